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


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(dict(
      num_blocks=1,
      task=dict(name="recurrent"),
      data=dict(name="lm1b_llama", vocab_size=32_000, tokenizer="sentencepiece-........", eos=2,
                workers=4),
      model=dict(num_layers=8, width=512, num_heads=8, embedding_width=512, prelude=2, coda=2,
                 dtype="bfloat16"),
      optimizer=dict(learning_rate=0.0003, schedule="constant", warmup_steps=2500,
                     weight_decay=0.1),
      train=dict(num_steps=150_000, batch_size=256, ema_decay=0.9999),
      checkpoint=dict(every_steps=5000),
      sample=dict(num_steps=32),
  ))


VARIANTS = dict(small=dict(
    task=dict(backprop=4, iterations=8),
    data=dict(workers=0),
    model=dict(num_layers=3, width=64, num_heads=2, embedding_width=64, prelude=1, coda=1,
               dtype="float32"),
    optimizer=dict(learning_rate=0.002, warmup_steps=20),
    train=dict(num_steps=100, batch_size=4, ema_decay=0.998),
    checkpoint=dict(every_steps=50), log=dict(every_steps=20),
    sample=dict(num_steps=8, batch_size=20), evaluate=dict(num_samples=20),
))
