"""Models: what they are asked for, who answers, and how they are made from Python."""

import dataclasses
import functools
import hashlib
import json

import chex
from conftest import load_config
from conftest import random_params
from conftest import states_of
from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import chain
from references import COV
from references import edm_schedule
from references import MU
from references import VALUES
from references import VECTORS

import dbjax
from dbjax import block as block_lib
from dbjax import checkpoint
from dbjax import config as config_lib
from dbjax import data
from dbjax import loading
from dbjax import model as model_lib
from dbjax import provenance
from dbjax import solvers
from dbjax import task as task_lib
from dbjax.errors import UserError
from dbjax.model import Model


@dataclasses.dataclass(frozen=True)
class Expert:
  """A task whose D is that of N(MU, COV), and NaN unless block, weights and sigma agree."""

  block: int

  def denoise(self, params, frozen, z, sigma, label):
    values = jnp.asarray(VALUES)
    d = MU + ((z - MU) @ VECTORS * (values / (values + sigma[:, None] ** 2))) @ VECTORS.T
    mine = (params["block"][0] == self.block) & (params["lo"] <= sigma) & (sigma <= params["hi"])
    return jnp.where(mine[:, None], d, jnp.nan)


def experts(num_blocks):
  split = edm_schedule(num_blocks)
  params = tuple(dict(block=np.full(12_345, b, np.float32), lo=np.float32(lo), hi=np.float32(hi))
                 for b, (hi, lo) in enumerate(zip(split.boundaries, split.boundaries[1:])))
  return Model(config=None, schedule=split, tasks=tuple(map(Expert, range(num_blocks))),
               params=params, steps=(0,) * num_blocks)


@pytest.mark.parametrize("solver", list(solvers.TABLES))
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_a_model_routes_each_sigma_to_its_block(solver, num_blocks):
  start = 80 * np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
  sigmas = edm_schedule(num_blocks).karras_grid(20)
  ours = solvers.solve(solver, experts(num_blocks).denoiser(jnp.zeros(4, int)), start, sigmas)
  expected = solvers.solve(solver, chain(num_blocks)[0], start.astype(np.float64), sigmas)
  np.testing.assert_allclose(ours, expected, rtol=0, atol=80 * 1e-6)  # float32 of the start


def untrained(config):
  """A model of a config without weights."""
  tasks = tuple(task_lib.make_task(config, b) for b in range(config.num_blocks))
  return Model(config=config, schedule=tasks[0].make_schedule(config), tasks=tasks,
               params=(None,) * len(tasks), steps=(0,) * len(tasks))


@pytest.mark.parametrize("options, words", [
    (dict(num_steps=10), "num_steps=10 on grid=karras leave out block(s) 1, 3: take more steps, "
                         "or grid=equal_mass"),
    (dict(num_steps=0), "num_steps=6 on grid=karras leave out block(s) 1, 2, 3, 4: take"),
    (dict(num_steps=3, grid="equal_mass"), "num_steps=3 on grid=equal_mass leave out block(s) "
                                           "1, 3, 4: take more steps\n"),
    (dict(num_steps=0, grid="equal_mass"), ""), (dict(num_steps=50), ""), ({}, "")])
def test_blocks_that_a_sampler_steps_over_are_told(capsys, options, words):
  model = untrained(config_lib.resolve(load_config(
      "digits", num_blocks=6, **{"model.num_layers": 6})))
  model.describe(options | dict(guidance=(1.0, 2.0)))  # of evaluate: several
  out = capsys.readouterr().out
  assert f"note: {words}" in out if words else "note" not in out


@pytest.mark.parametrize("name", ["gcide_masked", "digits_classify", "kjv", "kjv_recurrent"])
def test_every_task_describes_its_blocks(capsys, name):
  untrained(config_lib.resolve(load_config(name))).describe()
  assert "blocks trained for" in capsys.readouterr().out


def test_only_one_block_is_on_the_device():
  denoise = experts(3).denoiser(jnp.zeros(4, int))
  resident = lambda: [int(x[0]) for x in jax.live_arrays() if x.shape == (12_345,)]
  assert resident() == []
  for sigma, block in [(80.0, 0), (1.0, 0), (0.3, 1), (0.1, 2), (0.002, 2), (0.6, 0)]:
    denoise(jnp.zeros((4, 3)), sigma)
    assert resident() == [block]


@pytest.mark.parametrize("solver", list(solvers.TABLES))
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_compiled_steps_are_those_of_the_solver(solver, num_blocks):
  """Against the exact D in float64, step by step; one program, whatever the number of steps."""
  model, label = experts(num_blocks), jnp.zeros(4, int)
  start = 80 * np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
  z, states = model.trace(start, dict(solver=solver, grid="karras", num_steps=20), seeing_z, label)
  called, denoise = [], chain(num_blocks)[0]

  def record(z, sigma):
    called.append(z)
    return denoise(z, sigma)

  sigmas = edm_schedule(num_blocks).karras_grid(20)
  expected = solvers.solve(solver, record, start.astype(np.float64), sigmas)
  np.testing.assert_allclose(z, expected, rtol=0, atol=80 * 1e-6)  # float32 of the start
  np.testing.assert_allclose(states, called, rtol=0, atol=80 * 1e-6)


