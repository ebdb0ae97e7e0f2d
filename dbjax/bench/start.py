"""How long a command takes to its first step: with no compiled program kept, and the second time.

Each turn is a process: `python -m dbjax.main` on the bundled digits, one step of one block, and
the checkpoint of it.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile

from dbjax.bench import race


def main(argv: list[str]):
  parser = argparse.ArgumentParser(prog="python -m dbjax.bench start", description=__doc__)
  args = race.arguments(parser, argv, rounds=7, quick=3)
  with tempfile.TemporaryDirectory() as folder:
    environment = {**os.environ, "XDG_CACHE_HOME": f"{folder}/cache"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)

    def run():
      shutil.rmtree(f"{folder}/run", ignore_errors=True)
      subprocess.run(
          [sys.executable, "-m", "dbjax.main", "--config=digits", f"--workdir={folder}/run",
           "--config.train.num_steps=1", "--config.train.blocks=0"],
          env=environment, check=True, stdout=subprocess.DEVNULL)

    def first() -> float:
      shutil.rmtree(f"{folder}/cache", ignore_errors=True)
      return race.seconds_of(run)

    def imports() -> float:
      return race.seconds_of(lambda: subprocess.run(
          [sys.executable, "-c", "import dbjax.main"], check=True) and None)

    times = race.race({"first time": first, "second time": lambda: race.seconds_of(run),
                       "imports alone": imports}, args.rounds, warm=0)
  race.report("start", "a command of one step, from its start to its end",
              race.against(times, "first time"), args.json)
