"""Code that a config names: where it is found, and what is never run."""

import hashlib
import json
import os
import sys

import pytest

from dbjax import lookup
from dbjax.errors import UserError


@pytest.fixture
def here(tmp_path, monkeypatch):
  """An empty working directory."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", os.getcwd())])
  return tmp_path


def test_a_module_is_found_where_the_command_is_run(here):
  (here / "lookup_mine.py").write_text("class Net: ...")
  assert lookup.find("lookup_mine:Net", "model.network").__name__ == "Net"
  with pytest.raises(UserError, match="lookup_mine has no Nett; did you mean Net?"):
    lookup.find("lookup_mine:Nett", "model.network")
  content = (here / "lookup_mine.py").read_bytes()
  assert lookup.source_of("lookup_mine:Net") == dict(
      name="lookup_mine:Net", sha256=hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("name, near", [
    ("lookup_neer:Net", "lookup_near"), ("dbjax.modles.dit:DiT", "dbjax.models"),
    ("dbjax.models.dti:DiT", "dbjax.models.dit")])
def test_a_module_that_is_not_there_has_one_of_a_name_like_it(here, name, near):
  (here / "lookup_near.py").write_text("class Net: ...")
  with pytest.raises(UserError, match=f"there is no module .* did you mean {near}\\?$"):
    lookup.find(name, "model.network")


def test_a_module_is_found_beside_the_config(here):
  (here / "elsewhere").mkdir()
  (here / "elsewhere" / "lookup_beside.py").write_text("x = 3")
  with pytest.raises(UserError, match="there is no module lookup_beside where the command is run"):
    lookup.find("lookup_beside:x", "data.name")
  lookup.search_beside(here / "elsewhere" / "config.py")
  assert lookup.find("lookup_beside:x", "data.name") == 3


@pytest.mark.parametrize("content, words", [
    ("import no_such_module_of_mine", "line 1: ModuleNotFoundError: No module named"),
    ("x = 1\ny = x / 0", "line 2: ZeroDivisionError: division by zero"),
    ("def f(:", "line 1: SyntaxError"),
    ("raise ValueError('two\\nlines')", "line 1: ValueError: two lines"),
])
def test_a_module_that_fails_names_the_user_s_own_line(here, content, words):
  name = f"lookup_fails_{abs(hash(content))}"
  (here / f"{name}.py").write_text(content)
  with pytest.raises(UserError) as error:
    lookup.find(f"{name}:x", "task.name")
  assert f"{name}.py, {words}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["lookup_bad.py", "code/lookup_bad.py", "block_01/lookup_bad.py",
                                  "lookup_bad/__init__.py"])
def test_nothing_in_a_workdir_is_run(here, monkeypatch, path):
  """Even from inside: a stranger's workdir may hold a module of any name."""
  (here / "block_01").mkdir()
  (here / "config.json").write_text("{}")
  file = here / path
  file.parent.mkdir(exist_ok=True)
  file.write_text(f"open({str(here / 'ran')!r}, 'w')\nx = 1")
  monkeypatch.syspath_prepend(file.parent if file.name != "__init__.py" else here)
  with pytest.raises(UserError, match="lies in the workdir .* nothing in a workdir is run"):
    lookup.find("lookup_bad:x", "task.name")
  assert not (here / "ran").exists() and "lookup_bad" not in sys.modules


@pytest.mark.parametrize("name", ["run.lookup_bad", "runs.run.lookup_bad", "runs.link",
                                  "runs.run.code.lookup_bad"])
def test_nothing_in_a_workdir_is_run_from_a_folder_above_it(here, name):
  """A folder without __init__.py is a package too, and importing one runs those around it."""
  *folders, last = name.split(".")
  file = here.joinpath(*folders, f"{last}.py")
  workdir = here / "stranger" if last == "link" else here.joinpath(
      *folders[:folders.index("run") + 1])
  (workdir / "block_00").mkdir(parents=True)
  (workdir / "config.json").write_text("{}")
  file.parent.mkdir(parents=True, exist_ok=True)
  bad = f"open({str(here / 'ran')!r}, 'w')\nx = 1"
  if last == "link":
    (workdir / "bad.py").write_text(bad)
    file.symlink_to(workdir / "bad.py")
  else:
    for path in (file, file.with_name("__init__.py")):
      path.write_text(bad)
  with pytest.raises(UserError, match="lies in the workdir .* nothing in a workdir is run"):
    lookup.find(f"{name}:x", "task.name")
  assert not (here / "ran").exists() and name not in sys.modules


def test_code_in_packages_is_run(here):
  (here / "lookup_package/inner").mkdir(parents=True)
  (here / "lookup_package/__init__.py").write_text("")
  (here / "lookup_package/inner/deep.py").write_text("x = 5")
  assert lookup.find("lookup_package.inner.deep:x", "data.name") == 5


@pytest.mark.parametrize("file, expected", [
    ("/x/dbjax/.venv/lib/python3.12/site-packages/flax/core/scope.py", True),  # as the README says
    ("/home/me/.local/lib/python3.12/site-packages/jax/_src/api.py", True),
    ("/usr/lib/python3/dist-packages/numpy/ma/core.py", True), (json.__file__, True),
    (pytest.__file__, True), ("<frozen importlib._bootstrap>", True), ("/x/dbjax/my_net.py", False),
    (lookup.__file__, False), ("/x/my-site-packages.py", False)])
def test_what_is_a_library(file, expected):
  assert lookup.is_library(file) == expected


@pytest.mark.parametrize(
    "name", ["digits", "imagenet_resized/64x64:5.1.0", "a.b", "", ":x", "a b:c"])
def test_other_names_are_no_code(name):
  assert not lookup.names_code(name)
  with pytest.raises(UserError, match="expected module:attribute"):
    lookup.find(name, "data.name")
