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


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(dict(
      num_blocks=4,
      task=dict(name="image", flip=True),
      data=dict(name="imagenet_resized/64x64", image_size=64, num_classes=1000,
                held_out="validation", workers=8),
      model=dict(name="DiT-B/4", dtype="bfloat16"),
      optimizer=dict(learning_rate=0.0001, schedule="constant", warmup_steps=5000),
      train=dict(num_steps=100_000, batch_size=1024, ema_decay=0.9999),
      checkpoint=dict(every_steps=5000),
      sample=dict(every_steps=10_000, guidance=2.0), evaluate=dict(num_samples=10_000),
  ))


VARIANTS = dict(small=dict(
    data=dict(workers=0),
    model=dict(name="", num_layers=4, width=64, num_heads=2, patch_size=8, dtype="float32"),
    optimizer=dict(learning_rate=0.001, warmup_steps=20),
    train=dict(num_steps=200, batch_size=16),
    checkpoint=dict(every_steps=100), log=dict(every_steps=20),
    sample=dict(num_steps=20, every_steps=0), evaluate=dict(num_samples=200),
))
