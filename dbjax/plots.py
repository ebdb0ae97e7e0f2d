"""Pictures of a method, a run and a model, for a notebook, a talk, or `dbjax.report`.

    figure = dbjax.plots.losses(history)       # a notebook shows it
    dbjax.plots.save(figure, "losses.svg")     # or .png, .pdf

Every function returns a `Figure` of matplotlib, made without pyplot, so that nothing is left open.
A block has the same colour in all of them. Noise falls from left to right, as it does while a
sample is drawn, so that block 0 stands at the left.

matplotlib is an extra: pip install "dbjax[plot]".
"""

from collections.abc import Iterable, Mapping, Sequence
import functools
import io
import math
import os
import re
import textwrap
from typing import Any

from etils import epath
import numpy as np

from dbjax import config as config_lib
from dbjax import masking
from dbjax import metrics
from dbjax import paths
from dbjax import schedule as schedule_lib
from dbjax import task as task_lib
from dbjax import trust
from dbjax.errors import UserError

try:
  import matplotlib as mpl
  from matplotlib import figure as figure_lib
  from matplotlib import patches
  from matplotlib import ticker
except ImportError as e:
  raise UserError(f'pictures need matplotlib ({e}): pip install "dbjax[plot]"') from e

# Each stands out on a white page and on a dark one (a contrast of 3 or more), and who sees red and
# green alike can tell the first three apart.
_COLORS = ("#2b7bba", "#d9760a", "#128f74", "#b5529f", "#d64f4a", "#7a68c9", "#6b8b2e", "#a8744f",
           "#188fa0", "#d0609a")
_NEUTRAL = "#7b838c"  # of what is no block
_INK = "#1a1b1c"  # of all text and axes: `svg` lets the page choose in its place
_FAINT = 0.22  # opacity of a surface that something stands on
_STYLE = {
    "axes.edgecolor": _INK, "axes.labelcolor": _INK, "axes.titlecolor": _INK, "text.color": _INK,
    "xtick.color": _INK, "ytick.color": _INK, "axes.linewidth": 0.7, "xtick.major.width": 0.7,
    "ytick.major.width": 0.7, "xtick.minor.size": 0, "ytick.minor.size": 0, "font.size": 9,
    "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.titlepad": 9, "axes.labelsize": 9, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5, "legend.frameon": False, "axes.spines.top": False,
    "axes.spines.right": False, "lines.linewidth": 1.8, "lines.solid_capstyle": "round",
    "text.parse_math": False,  # a name may hold a $
    "svg.fonttype": "none", "svg.hashsalt": "dbjax", "savefig.dpi": 160,
}
_SIZE = (5.0, 3.0)  # inches: small, so that letters are large where a page is narrow
_GIB = 2.0**30
_NAME = 24  # characters of a model's name beside its bar


class Figure(figure_lib.Figure):
  """A figure that a notebook shows, though pyplot knows nothing of it."""

  def _repr_png_(self) -> bytes:
    file = io.BytesIO()
    with mpl.rc_context(_STYLE):
      self.savefig(file, format="png")
    return file.getvalue()


def color(block: int) -> str:
  """The colour of a block, "#rrggbb", in all pictures."""
  return _COLORS[block % len(_COLORS)]


