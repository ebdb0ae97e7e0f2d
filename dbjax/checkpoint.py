"""Checkpoints: one Orbax directory a block, `workdir/block_00/<step>`, on its own.

Each holds that block only: `params`, `ema`, `opt_state` and `meta` (block, step, seconds
trained, the config, a checksum of every item, and of the frozen arrays, which lie beside
the steps in `frozen.npz`; and what it was trained with: see `provenance.py`). A sampler reads
nothing but `ema`. The processes that hold a part of a block write it together, and no others; it is
read on any other mesh, or on none.

A new checkpoint is written in the background and read back; only then are older ones deleted. What
is found damaged is set aside as `<step>.damaged`, never deleted, and the one before it is used.
"""

from collections.abc import Callable, Iterator, Set
from concurrent import futures
import contextlib
import functools
import os
import shutil
import sys
import threading
from typing import Any
import uuid

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from dbjax import config as config_lib
from dbjax import paths
from dbjax import trust
from dbjax.block import BlockState
from dbjax.block import Health
from dbjax.block import HOPELESS
from dbjax.errors import UserError

META = {"block", "step", "seconds", "config", "checksum", "trained_with"}
ITEMS = ("params", "ema", "opt_state")
FROZEN = "frozen.npz"
_WRONG = "its checksum is wrong"
_STEPS = ocp.path.step.standard_name_format()
# One thread for all blocks: processes that share them must come to Orbax's barriers in one order.
_IN_ORDER = futures.ThreadPoolExecutor(1, thread_name_prefix="save")


def exists(workdir: epath.PathLike, block: int) -> bool:
  """Whether a block has been saved."""
  with BlockCheckpoint(workdir, block) as saved:
    return saved.latest() is not None


def examine(state: BlockState) -> tuple[jax.Array, dict[str, jax.Array]]:
  """What to know of a block before it is saved; pure, for any sharding.

  Returns:
    Whether it trains, all of it finite: a bool; the checksum of every item: uint32 scalars.
  """
  items = {name: getattr(state, name) for name in ITEMS}
  finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(items)]).all()
  return finite & (state.health.in_row < HOPELESS), {
      name: checksum(tree) for name, tree in items.items()}


@jax.jit
def checksum(tree: Any) -> jax.Array:
  """A uint32 that changes with any element of any array (all of 32 bits, or of 16).

  Every element is mixed with its place, bijectively, and summed mod 2^32: exact, so that
  it does not depend on how the arrays are spread over devices.
  """
  total = jnp.zeros((), jnp.uint32)
  for number, x in enumerate(jax.tree.leaves(tree), 1):
    place = jnp.full(x.shape, number * 0x9E3779B1 % 2**32, jnp.uint32)
    for axis in range(x.ndim):
      place = place * jnp.uint32(0x85EBCA6B) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    mixed = (bits ^ place) * jnp.uint32(0xC2B2AE35)
    total += jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32)
  return total


def checksum_of_host(tree: Any) -> int:
  """The `checksum` of numpy arrays, without a device."""
  total = 0
  for number, x in enumerate(jax.tree.leaves(tree), 1):
    place = np.full(x.shape, number * 0x9E3779B1 % 2**32, np.uint32)
    for axis, size in enumerate(x.shape):
      place *= np.uint32(0x85EBCA6B)
      place += np.arange(size, dtype=np.uint32).reshape(-1, *[1] * (x.ndim - axis - 1))
    bits = np.ascontiguousarray(x).view(f"uint{8 * x.dtype.itemsize}")
    mixed = (bits ^ place) * np.uint32(0xC2B2AE35)
    total += int(np.sum(mixed ^ (mixed >> np.uint32(15)), dtype=np.uint32))
  return total % 2**32


def reason(error: Any) -> str:
  """What an error says, in one line that is not too long."""
  return " ".join(str(error).split())[:200] or type(error).__name__


def free(path: epath.Path) -> int | None:
  """The bytes that are free where a path is, or will be; None where nobody knows."""
  if "://" in os.fspath(path):
    return None
  there = next((p for p in (path, *path.parents) if p.exists()), None)
  return shutil.disk_usage(there).free if there else None


