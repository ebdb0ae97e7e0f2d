'''Start from a pretrained network: a whole one is cut, and each block is trained on from its part.

    python -m dbjax.main --config=.. --workdir=.. --config.train.init_from=DIR_OR_FILE

The layers are cut in order, as `layers_per_block` says: the first ones go to block 0, which has
the highest noise. Each block gets its own copy of everything else: embedders, read-out, and a
table of targets that is learned. The averaged weights start from the same values.

`train.init_from` is one of two things:

    a workdir   of dbjax with num_blocks=1, or a folder of dbjax.export. Its averaged weights are
                taken, from the last checkpoint. The fields of its network must be the same. One of
                several blocks will do where the new ones are the same: layers, network, split of
                the noise. Then nothing is cut, and each block starts from its own.
    a file      FILE.safetensors, or a state_dict that PyTorch saved as FILE.pth or FILE.pt. It is
                read without PyTorch, and nothing in it is run. `train.init_layout` names the
                function that knows what its tensors mean.

The weights of the source are part of the experiment. Their checksum is recorded beside each block,
so the source may move but not change: a workdir that is trained further has other weights. A run
that resumes must name the same weights, and all blocks of one model must have started from the
same: anything else is refused.

A network of your own can be cut if its class says in `parts` which of its parameters are the
layers: see `python -m pydoc dbjax.network`. With num_blocks=1 nothing is cut and any network will
do. Parameters that the source does not have are drawn as for a block from scratch, and a line names
them. So a plain text network (task.end_to_end) can start blocks, which also read noised tokens.

The layout `dit`, the default, is that of the original DiT (github.com/facebookresearch/DiT):

    python -m dbjax.main --config=imagenet256_latent --config.model.name=DiT-XL/2 \\
        --config.num_blocks=4 --config.train.init_from=DiT-XL-2-256x256.pt --workdir=..

These are mapped exactly: patches, positions, labels, layers, the modulation and the read-out of
the mean. With num_blocks=1 the network computes, to float rounding, what the original computes from
the same input and the same conditioning vector, with the sign of its answer turned.

These are not exact:

    The answer. The original predicts the noise eps, and dbjax asks for F inside EDM's
    preconditioning. With t = sigma / sigma_data, F = t c_in z - sqrt(1 + t^2) eps. Where
    noise is low that is -eps, hence the sign. Where it is high the network has to learn the
    rest: a perfect eps has the loss 2 - 2 / sqrt(1 + t^2), a block from scratch 1. The
    input needs nothing: c_in z is the original's input if its data had unit variance.
    The noise level. The original embeds timesteps, dbjax embeds c_noise = ln(sigma) / 4. The
    second layer of that embedding is taken as it is, the first is fitted by least squares on all
    noise levels of the schedule, and a line says how much of it was lost: what varies with
    the timestep faster than our fastest sinusoid.
    The variance, which the original predicts too, is left out.
    The cut. A block from the middle was made to read the layer before it, and now reads the noised
    image through its own embedder: that is what it is trained for.

The number of heads is in no file: model.num_heads must be right. Without
y_embedder.embedding_table.weight the embedding of labels is drawn anew, for other classes.

Another layout is ONE function, `state, config -> params`:

    train.init_layout = "my_file:layout"

    def layout(state, config):
      """The original DiT, for other classes."""
      del state["y_embedder.embedding_table.weight"]
      return pretrained.dit(state, config)

state    {name: array}, all tensors of the file; those of real numbers are float32.
config   resolved, of the blocks.
params   a nested dict, as the network with num_blocks=1 has it: layers are stacked in order on
         the leading axis. What it leaves out is drawn anew. `take` gets a tensor of the
         shape that you expect.
'''

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import math
import re
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from dbjax import block as block_lib
from dbjax import config as config_lib
from dbjax import exported
from dbjax import fields as fields_lib
from dbjax import lookup
from dbjax import network as network_lib
from dbjax import paths
from dbjax import task as task_lib
from dbjax import tensors
from dbjax import trust
from dbjax.data import images
from dbjax.errors import UserError
from dbjax.models import positions
from dbjax.models.dit import DiT
from dbjax.models.transformer import sinusoids
from dbjax.quality.features import read_torch

