"""Networks and a sampler a second time, in numpy and float64, from their papers' definitions."""

import itertools
from types import SimpleNamespace

from flax.traverse_util import flatten_dict
import jax
import numpy as np

from dbjax.schedule import make_schedule

silu = lambda a: a / (1 + np.exp(-a))
gelu = lambda a: a / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))
rms = lambda a: a / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-6)


class NumpyBlock:
  """What DiT (arXiv 2212.09748, section 3) and ViT have in common, one image and head at a time.

  What may stand in the place of its parts: RMSNorm (1910.07467), SwiGLU (2002.05202), normed
  queries and keys (2302.05442), heads turned by row and column (2403.13298).
  """

  def __init__(self, params, patch, heads, *, norm="layer", mlp="gelu", qk_norm=False,
               rotary="none", positions="sincos", noise="sinusoids"):
    self.flat = {k: np.asarray(v, np.float64) for k, v in flatten_dict(params, sep="/").items()}
    self.patch, self.heads, self.norm, self.mlp, self.qk_norm = patch, heads, norm, mlp, qk_norm
    self.rotary, self.positions, self.noise = rotary, positions, noise

  def dense(self, name, a, layer=...):
    return a @ self.flat[f"{name}/kernel"][layer] + self.flat[f"{name}/bias"][layer]

  def normed(self, a, shift, scale):
    return rms(a - a.mean(-1, keepdims=True) if self.norm == "layer" else a) * (1 + scale) + shift

  def patches(self, image):
    """Tokens of an image, and the row and column of each."""
    size, quarter = self.patch, self.flat["patch_embedding/bias"].size // 4
    places = [(r, c) for r in range(image.shape[0] // size) for c in range(image.shape[1] // size)]
    cut = lambda r, c: image[r * size:(r + 1) * size, c * size:(c + 1) * size].reshape(-1)
    sinusoids = lambda x: [f(x / 10000 ** (i / quarter)) for f in (np.sin, np.cos)
                           for i in range(quarter)]
    a = self.dense("patch_embedding", [cut(*place) for place in places])
    if self.positions == "sincos":
      a += [sinusoids(c) + sinusoids(r) for r, c in places]
    return a + (self.flat["positions"] if self.positions == "learned" else 0), np.array(places)

  def level(self, c_noise):
    if self.noise == "line":
      return self.flat["noise_embedding/start"] + c_noise * self.flat["noise_embedding/slope"]
    angles = c_noise * np.geomspace(1, 100, 128)
    hidden = self.dense("noise_embedding/hidden", [*np.cos(angles), *np.sin(angles)])
    return self.dense("noise_embedding/out", silu(hidden))

  def turn(self, a, head, layer, places):
    """Pairs of features as complex numbers, each turned by its own angle."""
    real, imaginary = np.split(a, 2, axis=-1)
    falling = 100 ** (-np.arange(len(a[0]) // 4) / (len(a[0]) // 4))
    by_row, by_column = [*falling, *0 * falling], [*0 * falling, *falling]
    if self.rotary == "learned":
      by_row, by_column = self.flat["stack/layers/attention/frequencies"][layer, :, head]
    row, column = places.T[..., None]
    turned = (real + 1j * imaginary) * np.exp(1j * (row * by_row + column * by_column))
    return np.concatenate([turned.real, turned.imag], axis=-1)

  def attend(self, a, layer, places):
    qkv = np.split(self.dense("stack/layers/attention/qkv", a, layer), 3, axis=-1)
    outs = []
    for head, (q, k, v) in enumerate(zip(*(np.split(m, self.heads, axis=-1) for m in qkv))):
      if self.qk_norm:
        q, k = (rms(m) * self.flat[f"stack/layers/attention/{name}/scale"][layer]
                for m, name in ((q, "q_norm"), (k, "k_norm")))
      if self.rotary != "none":
        q, k = self.turn(q, head, layer, places), self.turn(k, head, layer, places)
      scores = np.exp(q @ k.T / np.sqrt(q.shape[-1]))
      outs.append(scores / scores.sum(-1, keepdims=True) @ v)
    return self.dense("stack/layers/attention/out", np.concatenate(outs, axis=-1), layer)

  def layers(self, a, c, places):
    for layer in range(len(self.flat["stack/layers/attention/qkv/bias"])):
      shift, scale, gate, shift_2, scale_2, gate_2 = np.split(
          self.dense("stack/layers/modulation", c, layer), 6)
      a = a + gate * self.attend(self.normed(a, shift, scale), layer, places)
      hidden = self.dense("stack/layers/mlp/hidden", self.normed(a, shift_2, scale_2), layer)
      if self.mlp == "swiglu":
        hidden, up = np.split(hidden, 2, axis=-1)
      hidden = silu(hidden) * up if self.mlp == "swiglu" else gelu(hidden)
      a = a + gate_2 * self.dense("stack/layers/mlp/out", hidden, layer)
    return self.dense("read_out", self.normed(a, *np.split(self.dense("modulation", c), 2)))


def numpy_dit(params, x, c_noise, label, patch, heads, **form):
  """The outputs of one image after another."""
  block = NumpyBlock(params, patch, heads, **form)

  def one(image, c_noise, label):
    a, places = block.patches(image)
    a = block.layers(a, silu(block.level(c_noise)
                             + block.flat["label_embedding/embedding"][label]), places)
    out = np.empty_like(image)
    for (r, c), token in zip(patch * places, a):
      out[r:r + patch, c:c + patch] = token.reshape(patch, patch, image.shape[-1])
    return out

  return np.stack([one(*each) for each in zip(np.float64(x), np.float64(c_noise), label)])


def numpy_vit(params, x, c_noise, image, patch, heads, **form):
  """The logits of one image after another."""
  block = NumpyBlock(params, patch, heads, **form)

  def one(x, c_noise, image):
    a, places = block.patches(image)
    label = block.dense("label_embedding", x) + block.flat["label_position"]
    return block.layers(np.array([label, *a]), silu(block.level(c_noise)),
                        np.array([(0, 0), *(places + 1)]))[0]

  return np.stack([one(*each) for each in zip(*(np.float64(a) for a in (x, c_noise, image)))])


def write(scores, move, key, sigmas, width, length, eos):
  """A text, token by token, each denoised from noise. (length,) int.

  Args:
    scores: (text, position, z (width,), sigma) -> (V,), of which the softmax is the token's.
    move: (z, scores, sigma, sigma_next, key) -> z at sigma_next.
    key: of the text.
    sigmas: descending to 0.
    width, length, eos: of embeddings, of the text, and what closes it.
  """
  text = np.zeros(length, int)
  for position in range(length):
    start, end, between = jax.random.split(jax.random.fold_in(key, position), 3)
    z = sigmas[0] * np.asarray(jax.random.normal(start, (width,)))
    for step, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
      found = scores(text, position, z, sigma)
      z = move(z, found, sigma, sigma_next, jax.random.fold_in(between, step))
    text[position] = np.argmax(found + jax.random.gumbel(end, found.shape))
    if text[position] == eos:
      text[position:] = eos
      break
  return text


# Gaussian data N(MU, COV), whose every denoiser and trajectory has a closed form.
MU = np.array([0.4, -0.3, 0.1])
COV = np.array([[0.5, 0.2, -0.1], [0.2, 0.3, 0.05], [-0.1, 0.05, 0.1]])
VALUES, VECTORS = np.linalg.eigh(COV)


def edm_schedule(num_blocks):
  return make_schedule(SimpleNamespace(P_mean=-1.2, P_std=1.2, sigma_min=0.002, sigma_max=80.0,
                                       partition="equal_mass", gamma=0.05), num_blocks)


def linear(scale):
  """The matrix with the data's eigenvectors and eigenvalues scale(VALUES)."""
  return VECTORS * scale(VALUES) @ VECTORS.T


def expert(lo, hi):
  """The denoiser of N(MU, COV), float64, for one block's noise only."""

  def denoise(z, sigma):
    assert lo <= sigma <= hi
    return MU + (z - MU) @ linear(lambda v: v / (v + sigma**2))

  return denoise


def chain(num_blocks):
  """D(z, sigma) by `num_blocks` experts, and the list of those that were called."""
  split = edm_schedule(num_blocks)
  experts = [expert(lo, hi) for hi, lo in zip(split.boundaries, split.boundaries[1:])]
  called = []

  def denoise(z, sigma):
    block = int(split.block_of(sigma))
    called.append(block)
    return experts[block](z, sigma)

  return denoise, called
