"""When one of several processes is lost, the others say which, and end: nothing hangs.

JAX itself ends the process in which it loses another, with a stack trace, or lets it wait. So the
first process of a command with --distributed trains nothing: it forks one that does, and watches
it, and the watchers of the others. Each watcher shows that it lives by a small file in the workdir,
`.alive/RUN/PROCESS`, which it touches all the time, and in which it says how its run has ended.

A process is lost when it has ended with an error of its own; when it is no more, which is seen at
once on the same machine; or when its file has not been touched for `STALE` seconds (a machine that
is gone). Then each of the others prints one line, which names it, and ends with `EXIT_CODE`. What
the training process writes of a crash is held back until it is known whose fault it is. A run that
ends in order leaves no file behind.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import json
import os
import re
import select
import signal
import sys
import threading
import time
import traceback
from typing import Any, IO, NamedTuple
import uuid

from etils import epath
import jax

from dbjax import owner
from dbjax import paths
from dbjax.errors import UserError

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on
STALE = 30  # seconds without a sign of life
JOIN = 100  # seconds, in which all processes of a run must have come
DIRECTORY = ".alive"
_LOOK, _LOOK_REMOTE = 1, 10  # seconds between looks at the others; on gs://
_PATIENCE = 3 * STALE  # for a crash, until it is known whose fault it is
_GRACE = 3  # seconds for a process to end by itself, when another has ended
_LINGER = 10  # seconds for which process 0, on which others depend, waits for their end
_ORDERLY = {0} | {128 + s for s in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)}
_CRASH = re.compile(rb"Traceback |Exception |Fatal Python error|terminate called|\*\*\* |"
                    rb"[EF]\d{4} |W\d{4} .*(preemption_sync|coordination)")
_JAX_LOST = b"JAX distributed service detected fatal errors"


class End(NamedTuple):
  """How a process ends.

  Attributes:
    code: its exit code.
    how: in words that follow its name, for the others; empty: in order, nobody minds.
    line: what it says itself, if anything.
    others: it may be the fault of another process.
    lost: of which process it was the fault, and how, if it was.
  """

  code: int
  how: str = ""
  line: str = ""
  others: bool = False
  lost: str = ""


# ---- in the process that trains ------------------------------------------------------------------


@contextlib.contextmanager
def watched(workdir: epath.Path) -> Iterator[Callable[..., None]]:
  """Goes on in a process of its own, which this one watches until it ends, and ends with it.

  Args:
    workdir: that all processes of the run share.

  Yields:
    tell(...), which is to be told `joining`, in words, which processes are expected; and when they
    have come, `process`, the number of this one, and `members`, of each what `member` gives.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  told, telling = os.pipe()
  life, living = os.pipe()  # the system closes what a process has open, however it ends
  err, writing = os.pipe()
  child = os.fork()
  if child:
    for end in (telling, life, writing):
      os.close(end)
    _Watcher(workdir, child, told, err).run()
  os.setpgid(0, 0)  # Ctrl-C reaches the watcher alone, which passes it on
  os.dup2(writing, 2)
  for end in (told, living, err, writing):
    os.close(end)
  threading.Thread(target=lambda: os.read(life, 1) or os._exit(EXIT_CODE), daemon=True).start()

  def tell(**what: Any):
    os.write(telling, json.dumps(what).encode() + b"\n")

  try:
    yield tell
  except SystemExit:
    raise
  except BaseException as e:
    if not isinstance(e, UserError | KeyboardInterrupt):
      traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    tell(end=_end_of(e))
    threading.Event().wait()  # JAX's own end would wait for the others: the watcher ends this one


def member() -> dict[str, Any]:
  """What the others have to know of this process: all of the watcher, which is its parent."""
  return owner.this_process(os.getppid()) | dict(run=uuid.uuid4().hex)


def _end_of(error: BaseException) -> End:
  if isinstance(error, KeyboardInterrupt):
    return End(130, "was stopped by hand")
  if isinstance(error, UserError):
    return End(2, f"ended with an error, to be mended first ({str(error)[:400]})", str(error),
               others=_of_jax(error))
  return End(1, f"ended with a {type(error).__name__}", others=_of_jax(error))


def _of_jax(error: BaseException | None) -> bool:
  """Whether the cause may be that another process is gone: JAX has an error, or Gloo has."""
  return error is not None and (isinstance(error, jax.errors.JaxRuntimeError)
                                or "Gloo" in str(error)
                                or _of_jax(error.__cause__ or error.__context__))


# ---- in the process that watches -----------------------------------------------------------------


