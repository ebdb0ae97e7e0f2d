"""Checkpoints: one Orbax directory a block, `workdir/block_00/<step>`, on its own.

Each holds that block only: `params`, `ema`, `opt_state` and `meta` (block, step,
seconds trained, the fingerprint that all blocks of one model share, and a checksum of
every array). A sampler reads nothing but `ema`.
"""

import functools
import sys
from typing import Any
import zlib

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp

from dbjax import config as config_lib
from dbjax.block import BlockState
from dbjax.cli import UserError

META = {"block", "step", "seconds", "fingerprint", "config", "crc32"}


def directory(workdir: epath.PathLike, block: int) -> epath.Path:
  """Where a block's checkpoints and logs live."""
  return epath.Path(workdir) / f"block_{block:02d}"


def exists(workdir: epath.PathLike, block: int) -> bool:
  """Whether a block has been saved."""
  with BlockCheckpoint(workdir, block) as saved:
    return saved.latest() is not None


class BlockCheckpoint:
  """The checkpoints of one block. A context manager: leaving it waits for the last save."""

  def __init__(self, workdir: epath.PathLike, block: int, keep: int | None = None):
    self.directory = directory(workdir, block)
    self.block = block
    self._keep = keep
    self._manager = None

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._manager:
      self._manager.close()

  def latest(self) -> int | None:
    """The last saved step, or None."""
    if not self.directory.exists():
      return None
    return self._open().latest_step()

  def save(self, state: BlockState, config, seconds: float):
    """Saves `state` (on the device or the host) in the background; keeps the last few.

    Args:
      state: of this block.
      config: resolved; recorded, so that what does not belong together is refused.
      seconds: that the block has been trained.
    """
    trees = dict(params=state.params, ema=state.ema, opt_state=state.opt_state)
    trees = jax.device_get(trees)
    meta = dict(block=self.block, step=int(state.step), seconds=seconds,
                fingerprint=config_lib.fingerprint(config), config=config_lib.binding(config),
                crc32={name: _checksum(tree) for name, tree in trees.items()})
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    self._open().save(meta["step"], args=ocp.args.Composite(
        meta=ocp.args.JsonSave(meta), **items))

  def wait(self):
    """Until the last save is complete."""
    self._open().wait_until_finished()

  def meta(self, **expected: dict[str, Any]) -> dict[str, Any]:
    """The `meta` of the last checkpoint.

    Args:
      **expected: what it must agree with: `fingerprint` to be used in a model, `config`
        to be trained further.

    Raises:
      UserError: as `restore` does, or the block is another one, or of another model.
    """
    meta = self._read("meta", ocp.args.JsonRestore())
    if not isinstance(meta, dict) or not META.issubset(meta):
      raise self._unreadable("meta", "fields are missing")
    if (meta["block"], meta["step"]) != (self.block, self.latest()):
      raise UserError(f"{self.directory / str(self.latest())} holds block {meta['block']}, step "
                      f"{meta['step']}: a block's directory cannot be renamed")
    for name, value in expected.items():
      differ = config_lib.differences(value, meta[name])
      if differ:
        raise UserError(f"{self.directory} belongs to another experiment: {differ}")
    return meta

  def restore(self, template: BlockState) -> BlockState:
    """The last checkpoint as numpy arrays.

    Args:
      template: a state with the shapes and dtypes to expect.

    Raises:
      UserError: the checkpoint is missing, damaged, or of another network.
    """
    meta = self.meta()
    trees = {name: self._read_tree(name, getattr(template, name), meta)
             for name in ("params", "ema", "opt_state")}
    return BlockState(step=np.asarray(meta["step"], np.int32), **trees)

  def restore_ema(self, template: Any) -> Any:
    """The averaged parameters of the last checkpoint alone. As `restore`."""
    return self._read_tree("ema", template, self.meta())

  def _open(self) -> ocp.CheckpointManager:
    if self._manager is None:
      self._manager = ocp.CheckpointManager(
          self.directory, options=ocp.CheckpointManagerOptions(max_to_keep=self._keep, create=True))
    return self._manager

  def _read_tree(self, name: str, template: Any, meta: dict[str, Any]) -> Any:
    as_numpy = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), template)
    tree = self._read(name, ocp.args.StandardRestore(as_numpy))
    if _checksum(tree) != meta["crc32"][name]:
      raise self._unreadable(name, "its checksum is wrong")
    same = jax.tree.map(lambda x, t: (x.shape, x.dtype) == (t.shape, t.dtype), tree, template)
    if not jax.tree.all(same):
      raise UserError(f"{self.directory / name}: its arrays have other shapes than this network's")
    return tree

  def _read(self, name: str, args) -> Any:
    step = self.latest()
    if step is None:
      raise UserError(f"{self.directory} has no checkpoint: train block {self.block} with "
                      f"python -m dbjax.main ... --config.train.blocks={self.block}")
    _hush_stragglers()
    try:
      return self._open().restore(step, args=ocp.args.Composite(**{name: args}))[name]
    except MemoryError:
      raise
    except Exception as e:  # Orbax and TensorStore raise almost anything here
      raise self._unreadable(name, e) from e

  def _unreadable(self, name: str, why) -> UserError:
    path = self.directory / str(self.latest())
    others = sorted(set(self._open().all_steps()) - {self.latest()})
    then = f"step {others[-1]}" if others else "the start"
    reason = " ".join(str(why).split())[:200]
    return UserError(f"{path / name} cannot be read, it may be damaged ({reason}): move {path} "
                     f"away and train again; block {self.block} then goes on from {then}")


@functools.cache
def _hush_stragglers():
  """When one read fails, the others end after Orbax's event loop, each with a stack trace."""
  report = sys.unraisablehook

  def hook(unraisable):
    if str(unraisable.exc_value) != "Event loop is closed":
      report(unraisable)

  sys.unraisablehook = hook


def _checksum(tree: Any) -> int:
  total = 0
  for leaf in jax.tree.leaves(tree):
    total = zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8).reshape(-1), total)
  return total
