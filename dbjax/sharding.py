"""Many devices and many hosts: which array lives where.

The devices of a run form a mesh with three axes, which the config sizes:

    mesh.block   rows. Each trains blocks of its own, and nothing crosses between rows: the
                 axis is not even visible to the code of a block, which runs under `shard_map`.
    mesh.data    parts of a batch inside a row; -1 takes the devices that are left.
    mesh.fsdp    parts of the batch and of parameters, EMA and optimizer, by `RULES` and by
                 the `split` of the network.

An axis of size 1 is the single-machine case of the same code. A row is a mesh of its own, on which
its blocks are trained, saved and restored as if there were no others. Where there are more blocks
than rows they take turns; those that wait are in the host's memory. With train.turn=together all
blocks that are alike (of one size, rate, batch) are on the devices at once.

On several hosts the same command starts on each, with --distributed. JAX finds the others by
itself on TPU pods, under SLURM and on Kubernetes; elsewhere three variables name them:
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Each host loads its part of the
batch, a block is written by the hosts that hold it, and all hosts must have the same config, data
and versions: where they differ, one line says how. The workdir is one that all of them share, such
as gs://bucket/name. When a process is lost, each of the others says which in one line and ends with
exit code 75 (`watch.py`): the same command on all hosts goes on from the last checkpoints.

    bash launch/local.sh --processes=2 --devices=2 --config.mesh.block=...     rehearse a pod here
    bash launch/tpu_vm.sh run --name=.. --zone=.. --type=v5litepod-16 --config=.. --workdir=gs://..
    sbatch --nodes=4 launch/slurm.sh --config=.. --workdir=..

`python -m dbjax.plan --config=.. --topology=v5e:4x4` chooses a mesh before there is one. A run goes
on elsewhere: on another mesh, on a laptop, in turns. Machines that never meet train blocks of one
config with --config.train.blocks=0 here and =1,2 there; `python -m dbjax.assemble` joins them.
"""

from collections.abc import Iterator, Sequence
import contextlib
import json
import os
import re
from typing import Any

from etils import epath
import jax
from jax.experimental import mesh_utils
from jax.experimental import multihost_utils
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import jaxlib
import numpy as np

import dbjax
from dbjax import paths
from dbjax import task as task_lib
from dbjax import watch
from dbjax.errors import UserError

BATCH = P(("data", "fsdp"))

# Which axis of an array of one block is split over "fsdp"; the first rule that fits its path.
# Embeddings are whole everywhere: split, the activations they give would have to travel.
RULES = (
    (r"(read_out|out)/kernel$", -2),
    (r"kernel$", -1),
)


@contextlib.contextmanager
def joined(distributed: bool, workdir: epath.Path) -> Iterator[None]:
  """Joins the processes of a run, before anything touches a device, and watches over them.

  JAX finds them by itself on TPU pods, SLURM and Kubernetes; elsewhere
  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name them.

  Args:
    distributed: whether there are others. Then what is inside goes on in a process of its own, and
      an error there ends all of them: see `watch`.
    workdir: that they share.

  Raises:
    UserError: it does not find them.
  """
  if not distributed:
    yield
    return
  with watch.watched(workdir) as tell:
    if "://" in os.fspath(workdir):
      with paths.reached(workdir, "--workdir"):  # not sooner: gcsfs does not outlive the fork
        workdir.exists()
    count = os.environ.get("JAX_NUM_PROCESSES")
    tell(joining=f"this is process {os.environ.get('JAX_PROCESS_ID')} of {count}, of which the "
         f"first is at {os.environ.get('JAX_COORDINATOR_ADDRESS')}" if count
         else "this is one of several processes")
    _initialize()
    members = _gather(watch.member())
    tell(process=jax.process_index(), members=members)
    agree("install the same on all hosts", dbjax=dbjax.__version__, jax=jax.__version__,
          jaxlib=jaxlib.__version__)
    yield


def _initialize():
  number = lambda name: int(os.environ[name]) if name in os.environ else None
  try:
    # The watch looks for lost processes: JAX need not be quick to judge.
    jax.distributed.initialize(num_processes=number("JAX_NUM_PROCESSES"),
                               process_id=number("JAX_PROCESS_ID"),
                               initialization_timeout=3 * watch.JOIN,
                               shutdown_timeout_seconds=3600)
  except (ValueError, RuntimeError) as e:
    raise UserError(f"--distributed: the other processes were not found ({e}): on a TPU pod or "
                    "under srun they are; elsewhere set JAX_COORDINATOR_ADDRESS, "
                    "JAX_NUM_PROCESSES and JAX_PROCESS_ID") from e


