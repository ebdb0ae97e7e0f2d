"""The scores against scipy, closed forms and double loops; the cache against damage."""

import itertools
import json
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg
from scipy import stats
from scipy.spatial import distance

from dbjax.data import Arrays
from dbjax.errors import UserError
from dbjax.quality import distances


def of(*batches, features="inception", **options):
  return distances.statistics(features, batches, **options)


def correlated(rng, n, dim):
  return rng.normal(size=(n, dim)) @ rng.normal(size=(dim, dim)) + rng.normal(size=dim)


def same(a, b):
  assert (a.features, a.num) == (b.features, b.num)
  for name in ("mean", "cov", "rows"):
    x, y = getattr(a, name), getattr(b, name)
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


def test_moments_however_cut_into_batches():
  """Far from 0, where a sum of squares would have lost every digit of the covariance."""
  x = 1e6 * np.arange(1, 6) + correlated(np.random.default_rng(0), 1000, 5)
  exact = x.astype(np.longdouble)
  mean = exact.mean(0)
  cov = (exact - mean).T @ (exact - mean) / 999
  for cuts in ([], [1], [999], [3, 500, 501], range(10, 1000, 10)):
    s = of(*np.split(x, cuts))
    assert s.num == 1000
    np.testing.assert_allclose(s.mean, mean, rtol=1e-15)
    np.testing.assert_allclose(s.cov, cov, rtol=0, atol=1e-9 * np.abs(cov).max())
  naive = (x.T @ x - 1000 * np.outer(x.mean(0), x.mean(0))) / 999
  assert np.abs(naive - cov).max() > 1e-4 * np.abs(cov).max()


def test_rows_are_those_of_the_seed_and_the_order():
  x = np.random.default_rng(0).normal(size=(500, 2)).astype(np.float32)
  whole = of(x, keep=50, seed=3).rows
  for cuts in ([1], [20, 49, 50, 51, 400], range(100, 500, 100)):
    np.testing.assert_array_equal(of(*np.split(x, cuts), keep=50, seed=3).rows, whole)
  assert whole.dtype == np.float32 and not np.array_equal(of(x, keep=50, seed=4).rows, whole)
  everything = of(x, keep=600).rows
  assert not np.array_equal(everything, x)
  np.testing.assert_array_equal(np.sort(everything, axis=0), np.sort(x, axis=0))


