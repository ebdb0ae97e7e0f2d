"""Classification of the handwritten digits of scikit-learn by a ViT, block by block.

    python -m dbjax.main --config=configs/digits_classify.py --workdir=DIR
    python -m dbjax.main --config=configs/digits_classify.py --workdir=DIR2 \
        --config.task.end_to_end=True                                     # an ordinary ViT
    python -m dbjax.evaluate --workdir=DIR

A minute or two on 2 CPU cores.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(dict(
      num_blocks=3,
      task=dict(name="classify", crop=1),
      data=dict(name="digits", image_size=8, channels=1, num_classes=10),
      model=dict(num_layers=6, width=64, num_heads=4, patch_size=2, embedding_width=64,
                 dropout=0.1, unroll=6),
      optimizer=dict(learning_rate=0.002, warmup_steps=50, weight_decay=0.05),
      train=dict(num_steps=1500, ema_decay=0.995),
      checkpoint=dict(every_steps=500),
      sample=dict(batch_size=500), evaluate=dict(num_samples=10_000),
  ))