def _marker(block: int) -> str:
  """The shape of its dots: there are ten colours, and block 10 has that of block 0."""
  return "osD^"[block // len(_COLORS) % 4]


def save(figure: Figure, path: epath.PathLike) -> epath.Path:
  """Writes a figure, in the format that the path's suffix names: .png, .svg or .pdf.

  Returns:
    The path.

  Raises:
    UserError: there is no such format, or the path cannot be written.
  """
  path = paths.expand(path, "path")
  kind, known = path.suffix.removeprefix("."), figure.canvas.get_supported_filetypes()
  if kind not in known:
    raise UserError(f"path={path}: expected a name that ends in one of "
                    + ", ".join(f".{name}" for name in known))
  file = io.BytesIO()
  with mpl.rc_context(_STYLE):
    figure.savefig(file, format=kind)
  with paths.writing(path, "path"):
    path.write_bytes(file.getvalue())
  return path


def svg(figure: Figure, name: str) -> str:
  """A figure to stand within a page of HTML, whose colour and font of text it takes.

  Args:
    figure: of this module.
    name: letters, before all ids: another one for each figure of a page.
  """
  file = io.StringIO()
  with mpl.rc_context(_STYLE):
    figure.savefig(file, format="svg", transparent=True,
                   metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
  text = file.getvalue()
  text = text[text.index("<svg"):].replace(_INK, "currentColor")
  text = re.sub(r"(font: [^;\"]*?px |font-family: )([^;\"]*)", lambda m: m[1] + (
      "monospace" if "monospace" in m[2] else "system-ui, sans-serif"), text)
  return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)


def _styled(draw):
  """Draws under the style of this module, whatever that of the caller is."""

  @functools.wraps(draw)
  def styled(*args, **kwargs) -> Figure:
    with mpl.rc_context():
      mpl.rcdefaults()
      mpl.rcParams.update(_STYLE)
      return draw(*args, **kwargs)

  return styled


def _axes(title: str, x: str, y: str, size: tuple[float, float] = _SIZE) -> Any:
  figure = Figure(figsize=size, layout="constrained")
  axes = figure.add_subplot()
  axes.set(title=title, xlabel=x, ylabel=y)
  return axes


def _toward_less_noise(axes: Any, levels: Iterable[float]):
  """Makes x an axis of sigma that falls, with numbers that people read."""
  axes.set_xscale("log")
  axes.set_xlim(max(levels), min(levels))
  _decades(axes.xaxis, (1,))


def _decades(axis: Any, within: Sequence[int]):
  """Marks a logarithmic axis at these parts of each decade, with numbers as people write them."""
  axis.set_major_locator(ticker.LogLocator(base=10, subs=within, numticks=9))
  axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
  axis.set_minor_locator(ticker.NullLocator())


@_styled
def noise(schedule: Any) -> Figure:
  """How often training draws each noise level, and which block trains and denoises it.

  Args:
    schedule: `model.schedule`, or of `dbjax.make_schedule`; or the `Masking` of masked text.

  Returns:
    A figure: the density, each block's share in its colour; and below a bar for each block, from
    end to end of what it trains on, in which the part that it denoises is full.

  Raises:
    UserError: it is another schedule, of a task of one's own.
  """
  if isinstance(schedule, masking.Masking):
    return _masks(schedule)
  if not isinstance(schedule, schedule_lib.Schedule):
    raise UserError(f"schedule: of a {type(schedule).__name__} there is no picture: expected one "
                    "of dbjax.make_schedule, or a Masking")
  axes = _axes("Noise, and the blocks that take it away", "noise level σ, falling as a sample is "
               "drawn", "density of ln σ in training")
  density = lambda sigma: np.exp(-((np.log(sigma) - schedule.P_mean) / schedule.P_std) ** 2 / 2) / (
      schedule.P_std * math.sqrt(2 * math.pi))
  top = density(np.geomspace(schedule.sigma_min, schedule.sigma_max, 400)).max()
  for b in range(schedule.num_blocks):
    hi, lo = schedule.boundaries[b:b + 2]
    sigma = np.geomspace(hi, lo, 200)
    axes.fill_between(sigma, density(sigma), color=color(b), alpha=0.75, linewidth=0,
                      label=f"block {b}")
  _bars(axes, top, [(schedule.training_range(b)[::-1], schedule.boundaries[b:b + 2])
                    for b in range(schedule.num_blocks)])
  _toward_less_noise(axes, schedule.boundaries)
  return axes.figure


def _masks(schedule: masking.Masking) -> Figure:
  """`noise` of masks: alpha over time, which runs from 1 to 0."""
  axes = _axes("Masks, and the blocks that take them away", "time t, falling as a text is written",
               "share α of tokens that are not masked")
  spans = []
  for b in range(schedule.num_blocks):
    own, trained = schedule.interval(b), schedule.training_interval(b)
    time = np.linspace(float(own.hi), float(own.lo), 100)
    axes.fill_between(time, np.asarray(masking.alpha_of(schedule.alpha, time)), color=color(b),
                      alpha=0.75, linewidth=0, label=f"block {b}")
    spans.append(((float(trained.hi), float(trained.lo)), (float(own.hi), float(own.lo))))
  _bars(axes, 1.0, spans)
  axes.set_xlim(1, 0)
  return axes.figure


def _bars(axes: Any, top: float, spans: Sequence[tuple[Sequence[float], Sequence[float]]]):
  """Below a curve as high as `top`, of each block what it trains on, and within what it denoises.

  Those of neighbours stand one below the other, so that their overlap is seen.
  """
  height = 0.05 * top
  for b, (trained, own) in enumerate(spans):
    y = -height * (1.5 + 1.5 * (b % 2))
    for (start, end), alpha in ((trained, 0.35), (own, 1.0)):
      axes.add_patch(patches.Rectangle((end, y), start - end, height, color=color(b), alpha=alpha,
                                       linewidth=0))
  axes.set_ylim(-height * 4, top * 1.08)
  axes.axhline(0, color=_INK, linewidth=0.7)
  axes.spines["bottom"].set_visible(False)
  axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= top * 1.08])
  if len(spans) > 7:  # they would cover the curve
    axes.figure.set_figheight(_SIZE[1] + 0.2 * math.ceil(len(spans) / 4))
    axes.figure.legend(loc="outside lower center", ncols=4, handlelength=1.0)
  elif len(spans) > 1:
    axes.legend(ncols=2 if len(spans) > 5 else 1, handlelength=1.0)


