"""DiffusionBlocks on clip art of Debian: 6,000 drawings in colour, 32 x 32, 6 layers as 3 blocks.

    apt install openclipart-png                                             # the data
    python -m dbjax.prepare --what=folder --source=/usr/share/openclipart/png --name=openclipart \\
        --image_size=32 --held_out=0.1 --skip='unsorted,buttons,stop_sign_*,microchip_v.2_*'
    python -m dbjax.main --config=configs/openclipart.py --workdir=...      # three blocks

A DiT of width 192 on 64 patches of 4 x 4, conditional on 20 classes of very different size. Half
the drawings are icons of computers or shapes. RESULTS.md has a narrower network after 40 epochs.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(dict(
      num_blocks=3, sigma_data=0.63,
      task=dict(name="image"),
      data=dict(name="openclipart", image_size=32, channels=3, num_classes=20),
      model=dict(num_layers=6, width=192, num_heads=6, patch_size=4, unroll=6,
                 norm="rms", mlp="swiglu", qk_norm=True, rotary="fixed"),
      optimizer=dict(name="muon", learning_rate=0.002),
      train=dict(num_steps=10000),
      sample=dict(guidance=2.0), evaluate=dict(num_samples=2000),
  ))


VARIANTS = dict(small=dict(
    model=dict(num_layers=3, width=64, num_heads=2),
    train=dict(num_steps=300), sample=dict(num_steps=20), evaluate=dict(num_samples=500),
))
