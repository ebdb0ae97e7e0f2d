"""Bars on a terminal: drawn on one, and on nothing else; what is left there when a run ends."""

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import sys
import termios
import threading
import time

import jax
import pytest

from dbjax import display
from dbjax import loop

pytestmark = pytest.mark.usefixtures("steps_once")


class Terminal:
  """The other end of a pseudo terminal: what it was sent, and how that looks."""

  def __init__(self, rows, columns):
    self._master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    self.file, self._read = os.fdopen(slave, "w"), []
    self._reader = threading.Thread(target=self._listen, daemon=True)
    self._reader.start()

  def _listen(self):
    try:
      while data := os.read(self._master, 1 << 16):
        self._read.append(data)
    except OSError:  # nobody holds the other end any more
      pass

  @property
  def sent(self):
    return b"".join(self._read).decode()

  def close(self):
    self.file.close()
    self._reader.join(10)
    os.close(self._master)

  def screen(self):
    """The lines on it, by the few sequences that move the cursor."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[?\d;]*[a-zA-Z]|\n|\r|[^\x1b\n\r]+", self.sent):
      if part == "\n":
        row += 1
        lines += [""] * (row == len(lines))
      elif part.endswith("A") and part[0] == "\x1b":
        row -= int(part[2:-1] or 1)
      elif part == "\x1b[2K":
        lines[row] = ""
      elif part == "\r" or part[0] == "\x1b":
        continue
      else:
        lines[row] += part
    return [line.rstrip() for line in lines]


@pytest.fixture
def terminal(monkeypatch):
  """terminal(rows=, columns=): stdout is one from now on."""
  made = []

  def make(rows=24, columns=120, term="xterm-256color", **variables):
    for name in ("NO_COLOR", "TTY_INTERACTIVE", "FORCE_COLOR", "TTY_COMPATIBLE"):
      monkeypatch.delenv(name, raising=False)
    # Rich asks the process's own streams for the size, which are none of this terminal.
    size = dict(LINES=str(rows), COLUMNS=str(columns))
    for name, value in dict(TERM=term, **size, **variables).items():
      monkeypatch.setenv(name, value)
    made.append(Terminal(rows, columns))
    monkeypatch.setattr(sys, "stdout", made[-1].file)
    return made[-1]

  yield make
  for one in made:
    one.close()


@pytest.fixture
def train(tiny, tmp_path):
  return lambda **fields: loop.train(tiny(**fields), tmp_path / "run", devices=jax.devices()[:1])


def is_left_in_order(terminal):
  """What was done to the terminal and to this process is undone."""
  time.sleep(0.1)  # for what is still on its way
  assert sys.stdout is terminal.file
  assert terminal.sent.rfind("\x1b[?25h") > terminal.sent.rfind("\x1b[?25l")
  assert not [t for t in threading.enumerate() if "Refresh" in type(t).__name__]
  return True


def test_each_block_has_a_bar_and_what_is_printed_stands_above(terminal, train, monkeypatch):
  screen, add = terminal(), loop.metrics.Progress.add

  def say(self, group, active, metrics):
    add(self, group, active, metrics)
    if self._steps[0] == 4 and group == (0,):
      time.sleep(1.2)  # so that it is drawn on the way, too
      print("note: " + "far " * 50, flush=True)

  monkeypatch.setattr(loop.metrics.Progress, "add", say)
  train()
  assert is_left_in_order(screen)
  assert re.search(r"block 0 .* 4/6 +loss \d\.\d{4} \| [\d,]+ examples/s \| left \d:", screen.sent)
  *above, b0, b1, b2, everything, last = screen.screen()
  assert last == "" and sum(line.startswith("block") for line in above) == 0
  assert "note: " + ("far " * 50).strip() in above
  for number, bar in enumerate((b0, b1, b2)):
    assert re.fullmatch(rf"block {number} ━+ 6/6 +loss [\d.]+ \| [\d,]+ examples/s \| "
                        r"left \d:\d\d:\d\d", bar)
  assert re.fullmatch(r"all +━+ 18/18 left 0:00:00", everything)
  assert "| step" not in screen.sent


def test_what_is_no_terminal_has_no_bars(train, capsys):
  train(**{"train.blocks": (0,)})
  out = capsys.readouterr().out
  assert out.count("block 0 | step ") == 3 and "\x1b" not in out and "━" not in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_leaves_the_terminal_in_order(terminal, train, monkeypatch, number):
  screen, add = terminal(), loop.metrics.Progress.add

  def stop(self, group, active, metrics):
    add(self, group, active, metrics)
    if self._steps[0] == 3:
      os.kill(os.getpid(), number)

  monkeypatch.setattr(loop.metrics.Progress, "add", stop)
  assert train(**{"train.blocks": (0,)}).stopped == number
  assert is_left_in_order(screen)
  assert re.search(r"block 0 [╺╸━]+ 3/6", screen.screen()[-3])
  assert screen.screen()[-2] == "stopped and saved: the same command goes on from here"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_terminal_in_order(terminal, train, monkeypatch, error):
  screen = terminal()

  def fail(*_):
    raise error("here")

  monkeypatch.setattr(loop.metrics.Progress, "add", fail)
  with pytest.raises(error):
    train(**{"train.blocks": (0,)})
  assert is_left_in_order(screen)


def test_no_color_is_respected(terminal, train):
  screen = terminal(NO_COLOR="1")
  train(**{"train.blocks": (0,)})
  assert "━" in screen.sent and not re.search(r"\x1b\[[\d;]*(3\d|38;5;\d+|9\d)m", screen.sent)
  screen = terminal()
  display.Bars({0: 1}, {0: 2}).close()
  time.sleep(0.1)
  assert re.search(r"\x1b\[[\d;]*(3\d|38;5;\d+|9\d)m", screen.sent)


def test_a_stream_that_can_only_be_written_has_no_bars(monkeypatch):
  class Stream:
    write, flush = (lambda *_: None,) * 2

  monkeypatch.setattr(sys, "stdout", Stream())
  assert not display.is_possible()


def test_where_bars_are_possible(terminal, monkeypatch):
  terminal()
  assert display.is_possible()
  monkeypatch.setattr(jax, "process_count", lambda: 2)  # which may share the terminal
  assert not display.is_possible()
  monkeypatch.setattr(jax, "process_count", lambda: 1)
  with jax.disable_jit():  # a debugger may need it
    assert not display.is_possible()
  terminal(term="dumb")
  assert not display.is_possible()


def test_of_more_blocks_than_lines_those_around_the_active_one_are_shown(terminal):
  screen = terminal(rows=8)
  totals = dict.fromkeys(range(30), 10)
  with contextlib.closing(display.Bars(dict.fromkeys(range(30), 0), totals)) as bars:
    bars.count(20, 7)
    bars.say(20, "loss 1", "left")
    time.sleep(0.1)
    assert screen.sent.endswith("\x1b[?25h")  # a kill -9 hides no cursor
  time.sleep(0.1)
  lines = [line for line in screen.screen() if line]
  assert [line.split()[1] for line in lines[:-1]] == ["18", "19", "20", "21"]
  assert re.fullmatch(r"all +[╺╸━]+ +7/300 left", lines[-1])


def test_a_step_only_counts(terminal, monkeypatch):
  screen, writers = terminal(), []

  class Stream:
    __getattr__ = lambda self, name: getattr(screen.file, name)

    def write(self, text):
      writers.append(threading.current_thread())
      return screen.file.write(text)

  monkeypatch.setattr(sys, "stdout", Stream())
  with contextlib.closing(display.Bars({0: 0}, {0: 10**6})) as bars:
    assert threading.current_thread() in writers  # it draws at once
    writers.clear()
    for step in range(10_000):
      bars.count(0, step)
    assert threading.current_thread() not in writers  # another thread may have drawn
    assert bars._of[0].completed == 9_999
