"""Augmentation against Pillow, numpy and scipy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from PIL import ImageEnhance
from PIL import ImageOps
import pytest
from scipy import stats

from dbjax import augment

SHAPE = (32, 26)
MAGNITUDES = (0, 5, 9, 17, 30)  # at 4, shears take pixels from right between two others


def keys(num, seed=0):
  return jax.random.split(jax.random.key(seed), num)


def images(channels):
  """Noise, narrow noise, a slope that differs by channel, two tones, one tone: uint8."""
  rng, size = np.random.default_rng(0), (*SHAPE, channels)
  rows, columns, channel = np.mgrid[:SHAPE[0], :SHAPE[1], :channels]
  return np.uint8([rng.integers(0, 256, size), rng.integers(90, 140, size),
                   4 * rows + 3 * columns + 20 * channel, np.where(rows > 18, 200, 60),
                   np.full(size, 77)])


def pillow(name, image, strength):
  """`image` (H, W, C) after one operation of Pillow's, with torchvision's ranges."""
  x = Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])
  fill = (128,) * image.shape[-1] if image.shape[-1] == 3 else 128
  size, height_width = x.size, image.shape[:2]
  affine = lambda *m: x.transform(size, Image.Transform.AFFINE, m, fillcolor=fill)
  pixels = lambda axis: int(150 / 331 * height_width[axis] * strength)
  enhance = lambda kind: kind(x).enhance(1 + 0.9 * strength)
  result = {
      "identity": lambda: x,
      "autocontrast": lambda: ImageOps.autocontrast(x),
      "equalize": lambda: ImageOps.equalize(x),
      "rotate": lambda: x.rotate(30 * strength, fillcolor=fill),
      "solarize": lambda: ImageOps.solarize(x, 255 - 255 * abs(strength)),
      "color": lambda: enhance(ImageEnhance.Color),
      "posterize": lambda: ImageOps.posterize(x, 8 - round(4 * abs(strength))),
      "contrast": lambda: enhance(ImageEnhance.Contrast),
      "brightness": lambda: enhance(ImageEnhance.Brightness),
      "sharpness": lambda: enhance(ImageEnhance.Sharpness),
      "shear_x": lambda: affine(1, 0.3 * strength, 0, 0, 1, 0),
      "shear_y": lambda: affine(1, 0, 0, 0.3 * strength, 1, 0),
      "translate_x": lambda: affine(1, 0, pixels(1), 0, 1, 0),
      "translate_y": lambda: affine(1, 0, 0, 0, 1, pixels(0)),
  }[name]()
  return np.asarray(result).reshape(image.shape)


@functools.cache
def operated(channels):
  """All operations on all images: (operations, strengths, images, H, W, C), and the strengths."""
  strengths = np.float32([sign * m / 30 for m in MAGNITUDES for sign in (1, -1)])
  each = jax.vmap(augment.operate, (0, None, None))
  each = jax.vmap(jax.vmap(each, (None, None, 0)), (None, 0, None))
  numbers = np.arange(len(augment.OPS))
  return np.asarray(jax.jit(each)(images(channels), numbers, strengths)), strengths


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", augment.OPS)
def test_operations_are_pillows(name, channels):
  ours, strengths = operated(channels)
  assert ours.dtype == np.uint8
  expected = np.array([[pillow(name, x, float(s)) for x in images(channels)] for s in strengths])
  difference = np.abs(np.int32(ours[augment.OPS.index(name)]) - expected)
  assert difference.max() <= (name not in augment.MOTIONS)  # tones may be rounded otherwise
  assert difference.mean() < 0.02
  changed = np.any(expected != images(channels), axis=(1, 2, 3, 4))
  nothing = name == "identity" or (name == "color" and channels == 1)
  assert not changed.any() if nothing else changed[2:].all()


@pytest.mark.parametrize("channels", [1, 3])
def test_ranks_of_equalize(channels):
  for image in images(channels):
    expected = stats.rankdata(image, "min", axis=None) if channels == 1 else np.stack(
        [stats.rankdata(image[..., c], "min").reshape(SHAPE) for c in range(3)], axis=-1)
    for below in (augment._below, augment._below_by_table):
      np.testing.assert_array_equal(below(jnp.asarray(image)),
                                    expected.reshape(image.shape) - 1)


def test_operations_are_drawn_evenly_and_independently():
  num = 20_000
  op, sign = jax.jit(augment.choose, static_argnums=1)(keys(num), 2)
  assert len(augment.OPS) == 14 and op.shape == sign.shape == (2, num)
  assert set(np.unique(sign)) == {-1, 1}
  for counts in (np.bincount(op[0] * 14 + op[1], minlength=14**2),  # both layers
                 np.bincount(op[0] * 2 + (sign[0] > 0), minlength=28),
                 np.bincount((sign[0] > 0) * 2 + (sign[1] > 0), minlength=4)):
    assert stats.chisquare(counts).pvalue > 1e-3


def test_rand_augment_is_the_operations_drawn_whatever_the_batch():
  num, layers, magnitude = 12, 3, 9
  image = np.resize(images(3), (num, *SHAPE, 3))
  f = lambda keys, image: augment.rand_augment(keys, image, layers, magnitude)
  parts = jax.jit(jax.vmap(f))(keys(num).reshape(2, -1), image.reshape(2, -1, *SHAPE, 3))
  assert parts.dtype == np.uint8

  op, sign = augment.choose(keys(num), layers)
  operate, expected = jax.jit(jax.vmap(augment.operate)), image
  for layer in range(layers):
    expected = operate(expected, op[layer], sign[layer] * np.float32(magnitude / 30))
  np.testing.assert_array_equal(parts.reshape(image.shape), expected)
  assert np.any(expected != image, axis=(1, 2, 3)).sum() > num / 2


@pytest.mark.parametrize("image", [np.zeros((1, 4, 4, 3), np.float32),
                                   np.zeros((1, 4, 4, 2), np.uint8)])
def test_other_images_are_refused(image):
  with pytest.raises(ValueError, match="expected uint8"):
    augment.rand_augment(keys(1), image, 2, 9)


def test_flip():
  num = 400
  image = np.random.default_rng(0).integers(0, 256, (num, 4, 5, 3)).astype(np.uint8)
  ours = np.asarray(jax.jit(augment.flip)(keys(num), image))
  same, mirrored = ((ours == x).all((1, 2, 3)) for x in (image, image[:, :, ::-1]))
  np.testing.assert_array_equal(same, ~mirrored)
  assert stats.binomtest(int(same.sum()), num).pvalue > 1e-3
  np.testing.assert_array_equal(augment.flip(keys(num)[50:60], image[50:60]), ours[50:60])


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_crop(dtype):
  num, padding = 1000, 2
  image = np.random.default_rng(0).integers(1, 256, (4, 5, 3)).astype(dtype)
  batch = np.broadcast_to(image, (num, *image.shape))
  ours = np.asarray(jax.jit(augment.crop, static_argnums=2)(keys(num), batch, padding))
  assert ours.dtype == dtype
  counts = np.zeros((5, 5), int)
  for down in range(-padding, padding + 1):
    for right in range(-padding, padding + 1):
      expected = np.zeros_like(image)
      rows, columns = np.mgrid[:4, :5]
      inside = ((rows >= down) & (rows < 4 + down) & (columns >= right) & (columns < 5 + right))
      expected[inside] = image[(rows - down)[inside], (columns - right)[inside]]
      counts[down, right] = (ours == expected).all((1, 2, 3)).sum()
  assert counts.sum() == num
  assert stats.chisquare(counts.reshape(-1)).pvalue > 1e-3
  np.testing.assert_array_equal(augment.crop(keys(num)[50:60], batch[50:60], padding), ours[50:60])
