"""ViT against a second implementation, in numpy and float64; dropout against its distribution."""

import functools

from conftest import random_params
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
from references import numpy_vit
from scipy import stats

from dbjax.models.transformer import Stack
from dbjax.models.vit import ViT

SMALL = dict(num_layers=2, width=24, num_heads=2, patch_size=2, num_classes=7)


def keys(num, seed=0):
  return jax.random.split(jax.random.key(seed), num)


def inputs(n=3):
  rng = np.random.default_rng(1)
  return (rng.normal(size=(n, 5)).astype(np.float32), np.float32(np.log([0.002, 0.3, 80])[:n] / 4),
          rng.normal(size=(n, 4, 6, 3)).astype(np.float32))


@functools.cache
def forward(**options):
  model, args = ViT(**SMALL, **options), inputs()
  params = random_params(model, *args)
  return params, args, jax.jit(model.apply)({"params": params}, *args)


def test_forward_agrees_with_numpy():
  params, args, ours = forward()
  expected = numpy_vit(params, *args, patch=2, heads=2)
  assert ours.shape == (3, 7) and expected.std() > 0.5
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [
    dict(norm="rms", positions="learned", noise="line"),
    dict(mlp="swiglu", qk_norm=True, rotary="fixed")], ids=str)
def test_every_form_agrees_with_numpy(options):
  params, args, ours = forward(**options)
  expected = numpy_vit(params, *args, patch=2, heads=2, **options)
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_a_new_network_has_logits_of_exactly_0():
  model, args = ViT(**SMALL), inputs()
  new = jax.jit(model.init)(jax.random.key(0), *args)
  assert not np.any(jax.jit(model.apply)(new, *args))


def test_bfloat16_computes_in_bfloat16_and_returns_float32():
  (*_, wide), (*_, narrow) = forward(), forward(dtype=jnp.bfloat16)
  assert narrow.dtype == wide.dtype == np.float32
  error = np.linalg.norm(narrow - wide) / np.linalg.norm(wide)
  assert 2**-9 < error < 2**-5  # bfloat16 rounds to 2^-9


def test_nothing_is_dropped_without_keys_or_without_dropout():
  params, args, expected = forward()
  evaluate = lambda rate, *keys: jax.jit(ViT(**SMALL, dropout=rate).apply)(
      {"params": params}, *args, *keys)
  np.testing.assert_array_equal(evaluate(0.5), expected)
  np.testing.assert_array_equal(evaluate(0.0, keys(3)), expected)
  dropped = evaluate(0.5, keys(3))
  assert np.abs(dropped - expected).mean() > 0.1
  assert np.abs(dropped - evaluate(0.5, keys(3, seed=1))).mean() > 0.1


def value_and_grad(**options):
  params, args, _ = forward()
  model = ViT(**SMALL, dropout=0.3, **options)
  loss = lambda p: jnp.mean((model.apply({"params": p}, *args, keys(3)) - 1) ** 2)
  return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.slow
def test_what_is_recomputed_or_unrolled_drops_the_same():
  (value, grad), (value_, grad_) = value_and_grad(), value_and_grad(remat=True, unroll=2)
  np.testing.assert_allclose(value, value_, rtol=1e-6)
  for g, g_ in zip(jax.tree.leaves(grad), jax.tree.leaves(grad_)):
    np.testing.assert_allclose(g, g_, rtol=0, atol=1e-5 * np.abs(g).max())


RATE, LAYERS, TOKENS, WIDTH = 0.25, 3, 2, 8


def masks(keys, place=lambda x: x):
  """What is kept in each layer and branch: bool (N, TOKENS, WIDTH, 2 * LAYERS).

  All gates are 1, one branch at a time is 1 everywhere and the others are 0: what comes out is
  what is left of that one.
  """
  stack = Stack(num_layers=LAYERS, num_heads=2, mlp_ratio=1.0, dropout=RATE)
  inputs = jnp.zeros((len(keys), TOKENS, WIDTH)), jnp.zeros((len(keys), WIDTH))
  run, inputs = jax.jit(stack.apply), list(map(place, (*inputs, keys)))
  shapes = jax.eval_shape(stack.init, jax.random.key(0), *inputs[:2])["params"]

  def kept(layer, branch):
    params = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), shapes)
    params["layers"]["modulation"]["bias"] += np.repeat([0, 0, 1, 0, 0, 1], WIDTH)
    params["layers"][branch]["out"]["bias"][layer] = 1
    out = np.asarray(run({"params": params}, *inputs))
    np.testing.assert_allclose(out, (out != 0) / (1 - RATE), rtol=1e-6)
    return out != 0

  return np.stack([kept(layer, branch) for layer in range(LAYERS)
                   for branch in ("attention", "mlp")], axis=-1)


def test_each_branch_of_each_layer_drops_by_itself_and_keeps_the_mean():
  kept = masks(keys(1000)).reshape(-1, 2 * LAYERS)
  patterns, counts = np.unique(kept, axis=0, return_counts=True)
  assert len(patterns) == 2 ** (2 * LAYERS)
  expected = np.where(patterns, 1 - RATE, RATE).prod(1) * len(kept)
  assert stats.chisquare(counts, expected).pvalue > 1e-3
  # `masks` has checked what is kept: the branch / (1 - RATE), of which this is the mean.
  error = np.sqrt(RATE / (1 - RATE) / len(kept))
  np.testing.assert_allclose(kept.mean(0) / (1 - RATE), 1, atol=4 * error)


def test_masks_differ_by_example_token_and_feature():
  kept = masks(keys(1000))[..., 0]
  for a, b in ((kept[:-1], kept[1:]), (kept[:, :-1], kept[:, 1:]),
               (kept[..., :-1], kept[..., 1:])):
    correlation = np.corrcoef(a.reshape(-1), b.reshape(-1))[0, 1]
    assert abs(correlation) < 4 / np.sqrt(a.size)


def test_the_mask_of_an_example_is_a_function_of_its_key():
  expected = masks(keys(1000))
  others = jnp.concatenate([keys(500, seed=1), keys(1000)[:500]])
  np.testing.assert_array_equal(masks(others)[500:], expected[:500])
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  split = masks(keys(1000)[::-1], lambda x: jax.device_put(x, NamedSharding(mesh, P("data"))))
  np.testing.assert_array_equal(split[::-1], expected)
