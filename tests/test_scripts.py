"""The scripts of an exported folder: mistakes are one line, told before anything is drawn."""

import re
import runpy
import subprocess
import sys

from conftest import random_workdir
from conftest import ROOT
from conftest import small_config
import numpy as np
import pytest

from dbjax import export


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A classifier to share, whose input is images, one for each sample."""
  where = tmp_path_factory.mktemp("scripts")
  random_workdir(where / "work", small_config("digits_classify"))
  return export.export(where / "work", where / "out", num_steps=2)


@pytest.fixture(scope="module")
def drawing(tmp_path_factory):
  """Digits to share, with labels and a guidance that all samples share."""
  where = tmp_path_factory.mktemp("scripts")
  random_workdir(where / "work", small_config("digits"))
  return export.export(where / "work", where / "out", num_steps=2)


def run(script, *arguments):
  return subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True,
                        text=True, check=False)


def refusal(script, *arguments):
  """The one line that a script ends with, of a mistake."""
  done = run(script, *arguments)
  assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
  return done.stderr.splitlines()[-1]


def test_there_are_as_many_samples_as_a_file_has(folder, tmp_path):
  np.save(tmp_path / "three.npy", np.zeros((3, 8, 8, 1), np.uint8))
  done = run(folder / "sample.py", f"--image={tmp_path / 'three.npy'}",
             f"--out={tmp_path / 'new/x'}")
  assert done.returncode == 0, done.stderr
  assert len(np.load(tmp_path / "new/x.npz")["samples"]) == 3
  assert "expected --num=3" in refusal(folder / "sample.py", "--num=4",
                                       f"--image={tmp_path / 'three.npy'}")


@pytest.mark.parametrize("content, words", [
    (None, "No such file"), (b"no array", "expected numbers"),
    (np.zeros((2, 8, 8), np.uint8), "expected numbers of shape"),
    (np.full((2, 8, 8, 1), 0.5), "expected numbers of uint8")])
def test_a_file_that_is_no_input_is_one_line(folder, tmp_path, content, words):
  path = tmp_path / "x.npy"
  if isinstance(content, bytes):
    path.write_bytes(content)
  elif content is not None:
    np.save(path, content)
  said = refusal(folder / "sample.py", f"--image={path}")
  assert f"--image={path}: " in said and words in said


@pytest.mark.parametrize("script, wrong", [
    ("sample.py", "--num=0"), ("sample.py", "--seed=-1"), ("sample.py", f"--seed={2**32}"),
    ("sample.py", "--label=cat"), ("sample.py", "--label=10"), ("sample.py", "--guidance=2,3"),
    ("sample.py", "--guidance=nan"), ("sample.py", "--guidance=inf"),
    ("sample.py", "--guidance=-1"), ("sample.py", "--out=FILE/x"), ("sample.py", "--out=FOLDER/x"),
    ("sample_torch.py", "--num=0"), ("sample_torch.py", "--guidance=nan"),
    ("sample_torch.py", "--guidance=-1.0"), ("sample_torch.py", "--out=FILE/x"),
    ("sample_torch.py", "--out=FOLDER/x")])
def test_a_mistake_is_one_line(drawing, script, wrong, tmp_path, monkeypatch, capsys):
  """In this process, which has imported what they need."""
  if script == "sample_torch.py":
    pytest.importorskip("torch")
  monkeypatch.chdir(tmp_path)
  (tmp_path / "FILE").write_text("as it was")
  for suffix in ("npz", "png"):
    (tmp_path / f"FOLDER/x.{suffix}").mkdir(parents=True)
  monkeypatch.setattr(sys, "argv", ["x", wrong])
  with pytest.raises(SystemExit, match="2"):
    runpy.run_path(str(drawing / script), run_name="__main__")
  assert f"{wrong}: expected" in capsys.readouterr().err.splitlines()[-1]
  assert sorted(path.name for path in tmp_path.iterdir()) == ["FILE", "FOLDER"]


@pytest.mark.parametrize("name", ["sample.py", "sample_torch.py"])
def test_what_a_script_needs_is_told_the_same_everywhere(name):
  needs = re.search("pip install (.*)", (ROOT / "dbjax/scripts" / name).read_text())[1].split()
  words = f"{', '.join(needs[:-1])} and {needs[-1]}"
  for text in (export.__doc__, (ROOT / "README.md").read_text()):
    assert f"needs {words}" in " ".join(text.split())
