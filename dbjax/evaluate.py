"""How good each block is, and what they make together.

    python -m dbjax.evaluate --workdir=DIR [--guidance=1,2] [--json=out.json]

Prints, on held-out data, the loss of each block over the noise that it trains on, and then
what matters in the task: each says so in its `evaluate`, as in `python -m pydoc dbjax.tasks.image`.
The options of a task are flags; those that a model has are listed by --workdir=DIR --help. A table
that is too long or too wide to be read is printed in part, and --json has the whole.
"""

from collections.abc import Mapping, Sequence
import json
from typing import Any

from absl import flags

from dbjax import cli
from dbjax import config as config_lib
from dbjax import fields as fields_lib
from dbjax import loading
from dbjax import metrics
from dbjax import model as model_lib
from dbjax import paths

_ROWS, _COLUMNS = 50, 21  # of the largest table that is printed whole
_FIRST = 20  # rows that are printed of a longer one


def fields() -> dict[str, fields_lib.Field]:
  """The flags that a workdir's task adds."""
  return model_lib.evaluate_fields(config_lib.load(cli.path("workdir")))


def main(options: dict[str, Any]):
  f = flags.FLAGS
  model = loading.load(cli.path("workdir"), best=f.best,
                       guide=cli.path("guide") if f.guide else None)
  loading.check_given(model, f.guide, options)
  path = cli.writable("json") if f.json else None
  if f.data_dir is not None:  # of another machine
    model = model.with_config(**{"data.dir": f.data_dir})
  model.describe(options)
  result = model.evaluate(**options)
  losses = result["losses"]  # a schedule of another's own may have no boundaries
  bounds = getattr(model.schedule, "boundaries", [None] * (len(losses) + 1))
  print(metrics.table(["block", "noise from", "to", "held-out loss"], [
      (b, *bounds[b:b + 2], loss) for b, loss in enumerate(losses)]))
  for name, rows in result.items():
    if name != "losses":
      print(f"\n{name}\n" + words([rows] if isinstance(rows, dict) else rows), flush=True)
  if path:
    with paths.writing(path, "--json"):
      path.write_text(as_json(result) + "\n")


def as_json(result: Mapping[str, Any]) -> str:
  """What `Model.evaluate` returns, or the like, in JSON: a task's figures may be numpy's or jax's.
  """
  return json.dumps(result, indent=2, default=lambda x: x.tolist())


def words(rows: Sequence[Mapping[str, Any]]) -> str:
  """A task's table as text: whole, or as much of it as can be read."""
  columns = list(dict.fromkeys(column for row in rows for column in row))
  if len(columns) > _COLUMNS:
    return f"{len(rows)} rows of {len(columns)} columns: see --json"
  shown = rows if len(rows) <= _ROWS else rows[:_FIRST]
  text = metrics.table(columns, [[row.get(column) for column in columns] for row in shown])
  left = len(rows) - len(shown)
  return text + (f"\nand {left} more rows: see --json" if left else "")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "Directory that dbjax.main trained in.")
  flags.DEFINE_boolean("best", False, "Take each block's checkpoint of the least held-out loss.")
  flags.DEFINE_string("guide", None, "Directory of a weaker model of images, to guide samples by.")
  flags.DEFINE_string("data_dir", None, "Where TFDS keeps its data sets [the config's].")
  flags.DEFINE_string("json", None, "Also write all figures to this file.")
  cli.run(main, __doc__, options=fields)
