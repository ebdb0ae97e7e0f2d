"""How a command starts, and how it fails.

A user's mistake is one line on stderr and exit code 2, nothing written. Anything
else keeps its stack trace, because then the mistake is ours.
"""

from collections.abc import Callable, Iterator
import contextlib
import functools
import importlib
import os
import re
import sys

from absl import app
from absl import flags
from absl import logging
from etils import epath
import ml_collections


class UserError(ValueError):
  """A mistake that the user can mend: names the field or file, the value, the cure."""


def run(main: Callable[..., None], usage: str, arguments: bool = False):
  """Parses the flags, then calls `main()`. Each command's last line.

  Args:
    main: the command; reads its own absl flags.
    usage: the command's docstring, shown by --help above the flags.
    arguments: whether it takes any besides flags: then it is `main(arguments)`.
  """
  if {"-h", "--help", "-help"} & set(sys.argv[1:]):
    print(usage.strip() + "\n" + flags.FLAGS.main_module_help())
    sys.exit(0)

  def guarded(argv):
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.ERROR)  # of the libraries; --verbosity=0 shows them
    with one_line_errors():
      main(argv[1:]) if arguments else main()

  app.run(guarded, flags_parser=functools.partial(_parse, arguments=arguments))


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
  """Ends the program with one line and exit code 2 on a UserError."""
  try:
    yield
  except UserError as e:
    sys.exit(_complain(e))


def require(name: str):
  """The value of flag `name`; raises UserError where it was not given."""
  value = flags.FLAGS[name].value
  if value in (None, ""):
    raise UserError(f"--{name} is missing: see --help")
  return value


def config() -> ml_collections.ConfigDict:
  """The value of --config; raises UserError where it is missing or no config."""
  value = require("config")
  if not isinstance(value, ml_collections.ConfigDict):
    raise UserError(f"--config={flags.FLAGS['config'].config_filename}: no such file, or its "
                    "get_config() returns no ConfigDict")
  return value


def writable(name: str) -> epath.Path:
  """The path in flag `name`, found writable before the work whose result goes there."""
  path = epath.Path(require(name))
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    existed = path.exists()
    path.open("ab").close()
    if not existed:
      path.unlink()
  except OSError as e:
    raise UserError(f"--{name}={path} cannot be written ({e.strerror})") from e
  return path


def function(name: str) -> Callable:
  """The function that flag `name` gives as module:function, from where the command is run."""
  text = require(name)
  module, _, attribute = text.partition(":")
  sys.path.insert(0, os.getcwd())
  try:
    return getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError, ValueError) as e:
    raise UserError(f"--{name}={text}: expected module:function, to be had from here ({e})") from e


def _parse(argv: list[str], arguments: bool) -> list[str]:
  try:
    rest = flags.FLAGS(argv)
  except flags.Error as e:
    sys.exit(_complain(e))
  except Exception as e:  # config_flags lets through whatever the file or a field raises
    sys.exit(_complain(_unknown_field(argv, e) or f"--config: {type(e).__name__}: {e}"))
  if len(rest) > 1 and not arguments:
    sys.exit(_complain(f"unexpected argument {rest[1]!r}: see --help"))
  return rest


def _unknown_field(argv: list[str], error: Exception) -> str | None:
  """Finds the --config.x=y whose field made config_flags raise `error`."""
  for arg in argv:
    field = re.match(r"--?config\.([\w.]+)", arg)
    if field and re.search(rf"\b{field[1].split('.')[-1]}\b", str(error)):
      near = re.search(r'Did you mean "(\w+)"', str(error))
      hint = f"; did you mean {near[1]}?" if near else ", its file lists those that it has"
      return f"{arg}: the config has no such field{hint}"
  return None


def _complain(error) -> int:
  print("error:", " ".join(str(error).split()), file=sys.stderr)
  return 2
