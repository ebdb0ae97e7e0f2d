"""Autoregressive text: the King James Bible in 1,000 word pieces, 4 layers as two blocks.

    apt install bible-kjv bible-kjv-text                                      # the text
    bible -f gen1:1-rev22:21 | sed 's/^[^ ]* //' > kjv.txt
    python -m dbjax.prepare --what=text --source=kjv.txt --name=kjv_1k --length=128 \
        --tokenizer=sentencepiece --vocab_size=1000 --documents=line
    python -m dbjax.main --config=configs/kjv.py --workdir=DIR                # two blocks
    python -m dbjax.main --config=configs/kjv.py --workdir=DIR2 \
        --config.task.end_to_end=True                                 # predicts the next token
    python -m dbjax.evaluate --workdir=DIR --judge=DIR2

A network for 2 CPU cores. To expect in the mean of three seeds (python -m dbjax.bench evidence): a
bound of 3.57 nats per token; end to end has 3.48. configs/kjv.py:small is smaller still.
"""

import ml_collections


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0

  config.num_blocks = 2
  config.layers_per_block = ()  # () is an even split; or by hand, as in (1, 3)
  config.sigma_data = 0.5  # of an embedding of unit norm: see dbjax/targets.py

  config.task = dict(
      name="autoregressive",
      end_to_end=False,  # the same network, plainly: one block that predicts the next token
      likelihood=True,  # of z is added to logits: blocks need not learn to read it
      weight="none",  # of the cross-entropy; or "edm", "edm_batch_mean" (the authors' code)
      embedding="random",  # of the tokens; or "pmi", or a file .npy
      shared_embeddings=False,  # True: learned by all blocks together, as the paper has it
  )
  config.data = dict(
      name="kjv_1k", length=128, vocab_size=1000, tokenizer="sentencepiece-ecb7f48c", eos=1,
      dir="", train="train", held_out="test", feature="tokens", workers=0,
  )

  config.schedule = dict(
      # Unit vectors are hard to read from sigma 0.24 to 1; the paper has -1.2, 1.2, 0.002, 80.
      P_mean=0.0, P_std=1.0, sigma_min=0.25, sigma_max=10.0,
      partition="equal_mass",
      gamma=0.1,
  )

  config.model = dict(
      num_layers=4,
      width=128,
      num_heads=4,
      embedding_width=128,
      mlp_ratio=8 / 3,
      dtype="float32",
      remat=False,
      unroll=4,
  )

  config.optimizer = dict(
      learning_rate=2e-3, schedule="cosine", warmup_steps=100,
      b1=0.9, b2=0.99, weight_decay=0.1, clip_norm=1.0,
  )

  config.train = dict(
      num_steps=500,  # optimizer steps of each block
      batch_size=16,
      accumulate=1,
      ema_decay=0.998,
      blocks=(),
      turn="all",
  )
  config.mesh = dict(block=1, data=-1, fsdp=1)
  config.checkpoint = dict(every_steps=500, keep=2)
  config.log = dict(every_steps=50)
  config.sample = dict(
      solver="ancestral",  # or "euler", the paper's, with D from logits by this bridge:
      bridge="soft", top_k=5,  # or "normalized", "hard", "top_k"
      grid="equal_mass", num_steps=8, temperature=1.0, batch_size=50,
      every_steps=0,
  )
  config.evaluate = dict(num_samples=100)

  if variant == "small":
    config.model.update(num_layers=2, width=64, num_heads=2, embedding_width=64)
    config.train.update(num_steps=200, batch_size=8)
    config.sample.num_steps = 4
    config.evaluate.num_samples = 20
  elif variant:
    raise ValueError(f"{variant!r}: there is only the variant small")
  return config
