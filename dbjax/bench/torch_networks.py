"""The networks of dbjax and their training steps in plain PyTorch: the twins to time against.

Run by `step.py` as a process of its own, so that neither library's threads disturb the other: says
the loss and the norm of the gradient of what it is given, then reads one line for each step to
take, and answers with the seconds it took. Modules have the names of dbjax's parameters.
"""

import json
import os
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

attend = F.scaled_dot_product_attention


def modulate(x, shift, scale):
  return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def rotary(length, features):
  """cos, sin (L, d) of rotary positions: those of feature i and of i + d/2 are the same."""
  frequencies = 1e4 ** -(torch.arange(features // 2) / (features // 2))
  angles = (torch.arange(length)[:, None] * frequencies).repeat(1, 2)
  return torch.stack([angles.cos(), angles.sin()])


def rotate(x, turn):
  a, b = x.chunk(2, -1)
  return x * turn[0] + torch.cat([-b, a], -1) * turn[1]


class Attention(nn.Module):

  def __init__(self, width, num_heads, bias=True):
    super().__init__()
    self.num_heads = num_heads
    self.qkv, self.out = nn.Linear(width, 3 * width, bias), nn.Linear(width, width, bias)

  def heads(self, x, turn=None):
    """q, k, v (N, H, T, d)."""
    q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return (q, k, v) if turn is None else (rotate(q, turn), rotate(k, turn), v)

  def merge(self, attended):
    return self.out(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):

  def __init__(self, width, hidden):
    super().__init__()
    self.hidden, self.out = nn.Linear(width, hidden), nn.Linear(hidden, width)

  def forward(self, x):
    return self.out(F.gelu(self.hidden(x), approximate="tanh"))


class SwiGLU(nn.Module):

  def __init__(self, width, hidden):
    super().__init__()
    self.hidden = nn.Linear(width, 2 * hidden, bias=False)
    self.out = nn.Linear(hidden, width, bias=False)

  def forward(self, x):
    gate, up = self.hidden(x).chunk(2, -1)
    return self.out(F.silu(gate) * up)


class NoiseEmbedding(nn.Module):

  def __init__(self, width):
    super().__init__()
    self.hidden, self.out = nn.Linear(256, width), nn.Linear(width, width)
    frequencies = torch.as_tensor(np.geomspace(1, 100, 128, dtype="f4"))
    self.register_buffer("frequencies", frequencies, persistent=False)

  def forward(self, c_noise):
    angles = c_noise[:, None] * self.frequencies
    return self.out(F.silu(self.hidden(torch.cat([angles.cos(), angles.sin()], -1))))


class Layer(nn.Module):

  def __init__(self, width, num_heads, mlp_ratio):
    super().__init__()
    self.modulation = nn.Linear(width, 6 * width)
    self.attention = Attention(width, num_heads)
    self.mlp = MLP(width, int(width * mlp_ratio))

  def forward(self, x, c, turn=None):
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(F.silu(c)).chunk(6, -1)
    attended = attend(*self.attention.heads(modulate(x, shift_a, scale_a), turn))
    x = x + gate_a[:, None] * self.attention.merge(attended)
    return x + gate_m[:, None] * self.mlp(modulate(x, shift_m, scale_m))


class Bidirectional(nn.Module):
  """What the DiT, the ViT and the masked network have in common."""

  def __init__(self, sizes, outputs):
    super().__init__()
    self.sizes = sizes
    width = sizes.width
    self.noise_embedding = NoiseEmbedding(width)
    self.layers = nn.ModuleList(Layer(width, sizes.num_heads, sizes.mlp_ratio)
                                for _ in range(sizes.num_layers))
    self.modulation, self.read_out = nn.Linear(width, 2 * width), nn.Linear(width, outputs)

  def embed_patches(self, image):
    """Patches (N, T, P P C) of images (N, H, W, C), embedded."""
    n, height, width, channels = image.shape
    p = self.sizes.patch_size
    patches = image.view(n, height // p, p, width // p, p, channels).transpose(2, 3)
    return self.patch_embedding(patches.reshape(n, -1, p * p * channels)) + self.positions

  def logits(self, x, c):
    shift, scale = self.modulation(F.silu(c)).chunk(2, -1)
    return self.read_out(modulate(x, shift, scale))


class DiT(Bidirectional):

  def __init__(self, sizes, positions):
    patch = sizes.patch_size**2 * sizes.channels
    super().__init__(sizes, patch)
    self.patch_embedding = nn.Linear(patch, sizes.width)
    self.label_embedding = nn.Embedding(sizes.num_classes + 1, sizes.width)
    self.register_buffer("positions", positions, persistent=False)

  def forward(self, x, c_noise, label):
    c = self.noise_embedding(c_noise) + self.label_embedding(label)
    tokens = self.embed_patches(x)
    for layer in self.layers:
      tokens = layer(tokens, c)
    n, height, width, channels = x.shape
    p = self.sizes.patch_size
    tokens = self.logits(tokens, c).view(n, height // p, width // p, p, p, channels)
    return tokens.transpose(2, 3).reshape(x.shape)

  def draw(self, batch):
    y, label = batch["image"].float() / 127.5 - 1, batch["label"].long()
    sigma = draw_sigma(len(y), self.sizes)
    label = torch.where(torch.rand(len(y)) < 0.1, self.sizes.num_classes, label)
    z = y + sigma[:, None, None, None] * torch.randn_like(y)
    return dict(y=y, z=z, sigma=sigma, label=label)

  def loss(self, y, z, sigma, label):
    data, wide = self.sizes.sigma_data, sigma[:, None, None, None]
    variance = wide**2 + data**2
    f = self(z * variance.rsqrt(), sigma.log() / 4, label)
    denoised = data**2 / variance * z + wide * data * variance.rsqrt() * f
    return (variance / (wide * data) ** 2 * (denoised - y) ** 2).mean()


class ViT(Bidirectional):

  def __init__(self, sizes, positions, table):
    super().__init__(sizes, sizes.num_classes)
    self.patch_embedding = nn.Linear(sizes.patch_size**2 * sizes.channels, sizes.width)
    self.label_embedding = nn.Linear(sizes.embedding_width, sizes.width)
    self.label_position = nn.Parameter(torch.empty(sizes.width))
    self.register_buffer("positions", positions, persistent=False)
    self.register_buffer("table", table, persistent=False)

  def forward(self, x, c_noise, image):
    label = self.label_embedding(x) + self.label_position
    tokens = torch.cat([label[:, None], self.embed_patches(image)], 1)
    c = self.noise_embedding(c_noise)
    for layer in self.layers:
      tokens = layer(tokens, c)
    return self.logits(tokens[:, :1], c)[:, 0]

  def draw(self, batch):
    image, label = batch["image"].float() / 127.5 - 1, batch["label"].long()
    noise = torch.randn(len(image), self.sizes.embedding_width)
    return dict(image=image, label=label, sigma=draw_sigma(len(image), self.sizes), noise=noise)

  def loss(self, image, label, sigma, noise):
    z = self.table[label] + sigma[:, None] * noise
    scale = (sigma**2 + self.sizes.sigma_data**2).rsqrt()
    return F.cross_entropy(self(scale[:, None] * z, sigma.log() / 4, image), label)


class MaskedLM(Bidirectional):

  def __init__(self, sizes):
    super().__init__(sizes, sizes.vocab_size)
    self.token_embedding = nn.Embedding(sizes.vocab_size + 1, sizes.width)
    self.register_buffer("turn", rotary(sizes.length, sizes.width // sizes.num_heads),
                         persistent=False)

  def forward(self, tokens, c_noise):
    x, c = self.token_embedding(tokens), self.noise_embedding(c_noise)
    for layer in self.layers:
      x = layer(x, c, self.turn)
    return self.logits(x, c)

  def draw(self, batch):
    tokens = batch["tokens"].long()
    time = ((torch.rand(()) + torch.arange(len(tokens)) / len(tokens)) % 1).clamp(1e-4)
    return dict(tokens=tokens, time=time, masked=torch.rand(tokens.shape) < time[:, None])

  def loss(self, tokens, time, masked):
    logits = self(torch.where(masked, self.sizes.vocab_size, tokens), 3 * (1 - time))
    ce = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
    return (torch.where(masked, ce.view(tokens.shape), 0).mean(1) / time).mean()


class CausalLayer(nn.Module):

  def __init__(self, width, num_heads, hidden):
    super().__init__()
    self.modulation = nn.Linear(width, 6 * width)
    self.attention = Attention(width, num_heads, bias=False)
    self.mlp = SwiGLU(width, hidden)

  def heads(self, x, modulation, turn):
    return self.attention.heads(rms_norm(x) * (1 + modulation[1]) + modulation[0], turn)

  def finish(self, x, modulation, attended):
    _, _, gate_a, shift_m, scale_m, gate_m = modulation
    x = x + gate_a * self.attention.merge(attended)
    return x + gate_m * self.mlp(rms_norm(x) * (1 + scale_m) + shift_m)

  def forward(self, clean, noisy, c_clean, c_noisy, turn, mask, last):
    """Both streams. Of the last layer's clean stream, only keys and values are of use."""
    c_clean, c_noisy = (self.modulation(F.silu(c)).chunk(6, -1) for c in (c_clean, c_noisy))
    q, k, v = self.heads(clean, c_clean, turn)
    if not last:
      clean = self.finish(clean, c_clean, attend(q, k, v, is_causal=True))
    q, own_k, own_v = self.heads(noisy, c_noisy, turn)
    k, v = torch.cat([k, own_k], 2), torch.cat([v, own_v], 2)
    return clean, self.finish(noisy, c_noisy, attend(q, k, v, attn_mask=mask))


class CausalLM(nn.Module):

  def __init__(self, sizes, table):
    super().__init__()
    self.sizes = sizes
    width, length = sizes.width, sizes.length
    self.token_embedding = nn.Embedding(sizes.vocab_size + 1, width)
    self.noisy_embedding = nn.Linear(sizes.embedding_width, width)
    self.clean = nn.Parameter(torch.empty(width))
    self.level = nn.Linear(1, width, bias=False)
    hidden = -(-int(width * sizes.mlp_ratio) // 32) * 32
    self.layers = nn.ModuleList(CausalLayer(width, sizes.num_heads, hidden)
                                for _ in range(sizes.num_layers))
    self.modulation, self.read_out = nn.Linear(width, 2 * width), nn.Linear(width, sizes.vocab_size)
    # A noisy position sees the clean ones before it, and itself.
    before = torch.ones(length, length).tril(-1).bool()
    self.register_buffer("mask", torch.cat([before, torch.eye(length).bool()], 1), persistent=False)
    self.register_buffer("turn", rotary(length, width // sizes.num_heads), persistent=False)
    self.register_buffer("table", table, persistent=False)

  def forward(self, tokens, noisy, c_noise):
    c_clean, c_noisy = self.clean[None, None], self.clean + self.level(c_noise[:, None, None])
    clean = self.token_embedding(F.pad(tokens[:, :-1], (1, 0), value=self.sizes.vocab_size))
    x = clean + self.noisy_embedding(noisy)
    for i, layer in enumerate(self.layers):
      clean, x = layer(clean, x, c_clean, c_noisy, self.turn, self.mask,
                       last=i == len(self.layers) - 1)
    shift, scale = self.modulation(F.silu(c_noisy)).chunk(2, -1)
    return self.read_out(rms_norm(x) * (1 + scale) + shift)

  def draw(self, batch):
    tokens = batch["tokens"].long()
    noise = torch.randn(*tokens.shape, self.sizes.embedding_width)
    return dict(tokens=tokens, sigma=draw_sigma(len(tokens), self.sizes), noise=noise)

  def loss(self, tokens, sigma, noise):
    variance = sigma[:, None, None] ** 2
    z = self.table[tokens] + sigma[:, None, None] * noise
    logits = self(tokens, z / (1 + z.shape[-1] * variance), sigma.log() / 4)
    logits = logits + z @ self.table.T / variance
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def rms_norm(x):
  return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def draw_sigma(num, sizes):
  sigma = torch.exp(torch.randn(num) * sizes.P_std + sizes.P_mean)
  return sigma.clamp(sizes.sigma_min, sizes.sigma_max)


def load(network, flat):
  """Copies dbjax's parameters, {"stack/layers/mlp/out/kernel": array, ...}, into the twin."""
  state: dict[str, torch.Tensor] = {}
  for name, value in flat.items():
    parts = name.removeprefix("stack/").split("/")
    value = torch.as_tensor(value)
    if parts[-1] == "kernel":
      value = value.mT.contiguous()
    if parts[-1] in ("kernel", "embedding"):
      parts[-1] = "weight"
    if parts[0] == "layers":
      state |= {".".join(["layers", str(i), *parts[1:]]): x for i, x in enumerate(value)}
    else:
      state[".".join(parts)] = value
  network.load_state_dict(state)


def read(path):
  """A twin with the weights that `path` (.npz) has, a drawn batch, and one to draw from."""
  file = dict(np.load(path))
  part = lambda name: {k.removeprefix(name): torch.as_tensor(v) for k, v in file.items()
                       if k.startswith(name)}
  sizes = SimpleNamespace(**json.loads(str(file["sizes"])))
  network = globals()[str(file["network"])](sizes, **part("constant/"))
  load(network, part("params/"))
  drawn = {k: v.long() if v.dtype == torch.int32 else v for k, v in part("drawn/").items()}
  return network, drawn, part("batch/")


def main(path, compiled):
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  network, drawn, batch = read(path)
  parameters = list(network.parameters())
  ema = [p.detach().clone() for p in parameters]
  optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.01,
                                fused=True)
  loss = torch.compile(network.loss) if compiled else network.loss

  def gradient(drawn):
    optimizer.zero_grad(set_to_none=True)
    value = loss(**drawn)
    value.backward()
    return value, nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)

  def step():
    value, _ = gradient(network.draw(batch))
    optimizer.step()
    with torch.no_grad():
      torch._foreach_lerp_(ema, parameters, 1e-3)
    return value.item()

  value, norm = gradient(drawn)
  print(value.item(), norm.item(), flush=True)
  for _ in sys.stdin:
    begin = time.perf_counter()
    step()
    print(time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2] == "compile")
