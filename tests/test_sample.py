"""The command dbjax.sample writes what `Model.sample` returns, and says which options there are."""

import jax
import numpy as np
from PIL import Image
import pytest

from dbjax import loading
from dbjax import loop


@pytest.fixture
def workdir(tiny, tmp_path, steps_once):
  """Of three tiny blocks after a step."""
  config = tiny(**{"train.num_steps": 1})
  loop.train(config, tmp_path / "run", devices=jax.devices()[:1])
  return tmp_path / "run"


@pytest.mark.slow  # in parts: test_cli.py, and the README's commands
def test_the_command(workdir, forked, tmp_path):
  out = tmp_path / "new/folder/samples.npz"
  flags = {"num_steps": 3, "solver": "heun", "guidance": 2.0, "batch_size": 4}
  done = forked("sample", f"--workdir={workdir}", f"--out={out}", "--num_samples=6", "--seed=7",
                "--labels=3,1", *(f"--{name}={value}" for name, value in flags.items()))
  assert done.returncode == 0, done.stderr
  assert "blocks trained for 1, 1, 1 of 1 steps" in done.stdout
  assert "4/6 samples\n6/6 samples\n" in done.stdout
  samples, labels = loading.load(workdir).sample(6, seed=7, labels=(3, 1), **flags)
  with np.load(out) as file:
    np.testing.assert_array_equal(file["samples"], samples)
    np.testing.assert_array_equal(file["labels"], labels)
  with Image.open(out.with_suffix(".png")) as grid:
    assert grid.height < grid.width

  flags |= {"guidance_from": 0.1, "guidance_to": 20.0, "churn": 2.0}
  done = forked("sample", f"--workdir={workdir}", f"--out={out}", "--num_samples=4",
                f"--guide={workdir}", *(f"--{name}={value}" for name, value in flags.items()))
  assert done.returncode == 0, done.stderr
  with np.load(out) as file:
    np.testing.assert_array_equal(
        file["samples"], loading.load(workdir, guide=workdir).sample(4, **flags)[0])

  shown = forked("sample", f"--workdir={workdir}", "--help")
  assert shown.returncode == 0
  for words in ("of this workdir's task:",
                "--guidance: 1 is none\n    (a finite number, 0 or more)",
                "--churn: noise added on the way, by euler and heun: EDM's S_churn; 0: none\n",
                "--labels: classes to draw, taken in turn [all]\n    (whole numbers)",
                "--solver: of the probability flow\n    (one of euler, heun, dpmpp_2m)"):
    assert words in shown.stdout

  before = out.read_bytes()
  for flag, words in [
      ("--guidence=2", "--guidence=2: there is no such flag; the options of this task are "),
      ("--guidence=2", "did you mean guidance?"),
      ("--guidance=nan", "--guidance=nan: expected a finite number, 0 or more"),
      ("--solver=eular", "--solver='eular': expected one of euler, heun, dpmpp_2m"),
      ("--labels=3,x", "--labels=3,x: expected whole numbers"),
      ("--labels=10", "labels=10: expected classes from 0 to 9"),
      ("--guide=/nowhere", "/nowhere"),
      ("--guidance_to=-1", "--guidance_to=-1.0: expected a finite number, 0 or more"),
      ("--churn=-1", "--churn=-1.0: expected a finite number, 0 or more"),
      ("--num_samples=0", "num_samples"),
      ("--out=samples.npy", "--out=samples.npy: expected a name that ends in .npz"),
      ("stray", "unexpected argument 'stray'"),
  ]:
    done = forked("sample", f"--workdir={workdir}", f"--out={out}", flag)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ") and words in done.stderr
  assert out.read_bytes() == before
