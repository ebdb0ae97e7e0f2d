"""Language models a second time, in numpy and float64, one sequence at a time, and what tests of
them have in common. Two streams are one sequence of 2L here, under the dense 2L x 2L mask.
"""

import functools

from conftest import random_params
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np

from dbjax.models.causal_lm import CausalLM
from dbjax.models.masked_lm import MaskedLM
from dbjax.models.recurrent_lm import RecurrentLM

HEADS, VOCABULARY, LENGTH, WIDTH, EMBEDDING = 2, 11, 7, 24, 8
SMALL = dict(width=WIDTH, num_heads=HEADS, vocab_size=VOCABULARY)
MODELS = {
    "masked": MaskedLM(num_layers=3, **SMALL),
    "masked, modern": MaskedLM(num_layers=2, norm="rms", mlp="swiglu", qk_norm=True, noise="line",
                               **SMALL),
    "causal": CausalLM(num_layers=3, embedding_width=EMBEDDING, **SMALL),
    "recurrent": RecurrentLM(num_layers=4, prelude=1, coda=1, embedding_width=EMBEDDING, **SMALL)}

rng = np.random.default_rng(0)
TOKENS = rng.integers(0, VOCABULARY, (2, LENGTH))
MASKED = np.where(rng.random((2, LENGTH)) < 0.4, VOCABULARY, TOKENS)
NOISY = np.float32(rng.normal(size=(2, LENGTH, EMBEDDING)))
C_NOISE = np.float32(rng.normal(size=(2, LENGTH)))
STATE = np.float32(rng.normal(size=(2, LENGTH, WIDTH)))
SEGMENT = np.array([[5, 5, 5, 5, 2, 2, 2], [1, 2, 2, 2, 2, 2, 2]])
WHOLE = np.zeros_like(SEGMENT)


def inputs(name, segment=SEGMENT):
  return (MASKED, C_NOISE[:, 0], segment) if name.startswith("masked") else (
      TOKENS, NOISY, C_NOISE, segment)


@functools.cache
def params(name):
  return {"params": random_params(MODELS[name], *inputs(name), seed=1)}


@functools.cache
def jitted(name, method="__call__", **options):
  return jax.jit(functools.partial(MODELS[name].clone(**options).apply, method=method))


def compiled(name, method="__call__", **options):
  return functools.partial(jitted(name, method, **options), params(name))


@functools.cache
def value_and_grad(name, **options):
  model = MODELS[name].clone(**options)
  loss = lambda p: jnp.mean((model.apply(p, *inputs(name)) - 1) ** 2)
  return jax.jit(jax.value_and_grad(loss))(params(name))


def same(j):
  """Which positions (N, L) are of the segment of position j."""
  return SEGMENT == SEGMENT[:, j:j + 1]


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


def assert_agree(ours, function, *args):
  """Of a batch, with a function of one sequence."""
  expected = np.stack([function(*each) for each in zip(*args)])
  assert expected.std() > 0.3
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


def assert_new_network_returns_0(name):
  """And its layers their input."""
  new = jax.jit(MODELS[name].init)(jax.random.key(0), *inputs(name))["params"]
  run = lambda **parts: jitted(name)({"params": new | parts}, *inputs(name))
  assert not np.any(run())
  ends = {k: v for k, v in params(name)["params"].items() if k != "stack"}
  layers = new["stack"]["layers"]
  doubled = {k: jax.tree.map(lambda w: 2 * w, layers[k]) for k in ("attention", "mlp")}
  assert np.std(run(**ends)) > 0.3
  np.testing.assert_array_equal(run(**ends), run(**ends, stack={"layers": layers | doubled}))


def assert_gradients_reach_every_layer(name, **options):
  for path, g in flatten_dict(value_and_grad(name, **options)[1]["params"], sep="/").items():
    for each in g if path.startswith("stack") else [g]:
      assert np.abs(each).max() > 1e-6, path


def assert_bfloat16_in_and_float32_out(name):
  wide = compiled(name)(*inputs(name))
  narrow = compiled(name, dtype=jnp.bfloat16)(*inputs(name))
  assert narrow.dtype == wide.dtype == np.float32
  error = np.linalg.norm(narrow - wide) / np.linalg.norm(wide)
  assert 2**-9 < error < 2**-4  # bfloat16 rounds to 2^-9


def assert_streams_see_what_they_may(name):
  """A clean token moves later noisy positions of its segment only, a noisy one and its level
  move themselves only.
  """
  for j in range(LENGTH):
    assert_moves(moved(name, 0, j), same(j) & (np.arange(LENGTH) > j))
    for which in (1, 2):
      assert_moves(moved(name, which, j), np.tile(np.arange(LENGTH) == j, (2, 1)))


def assert_cached_generation_equals_the_whole(name):
  expected = compiled(name)(*inputs(name, WHOLE))
  cache = jax.jit(lambda p: MODELS[name].apply(p, 2, LENGTH, method="empty_cache"))(params(name))
  query, append = compiled(name, "query"), compiled(name, "append")
  for i in range(LENGTH):
    ours = query(NOISY[:, i], C_NOISE[:, i], cache, i)
    np.testing.assert_allclose(ours, expected[:, i], rtol=0, atol=1e-5)
    cache = append(TOKENS[:, i], cache, i)


silu = lambda a: a / (1 + np.exp(-a))
gelu = lambda a: a / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))


class Numpy:
  """The three networks from their papers' definitions."""

  def __init__(self, name):
    self.plain = name == "masked"  # LayerNorm, GELU
    flat = flatten_dict(params(name)["params"], sep="/")
    self.flat = {k: np.asarray(v, np.float64) for k, v in flat.items()}
    self.tokens = self.flat["token_embedding/embedding"]

  def dense(self, path, a, layer=...):
    out = np.asarray(a) @ self.flat[f"{path}/kernel"][layer]
    return out + self.flat[f"{path}/bias"][layer] if f"{path}/bias" in self.flat else out

  def layer_dense(self, stack, layer, name, a):
    return self.dense(f"{stack}/{name}", a, layer)

  def norm(self, a):
    a = a - a.mean(-1, keepdims=True) if self.plain else a
    return self.rms(a)

  def rms(self, a, scale=1.0):
    return a / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-6) * scale

  def noise(self, c_noise):
    if "noise_embedding/start" in self.flat:
      return (self.flat["noise_embedding/start"]
              + np.outer(c_noise, self.flat["noise_embedding/slope"]))
    angles = np.asarray(c_noise, np.float64)[:, None] * np.geomspace(1, 100, 128)
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
        if f"{stack}/layers/attention/q_norm/scale" in self.flat:
          q, k = (self.rms(m, self.flat[f"{stack}/layers/attention/{name}/scale"][layer])
                  for m, name in ((q, "q_norm"), (k, "k_norm")))
        turn = np.exp(1j * positions[:, None] * 10000.0 ** (-np.arange(half) / half))
        q, k = ((m[:, :half] + 1j * m[:, half:]) * turn for m in (q, k))
        scores = (q @ k.conj().T).real / np.sqrt(2 * half)
        weights = np.where(mask, np.exp(scores), 0)
        outs.append(weights / weights.sum(1, keepdims=True) @ v)
      x = x + gate * dense("attention/out", np.concatenate(outs, axis=1))
      hidden = dense("mlp/hidden", self.norm(x) * (1 + scale_2) + shift_2)
      if not self.plain:
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
    x = np.concatenate([np.zeros((t, WIDTH)), self.dense("noisy_embedding", noisy)])
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
