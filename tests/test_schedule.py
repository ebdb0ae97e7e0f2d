"""The split of p(sigma) against scipy, the authors' formula and Kolmogorov-Smirnov."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dbjax import schedule as schedule_lib
from dbjax.errors import UserError
from dbjax.schedule import make_schedule
from dbjax.schedule import sample_sigma

EDM = dict(P_mean=-1.2, P_std=1.2, sigma_min=0.002, sigma_max=80.0, partition="equal_mass",
           gamma=0.0)
TAILS = [-14.0, 12.0]  # of P_mean: all CDFs are near 1, where they lose digits, or near 0


def make(num_blocks, **fields):
  return make_schedule(SimpleNamespace(**{**EDM, **fields}), num_blocks)


def truth(lo=0.002, hi=80.0, P_mean=-1.2, P_std=1.2):
  """The distribution of ln sigma in [lo, hi]."""
  ends = (np.log([lo, hi]) - P_mean) / P_std
  return stats.truncnorm(*ends, loc=P_mean, scale=P_std)


@pytest.mark.parametrize("P_mean", [-1.2, *TAILS])
def test_intervals_have_equal_mass_and_leave_no_gap(P_mean):
  law = truth(P_mean=P_mean)
  for num_blocks in range(1, 33):
    schedule = make(num_blocks, P_mean=P_mean)
    boundaries = np.array(schedule.boundaries)
    assert schedule.num_blocks == num_blocks == len(boundaries) - 1
    assert (boundaries[0], boundaries[-1]) == (80.0, 0.002)
    assert np.all(np.diff(boundaries) < 0)
    np.testing.assert_allclose(np.diff(law.sf(np.log(boundaries))), 1 / num_blocks, rtol=1e-9)


@pytest.mark.parametrize("lo, hi", [(0.002, 80), (0.002, 0.003), (0.3, 0.5), (20, 80)])
def test_mass(lo, hi):
  expected = truth().cdf(np.log(hi)) - truth().cdf(np.log(lo))
  mass = lambda *sigmas: schedule_lib._mass(*(np.log(sigmas) + 1.2) / 1.2)  # of Normal(0, 1)
  assert mass(lo, hi) / mass(0.002, 80) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("P_mean", [-1.2, *TAILS])
def test_masses_of_blocks_cut_by_hand(P_mean):
  whole = make(1, P_mean=P_mean)  # in the tails make_schedule takes no such cuts
  found = dataclasses.replace(whole, boundaries=(80.0, 5.0, 0.3, 0.01, 0.002)).masses
  expected = -np.diff(truth(P_mean=P_mean).cdf(np.log([80, 5, 0.3, 0.01, 0.002])))
  np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def released(num_blocks):
  """The authors' formula, ascending."""
  cdf_min, cdf_max = stats.norm.cdf((np.log([0.002, 80]) + 1.2) / 1.2)
  cdf = cdf_min + (cdf_max - cdf_min) * np.arange(num_blocks + 1) / num_blocks
  return np.exp(-1.2 + 1.2 * stats.norm.ppf(cdf))


@pytest.mark.parametrize("num_blocks", range(2, 33))
def test_boundaries_are_the_authors(num_blocks):
  ours, theirs = make(num_blocks).boundaries[::-1], released(num_blocks)
  np.testing.assert_allclose(ours[1:-1], theirs[1:-1], rtol=1e-12)
  assert (ours[0], ours[-1]) == (0.002, 80.0)
  # Their last one is the inverse of a CDF near 1, which float64 rounds to 1.1e-16.
  rounding = 1.2 * np.finfo(float).eps / stats.norm.pdf((np.log(80) + 1.2) / 1.2)
  np.testing.assert_allclose(theirs[[0, -1]], [0.002, 80], rtol=rounding)


@pytest.mark.parametrize("num_blocks, interior", [
    (3, [0.5050414640313313, 0.17963247211160274]),
    (4, [0.6766486433290233, 0.30120010256961854, 0.13407609549628868])])
