"""Benchmarks.

    python -m dbjax.bench all --quick     those of speed below, in a quarter of an hour on 2 cores
    python -m dbjax.bench step        training steps on CPU of four networks, against PyTorch's
    python -m dbjax.bench blocks      B blocks against end to end: a step of each, and samples
    python -m dbjax.bench loop        what data, metrics and checkpoints add to a step
    python -m dbjax.bench start       from a command to its first step
    python -m dbjax.bench memory      what a step needs, compiled for TPU chips and measured on CPU
    python -m dbjax.bench optimizers  what optimizers hold for each parameter, and what they make
    python -m dbjax.bench roofline    what bounds a block's step on a TPU chip, by its program
    python -m dbjax.bench scale       what a chip sends in a step, from 1 to 1,024 chips
    python -m dbjax.bench noise       which P_mean and P_std suit a set of images
    python -m dbjax.bench sampling    what guidance, a weaker guide and churn make of trained models
    python -m dbjax.bench guard       what passing over bad batches costs a step
    python -m dbjax.bench data        the input pipeline against a step
    python -m dbjax.bench inception   the features of FID against torchvision's and pytorch-fid's
    python -m dbjax.bench evidence    DiffusionBlocks against end to end, over seeds
    python -m dbjax.bench tradeoff    the same, against the memory that each model's step needs
    python -m dbjax.bench finetune    next tokens: blocks trained further on what the others make

Competitors take turns, and ratios are of neighbours; roofline, scale and what memory compiles need
libtpu, no TPU. With --json=FILE all but the last six add a line to FILE for each table, with the
machine and the versions.
"""

import importlib.util
import subprocess
import sys

from dbjax import cli
from dbjax import startup
from dbjax.bench import blocks
from dbjax.bench import data
from dbjax.bench import evidence
from dbjax.bench import finetune
from dbjax.bench import guard
from dbjax.bench import inception
from dbjax.bench import loop
from dbjax.bench import memory
from dbjax.bench import noise
from dbjax.bench import optimizers
from dbjax.bench import roofline
from dbjax.bench import sampling
from dbjax.bench import scale
from dbjax.bench import start
from dbjax.bench import step
from dbjax.bench import tradeoff
from dbjax.errors import UserError

BENCHMARKS = {"blocks": blocks.main, "data": data.main, "evidence": evidence.main,
              "finetune": finetune.main, "guard": guard.main, "inception": inception.main,
              "loop": loop.main, "memory": memory.main, "noise": noise.main,
              "optimizers": optimizers.main, "roofline": roofline.main,
              "sampling": sampling.main, "scale": scale.main,
              "start": start.main, "step": step.main, "tradeoff": tradeoff.main}
SPEED = ("step", "blocks", "loop", "start")


def run_all(arguments: list[str]):
  """The benchmarks of speed, one after the other, each in a process of its own."""
  for part in SPEED:
    if part == "step" and importlib.util.find_spec("torch") is None:
      print("step: left out, for want of PyTorch: .venv/bin/pip install -e '.[bench]'")
      continue
    code = subprocess.run([sys.executable, "-m", "dbjax.bench", part, *arguments]).returncode
    if code:
      sys.exit(code)


if __name__ == "__main__":
  name = sys.argv[1] if len(sys.argv) > 1 else "--help"
  if name in ("-h", "--help"):
    print(__doc__.strip())
  else:
    startup.prepare()
    with cli.one_line_errors():
      if name == "all":
        run_all(sys.argv[2:])
      elif name not in BENCHMARKS:
        raise UserError(f"no benchmark {name!r}: expected one of all, {', '.join(BENCHMARKS)}")
      else:
        BENCHMARKS[name](sys.argv[2:])
