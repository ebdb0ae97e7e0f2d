"""The examples in configs/examples: each trains, samples, draws, and is as short as it claims."""

import functools
import json
import subprocess
import sys

from conftest import distance
from conftest import FORK
from conftest import ROOT
from conftest import small_config
from conftest import states_of
from conftest import synthetic_batch
from etils import epath
import jax
import numpy as np
import optax
from PIL import Image
import pytest

import dbjax
from dbjax import assemble

EXAMPLES = ROOT / "configs" / "examples"
SHORT = {"train.num_steps": 4, "train.batch_size": 16, "optimizer.warmup_steps": 1,
         "checkpoint.every_steps": 2, "log.every_steps": 2, "sample.num_steps": 3,
         "sample.batch_size": 20, "model.width": 8}


@pytest.fixture(autouse=True)
def where_the_examples_lie(monkeypatch):
  monkeypatch.syspath_prepend(EXAMPLES)


def read(name, **overrides):
  return dbjax.resolve(dbjax.read_config(EXAMPLES / f"{name}.py", SHORT | overrides))


def train(config, workdir, devices=1):
  return dbjax.train(config, workdir, devices=jax.devices()[:devices])


def is_drawn(path):
  """Whether a picture has something on it."""
  return np.asarray(Image.open(path)).std() > 10


@pytest.mark.parametrize("name, limit", [("mixer", 60), ("signals", 100)])
def test_an_example_is_short(name, limit):
  assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < limit


@pytest.mark.parametrize("name", ["mixer", "signals"])
def test_an_example_uses_public_names_only(name):
  """`import dbjax` and no module of it."""
  text = (EXAMPLES / f"{name}.py").read_text()
  assert "from dbjax" not in text and "import dbjax." not in text


@pytest.mark.parametrize("name, shape", [("mixer", (8, 8, 1)), ("signals", (64,))])
def test_an_example_trains_samples_and_draws(name, shape, tmp_path):
  history = train(read(name), tmp_path)
  assert all(np.isfinite(loss).all() and len(loss) for loss in history.loss.values())
  model = dbjax.load(tmp_path)
  samples, labels = model.sample(30)
  assert samples.shape == (30, *shape) and labels.shape == (30,)
  few = model.sample(3)[0].astype(np.float32)  # a smaller batch, which is rounded otherwise
  np.testing.assert_allclose(few, samples[:3].astype(np.float32), rtol=1e-3, atol=1e-3)
  assert is_drawn(model.tasks[0].save(model, samples, labels, epath.Path(tmp_path / "picture")))


@pytest.mark.nightly
def test_remat_of_the_mixer_changes_no_loss():
  """Nor any gradient; and there is more than one layer to recompute."""
  found = []
  for remat in (False, True):
    config = read("mixer", **{"model.remat": remat, "model.unroll": 1})
    task = dbjax.make_task(config, 0)
    assert task.network.remat is remat and task.network.num_layers == 2
    params = jax.tree.map(lambda x: x + 0.1, task.init(jax.random.key(0)))  # gates are open
    batch = dbjax.load_data(config).batch(0, 0, 16)
    drawn = task.draw(jax.random.key(1), batch, task.make_schedule(config).training_interval(0))
    program = jax.jit(jax.value_and_grad(task.loss))
    assert ("remat" in str(jax.make_jaxpr(task.loss)(params, drawn))) == remat
    found.append(program(params, drawn))
  (loss, grads), (loss_remat, grads_remat) = found
  np.testing.assert_allclose(loss_remat, loss, rtol=1e-6)
  assert distance(grads_remat, grads) < 1e-5


@pytest.mark.nightly
def test_the_mixer_on_a_mesh_has_the_weights_of_one_device(tmp_path):
  """Eight devices, two parts of a batch and four of the weights."""
  for name, devices, mesh in [("one", 1, {}), ("mesh", 8, {"mesh.data": 2, "mesh.fsdp": 4})]:
    train(read("mixer", **mesh, **{"train.blocks": (1,)}), tmp_path / name, devices)
  one, mesh = (states_of(read("mixer"), tmp_path / name, (1,))[1] for name in ("one", "mesh"))
  assert distance(mesh.params, one.params) < 1e-5


@pytest.mark.slow
def test_signals_resume_and_assemble_to_the_same_samples(tmp_path):
  """Straight; stopped halfway; and in two workdirs that never met."""
  straight = read("signals")
  train(straight, tmp_path / "straight")
  train(straight, tmp_path / "stopped")
  for b in range(3):
    epath.Path(tmp_path / f"stopped/block_{b:02d}/4").rmtree()
  train(straight, tmp_path / "stopped")
  train(read("signals", **{"train.blocks": (0,)}), tmp_path / "here")
  train(read("signals", **{"train.blocks": (1, 2)}), tmp_path / "there")
  assemble.assemble([tmp_path / "here", tmp_path / "there"], tmp_path / "joint")
  samples = [dbjax.load(tmp_path / name).sample(6)[0] for name in ("straight", "stopped", "joint")]
  np.testing.assert_array_equal(samples[1], samples[0])
  np.testing.assert_array_equal(samples[2], samples[0])