_BETAS = np.linspace(1e-4, 0.02, 1000)  # of the original DiT: variance that each timestep adds
_AS_IN_DIT = dict(norm="layer", mlp="gelu", qk_norm=False, rotary="none", positions="sincos")
_RIDGE = 1e-3  # keeps fitted weights as small as the original's; less gains nothing


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
  """The weights of a whole network, to be cut.

  Attributes:
    config: resolved, of the blocks.
    checksum: of the source's weights, SHA-256.
    params: {name: array float32}, as of num_blocks=1. Names are paths: "stack/layers/mlp/..". Of
      blocks that are the same each name begins with its own: "block_00/stack/layers/mlp/..".
    drawn: names of the parameters that it does not have.
    cut: whether it is a whole network, and not blocks that are the same.
  """

  config: Any
  checksum: str
  params: Mapping[str, np.ndarray]
  drawn: tuple[str, ...] = ()
  cut: bool = True

  @property
  def params_checksum(self) -> str:
    """Of what the layout has made of the source."""
    return _checksum(self.params)

  def block(self, b: int) -> Any:
    """The parameters that block `b` starts from: a pytree of numpy arrays."""
    task = task_lib.make_task(self.config, b)
    if not self.cut:
      own = {name.removeprefix(_own(b)): x for name, x in self.params.items()}
      return exported.unnamed(own, block_lib.abstract_state(task).params)
    fresh = jax.device_get(block_lib.init_params(task, b)) if self.drawn else (
        block_lib.abstract_state(task).params)
    split = self.config.layers_per_block
    first = sum(split[:b])
    layers = _layers(task, self.config)

    def leaf(path, x):
      name = _name(path)
      if name not in self.params:
        return x
      found = self.params[name]
      return found[first:first + split[b]] if name in layers else found

    return jax.tree_util.tree_map_with_path(leaf, fresh)


def load(config: Any) -> Pretrained:
  """What config.train.init_from holds, for the blocks of a resolved config.

  Raises:
    UserError: it cannot be read, or is not of this network, or the network cannot be cut.
  """
  path = config.train.init_from
  where = f"train.init_from={path}"
  source = paths.expand(path, "train.init_from")
  try:
    theirs = _config_of(source) if source.is_dir() else None
    if theirs and theirs.num_blocks > 1:
      params = _of_same_blocks(source, theirs, config)
      return Pretrained(config=config, checksum=_checksum(params), params=params, cut=False)
  except UserError as e:
    raise UserError(f"{where}: {e}") from e
  expected = _expected(config)
  try:
    if theirs:
      params = state = exported.named(_of_workdir(source, theirs, config))
    else:
      state = _read(source)
      params = exported.named(_lay_out(state, config))
    checksum = _checksum(state)
    params = _fit(params, expected)
  except UserError as e:
    raise UserError(f"{where}: {e}") from e
  drawn = tuple(name for name in expected if name not in params)
  return Pretrained(config=config, checksum=checksum, params=params, drawn=drawn)


def take(state: Mapping[str, np.ndarray], name: str, *shape: int) -> np.ndarray:
  """The tensor of this name. Raises UserError where there is none, or it has another shape."""
  if name not in state:
    raise UserError(f"it has no tensor {name}{fields_lib.did_you_mean(name, state)}")
  if state[name].shape != shape:
    raise UserError(f"{name} has shape {list(state[name].shape)}, expected {list(shape)}")
  return state[name]


