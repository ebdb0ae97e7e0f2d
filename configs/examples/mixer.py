"""An own network: an MLP-Mixer (arXiv 2105.01601) for images, and a config that names it.

    cd configs/examples                                             # where mixer:Mixer is found
    python -m dbjax.main     --config=mixer.py --workdir=/tmp/mixer
    python -m dbjax.sample   --workdir=/tmp/mixer --out=/tmp/mixer.npz --guidance=2  # and .png
    python -m dbjax.evaluate --workdir=/tmp/mixer --guidance=1,2
    python -m dbjax.plan     --config=mixer.py --topology=cpu:4

Takes 75 s of CPU time. Of 1,500 samples: accuracy 0.85, Frechet 0.78; guidance 2: 0.99, 1.50.
"""

from flax import linen as nn
import jax.numpy as jnp
import ml_collections

import dbjax


class MixerLayer(nn.Module):
  """Mixes places, then features, each scaled, shifted and gated by c. x (N, T, D), c (N, D)."""

  @nn.compact
  def __call__(self, x, c):
    changes = nn.Dense(6 * x.shape[-1], kernel_init=nn.initializers.zeros)(nn.silu(c))[:, None]
    for axis, change in zip((1, 2), jnp.split(changes, 2, axis=-1)):
      scale, shift, gate = jnp.split(change, 3, axis=-1)
      h = nn.LayerNorm(use_bias=False, use_scale=False)(x) * (1 + scale) + shift
      h = h.swapaxes(axis, 2)  # what is mixed comes last
      h = nn.Dense(h.shape[-1])(nn.gelu(nn.Dense(2 * h.shape[-1])(h)))
      x = x + gate * h.swapaxes(axis, 2)  # gates start at 0: a new layer is the identity
    return x


class Mixer(nn.Module):
  num_layers: int  # of the block
  num_classes: int  # of the data; this number itself is the label of no class
  width: int = 64
  patch_size: int = 2
  remat: bool = False
  unroll: int = 1

  @nn.compact
  def __call__(self, x, c_noise, label):  # (N, H, W, C), (N,), (N,) -> (N, H, W, C)
    angles = c_noise[:, None] * jnp.geomspace(1, 100, 64)
    c = nn.Dense(self.width)(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1))
    c += nn.Embed(self.num_classes + 1, self.width)(label)
    patch = (self.patch_size, self.patch_size)
    h = nn.Conv(self.width, patch, patch)(x)
    layers = dbjax.stack(MixerLayer, self.num_layers, remat=self.remat, unroll=self.unroll)
    h = layers(h.reshape(len(x), -1, self.width), c).reshape(h.shape)
    return nn.ConvTranspose(x.shape[-1], patch, patch)(nn.LayerNorm()(h))


def get_config():
  return ml_collections.ConfigDict(dict(
      sigma_data=0.75, task=dict(name="image"), evaluate=dict(num_samples=1500),
      data=dict(image_size=8, channels=1, num_classes=10),  # name="digits" is the default
      model=dict(network="mixer:Mixer", num_layers=6, unroll=2),
      optimizer=dict(learning_rate=0.003), train=dict(num_steps=600, ema_decay=0.995)))
