"""Networks and a sampler a second time, in numpy and float64, from their papers' definitions."""

import itertools
from types import SimpleNamespace

from flax.traverse_util import flatten_dict
import jax
import numpy as np

from dbjax.schedule import make_schedule

# Where `numpy_dit` finds its weights: all names are here.
WEIGHTS = {
    "patch": "patch_embedding", "noise_1": "noise_embedding/hidden",
    "noise_2": "noise_embedding/out", "label": "label_embedding/embedding",
    "layer": "stack/layers", "qkv": "attention/qkv", "attended": "attention/out",
    "mlp_1": "mlp/hidden", "mlp_2": "mlp/out", "modulation": "modulation",
    "final_modulation": "modulation", "final": "read_out"}


def numpy_dit(params, x, c_noise, label, patch, heads):
  """DiT (arXiv 2212.09748, section 3), one image and one head at a time."""
  flat = {k: np.asarray(v, np.float64) for k, v in flatten_dict(params, sep="/").items()}
  silu = lambda a: a / (1 + np.exp(-a))
  gelu = lambda a: a / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))

  def dense(name, a, layer=None):
    path = WEIGHTS[name] if layer is None else f"{WEIGHTS['layer']}/{WEIGHTS[name]}"
    kernel, bias = flat[f"{path}/kernel"], flat[f"{path}/bias"]
    return a @ kernel + bias if layer is None else a @ kernel[layer] + bias[layer]

  def normed(a, shift, scale):
    a = a - a.mean(-1, keepdims=True)
    return a / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-6) * (1 + scale) + shift

  def attend(a, layer):
    qkv = np.split(dense("qkv", a, layer), 3, axis=-1)
    outs = []
    for q, k, v in zip(*(np.split(m, heads, axis=-1) for m in qkv)):
      scores = np.exp(q @ k.T / np.sqrt(q.shape[-1]))
      outs.append(scores / scores.sum(-1, keepdims=True) @ v)
    return dense("attended", np.concatenate(outs, axis=-1), layer)

  def one(image, c_noise, label):
    rows, columns = image.shape[0] // patch, image.shape[1] // patch
    cut = lambda r, c: image[r * patch:(r + 1) * patch, c * patch:(c + 1) * patch]
    a = dense("patch", [cut(r, c).reshape(-1) for r in range(rows) for c in range(columns)])
    quarter = a.shape[-1] // 4
    sinusoids = lambda x: [f(x / 10000 ** (i / quarter)) for f in (np.sin, np.cos)
                           for i in range(quarter)]
    a += [sinusoids(c) + sinusoids(r) for r in range(rows) for c in range(columns)]

    angles = c_noise * np.geomspace(1, 100, 128)
    noise = silu(dense("noise_1", np.concatenate([np.cos(angles), np.sin(angles)])))
    c = silu(dense("noise_2", noise) + flat[WEIGHTS["label"]][label])

    for layer in range(len(flat[f"{WEIGHTS['layer']}/{WEIGHTS['qkv']}/bias"])):
      shift, scale, gate, shift_2, scale_2, gate_2 = np.split(dense("modulation", c, layer), 6)
      a = a + gate * attend(normed(a, shift, scale), layer)
      hidden = gelu(dense("mlp_1", normed(a, shift_2, scale_2), layer))
      a = a + gate_2 * dense("mlp_2", hidden, layer)

    a = dense("final", normed(a, *np.split(dense("final_modulation", c), 2)))
    out = np.empty_like(image)
    for i, token in enumerate(a):
      r, c = divmod(i, columns)
      cut_shape = (patch, patch, image.shape[-1])
      out[r * patch:(r + 1) * patch, c * patch:(c + 1) * patch] = token.reshape(cut_shape)
    return out

  return np.stack([one(*each) for each in zip(np.float64(x), np.float64(c_noise), label)])


def numpy_vit(params, x, c_noise, image, patch, heads):
  """The logits of one image after another."""
  flat = {k: np.asarray(v, np.float64) for k, v in flatten_dict(params, sep="/").items()}
  silu = lambda a: a / (1 + np.exp(-a))
  gelu = lambda a: a / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))
  dense = lambda name, a: a @ flat[f"{name}/kernel"] + flat[f"{name}/bias"]

  def normed(a, shift, scale):
    return (a - a.mean(1, keepdims=True)) / np.sqrt(a.var(1, keepdims=True) + 1e-6) * (
        1 + scale) + shift

  def layer(i, a, c):
    of = lambda name, a: (a @ flat[f"stack/layers/{name}/kernel"][i]
                          + flat[f"stack/layers/{name}/bias"][i])
    shift, scale, gate, shift_2, scale_2, gate_2 = np.split(of("modulation", c), 6)
    qkv = of("attention/qkv", normed(a, shift, scale)).reshape(len(a), 3, heads, -1)
    q, k, v = (qkv[:, j] for j in range(3))
    scores = np.exp(np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1]))
    weights = scores / scores.sum(-1, keepdims=True)
    a = a + gate * of("attention/out", np.einsum("hqk,khd->qhd", weights, v).reshape(a.shape))
    return a + gate_2 * of("mlp/out", gelu(of("mlp/hidden", normed(a, shift_2, scale_2))))

  def one(x, c_noise, image):
    tokens = [dense("label_embedding", x) + flat["label_position"]]
    for r in range(image.shape[0] // patch):
      for c in range(image.shape[1] // patch):
        cut = image[r * patch:(r + 1) * patch, c * patch:(c + 1) * patch]
        quarter = len(flat["label_position"]) // 4
        position = [f(p / 10000 ** (i / quarter)) for p in (c, r) for f in (np.sin, np.cos)
                    for i in range(quarter)]
        tokens.append(dense("patch_embedding", cut.reshape(-1)) + position)
    angles = c_noise * np.geomspace(1, 100, 128)
    c = np.concatenate([np.cos(angles), np.sin(angles)])
    c = silu(dense("noise_embedding/out", silu(dense("noise_embedding/hidden", c))))
    a = np.array(tokens)
    for i in range(len(flat["stack/layers/modulation/bias"])):
      a = layer(i, a, c)
    return dense("read_out", normed(a, *np.split(dense("modulation", c), 2))[0])

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
