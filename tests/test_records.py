"""TFDS data sets in both of its formats, and what can be wrong with them."""

import gzip
import shutil

from conftest import as_tfrecord
from conftest import fake
from conftest import load_config
from conftest import png
from conftest import ROOT
from conftest import states_of
import jax
import numpy as np
import pytest

from dbjax import config as config_lib
from dbjax import data
from dbjax import loop
from dbjax import prepare
from dbjax.data import images as images_lib
from dbjax.data import tfds as tfds_lib
from dbjax.errors import UserError
from dbjax.sources import fashion_mnist
from dbjax.sources import latents
from dbjax.sources import Source

SHAPE, CLASSES = (16, 16, 3), 10
pytestmark = pytest.mark.usefixtures("steps_once")


@pytest.fixture(scope="session")
def tf_records(array_records, tmp_path_factory):
  """The same records, in the same order, as TFRECORD in two shards: by another's writer."""
  where = tmp_path_factory.mktemp("tfrecord")
  as_tfrecord(array_records / "mini/1.0.0", where / "mini/1.0.0")
  return where


@pytest.fixture(params=["array_record", "tfrecord"])
def where(request, array_records, tf_records, tmp_path):
  """A copy, to be damaged."""
  shutil.copytree(dict(array_record=array_records, tfrecord=tf_records)[request.param],
                  tmp_path / "data")
  return tmp_path / "data"


def mini(where, **overrides):
  """A config that fits that data set."""
  return config_lib.resolve(load_config(**{
      "data.name": "mini", "data.dir": str(where), "data.image_size": 16, "data.channels": 3,
      "train.batch_size": 8, "sigma_data": 0.58, "model.num_layers": 2, "num_blocks": 2,
      "model.width": 16, "model.num_heads": 2, "model.patch_size": 8, "model.unroll": 1,
      "train.num_steps": 4, "checkpoint.every_steps": 2, "log.every_steps": 2,
      "sample.every_steps": 0, **overrides}))


def test_both_formats_hold_what_was_written(where):
  dataset = data.load(mini(where))
  for split, total, seed in [(dataset.train, 60, 0), (dataset.held_out, 20, 1)]:
    image, label = fake(total, seed)
    got = split.take(np.arange(total))
    assert got["image"].dtype == np.uint8 and got["label"].dtype == np.int32
    np.testing.assert_array_equal(got["image"], image)  # in the order in which they were written
    np.testing.assert_array_equal(got["label"], label)
    again = split.take(np.array([total - 1, 0, 0]))  # from memory, in any order
    np.testing.assert_array_equal(again["image"], got["image"][[-1, 0, 0]])


def test_a_slice_is_a_part_of_a_split(where):
  whole = data.load(mini(where)).train.take(np.arange(60))
  part = data.load(mini(where, **{"data.train": "train[15:45]"})).train
  assert len(part) == 30
  np.testing.assert_array_equal(part.take(np.arange(30))["image"], whole["image"][15:45])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_is_the_batches_in_turn(where, workers):
  dataset = data.load(mini(where))
  rows = np.array([1, 5])
  stream = dataset.stream(3, range(5, 9), 8, rows, workers)
  for step, batch in zip(range(5, 9), stream, strict=True):  # across an epoch
    for name, value in dataset.batch(3, step, 8, rows).items():
      np.testing.assert_array_equal(batch[name], value)


@pytest.mark.slow
def test_training_on_records_resumes_bit_equal(array_records, tf_records, tmp_path):
  """Stopped after step 2 and resumed from the other format, against a run that was not."""
  one, config = jax.devices()[:1], mini(array_records)
  loop.train(config, tmp_path / "straight", devices=one)
  half = mini(array_records, **{"train.blocks": (0,)})
  loop.train(half, tmp_path / "resumed", devices=one)
  shutil.rmtree(tmp_path / "resumed/block_00/4")
  loop.train(mini(tf_records), tmp_path / "resumed", devices=one)
  expected, got = (states_of(config, tmp_path / w, (0, 1)) for w in ("straight", "resumed"))
  jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.slow
def test_imagenet64_trains_on_tfds_of_both_formats(tmp_path):
  """The file configs/imagenet64.py, small, on a fake in the place of TFDS's: the same weights."""
  import tensorflow_datasets as tfds
  features = tfds.features.FeaturesDict(dict(
      image=tfds.features.Image(shape=(64, 64, 3)),
      label=tfds.features.ClassLabel(num_classes=1000)))
  images = fake(40, shape=(64, 64, 3))[0]
  splits = {s: (dict(image=png(x), label=7) for x in images) for s in ("train", "validation")}
  made = prepare.write(tmp_path / "made", "resized", Source(features, splits))
  states = []
  for form in ("array_record", "tfrecord"):
    target = tmp_path / form / "imagenet_resized/64x64/0.1.0"
    (as_tfrecord if form == "tfrecord" else shutil.copytree)(made, target)
    config = config_lib.resolve(config_lib.read(f"{ROOT}/configs/imagenet64.py:small", {
        "data.dir": str(tmp_path / form), "train.num_steps": 2, "model.num_layers": 4}))
    loop.train(config, tmp_path / f"run_{form}", devices=jax.devices()[:1])
    states.append(states_of(config, tmp_path / f"run_{form}", range(4)))
  jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.parametrize("overrides, message", [
    ({"data.name": "nothing"}, "data.name=nothing: not found in .*--what=folder --source=DIR"),
    ({"data.image_size": 32}, "data.image_size=32, data.channels=3: .* mini are 16 x 16 with 3"),
    ({"data.channels": 1}, "data.channels=1: the images of mini are 16 x 16 with 3 channels"),
    ({"data.num_classes": 5}, "data.num_classes=5: mini has labels from 0 to 9"),
    ({"data.train": "validation"}, "mini has no split validation: expected t"),
    ({"data.feature": "latent"}, "data.feature=latent: mini has image, label"),
    ({"train.batch_size": 64}, "mini: 60 examples to train on are fewer than train.batch_size=64"),
    ({"sigma_data": 0.3}, "sigma_data=0.3: mini has standard deviation 0.5.*set sigma_data=0.5"),
])
def test_a_config_that_does_not_fit_is_refused(array_records, overrides, message):
  with pytest.raises(UserError, match=message):
    data.load(mini(array_records, **overrides))


