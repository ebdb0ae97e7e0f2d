"""ViT (arXiv 2010.11929) as a denoiser of labels: DiffusionBlocks, section 4.1.

One `ViT` is one self-contained block: its own embedders, layers and read-out.
"""

from typing import Annotated, Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dbjax.fields import above
from dbjax.fields import below
from dbjax.fields import WEIGHTS
from dbjax.models import positions as positions_lib
from dbjax.models.attention import Kernel
from dbjax.models.dense import Dense
from dbjax.models.dense import zeros
from dbjax.models.dit import patchify
from dbjax.models.positions import Positions
from dbjax.models.transformer import check_form
from dbjax.models.transformer import check_heads
from dbjax.models.transformer import check_mlp
from dbjax.models.transformer import Form
from dbjax.models.transformer import Heads
from dbjax.models.transformer import Hidden
from dbjax.models.transformer import Layers
from dbjax.models.transformer import modulate
from dbjax.models.transformer import Noise
from dbjax.models.transformer import NOISES
from dbjax.models.transformer import Norm
from dbjax.models.transformer import QKNorm
from dbjax.models.transformer import Ratio
from dbjax.models.transformer import Remat
from dbjax.models.transformer import Rotary
from dbjax.models.transformer import Stack
from dbjax.models.transformer import Unroll
from dbjax.models.transformer import Width


class ViT(nn.Module):
  """Logits of an image's label, from its noised embedding and the image.

  The embedding is one more token, and the one that is read.

  Attributes:
    num_layers, width, num_heads, mlp_ratio: of the transformer.
    patch_size: P; the image's height and width are multiples of it.
    num_classes: of the labels.
    norm, mlp, qk_norm, rotary: what a layer is made of: see `transformer.Form`.
    positions: what is added to tokens, by their row and column.
    noise: how the level of noise is embedded, one of `transformer.NOISES`.
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
  norm: Norm = "layer"
  mlp: Hidden = "gelu"
  qk_norm: QKNorm = False
  rotary: Rotary = "none"
  positions: Positions = "sincos"
  noise: Noise = "sinusoids"
  dropout: Annotated[float, below(1), WEIGHTS, "of each branch's outputs, while training"] = 0.0
  dtype: Any = jnp.float32
  remat: Remat = False
  unroll: Unroll = 1
  attention: Kernel = "auto"

  parts = dict(layers="stack", embedding="(patch|label)_embedding", head="read_out")

  def check(self):
    """Raises ValueError where the numbers do not go together."""
    check_heads(self.width, self.num_heads)
    check_form(self.width, self.num_heads, self.rotary, self.positions)
    check_mlp(self.width, self.mlp_ratio, self.mlp)

  @nn.compact
  def __call__(self, x: jax.Array, c_noise: jax.Array, image: jax.Array,
               keys: jax.Array | None = None) -> jax.Array:
    rows, columns = image.shape[1] // self.patch_size, image.shape[2] // self.patch_size
    tokens = patchify(image.astype(self.dtype), self.patch_size)
    tokens = Dense(self.width, dtype=self.dtype, name="patch_embedding")(tokens)
    tokens += positions_lib.added(self, self.positions, rows, columns).astype(self.dtype)

    # From zero: noise of unit variance would drown the token that is read.
    label = Dense(self.width, zeros, self.dtype, name="label_embedding")(x.astype(self.dtype))
    position = self.param("label_position", nn.initializers.normal(0.02), (self.width,))
    label += position.astype(self.dtype)
    tokens = jnp.concatenate([label[:, None], tokens], axis=1)

    c = NOISES[self.noise](self.width, dtype=self.dtype, name="noise_embedding")(c_noise)
    form = Form(self.norm, self.mlp, self.qk_norm, self.rotary)
    # The label stands before the first row and column.
    places = np.pad(1 + positions_lib.grid(rows, columns), [(1, 0), (0, 0)])
    tokens = Stack(num_layers=self.num_layers, num_heads=self.num_heads, mlp_ratio=self.mlp_ratio,
                   dtype=self.dtype, remat=self.remat, unroll=self.unroll, dropout=self.dropout,
                   attention=self.attention, form=form, places=places,
                   name="stack")(tokens, c, keys)

    shift, scale = jnp.split(
        Dense(2 * self.width, zeros, self.dtype, name="modulation")(nn.silu(c)), 2, axis=-1)
    # Whatever the dtype: a rounding of logits would be one of the loss.
    return Dense(self.num_classes, zeros, name="read_out")(
        modulate(tokens[:, :1], shift, scale, self.norm))[:, 0]
