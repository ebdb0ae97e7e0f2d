"""Our InceptionV3 against the networks that define it, carrying the same random weights.

These are torchvision's, and the one in pytorch-fid that FID is computed with. Features of
random images must agree within 1e-4 of the largest one, at the networks' own size and
resized to it from a smaller and a larger one.
"""

import argparse
import importlib.util
import io
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dbjax import paths
from dbjax.bench import race
from dbjax.errors import UserError
from dbjax.quality import features
from dbjax.quality import inception

SIZES = ((299, 299), (64, 48), (320, 400))
SMALL = (107, 107)  # not resized, the recorded case: the least that leaves 2 x 2 to pool
TOLERANCE = 1e-4


def random_state(source, module, seed: int = 0) -> dict[str, np.ndarray]:
  """Weights by their names in PyTorch, such that features neither vanish nor explode.

  Args:
    source: the file in dbjax/quality that defines `module`.
    module: the network.
    seed: of the weights.
  """
  rng = np.random.RandomState(seed)  # unlike default_rng, the same in every version of NumPy
  state = {}
  for parts in features.torch_shapes(module, source.torch_names).values():
    for part, (name, shape) in parts.items():
      if part == "kernel":
        value = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
      elif part in ("bias", "running_mean"):
        value = rng.normal(0, 0.2, shape)
      else:
        value = rng.uniform(0.5, 1.5, shape)
      state[name] = value.astype(np.float32)
  return state


def random_images(height: int, width: int, num: int = 2, seed: int = 1) -> np.ndarray:
  """Noise that differs between neighbours and between images, (N, H, W, 3) uint8."""
  rng = np.random.RandomState(seed)
  noise = rng.randint(0, 256, (num, height, width, 3)) * rng.uniform(size=(num, 1, 1, 3))
  return noise.astype(np.uint8)


def project(x: np.ndarray, num: int = 8) -> np.ndarray:
  """(N, 2048) -> (N, num): random directions, so that each sees every feature."""
  return x @ np.random.RandomState(2).normal(size=(x.shape[-1], num)) / np.sqrt(x.shape[-1])


def references(state: dict[str, np.ndarray]):
  """(torchvision's network, pytorch-fid's), each (images, resized or not) -> features."""
  import torch  # pylint: disable=g-import-not-at-top

  try:
    import torchvision  # pylint: disable=g-import-not-at-top
  except RuntimeError:  # built for CUDA, beside a PyTorch without: it looks for its operators
    for name in ("nms", "qnms"):
      torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")
    import torchvision  # pylint: disable=g-import-not-at-top
  from pytorch_fid import inception as pytorch_fid  # pylint: disable=g-import-not-at-top

  state = {k: torch.as_tensor(v) for k, v in state.items()}
  state |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
  plain = torchvision.models.inception_v3(
      weights=None, init_weights=False, aux_logits=False, num_classes=1008)
  plain.load_state_dict(state)
  plain.fc = torch.nn.Identity()
  plain.eval()
  pytorch_fid.load_state_dict_from_url = lambda *_, **__: state  # in place of its download
  patched = {resize: pytorch_fid.InceptionV3(resize_input=resize).eval()
             for resize in (False, True)}

  @torch.no_grad()
  def by_torchvision(images, resize):
    x = torch.as_tensor(images).permute(0, 3, 1, 2) / 255
    if resize:
      x = torch.nn.functional.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
    return plain(2 * x - 1).numpy()

  @torch.no_grad()
  def by_pytorch_fid(images, resize):
    return patched[resize](torch.as_tensor(images).permute(0, 3, 1, 2) / 255)[0].flatten(1).numpy()

  return by_torchvision, by_pytorch_fid


def torch_files() -> dict[str, np.ndarray]:
  """A state_dict as PyTorch saves it, and as it did before 1.6: bytes (N,) uint8."""
  import torch  # pylint: disable=g-import-not-at-top

  state = torch.nn.BatchNorm2d(3).state_dict()
  state["strided"] = torch.arange(24.0).reshape(2, 3, 4).transpose(0, 2)[1:]
  state["half"] = state["strided"].half()
  files = {}
  for name, is_zip in (("zip", True), ("legacy", False)):
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=is_zip)
    files[name] = np.frombuffer(file.getvalue(), np.uint8)
  return files


def ours(state: dict[str, np.ndarray], fid: bool):
  """The same function with our network."""
  module = inception.InceptionV3(fid)
  params = features.from_torch(module, inception.torch_names, state)
  network = jax.jit(lambda params, x: module.apply({"params": params}, x))

  def by_us(images, resize):
    x = inception.prepare(images) if resize else np.float32(images) / 127.5 - 1
    return np.asarray(network(params, x))

  return by_us


def main(argv: list[str]):
  parser = argparse.ArgumentParser(prog="python -m dbjax.bench inception", description=__doc__)
  parser.add_argument("--record", type=Path, metavar="FILE",
                      help="also write what tests/test_features.py expects (.npz)")
  args = parser.parse_args(argv)
  race.writable(args, "record")
  for package in ("torch", "torchvision", "pytorch_fid"):
    if importlib.util.find_spec(package) is None:
      raise UserError(f"the proof needs {package}: .venv/bin/pip install -e '.[bench]'")

  state = random_state(inception, inception.InceptionV3())
  largest, small = 0.0, {}
  for name, theirs in zip(("torchvision", "pytorch-fid"), references(state)):
    network = ours(state, fid=name == "pytorch-fid")
    for size in (SMALL, *SIZES):
      images, resize = random_images(*size), size != SMALL
      expected, actual = theirs(images, resize), network(images, resize)
      difference = np.abs(actual - expected).max() / np.abs(expected).max()
      largest = max(largest, difference)
      print(f"{name:11}  {size[0]} x {size[1]:3}  features {expected.mean():.3f} +- "
            f"{expected.std():.3f}  largest relative difference {difference:.1e}")
      if size == SMALL:
        small[name] = expected
  plain, patched = small.values()
  apart = np.abs(plain - patched).max() / np.abs(patched).max()
  print(f"for comparison, the two graphs differ by {apart:.2f}")
  if args.record:
    arrays: dict[str, Any] = {name: project(x) for name, x in small.items()} | torch_files()
    with paths.writing(args.record, "--record"):
      np.savez_compressed(args.record, **arrays)
  if not largest < TOLERANCE < apart:
    raise SystemExit(f"the largest difference is {largest:.1e}, expected less than {TOLERANCE}")
