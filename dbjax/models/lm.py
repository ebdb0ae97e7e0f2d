"""Language models: a DiT over tokens, Llama-2 (arXiv 2307.09288) and Huginn (arXiv 2502.05171),
conditioned on noise.

One instance is one self-contained block: its own token embedding, layers and read-out.

`MaskedLM` sees all of its segment. `CausalLM` and `RecurrentLM` carry two streams through the
same weights: the tokens before each position, and the same with noised embeddings of the very
tokens to be predicted.

    clean position i sees clean j <= i;    noisy position i sees clean j < i, and itself

Clean position i knows what noisy position i knows without its noise, so its place in the scores is
free, and holds the score of the noisy position with itself: both streams have L x L scores under
the same causal mask, where one sequence of clean and noisy positions would have 2L x 2L.
For the same reason a query of a cache is a step that writes itself into the next free place,
and forgets it. Without noise the streams would be equal, and in `CausalLM` the plain network: what
serves one serves the other.

A segment is a run of equal numbers in `segment` (N, L): one of several texts in a row. None sees
another. Positions are rotary (arXiv 2104.09864), so that a text may begin anywhere.
"""

from collections.abc import Callable
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dbjax.models.transformer import Dense
from dbjax.models.transformer import MLP
from dbjax.models.transformer import modulate
from dbjax.models.transformer import NoiseEmbedding
from dbjax.models.transformer import zeros

normal = nn.initializers.normal(0.02)
Cache = dict[str, Any]
Linear = functools.partial(Dense, use_bias=False)


class MaskedLM(nn.Module):
  """Logits of all tokens from those that are not masked.

  Attributes:
    num_layers, width, num_heads, mlp_ratio: of the transformer; width / num_heads is even.
    vocab_size: V. Tokens run from 0 to V - 1; V itself is the mask.
    dtype: of the compute; parameters, softmax and logits are float32.
    remat, unroll: see `transformer.Stack`.

  Call: tokens (N, L) int, c_noise (N,), segment (N, L) int -> (N, L, V) float32.
  """

  num_layers: int
  width: int
  num_heads: int
  vocab_size: int
  mlp_ratio: float = 4.0
  dtype: Any = jnp.float32
  remat: bool = False
  unroll: int = 1

  @nn.compact
  def __call__(self, tokens: jax.Array, c_noise: jax.Array, segment: jax.Array) -> jax.Array:
    x = nn.Embed(self.vocab_size + 1, self.width, dtype=self.dtype, embedding_init=normal,
                 name="token_embedding")(tokens)
    c = NoiseEmbedding(self.width, dtype=self.dtype, name="noise_embedding")(c_noise)
    x = MaskedStack(self.num_layers, self.num_heads, self.mlp_ratio, self.dtype, self.remat,
                    self.unroll, name="stack")(x, c, same_segment(segment))
    shift, scale = jnp.split(
        Dense(2 * self.width, zeros, self.dtype, name="modulation")(nn.silu(c)), 2, axis=-1)
    # Whatever the dtype: a rounding of logits would be one of the loss.
    return Dense(self.vocab_size, zeros, name="read_out")(modulate(x, shift, scale))


