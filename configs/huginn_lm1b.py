"""Recurrent-depth text: Huginn on LM1B, trained in one pass instead of 32.

    (the text and its tokenizer: see configs/lm1b.py)
    python -m dbjax.main --config=configs/huginn_lm1b.py --workdir=DIR \
        --config.data.tokenizer=sentencepiece-...                       # one pass
    python -m dbjax.main --config=configs/huginn_lm1b.py --workdir=DIR2 \
        --config.data.tokenizer=sentencepiece-... \
        --config.task.end_to_end=True                                   # Huginn itself
    python -m dbjax.evaluate --workdir=DIR --judge=DIR2

2 layers of prelude, 4 of core, 2 of coda: nothing is split. The paper's setting (arXiv
2506.14202), but for the noise, for an accelerator. Its MAUVE: 0.70 with a tenth of the compute,
Huginn itself 0.49 (the paper's figures; not trained by us, and MAUVE is not in
dbjax.evaluate). The number of steps, the constant learning rate, weight decay and clipping
are ours. configs/huginn_lm1b.py:small runs on a CPU, in minutes, to see that it does; it
learns little.
"""

import ml_collections


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0

  config.num_blocks = 1  # the core is not split
  config.layers_per_block = ()
  config.sigma_data = 0.5  # of an embedding of unit norm: see dbjax/targets.py

  config.task = dict(
      name="recurrent",
      iterations=32, backprop=8,  # end to end: runs on average, and those with gradients
      end_to_end=False,  # Huginn itself: the core runs over and over
      likelihood=True,  # of z is added to logits: blocks need not learn to read it
      weight="none",  # of the cross-entropy; or "edm", "edm_batch_mean" (the authors' code)
      embedding="random",  # of the tokens; or a file .npy
      shared_embeddings=False,  # True: learned, as the paper has it
  )
  config.data = dict(
      name="lm1b_llama", length=256, vocab_size=32_000, eos=2,
      tokenizer="sentencepiece-........",  # of your tokenizer.model: dbjax.prepare prints it
      dir="", train="train", held_out="test", feature="tokens", workers=4,
  )

  config.schedule = dict(
      # Centred where a unit vector is hard to read: below 0.24 it is plain. The paper's:
      # P_mean=-1.2, P_std=1.2, sigma_min=0.002, sigma_max=80.
      P_mean=0.0, P_std=1.0, sigma_min=0.25, sigma_max=10.0,
      partition="equal_mass",
      gamma=0.1,
  )

  config.model = dict(
      num_layers=8,  # prelude, core and coda
      prelude=2,
      coda=2,
      width=512,
      num_heads=8,
      embedding_width=512,
      mlp_ratio=8 / 3,
      dtype="bfloat16",
      remat=False,
      unroll=1,
  )

  config.optimizer = dict(
      learning_rate=3e-4, schedule="constant", warmup_steps=2500,
      b1=0.9, b2=0.99, weight_decay=0.1, clip_norm=1.0,
  )

  config.train = dict(
      num_steps=150_000,  # optimizer steps of each block
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
      solver="ancestral",  # or "euler", the paper's, with D from logits by this bridge:
      bridge="soft", top_k=5,  # or "normalized", "hard", "top_k"
      grid="equal_mass", num_steps=32, temperature=1.0, batch_size=100,
      every_steps=0,
  )
  config.evaluate = dict(num_samples=1000)

  if variant == "small":
    config.model.update(num_layers=3, prelude=1, coda=1, width=64, num_heads=2, embedding_width=64,
                        dtype="float32")
    config.task.update(iterations=8, backprop=4)
    config.data.workers = 0
    config.train.update(num_steps=100, batch_size=4, ema_decay=0.998)
    config.optimizer.update(learning_rate=2e-3, warmup_steps=20)
    config.checkpoint.every_steps = 50
    config.log.every_steps = 20
    config.sample.update(num_steps=8, batch_size=20)
    config.evaluate.num_samples = 20
  elif variant:
    raise ValueError(f"{variant!r}: there is only the variant small")
  return config
