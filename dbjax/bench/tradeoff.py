"""Quality against memory: a point for each model of `evidence`, with what a step of it needs.

    python -m dbjax.bench tradeoff --figure=tradeoff.png

Memory is that of one training step of one block: weights, average, optimizer, gradients and
activations, by XLA's compiler for this machine's CPU (`dbjax.plan`). Quality is the Frechet
distance of samples, of their pixels or of what EfficientNet-Lite0 sees in them, by Euler's steps
without guidance. A point is the mean of the seeds; a bar through it goes from the least to the most
of them. A square is a network of fewer layers, which is trained end to end in the memory of one
block, by as many layer evaluations.
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from dbjax import metrics
from dbjax import paths
from dbjax import plan
from dbjax.bench import evidence
from dbjax.bench import race
from dbjax.errors import UserError


class Picture(NamedTuple):
  """What a panel of the figure shows.

  Attributes:
    title: of the panel.
    features: "pixels" or "efficientnet_lite0", which the distance is of.
    lines: {name of a line: (data set of `evidence`, end of its models' names)}.
  """

  title: str
  features: str
  lines: Mapping[str, tuple[str, str]]


LONG = {"newer parts, Muon": ("fashion_mnist, long", ", newer parts")}
PICTURES = (
    Picture("Digits, DiT of 12 layers: pixels", "pixels", {
        "the paper's network": ("digits", ""),
        "newer parts, Muon, twice the rate": ("digits, new form", "")}),
    Picture("Fashion-MNIST, DiT of 6 layers, 2 epochs: pixels", "pixels", {
        "the paper's network": ("fashion_mnist", ""),
        "newer parts, Muon": ("fashion_mnist, new form", ""),
        "and half batches, P_std = 1.4": ("fashion_mnist, half batches", "")}),
    Picture("Fashion-MNIST, 16 epochs: pixels", "pixels", LONG),
    Picture("Fashion-MNIST, 16 epochs: EfficientNet-Lite0", "efficientnet_lite0", LONG))
NAME = r"(B = \d+(?:, \d+ layers)?)"  # of the models that differ in B and their layers alone


class Point(NamedTuple):
  """A model of one line.

  Attributes:
    model: B, and the layers where they are fewer than those of the others.
    shallow: whether they are.
    mib: what a step of its largest block needs.
    distances: (seeds,).
  """

  model: str
  shallow: bool
  mib: float
  distances: np.ndarray


def points(results: dict[Any, dict[str, Any]], wanted: dict[Any, Any], features: str, data: str,
           end: str) -> Iterator[Point]:
  """The models of a data set that differ in nothing but B and their layers; the shallow come last.

  Args:
    results, wanted: {(data set, model, seed): ...}, as of `evidence.current`.
    features: as of a Picture.
    data: the data set.
    end: of a model's name, after its B and layers.
  """
  for model, fields in evidence.EXPERIMENTS[data].models.items():
    named = re.fullmatch(NAME + re.escape(end), model)
    found = [r["scores"][0][f"frechet_{features}"] for (d, m, _), r in results.items()
             if (d, m) == (data, model)]
    if named and found:
      needed = plan.make_plan(wanted[data, model, evidence.SEEDS[0]], jax.devices()[:1]).total
      yield Point(named[1], "model.num_layers" in fields, needed / 2**20, np.array(found))


def figure(pictures: list[tuple[Picture, dict[str, list[Point]]]], path: Path):
  """Draws lines of points: memory to the right, distance upwards; a line is of one colour."""
  from matplotlib.figure import Figure  # pylint: disable=g-import-not-at-top

  columns = min(len(pictures), 2)
  rows = -(-len(pictures) // columns)
  drawing = Figure(figsize=(5.5 * columns, 3.8 * rows), layout="constrained")
  axes = list(drawing.subplots(rows, columns, squeeze=False).flat)
  names = list(dict.fromkeys(line for _, lines in pictures for line in lines))
  for ax, (picture, lines) in zip(axes, pictures):
    for line, found in lines.items():
      if found:
        _draw(ax, line, f"C{names.index(line)}", found)
    _dress(ax, picture)
  for ax in axes[len(pictures):]:
    ax.remove()
  with paths.writing(path, "--figure"):
    drawing.savefig(path, dpi=110)


def _draw(ax: Any, line: str, color: str, found: list[Point]):
  """One line of points, each with its name beside it."""
  x, mean = [p.mib for p in found], [p.distances.mean() for p in found]
  spread = [[m - p.distances.min() for p, m in zip(found, mean)],
            [p.distances.max() - m for p, m in zip(found, mean)]]
  ax.errorbar(x, mean, spread, fmt="none", ecolor=color, capsize=2, linewidth=1)
  deep = sum(not p.shallow for p in found)  # these come first
  ax.plot(x[:deep], mean[:deep], "o-", color=color, linewidth=1, label=line)
  ax.plot(x[deep:], mean[deep:], "s", color=color)
  for p, m in zip(found, mean):
    words = p.model.replace("B = 1", "end to end")
    beside = min(range(deep), key=lambda k: abs(x[k] - p.mib), default=None)
    below = beside is not None and m < mean[beside]
    ax.annotate(words, (p.mib, m), (4, -12 if below else 5), textcoords="offset points",
                fontsize=8)


def _dress(ax: Any, picture: Picture):
  """The axes of a panel."""
  from matplotlib.ticker import LogLocator  # pylint: disable=g-import-not-at-top
  from matplotlib.ticker import ScalarFormatter

  ax.set_title(picture.title, fontsize=10)
  ax.set(xscale="log", ylabel="Frechet distance (lower is better)",
         xlabel="memory of a training step of one block, MiB", ylim=(0, 1.1 * ax.dataLim.ymax))
  ax.margins(x=0.12)
  ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
  ax.xaxis.set_major_formatter(ScalarFormatter())
  ax.minorticks_off()
  ax.legend(fontsize=8, frameon=False)
  ax.spines[["top", "right"]].set_visible(False)


def main(argv: list[str]):
  parser = argparse.ArgumentParser(prog="python -m dbjax.bench tradeoff", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--results", type=Path, default=evidence.RESULTS, help="of `evidence`")
  parser.add_argument("--figure", type=Path, default=None, help="a PNG to draw (needs matplotlib)")
  args = parser.parse_args(argv)
  race.drawable(args)
  wanted = {(data, model, seed): config for data, model, seed, config in evidence.configs("")}
  results, pictures = evidence.current(args.results, wanted), []
  for picture in PICTURES:
    found = {line: list(points(results, wanted, picture.features, *which))
             for line, which in picture.lines.items()}
    rows = [(line, p.model, f"{p.mib:.0f}", len(p.distances), f"{p.distances.mean():.3g}",
             f"{p.distances.min():.3g} to {p.distances.max():.3g}")
            for line, some in found.items() for p in some]
    if rows:
      pictures.append((picture, found))
      print(picture.title + "\n" + metrics.table(
          ["network", "model", "MiB", "seeds", "Frechet distance", "least to most"], rows) + "\n")
  if not pictures:
    raise UserError(f"--results={args.results} has no images' scores: see python -m dbjax.bench "
                    "evidence --help")
  if args.figure:
    figure(pictures, args.figure)
    print(args.figure)
