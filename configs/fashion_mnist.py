"""DiffusionBlocks on Fashion-MNIST: 60,000 grey images of 28 x 28, 6 layers as three blocks.

    apt install dataset-fashion-mnist                                         # the data
    python -m dbjax.prepare --what=fashion_mnist --source=/usr/share/datasets/fashion-mnist
    python -m dbjax.main --config=configs/fashion_mnist.py --workdir=...      # three blocks

(elsewhere: tfds build fashion_mnist --file_format=array_record). A DiT of width 128 on 16
patches of 7 x 7, made for 2 CPU cores: about six minutes of one. To expect after it: a Frechet
distance (pixels) of 12.3, and of 18.2 with --config.num_blocks=1, in the mean of three seeds
(python -m dbjax.bench evidence). configs/fashion_mnist.py:small trains in a minute; after :new, of
newer parts, they are 8.14, and 9.18 with --config.num_blocks=1.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(dict(
      num_blocks=3, sigma_data=0.7,
      task=dict(name="image"),
      data=dict(name="fashion_mnist", image_size=28, channels=1, num_classes=10),
      model=dict(num_layers=6, width=128, num_heads=4, patch_size=7, unroll=6),
      optimizer=dict(learning_rate=0.004),
      train=dict(num_steps=2000, ema_decay=0.998),
      checkpoint=dict(every_steps=500), log=dict(every_steps=50),
      sample=dict(guidance=2.0), evaluate=dict(num_samples=2000),
  ))


VARIANTS = dict(
    small=dict(
        model=dict(num_layers=3, width=64, num_heads=2),
        train=dict(num_steps=300),
        sample=dict(num_steps=20), evaluate=dict(num_samples=500)),
    # Newer parts of a network, Muon, half batches, and more very high and very low noise.
    new=dict(
        schedule=dict(P_std=1.4),
        model=dict(norm="rms", mlp="swiglu", qk_norm=True, rotary="fixed"),
        optimizer=dict(name="muon", learning_rate=0.003),
        train=dict(batch_size=32, num_steps=4000, ema_decay=0.999)),
)
