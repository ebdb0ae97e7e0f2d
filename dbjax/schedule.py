"""The noise schedule, its split into blocks, and the sampling grids.

Noise is variance exploding, z = y + sigma eps, and training draws sigma from
p(sigma): ln sigma ~ Normal(P_mean, P_std), truncated to [sigma_min, sigma_max]
(EDM, arXiv 2206.00364, Table 1). DiffusionBlocks (arXiv 2506.14202, section 3.3)
gives each of B blocks an interval that holds 1/B of that mass.

Block 0 holds the first layers and the HIGHEST noise. So `boundaries` descend:
block b denoises sigma in [boundaries[b + 1], boundaries[b]], and nothing anywhere
needs to reverse an index. `Schedule.block_of` is the only map from sigma to block.

Masked diffusion (MD4, arXiv 2406.04329) has another kind of noise, `Masking`: its level is
alpha, the probability that a token is not masked, and equal mass means equal steps of alpha.

Host arithmetic is float64 (float32 loses the tails); only `sample_sigma` and `sample_time`
run on the device.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from dbjax.cli import UserError


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

  def block_of(self, sigma) -> np.ndarray:
    """The block that denoises `sigma` (any shape; 0 belongs to the last): int64.

    A boundary belongs to the block above it, as in the authors' code.
    """
    interior = np.asarray(self.boundaries[1:-1])
    return np.sum(np.asarray(sigma)[..., None] < interior, axis=-1)

  def training_range(self, block: int) -> tuple[float, float]:
    """(lo, hi) of `block` widened by the overlap, clipped to the whole range."""
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

  def mass(self, lo: float, hi: float) -> float:
    """Probability of [lo, hi] under the truncated p(sigma)."""
    z = self._standardise
    return _mass(z(lo), z(hi)) / _mass(z(self.sigma_min), z(self.sigma_max))

  def equal_mass_grid(self, num_steps: int) -> np.ndarray:
    """`num_steps` sigmas from sigma_max to sigma_min, equally spaced in mass, then 0.

    Each sigma is one evaluation for Euler; the step from sigma_min to 0 is the last
    denoise. With num_steps = B each block is called once. Shape (num_steps + 1,).
    """
    if num_steps == 1:
      return np.array([self.sigma_max, 0.0])
    return np.append(_equal_mass(self, num_steps - 1), 0.0)

  def karras_grid(self, num_steps: int, rho: float = 7.0) -> np.ndarray:
    """EDM's grid (arXiv 2206.00364, equation 5), then 0. Shape (num_steps + 1,)."""
    ramp = np.linspace(0, 1, num_steps)
    top, bottom = self.sigma_max ** (1 / rho), self.sigma_min ** (1 / rho)
    sigmas = (top + ramp * (bottom - top)) ** rho
    sigmas[0] = self.sigma_max
    if num_steps > 1:
      sigmas[-1] = self.sigma_min
    return np.append(sigmas, 0.0)

  def grid(self, name: str, num_steps: int) -> np.ndarray:
    """The sampling grid called `name`, "karras" or "equal_mass"."""
    return {"karras": self.karras_grid, "equal_mass": self.equal_mass_grid}[name](num_steps)

  def _standardise(self, sigma: float) -> float:
    return (np.log(sigma) - self.P_mean) / self.P_std


class TimeInterval(NamedTuple):
  """What the device needs to draw a block's times: float32 scalars, a pytree."""

  lo: jax.typing.ArrayLike
  hi: jax.typing.ArrayLike


