"""How a command starts, and how it fails.

A user's mistake is one line on stderr and exit code 2, nothing written; so is a platform that
JAX_PLATFORMS asks for and this machine lacks. Where nobody reads the output any more, as after
`| head -1`, a command ends with exit code 141, as a shell has it. Anything else keeps its stack
trace, because then the mistake is ours.

Besides its own flags a command may take fields of a config, --config.train.num_steps=100, and
options that depend on a workdir's task, --guidance=2.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import functools
import io
import os
import re
import select
import signal
import sys
import traceback
from typing import Any

from absl import app
from absl import flags
from absl import logging
from etils import epath
import ml_collections

from dbjax import config as config_lib
from dbjax import fields as fields_lib
from dbjax import paths
from dbjax import startup
from dbjax.errors import UserError

_overrides: dict[str, str] = {}  # of the command line: {"train.num_steps": "100"}
flags.disclaim_key_flags()  # flags that are defined here are the command's, which --help shows


def run(main: Callable[..., None], usage: str, *, arguments: bool = False,
        options: Callable[[], Mapping[str, fields_lib.Field]] | None = None):
  """Parses the flags, then calls `main()`. Each command's last line.

  Args:
    main: the command; reads its own absl flags.
    usage: the command's docstring, shown by --help above the flags.
    arguments: whether it takes any besides its flags: then it is `main(arguments)`.
    options: the fields that are flags of a workdir's task, asked for once --workdir is known: then
      it is `main(options)`, those that are given and their values.
  """
  if isinstance(sys.stdout, io.TextIOWrapper):  # a locale may lack a character of ours
    sys.stdout.reconfigure(errors="backslashreplace")
  flags.DEFINE_boolean("keep_memory", True, "On the CPU of Linux, keep memory that is free for the "
                       "next step: see dbjax/startup.py.")
  if {"-h", "--help", "-help"} & set(sys.argv[1:]):
    with one_line_errors():
      print(usage.strip() + "\n" + flags.FLAGS.main_module_help() + _help(options))
    sys.exit(0)

  def guarded(argv):
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.ERROR)  # of the libraries; --verbosity=0 shows them
    startup.prepare(flags.FLAGS.keep_memory)
    with one_line_errors():
      if options:
        main(_options(argv[1:], options))
      else:
        main(argv[1:]) if arguments else main()

  app.run(guarded, flags_parser=functools.partial(_parse, arguments=arguments,
                                                  options=options is not None))


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
  """Ends the program, with one line and exit code 2 on a mistake; silently if nobody reads it."""
  try:
    yield
    sys.stdout.flush()
  except (UserError, flags.Error) as e:
    sys.exit(_complain(e))
  except KeyboardInterrupt:  # asked twice: nothing is saved, and nothing is damaged
    sys.exit(128 + signal.SIGINT)
  except BrokenPipeError:
    if not _is_unread():
      raise
    sys.exit(128 + signal.SIGPIPE)
  except (AssertionError, RuntimeError) as e:
    if not traceback.extract_tb(e.__traceback__)[-1].filename.endswith("jax/_src/xla_bridge.py"):
      raise
    asked = os.environ.get("JAX_PLATFORMS", "")
    sys.exit(_complain(f"JAX_PLATFORMS={asked}: JAX finds no such platform on this machine"
                       + f" ({e})" * bool(str(e)) + ": set JAX_PLATFORMS=cpu, or unset it; a GPU "
                       "needs pip install 'dbjax[cuda]', a TPU 'dbjax[tpu]'"))


def _is_unread() -> bool:
  """Whether stdout is a pipe that nobody reads; if so nothing more is written to it."""
  stdout = select.poll()
  stdout.register(sys.stdout, select.POLLOUT)
  unread = any(event & (select.POLLERR | select.POLLHUP) for _, event in stdout.poll(0))
  if unread:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries once more
  return unread


class _FieldParser(flags.ArgumentParser):
  """Reads a flag as its field has it."""

  def __init__(self, name: str, field: fields_lib.Field):
    self._name, self._field = f"--{name}", field

  def parse(self, argument: Any) -> Any:
    if isinstance(argument, str):
      return self._field.parse(self._name, argument)
    return self._field.check(self._name, argument)

  def flag_type(self) -> str:
    return self._field.expected


def define(name: str, field: fields_lib.Field, meaning: str = ""):
  """Defines a flag that Python has too, as an argument: checked alike, in the same words."""
  flags.DEFINE(_FieldParser(name, field), name, field.default, meaning or field.help,
               serializer=flags.ArgumentSerializer())


def require(name: str) -> Any:
  """The value of flag `name`; raises UserError where it was not given."""
  value = flags.FLAGS[name].value
  if value in (None, ""):
    raise UserError(f"--{name} is missing: see --help")
  return value


def path(name: str) -> epath.Path:
  """The path in flag `name`; ~ is the home directory."""
  return paths.expand(require(name), f"--{name}")


def config() -> ml_collections.ConfigDict:
  """The config in --config, with the fields that --config.x=y say otherwise: complete."""
  return config_lib.read(require("config"), _overrides)


def _options(arguments: list[str], known: Callable[[], Mapping[str, fields_lib.Field]]
             ) -> dict[str, Any]:
  """The values of arguments that are no flags of the command: --guidance=2."""
  found, rest = {}, list(arguments)
  fields = known() if rest else {}
  while rest:
    argument = rest.pop(0)
    match = re.fullmatch(r"--?(\w+)(?:=(.*))?", argument, re.DOTALL)
    if not match:
      raise UserError(f"unexpected argument {argument!r}: see --help")
    name, text = match.groups()
    if name not in fields:
      raise UserError(f"{argument}: there is no such flag; the options of this task are "
                      f"{', '.join(fields)}{fields_lib.did_you_mean(name, fields)}")
    if text is None:
      text = "True" if fields[name].kind is bool else rest.pop(0) if rest else ""
    found[name] = fields[name].parse(f"--{name}", text)
  return found


def writable(name: str) -> epath.Path:
  """The path in flag `name`, found writable before the work whose result goes there."""
  target = path(name)
  paths.check_writable(target, f"--{name}")
  return target


def _help(options: Callable[[], Mapping[str, fields_lib.Field]] | None) -> str:
  """What a workdir's task adds to --help, if a workdir is named."""
  flags.FLAGS(sys.argv, known_only=True)
  if options is None or not flags.FLAGS["workdir"].value:
    return ""
  with one_line_errors():
    return "\nof this workdir's task:\n" + "".join(
        f"  --{name}: {field.help}\n    ({field.expected})\n" for name, field in options().items())


