"""What a run shows of itself: a console line with the time left, JSONL, TensorBoard.

A block's figures live in the block's own directory (`block_00/metrics.jsonl` and event
files beside it), so that machines which train different blocks do not write to one file.
"""

from collections.abc import Iterable, Mapping, Sequence
import json
import sys
import time
from typing import Any, NamedTuple

from etils import epath
import jax
import numpy as np

from dbjax import checkpoint
from dbjax import sharding
from dbjax import task as task_lib


class History(NamedTuple):
  """What blocks have behind them, over all their runs: by block, as arrays to plot.

  Attributes:
    steps: {block: (n,) int64}, at which something was reported.
    loss: {block: (n,) float64}, the mean since the report before.
    metrics: {block: {name: (n,) float64}}, everything that was reported.
    stopped: the signal that ended the run early, or None.
  """

  steps: dict[int, np.ndarray]
  loss: dict[int, np.ndarray]
  metrics: dict[int, dict[str, np.ndarray]]
  stopped: int | None


def read_history(workdir: epath.Path, blocks: Iterable[int], stopped: int | None = None
                 ) -> History:
  """The history of blocks, as their files in a workdir have it."""
  history = History(steps={}, loss={}, metrics={}, stopped=stopped)
  for b in blocks:
    path = checkpoint.directory(workdir, b) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    names = dict.fromkeys(name for row in rows for name in row if name != "skipped_steps")
    found = {name: np.array([row.get(name, np.nan) for row in rows], np.float64) for name in names}
    history.metrics[b] = found
    history.steps[b] = found.get("step", np.zeros(0)).astype(np.int64)
    history.loss[b] = found.get("loss", np.zeros(0))
  return history


class Progress:
  """Collects the metrics of every step and reports their mean at intervals.

  Metrics stay on the device until the step after is dispatched, so the device never
  waits for a report.
  """

  def __init__(self, config, workdir: epath.Path, groups: Sequence[tuple[int, ...]],
               steps: Mapping[int, int], seconds: Mapping[int, float], mine: Iterable[int]):
    """For blocks that are trained in `groups`.

    Args:
      config: resolved.
      workdir: of the experiment.
      groups: blocks that are trained at once.
      steps, seconds: what each block has behind it.
      mine: the blocks whose figures this process prints and writes.
    """
    self._config = config
    self._train_of = {group: task_lib.of_block(config, group[0]).train for group in groups}
    self._steps = dict(steps)
    self.seconds = dict(seconds)  # spent on each block, over all its runs
    self._pace = {}  # seconds per step and layer, of the last interval of a group
    self._pending = {group: [] for group in groups}  # (blocks that moved, metrics of the group)
    self._since = {group: 0.0 for group in groups}  # seconds, of the interval under way
    self._report_due = None
    self._clock = None
    self._files = {b: _BlockFiles(checkpoint.directory(workdir, b), steps[b]) for b in mine}

  def start_turn(self):
    self._clock = time.perf_counter()

  def add(self, group: tuple[int, ...], active: Sequence[int], metrics: Mapping[str, jax.Array]):
    """The metrics (K,) of a step, still being computed, of K blocks of which `active` moved."""
    self._flush()
    for block in active:
      self._steps[block] += 1
    step = self._steps[active[0]]
    self._pending[group].append((active, metrics))
    jax.block_until_ready(self._pending[group][-3:-2])  # no more than two steps run ahead
    if step % self._config.log.every_steps == 0 or step == self._train_of[group].num_steps:
      self._report_due = group

  def end_turn(self, group: tuple[int, ...]):
    """Waits for the group's last step, which may only be dispatched."""
    jax.block_until_ready(self._pending[group][-1:])
    if self._report_due is None:
      self._tick(group)
    self._flush()

  def _tick(self, group: tuple[int, ...]):
    now = time.perf_counter()
    for block in group:
      self.seconds[block] += now - self._clock
    self._since[group] += now - self._clock
    self._clock = now

  def _flush(self):
    group, self._report_due = self._report_due, None
    if group is None:
      return
    steps = [(active, {name: sharding.local_values(x) for name, x in metrics.items()})
             for active, metrics in self._pending[group]]  # waits for the step that is reported
    self._tick(group)
    seconds, self._since[group], self._pending[group] = self._since[group], 0.0, []
    self._pace[group] = seconds / len(steps) / self._layers(group)
    speed = len(steps) * self._train_of[group].batch_size / seconds
    here, everywhere = self._time_left(group)
    for position, block in enumerate(group):
      moved = [metrics for active, metrics in steps if block in active]
      if block not in self._files or not moved:
        continue
      moved = [{name: x[position] for name, x in metrics.items()} for metrics in moved]
      begin = self._steps[block] - len(moved)
      skipped = [begin + i for i, metrics in enumerate(moved) if metrics["skipped"]]
      good = [metrics for metrics in moved if not metrics["skipped"]] or moved
      means = {name: float(np.mean([m[name] for m in good])) for name in moved[0]}
      self._files[block].write(self._steps[block], means | {
          "skipped": len(skipped), "examples_per_s": speed, "seconds": self.seconds[block],
          "device_bytes": sharding.bytes_in_use()}, skipped)
      if skipped:
        print(f"note: block {block} passed over {len(skipped)} batches, of step "
              f"{', '.join(map(str, skipped[:10]))}{', ...' * (len(skipped) > 10)}: its loss or "
              "gradient was not finite, or its loss exploded", flush=True)
      print(f"block {block} | step {self._steps[block]:>6}/{self._train_of[group].num_steps} | "
            f"loss {means['loss']:.4f} | {speed:,.0f} examples/s | "
            f"left {_clock(here)} block, {_clock(everywhere)} all", flush=True)

  def _layers(self, group: tuple[int, ...]) -> int:
    return sum(self._config.layers_per_block[b] for b in group)

  def _time_left(self, active: tuple[int, ...]) -> tuple[float, float]:
    """Seconds for the active group, and for all; unseen ones go at the active one's pace."""
    left = {
        group: (self._train_of[group].num_steps - min(self._steps[b] for b in group))
               * self._layers(group) * self._pace.get(group, self._pace[active])
        for group in self._pending}
    return left[active], sum(left.values())

  def close(self):
    for files in self._files.values():
      files.close()


