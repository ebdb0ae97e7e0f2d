"""One page to look at: what was trained, how far, what it makes, and how good it is.

    python -m dbjax.report --workdir=DIR [--workdir=DIR2 ...] --out=report.html

writes one file of HTML that needs no other, no script and no network: the figures that say most,
samples, one sample as it comes to be, the loss of each block over its steps and over the noise,
what of the config differs from the defaults, versions, times, and the commands that made it.
Several workdirs stand side by side.

Scores are those that `dbjax.evaluate --json=DIR/scores.json` has left in a workdir; where there are
none, --evaluate=1000 scores so many samples now. Memory is shown where `dbjax.plan
--json=DIR/plan.json` has planned it. Blocks may be under way, or not trained yet, and data may be
gone: the page says what it leaves out.
"""

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import datetime
import html
import importlib.resources
import math
from pathlib import Path
import platform
import shlex
import string
import tempfile
from typing import Any

from absl import flags
from etils import epath
import jax
import numpy as np

import dbjax
from dbjax import cli
from dbjax import config as config_lib
from dbjax import exported
from dbjax import fields as fields_lib
from dbjax import logs
from dbjax import masking
from dbjax import paths
from dbjax import provenance
from dbjax import status
from dbjax import task as task_lib
from dbjax import trust
from dbjax import workdir as workdir_lib
from dbjax.errors import UserError
from dbjax.workdir import Run

_ROWS, _COLUMNS = 60, 24  # of the largest table of scores that is shown
_TEXT = 20_000  # characters of samples, at most
_NUM_SAMPLES = fields_lib.Field(50, "How many samples to show; 0: none, and nothing is drawn.",
                                fields_lib.between(0, 1000))
_EVALUATE = fields_lib.Field(0, "Score so many samples, in the place of scores.json; 0: none.",
                             fields_lib.at_least(0))


def page(runs: Sequence[Run], num_samples: int = 50) -> str:
  """The page of one run, or of several side by side.

  Args:
    runs: by `dbjax.workdir.read`.
    num_samples: to draw and show; 0: none, nor the steps of one.
  """
  names = paths.names([run.workdir for run in runs])
  runs = [dataclasses.replace(run, name=name) for run, name in zip(runs, names)]
  drawn = runs if num_samples else []
  topics = [
      _topic("strip", "One sample, from noise to answer", drawn, _strip, wide=True),
      _topic("samples", "Samples", drawn, lambda run: _samples(run, num_samples)),
      _topic("loss", "Loss of each block over its steps", runs, _losses),
      _topic("levels", "Loss at each noise level", runs, _levels),
      _topic("noise", "Which block takes which noise away", runs, _noise),
      _topic("memory", "Memory of a training step", runs, _memory),
  ]
  body = [
      f"<header><h1>{_e(', '.join(names))}</h1>"
      + "".join(f"<p class=lead>{f'<b>{_e(run.name)}</b>: ' * (len(runs) > 1)}{_e(_lead(run))}</p>"
                for run in runs) + "</header>",
      *(_notes(run, len(runs) > 1) for run in runs),
      _tiles(runs[0]) if len(runs) == 1 else _compared(runs),
      f"<div class=grid>{''.join(topics)}</div>",
      _topic("blocks", "The blocks", runs, _blocks, wide=True),
      _topic("scores", "Scores", runs, _scores, wide=True),
      _topic("config", "Config: what differs from the defaults", runs, _config, wide=True),
      _topic("commands", "Commands", runs, _commands, wide=True),
      _topic("provenance", "Made with", runs, _provenance, wide=True), _footer()]
  template = importlib.resources.files("dbjax").joinpath("report.html").read_text("utf-8")
  return string.Template(template).substitute(title=_e(", ".join(names)), body="\n".join(body))


def _e(words: Any, most: int = 300) -> str:
  """Words as they stand in HTML, and not too many: they may be a stranger's."""
  words = str(words)
  return html.escape(words if len(words) <= most else words[:most] + "…")


