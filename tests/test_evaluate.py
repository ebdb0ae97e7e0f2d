"""Stein's estimate and the exposure gap, on Gaussian data whose denoiser is known; what is printed.
"""

import dataclasses
import json
from types import SimpleNamespace

from conftest import load_config
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dbjax import config as config_lib
from dbjax import data
from dbjax import evaluate
from dbjax import solvers
from dbjax import task as task_lib
from dbjax.data import images
from dbjax.errors import UserError
from dbjax.model import Model
from dbjax.quality import distances
from dbjax.quality import exposure
from dbjax.quality import features
from dbjax.schedule import make_schedule

SHAPE = (2, 2, 1)
COV = 0.03 * np.array([[2, 1, 0, 1], [1, 3, 1, 0], [0, 1, 2, 0], [1, 0, 0, 1.5]])
VALUES, VECTORS = np.linalg.eigh(COV)
SCHEDULE = make_schedule(load_config().schedule, 3)


@dataclasses.dataclass(frozen=True)
class Gaussian:
  """A task whose D is that of N(mean, COV), times params: 1 is perfect."""

  mean: float = 0.0
  curved: bool = False

  @property
  def config(self):
    return SimpleNamespace(sigma_data=0.25)

  def denoise(self, params, frozen, z, sigma, label):
    x = (z.reshape(-1, 4) - self.mean) @ VECTORS
    x = x * (VALUES / (jnp.asarray(VALUES) + sigma[:, None] ** 2)) @ VECTORS.T
    d = params * (self.mean + x.reshape(z.shape))
    return jnp.tanh(3 * d) if self.curved else d

  def prior(self, key, sigma_max):
    return sigma_max * jax.random.normal(key, SHAPE)


def normal(n, mean, seed):
  """Data (n, 2, 2, 1) from N(mean, COV)."""
  eps = np.random.default_rng(seed).normal(size=(n, 4))
  return np.float32(mean + eps * np.sqrt(VALUES) @ VECTORS.T).reshape(n, *SHAPE)


def noise(n, seed):
  return np.random.default_rng(seed).normal(size=(n, *SHAPE)).astype(np.float32)


def losses(task, params, y, visited, sigma):
  key, label = jax.random.key(0), np.zeros(len(y), np.int32)
  three = exposure._losses(task, params, None, key, y, visited, jnp.float32(sigma), label)
  return [np.asarray(x, np.float64) for x in three]


def standard_error(x):
  return x.std() / len(x) ** 0.5


@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("params, curved", [(1.0, False), (0.7, False), (1.0, True)])
def test_steins_estimate_is_the_loss_for_any_denoiser(params, curved, sigma):
  task, y = Gaussian(0.2, curved=curved), normal(50_000, 0.2, seed=0)
  loss, sure, _ = losses(task, params, y, y, sigma)
  assert abs(np.mean(sure - loss)) < 4 * standard_error(sure - loss)
  assert standard_error(sure - loss) < 0.02 * loss.mean()  # so it would show
  if params == 1 and not curved:  # the least loss that there is
    weight = (sigma**2 + 0.25**2) / (0.25 * sigma) ** 2
    expected = weight * np.mean(VALUES * sigma**2 / (VALUES + sigma**2))
    assert abs(loss.mean() - expected) < 4 * standard_error(loss)


@pytest.mark.parametrize("sigma", [0.05, 0.3])
def test_the_gap_is_0_on_a_perfect_trajectory_and_not_with_too_little_noise(sigma):
  n, task = 50_000, Gaussian(0.2)
  y = normal(n, 0.2, seed=0)
  start = normal(n, 0.2, seed=1) + 80 * noise(n, seed=2)
  sigmas = np.geomspace(80, sigma, 60)
  denoise = jax.jit(lambda z, sigma: task.denoise(1.0, None, z, jnp.full(n, sigma), None))
  _, sure, trajectory = losses(task, 1.0, y, solvers.heun(denoise, start, sigmas), sigma)
  gap = trajectory - sure
  assert abs(gap.mean()) < 4 * standard_error(gap)
  _, sure, quiet = losses(task, 1.0, y, y + 0.8 * sigma * noise(n, seed=3), sigma)
  assert abs(np.mean(quiet - sure)) > 8 * standard_error(quiet - sure)


