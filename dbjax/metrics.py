"""What a run shows of itself: bars on a terminal (`display.py`), or else a line at intervals.

The figures are kept as `logs.py` says; `read_history` reads them.
"""

from collections.abc import Iterable, Mapping, Sequence
import time
from typing import Any, NamedTuple

from etils import epath
import jax
import numpy as np

from dbjax import display
from dbjax import logs
from dbjax import paths
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
    rows = logs.rows(paths.directory(workdir, b) / logs.FILE)
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

  def __init__(self, config, groups: Sequence[tuple[int, ...]], steps: Mapping[int, int],
               seconds: Mapping[int, float], mine: Iterable[int],
               kept: Mapping[int, logs.BlockLogs]):
    """For blocks that are trained in `groups`.

    Args:
      config: resolved.
      groups: blocks that are trained at once.
      steps, seconds: what each block has behind it.
      mine: the blocks whose figures this process shows.
      kept: where the figures of a block are kept, if they are.
    """
    self._config = config
    self._train_of = {group: task_lib.of_block(config, group[0]).train for group in groups}
    self._steps = dict(steps)
    self.lost: set[int] = set()  # blocks that have diverged: no time is left for them
    self.seconds = dict(seconds)  # spent on each block, over all its runs
    # Seconds per step and layer, of the last interval of a group.
    self._pace: dict[tuple[int, ...], float] = {}
    # (blocks that moved, metrics of the group).
    self._pending: dict[tuple[int, ...], list[tuple[Sequence[int], Mapping[str, jax.Array]]]] = {
        group: [] for group in groups}
    self._since = {group: 0.0 for group in groups}  # seconds, of the interval under way
    self._report_due: tuple[int, ...] | None = None
    self._clock = 0.0  # when what is not counted yet began, once there is a turn
    self._kept = dict(kept)
    self._mine = sorted(mine)
    totals = {b: train.num_steps for group, train in self._train_of.items() for b in group
              if b in self._mine}
    self._bars = display.Bars(steps, dict(sorted(totals.items()))) if (
        totals and display.is_possible()) else None

  def start_turn(self):
    self._clock = time.perf_counter()

  def add(self, group: tuple[int, ...], active: Sequence[int], metrics: Mapping[str, jax.Array]):
    """The metrics (K,) of a step, still being computed, of K blocks of which `active` moved."""
    self._flush()
    for block in active:
      self._steps[block] += 1
      if self._bars:
        self._bars.count(block, self._steps[block])
    step = self._steps[active[0]]
    self._pending[group].append((active, metrics))
    jax.block_until_ready(self._pending[group][-3:-2])  # no more than two steps run ahead
    if self.is_due(group, step):
      self._report_due = group

  def is_due(self, group: tuple[int, ...], step: int) -> bool:
    """Whether a group's figures are reported at a step."""
    return step % self._config.log.every_steps == 0 or step == self._train_of[group].num_steps

  def show(self, blocks: Iterable[int], path: epath.Path):
    """Says where samples are, and keeps them with the first of those blocks that it can."""
    print(f"samples: {path}", flush=True)
    block = next((b for b in blocks if b in self._kept), None)
    if block is not None:
      self._kept[block].show(self._steps[block], path)

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
      if block not in self._mine or not moved:
        continue
      moved = [{name: x[position] for name, x in metrics.items()} for metrics in moved]
      begin = self._steps[block] - len(moved)
      skipped = [begin + i for i, metrics in enumerate(moved) if metrics["skipped"]]
      means = _means(moved)
      if block in self._kept:
        self._kept[block].write(self._steps[block], means | {
            "skipped": len(skipped), "examples_per_s": speed, "seconds": self.seconds[block],
            "device_bytes": sharding.bytes_in_use()}, skipped)
      if skipped:
        print(f"note: block {block} passed over {len(skipped)} batches, of step "
              f"{', '.join(map(str, skipped[:10]))}{', ...' * (len(skipped) > 10)}: its loss or "
              "gradient was not finite, or its loss exploded", flush=True)
      said = f"loss {means['loss']:.4f} | {speed:,.0f} examples/s | left {clock(here)}"
      if self._bars:
        self._bars.say(block, said, f"left {clock(everywhere)}")
        continue
      print(f"block {block} | step {self._steps[block]:>6}/{self._train_of[group].num_steps} | "
            f"{said} block, {clock(everywhere)} all", flush=True)

  def _layers(self, group: tuple[int, ...]) -> int:
    return sum(self._config.layers_per_block[b] for b in group)

  def _time_left(self, active: tuple[int, ...]) -> tuple[float, float]:
    """Seconds for the active group, and for all; unseen ones go at the active one's pace."""
    steps = lambda group: max((self._train_of[group].num_steps - self._steps[b]
                               for b in group if b not in self.lost), default=0)
    left = {group: steps(group) * self._layers(group) * self._pace.get(group, self._pace[active])
            for group in self._pending}
    return left[active], sum(left.values())

  def close(self):
    if self._bars:
      self._bars.close()


def _means(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Of each figure its mean over the steps that have it, but for those that were passed over."""
  good = [step for step in steps if not step["skipped"]]
  found = {}
  for name in dict.fromkeys(name for step in steps for name in step):
    values = [step[name] for step in good if name in step] or [
        step[name] for step in steps if name in step]
    found[name] = float(np.mean(values))
  return found


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


def clock(seconds: float) -> str:
  """Hours, minutes and seconds: 1:02:03."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}"
