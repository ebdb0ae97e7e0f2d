"""Every Python block and every command of the README and of RESULTS.md does what it says.

Commands run as they stand, but for three things: what stands for a path is one, training is
shrunk by further flags, and what needs the cloud, a cluster or a network is checked without.
"""

import os
from pathlib import Path
import re
import shlex
import subprocess
import sys

from conftest import ROOT
import pytest

README, RESULTS = ((ROOT / name).read_text() for name in ("README.md", "RESULTS.md"))
SMALL = {"model.num_layers": 3, "model.width": 16, "model.num_heads": 2, "model.unroll": 1,
         "sample.num_steps": 3, "sample.every_steps": 0}
SHORT = ["--config.train.num_steps=2", "--config.train.batch_size=8", "--config.model.width=16",
         "--config.log.every_steps=1", "--config.sample.num_steps=2",
         "--config.sample.every_steps=0"]


def blocks(text, language):
  """The contents of fenced blocks of a language; "" has commands."""
  fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
  return [content for found, content in fenced if found == language]


def commands(text):
  """Single commands, as lists of words."""
  lines = "".join(b for b in blocks(text, "") if "schedule.py" not in b)  # that one is the map
  lines = lines.replace("\\\n", " ").splitlines()
  return [words for line in lines if (words := shlex.split(line, comments=True))]


def run(*words, cwd=ROOT, **environment):
  return subprocess.run(list(map(str, words)), cwd=cwd, capture_output=True, text=True, check=False,
                        env={**os.environ, "PYTHONPATH": str(ROOT), **environment})


def test_the_python_blocks_run_one_after_another(tmp_path):
  """As in one notebook: what the first defines, the second may use. Files are written."""
  code = []
  for block in blocks(README, "python"):
    name = re.match(r"# (\w+\.py)\n", block)
    if name:
      (tmp_path / name[1]).write_text(block)
    else:
      code.append(block.replace("/tmp/digits", str(tmp_path / "digits"))
                  .replace('read_config("digits")', f'read_config("digits", {SMALL})')
                  .replace("num_steps = 100", "num_steps = 2")
                  .replace("num_samples=200", "num_samples=20, guidance=(1.0,)"))
  (tmp_path / "notebook.py").write_text("\n".join(code) + "\nprint('loss', float(loss))\n")
  done = run(sys.executable, "notebook.py", cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  assert float(done.stdout.split()[-1]) > 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A workdir of digits for the commands that need one."""
  workdir = tmp_path_factory.mktemp("readme") / "DIR"
  done = run(sys.executable, "-m", "dbjax.main", "--config=digits", f"--workdir={workdir}", *SHORT)
  assert done.returncode == 0, done.stderr
  return workdir


def write_own_network(folder):
  for block in blocks(README, "python"):
    if block.startswith("# my_net.py"):
      (folder / "my_net.py").write_text(block)


def python(words, folder, trained):
  """Runs python -m dbjax.X ..., shrunk."""
  module = words[2]
  words = [w.replace("=DIR2", f"={folder / 'other'}") for w in words]
  if module == "dbjax.main" and "my_net:Net" in " ".join(words):
    write_own_network(folder)
    words = [w.replace("=DIR", f"={folder / 'own'}") for w in words] + SHORT
  elif module == "dbjax.main" and not {"--describe", "--status"} & set(words):
    words = [w.replace("=DIR", f"={folder / 'new'}") for w in words] + SHORT
  words = [str(trained) if w == "DIR" else w.replace("=DIR", f"={trained}") for w in words]
  if module == "dbjax.evaluate":
    words.append("--num_samples=4")
  if module == "dbjax.plan":
    if "v5e" in " ".join(words):  # slow: tests/test_plan.py compiles for TPU
      words = [w for w in words if not w.startswith("--topology")] + ["--topology=cpu:1"]
      words += ["--config.model.name=", "--config.model.num_layers=3"] * ("DiT" in " ".join(words))
      words += ["--config.model.num_heads=2", "--config.model.patch_size=8"] * (
          "DiT" in " ".join(words)) + ["--config.train.batch_size=4"]
      if "lm1b" in " ".join(words):
        words += ["--config.model.num_layers=4", "--config.model.num_heads=2",
                  "--config.data.vocab_size=50", "--config.data.length=8"]
    words += ["--nolargest", "--config.model.width=16"]
    words = [w.replace("cpu:4", "cpu:1") for w in words]
  if module == "dbjax.bench" and words[3:4] == ["evidence"]:
    words = [w for w in words if w != "--run" and not w.startswith("--results=")]
    words += [f"--figure={folder / 'figure.png'}"]  # of the runs that are there, which take hours
  elif module == "dbjax.bench" and len(words) > 3:
    words = [*words[:4], "--help"]  # each takes minutes, or PyTorch
  return run(sys.executable, *words[1:], cwd=folder)


def distinct(commands):
  """Each command once; what compiles for long is slow."""
  for line in dict.fromkeys(map(shlex.join, commands)):
    slow = [pytest.mark.slow] * ("dbjax.plan" in line and "v5e" in line)
    yield pytest.param(shlex.split(line), id=line, marks=slow)


@pytest.mark.parametrize("words", list(distinct(commands(README) + commands(RESULTS))))
def test_the_commands_run(words, tmp_path, trained):
  if words[0] == "python":
    done = python(words, tmp_path, trained)
    assert done.returncode == 0, done.stderr
  elif words[0] == "bash":  # tests/test_launch.py runs them
    done = run("bash", "-n", words[1])
    assert done.returncode == 0, done.stderr
  elif words[:2] == ["pip", "install"]:
    extras = re.search(r"\[(.*)\]", words[-1])
    declared = (ROOT / "setup.cfg").read_text().partition("extras_require]")[2]
    for extra in extras[1].split(",") if extras else ():
      assert re.search(rf"^{extra} =", declared, re.MULTILINE)
  else:
    assert words[:2] == ["git", "clone"] and Path(ROOT / "setup.cfg").exists()


@pytest.mark.parametrize("line", re.findall(r"`((?:bash|sbatch) [^`]*)`", README))
def test_the_commands_in_tables_name_what_there_is(line):
  words = line.replace("..", "x").split()
  script = next(w for w in words if w.endswith(".sh"))
  assert (ROOT / script).exists()


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"`--config\.([\w.]+)=", README + RESULTS))))
def test_fields_that_are_named_exist(flag):
  from dbjax import config as config_lib

  known = {name for config in ("digits", "kjv") for name in config_lib.fields_of(
      config_lib.flatten(config_lib.read(config)))}
  assert flag in known


@pytest.mark.parametrize("page", re.findall(r"python -m pydoc ([\w.]+)", README))
def test_pages_are_there(page):
  done = run(sys.executable, "-m", "pydoc", page)
  assert done.returncode == 0 and "DESCRIPTION" in done.stdout


@pytest.mark.parametrize("path", sorted(set(re.findall(
    r"(?:\(|`)((?:\.github|configs|tests|dbjax|launch)/[\w./]+|[A-Z]+\.md)", README + RESULTS))))
def test_files_that_are_named_exist(path):
  assert (ROOT / path).exists()
