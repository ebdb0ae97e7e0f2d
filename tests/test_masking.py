"""Masks as noise, against the definitions by numpy and Kolmogorov-Smirnov."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from scipy import stats

from dbjax.errors import UserError
from dbjax.masking import alpha_of
from dbjax.masking import make_masking
from dbjax.masking import mask_weight
from dbjax.masking import Masking
from dbjax.masking import MIN_TIME
from dbjax.masking import sample_time


def test_alpha_falls_by_equal_decrements_towards_block_0():
  assert Masking("linear", 4, 0.0).boundaries == (0, 0.25, 0.5, 0.75, 1)


KINDS = pytest.mark.parametrize("kind", ["linear", "cosine"])
ALPHA = {"linear": lambda t: 1 - t, "cosine": lambda t: 1 - np.cos(np.pi / 2 * (1 - t))}


@KINDS
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 7])
def test_intervals_of_time_join_and_are_equal_steps_of_alpha(kind, num_blocks):
  masking = Masking(kind, num_blocks, 0.0)
  intervals = [masking.interval(b) for b in range(num_blocks)]
  assert intervals[0].hi == 1 and intervals[-1].lo == 0
  for earlier, later in zip(intervals, intervals[1:]):
    assert earlier.lo == later.hi
  for lo, hi in intervals:
    np.testing.assert_allclose(ALPHA[kind](np.float64(lo)) - ALPHA[kind](np.float64(hi)),
                               1 / num_blocks, rtol=0, atol=2e-7)
  assert [masking.training_interval(b) for b in range(num_blocks)] == intervals


@KINDS
def test_overlap_of_masking_widens_in_alpha_and_is_clipped(kind):
  masking = Masking(kind, 4, 0.1)
  for b in range(4):
    lo, hi = masking.training_interval(b)
    expected = np.clip([(b + 1.1) / 4, (b - 0.1) / 4], 0, 1)
    np.testing.assert_allclose(ALPHA[kind](np.float64([lo, hi])), expected, rtol=0, atol=2e-7)
    assert masking.interval(b) == Masking(kind, 4, 0.0).interval(b)


@pytest.mark.parametrize("block", [-1, 3, 7])
def test_a_block_that_is_not_there_has_no_times(block):
  masking = Masking("cosine", 3, 0.05)
  for ask in (masking.interval, masking.training_interval, lambda b: masking.levels(b, 2)):
    with pytest.raises(UserError, match=f"^block={block}: expected a whole number, from 0 to 2"):
      ask(block)
  with pytest.raises(UserError, match="^num_steps=0: expected a whole number, above 0"):
    masking.grid(0)


@KINDS
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_block_of_alpha(kind, num_blocks, dtype):
  """On sampling grids that meet the boundaries, and away from them by definition."""
  masking = Masking(kind, num_blocks, 0.05)
  exact = np.arange(num_blocks)
  np.testing.assert_array_equal(masking.block_of(dtype(exact) / dtype(num_blocks)), exact)
  assert masking.block_of(1.0) == num_blocks - 1
  alphas = dtype(alpha_of(kind, dtype(masking.grid(60))))[:-1]
  fine = num_blocks * ALPHA[kind](np.linspace(1, 0, 61)[:-1])
  expected = np.floor(np.where(np.abs(fine - np.round(fine)) < 1e-9, np.round(fine), fine))
  np.testing.assert_array_equal(masking.block_of(alphas), expected)
  assert masking.block_of(0.0).shape == ()


@KINDS
def test_alpha_and_its_weight_by_a_numerical_derivative(kind):
  t, h = np.linspace(0.02, 0.98, 25), 1e-5
  np.testing.assert_allclose(alpha_of(kind, np.float32(t)), ALPHA[kind](t), atol=1e-6)
  slope = (ALPHA[kind](t + h) - ALPHA[kind](t - h)) / (2 * h)
  np.testing.assert_allclose(mask_weight(kind, np.float32(t)), -slope / (1 - ALPHA[kind](t)),
                             rtol=1e-5)


@KINDS
@pytest.mark.parametrize("block", range(3))
def test_times_are_uniform_and_spread_over_the_batch(kind, block):
  interval, num = Masking(kind, 3, 0.05).training_interval(block), 64
  times = np.asarray(jax.jit(jax.vmap(
      lambda key: sample_time(key, num, interval)))(
          jax.random.split(jax.random.key(0), 300)), np.float64)
  lo, hi = max(interval.lo, MIN_TIME), interval.hi
  assert times.min() >= np.float32(lo) and times.max() <= hi
  law = stats.uniform(interval.lo, hi - interval.lo)
  assert stats.kstest(times[:, 0], law.cdf).pvalue > 1e-3  # each of them, alone
  cells = np.clip((times - interval.lo) / (hi - interval.lo) * num, 0, num - 1e-3)
  offset = cells % 1  # one draw for all: the same place in every cell
  assert np.abs(np.sort(np.floor(cells + 1e-3), axis=1) - np.arange(num)).max() <= 1
  spread = np.angle(np.exp(2j * np.pi * (offset - offset[:, :1])))
  if block < 2:  # in the last one MIN_TIME raises the lowest
    assert np.abs(spread).max() < 0.01
  gaps = np.diff(np.sort(times, axis=1), axis=1)
  assert gaps.max() < 1.01 * (hi - interval.lo) / num


@KINDS
def test_the_masking_of_a_config(kind):
  assert make_masking(SimpleNamespace(alpha=kind, gamma=0.1), 4) == Masking(kind, 4, 0.1)


@pytest.mark.parametrize("gamma", [-0.1, float("inf"), float("nan")])
def test_an_overlap_that_makes_no_sense_is_named(gamma):
  with pytest.raises(UserError, match=f"schedule.gamma={gamma:g}: .*set it to 0 or more"):
    make_masking(SimpleNamespace(alpha="linear", gamma=gamma), 4)