def _gather(ours: Any) -> list[Any]:
  """What each process has to say, in JSON, in their order. All must call it."""
  text = np.frombuffer(json.dumps(ours).encode(), np.uint8)
  lengths = np.ravel(multihost_utils.process_allgather(np.int32(len(text))))
  texts = multihost_utils.process_allgather(np.pad(text, (0, max(lengths) - len(text))))
  return [json.loads(bytes(t[:n])) for t, n in zip(np.atleast_2d(texts), lengths)]


def agree(what: str, **ours: Any):
  """Raises UserError where a process has other values than process 0. All must call it."""
  if jax.process_count() == 1:
    return
  first, *others = _gather(ours)
  for process, theirs in enumerate(others, 1):
    differ = [f"{k}={theirs.get(k)} (process {process}) against {first.get(k)} (process 0)"
              for k in sorted(first.keys() | theirs.keys()) if theirs.get(k) != first.get(k)]
    if differ:
      raise UserError(f"the processes of this run differ in {', '.join(differ)}: {what}")


def union(found: set[int], size: int) -> set[int]:
  """The numbers below `size` that some process has found. All must call it."""
  if jax.process_count() == 1:
    return found
  mine = np.isin(np.arange(size), list(found))
  return set(np.flatnonzero(multihost_utils.process_allgather(mine).any(0)).tolist())


def wait_for_all(name: str):
  """Returns once every process has come here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def make_mesh(config, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh of a resolved config: axes ("block", "data", "fsdp"), over all devices.

  Args:
    config: `config.mesh`; data=-1 takes the devices that block and fsdp leave.
    devices: all of this run by default.

  Raises:
    UserError: it does not fit the devices, the blocks, the batch or the network.
  """
  devices = jax.devices() if devices is None else devices
  shape = mesh_shape(config, len(devices))
  check(config, shape)
  # A pod of 16 x 16 chips has no axis of its own for 4 x 16 x 4.
  grid = mesh_utils.create_device_mesh(tuple(shape.values()), devices,
                                       allow_split_physical_axes=True)
  return Mesh(grid, tuple(shape), axis_types=(AxisType.Auto,) * 3)


