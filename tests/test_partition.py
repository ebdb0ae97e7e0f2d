"""Proposed boundaries against closed forms, brute force, numpy, and the run that they are for."""

import functools
import itertools
import re

from conftest import distance
from conftest import load_config
from conftest import states_of
import jax
import numpy as np
import pytest
from scipy import special
from scipy import stats

from dbjax import block as block_lib
from dbjax import config as config_lib
from dbjax import data
from dbjax import loading
from dbjax import loop
from dbjax import partition
from dbjax import pilot
from dbjax import schedule as schedule_lib
from dbjax import task as task_lib
from dbjax.bench import evidence
from dbjax.errors import UserError

CLASSIFY = {"model.num_layers": 3, "model.width": 16, "model.num_heads": 2, "model.unroll": 1,
            "model.patch_size": 4, "train.batch_size": 8, "train.num_steps": 3,
            "optimizer.warmup_steps": 1, "checkpoint.every_steps": 3}


def noise_of(**fields):
  return schedule_lib.make_schedule(fields, 1)


def known(examples, num=256):
  rng = np.random.default_rng(1)
  examples = np.asarray(examples, np.float32)
  return partition.Known(examples, rng.normal(size=(num, examples.shape[1])).astype(np.float32))


def gaussian(*shape, scale=0.5):
  return scale * np.random.default_rng(0).normal(size=shape)


@functools.cache
def gaussian_known():
  """1,000 points of a plane, of standard deviation 0.5 in each direction."""
  return known(gaussian(1000, 2) / gaussian(1000, 2).std(0) / 2, num=1000)


@functools.cache
def gaussian_information():
  return partition.information(gaussian_known(), noise_of(sigma_min=0.1, sigma_max=10.0))


# What adds up.


@pytest.mark.parametrize("num_blocks", [2, 3, 4, 5, 6])
def test_where_all_levels_count_alike_the_cut_is_that_of_equal_mass(num_blocks):
  sigmas = noise_of().equal_mass_grid(partition._LEVELS + 1)[:-1]
  found = partition.Amounts(sigmas, np.full(partition._LEVELS, 0.7)).cut(num_blocks)
  expected = schedule_lib.make_schedule({}, num_blocks).boundaries[1:-1]
  np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_a_cut_divides_a_known_amount_equally():
  """Of a density sigma over ln sigma, whose integral is sigma: blocks are equally wide in sigma."""
  sigmas = np.geomspace(4, 1, 2001)
  amounts = partition.Amounts(sigmas, -np.diff(sigmas))
  np.testing.assert_allclose(amounts.cut(3), [3, 2], rtol=1e-6)
  np.testing.assert_allclose(amounts.within([4, 3.5, 1.5, 1]), [0.5, 2, 0.5], rtol=1e-6)


def test_decrements_are_those_of_the_nearest_loss_that_falls():
  found = partition.decrements(np.array([4.0, 3, 2, 1]), np.array([5.0, 2, 4, 1]))
  np.testing.assert_allclose(found.amounts, [2, 0, 2])  # 5, 3, 3, 1
  with pytest.raises(UserError, match="does not fall with the noise"):
    partition.decrements(np.array([3.0, 2, 1]), np.array([1.0, 2, 3]))


@pytest.mark.parametrize("amounts, num_layers, expected", [
    ([1, 1, 1], 6, (2, 2, 2)), ([1, 2, 3], 12, (2, 4, 6)), ([5, 3, 2], 7, (4, 2, 1)),
    ([98, 1, 1], 6, (4, 1, 1)), ([0, 0, 1], 3, (1, 1, 1)), ([0.1, 0.1, 0.1], 3, (1, 1, 1)),
    ([10, 1.4, 1.2], 5, (3, 1, 1))])
def test_layers_in_proportion_by_hand(amounts, num_layers, expected):
  assert partition.layers(np.array(amounts, float), num_layers) == expected


def test_layers_are_all_given_away_and_follow_the_amounts():
  rng = np.random.default_rng(0)
  for _ in range(300):
    amounts = rng.exponential(size=rng.integers(1, 8)) ** 3
    num_layers = int(rng.integers(len(amounts), 40))
    found = partition.layers(amounts, num_layers)
    assert sum(found) == num_layers and min(found) >= 1
    assert all(a <= b for (_, a), (_, b) in itertools.pairwise(sorted(zip(amounts, found))))


# The optimal denoiser.


