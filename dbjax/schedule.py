"""The noise schedule, its split into blocks, and the sampling grids.

Noise is variance exploding, z = y + sigma eps, and training draws sigma from
p(sigma): ln sigma ~ Normal(P_mean, P_std), truncated to [sigma_min, sigma_max]
(EDM, arXiv 2206.00364, Table 1). DiffusionBlocks (arXiv 2506.14202, section 3.3)
gives each of B blocks an interval that holds 1/B of that mass.

Block 0 holds the first layers and the HIGHEST noise. So `boundaries` descend:
block b denoises sigma in [boundaries[b + 1], boundaries[b]], and nothing anywhere
needs to reverse an index. `Schedule.block_of` is the only map from sigma to block.

Host arithmetic is float64 (float32 loses the tails); only `sample_sigma` runs on the device.
The noise of masked diffusion is in `masking.py`.
"""

import dataclasses
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from dbjax.errors import UserError
from dbjax.fields import above
from dbjax.fields import at_least
from dbjax.fields import between
from dbjax.fields import check_all
from dbjax.fields import Field
from dbjax.fields import FREE
from dbjax.fields import JOINT
from dbjax.fields import one_of
from dbjax.fields import shown

GRIDS = ("karras", "equal_mass")

GAMMA = Field(0.05, "overlap of the blocks' intervals of noise", at_least(0), JOINT)

# Of tasks whose noise is Gaussian.
FIELDS = {
    "sigma_data": Field(0.5, "standard deviation of what is noised", above(0), JOINT),
    "schedule.P_mean": Field(-1.2, "mean of ln sigma in training", role=JOINT),
    "schedule.P_std": Field(1.2, "standard deviation of ln sigma", above(0), JOINT),
    "schedule.sigma_min": Field(0.002, "the least noise", above(0), JOINT),
    "schedule.sigma_max": Field(80.0, "the most noise", above(0), JOINT),
    "schedule.partition": Field(
        "equal_mass", "or uniform (in ln sigma), or the boundaries: 0.5,0.18", role=JOINT),
    "sample.grid": Field("karras", "noise levels of the sampler", one_of(*GRIDS), FREE),
}


class Interval(NamedTuple):
  """What the device needs to draw a block's sigmas: float32 scalars, a pytree.

  `cdf` is the mass of Normal(0, 1) below the interval, `sf` the mass above it,
  `mass` that inside, all in units of ln sigma standardised by P_mean and P_std.
  """

  cdf: jax.typing.ArrayLike
  sf: jax.typing.ArrayLike
  mass: jax.typing.ArrayLike
  lo: jax.typing.ArrayLike  # the interval itself, in sigma
  hi: jax.typing.ArrayLike
  P_mean: jax.typing.ArrayLike
  P_std: jax.typing.ArrayLike


