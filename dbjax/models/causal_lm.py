"""Next-token networks: Llama-2 (arXiv 2307.09288), conditioned on noise.

One instance is one self-contained block: its own token embedding, layers and read-out.

`CausalLM` (and `recurrent_lm.RecurrentLM`) carry two streams through the same weights: the
tokens before each position, and the same with noised embeddings of the very tokens to be predicted.

    clean position i sees clean j <= i;    noisy position i sees clean j < i, and itself

Clean position i knows what noisy position i knows without its noise, so its place in the scores is
free, and holds the score of the noisy position with itself: both streams have L x L scores under
the same causal mask, where one sequence of clean and noisy positions would have 2L x 2L.
For the same reason a query of a cache is a step that writes itself into the next free place,
and forgets it. Without noise the streams would be equal, and in `CausalLM` the plain network: what
serves one serves the other.
"""

from collections.abc import Callable
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from dbjax.models.attention import attend
from dbjax.models.attention import attend_to_others
from dbjax.models.attention import Kernel
from dbjax.models.dense import Dense
from dbjax.models.dense import Embed
from dbjax.models.dense import Linear
from dbjax.models.dense import zeros
from dbjax.models.rotary import check_rotary
from dbjax.models.rotary import RotaryAttention
from dbjax.models.transformer import check_mlp
from dbjax.models.transformer import Heads
from dbjax.models.transformer import Layers
from dbjax.models.transformer import Ratio
from dbjax.models.transformer import Remat
from dbjax.models.transformer import rms_norm
from dbjax.models.transformer import SwiGLU
from dbjax.models.transformer import Unroll
from dbjax.models.transformer import Width

normal = nn.initializers.normal(0.02)
Cache = dict[str, Any]


