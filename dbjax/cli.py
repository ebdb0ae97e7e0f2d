"""How a command starts, and how it fails.

A user's mistake is one line on stderr and exit code 2, nothing written. Anything
else keeps its stack trace, because then the mistake is ours.
"""

from collections.abc import Callable
import re
import sys

from absl import app
from absl import flags
from absl import logging


class UserError(ValueError):
  """A mistake that the user can mend: names the field or file, the value, the cure."""


def run(main: Callable[[], None], usage: str):
  """Parses the flags, then calls `main()`. Each command's last line.

  Args:
    main: the command; reads its own absl flags.
    usage: the command's docstring, shown by --help above the flags.
  """
  if {"-h", "--help", "-help"} & set(sys.argv[1:]):
    print(usage.strip() + "\n" + flags.FLAGS.main_module_help())
    sys.exit(0)

  def guarded(_):
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.ERROR)  # of the libraries; --verbosity=0 shows them
    try:
      main()
    except UserError as e:
      sys.exit(_complain(e))

  app.run(guarded, flags_parser=_parse)


def require(name: str):
  """The value of flag `name`; raises UserError where it was not given."""
  value = flags.FLAGS[name].value
  if value is None:
    raise UserError(f"--{name} is missing: see --help")
  return value


def _parse(argv: list[str]) -> list[str]:
  try:
    rest = flags.FLAGS(argv)
  except flags.Error as e:
    sys.exit(_complain(e))
  except (AttributeError, KeyError) as e:  # config_flags: no such config field
    missing = re.findall(r"\w+", str(e))[-1]
    culprit = [a for a in argv if re.match(rf"--?config\.([\w.]*\.)?{missing}\b", a)]
    sys.exit(_complain(f"{' '.join(culprit) or missing}: the config has no such field; "
                       "its file lists those that it has"))
  if len(rest) > 1:
    sys.exit(_complain(f"unexpected argument {rest[1]!r}: see --help"))
  return rest


def _complain(error) -> int:
  print("error:", " ".join(str(error).split()), file=sys.stderr)
  return 2
