"""Attention with rotary positions (RoFormer, arXiv 2104.09864): a text may begin anywhere."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from dbjax.models.dense import Dense
from dbjax.models.positions import rotate
from dbjax.models.positions import sequence
from dbjax.models.transformer import check_heads
from dbjax.models.transformer import norm_heads


class RotaryAttention(nn.Module):
  """Multi-head attention with rotary positions, in which `attend` says who sees whom.

  Attributes:
    dense: `Dense` or `Linear`.
    qk_norm: see `transformer.Attention`.

  Call: x (N, L, D), positions (L,), attend -> (N, L, D), (k, v). attend takes q, k, v
    (N, L, H, d), rotated, and returns (N, L, H, d).
  """

  num_heads: int
  dtype: Any = jnp.float32
  dense: Any = Dense
  qk_norm: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, positions: jax.Array,
               attend: Callable) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    n, t, d = x.shape
    qkv = self.dense(3 * d, dtype=self.dtype, name="qkv")(x)
    q, k, v = jnp.moveaxis(qkv.reshape(n, t, 3, self.num_heads, d // self.num_heads), 2, 0)
    if self.qk_norm:
      q, k = norm_heads(q, "q_norm"), norm_heads(k, "k_norm")
    angles = sequence(positions, d // self.num_heads)
    q, k = rotate(q, angles), rotate(k, angles)
    out = attend(q, k, v).reshape(n, t, d)
    return self.dense(d, dtype=self.dtype, name="out")(out), (k, v)


def check_rotary(width: int, num_heads: int):
  """Raises ValueError where a head cannot be turned."""
  check_heads(width, num_heads)
  if width // num_heads % 2:
    raise ValueError(f"model.width={width} with model.num_heads={num_heads}: a head of text must "
                     "have an even width, for rotary positions")