def _topic(key: str, title: str, runs: Sequence[Run], part: Callable[[Run], Any],
           wide: bool = False) -> str:
  """A section with what `part` makes of each run: HTML, or a figure; None: nothing to show."""
  cards = []
  for i, run in enumerate(runs):
    try:
      made = part(run)
    except UserError as e:
      made = f"<p class=note>Left out: {_e(e)}</p>"
    except (ValueError, TypeError, LookupError, ArithmeticError, OSError) as e:
      made = f"<p class=note>Left out, for a file of the workdir cannot be read: {_e(e)}</p>"
    if made is not None:
      name = f"<h3>{_e(run.name)}</h3>" if len(runs) > 1 else ""
      cards.append(f"<div class=card>{name}{_html(made, f'{key}{i}', title)}</div>")
  if not cards:
    return ""
  kind, columns = "wide" if wide or len(runs) > 1 else "half", 1 if wide else min(len(cards), 3)
  return (f'<section class={kind} id={key}><h2>{_e(title)}</h2>'
          f'<div class="side n{columns}">{"".join(cards)}</div></section>')


def _html(made: Any, name: str, title: str) -> str:
  if isinstance(made, str):
    return made
  width, height = made.get_size_inches()
  kind = "strip" if name.startswith("strip") else "plot"
  if kind == "plot" and name != "compare" and len(made.axes) == 1:
    made.axes[0].set_title("", loc="left")  # the section has it
  drawing = dbjax.plots.svg(made, name).replace(
      "<svg ", f'<svg role="img" aria-label="{_e(title)}" ', 1)
  return f'<div class="scroll {kind}" style="--w:{width:.2f};--h:{height:.2f}">{drawing}</div>'


def _notes(run: Run, named: bool) -> str:
  return "".join(f"<p class=note>{f'<b>{_e(run.name)}</b> ' * named}{_e(note)}</p>"
                 for note in run.notes)


def _lead(run: Run) -> str:
  """What it is, in a sentence."""
  c, each = run.config, run.config.layers_per_block
  network = c.model.network.rpartition(":")[2]
  layers = f"{each[0]}" if len(set(each)) == 1 else ", ".join(map(str, each))
  how = "trained end to end" if config_lib.is_plain(c) else "as one block"
  if c.num_blocks > 1:
    how = f"as {c.num_blocks} blocks of {layers}" + (
        "" if task_lib.make_task(c, 0).joint else ", each trained alone")
  return f"{network} of {c.model.num_layers} layers {how}. Task {c.task.name}, data {c.data.name}."


def _facts(run: Run) -> dict[str, str]:
  """What has been done, in a few words each."""
  c, each = run.config, [task_lib.of_block(run.config, b) for b in range(run.config.num_blocks)]
  span = lambda values: f"{min(values):,}" + f" to {max(values):,}" * (min(values) < max(values))
  sizes = [sum(int(np.prod(x.shape)) for x in jax.tree.leaves(jax.eval_shape(
      task_lib.make_task(c, b).init, jax.random.key(0)))) for b in range(c.num_blocks)]
  return {
      "steps of each block": span([meta["step"] if meta else 0 for meta in run.metas]),
      "examples in a step": span([own.train.batch_size for own in each]),
      "weights in each block": " to ".join(dict.fromkeys(
          f"{n / 1e6:.2f} M" if n >= 1e5 else f"{n:,}" for n in (min(sizes), max(sizes)))),
      "of training, all blocks": _duration(sum(
          meta["seconds"] / row["at_once"]  # of which each has spent the time of all
          for meta, row in zip(run.metas, status.read(run.workdir)) if meta)),
  }


