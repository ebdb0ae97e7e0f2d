"""Attention with rotary positions (RoFormer, arXiv 2104.09864): a text may begin anywhere."""

from collections.abc import Callable
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dbjax.models.transformer import check_heads
from dbjax.models.transformer import Dense

Linear = functools.partial(Dense, use_bias=False)


class RotaryAttention(nn.Module):
  """Multi-head attention with rotary positions, in which `attend` says who sees whom.

  Attributes:
    dense: `Dense` or `Linear`.

  Call: x (N, L, D), positions (L,), attend -> (N, L, D), (k, v). attend takes q, k, v
    (N, L, H, d), rotated, and returns (N, L, H, d).
  """

  num_heads: int
  dtype: Any = jnp.float32
  dense: Any = Dense

  @nn.compact
  def __call__(self, x: jax.Array, positions: jax.Array,
               attend: Callable) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    n, t, d = x.shape
    qkv = self.dense(3 * d, dtype=self.dtype, name="qkv")(x)
    q, k, v = jnp.moveaxis(qkv.reshape(n, t, 3, self.num_heads, d // self.num_heads), 2, 0)
    q, k = rotate(q, positions), rotate(k, positions)
    out = attend(q, k, v).reshape(n, t, d)
    return self.dense(d, dtype=self.dtype, name="out")(out), (k, v)


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
  """Rotary positions: turns features i and d/2 + i by positions * 10000^(-2i/d). x (N, L, H, d).

  Angles and rotation in float32: bfloat16 cannot tell position 256 from 257.
  """
  half = x.shape[-1] // 2
  angles = positions[:, None] * (1e4 ** -(np.arange(half) / half)).astype(np.float32)
  cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]  # (L, 1, d / 2)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


def check_rotary(width: int, num_heads: int):
  """Raises ValueError where a head cannot be turned."""
  check_heads(width, num_heads)
  if width // num_heads % 2:
    raise ValueError(f"model.width={width} with model.num_heads={num_heads}: a head of text must "
                     "have an even width, for rotary positions")
