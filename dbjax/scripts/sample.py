"""Runs the sampler of this folder, without dbjax: pip install jax flatbuffers safetensors pillow

    python sample.py --num=16 --seed=1 --out=samples

writes samples.npz, and of images samples.png. Further inputs are in model.json, and flags here:
--label=3,7 is taken by samples in turn, --image=FILE.npy has one for each.
"""

import argparse
import json
from pathlib import Path

import jax
from jax import export
import numpy as np
from safetensors.numpy import load_file

here = Path(__file__).parent
about = json.loads((here / "model.json").read_text())
inputs, classes = about["sampler"]["inputs"], range(about["sampler"].get("no_label", 0))
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--num", type=int, default=16, help="how many")
parser.add_argument("--seed", type=int, default=0, help="sample i is a function of (seed, i)")
parser.add_argument("--out", default="samples", help="of the files, without a suffix")
for name in inputs.keys() - {"noise", "seed", "index"}:
  parser.add_argument(f"--{name}", required=not inputs[name]["values"])
args = parser.parse_args()


def value(name, shape, dtype, values, shared):
  """What is given of an input, or its values: one for each sample, unless they share it."""
  index = np.arange(args.num, dtype=np.int32)
  if name == "noise":
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(args.seed), index)
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
  if name in ("seed", "index"):
    return index if name == "index" else np.uint32(args.seed)
  given = getattr(args, name)
  if given:
    values = np.load(given) if given.endswith(".npy") else [float(x) for x in given.split(",")]
  exact, values = np.asarray(values), np.asarray(values).astype(dtype)
  if np.issubdtype(dtype, np.integer) and (values != exact).any():
    parser.error(f"--{name}={given}: expected numbers of {dtype}")
  if name == "label" and classes and not np.isin(values, classes).all():
    parser.error(f"--label={given}: expected classes from 0 to {classes[-1]}")
  return values[0] if shared else values[index % len(values)]


program = export.deserialize((here / about["sampler"]["file"]).read_bytes())
blocks = [load_file(here / block["file"]) for block in about["blocks"]]
samples = np.asarray(jax.jit(program.call)(
    blocks, {name: value(name, **given) for name, given in inputs.items()}))
np.savez(f"{args.out}.npz", samples=samples)
print(f"{args.out}.npz: {samples.dtype} {samples.shape}")
if samples.dtype == np.uint8 and samples.ndim == 4:
  from PIL import Image

  row = np.concatenate(samples[..., :3 if samples.shape[-1] > 2 else 1], axis=1).squeeze()
  Image.fromarray(row).save(f"{args.out}.png")