@pytest.mark.parametrize("solver, num_blocks", [("euler", 3), ("heun", 1), ("heun", 3)])
def test_compiled_steps_with_churn_are_algorithm_2(solver, num_blocks):
  """EDM's, in float64, by the same normals; what is raised across a seam is its block's."""
  model, label = experts(num_blocks), jnp.zeros(4, int)
  options = dict(solver=solver, grid="karras", num_steps=20, churn=12.0, churn_from=0.01,
                 churn_to=60.0, churn_noise=1.01)
  start = 80 * np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
  keys, rows = model.keys(7, np.arange(4)), 2 if solver == "heun" else 1
  z = model.solve(start, options, label, keys=keys)
  t, denoise, x = edm_schedule(num_blocks).karras_grid(20), chain(num_blocks)[0], np.float64(start)
  for i in range(20):
    t_hat = min(t[i] * (1 + min(12 / 20, 2**0.5 - 1) * (0.01 <= t[i] <= 60)), 80)
    normal = [jax.random.normal(jax.random.fold_in(key, rows * i), (3,)) for key in keys]
    x_hat = x + np.sqrt(t_hat**2 - t[i] ** 2) * 1.01 * np.float64(normal)
    d = (x_hat - denoise(x_hat, t_hat)) / t_hat
    x = x_hat + (t[i + 1] - t_hat) * d
    if solver == "heun" and t[i + 1]:
      x = x_hat + (t[i + 1] - t_hat) * (d + (x - denoise(x, t[i + 1])) / t[i + 1]) / 2
  np.testing.assert_allclose(z, x, rtol=0, atol=80 * 1e-6)  # float32 of the start
  with pytest.raises(UserError, match=r"churn=12: expected keys=model.keys\(seed, index\)"):
    model.solve(start, options, label)


@pytest.mark.parametrize("churn", [0.0, 10.0])
def test_samples_of_gaussian_data_have_their_covariance(churn):
  model, index = experts(3), np.arange(5000)
  options = dict(solver="heun", grid="karras", num_steps=60, churn=churn, churn_from=0.0,
                 churn_to=1e20, churn_noise=1.0)
  start = 80 * np.random.default_rng(0).normal(size=(len(index), 3)).astype(np.float32)
  z = model.solve(start, options, jnp.zeros(len(index), int), keys=model.keys(0, index))
  np.testing.assert_allclose(np.cov(z, rowvar=False), COV, rtol=0, atol=0.04)  # 4 standard errors
  plain = model.solve(start, options | dict(churn=0.0), jnp.zeros(len(index), int))
  correlation = np.corrcoef(np.asarray(z)[:, 0], np.asarray(plain)[:, 0])[0, 1]
  assert (correlation > 0.99) == (churn == 0)  # with churn, z is hardly where the ODE leads


def seeing_z(task, params, frozen, z, sigma, label):
  return task.denoise(params, frozen, z, sigma, label), z


def test_all_blocks_and_solvers_run_one_program(model):
  options = dict(solver="heun", num_steps=7, batch_size=4)
  model.sample(4, **options)  # stretches of 4 to 5 evaluations
  before = model_lib._solve._cache_size()
  model.sample(8, seed=3, **options)
  model.sample(4, **options | dict(solver="dpmpp_2m", num_steps=40))
  assert model_lib._solve._cache_size() == before


@pytest.mark.parametrize("total, words", [(7, "of 7 steps"), ((7, 7, 9), "of 7, 7, 9 steps")])
def test_it_tells_how_far_its_blocks_are(tiny, capsys, total, words):
  config = config_lib.resolve(tiny(**{"train.num_steps": total, "sample.num_steps": 50}))
  dataclasses.replace(experts(3), config=config).describe()
  assert capsys.readouterr().out == f"blocks trained for 0, 0, 0 {words}\n"


def test_weights_come_and_go_with_their_stretch():
  resident = lambda: sorted(int(x[0]) for x in jax.live_arrays() if x.shape == (12_345,))
  seen = []
  for *_, params in experts(3).stretches(np.array([80.0, 0.3, 0.29, 0.1])):
    del params
    seen.append(resident())
  assert seen == [[0], [1], [2]] and resident() == []


