"""Paths as people write them: ~ is the home directory, wherever a path is given."""

import os
import tempfile

from etils import epath

from dbjax.errors import UserError


def expand(given: epath.PathLike, name: str) -> epath.Path:
  """The path that is meant, on a disk or gs://.

  Args:
    given: as a user wrote it.
    name: of the field or flag, for the words of an error.

  Raises:
    UserError: it is no path, or begins with ~ where no home directory is known.
  """
  try:
    path = epath.Path(given).expanduser()
  except TypeError:
    raise UserError(f"{name}={given!r}: expected a path") from None
  if os.fspath(path).startswith("~"):
    raise UserError(f"{name}={given}: no home directory is known here: set HOME, or write the "
                    "whole path")
  return path


def cache() -> epath.Path:
  """Where what can be computed again is kept; without a home directory, among temporary files."""
  home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  return epath.Path(tempfile.gettempdir() if home.startswith("~") else home) / "dbjax"