def test_boundaries_by_value(num_blocks, interior):
  """As the released code prints them; its 79.99999999976642 is an exact 80 here."""
  boundaries = make(num_blocks).boundaries
  np.testing.assert_allclose(boundaries[1:-1], interior, rtol=1e-12)
  assert boundaries[0] == 80 == pytest.approx(79.99999999976642, rel=1e-11)


def test_uniform_partition_is_uniform_in_ln_sigma():
  boundaries = make(5, partition="uniform").boundaries
  np.testing.assert_allclose(np.diff(np.log(boundaries)), np.log(0.002 / 80) / 5, rtol=1e-12)
  assert (boundaries[0], boundaries[-1]) == (80.0, 0.002)


@pytest.mark.parametrize("text", ["0.5,0.18", "0.18, 0.5"])
def test_explicit_partition_in_either_order(text):
  assert make(3, partition=text).boundaries == (80.0, 0.5, 0.18, 0.002)


@pytest.mark.parametrize("partition", ["uniform", "0.5,0.18"])
def test_one_block_is_the_whole_range_whatever_the_partition(partition):
  assert make(1, partition=partition).boundaries == (80.0, 0.002)


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 7, 32])
def test_block_of_agrees_with_the_intervals(num_blocks):
  schedule = make(num_blocks)
  sigmas = np.append(np.geomspace(100, 0.001, 5000), 0)
  blocks = schedule.block_of(sigmas)
  assert blocks[0] == 0 and blocks[-1] == num_blocks - 1 and np.all(np.diff(blocks) >= 0)
  for block, hi, lo in zip(range(num_blocks), schedule.boundaries, schedule.boundaries[1:]):
    np.testing.assert_array_equal(blocks[(lo < sigmas) & (sigmas < hi)], block)


def test_a_boundary_belongs_to_the_block_with_more_noise():
  schedule = make(3)
  first, second = schedule.boundaries[1:-1]
  below = np.nextafter([first, second], 0)
  sigmas = np.array([[80, first, below[0]], [second, below[1], 0.002]])
  np.testing.assert_array_equal(schedule.block_of(sigmas), [[0, 0, 1], [1, 2, 2]])
  assert schedule.block_of(first).shape == () and schedule.block_of(0) == 2


@pytest.mark.parametrize("gamma", [0.05, 0.1, 2.0])
def test_overlap_widens_in_ln_sigma_and_is_clipped(gamma):
  schedule = make(4, gamma=gamma)
  for block in range(4):
    ln_hi, ln_lo = np.log(schedule.boundaries[block:block + 2])
    wide = np.exp([ln_lo - gamma * (ln_hi - ln_lo), ln_hi + gamma * (ln_hi - ln_lo)])
    expected = np.clip(wide, 0.002, 80)
    np.testing.assert_allclose(schedule.training_range(block), expected, rtol=1e-12)
    interval = schedule.training_interval(block)
    np.testing.assert_allclose([interval.lo, interval.hi], expected, rtol=1e-7)
  assert schedule.boundaries == make(4).boundaries  # inference routes by the unwidened ones


@functools.partial(jax.jit, static_argnums=2)
def draw(key, interval, shape=(200_000,)):
  return sample_sigma(key, shape, interval)


def pvalue(sigmas, law):
  return stats.kstest(np.log(np.asarray(sigmas, np.float64)), law.cdf, method="asymp").pvalue


@pytest.mark.parametrize("num_blocks, block, gamma", [
    (1, 0, 0.05), (3, 0, 0.05), (3, 1, 0.05), (3, 2, 0.05), (3, 2, 0.0), (32, 0, 0.1),
    (32, 15, 0.1), (32, 31, 0.1)])
def test_sigmas_have_the_truncated_distribution(num_blocks, block, gamma):
  schedule = make(num_blocks, gamma=gamma)
  lo, hi = schedule.training_range(block)
  sigmas = draw(jax.random.key(block), schedule.training_interval(block))
  assert np.float32(lo) <= sigmas.min() and sigmas.max() <= np.float32(hi)
  assert pvalue(sigmas, truth(lo, hi)) > 1e-3
  shift = 0.01 * np.log(hi / lo)  # the positive control: all of it 1% of its length higher
  wrong = truth(lo * np.exp(shift), hi * np.exp(shift), P_mean=-1.2 + shift)
  assert pvalue(sigmas, wrong) < 1e-6


