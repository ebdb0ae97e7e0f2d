"""ViT (arXiv 2010.11929) as a denoiser of labels: DiffusionBlocks, section 4.1.

One `ViT` is one self-contained block: its own embedders, layers and read-out.
"""

from typing import Annotated, Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from dbjax.fields import above
from dbjax.fields import below
from dbjax.fields import WEIGHTS
from dbjax.models.attention import Kernel
from dbjax.models.dit import patchify
from dbjax.models.transformer import check_heads
from dbjax.models.transformer import check_mlp
from dbjax.models.transformer import Dense
from dbjax.models.transformer import Heads
from dbjax.models.transformer import Layers
from dbjax.models.transformer import modulate
from dbjax.models.transformer import NoiseEmbedding
from dbjax.models.transformer import Ratio
from dbjax.models.transformer import Remat
from dbjax.models.transformer import sincos_positions
from dbjax.models.transformer import Stack
from dbjax.models.transformer import Unroll
from dbjax.models.transformer import Width
from dbjax.models.transformer import zeros


class ViT(nn.Module):
  """Logits of an image's label, from its noised embedding and the image.

  The embedding is one more token, and the one that is read.

  Attributes:
    num_layers, width, num_heads, mlp_ratio: of the transformer.
    patch_size: P; the image's height and width are multiples of it.
    num_classes: of the labels.
    dtype: of the compute; parameters and logits are float32.
    dropout, remat, unroll, attention: see `transformer.Stack`.

  Call: x (N, E), the noised embedding times c_in; c_noise (N,); image (N, H, W, C) float;
    keys (N,) of dropout, or None -> (N, num_classes) float32.
  """

  num_layers: Layers
  width: Width
  num_heads: Heads
  patch_size: Annotated[int, above(0), "pixels, of a side"]
  num_classes: int
  mlp_ratio: Ratio = 4.0
  dropout: Annotated[float, below(1), WEIGHTS, "of each branch's outputs, while training"] = 0.0
  dtype: Any = jnp.float32
  remat: Remat = False
  unroll: Unroll = 1
  attention: Kernel = "auto"

  parts = dict(layers="stack", embedding="(patch|label)_embedding", head="read_out")

  def check(self):
    """Raises ValueError where the numbers do not go together."""
    check_heads(self.width, self.num_heads)
    check_mlp(self.width, self.mlp_ratio)

  @nn.compact
  def __call__(self, x: jax.Array, c_noise: jax.Array, image: jax.Array,
               keys: jax.Array | None = None) -> jax.Array:
    rows, columns = image.shape[1] // self.patch_size, image.shape[2] // self.patch_size
    tokens = patchify(image.astype(self.dtype), self.patch_size)
    tokens = Dense(self.width, dtype=self.dtype, name="patch_embedding")(tokens)
    tokens += sincos_positions(rows, columns, self.width).astype(self.dtype)

    # From zero: noise of unit variance would drown the token that is read.
    label = Dense(self.width, zeros, self.dtype, name="label_embedding")(x.astype(self.dtype))
    position = self.param("label_position", nn.initializers.normal(0.02), (self.width,))
    label += position.astype(self.dtype)
    tokens = jnp.concatenate([label[:, None], tokens], axis=1)

    c = NoiseEmbedding(self.width, dtype=self.dtype, name="noise_embedding")(c_noise)
    tokens = Stack(num_layers=self.num_layers, num_heads=self.num_heads, mlp_ratio=self.mlp_ratio,
                   dtype=self.dtype, remat=self.remat, unroll=self.unroll, dropout=self.dropout,
                   attention=self.attention, name="stack")(tokens, c, keys)

    shift, scale = jnp.split(
        Dense(2 * self.width, zeros, self.dtype, name="modulation")(nn.silu(c)), 2, axis=-1)
    # Whatever the dtype: a rounding of logits would be one of the loss.
    return Dense(self.num_classes, zeros, name="read_out")(
        modulate(tokens[:, :1], shift, scale))[:, 0]