def _events(directory: epath.Path, step: int) -> Any:
  hide = "torch" not in sys.modules
  if hide:  # it would be imported too, which takes seconds, to know its tensors
    sys.modules["torch"] = None
  try:
    import tensorboardX  # pylint: disable=g-import-not-at-top
  finally:
    if hide:
      del sys.modules["torch"]
  return tensorboardX.SummaryWriter(str(directory), purge_step=step)


class _BlockFiles:
  """metrics.jsonl and TensorBoard events of one block; steps that are redone are dropped."""

  def __init__(self, directory: epath.Path, step: int):
    directory.mkdir(parents=True, exist_ok=True)
    self._path = directory / "metrics.jsonl"
    lines = self._path.read_text().splitlines() if self._path.exists() else []
    self._lines = [line for line in lines if _step(line) <= step]
    self._make_events = lambda: _events(directory, step + 1)
    self._events = None  # a run that is finished already leaves no empty file

  def write(self, step: int, scalars: Mapping[str, float], skipped: Sequence[int]):
    which = {"skipped_steps": list(skipped)} if skipped else {}
    self._lines.append(json.dumps({"step": step, **scalars, **which}))
    self._path.parent.mkdir(parents=True, exist_ok=True)  # a disk may come back empty
    fresh = self._path.with_name("metrics.jsonl.tmp")
    fresh.write_text("\n".join(self._lines) + "\n")
    fresh.replace(self._path)
    self._events = self._events or self._make_events()
    for name, value in scalars.items():
      self._events.add_scalar(name, value, step)
    self._events.flush()  # a run that is killed goes on after these

  def close(self):
    if self._events:
      self._events.close()


def _step(line: str) -> float:
  try:
    return json.loads(line)["step"]
  except (ValueError, TypeError, KeyError):  # torn by a crash
    return float("inf")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], left: bool = False) -> str:
  """A plain text table; floats with four significant digits, None as nothing.

  Args:
    header: of the columns.
    rows: as long as the header.
    left: words begin at the left of their column, as figures end at its right.
  """
  show = lambda x: f"{x:.4g}" if isinstance(x, float) else "" if x is None else str(x)
  cells = [list(header), *([show(x) for x in row] for row in rows)]
  widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
  pad = str.ljust if left else str.rjust
  return "\n".join("  ".join(pad(c, w) for c, w in zip(row, widths)).rstrip() for row in cells)


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}"