@pytest.mark.parametrize("block", range(3))
@pytest.mark.parametrize("P_mean", TAILS)
def test_sigmas_in_a_tail_of_p(P_mean, block):
  schedule = make(3, P_mean=P_mean)
  sigmas = draw(jax.random.key(0), schedule.training_interval(block))
  assert pvalue(sigmas, truth(*schedule.training_range(block), P_mean=P_mean)) > 1e-3


def test_the_tails_are_no_staircase():
  keys = jax.random.split(jax.random.key(0), 5)  # of a million draws in all

  def distinct_extremes(draw):
    ordered = np.sort(np.concatenate([draw(key) for key in keys]))
    return [len(np.unique(tail)) for tail in (ordered[:1000], ordered[-1000:])]

  interval = make(1).training_interval(0)
  assert min(distinct_extremes(lambda key: draw(key, interval))) > 990

  @jax.jit
  def naive(key):  # the positive control: one float32 uniform, one CDF
    lo, hi = jax.scipy.special.ndtr(jnp.log(jnp.array([0.002, 80])) / 1.2 + 1)
    uniform = jax.random.uniform(key, (200_000,))
    return jnp.exp(-1.2 + 1.2 * jax.scipy.special.ndtri(lo + uniform * (hi - lo)))

  assert max(distinct_extremes(naive)) < 960


def test_stacked_intervals_draw_what_single_ones_do():
  schedule = make(3, gamma=0.05)
  intervals = [schedule.training_interval(b) for b in range(3)]
  keys = jax.random.split(jax.random.key(0), 3)
  single = np.stack([draw(key, interval, (10, 100)) for key, interval in zip(keys, intervals)])
  stacked = jax.tree.map(lambda *x: np.stack(x), *intervals)
  together = jax.jit(jax.vmap(functools.partial(draw, shape=(10, 100))))(keys, stacked)
  assert together.dtype == np.float32 and len(np.unique(single)) > 2990
  np.testing.assert_array_equal(together, single)


@pytest.mark.parametrize("num_steps", [2, 18, 50])
def test_karras_grid(num_steps):
  i = np.arange(num_steps)
  top, bottom = 80 ** (1 / 7), 0.002 ** (1 / 7)
  sigmas = make(3).grid("karras", num_steps)
  np.testing.assert_allclose(sigmas[:-1], (top + i / (num_steps - 1) * (bottom - top)) ** 7,
                             rtol=1e-12)
  assert (sigmas[0], sigmas[-2], sigmas[-1]) == (80.0, 0.002, 0.0)


@pytest.mark.parametrize("num_steps", [2, 3, 50])
def test_equal_mass_grid(num_steps):
  sigmas = make(3).grid("equal_mass", num_steps)
  above = truth().sf(np.log(sigmas[:-1]))
  np.testing.assert_allclose(above, np.linspace(0, 1, num_steps), rtol=0, atol=1e-9)
  assert (sigmas[0], sigmas[-2], sigmas[-1]) == (80.0, 0.002, 0.0)


@pytest.mark.parametrize("name", ["karras", "equal_mass"])
def test_a_grid_of_one_step(name):
  np.testing.assert_array_equal(make(3).grid(name, 1), [80, 0])


@pytest.mark.parametrize("num_steps", [0, -1, 1.5])
@pytest.mark.parametrize("name", ["karras", "equal_mass"])
def test_a_grid_of_no_steps_is_refused(name, num_steps):
  with pytest.raises(UserError, match=f"^num_steps={num_steps}: expected a whole number, above 0"):
    make(3).grid(name, num_steps)


