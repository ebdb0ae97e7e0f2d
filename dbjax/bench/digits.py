"""DiffusionBlocks against end to end on the bundled digits, over seeds.

Every model takes as many layer evaluations in training: B blocks of L / B layers with
`num_steps` steps each. The score of a model is that of `dbjax.evaluate`. Runs resume;
what is finished is not run again.
"""

import argparse
import json
from pathlib import Path
import sys

from etils import epath
import numpy as np

from dbjax import config as config_lib
from dbjax import data
from dbjax import evaluate
from dbjax import metrics
from dbjax import sample
from dbjax import train

CONFIG = Path(__file__).parents[2] / "configs" / "digits.py"
GUIDANCES = (1.0, 2.0)


def run(num_blocks: int, seed: int, workdir: Path) -> dict:
  """Trains and scores one model; {guidance: scores} as JSON has it."""
  config = config_lib.read(CONFIG)
  config.num_blocks, config.seed, config.sample.every_steps = num_blocks, seed, 0
  config = config_lib.resolve(config)
  config_lib.check(epath.Path(workdir), config)  # scores of another config are not reported
  result = workdir / "scores.json"
  if not result.exists():
    stopped = train.train(config, workdir)
    if stopped:
      sys.exit(128 + stopped)
    model, dataset = sample.load(workdir), data.load(config)
    scores = {g: evaluate.quality(model, dataset, config.evaluate.num_samples, guidance=g)
              for g in GUIDANCES}
    result.write_text(json.dumps(scores, indent=2) + "\n")
  return json.loads(result.read_text())


def main(argv: list[str]):
  parser = argparse.ArgumentParser(prog="python -m dbjax.bench digits", description=__doc__)
  numbers = lambda text: [int(x) for x in text.split(",")]
  parser.add_argument("--workdir", type=Path, required=True, help="runs are kept here")
  parser.add_argument("--blocks", type=numbers, default=[1, 2, 3], help="1,2,3")
  parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="0,1,2")
  args = parser.parse_args(argv)

  runs = {}
  for seed in args.seeds:
    for num_blocks in args.blocks:
      runs[num_blocks, seed] = run(num_blocks, seed, args.workdir / f"B{num_blocks}_seed{seed}")
      print(f"B = {num_blocks}, seed {seed}: {runs[num_blocks, seed]}", flush=True)

  def over_seeds(num_blocks, guidance, name):
    values = [runs[num_blocks, seed][str(guidance)][name] for seed in args.seeds]
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"

  rows = [(b, *(over_seeds(b, g, name) for g in GUIDANCES for name in ("accuracy", "frechet")))
          for b in args.blocks]
  held_out = runs[args.blocks[0], args.seeds[0]][str(GUIDANCES[0])]
  rows.append(("real, held out", f"{held_out['judge_accuracy']:.3f}",
               f"{held_out['frechet_held_out']:.3f}", "", ""))
  print(metrics.table(["B", "accuracy", "Frechet", "accuracy, guidance 2", "Frechet, guidance 2"],
                      rows))