class TwoStreams(nn.Module):
  """What `CausalLM` and `recurrent_lm.RecurrentLM` have in common: everything but the layers."""

  def check(self):
    """Raises ValueError where the numbers do not go together."""
    check_rotary(self.width, self.num_heads)
    check_mlp(self.width, self.mlp_ratio)

  def _set_up_ends(self):
    # Row V is the beginning of a segment.
    self.token_embedding = Embed(self.vocab_size + 1, self.width, dtype=self.dtype,
                                    embedding_init=normal)
    # Noise of unit variance would drown the embeddings, whose scale is 0.02.
    self.noisy_embedding = Dense(self.width, zeros, self.dtype)
    # Conditioning: clean + level c_noise, in each feature. Adam moves these by the rate, but what
    # an MLP makes of sinusoids by the rate times their number, and all that it modulates.
    self.clean = self.param("clean", normal, (self.width,))
    self.level = Linear(self.width, zeros)
    self.modulation = Dense(2 * self.width, zeros, self.dtype)
    self.read_out = Dense(self.vocab_size, zeros)

  def _stack(self, num_layers: int) -> "CausalStack":
    return CausalStack(num_layers=num_layers, num_heads=self.num_heads, mlp_ratio=self.mlp_ratio,
                       dtype=self.dtype, remat=self.remat, unroll=self.unroll,
                       attention=self.attention)

  def _noisy(self, noisy: jax.Array, c_noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(N, L, E), (N, L) -> what noise adds to the stream (N, L, D), and its conditioning."""
    if noisy.shape[-1] != self.embedding_width:
      raise ValueError(f"noisy has shape {noisy.shape}: expected (..., {self.embedding_width})")
    c = self.clean + self.level(c_noise[..., None])
    return self.noisy_embedding(noisy.astype(self.dtype)), c.astype(self.dtype)

  def _clean(self) -> jax.Array:
    """The conditioning of clean positions, (1, 1, D): no level of noise."""
    return self.clean.astype(self.dtype)[None, None]

  def _previous(self, tokens: jax.Array, segment: jax.Array) -> jax.Array:
    """For each position the token before it, or V where a segment begins. (N, L)."""
    begins = jnp.diff(segment, axis=1, prepend=segment[:, :1] - 1) != 0
    return jnp.where(begins, self.vocab_size, jnp.roll(tokens, 1, axis=1))

  def _logits(self, x: jax.Array, c: jax.Array) -> jax.Array:
    shift, scale = jnp.split(self.modulation(nn.silu(c)), 2, axis=-1)
    return self.read_out(rms_norm(x) * (1 + scale) + shift)


class CausalLM(TwoStreams):
  """Logits of a token from its noised embedding and the clean tokens before it.

  Attributes:
    num_layers, width, num_heads: of the transformer; width / num_heads is even.
    vocab_size: V. Tokens run from 0 to V - 1; V itself is the beginning.
    embedding_width: E, of the space in which tokens are noised.
    mlp_ratio: see `transformer.SwiGLU`.
    dtype: of the compute; parameters, softmax and logits are float32.
    remat: see `transformer.Stack`.
    unroll: the same. The clean stream has no use for the output of its last layer; where all
      layers are unrolled, XLA leaves it out, but not in training: its gradient of zeros is used.
    attention: see `attention.Kernel`.

  Call: tokens (N, L) int, noisy (N, L, E), c_noise (N, L), segment (N, L) int -> (N, L, V)
    float32. Position i of both streams begins with token i - 1; to the noisy one is added `noisy`,
    at position i the noised embedding OF token i. A c_noise (N, 1) is one level for a sequence,
    and cheaper: layers make their modulation once, not L times.
  """

  num_layers: Layers
  width: Width
  num_heads: Heads
  vocab_size: int
  embedding_width: int
  mlp_ratio: Ratio = 8 / 3
  dtype: Any = jnp.float32
  remat: Remat = False
  unroll: Unroll = 1
  attention: Kernel = "auto"

  parts = dict(layers="stack", embedding="(token|noisy)_embedding", head="read_out")

  def setup(self):
    self._set_up_ends()
    self.stack = self._stack(self.num_layers)

  def __call__(self, tokens: jax.Array, noisy: jax.Array, c_noise: jax.Array,
               segment: jax.Array) -> jax.Array:
    x, c = self._noisy(noisy, c_noise)
    clean = self.token_embedding(self._previous(tokens, segment))
    x = self.stack.pair(clean, clean + x, self._clean(), c, segment)[1]
    return self._logits(x, c)

  def next_token(self, tokens: jax.Array, segment: jax.Array) -> jax.Array:
    """The plain autoregressive network: logits of token i from j < i. (N, L) -> (N, L, V)."""
    x = self.token_embedding(self._previous(tokens, segment))
    return self._logits(self.stack(x, self._clean(), segment), self._clean())

  def empty_cache(self, batch: int, length: int) -> Cache:
    """Room for keys and values, and the token before: none, at first."""
    return dict(layers=empty_cache(self, self.num_layers, batch, length),
                previous=jnp.full(batch, self.vocab_size))

  def append(self, tokens: jax.Array, cache: Cache, position: jax.Array) -> Cache:
    """Adds the clean `position` (), int, and its token for the next. tokens (N,) -> the cache."""
    x = self.token_embedding(cache["previous"][:, None])
    return dict(layers=self.stack.cached(x, self._clean(), cache["layers"], position)[1],
                previous=tokens)

  def query(self, noisy: jax.Array, c_noise: jax.Array, cache: Cache,
            position: jax.Array) -> jax.Array:
    """Logits at `position` (), where all before it are in the cache.

    noisy (N, E), c_noise (N,) -> (N, V).
    """
    x, c = self._noisy(noisy[:, None], c_noise[:, None])
    x += self.token_embedding(cache["previous"][:, None])
    return self._logits(self.stack.cached(x, c, cache["layers"], position)[0], c)[:, 0]

  def query_next(self, tokens: jax.Array, cache: Cache,
                 position: jax.Array) -> tuple[jax.Array, Cache]:
    """`next_token` at `position` (): the token before it (N,), V at 0 -> logits (N, V), cache."""
    x = self.token_embedding(tokens[:, None])
    x, layers = self.stack.cached(x, self._clean(), cache["layers"], position)
    return self._logits(x, self._clean())[:, 0], cache | dict(layers=layers)


class CausalStack(nn.Module):
  """`num_layers` CausalLayers as one scanned axis, in three uses; see `transformer.Stack`."""

  num_layers: int
  num_heads: int
  mlp_ratio: float
  dtype: Any = jnp.float32
  remat: bool = False
  unroll: int = 1
  attention: str = "auto"

  def setup(self):
    self.layers = CausalLayer(num_heads=self.num_heads, mlp_ratio=self.mlp_ratio,
                              dtype=self.dtype)

  def _scan(self, step: Callable, carry: Any, per_layer: Any, *args) -> tuple[Any, Any]:
    if self.remat:  # without a loop around it, CSE would undo the recomputation
      step = nn.remat(step, prevent_cse=self.unroll > 1)
    scan = nn.scan(
        step, length=self.num_layers, in_axes=(0, *[nn.broadcast] * len(args)),
        variable_axes={"params": 0}, split_rngs={"params": True},
        unroll=min(self.unroll, self.num_layers))
    return scan(self.layers, carry, per_layer, *args)

  def __call__(self, x: jax.Array, c: jax.Array, segment: jax.Array) -> jax.Array:
    """The clean stream alone. x (N, L, D), c (1, 1, D), segment (N, L) -> x."""

    def step(layer, x, _, c, segment):
      return layer(x, c, jnp.arange(x.shape[1]), self._among(segment))[0], None

    return self._scan(step, x, None, c, segment)[0]

  def pair(self, clean: jax.Array, noisy: jax.Array, c_clean: jax.Array, c_noisy: jax.Array,
           segment: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both streams (N, L, D). c_clean (1, 1, D), c_noisy (N, L or 1, D), segment (N, L)."""

    def step(layer, streams, _, c_clean, c_noisy, segment):
      clean, noisy = streams
      positions = jnp.arange(clean.shape[1])
      clean, (k, v) = layer(clean, c_clean, positions, self._among(segment))
      to_clean = lambda q, own_k, own_v: attend_to_others(
          q, own_k, own_v, k, v, segment=segment, kernel=self.attention, remat=self.remat)
      return (clean, layer(noisy, c_noisy, positions, to_clean)[0]), None

    return self._scan(step, (clean, noisy), None, c_clean, c_noisy, segment)[0]

  def _among(self, segment: jax.Array) -> Callable:
    """How a clean stream attends: to what comes before in the same segment."""
    return functools.partial(attend, segment=segment, causal=True, kernel=self.attention,
                             remat=self.remat)

  def cached(self, x: jax.Array, c: jax.Array, cache: Cache,
             position: jax.Array | int) -> tuple[jax.Array, Cache]:
    """One position, which sees those before it. x (N, 1, D) -> x, the cache with x's own."""

    def step(layer, x, cache, c, position):
      keep = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, position, axis=1)
      seen = jnp.arange(cache["k"].shape[1]) <= position

      def attend(q, k, v):
        return jax.nn.dot_product_attention(
            q, keep(cache["k"], k), keep(cache["v"], v), mask=seen[None, None, None])

      x, (k, v) = layer(x, c, position[None], attend)
      return x, dict(k=keep(cache["k"], k), v=keep(cache["v"], v))

    return self._scan(step, x, cache, c, jnp.asarray(position))


