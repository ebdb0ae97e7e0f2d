"""The block of `models/dit.py` and its training step in plain PyTorch: the twin to time against.

Run by `step.py` as a process of its own, so that neither library's threads disturb the
other: reads one line for each step to take, answers with the seconds it took.
"""

import os
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def modulate(x, shift, scale):
  return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Layer(nn.Module):

  def __init__(self, width, num_heads):
    super().__init__()
    self.num_heads = num_heads
    self.modulation = nn.Linear(width, 6 * width)
    self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
    self.mlp_hidden, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

  def forward(self, x, c):
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(F.silu(c)).chunk(6, -1)
    n, t, d = x.shape
    qkv = self.qkv(modulate(x, shift_a, scale_a))
    q, k, v = qkv.view(n, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d)
    x = x + gate_a[:, None] * self.out(attended)
    hidden = F.gelu(self.mlp_hidden(modulate(x, shift_m, scale_m)), approximate="tanh")
    return x + gate_m[:, None] * self.mlp_out(hidden)


class Block(nn.Module):

  def __init__(self, num_layers, width, num_heads, patch, channels, num_classes, positions):
    super().__init__()
    self.patch = patch
    self.num_classes = num_classes
    self.patch_embedding = nn.Linear(patch**2 * channels, width)
    self.noise_hidden, self.noise_out = nn.Linear(256, width), nn.Linear(width, width)
    self.label_embedding = nn.Embedding(num_classes + 1, width)
    self.layers = nn.ModuleList(Layer(width, num_heads) for _ in range(num_layers))
    self.modulation = nn.Linear(width, 2 * width)
    self.read_out = nn.Linear(width, patch**2 * channels)
    self.register_buffer("positions", torch.as_tensor(positions))
    self.register_buffer("frequencies", torch.as_tensor(np.geomspace(1, 100, 128, dtype="f4")))

  def forward(self, x, c_noise, label):
    n, height, width, channels = x.shape
    p = self.patch
    grid = (n, height // p, p, width // p, p, channels)
    tokens = x.reshape(grid).permute(0, 1, 3, 2, 4, 5).reshape(n, -1, p * p * channels)
    tokens = self.patch_embedding(tokens) + self.positions
    angles = c_noise[:, None] * self.frequencies
    c = self.noise_hidden(torch.cat([angles.cos(), angles.sin()], -1))
    c = self.noise_out(F.silu(c)) + self.label_embedding(label)
    for layer in self.layers:
      tokens = layer(tokens, c)
    shift, scale = self.modulation(F.silu(c)).chunk(2, -1)
    tokens = self.read_out(modulate(tokens, shift, scale))
    grid = (n, height // p, width // p, p, p, channels)
    return tokens.view(grid).permute(0, 1, 3, 2, 4, 5).reshape(x.shape)


def load(block, flat):
  """Copies dbjax's parameters, {"stack/layers/mlp/out/kernel": array, ...}, into the twin."""

  def dense(linear, name, layer=slice(None)):
    linear.weight.data = torch.as_tensor(flat[name + "/kernel"][layer].T.copy())
    linear.bias.data = torch.as_tensor(flat[name + "/bias"][layer].copy())

  dense(block.patch_embedding, "patch_embedding")
  dense(block.noise_hidden, "noise_embedding/hidden")
  dense(block.noise_out, "noise_embedding/out")
  block.label_embedding.weight.data = torch.as_tensor(flat["label_embedding/embedding"].copy())
  dense(block.modulation, "modulation")
  dense(block.read_out, "read_out")
  for i, layer in enumerate(block.layers):
    for name, linear in (("modulation", layer.modulation), ("attention/qkv", layer.qkv),
                         ("attention/out", layer.out), ("mlp/hidden", layer.mlp_hidden),
                         ("mlp/out", layer.mlp_out)):
      dense(linear, f"stack/layers/{name}", i)


def loss(block, y, z, sigma, label, sigma_data):
  wide = sigma[:, None, None, None]
  variance = wide**2 + sigma_data**2
  f = block(z * variance.rsqrt(), sigma.log() / 4, label)
  denoised = sigma_data**2 / variance * z + wide * sigma_data * variance.rsqrt() * f
  return (variance / (wide * sigma_data) ** 2 * (denoised - y) ** 2).mean()


def main(path):
  """Checks the loss on the draws in `path` (.npz), then takes a step for every line read."""
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  file = dict(np.load(path))
  sizes = {k: int(file[k]) for k in ("num_layers", "width", "num_heads", "patch", "channels",
                                     "num_classes")}
  block = Block(**sizes, positions=file["positions"])
  load(block, {k.removeprefix("params/"): v for k, v in file.items() if k.startswith("params/")})
  sigma_data = float(file["sigma_data"])
  y, z, sigma, label = (torch.as_tensor(file[k]) for k in ("y", "z", "sigma", "label"))
  label = label.long()
  print(loss(block, y, z, sigma, label, sigma_data).item(), flush=True)

  parameters = list(block.parameters())
  ema = [p.detach().clone() for p in parameters]
  optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.01,
                                fused=True)

  def step():
    sigma = torch.exp(torch.randn(len(y)) * 1.2 - 1.2).clamp(0.002, 80)
    dropped = torch.where(torch.rand(len(y)) < 0.1, block.num_classes, label)
    z = y + sigma[:, None, None, None] * torch.randn_like(y)
    value = loss(block, y, z, sigma, dropped, sigma_data)
    value.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
      torch._foreach_lerp_(ema, parameters, 1e-3)
    return value.item()

  for _ in sys.stdin:
    begin = time.perf_counter()
    step()
    print(time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
  main(sys.argv[1])