def test_signals_are_near_to_spectra_that_are_like_theirs():
  """Held-out signals have distance 0 to themselves, and noise is far from them."""
  import signals  # beside the config

  config = read("signals")
  train_on, held_out = signals.load(config)
  assert (len(train_on), len(held_out)) == (2000, 500)
  assert abs(train_on.arrays["signal"].std() - config.sigma_data) < 0.05

  class Fake:
    def __init__(self, samples):
      self.samples = samples

    def sample(self, num):
      return self.samples, held_out.arrays["label"]

  evaluate = functools.partial(dbjax.make_task(config, 0).evaluate,
                               dataset=dbjax.Dataset(train_on, held_out),
                               options=dict(num_samples=500))
  same = evaluate(Fake(held_out.arrays["signal"]))["spectra"]
  noise = evaluate(Fake(np.random.default_rng(0).normal(size=(500, 64)) * 0.7))["spectra"]
  assert [row["kind"] for row in same] == ["tone", "chirp", "chord"]
  for row, far in zip(same, noise):
    assert row["drawn"] == 0 < row["training"] < 3 < 10 < far["drawn"]
    assert row["training"] == far["training"]


@pytest.fixture
def here(tmp_path):
  """here("sample", ...) is python -m dbjax.sample ..., in configs/examples."""
  with subprocess.Popen([sys.executable, "-c", FORK], cwd=EXAMPLES, text=True,
                        stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:

    def run(module, *args):
      argv = [f"dbjax.{module}", *map(str, args)]
      out, err = tmp_path / "out", tmp_path / "err"
      for path in (out, err):
        path.unlink(missing_ok=True)
      server.stdin.write(json.dumps([argv, str(out), str(err)]) + "\n")
      server.stdin.flush()
      assert server.stdout.readline() == "0\n", err.read_text()
      return out.read_text()

    yield run
    server.stdin.close()


@pytest.mark.slow  # in parts: the tests above
@pytest.mark.parametrize("name", ["mixer", "signals"])
def test_every_command_works(name, here, tmp_path):
  """As the docstring has them, shrunk."""
  text = (EXAMPLES / f"{name}.py").read_text()
  flags = [f"--config.{field}={value}" for field, value in SHORT.items()]
  main = f"--config={name}.py", *flags
  for module in ("main", "sample", "evaluate"):
    assert f"python -m dbjax.{module}" in text
  for blocks in ("0", "1,2"):
    here("main", *main, f"--workdir={tmp_path / blocks}", f"--config.train.blocks={blocks}")
  here("assemble", f"--out={tmp_path / 'joint'}", tmp_path / "0", tmp_path / "1,2")
  workdir = f"--workdir={tmp_path / 'joint'}"
  assert "step      4/4" not in here("main", *main, workdir)  # it has nothing left to do
  here("sample", workdir, f"--out={tmp_path / 'drawn.npz'}", "--num_samples=12")
  assert np.load(tmp_path / "drawn.npz")["samples"].shape[0] == 12
  assert is_drawn(tmp_path / "drawn.png")
  assert "held-out loss" in here("evaluate", workdir, "--num_samples=40")
  assert "B = 3" in here("plan", *main, "--topology=cpu:1", "--nolargest")


@pytest.mark.slow
def test_by_hand_trains_and_draws(python, tmp_path):
  """Without a config, a workdir or a task."""
  done = python(EXAMPLES / "by_hand.py", "--steps=30", f"--out={tmp_path / 'drawn.png'}")
  assert done.returncode == 0, done.stderr
  assert done.stdout.count("block") == 3 and is_drawn(tmp_path / "drawn.png")


def test_by_hand_a_step_is_less_than_fifteen_lines():
  text = (EXAMPLES / "by_hand.py").read_text()
  init, step = (text.partition(f"\ndef {name}(")[2].partition("\n\n\n")[0].count("\n") + 1
                for name in ("init", "step"))
  assert init + step < 15


@pytest.mark.parametrize(
    "name", ["digits", *(pytest.param(name, marks=pytest.mark.slow) for name in (
        "digits_classify", "gcide_masked", "kjv", "kjv_recurrent"))])
def test_a_step_by_hand_of_any_task(name):
  """Downhill: on the same draws the loss is lower after it. The five tasks of dbjax."""
  import by_hand  # beside the examples

  config = small_config(name)
  task = dbjax.make_task(config, 0)
  batch = synthetic_batch(task, 0)  # of shapes that task.abstract_batch says
  params, loss = by_hand.step_of_any_task(config, 0, batch, optax.sgd(1e-3))
  interval, frozen = task.make_schedule(config).training_interval(0), task.frozen(config)
  drawn = jax.jit(task.draw)(jax.random.key(1), batch, interval)
  after = jax.jit(task.loss)(params, drawn, frozen)
  assert np.isfinite(loss) and after < loss
