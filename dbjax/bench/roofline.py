"""What bounds a block's training step on one TPU chip: its compiled program against the peaks of
the chip, operation by operation. Neither the chip nor a run is needed.

An operation can take no less than its matrix products at the chip's peak rate, and no less than
the bytes that it moves at the bandwidth of main memory: the larger of the two is its bound. The
sum of all is what a step takes if every operation runs at its bound, one after the other. What the
vector unit computes, and what the matrix unit loses where a head has 64 or 72 features, not 128,
are not in it: a real step takes longer.

products    of the layers; of attention (q k and weights v); of the ends: embedders, read-out
kept        what the forward pass only stores for the backward pass
softmax     what else attention does
elementwise norms, modulations, gates, GELU, and their gradients
prefetch    of arrays into vector memory, where products read them
copies      in another layout, order or type, and arrays filled with zeros
noise       random bits, noised images
update      of the weights: norm of the gradient, AdamW, EMA

--quick compiles DiT-L/2 without remat only.
"""

import argparse
from collections.abc import Sequence
import re
from typing import Any, NamedTuple

import jax

from dbjax import config as config_lib
from dbjax import operations
from dbjax import plan
from dbjax import program
from dbjax import sharding
from dbjax import task as task_lib
from dbjax.bench import memory
from dbjax.bench import race
from dbjax.errors import UserError

CASES = (("DiT-L/2", 3), ("DiT-XL/2", 4))  # and number of blocks
_MOVES = {"copy", "transpose", "reshape", "broadcast", "convert", "slice", "dynamic-slice", "pad",
          "dynamic-update-slice", "concatenate", "iota", "bitcast-convert"}
_RANDOM = r"threefry|_uniform|_normal|_bernoulli|draw|block_key"


class Chip(NamedTuple):
  """Peaks of a chip."""

  flops: float  # bfloat16, a second
  bandwidth: float  # of main memory, bytes a second


# Of "v5e:1x1" what precedes the colon -> peak compute per chip (bf16) and HBM bandwidth, as in
# docs.cloud.google.com/tpu/docs/v5e, /v5p and /v6e.
CHIPS = {"v5e": Chip(197e12, 819e9), "v5p": Chip(459e12, 2765e9), "v6e": Chip(918e12, 1638e9)}


class Cost(NamedTuple):
  """What an operation costs, over all times that it runs in a step."""

  name: str
  kind: str
  flops: float  # of matrix products
  bytes: float
  compute: float  # ms, at the chip's peak
  memory: float  # ms

  @property
  def bound(self) -> float:
    """ms."""
    return max(self.compute, self.memory)


def costs(text: str | None, chip: Chip) -> list[Cost]:
  """The costs of all operations of a compiled program, in its order."""
  found = []
  for op in operations.read(text):
    flops, moved = op.count * sum(n for _, n in op.products), float(op.count * op.bytes)
    found.append(Cost(op.name, kind(op), flops, moved, 1e3 * flops / chip.flops,
                      1e3 * moved / chip.bandwidth))
  return found


def kind(op: operations.Operation) -> str:
  """What an operation is for, by the names that JAX gave to what is in it: see above."""
  if op.products:
    name = max(op.products, key=lambda product: product[1])[0]
    if re.search(r"/attention/(?!qkv/|out/)", name):
      return "products of attention"
    return "products of layers" if "/stack/" in name else "products of ends"
  if op.opcode in ("copy-start", "slice-start"):
    return "prefetch"
  names = [name for _, name in op.parts if name]
  if any(name.endswith("dynamic_update_slice") and "/jvp(" in name for name in names):
    return "kept"
  if {opcode for opcode, _ in op.parts} <= _MOVES:
    return "copies"
  for pattern, found in ((r"/attention/(?!qkv/|out/)", "softmax"), (r"jvp\(", "elementwise"),
                         (_RANDOM, "noise")):
    if any(re.search(pattern, name) for name in names):
      return found
  return "update"