@_styled
def losses(*runs: metrics.History | epath.PathLike, names: Sequence[str] = ()) -> Figure:
  """The training loss of each block over its steps.

  Args:
    *runs: each the history that `dbjax.train` returns, or a workdir, whose run may be under way.
    names: of the runs, as many; those of the workdirs, if they are not given.

  Returns:
    A figure: a line a block in the block's colour; of several runs each in another style.

  Raises:
    UserError: there are more or fewer names than runs, or a workdir has no config.
  """
  own = iter(paths.names([paths.expand(run, "workdir") for run in runs
                          if not isinstance(run, metrics.History)]))
  names = list(names) or [f"run {i}" if isinstance(run, metrics.History) else next(own)
                          for i, run in enumerate(runs)]
  if len(names) != len(runs):
    raise UserError(f"names={names}: expected as many as runs, {len(runs)}")
  axes = _axes("Loss of each block", "steps of the block", "training loss")
  values = []
  for run, name, style in zip(runs, names, ("-", "--", ":", "-.") * len(runs)):
    history = run if isinstance(run, metrics.History) else _history(run)
    for b in sorted(b for b, steps in history.steps.items() if len(steps)):
      loss = history.loss[b]
      values.extend(loss[np.isfinite(loss)])
      label = f"block {b}" + f", {name}" * (len(runs) > 1)
      marks = dict(marker=_marker(b), markevery=0.1, markersize=4) if b >= len(_COLORS) else {}
      _line(axes, history.steps[b], loss, color=color(b), linestyle=style, label=label, **marks)
  if not values:
    axes.text(0.5, 0.5, "nothing has been reported yet", transform=axes.transAxes, ha="center")
    return axes.figure
  _loss_axis(axes, values)
  axes.set_xlim(left=0)
  if len(axes.get_legend_handles_labels()[0]) > 1:
    axes.legend(ncols=1 + (len(axes.lines) > 8))
  return axes.figure


