"""Transformer layers with adaLN-zero conditioning (DiT, arXiv 2212.09748, section 3.2)."""

from collections.abc import Callable
import functools
from typing import Annotated, Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dbjax.fields import above
from dbjax.fields import FREE
from dbjax.models import on_mesh
from dbjax.models.attention import attend

# What networks have in common: their fields in a config.
Layers = Annotated[int, above(0), "layers of all blocks together"]
Width = Annotated[int, above(0), "features of a token"]
Heads = Annotated[int, above(0), "of attention"]
Ratio = Annotated[float, above(0), "hidden features of the MLP over width"]
Remat = Annotated[bool, FREE, "recompute activations in the backward pass"]
Unroll = Annotated[int, above(0), FREE, "layers per iteration of the loop; on CPU all, on TPU 1"]

_NOISE_FEATURES = 256

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


class NoiseEmbedding(nn.Module):
  """An MLP over sinusoids of c_noise. (N,) float32 -> (N, width).

  c_noise = ln(sigma) / 4 spans about 3 in all, and a fraction of that in one block:
  frequencies from 1 to 100 resolve both.
  """

  width: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, c_noise: jax.Array) -> jax.Array:
    normal = nn.initializers.normal(0.02)
    x = nn.silu(Dense(self.width, normal, self.dtype, name="hidden")(sinusoids(c_noise)))
    return Dense(self.width, normal, self.dtype, name="out")(x)


