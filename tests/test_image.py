"""The image task against numpy, its own definition and numerical derivatives."""

import functools

from conftest import load_config
from conftest import random_params
import jax
import numpy as np
import pytest
from references import numpy_dit
from scipy import stats

from dbjax import config as config_lib
from dbjax import task as task_lib
from dbjax.data import images

CONFIG = config_lib.resolve(load_config(**{
    "data.image_size": 4, "data.channels": 2, "num_blocks": 3, "model.num_layers": 6,
    "model.width": 16, "model.num_heads": 2, "model.patch_size": 2, "model.unroll": 1}))
TASK = task_lib.make_task(CONFIG, 1)
SCHEDULE = TASK.make_schedule(CONFIG)


@functools.cache
def params():
  return random_params(TASK.network, *TASK.call(1).inputs)


def batch(n, seed=0):
  rng = np.random.default_rng(seed)
  return dict(image=rng.integers(0, 256, (n, 4, 4, 2), np.uint8),
              label=rng.integers(0, 10, n, np.int32))


draw = jax.jit(TASK.draw)
denoise = jax.jit(functools.partial(TASK.denoise, frozen={}))
value_and_grad = jax.jit(jax.value_and_grad(TASK.loss))


def drawn(n=6):
  return jax.device_get(draw(jax.random.key(0), batch(n), SCHEDULE.training_interval(1)))


def test_denoise_and_loss_agree_with_numpy():
  x = drawn()
  z, y, sigma = (np.float64(x[name]) for name in ("z", "y", "sigma"))
  s = sigma[:, None, None, None]
  f = numpy_dit(params(), z / np.sqrt(s**2 + 0.75**2), np.log(sigma) / 4, x["label"], 2, 2)
  d = (0.75**2 * z + 0.75 * s * np.sqrt(s**2 + 0.75**2) * f) / (s**2 + 0.75**2)
  ours = denoise(params(), z=x["z"], sigma=x["sigma"], label=x["label"])
  np.testing.assert_allclose(ours, d, atol=2e-5)
  weight = (s**2 + 0.75**2) / (0.75 * s) ** 2
  expected = np.mean(weight * (d - y) ** 2)
  np.testing.assert_allclose(value_and_grad(params(), x)[0], expected, rtol=2e-5)


def test_what_is_drawn():
  n, interval = 20_000, SCHEDULE.training_interval(1)
  given = batch(n)
  x = jax.device_get(draw(jax.random.key(0), given, interval))
  np.testing.assert_allclose(x["y"], given["image"] / 127.5 - 1, rtol=0, atol=1e-6)
  eps = (x["z"] - x["y"]) / x["sigma"][:, None, None, None]
  assert stats.kstest(eps[:, 1, 2, 0], "norm").pvalue > 1e-3
  pixel, ln_sigma = eps[:, 0, 0, 0], np.log(np.float64(x["sigma"]))
  for other in (eps[:, 0, 0, 1], np.roll(pixel, 1), ln_sigma):
    assert abs(np.corrcoef(pixel, other)[0, 1]) < 5 / n**0.5
  assert abs(np.corrcoef(eps.ravel()[:n], ln_sigma)[0, 1]) < 5 / n**0.5  # not from one key
  lo, hi = SCHEDULE.training_range(1)
  law = stats.truncnorm(*((np.log([lo, hi]) + 1.2) / 1.2), loc=-1.2, scale=1.2)
  assert stats.kstest(ln_sigma, law.cdf).pvalue > 1e-3
  dropped = x["label"] == 10
  assert stats.binomtest(int(dropped.sum()), n, 0.1).pvalue > 1e-3
  np.testing.assert_array_equal(x["label"][~dropped], given["label"][~dropped])


def test_a_draw_is_a_function_of_its_key():
  x, rest = drawn(), (batch(6), SCHEDULE.training_interval(1))
  again = jax.jit(lambda *args: TASK.draw(*args))(jax.random.key(0), *rest)  # traced anew
  other = draw(jax.random.key(1), *rest)
  for name in x:
    np.testing.assert_array_equal(x[name], again[name])
  assert not np.any(x["sigma"] == other["sigma"]) and not np.any(x["z"] == other["z"])


def test_guidance():
  x = drawn()
  z, sigma, label = x["z"], x["sigma"], np.arange(6, dtype=np.int32)
  run = lambda label, **options: denoise(params(), z=z, sigma=sigma, label=label, **options)
  with_label, without = run(label), run(np.full(6, 10, np.int32))
  assert np.abs(with_label - without).max() > 0.05
  for guidance, expected in ((0.0, without), (1.0, with_label)):
    np.testing.assert_allclose(run(label, guidance=guidance), expected, atol=1e-5)
  np.testing.assert_allclose(run(label, guidance=2.0), 2 * with_label - without, rtol=0, atol=1e-5)


def test_answer_rounds_and_clips():
  level = np.array([0, 1, 127, 128, 254, 255])
  for offset in (-0.49, 0, 0.49):
    z = np.float32((level + offset) / 127.5 - 1).reshape(6, 1, 1, 1)
    ours = TASK.answer(z)
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours.ravel(), level)
  np.testing.assert_array_equal(TASK.answer(np.array([-1e4, -1.1, 1.1, 1e4])), [0, 0, 255, 255])
  every = np.arange(256, dtype=np.uint8)
  np.testing.assert_array_equal(TASK.answer(images.to_float(every)), every)


def test_prior_is_noise_of_sigma_max():
  z = jax.vmap(TASK.prior, (0, None))(jax.random.split(jax.random.key(0), 500), 80.0)
  assert z.shape == (500, 4, 4, 2)
  assert stats.kstest(np.ravel(z) / 80, "norm").pvalue > 1e-3


@pytest.mark.parametrize("part", ["patch_embedding", "noise_embedding", "label_embedding", "stack",
                                  "modulation", "read_out"])
def test_gradient_against_central_differences(part):
  """Along a random direction in one part of the network, scaled so that the slope is 1."""
  x, rng = drawn(), np.random.default_rng(0)
  weights, grad = params()[part], value_and_grad(params(), x)[1][part]
  uphill = lambda g: np.abs(rng.normal(size=g.shape)) * np.where(g < 0, -1, 1)
  direction = jax.tree.map(uphill, grad)
  rate = sum(np.vdot(*pair) for pair in zip(*map(jax.tree.leaves, (grad, direction))))

  def loss(h):
    moved = jax.tree.map(lambda w, d: np.float32(w + h * d / rate), weights, direction)
    return value_and_grad({**params(), part: moved}, x)[0]

  # The loss, about 2, has float32 rounding of 2e-7: 1e-5 of what 2 h changes.
  assert (loss(0.01) - loss(-0.01)) / 0.02 == pytest.approx(1, abs=1e-3)
