"""What was prepared: a table, a picture, and the fields that a config should have."""

from collections import Counter
from collections.abc import Iterable, Iterator
import dataclasses
from typing import Any

from etils import epath
import tqdm

from dbjax import metrics
from dbjax import pictures
from dbjax.data import images
from dbjax.data import records
from dbjax.data import some
from dbjax.data.tfds import read_split
from dbjax.sources import Source

PREVIEW = "preview.png"
_ROWS = 20  # of a table of classes
_SHOWN, _THUMBNAIL = 40, 64  # images in the preview, and their size where it is not one


def watched(source: Source, seen: Counter) -> Source:
  """The same source, which shows on a terminal how far it is, and counts (split, label)."""

  def count(split: str, examples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for example in tqdm.tqdm(examples, split, source.sizes.get(split), unit="", disable=None):
      seen[split, example.get("label")] += 1
      yield example

  return dataclasses.replace(source, splits={s: count(s, x) for s, x in source.splits.items()})


def of_images(path: epath.Path, seen: Counter) -> tuple[str, dict[str, Any]]:
  """What is in a data set of images or latents that has just been written.

  Args:
    path: its directory. A picture of forty images, `PREVIEW`, is written there.
    seen: how many of each (split, label).

  Returns:
    Lines to print; and {name: value} of the config fields that fit.
  """
  name, data_dir = path.parent.name, str(path.parents[1])
  train, held_out, *_ = splits = _in_order({split for split, _ in seen})
  features = records.Split(name, train, data_dir).features
  feature = "image" if "image" in features else "latent"
  height, _, channels = features[feature].shape
  examples = read_split(name, train, data_dir, height or _THUMBNAIL, feature, keep=False)
  mean, deviation = images.mean_and_deviation(examples)
  if feature == "image":
    few = examples.take(some(len(examples), _SHOWN))
    pictures.save_grid(path / PREVIEW, few["image"], _names(features, few["label"]), 10)
  classes = _names(features, range(examples.num_classes or 0))
  lines = [_table(classes, splits, seen), f"{train}: mean {mean:.3f} and standard deviation "
           f"{deviation:.3f}" + " in [-1, 1]" * (feature == "image")]
  fields = {"data.feature": feature, "data.image_size": height, "data.channels": channels,
            "data.num_classes": len(classes or [""]), "sigma_data": float(f"{deviation:.2g}"),
            "data.train": train, "data.held_out": held_out}
  usual = {"data.feature": "image", "data.image_size": None, "data.train": "train",
           "data.held_out": "test"}
  return "\n".join(lines), {k: v for k, v in fields.items() if usual.get(k, v is None) != v}


def _in_order(splits: Iterable[str]) -> list[str]:
  """That which is trained on, that which is held out, and others."""
  rank = lambda s: next((i for i, word in enumerate(("train", "test")) if s.startswith(word)), 2)
  train, *others = sorted(splits, key=lambda s: (rank(s.lower()), s))
  return [train, *others] if others else [train, train]


def _names(features: Any, labels: Iterable[int]) -> list[str] | None:
  return [features["label"].int2str(int(y)) for y in labels] if "label" in features else None


def _table(classes: list[str] | None, splits: list[str], seen: Counter) -> str:
  """How many images of each class there are in each split."""
  splits = list(dict.fromkeys(splits))
  of = lambda split, number, name: seen[split, name] + seen[split, number]  # however it was given
  rows: list[tuple[Any, ...]] = [
      (name, *(of(s, i, name) for s in splits)) for i, name in enumerate(classes or [])]
  notes = []
  for column, split in enumerate(splits, 1):
    missing = [row[0] for row in rows if not row[column]]
    if missing:
      notes.append(f"note: {split} has no images of {', '.join(missing[:5])}"
                   + ", ..." * (len(missing) > 5))
  if len(rows) > _ROWS:
    rows[_ROWS:] = [(f"... {len(rows) - _ROWS} more", *([None] * len(splits)))]
  total = lambda split: sum(n for (s, _), n in seen.items() if s == split)
  rows.append(("all", *map(total, splits)))
  return "\n".join([metrics.table(["class", *splits], rows), *notes])
