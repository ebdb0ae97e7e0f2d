"""Attention with rotary positions (RoFormer, arXiv 2104.09864), in which texts may share a row.

A segment is a run of equal numbers in `segment` (N, L): one of several texts in a row. None sees
another. Positions are rotary, so that a text may begin anywhere.
"""

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
    remat: keep q, k and v for the backward pass, not the weights (N, H, L, L).
    dense: `Dense` or `Linear`.

  Call: x (N, L, D), positions (L,), attend -> (N, L, D), (k, v). attend takes q, k, v
    (N, L, H, d), rotated, and returns (N, L, H, d).
  """

  num_heads: int
  dtype: Any = jnp.float32
  remat: bool = False
  dense: Any = Dense

  @nn.compact
  def __call__(self, x: jax.Array, positions: jax.Array,
               attend: Callable) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    n, t, d = x.shape
    qkv = self.dense(3 * d, dtype=self.dtype, name="qkv")(x)
    q, k, v = jnp.moveaxis(qkv.reshape(n, t, 3, self.num_heads, d // self.num_heads), 2, 0)
    q, k = rotate(q, positions), rotate(k, positions)
    out = (jax.checkpoint(attend) if self.remat else attend)(q, k, v)
    return self.dense(d, dtype=self.dtype, name="out")(out.reshape(n, t, d)), (k, v)


def attend_to_others(q: jax.Array, k: jax.Array, v: jax.Array, others_k: jax.Array,
                     others_v: jax.Array, mask: jax.Array) -> jax.Array:
  """Attention of position i to the others' j < i, and to itself.

  Args:
    q, k, v: (N, L, H, d), of the positions themselves.
    others_k, others_v: (N, L, H, d), of the others.
    mask: (N, 1, L, L), causal. Its diagonal stands for the position itself.

  Returns:
    (N, L, H, d).
  """
  # Zeros on the diagonal, not a difference after the sum: rounding would leak.
  itself = jnp.eye(q.shape[1], dtype=bool)
  scores = jnp.einsum("nqhd,nkhd->nhqk", q, others_k, preferred_element_type=jnp.float32)
  own = jnp.einsum("nqhd,nqhd->nhq", q, k, preferred_element_type=jnp.float32)
  scores = jnp.where(itself, own[..., None], scores) / np.sqrt(q.shape[-1])
  weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
  own = jnp.where(itself, weights, 0).sum(-1).swapaxes(1, 2)[..., None].astype(v.dtype)
  weights = jnp.where(itself, 0, weights).astype(v.dtype)
  return jnp.einsum("nhqk,nkhd->nqhd", weights, others_v) + own * v


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
  """Rotary positions: turns features i and d/2 + i by positions * 10000^(-2i/d). x (N, L, H, d).

  Angles and rotation in float32: bfloat16 cannot tell position 256 from 257.
  """
  half = x.shape[-1] // 2
  angles = positions[:, None] * (1e4 ** -(np.arange(half) / half)).astype(np.float32)
  cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]  # (L, 1, d / 2)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


def same_segment(segment: jax.Array) -> jax.Array:
  """Who may see whom, for all heads: (N, L) int -> (N, 1, L, L) bool."""
  return (segment[:, :, None] == segment[:, None])[:, None]


def causal(segment: jax.Array) -> jax.Array:
  """The same, and none a later one."""
  return same_segment(segment) & jnp.tri(segment.shape[1], dtype=bool)


def check_rotary(width: int, num_heads: int):
  """Raises ValueError where a head cannot be turned."""
  check_heads(width, num_heads)
  if width // num_heads % 2:
    raise ValueError(f"model.width={width} with model.num_heads={num_heads}: a head of text must "
                     "have an even width, for rotary positions")