@dataclasses.dataclass(frozen=True)
class Masking:
  """Masks as noise: at time t a token is masked with probability 1 - alpha(t).

  t runs from 0 (data) to 1 (all masked). Block 0 has the most noise, so that alpha
  ascends with the blocks: block b has alpha in [b / B, (b + 1) / B].

  Attributes:
    alpha: "linear", 1 - t, or "cosine", 1 - cos(pi/2 (1 - t)) (MD4, Table 4).
    num_blocks: B.
    gamma: overlap, as in `Schedule`, in units of alpha.
  """

  alpha: str
  num_blocks: int
  gamma: float

  @property
  def boundaries(self) -> tuple[float, ...]:
    """B + 1 values of alpha, ascending from 0 to 1: equal mass is equal steps of alpha."""
    return tuple(np.arange(self.num_blocks + 1) / self.num_blocks)

  def block_of(self, alpha) -> np.ndarray:
    """The block that unmasks at `alpha` (any shape): int64. A boundary begins the next block."""
    interior = np.array(self.boundaries[1:-1]) - 1e-6  # alpha may be a float32
    return np.sum(np.asarray(alpha)[..., None] >= interior, axis=-1)

  def interval(self, block: int) -> TimeInterval:
    """The times of `block`, without overlap."""
    return self._times(*self.boundaries[block:block + 2])

  def training_interval(self, block: int) -> TimeInterval:
    """The times that `block` trains on."""
    lo, hi = self.boundaries[block:block + 2]
    stretch = self.gamma * (hi - lo)
    return self._times(max(lo - stretch, 0.0), min(hi + stretch, 1.0))

  def grid(self, num_steps: int) -> np.ndarray:
    """Times from 1 to 0, equally spaced. Shape (num_steps + 1,)."""
    return np.linspace(1, 0, num_steps + 1)

  def _times(self, lo: float, hi: float) -> TimeInterval:
    return TimeInterval(*(np.float32(_time_of(self.alpha, a)) for a in (hi, lo)))


MIN_TIME = 1e-4  # the weight grows as 1 / t


def alpha_of(kind: str, time):
  """alpha(t), of numpy's or jax's arrays."""
  return 1 - time if kind == "linear" else 1 - jnp.cos(jnp.pi / 2 * (1 - time))


def _time_of(kind: str, alpha: float) -> float:
  return 1 - alpha if kind == "linear" else 1 - 2 / np.pi * np.arccos(1 - alpha)


def mask_weight(kind: str, time: jax.Array) -> jax.Array:
  """-alpha'(t) / (1 - alpha(t)): what a masked token's cross-entropy counts (MD4, equation 8)."""
  if kind == "linear":
    return 1 / time
  return jnp.pi / 2 * jnp.tan(jnp.pi / 2 * (1 - time))


def sample_time(key: jax.Array, num: int, interval: TimeInterval) -> jax.Array:
  """Times (num,) float32, uniform in `interval` above MIN_TIME.

  One draw, spread evenly over the batch: the loss varies less (arXiv 2107.00630, section 3.4).
  """
  unit = (jax.random.uniform(key) + jnp.arange(num) / num) % 1
  return jnp.maximum(interval.lo + (interval.hi - interval.lo) * unit, MIN_TIME)


def make_schedule(config, num_blocks: int) -> Schedule | Masking:
  """The schedule of a config.

  Args:
    config: `config.schedule`: of masks alpha, "linear" or "cosine", and gamma. Of
      Gaussian noise P_mean, P_std, sigma_min, sigma_max, gamma, and
      partition: "equal_mass", "uniform" (in ln sigma: the paper's ablation) or the
      B - 1 interior boundaries themselves, as in "0.5,0.18". One block is the whole
      range whatever the partition, so that num_blocks=1 alone is the baseline.
    num_blocks: B.

  Raises:
    UserError: a range, overlap or partition that makes no sense.
  """
  if not 0 <= config.gamma < float("inf"):
    raise UserError(f"schedule.gamma={config.gamma:g}: the overlap of two blocks cannot be "
                    "negative; set it to 0 or more")
  if hasattr(config, "alpha"):
    return Masking(config.alpha, num_blocks, config.gamma)
  if not 0 < config.sigma_min < config.sigma_max < float("inf"):
    raise UserError(f"schedule.sigma_min={config.sigma_min:g}, schedule.sigma_max="
                    f"{config.sigma_max:g}: expected 0 < sigma_min < sigma_max")
  if not config.P_std > 0:
    raise UserError(f"schedule.P_std={config.P_std:g}: expected a number above 0")
  whole = Schedule(config.P_mean, config.P_std, config.sigma_min, config.sigma_max,
                   (config.sigma_max, config.sigma_min), config.gamma)
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
  return dataclasses.replace(whole, boundaries=(config.sigma_max, *interior, config.sigma_min))


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
    raise UserError(f"schedule.partition={config.partition!r} has {len(interior)} boundaries: "
                    f"num_blocks={num_blocks} needs {num_blocks - 1}")
  boundaries = [config.sigma_max, *interior, config.sigma_min]
  if not all(hi > lo for hi, lo in zip(boundaries, boundaries[1:])):
    raise UserError(f"schedule.partition={config.partition!r}: the boundaries must differ and lie "
                    f"between sigma_min={config.sigma_min:g} and sigma_max={config.sigma_max:g}")
  return boundaries