@pytest.mark.parametrize("block", [-1, 3, 7])
def test_a_block_that_is_not_there_has_no_interval(block):
  schedule = make(3)
  for ask in (schedule.training_range, schedule.training_interval, lambda b: schedule.levels(b, 2)):
    with pytest.raises(UserError, match=f"^block={block}: expected a whole number, from 0 to 2"):
      ask(block)


@pytest.mark.parametrize("fields, num_blocks, words", [
    (dict(P_std=0.25, partition="uniform"), 6, "block 0, of sigma 13.7 to 80"),
    (dict(P_std=0.25, partition="20,0.2"), 3, "block 0, of sigma 20 to 80"),
    (dict(P_std=0.25, partition="0.5,0.01"), 3, "block 2, of sigma 0.002 to 0.01"),
    (dict(P_mean=-60.0), 1, "block 0, of sigma 0.002 to 80")])
def test_a_block_without_a_mass_in_float32_is_refused(fields, num_blocks, words):
  """It would train at one end of its interval alone."""
  with pytest.raises(UserError, match=f"schedule.P_std=.*{words}, has next to no mass"):
    make(num_blocks, **fields)
  interval = make(3, P_std=0.3, partition="4,0.2").training_interval(0)  # as little as this will do
  sigmas = draw(jax.random.key(0), interval)
  assert 0 < interval.mass < 1e-10 and len(np.unique(sigmas)) > 1000


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 12, 32])
def test_as_many_steps_as_blocks_call_each_once_in_order(num_blocks):
  schedule = make(num_blocks)
  called = schedule.block_of(schedule.equal_mass_grid(num_blocks)[:-1])
  np.testing.assert_array_equal(called, np.arange(num_blocks))


@pytest.mark.parametrize("fields, named", [
    (dict(sigma_min=0.0), "sigma_min=0"),
    (dict(sigma_min=80.0), "sigma_min=80"),
    (dict(sigma_max=0.001), "sigma_max=0.001"),
    (dict(sigma_max=float("inf")), "sigma_max=inf"),
    (dict(sigma_max=float("nan")), "sigma_max=nan"),
    (dict(gamma=-0.1), "gamma=-0.1"),
    (dict(P_std=0.0), "P_std=0"),
    (dict(partition="equal"), "partition='equal'"),
    (dict(partition="0.5"), "partition='0.5' has 1 boundary: num_blocks=3"),
    (dict(partition="0.5,0.5"), "partition='0.5,0.5'"),
    (dict(partition="0.5,90"), "partition='0.5,90'"),
    (dict(partition="0.5,0.002"), "partition='0.5,0.002'"),
    (dict(partition="0.5,nan"), "partition='0.5,nan'")])
def test_what_makes_no_sense_is_named(fields, named):
  with pytest.raises(UserError) as error:
    make(3, **fields)
  assert "schedule." + named.split("=")[0] in str(error.value) and named in str(error.value)


@pytest.mark.parametrize("field, value", [
    ("P_mean", float("nan")), ("P_mean", -60.0), ("P_mean", 1000.0), ("P_std", float("nan")),
    ("P_std", 0.0), ("gamma", float("nan")), ("sigma_max", float("inf"))])
def test_absurd_numbers_are_refused_by_name(field, value):
  with pytest.raises(UserError, match=f"schedule.{field}="):
    make(3, **{field: value})


def test_of_a_dict_the_rest_is_as_in_a_config():
  assert make_schedule({}, 3) == make(3, gamma=0.05)
  given = dict(P_mean=-0.4, P_std=1.0, gamma=0.0, partition="uniform")
  assert make_schedule(given, 2) == make(2, **given)


@pytest.mark.parametrize("given, message", [
    (dict(P_meen=0.0), "P_meen=0.0: there is no such option, .*did you mean P_mean?"),
    (dict(P_std=-1.0), "P_std=-1.0: expected a finite number, above 0"),
    (dict(gamma="wide"), "gamma='wide': expected a finite number, 0 or more"),
    (dict(P_mean=10**400), "P_mean=1000.*: expected a finite number")])
def test_a_dict_is_checked_as_a_config_is(given, message):
  with pytest.raises(UserError, match=message):
    make_schedule(given, 3)
