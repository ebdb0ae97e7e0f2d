"""Code that a config names: "my_net:Net" is the attribute Net of the module my_net.

A module is looked for where the command is run (in a notebook: where it runs), on PYTHONPATH,
and beside the config file. Nothing that lies in a workdir is ever run: a name whose module is
there is refused before it is imported.
"""

import hashlib
import importlib
import importlib.util
import inspect
import os
from pathlib import Path
import pkgutil
import re
import sys
import sysconfig
import traceback
from typing import Any

from dbjax import fields
from dbjax.errors import UserError

_OURS = os.path.dirname(__file__) + os.sep  # where dbjax lies


def names_code(name: str) -> bool:
  """Whether a name is of the form module:attribute."""
  module, _, attribute = name.partition(":")
  return attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


_beside: list[Path] = []  # folders of the configs that this process has read


def search_beside(path: Path):
  """Lets modules be found beside a file, after all other places.

  Raises:
    UserError: one there is called as another one, which was imported from beside another file.
      Python would take that for this one.
  """
  folder = path.resolve().parent
  imported = {Path(file): name for name, module in list(sys.modules.items())
              if "." not in name and (file := getattr(module, "__file__", None))}
  for file, name in imported.items():
    other = next((x for x in _beside if x != folder and file.is_relative_to(x)), None)
    own = other and folder / file.relative_to(other)
    if own and own.is_file() and own.read_bytes() != file.read_bytes():
      raise UserError(f"{own} and {file}, which was imported before, are modules of one name, "
                      f"{name}, and a process has one of each name: rename one, or read these "
                      "configs in processes of their own")
  if folder not in _beside:
    _beside.append(folder)
  if str(folder) not in map(os.path.abspath, sys.path):
    sys.path.append(str(folder))


def find(name: str, field: str) -> Any:
  """The object that `name` names.

  Args:
    name: "module:attribute".
    field: of the config, for the words of an error.

  Raises:
    UserError: there is no such module or attribute, it lies in a workdir, or importing it fails;
      then with the file and line of the user's own mistake.
  """
  if not names_code(name):
    raise UserError(f"{field}={fields.shorten(name)}: expected module:attribute, such as "
                    "my_file:MyClass")
  module_name, _, attribute = name.partition(":")
  if module_name.partition(".")[0] in sys.stdlib_module_names - {"__main__"}:
    raise UserError(f"{field}={fields.shorten(name)}: {module_name} is Python's own, and nothing "
                    "in it is meant for this: expected a module of yours")
  if os.getcwd() not in map(os.path.abspath, sys.path):
    sys.path.insert(0, os.getcwd())
  if module_name not in sys.modules:
    _refuse_workdirs(module_name, field, name)
  try:
    module = importlib.import_module(module_name)
  except ModuleNotFoundError as e:
    if e.name and (module_name == e.name or module_name.startswith(e.name + ".")):
      raise UserError(f"{field}={name}: there is no module {module_name} where the command is run, "
                      "on PYTHONPATH, or beside the config file" + _near(e.name)) from None
    raise UserError(f"{field}={name}: {own_words(e, module_name)}") from e
  except (Exception, SystemExit) as e:  # whatever the user's module raises
    raise UserError(f"{field}={name}: {own_words(e, module_name)}") from e
  if not hasattr(module, attribute):
    raise UserError(f"{field}={name}: {module_name} has no {attribute}"
                    + fields.did_you_mean(attribute, vars(module)))
  return getattr(module, attribute)


def modules(package: str) -> list[str]:
  """The names of the modules in a package."""
  paths = importlib.import_module(package).__path__
  return sorted(module.name for module in pkgutil.iter_modules(paths))


def is_library(file: str) -> bool:
  """Whether a file of code is Python's own, or of a package that is installed; not dbjax's."""
  return not file.startswith(_OURS) and (
      file.startswith(("<frozen", sysconfig.get_path("stdlib") + os.sep))
      or not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts))


def own_words(error: BaseException, what: str) -> str:
  """An error in a user's own file: what it says, with the file and line where it arose."""
  frames = [f for f in traceback.extract_tb(error.__traceback__)
            if not (f.filename.startswith(_OURS) or is_library(f.filename))]
  if isinstance(error, SyntaxError):
    line = f", line {error.lineno}" if error.lineno else ""
    where = f"{error.filename or what}{line}"
  else:
    where = f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else what
  said = " ".join(str(error).split())
  return f"{where}: {type(error).__name__}" + f": {said}" * bool(said)


def source_of(name: str) -> dict[str, str]:
  """What is recorded of code beside a block: its name, and the SHA-256 of its file."""
  module = sys.modules.get(name.partition(":")[0])
  try:
    content = Path(module.__file__).read_bytes()  # type: ignore[union-attr, arg-type]  # see below
  except (AttributeError, TypeError, OSError):  # a notebook's cell
    try:
      content = inspect.getsource(find(name, "")).encode()
    except (OSError, TypeError, UserError):
      content = b""
  return dict(name=name, sha256=hashlib.sha256(content).hexdigest() if content else "")


def _refuse_workdirs(module: str, field: str, name: str):
  """Raises UserError where the module, or a package around it, would come out of a workdir."""
  top, *parts = module.split(".")
  try:
    spec = importlib.util.find_spec(top)
  except (ImportError, ValueError):
    return
  if spec is None:
    return
  folders = [Path(x) for x in spec.submodule_search_locations or []]
  places = [*folders, *([Path(spec.origin)] if spec.has_location and spec.origin else [])]
  for part in parts:  # not find_spec: it would import the packages around the module
    folders = [folder / part for folder in folders]
    places += [*folders, *(folder.with_name(f"{part}.py") for folder in folders)]
  for place in reversed([place for place in places if place.exists()]):
    real = place.resolve()
    for folder in (real, *real.parents):
      if re.fullmatch(r"block_\d{2,}", folder.name) or (
          (folder / "config.json").exists() and any(folder.glob("block_[0-9]*"))):
        raise UserError(f"{field}={name}: {place} lies in the workdir {folder}, and nothing in a "
                        "workdir is run: move the file elsewhere if you trust it")


def _near(missing: str) -> str:
  """"; did you mean ...?", where a module of the user's, or of its package, has a name like it."""
  package, _, _ = missing.rpartition(".")
  paths = getattr(sys.modules[package], "__path__", []) if package in sys.modules else [
      path for path in sys.path if os.sep + "lib" + os.sep not in path]
  return fields.did_you_mean(missing, [
      f"{package}.{module.name}" if package else module.name
      for module in pkgutil.iter_modules(paths)])
