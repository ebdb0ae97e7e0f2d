"""A trace of some steps of each block: what the devices and this process did, and for how long.

`log.profile_steps=10,13` traces steps 10 to 13 of each block that is trained here into the block's
own directory, block_00/plugins/profile, where XProf finds it, alone or in TensorBoard (`pip install
xprof`, then `xprof --logdir=DIR`); the file *.trace.json.gz there opens in https://ui.perfetto.dev.
Steps that fall into several turns of a block make a trace for each turn. A step that is traced
takes longer.
"""

import contextlib
import os
from typing import Any

from etils import epath
import jax


class Window(contextlib.AbstractContextManager):
  """Traces the steps from `first` to `last` of one turn; leaving it ends a trace under way."""

  def __init__(self, steps: tuple[int, ...], directory: epath.Path | None):
    """For the `steps` (first, last), or () for none, and the directory of a block, or None."""
    self._steps = range(steps[0], steps[1] + 1) if steps and directory else range(0)
    self._directory: Any = directory  # None: no step is traced
    self._result: Any = None  # of the last step that is traced; None: none is

  def step(self, number: int) -> contextlib.AbstractContextManager:
    """The context to dispatch step `number` in."""
    if number not in self._steps:
      return contextlib.nullcontext()
    if self._result is None:
      jax.profiler.start_trace(os.fspath(self._directory))
      self._result = ()
    return jax.profiler.StepTraceAnnotation("train", step_num=number)

  def done(self, number: int, result: Any):
    """Step `number` is dispatched, with this result."""
    if self._result is not None:
      self._result = result
      if number + 1 not in self._steps:
        self.__exit__()

  def __exit__(self, *_):
    result, self._result = self._result, None
    if result is not None:
      try:
        jax.block_until_ready(result)
      finally:
        jax.profiler.stop_trace()
      print(f"profile: {self._directory / 'plugins/profile'}", flush=True)
