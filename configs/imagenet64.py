"""DiffusionBlocks on ImageNet at 64 x 64: a DiT-B/4 of 12 layers as four blocks of three.

    tfds build imagenet_resized/64x64 --file_format=array_record              # the data
    python -m dbjax.plan --config=configs/imagenet64.py --topology=v5e:4x4    # will it fit
    python -m dbjax.main --config=configs/imagenet64.py --workdir=gs://...    # train

All four blocks at once, each on its own quarter of a pod: --config.mesh.block=4. Not
trained by us yet; learning rate, batch and schedule follow the DiT paper (arXiv
2212.09748) and EDM (arXiv 2206.00364), the rest the DiffusionBlocks paper. About 80
epochs a block. configs/imagenet64.py:small is the same on a CPU, in minutes, to see that
it runs; it learns little.
"""

import ml_collections
from ml_collections import config_dict


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0

  config.num_blocks = 4
  config.layers_per_block = ()  # () is an even split; or by hand, as in (2, 2, 4, 4)
  config.sigma_data = 0.5

  config.task = dict(name="image", label_drop=0.1, flip=True)
  config.data = dict(
      name="imagenet_resized/64x64", image_size=64, channels=3, num_classes=1000,
      dir="", train="train", held_out="validation", feature="image", workers=8,
  )

  config.schedule = dict(
      P_mean=-1.2, P_std=1.2, sigma_min=0.002, sigma_max=80.0,
      partition="equal_mass",
      gamma=0.05,
  )

  config.model = dict(
      name="DiT-B/4",
      num_layers=config_dict.placeholder(int),
      width=config_dict.placeholder(int),
      num_heads=config_dict.placeholder(int),
      patch_size=config_dict.placeholder(int),
      mlp_ratio=4.0,
      dtype="bfloat16",
      remat=False,
      unroll=1,
  )

  config.optimizer = dict(
      learning_rate=1e-4, schedule="constant", warmup_steps=5000,
      b1=0.9, b2=0.99, weight_decay=0.01, clip_norm=1.0,
  )

  config.train = dict(
      num_steps=100_000,  # optimizer steps of each block
      batch_size=1024,
      accumulate=1,
      ema_decay=0.9999,
      blocks=(),
      turn="all",
  )
  config.mesh = dict(block=1, data=-1, fsdp=1)
  config.checkpoint = dict(every_steps=5000, keep=2)
  config.log = dict(every_steps=100)
  config.sample = dict(
      solver="euler", grid="karras", num_steps=50, guidance=2.0, batch_size=100,
      every_steps=10_000,
  )
  config.evaluate = dict(num_samples=10_000)

  if variant == "small":
    config.model.update(name="DiT", num_layers=4, width=64, num_heads=2, patch_size=8)
    config.model.dtype = "float32"
    config.data.workers = 0
    config.train.update(num_steps=200, batch_size=16)
    config.optimizer.update(learning_rate=1e-3, warmup_steps=20)
    config.checkpoint.every_steps = 100
    config.log.every_steps = 20
    config.sample.update(num_steps=20, every_steps=0)
    config.evaluate.num_samples = 200
  elif variant:
    raise ValueError(f"{variant!r}: there is only the variant small")
  return config