def mesh_shape(config, num_devices: int) -> dict[str, int]:
  """{"block": .., "data": .., "fsdp": ..} of a resolved config, with no axis left open.

  Raises:
    UserError: the mesh does not have `num_devices`.
  """
  m = config.mesh
  data = max(1, num_devices // (m.block * m.fsdp)) if m.data == -1 else m.data
  if m.block * data * m.fsdp != num_devices:
    left = " (data=-1 takes what the others leave)" if m.data == -1 else ""
    raise UserError(f"mesh.block={m.block}, mesh.data={m.data}, mesh.fsdp={m.fsdp}{left}: expected "
                    f"three numbers whose product is {num_devices}, the devices of this run")
  return dict(block=m.block, data=data, fsdp=m.fsdp)


def check(config, shape: dict[str, int]):
  """Raises UserError where a mesh of this shape cannot train a resolved config."""
  groups(config, shape["block"])
  split = shape["data"] * shape["fsdp"]
  for own in (task_lib.of_block(config, b) for b in config.train.blocks):
    micro = own.train.batch_size // own.train.accumulate
    if micro % split:
      raise UserError(f"train.batch_size={own.train.batch_size} in train.accumulate="
                      f"{own.train.accumulate} parts: {micro} examples do not divide among "
                      f"{split} devices (mesh: data={shape['data']}, fsdp={shape['fsdp']})")
    width = own.model.get("width", 0)
    if width % shape["fsdp"]:
      raise UserError(f"mesh.fsdp={shape['fsdp']} does not divide model.width={width}")


def groups(config, rows: int) -> list[tuple[int, ...]]:
  """The blocks of config.train.blocks that are trained at once, in the order of their turns.

  A group is as many blocks as the mesh has rows, or with train.turn="together" all of
  them. They are alike, since they are one stacked program.

  Raises:
    UserError: the blocks do not divide among the rows.
  """
  alike: dict[Any, list[int]] = {}
  lists = task_lib.per_block(config)
  for b in config.train.blocks:
    kind = config.layers_per_block[b], task_lib.of_block(config, b)
    alike.setdefault(kind, []).append(b)
  for (depth, _), blocks in alike.items():
    if len(blocks) % rows:
      same = f" and the same {', '.join(lists)}" * bool(lists)
      raise UserError(f"mesh.block={rows}: the blocks to train that have {depth} layers{same} are "
                      f"{', '.join(map(str, blocks))}, which do not divide among {rows} rows of "
                      "the mesh; change mesh.block or train.blocks")
  at_once = lambda blocks: len(blocks) if config.train.turn == "together" else rows
  return sorted(tuple(blocks[i:i + at_once(blocks)]) for blocks in alike.values()
                for i in range(0, len(blocks), at_once(blocks)))


def row(mesh: Mesh, group: Sequence[int], block: int) -> Mesh:
  """The part of the mesh, axes ("data", "fsdp"), that trains `block` of `group`."""
  return Mesh(mesh.devices[row_number(mesh, group, block)], ("data", "fsdp"))


def row_number(mesh: Mesh, group: Sequence[int], block: int) -> int:
  """Its number."""
  return group.index(block) // (len(group) // mesh.shape["block"])


def processes(mesh: Mesh) -> frozenset[int]:
  """The processes that own devices of a mesh; the least of them writes its logs."""
  return frozenset(int(d.process_index) for d in mesh.devices.flat)


def shardings(mesh: Mesh, tree: Any, kind: str = "device",
              rules: tuple[tuple[str, int], ...] = ()) -> Any:
  """The sharding of every array of one block (pytree of shapes), by `RULES`.

  Args:
    mesh: with an axis "fsdp". An array whose axis does not divide is not split, nor one that has
      no such axis: Adafactor's sums over rows and columns.
    tree: arrays or shapes, without the leading axis of blocks.
    kind: of memory: "device" or "pinned_host", the host's.
    rules: of the network, before those.
  """

  def sharding(path, x):
    name = "/".join(str(getattr(p, "key", getattr(p, "name", p))) for p in path)
    spec: list[str | None] = [None] * len(x.shape)
    axis = next((axis for pattern, axis in (*rules, *RULES) if re.search(pattern, name)), None)
    if axis is not None and -len(spec) <= axis < len(spec) and (
        x.shape[axis] % mesh.shape["fsdp"] == 0):
      spec[axis] = "fsdp"
    return NamedSharding(mesh, P(*spec), memory_kind=kind)

  return jax.tree_util.tree_map_with_path(sharding, tree)


def templates(shapes: Any, shardings: Any, leading: tuple[int, ...] = ()) -> Any:
  """Shapes with their shardings: what Orbax restores to and XLA compiles for."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct((*leading, *x.shape), x.dtype, sharding=s),
                      shapes, shardings)


def put(mesh: Mesh, spec: P, tree: Any) -> Any:
  """Arrays that every process has whole, spread over the mesh."""
  sharding = NamedSharding(mesh, spec)
  return jax.tree.map(lambda x: jax.make_array_from_callback(
      np.shape(x), sharding, lambda index: np.asarray(x)[index]), tree)


def batch_rows(mesh: Mesh, size: int) -> np.ndarray:
  """The numbers, ascending, of those rows of a global batch that this process's devices need."""
  parts = NamedSharding(mesh, BATCH).addressable_devices_indices_map((size,)).values()
  return np.unique(np.concatenate([np.arange(size)[part] for part in parts]))


def put_batch(mesh: Mesh, size: int, rows: np.ndarray, batch: Any) -> Any:
  """The global batch on the mesh, the same for every row of the mesh.

  Args:
    mesh: the whole.
    size: of the global batch.
    rows: those that this process has, by `batch_rows`.
    batch: arrays (len(rows), ...).
  """
  sharding = NamedSharding(mesh, BATCH)

  def spread(x):
    part = lambda index: x[np.searchsorted(rows, np.arange(size)[index[0]])]
    return jax.make_array_from_callback((size, *x.shape[1:]), sharding, part)

  return jax.tree.map(spread, batch)


def move(tree: Any, kind: str) -> Any:
  """The same arrays in another memory: "device" or "pinned_host". Returns at once."""
  return jax.device_put(tree, jax.tree.map(lambda x: x.sharding.with_memory_kind(kind), tree))


def local_values(array: jax.Array) -> dict[int, Any]:
  """The elements of an array (K,) that this process has: {position: value}."""
  return {i: value for shard in array.addressable_shards
          for i, value in zip(range(len(array))[shard.index[0]], np.asarray(shard.data))}


def bytes_in_use() -> int:
  """Bytes on the first device of this process, as its backend counts them, or of live arrays."""
  device = jax.local_devices()[0]
  stats = device.memory_stats()
  if stats:
    return stats["bytes_in_use"]
  return sum(s.data.nbytes for x in jax.live_arrays() if x.sharding.memory_kind == "device"
             for s in x.addressable_shards if s.device == device)


def has_room(tree: Any) -> bool:
  """Whether every device of this process could hold `tree` on top of all that it ever held."""
  stats = [device.memory_stats() for device in jax.local_devices()]
  return all(s and s["bytes_limit"] - s["peak_bytes_in_use"] >= bytes_per_device(tree)
             for s in stats)


def bytes_per_device(tree: Any) -> int:
  """Bytes on one device of arrays or templates with shardings."""
  return sum(np.dtype(x.dtype).itemsize * int(np.prod(x.sharding.shard_shape(x.shape)))
             for x in jax.tree.leaves(tree))
