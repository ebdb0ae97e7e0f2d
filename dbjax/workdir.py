"""What is known of a workdir: its blocks, how far each has come, scores, and the commands.

Blocks may be under way, or not trained yet, and a file of scores may be a stranger's: what cannot
be read is said in `Run.notes`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import json
import math
import shlex
from typing import Any

from etils import epath

from dbjax import checkpoint
from dbjax import config as config_lib
from dbjax import evaluate as evaluate_lib
from dbjax import exported
from dbjax import loading
from dbjax import logs
from dbjax import lookup
from dbjax import metrics
from dbjax import model as model_lib
from dbjax import paths
from dbjax import provenance
from dbjax import task as task_lib
from dbjax import trust
from dbjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Run:
  """What is known of a workdir.

  Attributes:
    name: of the workdir, short.
    workdir: as it was given.
    config: resolved.
    metas: of each block's last checkpoint that can be read; None where it has none.
    model: all blocks, or None where one is missing.
    scores: of `Model.evaluate`, or {}.
    source: where the scores are from, in words.
    headline: the few figures that say most, by name.
    notes: what is to be said before all else.
  """

  name: str
  workdir: epath.Path
  config: Any
  metas: tuple[dict[str, Any] | None, ...]
  model: model_lib.Model | None
  scores: dict[str, Any]
  source: str
  headline: dict[str, float]
  notes: tuple[str, ...]


def read(workdir: epath.PathLike, *, data_dir: str | None = None, evaluate: int = 0) -> Run:
  """Reads what is known of a workdir.

  Args:
    workdir: that dbjax.main trains or has trained in, that dbjax.assemble made, or a folder of
      dbjax.export.
    data_dir: where TFDS keeps its data sets, if not where the config says.
    evaluate: score so many samples; 0: take scores.json, if it is there.

  Raises:
    UserError: there is no config, or a checkpoint is damaged or of another model.
  """
  path = paths.expand(workdir, "--workdir")
  trust.check_beside(path)
  config = config_lib.load(path)
  blocks = range(config.num_blocks)
  missing = [b for b in blocks if not (
      exported.path_of(path, b).exists() or checkpoint.exists(path, b))]
  if missing:
    trust.check_sums(path)  # as `load` does
  model = None if missing else loading.load(path)
  metas = model.metas if model else tuple(
      None if b in missing else _meta(path, b, config) for b in blocks)
  if model and data_dir is not None:
    model = model.with_config(**{"data.dir": data_dir})
  notes = list(_progress(config, metas, missing))
  scores, source = _scored(path, config, model, evaluate, notes)
  name, = paths.names([path])
  return Run(name, path, config, metas, model, scores, source, _headline(config, scores, notes),
             tuple(notes))


def _meta(workdir: epath.Path, block: int, config: Any) -> dict[str, Any]:
  """What a block's last checkpoint says of itself; damaged ones are passed over, as by `load`."""
  with exported.open_block(workdir, block) as saved:
    return loading.read_block(saved, task_lib.make_task(config, block), config)[0]


def _scored(workdir: epath.Path, config: Any, model: model_lib.Model | None, num: int,
            notes: list[str]) -> tuple[dict[str, Any], str]:
  """The scores, and where they are from: of `num` samples; where it is 0, or fails, of a file.

  What fails is added to `notes`.
  """
  if num:
    try:
      if model is None:
        raise UserError("there are no samples before every block has a checkpoint")
      with task_named(config):
        scores = json.loads(evaluate_lib.as_json(model.evaluate(num_samples=num)))
      return _plain(scores), f"of {num:,} samples, made with this page"
    except UserError as e:
      notes.append(f"--evaluate={num}: not scored: {e}")
  try:
    if beside := trust.beside(workdir, "scores.json"):
      return _plain(trust.read_json(beside)), "from scores.json"
  except UserError as e:
    notes.append(f"Not scored: {e}")
  except (OSError, ValueError) as e:
    notes.append(f"scores.json cannot be read: {e}")
  return {}, ""


