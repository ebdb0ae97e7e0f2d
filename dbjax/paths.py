"""Paths as people write them, ~ is the home directory wherever a path is given; and of blocks."""

from collections.abc import Iterator, Sequence
import contextlib
import os
import tempfile

from etils import epath

from dbjax import fields
from dbjax.errors import UserError


def expand(given: epath.PathLike, name: str) -> epath.Path:
  """The path that is meant, on a disk or gs://.

  Args:
    given: as a user wrote it.
    name: of the field or flag, for the words of an error.

  Raises:
    UserError: it is no path, or begins with ~ where no home directory is known, or its characters
      are none of this locale, so that libraries would not find it.
  """
  try:
    path = epath.Path(given).expanduser()
  except (TypeError, RuntimeError):
    path = None
  if path is None or given == "" or "\0" in os.fspath(path):
    raise UserError(f"{name}={fields.shown(given)}: expected a path")
  if os.fspath(path).startswith("~"):
    raise UserError(f"{name}={given}: no home directory is known here: set HOME, or write the "
                    "whole path")
  whole = os.fspath(path) if "://" in os.fspath(path) else os.path.abspath(path)
  try:
    whole.encode()
  except UnicodeEncodeError:  # bytes that Python keeps as they are; TensorStore takes UTF-8
    raise UserError(f"{name}={ascii(whole)}: not UTF-8, or this locale has none: set "
                    "LC_ALL=C.UTF-8, or choose another name") from None
  return path


def check_directory(path: epath.Path, name: str):
  """Raises UserError where there is no directory at `path` and none can be made."""
  if "://" in os.fspath(path):
    return
  whole = epath.Path(os.path.abspath(path))
  there = next(x for x in (whole, *whole.parents) if x.exists())
  if not there.is_dir():
    raise UserError(f"{name}={path}: {there} is a file: choose another directory")
  if not os.access(there, os.W_OK | os.X_OK):
    raise UserError(f"{name}={path}: {there} cannot be written (Permission denied): choose another")


def failures(path: epath.PathLike) -> type[Exception]:
  """What a file system raises where it fails for a while, or for good.

  On gs:// that may be anything, as errors of gcsfs, of Google's log-in and of aiohttp are no
  OSErrors; on a disk the rest is a mistake of ours.
  """
  return Exception if "://" in os.fspath(path) else OSError


@contextlib.contextmanager
def reached(path: epath.Path, name: str) -> Iterator[None]:
  """Inside, raises UserError where gs:// cannot be asked: for want of a package, a right, a net."""
  try:
    yield
  except ImportError as e:
    raise UserError(f"{name}={path} needs a package: pip install 'dbjax[gcs]' ({e})") from e
  except Exception as e:
    if "://" not in os.fspath(path) or isinstance(e, UserError):
      raise
    raise UserError(f"{name}={path} cannot be reached ({reason(e)}): see whether there is such a "
                    "bucket, and whether this machine may read and write it (gcloud auth "
                    "application-default login)") from e


@contextlib.contextmanager
def writing(path: epath.PathLike, name: str) -> Iterator[None]:
  """Inside, raises UserError where the file that field or flag `name` names cannot be written."""
  try:
    yield
  except failures(path) as e:
    raise UserError(f"{name}={path} cannot be written ({reason(e)}): choose another, or make "
                    "room") from e


def check_writable(path: epath.Path, name: str):
  """Raises UserError where a file cannot be written; what is there stays as it is.

  Its folder is made. For before the work whose result goes there.
  """
  with writing(path, name):
    path.parent.mkdir(parents=True, exist_ok=True)
    existed = path.exists()
    path.open("ab").close()
    if not existed:
      path.unlink()


def reason(error: Exception) -> str:
  """What an error of a file system says, in one line that is not too long."""
  words = getattr(error, "strerror", None) or error  # gcsfs gives none
  return " ".join(str(words).split())[:200] or type(error).__name__


def names(directories: Sequence[epath.Path]) -> list[str]:
  """The name of each directory, or the whole path where several have that name."""
  found = [x.name if x.name not in ("", "..") else os.path.basename(os.path.abspath(x))
           for x in directories]
  return [str(x) if found.count(name) > 1 else name for x, name in zip(directories, found)]


def directory(workdir: epath.PathLike, block: int) -> epath.Path:
  """Where a block's checkpoints and logs live."""
  path = epath.Path(workdir)
  if "://" not in os.fspath(workdir):
    path = path.resolve()  # Orbax wants it absolute
  return path / f"block_{block:02d}"


def cache() -> epath.Path:
  """Where what can be computed again is kept; without a home directory, among temporary files."""
  home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  return epath.Path(tempfile.gettempdir() if home.startswith("~") else home) / "dbjax"
