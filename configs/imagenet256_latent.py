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


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(dict(
      num_blocks=3,
      task=dict(name="image"),
      data=dict(name="imagenet2012_latent", image_size=32, channels=4, num_classes=1000,
                feature="latent", held_out="validation", workers=8),
      model=dict(name="DiT-L/2", dtype="bfloat16"),
      optimizer=dict(learning_rate=5e-5, schedule="constant", warmup_steps=0),
      train=dict(num_steps=400_000, batch_size=256, ema_decay=0.9999),
      checkpoint=dict(every_steps=5000),
      sample=dict(every_steps=10_000, guidance=2.0), evaluate=dict(num_samples=50_000),
  ))


VARIANTS = dict(small=dict(
    data=dict(workers=0),
    model=dict(name="", num_layers=3, width=64, num_heads=2, patch_size=4, dtype="float32"),
    optimizer=dict(learning_rate=0.001),
    train=dict(num_steps=200, batch_size=16),
    checkpoint=dict(every_steps=100), log=dict(every_steps=20),
    sample=dict(num_steps=20, every_steps=0), evaluate=dict(num_samples=200),
))
