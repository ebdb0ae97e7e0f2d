"""Classification of Fashion-MNIST by a ViT of 6 layers, as three blocks of two.

    apt install dataset-fashion-mnist                                         # the data
    python -m dbjax.prepare --what=fashion_mnist --source=/usr/share/datasets/fashion-mnist
    python -m dbjax.main --config=configs/fashion_classify.py --workdir=DIR   # three blocks
    python -m dbjax.main --config=configs/fashion_classify.py --workdir=DIR2 \
        --config.task.end_to_end=True                                         # an ordinary ViT
    python -m dbjax.evaluate --workdir=DIR                                    # accuracy

(elsewhere: tfds build fashion_mnist --file_format=array_record). 16 patches of 7 x 7, two epochs:
made for 2 CPU cores. To expect in the mean of three seeds (python -m dbjax.bench evidence): an
accuracy of 0.814, and 0.827 end to end. configs/fashion_classify.py:small trains in a minute.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(dict(
      num_blocks=3,
      task=dict(name="classify", crop=2),
      data=dict(name="fashion_mnist", image_size=28, channels=1, num_classes=10),
      model=dict(num_layers=6, width=96, num_heads=4, patch_size=7, dropout=0.1, unroll=6),
      optimizer=dict(learning_rate=0.003, weight_decay=0.05),
      train=dict(batch_size=128, ema_decay=0.998),
      checkpoint=dict(every_steps=500), log=dict(every_steps=50),
      sample=dict(batch_size=500), evaluate=dict(num_samples=10_000),
  ))


VARIANTS = dict(small=dict(
    model=dict(num_layers=3, width=64, num_heads=2),
    optimizer=dict(warmup_steps=20),
    train=dict(num_steps=300, batch_size=64),
    evaluate=dict(num_samples=1000),
))