def _tiles(run: Run) -> str:
  """The figures of one run, each under a large number."""
  tiles = [("score", _figure(x), name) for name, x in list(run.headline.items())[:4]]
  tiles += [("fact", value, name) for name, value in _facts(run).items()]
  return "<div class=tiles>" + "".join(
      f"<div class='tile {kind}'><b>{_e(value, 40)}</b><span>{_e(name)}</span></div>"
      for kind, value, name in tiles) + "</div>"


def _figure(x: float) -> str:
  return f"{x:.3f}" if 1e-3 <= abs(x) < 10 else f"{x:.4g}"


def _compared(runs: Sequence[Run]) -> str:
  """Several runs: a table of their figures, and of the fields in which they differ."""
  if len(runs) < 2:
    return ""
  named, found = [run.name for run in runs], [run.headline for run in runs]
  rows = [(name, *(_figure(of[name]) if name in of else "" for of in found))
          for name in dict.fromkeys(name for of in found for name in of)]
  facts = [_facts(run) for run in runs]
  rows += [(name, *(of.get(name, "") for of in facts)) for name in dict.fromkeys(
      name for of in facts for name in of)]
  flat = [{row[0]: row[1] for row in config_lib.describe(run.config)} for run in runs]
  differ = [(name, *(of.get(name, "") for of in flat)) for name in dict.fromkeys(
      name for of in flat for name in of) if len({of.get(name) for of in flat}) > 1]
  figure = _html(dbjax.plots.compare(dict(zip(named, found))), "compare", "Scores compared") if (
      sum(map(bool, found)) > 1) else ""
  return (f"<section class=wide><h2>Side by side</h2><div class=card>{figure}"
          f"{_table(['', *named], rows)}</div></section>"
          "<section class=wide><h2>Fields in which they differ</h2><div class=card>"
          f"{_table(['field', *named], differ)}</div></section>")


def _strip(run: Run) -> Any:
  if run.model is None:
    return None
  model = run.model
  with workdir_lib.task_named(run.config):
    found = model.tasks[0].strip(model, 0, 0, model.options({}))
    return None if found is None else dbjax.plots.strip(found)


def _samples(run: Run, num: int) -> str | None:
  """As the task shows them: a picture, or text."""
  if run.model is None:
    return None
  with workdir_lib.task_named(run.config), tempfile.TemporaryDirectory() as folder:
    samples, labels = run.model.sample(num)
    shown = run.model.tasks[0].save(run.model, samples, labels, epath.Path(folder) / "samples")
    if shown is None:
      return None
    path = Path(shown)
    if path.suffix in logs.PICTURES:
      data = base64.b64encode(path.read_bytes()).decode()
      return (f'<img class=samples alt="{num} samples" '
              f'src="data:{logs.PICTURES[path.suffix]};base64,{data}">')
    if path.suffix == ".txt":
      return f"<pre>{_e(path.read_text(), _TEXT)}</pre>"
    raise UserError(f"the task has saved them as {path.name}, which a page does not show")


def _losses(run: Run) -> Any:
  history = workdir_lib.history(run)
  return dbjax.plots.losses(history) if any(map(len, history.steps.values())) else None


def _levels(run: Run) -> Any:
  """From the scores, or else measured now."""
  rows = dbjax.plots.find_levels(run.scores)
  if not rows and run.model is not None:
    with workdir_lib.task_named(run.config):
      rows = run.model.losses_by_noise(run.model.dataset().held_out)
  return dbjax.plots.loss_by_noise(rows) if rows else None


def _noise(run: Run) -> Any:
  if run.config.num_blocks == 1:
    return None
  return dbjax.plots.noise(task_lib.find(run.config.task.name).make_schedule(run.config))


def _memory(run: Run) -> Any:
  path = trust.beside(run.workdir, "plan.json")
  return dbjax.plots.memory(path) if path else None


