"""Classification of the handwritten digits of scikit-learn by a ViT, block by block.

    python -m dbjax.main --config=configs/digits_classify.py --workdir=DIR
    python -m dbjax.main --config=configs/digits_classify.py --workdir=DIR2 \
        --config.task.end_to_end=True                                     # an ordinary ViT
    python -m dbjax.evaluate --workdir=DIR

A minute or two on 2 CPU cores.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0

  config.num_blocks = 3
  config.layers_per_block = ()  # () is an even split; or by hand, as in (1, 2, 3)
  config.sigma_data = 0.5  # of an embedding of unit norm: see dbjax/targets.py

  config.task = dict(
      name="classify",
      end_to_end=False,  # the same network, plainly: one block, nothing noised
      weight="none",  # of the cross-entropy; or "edm", "edm_batch_mean" (the authors' code)
      embedding="random",  # of the labels; or a file .npy
      shared_embeddings=False,  # True: learned by all blocks together, as the paper has it
      flip=False, crop=1, rand_augment=0, magnitude=9,
  )
  config.data = dict(
      name="digits", image_size=8, channels=1, num_classes=10,
      dir="", train="train", held_out="test", feature="image", workers=0,
  )

  config.schedule = dict(
      # Centred where a unit vector is hard to read: below 0.24 it is plain.
      P_mean=0.7, P_std=1.0, sigma_min=0.2, sigma_max=20.0,
      partition="equal_mass",
      gamma=0.05,
  )

  config.model = dict(
      num_layers=6,
      width=64,
      num_heads=4,
      patch_size=2,
      embedding_width=64,
      mlp_ratio=4.0,
      dropout=0.1,
      dtype="float32",
      remat=False,
      unroll=6,
  )

  config.optimizer = dict(
      learning_rate=2e-3, schedule="cosine", warmup_steps=50,
      b1=0.9, b2=0.99, weight_decay=0.05, clip_norm=1.0,
  )

  config.train = dict(
      num_steps=1500,  # optimizer steps of each block
      batch_size=64,
      accumulate=1,
      ema_decay=0.995,
      blocks=(),
      turn="all",
  )
  config.mesh = dict(block=1, data=-1, fsdp=1)
  config.checkpoint = dict(every_steps=500, keep=2)
  config.log = dict(every_steps=100)
  config.sample = dict(
      bridge="soft", top_k=5,  # from logits to D; or "normalized", "hard", "top_k"
      solver="euler", grid="equal_mass", num_steps=0,  # 0: as many as blocks
      temperature=0.0, answer="mean",  # of all steps; the paper's: temperature=1.0, answer="last"
      batch_size=500, every_steps=0,
  )
  config.evaluate = dict(num_samples=10_000)
  return config
