"""DiffusionBlocks on ImageNet at 256 x 256, in a VAE's latent space: a DiT-L/2 as three blocks.

    tfds build imagenet2012 --file_format=array_record       # from files that you download
    python -m dbjax.prepare --what=latents --source=imagenet2012 --name=imagenet2012_latent \
        --splits=train,validation --encode=my_vae:encode     # your VAE: 256 x 256 to 32 x 32 x 4
    python -m dbjax.main --config=configs/imagenet256_latent.py --workdir=gs://...

The paper's setting (arXiv 2506.14202): 24 layers in blocks of eight, AdamW 5e-5. Its FID, to
the training and the validation images: 9.00 and 10.63, end to end 9.01 and 12.09 (the
paper's figures; not trained by us). Scale the latents to a standard deviation of 0.5. Memory,
by dbjax.plan, is in the README. configs/imagenet256_latent.py:small runs on a CPU, in minutes.
"""

import ml_collections
from ml_collections import config_dict


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0

  config.num_blocks = 3
  config.layers_per_block = ()  # () is an even split; or by hand, as in (2, 2, 4, 4)
  config.sigma_data = 0.5

  config.task = dict(name="image", label_drop=0.1, flip=False)
  config.data = dict(
      name="imagenet2012_latent", image_size=32, channels=4, num_classes=1000,
      dir="", train="train", held_out="validation", feature="latent", workers=8,
  )

  config.schedule = dict(
      P_mean=-1.2, P_std=1.2, sigma_min=0.002, sigma_max=80.0,
      partition="equal_mass",
      gamma=0.05,
  )

  config.model = dict(
      name="DiT-L/2",
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
      learning_rate=5e-5, schedule="constant", warmup_steps=0,
      b1=0.9, b2=0.99, weight_decay=0.01, clip_norm=1.0,
  )

  config.train = dict(
      num_steps=400_000,  # optimizer steps of each block
      batch_size=256,
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
  config.evaluate = dict(num_samples=50_000)

  if variant == "small":
    config.model.update(name="DiT", num_layers=3, width=64, num_heads=2, patch_size=4)
    config.model.dtype = "float32"
    config.data.workers = 0
    config.train.update(num_steps=200, batch_size=16)
    config.optimizer.learning_rate = 1e-3
    config.checkpoint.every_steps = 100
    config.log.every_steps = 20
    config.sample.update(num_steps=20, every_steps=0)
    config.evaluate.num_samples = 200
  elif variant:
    raise ValueError(f"{variant!r}: there is only the variant small")
  return config