def _parse(argv: list[str], arguments: bool = False, options: bool = False) -> list[str]:
  """What is left of a command line, its first word included, once the command's flags are out.

  Args:
    argv: the words.
    arguments: whether the command takes words that are no flags.
    options: whether it takes flags that are those of a task, which are left.
  """
  try:
    rest = flags.FLAGS(_without_overrides(argv), known_only=arguments or options)
  except (flags.Error, UserError) as e:
    sys.exit(_complain(e.__context__ if isinstance(e.__context__, UserError) else e))
  if _overrides and "config" not in flags.FLAGS:
    takes = "the config of its --workdir" if "workdir" in flags.FLAGS else "no field of a config"
    sys.exit(_complain(f"--config.{next(iter(_overrides))}: this command takes {takes}: see "
                       "--help"))
  if len(rest) > 1 and not (arguments or options):
    sys.exit(_complain(f"unexpected argument {rest[1]!r}: see --help"))
  return _words(rest) if arguments else rest


def _words(rest: list[str]) -> list[str]:
  """What is left of a command line, if no flag is; behind -- a word may begin as flags do."""
  end = rest.index("--") if "--" in rest else len(rest)
  unknown = next((word for word in rest[1:end] if word.startswith("-")), None)
  if unknown:
    known = fields_lib.did_you_mean(re.sub("^--?|=.*", "", unknown), flags.FLAGS)
    sys.exit(_complain(f"{unknown}: there is no such flag: see --help{known}"))
  return rest[:end] + rest[end + 1:]


def _without_overrides(argv: list[str]) -> list[str]:
  """Takes --config.x=y out of the command line, into `_overrides`."""
  left, rest = list[str](), list(argv)
  _overrides.clear()
  while rest:
    argument = rest.pop(0)
    if argument == "--":
      return [*left, argument, *rest]
    match = re.fullmatch(r"--?(no)?config\.([\w.]+)(?:=(.*))?", argument, re.DOTALL)
    if not match:
      left.append(argument)
      continue
    negated, name, text = match.groups()
    if negated:
      text = "False"
    elif text is None:  # --config.x y, or --config.x alone: a switch
      text = "True" if not rest or rest[0].startswith("--") else rest.pop(0)
    _overrides[name] = text
  return left


def _complain(error) -> int:
  with contextlib.suppress(BrokenPipeError):
    print("error:", " ".join(str(error).split()), file=sys.stderr)
  return 2