def wrong_in(meta: Any) -> str:
  """What is wrong with a meta as it was read, in a few words; empty: it is as `save` writes it."""
  if not isinstance(meta, dict) or not META.issubset(meta):
    return "fields are missing"
  number = lambda x: type(x) in (int, float)
  health, trained = meta.get("health", [0, 0, 0]), meta["trained_with"]
  sums = meta["checksum"]
  right = dict(
      block=type(meta["block"]) is int, step=type(meta["step"]) is int,
      seconds=number(meta["seconds"]), config=isinstance(meta["config"], dict),
      held_out=number(meta.get("held_out", 0)),
      health=isinstance(health, list) and len(health) == 3 and all(map(number, health)),
      checksum=isinstance(sums, dict) and set(ITEMS) <= sums.keys()
      and all(type(x) is int and 0 <= x < 2**32 for x in sums.values()),
      trained_with=isinstance(trained, dict) and {"dbjax", "code", "data"} <= trained.keys()
      and isinstance(trained.get("init_from", ""), str) and isinstance(trained["code"], dict)
      and all(isinstance(x, dict) and {"name", "sha256"} <= x.keys()
              for x in trained["code"].values()))
  return ", ".join(f"{name} is not as dbjax writes it" for name, good in right.items() if not good)


def check_config(path: epath.Path, meta: dict[str, Any], config: Any = None,
                 on: Callable = config_lib.joint):
  """Completes the config in a meta: fields that dbjax has gained since have their defaults.

  Args:
    path: of the block, for the words of an error.
    meta, config, on: as of `BlockCheckpoint.meta`.

  Raises:
    UserError: it is no config, or does not agree with the other one.
  """
  try:
    meta["config"] = config_lib.flatten(config_lib.unflatten(meta["config"]))
  except UserError as e:
    raise UserError(f"{path}: its config cannot be used: {e}") from e
  differ = config and config_lib.differences(on(config_lib.flatten(config)), on(meta["config"]))
  if differ:
    raise UserError(f"{path} belongs to another experiment: {differ}")


def check_frozen(path: epath.Path, meta: dict[str, Any], found: int):
  """Raises UserError where a block was trained with a table of another checksum."""
  if meta["checksum"].get("frozen") != found:
    raise UserError(f"{path} was trained with another table of targets, that which lies with it: "
                    "the file or the text of task.embedding differs; bring it back")


class Damaged(UserError):
  """A checkpoint that cannot be read; `why`, in a few words."""

  def __init__(self, message: str, why: str):
    super().__init__(message)
    self.why = why


class SaveFailed(UserError):
  """A block that could not be written: its state is still in memory, to be saved again."""