class TwoStreams(nn.Module):
  """What `CausalLM` and `RecurrentLM` have in common: everything but the layers."""

  def _set_up_ends(self):
    # Row V is the beginning of a segment.
    self.token_embedding = nn.Embed(self.vocab_size + 1, self.width, dtype=self.dtype,
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
    return CausalStack(num_layers, self.num_heads, self.mlp_ratio, self.dtype, self.remat,
                       self.unroll)

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
    mlp_ratio: see `SwiGLU`.
    dtype: of the compute; parameters, softmax and logits are float32.
    remat: see `transformer.Stack`.
    unroll: the same. The clean stream has no use for the output of its last layer; where all
      layers are unrolled, XLA leaves it out.

  Call: tokens (N, L) int, noisy (N, L, E), c_noise (N, L), segment (N, L) int -> (N, L, V)
    float32. Position i of both streams begins with token i - 1; to the noisy one is added `noisy`,
    at position i the noised embedding OF token i. A c_noise (N, 1) is one level for a sequence,
    and cheaper: layers make their modulation once, not L times.
  """

  num_layers: int
  width: int
  num_heads: int
  vocab_size: int
  embedding_width: int
  mlp_ratio: float = 8 / 3
  dtype: Any = jnp.float32
  remat: bool = False
  unroll: int = 1

  def setup(self):
    self._set_up_ends()
    self.stack = self._stack(self.num_layers)

  def __call__(self, tokens: jax.Array, noisy: jax.Array, c_noise: jax.Array,
               segment: jax.Array) -> jax.Array:
    x, c = self._noisy(noisy, c_noise)
    clean = self.token_embedding(self._previous(tokens, segment))
    x = self.stack.pair(clean, clean + x, self._clean(), c, causal(segment))[1]
    return self._logits(x, c)

  def next_token(self, tokens: jax.Array, segment: jax.Array) -> jax.Array:
    """The plain autoregressive network: logits of token i from j < i. (N, L) -> (N, L, V)."""
    x = self.token_embedding(self._previous(tokens, segment))
    return self._logits(self.stack(x, self._clean(), causal(segment)), self._clean())

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


class RecurrentLM(TwoStreams):
  """Huginn: a prelude makes a context of clean tokens, a core improves a state with it, a coda
  reads the state.

  As a denoiser the core runs once: the state is the noised embedding, and the levels of noise are
  the iterations. The context of position i is the prelude's at token i - 1; the state of a clean
  position is 0. The plain network is `iterate`.

  Attributes:
    prelude, core, coda: numbers of layers.
    others: see `CausalLM`.

  Call: as of `CausalLM`.
  """

  prelude: int
  core: int
  coda: int
  width: int
  num_heads: int
  vocab_size: int
  embedding_width: int
  mlp_ratio: float = 8 / 3
  dtype: Any = jnp.float32
  remat: bool = False
  unroll: int = 1

  @property
  def num_layers(self) -> int:
    """Of all three."""
    return self.prelude + self.core + self.coda

  def setup(self):
    self._set_up_ends()
    self.adapter = Linear(self.width, dtype=self.dtype)
    self.stack = dict(prelude=self._stack(self.prelude), core=self._stack(self.core),
                      coda=self._stack(self.coda))

  def __call__(self, tokens: jax.Array, noisy: jax.Array, c_noise: jax.Array,
               segment: jax.Array) -> jax.Array:
    x, c = self._noisy(noisy, c_noise)
    mask, c_clean = causal(segment), self._clean()
    context = self._context(tokens, segment, mask)
    clean, x = self.stack["core"].pair(self._adapt(context, jnp.zeros_like(x)),
                                       self._adapt(context, x), c_clean, c, mask)
    return self._logits(
        self.stack["coda"].pair(rms_norm(clean), rms_norm(x), c_clean, c, mask)[1], c)

  def iterate(self, tokens: jax.Array, segment: jax.Array, state: jax.Array,
              num_iterations: jax.Array, num_backprop: int) -> jax.Array:
    """The plain network: logits of token i from j < i, after some runs of the core.

    Args:
      tokens, segment: (N, L) int.
      state: (N, L, D), the first one: noise, in Huginn.
      num_iterations: (), may be traced.
      num_backprop: how many of the last ones gradients go through.

    Returns:
      (N, L, V) float32.
    """
    mask = causal(segment)
    context, state = self._context(tokens, segment, mask), state.astype(self.dtype)
    if self.is_initializing():
      self._improve(state, context, mask)  # inside JAX's loops no parameter can be made
    model, variables = self.unbind()
    improve = lambda state, variables, context: model.apply(variables, state, context, mask,
                                                            method="_improve")
    # A loop of unknown length has no gradient: nothing that has one may enter it.
    frozen = jax.lax.stop_gradient((variables, context))
    state = jax.lax.fori_loop(0, num_iterations - num_backprop, lambda _, s: improve(s, *frozen),
                              jax.lax.stop_gradient(state))
    step = lambda state, i: (
        jnp.where(i < num_iterations, improve(state, variables, context), state), None)
    state, _ = jax.lax.scan(step, state, jnp.arange(num_backprop))
    return self._logits(self.stack["coda"](state, self._clean(), mask), self._clean())

  def empty_cache(self, batch: int, length: int) -> Cache:
    """Room for keys and values, and the context of position 0: `apply` it with parameters."""
    cache = {name: empty_cache(self, layers, batch, length) for name, layers in
             (("prelude", self.prelude), ("core", self.core), ("coda", self.coda))}
    return self._look_back(jnp.full(batch, self.vocab_size), cache, 0)

  def append(self, tokens: jax.Array, cache: Cache, position: jax.Array) -> Cache:
    """Adds the clean `position` (), int, and its token for the next. tokens (N,) -> the cache."""
    nothing = jnp.zeros_like(cache["context"])
    return self._look_back(tokens, self._cached(nothing, self._clean(), cache, position)[1],
                           position + 1)

  def query(self, noisy: jax.Array, c_noise: jax.Array, cache: Cache,
            position: jax.Array) -> jax.Array:
    """Logits at `position` (), where all before it are in the cache.

    noisy (N, E), c_noise (N,) -> (N, V).
    """
    x, c = self._noisy(noisy[:, None], c_noise[:, None])
    return self._logits(self._cached(x, c, cache, position)[0], c)[:, 0]

  def _context(self, tokens: jax.Array, segment: jax.Array, mask: jax.Array) -> jax.Array:
    x = self.token_embedding(self._previous(tokens, segment))
    return self.stack["prelude"](x, self._clean(), mask)

  def _adapt(self, context: jax.Array, state: jax.Array) -> jax.Array:
    return self.adapter(jnp.concatenate([context, state], axis=-1))

  def _improve(self, state: jax.Array, context: jax.Array, mask: jax.Array) -> jax.Array:
    return rms_norm(self.stack["core"](self._adapt(context, state), self._clean(), mask))

  def _cached(self, state: jax.Array, c: jax.Array, cache: Cache,
              position: jax.Array) -> tuple[jax.Array, Cache]:
    """Core and coda at one position. state (N, 1, D)."""
    x = self._adapt(cache["context"], state)
    x, core = self.stack["core"].cached(x, c, cache["core"], position)
    x, coda = self.stack["coda"].cached(rms_norm(x), c, cache["coda"], position)
    return x, cache | dict(core=core, coda=coda)

  def _look_back(self, previous: jax.Array, cache: Cache, position: jax.Array) -> Cache:
    """The prelude at one position, from the token before it (N,)."""
    context, prelude = self.stack["prelude"].cached(
        self.token_embedding(previous[:, None]), self._clean(), cache["prelude"], position)
    return cache | dict(prelude=prelude, context=context)


class CausalStack(nn.Module):
  """`num_layers` CausalLayers as one scanned axis, in three uses; see `transformer.Stack`."""

  num_layers: int
  num_heads: int
  mlp_ratio: float
  dtype: Any = jnp.float32
  remat: bool = False
  unroll: int = 1

  def setup(self):
    self.layers = CausalLayer(self.num_heads, self.mlp_ratio, self.dtype, self.remat)

  def _scan(self, step: Callable, carry: Any, per_layer: Any, *args) -> tuple[Any, Any]:
    if self.remat:  # without a loop around it, CSE would undo the recomputation
      step = nn.remat(step, prevent_cse=self.unroll > 1)
    scan = nn.scan(
        step, length=self.num_layers, in_axes=(0, *[nn.broadcast] * len(args)),
        variable_axes={"params": 0}, split_rngs={"params": True},
        unroll=min(self.unroll, self.num_layers))
    return scan(self.layers, carry, per_layer, *args)

  def __call__(self, x: jax.Array, c: jax.Array, mask: jax.Array) -> jax.Array:
    """The clean stream alone. x (N, L, D), c (1, 1, D), mask (N, 1, L, L) -> x."""

    def step(layer, x, _, c, mask):
      attend = functools.partial(jax.nn.dot_product_attention, mask=mask)
      return layer(x, c, jnp.arange(x.shape[1]), attend)[0], None

    return self._scan(step, x, None, c, mask)[0]

  def pair(self, clean: jax.Array, noisy: jax.Array, c_clean: jax.Array, c_noisy: jax.Array,
           mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both streams (N, L, D). c_clean (1, 1, D), c_noisy (N, L or 1, D), mask (N, 1, L, L)."""

    def step(layer, streams, _, c_clean, c_noisy, mask):
      clean, noisy = streams
      positions = jnp.arange(clean.shape[1])
      attend = functools.partial(jax.nn.dot_product_attention, mask=mask)
      clean, (k, v) = layer(clean, c_clean, positions, attend)
      attend = lambda *own: attend_to_others(*own, k, v, mask)
      return (clean, layer(noisy, c_noisy, positions, attend)[0]), None

    return self._scan(step, (clean, noisy), None, c_clean, c_noisy, mask)[0]

  def cached(self, x: jax.Array, c: jax.Array, cache: Cache,
             position: jax.Array) -> tuple[jax.Array, Cache]:
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
  remat: bool = False  # of attention

  @nn.compact
  def __call__(self, x: jax.Array, c: jax.Array, positions: jax.Array,
               attend: Callable) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    attention = RotaryAttention(self.num_heads, self.dtype, self.remat, Linear, name="attention")
    mlp = SwiGLU(self.mlp_ratio, self.dtype, name="mlp")
    modulation = Dense(6 * x.shape[-1], zeros, self.dtype, name="modulation")(nn.silu(c))
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation, 6, axis=-1)
    out, kv = attention(rms_norm(x) * (1 + scale_a) + shift_a, positions, attend)
    x = x + gate_a * out
    return x + gate_m * mlp(rms_norm(x) * (1 + scale_m) + shift_m), kv


