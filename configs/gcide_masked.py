r"""Masked diffusion of the characters of a dictionary (GCIDE): 6 layers as three blocks.

    apt install dict-gcide                                                    # the text
    zcat /usr/share/dictd/gcide.dict.dz | iconv -c -f UTF-8 -t UTF-8 \
      | sed 's/\[1913 Webster\]//g' > gcide.txt
    python -m dbjax.prepare --what=text --source=gcide.txt --name=gcide_chars \
        --tokenizer=text8 --normalize=text8 --length=256
    python -m dbjax.main --config=configs/gcide_masked.py --workdir=DIR       # three blocks
    python -m dbjax.main --config=configs/gcide_masked.py --workdir=DIR2 --config.num_blocks=1
    python -m dbjax.evaluate --workdir=DIR                                    # bits per character

A network for 2 CPU cores. To expect in the mean of three seeds (python -m dbjax.bench evidence):
3.67 bits per character, and 3.82 with B = 1. These are not figures of text8: another text.
configs/gcide_masked.py:small is smaller still.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(dict(
      num_blocks=3,
      task=dict(name="masked"),
      data=dict(name="gcide_chars", vocab_size=27, tokenizer="text8"),
      model=dict(num_layers=6, width=128, num_heads=4, unroll=6),
      optimizer=dict(learning_rate=0.002, weight_decay=0.03),
      train=dict(batch_size=8, ema_decay=0.998),
      checkpoint=dict(every_steps=500), log=dict(every_steps=50),
      sample=dict(num_steps=120, batch_size=50),
  ))


VARIANTS = dict(small=dict(
    model=dict(num_layers=3, width=64, num_heads=2),
    train=dict(num_steps=300),
    sample=dict(num_steps=30), evaluate=dict(num_samples=100),
))
