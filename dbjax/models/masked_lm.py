"""The network of masked diffusion (MD4, arXiv 2406.04329): a DiT over tokens.

One instance is one self-contained block: its own token embedding, layers and read-out.
"""

from collections.abc import Callable
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from dbjax.models.attention import attend
from dbjax.models.attention import Kernel
from dbjax.models.dense import Dense
from dbjax.models.dense import Embed
from dbjax.models.dense import zeros
from dbjax.models.rotary import check_rotary
from dbjax.models.rotary import RotaryAttention
from dbjax.models.transformer import check_mlp
from dbjax.models.transformer import Form
from dbjax.models.transformer import Heads
from dbjax.models.transformer import Hidden
from dbjax.models.transformer import Layers
from dbjax.models.transformer import make_mlp
from dbjax.models.transformer import modulate
from dbjax.models.transformer import Noise
from dbjax.models.transformer import NOISES
from dbjax.models.transformer import Norm
from dbjax.models.transformer import QKNorm
from dbjax.models.transformer import Ratio
from dbjax.models.transformer import Remat
from dbjax.models.transformer import Unroll
from dbjax.models.transformer import Width
from dbjax.network import stack

normal = nn.initializers.normal(0.02)


class MaskedLM(nn.Module):
  """Logits of all tokens from those that are not masked.

  Attributes:
    num_layers, width, num_heads, mlp_ratio: of the transformer; width / num_heads is even.
    vocab_size: V. Tokens run from 0 to V - 1; V itself is the mask.
    norm, mlp, qk_norm: what a layer is made of: see `transformer.Form`.
    noise: how the level of noise is embedded, one of `transformer.NOISES`.
    dtype: of the compute; parameters, softmax and logits are float32.
    remat, unroll, attention: see `transformer.Stack`.

  Call: tokens (N, L) int, c_noise (N,), segment (N, L) int -> (N, L, V) float32.
  """

  num_layers: Layers
  width: Width
  num_heads: Heads
  vocab_size: int
  mlp_ratio: Ratio = 4.0
  norm: Norm = "layer"
  mlp: Hidden = "gelu"
  qk_norm: QKNorm = False
  noise: Noise = "sinusoids"
  dtype: Any = jnp.float32
  remat: Remat = False
  unroll: Unroll = 1
  attention: Kernel = "auto"

  parts = dict(layers="stack", embedding="token_embedding", head="read_out")

  def check(self):
    """Raises ValueError where the numbers do not go together."""
    check_rotary(self.width, self.num_heads)
    check_mlp(self.width, self.mlp_ratio, self.mlp)

  @nn.compact
  def __call__(self, tokens: jax.Array, c_noise: jax.Array, segment: jax.Array) -> jax.Array:
    x = Embed(self.vocab_size + 1, self.width, dtype=self.dtype, embedding_init=normal,
                 name="token_embedding")(tokens)
    form = Form(self.norm, self.mlp, self.qk_norm)
    c = NOISES[self.noise](self.width, dtype=self.dtype, name="noise_embedding")(c_noise)
    x = MaskedStack(num_layers=self.num_layers, num_heads=self.num_heads, mlp_ratio=self.mlp_ratio,
                    dtype=self.dtype, remat=self.remat, unroll=self.unroll,
                    attention=self.attention, form=form, name="stack")(x, c, segment)
    shift, scale = jnp.split(
        Dense(2 * self.width, zeros, self.dtype, name="modulation")(nn.silu(c)), 2, axis=-1)
    # Whatever the dtype: a rounding of logits would be one of the loss.
    return Dense(self.vocab_size, zeros, name="read_out")(
        modulate(x, shift, scale, self.norm))


class MaskedStack(nn.Module):
  """`num_layers` MaskedLayers as one scanned axis; see `transformer.Stack`."""

  num_layers: int
  num_heads: int
  mlp_ratio: float
  dtype: Any = jnp.float32
  remat: bool = False
  unroll: int = 1
  attention: str = "auto"
  form: Form = Form()

  @nn.compact
  def __call__(self, x: jax.Array, c: jax.Array, segment: jax.Array) -> jax.Array:
    layer = functools.partial(
        MaskedLayer, num_heads=self.num_heads, mlp_ratio=self.mlp_ratio, dtype=self.dtype,
        form=self.form, attend=functools.partial(attend, kernel=self.attention, remat=self.remat))
    return stack(layer, self.num_layers, remat=self.remat, unroll=self.unroll)(x, c, segment)


class MaskedLayer(nn.Module):
  """`transformer.AdaLNLayer` with rotary positions and segments.

  Call: x (N, L, D), c (N, D), segment (N, L) -> x (N, L, D).
  """

  num_heads: int
  mlp_ratio: float
  dtype: Any = jnp.float32
  attend: Callable = attend
  form: Form = Form()

  @nn.compact
  def __call__(self, x: jax.Array, c: jax.Array, segment: jax.Array) -> jax.Array:
    form = self.form
    attention = RotaryAttention(self.num_heads, self.dtype, qk_norm=form.qk_norm, name="attention")
    mlp = make_mlp(form, self.mlp_ratio, self.dtype)
    modulation = Dense(6 * x.shape[-1], zeros, self.dtype, name="modulation")(nn.silu(c))
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation, 6, axis=-1)
    out, _ = attention(modulate(x, shift_a, scale_a, form.norm), jnp.arange(x.shape[1]),
                       functools.partial(self.attend, segment=segment))
    x = x + gate_a[:, None] * out
    return x + gate_m[:, None] * mlp(modulate(x, shift_m, scale_m, form.norm))