def chain(first_block):
  """Three blocks of perfect denoisers, but for D times `first_block` in block 0."""
  config = config_lib.resolve(load_config(**{
      "sample.solver": "euler", "sample.grid": "karras", "sample.num_steps": 100,
      "sample.batch_size": 4000}))
  params = tuple(np.float32(p) for p in (first_block, 1, 1))
  return Model(config=config, schedule=SCHEDULE, tasks=(Gaussian(),) * 3, params=params,
               steps=(0,) * 3)


def test_exposure(monkeypatch):
  monkeypatch.setattr(exposure, "_LEVELS", 2)
  n = 4000
  pixels = np.clip(np.round(127.5 * (normal(n, 0.0, seed=0) + 1)), 0, 255).astype(np.uint8)
  y, label = images.to_float(pixels), np.zeros(n, np.int32)
  perfect, broken = (exposure.exposure(chain(p), y, label) for p in (1, 3))
  assert [row["block"] for row in perfect] == [0, 0, 1, 1, 2, 2]
  assert np.all(np.diff([row["sigma"] for row in perfect]) < 0)
  for row, broken_row in zip(perfect, broken):
    hi, lo = SCHEDULE.boundaries[row["block"]:row["block"] + 2]
    assert lo <= row["sigma"] <= hi
    assert abs(row["gap"]) < 4 * row["gap_error"]
    assert row["gap"] == pytest.approx(row["sure_trajectory"] - row["sure"], abs=1e-5)
    if row["block"] > 0:  # as good as ever on noised data; it is what reaches them that is not
      assert broken_row["loss"] == row["loss"] and broken_row["sure"] == row["sure"]
  assert abs(broken[2]["gap"]) > 8 * broken[2]["gap_error"]


def test_the_exposure_of_a_single_image_has_no_error():
  y = normal(2, 0.0, seed=0)
  rows = exposure.exposure(chain(1), y[:1], np.zeros(1, np.int32))
  assert rows and all(row["gap_error"] is None and np.isfinite(row["gap"]) for row in rows)
  assert all(row["gap_error"] > 0 for row in exposure.exposure(chain(1), y, np.zeros(2, np.int32)))


def test_the_exposure_of_large_images_is_that_of_fewer(monkeypatch):
  y, label = normal(9, 0.0, seed=0), np.zeros(9, np.int32)
  few = exposure.exposure(chain(1), y[:3], label[:3])
  levels = len(chain(1).table(chain(1).options({})).sigma)
  monkeypatch.setattr(exposure, "_KEPT", 3 * y[0].size * levels)
  assert exposure.exposure(chain(1), y, label) == few


def test_block_losses_of_an_untrained_network():
  """F = 0, and pixels of +-0.749 where sigma_data is 0.5: the loss has a closed form."""
  config = config_lib.resolve(load_config(**{
      "model.num_layers": 3, "model.width": 8, "model.num_heads": 1, "model.patch_size": 4,
      "data.num_classes": 1, "sigma_data": 0.5,
      "sample.batch_size": 200}))  # the last batch is smaller
  task = task_lib.make_task(config, 0)
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype),
                       jax.eval_shape(task.init, jax.random.key(0)))
  model = Model(config=config, schedule=SCHEDULE, tasks=(task,) * 3, params=(zeros,) * 3,
                steps=(0,) * 3)
  signs = np.random.default_rng(0).integers(0, 2, (512, 8, 8, 1))
  held_out = data.Arrays(image=np.where(signs, 223, 32).astype(np.uint8),
                         label=np.zeros(512, np.int32))
  ours = model.losses(held_out)
  ratio = ((223 / 127.5 - 1) / 0.5) ** 2
  for block, loss in enumerate(ours):
    law = stats.truncnorm(*((np.log(SCHEDULE.training_range(block)) + 1.2) / 1.2), -1.2, 1.2)
    expected = ratio - law.expect(lambda s: (ratio - 1) / (1 + 4 * np.exp(2 * s)))
    assert loss == pytest.approx(expected, rel=4 * (2 / (8 * 512 * 64)) ** 0.5)