@dataclasses.dataclass(frozen=True)
class Schedule:
  """p(sigma) and its split into blocks.

  Attributes:
    P_mean, P_std: mean and standard deviation of ln sigma.
    sigma_min, sigma_max: the truncation.
    boundaries: B + 1 sigmas, descending from sigma_max to sigma_min.
    gamma: overlap; each block trains on its interval widened by gamma times its
      length in ln sigma at both ends. Inference uses the unwidened one.
  """

  P_mean: float
  P_std: float
  sigma_min: float
  sigma_max: float
  boundaries: tuple[float, ...]
  gamma: float

  @property
  def num_blocks(self) -> int:
    return len(self.boundaries) - 1

  @property
  def masses(self) -> np.ndarray:
    """The share of p(sigma) in each block's interval, without overlap: (B,) float64, sum 1."""
    z = [self._standardise(sigma) for sigma in self.boundaries]
    return np.array([_mass(lo, hi) for hi, lo in zip(z, z[1:])]) / _mass(z[-1], z[0])

  def block_of(self, sigma) -> np.ndarray:
    """The block that denoises `sigma` (any shape; 0 belongs to the last): int64.

    A boundary belongs to the block above it, as in the authors' code.
    """
    interior = np.asarray(self.boundaries[1:-1])
    return np.sum(np.asarray(sigma)[..., None] < interior, axis=-1)

  def training_range(self, block: int) -> tuple[float, float]:
    """(lo, hi) of `block` widened by the overlap, clipped to the whole range.

    Raises:
      UserError: there is no such block; so do those that follow from it.
    """
    block = check_block(block, self.num_blocks)
    hi, lo = self.boundaries[block], self.boundaries[block + 1]
    stretch = np.exp(min(self.gamma * np.log(hi / lo), 100.0))
    return max(lo / stretch, self.sigma_min), min(hi * stretch, self.sigma_max)

  def training_interval(self, block: int) -> Interval:
    """`training_range` in the form that `sample_sigma` takes."""
    lo, hi = self.training_range(block)
    z_lo, z_hi = self._standardise(lo), self._standardise(hi)
    cdf, sf = special.ndtr(z_lo), special.ndtr(-z_hi)
    mass = _mass(z_lo, z_hi)
    return Interval(*(np.float32(x) for x in (cdf, sf, mass, lo, hi, self.P_mean, self.P_std)))

  def levels(self, block: int, num: int) -> list[tuple[dict[str, float], Interval]]:
    """`num` noise levels over `training_range`, falling: each by name, and as an interval of its
    own, of which `sample_sigma` draws no other.
    """
    sigmas = np.geomspace(*self.training_range(block)[::-1], num)
    return [(dict(sigma=float(s)), self.training_interval(block)._replace(
        lo=np.float32(s), hi=np.float32(s))) for s in sigmas]

  def equal_mass_grid(self, num_steps: int) -> np.ndarray:
    """`num_steps` sigmas from sigma_max to sigma_min, equally spaced in mass, then 0.

    Each sigma is one evaluation for Euler; the step from sigma_min to 0 is the last
    denoise. With num_steps = B each block of equal mass is called once. Shape (num_steps + 1,).

    Raises:
      UserError: num_steps is none.
    """
    num_steps = check_steps(num_steps)
    if num_steps == 1:
      return np.array([self.sigma_max, 0.0])
    return np.append(_equal_mass(self, num_steps - 1), 0.0)

  def karras_grid(self, num_steps: int) -> np.ndarray:
    """EDM's grid, rho = 7 (arXiv 2206.00364, equation 5), then 0. Shape (num_steps + 1,).

    Raises:
      UserError: num_steps is none.
    """
    num_steps = check_steps(num_steps)
    rho, ramp = 7.0, np.linspace(0, 1, num_steps)
    top, bottom = self.sigma_max ** (1 / rho), self.sigma_min ** (1 / rho)
    sigmas = (top + ramp * (bottom - top)) ** rho
    sigmas[0] = self.sigma_max
    if num_steps > 1:
      sigmas[-1] = self.sigma_min
    return np.append(sigmas, 0.0)

  def grid(self, name: str, num_steps: int) -> np.ndarray:
    """The sampling grid called `name`, one of GRIDS."""
    return dict(zip(GRIDS, (self.karras_grid, self.equal_mass_grid)))[name](num_steps)

  def _standardise(self, sigma: float) -> float:
    return (np.log(sigma) - self.P_mean) / self.P_std


def check_block(block: int, num_blocks: int) -> int:
  """The number of a block. Raises UserError where there is none of this number."""
  return Field(0, range=between(0, num_blocks - 1)).check("block", block)


def check_steps(num_steps: int) -> int:
  """How many steps a grid has. Raises UserError where it has none."""
  return Field(1, range=above(0)).check("num_steps", num_steps)


def make_schedule(config, num_blocks: int) -> Schedule:
  """The schedule of a config.

  Args:
    config: `config.schedule`: P_mean, P_std, sigma_min, sigma_max, gamma, and
      partition: "equal_mass", "uniform" (in ln sigma: the paper's ablation) or the
      B - 1 interior boundaries themselves, as in "0.5,0.18". One block is the whole
      range whatever the partition, so that num_blocks=1 alone is the baseline. Or a dict of
      those that differ from the defaults in FIELDS.
    num_blocks: B.

  Raises:
    UserError: a range, overlap or partition that makes no sense, or that leaves a block without
      noise.
  """
  num_blocks = Field(1, range=above(0)).check("num_blocks", num_blocks)
  if isinstance(config, dict):
    known = {name.removeprefix("schedule."): field for name, field in FIELDS.items()
             if name.startswith("schedule.")} | dict(gamma=GAMMA)
    defaults = {name: field.default for name, field in known.items()}
    config = types.SimpleNamespace(**defaults | check_all(config, known))
  if not hasattr(config, "gamma"):
    raise UserError(f"config={shown(config)}: expected config.schedule, or a dict of what differs "
                    "from the defaults")
  if not 0 <= config.gamma < float("inf"):
    raise UserError(f"schedule.gamma={config.gamma:g}: the overlap of two blocks cannot be "
                    "negative; set it to 0 or more")
  if not 0 < config.sigma_min < config.sigma_max < float("inf"):
    raise UserError(f"schedule.sigma_min={config.sigma_min:g}, schedule.sigma_max="
                    f"{config.sigma_max:g}: expected 0 < sigma_min < sigma_max")
  if not config.P_std > 0:
    raise UserError(f"schedule.P_std={config.P_std:g}: expected a number above 0")
  whole = Schedule(P_mean=config.P_mean, P_std=config.P_std, sigma_min=config.sigma_min,
                   sigma_max=config.sigma_max, boundaries=(config.sigma_max, config.sigma_min),
                   gamma=config.gamma)
  if config.partition not in ("equal_mass", "uniform"):
    boundaries = _explicit(config, num_blocks)
  elif num_blocks == 1:
    boundaries = whole.boundaries
  elif config.partition == "equal_mass":
    boundaries = _equal_mass(whole, num_blocks)
  else:
    boundaries = np.geomspace(config.sigma_max, config.sigma_min, num_blocks + 1)
  if not all(hi > lo for hi, lo in zip(boundaries, boundaries[1:])):  # also where one is nan
    raise UserError(f"schedule.P_mean={config.P_mean:g}, schedule.P_std={config.P_std:g}: almost "
                    "no mass between sigma_min and sigma_max; put P_mean between their logarithms")
  interior = (float(b) for b in boundaries[1:-1])
  made = dataclasses.replace(whole, boundaries=(config.sigma_max, *interior, config.sigma_min))
  _check_masses(made, config.partition)
  return made


