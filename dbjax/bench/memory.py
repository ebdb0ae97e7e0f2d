"""Memory: what one training step needs, end to end and of one of B blocks, compiled and measured.

    peaks      by XLA's compiler for one TPU chip, which need not be there (pip install libtpu):
               DiT-L/2 of 24 layers, 256 tokens, latents of 32 x 32 x 4, batch 32, bfloat16 compute
    largest    the most layers of a given width that train on that chip, with recomputation (remat)
               and a small batch: of a DiT like DiT-XL/2, and of a language model like Llama
    measured   on this machine's CPU: the peak of resident memory of a process that takes steps of
               a DiT-S/2 of 12 layers, over what it had once the step was compiled

Parameters are those of the whole network, its embedders and read-out counted once, though each
block has some of its own.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
import contextlib
import ctypes
import functools
import gc
import importlib.util
import json
import os
from pathlib import Path
import platform
import subprocess
import sys
from typing import Any

import jax

from dbjax import block as block_lib
from dbjax import config as config_lib
from dbjax import plan
from dbjax import startup
from dbjax import task as task_lib
from dbjax.bench import race
from dbjax.bench import step as step_bench
from dbjax.errors import UserError

PARTS = ("peaks", "largest", "measured")
CHIPS = {"v5e": "v5e:1x1", "v6e": "v6e:1x1", "v5p": "v5p:1x1x1"}
_GIB = 2**30
_STEPS = 3


def dit(num_blocks: int, remat: bool, **fields: Any) -> Any:
  """DiT-L/2 in the latent space of a VAE, batch 32, unless fields say otherwise."""
  return config_lib.resolve(config_lib.read("imagenet256_latent", {
      "num_blocks": num_blocks, "model.remat": remat, "train.batch_size": 32, **fields}))


def wide_dit(width: int, num_blocks: int, num_layers: int, **fields: Any) -> Any:
  """Layers of DiT-XL/2 and wider: heads of 72 features, batch 8."""
  return dit(num_blocks, True, **{
      "model.name": "", "model.patch_size": 2, "model.width": width, "model.num_layers": num_layers,
      "model.num_heads": width // 72, "train.batch_size": 8, **fields})


def language_model(width: int, num_blocks: int, num_layers: int, **fields: Any) -> Any:
  """Layers of Llama, heads of 128 features; 32,000 tokens, 1,024 a sequence, batch 4.

  End to end it is the plain network, of one stream and without a table.
  """
  return config_lib.resolve(config_lib.read("lm1b", {
      "num_blocks": num_blocks, "task.end_to_end": num_blocks == 1, "model.remat": True,
      "model.width": width, "model.num_layers": num_layers, "model.num_heads": width // 128,
      "data.length": 1024, "data.tokenizer": "sentencepiece-00000000", "train.batch_size": 4,
      **fields}))


# Of each chip: networks and widths, so that what fits is neither a tower nor a plate.
FAMILIES = {
    "v5e": (("DiT", wide_dit, 1152), ("DiT", wide_dit, 2304), ("LM", language_model, 2048)),
    "v6e": (("DiT", wide_dit, 2304), ("LM", language_model, 2048)),
    "v5p": (("DiT", wide_dit, 2304), ("LM", language_model, 4096)),
}


def peaks(chip: str, counts: Sequence[int], path: str):
  """The table of compiled peaks on a chip."""
  devices, rows = plan.find_devices(CHIPS[chip]), []
  for remat in (False, True):
    plans = [_compiled(dit(b, remat), devices) for b in counts]
    rows += [{
        "blocks": _name(b), "remat": _word(remat), "GiB": found.total / _GIB,
        "state": (found.parameters + found.optimizer) / _GIB, "gradients": found.gradients / _GIB,
        "activations": found.activations / _GIB, "times less": plans[0].total / found.total,
        "fits": _word(found.fits)} for b, found in zip(counts, plans)]
  race.report("peaks", f"DiT-L/2, 24 layers, 256 tokens, batch 32, on one {_chip(devices)}", rows,
              path)


def largest(chip: str, counts: Sequence[int], few: bool, path: str):
  """The table of the largest networks that train on a chip.

  A block of so many layers is the same program for every B; so is the end-to-end DiT, but not the
  plain language model.
  """
  devices, rows = plan.find_devices(CHIPS[chip]), []
  for name, make, width in FAMILIES[chip][-2:] if few else FAMILIES[chip]:
    found, guess, sizes = {}, 4, []
    for dtype in ("float32", "bfloat16"):
      for b in counts:
        plain = make(width, b, b).task.get("end_to_end", False)
        if (dtype, plain) not in found:
          moments: dict[str, Any] = {"optimizer.moments_dtype": dtype}
          block = functools.partial(make, width, b, **moments)
          found[dtype, plain] = deepest(block, b, devices, guess)
        guess, total = found[dtype, plain]
        sizes.append(num_parameters(make(width, 1, b * guess)))
        rows.append({
            "network": name, "width": width, "blocks": _name(b), "first moment": dtype,
            "layers": b * guess, "parameters, 1e9": sizes[-1] / 1e9,
            "times end to end": sizes[-1] / sizes[0], "GiB": total / _GIB})
  race.report("largest", f"the most layers that train on one {_chip(devices)}, remat, DiT batch 8, "
              "LM 4 of 1,024 tokens", rows, path)


def deepest(make: Callable[[int], Any], num_blocks: int, devices: Sequence[jax.Device],
            guess: int) -> tuple[int, int]:
  """The most layers a block of which a training step fits on a device, and its bytes; or (0, 0).

  They are looked for by programs that are compiled with the least effort, whose peaks are some
  percent more or less: a layer more may fit.

  Args:
    make: from the layers of all blocks to a config. Memory grows about linearly with them.
    num_blocks: B.
    devices: one.
    guess: layers a block, 1 or more, to begin with.
  """
  limit, total, fits, fails = plan.capacity(devices[0]), {0: 0}, 0, None
  with _least_effort():
    while fails is None or fails - fits > 1:
      found = _compiled(make(num_blocks * guess), devices)
      total[guess] = found.total
      if found.fits:
        fits = guess
      else:
        fails = guess
      (n0, m0), (n1, m1) = sorted(total.items(), key=lambda point: abs(point[1] - limit))[:2]
      guess = max(int(n0 + (limit - m0) * (n1 - n0) / (m1 - m0)), fits + 1)
      guess = guess if fails is None else min(guess, fails - 1)
  for layers in range(fits, 0, -1):
    found = _compiled(make(num_blocks * layers), devices)
    if found.fits:
      return layers, found.total
  return 0, 0


def _compiled(config: Any, devices: Sequence[jax.Device]) -> plan.Plan:
  """The plan of a config; says so, since it takes half a minute."""
  found = plan.make_plan(config, devices)
  print(f"compiled {found.parameters / 4e9:.2f} 1e9 parameters of a block, remat "
        f"{_word(found.remat)}: {found.total / _GIB:.2f} GiB", flush=True)
  return found


@contextlib.contextmanager
def _least_effort() -> Iterator[None]:
  """XLA takes a quarter of the time to compile."""
  before = jax.config.values["jax_exec_time_optimization_effort"]
  jax.config.update("jax_exec_time_optimization_effort", -1.0)
  try:
    yield
  finally:
    jax.config.update("jax_exec_time_optimization_effort", before)


def num_parameters(config: Any) -> int:
  """Of one block."""
  params = block_lib.abstract_state(task_lib.make_task(config, 0)).params
  return sum(x.size for x in jax.tree.leaves(params))


def measured(counts: Sequence[int], remats: Sequence[bool], path: str):
  """The table of measured peaks on CPU, beside what the compiler says."""
  rows = []
  for remat in remats:
    found = []
    for b in counts:
      code = f"from dbjax.bench import memory; memory.measure({b}, {remat})"
      done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE,
                            text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
      found.append(json.loads(done.stdout.splitlines()[-1]))
    rows += [{"blocks": _name(b), "remat": _word(remat), "measured, MiB": peak / 2**20,
              "compiled, MiB": compiled / 2**20, "measured over compiled": peak / compiled,
              "times less": found[0][1] / peak} for b, (compiled, peak) in zip(counts, found)]
  race.report("measured", "DiT-S/2, 12 layers, 256 tokens, batch 16, float32, on CPU", rows, path)


def measure(num_blocks: int, remat: bool):
  """In a process of its own: prints the bytes of a step, by the compiler and as measured."""
  startup.prepare()
  config = step_bench.make_config("dit", **{
      "num_blocks": num_blocks, "model.num_layers": 12, "model.unroll": 12, "model.remat": remat})
  step = step_bench.compiled(config)
  _trim()
  before = _own_bytes("VmRSS")
  state, others = step_bench.begin(config, step_bench.random_batch(config))
  _trim()  # or what was needed to begin would count
  Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
  for _ in range(_STEPS):
    state, _ = step(state, *others)
  jax.block_until_ready(state)
  print(json.dumps([plan.bytes_of(step), _own_bytes("VmHWM") - before]))


def _trim():
  """Gives back what nobody uses any more."""
  gc.collect()
  ctypes.CDLL(None).malloc_trim(0)


def _own_bytes(what: str) -> int:
  """Of this process in memory: now (VmRSS), or at most (VmHWM)."""
  lines = Path("/proc/self/status").read_text().splitlines()
  return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what + ":"))


def _name(num_blocks: int) -> str:
  return "end to end" if num_blocks == 1 else f"B = {num_blocks}"


def _word(yes: bool) -> str:
  return "yes" if yes else "no"


def _chip(devices: Sequence[jax.Device]) -> str:
  return f"{devices[0].device_kind} of {plan.capacity(devices[0]) / _GIB:.2f} GiB"


def main(argv: list[str]):
  parser = argparse.ArgumentParser(prog="python -m dbjax.bench memory", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--only", default="", choices=["", *PARTS], help="one part; all by default")
  parser.add_argument("--chip", default="", choices=["", *CHIPS], help="one chip; all by default, "
                      "with --quick v5e")
  args = race.arguments(parser, argv)
  parts = [args.only] if args.only else list(PARTS)
  if importlib.util.find_spec("libtpu") is None and parts != ["measured"]:
    raise UserError("compiling for TPU needs libtpu (no TPU): pip install 'dbjax[tpu]'; "
                    "--only=measured does without")
  if platform.libc_ver()[0] != "glibc" and "measured" in parts:
    raise UserError("measuring needs Linux and glibc: --only=peaks and --only=largest do not")
  chips = [args.chip] if args.chip else ["v5e"] if args.quick else list(CHIPS)
  for chip in chips if "peaks" in parts else ():
    peaks(chip, (1, 4) if args.quick else (1, 2, 3, 4, 6, 8), args.json)
  for chip in chips if "largest" in parts else ():
    largest(chip, (1, 8) if args.quick else (1, 4, 8), args.quick, args.json)
  if "measured" in parts:
    measured((1, 3) if args.quick else (1, 2, 3, 4, 6), (False,) if args.quick else (False, True),
             args.json)