def by_kind(found: Sequence[Cost]) -> list[dict[str, Any]]:
  """A row of sums for each kind, the dearest first.

  Its bound is the sum of the operations' own; memory-bound is what of it is of operations that wait
  for memory, beyond compute how much shorter the step were if they did not.
  """
  total, rows = sum(c.bound for c in found), []
  for name in {c.kind for c in found}:
    mine = [c for c in found if c.kind == name]
    bound = sum(c.bound for c in mine)
    rows.append({
        "kind": name, "GFLOP": sum(c.flops for c in mine) / 1e9,
        "MB": sum(c.bytes for c in mine) / 1e6, "bound ms": bound, "share": bound / total,
        "memory-bound ms": sum(c.bound for c in mine if c.memory > c.compute),
        "beyond compute ms": bound - sum(c.compute for c in mine)})
  return sorted(rows, key=lambda row: -row["bound ms"])


def main(argv: list[str]):
  parser = argparse.ArgumentParser(prog="python -m dbjax.bench roofline", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--topology", default="v5e:1x1", help="one chip: v5e:1x1, v5p:1x1x1, v6e:1x1")
  parser.add_argument("--batch_size", type=int, default=32)
  args = race.arguments(parser, argv)
  chip = CHIPS.get(args.topology.partition(":")[0])
  if chip is None:
    raise UserError(f"--topology={args.topology}: expected a chip whose peaks are known: "
                    f"{', '.join(CHIPS)}, such as v5e:1x1")
  devices = plan.find_devices(args.topology)
  if len(devices) > 1:
    raise UserError(f"--topology={args.topology}: expected one chip, not {len(devices)}")
  rows = []
  for model, num_blocks in CASES[:1] if args.quick else CASES:
    for remat in (False,) if args.quick else (False, True):
      config = memory.dit(num_blocks, remat, **{
          "model.name": model, "train.batch_size": args.batch_size})
      title = f"{model}, B = {num_blocks}, {config.layers_per_block[0]} layers, batch " \
              f"{args.batch_size}{', remat' * remat}"
      rows.append(dict(program=title, **_report(config, devices, chip, title, args)))
  race.report("roofline", f"a step on one {args.topology.partition(':')[0]}, {chip.flops / 1e12:g} "
              f"TFLOP/s and {chip.bandwidth / 1e9:g} GB/s", rows, args.json)


def _report(config: Any, devices: Sequence[jax.Device], chip: Chip, title: str, args: Any
            ) -> dict[str, Any]:
  """Prints where a step goes, and returns its sums."""
  mesh, task = sharding.make_mesh(config, devices), task_lib.make_task(config, 0)
  compiled = program.compile_step(task, mesh, 1)
  found = costs(compiled.as_text(), chip)
  race.report("roofline", title, by_kind(found), args.json)
  dearest = sorted((c for c in found if c.memory > c.compute), key=lambda c: -c.memory)[:10]
  race.report("roofline", f"{title}: what waits for memory", [
      {"operation": c.name, "kind": c.kind, "GFLOP": c.flops / 1e9, "MB": c.bytes / 1e6,
       "ms": c.bound, "beyond compute ms": c.bound - c.compute} for c in dearest], args.json)
  plain = task_lib.make_task(config_lib.changed(config, **{"model.remat": False}), 0)
  once, xla = operations.read(compiled.as_text()), compiled.cost_analysis() or {}
  total = sum(c.bound for c in found)
  return {
      "TFLOP": sum(c.flops for c in found) / 1e12, "GB": sum(c.bytes for c in found) / 1e9,
      "compute ms": sum(c.compute for c in found), "memory ms": sum(c.memory for c in found),
      "sum of bounds ms": total,
      "model FLOPs utilisation": plan.matmul_flops(plain) / (total / 1e3 * chip.flops),
      "loops once, TFLOP": sum(n for op in once for _, n in op.products) / 1e12,
      "XLA's": xla["flops"] / 1e12, "loops once, GB": sum(op.bytes for op in once) / 1e9,
      "XLA's GB": xla["bytes accessed"] / 1e9}