def _history(workdir: epath.PathLike) -> metrics.History:
  path = paths.expand(workdir, "workdir")
  return metrics.read_history(path, range(config_lib.load(path).num_blocks))


def _line(axes: Any, x: np.ndarray, y: np.ndarray, **style):
  """A line; of a long and restless one its running mean, with what it is of behind it.

  The mean is that of the finite values, so that a nan is one gap behind the line, not many in it.
  """
  width = len(y) // 60
  if width > 1:
    axes.plot(x, y, **style | dict(alpha=_FAINT, linewidth=0.8, label=None, marker=""))
    sums = lambda values: np.convolve(values, np.ones(width), "valid")
    good = np.isfinite(y)
    number = sums(good)
    x, y = sums(x) / width, sums(np.where(good, y, 0)) / np.where(number, number, np.nan)
  axes.plot(x, y, **(dict(marker="o", markersize=3) if len(y) < 8 else {}) | style)


def _loss_axis(axes: Any, values: Sequence[float]):
  """From 0, or logarithmic where losses differ by a factor. An error bar may reach beyond it."""
  low, high = min(values), max(values)
  if low > 0 and high > 8 * low:
    axes.set_yscale("log")
    axes.set_ylim(low / 1.2, high * 1.2)
    _decades(axes.yaxis, (1, 2, 5) if high < 100 * low else (1,))
  else:
    room = 0.08 * (high - min(low, 0)) or 1
    axes.set_ylim(low - room if low < 0 else 0, high + room)
  axes.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.6)


