"""How good each block is, and what they make together.

    python -m dbjax.evaluate --workdir=DIR [--guidance=1,2] [--features=pixels,inception] \\
        [--inception=pt_inception-2015-12-05-6726825d.pth] [--json=out.json]

Prints, on held-out data, the loss of each block over the noise that it trains on, and then
what matters in the task (`tasks/NAME.py`). Of images:

exposure    the loss at each noise level on the states that the sampler itself reaches,
            beside that on truly noised data: see `exposure.py`.
quality     of samples, for each guidance: distances to the training images in the
            features asked for (see `features.py` and `quality.py`; FID is that of
            inception), beside those of held-out images, which no model need beat. For
            small images also accuracy: the share that a classifier fitted to the
            training images gives the class asked for. Of latents say what decodes them
            (--decode=module:function) and whose images they are to equal (--images).

Of a classifier accuracy and calibration per number of steps, and the exposure gap; of masked
text bits per token, block by block; of autoregressive text the cross-entropy per noise level,
the bound on the nats per token, block by block, and how likely (to --judge, the workdir of a
plain network) and how diverse what it writes is; of recurrent text what a token costs, too.
"""

import json

from absl import flags

from dbjax import cli
from dbjax import config as config_lib
from dbjax import metrics
from dbjax import model as model_lib
from dbjax import task as task_lib


def main(arguments: list[str]):
  f, workdir = flags.FLAGS, cli.path("workdir")
  options = cli.options(arguments, lambda: {
      **task_lib.find(config_lib.load(workdir).task.name).EVALUATE,
      "num_samples": config_lib.COMMON["evaluate.num_samples"]})
  model = model_lib.load(workdir)
  path = cli.writable("json") if f.json else None
  if f.data_dir is not None:  # of another machine
    model = model.with_config(**{"data.dir": f.data_dir})
  model.describe()
  result = model.evaluate(**options)
  print(metrics.table(["block", "noise from", "to", "held-out loss"], [
      (b, *model.schedule.boundaries[b:b + 2], loss) for b, loss in enumerate(result["losses"])]))
  for name, rows in result.items():
    if name != "losses":
      rows = [rows] if isinstance(rows, dict) else rows
      print(f"\n{name}\n" + metrics.table(list(rows[0]), [list(row.values()) for row in rows]))
  if path:
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "Directory that dbjax.main trained in.")
  flags.DEFINE_string("data_dir", None, "Where TFDS keeps its data sets [the config's].")
  flags.DEFINE_string("json", None, "Also write all figures to this file.")
  cli.run(main, __doc__, arguments=True)
