"""Where a token stands: what is added to it, or turns its queries and keys."""

from typing import Annotated

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dbjax.fields import one_of

Positions = Annotated[str, one_of("sincos", "learned", "none"),
                      "what is added to the tokens of an image; learned ones begin as sincos"]


def grid(rows: int, columns: int) -> np.ndarray:
  """Row and column of each patch of an image, row by row. (rows * columns, 2) float32."""
  return np.mgrid[:rows, :columns].reshape(2, -1).T.astype(np.float32)


def sincos(height: int, width: int, features: int) -> np.ndarray:
  """Fixed 2-D positions, half the features for each axis. (height * width, features)."""
  frequencies = 1 / 10000 ** (np.arange(features // 4) / (features // 4))
  def axis(positions):
    angles = positions.reshape(-1, 1) * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
  rows, columns = np.mgrid[:height, :width]
  return np.concatenate([axis(columns), axis(rows)], axis=1).astype(np.float32)


def added(module: nn.Module, kind: str, rows: int, columns: int) -> jax.Array | np.ndarray:
  """What a module adds to its tokens, by `Positions`. (rows * columns, module.width) float32."""
  fixed = sincos(rows, columns, module.width)
  if kind == "learned":
    return module.param("positions", lambda key: jnp.asarray(fixed))
  return fixed if kind == "sincos" else np.zeros_like(fixed)


def axial(num_heads: int, features: int) -> np.ndarray:
  """Frequencies at which heads of an image turn: a quarter of the features by the row, another by
  the column, from 1 down towards 1/100 (RoPE-Axial, arXiv 2403.13298). (2, H, d / 2) float32.
  """
  quarter = 100.0 ** -(np.arange(features // 4) / (features // 4))
  none = np.zeros_like(quarter)
  one = np.array([[*quarter, *none], [*none, *quarter]], np.float32)
  return np.repeat(one[:, None], num_heads, axis=1)


def sequence(positions: jax.Array, features: int) -> jax.Array:
  """Angles of a text's positions (L,): positions * 10000^(-2i/d). (L, 1, d / 2) float32."""
  half = features // 2
  angles = positions[:, None] * (1e4 ** -(np.arange(half) / half)).astype(np.float32)
  return angles[:, None]


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
  """Rotary positions (RoFormer, arXiv 2104.09864): turns features i and d/2 + i. x (N, L, H, d).

  Angles (L, H or 1, d / 2) and rotation in float32: bfloat16 cannot tell position 256 from 257.
  """
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)