def shard(where):
  return max(where.glob("mini/1.0.0/mini-train.*"), key=lambda p: p.stat().st_size)


def test_a_truncated_download_is_found_at_once(where):
  path = shard(where)
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(UserError, match=f"{path.name} cannot be read .*missing or truncated"):
    data.load(mini(where))
  path.unlink()
  with pytest.raises(UserError, match=f"{path.name} cannot be read"):
    data.load(mini(where))


def test_metadata_that_is_no_json_is_one_line(where):
  (where / "mini/1.0.0/features.json").write_text("{")
  with pytest.raises(UserError, match="data.name=mini: .*1.0.0 cannot be read"):
    data.load(mini(where))


def test_a_corrupt_record_stops_the_run_and_loses_nothing(where, tmp_path, monkeypatch):
  """Noticed in mid-run: what was trained until then is saved, and the record is named."""
  monkeypatch.setattr(images_lib, "_MEASURED", 1)
  path = shard(where)
  content = bytearray(path.read_bytes())
  pixels = content.index(b"IDAT", len(content) // 3) + 20
  content[pixels:pixels + 40] = bytes(40)
  path.write_bytes(content)
  config = mini(where, **{"train.num_steps": 40, "train.batch_size": 1,
                          "checkpoint.every_steps": 100})
  with pytest.raises(UserError, match=r"record \d+ of .*mini-train.* cannot be read .*damaged"):
    loop.train(config, tmp_path / "run", devices=jax.devices()[:1])
  saved = [int(p.name) for p in (tmp_path / "run/block_00").iterdir() if p.name.isdecimal()]
  assert len(saved) == 1 and saved[0] > 0


def test_a_label_out_of_range_is_named(tmp_path):
  import tensorflow_datasets as tfds

  features = tfds.features.FeaturesDict(dict(
      image=tfds.features.Image(shape=SHAPE), label=tfds.features.ClassLabel(num_classes=CLASSES)))
  prepare.write(tmp_path, "mini", Source(features, {
      s: (dict(image=png(x), label=-1) for x in fake(10)[0]) for s in ("train", "test")}))
  with pytest.raises(UserError, match=r"record \d of .* has the label -1: expected 0 to 9"):
    data.load(mini(tmp_path))


def test_latents_are_prepared_from_a_data_set_and_an_encoder(array_records, tmp_path):
  encode = lambda images: images.reshape(-1, 4, 4, 4, 4, 3).mean((2, 4)) / 100
  shutil.copytree(array_records, tmp_path / "data")
  source = latents.source("mini", str(tmp_path / "data"), 16, encode)
  prepare.write(tmp_path / "data", "mini_latent", source)
  dataset = data.load(mini(tmp_path / "data", **{
      "data.name": "mini_latent", "data.feature": "latent", "data.image_size": 4,
      "model.patch_size": 2, "sigma_data": 0.18}))
  image, _ = fake(60)
  got = dataset.train.take(np.arange(60))["image"]
  assert got.dtype == np.float16
  key = lambda x: np.sort(x.reshape(60, -1).sum(1, dtype=np.float64))
  np.testing.assert_allclose(key(got), key(encode(image).astype(np.float16)), rtol=1e-6)


@pytest.mark.parametrize("encode, words", [
    (lambda x: x[0], r"shape \(16, 16, 3\) of 1 images, expected \(1, height, width, channels\)"),
    (lambda x: x[:3] / 1.0, r"shape \(3, 16, 16, 3\) of 16 images, expected \(16, 16, 16, 3\)"),
    (lambda x: x, "made uint8, expected finite numbers that float16 holds"),
    (lambda x: x * 1e6, "made float64, expected finite numbers"),
    (lambda x: x.nothing, "--encode: .*test_records.py, line .*: AttributeError"),
])
def test_an_encoder_that_fails_is_named(array_records, tmp_path, encode, words):
  with pytest.raises(UserError, match=words) as error:
    source = latents.source("mini", str(array_records), 16, encode)
    prepare.write(tmp_path, "mini_latent", source)
  assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_center_crop_keeps_the_middle_and_does_not_alias():
  ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (32, 64, 1))
  np.testing.assert_array_equal(tfds_lib.center_crop(ramp, 32), ramp[:, 16:48])
  stripes = np.broadcast_to(255 * (np.arange(64) % 2)[:, None, None], (64, 64, 1)).astype(np.uint8)
  assert abs(tfds_lib.center_crop(stripes, 16).astype(int) - 127.5).max() < 10


def test_fashion_mnist_from_files_that_are_damaged(tmp_path):
  with pytest.raises(UserError, match="train-images-idx3-ubyte.gz does not exist: --source"):
    fashion_mnist.source(tmp_path)
  whole = gzip.compress(bytes(16 + 28 * 28 * 3))
  for content in (whole[:5], whole[:-9], whole[:20] + b"no" + whole[22:], gzip.compress(bytes(99))):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(UserError, match="train-images-idx3-ubyte.gz is damaged or truncated"):
      fashion_mnist.source(tmp_path)
  (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(whole)
  (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8 + 2)))
  with pytest.raises(UserError, match="3 images and 2 labels, expected 60000 of each"):
    fashion_mnist.source(tmp_path)
