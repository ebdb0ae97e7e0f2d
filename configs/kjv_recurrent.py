"""Recurrent-depth text: the King James Bible, by Huginn in small, in one pass.

    (the text: see configs/kjv.py)
    python -m dbjax.main --config=configs/kjv_recurrent.py --workdir=DIR        # one pass
    python -m dbjax.main --config=configs/kjv_recurrent.py --workdir=DIR2 \
        --config.task.end_to_end=True                                   # Huginn itself
    python -m dbjax.evaluate --workdir=DIR --judge=DIR2

A layer of prelude, two of core, one of coda: for 2 CPU cores. configs/kjv_recurrent.py:small
is smaller still.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(dict(
      num_blocks=1,
      task=dict(name="recurrent", backprop=4, iterations=8),
      data=dict(name="kjv_1k", length=128, vocab_size=1000, tokenizer="sentencepiece-ecb7f48c",
                eos=1),
      model=dict(num_layers=4, width=128, num_heads=4, prelude=1, coda=1, unroll=4),
      optimizer=dict(learning_rate=0.002, weight_decay=0.1),
      train=dict(num_steps=500, batch_size=16, ema_decay=0.998),
      checkpoint=dict(every_steps=500), log=dict(every_steps=50),
      sample=dict(batch_size=50), evaluate=dict(num_samples=100),
  ))


VARIANTS = dict(small=dict(
    task=dict(backprop=2, iterations=4),
    model=dict(num_layers=3, width=64, num_heads=2, embedding_width=64),
    train=dict(num_steps=200, batch_size=8),
    sample=dict(num_steps=4), evaluate=dict(num_samples=20),
))
