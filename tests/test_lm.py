"""Language models against a second implementation: numpy, float64, one sequence at a time, and
for two streams one sequence of 2L under the dense 2L x 2L mask."""

import functools
import re

from flax.traverse_util import flatten_dict
from flax.traverse_util import unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dbjax.models.lm import causal
from dbjax.models.lm import CausalLM
from dbjax.models.lm import MaskedLM
from dbjax.models.lm import RecurrentLM

HEADS, VOCABULARY, LENGTH = 2, 11, 7
SMALL = dict(width=24, num_heads=HEADS, vocab_size=VOCABULARY)
MODELS = {
    "masked": MaskedLM(num_layers=3, **SMALL),
    "causal": CausalLM(num_layers=3, embedding_width=8, **SMALL),
    "recurrent": RecurrentLM(prelude=1, core=2, coda=1, embedding_width=8, **SMALL)}
TWO_STREAMS = ["causal", "recurrent"]

rng = np.random.default_rng(0)
TOKENS = rng.integers(0, VOCABULARY, (2, LENGTH))
MASKED = np.where(rng.random((2, LENGTH)) < 0.4, VOCABULARY, TOKENS)
NOISY = np.float32(rng.normal(size=(2, LENGTH, 8)))
C_NOISE = np.float32(rng.normal(size=(2, LENGTH)))
STATE = np.float32(rng.normal(size=(2, LENGTH, 24)))
SEGMENT = np.array([[5, 5, 5, 5, 2, 2, 2], [1, 2, 2, 2, 2, 2, 2]])
WHOLE = np.zeros_like(SEGMENT)


def inputs(name, segment=SEGMENT):
  return (MASKED, C_NOISE[:, 0], segment) if name == "masked" else (
      TOKENS, NOISY, C_NOISE, segment)


@functools.cache
def params(name):
  """Weights of size 1 / sqrt(fan-in) for all that the model has, so that nothing is zero."""
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(MODELS[name].init, jax.random.key(0), *inputs(name))
  draw = lambda s: rng.normal(size=s.shape) / np.sqrt(s.shape[-2] if len(s.shape) > 1 else 4)
  return jax.tree.map(lambda s: np.float32(draw(s)), shapes)


@functools.cache
def jitted(name, method="__call__", **options):
  return jax.jit(functools.partial(MODELS[name].clone(**options).apply, method=method))


def compiled(name, method="__call__", **options):
  return functools.partial(jitted(name, method, **options), params(name))


silu = lambda a: a / (1 + np.exp(-a))
gelu = lambda a: a / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))


