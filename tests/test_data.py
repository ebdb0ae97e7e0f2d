"""Batch n is a function of (seed, n), and an epoch is an epoch."""

from conftest import load_config
import numpy as np
import pytest

from dbjax import data
from dbjax.errors import UserError


def numbered(total):
  """A data set whose images and labels are their own numbers."""
  number = np.arange(total)
  images = data.Images(number.astype(np.uint8)[:, None, None, None], number.astype(np.int32))
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
  data._permutation.cache_clear()
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


def test_digits():
  dataset = data.load(load_config())
  train, held_out = dataset.train, dataset.held_out
  assert train.image.shape == (1500, 8, 8, 1) and held_out.image.shape == (297, 8, 8, 1)
  assert train.image.dtype == np.uint8 and train.label.dtype == np.int32
  assert (train.image.min(), train.image.max()) == (0, 255)
  for images in (train, held_out):  # as many of each class, but for chance
    share, chance = np.bincount(images.label) / len(images), (0.09 / len(images)) ** 0.5
    np.testing.assert_allclose(share, np.full(10, 0.1), rtol=0, atol=4 * chance)
  both = np.concatenate([train.image, held_out.image]).reshape(1797, -1)
  assert len(np.unique(both, axis=0)) == 1797  # nothing held out is trained on


def test_sigma_data_of_the_digits_is_their_standard_deviation():
  config = load_config()
  y = data.load(config).train.image / 127.5 - 1
  assert config.sigma_data == pytest.approx(y.std(), rel=0.02)


@pytest.mark.parametrize("field, value", [
    ("data.image_size", 16), ("data.channels", 3), ("data.num_classes", 5)])
def test_a_config_that_does_not_fit_the_data_is_named(field, value):
  with pytest.raises(UserError, match=f"{field}={value}"):
    data.load(load_config(**{field: value}))