@_styled
def loss_by_noise(scores: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Figure:
  """The loss at each noise level, of the block that denoises it.

  Args:
    scores: of `model.evaluate`, or a file of dbjax.evaluate --json, as read; or rows, as
      `model.losses_by_noise` has them: of block, a level (sigma or time) and a loss x; where they
      have x_trajectory, or the gap by which that is more (with gap_error), it is drawn too.

  Returns:
    A figure: full dots are the loss on noised data, rings that on the states that the sampler
    itself reaches; faint ones have an error as large as the loss. Where dots and rings part, a
    block meets what it was not trained on.

  Raises:
    UserError: there are no such rows.
  """
  rows = find_levels(scores)
  if not rows:
    raise UserError("scores: no loss per noise level among them: expected rows with block, sigma "
                    "and a loss, such as of model.evaluate() or model.losses_by_noise()")
  level = "sigma" if "sigma" in rows[0] else "time"
  name, seen = _loss_of(rows[0]), _on_trajectory(rows[0]) is not None
  axes = _axes("Loss at each noise level", "noise level σ, falling as a sample is drawn"
               if level == "sigma" else "time t, falling as a text is written",
               {"ce": "cross-entropy, nats", "nats": "cross-entropy, nats"}.get(name, "loss"),
               (_SIZE[0], _SIZE[1] + 0.3))
  for b in sorted({row["block"] for row in rows}):
    mine = sorted((row for row in rows if row["block"] == b), key=lambda row: -row[level])
    x = [row[level] for row in mine]
    dots = _marker(b)
    axes.plot(x, [row[name] for row in mine], f"{dots}-", color=color(b), markersize=4.5,
              label=f"block {b}")
    for test, form, alpha in ((_is_known, f"{dots}--", 1),
                              (lambda row: not _is_known(row), dots, 0.3)):
      rings = [row for row in mine if seen and test(row)]
      if rings:
        axes.errorbar([row[level] for row in rings], [*map(_on_trajectory, rings)],
                      [row.get("gap_error") or 0 for row in rings], fmt=form, color=color(b),
                      markersize=7, markerfacecolor="none", linewidth=1, alpha=alpha,
                      label="_nolegend_")
  if seen:
    dot = dict(color=_INK, linewidth=1)
    axes.plot([], [], "o-", markersize=4.5, label="on noised data", **dot)
    axes.plot([], [], "o--", markersize=7, markerfacecolor="none",
              label="on the sampler's own states", **dot)
  _loss_axis(axes, [row[name] for row in rows] + [
      _on_trajectory(row) for row in rows if seen and _is_known(row)])
  if level == "sigma":
    sigmas = [row["sigma"] for row in rows]
    _toward_less_noise(axes, [min(sigmas) / 1.25, max(sigmas) * 1.25])
  else:
    axes.set_xlim(1.02, -0.02)
  axes.figure.legend(loc="outside lower center", ncols=3, handlelength=1.6, columnspacing=1.2)
  return axes.figure


def find_levels(scores: Any) -> Sequence[Mapping[str, Any]]:
  """The rows that `loss_by_noise` draws: of scores those of one table; [] if none has such."""
  tables = scores.values() if isinstance(scores, Mapping) else [scores]
  tables = [[row for row in map(_plain, table) if row and _is_level(row)]
            for table in tables if isinstance(table, list | tuple)]
  return next((rows for rows in tables if rows), [])


def _plain(row: Any) -> dict[str, Any]:
  """A row with Python's numbers in the place of numpy's and jax's; {} if it is none."""
  return {name: x.item() if getattr(x, "shape", None) == () else x
          for name, x in row.items()} if isinstance(row, Mapping) else {}


def _is_level(row: Mapping[str, Any]) -> bool:
  level, name = row.get("sigma", row.get("time")), _loss_of(row)
  number = lambda x: type(x) in (int, float) and math.isfinite(x)
  return (type(row.get("block")) is int and 0 <= row["block"] < 10**4 and number(level)
          and (level > 0 or "time" in row) and number(row.get(name))
          and number(_on_trajectory(row) or 0) and number(row.get("gap_error") or 0))


def _loss_of(row: Mapping[str, Any]) -> str:
  """The name of a row's loss on data: the first that is none of where it was measured, or ""."""
  return next((name for name in row if name not in ("block", "sigma", "time")), "")


def _on_trajectory(row: Mapping[str, Any]) -> float | None:
  """A row's loss on the states of the sampler, if it has one."""
  name = _loss_of(row)
  if type(row.get("gap")) is float:
    return row[name] + row["gap"]
  return row.get(f"{name}_trajectory")


def _is_known(row: Mapping[str, Any]) -> bool:
  """Whether a row's loss on the trajectory says anything."""
  return (row.get("gap_error") or 0) < abs(row[_loss_of(row)])


@_styled
def memory(plan: Any) -> Figure:
  """What one training step needs on a device, end to end against blocks.

  Args:
    plan: a file that `dbjax.plan --json` has written, or what it holds; or a list of
      `dbjax.plan.Plan`.

  Returns:
    A figure: a bar for each program, of its parts, with its total; and, where the plan says it, a
    line at what the device has.

  Raises:
    UserError: it is no plan.
  """
  plans, limit, words = _read_plan(plan)
  scale, unit = (_GIB, "GiB") if max(p["total"] for p in plans) >= _GIB / 10 else (2.0**20, "MiB")
  axes = _axes("Memory of a training step on one device", unit, "",
               (_SIZE[0], 1.25 + 0.42 * len(plans)))
  if words:
    axes.set_xlabel(f"{unit} on one {words}")
  parts = ("parameters", "optimizer", "gradients", "activations", "table")
  shades = ("#3d6ea5", "#6fa3d3", "#a3c4e2", "#e8a13c", "#9aa0a6")
  shown = [part for part in parts if any(p[part] for p in plans)]
  left = np.zeros(len(plans))
  for part in shown:
    width = np.array([p[part] for p in plans]) / scale
    axes.barh(range(len(plans)), width, 0.62, left, color=shades[parts.index(part)], label=part)
    left += width
  for y, p in enumerate(plans):
    refused = "" if p["fits"] else ", does not fit"
    axes.annotate(f"{p['total'] / scale:.3g} {unit}{refused}", (1.03, y), va="center",
                  xycoords=("axes fraction", "data"), annotation_clip=False, fontsize=8.5)
  axes.set_yticks(range(len(plans)), [_plan_name(p) for p in plans])
  axes.invert_yaxis()
  axes.tick_params("y", length=0)
  axes.set_xlim(0, max(p["total"] for p in plans) / scale * 1.03)
  if limit and limit / scale <= axes.get_xlim()[1]:
    axes.axvline(limit / scale, color="#d64f4a", linewidth=1.2, linestyle="--",
                 label="what the device has")
  axes.figure.legend(loc="outside lower left", ncols=3, handlelength=1.0, columnspacing=1.2)
  return axes.figure


def _plan_name(plan: Mapping[str, Any]) -> str:
  name = "end to end" if plan["end_to_end"] else f"B = {plan['num_blocks']}"
  return name + ", remat" * plan["remat"]


def _read_plan(plan: Any) -> tuple[list[dict[str, Any]], int | None, str]:
  """Its programs, the bytes of a device, and the device's name."""
  if isinstance(plan, str | os.PathLike):
    path = paths.expand(plan, "plan")
    try:
      plan = trust.read_json(path)
    except (OSError, ValueError) as e:
      raise UserError(f"plan={path} cannot be read ({e}): expected a file that python -m "
                      "dbjax.plan --json has written") from e
  whole = plan if isinstance(plan, Mapping) else dict(plans=plan)
  try:
    plans = [dict(p) if isinstance(p, Mapping) else vars(p) for p in whole["plans"]]
    needed = ("total", "parameters", "optimizer", "gradients", "activations", "table", "num_blocks")
    if not plans or not all(math.isfinite(p[name]) for p in plans for name in needed):
      raise ValueError
    for p in plans:
      _plan_name(p), bool(p["fits"])
    return plans, whole.get("bytes_per_device"), str(whole.get("device_kind", ""))[:40]
  except (KeyError, TypeError, ValueError):
    raise UserError("plan: expected what python -m dbjax.plan --json writes, or a list of "
                    "dbjax.plan.Plan") from None


@_styled
def compare(figures: Mapping[str, Mapping[str, float]]) -> Figure:
  """The figures of several models, side by side.

  Args:
    figures: of each model, by its name, such as those of `Task.headline`: {"B = 3": {"accuracy":
      0.97}, ...}. One that a model lacks is left out there.

  Returns:
    A figure: a panel for each figure, in which each model has a bar.
  """
  names = list(dict.fromkeys(name for of in figures.values() for name in of))
  columns = min(len(names), 3) or 1
  rows = -(-len(names) // columns)
  bars = max(len(figures), 1)
  figure = Figure(figsize=(2.4 * columns + 0.4, rows * (0.75 + 0.3 * bars)), layout="constrained")
  for i, name in enumerate(names):
    axes = figure.add_subplot(rows, columns, i + 1)
    axes.set_title(textwrap.fill(name, 30), fontweight="normal", fontsize=9)
    for y, of in enumerate(figures.values()):
      value = of.get(name)
      if value is not None and math.isfinite(value):
        axes.barh(y, value, 0.66, color=_NEUTRAL)
        axes.text(max(value, 0), y, f" {value:.3g}", va="center", fontsize=8.5)
    short = [x if len(x) <= _NAME else "…" + x[1 - _NAME:] for x in figures]  # of a path, its end
    axes.set_yticks(range(bars), short if i % columns == 0 else [""] * bars)
    axes.set_ylim(bars - 0.4, -0.6)
    axes.set_xticks([])
    axes.tick_params("y", length=0)
    axes.margins(x=0.25)
    axes.spines["bottom"].set_visible(False)
  return figure


# ---- one sample as it comes to be ----------------------------------------------------------------


@_styled
def strip(model: Any, number: int = 0, *, seed: int = 0, frames: int = 10, **options: Any
          ) -> Figure:
  """One sample, from noise to the answer: what it is on the way, and which block is at work.

  Args:
    model: of `dbjax.load`; or the `Strip` of a task, which has the rest in it.
    number: of the sample, as `model.sample` numbers them.
    seed: as of `model.sample`.
    frames: how many of the sampler's steps are shown.
    **options: as of `model.sample`.

  Returns:
    A figure. Of pictures: above, the state from which a step starts, its noise scaled to that of
    the data; below, what the block makes of it. Of a classifier: how likely each class is. Of
    text: the tokens as they settle, each in the colour of the block that has put it there.

  Raises:
    UserError: an option is none, or nothing is denoised by such a model.
  """
  found = model if isinstance(model, task_lib.Strip) else model.tasks[0].strip(
      model, number, seed, model.options(options))
  if found is None:
    raise UserError(f"task.name={model.config.task.name}: there are no steps of denoising to show")
  keep = _frames(np.asarray(found.block), frames)
  if any(rows.dtype.kind in "UO" for rows in found.rows.values()):
    return _text_strip(found, keep)
  return _frame_strip(found, keep)


def _frames(blocks: np.ndarray, num: int) -> np.ndarray:
  """About `num` of the steps: of each block about as many, evenly spread over its own."""
  begin = np.flatnonzero(np.diff(blocks, prepend=-1))
  each = [max(num // len(begin) + (i < num % len(begin)), 1) for i in range(len(begin))]
  keep = [np.linspace(start, end - 1, min(n, end - start)).round()
          for start, end, n in zip(begin, [*begin[1:], len(blocks)], each)]
  return np.unique(np.concatenate(keep)).astype(int)


def _frame_strip(found: Any, keep: np.ndarray) -> Figure:
  """Frames side by side, over a band in the colours of the blocks."""
  names, left = list(found.rows), 1.1 if found.given is not None else 0.0
  below = 0.28 * any(": " in word for word in found.words)  # of a second line
  height = len(names) * 1.06 + 0.75 + below
  figure = Figure(figsize=(0.74 * (len(keep) + left) + 0.9, 0.74 * height + 0.3),
                  layout="constrained")
  axes = figure.add_subplot()
  axes.set(xlim=(-left, len(keep)), ylim=(-0.75 - below, height - 0.75 - below), aspect="equal",
           title=found.title or "One sample, step by step")
  axes.set_axis_off()
  for i, name in enumerate(names):
    bottom = 1.06 * (len(names) - 1 - i)
    values = found.rows[name][keep]
    axes.text(-left - 0.08, bottom + 0.5, name.replace(", ", "\n"), ha="right", va="center",
              fontsize=8)
    for k, value in enumerate(values):
      box = (k + 0.03, bottom + 0.03, 0.94, 0.94)
      _picture(axes, value, box) if value.dtype == np.uint8 else _numbers(
          axes, value, (values.min(), values.max()), box, color(found.block[keep[k]]))
  if found.given is not None:
    _picture(axes, found.given, (-left, 0.03, 0.94, 0.94))
  for k, word in enumerate(np.asarray(found.words)[keep]):
    axes.text(k + 0.5, -0.06, word.replace(": ", "\n"), ha="center", va="top", fontsize=7.5)
  _band(axes, np.asarray(found.block)[keep], -0.68 - below)
  return figure


def _picture(axes: Any, image: np.ndarray, box: tuple[float, float, float, float]):
  x, y, width, height = box
  image = image[..., :3] if image.shape[-1] > 2 else np.repeat(image[..., :1], 3, -1)
  factor = max(1, 96 // max(image.shape[:2]))  # so that a browser has nothing to smooth
  image = image.repeat(factor, 0).repeat(factor, 1)
  axes.imshow(image, extent=(x, x + width, y, y + height), interpolation="none")


def _numbers(axes: Any, values: np.ndarray, span: tuple[float, float],
             box: tuple[float, float, float, float], shade: str):
  """A few numbers as bars, many as a line, in a box."""
  x, y, width, height = box
  low, high = min(span[0], 0), max(span[1], 0)
  at: Any = lambda v: y + height * (np.asarray(v) - low) / ((high - low) or 1)
  axes.add_patch(patches.Rectangle((x, y), width, height, facecolor=shade, alpha=0.1, linewidth=0))
  flat = values.reshape(-1)
  if len(flat) <= 32:
    each = width / len(flat)
    for i, v in enumerate(flat):
      axes.add_patch(patches.Rectangle((x + each * (i + 0.1), at(0)), each * 0.8, at(v) - at(0),
                                       facecolor=shade, linewidth=0))
  else:
    axes.plot(np.linspace(x, x + width, len(flat)), at(flat), color=shade, linewidth=1)


def _band(axes: Any, blocks: np.ndarray, y: float):
  """Below the frames, from where to where each block is at work."""
  cuts = [0, *(np.flatnonzero(np.diff(blocks)) + 1), len(blocks)]
  for start, end in zip(cuts, cuts[1:]):
    axes.add_patch(patches.Rectangle((start + 0.03, y), end - start - 0.06, 0.3,
                                     facecolor=color(blocks[start]), linewidth=0))
    words = f"block {blocks[start]}" if end - start > 1 else f"{blocks[start]}"
    axes.text((start + end) / 2, y + 0.15, words, ha="center", va="center_baseline", fontsize=7.5,
              color="white", fontweight="bold")


_COLUMNS, _LINES, _FRAMES = 84, 4, 7  # of a text in a strip


def _text_strip(found: Any, keep: np.ndarray) -> Figure:
  """Texts one below the other; a token's colour is that of the block that changed it last."""
  tokens = next(rows for rows in found.rows.values() if rows.dtype.kind in "UO")
  changed = np.ones(tokens.shape, bool)
  changed[1:] = tokens[1:] != tokens[:-1]
  since = np.maximum.accumulate(np.where(changed, np.arange(len(tokens))[:, None], 0))
  if len(keep) > _FRAMES:
    keep = keep[np.linspace(0, len(keep) - 1, _FRAMES).round().astype(int)]
  lengths = np.vectorize(len)(np.where(tokens == "", tokens[-1], tokens)).clip(1)
  places = {k: list(_places(lengths[k])) for k in keep}
  step = max(place[-1][0] for place in places.values()) + 2.6
  figure = Figure(figsize=(6.4, 0.165 * step * len(keep) + 0.5), layout="constrained")
  axes = figure.add_subplot()
  axes.set(xlim=(0, _COLUMNS), ylim=(step * len(keep) - 0.6, -1.1),
           title=found.title or "One text, step by step")
  axes.set_axis_off()
  for i, k in enumerate(keep):
    axes.text(0, step * i - 0.45, f"{found.words[k]}, block {found.block[k]}", fontsize=7.5,
              va="center", color=color(found.block[k]), fontweight="bold")
    for n, (line, column) in enumerate(places[k]):
      word, y = tokens[k, n], step * i + line + 0.5
      if word:
        shade = color(found.block[since[k, n]])
        axes.add_patch(patches.Rectangle((column, y - 0.46), lengths[k, n], 0.92, facecolor=shade,
                                         alpha=0.3, linewidth=0))
      axes.text(column, y, word or "·", family="monospace", fontsize=8, va="center_baseline",
                alpha=1 if word else 0.4)
  return figure


def _places(lengths: Sequence[int]) -> Iterable[tuple[int, int]]:
  """(line, column) of tokens one after the other, as far as there is room."""
  line = column = 0
  for length in lengths:
    if column and column + length > _COLUMNS:
      line, column = line + 1, 0
    if line == _LINES:
      return
    yield line, column
    column += int(length)