def test_every_image_is_as_likely_in_every_row():
  """Chi-squared over 3,000 seeds: which of 12 images, and where among the 5 rows kept."""
  image = np.arange(12.0)[:, None]
  drawn = [of(image[:7], image[7:], keep=5, seed=s).rows[:, 0].astype(int) for s in range(3000)]
  assert all(len(set(rows)) == 5 for rows in drawn)
  for place in range(5):
    counts = np.bincount([rows[place] for rows in drawn], minlength=12)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_memory_does_not_grow_with_the_number_of_images():
  def peak(num_batches):
    rng = np.random.default_rng(0)
    tracemalloc.start()
    distances.statistics("f", (rng.normal(size=(100, 64)) for _ in range(num_batches)), keep=200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak

  assert peak(200) < peak(5) + 10_000  # all rows would be 10 MB


def test_features_that_are_not_finite_are_refused():
  x = np.zeros((4, 2))
  whole = distances.Accumulator("f")
  whole.add(x)
  x[1, 1] = np.nan
  with pytest.raises(UserError, match="'f' of images 4 to 7 are not finite"):
    whole.add(x)


def test_an_empty_batch_changes_nothing(capfd):
  x, none = np.random.default_rng(0).normal(size=(9, 3)), np.zeros((0, 3), np.float32)
  same(of(none, x[:4], none, none, x[4:], none), of(x[:4], x[4:]))
  assert capfd.readouterr() == ("", "")  # nor does numpy warn


@pytest.mark.parametrize("x, words", [
    (np.zeros(4), r"features 'f' are of shape \(4,\), expected \(images, numbers of each\)"),
    (np.zeros((4, 2, 2)), r"features 'f' are of shape \(4, 2, 2\)"),
    (np.float32(1), r"features 'f' are of shape \(\)"),
    (np.zeros((4, 0)), r"features 'f' are of shape \(4, 0\)"),
    (np.zeros((4, 3)), "features 'f' are 3 numbers of an image, and were 2 of those before"),
])
def test_what_is_no_table_of_features_is_refused(x, words):
  whole = distances.Accumulator("f")
  whole.add(np.eye(2))
  with pytest.raises(UserError, match=words):
    whole.add(x)
  assert whole.statistics().num == 2


@pytest.mark.parametrize("num", [0, 1])
def test_sets_of_no_image_or_of_one_are_refused(num, tmp_path):
  few = np.zeros((num, 2, 2, 1), np.uint8)
  words = f"^{num} images: statistics need 2 or more$"
  with pytest.raises(UserError, match=words):
    of(few.reshape(num, 4))
  with pytest.raises(UserError, match=words):
    distances.reference(tmp_path, Features(), "d", num, lambda: [few])
  with pytest.raises(UserError, match="^0 images: statistics need"):
    of()
  real = of(np.random.default_rng(0).normal(size=(9, 2)), features="two")
  judge = distances.Reference((Features(),), (real,), lambda images: np.zeros(len(images)), {})
  with pytest.raises(UserError, match=f"^{num} images: their scores need 4 or more$"):
    judge.scores([(few, np.zeros(num))])
  with pytest.raises(UserError, match="^0 images: their scores need 4 or more$"):
    judge.scores([])


@pytest.mark.parametrize("num", [0, 1, 2, 3])
@pytest.mark.parametrize("score", [
    distances.kid, distances.precision_recall, lambda a, b: tuple(distances.scores(a, b).values())])
def test_scores_need_four_images_of_both(score, num):
  enough = of(np.random.default_rng(0).normal(size=(4, 2)))
  assert np.isfinite(score(enough, enough)).all()
  few = distances.Statistics("inception", num, np.zeros(2), np.eye(2), enough.rows[:num])
  for pair in ((few, enough), (enough, few)):
    with pytest.raises(UserError, match=f"^{num} images: their scores need 4 or more$"):
      score(*pair)


def test_features_may_be_arrays_of_jax():
  """Whose mean would be float32's."""
  x = np.random.default_rng(0).normal(100, 1, (50, 3)).astype(np.float32)
  same(of(jnp.asarray(x[:20]), jnp.asarray(x[20:])), of(x[:20], x[20:]))


def test_frechet_is_that_of_sqrtm():
  rng = np.random.default_rng(0)
  x, y = correlated(rng, 300, 5), correlated(rng, 200, 5)
  cov_x, cov_y = np.cov(x.T), np.cov(y.T)
  expected = (np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(cov_x + cov_y)
              - 2 * np.trace(linalg.sqrtm(cov_x @ cov_y).real))
  assert distances.frechet(of(x), of(y)) == pytest.approx(expected, rel=1e-12)
  assert distances.frechet(of(y), of(x)) == pytest.approx(expected, rel=1e-12)
  assert distances.frechet(of(x), of(x + 3)) == pytest.approx(5 * 9, rel=1e-12)


def test_frechet_of_two_gaussians():
  """N(m, diag s^2) and N(n, diag t^2) are |m - n|^2 + |s - t|^2 apart; also where s is 0."""
  s, t, m, n = np.array([[1, 2, 0], [3, 0.5, 0.1], [1, 0, 0], [0, 2, 0]])
  gaussian = lambda mean, std: distances.Statistics("f", 9, mean, np.diag(std**2), np.empty((0, 3)))
  expected = np.sum((m - n) ** 2) + np.sum((s - t) ** 2)
  assert distances.frechet(gaussian(m, s), gaussian(n, t)) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("num, dim, rank", [
    (200, 5, 5), (50, 20, 20), (30, 20, 3), (10, 40, 40), (500, 64, 63), (4, 100, 100)])
def test_frechet_is_never_below_zero(num, dim, rank):
  """Sets with themselves and in another order, where rounding alone decides; singular ones too."""
  rng = np.random.default_rng(0)
  for size in (1e-3, 1, 1e3):
    x = size * rng.normal(size=(num, rank)) @ rng.normal(size=(rank, dim))
    for y in (x, x[::-1], np.float32(x)):
      assert 0 <= distances.frechet(of(x), of(y)) < 1e-5 * size**2 * dim * rank


def test_a_distance_that_is_no_number_is_not_called_zero():
  bad = distances.Statistics("f", 9, np.array([np.nan]), np.eye(1), np.empty((0, 1)))
  assert np.isnan(distances.frechet(bad, bad))


@pytest.mark.parametrize("sizes", [(40, 30), (30, 200), (200, 30)])
def test_frechet_of_fewer_images_than_dimensions(sizes):
  """tr (A B)^(1/2) is the nuclear norm of X Y^T, whose sides are the numbers of images."""
  rng = np.random.default_rng(0)
  x, y = (rng.normal(size=(n, 100)) / np.arange(1, 101) for n in sizes)
  a, b, deviation = of(x), of(y), lambda x: (x - x.mean(0)) / (len(x) - 1) ** 0.5
  cross = linalg.svdvals(deviation(x) @ deviation(y).T).sum()
  traces = np.trace(a.cov) + np.trace(b.cov)
  expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + traces - 2 * cross
  assert distances.frechet(a, b) == pytest.approx(expected, abs=1e-7 * traces)
  assert distances.frechet(a, a) == pytest.approx(0, abs=1e-7 * traces)


def mmd(x, y):
  """Every pair on its own, in Python."""
  k = lambda u, v: (sum(p * q for p, q in zip(u, v)) / len(u) + 1) ** 3
  within = lambda x: np.mean([k(u, v) for u, v in itertools.permutations(x, 2)])
  return within(x) + within(y) - 2 * np.mean([k(u, v) for u in x for v in y])


@pytest.mark.parametrize("sizes, subsets", [((4, 9), 2), ((60, 75), 10), ((60, 128), 16)])
def test_kid_is_the_double_sum_over_pairs(monkeypatch, sizes, subsets):
  monkeypatch.setattr(distances, "SUBSET_SIZE", 8)
  rng = np.random.default_rng(0)
  a, b = (of(rng.normal(size=(n, 3)) + i) for i, n in enumerate(sizes))
  cut = lambda rows: [rows[i:j].tolist() for i, j in itertools.pairwise(
      np.cumsum([0] + [len(rows) // subsets + (i < len(rows) % subsets) for i in range(subsets)]))]
  values = [mmd(x, y) for x, y in zip(cut(a.rows), cut(b.rows))]
  assert len(values) == subsets
  value, error = distances.kid(a, b)
  assert value == pytest.approx(np.mean(values), rel=1e-12)
  assert error == pytest.approx(stats.sem(values), rel=1e-12)


def test_kid_of_two_gaussians_and_its_error():
  """In one dimension k(x, y) = x^3 y^3 + 3 x^2 y^2 + 3 x y + 1: MMD^2 compares three moments."""
  rng = np.random.default_rng(0)
  for m, s in [(0, 1), (0.3, 1), (0, 1.5)]:  # the first: two halves of one distribution
    found = np.array([distances.kid(of(rng.normal(size=(400, 1))),
                                  of(m + s * rng.normal(size=(400, 1)))) for _ in range(400)])
    moments = stats.norm.moment
    expected = sum(weight * (moments(order, m, s) - moments(order)) ** 2
                   for order, weight in [(1, 3), (2, 3), (3, 1)])
    assert abs(found[:, 0].mean() - expected) < 3 * stats.sem(found[:, 0])
    # The error claimed is the spread that there is, which 400 draws tell to some 10%.
    assert np.mean(found[:, 1] ** 2) ** 0.5 == pytest.approx(found[:, 0].std(), rel=0.2)
    assert found[:, 0].min() < 0 or (m, s) == (0, 1.5)  # unbiased: nothing is clipped


def brute_precision_recall(samples, real):
  """scipy's distances, from differences, all at once."""
  def covered(points, centres):
    radius = np.sort(distance.cdist(centres, centres), axis=1)[:, 3]
    return np.mean((distance.cdist(points, centres) <= radius).any(1))

  return covered(samples, real), covered(real, samples)


@pytest.mark.parametrize("block", [1, 7, 150, 500])
def test_precision_recall_is_that_of_brute_force(monkeypatch, block):
  monkeypatch.setattr(distances, "BLOCK", block)
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(150, 6)), correlated(rng, 150, 6)
  a, b = (of(1000 + 0.01 * points) for points in (x, y))  # near each other, far from 0
  expected = brute_precision_recall(np.float64(a.rows), np.float64(b.rows))
  assert 0.05 < expected[0] < 0.95 and 0.05 < expected[1] < 0.95
  assert distances.precision_recall(a, b) == expected
  assert distances.precision_recall(b, a) == expected[::-1]


def test_precision_recall_of_unequal_numbers_takes_as_many_of_each():
  rng = np.random.default_rng(0)
  a, b = of(rng.normal(size=(300, 4))), of(rng.normal(size=(100, 4)) + 1)
  expected = brute_precision_recall(np.float64(a.rows[:100]), np.float64(b.rows))
  assert distances.precision_recall(a, b) == expected


def test_precision_recall_where_the_answer_is_clear():
  rng = np.random.default_rng(0)
  data = rng.normal(size=(600, 3)) + 40 * rng.integers(0, 3, (600, 1))  # three modes
  real = of(data)
  assert distances.precision_recall(real, real) == (1, 1)
  assert distances.precision_recall(of(data[::-1]), real) == (1, 1)
  assert distances.precision_recall(of(data + 1000), real) == (0, 0)
  # Samples of one mode only: good ones, but a third of the data.
  precision, recall = distances.precision_recall(of(rng.normal(size=(600, 3))), real)
  assert precision > 0.9 and recall == pytest.approx(np.mean(data[:, 0] < 20), abs=0.05)
  # Half of the samples good and of all modes, half far away: the reverse.
  wide = of(np.concatenate([data[:300], data[:300] + 300]))
  precision, recall = distances.precision_recall(wide, real)
  assert precision == 0.5 and recall > 0.8


@pytest.mark.parametrize("num", [501, 503])  # the last block is small: BLAS rounds differently
def test_copies_have_balls_of_radius_0(num):
  """Fifty images, each ten times over: their balls hold what they copy, whatever the rounding."""
  data = np.random.default_rng(0).normal(size=(num, 257))
  real, copies = of(data), of(data[np.arange(num) % 50])
  assert distances.precision_recall(copies, real) == (1, 50 / num)
  assert distances.precision_recall(copies, copies) == (1, 1)


def test_distances_are_held_a_block_at_a_time():
  rng = np.random.default_rng(0)
  a, b = of(rng.normal(size=(3000, 2))), of(rng.normal(size=(3000, 2)))
  tracemalloc.start()
  distances.precision_recall(a, b)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 4.5 * distances.BLOCK * 3000 * 8 < 3000 * 3000 * 8


def test_names_of_scores():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(50, 3)), rng.normal(size=(60, 3)) + 0.5
  a, b = of(x), of(y)
  found = distances.scores(a, b)
  assert list(found) == ["fid", "kid", "kid_error", "precision", "recall"]
  assert all(type(value) is float for value in found.values())
  assert list(found.values()) == [
      distances.frechet(a, b), *distances.kid(a, b), *distances.precision_recall(a, b)]
  other = distances.scores(of(x, features="pixels"), of(y, features="pixels"))
  assert list(other) == ["frechet_pixels", "kid_pixels", "kid_error_pixels", "precision_pixels",
                         "recall_pixels"]
  assert list(other.values()) == list(found.values())
  with pytest.raises(ValueError, match="'inception', the reference by 'pixels'"):
    distances.scores(a, of(y, features="pixels"))
  with pytest.raises(UserError, match="'inception' are 2 numbers of a sample, and 3 of a real"):
    distances.scores(of(x[:, :2]), b)


class Features:
  """The mean and the spread of an image; counts its calls."""

  name = "two"
  calls = 0

  def __call__(self, images):
    assert len(images)  # a network need not take none
    self.calls += 1
    return np.stack([images.mean((1, 2, 3)), images.std((1, 2, 3))], 1).astype(np.float32)


@pytest.fixture
def cache(tmp_path):
  """cache(**changes): the reference of 40 images, and whether it had to be computed."""
  images = np.random.default_rng(0).integers(0, 256, (40, 2, 2, 1), np.uint8)

  def reference(directory=tmp_path / "cache", name="two", **changes):
    features = Features()
    features.name = name
    asked = {**dict(data="d", num=40), **changes}
    batches = lambda: iter(np.split(images[:asked["num"]], [25]))
    return distances.reference(directory, features, batches=batches, **asked), features.calls > 0

  return reference


def test_a_reference_is_computed_once_for_each_identity(cache, tmp_path, monkeypatch, capsys):
  first, computed = cache()
  assert computed and (first.features, first.num, len(first.rows)) == ("two", 40, 40)
  again, computed = cache()
  assert not computed
  same(again, first)
  for changes in (dict(name="three"), dict(data="e"), dict(num=39)):
    assert cache(**changes)[1] and not cache(**changes)[1]
  monkeypatch.setattr(distances, "ROWS", 30)
  assert cache()[1]
  files = [p.name for p in (tmp_path / "cache").iterdir()]
  assert len(files) == 5 and all(name.endswith(".npz") for name in files)  # nothing half-written
  assert capsys.readouterr().out == ""


def test_a_damaged_reference_is_found_and_replaced(cache, tmp_path, capsys):
  """Wherever a byte is flipped, what comes back is right."""
  first, _ = cache()
  path, = (tmp_path / "cache").iterdir()
  whole = path.read_bytes()
  found = 0
  for place in range(0, len(whole), 17):
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1:])
    again, computed = cache()
    same(again, first)
    out = capsys.readouterr().out
    assert out.startswith(f"note: {path} cannot be used (") == computed == bool(out)
    assert out.count("\n") == computed
    found += computed
  assert found > 0.7 * len(range(0, len(whole), 17))  # the others are zip's times and attributes
  for content in (b"", whole[:len(whole) // 2], whole[:-1], b"not a zip file"):
    path.write_bytes(content)
    again, computed = cache()
    same(again, first)
    assert computed and "cannot be used" in capsys.readouterr().out
    assert not cache()[1]


def test_a_reference_under_another_name_is_not_used(cache, tmp_path, capsys):
  cache(data="other")
  theirs, = (tmp_path / "cache").iterdir()
  content = theirs.read_bytes()
  theirs.unlink()
  first, _ = cache()
  mine, = (tmp_path / "cache").iterdir()
  mine.write_bytes(content)
  again, computed = cache()
  assert computed
  same(again, first)
  out = capsys.readouterr().out
  assert out.count("\n") == 1
  held = json.loads(out[out.index("{"):out.index("}") + 1])
  assert held == dict(features="two", data="other", num=40, keep=distances.ROWS)


def test_a_cache_that_cannot_be_written(cache, tmp_path, monkeypatch, capsys):
  (tmp_path / "file").write_text("")
  first, _ = cache(directory=tmp_path / "file")
  out = capsys.readouterr().out
  assert "cannot be written (" in out and out.count("\n") == 1

  def full(file, **arrays):
    file.write(b"half")
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(np, "savez", full)
    same(cache()[0], first)
  assert "(No space left on device)" in capsys.readouterr().out
  assert not list((tmp_path / "cache").iterdir())
  assert cache()[1]


def examples(num, num_classes=2, seed=0):
  """Images (num, 2, 2, 1) whose brightness tells their class."""
  label = np.arange(num) % num_classes
  noise = np.random.default_rng(seed).integers(0, 50, (num, 2, 2, 1))
  return Arrays(image=np.uint8(200 * label[:, None, None, None] / num_classes + noise), label=label)


@pytest.fixture
def make_reference(monkeypatch, tmp_path):
  monkeypatch.setattr(distances.paths, "cache", lambda: tmp_path)
  return distances.make_reference


def test_scores_say_of_how_many_images_they_are(make_reference):
  made = make_reference(examples(40), examples(12, seed=1), [Features()])
  assert made.held_out["num_samples"] == 12
  sample = examples(7, seed=2).arrays
  batches = [(sample["image"][i:j], sample["label"][i:j]) for i, j in ((0, 3), (3, 3), (3, 7))]
  found = made.scores(batches)
  assert found["num_samples"] == 7 and found["accuracy"] == 1
  assert found == made.scores([(sample["image"], sample["label"])])
  assert "accuracy" not in made.scores([(sample["image"], None)])
  seen = of(Features()(sample["image"]), features="two")
  assert found["frechet_two"] == pytest.approx(
      distances.frechet(seen, made.statistics[0]), rel=1e-12)


def test_a_covariance_of_too_few_is_noted_once_for_each_features(make_reference, capsys):
  """Of n images it has rank n - 1: singular if there are as many numbers."""

  def first(num, name):
    features = lambda x: np.float32(x.reshape(len(x), 4)[:, :num])
    features.name = name
    return features

  three, two = first(3, "three"), first(2, "two")
  made = make_reference(examples(12), examples(4, seed=1), [three, two])
  assert capsys.readouterr().out == ""
  made.note_few(4)
  assert capsys.readouterr().out == ""  # more than the three numbers of each
  made.note_few(3)
  assert capsys.readouterr().out == (
      "note: features 'three' are 3 numbers of an image: the covariance of 3 samples is singular, "
      "and their Frechet distance says little\n")
  make_reference(examples(4), examples(4, seed=1), [first(4, "whole"), two]).note_few(100)
  out = capsys.readouterr().out
  assert out.count("\n") == 1 and "4 training images and 4 held-out images is singular" in out


def test_data_of_too_few_images(make_reference, capsys):
  made = make_reference(examples(12), examples(3, seed=1), [Features()])
  assert capsys.readouterr().out == ("note: the held-out images are 3: only 4 or more have scores "
                                     "of their own\n")
  assert made.held_out == {} and made.scores([tuple(examples(8).arrays.values())])
  made.note_few(100)
  assert capsys.readouterr().out == ""
  with pytest.raises(UserError, match="the images to train on are 3: .* 4 or more are needed"):
    make_reference(examples(3), examples(12), [Features()])


def test_a_reference_of_another_number_is_no_reference(tmp_path):
  with pytest.raises(ValueError, match="2 images for the statistics of 3"):
    distances.reference(tmp_path, Features(), "d", 3, lambda: [np.zeros((2, 1, 1, 1))])
  assert not list(tmp_path.iterdir())
