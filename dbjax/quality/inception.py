"""InceptionV3 (Szegedy et al., arXiv 1512.00567) up to its pooled features, as FID uses it.

FID is defined by one set of weights, TensorFlow's of 2015-12-05, and by the graph that they
ran in. pytorch-fid ported both (https://github.com/mseitzer/pytorch-fid): torchvision's
network, except that average pools leave the padding out of their mean and that the last
block's pool takes the maximum. Names are torchvision's; each norm is folded into the
convolution before it.
"""

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

SIZE = 299
CHECKSUM = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
       "pt_inception-2015-12-05-6726825d.pth")


class InceptionV3(nn.Module):
  """Features of images.

  Attributes:
    fid: pytorch-fid's graph, whose features FID compares; otherwise torchvision's.

  Call: x (N, H, W, 3) in [-1, 1], H and W 75 or more -> (N, 2048) float32.
  """

  fid: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    average = functools.partial(nn.avg_pool, window_shape=(3, 3), padding="SAME",
                                count_include_pad=not self.fid)
    largest = functools.partial(nn.max_pool, window_shape=(3, 3), padding="SAME")
    x = conv(x, "Conv2d_1a_3x3", 32, 3, 3, stride=2, padding="VALID")
    x = conv(x, "Conv2d_2a_3x3", 32, 3, 3, padding="VALID")
    x = halve(conv(x, "Conv2d_2b_3x3", 64, 3, 3))
    x = conv(x, "Conv2d_3b_1x1", 80, 1, 1)
    x = halve(conv(x, "Conv2d_4a_3x3", 192, 3, 3, padding="VALID"))
    for name, pool_features in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
      x = InceptionA(pool_features, average, name=name)(x)
    x = InceptionB(name="Mixed_6a")(x)
    for name, features in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160),
                           ("Mixed_6e", 192)):
      x = InceptionC(features, average, name=name)(x)
    x = InceptionD(name="Mixed_7a")(x)
    x = InceptionE(average, name="Mixed_7b")(x)
    x = InceptionE(largest if self.fid else average, name="Mixed_7c")(x)
    return x.mean(axis=(1, 2))


class InceptionA(nn.Module):
  """(N, H, W, C) -> (N, H, W, 224 + pool_features)."""

  pool_features: int
  pool: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return jnp.concatenate([
        conv(x, "branch1x1", 64, 1, 1),
        chain(x, "branch5x5", (48, 1, 1), (64, 5, 5)),
        chain(x, "branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3)),
        conv(self.pool(x), "branch_pool", self.pool_features, 1, 1)], axis=-1)


class InceptionB(nn.Module):
  """(N, H, W, C) -> (N, (H - 1) // 2, (W - 1) // 2, 480 + C)."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    double = chain(x, "branch3x3dbl", (64, 1, 1), (96, 3, 3))
    return jnp.concatenate([
        conv(x, "branch3x3", 384, 3, 3, stride=2, padding="VALID"),
        conv(double, "branch3x3dbl_3", 96, 3, 3, stride=2, padding="VALID"),
        halve(x)], axis=-1)


class InceptionC(nn.Module):
  """(N, H, W, C) -> (N, H, W, 768)."""

  features: int
  pool: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.features
    return jnp.concatenate([
        conv(x, "branch1x1", 192, 1, 1),
        chain(x, "branch7x7", (c, 1, 1), (c, 1, 7), (192, 7, 1)),
        chain(x, "branch7x7dbl", (c, 1, 1), (c, 7, 1), (c, 1, 7), (c, 7, 1), (192, 1, 7)),
        conv(self.pool(x), "branch_pool", 192, 1, 1)], axis=-1)


class InceptionD(nn.Module):
  """(N, H, W, C) -> (N, (H - 1) // 2, (W - 1) // 2, 512 + C)."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    three = conv(x, "branch3x3_1", 192, 1, 1)
    seven = chain(x, "branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1))
    return jnp.concatenate([
        conv(three, "branch3x3_2", 320, 3, 3, stride=2, padding="VALID"),
        conv(seven, "branch7x7x3_4", 192, 3, 3, stride=2, padding="VALID"),
        halve(x)], axis=-1)


class InceptionE(nn.Module):
  """(N, H, W, C) -> (N, H, W, 2048)."""

  pool: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    three = conv(x, "branch3x3_1", 384, 1, 1)
    double = chain(x, "branch3x3dbl", (448, 1, 1), (384, 3, 3))
    return jnp.concatenate([
        conv(x, "branch1x1", 320, 1, 1),
        conv(three, "branch3x3_2a", 384, 1, 3),
        conv(three, "branch3x3_2b", 384, 3, 1),
        conv(double, "branch3x3dbl_3a", 384, 1, 3),
        conv(double, "branch3x3dbl_3b", 384, 3, 1),
        conv(self.pool(x), "branch_pool", 192, 1, 1)], axis=-1)


def conv(x: jax.Array, name: str, features: int, height: int, width: int, stride: int = 1,
         padding: str = "SAME") -> jax.Array:
  """Convolution and ReLU, as the layer `name` of the module that calls this."""
  # Without "highest" TPUs multiply in bfloat16 and GPUs in TF32, which moves FID.
  return nn.relu(nn.Conv(features, (height, width), stride, padding, precision="highest",
                         name=name)(x))


def chain(x: jax.Array, name: str, *convs: tuple[int, int, int]) -> jax.Array:
  """The layers name_1, name_2, ..., each given as (features, height, width)."""
  for i, (features, height, width) in enumerate(convs, start=1):
    x = conv(x, f"{name}_{i}", features, height, width)
  return x


def halve(x: jax.Array) -> jax.Array:
  """Max pool of 3 x 3 with stride 2, unpadded."""
  return nn.max_pool(x, (3, 3), (2, 2))


def prepare(images: jax.Array) -> jax.Array:
  """Resized as by pytorch-fid: bilinear, not antialiased even where it shrinks.

  images (N, H, W, 3) uint8 -> (N, 299, 299, 3) float32 in [-1, 1].
  """
  x = images.astype(jnp.float32) / 255
  shape = (len(x), SIZE, SIZE, 3)
  return 2 * jax.image.resize(x, shape, "bilinear", antialias=False) - 1


def torch_names(layer: str) -> tuple[str, str]:
  """What pytorch-fid's file calls the convolution and the norm of our `layer`."""
  return f"{layer}.conv", f"{layer}.bn"
