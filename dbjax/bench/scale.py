"""What a chip sends to others in one training step, on TPU slices from 1 to 1,024 chips.

The real step is compiled for each slice, none of which need be there, and its collectives are read
out of the compiled program. In all schemes a step trains every layer on the same global batch, of
BATCH examples a chip: they do the same work, and differ in what they send.

end to end, data parallel    the whole network on every chip
end to end, FSDP             the whole network, split over FSDP chips, and data parallel beyond
blocks, data parallel        each block on its own row of the mesh, and on every chip of it
blocks, FSDP                 each block on its own row, split over FSDP chips of it

Bytes are those that a chip sends in a ring (`hlo.Collective.sent`). Beside them stands what the
shapes of the parameters say by themselves (`formula`). --quick compiles for 16 chips only.
"""

import argparse
from collections.abc import Callable, Sequence
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dbjax import config as config_lib
from dbjax import hlo
from dbjax import paths
from dbjax import plan
from dbjax import program
from dbjax import sharding
from dbjax import task as task_lib
from dbjax.bench import race

BATCH = 8  # examples a chip
NUM_BLOCKS = 4
FSDP = 16  # of more chips, each has a part narrower than a tile, which XLA gathers as a sum
# v5e and v6e end at 256 chips: one kind for the whole curve.
SLICES = {1: "v5p:1x1x1", 4: "v5p:2x2x1", 16: "v5p:2x2x4", 64: "v5p:4x4x4", 256: "v5p:4x8x8",
          1024: "v5p:8x8x16"}
MODELS = {
    "DiT-L/2": ("imagenet256_latent", {}),
    "language model": ("lm1b", {"data.tokenizer": "sentencepiece-00000000"}),
}


class Scheme(NamedTuple):
  """How a network is spread over chips."""

  name: str
  blocks: bool
  fsdp: bool


SCHEMES = (
    Scheme("end to end, data parallel", False, False), Scheme("end to end, FSDP", False, True),
    Scheme("blocks, data parallel", True, False), Scheme("blocks, FSDP", True, True))


