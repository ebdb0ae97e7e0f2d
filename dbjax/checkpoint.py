"""Checkpoints: one Orbax directory a block, `workdir/block_00/<step>`, on its own.

Each holds that block only: `params`, `ema`, `opt_state` and `meta` (block, step, seconds
trained, the config, a checksum of every item, and of the frozen arrays, which lie beside
the steps in `frozen.npz`; and what code and data it was trained with). A sampler reads nothing but
`ema`. The processes that hold a
part of a block write it together, and no others; it is read on any other mesh, or on
none.
"""

from collections.abc import Callable, Set
import functools
import os
import sys
from typing import Any
import zipfile

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import dbjax
from dbjax import config as config_lib
from dbjax import lookup
from dbjax.block import BlockState
from dbjax.data.dataset import fingerprint
from dbjax.errors import UserError

META = {"block", "step", "seconds", "config", "checksum", "trained_with"}
ITEMS = ("params", "ema", "opt_state")
FROZEN = "frozen.npz"
_STEPS = ocp.path.step.standard_name_format()


def directory(workdir: epath.PathLike, block: int) -> epath.Path:
  """Where a block's checkpoints and logs live."""
  path = epath.Path(workdir)
  if "://" not in os.fspath(workdir):
    path = path.resolve()  # Orbax wants it absolute
  return path / f"block_{block:02d}"


def exists(workdir: epath.PathLike, block: int) -> bool:
  """Whether a block has been saved."""
  with BlockCheckpoint(workdir, block) as saved:
    return saved.latest() is not None


def examine(state: BlockState) -> tuple[jax.Array, dict[str, jax.Array]]:
  """What to know of a block before it is saved; pure, for any sharding.

  Returns:
    Whether all of it is finite: a bool; the checksum of every item: uint32 scalars.
  """
  finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(state)]).all()
  return finite, {name: checksum(getattr(state, name)) for name in ITEMS}


@jax.jit
def checksum(tree: Any) -> jax.Array:
  """A uint32 that changes with any element of any array (all of 32 bits).

  Every element is mixed with its place, bijectively, and summed mod 2^32: exact, so that
  it does not depend on how the arrays are spread over devices.
  """
  total = jnp.zeros((), jnp.uint32)
  for number, x in enumerate(jax.tree.leaves(tree), 1):
    place = jnp.full(x.shape, number * 0x9E3779B1 % 2**32, jnp.uint32)
    for axis in range(x.ndim):
      place = place * jnp.uint32(0x85EBCA6B) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    mixed = (jax.lax.bitcast_convert_type(x, jnp.uint32) ^ place) * jnp.uint32(0xC2B2AE35)
    total += jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32)
  return total


def trained_with(config: Any, dataset: Any, init_from: str = "") -> dict[str, Any]:
  """What a block is trained with, besides its config: to be recorded beside it.

  Args:
    config: resolved.
    dataset: the data.
    init_from: checksum of the pretrained weights that blocks start from, if they do.

  Returns:
    dbjax, its version; code, of each field that names some of the user's: its name and the
    SHA-256 of its file; data, a fingerprint of the examples to train on; init_from.
  """
  known, layout = code_of(config), config.train.init_layout
  if init_from and not layout.startswith("dbjax."):
    known["code"]["train.init_layout"] = lookup.source_of(layout)
  return known | dict(data=fingerprint(dataset.train), init_from=init_from)


def code_of(config: Any) -> dict[str, Any]:
  """Of `trained_with`, what the config alone tells: dbjax and code."""
  names = {"task.name": config.task.name, "model.network": config.model.network,
           "data.name": config.data.name}
  return dict(dbjax=dbjax.__version__, code={
      field: lookup.source_of(name) for field, name in names.items()
      if lookup.names_code(name) and not name.startswith("dbjax.")})


def started_from(meta: dict[str, Any]) -> str:
  """The checksum of the pretrained weights that a block started from; empty: random ones."""
  return meta["trained_with"].get("init_from", "")


def _start(checksum: str) -> str:
  return f"the pretrained weights {checksum[:12]}" if checksum else "random weights"


def check_one_start(starts: dict[epath.Path, str]):
  """Raises UserError where blocks of one model did not start from the same weights.

  Args:
    starts: {directory of a block: `started_from`}.
  """
  (first, start), *others = starts.items()
  for directory, other in others:
    if other != start:
      raise UserError(f"{directory} started from {_start(other)}, {first} from {_start(start)}: "
                      "blocks of one model must start from the same (train.init_from)")