class BlockCheckpoint:
  """The checkpoints of one block. A context manager: leaving it waits for the last save.

  Attributes:
    directory, block: where, and which.
    processes: those that have a part of the block: all of them call `save`, `restore`
      and `wait`. By default this one has all of it.
  """

  def __init__(self, workdir: epath.PathLike, block: int, *, keep: int | None = None,
               keep_every: int = 0, processes: Set[int] | None = None):
    """`keep`: the last so many stay, None: all; and those of every so-manieth step, if not 0."""
    self.directory = paths.directory(workdir, block)
    self.block = block
    self.processes = processes
    self._keep, self._keep_every = keep, keep_every
    self._manager: ocp.CheckpointManager | None = None
    self._saved: int | None = None  # the step that is being saved, or was, by this process
    self._begun: futures.Future[ocp.CheckpointManager] | None = None  # Orbax has it
    self._saving: threading.Thread | None = None  # the thread that sees to it
    self._failed: SaveFailed | None = None  # what was raised there

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    if kind is KeyboardInterrupt:  # now: what is being written is no checkpoint yet
      if self._begun:
        self._begun.cancel()
      return
    try:
      self.wait()
    except SaveFailed:
      if kind is None:
        raise
    self._forget()

  def latest(self) -> int | None:
    """The last step that is saved, or being saved by this process; or None."""
    return max(self._steps(), default=None) if self._saved is None else self._saved

  def save(self, state: BlockState, config: Any, *, seconds: float, checksums: dict[str, int],
           trained_with: dict[str, Any], held_out: float | None = None):
    """Saves a block in the background, and reads it back; then deletes what is not to be kept.

    Args:
      state: of this block, anywhere; nobody may donate or change its arrays before `wait`.
      config: resolved; recorded, so that what does not belong together is refused.
      seconds: that the block has been trained.
      checksums: by `examine`, and "frozen", that of the frozen arrays.
      trained_with: as `provenance.trained_with` makes it.
      held_out: the block's loss on held-out data, where it is known.

    Raises:
      SaveFailed: the one before was not written.
    """
    self.wait()
    meta: dict[str, Any] = dict(
        block=self.block, step=int(state.step), seconds=seconds,
        health=[x.item() for x in map(np.asarray, state.health)],
        config=config_lib.flatten(config), trained_with=trained_with,
        checksum={name: int(value) for name, value in checksums.items()},
        **({} if held_out is None else dict(held_out=held_out)))
    self._saved = meta["step"]
    self._begun = _IN_ORDER.submit(
        self._begin, meta, {name: getattr(state, name) for name in ITEMS})
    template = {name: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
                                   getattr(state, name)) for name in ITEMS}
    self._saving = threading.Thread(target=self._finish, args=(self._begun, meta, template))
    self._saving.start()

  def wait(self):
    """Until the last save is complete. Raises SaveFailed where it was not written."""
    if self._saving:
      self._saving.join()
    self._saving, failed, self._failed = None, self._failed, None
    if failed:
      self._saved = None
      self._drop()
      raise failed

  def _begin(self, meta: dict[str, Any], trees: dict[str, Any]) -> ocp.CheckpointManager:
    """Hands a block to Orbax, which writes it in threads of its own."""
    if self._manager is None:
      self._remove_torn()
    manager = self._open()
    manager.save(meta["step"], args=ocp.args.Composite(
        meta=ocp.args.JsonSave(meta),
        **{name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}))
    return manager

  def _finish(self, begun: futures.Future[ocp.CheckpointManager], meta: dict[str, Any],
              template: dict[str, Any]):
    """Waits for a save, reads it back, and deletes what it replaces: in a thread of its own."""
    try:
      begun.result().wait_until_finished()
      if self._leads():
        self._verify(meta, template)
        self._prune()
    except futures.CancelledError:
      pass
    except Exception as e:  # Orbax and TensorStore raise almost anything here
      self._failed = self._not_saved(meta["step"], template, e)

  def _leads(self) -> bool:
    """Whether this process is the one that speaks for all that have a part of the block."""
    return jax.process_index() == min(self.processes or {jax.process_index()})

  def _verify(self, meta: dict[str, Any], template: dict[str, Any]):
    """Raises Damaged where a checkpoint is not what was saved; read by this process alone."""
    for name in ITEMS:
      if checksum_of_host(self._read_here(name, template[name], meta["step"])) != (
          meta["checksum"][name]):
        raise self._unreadable(name, _WRONG, meta["step"])

  def best(self) -> int | None:
    """The step of the checkpoint whose loss on held-out data is least; None: of none it is known.

    The first of several. What cannot be read is passed over.
    """
    losses: dict[int, float] = {}
    for step in self._steps():
      with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
        loss = self._read_meta(step).get("held_out")
        losses |= {step: loss} if np.isfinite(loss) else {}
    return min(losses, key=losses.__getitem__) if losses else None

  def _read_meta(self, step: int) -> Any:
    # By every process alone, and without Orbax, which would make them wait for one another.
    return trust.read_json(self.directory / str(step) / "meta" / "metadata")

  def need_best(self) -> int:
    """`best`. Raises UserError where there is none."""
    found = self.best()
    if found is None:
      raise UserError(f"{self.directory} has no checkpoint whose loss on held-out data is known: "
                      "train with --config.checkpoint.best=True, or take the last")
    return found

  def _prune(self):
    """Deletes all but the last few, the best one, and those of steps that stay."""
    old, best = self._steps()[:-self._keep] if self._keep else [], self.best()
    for step in old:
      if step != best and not (self._keep_every and step % self._keep_every == 0):
        # Under another name first, so that a reader finds it whole or not at all.
        aside = self.directory / f"deleted.{uuid.uuid4().hex}"
        (self.directory / str(step)).rename(aside)
        aside.rmtree()

  def _drop(self):
    """Forgets a save that failed: what Orbax holds of it, and what it has written of it."""
    self._forget()
    with contextlib.suppress(Exception):  # where the disk or gs:// is gone, the next save does it
      self._remove_torn()

  def _forget(self):
    """Lets Orbax look again at what there is."""
    if self._manager:
      with contextlib.suppress(Exception):  # it tells of a failure once more
        self._manager.close()
    self._manager = None

  def _remove_torn(self):
    """Removes what saves that were cut short have left."""
    if self.directory.exists() and self._leads():
      for path in self.directory.iterdir():
        if ".orbax-checkpoint-tmp" in path.name or path.name.startswith("deleted."):
          with contextlib.suppress(OSError):
            path.rmtree()

  def _not_saved(self, step: int, template: dict[str, Any], why: Exception) -> SaveFailed:
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(template))
    there = free(self.directory)
    room = "" if there is None else f", {there / 1e6:,.1f} MB are free"
    return SaveFailed(f"block {self.block}, step {step}, cannot be saved in {self.directory} "
                      f"({reason(why)}): it needs {size / 1e6:,.1f} MB{room}")

  def save_frozen(self, frozen: dict[str, np.ndarray]):
    """Writes frozen arrays, so that the block can be used without the file or text they are of."""
    if frozen and not (self.directory / FROZEN).exists():
      self.directory.mkdir(parents=True, exist_ok=True)
      fresh = self.directory / f"{FROZEN}.{os.getpid()}"
      with fresh.open("wb") as file:
        np.savez(file, **frozen)  # type: ignore[arg-type]  # none is called allow_pickle
      fresh.replace(self.directory / FROZEN)

  def frozen(self, expected: Any = None) -> dict[str, np.ndarray] | None:
    """What `save_frozen` has written, if it has.

    Args:
      expected: shapes and dtypes by name, if they are known.

    Raises:
      UserError: it is damaged, or holds other arrays.
    """
    path = self.directory / FROZEN
    if not path.exists():
      return None
    try:
      trust.check_npz(path, expected)
      with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)
    except UserError:
      raise
    except MemoryError:
      raise
    except Exception as e:  # zipfile and numpy raise almost anything of a damaged one
      raise UserError(f"{path} cannot be read ({reason(e)}): remove it, and it is made again from "
                      "task.embedding") from e

  def check_frozen(self, meta: dict[str, Any], found: int):
    """As the function `check_frozen`."""
    check_frozen(self.directory, meta, found)

  def set_damaged_aside(self, abstract: BlockState):
    """Moves checkpoints that cannot be read out of the way, from the last on; says which.

    Args:
      abstract: the shapes and dtypes of the block.
    """
    while (step := self.latest()) is not None:
      try:
        self._verify(self.meta(), {name: getattr(abstract, name) for name in ITEMS})
        return
      except Damaged as e:
        words = e.why
      except UserError:  # it is of another experiment, as `meta` will say
        return
      path = self.directory / str(step)
      aside = next(p for n in range(10_000) if not (
          p := self.directory / f"{step}.damaged{f'.{n}' * bool(n)}").exists())
      path.rename(aside)
      self._forget()
      print(f"note: {path} cannot be read ({words}): it is set aside as {aside.name}", flush=True)

  def restore_newest(self, template: Any, config: Any) -> tuple[dict[str, Any], Any]:
    """The meta and the averaged parameters of the last checkpoint that can be read, and says so
    where it is not the last. For a reader, who changes nothing; a writer may be at work.

    Args:
      template: as of `restore_ema`.
      config: resolved, of the model in which it is used.

    Raises:
      UserError: there is no checkpoint, none can be read, or it is of another model.
    """
    trust.check_files(self.directory)
    damaged: dict[int, Damaged] = {}
    while True:
      steps = [step for step in self._steps() if step not in damaged]
      if not steps and damaged:
        raise damaged[max(damaged)]
      try:
        meta = self.meta(config, step=steps[-1] if steps else None)
        tree = self.restore_ema(template, meta)
      except Damaged as e:
        if steps[-1] in self._steps():
          damaged[steps[-1]] = e
        # Or else a newer one has just replaced it.
        continue
      for step in sorted(damaged):
        if step > meta["step"]:
          print(f"note: {self.directory / str(step)} cannot be read ({damaged[step].why}): step "
                f"{meta['step']} is used in its place", flush=True)
      return meta, tree

  def restore_step(self, template: Any, config: Any, step: int) -> tuple[dict[str, Any], Any]:
    """As `restore_newest`, but of the checkpoint of `step`.

    Raises:
      UserError: there is no such checkpoint, it cannot be read, or it is of another model.
    """
    trust.check_files(self.directory)
    steps = self._steps()
    if step not in steps:
      there = f"one of {', '.join(map(str, steps))}" if steps else "a block that has some"
      raise UserError(f"{self.directory} has no checkpoint of step {step}, expected {there}; "
                      "checkpoint.keep_every keeps more of them while a block trains")
    meta = self.meta(config, step=step)
    return meta, self.restore_ema(template, meta)

  def meta(self, config=None, on: Callable = config_lib.joint, step: int | None = None
           ) -> dict[str, Any]:
    """The `meta` of the last checkpoint, or that of `step`.

    Args:
      config: resolved, that it must agree with.
      on: which fields: `config.joint` to be used in a model, `config.binding_of_block` to
        be trained further.

    Raises:
      UserError: as `restore` does, or the block is another one, or of another model.
    """
    step = self._need(self.latest() if step is None else step)
    try:
      meta = self._read_meta(step)
    except (OSError, ValueError) as e:
      raise self._unreadable("meta", e, step) from e
    wrong = wrong_in(meta)
    if wrong:
      raise self._unreadable("meta", wrong, step)
    if (meta["block"], meta["step"]) != (self.block, step):
      raise UserError(f"{self.directory / str(step)} holds block {meta['block']}, step "
                      f"{meta['step']}: a block's directory cannot be renamed")
    check_config(self.directory, meta, config, on)
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
    def scalar(like, value):
      value = np.asarray(value, like.dtype)
      sharding = getattr(like, "sharding", None)
      return value if sharding is None else jax.make_array_from_callback(
          (), sharding, lambda _: value)

    trees = {name: self._read_tree(name, getattr(template, name), meta) for name in ITEMS}
    return BlockState(
        step=scalar(template.step, meta["step"]),
        health=Health(*map(scalar, template.health, meta.get("health", (np.inf, 0, 0)))), **trees)

  def restore_ema(self, template: Any, meta: dict[str, Any]) -> Any:
    """The averaged parameters of a checkpoint alone, that of `meta`. As `restore`."""
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
              max_to_keep=None, create=False, multiprocessing_options=many,
              async_options=here),
          item_handlers=dict(
              trees, meta=ocp.JsonCheckpointHandler(multiprocessing_options=many)))
    return self._manager

  def _read_tree(self, name: str, template: Any, meta: dict[str, Any]) -> Any:
    if any(getattr(x, "sharding", None) is None for x in jax.tree.leaves(template)):
      tree = self._read_here(name, template, meta["step"])
      found = checksum_of_host(tree)
    else:
      tree = self._read(name, template, meta["step"])
      found = int(checksum(jax.device_put(
          tree, jax.tree.map(lambda x: x.sharding.with_memory_kind("device"), tree))))
    if found != meta["checksum"][name]:
      raise self._unreadable(name, _WRONG, meta["step"])
    same = jax.tree.map(lambda x, t: (x.shape, x.dtype) == (t.shape, t.dtype), tree, template)
    if not jax.tree.all(same):
      raise UserError(f"{self.directory / name}: its arrays have other shapes than this network's")
    return tree

  def _need(self, step: int | None) -> int:
    if step is None:
      raise UserError(f"{self.directory} has no checkpoint: train block {self.block} with "
                      f"python -m dbjax.main ... --config.train.blocks={self.block}")
    return step

  def _read(self, name: str, template: Any, step: int) -> Any:
    """An item as arrays on devices, by all processes that have a part of them."""
    self._check_claims(name, template, step)
    with self._damage_named(name, step):
      return self._open().restore(step, args=ocp.args.Composite(**{name: ocp.args.PyTreeRestore(
          template, restore_args=ocp.checkpoint_utils.construct_restore_args(template))}))[name]

  def _read_here(self, name: str, template: Any, step: int) -> Any:
    """An item as numpy's arrays, by this process alone, whatever others do in the directory."""
    self._check_claims(name, template, step)
    arrays, me = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), template), jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=uuid.uuid4().hex)
    handler = ocp.PyTreeCheckpointHandler(
        multiprocessing_options=alone,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (np.ndarray, ocp.type_handlers.NumpyHandler()),
            # Unused; without it Orbax warns of metadata that nobody has asked for.
            (jax.Array, ocp.type_handlers.ArrayHandler(array_metadata_store=None))))
    with self._damage_named(name, step):
      with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
        return reader.restore(self.directory / str(step) / name, args=ocp.args.PyTreeRestore(
            arrays, restore_args=ocp.checkpoint_utils.construct_restore_args(arrays)))

  def _check_claims(self, name: str, template: Any, step: int):
    """Raises UserError where an item claims other arrays than the template; before it is read."""
    path = self.directory / str(step) / name
    with self._damage_named(name, step):
      found = trust.arrays_in(path)
    trust.check_arrays(path, found, template)

  @contextlib.contextmanager
  def _damage_named(self, name: str, step: int) -> Iterator[None]:
    """Raises Damaged in the place of whatever is raised inside."""
    _hush_stragglers()
    try:
      yield
    except MemoryError:
      raise
    except Exception as e:  # Orbax and TensorStore raise almost anything here
      raise self._unreadable(name, e, step) from e

  def _unreadable(self, name: str, why, step: int) -> Damaged:
    path = self.directory / str(step)
    others = [s for s in self._steps() if s < step]
    then = f"step {others[-1]}" if others else "the start"
    return Damaged(f"{path / name} cannot be read, it may be damaged ({reason(why)}): train block "
                   f"{self.block} again: it is set aside, and the block goes on from {then}",
                   reason(why))


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
