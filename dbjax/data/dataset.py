"""Data sets, and the order in which they are seen.

Batch n is a function of (seed, n) alone: the same for every block, for any number of
hosts, and after a resume, without replaying what came before. So there is no iterator
state to save: a batch is asked for by its step.
"""

from collections.abc import Generator, Iterator
import contextlib
import dataclasses
import functools
import signal
from typing import Any
import zlib

from absl import flags
import grain
import numpy as np

from dbjax.errors import UserError

COMPARED = 100  # examples, by which data without a fingerprint of their own are known again


class Arrays:
  """Examples in memory: `Arrays(image=..., label=...)`, each (N, ...)."""

  def __init__(self, **arrays: np.ndarray):
    lengths = {name: len(x) for name, x in arrays.items()}
    if len(set(lengths.values())) != 1:
      raise UserError(f"arrays of {lengths}: expected some of one length")
    self.arrays = {name: np.asarray(x) for name, x in arrays.items()}

  @property
  def identity(self) -> str:
    """A fingerprint."""
    crc = 0
    for x in self.arrays.values():
      crc = zlib.crc32(np.ascontiguousarray(x).data, crc)
    return f"{crc:08x}"

  def __len__(self) -> int:
    return len(next(iter(self.arrays.values())))

  def take(self, index: np.ndarray) -> dict[str, np.ndarray]:
    """The examples of these numbers: a batch."""
    return {name: x[index] for name, x in self.arrays.items()}


@dataclasses.dataclass(frozen=True)
class Dataset:
  """What to train on, and what is held out. Each has `len` and `take(numbers)`."""

  train: Any
  held_out: Any

  def batch(self, seed: int, step: int, batch_size: int,
            rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The global batch of `step`: arrays (batch_size, ...).

    Each epoch is a new permutation; a batch may span two. `rows`, ascending, are the
    numbers of those rows of the batch that are wanted: all by default.
    """
    total = len(self.train)
    position = step * batch_size + (np.arange(batch_size) if rows is None else rows)
    epoch = position // total
    index = np.concatenate([_permutation(seed, e, total)[position[epoch == e] % total]
                            for e in range(epoch[0], epoch[-1] + 1)])
    return self.train.take(index)

  def stream(self, seed: int, steps: range, batch_size: int, rows: np.ndarray | None = None,
             workers: int = 0) -> Generator[dict[str, np.ndarray], None, None]:
    """The batches of `steps`, some loaded ahead: by threads, or by processes (`workers`).

    To be closed when it is left before its end.
    """
    load = functools.partial(_batch, self, seed, batch_size, rows)
    if isinstance(self.train, Arrays):
      yield from map(load, steps)
      return
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    batches = grain.MapDataset.source(steps).map(load).to_iter_dataset(ahead)
    if workers:
      if not flags.FLAGS.is_parsed():  # in a notebook; Grain has flags
        flags.FLAGS.mark_as_parsed()
      batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers),
                                    worker_init_fn=_ignore_interrupts)
    with contextlib.closing(iter(batches)) as iterator:
      yield from iterator


def _ignore_interrupts(*_):
  """Ctrl-C reaches workers too; it is for the run, which ends them."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)


def _batch(dataset, seed, batch_size, rows, step):
  return dataset.batch(seed, int(step), batch_size, rows)


def batches(examples: Any, size: int, total: int | None = None
            ) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
  """All examples in order, or `some` of them, `total`: (numbers, batch) of at most `size`."""
  numbers = some(len(examples), len(examples) if total is None else total)
  for start in range(0, len(numbers), size):
    index = numbers[start:start + size]
    yield index, examples.take(index)


def some(total: int, num: int) -> np.ndarray:
  """Which of `total` examples are looked at, where `num` are enough: always the same, ascending.

  Drawn at random, because data may be sorted by class, or go through the classes again and again.
  """
  if num >= total:
    return np.arange(total)
  return np.sort(np.random.default_rng(0).choice(total, num, replace=False))


def fingerprint(examples: Any, num: int = 0) -> int:
  """A CRC-32 of how many examples there are, of the first, the middle and the last, and of `num`
  between them.
  """
  total = len(examples)
  few = examples.take(np.union1d([0, total // 2, total - 1], some(total, num)))
  crc = zlib.crc32(str(total).encode())
  for name in sorted(few):
    crc = zlib.crc32(np.ascontiguousarray(few[name]).tobytes(), zlib.crc32(name.encode(), crc))
  return crc


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, total: int) -> np.ndarray:
  return np.random.default_rng([seed, epoch]).permutation(total)
