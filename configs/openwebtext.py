"""Autoregressive text of 3,072 tokens: OpenWebText, 12 layers as four blocks of three.

    python -m dbjax.prepare --what=text --source=openwebtext --name=openwebtext_llama \
        --length=3072 --documents=file --held_out=0.0125 \
        --tokenizer=sentencepiece --model=tokenizer.model
    python -m dbjax.plan --config=configs/openwebtext.py --topology=v5e:4x4  # will it fit
    python -m dbjax.main --config=configs/openwebtext.py --workdir=gs://... \
        --config.data.tokenizer=sentencepiece-... --config.mesh.block=4     # four blocks
    python -m dbjax.main --config=configs/openwebtext.py --workdir=gs://... \
        --config.data.tokenizer=sentencepiece-... \
        --config.task.end_to_end=True                                   # predicts the next token
    python -m dbjax.evaluate --workdir=gs://... --judge=gs://...

TFDS has no such data set: openwebtext is a folder with its documents as files .txt, unpacked, of
which the last 100,000 or so are held out. As configs/lm1b.py, which says where tokenizer.model
and its name come from, but for the length: a step is 786,432 tokens, so it is for a pod, each
block on its own quarter of it (mesh.block=4). Where a row of the mesh has few devices, as many
parts of the batch as fit: --config.train.accumulate=8.

The paper's MAUVE (arXiv 2506.14202): 0.82, end to end 0.85 (the paper's figures; not trained by
us, and MAUVE is not in dbjax.evaluate). The number of steps, the constant learning rate, weight
decay and clipping are ours. configs/openwebtext.py:small runs on a CPU, slowly, to see that
it does; it learns little.
"""

import ml_collections


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0

  config.num_blocks = 4
  config.layers_per_block = ()  # () is an even split; or by hand, as in (1, 2, 3, 6)
  config.sigma_data = 0.5  # of an embedding of unit norm: see dbjax/targets.py

  config.task = dict(
      name="autoregressive",
      end_to_end=False,  # the same network, plainly: one block that predicts the next token
      likelihood=True,  # of z is added to logits: blocks need not learn to read it
      weight="none",  # of the cross-entropy; or "edm", "edm_batch_mean" (the authors' code)
      embedding="random",  # of the tokens; or a file .npy
      shared_embeddings=False,  # True: learned by all blocks together, as the paper has it
  )
  config.data = dict(
      name="openwebtext_llama", length=3072, vocab_size=32_000, eos=2,
      tokenizer="sentencepiece-........",  # of your tokenizer.model: dbjax.prepare prints it
      dir="", train="train", held_out="test", feature="tokens", workers=8,
  )

  config.schedule = dict(
      # Centred where a unit vector is hard to read: below 0.24 it is plain. The paper's:
      # P_mean=-1.2, P_std=1.2, sigma_min=0.002, sigma_max=80.
      P_mean=0.0, P_std=1.0, sigma_min=0.25, sigma_max=10.0,
      partition="equal_mass",
      gamma=0.1,
  )

  config.model = dict(
      num_layers=12,
      width=768,
      num_heads=12,
      embedding_width=768,
      mlp_ratio=8 / 3,
      dtype="bfloat16",
      remat=True,
      unroll=1,
  )

  config.optimizer = dict(
      learning_rate=3e-4, schedule="constant", warmup_steps=2500,
      b1=0.9, b2=0.99, weight_decay=0.1, clip_norm=1.0,
  )

  config.train = dict(
      num_steps=60_000,  # optimizer steps of each block
      batch_size=256,
      accumulate=1,
      ema_decay=0.9999,
      blocks=(),
      turn="all",
  )
  config.mesh = dict(block=1, data=-1, fsdp=1)  # block=4: all at once, on four rows of a pod
  config.checkpoint = dict(every_steps=2000, keep=2)
  config.log = dict(every_steps=100)
  config.sample = dict(
      solver="ancestral",  # or "euler", the paper's, with D from logits by this bridge:
      bridge="soft", top_k=5,  # or "normalized", "hard", "top_k"
      grid="equal_mass", num_steps=0,  # 0: as many as blocks
      temperature=1.0, batch_size=20, every_steps=0,
  )
  config.evaluate = dict(num_samples=1000)

  if variant == "small":
    config.model.update(num_layers=4, width=64, num_heads=2, embedding_width=64, dtype="float32")
    config.data.workers = 0
    config.train.update(num_steps=20, batch_size=2, ema_decay=0.998)
    config.optimizer.update(learning_rate=2e-3, warmup_steps=5)
    config.checkpoint.every_steps = 10
    config.log.every_steps = 5
    config.sample.update(num_steps=4, batch_size=2)
    config.evaluate.num_samples = 2
  elif variant:
    raise ValueError(f"{variant!r}: there is only the variant small")
  return config
