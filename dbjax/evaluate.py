"""How good each block is, and what they make together.

    python -m dbjax.evaluate --workdir=DIR [--guidance=1,2] [--json=out.json]

Prints, on held-out data, the loss of each block over the noise that it trains on, and then
what matters in the task: each says so in its `evaluate`, as in `python -m pydoc dbjax.tasks.image`.
The options of a task are flags; those that a model has are listed by --workdir=DIR --help.
"""

import json
from typing import Any

from absl import flags

from dbjax import cli
from dbjax import config as config_lib
from dbjax import fields as fields_lib
from dbjax import metrics
from dbjax import model as model_lib


def fields() -> dict[str, fields_lib.Field]:
  """The flags that a workdir's task adds."""
  return model_lib.evaluate_fields(config_lib.load(cli.path("workdir")))


def main(options: dict[str, Any]):
  f, model = flags.FLAGS, model_lib.load(cli.path("workdir"))
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
  cli.run(main, __doc__, options=fields)
