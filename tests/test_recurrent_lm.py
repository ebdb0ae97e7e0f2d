"""Huginn against numpy, as a denoiser of two streams, and with its core run over and over."""

import functools

from flax.traverse_util import flatten_dict
from flax.traverse_util import unflatten_dict
import jax
import jax.numpy as jnp
import language
from language import assert_moves
from language import C_NOISE
from language import compiled
from language import inputs
from language import jitted
from language import LENGTH
from language import MODELS
from language import NOISY
from language import params
from language import same
from language import SEGMENT
from language import STATE
from language import TOKENS
from language import VOCABULARY
from language import WHOLE
import numpy as np
import pytest


def test_agrees_with_numpy():
  for segment in (SEGMENT, WHOLE):
    args = inputs("recurrent", segment)
    language.assert_agree(
        compiled("recurrent")(*args), language.Numpy("recurrent").recurrent, *args)


def test_its_layers_are_prelude_core_and_coda():
  assert MODELS["recurrent"].core == 2
  shapes = jax.tree.map(len, params("recurrent")["params"])
  layers = {name: set(jax.tree.leaves(shapes[f"stack_{name}"]))
            for name in ("prelude", "core", "coda")}
  assert layers == dict(prelude={1}, core={2}, coda={1})


def test_a_stream_sees_what_it_may():
  language.assert_streams_see_what_they_may("recurrent")


def test_cached_generation_equals_the_whole():
  language.assert_cached_generation_equals_the_whole("recurrent")


def test_recurrent_depends_on_every_parameter_of_every_layer():
  """As a gradient would show, without the time to compile one."""
  rng = np.random.default_rng(0)
  flat, run = flatten_dict(params("recurrent")["params"]), jitted("recurrent")
  before = run(params("recurrent"), *inputs("recurrent"))
  for path, w in flat.items():
    for layer in range(len(w)) if path[0].startswith("stack") else [...]:
      changed = w.copy()
      changed[layer] += np.float32(rng.normal(size=w[layer].shape))
      after = run({"params": unflatten_dict(flat | {path: changed})}, *inputs("recurrent"))
      assert np.abs(after - before).max() > 1e-3, (path, layer)


def test_recurrent_in_bfloat16_returns_float32():
  model = MODELS["recurrent"].clone(dtype=jnp.bfloat16)
  shape = lambda method, *args: jax.eval_shape(
      lambda p: model.apply(p, *args, method=method), params("recurrent"))
  cache = shape("empty_cache", 2, LENGTH)
  assert {x.dtype for x in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)}
  cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)
  assert jax.tree.map(jnp.shape, cache) == jax.tree.map(
      jnp.shape, shape("append", TOKENS[:, 0], cache, 0))
  for logits in (shape("__call__", *inputs("recurrent")),
                 shape("iterate", TOKENS, SEGMENT, STATE, 3, 1),
                 shape("query", NOISY[:, 0], C_NOISE[:, 0], cache, 0)):
    assert logits.dtype == np.float32


BACKPROP = 2


def iterate_loss(p, num_iterations):
  return jnp.mean((MODELS["recurrent"].apply(p, TOKENS, SEGMENT, STATE, num_iterations, BACKPROP,
                                             method="iterate") - 1) ** 2)


iterate_grad = jax.jit(jax.value_and_grad(iterate_loss))


@functools.cache
def parts():
  """Prelude, core, and coda with read-out, each a function of (parameters, x)."""
  prelude = lambda model, _: model._context(TOKENS, SEGMENT)
  core = lambda model, x: model._improve(*x, SEGMENT)
  coda = lambda model, x: model._logits(model.stack["coda"](x, model._clean(), SEGMENT),
                                        model._clean())
  return [jitted("recurrent", part) for part in (prelude, core, coda)]


def unrolled_loss(p, num_iterations, num_backprop):
  """`iterate` as a Python loop."""
  (prelude, core, coda), state = parts(), STATE
  context = prelude(p, None)
  for i in range(num_iterations):
    if i == num_iterations - num_backprop:
      state = jax.lax.stop_gradient(state)
    state = core(p, (state, context))
  return jnp.mean((coda(p, state) - 1) ** 2)


def assert_same_gradients(grad, grad_):
  for g, g_ in zip(jax.tree.leaves(grad), jax.tree.leaves(grad_)):
    np.testing.assert_allclose(g, g_, rtol=0, atol=1e-5 * max(np.abs(g_).max(), 1e-3))


@pytest.mark.parametrize("num_iterations", [
    pytest.param(2, marks=pytest.mark.slow),
    *(pytest.param(n, marks=pytest.mark.nightly) for n in (1, 4))])
def test_iterate_is_backpropagation_through_the_last_iterations(num_iterations):
  ours, grad = iterate_grad(params("recurrent"), num_iterations)
  theirs, grad_ = jax.value_and_grad(unrolled_loss)(params("recurrent"), num_iterations, BACKPROP)
  np.testing.assert_allclose(ours, theirs, rtol=1e-6)
  assert_same_gradients(grad, grad_)
  if num_iterations > BACKPROP:  # and not through all of them
    grad_ = jax.grad(unrolled_loss)(params("recurrent"), num_iterations, num_iterations)
    with pytest.raises(AssertionError):
      assert_same_gradients(grad, grad_)


def test_iterate_sees_the_tokens_before_it_of_its_segment():
  run = jax.jit(lambda tokens: MODELS["recurrent"].apply(
      params("recurrent"), tokens, SEGMENT, STATE, 3, 1, method="iterate"))
  before = run(TOKENS)
  for j in range(LENGTH):
    tokens = TOKENS.copy()
    tokens[:, j] = (tokens[:, j] + 1) % VOCABULARY
    assert_moves(np.abs(run(tokens) - before).max(-1), same(j) & (np.arange(LENGTH) > j))


def test_iterate_makes_all_parameters_of_its_own():
  shapes = jax.eval_shape(lambda key: MODELS["recurrent"].init(
      key, TOKENS, SEGMENT, STATE, 3, 1, method="iterate"), jax.random.key(0))
  assert params("recurrent")["params"].keys() - shapes["params"].keys() == {
      "level", "noisy_embedding"}