class MaskedStack(nn.Module):
  """`num_layers` MaskedLayers as one scanned axis; see `transformer.Stack`."""

  num_layers: int
  num_heads: int
  mlp_ratio: float
  dtype: Any = jnp.float32
  remat: bool = False
  unroll: int = 1

  @nn.compact
  def __call__(self, x: jax.Array, c: jax.Array, mask: jax.Array) -> jax.Array:
    remat = functools.partial(nn.remat, prevent_cse=self.unroll > 1)
    layer_cls = remat(MaskedLayer) if self.remat else MaskedLayer
    scan = nn.scan(
        lambda layer, x, c, mask: (layer(x, c, mask), None), length=self.num_layers,
        in_axes=nn.broadcast, variable_axes={"params": 0}, split_rngs={"params": True},
        unroll=min(self.unroll, self.num_layers))
    layers = layer_cls(self.num_heads, self.mlp_ratio, self.dtype, self.remat, name="layers")
    return scan(layers, x, c, mask)[0]


class MaskedLayer(nn.Module):
  """`transformer.AdaLNLayer` with rotary positions and a mask.

  Call: x (N, L, D), c (N, D), mask (N, 1, L, L) -> x (N, L, D).
  """

  num_heads: int
  mlp_ratio: float
  dtype: Any = jnp.float32
  remat: bool = False  # of attention

  @nn.compact
  def __call__(self, x: jax.Array, c: jax.Array, mask: jax.Array) -> jax.Array:
    attention = RotaryAttention(self.num_heads, self.dtype, self.remat, name="attention")
    mlp = MLP(self.mlp_ratio, self.dtype, name="mlp")
    modulation = Dense(6 * x.shape[-1], zeros, self.dtype, name="modulation")(nn.silu(c))
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation, 6, axis=-1)
    attend = functools.partial(jax.nn.dot_product_attention, mask=mask)
    out, _ = attention(modulate(x, shift_a, scale_a), jnp.arange(x.shape[1]), attend)
    x = x + gate_a[:, None] * out
    return x + gate_m[:, None] * mlp(modulate(x, shift_m, scale_m))


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


