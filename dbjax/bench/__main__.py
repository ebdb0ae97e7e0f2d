"""Benchmarks.

    python -m dbjax.bench step        one block's training step on CPU against PyTorch's
    python -m dbjax.bench guard       what passing over bad batches costs a step
    python -m dbjax.bench data        the input pipeline against a step
    python -m dbjax.bench inception   the features of FID against torchvision's and pytorch-fid's
    python -m dbjax.bench evidence    DiffusionBlocks against end to end, over seeds
    python -m dbjax.bench finetune    next tokens: blocks trained further on what the others make
"""

import sys

from dbjax import cli
from dbjax import startup
from dbjax.bench import data
from dbjax.bench import evidence
from dbjax.bench import finetune
from dbjax.bench import guard
from dbjax.bench import inception
from dbjax.bench import step
from dbjax.errors import UserError

BENCHMARKS = {"data": data.main, "evidence": evidence.main, "finetune": finetune.main,
              "guard": guard.main, "inception": inception.main, "step": step.main}

if __name__ == "__main__":
  name = sys.argv[1] if len(sys.argv) > 1 else "--help"
  if name in ("-h", "--help"):
    print(__doc__.strip())
  else:
    startup.prepare()
    with cli.one_line_errors():
      if name not in BENCHMARKS:
        raise UserError(f"no benchmark {name!r}: expected one of {', '.join(BENCHMARKS)}")
      BENCHMARKS[name](sys.argv[2:])
