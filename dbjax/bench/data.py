"""Does the input keep up? Images per second of the input pipeline, against those of a step.

Reads a stand-in for ImageNet at 64 x 64 (random pixels, the hardest PNGs there are) through
TFDS's format, as configs/imagenet64.py does, and trains its small variant; each alone on the
machine, in turns.
"""

import argparse
import io
import tempfile
import time

import numpy as np
from PIL import Image

from dbjax import config as config_lib
from dbjax import data
from dbjax import prepare
from dbjax.bench import race
from dbjax.bench.step import stepper
from dbjax.data import tfds
from dbjax.sources import Source


def stand_in(directory: str, total: int) -> None:
  """Writes a data set `stand_in` like imagenet_resized/64x64, with one split of random images."""
  from tensorflow_datasets import features as types  # pylint: disable=g-import-not-at-top

  rng = np.random.default_rng(0)

  def examples():
    for _ in range(total):
      file = io.BytesIO()
      Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(file, "PNG")
      file.seek(0)
      yield dict(image=file, label=int(rng.integers(1000)))

  features = types.FeaturesDict(dict(
      image=types.Image(shape=(64, 64, 3)), label=types.ClassLabel(num_classes=1000)))
  prepare.write(directory, "stand_in", Source(features, dict(train=examples())))


def main(argv: list[str]):
  parser = argparse.ArgumentParser(prog="python -m dbjax.bench data", description=__doc__)
  parser.add_argument("--images", type=int, default=4000)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--workers", type=int, default=0, help="processes that decode; 0: threads")
  args = parser.parse_args(argv)
  config = config_lib.resolve(config_lib.read("imagenet64:small"))
  size = config.train.batch_size
  race.at_least(args, images=2 * size, rounds=1, workers=0)  # the first batch is not timed

  with tempfile.TemporaryDirectory() as directory:
    stand_in(directory, args.images)
    records = tfds.read_split("stand_in", "train", directory, 64, keep=False)
    dataset, num_steps = data.Dataset(records, records), args.images // size
    take = stepper(config, dataset.batch(0, 0, size))
    rates: dict[str, list[float]] = {"input": [], "step": []}
    for n in range(args.rounds):
      stream = dataset.stream(0, range(n * num_steps, (n + 1) * num_steps), size,
                              workers=args.workers)
      next(stream)
      begin = time.perf_counter()
      total = sum(len(b["label"]) for b in stream)
      rates["input"].append(total / (time.perf_counter() - begin))
      rates["step"].append(20 * size / take(20))
  for name, rate in rates.items():
    print(f"{name:6} median {np.median(rate):7.0f} images/s  ({min(rate):.0f} to {max(rate):.0f})")
  print(f"ratio  {np.median(rates['input']) / np.median(rates['step']):.2f}")