def test_a_guide_is_on_the_device_beside_the_block_that_it_guides():
  """And only there: 100 and more are its weights."""
  model, resident = experts(3), lambda: sorted(
      int(x[0]) for x in jax.live_arrays() if x.shape == (12_345,))
  guide = dataclasses.replace(model, params=tuple(
      p | dict(block=100 + p["block"]) for p in model.params))
  seen = []
  for *_, params in model.beside(guide, {1}).stretches(np.array([80.0, 0.3, 0.29, 0.1])):
    del params
    seen.append(resident())
  assert seen == [[0], [1, 101], [2]] and resident() == []


@pytest.fixture
def model(tiny):
  """Three blocks of a tiny DiT with random weights."""
  config = config_lib.resolve(tiny())
  tasks = tuple(task_lib.make_task(config, b) for b in range(3))
  weights = tuple(random_params(task.network, *task.call(1).inputs, seed=b)
                  for b, task in enumerate(tasks))
  return Model(config=config, schedule=tasks[0].make_schedule(config), tasks=tasks, params=weights,
               steps=(0,) * 3)


def test_samples_are_a_function_of_their_number(model):
  whole, labels = model.sample(10, batch_size=10)
  assert whole.shape == (10, 8, 8, 1) and whole.dtype == np.uint8
  np.testing.assert_array_equal(labels, np.arange(10))
  assert len(np.unique(whole)) > 100  # neither flat nor saturated

  def assert_same(samples, expected):  # another batch size sums in another order
    difference = np.abs(samples.astype(int) - expected)
    assert difference.max() <= 1 and np.mean(difference > 0) < 0.01

  churned = model.sample(10, batch_size=10, solver="heun", churn=4)[0]
  assert_same(model.sample(10, batch_size=4, solver="heun", churn=4)[0], churned)
  assert np.mean(model.sample(10, batch_size=10, solver="heun")[0] != churned) > 0.5

  parts = list(model.generate(10, batch_size=4))
  assert [len(label) for _, label in parts] == [4, 4, 2]
  assert_same(np.concatenate([x for x, _ in parts]), whole)
  np.testing.assert_array_equal(np.concatenate([label for _, label in parts]), labels)
  tail, labels = model.tasks[0].generate(model, np.arange(6, 10), 0, model.options({}))
  assert_same(tail, whole[6:])
  np.testing.assert_array_equal(labels, np.arange(6, 10))

  assert np.mean(model.sample(10, batch_size=10, seed=1)[0] != whole) > 0.5
  threes, labels = model.sample(10, batch_size=10, labels=(3, 1))
  np.testing.assert_array_equal(labels, [3, 1] * 5)
  differ = np.any(threes != whole, axis=(1, 2, 3))  # only those asked for another class
  np.testing.assert_array_equal(differ, np.arange(10) != 1)


@pytest.mark.parametrize("num, options, message", [
    (0, {}, "num=0: expected a whole number, from 1 to 2147483647"),
    (2.5, {}, "num=2.5: expected a whole number"),
    (True, {}, "num=True: expected a whole number"),
    (10**30, {}, "num=10+: expected a whole number"),
    (4, {"seed": -1}, "seed=-1: expected a whole number, from 0 to 4294967295"),
    (4, {"seed": 2**32}, "seed=4294967296: expected a whole number, from 0 to 4294967295"),
    (4, {"seed": 1.5}, "seed=1.5: expected a whole number"),
    (4, {"num_steps": 10**6 + 1}, "num_steps=1000001: expected a whole number, from 0 to 1000000"),
    (4, {"batch_size": 2**63}, r"batch_size=\d+: expected a whole number, above 0, at most 9.2e"),
    (4, {"guidance": 1e39}, r"guidance=1e\+39: expected a finite number, 0 or more, at most 3.4e"),
    (4, {"labels": (2**40,)}, "labels=1099511627776: expected classes from 0 to 9"),
    (4, {"guidence": 2}, "guidence=2: there is no such option, .*; did you mean guidance?"),
    (4, {"every_steps": 2}, "every_steps=2: there is no such option"),
    (4, {"guidance": np.nan}, "guidance=nan: expected a finite number, 0 or more"),
    (4, {"guidance": -1}, "guidance=-1: expected a finite number, 0 or more"),
    (4, {"num_steps": 2.5}, "num_steps=2.5: expected a whole number, 0 or more"),
    (4, {"batch_size": 0}, "batch_size=0: expected a whole number, above 0"),
    (4, {"solver": "eular"}, "solver='eular': expected one of euler, heun, dpmpp_2m"),
    (4, {"grid": "even"}, "grid='even': expected one of karras, equal_mass"),
    (4, {"labels": (3, 10)}, "labels=3,10: expected classes from 0 to 9"),
    (4, {"labels": (-1,)}, "labels=-1: expected classes from 0 to 9"),
    (4, {"labels": 3}, "labels=3: expected whole numbers"),
    (4, {"guidance_from": 3, "guidance_to": 2.5},
     "guidance_from=3 is above guidance_to=2.5: expected two noise levels"),
    (4, {"guidance_to": -1}, "guidance_to=-1: expected a finite number, 0 or more"),
    (4, {"churn": 9, "solver": "dpmpp_2m"}, "churn=9: expected 0 with solver=dpmpp_2m"),
    (4, {"churn": 9, "churn_from": 2, "churn_to": 1}, "churn_from=2 is above churn_to=1"),
    (4, {"churn_noise": 0}, "churn_noise=0: expected a finite number, above 0"),
    (4, {"guide_step": 2, "guidance": 2}, "guide_step=2: expected a model that dbjax.load has "),
])
def test_what_is_asked_of_samples_is_checked(model, num, options, message):
  with pytest.raises(UserError, match=message):
    model.sample(num, **options)


