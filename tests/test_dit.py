"""DiT against a second implementation, in numpy and float64, from the paper's definition."""

import functools

from conftest import random_params
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import numpy_dit

from dbjax.models import dit
from dbjax.models.dit import DiT
from dbjax.models.transformer import Stack

SMALL = dict(num_layers=3, width=24, num_heads=2, patch_size=2, num_classes=10)


def inputs(n=3, height=4, width=6, channels=2):
  rng = np.random.default_rng(1)
  return (rng.normal(size=(n, height, width, channels)).astype(np.float32),
          np.float32(np.log([0.002, 0.3, 80])[:n] / 4), np.array([0, 7, 10])[:n])


@functools.cache
def forward(**options):
  model, args = DiT(**SMALL | options), inputs()
  params = random_params(model, *args)
  return params, args, jax.jit(model.apply)({"params": params}, *args)


def test_forward_agrees_with_numpy():
  params, args, ours = forward()
  expected = numpy_dit(params, *args, patch=2, heads=2)
  assert expected.std() > 0.5
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [
    dict(norm="rms"), dict(mlp="swiglu"), dict(qk_norm=True), dict(rotary="fixed"),
    dict(rotary="learned", positions="none"), dict(positions="learned"), dict(noise="line"),
    dict(norm="rms", mlp="swiglu", qk_norm=True, rotary="fixed")], ids=str)
def test_every_form_agrees_with_numpy(options):
  params, args, ours = forward(num_layers=2, **options)
  expected = numpy_dit(params, *args, patch=2, heads=2, **options)
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("width, more", [(384, 0.0), (64, 0.125)])
def test_swiglu_costs_about_what_the_mlp_does(width, more):
  """A small one more: its hidden features are a multiple of 32."""
  def count(**options):
    network = DiT(**SMALL | dict(width=width, num_heads=2), **options)
    params = jax.eval_shape(network.init, jax.random.key(0), *inputs())["params"]
    layers = params["stack"]["layers"]["mlp"]
    return sum(x.size for path, x in jax.tree_util.tree_leaves_with_path(layers)
               if "kernel" in str(path[-1]))
  assert count(mlp="swiglu") == pytest.approx((1 + more) * count(), rel=1e-9)


def test_heads_that_cannot_be_turned_by_row_and_column_are_refused():
  with pytest.raises(ValueError, match="model.width=24 with model.num_heads=4.*multiple of 4"):
    DiT(**SMALL | dict(num_heads=4, rotary="fixed")).check()


def test_a_new_network_returns_exactly_0_and_its_layers_their_input():
  model, args = DiT(**SMALL), inputs()
  new = jax.jit(model.init)(jax.random.key(0), *args)
  assert not np.any(jax.jit(model.apply)(new, *args))
  x, c = np.float32(np.random.default_rng(0).normal(size=(3, 5, 24))), np.ones((3, 24), np.float32)
  stack = Stack(SMALL["num_layers"], SMALL["num_heads"], mlp_ratio=4.0)
  np.testing.assert_array_equal(stack.apply({"params": new["params"]["stack"]}, x, c), x)


@pytest.mark.parametrize("name, paper", [
    ("DiT-S", 33e6), ("DiT-B", 130e6), ("DiT-L", 458e6), ("DiT-XL", 675e6)])
def test_parameter_counts(name, paper):
  """Table 1 of the paper, patches of 2 on 32x32x4 latents, 1,000 classes.

  The paper's network also predicts a variance: 16 more columns of read-out at patch 2.
  """
  model = DiT(**DiT.sizes[f"{name}/2"], num_classes=1000)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 4)), jnp.zeros(1),
                          jnp.zeros(1, int))
  ours = sum(x.size for x in jax.tree.leaves(shapes))
  d = model.width
  layer = (3 * d + 1 * d + 4 * d + 4 * d + 6 * d) * d + (3 + 1 + 4 + 1 + 6) * d
  ends = (16 + 1) * d + (256 + 1) * d + (d + 1) * d + 1001 * d + (d + 1) * 2 * d + (d + 1) * 16
  assert ours == model.num_layers * layer + ends
  assert ours + (d + 1) * 16 == pytest.approx(paper, rel=0.005)


@functools.cache
def value_and_grad(**options):
  params, args, _ = forward()
  loss = lambda p: jnp.mean((DiT(**SMALL, **options).apply({"params": p}, *args) - 1) ** 2)
  return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("options", [dict(remat=True), dict(unroll=3)])
@pytest.mark.slow
def test_remat_and_unroll_change_neither_value_nor_gradient(options):
  (value, grad), (value_, grad_) = value_and_grad(), value_and_grad(**options)
  np.testing.assert_allclose(value, value_, rtol=1e-6)
  for g, g_ in zip(jax.tree.leaves(grad), jax.tree.leaves(grad_)):
    np.testing.assert_allclose(g, g_, rtol=0, atol=1e-5 * np.abs(g).max())


def test_bfloat16_computes_in_bfloat16_and_returns_float32():
  (*_, wide), (*_, narrow) = forward(), forward(dtype=jnp.bfloat16)
  assert narrow.dtype == wide.dtype == np.float32
  error = np.linalg.norm(narrow - wide) / np.linalg.norm(wide)
  assert 2**-9 < error < 2**-5  # bfloat16 rounds to 2^-9


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patchify(patch):
  x = np.arange(2 * 8 * 12 * 3).reshape(2, 8, 12, 3)
  tokens = dit.patchify(x, patch)
  corners = [(r, c) for r in range(0, 8, patch) for c in range(0, 12, patch)]
  assert tokens.shape == (2, len(corners), patch * patch * 3)
  for i, (r, c) in enumerate(corners):
    expected = x[:, r:r + patch, c:c + patch].reshape(2, -1)
    np.testing.assert_array_equal(tokens[:, i], expected)
  np.testing.assert_array_equal(dit.unpatchify(tokens, 8 // patch, patch), x)