# ---- tables --------------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]], cell: Callable = _e) -> str:
  """In a box of its own, which scrolls where it is too wide for the page."""
  kind = lambda x: " class=long" * (isinstance(x, str) and len(x) > 36)
  row = lambda tag, cells: "<tr>" + "".join(
      f"<{tag}{kind(x)}>{cell(x)}</{tag}>" for x in cells) + "</tr>"
  return (f"<div class=scroll><table><thead>{row('th', header)}</thead><tbody>"
          + "".join(row("td", cells) for cells in rows) + "</tbody></table></div>")


def _blocks(run: Run) -> str:
  """Of each block what it is, how far it has come, and how long that took."""
  history = workdir_lib.history(run)
  schedule = task_lib.find(run.config.task.name).make_schedule(run.config)
  boundaries = getattr(schedule, "boundaries", None)
  losses = run.scores.get("losses", ())
  rows = []
  for b, meta in enumerate(run.metas):
    own, last = task_lib.of_block(run.config, b), history.metrics[b]
    at = lambda name, values=last: float(values[name][-1]) if len(values.get(name, ())) else None
    number = lambda x, form: "" if x is None else format(x, form)
    # Of fewer bytes they were counted as a turn had ended: no block was on the device any more.
    memory = at("device_bytes") if (at("device_bytes") or 0) > 2**17 else None
    rows.append([
        _Swatch(b), run.config.layers_per_block[b],
        "{:.3g} to {:.3g}".format(*boundaries[b:b + 2]) if boundaries else "",
        f"{meta['step'] if meta else 0:,} of {own.train.num_steps:,}",
        _duration(meta["seconds"]) if meta else "", number(at("examples_per_s"), ",.0f"),
        number(memory and memory / 2**20, ",.1f"), number(at("loss"), ".4g"),
        f"{losses[b]:.4g}" if b < len(losses) else ""])
  level = "share unmasked" if isinstance(schedule, masking.Masking) else "noise σ"
  return _table(["block", "layers", level, "steps", "trained for", "examples/s", "MiB on a device",
                 "training loss", "held-out loss"], rows, _cell)


class _Swatch(int):
  """The number of a block, shown with its colour."""


def _cell(x: Any) -> str:
  if isinstance(x, _Swatch):
    return f'<i style="background:{dbjax.plots.color(x)}"></i>{x:d}'
  if isinstance(x, float):
    return f"{x:.4g}"
  return "" if x is None else _e(x)


def _scores(run: Run) -> str | None:
  """All tables; long ones are folded."""
  if not run.scores:
    return None
  parts = [f"<p class=source>{_e(run.source)}</p>"]
  for name, table in run.scores.items():
    if name == "losses":
      continue  # stand with the blocks
    rows = [table] if isinstance(table, Mapping) else table
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if len(columns) > _COLUMNS:
      parts.append(f"<p class=note>{_e(name)}: {len(rows)} rows of {len(columns)} columns, too "
                   "wide to be shown here</p>")
      continue
    shown = _table(columns, [[row.get(c) for c in columns] for row in rows[:_ROWS]], _cell)
    left = f"<p class=note>and {len(rows) - _ROWS} more rows</p>" * (len(rows) > _ROWS)
    opened = " open" * (len(rows) <= 6)
    parts.append(f"<details{opened}><summary>{_e(name)}</summary>{shown}{left}</details>")
  return "".join(parts)


def _config(run: Run) -> str:
  """What differs from the defaults; the rest is folded."""
  rows = config_lib.describe(run.config)
  even = {"layers_per_block", "train.blocks"}  # a resolved config has none as by default
  differ = [(name, value, default, help) for name, value, default, _, help in rows
            if value != default and name not in even]
  rest = [(name, value, help) for name, value, default, _, help in rows if value == default]
  return (_table(["field", "value", "default", "meaning"], differ)
          + f"<details><summary>{len(rest)} fields as they are by default</summary>"
          + _table(["field", "value", "meaning"], rest) + "</details>")


