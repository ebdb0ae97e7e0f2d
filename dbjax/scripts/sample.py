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
inputs, below = about["sampler"]["inputs"], dict(guidance=np.inf, temperature=np.inf)
below["label"] = about["sampler"].get("no_label")  # these are numbers from 0
further = sorted(inputs.keys() - {"noise", "seed", "index"})
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--num", type=int, help="how many [16, or as many as FILE.npy has]")
parser.add_argument("--seed", type=int, default=0, help="sample i is a function of (seed, i)")
parser.add_argument("--out", default="samples", help="of the files, without a suffix")
for name in further:
  parser.add_argument(f"--{name}", default="", required=not inputs[name]["values"])
args = parser.parse_args()
for name, allowed in [("num", range(1, 2**31)), ("seed", range(2**32))]:
  if vars(args)[name] is not None and vars(args)[name] not in allowed:
    parser.error(f"--{name}={vars(args)[name]}: expected {allowed[0]} to {allowed[-1]}")
try:  # before all work
  (out := Path(f"{args.out}.npz")).parent.mkdir(parents=True, exist_ok=True)
  if out.open("ab").tell() == 0:
    out.unlink()
except OSError as e:
  parser.error(f"--out={args.out}: expected a file that can be written ({e})")


def read(name, shape, dtype, values, shared):  # what is given, or its values: (N, *shape)
  given, file = getattr(args, name), getattr(args, name).endswith(".npy")
  try:
    values = np.load(given) if file else [*map(float, given.split(","))] if given else values
    exact, values = np.atleast_1d(values), np.atleast_1d(values).astype(dtype)
  except (OSError, EOFError, TypeError, ValueError) as e:
    parser.error(f"--{name}={given}: expected numbers, such as 3,7, or FILE.npy of them ({e})")
  args.num = args.num or (len(values) if file and not shared else None)
  for wrong, expected in [
      (values.shape[1:] != tuple(shape) or not len(values), f"numbers of shape (N, *{shape})"),
      (np.issubdtype(dtype, np.integer) and (values != exact).any(), f"numbers of {dtype}"),
      ((top := below.get(name)) and not ((0 <= values) & (values < top)).all(),
       f"numbers from 0 to below {top}"),
      (shared and len(values) > 1, "one value, which all samples share"),
      (file and not shared and len(values) != args.num, f"--num={len(values)}, as it has")]:
    if wrong:
      parser.error(f"--{name}={given}: expected {expected}")
  return values


given = {name: read(name, **inputs[name]) for name in further}
index, shape = np.arange(args.num or 16, dtype=np.int32), inputs.get("noise", {}).get("shape", ())
draw = lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(args.seed), i), shape)
made = dict(seed=np.uint32(args.seed), index=index, noise=jax.vmap(draw)(index)) | {
    name: x[0] if inputs[name]["shared"] else x[index % len(x)] for name, x in given.items()}
program = jax.export.deserialize((here / about["sampler"]["file"]).read_bytes())
blocks = [load_file(here / block["file"]) for block in about["blocks"]]
samples = np.asarray(jax.jit(program.call)(blocks, {name: made[name] for name in inputs}))
np.savez(out, samples=samples)
print(f"{out}: {samples.dtype} {samples.shape}")
if samples.dtype == np.uint8 and samples.ndim == 4:
  from PIL import Image

  row = np.concatenate(samples[..., :3 if samples.shape[-1] > 2 else 1], axis=1).squeeze()
  Image.fromarray(row).save(f"{args.out}.png")