class Numpy:
  """The three networks from their papers' definitions."""

  def __init__(self, name):
    self.causal = name != "masked"
    flat = flatten_dict(params(name)["params"], sep="/")
    self.flat = {k: np.asarray(v, np.float64) for k, v in flat.items()}
    self.tokens = self.flat["token_embedding/embedding"]

  def dense(self, path, a, layer=...):
    out = np.asarray(a) @ self.flat[f"{path}/kernel"][layer]
    return out + self.flat[f"{path}/bias"][layer] if f"{path}/bias" in self.flat else out

  def layer_dense(self, stack, layer, name, a):
    return self.dense(f"{stack}/{name}", a, layer)

  def norm(self, a):
    a = a if self.causal else a - a.mean(-1, keepdims=True)
    return a / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-6)

  def noise(self, c_noise):
    angles = np.float64(c_noise)[:, None] * np.geomspace(1, 100, 128)
    features = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    return self.dense("noise_embedding/out", silu(self.dense("noise_embedding/hidden", features)))

  def layers(self, stack, x, c, positions, mask):
    """x, c (T, D), positions (T,), mask (T, T)."""
    for layer in range(len(self.flat[f"{stack}/layers/modulation/bias"])):
      dense = functools.partial(self.layer_dense, f"{stack}/layers", layer)
      shift, scale, gate, shift_2, scale_2, gate_2 = np.split(dense("modulation", silu(c)), 6, 1)
      qkv = np.split(dense("attention/qkv", self.norm(x) * (1 + scale) + shift), 3, axis=1)
      outs = []
      for q, k, v in zip(*(np.split(m, HEADS, axis=1) for m in qkv)):
        half = q.shape[1] // 2
        turn = np.exp(1j * positions[:, None] * 10000.0 ** (-np.arange(half) / half))
        q, k = ((m[:, :half] + 1j * m[:, half:]) * turn for m in (q, k))
        scores = (q @ k.conj().T).real / np.sqrt(2 * half)
        weights = np.where(mask, np.exp(scores), 0)
        outs.append(weights / weights.sum(1, keepdims=True) @ v)
      x = x + gate * dense("attention/out", np.concatenate(outs, axis=1))
      hidden = dense("mlp/hidden", self.norm(x) * (1 + scale_2) + shift_2)
      if self.causal:
        linear, up = np.split(hidden, 2, axis=1)
        x = x + gate_2 * dense("mlp/out", silu(linear) * up)
      else:
        x = x + gate_2 * dense("mlp/out", gelu(hidden))
    return x

  def logits(self, x, c):
    shift, scale = np.split(self.dense("modulation", silu(c)), 2, axis=1)
    return self.dense("read_out", self.norm(x) * (1 + scale) + shift)

  def previous(self, tokens, segment):
    return [VOCABULARY if i == 0 or segment[i - 1] != segment[i] else tokens[i - 1]
            for i in range(len(tokens))]

  def masked(self, tokens, c_noise, segment):
    c, t = self.noise(c_noise[None]), len(tokens)
    mask = np.equal.outer(segment, segment)
    return self.logits(self.layers("stack", self.tokens[tokens], c, np.arange(t), mask), c)

  def next_token(self, tokens, segment):
    c, x, t = self.flat["clean"][None], self.tokens[self.previous(tokens, segment)], len(tokens)
    mask = np.equal.outer(segment, segment) & np.tri(t, dtype=bool)
    return self.logits(self.layers("stack", x, c, np.arange(t), mask), c)

  def both(self, tokens, noisy, c_noise, segment):
    """The dense mask, rule by rule."""
    t = len(tokens)
    mask, same = np.zeros((2 * t, 2 * t), bool), np.equal.outer(segment, segment)
    for i in range(t):
      for j in range(t):
        mask[i, j] = same[i, j] and j <= i  # clean sees clean
        mask[t + i, j] = same[i, j] and j < i  # noisy sees clean
      mask[t + i, t + i] = True  # noisy sees itself
    clean = np.tile(self.flat["clean"], (t, 1))
    c = np.concatenate([clean, clean + np.outer(c_noise, self.flat["level/kernel"])])
    x = np.concatenate([np.zeros((t, 24)), self.dense("noisy_embedding", noisy)])
    return x, c, np.tile(np.arange(t), 2), mask

  def causal_lm(self, *args):
    x, c, positions, mask = self.both(*args)
    t = len(x) // 2
    x[:t] = self.tokens[self.previous(args[0], args[3])]
    x[t:] += x[:t]
    return self.logits(self.layers("stack", x, c, positions, mask)[t:], c[t:])

  def recurrent(self, *args):
    x, c, positions, mask = self.both(*args)
    t = len(x) // 2
    context = self.tokens[self.previous(args[0], args[3])]
    context = self.layers("stack_prelude", context, c[:t], positions[:t], mask[:t, :t])
    x = self.dense("adapter", np.concatenate([np.tile(context, (2, 1)), x], axis=1))
    x = self.norm(self.layers("stack_core", x, c, positions, mask))
    return self.logits(self.layers("stack_coda", x, c, positions, mask)[t:], c[t:])


def agree(ours, function, *args):
  expected = np.stack([function(*each) for each in zip(*args)])
  assert expected.std() > 0.3
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name, reference", [
    ("masked", "masked"), ("causal", "causal_lm"), ("recurrent", "recurrent")])
def test_agrees_with_numpy(name, reference):
  for segment in (SEGMENT, WHOLE):
    args = inputs(name, segment)
    agree(compiled(name)(*args), getattr(Numpy(name), reference), *args)


def test_next_token_agrees_with_numpy():
  agree(compiled("causal", "next_token")(TOKENS, SEGMENT), Numpy("causal").next_token, TOKENS,
        SEGMENT)