def test_the_optimal_denoiser_is_a_softmax_over_examples():
  """Written out in float64; at low noise it is the example itself."""
  examples, noise = gaussian(30, 4).astype(np.float32), gaussian(50, 4, scale=1).astype(np.float32)
  noise[0] *= 50  # so that another example is far likelier than y
  found, y = partition.Known(examples, noise), examples[np.arange(50) % 30].astype(np.float64)
  for sigma in (1e-3, 0.03, 0.3, 3.0, 300.0):
    z = y + sigma * noise.astype(np.float64)
    distances = np.sum((z[:, None] - examples.astype(np.float64)) ** 2, axis=-1)
    weights = special.softmax(-distances / (2 * sigma**2), axis=1)
    np.testing.assert_allclose(found.weights(sigma), weights, atol=1e-6)
    residual = found.residual(found.weights(sigma))
    np.testing.assert_allclose(residual, y - weights @ examples, atol=1e-6)
    some = found.residual(found.weights(sigma), slice(1, 3))
    np.testing.assert_allclose(some, residual[:, 1:3], atol=1e-6)
  np.testing.assert_array_equal(found.residual(found.weights(1e-3))[1:], 0)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 1.0, 3.0])
def test_its_error_on_gaussian_data_is_wieners(sigma):
  expected = 2 * 0.25 * sigma**2 / (0.25 + sigma**2)
  assert gaussian_known().mmse(sigma) == pytest.approx(expected, rel=0.03)
  residual = gaussian_known().residual(gaussian_known().weights(sigma))
  direct = np.mean(np.sum(residual**2, axis=1))
  assert direct == pytest.approx(expected, rel=0.15)


def test_information_is_the_logarithm_of_how_many_there_are():
  """From no noise to nothing but noise. On the way it is H(y) - H(y | z), from the weights."""
  examples = known(gaussian(40, 5), num=2000)
  found = partition.information(examples, noise_of(sigma_min=1e-3, sigma_max=1e3))
  assert found.amounts.sum() == pytest.approx(np.log(40), rel=0.02)
  for sigma in (0.1, 0.3, 1.0):
    entropy = stats.entropy(examples.weights(sigma), axis=1).mean()
    assert found.within([1e3, sigma])[0] == pytest.approx(np.log(40) - entropy, rel=0.05)


@pytest.mark.parametrize("num_blocks", [2, 4])
def test_equal_information_of_gaussian_data(num_blocks):
  """It is ln(1 + sigma_data^2 / sigma^2) / 2 in each direction."""
  nats = lambda sigma: np.log1p(0.25 / sigma**2)
  found = gaussian_information()
  wanted = nats(10) + (nats(0.1) - nats(10)) * np.arange(1, num_blocks) / num_blocks
  np.testing.assert_allclose(found.cut(num_blocks), np.sqrt(0.25 / np.expm1(wanted)), rtol=0.03)


def test_examples_that_are_all_the_same_hold_no_information():
  with pytest.raises(UserError, match="tells nothing of these examples"):
    partition.information(known(np.ones((7, 3))), noise_of())


def test_similarity_is_the_share_of_components_whose_noise_is_found_alike():
  """Arxiv 2312.09181, equation 5, written out: eps* = (z - D(z)) / sigma."""
  examples = known(gaussian(20, 6), num=40)
  found = partition.similarity(examples, noise_of(sigma_min=0.05, sigma_max=5.0))
  y = examples.examples[examples.which].astype(np.float64)

  def noise_found(sigma):
    z = y + sigma * examples.noise
    return (z - (y - examples.residual(examples.weights(sigma)))) / sigma

  for i, j in [(0, 0), (3, 60), (60, 3), (50, 70), (119, 0)]:
    a, b = (noise_found(found.levels[k]) for k in (i, j))
    alike = np.mean(np.abs(a - b) <= 2 / 256)
    assert found.similarity[i, j] == pytest.approx(alike, abs=0.01)
  assert (found.edges[0], found.edges[-1]) == (5, 0.05)


def test_similar_levels_are_grouped_as_by_trying_all_ways():
  rng = np.random.default_rng(0)
  for num, parts in [(7, 3), (8, 4), (6, 2), (5, 5)]:
    alike = rng.uniform(size=(num, num))
    alike = alike + alike.T
    inside = lambda a, b, alike=alike: alike[a:b, a:b].sum() / (b - a)
    best = max(itertools.combinations(range(1, num), parts - 1), key=lambda cuts: sum(
        inside(a, b) for a, b in itertools.pairwise([0, *cuts, num])))
    assert tuple(partition.cluster(alike, parts)) == best


def test_groups_that_are_alike_within_and_not_between_are_found():
  alike = np.kron(np.eye(3), np.ones((4, 4)))
  found = partition.Similarity(np.arange(13.0)[::-1], np.arange(11.5, -0.5, -1), alike)
  np.testing.assert_array_equal(found.cut(3), [8, 4])
  np.testing.assert_allclose(found.within([12, 8, 4, 0]), 1)
  np.testing.assert_allclose(found.within([12, 6, 5.9, 0])[[0, 2]], [5 / 9, 5 / 9])
  assert np.isnan(found.within([12, 6, 5.9, 0])[1])


