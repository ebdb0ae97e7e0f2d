"""The progress of a run on a terminal: a bar for each block, by rich.

Where output is no terminal (a pipe, a log, a notebook), or one that cannot move its cursor
(TERM=dumb), and where a run has several processes, which may share one terminal, lines are printed
instead; so with --debug, where a debugger may ask for something. NO_COLOR is respected. What is
printed meanwhile comes to stand above the bars.

A thread draws, twice a second; a step only counts.
"""

from collections.abc import Mapping
import sys

import jax

_PER_SECOND = 2
_WIDTH = 60  # characters of a line beside its bar
_HEIGHT = 3  # lines of the terminal that are left to others


def is_possible() -> bool:
  """Whether bars can be drawn here."""
  may_ask = getattr(sys.stdout, "isatty", lambda: False)  # whatever a notebook puts in its place
  in_python = jax.config.jax_disable_jit  # type: ignore[attr-defined]  # jax makes it as it runs
  if jax.process_count() > 1 or in_python or not may_ask():
    return False
  from rich import console  # only where it is used

  terminal = console.Console()
  return terminal.is_interactive and not terminal.is_dumb_terminal


class Bars:
  """The bars of some blocks, and where there are several, one of all of them."""

  def __init__(self, steps: Mapping[int, int], totals: Mapping[int, int]):
    """Draws at once.

    Args:
      steps: at which each block stands.
      totals: how many each block has.
    """
    from rich import console  # only where it is used
    from rich import progress

    self._console = console.Console(soft_wrap=True)  # a long path stays one line, to be copied
    bar = progress.BarColumn(max(8, min(40, self._console.width - _WIDTH)))
    self._progress = progress.Progress(
        "{task.description}", bar, "{task.completed}/{task.total}", "{task.fields[said]}",
        console=self._console, refresh_per_second=_PER_SECOND,
        redirect_stderr=sys.stderr.isatty())  # or rich would show here what goes to a file
    for b, total in totals.items():
      self._progress.add_task(f"block {b}", total=total, completed=steps[b], said="")
    several = len(totals) > 1
    if several:
      self._progress.add_task("all", total=sum(totals.values()), completed=sum(steps.values()),
                              said="")
    tasks = self._progress.tasks
    self._of = dict(zip(totals, tasks))
    self._all = tasks[-1] if several else None
    self._choose(0)
    self._progress.start()
    self._console.show_cursor(True)  # it would stay hidden after a kill -9

  def count(self, block: int, step: int):
    """A block is at a step."""
    self._of[block].completed = step
    if self._all:
      self._all.completed = sum(task.completed for task in self._of.values())

  def say(self, block: int, said: str, of_all: str):
    """Puts words behind the bars of a block and of all."""
    self._of[block].fields["said"] = said
    if self._all:
      self._all.fields["said"] = of_all
    self._choose(list(self._of).index(block))

  def _choose(self, position: int):
    """Shows as many blocks as there is room for: those around one of them."""
    room = max(1, self._console.height - _HEIGHT - bool(self._all))
    first = min(max(0, position - room // 2), max(0, len(self._of) - room))
    for i, task in enumerate(self._of.values()):
      task.visible = first <= i < first + room

  def close(self):
    """Draws a last time, and gives the terminal back as it was."""
    self._progress.stop()
