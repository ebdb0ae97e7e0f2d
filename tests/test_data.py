"""Batch n is a function of (seed, n), and an epoch is an epoch."""

from conftest import load_config
import numpy as np
import pytest

from dbjax import config as config_lib
from dbjax import data
from dbjax.data import dataset as dataset_lib
from dbjax.errors import UserError


def numbered(total):
  """A data set whose images and labels are their own numbers."""
  number = np.arange(total)
  images = data.Arrays(image=number.astype(np.uint8)[:, None, None, None],
                       label=number.astype(np.int32))
  return data.Dataset(images, images)


def order(total, batch_size, steps, seed=0):
  """The numbers seen in `steps`, in order."""
  batches = [numbered(total).batch(seed, n, batch_size) for n in steps]
  for batch in batches:
    assert batch["label"].shape == (batch_size,)
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])  # still pairs
  return np.concatenate([batch["label"] for batch in batches])


@pytest.mark.parametrize("total, batch_size", [(12, 4), (10, 4), (10, 3), (7, 20), (1, 3)])
def test_every_epoch_sees_each_image_once(total, batch_size):
  seen = order(total, batch_size, range(-(-4 * total // batch_size)))
  for epoch in range(4):
    np.testing.assert_array_equal(np.sort(seen[epoch * total:][:total]), np.arange(total))


def test_a_batch_is_a_function_of_seed_and_step_alone():
  """As after a resume, and whatever was asked for before."""
  steps = [9, 2, 1000, 0, 9]
  forwards = {n: order(101, 13, [n]) for n in sorted(set(steps))}
  dataset_lib._permutation.cache_clear()
  for n in steps:
    np.testing.assert_array_equal(order(101, 13, [n]), forwards[n])


def test_epochs_and_seeds_differ_and_are_shuffled():
  orders = [order(200, 200, [step], seed) for seed in (0, 1) for step in (0, 1)]
  for i, a in enumerate(orders):
    for b in [np.arange(200), *orders[:i]]:
      assert np.mean(a == b) < 0.05  # 1 in 200 by chance


def test_the_order_of_many_batches_is_that_of_one():
  """So that accumulation or another batch size moves the seams, not the images."""
  np.testing.assert_array_equal(order(10, 4, range(6)), order(10, 8, range(3)))


def load(dataset=None, **overrides):
  return data.load(config_lib.resolve(load_config(**overrides)), dataset)


def test_digits():
  dataset = load()
  parts = [part.take(np.arange(len(part))) for part in (dataset.train, dataset.held_out)]
  train, held_out = (part["image"] for part in parts)
  assert train.shape == (1500, 8, 8, 1) and held_out.shape == (297, 8, 8, 1)
  assert train.dtype == np.uint8 and parts[0]["label"].dtype == np.int32
  assert (train.min(), train.max()) == (0, 255)
  for part in parts:  # as many of each class, but for chance
    total = len(part["label"])
    share, chance = np.bincount(part["label"]) / total, (0.09 / total) ** 0.5
    np.testing.assert_allclose(share, np.full(10, 0.1), rtol=0, atol=4 * chance)
  both = np.concatenate([train, held_out]).reshape(1797, -1)
  assert len(np.unique(both, axis=0)) == 1797  # nothing held out is trained on


def test_sigma_data_of_the_digits_is_their_standard_deviation():
  y = load().train.take(np.arange(1500))["image"] / 127.5 - 1
  assert load_config().sigma_data == pytest.approx(y.std(), rel=0.02)


@pytest.mark.parametrize("field, value", [
    ("data.image_size", 16), ("data.channels", 3), ("data.num_classes", 5)])
def test_a_config_that_does_not_fit_the_data_is_named(field, value):
  with pytest.raises(UserError, match=f"{field}={value}"):
    load(**{field: value})


def test_a_config_that_is_not_resolved_is_named():
  with pytest.raises(UserError, match="config=.*: expected a config that is resolved: dbjax.reso"):
    data.load(load_config())


def digits(total=100):
  """Some of them, as a user would have them in memory."""
  return load().train.take(np.arange(total))


@pytest.mark.parametrize("form", ["arrays", "dict", "pair", "pair of dicts", "dataset"])
def test_given_from_python_in_any_form(form):
  x, y = digits(80), digits(20)
  made = {"arrays": data.Arrays(**x), "dict": x, "pair": (data.Arrays(**x), data.Arrays(**y)),
          "pair of dicts": [x, y],
          "dataset": data.Dataset(data.Arrays(**x), data.Arrays(**y))}[form]
  dataset = load(made)
  total = len(dataset.held_out)  # one object alone is both
  assert len(dataset.train) == 80 and total == (20 if "pair" in form or form == "dataset" else 80)
  np.testing.assert_array_equal(dataset.held_out.take(np.arange(total))["label"],
                                x["label"][:total])


def with_(**arrays):
  return {**digits(), **arrays}


@pytest.mark.parametrize("make, message", [
    (lambda: 3, "dataset: expected what to train on and what is held out, .* found int"),
    (lambda: (digits(), {"image": np.zeros((0, 8, 8, 1))}), "dataset: has no examples"),
    (lambda: digits(8), "dataset: 8 examples to train on are fewer than train.batch_size=64"),
    (lambda: with_(label=np.arange(99)), "arrays of {'image': 100, 'label': 99}: .* one length"),
    (lambda: with_(label=digits()["label"].astype(np.int64)),
     r"dataset: train.take returns label int64\[2\], expected int32\[2\]"),
    (lambda: with_(image=digits()["image"] / np.float32(127.5) - 1),
     r"dataset: train.take returns image float32\[2, 8, 8, 1\], expected uint8\[2, 8, 8, 1\]"),
    (lambda: (digits(), {k: v for k, v in digits().items() if k == "image"}),
     r"dataset: held_out.take returns \['image'\], expected label int32\[2\]"),
    (lambda: with_(image=np.zeros((100, 8, 8, 1), np.uint8)), "all its images are the same"),
    (lambda: with_(label=digits()["label"] + 1), "data.num_classes=10: digits has labels from 1 "
     "to 10 .train"),
    (lambda: (digits(), with_(label=digits()["label"] - 1)), "has labels from -1 to 8 .held_out"),
    (lambda: {k: np.resize(v, (3001, *v.shape[1:])) for k, v in digits().items()} | dict(
        label=np.int32([0] * 3000 + [10])), "has labels from 0 to 10 .train"),
    (lambda: with_(image=digits()["image"][..., 0]),
     r"dataset: train.take returns image uint8\[2, 8, 8\], expected uint8\[2, 8, 8, 1\]"),
    (lambda: {"label": digits()["label"]}, r"dataset: train.take returns \['label'\], expected im"),
    (lambda: with_(image=np.float32(digits()["image"]) / 255),
     r"dataset: train.take returns image float32\[2, 8, 8, 1\], expected uint8"),
    (lambda: with_(image=digits()["image"].repeat(2, 1)), "the images of digits are 16 x 8 with 1"),
])
def test_given_data_that_do_not_fit_are_named(make, message):
  with pytest.raises(UserError, match=message) as error:
    load(make())
  assert "\n" not in str(error.value)


MINE = """
from sklearn import datasets
import dbjax

def load(config):
  x = datasets.load_digits()
  image = (x.images[..., None] * 255 / 16).astype("uint8")
  half = config.train.batch_size
  part = lambda rows: dbjax.Arrays(image=image[rows], label=x.target[rows].astype("int32"))
  return part(slice(half)), part(slice(half, None))

def fails(config):
  return config.data.nothing

def tells(config):
  raise dbjax.UserError("data.dir: is not mounted")
"""


def test_ones_own_data_by_name(tmp_path, monkeypatch):
  (tmp_path / "my_digits.py").write_text(MINE)
  monkeypatch.syspath_prepend(tmp_path)
  dataset = load(**{"data.name": "my_digits:load", "train.batch_size": 700})
  assert (len(dataset.train), len(dataset.held_out)) == (700, 1097)
  with pytest.raises(UserError, match="data.name=my_digits:fails: .*my_digits.py, line 13: Attri"):
    load(**{"data.name": "my_digits:fails"})
  with pytest.raises(UserError, match="^data.dir: is not mounted$"):
    load(**{"data.name": "my_digits:tells"})


def test_batches_in_order():
  parts = list(data.batches(numbered(10).train, 4))
  assert [numbers.tolist() for numbers, _ in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
  parts = list(data.batches(numbered(10).train, 4, 5))
  assert [len(batch["label"]) for _, batch in parts] == [4, 1]
  labels = np.concatenate([batch["label"] for _, batch in parts])
  np.testing.assert_array_equal(labels, np.concatenate([numbers for numbers, _ in parts]))
  np.testing.assert_array_equal(labels, data.some(10, 5))


@pytest.mark.parametrize("label", [np.arange(9000) // 900, np.arange(9000) % 10])
def test_some_examples_are_of_all_classes_however_data_are_sorted(label):
  few = data.some(9000, 1000)
  assert len(np.unique(few)) == 1000 and (np.diff(few) > 0).all()
  np.testing.assert_array_equal(few, data.some(9000, 1000))
  # Of 100 expected, hypergeometric: a standard deviation of 8.9.
  assert (np.abs(np.bincount(label[few], minlength=10) - 100) < 4 * 8.9).all()
  np.testing.assert_array_equal(data.some(7, 8), np.arange(7))


def test_a_fingerprint_tells_data_of_one_name_apart():
  x = digits(11)
  of = lambda **arrays: data.fingerprint(data.Arrays(**arrays))
  assert of(**x) == of(**dict(reversed(x.items())))
  others = [{name: value[:10] for name, value in x.items()}]
  for place in (0, 5, 10):  # the first, the middle and the last are looked at
    changed = {name: value.copy() for name, value in x.items()}
    changed["label"][place] += 1
    others.append(changed)
  assert len({of(**x), *(of(**other) for other in others)}) == 5
