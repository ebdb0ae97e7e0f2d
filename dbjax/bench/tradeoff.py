"""Quality against memory: a point for each model of `evidence`, with what a step of it needs.

    python -m dbjax.bench tradeoff --figure=tradeoff.png

Memory is that of one training step of one block: weights, average, optimizer, gradients and
activations, by XLA's compiler for this machine's CPU (`dbjax.plan`). Quality is the Frechet
distance of samples' pixels, by Euler's steps without guidance. A point is the mean of the seeds; a
bar through it goes from the least to the most of them. A square is a network of fewer layers, which
is trained end to end in the memory of one block, by as many layer evaluations.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dbjax import metrics
from dbjax import paths
from dbjax import plan
from dbjax.bench import evidence
from dbjax.bench import race
from dbjax.errors import UserError

# Of each picture: its title, and {name of a line: (data set of `evidence`, end of a model's name)}.
PICTURES = {
    "Digits, DiT of 12 layers": {
        "the paper's network": ("digits", ""),
        "newer parts, Muon, twice the rate": ("digits, new form", "")},
    "Fashion-MNIST, DiT of 6 layers, 2 epochs": {
        "the paper's network": ("fashion_mnist", ""),
        "newer parts, Muon": ("fashion_mnist, new form", "")},
    "Fashion-MNIST, DiT of 6 layers, 16 epochs": {
        "the paper's network": ("fashion_mnist, long", ""),
        "newer parts, Muon": ("fashion_mnist, long", ", newer parts")},
}


class Point(NamedTuple):
  """A model of one line.

  Attributes:
    model: B, and the layers where they are fewer than those of the others.
    mib: what a step of its largest block needs.
    distances: (seeds,).
  """

  model: str
  mib: float
  distances: np.ndarray


def points(results: dict[Any, dict[str, Any]], wanted: dict[Any, Any], data: str, end: str
           ) -> Iterator[Point]:
  """The models of a data set that differ in nothing but B and their layers.

  Args:
    results, wanted: {(data set, model, seed): ...}, as of `evidence.current`.
    data: the data set.
    end: of a model's name, after its B and layers.
  """
  measure = f"frechet_{evidence.EXPERIMENTS[data].options['features'][0]}"
  shallow = [f"B = 1, {layers} layers" for layers in range(1, 12)]
  for name in [f"B = {b}" for b in range(1, 9)] + shallow:
    model = name + end
    found = [r["scores"][0][measure] for (d, m, _), r in results.items() if (d, m) == (data, model)]
    if found:
      config = wanted[data, model, evidence.SEEDS[0]]
      needed = plan.make_plan(config, jax.devices()[:1]).total
      yield Point(name, needed / 2**20, np.array(found))


def figure(pictures: dict[str, dict[str, list[Point]]], path: Path):
  """Draws lines of points: memory to the right, distance upwards; each has its colour in all."""
  from matplotlib.figure import Figure  # pylint: disable=g-import-not-at-top
  from matplotlib.ticker import LogLocator
  from matplotlib.ticker import ScalarFormatter

  drawing = Figure(figsize=(5 * len(pictures), 3.6), layout="constrained")
  axes = drawing.subplots(1, len(pictures), squeeze=False)[0]
  for ax, (title, lines) in zip(axes, pictures.items()):
    for i, (line, found) in enumerate(lines.items()):
      if not found:
        continue
      x, mean = [p.mib for p in found], [p.distances.mean() for p in found]
      spread = [[m - p.distances.min() for p, m in zip(found, mean)],
                [p.distances.max() - m for p, m in zip(found, mean)]]
      ax.errorbar(x, mean, spread, fmt="none", ecolor=f"C{i}", capsize=2, linewidth=1)
      deep = sum("layers" not in p.model for p in found)  # these come first
      ax.plot(x[:deep], mean[:deep], "o-", color=f"C{i}", linewidth=1, label=line)
      ax.plot(x[deep:], mean[deep:], "s", color=f"C{i}")
      for p, m in zip(found, mean):
        words = p.model.replace("B = 1", "end to end")
        beside = min(range(deep), key=lambda k: abs(x[k] - p.mib), default=None)
        below = beside is not None and m < mean[beside]
        ax.annotate(words, (p.mib, m), (4, -12 if below else 5), textcoords="offset points",
                    fontsize=8)
    ax.set(title=title, xscale="log", ylabel="Frechet distance (lower is better)",
           xlabel="memory of a training step of one block, MiB", ylim=(0, 1.1 * ax.dataLim.ymax))
    ax.margins(x=0.12)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.minorticks_off()
    ax.legend(fontsize=8, frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
  with paths.writing(path, "--figure"):
    drawing.savefig(path, dpi=110)


def main(argv: list[str]):
  parser = argparse.ArgumentParser(prog="python -m dbjax.bench tradeoff", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--results", type=Path, default=evidence.RESULTS, help="of `evidence`")
  parser.add_argument("--figure", type=Path, default=None, help="a PNG to draw (needs matplotlib)")
  args = parser.parse_args(argv)
  race.drawable(args)
  wanted = {(data, model, seed): config for data, model, seed, config in evidence.configs("")}
  results, pictures = evidence.current(args.results, wanted), {}
  for title, lines in PICTURES.items():
    found = {line: list(points(results, wanted, *which)) for line, which in lines.items()}
    pictures[title] = found
    rows = [(line, p.model, f"{p.mib:.0f}", len(p.distances), f"{p.distances.mean():.3g}",
             f"{p.distances.min():.3g} to {p.distances.max():.3g}")
            for line, some in found.items() for p in some]
    if rows:
      print(title + "\n" + metrics.table(
          ["network", "model", "MiB", "seeds", "Frechet distance", "least to most"], rows) + "\n")
  pictures = {title: lines for title, lines in pictures.items() if any(lines.values())}
  if not pictures:
    raise UserError(f"--results={args.results} has no images' scores: see python -m dbjax.bench "
                    "evidence --help")
  if args.figure:
    figure(pictures, args.figure)
    print(args.figure)
