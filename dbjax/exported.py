"""Blocks in one file each, `block_00.safetensors`: what `dbjax.export` writes, read back.

A file has the averaged weights of a block under their paths in the network's tree
(`stack/layers/mlp/out/kernel`; layers are stacked on the leading axis), and under `frozen/` the
arrays that all blocks use and none trains. Its metadata have what a checkpoint records of a block:
number, step, config, provenance, checksums. So it is all of a block but what the optimizer
remembers: it can be sampled with and evaluated, and made one model with others, but not trained
further.
"""

from collections.abc import Callable, Mapping
import json
import os
from typing import Any

from etils import epath
import jax
import numpy as np

import dbjax
from dbjax import checkpoint
from dbjax import config as config_lib
from dbjax import paths
from dbjax import tensors
from dbjax import trust
from dbjax.errors import UserError

FROZEN = "frozen/"


def path_of(workdir: epath.PathLike, block: int) -> epath.Path:
  """Where a block lies that is one file."""
  directory = paths.directory(workdir, block)
  return directory.with_name(directory.name + tensors.SUFFIX)


def open_block(workdir: epath.PathLike, block: int) -> Any:
  """What reads a block of a workdir or of an exported folder: a context manager.

  Raises:
    UserError: it is there twice, as a file and as checkpoints.
  """
  path = path_of(workdir, block)
  if not path.exists():
    return checkpoint.BlockCheckpoint(workdir, block)
  if checkpoint.exists(workdir, block):
    raise UserError(f"block {block} is there twice: {path} and the checkpoints in "
                    f"{paths.directory(workdir, block)}: move one of them away")
  return ExportedBlock(path, block)


def named(tree: Any) -> dict[str, Any]:
  """{path: leaf} of a pytree, in the order of its leaves: {"stack/layers/mlp/out/kernel": ...}.

  Raises:
    UserError: two of its paths read alike.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  found = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}
  if len(found) != len(leaves):
    raise UserError("two parameters of this network have one name, once their paths are joined by "
                    "/: rename one")
  return found


def unnamed(arrays: Mapping[str, Any], template: Any) -> Any:
  """The pytree like `template` of arrays by name: the inverse of `named`."""
  return jax.tree.unflatten(jax.tree.structure(template), [arrays[x] for x in named(template)])


def contents(params: Any, frozen: Mapping[str, Any]) -> dict[str, Any]:
  """What the file of a block has of them: {name: array}, frozen ones too.

  Raises:
    UserError: a parameter is called as a frozen array may be.
  """
  weights = named(params)
  for name in weights:
    if name.startswith(FROZEN):
      raise UserError(f"a parameter of this network is called {name}: the names of frozen arrays "
                      f"begin with {FROZEN}: rename it")
  return weights | {FROZEN + name: x for name, x in frozen.items()}


def write(path: epath.Path, params: Any, frozen: Mapping[str, np.ndarray], meta: dict[str, Any]):
  """Writes a block.

  Args:
    path: the file.
    params: its averaged weights.
    frozen: the frozen arrays.
    meta: as `checkpoint.BlockCheckpoint.meta` returns it.

  Raises:
    UserError: it cannot be written.
  """
  write_file(path, contents(params, frozen), dict(block=json.dumps(meta)))


def write_file(path: epath.Path, arrays: Mapping[str, Any], metadata: Mapping[str, str]):
  """Writes a file of arrays by name. Raises UserError: it cannot be written."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
      tensors.write(file, arrays, dict(format="dbjax", dbjax=dbjax.__version__, **metadata))
  except OSError as e:
    raise UserError(f"{path} cannot be written ({e.strerror or e}): make room, or choose another "
                    "--out") from e
  except ValueError as e:
    raise UserError(f"{path} cannot be written: {e}") from e