class _Watcher:
  """Waits for the process that trains, and for the others."""

  def __init__(self, workdir: epath.Path, child: int, told: int, err: int):
    self._workdir, self._child = workdir, child
    self._told: IO[bytes] | None = os.fdopen(told, "rb", 0)
    self._err = _Stderr(err)
    self._joining, self._since = "", time.monotonic()
    self._peers: _Peers | None = None
    self._end: End | None = None  # how the child has ended, or is about to; and when
    self._ended = 0.0
    self._gone = False  # the child is no more

  def run(self):
    """Watches, and ends this process: what is above this in the stack is the other's."""
    code = 1
    try:
      for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
          signal.signal(number, self._pass_on)
      while (end := self._decide()) is None:
        self._listen()
        self._wait()
        if self._peers:
          self._peers.look()
      self._leave(end)
      code = end.code
    except BaseException:
      traceback.print_exc()
    finally:
      sys.stderr.flush()
      os._exit(code)

  def _pass_on(self, number, _):
    if not self._gone:
      os.kill(self._child, number)

  def _listen(self):
    """Takes, for a moment, what the child tells and what it writes."""
    streams = [s for s in (self._told, self._err.source) if s is not None]
    ready = select.select(streams, [], [], 0.2)[0]
    if self._err.source in ready:
      self._err.take()
    if self._told in ready:
      line = self._told.readline()
      if line.endswith(b"\n"):
        self._hear(**json.loads(line))
      else:
        self._told = None
    if time.monotonic() - self._err.since > _PATIENCE and not self._end:
      self._err.release()  # it lives on: that was no crash

  def _hear(self, joining: str = "", end: Sequence[Any] = (), process: int = 0,
            members: Sequence[Mapping[str, Any]] = ()):
    if end:
      self._note(End(*end))
    else:
      self._joining, self._since = joining, time.monotonic()
    if len(members) > 1:
      try:
        self._peers = _Peers(self._workdir, process, members)
      except paths.failures(self._workdir) as e:
        self._note(End(2, "cannot write", f"--workdir={self._workdir} cannot be written "
                       f"({paths.reason(e)}): choose another"))

  def _wait(self):
    """Notes the end of the child."""
    pid, status = (0, 0) if self._gone else os.waitpid(self._child, os.WNOHANG)
    if not pid:
      return
    self._gone = True
    self._err.take_all()
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
      self._note(End(code, "" if code in _ORDERLY else f"ended with exit code {code}"))
      return
    how = (f"was ended by {signal.Signals(-code).name}"
           + ", perhaps for want of memory" * (code == -signal.SIGKILL))
    quiet = 128 - code in _ORDERLY or code == -signal.SIGABRT  # asked for; or says why itself
    self._note(End(128 - code, how, "" if quiet else self._go_on(f"this process {how}"),
                   others=code == -signal.SIGABRT))

  def _note(self, end: End):
    if self._end is None:
      self._end, self._ended = end, time.monotonic()

  def _decide(self) -> End | None:
    """How this process is to end now; None: not yet."""
    now, end, peers = time.monotonic(), self._end, self._peers
    if end and not end.others:
      return end
    lost = peers.lost if peers else ""
    if not lost and end and now - self._ended > (_PATIENCE if peers else 0):
      if _JAX_LOST not in self._err.held and (end.line or not self._joining):
        return end
      lost = "another process was lost, or the network; see what the others say"
    if lost and (end or (peers and now - peers.since > _GRACE)):
      return End(EXIT_CODE, line=self._go_on(lost), lost=lost)
    if self._joining and now - self._since > JOIN:
      return End(EXIT_CODE, lost="some did not come", line=(
          f"--distributed: {self._joining}, and not all have come within {JOIN} s: start each with "
          "the same command, and see whether one has ended with an error or cannot be reached"))
    return None

  def _go_on(self, lost: str) -> str:
    return f"{lost}: the same command goes on from the last checkpoints in {self._workdir}"

  def _leave(self, end: End):
    """Says how this process ends, to people and to the others, and ends the child."""
    if not end.lost:
      self._err.release()
    if end.line:
      print("error:", end.line, file=sys.stderr, flush=True)
    if self._peers:
      self._peers.end(end, linger=not self._gone and not end.lost)
    if not self._gone:
      os.kill(self._child, signal.SIGKILL)
      os.waitpid(self._child, 0)
    if self._peers:
      self._peers.clear()


class _Stderr:
  """What the child writes there: passed on, but held back from where it looks like a crash.

  Attributes:
    source: where it comes from; None: no more will.
    held: what is held back.
    since: when that began; inf: nothing is.
  """

  def __init__(self, source: int):
    self.source: int | None = source
    self.held, self.since = b"", float("inf")
    self._part = b""  # of a line that is not whole yet

  def take(self):
    assert self.source is not None
    came = os.read(self.source, 1 << 16)
    if not came:
      self.source = None
    *lines, self._part = (self._part + came).split(b"\n")
    for line in lines:
      if not self.held and not _CRASH.match(line):
        _write(line + b"\n")
        continue
      self.since = self.since if self.held else time.monotonic()
      self.held += line + b"\n"

  def take_all(self):
    """What there is still."""
    while self.source is not None and select.select([self.source], [], [], 0)[0]:
      self.take()
    if self._part:
      self.held, self._part = self.held + self._part + b"\n", b""

  def release(self):
    _write(self.held)
    self.held, self.since = b"", float("inf")


