"""How far a set of samples is from the data, in a space of features.

A network that sees well, or the pixels themselves, turns images into points; then

frechet      |m - n|^2 + tr(A + B - 2 (A B)^(1/2)), between Gaussians with the means and
             covariances of both sets (Heusel et al. 2017, arXiv 1706.08500). It is too
             large by about 1 / num: only figures of equal numbers compare.
kid          the squared maximum mean discrepancy under k(x, y) = (x.y / dim + 1)^3
             (Binkowski et al. 2018, arXiv 1801.01401). Unbiased, so it may fall below 0.
precision    the share of samples that lie in the manifold of the data: the union of
recall       balls about its points that reach their third neighbour; and the share of
             the data that lie in that of the samples (Kynkaanniemi et al. 2019, arXiv
             1904.06991). One falls with bad samples, the other with missing modes.

All is float64 on the host. Features stream by: memory grows with dim^2 and with the rows
kept for all but the first, not with the number of images.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import hashlib
import json
import uuid

from etils import epath
import numpy as np

from dbjax import paths
from dbjax.data.dataset import batches
from dbjax.data.dataset import COMPARED
from dbjax.data.dataset import fingerprint
from dbjax.data.dataset import some
from dbjax.errors import UserError
from dbjax.quality.features import Features

ROWS = 10_000  # kept by default: ten subsets for KID of the size that its authors take
SUBSETS, SUBSET_SIZE = 10, 1000  # KID: at least so many, none larger
NEIGHBOUR = 3  # whose distance is the radius of a ball
MIN_IMAGES = NEIGHBOUR + 1  # that have scores; KID's error needs as many: two subsets of two
BLOCK = 500  # points whose distances to all others are held at a time
_CLASSIFIED_PIXELS = 1024  # of larger images no classifier is fitted
_CLASSIFIER_IMAGES = 5000  # that one is fitted to, at most
_AT_ONCE = 100  # images seen by features at a time


@dataclasses.dataclass(frozen=True)
class Statistics:
  """Of a set of images.

  Attributes:
    features: what they were seen by.
    num: how many images.
    mean, cov: (dim,) and (dim, dim) float64; cov has the divisor num - 1.
    rows: (min(num, keep), dim) float32, a random subset of the features in random order:
      so any slice is a random subset too.
  """

  features: str
  num: int
  mean: np.ndarray
  cov: np.ndarray
  rows: np.ndarray


class Accumulator:
  """Statistics of features that come a batch at a time.

  The rows kept are a function of the seed and of the order of the images, not of how
  they are cut into batches.
  """

  def __init__(self, features: str, keep: int = ROWS, seed: int = 0):
    self._features, self._keep, self._seed = features, keep, seed
    self._rng = np.random.default_rng(seed)
    self._num, self._mean, self._scatter = 0, np.zeros(0), np.zeros((0, 0))
    self._rows = np.empty((0, 0), np.float32)

  def add(self, x: np.ndarray):
    """Takes in the features (n, dim) of n more images; none of them changes nothing.

    Raises:
      UserError: they are not of this shape, of another dim than before, or not finite.
    """
    x = np.asarray(x)
    self._check(x)
    if not len(x):
      return
    if not self._num:
      dim = x.shape[1]
      self._mean, self._scatter = np.zeros(dim), np.zeros((dim, dim))
      self._rows = np.empty((self._keep, dim), np.float32)
    # Vitter's algorithm R: image i takes a random one of i + 1 slots, if that is one of those kept.
    index = self._num + np.arange(len(x))
    slot = (self._rng.random(len(x)) * (index + 1)).astype(int)
    slot = np.where(index < self._keep, index, slot)
    kept = slot < self._keep
    self._rows[slot[kept]] = x[kept]  # of two in one slot the last stays

    # Chan et al. 1979: scatters about two means add up, and one more term for their distance.
    total = self._num + len(x)
    mean = x.mean(0, np.float64)
    apart = mean - self._mean
    deviation = np.concatenate([x - mean, [(self._num * len(x) / total) ** 0.5 * apart]])
    self._scatter += deviation.T @ deviation
    self._mean += len(x) / total * apart
    self._num = total

  def _check(self, x: np.ndarray):
    if x.ndim != 2 or not x.shape[1]:
      raise UserError(f"features {self._features!r} are of shape {x.shape}, expected (images, "
                      "numbers of each)")
    if self._num and x.shape[1] != self._rows.shape[1]:
      raise UserError(f"features {self._features!r} are {x.shape[1]} numbers of an image, and were "
                      f"{self._rows.shape[1]} of those before: all images must have one size")
    if not np.isfinite(x).all():
      raise UserError(f"features {self._features!r} of images {self._num} to "
                      f"{self._num + len(x) - 1} are not finite: check the weights behind them")

  def statistics(self) -> Statistics:
    """Of all images so far. Raises UserError where there are fewer than two."""
    _require(self._num, "statistics", 2)
    order = np.random.default_rng([self._seed, 1]).permutation(min(self._num, self._keep))
    return Statistics(self._features, self._num, self._mean.copy(),
                      self._scatter / (self._num - 1), self._rows[order])


def _require(num: int, what: str, least: int):
  """Raises UserError where there are fewer images."""
  if num < least:
    raise UserError(f"{num} images: {what} need {least} or more")


def statistics(features: str, batches: Iterable[np.ndarray], keep: int = ROWS,
               seed: int = 0) -> Statistics:
  """The statistics of all batches (n, dim) of features; see `Accumulator`."""
  whole = Accumulator(features, keep, seed)
  for x in batches:
    whole.add(x)
  return whole.statistics()


def frechet(a: Statistics, b: Statistics) -> float:
  """The Frechet distance of the Gaussians with these means and covariances, singular or not."""
  # With roots A = R R^T and B = S S^T, the trace is the sum of the singular values of R^T S; the
  # roots of the eigenvalues of A B would be wrong by 1e-7 of the whole where A is singular.
  cross = np.linalg.svd(_root(a.cov).T @ _root(b.cov), compute_uv=False).sum()
  apart = np.sum((a.mean - b.mean) ** 2)
  found = apart + np.trace(a.cov) + np.trace(b.cov) - 2 * cross
  return float(np.maximum(found, 0))  # of equal sets it is rounding, of either sign


def _root(cov: np.ndarray) -> np.ndarray:
  values, vectors = np.linalg.eigh(cov)
  return vectors * np.sqrt(np.maximum(values, 0))


def kid(a: Statistics, b: Statistics) -> tuple[float, float]:
  """The kernel distance and its standard error.

  Both sets of rows are cut into as many subsets: ten, or more so that none is larger
  than 1000. The subsets are disjoint, so their estimates are independent, and the error
  is what their spread says; of overlapping ones it would be too small.

  Raises:
    UserError: fewer than four images, of which two subsets cannot be made.
  """
  sizes = len(a.rows), len(b.rows)
  _require(min(sizes), "their scores", MIN_IMAGES)
  num = min(max(SUBSETS, -(-max(sizes) // SUBSET_SIZE)), min(sizes) // 2)
  values = [_mmd(x.astype(np.float64), y.astype(np.float64))
            for x, y in zip(np.array_split(a.rows, num), np.array_split(b.rows, num))]
  return float(np.mean(values)), float(np.std(values, ddof=1) / num**0.5)


def _mmd(x: np.ndarray, y: np.ndarray) -> float:
  """The unbiased estimate of MMD^2 (arXiv 1801.01401, equation 4) from (N, dim) and (M, dim)."""
  kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3
  others = lambda k: (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))
  return others(kernel(x, x)) + others(kernel(y, y)) - 2 * kernel(x, y).mean()


def precision_recall(samples: Statistics, reference: Statistics) -> tuple[float, float]:
  """Precision and recall, from equal numbers of rows: as many as both have.

  Raises:
    UserError: fewer than four images: a third neighbour is wanting.
  """
  num = min(len(samples.rows), len(reference.rows))
  _require(num, "their scores", MIN_IMAGES)
  x, y = samples.rows[:num] - reference.mean, reference.rows[:num] - reference.mean
  # |x|^2 + |y|^2 - 2 x.y of points that coincide is not quite 0, but within this.
  rounding = 1e-12 * max(_squares(x).max(), _squares(y).max())
  radius = lambda x: np.concatenate([  # the 0th neighbour is the point itself
      rounding + np.partition(d, NEIGHBOUR)[:, NEIGHBOUR] for _, d in _distances(x, x)])
  radius_x, radius_y = radius(x), radius(y)
  precise, recalled = np.zeros(num, bool), np.zeros(num, bool)
  for block, d in _distances(x, y):
    precise[block] = (d <= radius_y).any(1)
    recalled |= (d <= radius_x[block, None]).any(0)
  return float(precise.mean()), float(recalled.mean())


def _distances(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
  """Squared distances of some rows of x (N, dim), in turn, to all of y (M, dim): (n, M)."""
  for start in range(0, len(x), BLOCK):
    block = slice(start, start + BLOCK)
    yield block, _squares(x[block])[:, None] + _squares(y) - 2 * x[block] @ y.T


def _squares(x: np.ndarray) -> np.ndarray:
  return np.einsum("nd,nd->n", x, x)


def scores(samples: Statistics, reference: Statistics) -> dict[str, float]:
  """All figures, under the names that they may be printed by.

  Returns:
    fid, kid, kid_error, precision, recall if the features are `inception`'s. Of other
    features f they are other measures: frechet_f, kid_f and so on.

  Raises:
    UserError: there are fewer than `MIN_IMAGES`, or the features are of images of two sizes.
  """
  if samples.features != reference.features:
    raise ValueError(f"samples were seen by {samples.features!r}, the reference by "
                     f"{reference.features!r}")
  if len(samples.mean) != len(reference.mean):
    raise UserError(f"features {samples.features!r} are {len(samples.mean)} numbers of a sample, "
                    f"and {len(reference.mean)} of a real image: both must have one size")
  inception = samples.features == "inception"
  distance, error = kid(samples, reference)
  precision, recall = precision_recall(samples, reference)
  figures = {"fid" if inception else "frechet": frechet(samples, reference), "kid": distance,
             "kid_error": error, "precision": precision, "recall": recall}
  return {name if inception else f"{name}_{samples.features}": x for name, x in figures.items()}


def reference(directory: epath.PathLike, features: Features, data: str, num: int,
              batches: Callable[[], Iterable[np.ndarray]]) -> Statistics:
  """The statistics of real images, computed once and then read from `directory`.

  A file that is damaged, or holds something else than its name says, is computed anew
  and replaced; a line says so.

  Args:
    directory: of the cache; may be gs://.
    features: to see them by.
    data: a fingerprint of the images and of how they are prepared.
    num: of images.
    batches: called if need be, gives all images.
  """
  identity = dict(features=features.name, data=data, num=num, keep=ROWS)
  key = json.dumps(identity, sort_keys=True)
  digest = hashlib.sha256(key.encode()).hexdigest()[:16]
  path = epath.Path(directory) / f"{features.name}_{num}_{digest}.npz"
  if path.exists():
    try:
      with path.open("rb") as file, np.load(file) as saved:
        if str(saved["key"]) != key:
          raise ValueError(f"it is that of {saved['key']}")
        return Statistics(features.name, num, saved["mean"], saved["cov"], saved["rows"])
    except Exception as e:  # numpy and zipfile raise almost anything here
      print(f"note: {path} cannot be used ({' '.join(str(e).split())[:200]}): computed anew",
            flush=True)
  computed = statistics(features.name, (np.asarray(features(x)) for x in batches() if len(x)))
  if computed.num != num:
    raise ValueError(f"{computed.num} images for the statistics of {num}")
  _write(path, key=key, mean=computed.mean, cov=computed.cov, rows=computed.rows)
  return computed


def _write(path: epath.Path, **arrays):
  """A .npz file, whole or not at all; a line where it cannot be had."""
  fresh = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with fresh.open("wb") as file:
      np.savez(file, **arrays)
    fresh.replace(path)
  except OSError as e:
    print(f"note: {path} cannot be written ({e.strerror}): it will be computed again", flush=True)
  finally:
    if fresh.exists():
      fresh.unlink()


@dataclasses.dataclass(frozen=True)
class Reference:
  """What samples are compared with.

  Attributes:
    features: to see images by.
    statistics: of the training images in each of them.
    classifier: images -> classes; None if the images are large.
    held_out: the scores of real images that were not trained on; empty if they are too few.
  """

  features: tuple[Features, ...]
  statistics: tuple[Statistics, ...]
  classifier: Callable[[np.ndarray], np.ndarray] | None
  held_out: dict[str, float]

  def scores(self, batches: Iterable[tuple[np.ndarray, np.ndarray | None]]) -> dict[str, float]:
    """Of images (n, H, W, C) uint8 and their labels (n,), a batch at a time.

    Returns:
      num_samples, how many they were; accuracy, if there are a classifier and labels; and `scores`
      in each of the features.
    """
    seen = [Accumulator(f.name) for f in self.features]
    right: list[np.ndarray] = []
    total = 0
    for images, labels in batches:
      if not len(images):
        continue
      total += len(images)
      for features, accumulator in zip(self.features, seen):
        accumulator.add(np.asarray(features(images)))
      if self.classifier and labels is not None:
        right.append(self.classifier(images) == labels)
    _require(total, "their scores", MIN_IMAGES)
    found: dict[str, float] = dict(num_samples=total)
    if right:
      found["accuracy"] = float(np.mean(np.concatenate(right)))
    for accumulator, real in zip(seen, self.statistics):
      found |= scores(accumulator.statistics(), real)
    return found

  def note_few(self, num_samples: int):
    """Prints a line for each features in which some images are too few for a covariance."""
    for features, real in zip(self.features, self.statistics):
      numbers = {"samples": num_samples, "training images": real.num,
                 "held-out images": self.held_out.get("num_samples", np.inf)}
      dim = len(real.mean)
      few = [f"{num} {kind}" for kind, num in numbers.items() if num <= dim]
      if few:
        print(f"note: features {features.name!r} are {dim} numbers of an image: the covariance of "
              f"{' and '.join(few)} is singular, and their Frechet distance says little",
              flush=True)


def make_reference(train, held_out, features: Sequence[Features]) -> Reference:
  """The reference of a data set; the statistics of its images are cached.

  Args:
    train, held_out: examples of image (H, W, C) uint8 and label: see `dbjax/data`.
    features: to see them by.

  Raises:
    UserError: there are too few images to train on. Of too few held out a line says so.
  """
  if len(train) < MIN_IMAGES:
    raise UserError(f"the images to train on are {len(train)}: to score samples by them "
                    f"{MIN_IMAGES} or more are needed")
  identity = getattr(train, "identity", None) or f"{fingerprint(train, COMPARED):08x}"
  statistics = tuple(reference(
      paths.cache(), f, identity, len(train), lambda: (image for image, _ in _batches(train)))
      for f in features)
  classifier = None
  if train.take(np.arange(1))["image"].size <= _CLASSIFIED_PIXELS:
    few = train.take(some(len(train), _CLASSIFIER_IMAGES))
    if len(np.unique(few["label"])) > 1:
      classifier = fit_classifier(few["image"], few["label"])
  made = Reference(tuple(features), statistics, classifier, {})
  if len(held_out) < MIN_IMAGES:
    print(f"note: the held-out images are {len(held_out)}: only {MIN_IMAGES} or more have scores "
          "of their own", flush=True)
    return made
  return dataclasses.replace(made, held_out=made.scores(_batches(held_out)))


def _batches(images) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  for _, batch in batches(images, _AT_ONCE):
    yield batch["image"], batch["label"]


def fit_classifier(images: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
  """A classifier of images (N, H, W, C) uint8 by their pixels: an SVC. For small images."""
  from sklearn import svm  # pylint: disable=g-import-not-at-top

  flat = lambda x: np.asarray(x, np.float64).reshape(len(x), -1) / 127.5 - 1
  svc = svm.SVC().fit(flat(images), labels)
  return lambda x: svc.predict(flat(x))
