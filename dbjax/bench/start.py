"""How long a command takes to its first step: with no compiled program kept, and the second time.

Each turn is a process: `python -m dbjax.main` on the bundled digits, one step of one block, and
the checkpoint of it. Then how long a step takes to compile, of 3 layers and of 24, as a scanned
loop.
"""

import argparse
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np

from dbjax import config as config_lib
from dbjax import program
from dbjax import sharding
from dbjax import task as task_lib
from dbjax.bench import race


def main(argv: list[str]):
  parser = argparse.ArgumentParser(prog="python -m dbjax.bench start", description=__doc__)
  args = race.arguments(parser, argv, rounds=7, quick=3)
  with tempfile.TemporaryDirectory() as folder:
    first_steps: dict[str, list[float]] = {"first time": [], "second time": []}
    environment = {**os.environ, "XDG_CACHE_HOME": f"{folder}/cache", "PYTHONUNBUFFERED": "1"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)

    def run(which: str) -> float:
      """Seconds to the end."""
      shutil.rmtree(f"{folder}/run", ignore_errors=True)
      if which == "first time":
        shutil.rmtree(f"{folder}/cache", ignore_errors=True)
      begin = time.perf_counter()
      with subprocess.Popen(
          [sys.executable, "-m", "dbjax.main", "--config=digits", f"--workdir={folder}/run",
           "--config.train.num_steps=1", "--config.train.blocks=0"],
          env=environment, stdout=subprocess.PIPE, text=True) as command:
        for line in command.stdout or ():
          if line.startswith("block 0 | step"):
            first_steps[which].append(time.perf_counter() - begin)
      if command.returncode:
        raise subprocess.CalledProcessError(command.returncode, command.args)
      return time.perf_counter() - begin

    imports = lambda: race.seconds_of(lambda: subprocess.run(
        [sys.executable, "-c", "import dbjax.main"], check=True) and None)
    times = race.race({"first time": lambda: run("first time"),
                       "second time": lambda: run("second time"), "imports alone": imports},
                      args.rounds, warm=0)
  _report("a command of one step, from its start to that step", race.against(
      {which: np.array(seconds) for which, seconds in first_steps.items()}, "first time"),
          args.json)
  _report("the same, to its end", race.against(times, "first time"), args.json)
  jax.config.update("jax_compilation_cache_dir", None)
  times = race.race({f"{layers} layers": functools.partial(compile_seconds, layers)
                     for layers in (3, 24)}, args.rounds, warm=1)
  _report("compiling a step whose layers are a scanned loop", race.against(times, "3 layers"),
          args.json)


def _report(title: str, rows: list[dict[str, Any]], path: str):
  race.report("start", title, rows, path)


def compile_seconds(num_layers: int) -> float:
  """To trace and compile the step of one block of so many layers of the digits' network."""
  jax.clear_caches()
  config = config_lib.resolve(config_lib.read("digits", {
      "num_blocks": 1, "model.num_layers": num_layers, "model.unroll": 1}))
  mesh = sharding.make_mesh(config, jax.devices()[:1])
  begin = time.perf_counter()
  program.compile_step(task_lib.make_task(config, 0), mesh, 1)
  return time.perf_counter() - begin
