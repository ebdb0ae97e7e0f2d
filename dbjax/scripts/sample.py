"""Runs the sampler of this folder, without dbjax: pip install jax flatbuffers safetensors pillow

    python sample.py --num=16 --seed=1 --out=samples

writes samples.npz, and of images samples.png. Further inputs are in model.json, and flags here:
--label=3,7 is taken by samples in turn, --image=FILE.npy has one for each.
"""

import argparse
import json
from pathlib import Path

import jax.export
import numpy as np
from safetensors.numpy import load_file

here = Path(__file__).parent
about = json.loads((here / "model.json").read_text())
inputs, classes = about["sampler"]["inputs"], range(about["sampler"].get("no_label", 0))
further = sorted(inputs.keys() - {"noise", "seed", "index"})
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--num", type=int, help="how many [16, or as many as FILE.npy has]")
parser.add_argument("--seed", type=int, default=0, help="sample i is a function of (seed, i)")
parser.add_argument("--out", default="samples", help="of the files, without a suffix")
for name in further:
  parser.add_argument(f"--{name}", default="", required=not inputs[name]["values"])
args = parser.parse_args()
if args.num is not None and args.num < 1:
  parser.error(f"--num={args.num}: expected 1 or more")
if args.seed not in range(2**32):
  parser.error(f"--seed={args.seed}: expected 0 to {2**32 - 1}")
Path(f"{args.out}.npz").parent.mkdir(parents=True, exist_ok=True)  # or fails, before all else


def read(name, shape, dtype, values, shared):
  """What is given of an input, or its values: (N, *shape)."""
  given, file = getattr(args, name), getattr(args, name).endswith(".npy")
  try:
    if given:
      values = np.load(given) if file else [float(x) for x in given.split(",")]
    exact, values = np.atleast_1d(values), np.atleast_1d(values).astype(dtype)
  except (OSError, EOFError, TypeError, ValueError) as e:
    parser.error(f"--{name}={given}: expected numbers, such as 3,7, or FILE.npy of them ({e})")
  if file and not shared and args.num is None:
    args.num = len(values)
  for wrong, expected in [
      (values.shape[1:] != tuple(shape) or not len(values), f"numbers of shape (N, *{shape})"),
      (np.issubdtype(dtype, np.integer) and (values != exact).any(), f"numbers of {dtype}"),
      (name == "label" and classes and not np.isin(values, classes).all(),
       f"classes from 0 to {len(classes) - 1}"),
      (shared and len(values) > 1, "one value, which all samples share"),
      (file and not shared and len(values) != args.num, f"--num={len(values)}, as it has")]:
    if wrong:
      parser.error(f"--{name}={given}: expected {expected}")
  return values


given = {name: read(name, **inputs[name]) for name in further}
index = np.arange(args.num or 16, dtype=np.int32)
made = dict(seed=np.uint32(args.seed), index=index) | {
    name: x[0] if inputs[name]["shared"] else x[index % len(x)] for name, x in given.items()}
if "noise" in inputs:
  keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(args.seed), index)
  made["noise"] = jax.vmap(lambda key: jax.random.normal(key, inputs["noise"]["shape"]))(keys)
program = jax.export.deserialize((here / about["sampler"]["file"]).read_bytes())
blocks = [load_file(here / block["file"]) for block in about["blocks"]]
samples = np.asarray(jax.jit(program.call)(blocks, {name: made[name] for name in inputs}))
np.savez(f"{args.out}.npz", samples=samples)
print(f"{args.out}.npz: {samples.dtype} {samples.shape}")
if samples.dtype == np.uint8 and samples.ndim == 4:
  from PIL import Image

  row = np.concatenate(samples[..., :3 if samples.shape[-1] > 2 else 1], axis=1).squeeze()
  Image.fromarray(row).save(f"{args.out}.png")
