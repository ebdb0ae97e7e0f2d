"""DiffusionBlocks on CIFAR-10: a DiT-S/2 of 12 layers as three blocks of four.

    tfds build cifar10 --file_format=array_record                       # the data
    python -m dbjax.main --config=configs/cifar10.py --workdir=...      # three blocks
    python -m dbjax.main --config=configs/cifar10.py --config.num_blocks=1 --workdir=...

The paper's setting (arXiv 2506.14202): 100 epochs of batch 512, AdamW 1e-4. Its FID, to
the training and the test images: 30.59 and 37.20, end to end 32.84 and 39.83 (the paper's
figures; not trained by us). configs/cifar10.py:small is the same on a CPU, in minutes.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(dict(
      num_blocks=3,
      task=dict(name="image", flip=True),
      data=dict(name="cifar10", image_size=32, num_classes=10),
      model=dict(name="DiT-S/2", dtype="bfloat16"),
      optimizer=dict(learning_rate=0.0001, schedule="constant", warmup_steps=0),
      train=dict(num_steps=9766, batch_size=512),
      sample=dict(every_steps=2000, guidance=2.0), evaluate=dict(num_samples=50_000),
  ))


VARIANTS = dict(small=dict(
    model=dict(name="", num_layers=3, width=64, num_heads=2, patch_size=4, dtype="float32"),
    optimizer=dict(learning_rate=0.001),
    train=dict(num_steps=300, batch_size=32),
    checkpoint=dict(every_steps=100), log=dict(every_steps=20),
    sample=dict(num_steps=20, every_steps=0), evaluate=dict(num_samples=500),
))
