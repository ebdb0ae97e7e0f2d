"""Where to cut the noise into blocks, for these data: proposes schedule.partition.

    python -m dbjax.partition --config=configs/digits.py --config.num_blocks=6 [--by=information]

prints --config.schedule.partition=0.5,0.18,... for dbjax.main: numbers that become part of the
config, so that a block stays a function of (config, b, n). Before it stands a table of the
proposal beside the two splits that need no data, equal_mass and uniform (see `schedule.py`): of
each block the noise levels, the mass of p(sigma), and what --by divides:

loss         the share of the loss: the integral over ln sigma of p(sigma) times the (weighted)
             held-out loss at sigma, of a pilot: the whole network, trained for --pilot_steps.
             Equal in all blocks.
decrement    by how much the loss falls from the block's highest noise to its lowest, of the same
             pilot. For a cross-entropy without a weight, in nats. Equal in all blocks.
information  nats that z = y + sigma eps gains on y from the block's highest noise to its lowest:
             the integral over ln sigma of mmse(sigma) / sigma^2, since dI / d snr = mmse / 2 with
             snr = 1 / sigma^2 (Guo, Shamai & Verdu, IEEE Trans. IT 51(4), 2005, theorem 1). mmse
             is the squared error of the optimal denoiser, in closed form. Equal in all blocks.
similarity   how much alike the optimal denoisers are at two noise levels of the block (arXiv
             2312.09181, section 4.2, equation 5), in the mean. As large as it can be, in the mean
             over all noise levels; the paper asks so much of each end of the noise.

The optimal denoiser is that of --num_examples training examples, without their labels or other
conditions. It needs a task that noises what the data hold (`Task.draw` returns y), as image does.
It knows these examples by heart: where the noise is less than the distance between them nothing is
left to find out, so that nearly all blocks go to higher noise. A network, which does not know
them, has much to learn there: --by=loss is the better choice then, and works for every task of
Gaussian noise.

--layers leaves the noise as it is, in equal masses, and proposes layers_per_block in proportion to
what --by measures in each block: the largest remainders, and at least 1.

Deterministic: the same config and options make the same proposal on the same machine. In Python it
is `propose`.
"""

from collections.abc import Iterable, Sequence
import dataclasses
from typing import Any, NamedTuple

from absl import flags
import jax
import numpy as np
from scipy import optimize

from dbjax import block as block_lib
from dbjax import cli
from dbjax import config as config_lib
from dbjax import data
from dbjax import fields as fields_lib
from dbjax import metrics
from dbjax import pilot
from dbjax import task as task_lib
from dbjax.errors import UserError
from dbjax.fields import above
from dbjax.fields import at_least
from dbjax.fields import Field
from dbjax.fields import one_of
from dbjax.schedule import Schedule

WAYS = ("loss", "decrement", "information", "similarity")
OPTIONS = {
    "by": Field("loss", "What is divided among the blocks.", one_of(*WAYS)),
    "pilot_steps": Field(300, "Of the pilot's training, for loss and decrement.", above(0)),
    "num_examples": Field(5000, "That the optimal denoiser knows, at most, for information and "
                          "similarity.", at_least(2)),
}

_LEVELS = 60  # cells that the noise is measured in; 2 to 6 divide it, so that equal masses cut none
_FINE = 120  # in closed form
_PROBES = 256  # examples that are noised, of those that the optimal denoiser knows
_PIXELS = 1024  # components, at most, in which two denoisers are compared
_ETA = 2 / 256  # by which they differ, at most, where they are alike: the authors' code


class Amounts(NamedTuple):
  """Something that adds up over the noise.

  Attributes:
    sigmas: (K + 1,) float64, descending: the edges of cells.
    amounts: (K,) float64, of each cell, 0 or more.
  """

  sigmas: np.ndarray
  amounts: np.ndarray

  def cut(self, num_blocks: int) -> np.ndarray:
    """The sigmas (num_blocks - 1,), descending, that divide it equally."""
    total = self._from_top()
    wanted = total[-1] * np.arange(1, num_blocks) / num_blocks
    return np.exp(np.interp(wanted, total, np.log(self.sigmas)))

  def within(self, boundaries: Sequence[float]) -> np.ndarray:
    """How much there is between boundaries (B + 1,), descending: (B,)."""
    depth = -np.log(self.sigmas)  # np.interp wants it to ascend
    return np.diff(np.interp(-np.log(boundaries), depth, self._from_top()))

  def _from_top(self) -> np.ndarray:
    return np.append(0.0, np.cumsum(self.amounts))