def _commands(run: Run) -> str:
  """What trains it, or goes on; and what to do with it."""
  where, words = shlex.quote(str(run.workdir)), ""
  started = workdir_lib.commands(run)
  if not started:
    made = workdir_lib.command(run.config)
    started = [f"python -m dbjax.main --workdir={where} {made or '--config=FILE'}"]
    words = "" if made else ("<p class=source>FILE is the config that it was started with: none "
                             "that comes with dbjax.</p>")
  done = all(meta and meta["step"] >= task_lib.of_block(run.config, b).train.num_steps
             for b, meta in enumerate(run.metas))
  lines = [
      *started,
      f"python -m dbjax.sample --workdir={where} --out=samples.npz --num_samples=100",
      f"python -m dbjax.evaluate --workdir={where} --json={where}/scores.json",
      f"python -m dbjax.report --workdir={where} --out=report.html"]
  title = "# trained it; the same command goes on from where it is" if done else (
      "# goes on from where it is")
  if any(exported.path_of(run.workdir, b).exists() for b in range(run.config.num_blocks)):
    # Nothing goes on from there.
    title, words, lines = "# draws, scores and shows", "", lines[len(started):]
  return f"{words}<pre class=commands>{_e(chr(10).join([title, *lines]), _TEXT)}</pre>"


def _provenance(run: Run) -> str:
  """With which dbjax, code and data each block was trained, as its checkpoint says."""
  rows = []
  for b, meta in enumerate(run.metas):
    if meta is None:
      continue
    t = meta["trained_with"]
    code = ", ".join(f"{x['name']} ({str(x['sha256'])[:12]})" for x in t["code"].values())
    rows.append([_Swatch(b), t["dbjax"], f"{run.config.data.name} ({t['data']:08x})"
                 if isinstance(t["data"], int) else t["data"], code or "dbjax's own",
                 provenance.beginning(t), meta["config"]["seed"]])
  if not rows:
    return "<p class=note>No block has a checkpoint yet.</p>"
  return _table(["block", "dbjax", "data (fingerprint)", "code (SHA-256)", "began with", "seed"],
                rows, _cell)


def _duration(seconds: float) -> str:
  if not math.isfinite(seconds):
    return "unknown"
  minutes, s = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  days, hours = divmod(hours, 24)
  parts = [(days, "d"), (hours, "h"), (minutes, "min"), (s, "s")]
  first = next((i for i, (n, _) in enumerate(parts) if n), 3)
  return " ".join(f"{n} {unit}" for n, unit in parts[first:first + 2])


def _footer() -> str:
  now = datetime.datetime.now(datetime.UTC).strftime("%d %B %Y, %H:%M UTC")
  return (f"<footer>Made on {now} by dbjax {dbjax.__version__}, jax {jax.__version__}, Python "
          f"{platform.python_version()}, on {_e(jax.devices()[0].device_kind)}.</footer>")




def main():
  f = flags.FLAGS
  workdirs = cli.require("workdir")
  if cli.path("out").suffix not in (".html", ".htm"):
    raise UserError(f"--out={f.out}: expected a name that ends in .html")
  dbjax.plots  # noqa: B018  where matplotlib is missing it says so now
  for workdir in workdirs:
    config_lib.load(paths.expand(workdir, "--workdir"))
  out = cli.writable("out")
  runs = [workdir_lib.read(workdir, data_dir=f.data_dir, evaluate=f.evaluate)
          for workdir in workdirs]
  text = page(runs, f.num_samples)
  with paths.writing(out, "--out"):
    out.write_text(text, encoding="utf-8")
  print(out)


if __name__ == "__main__":
  flags.DEFINE_multi_string("workdir", None, "Directory that dbjax.main trained in; of several, "
                            "once for each.")
  flags.DEFINE_string("out", "report.html", "The file to write.")
  flags.DEFINE_string("data_dir", None, "Where TFDS keeps its data sets [the config's].")
  cli.define("num_samples", _NUM_SAMPLES)
  cli.define("evaluate", _EVALUATE)
  cli.run(main, __doc__)
