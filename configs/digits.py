"""DiffusionBlocks on the handwritten digits of scikit-learn: 1,797 images of 8x8, bundled.

    bash launch/local.sh                                                    # three blocks
    bash launch/local.sh --config.num_blocks=1 --workdir=.runs/end_to_end   # the baseline

Each trains, samples and scores, in two to five minutes on 2 CPU cores. Expected of 1,500
samples, over seeds 0, 1, 2 (python -m dbjax.bench evidence --only='^digits, 6 layers, B'):
accuracy 0.97 to 0.98 and Frechet distance 0.23 to 0.29 without guidance, accuracy 1.000 with
guidance 2. Of newer parts (configs/digits.py:new) 0.14 to 0.18.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(dict(
      num_blocks=3, sigma_data=0.75,
      task=dict(name="image"),
      data=dict(name="digits", image_size=8, channels=1, num_classes=10),
      model=dict(name="DiT-Ti/2", unroll=6),
      optimizer=dict(learning_rate=0.002, warmup_steps=50),
      train=dict(num_steps=1500, ema_decay=0.995),
      checkpoint=dict(every_steps=500),
      sample=dict(batch_size=500, every_steps=500), evaluate=dict(num_samples=1500),
  ))


# Newer parts of a network, Muon, and a solver of second order: see RESULTS.md.
VARIANTS = dict(new=dict(
    model=dict(norm="rms", mlp="swiglu", qk_norm=True, rotary="fixed"),
    optimizer=dict(name="muon"), sample=dict(solver="dpmpp_2m"),
))
