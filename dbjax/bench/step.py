"""One block's training step on CPU, timed alternately against PyTorch's: eager, and compiled.

Four networks, float32, AdamW, clipping, EMA: the DiT, the ViT (task classify), the masked and the
autoregressive one. Before the clock starts all compute the loss and the norm of its gradient, of
the same weights and draws, and must agree. The share of the matrix rate is that of the operations
in matrix products of our compiled step, in the time of each, in what JAX's own products of large
matrices reach in the same round.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
import contextlib
import importlib.util
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from typing import Any, NamedTuple

import flax
import jax
import numpy as np
import optax

from dbjax import block as block_lib
from dbjax import config as config_lib
from dbjax import operations
from dbjax import program
from dbjax import sharding
from dbjax import task as task_lib
from dbjax.bench import race
from dbjax.errors import UserError
from dbjax.models import positions


class Case(NamedTuple):
  """A network and its task.

  Attributes:
    title: in the table.
    config: that it is made of.
    fields: that differ; the twin in `torch_networks.py` has the name of the network.
  """

  title: str
  config: str
  fields: Mapping[str, Any]


_LAYERS = {"num_blocks": 1, "model.num_layers": 4, "model.unroll": 4, "model.width": 384,
           "model.num_heads": 6}
_IMAGES = {"data.image_size": 32, "data.channels": 3}
CASES = {
    "dit": Case("DiT-S/2, 4 layers, 256 tokens, batch 16", "digits", _LAYERS | _IMAGES | {
        "sigma_data": 0.5, "model.patch_size": 2, "train.batch_size": 16}),
    "vit": Case("ViT, 4 layers of width 384, 65 tokens, batch 64", "digits_classify",
                _LAYERS | _IMAGES | {
                    "data.num_classes": 100, "model.patch_size": 4, "model.dropout": 0.0,
                    "task.crop": 0, "train.batch_size": 64}),
    "masked": Case("masked, 4 layers of width 384, 256 tokens of 256, batch 8", "gcide_masked",
                   _LAYERS | {"data.vocab_size": 256, "train.batch_size": 8}),
    "autoregressive": Case(
        "autoregressive, two streams, 4 layers of width 384, 256 tokens of 4,096, batch 8", "kjv",
        _LAYERS | {"data.vocab_size": 4096, "data.length": 256, "data.eos": -1,
                   "train.batch_size": 8}),
}


def make_config(case: str, **fields: Any) -> Any:
  """The config of a case, resolved; some fields by argument: make_config("dit", num_blocks=2)."""
  return config_lib.resolve(config_lib.read(
      CASES[case].config, {**CASES[case].fields, **fields}))


def random_batch(config: Any) -> dict[str, np.ndarray]:
  """Images, labels or tokens of nothing: what the task trains on, (N, ...)."""
  rng = np.random.default_rng(0)
  data = config.data
  above = dict(image=256, label=data.get("num_classes"), tokens=data.get("vocab_size"))
  task = task_lib.make_task(config, 0)
  shapes = task.abstract_batch(task.config.train.batch_size)
  return {name: rng.integers(0, above[name], x.shape, x.dtype) for name, x in shapes.items()}


def compiled(config: Any) -> jax.stages.Compiled:
  """The training step of block 0 on one device: `program.compile_step`'s."""
  return program.compile_step(task_lib.make_task(config, 0), _mesh(config), 1)


def begin(config: Any, batch: Mapping[str, Any]) -> tuple[Any, tuple]:
  """The state that `compiled` starts from, and its other arguments.

  Args:
    config: resolved.
    batch: arrays (N, ...).
  """
  task, mesh = task_lib.make_task(config, 0), _mesh(config)
  batch, frozen = (sharding.put(mesh, jax.P(), x) for x in (batch, task.frozen(config)))
  interval = task.make_schedule(config).training_interval(0)
  of_blocks = sharding.put(mesh, jax.P("block"), jax.tree.map(
      lambda x: np.asarray(x)[None], (np.int32(0), interval)))
  return program.init(task, mesh, (0,)), (batch, *of_blocks, frozen)


def _mesh(config: Any) -> jax.sharding.Mesh:
  return sharding.make_mesh(config, jax.devices()[:1])


def taker(step: Callable, state: Any, others: tuple) -> Callable[[int], float]:
  """What takes so many steps, by the same arguments, and returns the seconds that they took."""

  def turn(num_steps: int) -> Any:
    nonlocal state
    for _ in range(num_steps):
      state, _ = step(state, *others)
    return state

  return lambda num_steps: race.seconds_of(lambda: turn(num_steps))


def stepper(config: Any, batch: Mapping[str, Any]) -> Callable[[int], float]:
  """What trains block 0 on one device by the same batch, again and again: see `taker`."""
  return taker(compiled(config), *begin(config, batch))


