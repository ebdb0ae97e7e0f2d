"""Linear maps and tables, in the form that each platform computes well."""

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from dbjax.models import on_mesh

xavier = nn.initializers.xavier_uniform()
zeros = nn.initializers.zeros_init()


class Dense(nn.Module):
  """y = x W + b over the last axis, or x W. (..., K) -> (..., features), in `dtype`."""

  features: int
  kernel_init: Any = xavier
  dtype: Any = jnp.float32
  use_bias: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
    bias = [self.param("bias", zeros, (self.features,))] if self.use_bias else []
    x, kernel, *bias = (a.astype(self.dtype) for a in (x, kernel, *bias))
    return jax.lax.platform_dependent(
        x, on_mesh.whole(kernel), *bias, cpu=_flat_affine, default=lambda x, w, *b: sum(b, x @ w))


Linear = functools.partial(Dense, use_bias=False)


class Embed(nn.Embed):
  """Rows of a table: (N, ...) int -> (N, ..., features), in `dtype`.

  On a mesh each device sums its own part of the table's gradient, and these are summed: the
  partitioner would gather what all devices have to add, which grows with their number.
  """

  def __call__(self, rows: jax.Array) -> jax.Array:
    table = self.embedding.astype(self.dtype)
    return _look_up(table, rows) if on_mesh.is_there() else jnp.take(table, rows, axis=0)


@jax.custom_vjp
def _look_up(table: jax.Array, rows: jax.Array) -> jax.Array:
  return jnp.take(table, rows, axis=0)


def _look_up_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array
                      ) -> tuple[jax.Array, None]:
  (table, rows), axes = saved, on_mesh.batch_axes()

  def add(rows, gradient):
    return jax.lax.psum(jnp.zeros(table.shape, table.dtype).at[rows].add(gradient), axes)

  return on_mesh.on_each_device(add, jax.sharding.PartitionSpec())(rows, gradient), None


_look_up.defvjp(lambda table, rows: (_look_up(table, rows), (table, rows)), _look_up_backward)


def _flat_affine(x: jax.Array, kernel: jax.Array, *bias: jax.Array) -> jax.Array:
  """x @ kernel, and the bias. With two dimensions XLA on CPU leaves the backward products to its
  matrix library, rather than fuse into them; on TPU the same would cost 2 to 6% more bytes.
  """
  rows = x.reshape(-1, x.shape[-1]) @ kernel
  # An outer product with ones is a broadcast, and its gradient an inner product: as a sum over
  # (N, T) it would go down one column after the other, which takes ten times as long.
  rows = sum((jnp.tensordot(jnp.ones(len(rows), b.dtype), b, axes=0) for b in bias), rows)
  return rows.reshape(*x.shape[:-1], -1)
