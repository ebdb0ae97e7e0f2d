"""Who trains a block: one run at a time.

While a run trains a block, `block_00/owner.json` names its host, process and start. A second run on
the same block is refused; other blocks of the same workdir are free, as for the tasks of a SLURM
array. An owner that is gone is recognised, and its place taken: on the same host the process is
no more, or the machine has been started anew; on another host, over a shared file system,
the file has not been touched for `STALE` seconds. A reader needs to own nothing.

On gs:// two runs that start in the same second may both pass.
"""

from collections.abc import Mapping
import contextlib
import datetime
import json
import os
from pathlib import Path
import socket
import threading
import time
from typing import Any
import uuid

from etils import epath

from dbjax import tensors
from dbjax.errors import UserError

FILE = "owner.json"
STALE = 600  # seconds without a sign of life, of an owner on another host
_TOUCH = 30  # seconds between signs of life


class Owner(contextlib.AbstractContextManager):
  """Owns the blocks in some directories, from `take` until it is left."""

  def __init__(self):
    self._mine = json.dumps(this_process(os.getpid()))
    self._paths: list[epath.Path] = []
    self._left = threading.Event()
    self._thread = threading.Thread(target=self._live, daemon=True)

  def take(self, directory: epath.Path):
    """Becomes the owner of a block. Raises UserError where it has one, or cannot be trained."""
    exported = directory.with_name(directory.name + tensors.SUFFIX)
    if exported.exists():
      raise UserError(f"{exported} is an exported block, without what its optimizer remembers: it "
                      "cannot be trained further; train others with --config.train.blocks, or "
                      "begin anew in another --workdir (--config.train.init_from)")
    path = directory / FILE
    directory.mkdir(parents=True, exist_ok=True)
    while not _create(path, self._mine):
      owner = _read(path)
      if owner is None:  # it has just been given up
        continue
      if not _gone(owner, path):
        raise UserError(
            f"{directory} is being trained by process {owner.get('pid')} on "
            f"{owner.get('host')}, since {owner.get('started')}: wait for its end, stop it, or "
            f"train other blocks; if it is long gone, remove {path}")
      _clear(path, self._mine)
    self._paths.append(path)
    if not self._thread.is_alive():
      self._thread.start()

  def __exit__(self, *_):
    self._left.set()
    for path in self._paths:
      with contextlib.suppress(OSError):
        if path.read_text() == self._mine:
          path.unlink()

  def _live(self):
    while not self._left.wait(_TOUCH):
      for path in self._paths:
        with contextlib.suppress(OSError):
          touch(path, self._mine)


def this_process(pid: int) -> dict[str, Any]:
  """What tells a process of this machine from all others."""
  now = datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds")
  return dict(host=socket.gethostname(), pid=pid, started=now, boot=_boot(), born=_born(pid))


def dead(process: Mapping[str, Any]) -> bool | None:
  """Whether a process is no more; None: it is one of another machine."""
  if process.get("host") != socket.gethostname():
    return None
  return process.get("boot") != _boot() or _born(process.get("pid")) != process.get("born")


def read(directory: epath.Path) -> dict[str, Any] | None:
  """What the owner of a block says of itself; {}: that cannot be read; None: it has none."""
  return _read(directory / FILE)


def is_alive(directory: epath.Path, process: Mapping[str, Any]) -> bool:
  """Whether an owner, as `read` found it, still trains; for a reader, who writes nothing.

  Of one on another host that is so for as long as it shows signs of life, by this machine's clock.
  """
  here = dead(process)
  if here is not None:
    return not here
  try:
    return time.time() - (directory / FILE).stat().mtime < STALE
  except OSError:  # it has just left
    return False


def _gone(owner: Mapping[str, Any], path: epath.Path) -> bool:
  """Whether the process that a file names is no more."""
  here = dead(owner)
  return _age(path) > STALE if here is None else here


def _age(path: epath.Path) -> float:
  """Seconds since a file was touched, by the clock of its file system; inf if there is none."""
  probe = path.with_name(f"{FILE}.{uuid.uuid4().hex}")
  try:
    probe.write_text("")
    return probe.stat().mtime - path.stat().mtime
  except FileNotFoundError:
    return float("inf")
  finally:
    with contextlib.suppress(OSError):
      probe.unlink()


def _clear(path: epath.Path, mine: str):
  """Removes the file of an owner that is gone; only one process at a time looks and removes."""
  guard = path.with_name(f"{FILE}.clearing")
  if not _create(guard, mine):
    if _age(guard) > _TOUCH:  # whoever made it was killed
      guard.unlink(missing_ok=True)
    time.sleep(0.05)
    return
  try:
    owner = _read(path)
    if owner is not None and _gone(owner, path):
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
  finally:
    fresh.unlink()


def _read(path: epath.Path) -> dict[str, Any] | None:
  try:
    return dict(json.loads(path.read_text()))
  except FileNotFoundError:
    return None
  except (OSError, TypeError, ValueError):
    return {}  # damaged: its owner is unknown


def touch(path: epath.Path, content: str):
  """Gives a file the time of now; the content is what it has."""
  if "://" in os.fspath(path):
    path.write_text(content)
  else:
    os.utime(path)


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