# The pilot.


def test_the_loss_in_cells_is_that_of_a_network_that_says_nothing(tiny):
  """A new DiT answers 0, so that D = c_skip z, whose loss is known at every level."""
  config = config_lib.resolve(tiny(**{"num_blocks": 1, "train.batch_size": 64}))
  task, held_out = task_lib.make_task(config, 0), data.load(config).held_out
  sigmas = np.array([80, 1.5, 0.5, 0.3, 0.05, 0.002])
  found = pilot.losses(task, block_lib.init_params(task, 0), held_out, None, sigmas)
  square = np.mean((held_out.take(np.arange(256))["image"] / 127.5 - 1) ** 2)

  def loss(ln_sigma):
    s, v = 0.75**2, np.exp(2 * ln_sigma)
    return (v + s) / (v * s) * ((v / (v + s)) ** 2 * square + (s / (v + s)) ** 2 * v)

  ends = (np.log(sigmas) + 1.2) / 1.2
  expected = [stats.truncnorm(lo, hi, loc=-1.2, scale=1.2).expect(loss)
              for hi, lo in itertools.pairwise(ends)]
  np.testing.assert_allclose(found, expected, rtol=0.01)


@pytest.mark.slow
def test_the_pilot_is_a_run_of_one_block(tmp_path):
  """The same weights as dbjax.train writes, but for the last bits; here with a frozen table."""
  config = config_lib.resolve(load_config("digits_classify", **CLASSIFY | {
      "num_blocks": 1, "model.num_layers": 1, "model.width": 8}))
  loop.train(config, tmp_path, devices=jax.devices()[:1])
  task, dataset = task_lib.make_task(config, 0), data.load(config)
  found = pilot.train(task, dataset, task.frozen(config, dataset))
  assert distance(found, states_of(config, tmp_path, [0])[0].ema) < 1e-5


@pytest.fixture
def as_if(monkeypatch):
  """as_if(loss): the pilot's loss is this function of sigma."""

  def replace(loss):
    def losses(config, dataset, num_steps, sigmas):
      """The mean of p(sigma) in each cell."""
      law = stats.norm(config.schedule.P_mean, config.schedule.P_std)
      below = law.cdf(np.log(sigmas))
      inside = np.linspace(below[:-1], below[1:], 101, axis=1)[:, 1::2]
      return loss(np.exp(law.ppf(inside))).mean(axis=1)

    monkeypatch.setattr(partition, "pilot_losses", losses)

  return replace


def test_equal_loss_where_it_is_known(tiny, as_if):
  """In proportion to sigma^0.5: p(sigma) times it is a lognormal of another mean."""
  as_if(np.sqrt)
  found = partition.propose(tiny(num_blocks=3))
  ends = (np.log([0.002, 80]) - (-1.2 + 0.5 * 1.44)) / 1.2
  law = stats.truncnorm(*ends, loc=-1.2 + 0.5 * 1.44, scale=1.2)
  np.testing.assert_allclose(np.log(found), law.isf([1 / 3, 2 / 3]), atol=0.01)


def test_a_pilot_has_no_weight_of_its_own(tiny, monkeypatch):
  """It would make all levels' losses alike."""
  seen = []
  monkeypatch.setattr(partition, "pilot_losses", lambda config, dataset, num_steps, sigmas: (
      seen.append(config.task.learned_weight), np.ones(len(sigmas) - 1))[1])
  partition.propose(tiny(**{"task.learned_weight": True}))
  assert seen == [False]


def test_a_loss_below_zero_has_no_shares(tiny, as_if):
  as_if(lambda sigma: sigma - 1)
  with pytest.raises(UserError, match="by=loss: the pilot's loss is -0.9.* above zero"):
    partition.propose(tiny())


def test_equal_decrements_of_a_cross_entropy_that_is_known(as_if):
  as_if(lambda sigma: np.log(10) * sigma / (1 + sigma))
  found = partition.propose(load_config("digits_classify", num_blocks=3, **CLASSIFY),
                            by="decrement")
  ends = np.array([0.2, 20]) / (1 + np.array([0.2, 20]))
  shares = ends[1] + (ends[0] - ends[1]) * np.array([1, 2]) / 3
  np.testing.assert_allclose(found, shares / (1 - shares), rtol=0.02)


def test_a_pilot_that_diverges_is_named(tiny, monkeypatch):
  monkeypatch.setattr(pilot, "train", lambda *_: None)
  monkeypatch.setattr(pilot, "losses", lambda *_: np.array([1, np.nan]))
  with pytest.raises(UserError, match="optimizer.learning_rate=0.002: the pilot of pilot_steps=3 "):
    partition.propose(tiny(), pilot_steps=3)


