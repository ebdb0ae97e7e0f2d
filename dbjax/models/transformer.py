"""Transformer layers with adaLN-zero conditioning (DiT, arXiv 2212.09748, section 3.2)."""

from collections.abc import Callable
import functools
from typing import Annotated, Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dbjax.fields import above
from dbjax.fields import FREE
from dbjax.fields import one_of
from dbjax.models import positions as positions_lib
from dbjax.models.attention import attend
from dbjax.models.dense import Dense
from dbjax.models.dense import zeros

# What networks have in common: their fields in a config.
Layers = Annotated[int, above(0), "layers of all blocks together"]
Width = Annotated[int, above(0), "features of a token"]
Heads = Annotated[int, above(0), "of attention"]
Ratio = Annotated[float, above(0), "hidden features of the MLP over width"]
Remat = Annotated[bool, FREE, "recompute activations in the backward pass"]
Unroll = Annotated[int, above(0), FREE, "layers per iteration of the loop; on CPU all, on TPU 1"]

# What a layer is made of: the first of each is DiT's.
Norm = Annotated[str, one_of("layer", "rms"), "of a layer's inputs: LayerNorm or RMSNorm"]
Hidden = Annotated[str, one_of("gelu", "swiglu"), "the MLP's; swiglu at equal compute"]
QKNorm = Annotated[bool, "RMSNorm of queries and keys, with weights"]
Rotary = Annotated[str, one_of("none", "fixed", "learned"),
                   "queries and keys are turned by their row and column; frequencies"]
# How the level of noise is embedded.
Noise = Annotated[str, one_of("sinusoids", "line"), "the level's embedding: an MLP, or a line"]

_NOISE_FEATURES = 256


class Form(NamedTuple):
  """What a layer is made of, by the fields above; LightningDiT (arXiv 2501.01423) has the second
  of each.
  """

  norm: str = "layer"
  mlp: str = "gelu"
  qk_norm: bool = False
  rotary: str = "none"


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


class NoiseLine(nn.Module):
  """start + c_noise slope: one vector for a level of noise. (N,) float32 -> (N, width).

  A step of Adam changes this vector by about the rate, but what an MLP makes of 256 sinusoids by
  many times the rate.
  """

  width: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, c_noise: jax.Array) -> jax.Array:
    start = self.param("start", nn.initializers.normal(0.02), (self.width,))
    slope = self.param("slope", zeros, (self.width,))
    return (start + c_noise[:, None] * slope).astype(self.dtype)


NOISES = {"sinusoids": NoiseEmbedding, "line": NoiseLine}