class ExportedBlock:
  """A block in one file, to be read: has what `checkpoint.BlockCheckpoint` has for readers.

  Attributes:
    directory: the file; of a block with checkpoints it is where they lie.
    block: which it is to be; None: whichever it says.
  """

  def __init__(self, path: epath.Path, block: int | None = None):
    self.directory, self.block = path, block

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass

  def meta(self, config: Any = None, on: Callable = config_lib.joint) -> dict[str, Any]:
    """What is recorded of the block; no array is read.

    Args:
      config: resolved, that it must agree with.
      on: which fields.

    Raises:
      UserError: the file is damaged or none of dbjax's, another block, or of another model.
    """
    metadata, _ = self._header()
    try:
      meta = json.loads(metadata["block"])
      wrong = checkpoint.wrong_in(meta)
      if wrong:
        raise ValueError(wrong)
    except (KeyError, ValueError, RecursionError) as e:
      raise UserError(f"{self.directory} holds no block that dbjax.export has written "
                      f"({checkpoint.reason(e)}): expected one such as block_00.safetensors") from e
    if self.block not in (None, meta["block"]):
      raise UserError(f"{self.directory} holds block {meta['block']}: give it its name back")
    checkpoint.check_config(self.directory, meta, config, on)
    return meta

  def restore_newest(self, template: Any, config: Any) -> tuple[dict[str, Any], Any]:
    """The meta, and the averaged weights, like `template`. Raises UserError as each of both."""
    meta = self.meta(config)
    return meta, self.restore_ema(template, meta)

  def restore_step(self, template: Any, config: Any, step: int) -> tuple[dict[str, Any], Any]:
    """The same of this step alone. Raises UserError where it is another one."""
    meta = self.meta(config)
    if meta["step"] != step:
      raise UserError(f"{self.directory} is the block at step {meta['step']}, and has no other, "
                      f"expected {step}")
    return meta, self.restore_ema(template, meta)

  def need_best(self) -> int:
    """Raises UserError: there is nothing to choose from."""
    raise UserError(f"{self.directory} is of one checkpoint: whether it is the best was chosen "
                    "when it was exported; leave best out")

  def restore_ema(self, template: Any, meta: dict[str, Any]) -> Any:
    """The averaged weights.

    Args:
      template: their shapes and dtypes.
      meta: of the same file.

    Raises:
      UserError: the file has other arrays, or is damaged.
    """
    tree = unnamed(self._read(named(template), frozen=False), template)
    if checkpoint.checksum_of_host(tree) != meta["checksum"]["ema"]:
      raise self._damaged("its checksum is wrong")
    return tree

  def frozen(self, expected: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
    """The frozen arrays, if there are some. Raises UserError: they are not those expected."""
    arrays = self._read({FROZEN + name: x for name, x in expected.items()}, frozen=True)
    return {name.removeprefix(FROZEN): x for name, x in arrays.items()} or None

  def check_frozen(self, meta: dict[str, Any], found: int):
    """As `checkpoint.check_frozen`."""
    checkpoint.check_frozen(self.directory, meta, found)

  def _header(self) -> tuple[dict[str, str], dict[str, tensors.Claim]]:
    try:
      if "://" not in os.fspath(self.directory) and not os.path.isfile(self.directory):
        raise ValueError("it is no file")  # a pipe would be waited for
      with self.directory.open("rb") as file:
        return tensors.read_header(file, self.directory.stat().length)
    except (OSError, ValueError) as e:
      raise self._damaged(e) from e

  def _read(self, expected: Mapping[str, Any], frozen: bool) -> dict[str, np.ndarray]:
    """The frozen arrays, or the others. Raises UserError unless they are those expected."""
    _, claims = self._header()
    found = {name: claim for name, claim in claims.items() if name.startswith(FROZEN) == frozen}
    trust.check_claims(self.directory, found, expected)
    arrays = {}
    try:
      with self.directory.open("rb") as file:
        for name, claim in found.items():
          file.seek(claim.begin)
          x = np.frombuffer(file.read(np.prod(claim.shape, dtype=int) * claim.dtype.itemsize),
                            claim.dtype)
          arrays[name] = x.reshape(claim.shape)
    except (OSError, ValueError) as e:
      raise self._damaged(e) from e
    return arrays

  def _damaged(self, why: Any) -> UserError:
    return UserError(f"{self.directory} cannot be read, it may be damaged "
                     f"({checkpoint.reason(why)}): get it again, or export it anew")
