"""Rotary attention of texts that share a row, against numpy, and what it means for networks."""

import jax.numpy as jnp
from language import compiled
from language import inputs
from language import LENGTH
from language import SEGMENT
from language import TOKENS
from language import WHOLE
import numpy as np
import pytest

from dbjax.models import positions as positions_lib
from dbjax.models import rotary
from dbjax.models.positions import rotate
from dbjax.models.positions import sequence

rng = np.random.default_rng(0)


def test_rotate_turns_pairs_of_features_as_complex_numbers():
  x, positions = np.float32(rng.normal(size=(2, 5, 3, 8))), np.array([0, 1, 7, 256, 257])
  turned = np.asarray(rotate(x, sequence(positions, 8)))
  turn = np.exp(1j * positions[:, None] * 10000.0 ** (-np.arange(4) / 4))[:, None]
  expected = (x[..., :4] + 1j * x[..., 4:]) * turn
  np.testing.assert_allclose(turned[..., :4] + 1j * turned[..., 4:], expected, rtol=0, atol=1e-4)
  narrow = rotate(jnp.asarray(x, jnp.bfloat16), sequence(positions, 8))
  assert narrow.dtype == jnp.bfloat16  # which alone could not tell 256 from 257
  np.testing.assert_allclose(np.float32(narrow), turned, rtol=0, atol=0.05)


def test_scalar_products_depend_on_the_distance_alone():
  q, k = (np.float32(rng.normal(size=(1, 4, 1, 8))) for _ in range(2))
  at = lambda start: np.einsum("nqhd,nkhd->qk", *(
      np.asarray(rotate(x, sequence(start + np.arange(4), 8))) for x in (q, k)))
  np.testing.assert_allclose(at(9), at(0), rtol=0, atol=1e-5)


def test_of_an_image_they_depend_on_the_distance_in_rows_and_columns_alone():
  q, k = (np.float32(rng.normal(size=(1, 6, 2, 8))) for _ in range(2))
  frequencies = positions_lib.axial(2, 8)
  def at(row, column):
    angles = np.einsum("ta,ahf->thf", positions_lib.grid(2, 3) + [row, column], frequencies)
    return np.einsum("nqhd,nkhd->hqk", *(np.asarray(rotate(x, angles)) for x in (q, k)))
  np.testing.assert_allclose(at(5, 7), at(0, 0), rtol=0, atol=1e-5)
  moved = np.einsum("ta,ahf->thf", positions_lib.grid(2, 3)[[1, 1, 2, 3, 4, 5]], frequencies)
  assert np.abs(np.einsum("nqhd,nkhd->hqk", *(np.asarray(rotate(x, moved)) for x in (q, k)))
                - at(0, 0)).max() > 0.1


@pytest.mark.parametrize("width, message", [
    (12, "model.width=12 with model.num_heads=4: a head of text must have an even width"),
    (8, "model.width=8: must be a multiple of 4 and of model.num_heads=3")])
def test_heads_that_cannot_be_turned_are_refused(width, message):
  with pytest.raises(ValueError, match=message):
    rotary.check_rotary(width, 4 if width == 12 else 3)
  rotary.check_rotary(16, 4)


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
