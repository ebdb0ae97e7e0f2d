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

import functools
import json
from typing import Any

from absl import flags
import jax
import numpy as np

from dbjax import cli
from dbjax import config as config_lib
from dbjax import data
from dbjax import features as features_lib
from dbjax import metrics
from dbjax import sample
from dbjax import tasks
from dbjax.models import inception

_HELD_OUT = 2000  # examples, at most, that losses are averaged over
_OF_TASKS = dict(  # flags that mean something to some tasks only
    judge=("autoregressive", "recurrent"),
    **dict.fromkeys(("guidance", "features", "inception", "decode", "images"), ("image",)))


def block_losses(model: sample.Model, held_out: Any, passes: int = 8) -> list[float]:
  """Each block's training loss on held-out data, averaged over `passes` draws of the noise."""
  size, total = model.config.sample.batch_size, min(len(held_out), _HELD_OUT)
  parts = [held_out.take(np.arange(i, min(i + size, total))) for i in range(0, total, size)]
  weights = [len(next(iter(part.values()))) for part in parts] * passes
  losses = []
  for b, (task, params) in enumerate(zip(model.tasks, model.params)):
    params = jax.device_put(params)
    interval = model.schedule.training_interval(b)
    values = [_loss(task, params, model.key(b, n * len(parts) + i), part, interval, model.shared)
              for n in range(passes) for i, part in enumerate(parts)]
    losses.append(float(np.average(values, weights=weights)))
  return losses


@functools.partial(jax.jit, static_argnums=0)
def _loss(task, params, key, batch, interval, shared):
  return task.loss(params, task.draw(key, batch, interval), shared)


def _options(config) -> dict[str, Any]:
  """What the flags ask of a task's own evaluation."""
  f, name = flags.FLAGS, config.task.name
  for flag, names in _OF_TASKS.items():
    if f[flag].value and name not in names:
      raise cli.UserError(f"--{flag}: the task {name} has no use for it, only "
                          f"{' and '.join(names)}")
  try:
    guidances = [float(g) for g in f.guidance]
    if not all(0 <= g < float("inf") for g in guidances):
      raise ValueError
  except ValueError:
    raise cli.UserError(f"--guidance={','.join(f.guidance)}: expected numbers, 0 or more, such as "
                        "1,2") from None
  return dict(guidances=guidances, num_samples=f.num_samples, features=f.features,
              inception=f.inception, decode=cli.function("decode") if f.decode else None,
              images=f.images, judge=load_judge(f.judge, config) if f.judge else None)


def load_judge(workdir: str, config) -> sample.Model:
  """The model that tells how likely a text is, if it can."""
  judge = sample.load(workdir)
  theirs = judge.config
  if theirs.task.name not in _OF_TASKS["judge"] or not theirs.task.end_to_end:
    raise cli.UserError(f"--judge={workdir}: expected a model that predicts the next token, "
                        "trained with --config.task.end_to_end=True")
  for field in ("tokenizer", "vocab_size", "eos", "length"):
    if theirs.data[field] != config.data[field]:
      raise cli.UserError(f"--judge={workdir} was trained with data.{field}={theirs.data[field]}, "
                          f"--workdir with {config.data[field]}: expected the same")
  return judge


def main():
  f = flags.FLAGS
  model = sample.load(cli.require("workdir"))
  options = _options(model.config)
  path = cli.writable("json") if f.json else None
  sample.describe(model)
  config = model.config
  if f.data_dir is not None:  # of another machine
    config = config_lib.unflatten(config_lib.flatten(config) | {"data.dir": f.data_dir})
  dataset = data.load(config)
  result = dict(losses=block_losses(model, dataset.held_out))
  print(metrics.table(["block", "noise from", "to", "held-out loss"], [
      (b, *model.schedule.boundaries[b:b + 2], loss) for b, loss in enumerate(result["losses"])]))
  result |= tasks.module(config).evaluate(model, dataset, options)
  for name, rows in result.items():
    if name != "losses":
      rows = [rows] if isinstance(rows, dict) else rows
      print(f"\n{name}\n" + metrics.table(list(rows[0]), [list(row.values()) for row in rows]))
  if path:
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "Directory that dbjax.main trained in.")
  flags.DEFINE_list("guidance", [], "Score samples at each of these [the config's].")
  flags.DEFINE_integer("num_samples", None, "Samples to score [the config's].", lower_bound=2)
  flags.DEFINE_list("features", [], "To see samples by: " + ", ".join(features_lib.NAMES)
                    + " [pixels, if images are small].")
  flags.DEFINE_string("inception", None, "Weights: " + inception.URL)
  flags.DEFINE_string("data_dir", None, "Where TFDS keeps its data sets [the config's].")
  flags.DEFINE_string("decode", None, "Of latents: module:function, to images uint8.")
  flags.DEFINE_string("images", None, "Of latents: the TFDS data set of their images.")
  flags.DEFINE_string("judge", None, "Of text: the workdir of a model that judges what is written.")
  flags.DEFINE_string("json", None, "Also write all figures to this file.")
  cli.run(main, __doc__)