class SwiGLU(nn.Module):
  """out(silu(gate(x)) * up(x)), without biases. (N, L, D) -> (N, L, D).

  The width between is D * ratio, to the next multiple of 32, so that it divides (Llama-2: 256).
  """

  ratio: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    hidden = -(-int(x.shape[-1] * self.ratio) // 32) * 32
    gate, up = jnp.split(Linear(2 * hidden, dtype=self.dtype, name="hidden")(x), 2, axis=-1)
    return Linear(x.shape[-1], dtype=self.dtype, name="out")(nn.silu(gate) * up)


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


def rms_norm(x: jax.Array) -> jax.Array:
  """RMSNorm (arXiv 1910.07467; no parameters, float32 statistics) over the last axis."""
  mean_square = jnp.square(x.astype(jnp.float32)).mean(-1, keepdims=True)
  return (x * jax.lax.rsqrt(mean_square + 1e-6)).astype(x.dtype)


def same_segment(segment: jax.Array) -> jax.Array:
  """Who may see whom, for all heads: (N, L) int -> (N, 1, L, L) bool."""
  return (segment[:, :, None] == segment[:, None])[:, None]


def causal(segment: jax.Array) -> jax.Array:
  """The same, and none a later one."""
  return same_segment(segment) & jnp.tri(segment.shape[1], dtype=bool)


def empty_cache(model: nn.Module, num_layers: int, batch: int, length: int) -> Cache:
  """Room for the keys and values of `num_layers` layers of a model."""
  shape = (num_layers, batch, length, model.num_heads, model.width // model.num_heads)
  return dict(k=jnp.zeros(shape, model.dtype), v=jnp.zeros(shape, model.dtype))