@pytest.mark.parametrize("name", ["masked", "causal"])
def test_a_new_network_returns_exactly_0_and_its_layers_their_input(name):
  new = jax.jit(MODELS[name].init)(jax.random.key(0), *inputs(name))["params"]
  run = lambda **parts: jitted(name)({"params": new | parts}, *inputs(name))
  assert not np.any(run())
  ends = {k: v for k, v in params(name)["params"].items() if k != "stack"}
  layers = new["stack"]["layers"]
  doubled = {k: jax.tree.map(lambda w: 2 * w, layers[k]) for k in ("attention", "mlp")}
  assert np.std(run(**ends)) > 0.3
  np.testing.assert_array_equal(run(**ends), run(**ends, stack={"layers": layers | doubled}))


def moved(name, which, j, method="__call__", args=None):
  """Which positions (N, L) a change at position j of argument `which` moves, by how much."""
  args = list(args or inputs(name))
  run = compiled(name, method)
  before = run(*args)
  changed = np.array(args[which])
  changed[:, j] = (changed[:, j] + 1) % VOCABULARY if changed.dtype.kind == "i" else (
      changed[:, j] + 1)
  args[which] = changed
  return np.abs(run(*args) - before).max(-1)


def assert_moves(distance, expected):
  """Those and only those: the others stay the same to the last bit."""
  np.testing.assert_array_equal(distance > 0, expected)
  assert not expected.any() or distance[expected].min() > 1e-4


def same(j):
  return SEGMENT == SEGMENT[:, j:j + 1]


@pytest.mark.parametrize("name", TWO_STREAMS)
def test_a_clean_token_moves_later_noisy_positions_of_its_segment_only(name):
  for j in range(LENGTH):
    assert_moves(moved(name, 0, j), same(j) & (np.arange(LENGTH) > j))


@pytest.mark.parametrize("name", TWO_STREAMS)
@pytest.mark.parametrize("which", [1, 2], ids=["noisy", "c_noise"])
def test_a_noisy_position_moves_itself_only(name, which):
  for j in range(LENGTH):
    assert_moves(moved(name, which, j), np.tile(np.arange(LENGTH) == j, (2, 1)))


def test_next_token_sees_the_tokens_before_it_of_its_segment():
  for j in range(LENGTH):
    distance = moved("causal", 0, j, "next_token", (TOKENS, SEGMENT))
    assert_moves(distance, same(j) & (np.arange(LENGTH) > j))


def test_masked_sees_its_segment():
  for j in range(LENGTH):
    assert_moves(moved("masked", 0, j), same(j))


@pytest.mark.parametrize("name, method", [
    ("masked", "__call__"), ("causal", "__call__"), ("causal", "next_token"),
    ("recurrent", "__call__")])
def test_a_text_may_begin_anywhere(name, method):
  """The text of positions 0 to 3 again at 3 to 6."""
  args = (TOKENS, SEGMENT) if method == "next_token" else inputs(name)
  shift = lambda a: np.concatenate([a[:, -3:], a[:, :-3]], axis=1) if a.ndim > 1 else a
  at_0, at_3 = np.array([[0] * 4 + [1] * 3] * 2), np.array([[1] * 3 + [0] * 4] * 2)
  run = compiled(name, method)
  first, second = run(*args[:-1], at_0), run(*map(shift, args[:-1]), at_3)
  np.testing.assert_allclose(second[:, 3:], first[:, :4], rtol=0, atol=1e-5)

  swap = lambda a: a[:, [1, 0, *range(2, LENGTH)]] if a.ndim > 1 else a
  third = run(*map(swap, args[:-1]), WHOLE)  # while within a text order matters
  assert np.abs(third - run(*args[:-1], WHOLE))[:, 3:].max(-1).min() > 1e-3


@pytest.mark.parametrize("name", TWO_STREAMS)
def test_cached_generation_equals_the_whole(name):
  expected = compiled(name)(*inputs(name, WHOLE))
  cache = jax.jit(lambda p: MODELS[name].apply(p, 2, LENGTH, method="empty_cache"))(params(name))
  query, append = compiled(name, "query"), compiled(name, "append")
  for i in range(LENGTH):
    ours = query(NOISY[:, i], C_NOISE[:, i], cache, i)
    np.testing.assert_allclose(ours, expected[:, i], rtol=0, atol=1e-5)
    cache = append(TOKENS[:, i], cache, i)


