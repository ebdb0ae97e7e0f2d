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


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(dict(
      num_blocks=2,
      task=dict(name="autoregressive"),
      data=dict(name="kjv_1k", length=128, vocab_size=1000, tokenizer="sentencepiece-ecb7f48c",
                eos=1),
      model=dict(num_layers=4, width=128, num_heads=4, unroll=4),
      optimizer=dict(learning_rate=0.002, weight_decay=0.1),
      train=dict(num_steps=500, batch_size=16, ema_decay=0.998),
      checkpoint=dict(every_steps=500), log=dict(every_steps=50),
      sample=dict(batch_size=50), evaluate=dict(num_samples=100),
  ))


VARIANTS = dict(small=dict(
    model=dict(num_layers=2, width=64, num_heads=2, embedding_width=64),
    train=dict(num_steps=200, batch_size=8),
    sample=dict(num_steps=4), evaluate=dict(num_samples=20),
))