def sinusoids(c_noise: jax.Array) -> jax.Array:
  """What `NoiseEmbedding` sees of c_noise: (N,) float32 -> (N, 256)."""
  angles = c_noise[:, None] * np.geomspace(1, 100, _NOISE_FEATURES // 2, dtype=np.float32)
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Attention(nn.Module):
  """Multi-head self-attention without a mask. (N, T, D) -> (N, T, D).

  Attributes:
    attend: q, k, v (N, T, H, d) -> (N, T, H, d).
    qk_norm: RMSNorm of each head's queries and keys, with weights (arXiv 2302.05442 has LayerNorm).
    rotary: "fixed": queries and keys are turned by their row and column (RoPE-Axial of arXiv
      2403.13298); "learned": by frequencies of each head's own, which begin as those (its
      RoPE-Mixed); or "none".

  Call: x (N, T, D), places (T, 2) or None: see `positions.grid`.
  """

  num_heads: int
  dtype: Any = jnp.float32
  attend: Callable = attend
  qk_norm: bool = False
  rotary: str = "none"

  @nn.compact
  def __call__(self, x: jax.Array, places: np.ndarray | None = None) -> jax.Array:
    n, t, d = x.shape
    qkv = Dense(3 * d, dtype=self.dtype, name="qkv")(x)
    q, k, v = jnp.moveaxis(qkv.reshape(n, t, 3, self.num_heads, d // self.num_heads), 2, 0)
    if self.qk_norm:
      q, k = norm_heads(q, "q_norm"), norm_heads(k, "k_norm")
    if self.rotary != "none":
      frequencies = positions_lib.axial(self.num_heads, d // self.num_heads)
      if self.rotary == "learned":
        frequencies = self.param("frequencies", lambda key: jnp.asarray(frequencies))
      angles = jnp.einsum("ta,ahf->thf", places, frequencies)
      q, k = positions_lib.rotate(q, angles), positions_lib.rotate(k, angles)
    return Dense(d, dtype=self.dtype, name="out")(self.attend(q, k, v).reshape(n, t, d))


def norm_heads(x: jax.Array, name: str) -> jax.Array:
  """RMSNorm over the features of a head, float32 statistics, weights (d,) called `name`."""
  return nn.RMSNorm(dtype=x.dtype, name=name)(x)


class MLP(nn.Module):
  """Dense, GELU (tanh), Dense. (N, T, D) -> (N, T, D)."""

  ratio: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    hidden = Dense(int(x.shape[-1] * self.ratio), dtype=self.dtype, name="hidden")(x)
    return Dense(x.shape[-1], dtype=self.dtype, name="out")(nn.gelu(hidden, approximate=True))


class SwiGLU(nn.Module):
  """out(silu(gate(x)) * up(x)) (arXiv 2002.05202). (N, L, D) -> (N, L, D).

  The width between is D * ratio, to the next multiple of 32, so that it divides (Llama-2: 256).
  """

  ratio: float
  dtype: Any = jnp.float32
  dense: Any = Dense

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    hidden = -(-int(x.shape[-1] * self.ratio) // 32) * 32
    gate, up = jnp.split(self.dense(2 * hidden, dtype=self.dtype, name="hidden")(x), 2, axis=-1)
    return self.dense(x.shape[-1], dtype=self.dtype, name="out")(nn.silu(gate) * up)


def make_mlp(form: Form, ratio: float, dtype: Any) -> nn.Module:
  """The MLP of a form, of about equal cost: SwiGLU has three matrices where the other has two."""
  return SwiGLU(2 / 3 * ratio, dtype, name="mlp") if form.mlp == "swiglu" else MLP(
      ratio, dtype, name="mlp")


class AdaLNLayer(nn.Module):
  """One transformer layer: attention and MLP, each scaled, shifted and gated by c.

  The gates start at 0, so that a new layer is the identity.

  Call: x (N, T, D), c (N, D), keys (N,) of dropout or None, places of `Attention` -> x (N, T, D).
  """

  num_heads: int
  mlp_ratio: float
  dtype: Any = jnp.float32
  attend: Callable = attend  # of `Attention`
  dropout: float = 0.0
  form: Form = Form()

  @nn.compact
  def __call__(self, x: jax.Array, c: jax.Array, keys: jax.Array | None = None,
               places: np.ndarray | None = None) -> jax.Array:
    form = self.form
    attention = Attention(self.num_heads, self.dtype, self.attend, form.qk_norm, form.rotary,
                          name="attention")
    mlp = make_mlp(form, self.mlp_ratio, self.dtype)
    modulation = Dense(6 * x.shape[-1], zeros, self.dtype, name="modulation")(nn.silu(c))
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation, 6, axis=-1)
    drop = lambda x, place: x
    if keys is not None:
      drop = lambda x, place: dropout(x, fold_in(keys, place), self.dropout)
    x = x + gate_a[:, None] * drop(
        attention(modulate(x, shift_a, scale_a, form.norm), places), 0)
    return x + gate_m[:, None] * drop(mlp(modulate(x, shift_m, scale_m, form.norm)), 1)


class Stack(nn.Module):
  """`num_layers` AdaLNLayers as one scanned axis: compile time does not grow with depth.

  Attributes:
    remat: recompute a layer's activations in the backward pass; attention's weights when
      their turn comes, or they would be held while the MLP's gradients are computed.
    unroll: layers per iteration of the scan. On CPU scanning costs a third more
      than unrolling (copies of stacked weights); on TPU 1 compiles fastest.
    attention: see `attention.Kernel`.
    dropout: the fraction of each branch's outputs that is zeroed, where there are keys.
    form: what a layer is made of.
    places: (T, 2) of the tokens, where the form is rotary: see `positions.grid`.

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
  form: Form = Form()
  places: np.ndarray | None = None

  @nn.compact
  def __call__(self, x: jax.Array, c: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    # Without a loop around it, CSE would undo the recomputation.
    remat = functools.partial(nn.remat, prevent_cse=self.unroll > 1)
    layer_cls = remat(AdaLNLayer) if self.remat else AdaLNLayer
    scan = nn.scan(
        lambda layer, x, c, keys: (layer(x, c, keys, self.places), None), length=self.num_layers,
        in_axes=(nn.broadcast, 0), variable_axes={"params": 0}, split_rngs={"params": True},
        unroll=min(self.unroll, self.num_layers))
    layers = layer_cls(num_heads=self.num_heads, mlp_ratio=self.mlp_ratio, dtype=self.dtype,
                       dropout=self.dropout, form=self.form, name="layers",
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


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array, norm: str = "layer") -> jax.Array:
  """x (N, T, D), normalised without parameters, then scaled and shifted by (N, D)."""
  return _NORMS[norm](x) * (1 + scale[:, None]) + shift[:, None]


def layer_norm(x: jax.Array) -> jax.Array:
  """LayerNorm (no parameters, float32 statistics) over the last axis."""
  dtype = x.dtype
  x = x.astype(jnp.float32)
  x = x - x.mean(-1, keepdims=True)
  return (x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)).astype(dtype)


def rms_norm(x: jax.Array) -> jax.Array:
  """RMSNorm (arXiv 1910.07467; no parameters, float32 statistics) over the last axis."""
  mean_square = jnp.square(x.astype(jnp.float32)).mean(-1, keepdims=True)
  return (x * jax.lax.rsqrt(mean_square + 1e-6)).astype(x.dtype)


_NORMS = {"layer": layer_norm, "rms": rms_norm}


def check_heads(width: int, num_heads: int):
  """Raises ValueError where attention cannot split a width among its heads."""
  if width % 4 or width % num_heads:
    raise ValueError(f"model.width={width}: must be a multiple of 4 and of "
                     f"model.num_heads={num_heads}")


def check_form(width: int, num_heads: int, rotary: str, positions: str):
  """Raises ValueError where tokens of an image would not know, or cannot be told, their places."""
  if rotary == positions == "none":
    raise ValueError("model.positions=none: with model.rotary=none no token knows its place: set "
                     "model.positions=sincos, or model.rotary=fixed")
  if rotary != "none" and width // num_heads % 4:
    raise ValueError(f"model.width={width} with model.num_heads={num_heads}: the width of a head "
                     f"must be a multiple of 4, for model.rotary={rotary}")


def check_mlp(width: int, mlp_ratio: float, mlp: str = "gelu"):
  """Raises ValueError where the MLP, as `make_mlp` makes it, would have nothing inside."""
  if width * (2 / 3 * mlp_ratio if mlp == "swiglu" else mlp_ratio) < 1:
    raise ValueError(f"model.mlp_ratio={mlp_ratio:g}: leaves the MLP no hidden feature")
