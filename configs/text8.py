"""Masked diffusion of the characters of text8 (MD4): 12 layers as three blocks of four.

    wget http://mattmahoney.net/dc/text8.zip && unzip text8.zip         # the text
    python -m dbjax.prepare --what=text --source=text8 --name=text8 \
        --tokenizer=text8 --length=256 --held_out=0.1
    python -m dbjax.main --config=configs/text8.py --workdir=DIR        # three blocks
    python -m dbjax.main --config=configs/text8.py --workdir=DIR2 --config.num_blocks=1
    python -m dbjax.evaluate --workdir=DIR                              # bits per character

Figures of text8 are those of its last 5 million characters, after training on the first 90; the
5 between are for validation. Here --held_out=0.1 makes a split train of 90 million and a split
test of the last 10, of which data.held_out is the second half (the first is test[:50%]).

The paper's setting (arXiv 2506.14202), 100 epochs of batch 256, for an accelerator. Its bits per
character: 1.45, end to end 1.56 (the paper's figures; not trained by us). Both are of small
runs: MD4's own figure (arXiv 2406.04329) is no baseline for them. configs/text8.py:small
runs on a CPU, in minutes, to see that it does; it learns little.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(dict(
      num_blocks=3,
      task=dict(name="masked"),
      data=dict(name="text8", vocab_size=27, tokenizer="text8", held_out="test[50%:]"),
      model=dict(num_layers=12, width=768, num_heads=12, dtype="bfloat16"),
      optimizer=dict(learning_rate=0.0003, warmup_steps=2000, weight_decay=0.03),
      train=dict(num_steps=137_329, batch_size=256, ema_decay=0.9999),
      checkpoint=dict(every_steps=5000), evaluate=dict(num_samples=2000),
  ))


VARIANTS = dict(small=dict(
    model=dict(num_layers=3, width=64, num_heads=2, dtype="float32"),
    optimizer=dict(learning_rate=0.002, warmup_steps=20),
    train=dict(num_steps=300, batch_size=8, ema_decay=0.998),
    checkpoint=dict(every_steps=100), log=dict(every_steps=20),
    sample=dict(num_steps=30, batch_size=50), evaluate=dict(num_samples=100),
))