def make_config(model: str, scheme: Scheme, chips: int, num_blocks: int = NUM_BLOCKS,
                most: int = FSDP) -> Any:
  """The resolved config of a model on that many chips, split by FSDP over `most` of a row."""
  name, fields = MODELS[model]
  config = config_lib.resolve(config_lib.read(name, {
      **fields, "num_blocks": num_blocks, "train.batch_size": BATCH * chips}))
  config = config if scheme.blocks else plan.end_to_end(config)
  rows = min(config.num_blocks, chips)
  return config_lib.changed(config, **{
      "model.unroll": 1, "mesh.block": rows, "mesh.data": -1,
      "mesh.fsdp": min(most, chips // rows) if scheme.fsdp else 1})


def measure(config: Any, devices: Sequence[jax.Device]) -> dict[str, Any]:
  """What a chip sends in a step of `config` compiled for `devices`, in MB of 10^6 bytes.

  Returns:
    MB: of the compiled program; formula: by shapes alone; ratio: of the two, None where nothing is
    sent; across blocks: those that leave a row of the mesh.
  """
  mesh, task = sharding.make_mesh(config, devices), task_lib.make_task(config, 0)
  compiled = program.compile_step(task, mesh, mesh.shape["block"])
  found = hlo.collectives(compiled.as_text())  # type: ignore[arg-type]  # it has a text
  sent = sum(c.count * c.sent for c in found)
  across = sum(c.count * c.sent for c in found if "block" in hlo.axes(c, mesh.shape))
  expected = formula(task, mesh)
  return {"MB": sent / 1e6, "formula": expected / 1e6,
          "ratio": sent / expected if expected else None, "across blocks": across / 1e6}


def formula(task: task_lib.Task, mesh: jax.sharding.Mesh) -> float:
  """Bytes that a chip must send in a step, in a ring, if nothing but parameters travel.

  In a row of d x f chips, with S of a block's parameters split over f and W whole everywhere, each
  of s bytes where it is computed with:

      s S (f - 1) / f (g + 1)    gathered g times, and their gradients summed into parts
      2 s S / f (d - 1) / d      these parts summed over data
      2 s W (df - 1) / (df)      gradients of the others

  g is 1, and 2 with remat, which gathers again for the backward pass.
  """
  d, f = mesh.shape["data"], mesh.shape["fsdp"]
  size = jnp.dtype(task.config.model.dtype).itemsize
  split = whole = 0
  for x in jax.tree.leaves(program.abstract_states(task, mesh, mesh.shape["block"]).params):
    number = x.size // x.shape[0]
    if f > 1 and "fsdp" in x.sharding.spec:
      split += number
    else:
      whole += number
  gathers = 1 + task.config.model.remat
  return size * (split * (f - 1) / f * (gathers + 1) + 2 * split / f * (d - 1) / d
                 + 2 * whole * (d * f - 1) / (d * f))


def figure(results: dict[str, list[dict[str, Any]]], path: Path):
  """MB over chips, a panel a model and a line a scheme, as a PNG."""
  from matplotlib import pyplot as plt  # pylint: disable=g-import-not-at-top
  from matplotlib import ticker  # pylint: disable=g-import-not-at-top

  colors = dict(zip((scheme.name for scheme in SCHEMES), ("#d08a5c", "#a03c1e", "#5d9bd3",
                                                          "#1b4f8f")))
  canvas, panels = plt.subplots(1, len(results), figsize=(5.2 * len(results), 3.6), squeeze=False)
  for (model, rows), panel in zip(results.items(), panels[0]):
    lines = {name: [(row["chips"], row["MB"]) for row in rows if row["scheme"] == name]
             for name in colors}
    room = 0.07 * max(row["MB"] for row in rows)  # of a label: one may not hide another
    ends = sorted((points[-1][1], name) for name, points in lines.items())
    for (low, one), (high, other) in zip(ends[::2], ends[1::2]):
      apart = max(0, room - (high - low)) / 2
      for y, name in ((low - apart, one), (high + apart, other)):
        panel.text(1.2 * max(SLICES), y, name, color=colors[name], va="center", fontsize=8.5)
    for scheme in SCHEMES:  # where both send as much, one shows through the other
      panel.plot(*zip(*lines[scheme.name]), color=colors[scheme.name], linewidth=1.8, marker="o",
                 markersize=3.5, linestyle=(0, (3, 2)) if scheme.fsdp else "-")
    panel.set_xscale("log", base=2)
    panel.set(xlabel="chips", ylim=(0, None), xticks=tuple(SLICES))
    panel.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    panel.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    panel.set_title(f"{model}, B = {NUM_BLOCKS}", loc="left", fontsize=10, fontweight="bold")
    panel.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(length=0, labelsize=8.5)
    panel.xaxis.label.set_size(9)
    panel.yaxis.label.set_size(9)
  panels[0][0].set_ylabel("MB that a chip sends in a step")
  canvas.tight_layout(w_pad=6)
  with paths.writing(path, "--figure"):
    canvas.savefig(path, dpi=150, facecolor="white", bbox_inches="tight")
  plt.close(canvas)


def main(argv: list[str]):
  parser = argparse.ArgumentParser(prog="python -m dbjax.bench scale", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--figure", type=Path, help="a PNG to write")
  args = race.arguments(parser, argv)
  race.drawable(args)

  @functools.cache
  def sends(config, chips):
    print(f"compiling for {SLICES[chips]}, mesh {config.mesh.block},..,{config.mesh.fsdp}: "
          f"{config.model.network}, B = {config.num_blocks}", flush=True)
    return measure(config, plan.find_devices(SLICES[chips]))

  results, slices = {}, (16,) if args.quick else tuple(SLICES)
  for model in MODELS:
    results[model] = [
        dict(chips=chips, scheme=scheme.name, **sends(make_config(model, scheme, chips), chips))
        for chips in slices for scheme in SCHEMES]
    race.report("scale", f"{model}, B = {NUM_BLOCKS}: MB that a chip of v5p sends in a step",
                results[model], args.json)
  if not args.quick:
    for title, rows in _others(sends).items():
      race.report("scale", title, rows, args.json)
  if args.figure:
    figure(results, args.figure)


def _others(sends: Callable[[Any, int], dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
  """More tables: over B, and of FSDP over all chips."""
  whole, parallel = SCHEMES[1], SCHEMES[2]
  return {
      "DiT-L/2 on 64 chips, blocks, data parallel": [
          dict(B=b, **sends(make_config("DiT-L/2", parallel, 64, b), 64)) for b in (1, 2, 4, 8)],
      "DiT-L/2, end to end, FSDP over all chips": [
          dict(chips=n, **sends(make_config("DiT-L/2", whole, n, most=n), n)) for n in SLICES]}