def test_cached_generation_of_the_plain_network_equals_the_whole():
  expected = compiled("causal", "next_token")(TOKENS, WHOLE)
  cache, token = MODELS["causal"].empty_cache(2, LENGTH), np.full(2, VOCABULARY)
  query = compiled("causal", "query_next")
  for i in range(LENGTH):
    ours, cache = query(token, cache, i)
    np.testing.assert_allclose(ours, expected[:, i], rtol=0, atol=1e-5)
    token = TOKENS[:, i]


def test_without_its_noise_the_noisy_stream_is_the_plain_network():
  silent = {k: jax.tree.map(np.zeros_like, v) if k in ("noisy_embedding", "level") else v
            for k, v in params("causal")["params"].items()}
  np.testing.assert_allclose(
      jitted("causal")({"params": silent}, *inputs("causal")),
      compiled("causal", "next_token")(TOKENS, SEGMENT), rtol=0, atol=1e-5)


def test_one_level_for_a_sequence_may_be_given_once():
  once = C_NOISE[:, :1]
  np.testing.assert_allclose(
      compiled("causal")(TOKENS, NOISY, once, SEGMENT),
      compiled("causal")(TOKENS, NOISY, np.tile(once, LENGTH), SEGMENT), rtol=0, atol=1e-5)


def test_no_scores_of_both_streams():
  args = [np.tile(a[:1], (1, 7, 1)[:a.ndim]) for a in inputs("causal")]
  program = str(jax.make_jaxpr(MODELS["causal"].apply)(params("causal"), *args))
  assert "49,49" in program and not re.search(r"\[[\d,]*\b98\b", program)


@functools.cache
def value_and_grad(name, **options):
  model = MODELS[name].clone(**options)
  loss = lambda p: jnp.mean((model.apply(p, *inputs(name)) - 1) ** 2)
  return jax.jit(jax.value_and_grad(loss))(params(name))


@pytest.mark.parametrize("name, options", [("masked", dict(remat=True)), ("causal", {})])
def test_gradients_reach_every_parameter_of_every_layer(name, options):
  for path, g in flatten_dict(value_and_grad(name, **options)[1]["params"], sep="/").items():
    for each in g if path.startswith("stack") else [g]:
      assert np.abs(each).max() > 1e-6, path


def test_recurrent_depends_on_every_parameter_of_every_layer():
  """As a gradient would show, without the time to compile one."""
  flat, run = flatten_dict(params("recurrent")["params"]), jitted("recurrent")
  before = run(params("recurrent"), *inputs("recurrent"))
  for path, w in flat.items():
    for layer in range(len(w)) if path[0].startswith("stack") else [...]:
      changed = w.copy()
      changed[layer] += np.float32(rng.normal(size=w[layer].shape))
      after = run({"params": unflatten_dict(flat | {path: changed})}, *inputs("recurrent"))
      assert np.abs(after - before).max() > 1e-3, (path, layer)


def test_remat_and_unroll_change_neither_value_nor_gradient():
  (value, grad), (value_, grad_) = (value_and_grad("causal", **options) for options in
                                    ({}, dict(remat=True, unroll=3)))
  np.testing.assert_allclose(value, value_, rtol=1e-6)
  for g, g_ in zip(jax.tree.leaves(grad), jax.tree.leaves(grad_)):
    np.testing.assert_allclose(g, g_, rtol=0, atol=1e-5 * np.abs(g).max())
  value = np.mean((compiled("masked")(*inputs("masked")) - 1) ** 2)
  np.testing.assert_allclose(value, value_and_grad("masked", remat=True)[0], rtol=1e-6)


@pytest.mark.parametrize("name", ["masked", "causal"])
def test_bfloat16_computes_in_bfloat16_and_returns_float32(name):
  wide = compiled(name)(*inputs(name))
  narrow = compiled(name, dtype=jnp.bfloat16)(*inputs(name))
  assert narrow.dtype == wide.dtype == np.float32
  error = np.linalg.norm(narrow - wide) / np.linalg.norm(wide)
  assert 2**-9 < error < 2**-4  # bfloat16 rounds to 2^-9


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
  mask = causal(SEGMENT)
  prelude = lambda model, _: model._context(TOKENS, SEGMENT, mask)
  core = lambda model, x: model._improve(*x, mask)
  coda = lambda model, x: model._logits(model.stack["coda"](x, model._clean(), mask),
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


@pytest.mark.parametrize("num_iterations", [1, 2, 4])
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
