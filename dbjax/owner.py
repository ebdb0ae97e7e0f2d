"""Who trains a block: one run at a time.

While a run trains a block, `block_00/owner.json` names its host, process and start. A second run on
the same block is refused; other blocks of the same workdir are free, as for the tasks of a SLURM
array. An owner that is gone is recognised, and its place taken: on the same host the process is
no more, or the machine has been started anew; on another host, or in another container, the file
is watched until it has not been touched for `STALE` seconds. A reader needs to own nothing.

On gs://, and where a file system knows no hard links, two runs that start in the same second may
both pass.
"""

from collections.abc import Mapping
import contextlib
import datetime
import errno
import json
import math
import os
from pathlib import Path
import socket
import threading
import time
from typing import Any, NamedTuple
import uuid

from etils import epath

from dbjax import paths
from dbjax import tensors
from dbjax.errors import UserError

FILE = "owner.json"
# An owner that cannot be asked is gone after so many seconds without a sign of life, of which it
# gives ten in that time; a machine that was replaced must not wait for long. Clocks of two machines
# may differ, so what counts is that the file does not move while it is watched. Its age, by the
# clock of its file system, only shortens that, never below `_WATCH`: gcsfuse may show for a minute
# what was, and owners of an older dbjax gave a sign every 30 seconds.
STALE = 150
LONG_AGO = 600  # seconds by which no two clocks differ: what is older need not be watched
_TOUCH = 15  # seconds between signs of life
_WATCH = 75
# Of os.link, where a file system knows no hard links: gcsfuse, Google Drive in Colab, exFAT, SMB.
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class Wait(NamedTuple):
  """What is waited for: whether the owner of a block lives.

  Attributes:
    directory: of the block.
    owner: in words.
    seconds: for how long, if it shows no sign of life.
  """

  directory: epath.Path
  owner: str
  seconds: float


class _Look(NamedTuple):
  """An owner's file as it was found."""

  content: bytes
  touched: float


class Owner(contextlib.AbstractContextManager):
  """Owns the blocks in some directories, from `take` until it is left."""

  def __init__(self):
    self._mine = json.dumps(this_process(os.getpid()))
    self._paths: list[epath.Path] = []
    self._watched: dict[epath.Path, tuple[_Look, float]] = {}  # as first seen; when it is gone
    self._left = threading.Event()
    self._thread = threading.Thread(target=self._live, daemon=True)

  def take(self, directory: epath.Path) -> Wait | None:
    """Becomes the owner of a block, if it is not; or says what to wait for before another try.

    Raises:
      UserError: it has another, or cannot be trained.
    """
    exported = directory.with_name(directory.name + tensors.SUFFIX)
    if exported.exists():
      raise UserError(f"{exported} is an exported block, without what its optimizer remembers: it "
                      "cannot be trained further; train others with --config.train.blocks, or "
                      "begin anew in another --workdir (--config.train.init_from)")
    path = directory / FILE
    if path in self._paths:
      return None
    directory.mkdir(parents=True, exist_ok=True)
    while not _create(path, self._mine):
      found = _look(path)
      if found is None:  # it has just been given up
        continue
      owner = _parse(found.content)
      words = f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('started')}"
      seconds = self._seconds_left(path, found, owner)
      if seconds == math.inf:
        raise UserError(f"{directory} is being trained by {words}: wait for its end, stop it, or "
                        f"train other blocks; if it is long gone, remove {path}")
      if seconds:
        return Wait(directory, words, seconds)
      _clear(path, self._mine, found)
    self._paths.append(path)
    if not self._thread.is_alive():
      self._thread.start()
    return None

  def _seconds_left(self, path: epath.Path, found: _Look, owner: Mapping[str, Any]) -> float:
    """For how long an owner has to show no sign of life; 0: it is gone; inf: it lives."""
    here = dead(owner)
    if here is not None:
      return 0 if here else math.inf
    if path not in self._watched:
      self._watched[path] = found, time.monotonic() + _patience(_age(path))
    first, until = self._watched[path]
    return max(0, until - time.monotonic()) if found == first else math.inf

  def __exit__(self, *_):
    self._left.set()
    if self._thread.is_alive():  # a touch that is under way on gs:// would make the file anew
      self._thread.join(_TOUCH)
    for path in self._paths:
      with contextlib.suppress(paths.failures(path)):
        if path.read_text() == self._mine:
          path.unlink()

  def _live(self):
    while not self._left.wait(_TOUCH):
      for path in self._paths:
        with contextlib.suppress(paths.failures(path)):  # the next try may succeed
          if path.read_text() == self._mine:  # this one slept, and was taken for gone, if not
            touch(path, self._mine)


