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


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(dict(
      num_blocks=4,
      task=dict(name="autoregressive"),
      data=dict(name="openwebtext_llama", length=3072, vocab_size=32_000,
                tokenizer="sentencepiece-........", eos=2, workers=8),
      model=dict(num_layers=12, width=768, num_heads=12, embedding_width=768, dtype="bfloat16",
                 remat=True),
      optimizer=dict(learning_rate=0.0003, schedule="constant", warmup_steps=2500,
                     weight_decay=0.1),
      train=dict(num_steps=60_000, batch_size=256, ema_decay=0.9999),
      checkpoint=dict(every_steps=2000),
      sample=dict(num_steps=0, batch_size=20),
  ))


VARIANTS = dict(small=dict(
    data=dict(workers=0),
    model=dict(num_layers=4, width=64, num_heads=2, embedding_width=64, dtype="float32"),
    optimizer=dict(learning_rate=0.002, warmup_steps=5),
    train=dict(num_steps=20, batch_size=2, ema_decay=0.998),
    checkpoint=dict(every_steps=10), log=dict(every_steps=5),
    sample=dict(num_steps=4, batch_size=2), evaluate=dict(num_samples=2),
))
