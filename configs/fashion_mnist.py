"""DiffusionBlocks on Fashion-MNIST: 60,000 grey images of 28 x 28, 6 layers as three blocks.

    apt install dataset-fashion-mnist                                         # the data
    python -m dbjax.prepare --what=fashion_mnist --source=/usr/share/datasets/fashion-mnist
    python -m dbjax.main --config=configs/fashion_mnist.py --workdir=...      # three blocks

(elsewhere: tfds build fashion_mnist --file_format=array_record). A DiT of width 128 on 16
patches of 7 x 7, made for 2 CPU cores: about six minutes of one. To expect after it: a Frechet
distance (pixels) of 12.3, and of 18.2 with --config.num_blocks=1, in the mean of three seeds
(python -m dbjax.bench evidence). configs/fashion_mnist.py:small trains in a minute.
"""

import ml_collections


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0

  config.num_blocks = 3
  config.layers_per_block = ()  # () is an even split; or by hand, as in (2, 2, 4, 4)
  config.sigma_data = 0.7  # measured

  config.task = dict(name="image", label_drop=0.1, flip=False)
  config.data = dict(
      name="fashion_mnist", image_size=28, channels=1, num_classes=10,
      dir="", train="train", held_out="test", feature="image", workers=0,
  )

  config.schedule = dict(
      P_mean=-1.2, P_std=1.2, sigma_min=0.002, sigma_max=80.0,
      partition="equal_mass",
      gamma=0.05,
  )

  config.model = dict(
      name="DiT",
      num_layers=6,
      width=128,
      num_heads=4,
      patch_size=7,
      mlp_ratio=4.0,
      dtype="float32",
      remat=False,
      unroll=6,
  )

  config.optimizer = dict(
      learning_rate=4e-3, schedule="cosine", warmup_steps=100,
      b1=0.9, b2=0.99, weight_decay=0.01, clip_norm=1.0,
  )

  config.train = dict(
      num_steps=2000,  # optimizer steps of each block
      batch_size=64,
      accumulate=1,
      ema_decay=0.998,
      blocks=(),
      turn="all",
  )
  config.mesh = dict(block=1, data=-1, fsdp=1)
  config.checkpoint = dict(every_steps=500, keep=2)
  config.log = dict(every_steps=50)
  config.sample = dict(
      solver="euler", grid="karras", num_steps=50, guidance=2.0, batch_size=100,
      every_steps=0,
  )
  config.evaluate = dict(num_samples=2000)

  if variant == "small":
    config.model.update(num_layers=3, width=64, num_heads=2)
    config.train.num_steps = 300
    config.sample.num_steps = 20
    config.evaluate.num_samples = 500
  elif variant:
    raise ValueError(f"{variant!r}: there is only the variant small")
  return config