class Similarity(NamedTuple):
  """How much alike two noise levels are.

  Attributes:
    edges: (K + 1,) float64, descending: of cells of equal mass, each with a level in its middle.
    levels: (K,).
    similarity: (K, K) float64, symmetric, from 0 to 1.
  """

  edges: np.ndarray
  levels: np.ndarray
  similarity: np.ndarray

  def cut(self, num_blocks: int) -> np.ndarray:
    """The sigmas (num_blocks - 1,), descending, between blocks of the most similar levels."""
    return self.edges[cluster(self.similarity, num_blocks)]

  def within(self, boundaries: Sequence[float]) -> np.ndarray:
    """The mean of two levels of a block, for boundaries (B + 1,), descending: (B,); nan where a
    block has no level.
    """
    inside = [(lo <= self.levels) & (self.levels < hi)
              for hi, lo in zip(boundaries, boundaries[1:])]
    return np.array([self.similarity[i][:, i].mean() if i.any() else np.nan for i in inside])


def propose(config: Any, dataset: Any = None, **options: Any) -> tuple[float, ...]:
  """The boundaries of the blocks, for schedule.partition.

  Args:
    config: a ConfigDict, complete or not. What its schedule.partition says does not matter.
    dataset: if not what config.data names.
    **options: of OPTIONS: by, pilot_steps, num_examples.

  Returns:
    num_blocks - 1 noise levels, descending, of five digits, as the command prints them.

  Raises:
    UserError: an option or the config makes no sense, the task has no such boundaries, or the data
      are not there.
  """
  config = prepare(config)
  return rounded(measure(config, dataset, **options).cut(config.num_blocks))


def measure(config: Any, dataset: Any = None, **options: Any) -> Amounts | Similarity:
  """What the blocks of a config, by `prepare`, are to divide. See `propose`."""
  chosen = {name: field.default for name, field in OPTIONS.items()
            } | fields_lib.check_all(options, OPTIONS)
  _check_used(chosen["by"], options)
  by, single = chosen["by"], config_lib.as_one_block(config, **_plain_loss(config))
  task = task_lib.make_task(single, 0)
  schedule = task.make_schedule(single)
  if by == "decrement" and single.task.get("weight") != "none":
    raise UserError("by=decrement: expected a task whose loss is a cross-entropy without a weight "
                    "(task.weight=none), which falls with the noise; set by=loss")
  if by in ("loss", "decrement"):
    sigmas = schedule.equal_mass_grid(2 * _LEVELS + 1)[:-1] if by == "loss" else (
        np.geomspace(schedule.sigma_max, schedule.sigma_min, 2 * _LEVELS + 1))
    losses = pilot_losses(single, data.load(single, dataset), chosen["pilot_steps"], sigmas[::2])
    return shares(sigmas[::2], losses) if by == "loss" else decrements(sigmas[1::2], losses)
  _check_closed_form(task, by)
  known = Known(*_examples(task, data.load(single, dataset), chosen["num_examples"]))
  return information(known, schedule) if by == "information" else similarity(known, schedule)


def _check_used(by: str, given: Iterable[str]):
  """Raises UserError where an option is given that --by has no use for."""
  trained = ("loss", "decrement")
  uses = dict(pilot_steps=trained, num_examples=[way for way in WAYS if way not in trained])
  for name in given:
    if by not in uses.get(name, WAYS):
      raise UserError(f"{name}: expected only with by={' or by='.join(uses[name])}, and not with "
                      f"by={by}: leave it out")