class CausalLayer(nn.Module):
  """Llama-2's layer (RMSNorm, rotary positions, SwiGLU, no biases), scaled, shifted, gated by c.

  The gates start at 0, so that a new layer is the identity. The norms need no weights of
  their own: biases of the modulation are those.

  Call: x (N, L, D), c (N or 1, L or 1, D), positions (L,), attend of `RotaryAttention` ->
    x (N, L, D), its keys and values.
  """

  num_heads: int
  mlp_ratio: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, c: jax.Array, positions: jax.Array,
               attend: Callable) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    attention = RotaryAttention(num_heads=self.num_heads, dtype=self.dtype, dense=Linear,
                                name="attention")
    mlp = SwiGLU(self.mlp_ratio, self.dtype, Linear, name="mlp")
    modulation = Dense(6 * x.shape[-1], zeros, self.dtype, name="modulation")(nn.silu(c))
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation, 6, axis=-1)
    out, kv = attention(rms_norm(x) * (1 + scale_a) + shift_a, positions, attend)
    x = x + gate_a * out
    return x + gate_m * mlp(rms_norm(x) * (1 + scale_m) + shift_m), kv


def empty_cache(model: nn.Module, num_layers: int, batch: int, length: int) -> Cache:
  """Room for the keys and values of `num_layers` layers of a model."""
  shape = (num_layers, batch, length, model.num_heads, model.width // model.num_heads)
  return dict(k=jnp.zeros(shape, model.dtype), v=jnp.zeros(shape, model.dtype))
