"""Huginn (arXiv 2502.05171), conditioned on noise: a core that is run over and over.

One instance is the whole network: nothing of it is split.
"""

from typing import Annotated, Any

import jax
import jax.numpy as jnp

from dbjax.fields import above
from dbjax.models.attention import Kernel
from dbjax.models.causal_lm import Cache
from dbjax.models.causal_lm import empty_cache
from dbjax.models.causal_lm import TwoStreams
from dbjax.models.dense import Linear
from dbjax.models.transformer import Heads
from dbjax.models.transformer import Layers
from dbjax.models.transformer import Ratio
from dbjax.models.transformer import Remat
from dbjax.models.transformer import rms_norm
from dbjax.models.transformer import Unroll
from dbjax.models.transformer import Width


class RecurrentLM(TwoStreams):
  """Huginn: a prelude makes a context of clean tokens, a core improves a state with it, a coda
  reads the state.

  As a denoiser the core runs once: the state is the noised embedding, and the levels of noise are
  the iterations. The context of position i is the prelude's at token i - 1; the state of a clean
  position is 0. The plain network is `iterate`.

  Attributes:
    num_layers: of prelude, core and coda together.
    prelude, coda: numbers of layers.
    others: see `CausalLM`.

  Call: as of `CausalLM`.
  """

  num_layers: Layers
  prelude: Annotated[int, above(0), "layers before the core"]
  coda: Annotated[int, above(0), "layers after the core"]
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

  def check(self):
    """Raises ValueError where the numbers do not go together."""
    super().check()
    if self.core < 1:
      raise ValueError(f"model.num_layers={self.num_layers}: model.prelude={self.prelude} and "
                       f"model.coda={self.coda} leave the core no layer: set "
                       f"{self.prelude + self.coda + 1} or more")

  @property
  def core(self) -> int:
    """Layers of the core."""
    return self.num_layers - self.prelude - self.coda

  def setup(self):
    self._set_up_ends()
    self.adapter = Linear(self.width, dtype=self.dtype)
    self.stack = dict(prelude=self._stack(self.prelude), core=self._stack(self.core),
                      coda=self._stack(self.coda))

  def __call__(self, tokens: jax.Array, noisy: jax.Array, c_noise: jax.Array,
               segment: jax.Array) -> jax.Array:
    x, c = self._noisy(noisy, c_noise)
    c_clean, context = self._clean(), self._context(tokens, segment)
    clean, x = self.stack["core"].pair(self._adapt(context, jnp.zeros_like(x)),
                                       self._adapt(context, x), c_clean, c, segment)
    return self._logits(
        self.stack["coda"].pair(rms_norm(clean), rms_norm(x), c_clean, c, segment)[1], c)

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
    context, state = self._context(tokens, segment), state.astype(self.dtype)
    if self.is_initializing():
      self._improve(state, context, segment)  # inside JAX's loops no parameter can be made
    model, variables = self.unbind()

    def improve(state, variables, context):
      return model.apply(variables, state, context, segment, method="_improve")

    # A loop of unknown length has no gradient: nothing that has one may enter it.
    frozen = jax.lax.stop_gradient((variables, context))
    state = jax.lax.fori_loop(0, num_iterations - num_backprop, lambda _, s: improve(s, *frozen),
                              jax.lax.stop_gradient(state))
    step = lambda state, i: (
        jnp.where(i < num_iterations, improve(state, variables, context), state), None)
    state, _ = jax.lax.scan(step, state, jnp.arange(num_backprop))
    return self._logits(self.stack["coda"](state, self._clean(), segment), self._clean())

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

  def _context(self, tokens: jax.Array, segment: jax.Array) -> jax.Array:
    x = self.token_embedding(self._previous(tokens, segment))
    return self.stack["prelude"](x, self._clean(), segment)

  def _adapt(self, context: jax.Array, state: jax.Array) -> jax.Array:
    return self.adapter(jnp.concatenate([context, state], axis=-1))

  def _improve(self, state: jax.Array, context: jax.Array, segment: jax.Array) -> jax.Array:
    return rms_norm(self.stack["core"](self._adapt(context, state), self._clean(), segment))

  def _cached(self, state: jax.Array, c: jax.Array, cache: Cache,
              position: jax.Array) -> tuple[jax.Array, Cache]:
    """Core and coda at one position. state (N, 1, D)."""
    x = self._adapt(cache["context"], state)
    x, core = self.stack["core"].cached(x, c, cache["core"], position)
    x, coda = self.stack["coda"].cached(rms_norm(x), c, cache["coda"], position)
    return x, cache | dict(core=core, coda=coda)

  def _look_back(self, previous: jax.Array, cache: Cache, position: jax.Array | int) -> Cache:
    """The prelude at one position, from the token before it (N,)."""
    context, prelude = self.stack["prelude"].cached(
        self.token_embedding(previous[:, None]), self._clean(), cache["prelude"], position)
    return cache | dict(prelude=prelude, context=context)