def prepare(config: Any, layers: bool = False) -> Any:
  """The config, resolved, of blocks that divide the noise equally by mass.

  Args:
    config: a ConfigDict, complete or not.
    layers: whether layers_per_block is what is looked for: then whatever it says does not matter.

  Raises:
    UserError: it is none, has one block, or its noise takes no boundaries.
  """
  flat = config_lib.flatten(config_lib.complete(config_lib.flatten(config)))
  if "schedule.partition" not in flat:
    raise UserError(f"task.name={flat['task.name']}: its schedule of noise takes no boundaries "
                    "(there is no schedule.partition); expected a task of Gaussian noise")
  flat |= {"schedule.partition": "equal_mass"}
  if layers and flat["num_blocks"] > 1:  # some split that passes, so that all else is checked
    spare = config_lib.as_one_block(flat).model.num_layers - flat["num_blocks"]
    flat |= {"layers_per_block": (spare + 1, *[1] * (flat["num_blocks"] - 1))}
  config = config_lib.unflatten(flat)
  if config.task.get("end_to_end"):
    raise UserError("task.end_to_end=True: nothing is noised, so there is no noise to divide; set "
                    "it to False, and num_blocks to 2 or more")
  if config.num_blocks == 1:
    why = "num_blocks=1: one block has the whole range of noise"
    try:
      config_lib.unflatten(flat | {"num_blocks": 2})
    except UserError as e:
      raise UserError(f"{why}, and this config takes no more ({e})") from None
    raise UserError(f"{why}; set 2 or more")
  if not isinstance(_schedule(config), Schedule):
    raise UserError(f"task.name={config.task.name}: its schedule is another than that of "
                    "dbjax.make_schedule, and takes no boundaries")
  return config


def _plain_loss(config: Any) -> dict[str, bool]:
  """The fields of a loss that is an error: a learned weight makes all noise levels' alike."""
  return {"task.learned_weight": False} if "learned_weight" in config.task else {}


def _schedule(config: Any) -> Schedule:
  return task_lib.find(config.task.name).make_schedule(config)


def rounded(sigmas: np.ndarray) -> tuple[float, ...]:
  """Sigmas of five digits. Raises UserError where two of them become one."""
  found = tuple(float(f"{sigma:.5g}") for sigma in sigmas)
  if len(set(found)) < len(found):
    raise UserError(f"num_blocks={len(found) + 1}: some blocks would have no noise of their own "
                    f"({words(found)}); set fewer")
  return found


def words(boundaries: Sequence[float]) -> str:
  """Boundaries as schedule.partition takes them."""
  return ",".join(f"{sigma:.5g}" for sigma in boundaries)


# By a pilot.


def pilot_losses(config: Any, dataset: data.Dataset, num_steps: int, sigmas: np.ndarray
                 ) -> np.ndarray:
  """The held-out loss of a short training, in each cell of the noise.

  Args:
    config: resolved, of one block.
    dataset: to train on, and to hold out.
    num_steps: of the training; the learning rate falls to 0 in them.
    sigmas: (K + 1,) edges of cells, descending.

  Returns:
    (K,) float64: the task's loss, weighted as it is in training, of p(sigma) within each cell.

  Raises:
    UserError: it is not finite.
  """
  config = pilot.short(config, num_steps)
  task = task_lib.make_task(config, 0)
  task_lib.check(task)
  frozen = jax.device_put(task.frozen(config, dataset))
  params = pilot.train(task, dataset, frozen)
  losses = pilot.losses(task, params, dataset.held_out, frozen, sigmas)
  if not np.isfinite(losses).all():
    raise UserError(f"optimizer.learning_rate={config.optimizer.learning_rate:g}: the pilot of "
                    f"pilot_steps={num_steps} has diverged: set a lower one")
  return losses


def shares(sigmas: np.ndarray, losses: np.ndarray) -> Amounts:
  """The share of each of K cells of equal mass, between sigmas (K + 1,), in a loss (K,).

  Raises:
    UserError: it is below zero somewhere, as a log-likelihood may be.
  """
  if losses.min() < 0 or not losses.sum() > 0:
    raise UserError(f"by=loss: the pilot's loss is {losses.min():.3g} at some noise; expected one "
                    "above zero, which can be shared out; set by=information or by=similarity")
  return Amounts(sigmas, losses / losses.sum())


def decrements(levels: np.ndarray, losses: np.ndarray) -> Amounts:
  """By how much a loss falls between noise levels (K,), descending, where it is losses (K,).

  A perfect network's never rises as the noise falls: the nearest sequence that does not.

  Raises:
    UserError: it does not fall at all.
  """
  falling = optimize.isotonic_regression(losses, increasing=False).x
  if not falling[0] > falling[-1]:
    raise UserError("by=decrement: the pilot's loss does not fall with the noise; set more "
                    "pilot_steps, or by=loss")
  return Amounts(levels, -np.diff(falling))


# By the optimal denoiser, in closed form.