def this_process(pid: int) -> dict[str, Any]:
  """What tells a process of this machine from all others."""
  now = datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds")
  return dict(host=socket.gethostname(), namespace=_namespace(), pid=pid, started=now,
              boot=_boot(), born=_born(pid))


def dead(process: Mapping[str, Any]) -> bool | None:
  """Whether a process is no more; None: it is one of another machine, or of another container."""
  here = socket.gethostname(), _namespace()  # which dbjax did not always record
  if (process.get("host"), process.get("namespace", here[1])) != here:
    return None
  return process.get("boot") != _boot() or _born(process.get("pid")) != process.get("born")


def read(directory: epath.Path) -> dict[str, Any] | None:
  """What the owner of a block says of itself; {}: that cannot be read; None: it has none."""
  path = directory / FILE
  try:
    found = _look(path)
  except paths.failures(path):
    return {}
  return None if found is None else _parse(found.content)


def is_alive(directory: epath.Path, process: Mapping[str, Any]) -> bool:
  """Whether an owner, as `read` found it, still trains; for a reader, who writes nothing.

  Of one on another host that is so for as long as it shows signs of life, by this machine's clock.
  """
  here = dead(process)
  if here is not None:
    return not here
  try:
    return time.time() - (directory / FILE).stat().mtime < STALE
  except paths.failures(directory):  # it has just left
    return False


def _patience(age: float) -> float:
  """Seconds for which an owner's file of this age is watched, before its owner counts as gone."""
  return 0 if age > LONG_AGO else min(max(STALE - age, _WATCH), STALE)


def _age(path: epath.Path) -> float:
  """Seconds since a file was touched, by the clock of its file system; inf if there is none."""
  probe = path.with_name(f"{FILE}.{uuid.uuid4().hex}")
  try:
    probe.write_text("")
    return probe.stat().mtime - path.stat().mtime
  except FileNotFoundError:
    return float("inf")
  finally:
    with contextlib.suppress(paths.failures(probe)):
      probe.unlink()


def _clear(path: epath.Path, mine: str, found: _Look):
  """Removes the file of an owner that is gone; only one process at a time looks and removes."""
  guard = path.with_name(f"{FILE}.clearing")
  if not _create(guard, mine):
    if _age(guard) > _TOUCH:  # whoever made it was killed
      guard.unlink(missing_ok=True)
    time.sleep(0.05)
    return
  try:
    if _look(path) == found:
      path.unlink(missing_ok=True)
  finally:
    guard.unlink(missing_ok=True)  # another may have taken this process for killed, if it is slow


def _create(path: epath.Path, content: str) -> bool:
  """Makes a file with its content in one step; False if there is one."""
  if "://" in os.fspath(path):
    if path.exists():
      return False
    path.write_text(content)
    return True
  fresh = path.with_name(f"{FILE}.{uuid.uuid4().hex}")
  fresh.write_text(content)
  try:
    os.link(fresh, path)  # atomic over NFS too
    return True
  except FileExistsError:
    return False
  except OSError as e:
    if e.errno not in _NO_LINKS:
      raise
    return _create_without_link(path, content)
  finally:
    fresh.unlink()


def _create_without_link(path: epath.Path, content: str) -> bool:
  """As `_create`; another may see the file before it has its content, and waits for that."""
  try:
    with open(path, "x") as file:
      file.write(content)
    return True
  except FileExistsError:
    return False


def _look(path: epath.Path) -> _Look | None:
  """An owner's file as it is now; None where there is none.

  It is read before its time is asked for: NFS remembers that, but asks anew where a file is opened.
  """
  try:
    content = b""
    with contextlib.suppress(PermissionError):
      content = path.read_bytes()
    return _Look(content, path.stat().mtime)
  except FileNotFoundError:
    return None


def _parse(content: bytes) -> dict[str, Any]:
  """What an owner says of itself; nothing where that is damaged."""
  try:
    return dict(json.loads(content))
  except (TypeError, ValueError):
    return {}


def touch(path: epath.Path, content: str):
  """Gives a file the time of now; the content is what it has."""
  if "://" in os.fspath(path):
    path.write_text(content)
  else:
    os.utime(path)


def _namespace() -> str:
  """Within which the number of a process means something: a container has its own."""
  with contextlib.suppress(OSError):
    return os.readlink("/proc/self/ns/pid")
  return ""


def _boot() -> str:
  """Of this start of the machine, where Linux tells."""
  with contextlib.suppress(OSError):
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
  return ""


def _born(pid: Any) -> str | None:
  """When a process was started, in ticks since the machine was; None where there is none.

  A number that is given to another process later does not pass for the first.
  """
  with contextlib.suppress(OSError):
    state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]  # killed, but nobody has asked how it ended
  if not Path("/proc/self/stat").exists():  # macOS
    with contextlib.suppress(OSError, TypeError):
      os.kill(pid, 0)
      return ""
  return None
