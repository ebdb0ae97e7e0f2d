"""Training in Python, op by op, to be looked at: `dbjax.main --debug`.

Nothing is compiled, so that a breakpoint or a print in a network or a task shows arrays with their
values, layer by layer; and the first operation that makes a nan ends the run, in one line that says
which, where, and in which step of which block. It is slow: meant for small configs and few steps.

The run goes on from where the workdir stands, on one device, and leaves the workdir as it is:
nothing is saved, because what is computed op by op is rounded otherwise.
"""

from collections.abc import Iterator, Sequence
import contextlib
import traceback
from typing import Any

import jax

from dbjax import config as config_lib
from dbjax import lookup
from dbjax.errors import UserError

_MESH = {"mesh.block": 1, "mesh.data": 1, "mesh.fsdp": 1}
_TRANSFORMED = "JaxStackTraceBeforeTransformation"  # of an operation in the backward pass


@contextlib.contextmanager
def in_python() -> Iterator[None]:
  """Inside, functions of JAX run op by op, and a nan is an error."""
  with jax.disable_jit(), jax.debug_nans(True), nan_named():
    yield


def prepare(config: Any, fork_from: Any) -> Any:
  """The resolved config of such a run. Raises UserError where there can be none."""
  if jax.process_count() > 1:
    raise UserError("--debug: one process runs in Python, on one device: leave --distributed out")
  if fork_from:
    raise UserError(f"--fork_from={fork_from}: --debug writes nothing: fork first, without it")
  print("debug: runs in Python, op by op, on one device, and saves nothing", flush=True)
  return config_lib.changed(config, **_MESH)


@contextlib.contextmanager
def nan_named(blocks: Sequence[int] = (), step: int = 0) -> Iterator[None]:
  """Raises UserError in the place of JAX's error of a nan, in this step of blocks or before any."""
  try:
    yield
  except FloatingPointError as e:
    backward = type(e.__cause__).__name__ == _TRANSFORMED
    frame = _own_frame(e.__cause__ if backward else e)
    line = f": {frame.line}" * bool(frame.line)
    which = f"block{'s' * (len(blocks) > 1)} {', '.join(map(str, blocks))}, step {step}" if (
        step) else "before the first step"
    raise UserError(f"{which}: {e}{' in the backward pass' * backward}, at {frame.filename}, line "
                    f"{frame.lineno}, in {frame.name}{line}") from e


def _own_frame(error: Any) -> traceback.FrameSummary:
  """The innermost frame that is no library's."""
  frames = traceback.extract_tb(error.__traceback__)
  own = [f for f in frames if not lookup.is_library(f.filename)]
  return (own or frames)[-1]