class Known:
  """What is known of an example from its noised self, if it is one of N: the optimal denoiser.

  Of z = y + sigma eps it is the mean of the examples, weighted by softmax(-|z - y_i|^2 / (2
  sigma^2)) (EDM, arXiv 2206.00364, equation 57).
  """

  def __init__(self, examples: np.ndarray, noise: np.ndarray):
    """Of examples (N, d) the first are noised, in turn, by noise (n, d); both float32."""
    wide, eps = examples.astype(np.float64), noise.astype(np.float64)
    self.examples, self.noise = examples, noise
    self.which = np.arange(len(noise)) % len(examples)
    # In float64, and of differences to y: at low noise, small ones of large numbers matter.
    square = np.sum(wide**2, axis=1)
    self._apart = square[self.which, None] + square - 2 * wide[self.which] @ wide.T
    along = eps @ wide.T
    self._along = along[np.arange(len(eps)), self.which][:, None] - along  # eps (y - y_i)

  def weights(self, sigma: float) -> np.ndarray:
    """Of each example in D(z): (n, N) float32, rows of sum 1."""
    logits = self._apart / (-2 * sigma**2) - self._along / sigma
    weights = np.exp(np.float32(logits - logits.max(axis=1, keepdims=True)))
    return weights / weights.sum(axis=1, keepdims=True)

  def residual(self, weights: np.ndarray, components: Any = slice(None)) -> np.ndarray:
    """y - D(z): (n, d) float32, or some of its components."""
    examples = self.examples[:, components]
    return examples[self.which] - weights @ examples

  def mmse(self, sigma: float) -> float:
    """E |y - D(z)|^2, a sum over components: by the posterior's variance, whose mean it is."""
    weights = self.weights(sigma)
    apart = np.einsum("ij,ij->i", weights, self._apart)
    return float(np.mean(apart - np.sum(np.square(self.residual(weights)), axis=1)))


def _check_closed_form(task: task_lib.Task, by: str):
  """Raises UserError where a task does not say what is noised."""
  interval = task.make_schedule(task.config).training_interval(0)
  drawn = jax.eval_shape(task.draw, jax.random.key(0), task.abstract_batch(2), interval)
  if "y" not in drawn:
    raise UserError(f"by={by}: the task {task.config.task.name} noises no array of the data "
                    "(Task.draw returns no y); set by=loss")


def _examples(task: task_lib.Task, dataset: data.Dataset, num: int
              ) -> tuple[np.ndarray, np.ndarray]:
  """Training examples (N, d), as the task noises them, and noise (n, d): float32."""
  config, seed = task.config, task.config.seed
  batch = dataset.batch(seed, 0, min(num, len(dataset.train)))
  key = block_lib.block_key(seed, 0, 0, block_lib.EVALUATE)
  interval = task.make_schedule(config).training_interval(0)
  y = np.asarray(jax.jit(lambda batch: task.draw(key, batch, interval)["y"])(batch), np.float32)
  y = y.reshape(len(y), -1)
  rng = np.random.Generator(np.random.Philox(seed))
  return y, rng.standard_normal((_PROBES, y.shape[1]), np.float32)


def information(known: Known, schedule: Schedule) -> Amounts:
  """Nats that z gains on y in cells of ln sigma. From sigma = inf to 0 they are ln N in all."""
  sigmas = np.geomspace(schedule.sigma_max, schedule.sigma_min, 2 * _FINE + 1)
  density = np.array([known.mmse(sigma) / sigma**2 for sigma in sigmas[1::2]])
  nats = np.maximum(density, 0) * -np.diff(np.log(sigmas[::2]))
  if not nats.sum() > 0:
    raise UserError("by=information: the noise tells nothing of these examples apart; are they all "
                    "the same?")
  return Amounts(sigmas[::2], nats)


def similarity(known: Known, schedule: Schedule) -> Similarity:
  """How much alike the optimal denoisers are at levels that training draws equally often.

  arXiv 2312.09181, equation 5: the share of components of eps*, the noise that they find in y +
  sigma eps, for the same y and eps, that differ by no more than _ETA.
  """
  sigmas = schedule.equal_mass_grid(2 * _FINE + 1)[:-1]
  d = known.examples.shape[1]
  some = np.unique(np.linspace(0, d - 1, min(d, _PIXELS)).astype(int))
  found = np.stack([known.residual(known.weights(sigma), some) / np.float32(sigma)
                    for sigma in sigmas[1::2]])
  alike = np.eye(_FINE)
  for i, one in enumerate(found):  # eps* is eps + (y - D) / sigma, and eps the same
    alike[i, i:] = np.mean(np.abs(found[i:] - one) <= _ETA, axis=(1, 2))
  return Similarity(sigmas[::2], sigmas[1::2], np.maximum(alike, alike.T))


