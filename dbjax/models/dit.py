"""DiT (Peebles & Xie, arXiv 2212.09748): a transformer over the patches of an image.

One `DiT` is one self-contained block: its own embedders, layers and read-out.
"""

from typing import Annotated, Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from dbjax.fields import above
from dbjax.models import positions as positions_lib
from dbjax.models.attention import Kernel
from dbjax.models.dense import Dense
from dbjax.models.dense import Embed
from dbjax.models.dense import zeros
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

# Table 1 of the paper; Ti is ours, for small images.
_SIZES = {
    "DiT-Ti": dict(num_layers=6, width=128, num_heads=4),
    "DiT-S": dict(num_layers=12, width=384, num_heads=6),
    "DiT-B": dict(num_layers=12, width=768, num_heads=12),
    "DiT-L": dict(num_layers=24, width=1024, num_heads=16),
    "DiT-XL": dict(num_layers=28, width=1152, num_heads=16),
}
# "DiT-S/2" is size S with patches of 2 x 2.
SIZES = {f"{name}/{patch}": dict(**size, patch_size=patch)
         for name, size in _SIZES.items() for patch in (2, 4, 8)}


class DiT(nn.Module):
  """F(x, c_noise, label): the network inside the preconditioning.

  Attributes:
    num_layers, width, num_heads, mlp_ratio: of the transformer.
    patch_size: P; the image's height and width are multiples of it.
    num_classes: labels run from 0 to num_classes - 1; num_classes itself means none.
    norm, mlp, qk_norm, rotary: what a layer is made of: see `transformer.Form`.
    positions: what is added to tokens, by their row and column.
    noise: how the level of noise is embedded, one of `transformer.NOISES`.
    dtype: of the compute; parameters stay float32.
    remat, unroll, attention: see `transformer.Stack`.

  Call: x (N, H, W, C), c_noise (N,), label (N,) int -> (N, H, W, C) float32.
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
  dtype: Any = jnp.float32
  remat: Remat = False
  unroll: Unroll = 1
  attention: Kernel = "auto"

  sizes = SIZES
  parts = dict(layers="stack", embedding="(patch|label)_embedding", head="read_out")

  def check(self):
    """Raises ValueError where the numbers do not go together."""
    check_heads(self.width, self.num_heads)
    check_form(self.width, self.num_heads, self.rotary, self.positions)
    check_mlp(self.width, self.mlp_ratio, self.mlp)

  @nn.compact
  def __call__(self, x: jax.Array, c_noise: jax.Array, label: jax.Array) -> jax.Array:
    height, width, channels = x.shape[1:]
    rows, columns = height // self.patch_size, width // self.patch_size
    tokens = patchify(x.astype(self.dtype), self.patch_size)
    tokens = Dense(self.width, dtype=self.dtype, name="patch_embedding")(tokens)
    tokens += positions_lib.added(self, self.positions, rows, columns).astype(self.dtype)

    c = NOISES[self.noise](self.width, dtype=self.dtype, name="noise_embedding")(c_noise)
    c += Embed(self.num_classes + 1, self.width, dtype=self.dtype, name="label_embedding",
                  embedding_init=nn.initializers.normal(0.02))(label)

    form = Form(self.norm, self.mlp, self.qk_norm, self.rotary)
    places = positions_lib.grid(rows, columns)
    tokens = Stack(num_layers=self.num_layers, num_heads=self.num_heads, mlp_ratio=self.mlp_ratio,
                   dtype=self.dtype, remat=self.remat, unroll=self.unroll,
                   attention=self.attention, form=form, places=places, name="stack")(tokens, c)

    shift, scale = jnp.split(
        Dense(2 * self.width, zeros, self.dtype, name="modulation")(nn.silu(c)), 2, axis=-1)
    tokens = Dense(self.patch_size**2 * channels, zeros, self.dtype, name="read_out")(
        modulate(tokens, shift, scale, self.norm))
    return unpatchify(tokens, rows, self.patch_size).astype(jnp.float32)


def patchify(x: jax.Array, patch: int) -> jax.Array:
  """(N, H, W, C) -> (N, H/P * W/P, P * P * C), row by row."""
  n, h, w, c = x.shape
  x = x.reshape(n, h // patch, patch, w // patch, patch, c)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, -1, patch * patch * c)


def unpatchify(x: jax.Array, rows: int, patch: int) -> jax.Array:
  """The inverse of `patchify` for an image of `rows` rows of patches."""
  n, t, d = x.shape
  x = x.reshape(n, rows, t // rows, patch, patch, d // patch**2)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, rows * patch, -1, d // patch**2)