@pytest.mark.parametrize("by, name, ways", [
    ("information", "pilot_steps", "by=loss or by=decrement"),
    ("similarity", "pilot_steps", "by=loss or by=decrement"),
    ("loss", "num_examples", "by=information or by=similarity"),
    ("decrement", "num_examples", "by=information or by=similarity")])
def test_an_option_without_a_use_is_refused(tiny, by, name, ways):
  with pytest.raises(UserError, match=f"^{name}: expected only with {ways}, and not with by={by}"):
    partition.propose(tiny(), by=by, **{name: 7})


# From a config to a config.


@pytest.mark.usefixtures("steps_once")
def test_the_proposal_is_what_blocks_are_trained_by(tiny, tmp_path):
  """The same proposal again, whatever split the config had."""
  options = dict(by="information", num_examples=100)
  found = partition.propose(tiny(), **options)
  assert found == partition.propose(tiny(**{"schedule.partition": "7,6,5,4"}), **options)
  config = tiny(**{"schedule.partition": partition.words(found), "train.num_steps": 2})
  loop.train(config, tmp_path, devices=jax.devices()[:1])
  model = loading.load(tmp_path)
  assert model.schedule.boundaries == (80.0, *found, 0.002)
  assert list(found) == sorted(found, reverse=True)


def test_the_command_prints_fields_of_a_config(forked):
  small = ("--config=digits", "--config.num_blocks=3", "--config.model.num_layers=7",
           "--num_examples=100")
  done = forked("partition", *small, "--config.layers_per_block=1,1,5", "--by=similarity")
  assert done.returncode == 0, done.stderr
  table, line = done.stdout.split("\n\n")
  field, text = line.strip().removeprefix("--config.").split("=")
  assert len(config_lib.resolve(load_config(**{field: text})).schedule.partition.split(",")) == 2
  rows = [re.split(r"\s{2,}", row.strip()) for row in table.splitlines()]
  assert rows[0] == ["split", "block", "noise from", "to", "mass", "similarity"] and len(rows) == 10
  masses = [sum(float(row[4]) for row in rows[i:i + 3]) for i in (1, 4, 7)]
  np.testing.assert_allclose(masses, 1, atol=1e-3)

  done = forked("partition", *small, "--by=information", "--layers")  # of 7 in 3: none is even
  line = done.stdout.split("\n\n")[1]
  found = re.fullmatch(
      "--config.schedule.partition=equal_mass --config.layers_per_block=(.*)\n", line)
  assert found[1] == "5,1,1"


@pytest.mark.parametrize("arguments, words", [
    (["--config=digits", "--config.num_blocks=1"],
     "num_blocks=1: one block has the whole range of noise; set 2 or more"),
    (["--config=digits_classify", "--config.task.end_to_end=True"],
     "task.end_to_end=True: nothing is noised"),
    (["--config=kjv_recurrent"], "this config takes no more (num_blocks=2: the task recurrent"),
    (["--config=digits", "--by=mass"], "--by='mass': expected one of loss, decrement, information"),
    (["--config=digits", "--pilot_steps=0"], "--pilot_steps=0: expected a whole number, above 0"),
    (["--config=digits", "--by=decrement"], "by=decrement: expected a task whose loss is a cross"),
    (["--config=digits", "--by=information", "--pilot_steps=7"], "pilot_steps: expected only with"),
    (["--config=digits", "--by=similarity", "--layers"], "--by=similarity: with --layers expected"),
    (["--config=digits", "--config.num_blocks=9", "--layers"], "num_blocks=9 is more than"),
    (["--config=gcide_masked"], "task.name=masked: its schedule of noise takes no boundaries"),
    (["--config=kjv_recurrent", "--config.num_blocks=2"], "splits nothing"),
    (["--config=digits_classify", "--by=information"], "noises no array of the data"),
])
def test_a_mistake_is_one_line(forked, arguments, words):
  done = forked("partition", *arguments)
  assert (done.returncode, done.stderr.count("\n")) == (2, 1) and words in done.stderr, done.stderr


@pytest.mark.nightly
@pytest.mark.parametrize("by", ["information", "similarity"])  # a pilot takes minutes
def test_the_cuts_of_the_evidence_are_those_proposed(by):
  measured = partition.measure(partition.prepare(load_config(
      "digits", **evidence.EXPERIMENTS["digits, cut"].fields)), by=by)
  for num_blocks, text in evidence.CUT[by].items():
    np.testing.assert_allclose(measured.cut(num_blocks), np.float64(text.split(",")), rtol=0.01)


def test_boundaries_that_five_digits_do_not_tell_apart_are_refused():
  with pytest.raises(UserError, match="num_blocks=3: some blocks would have no noise"):
    partition.rounded(np.array([0.123451, 0.123452]))