def cluster(alike: np.ndarray, parts: int) -> np.ndarray:
  """Cuts K levels into runs of similar ones.

  Args:
    alike: (K, K), symmetric.
    parts: how many runs.

  Returns:
    (parts - 1,) int: where runs begin, but for the first, so that the mean over all levels of their
    mean similarity to the levels of their own run is the largest. Exact, by dynamic programming.
  """
  num = len(alike)
  sums = np.pad(alike.cumsum(0).cumsum(1), [(1, 0), (1, 0)])
  start, stop = np.ogrid[:num + 1, :num + 1]
  inside = sums[stop, stop] - 2 * sums[start, stop] + sums[start, start]
  score = np.where(start < stop, inside / np.maximum(stop - start, 1), -np.inf)
  best, choices = score[0], []
  for _ in range(parts - 1):
    through = best[:, None] + score  # the last run begins at the first index and ends at the second
    choices.append(through.argmax(axis=0))
    best = through.max(axis=0)
  cuts = [num]
  for choice in reversed(choices):
    cuts.append(choice[cuts[-1]])
  return np.array(cuts[:0:-1], int)


def layers(amounts: np.ndarray, num_layers: int) -> tuple[int, ...]:
  """Layers of each block, in proportion to amounts (B,): by largest remainders, at least 1 each."""
  share = lambda number, of: np.round(number * of / of.sum(), 9)  # three thirds are one
  quota = share(num_layers, amounts)
  while (quota < 1).any():  # they get one, and the others share the rest
    small = quota <= 1
    quota = np.where(small, 1, share(num_layers - small.sum(), np.where(small, 0, amounts)))
  found = np.floor(quota).astype(int)
  order = np.argsort(found - quota, kind="stable")
  found[order[:num_layers - found.sum()]] += 1
  return tuple(found.tolist())


def rows(measured: Amounts | Similarity, schedule: Schedule, name: str) -> list[list[Any]]:
  """The blocks of a split in a table: name, number, noise from, to, mass, what was divided."""
  figures = [None if np.isnan(x) else float(x) for x in measured.within(schedule.boundaries)]
  return [[name, b, *schedule.boundaries[b:b + 2], float(mass), figure]
          for b, (mass, figure) in enumerate(zip(schedule.masses, figures))]


def main():
  f = flags.FLAGS
  config = prepare(cli.config(), f.layers)
  if f.layers and f.by == "similarity":
    raise UserError("--by=similarity: with --layers expected what adds up over blocks: loss, "
                    "decrement or information")
  measured = measure(config, **{name: f[name].value for name in OPTIONS
                                if f[name].present or name == "by"})
  equal = _schedule(config)
  table = rows(measured, equal, "equal_mass")
  if f.layers:
    found = layers(measured.within(equal.boundaries), config.model.num_layers)
    line = ("--config.schedule.partition=equal_mass --config.layers_per_block="
            + ",".join(map(str, found)))
    table = [[*row, num] for row, num in zip(table, found)]
  else:
    interior = rounded(measured.cut(config.num_blocks))
    line = f"--config.schedule.partition={words(interior)}"
    even = np.geomspace(equal.sigma_max, equal.sigma_min, config.num_blocks + 1)
    others = {"uniform": tuple(even),
              f"by {f.by}": (equal.sigma_max, *interior, equal.sigma_min)}
    for name, boundaries in others.items():
      table += rows(measured, dataclasses.replace(equal, boundaries=boundaries), name)
  header = ["split", "block", "noise from", "to", "mass", f.by] + ["layers"] * f.layers
  print(metrics.table(header, table) + f"\n\n{line}")


if __name__ == "__main__":
  flags.DEFINE_string("config", None, "A config: a file, or a name such as digits.")
  for option, of in OPTIONS.items():
    cli.define(option, of)
  flags.DEFINE_boolean("layers", False, "Propose layers_per_block, at equal mass.")
  cli.run(main, __doc__)
