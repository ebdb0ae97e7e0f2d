"""Samples images with PyTorch, no JAX and no dbjax: pip install torch numpy safetensors pillow

    python sample_torch.py --num=16 --seed=1 --label=3,7 --guidance=2 --out=samples    # .png

`sample` takes a noise of your own. A row of `steps` in model.json is one evaluation of the solver,
by the block that has this noise level: whichever solver it is, z and a memory m become sums of z,
D and m.
"""

import argparse
import json
from pathlib import Path

from safetensors.torch import load_file
import torch
from torch.nn import functional as F

here = Path(__file__).parent
about = json.loads((here / "model.json").read_text())
blocks = [load_file(here / block["file"]) for block in about["blocks"]]


def part(weights, name):
  return {k.removeprefix(f"{name}/"): x for k, x in weights.items() if k.startswith(f"{name}/")}


def dense(weights, name, x):
  return x @ weights[f"{name}/kernel"] + weights[f"{name}/bias"]


def modulate(net, x, shift, scale):
  x = (F.rms_norm if net["norm"] == "rms" else F.layer_norm)(x, x.shape[-1:], eps=1e-6)
  return x * (1 + scale[:, None]) + shift[:, None]


def sincos(places, width):  # fixed positions (T, width) of rows and columns (T, 2)
  angles = places.flip(1)[..., None] / 10000 ** (torch.arange(width // 4) / (width // 4))
  return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)


def axial(width):  # frequencies (2, 1, width / 2) at which a head turns: by row, by column
  quarter = 100.0 ** -(torch.arange(width // 4) / (width // 4))
  return torch.block_diag(quarter, quarter)[:, None]


def attention(net, weights, x, places):
  q, k, v = dense(weights, "qkv", x).unflatten(-1, (3, net["num_heads"], -1)).permute(2, 0, 3, 1, 4)
  if net["qk_norm"]:
    q, k = (F.rms_norm(a, a.shape[-1:], weights[f"{name}_norm/scale"], 1e-6)
            for name, a in (("q", q), ("k", k)))
  if net["rotary"] != "none":
    frequencies = weights.get("frequencies", axial(q.shape[-1]))
    turn = torch.polar(torch.ones(()), torch.einsum("ta,ahf->htf", places, frequencies))
    q, k = (torch.view_as_real(torch.complex(*a.chunk(2, -1)) * turn).transpose(-1, -2).flatten(-2)
            for a in (q, k))
  return dense(weights, "out", F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def mlp(net, weights, x):
  hidden = dense(weights, "hidden", x)
  gate, up = hidden.chunk(2, -1)
  gated = net["mlp"] == "swiglu"
  return dense(weights, "out", F.silu(gate) * up if gated else F.gelu(hidden, approximate="tanh"))


def network(net, weights, x, c_noise, label):  # F: x and F (N, H, W, C), c_noise (), label (N,)
  p, (n, height, width, channels) = net["patch_size"], x.shape
  grid = (n, height // p, p, width // p, p, channels)
  tokens = x.reshape(grid).transpose(2, 3).reshape(n, -1, p * p * channels)
  places = torch.cartesian_prod(torch.arange(height // p), torch.arange(width // p)).float()
  fixed = 0 if net["positions"] == "none" else sincos(places, net["width"])
  tokens = dense(weights, "patch_embedding", tokens) + weights.get("positions", fixed)
  noise = part(weights, "noise_embedding")
  if net["noise"] == "line":
    c = noise["start"] + c_noise * noise["slope"]
  else:
    angles = c_noise * torch.logspace(0, 2, 128)
    c = dense(noise, "out", F.silu(dense(noise, "hidden", torch.cat([angles.cos(), angles.sin()]))))
  c = F.silu(c + weights["label_embedding/embedding"][label])
  layers = part(weights, "stack/layers")
  for i in range(net["num_layers"]):
    layer = {name: x[i] for name, x in layers.items()}
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = dense(layer, "modulation", c).chunk(6, -1)
    tokens = tokens + gate_a[:, None] * attention(
        net, part(layer, "attention"), modulate(net, tokens, shift_a, scale_a), places)
    tokens = tokens + gate_m[:, None] * mlp(
        net, part(layer, "mlp"), modulate(net, tokens, shift_m, scale_m))
  tokens = modulate(net, tokens, *dense(weights, "modulation", c).chunk(2, -1))
  tokens = dense(weights, "read_out", tokens).reshape(grid[0], grid[1], grid[3], p, p, channels)
  return tokens.transpose(2, 3).reshape(x.shape)


def denoise(block, z, sigma, label):  # D of one block (EDM, arXiv 2206.00364): sigma is a number
  data, norm = about["sigma_data"], (sigma**2 + about["sigma_data"]**2) ** 0.5
  c_noise = torch.tensor(sigma).log() / 4
  f = network(about["blocks"][block]["network"], blocks[block], z / norm, c_noise, label)
  return (data / norm) ** 2 * z + sigma * data / norm * f


@torch.no_grad()
def sample(noise, label, guidance=1.0):
  """Images (N, H, W, C), in [-1, 1] or latents, of noise of variance 1 and labels (N,) int64."""
  z, m = about["sampler"]["sigma_max"] * noise, 0
  none = torch.full_like(label, about["sampler"]["no_label"])
  for row in about["sampler"]["steps"]:
    z = z + row["noise"] * torch.randn_like(z) if row["noise"] else z
    d = denoise(row["block"], z, row["sigma"], label)
    if row["guided"] and guidance != 1:
      d = d + (guidance - 1) * (d - denoise(row["block"], z, row["sigma"], none))
    (a, b, c), (e, f, g) = row["move"], row["keep"]
    z, m = a * z + b * d + c * m, e * z + f * d + g * m
  return z


def classes(text):
  if {*(found := [int(x) for x in text.split(",")])} <= {*range(about["sampler"]["no_label"])}:
    return found
  raise argparse.ArgumentTypeError(f"expected classes from 0 to {about['sampler']['no_label'] - 1}")


def main():
  from PIL import Image

  inputs = about["sampler"]["inputs"]
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--num", type=int, default=16)
  parser.add_argument("--seed", type=int, default=0)
  parser.set_defaults(label=[about["sampler"]["no_label"]], guidance=1.0)
  if "label" in inputs:
    parser.add_argument("--label", type=classes, default=inputs["label"]["values"])
  if "guidance" in inputs:
    parser.add_argument("--guidance", type=float, default=inputs["guidance"]["values"][0])
  parser.add_argument("--out", default="samples", help="of the file, without a suffix")
  args = parser.parse_args()
  if args.num < 1:
    parser.error(f"--num={args.num}: expected 1 or more")
  if not 0 <= args.guidance < float("inf"):
    parser.error(f"--guidance={args.guidance}: expected a finite number, 0 or more")
  out = Path(args.out + (".png" if about["sampler"]["output"]["dtype"] == "uint8" else ".pt"))
  try:  # before all work
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.open("ab").tell() == 0:
      out.unlink()
  except OSError as e:
    parser.error(f"--out={args.out}: expected a file that can be written ({e})")
  label = torch.tensor(args.label)[torch.arange(args.num) % len(args.label)]
  torch.manual_seed(args.seed)  # of the noise that `sample` adds, too
  z = sample(torch.randn(args.num, *inputs["noise"]["shape"]), label, args.guidance)
  if out.suffix == ".pt":  # latents
    return torch.save(z, out)
  pixels = (127.5 * (z + 1)).round().clamp(0, 255).byte()
  row = torch.cat([*pixels[..., :3 if pixels.shape[-1] > 2 else 1]], 1).squeeze(-1)
  Image.fromarray(row.numpy()).save(out)


if __name__ == "__main__":
  main()
