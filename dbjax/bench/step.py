"""One block's training step on CPU, timed alternately against PyTorch's.

The case: the layers of DiT-S/2 (width 384, 6 heads), 256 tokens, float32, AdamW,
clipping, EMA. Before the clock starts both compute the loss of the same weights and
draws, and must agree.
"""

import argparse
from collections.abc import Callable
import importlib.util
import subprocess
import sys
import tempfile
import time
from typing import Any

import flax
import jax
import numpy as np

from dbjax import block as block_lib
from dbjax import config as config_lib
from dbjax import plan
from dbjax import program
from dbjax import sharding
from dbjax import task as task_lib
from dbjax.bench import race
from dbjax.errors import UserError
from dbjax.models.transformer import sincos_positions


def make_config(num_layers: int, batch_size: int, num_blocks: int = 1):
  """DiT-S layers on 32 x 32 colour images."""
  return config_lib.resolve(config_lib.read("digits", {
      "num_blocks": num_blocks, "sigma_data": 0.5, "data.image_size": 32, "data.channels": 3,
      "model.num_layers": num_layers, "model.width": 384, "model.num_heads": 6,
      "model.patch_size": 2, "model.unroll": num_layers, "train.batch_size": batch_size}))


def stepper(config, batch: dict[str, Any]) -> Callable[[int], float]:
  """Trains block 0 on one device by the same batch, again and again.

  Args:
    config: resolved.
    batch: arrays (N, ...).

  Returns:
    A function that takes so many steps, and returns the seconds that they took.
  """
  task, mesh = task_lib.make_task(config, 0), sharding.make_mesh(config, jax.devices()[:1])
  state = program.init(task, mesh, (0,))
  step = program.compile_step(task, mesh, 1)
  batch, frozen = (sharding.put(mesh, jax.P(), x) for x in (batch, task.frozen(config)))
  interval = task.make_schedule(config).training_interval(0)
  of_blocks = sharding.put(mesh, jax.P("block"), jax.tree.map(
      lambda x: np.asarray(x)[None], (np.int32(0), interval)))

  def take(num_steps: int) -> float:
    nonlocal state
    begin = time.perf_counter()
    for _ in range(num_steps):
      state, _ = step(state, batch, *of_blocks, frozen)
    jax.block_until_ready(state)
    return time.perf_counter() - begin

  return take


def random_batch(batch_size: int) -> dict[str, np.ndarray]:
  """Images (N, 32, 32, 3) and labels (N,) of nothing."""
  rng = np.random.default_rng(0)
  return dict(image=rng.integers(0, 256, (batch_size, 32, 32, 3), np.uint8),
              label=rng.integers(0, 10, batch_size, np.int32))


def main(argv: list[str]):
  parser = argparse.ArgumentParser(prog="python -m dbjax.bench step", description=__doc__)
  parser.add_argument("--layers", type=int, default=4)
  parser.add_argument("--batch_size", type=int, default=16)
  args = race.arguments(parser, argv, rounds=15, quick=8)
  if importlib.util.find_spec("torch") is None:
    raise UserError("the benchmark needs PyTorch: .venv/bin/pip install -e '.[bench]'")

  config = make_config(args.layers, args.batch_size)
  task = task_lib.make_task(config, 0)
  interval = task.make_schedule(config).training_interval(0)
  rng, batch = np.random.default_rng(1), random_batch(args.batch_size)
  noisy = jax.tree.map(lambda x: np.asarray(x + rng.normal(0, 0.02, x.shape), np.float32),
                       block_lib.init(task, 0).params)
  drawn = task.draw(jax.random.key(0), batch, interval)
  ours = float(task.loss(noisy, drawn))
  take = stepper(config, batch)

  with tempfile.NamedTemporaryFile(suffix=".npz") as file:
    flat = flax.traverse_util.flatten_dict(noisy, sep="/")
    np.savez(file.name, **{f"params/{k}": v for k, v in flat.items()}, **drawn,
             num_layers=args.layers, width=384, num_heads=6, patch=2, channels=3, num_classes=10,
             sigma_data=config.sigma_data, positions=sincos_positions(16, 16, 384))
    twin = subprocess.Popen([sys.executable, "-m", "dbjax.bench.torch_block", file.name],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    theirs = float(twin.stdout.readline())
  print(f"loss of the same weights and draws: jax {ours:.6f}, torch {theirs:.6f}")
  np.testing.assert_allclose(ours, theirs, rtol=1e-4)

  def torch_step() -> float:
    twin.stdin.write("\n")
    twin.stdin.flush()
    return float(twin.stdout.readline())

  rate = race.matrix_rate()
  times = race.race({"jax": lambda: take(1), "torch": torch_step, "product": rate}, args.rounds, 2)
  twin.stdin.close()
  twin.wait()
  per_gflop = times.pop("product")
  rows = race.against(times, "torch")
  flops = plan.matmul_flops(task)
  for row in rows:
    shares = flops / 1e9 * per_gflop / times[row["what"]]
    row["share of matrix rate"] = float(np.median(shares))
  race.report("step", f"DiT-S/2, {args.layers} layers, 256 tokens, batch {args.batch_size}: "
              f"{flops / 1e9:.0f} GFLOP a step; products at {np.median(1 / per_gflop):.0f} GFLOP/s",
              rows, args.json)