class BlockCheckpoint:
  """The checkpoints of one block. A context manager: leaving it waits for the last save.

  Attributes:
    directory, block: where, and which.
    processes: those that have a part of the block: all of them call `save`, `restore`
      and `wait`. By default this one has all of it.
  """

  def __init__(self, workdir: epath.PathLike, block: int, keep: int | None = None,
               processes: Set[int] | None = None):
    self.directory = directory(workdir, block)
    self.block = block
    self.processes = processes
    self._keep = keep
    self._manager = None
    self._saved = None

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._manager:
      self._manager.close()

  def latest(self) -> int | None:
    """The last step that is saved, or being saved by this process; or None."""
    return max(self._steps(), default=None) if self._saved is None else self._saved

  def save(self, state: BlockState, config: Any, *, seconds: float, checksums: dict[str, int],
           trained_with: dict[str, Any]):
    """Saves a block in the background; keeps the last few.

    Args:
      state: of this block, anywhere.
      config: resolved; recorded, so that what does not belong together is refused.
      seconds: that the block has been trained.
      checksums: by `examine`, and "frozen", that of the frozen arrays.
      trained_with: as `trained_with` makes it.
    """
    meta = dict(block=self.block, step=int(state.step), seconds=seconds,
                config=config_lib.flatten(config), trained_with=trained_with,
                checksum={name: int(value) for name, value in checksums.items()})
    items = {name: ocp.args.PyTreeSave(getattr(state, name)) for name in ITEMS}
    self._open().save(meta["step"], args=ocp.args.Composite(
        meta=ocp.args.JsonSave(meta), **items))
    self._saved = meta["step"]

  def save_frozen(self, frozen: dict[str, np.ndarray]):
    """Writes frozen arrays, so that the block can be used without the file or text they are of."""
    if frozen and not (self.directory / FROZEN).exists():
      self.directory.mkdir(parents=True, exist_ok=True)
      fresh = self.directory / f"{FROZEN}.{os.getpid()}"
      with fresh.open("wb") as file:
        np.savez(file, **frozen)
      fresh.replace(self.directory / FROZEN)

  def frozen(self) -> dict[str, np.ndarray] | None:
    """What `save_frozen` has written, if it has. Raises UserError: it is damaged."""
    path = self.directory / FROZEN
    if not path.exists():
      return None
    try:
      with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
      raise UserError(f"{path} cannot be read ({e}): remove it, and it is made again from "
                      "task.embedding") from e

  def check_frozen(self, meta: dict[str, Any], found: int):
    """Raises UserError where the block was trained with a table of another checksum."""
    if meta["checksum"].get("frozen") != found:
      raise UserError(f"{self.directory} was trained with another table of targets, that in its "
                      f"{FROZEN}: the file or the text of task.embedding differs; bring it back")

  def check_trained_with(self, meta: dict[str, Any], now: dict[str, Any]):
    """Prints what else is not as it was when the block was trained: code, version.

    Raises:
      UserError: the data differ, or the weights that it started from.
    """
    then, start = meta["trained_with"], started_from(meta)
    if start != now.get("init_from", start):
      raise UserError(f"{self.directory} started from {_start(start)}, this run from "
                      f"{_start(now['init_from'])}: set train.init_from as it was, or choose "
                      "another --workdir")
    if then["data"] != now.get("data", then["data"]):
      raise UserError(f"{self.directory} was trained with other data of the same name: bring them "
                      "back, or choose another --workdir")
    changed = [f"dbjax {then['dbjax']} (now {now['dbjax']})"] * (then["dbjax"] != now["dbjax"])
    changed += [f"another content of the module of {field}={code['name']}"
                for field, code in then["code"].items()
                if code["sha256"] != now["code"].get(field, code)["sha256"]]
    if changed:
      print(f"note: {self.directory} was trained with {', '.join(changed)}", flush=True)

  def wait(self):
    """Until the last save is complete."""
    if self._manager:
      self._manager.wait_until_finished()

  def meta(self, config=None, on: Callable = config_lib.joint) -> dict[str, Any]:
    """The `meta` of the last checkpoint.

    Args:
      config: resolved, that it must agree with.
      on: which fields: `config.joint` to be used in a model, `config.binding` to
        be trained further.

    Raises:
      UserError: as `restore` does, or the block is another one, or of another model.
    """
    step = self.latest()
    meta = self._read("meta", ocp.args.JsonRestore(), step)
    if not isinstance(meta, dict) or not META.issubset(meta):
      raise self._unreadable("meta", "fields are missing", step)
    if (meta["block"], meta["step"]) != (self.block, step):
      raise UserError(f"{self.directory / str(step)} holds block {meta['block']}, step "
                      f"{meta['step']}: a block's directory cannot be renamed")
    try:  # fields that dbjax has gained since have their defaults
      meta["config"] = config_lib.flatten(config_lib.unflatten(meta["config"]))
    except UserError as e:
      raise UserError(f"{self.directory / str(step)}: its config cannot be used: {e}") from e
    differ = config and config_lib.differences(on(config_lib.flatten(config)), on(meta["config"]))
    if differ:
      raise UserError(f"{self.directory} belongs to another experiment: {differ}")
    return meta

  def restore(self, template: BlockState, meta: dict[str, Any]) -> BlockState:
    """The last checkpoint.

    Args:
      template: the shapes and dtypes to expect. With shardings, which may differ from
        those it was saved with, the arrays come so; without, as numpy's.
      meta: of the same checkpoint.

    Raises:
      UserError: the checkpoint is missing, damaged, or of another network.
    """
    step = np.asarray(meta["step"], np.int32)
    sharding = getattr(template.step, "sharding", None)
    if sharding is not None:
      step = jax.make_array_from_callback((), sharding, lambda _: step)
    trees = {name: self._read_tree(name, getattr(template, name), meta) for name in ITEMS}
    return BlockState(step=step, **trees)

  def restore_ema(self, template: Any, meta: dict[str, Any]) -> Any:
    """The averaged parameters of the last checkpoint alone. As `restore`."""
    return self._read_tree("ema", template, meta)

  def _steps(self) -> list[int]:
    if not self.directory.exists():
      return []
    return sorted(m.step for m in _STEPS.find_all(self.directory))

  def _open(self) -> ocp.CheckpointManager:
    if self._manager is None:
      self.directory.mkdir(parents=True, exist_ok=True)
      mine = self.processes or {jax.process_index()}
      many = ocp.options.MultiprocessingOptions(
          primary_host=min(mine), active_processes=set(mine),
          barrier_sync_key_prefix=self.directory.name)
      types = ocp.type_handlers.create_type_handler_registry(
          (np.ndarray, ocp.type_handlers.NumpyHandler()),
          (jax.Array, ocp.type_handlers.ArrayHandler(
              primary_host=min(mine), use_replica_parallel=False,
              enable_write_sharding_file=False)))
      trees = {name: ocp.PyTreeCheckpointHandler(
          multiprocessing_options=many, type_handler_registry=types) for name in ITEMS}
      # Directories made asynchronously signal under one name for all blocks: one waits for another.
      here = ocp.AsyncOptions(create_directories_asynchronously=False)
      self._manager = _Manager(
          self.directory,
          options=ocp.CheckpointManagerOptions(
              max_to_keep=self._keep, create=False, multiprocessing_options=many,
              async_options=here),
          item_handlers=dict(
              trees, meta=ocp.JsonCheckpointHandler(multiprocessing_options=many)))
    return self._manager

  def _read_tree(self, name: str, template: Any, meta: dict[str, Any]) -> Any:
    spread = [getattr(x, "sharding", None) for x in jax.tree.leaves(template)]
    if None in spread:
      template = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), template)
    tree = self._read(name, ocp.args.PyTreeRestore(
        template, restore_args=ocp.checkpoint_utils.construct_restore_args(template)), meta["step"])
    on_device = tree if None in spread else jax.device_put(
        tree, jax.tree.map(lambda x: x.sharding.with_memory_kind("device"), tree))
    if int(checksum(on_device)) != meta["checksum"][name]:
      raise self._unreadable(name, "its checksum is wrong", meta["step"])
    same = jax.tree.map(lambda x, t: (x.shape, x.dtype) == (t.shape, t.dtype), tree, template)
    if not jax.tree.all(same):
      raise UserError(f"{self.directory / name}: its arrays have other shapes than this network's")
    return tree

  def _read(self, name: str, args, step: int | None) -> Any:
    if step is None:
      raise UserError(f"{self.directory} has no checkpoint: train block {self.block} with "
                      f"python -m dbjax.main ... --config.train.blocks={self.block}")
    _hush_stragglers()
    try:
      return self._open().restore(step, args=ocp.args.Composite(**{name: args}))[name]
    except MemoryError:
      raise
    except Exception as e:  # Orbax and TensorStore raise almost anything here
      raise self._unreadable(name, e, step) from e

  def _unreadable(self, name: str, why, step: int) -> UserError:
    path = self.directory / str(step)
    others = [s for s in self._steps() if s < step]
    then = f"step {others[-1]}" if others else "the start"
    reason = " ".join(str(why).split())[:200]
    return UserError(f"{path / name} cannot be read, it may be damaged ({reason}): move {path} "
                     f"away and train again; block {self.block} then goes on from {then}")


class _Manager(ocp.CheckpointManager):
  """Leaves preemption to the loop, whose count of steps is not the block's."""

  def reached_preemption(self, step: int) -> bool:
    return False


@functools.cache
def _hush_stragglers():
  """When one read fails, the others end after Orbax's event loop, each with a stack trace."""
  report = sys.unraisablehook

  def hook(unraisable):
    if str(unraisable.exc_value) != "Event loop is closed":
      report(unraisable)

  sys.unraisablehook = hook