def test_the_reference_scores_real_images_noise_and_wrong_classes():
  dataset = data.load(config_lib.resolve(load_config()))
  pixels = features.load("pixels", (8, 8, 1))
  reference = distances.make_reference(dataset.train, dataset.held_out, [pixels])
  held_out = dataset.held_out.take(np.arange(len(dataset.held_out)))
  real, order = reference.held_out, np.random.default_rng(0)
  assert real["accuracy"] > 0.97 and 0 < real["frechet_pixels"] < 1
  noise = order.integers(0, 256, held_out["image"].shape, np.uint8)
  halves = lambda images, labels: [(images[:100], labels[:100]), (images[100:], labels[100:])]
  assert reference.scores(halves(noise, held_out["label"]))["frechet_pixels"] > 10
  same = reference.scores(halves(held_out["image"], order.permutation(held_out["label"])))
  assert same["accuracy"] == pytest.approx(0.1, abs=4 * (0.09 / 297) ** 0.5)
  assert same["frechet_pixels"] == pytest.approx(real["frechet_pixels"], rel=1e-9)


def test_a_table_is_printed_as_far_as_it_can_be_read():
  lines = lambda rows: evaluate.words(rows).splitlines()
  rows = [{"class": i, "share": i / 4} for i in range(100)]
  assert lines(rows[:3]) == ["class  share", "    0      0", "    1   0.25", "    2    0.5"]
  assert len(lines(rows[:50])) == 51  # such as the exposure at 4 levels of 12 blocks
  first = lines(rows)
  assert first[:-1] == lines(rows[:20]) and first[-1] == "and 80 more rows: see --json"
  square = lambda n: [{"class": i, **{str(j): 0 for j in range(n)}} for i in range(n)]
  assert len(lines(square(20))) == 21 and len(lines(square(20))[0].split()) == 21
  assert lines(square(30)) == ["30 rows of 31 columns: see --json"]
  assert lines([{"a": 1}, {"a": None, "b": 2}]) == ["a  b", "1", "   2"]
  assert lines([]) == []


@pytest.mark.parametrize("schedule, row", [
    (dict(boundaries=[80.0, 0.002]), "0          80  0.002            0.5"),
    ({}, "0                            0.5")])
def test_all_that_is_found_is_in_the_json(monkeypatch, tmp_path, capsys, schedule, row):
  """Whatever tables a task has: also of numpy's figures, or without a row; whatever its noise."""
  path = tmp_path / "scores.json"
  tables = {"losses": [0.5], "classes": [{"class": i, "share": np.float32(0.5)} for i in range(60)],
            "confusion": [{str(j): np.int64(j) for j in range(60)}] * 60, "none": [],
            "held_out": {"num_samples": 7}}
  model = SimpleNamespace(describe=lambda _: None, evaluate=lambda **options: tables | options,
                          schedule=SimpleNamespace(**schedule))
  monkeypatch.setattr(evaluate, "flags", SimpleNamespace(FLAGS=SimpleNamespace(
      json="scores.json", data_dir=None, guide=None, best=True)))
  monkeypatch.setattr(evaluate.cli, "path", lambda name: tmp_path)
  monkeypatch.setattr(evaluate.loading, "load",
                      lambda workdir, guide, best: model if best else None)
  monkeypatch.setattr(evaluate.cli, "writable", lambda name: tmp_path)  # it has become none
  with pytest.raises(UserError, match="--json=.* cannot be written"):
    evaluate.main(dict(own=[{"figure": 3}]))
  assert row in capsys.readouterr().out
  monkeypatch.setattr(evaluate.cli, "writable", lambda name: path)
  evaluate.main(dict(own=[{"figure": 3}]))
  found = json.loads(path.read_text())
  assert found == tables | {"own": [{"figure": 3}]}
  out = capsys.readouterr().out
  assert row in out and "\nclasses\n" in out and "and 40 more rows: see --json" in out
  assert "\nconfusion\n60 rows of 60 columns: see --json\n" in out
  assert "num_samples\n          7\n" in out and "\nown\nfigure\n     3\n" in out


def test_latents_that_are_not_finite_are_named():
  latents = np.random.default_rng(0).normal(size=(8, 4, 4, 2)).astype(np.float32)
  config = SimpleNamespace(sigma_data=1.0, data=SimpleNamespace(name="mine"))
  images.check_sigma_data(config, data.Dataset(*[data.Arrays(image=latents)] * 2))
  latents[5, 1, 2, 0] = np.nan
  with pytest.raises(UserError, match="data.name=mine: it has numbers that are not finite"):
    images.check_sigma_data(config, data.Dataset(*[data.Arrays(image=latents)] * 2))