def _check_masses(schedule: Schedule, partition: str):
  """Raises UserError where float32 knows no mass of a block: all that it draws is one end."""
  for b in range(schedule.num_blocks):
    interval = schedule.training_interval(b)
    if not interval.mass >= np.finfo(np.float32).tiny:
      raise UserError(
          f"schedule.P_mean={schedule.P_mean:g}, schedule.P_std={schedule.P_std:g}, "
          f"schedule.partition={shown(partition)}: block {b}, of sigma {interval.lo:.3g} to "
          f"{interval.hi:.3g}, has next to no mass of p(sigma), so that it would see one level of "
          "noise alone: choose equal_mass or other boundaries, or a larger P_std")


def sample_sigma(key: jax.Array, shape: tuple[int, ...], interval: Interval) -> jax.Array:
  """Draws sigma from p(sigma) restricted to `interval`, by the inverse CDF, on the device.

  A float32 uniform has steps of 1.2e-7, and so has a CDF near 1: either turns the
  tails into a staircase. Hence 64 random bits, and both the lower tail's mass and
  its mirror, the upper's, computed without cancellation; the smaller is inverted.

  Args:
    key: a PRNG key.
    shape: of the result.
    interval: of the block; scalars, traced or not.

  Returns:
    float32 sigmas in [interval.lo, interval.hi].
  """
  bits = jax.random.bits(key, (2, *shape), jnp.uint32)

  def unit(bits):  # 64 bits -> (0, 1), to full float32 precision near 0
    high, low = bits.astype(jnp.float32)
    return (high + (low + 0.5) * 2.0**-32) * 2.0**-32

  below = interval.cdf + interval.mass * unit(bits)
  above = interval.sf + interval.mass * unit(~bits)  # ~bits is 1 - u
  normal = jax.scipy.special.ndtri(jnp.minimum(below, above))
  ln_sigma = interval.P_mean + interval.P_std * jnp.where(below < above, normal, -normal)
  return jnp.clip(jnp.exp(ln_sigma), interval.lo, interval.hi)


def _mass(z_lo: float, z_hi: float) -> float:
  """Mass of Normal(0, 1) in [z_lo, z_hi], mirrored into the lower tail."""
  if z_lo > 0:
    z_lo, z_hi = -z_hi, -z_lo
  return special.ndtr(z_hi) - special.ndtr(z_lo)


def _equal_mass(whole: Schedule, parts: int) -> np.ndarray:
  """parts + 1 sigmas from sigma_max down to sigma_min with equal mass between them."""
  z_lo, z_hi = whole._standardise(whole.sigma_min), whole._standardise(whole.sigma_max)
  fraction = np.arange(parts + 1) / parts  # of the mass, from the top
  mass = _mass(z_lo, z_hi)
  above = special.ndtr(-z_hi) + fraction * mass
  below = special.ndtr(z_lo) + (1 - fraction) * mass
  z = np.where(below < above, special.ndtri(below), -special.ndtri(above))
  sigmas = np.exp(whole.P_mean + whole.P_std * z)
  sigmas[0], sigmas[-1] = whole.sigma_max, whole.sigma_min
  return sigmas


def _explicit(config, num_blocks: int) -> list[float]:
  """Boundaries given by hand, in either order."""
  try:
    interior = sorted((float(x) for x in config.partition.split(",")), reverse=True)
  except ValueError:
    raise UserError(f"schedule.partition={config.partition!r}: expected equal_mass, uniform or "
                    "the boundaries themselves, such as 0.5,0.18") from None
  if num_blocks == 1:
    return [config.sigma_max, config.sigma_min]
  if len(interior) != num_blocks - 1:
    noun = "boundary" if len(interior) == 1 else "boundaries"
    raise UserError(f"schedule.partition={config.partition!r} has {len(interior)} {noun}: "
                    f"num_blocks={num_blocks} needs {num_blocks - 1}")
  boundaries = [config.sigma_max, *interior, config.sigma_min]
  if not all(hi > lo for hi, lo in zip(boundaries, boundaries[1:])):
    raise UserError(f"schedule.partition={config.partition!r}: the boundaries must differ and lie "
                    f"between sigma_min={config.sigma_min:g} and sigma_max={config.sigma_max:g}")
  return boundaries