def dit(state: Mapping[str, np.ndarray], config: Any) -> dict[str, Any]:
  """The layout of the original DiT, for `models.dit.DiT`."""
  network = network_lib.find(config.model.network)
  if not (isinstance(network, type) and issubclass(network, DiT)):
    raise UserError(f"the layout {config.train.init_layout} is of the network DiT, not of "
                    f"model.network={config.model.network}: write your own, and name it in "
                    "train.init_layout")
  m = config.model
  for name, value in _AS_IN_DIT.items():
    if m.get(name, value) != value:
      raise UserError(f"model.{name}={m[name]}: the layout {config.train.init_layout} is of a "
                      f"network with model.{name}={value}: set it so, or write your own layout")
  height, width, channels = images.shape(config)
  d, p, hidden = m.width, m.patch_size, int(m.width * m.mlp_ratio)

  def dense(name, outputs, inputs):
    return dict(kernel=take(state, f"{name}.weight", outputs, inputs).T,
                bias=take(state, f"{name}.bias", outputs))

  def layer(i):
    name = f"blocks.{i}"
    return dict(
        attention=dict(qkv=dense(f"{name}.attn.qkv", 3 * d, d),
                       out=dense(f"{name}.attn.proj", d, d)),
        mlp=dict(hidden=dense(f"{name}.mlp.fc1", hidden, d),
                 out=dense(f"{name}.mlp.fc2", d, hidden)),
        modulation=dense(f"{name}.adaLN_modulation.1", 6 * d, d))

  depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
  if depth != m.num_layers:
    raise UserError(f"it has {depth} layers (blocks.0 and so on), expected model.num_layers="
                    f"{m.num_layers}")
  _check_positions(state, height // p, width // p, d)
  table = "y_embedder.embedding_table.weight"
  labels = dict(label_embedding=dict(embedding=take(
      state, table, config.data.num_classes + 1, d))) if table in state else {}
  patches = take(state, "x_embedder.proj.weight", d, channels, p, p)
  return labels | dict(
      patch_embedding=dict(kernel=patches.transpose(2, 3, 1, 0).reshape(-1, d),
                           bias=take(state, "x_embedder.proj.bias", d)),
      noise_embedding=dict(hidden=_fit_sinusoids(dense("t_embedder.mlp.0", d, 256), config),
                           out=dense("t_embedder.mlp.2", d, d)),
      stack=dict(layers=jax.tree.map(lambda *x: np.stack(x), *map(layer, range(depth)))),
      modulation=dense("final_layer.adaLN_modulation.1", 2 * d, d),
      read_out=_read_out(state, p, channels, d))


def timesteps(sigma: np.ndarray, sigma_data: float) -> np.ndarray:
  """The original DiT's timestep of a noise level; between two of them, and none beyond the ends.

  Its data have unit variance, so that it knows sigma / sigma_data.
  """
  kept = np.cumprod(1 - _BETAS)
  levels = np.log((1 - kept) / kept) / 2
  return np.interp(np.log(sigma / sigma_data), levels, np.arange(len(levels)))


def timestep_features(t: np.ndarray) -> np.ndarray:
  """The original DiT's sinusoids of timesteps: (N,) -> (N, 256)."""
  angles = t[:, None] * 1e4 ** (-np.arange(128) / 128)
  return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


def _fit_sinusoids(theirs: Mapping[str, np.ndarray], config: Any) -> dict[str, np.ndarray]:
  """The layer after our sinusoids of c_noise that does most nearly what theirs does of timesteps.

  By least squares over c_noise, uniformly, with a small ridge.
  """
  s = config.schedule
  c_noise = np.linspace(np.log(s.sigma_min) / 4, np.log(s.sigma_max) / 4, 4096)
  t = timesteps(np.exp(4 * c_noise), config.sigma_data)
  wanted = timestep_features(t) @ np.float64(theirs["kernel"])
  inputs = np.float64(sinusoids(jnp.asarray(c_noise, jnp.float32)))
  inputs = np.concatenate([inputs, np.ones((len(t), 1))], axis=1)
  covariance = inputs.T @ inputs / len(t) + _RIDGE * np.eye(inputs.shape[1])
  ours = np.linalg.solve(covariance, inputs.T @ wanted / len(t))
  lost = np.mean((inputs @ ours - wanted)**2) / max(np.mean((wanted - wanted.mean(0))**2), 1e-30)
  if jax.process_index() == 0:
    print(f"note: of what the embedding of timesteps varies by, {math.sqrt(lost):.1%} is lost in "
          "that of c_noise", flush=True)
  return dict(kernel=ours[:-1], bias=ours[-1] + theirs["bias"])


def _read_out(state: Mapping[str, np.ndarray], p: int, channels: int, d: int
              ) -> dict[str, np.ndarray]:
  """-eps, without the variance that may follow it."""
  name = "final_layer.linear"
  outputs = p * p * channels
  twice = f"{name}.weight" in state and len(state[f"{name}.weight"]) == 2 * outputs
  rows = outputs * (1 + twice)

  def minus_mean(x):
    x = x.reshape(p, p, -1, *x.shape[1:])[:, :, :channels]
    return -x.reshape(outputs, *x.shape[3:])

  return dict(kernel=minus_mean(take(state, f"{name}.weight", rows, d)).T,
              bias=minus_mean(take(state, f"{name}.bias", rows)))


def _check_positions(state: Mapping[str, np.ndarray], rows: int, columns: int, d: int):
  """Raises UserError where positions are not the fixed ones; of another image size are those."""
  found = state.get("pos_embed")
  if found is None or found.shape != (1, rows * columns, d):
    return
  if np.abs(found[0] - positions.sincos(rows, columns, d)).max() > 1e-2:
    raise UserError("pos_embed differs from the fixed sinusoids, which are all that the network "
                    "DiT has")


def _config_of(workdir: epath.Path) -> Any:
  """The config of a workdir or of an exported folder."""
  if not (workdir / "config.json").exists():
    raise UserError("it is a directory, but none that dbjax.main has trained in")
  trust.check_workdir(workdir)
  return config_lib.load(workdir)


def _of_workdir(workdir: epath.Path, theirs: Any, config: Any) -> Any:
  """The averaged weights of a whole network."""
  of_network = lambda c: {k: v for k, v in config_lib.joint(config_lib.flatten(c)).items()
                          if k.startswith("model.")}
  differ = config_lib.differences(of_network(config), of_network(theirs))
  if differ:
    raise UserError(f"it holds another network: {differ}")
  return _of_block(workdir, theirs, 0)


def _of_same_blocks(workdir: epath.Path, theirs: Any, config: Any) -> dict[str, np.ndarray]:
  """The averaged weights of blocks that are as those of the config, but for their data."""
  same = lambda c: {k: v for k, v in config_lib.joint(config_lib.flatten(c)).items()
                    if k not in ("data.name", "data.train", "data.held_out", "train.init_layout")}
  differ = config_lib.differences(same(config), same(theirs))
  if differ:
    raise UserError(f"it holds {theirs.num_blocks} blocks, expected a whole network: num_blocks=1; "
                    f"or the same blocks: {differ}")
  return {_own(b) + name: x for b in range(theirs.num_blocks)
          for name, x in exported.named(_of_block(workdir, theirs, b)).items()}


def _of_block(workdir: epath.Path, theirs: Any, b: int) -> Any:
  template = block_lib.abstract_state(task_lib.make_task(theirs, b)).ema
  with exported.open_block(workdir, b) as saved:
    trust.check_block(saved.directory)
    return saved.restore_ema(template, saved.meta(theirs))


def _own(b: int) -> str:
  """What the names of a block's own parameters begin with."""
  return f"block_{b:02d}/"


def _lay_out(state: dict[str, np.ndarray], config: Any) -> Any:
  """The parameters that the layout makes of tensors."""
  name = config.train.init_layout
  layout = lookup.find(name, "train.init_layout")
  try:
    return layout(dict(state), config)
  except UserError:
    raise
  except Exception as e:  # whatever the user's function raises
    raise UserError(f"train.init_layout={name}: {lookup.own_words(e, name)}") from e


def _expected(config: Any) -> dict[str, tuple[int, ...]]:
  """{name: shape} of the whole network's parameters. Raises UserError where it cannot be cut."""
  whole: dict[str, tuple[int, ...]] = {}
  for task in task_lib.kinds(config):
    n = task.network.num_layers
    layers = _layers(task, config)
    for path, x in jax.tree_util.tree_leaves_with_path(block_lib.abstract_state(task).params):
      name, shape = _name(path), x.shape
      if name in layers:
        if shape[:1] != (n,):
          raise UserError(f"model.network={config.model.network}: {name} has shape {list(shape)} "
                          f"in a block of {n} layers, expected them stacked on the leading axis")
        shape = (config.model.num_layers, *shape[1:])
      if whole.setdefault(name, shape) != shape:
        raise UserError(f"model.network={config.model.network}: {name} has another shape in "
                        "another block: only layers, as its `parts` names them, are cut, and all "
                        "of one size")
  return whole


def _layers(task: task_lib.Task, config: Any) -> set[str]:
  """The names of those parameters that are cut."""
  if config.num_blocks == 1:
    return set()
  params = block_lib.abstract_state(task).params
  pattern = getattr(task.network, "parts", {}).get("layers")
  if pattern is None or not isinstance(params, Mapping):
    raise UserError(f"model.network={config.model.network} does not say in `parts` which of its "
                    "parameters are the layers, so train.init_from cannot cut it: see "
                    "python -m pydoc dbjax.network")
  found = {name for name in exported.named(params) if re.match(pattern, name.partition("/")[0])}
  if not found:
    raise UserError(f"model.network={config.model.network} has no parameter that `parts` calls "
                    f"layers ({pattern!r}): see python -m pydoc dbjax.network")
  return found


def _fit(params: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]
         ) -> dict[str, np.ndarray]:
  """The parameters in float32. Raises UserError where they are not those of the network."""
  fitting = {}
  for name, x in params.items():
    if name not in expected:
      raise UserError(f"{name} is no parameter of this network"
                      + fields_lib.did_you_mean(name, expected))
    try:
      x = np.asarray(x, np.float32)
    except (TypeError, ValueError):
      raise UserError(f"{name} is {type(x).__name__}, expected an array of numbers") from None
    if x.shape != expected[name]:
      raise UserError(f"{name} has shape {list(x.shape)}, expected {list(expected[name])}")
    if not np.isfinite(x).all():
      raise UserError(f"{name} is not finite")
    fitting[name] = x
  if not fitting:
    raise UserError("it holds no parameter of this network")
  return fitting


