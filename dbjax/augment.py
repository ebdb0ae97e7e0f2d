"""Random flips, crops and RandAugment (arXiv 1909.13719) of image batches, on the device.

What becomes of image i is a function of keys[i] alone, so that no split of a batch changes it.

RandAugment draws `num_layers` of 14 operations, one after another, all at one magnitude from 0
to 30. Each is Pillow's, in the ranges of torchvision; pixels from outside are grey, as in
AutoAugment (arXiv 1805.09501), and those inside are the nearest. In one program for a batch
every image pays for all operations, so they are put together: one resampling, by the matrix of
the operation drawn, and one selection of tones.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
import numpy as np

MAX_MAGNITUDE = 30
FILL = 128


def flip(keys: jax.Array, image: jax.Array) -> jax.Array:
  """Mirrors each image (N, H, W, C) left to right, or not. keys (N,)."""
  flipped = jax.vmap(jax.random.bernoulli)(keys)
  return jnp.where(flipped[:, None, None, None], image[:, :, ::-1], image)


def crop(keys: jax.Array, image: jax.Array, padding: int) -> jax.Array:
  """Moves each image (N, H, W, C) up to `padding` pixels along both axes; 0 comes in. keys (N,)."""
  padded = jnp.pad(image, ((0, 0), (padding, padding), (padding, padding), (0, 0)))

  def one(key, padded):
    row, column = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return jax.lax.dynamic_slice(padded, (row, column, 0), image.shape[1:])

  return jax.vmap(one)(keys, padded)


def rand_augment(keys: jax.Array, image: jax.Array, num_layers: int,
                 magnitude: jax.typing.ArrayLike) -> jax.Array:
  """`num_layers` random operations on each image.

  Args:
    keys: (N,).
    image: (N, H, W, C) uint8 with C 1 or 3.
    num_layers: of operations: 2 in the paper.
    magnitude: from 0 to 30, 9 in torchvision.

  Returns:
    (N, H, W, C) uint8.
  """
  if image.dtype != jnp.uint8 or image.shape[-1] not in (1, 3):
    raise ValueError(f"image is {image.dtype} {image.shape}: expected uint8 (N, H, W, 1 or 3)")

  def layer(image, drawn):
    op, sign = drawn
    return jax.vmap(operate)(image, op, sign * (magnitude / MAX_MAGNITUDE)), None

  return jax.lax.scan(layer, image, choose(keys, num_layers))[0]


def choose(keys: jax.Array, num_layers: int) -> tuple[jax.Array, jax.Array]:
  """Numbers in OPS and signs, 1 or -1, of the operations: both (num_layers, N)."""

  def one(key, layer):
    op_key, sign_key = jax.random.split(jax.random.fold_in(key, layer))
    return jax.random.randint(op_key, (), 0, len(OPS)), jax.random.rademacher(sign_key, ())

  return jax.vmap(jax.vmap(one, (0, None)), (None, 0))(keys, jnp.arange(num_layers))


def operate(image: jax.Array, op: jax.Array, strength: jax.Array) -> jax.Array:
  """One operation on one image.

  Args:
    image: (H, W, C) uint8.
    op: (), its number in OPS.
    strength: (), from -1 to 1; the sign is that of a direction, where there is one.

  Returns:
    (H, W, C) uint8.
  """
  # `switch` takes a number beyond its branches for the nearest of them, and on both sides of
  # the border between tones and motions is the identity.
  motions = [functools.partial(f, image.shape[:2]) for f in MOTIONS.values()]
  matrix = jax.lax.switch(op - len(TONES) + 1, motions, strength)
  tones = list(TONES.values())
  return jax.lax.switch(op, tones, _resample(image, matrix), strength).astype(jnp.uint8)


def _resample(image: jax.Array, matrix: jax.Array) -> jax.Array:
  """int32 (H, W, C): at (column, row) what `image` has at matrix (2, 3) @ (column, row, 1)."""
  height, width, channels = image.shape
  row, column = jnp.mgrid[:height, :width] + 0.5  # the centres of pixels
  column, row = (jnp.floor(a * column + b * row + c).astype(jnp.int32) for a, b, c in matrix)
  inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
  pixels = image.reshape(-1, channels).astype(jnp.int32)
  return jnp.where(inside[..., None],
                   jnp.take(pixels, row * width + column, axis=0, mode="clip"), FILL)


def _matrix(a=1.0, b=0.0, c=0.0, d=0.0, e=1.0, f=0.0) -> jax.Array:
  return jnp.stack([jnp.float32(x) for x in (a, b, c, d, e, f)]).reshape(2, 3)


def _rotate(shape: tuple[int, int], strength: jax.Array) -> jax.Array:
  """By up to 30 degrees around the centre, anticlockwise."""
  angle = np.pi / 6 * strength
  cos, sin, (y, x) = jnp.cos(angle), jnp.sin(angle), (shape[0] / 2, shape[1] / 2)
  return _matrix(cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)


def _pixels(size: int, strength: jax.Array) -> jax.Array:
  return jnp.trunc(150 / 331 * size * strength)


# Of one operation: (H, W), strength -> where a pixel comes from.
MOTIONS = {
    "identity": lambda shape, s: _matrix(),
    "rotate": _rotate,
    "shear_x": lambda shape, s: _matrix(b=0.3 * s),
    "shear_y": lambda shape, s: _matrix(d=0.3 * s),
    "translate_x": lambda shape, s: _matrix(c=_pixels(shape[1], s)),
    "translate_y": lambda shape, s: _matrix(f=_pixels(shape[0], s)),
}


def _autocontrast(image: jax.Array, strength: jax.Array) -> jax.Array:
  """Each channel stretched to [0, 255]."""
  low, high = image.min((0, 1)), image.max((0, 1))
  return jnp.where(high > low, (image - low) * 255 // jnp.maximum(high - low, 1), image)


def _equalize(image: jax.Array, strength: jax.Array) -> jax.Array:
  """Each channel's histogram made even."""
  below = jax.lax.platform_dependent(image, cpu=_below_by_table, default=_below)
  step = below.max((0, 1)) // 255  # how many pixels a grey level is to have
  even = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
  return jnp.where(step > 0, even, image)