def test_options_are_those_of_the_config_unless_given(model):
  assert model.options({}) == dict(
      solver="euler", grid="karras", num_steps=5, batch_size=8, every_steps=0, guidance=1.0,
      guidance_from=0.0, guidance_to=1e20, guide_step=0, churn=0.0, churn_from=0.0, churn_to=1e20,
      churn_noise=1.0, labels=())
  assert model.options(dict(num_steps=0, guidance=2))["num_steps"] == 3  # as many as blocks
  other = model.with_config(**{"sample.guidance": 2.0, "sample.num_steps": 2})
  np.testing.assert_array_equal(other.sample(4)[0], model.sample(4, guidance=2, num_steps=2)[0])


Z, LABEL = np.zeros((2, 8, 8, 1), np.float32), np.array([3, 10])


@pytest.mark.parametrize("z, sigma, condition, message", [
    (Z[..., 0], 1.0, (LABEL,), r"denoise\(z float32\[2, 8, 8\], sigma, int64\[2\]\)"),
    (np.zeros((2, 9, 9, 1), np.float32), 1.0, (LABEL,), r"z float32\[2, 9, 9, 1\], .* takes none"),
    (Z.astype(np.uint8), 1.0, (LABEL,), "expected z of floats, noised"),
    (None, 1.0, (LABEL,), "expected z of floats"),
    ("z", 1.0, (LABEL,), "expected z of floats"),
    ([[1.0], [1.0, 2.0]], 1.0, (LABEL,), "expected arrays"),
    (Z, 1.0, (), "label is missing, after z and sigma"),
    (Z, 1.0, (LABEL[:1],), r"expected label \(2, ...\) of numbers, one for each z"),
    (Z, 1.0, (None,), "expected label"),
    (Z, 1.0, (np.array(["a", "b"]),), "expected label"),
    (Z, 1.0, (LABEL + 0.5,), "takes none such"),
    (Z, 1.0, (LABEL, 2.0, 3), "takes none such"),
    (Z, np.nan, (LABEL,), "sigma=nan: expected a finite number, from 0.002 to 80, of the schedule"),
    (Z, -1.0, (LABEL,), "sigma=-1.0: expected a finite number, from 0.002 to 80"),
    (Z, 0, (LABEL,), "sigma=0: expected a finite number"),
    (Z, 81.0, (LABEL,), "sigma=81.0: expected a finite number"),
    (Z, np.ones(2), (LABEL,), r"sigma=array\(\[1., 1.\]\): expected a finite number"),
    (Z, "1", (LABEL,), "sigma='1': expected a finite number"),
])
def test_what_denoise_is_given_is_checked(model, z, sigma, condition, message):
  with pytest.raises(UserError, match=message) as error:
    model.denoise(z, sigma, *condition)
  assert "\n" not in str(error.value)


def test_denoise_takes_the_ends_of_the_schedule_and_guidance(model):
  for sigma in (np.float32(0.002), 80, jnp.float32(80)):
    assert np.isfinite(model.denoise(Z, sigma, LABEL)).all()
  one, two = model.denoise(Z, 1.0, LABEL), model.denoise(Z, 1.0, LABEL, 2.0)
  assert two.shape == Z.shape and np.isfinite(two).all()
  np.testing.assert_array_equal(model.denoise(Z.astype(np.float64), 1.0, LABEL.tolist()), one)


@pytest.mark.parametrize("held_out, options, message", [
    (None, {}, "held_out=None: expected examples, with len and take"),
    (data.Arrays(image=np.zeros((3, 8, 8, 1), np.uint8)), {}, "held_out.take returns no label"),
    (data.Arrays(image=np.zeros((3, 8, 8, 1)), label=np.zeros(3, np.int32)), {},
     r"held_out.take returns image float64\[1, 8, 8, 1\], expected uint8\[1, 8, 8, 1\]"),
    (data.Arrays(image=np.zeros((0, 8, 8, 1))), {}, "held_out: has no examples"),
    (None, dict(passes=0), "passes=0: expected a whole number, above 0"),
])
def test_what_losses_are_asked_of_is_checked(model, held_out, options, message):
  with pytest.raises(UserError, match=message):
    model.losses(held_out, **options)


