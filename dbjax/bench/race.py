"""Competitors take turns in one process tree: what else the machine does falls on all alike.

Results are medians and quartiles over rounds, and ratios of neighbours in a round, as a table and
as JSON beside the machine and the versions.
"""

import argparse
from collections.abc import Callable, Mapping
import datetime
import importlib.util
import json
import os
from pathlib import Path
import platform
import time
from typing import Any

import jax
import jaxlib
import numpy as np

import dbjax
from dbjax import metrics
from dbjax import paths
from dbjax.errors import UserError


def seconds_of(work: Callable[[], Any]) -> float:
  """How long it takes to do some work whose result is arrays, and to have them."""
  begin = time.perf_counter()
  jax.block_until_ready(work())
  return time.perf_counter() - begin


def arguments(parser: argparse.ArgumentParser, argv: list[str], *, rounds: int = 0, quick: int = 0
              ) -> argparse.Namespace:
  """The arguments of a benchmark: its own, --rounds where it has some, --quick and --json.

  Raises:
    UserError: there are no rounds, or the file cannot be written.
  """
  fewer = "fewer cases or steps"
  if rounds:
    parser.add_argument("--rounds", type=int, default=0, help=f"turns of each, {rounds} by default")
    fewer = f"{quick} rounds, and fewer cases"
  parser.add_argument("--quick", action="store_true", help=fewer)
  parser.add_argument("--json", default="", help="a file, to which a line is added for each table")
  args = parser.parse_args(argv)
  writable(args, "json")
  if not rounds:
    return args
  args.rounds = args.rounds or (quick if args.quick else rounds)
  at_least(args, rounds=1)
  return args


def at_least(args: argparse.Namespace, **numbers: int):
  """Raises UserError where an argument is smaller than the number of its name."""
  for name, least in numbers.items():
    if getattr(args, name) < least:
      raise UserError(f"--{name}={getattr(args, name)}: expected {least} or more")


def writable(args: argparse.Namespace, name: str):
  """Sees, before the work whose result goes there, that the file in an argument can be written.

  None need be given. In its place comes the path with ~ expanded.

  Raises:
    UserError: it cannot.
  """
  if given := getattr(args, name):
    target = paths.expand(given, f"--{name}")
    paths.check_writable(target, f"--{name}")
    setattr(args, name, type(given)(target))


def drawable(args: argparse.Namespace):
  """The same of --figure; and that what draws it is there, and can draw such a file."""
  if not args.figure:
    return
  if importlib.util.find_spec("matplotlib") is None:
    raise UserError("--figure needs matplotlib: .venv/bin/pip install -e '.[bench]'")
  if args.figure.suffix not in (".png", ".pdf", ".svg"):
    raise UserError(f"--figure={args.figure}: expected a name that ends in .png, .pdf or .svg")
  writable(args, "figure")


def race(competitors: Mapping[str, Callable[[], float]], rounds: int, warm: int = 1
         ) -> dict[str, np.ndarray]:
  """Seconds of each competitor in each round, (rounds,).

  Args:
    competitors: each takes one turn, and returns the seconds that it took.
    rounds: that count.
    warm: rounds before, that do not.
  """
  times = [[take() for take in competitors.values()] for _ in range(warm + rounds)]
  return dict(zip(competitors, np.array(times[warm:]).T))


def against(times: Mapping[str, np.ndarray], base: str) -> list[dict[str, Any]]:
  """Of each competitor: median and quartiles of its milliseconds, and its ratio to `base`'s."""
  rows = []
  for name, seconds in times.items():
    ratios = seconds / times[base]
    low, median, high = 1e3 * np.quantile(seconds, (0.25, 0.5, 0.75))
    rows.append(dict(what=name, ms=float(median), from_ms=float(low), to_ms=float(high),
                     **{f"over {base}": float(np.median(ratios)),
                        "from": float(np.quantile(ratios, 0.25)),
                        "to": float(np.quantile(ratios, 0.75))}))
  return rows


def matrix_rate() -> Callable[[], float]:
  """A turn of products of matrices (4096, 1536) by (1536, 1536): seconds per 1e9 operations."""
  x, w = jax.numpy.ones((4096, 1536)), jax.numpy.ones((1536, 1536))
  product = jax.jit(lambda x, w: x @ w)

  def take() -> float:
    return min(seconds_of(lambda: product(x, w)) for _ in range(3)) / (
        2 * 4096 * 1536**2 / 1e9)

  return take


def report(part: str, title: str, rows: list[dict[str, Any]], path: str = ""):
  """Prints a table, and adds a line to a file of JSON lines, if one is named."""
  cells = [list(row.values()) for row in rows]
  print(f"\n{part}: {title}\n{metrics.table(list(rows[0]), cells, left=True)}", flush=True)
  if path:
    with paths.writing(path, "--json"), Path(path).open("a") as file:
      file.write(json.dumps(dict(part=part, title=title, rows=rows, **_machine())) + "\n")


def _machine() -> dict[str, Any]:
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    lines = []
  names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return dict(
      processor=names[0] if names else platform.processor(), cores=os.cpu_count(),
      device=jax.devices()[0].device_kind, system=platform.platform(), dbjax=dbjax.__version__,
      jax=jax.__version__, jaxlib=jaxlib.__version__, python=platform.python_version(),
      date=datetime.date.today().isoformat())