def sinusoids(c_noise: jax.Array) -> jax.Array:
  """What `NoiseEmbedding` sees of c_noise: (N,) float32 -> (N, 256)."""
  angles = c_noise[:, None] * np.geomspace(1, 100, _NOISE_FEATURES // 2, dtype=np.float32)
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Attention(nn.Module):
  """Multi-head self-attention without a mask. (N, T, D) -> (N, T, D).

  Attributes:
    attend: q, k, v (N, T, H, d) -> (N, T, H, d).
  """

  num_heads: int
  dtype: Any = jnp.float32
  attend: Callable = attend

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    n, t, d = x.shape
    qkv = Dense(3 * d, dtype=self.dtype, name="qkv")(x)
    q, k, v = jnp.moveaxis(qkv.reshape(n, t, 3, self.num_heads, d // self.num_heads), 2, 0)
    return Dense(d, dtype=self.dtype, name="out")(self.attend(q, k, v).reshape(n, t, d))


class MLP(nn.Module):
  """Dense, GELU (tanh), Dense. (N, T, D) -> (N, T, D)."""

  ratio: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    hidden = Dense(int(x.shape[-1] * self.ratio), dtype=self.dtype, name="hidden")(x)
    return Dense(x.shape[-1], dtype=self.dtype, name="out")(nn.gelu(hidden, approximate=True))


class AdaLNLayer(nn.Module):
  """One transformer layer: attention and MLP, each scaled, shifted and gated by c.

  The gates start at 0, so that a new layer is the identity.

  Call: x (N, T, D), c (N, D), keys (N,) of dropout or None -> x (N, T, D).
  """

  num_heads: int
  mlp_ratio: float
  dtype: Any = jnp.float32
  attend: Callable = attend  # of `Attention`
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x: jax.Array, c: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    attention = Attention(self.num_heads, self.dtype, self.attend, name="attention")
    mlp = MLP(self.mlp_ratio, self.dtype, name="mlp")
    modulation = Dense(6 * x.shape[-1], zeros, self.dtype, name="modulation")(nn.silu(c))
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation, 6, axis=-1)
    drop = lambda x, place: x
    if keys is not None:
      drop = lambda x, place: dropout(x, fold_in(keys, place), self.dropout)
    x = x + gate_a[:, None] * drop(attention(modulate(x, shift_a, scale_a)), 0)
    return x + gate_m[:, None] * drop(mlp(modulate(x, shift_m, scale_m)), 1)


class Stack(nn.Module):
  """`num_layers` AdaLNLayers as one scanned axis: compile time does not grow with depth.

  Attributes:
    remat: recompute a layer's activations in the backward pass; attention's weights when
      their turn comes, or they would be held while the MLP's gradients are computed.
    unroll: layers per iteration of the scan. On CPU scanning costs a third more
      than unrolling (copies of stacked weights); on TPU 1 compiles fastest.
    attention: see `attention.Kernel`.
    dropout: the fraction of each branch's outputs that is zeroed, where there are keys.

  Call: x (N, T, D), c (N, D), keys (N,) or None -> x (N, T, D). What is dropped of example i
    is a function of keys[i] alone, so that no split of a batch changes it.
  """

  num_layers: int
  num_heads: int
  mlp_ratio: float
  dtype: Any = jnp.float32
  remat: bool = False
  unroll: int = 1
  attention: str = "auto"
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x: jax.Array, c: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    # Without a loop around it, CSE would undo the recomputation.
    remat = functools.partial(nn.remat, prevent_cse=self.unroll > 1)
    layer_cls = remat(AdaLNLayer) if self.remat else AdaLNLayer
    scan = nn.scan(
        lambda layer, x, c, keys: (layer(x, c, keys), None), length=self.num_layers,
        in_axes=(nn.broadcast, 0), variable_axes={"params": 0}, split_rngs={"params": True},
        unroll=min(self.unroll, self.num_layers))
    layers = layer_cls(num_heads=self.num_heads, mlp_ratio=self.mlp_ratio, dtype=self.dtype,
                       dropout=self.dropout, name="layers",
                       attend=functools.partial(attend, kernel=self.attention, remat=self.remat))
    if keys is not None and self.dropout:
      keys = jax.vmap(fold_in, (None, 0))(keys, jnp.arange(self.num_layers))
    else:
      keys = None
    return scan(layers, x, c, keys)[0]


def fold_in(keys: jax.Array, number: jax.typing.ArrayLike) -> jax.Array:
  """New keys (N,) of keys (N,) and one number."""
  return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def dropout(x: jax.Array, keys: jax.Array, rate: float) -> jax.Array:
  """Zeroes `rate` of x (N, T, D), and scales the rest so that the mean stays.

  keys (N,): typed, and threefry's: others make a batch of masks from its first key.
  """
  draw = lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:])
  return jnp.where(jax.vmap(draw)(keys), x / (1 - rate), 0)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
  """LayerNorm (no parameters, float32 statistics), scaled and shifted. x (N, T, D)."""
  dtype = x.dtype
  x = x.astype(jnp.float32)
  x = x - x.mean(-1, keepdims=True)
  x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
  return x.astype(dtype) * (1 + scale[:, None]) + shift[:, None]


def rms_norm(x: jax.Array) -> jax.Array:
  """RMSNorm (arXiv 1910.07467; no parameters, float32 statistics) over the last axis."""
  mean_square = jnp.square(x.astype(jnp.float32)).mean(-1, keepdims=True)
  return (x * jax.lax.rsqrt(mean_square + 1e-6)).astype(x.dtype)


def sincos_positions(height: int, width: int, features: int) -> np.ndarray:
  """Fixed 2-D positions, half the features for each axis. (height * width, features)."""
  frequencies = 1 / 10000 ** (np.arange(features // 4) / (features // 4))
  def axis(positions):
    angles = positions.reshape(-1, 1) * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
  rows, columns = np.mgrid[:height, :width]
  return np.concatenate([axis(columns), axis(rows)], axis=1).astype(np.float32)


def check_heads(width: int, num_heads: int):
  """Raises ValueError where attention cannot split a width among its heads."""
  if width % 4 or width % num_heads:
    raise ValueError(f"model.width={width}: must be a multiple of 4 and of "
                     f"model.num_heads={num_heads}")


def check_mlp(width: int, mlp_ratio: float):
  """Raises ValueError where the MLP would have nothing inside."""
  if width * mlp_ratio < 1:
    raise ValueError(f"model.mlp_ratio={mlp_ratio:g}: leaves the MLP no hidden feature")