def main(argv: list[str]):
  parser = argparse.ArgumentParser(prog="python -m dbjax.bench step", description=__doc__)
  parser.add_argument("--only", default=",".join(CASES), help="of " + ", ".join(CASES))
  args = race.arguments(parser, argv, rounds=15, quick=8)
  if importlib.util.find_spec("torch") is None:
    raise UserError("the benchmark needs PyTorch: .venv/bin/pip install -e '.[bench]'")
  if unknown := set(args.only.split(",")) - CASES.keys():
    raise UserError(f"--only={args.only}: there is no {', '.join(sorted(unknown))}; expected some "
                    f"of {', '.join(CASES)}")
  twins = ["eager", "compile"] if _has_compiler() else ["eager"]
  for name in args.only.split(","):
    _compare(CASES[name].title, make_config(name), twins, args)


def _has_compiler() -> bool:
  """Whether torch.compile finds what it needs; says so where it does not."""
  compiler = os.environ.get("CXX", "g++")
  headers = Path(sysconfig.get_path("include"), "Python.h")
  if found := shutil.which(compiler) and headers.exists():
    return found
  print(f"torch.compile: left out, for want of a C++ compiler ({compiler}) or of {headers}")
  return False


def _compare(title: str, config: Any, twins: list[str], args: argparse.Namespace):
  batch, rate = random_batch(config), race.matrix_rate()
  example, ours = _example(config, batch)
  step = compiled(config)
  take, flops = taker(step, *begin(config, batch)), operations.product_flops(step.as_text())
  with contextlib.ExitStack() as stack, tempfile.NamedTemporaryFile(suffix=".npz") as file:
    np.savez(file.name, **example)
    torch = {f"torch {kind}": stack.enter_context(_twin(file.name, kind, ours)) for kind in twins}
    times = race.race({"jax": lambda: take(1), **torch, "product": rate}, args.rounds, 2)
  per_gflop = times.pop("product")
  rows = race.against(times, "torch eager")
  for row in rows:
    seconds = times[row["what"]]
    if len(twins) > 1:
      row["over torch compile"] = float(np.median(seconds / times["torch compile"]))
    row["share of matrix rate"] = float(np.median(flops / 1e9 * per_gflop / seconds))
  race.report("step", f"{title}: {flops / 1e9:.0f} GFLOP a step; products at "
              f"{np.median(1 / per_gflop):.0f} GFLOP/s", rows, args.json)


def _example(config: Any, batch: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[float, float]]:
  """What a twin needs, as flat arrays; the loss and the norm of its gradient there.

  Weights are those of a new block and a little noise, so that nothing is zero.
  """
  task, rng = task_lib.make_task(config, 0), np.random.default_rng(1)
  params = jax.tree.map(lambda x: np.asarray(x + rng.normal(0, 0.02, x.shape), np.float32),
                        block_lib.init(task, 0).params)
  frozen = task.frozen(config)
  drawn = task.draw(jax.random.key(0), batch, task.make_schedule(config).training_interval(0))
  loss, grads = jax.jit(jax.value_and_grad(task.loss))(params, drawn, frozen)
  drawn.pop("key", None)  # of dropout, which no case has
  constants = dict(frozen or {})
  if "patch_size" in config.model:
    side = config.data.image_size // config.model.patch_size
    constants["positions"] = positions.sincos(side, side, config.model.width)
  flat = flax.traverse_util.flatten_dict(
      dict(params=params, drawn=drawn, constant=constants, batch=dict(batch)), sep="/")
  sizes = {**config.model, **config.data, **config.schedule, "sigma_data": config.get("sigma_data")}
  network = config.model.network.rpartition(":")[2]
  return flat | dict(network=network, sizes=json.dumps(sizes)), (
      float(loss), float(optax.tree.norm(grads)))


@contextlib.contextmanager
def _twin(path: str, kind: str, ours: tuple[float, float]) -> Iterator[Callable[[], float]]:
  """A turn of the twin, a step, in a process of its own, once it agrees with `ours`.

  Raises:
    AssertionError: it does not.
  """
  with subprocess.Popen(
      [sys.executable, "-m", "dbjax.bench.torch_networks", path, kind],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
    to, of = process.stdin, process.stdout
    assert to and of  # pipes, as asked for
    loss, norm = map(float, of.readline().split())
    print(f"loss and norm of the gradient: jax {ours[0]:.6f}, {ours[1]:.6f}; "
          f"torch {kind} {loss:.6f}, {norm:.6f}", flush=True)
    np.testing.assert_allclose(ours, (loss, norm), rtol=1e-4)

    def turn() -> float:
      to.write("\n")
      to.flush()
      return float(of.readline())

    yield turn
    to.close()