def test_a_batch_that_does_not_fit_into_memory_is_one_line(model, monkeypatch):
  def exhausted(*_):
    raise MemoryError

  monkeypatch.setattr(type(model.tasks[0]), "generate", exhausted)
  with pytest.raises(UserError, match="batch_size=8: so many samples at a time do not fit"):
    model.sample(9)


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_denoise_asks_the_block_of_its_noise(num_blocks):
  """Another block's D would be nan."""
  model, z = experts(num_blocks), np.float32(np.random.default_rng(0).normal(size=(4, 3)))
  for sigma in (*model.schedule.boundaries, 1.0, 0.3, 0.01):
    expected = chain(num_blocks)[0](np.float64(z), sigma)
    d = model.denoise(z, sigma, jnp.zeros(4, int))
    assert d.dtype == jnp.float32
    np.testing.assert_allclose(d, expected, rtol=0, atol=1e-5)


def images(total=60, seed=0):
  """Like digits: image (N, 8, 8, 1) uint8 of standard deviation 0.75, label (N,)."""
  rng = np.random.default_rng(seed)
  label = rng.integers(0, 10, total, np.int32)
  image = np.where(rng.integers(0, 2, (total, 8, 8, 1)), 223, 32) + label[:, None, None, None]
  return dict(image=np.uint8(image), label=label)


def test_losses_without_overlap_are_of_each_blocks_own_noise(model, monkeypatch):
  drawn, held_out = {}, data.Arrays(**images(20))

  def loss(task, params, key, batch, interval, frozen):
    drawn[interval.hi] = interval.lo
    return interval.mass

  monkeypatch.setattr(model_lib, "_loss", loss)
  own = model.losses(held_out, overlap=False)
  np.testing.assert_allclose(list(drawn), model.schedule.boundaries[:-1], rtol=1e-6)
  np.testing.assert_allclose(list(drawn.values()), model.schedule.boundaries[1:], rtol=1e-6)
  assert all(np.less(own, model.losses(held_out)))


def test_a_model_is_evaluated_on_the_data_given(model):
  model = model.with_config(**{"sample.grid": "equal_mass"})  # of so few steps one in each block
  train, held_out = images(), images(20, seed=1)
  result = model.evaluate((train, held_out), num_samples=8, guidance=(1, 2.0))
  assert set(result) == {"losses", "exposure", "quality", "held_out"}
  assert result["losses"] == model.losses(data.Arrays(**held_out))
  assert result["losses"] != model.losses(data.Arrays(**train))
  assert [(row["guidance"], row["num_samples"]) for row in result["quality"]] == [(1, 8), (2, 8)]
  assert {row["block"] for row in result["exposure"]} == {0, 1, 2}
  for options, message in [
      ({"num_sample": 8}, "num_sample=8: there is no such option, .*did you mean num_samples?"),
      ({"guidance": (1, np.nan)}, "guidance=.1, nan.: expected finite numbers, 0 or more each"),
      ({"num_samples": 1}, "num_samples=1: expected a whole number, 2 or more"),
      ({"features": ("pixel",)}, "features 'pixel': expected one of pixels, inception"),
  ]:
    with pytest.raises(UserError, match=message):
      model.evaluate((train, held_out), **options)
  small = train | dict(image=train["image"][:, :4, :4])
  with pytest.raises(UserError, match="data.image_size=8, data.channels=1: the images .* 4 x 4"):
    model.evaluate(small)


def test_fields_of_the_sampler_are_options_of_evaluate(model, monkeypatch):
  """With the config's values where they are not given; guidance has its own form."""
  monkeypatch.setattr(type(model.tasks[0]), "evaluate", lambda *given: given[-1])
  monkeypatch.setattr(Model, "losses", lambda *_: [])
  model = model.with_config(**{"sample.guidance_to": 4.0, "sample.churn_noise": 1.1,
                               "sample.guidance": 3.0})
  found = model.evaluate((images(), images()), guidance_from=2, churn=5)
  assert [found[name] for name in (
      "guidance", "guidance_from", "guidance_to", "churn", "churn_noise", "guide_step")] == [
          (), 2, 4.0, 5, 1.1, 0]
  with pytest.raises(UserError, match="solver='heun': there is no such option"):
    model.evaluate((images(), images()), solver="heun")


class Own:
  """Examples of a user's class."""

  def __init__(self, image, label):
    self._image, self._label = image, label

  def __len__(self):
    return len(self._label)

  def take(self, numbers):
    return dict(image=self._image[numbers], label=self._label[numbers])


@pytest.fixture
def small(tiny):
  """small(**overrides): two blocks, two steps."""
  fields = {"num_blocks": 2, "model.num_layers": 2, "train.num_steps": 2}
  return lambda **more: tiny(**fields | more)