@contextlib.contextmanager
def task_named(config: Any) -> Iterator[None]:
  """Raises UserError in the place of whatever a task, which may be the user's, raises inside."""
  try:
    yield
  except UserError:
    raise
  except Exception as e:
    raise UserError(lookup.own_words(e, f"task.name={config.task.name}")) from e


def _progress(config: Any, metas: Sequence[Any], missing: Sequence[int]) -> Iterable[str]:
  """What is not done yet."""
  if missing:
    yield (f"Block{'s' * (len(missing) > 1)} {', '.join(map(str, missing))} of {config.num_blocks} "
           "not trained yet: there are no samples before every block has a checkpoint.")
  short = [f"block {b} at step {meta['step']:,} of {total:,}" for b, meta in enumerate(metas)
           if meta and meta["step"] < (total := task_lib.of_block(config, b).train.num_steps)]
  if short:
    yield f"Under way, or stopped: {', '.join(short)}."


def _plain(scores: Any) -> dict[str, Any]:
  """Of scores, which may come from a stranger, what is as `Model.evaluate` makes it."""
  scalar = lambda x: x is None or isinstance(x, bool | int | float | str)
  row = lambda x: isinstance(x, Mapping) and all(map(scalar, x.values()))
  found = {}
  for name, table in scores.items() if isinstance(scores, Mapping) else ():
    if name == "losses":
      good = isinstance(table, list) and all(isinstance(x, float) for x in table)
    else:
      good = row(table) or isinstance(table, list | tuple) and table and all(map(row, table))
    if good:
      found[name] = table
  return found


def _headline(config: Any, scores: Mapping[str, Any], notes: list[str]) -> dict[str, float]:
  """The few figures that say most, by name: the task's own, else the blocks' held-out losses.

  Where the task makes none of such scores, that is added to `notes`.
  """
  found: dict[str, float] = {}
  tables = {name: table for name, table in scores.items() if name != "losses"}
  try:
    with task_named(config):
      figures = task_lib.make_task(config, 0).headline(tables) if tables else {}
      found = {str(name): float(x) for name, x in figures.items() if math.isfinite(x)}
  except UserError as e:
    notes.append(f"No figures of these scores: {e}")
  return found or {f"held-out loss of block {b}": x
                   for b, x in enumerate(scores.get("losses", ()))}


def history(run: Run) -> metrics.History:
  """What its blocks have reported. Raises UserError where a file of that is a link."""
  blocks = range(run.config.num_blocks)
  for b in blocks:
    trust.beside(paths.directory(run.workdir, b), logs.FILE)
  return metrics.read_history(run.workdir, blocks)


def commands(run: Run) -> list[str]:
  """The commands that have trained its blocks, each once, with when, on what, and which; [] if
  none is kept.

  Raises:
    UserError: a file that keeps them is a link.
  """
  blocks = range(run.config.num_blocks)
  kept = [b for b in blocks if trust.beside(paths.directory(run.workdir, b), provenance.COMMANDS)]
  return [line for row in provenance.commands(run.workdir, kept) for line in (
      f"# {row['time']}" + f", on {row['devices']}" * bool(row["devices"]) + ": " + ", ".join(
          f"block {b} from step {n}" for b, n in row["steps"].items()), row["command"])]


def command(config: Any) -> str | None:
  """The flags of dbjax.main that make this resolved config of one that comes with dbjax, with the
  fewest fields; None if none does.
  """
  target, found = config_lib.flatten(config), []
  del target["train.blocks"]  # no weight depends on it, and some may be left to train
  for name in config_lib.shipped():
    try:
      base = config_lib.read(name)
      if base.task.name != config.task.name:
        continue
      base = config_lib.flatten(config_lib.resolve(base))
      differ = {k: v for k, v in target.items() if base.get(k) != v}
      even = {k: v for k, v in differ.items() if k != "layers_per_block"}
      for fields in (even, differ):
        made = config_lib.flatten(config_lib.resolve(config_lib.read(name, fields)))
        if made | target == made:
          found.append((len(fields), f"--config={name}" + "".join(
              f" --config.{k}={shlex.quote(_flag(v))}" for k, v in fields.items())))
          break
    except UserError:
      continue
  return min(found)[1] if found else None


def _flag(value: Any) -> str:
  return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