def _below(image: jax.Array) -> jax.Array:
  """How many pixels of its channel each one is brighter than. int (H, W, C) -> int32.

  Two sums that XLA never holds the terms of: accelerators, TPUs above all, are slow at tables.
  """
  levels = jnp.arange(256)
  below = (image[..., None] < levels).sum((0, 1), dtype=jnp.int32)  # (C, 256)
  return jnp.where(image[..., None] == levels, below, 0).sum(-1)


def _below_by_table(image: jax.Array) -> jax.Array:
  """The same, on CPU a hundred times as fast."""
  channel = jnp.arange(image.shape[-1])
  histogram = jnp.zeros((256, image.shape[-1]), jnp.int32).at[image, channel].add(1)
  return (jnp.cumsum(histogram, axis=0) - histogram)[image, channel]


def _posterize(image: jax.Array, strength: jax.Array) -> jax.Array:
  """The highest 8 to 4 bits."""
  dropped = jnp.round(4 * jnp.abs(strength)).astype(jnp.int32)
  return image >> dropped << dropped


def _solarize(image: jax.Array, strength: jax.Array) -> jax.Array:
  """The negative of what is at least as bright as a threshold from 255 to 0."""
  return jnp.where(image >= 255 * (1 - jnp.abs(strength)), 255 - image, image)


def _enhance(without, image: jax.Array, strength: jax.Array) -> jax.Array:
  """From 0.1 to 1.9 times what distinguishes `image` from the one `without` it."""
  without = without(image)
  blend = without + (1 + 0.9 * strength) * (image - without)
  return jnp.clip(blend, 0, 255).astype(jnp.int32)


def _grey(image: jax.Array) -> jax.Array:
  """ITU-R 601 luma in integers, as Pillow: (H, W, 1)."""
  if image.shape[-1] == 1:
    return image
  weights = np.array([19595, 38470, 7471], np.int32)
  return ((image * weights).sum(-1, keepdims=True) + 2**15) >> 16


def _mean_grey(image: jax.Array) -> jax.Array:
  return jnp.floor(_grey(image).mean(dtype=jnp.float32) + 0.5)


def _smooth(image: jax.Array) -> jax.Array:
  """Of 3 x 3 pixels the mean, the one in the middle with weight 5; the edge as it is."""
  height, width, _ = image.shape
  total = 4 * image[1:-1, 1:-1] + sum(
      image[i:height - 2 + i, j:width - 2 + j] for i in range(3) for j in range(3))
  return image.at[1:-1, 1:-1].set((2 * total + 13) // 26)


# Of one operation: image (H, W, C) int32, strength -> image. The identity is the last.
TONES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "solarize": _solarize,
    "posterize": _posterize,
    "color": functools.partial(_enhance, _grey),
    "contrast": functools.partial(_enhance, _mean_grey),
    "brightness": functools.partial(_enhance, jnp.zeros_like),
    "sharpness": functools.partial(_enhance, _smooth),
    "identity": lambda image, s: image,
}
OPS = tuple(dict.fromkeys([*TONES, *MOTIONS]))