@pytest.fixture
def train():
  """As `dbjax.train`, on one device."""
  return lambda *args: dbjax.train(*args, devices=jax.devices()[:1])


@pytest.mark.usefixtures("steps_once")
@pytest.mark.nightly
def test_data_may_be_given_in_any_form(small, train, tmp_path):
  """The same examples: the same weights. The config may be complete only, or resolved."""
  x, config = images(), config_lib.resolve(small())
  forms = dict(
      alone=data.Arrays(**x), pair=(data.Arrays(**x), data.Arrays(**images(20, seed=1))), plain=x,
      plain_pair=[x, images(20, seed=1)], own=Own(**x), own_pair=(Own(**x), x),
      dataset=data.Dataset(train=Own(**x), held_out=Own(**x)))
  for i, (name, form) in enumerate(forms.items()):
    train(small() if i % 2 else config, tmp_path / name, form)
  first, *others = [states_of(config, tmp_path / name, (0, 1)) for name in forms]
  for other in others:
    chex.assert_trees_all_equal(other, first)
  train(config, tmp_path / "digits")  # the config's
  theirs = states_of(config, tmp_path / "digits", (0, 1))
  assert not np.array_equal(theirs[0].params["read_out"]["kernel"],
                            first[0].params["read_out"]["kernel"])