def _name(path: tuple) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
  """SHA-256 of names, shapes, types and elements; the same for any order and format of a file."""
  digest = hashlib.sha256()
  for name in sorted(arrays):
    x = np.ascontiguousarray(arrays[name])
    digest.update(json.dumps([name, arrays[name].shape, x.dtype.name]).encode())
    digest.update(x.view(np.uint8).data)
  return digest.hexdigest()


def _read(path: epath.Path) -> dict[str, np.ndarray]:
  """The tensors of a file; real numbers as float32."""
  if path.suffix not in (".safetensors", ".pth", ".pt"):
    raise UserError("expected a workdir of dbjax.main, or a file FILE.safetensors, FILE.pth or "
                    "FILE.pt" + "; there is no such file or directory" * (not path.exists()))
  try:
    content = path.read_bytes()
  except OSError as e:
    raise UserError(f"it cannot be read ({e.strerror or e})") from e
  try:
    state = tensors.read(content) if path.suffix == tensors.SUFFIX else read_torch(content)
    if not state:
      raise ValueError("it holds no tensor by name")
  except ValueError as e:
    hint = "" if path.suffix == tensors.SUFFIX else (
        "; of a checkpoint with more in it save the state_dict alone: "
        "torch.save(checkpoint['ema'], FILE)")
    raise UserError(f"{e}{hint}") from e
  real = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
  return {name: x.astype(np.float32, copy=False) if real(x) else x for name, x in state.items()}
