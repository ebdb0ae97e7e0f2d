"""Masks as noise: masked diffusion of tokens (MD4, arXiv 2406.04329), split into blocks.

The level of noise is alpha, the probability that a token is not masked, and equal mass means
equal steps of alpha. It is to text what `schedule.py` is to Gaussian noise.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dbjax import schedule as schedule_lib
from dbjax.errors import UserError

MIN_TIME = 1e-4  # the weight grows as 1 / t


class TimeInterval(NamedTuple):
  """What the device needs to draw a block's times: float32 scalars, a pytree."""

  lo: jax.Array | np.float32
  hi: jax.Array | np.float32


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
    """The times of `block`, without overlap. Raises UserError where there is no such block."""
    return self._times(*self._alphas(block))

  def training_interval(self, block: int) -> TimeInterval:
    """The times that `block` trains on. Raises UserError where there is no such block."""
    lo, hi = self._alphas(block)
    stretch = self.gamma * (hi - lo)
    return self._times(max(lo - stretch, 0.0), min(hi + stretch, 1.0))

  def levels(self, block: int, num: int) -> list[tuple[dict[str, float], TimeInterval]]:
    """`num` times over what `block` trains on, falling: each by name, and as an interval."""
    lo, hi = (float(t) for t in self.training_interval(block))
    times = hi - (hi - lo) * (np.arange(num) + 0.5) / num
    return [(dict(time=float(t)), TimeInterval(np.float32(t), np.float32(t))) for t in times]

  def grid(self, num_steps: int) -> np.ndarray:
    """Times from 1 to 0, equally spaced. Shape (num_steps + 1,). Raises UserError of no step."""
    return np.linspace(1, 0, schedule_lib.check_steps(num_steps) + 1)

  def _alphas(self, block: int) -> tuple[float, ...]:
    block = schedule_lib.check_block(block, self.num_blocks)
    return self.boundaries[block:block + 2]

  def _times(self, lo: float, hi: float) -> TimeInterval:
    return TimeInterval(*(np.float32(_time_of(self.alpha, a)) for a in (hi, lo)))


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


def make_masking(config, num_blocks: int) -> Masking:
  """The masking of a config.

  Args:
    config: `config.schedule`: alpha, "linear" or "cosine", and gamma.
    num_blocks: B.

  Raises:
    UserError: an overlap that makes no sense.
  """
  if not 0 <= config.gamma < float("inf"):
    raise UserError(f"schedule.gamma={config.gamma:g}: the overlap of two blocks cannot be "
                    "negative; set it to 0 or more")
  return Masking(config.alpha, num_blocks, config.gamma)