@pytest.mark.parametrize("dataset, message", [
    (3, "dataset: expected what to train on and what is held out, .* found int"),
    ((images(), None), "dataset: expected what to train on .* found NoneType"),
    ({k: v[:0] for k, v in images().items()}, "dataset: has no examples"),
    (images(7), "dataset: 7 examples to train on are fewer than train.batch_size=8"),
    (images() | dict(label=images(61)["label"]), "arrays of .*expected some of one length"),
    (dict(image=images()["image"], label=np.zeros(60)),
     r"dataset: train.take returns label float64\[2\], expected int32\[2\]"),
    (images() | dict(image=images()["image"] // 4), "sigma_data=0.75: .* standard deviation"),
])
def test_data_that_do_not_fit_are_refused(small, train, tmp_path, dataset, message):
  with pytest.raises(UserError, match=message):
    train(small(), tmp_path / "run", dataset)
  assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("steps_once")
def test_a_run_returns_what_it_has_written(small, train, tmp_path):
  """And so does the same call again, which trains nothing; other runs do not mix in."""
  config = small(**{"log.every_steps": 1})

  def check(history, name, blocks):
    assert history.stopped is None
    assert set(history.steps) == set(history.loss) == set(history.metrics) == set(blocks)
    for b in blocks:
      lines = (tmp_path / name / f"block_0{b}/metrics.jsonl").read_text().splitlines()
      rows = [json.loads(line) for line in lines]
      np.testing.assert_array_equal(history.steps[b], [1, 2])
      assert history.steps[b].dtype == np.int64
      np.testing.assert_array_equal(history.loss[b], [row["loss"] for row in rows])
      assert set(history.metrics[b]) == set(rows[0])
      for key, values in history.metrics[b].items():
        np.testing.assert_array_equal(values, [row[key] for row in rows])

  first = train(config, tmp_path / "run")
  check(first, "run", (0, 1))
  check(train(config, str(tmp_path / "run")), "run", (0, 1))
  one = train(small(**{"log.every_steps": 1, "train.blocks": (1,)}), tmp_path / "one")
  check(one, "one", (1,))
  np.testing.assert_array_equal(one.loss[1], first.loss[1])
  other = train(small(seed=1, **{"log.every_steps": 1}), tmp_path / "other")
  assert not np.array_equal(other.loss[1], first.loss[1])


@pytest.mark.usefixtures("steps_once")
def test_training_twice_in_one_process_is_training_once(small, train, tmp_path):
  for name, more in (("one", {}), ("other", {"seed": 3}), ("two", {})):
    train(small(**more), tmp_path / name)
  config = config_lib.resolve(small())
  one, two = (states_of(config, tmp_path / name, (0, 1)) for name in ("one", "two"))
  chex.assert_trees_all_equal(one, two)
  for name in ("one", "two"):
    model = dbjax.load(tmp_path / name)
    assert model.steps == (2, 2) and model.workdir == tmp_path / name
  np.testing.assert_array_equal(model.sample(4)[0], dbjax.load(tmp_path / "one").sample(4)[0])


@pytest.mark.usefixtures("steps_once")
def test_other_data_on_resume_are_refused(small, train, tmp_path):
  first = small(**{"train.blocks": (0,)})
  train(first, tmp_path / "run", images())
  relabelled = images() | dict(label=images()["label"][np.r_[0, 29:0:-1, 30, 58:30:-1, 59]])
  assert data.fingerprint(data.Arrays(**images())) == data.fingerprint(data.Arrays(**relabelled))
  for other in (images(seed=1), images(59), relabelled, None):
    with pytest.raises(UserError, match="block_00 was trained with other data of the same name"):
      train(small(), tmp_path / "run", other)
  assert not list((tmp_path / "run/block_01").iterdir())
  train(small(), tmp_path / "run", Own(**images()))
  model = dbjax.load(tmp_path / "run")
  assert model.steps == (2, 2) and len(model.dataset((images(), images())).train) == 60
  with pytest.raises(UserError, match="config.data names other data than the model was trained wi"):
    model.evaluate()


NET = """
from flax import linen as nn

class Net(nn.Module):
  num_layers: int
  width: int = 8

  @nn.compact
  def __call__(self, x, c_noise, label):
    h = nn.Dense(self.width)(x.reshape(len(x), -1)) + nn.Dense(self.width)(c_noise[:, None])
    for _ in range(self.num_layers):
      h = h + nn.Dense(self.width)(nn.silu(h))
    return nn.Dense(x[0].size)(h).reshape(x.shape)
"""


def test_what_a_block_was_trained_with_is_recorded_and_compared(train, tmp_path, monkeypatch,
                                                                capsys):
  monkeypatch.syspath_prepend(tmp_path)
  module = tmp_path / "net_of_test_model.py"
  module.write_text(NET)
  config = dbjax.read_config("digits", {
      "model.network": "net_of_test_model:Net", "model.num_layers": 2, "num_blocks": 2,
      "train.num_steps": 1, "train.batch_size": 8, "sample.every_steps": 0,
      "sample.num_steps": 2})
  train(config, tmp_path / "run", images())
  for b in range(2):
    with checkpoint.BlockCheckpoint(tmp_path / "run", b) as saved:
      recorded = saved.meta()["trained_with"]
    assert recorded["dbjax"] == dbjax.__version__
    assert recorded["data"] == data.fingerprint(data.Arrays(**images()))
    assert recorded["code"] == {"model.network": dict(
        name="net_of_test_model:Net", sha256=hashlib.sha256(NET.encode()).hexdigest())}
  capsys.readouterr()
  before = dbjax.load(tmp_path / "run").sample(4)[0]
  assert "note" not in capsys.readouterr().out
  module.write_text(NET + "\n# as it was, but for this\n")
  after = dbjax.load(tmp_path / "run").sample(4)[0]
  notes = [x for x in capsys.readouterr().out.splitlines() if x.startswith("note: ")]
  assert len(notes) == 2 and all(x.endswith(
      "was trained with another content of the module of model.network=net_of_test_model:Net")
      for x in notes)
  np.testing.assert_array_equal(after, before)
  train(config, tmp_path / "run", images())
  assert capsys.readouterr().out.count("another content of the module of model.network=") == 2


def write(where, model, *steps):
  """The model as a run would have written it, with checkpoints of these steps, in all of which but
  the last its weights are larger than they are.
  """
  config_lib.save(epath.Path(where), model.config, {})
  trained_with = provenance.trained_with(model.config, images_alone())
  for b, (task, params) in enumerate(zip(model.tasks, model.params)):
    with checkpoint.BlockCheckpoint(where, b) as saved:
      for step in steps:
        scale = np.float32(1 if step == steps[-1] else 1.5)
        state = block_lib.from_params(task, jax.tree.map(functools.partial(np.multiply, scale),
                                                         params))
        state = state.replace(step=jnp.int32(step))
        saved.save(state, model.config, seconds=0.0, trained_with=trained_with,
                   checksums=checkpoint.examine(state)[1] | dict(frozen=checkpoint.checksum({})))
  return where


def images_alone():
  return data.Dataset(data.Arrays(**images()), data.Arrays(**images()))


def of(config, blocks, seed=0):
  """A model of a config, of random weights."""
  tasks = tuple(task_lib.make_task(config, b) for b in range(blocks))
  return Model(config=config, schedule=tasks[0].make_schedule(config), tasks=tasks,
               params=tuple(random_params(task.network, *task.call(1).inputs, seed=seed + b)
                            for b, task in enumerate(tasks)), steps=(0,) * blocks)


def guided(good, bad, z, sigmas):
  """By Euler, D_bad + 3 (D_good - D_bad) of two denoisers."""
  return solvers.euler(
      lambda z, sigma: bad(z, sigma) + 3 * (good(z, sigma) - bad(z, sigma)), z, sigmas)


def test_a_model_of_an_earlier_step_guides(model, tmp_path):
  """Its blocks' own checkpoints, or those of another workdir; each is found, and none other."""
  write(tmp_path / "run", model, 3, 9)
  model, early = dbjax.load(tmp_path / "run"), dbjax.load(tmp_path / "run", step=3)
  assert (model.steps, early.steps) == ((9, 9, 9), (3, 3, 3))
  task, label, start = model.tasks[0], jnp.arange(4), model.start(0, np.arange(4))
  options, sigmas = dict(guidance=3.0, num_steps=4, grid="equal_mass"), (
      model.schedule.equal_mass_grid(4))

  def check(found, weaker):
    expected = task.answer(guided(model.denoiser(label), weaker.denoiser(label), start, sigmas))
    assert np.abs(found - expected.astype(int)).max() <= 1
    assert np.mean(np.abs(found - plain.astype(int)) > 1) > 0.2

  plain = model.sample(4, **options | dict(guidance=1.0))[0]
  check(model.sample(4, guide_step=3, **options)[0], early)
  other = of(config_lib.changed(model.config, **{"model.width": 8}), 3, seed=5)
  write(tmp_path / "smaller", other, 2, 5)
  led = dbjax.load(tmp_path / "run", guide=tmp_path / "smaller")
  check(led.sample(4, **options)[0], dbjax.load(tmp_path / "smaller"))
  check(led.sample(4, guide_step=2, **options)[0], dbjax.load(tmp_path / "smaller", step=2))
  np.testing.assert_array_equal(led.sample(4, **options | dict(guidance=1.0))[0], plain)
  loading.weaker(model, 9)  # which is remembered, and is none of another guide's
  again = dataclasses.replace(model, guide=dbjax.load(tmp_path / "smaller"))
  assert loading.weaker(again, 5).config.model.width == 8
  assert loading.weaker(model, 9).config.model.width != 8
  with pytest.raises(UserError, match="smaller/block_00 .*, expected one of 2, 5"):
    loading.weaker(again, 9)
  for call, words in [
      (lambda: model.sample(4, guide_step=7, **options),
       "guide_step=7: .*block_00 has no checkpoint of step 7, expected one of 3, 9; .*keep_every"),
      (lambda: led.sample(4, guide_step=9, **options), "smaller/block_00 .*, expected one of 2, 5"),
      (lambda: dbjax.load(tmp_path / "run", step=4), "^.*block_00 has no checkpoint of step 4"),
      (lambda: dbjax.load(tmp_path / "run", step=-1), "step=-1: expected a whole number, 0 or"),
      (lambda: dbjax.load(tmp_path / "run", guide=tmp_path / "none"),
       "^guide=.*none: .*does not exist"),
      (lambda: dbjax.load(tmp_path / "run", guide=""), "^guide='': expected a path")]:
    with pytest.raises(UserError, match=words) as e:
      call()
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("fields, blocks, words", [
    ({"num_blocks": 1, "layers_per_block": (), "train.blocks": ()}, 1,
     r"its split of noise is \(80.0, 0.002\), expected \(80.0, 0.\d+, 0"),
    ({"data.num_classes": 7}, 3, "its data.num_classes is 7, expected 10, as of the model that it"),
])
def test_a_model_that_answers_otherwise_does_not_guide(model, tmp_path, fields, blocks, words):
  other = of(config_lib.changed(model.config, **fields), blocks)
  with pytest.raises(UserError, match=f"guide=.*other: {words}") as e:
    loading._load_guide(model, write(tmp_path / "other", other, 1))
  assert "\n" not in str(e.value)


@pytest.mark.parametrize("guide, options, refused", [
    ("w", {}, "--guide=w"), ("w", dict(guidance=1.0), "--guide=w"), ("w", dict(guidance=2.0), ""),
    ("", dict(guide_step=3), "--guide_step=3"), ("", dict(guide_step=3, guidance=0.0), ""),
    ("w", dict(guidance=(1.0,)), "--guide=w"), ("w", dict(guidance=(1.0, 2.0)), ""), ("", {}, ""),
    ("", dict(guide_step=0), ""), ("", dict(guidance_to=5.0), "--guidance_to=5.0"),
    ("", dict(guidance_to=5.0, guidance=2.0), ""), ("", dict(churn_to=5.0, churn=20.0), "")])
def test_flags_without_effect_are_refused(model, guide, options, refused):
  if not refused:
    loading.check_given(model, guide, options)
    return
  with pytest.raises(UserError, match=f"^{refused}: with --guidance=1 it is without effect: give"):
    loading.check_given(model, guide, options)


def test_an_interval_of_no_churn_is_refused(model):
  with pytest.raises(UserError, match="^--churn_noise=1.1: with --churn=0 it is without effect"):
    loading.check_given(model, "", dict(churn_noise=1.1))


def test_a_model_that_is_not_guided_says_so(model):
  config = config_lib.resolve(load_config("digits_classify"))
  with pytest.raises(UserError, match="^guide=/x: expected a model of images, and task.name=class"):
    loading._load_guide(dataclasses.replace(model, config=config), "/x")
