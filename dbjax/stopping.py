"""What asks a run to stop: a signal, a machine that goes away, an output that nobody reads."""

from collections.abc import Callable
import contextlib
import os
import signal
import sys
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopSignal(contextlib.AbstractContextManager):
  """SIGINT, SIGTERM or SIGHUP (its terminal is closed) to any process: the loop ends after the step
  under way, and saves. After a second SIGINT it ends at once. Other signals may come twice of one
  cause, such as a service manager or a closed terminal: they change nothing.

  The loop also ends, and saves, where nobody reads the output any more, as after `| head -1`: what
  a pipeline has no use for should not hold a machine for days, and the same command goes on.
  SIGPIPE itself is not watched: it would come from any connection.

  `signal` is the one that was received, or None; SIGPIPE where output is not read.
  """

  def __init__(self):
    self.signal = None
    self._first = None  # the first signal here, on which many processes may not have agreed yet
    self._before = {}
    self._steps = 0
    self._stdout = contextlib.redirect_stdout(  # there is none where it was closed, or set to None
        sys.stdout and _Output(sys.stdout, self._unread))

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      # Many processes agree on the step to stop after through JAX, which watches for SIGTERM.
      watched = [signal.SIGINT, signal.SIGHUP]
      watched += [signal.SIGTERM] * (jax.process_count() == 1)
      for number in watched:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
          self._before[number] = signal.signal(number, self._handle)
    self._stdout.__enter__()
    return self

  def __exit__(self, *_):
    self._stdout.__exit__(None, None, None)
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def asked(self) -> bool:
    """To be called once before each step, by every process."""
    if jax.process_count() > 1:
      self._steps += 1
      if multihost_utils.reached_preemption_sync_point(self._steps):
        self.signal = self._first or signal.SIGTERM
    return self.signal is not None

  def _unread(self):
    self._handle(signal.SIGPIPE, None)

  def _handle(self, number, _):
    if self._first or self.signal:
      if number == signal.SIGINT:
        raise KeyboardInterrupt  # asked again: now
      return
    if jax.process_count() > 1:
      self._first = number if number != signal.SIGPIPE else signal.SIGTERM
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      self._first = self.signal = number


class _Output:
  """A stream of text that, once it cannot be written, tells so and is silent from then on."""

  def __init__(self, stream: Any, unread: Callable[[], None]):
    self._stream, self._tell = stream, unread

  def write(self, text: str) -> int:
    self._try(self._stream.write, text)
    return len(text)

  def flush(self):
    self._try(self._stream.flush)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def _try(self, do: Callable, *arguments: Any):
    try:
      do(*arguments)
    except OSError:  # the pipe is closed, or the disk of a log is full
      os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
      self._tell()