def _write(content: bytes):
  sys.stderr.buffer.write(content)
  sys.stderr.buffer.flush()


class _Peers:
  """The other watchers of a run, by their files, and the file of this one.

  Attributes:
    lost: which of them is lost, and how; empty: none.
    since: when that was found.
  """

  def __init__(self, workdir: epath.Path, process: int, members: Sequence[Mapping[str, Any]]):
    self.lost, self.since = "", 0.0
    self._process, self._members = process, members
    self._others = [p for p in range(len(members)) if p != process]
    self._workdir, self._directory = workdir, workdir / DIRECTORY / members[0]["run"]
    remote = "://" in os.fspath(workdir)
    self._pace = max(_LOOK_REMOTE if remote else _LOOK, len(members) / 32)
    self._stale = STALE + 3 * self._pace
    self._failures = paths.failures(workdir)  # where it fails for a minute, the watch goes on
    self._looked, self._awake = time.monotonic(), 0.0  # a watcher that was stopped accuses nobody
    self._changed = dict.fromkeys(range(len(members)), (None, 0.0))  # when a file was touched; seen
    self._content = json.dumps(dict(end=None))
    self._directory.mkdir(parents=True, exist_ok=True)
    self._write()
    if process == 0:
      self._forget_others()

  def _write(self):
    fresh = self._directory / f"{self._process}.new"
    fresh.write_text(self._content)
    fresh.replace(self._directory / str(self._process))

  def look(self):
    """Shows that this one lives, and sees whether the others do."""
    passed = time.monotonic() - self._looked
    if self.lost or passed < self._pace:
      return
    self._looked += passed
    self._awake += min(passed, 2 * self._pace)
    with contextlib.suppress(self._failures):  # or the next time
      owner.touch(self._directory / str(self._process), self._content)
    self.lost = next(filter(None, map(self._fate, self._others)), "")
    self.since = time.monotonic()

  def _fate(self, process: int) -> str:
    """How a process was lost; empty: it lives, or has ended in order."""
    dead = self._dead(process)  # before its file is read, where its last word stands
    file = self._read(process)
    m = self._members[process]
    name = f"process {process} of {len(self._members)} (host {m['host']}, pid {m['pid']})"
    if file and file["end"]:
      end = End(*file["end"])
      return end.lost or (f"{name} {end.how}" if end.how else "")
    if dead:
      return f"{name} was killed, perhaps for want of memory"
    if (silent := self._silent(process)) > self._stale:
      return (f"{name} has given no sign of life for {silent:.0f} s in {self._directory}, which "
              "all processes must share")
    return ""

  def _silent(self, process: int) -> float:
    """Seconds without a sign of life."""
    return self._awake - self._changed[process][1]

  def _dead(self, process: int) -> bool:
    """Whether it was on this machine, and is no more."""
    return bool(owner.dead(self._members[process]))

  def _read(self, process: int) -> dict[str, Any] | None:
    """What its file says; None where there is none, or it cannot be read now."""
    path = self._directory / str(process)
    try:
      content, touched = json.loads(path.read_text()), path.stat().mtime
    except (self._failures, ValueError):
      return None
    if touched != self._changed[process][0]:
      self._changed[process] = touched, self._awake
    return content

  def end(self, end: End, linger: bool):
    """Leaves a last word; may wait, where the others depend on this one, for their end."""
    self._content = json.dumps(dict(end=end))
    with contextlib.suppress(self._failures):
      self._write()
    until = time.monotonic() + _LINGER * (linger and self._process == 0)
    while not self._all_ended() and time.monotonic() < until:
      time.sleep(0.2)

  def _all_ended(self) -> bool:
    files = {p: self._read(p) for p in self._others}
    return not self._is_there() or all(
        file and file["end"] or self._dead(p) or self._silent(p) > self._stale
        for p, file in files.items())

  def _is_there(self) -> bool:
    with contextlib.suppress(self._failures):
      return self._directory.exists()
    return True

  def clear(self):
    """Removes the files of the run, if this is the last to leave."""
    if not self._all_ended():
      return
    with contextlib.suppress(self._failures, ValueError):  # a directory is not empty
      self._directory.rmtree()
      self._directory.parent.rmdir()
      self._workdir.rmdir()  # nothing was trained

  def _forget_others(self):
    """Removes the files of runs of which no process could clear them."""
    now = (self._directory / "0").stat().mtime
    for directory in self._directory.parent.iterdir():
      with contextlib.suppress(self._failures):
        if all(now - file.stat().mtime > owner.LONG_AGO for file in directory.iterdir()):
          directory.rmtree()
