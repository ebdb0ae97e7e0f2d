"""Where things live: processes, the mesh ("block", "data", "fsdp"), and who holds what.

    block   blocks, stacked on a leading axis. Nothing may cross it: it is not even visible
            to the code of a block, which runs under `shard_map` over this axis.
    data    the batch
    fsdp    the batch too, and parameters, EMA and optimizer by `RULES`

An axis of size 1 is the single-machine case of the same code. A row of the mesh is the
devices of one index along "block": a mesh of its own, on which its blocks are trained,
saved and restored as if there were no others.
"""

from collections.abc import Callable, Sequence
import functools
import json
import os
import re
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from dbjax import block as block_lib
from dbjax import schedule as schedule_lib
from dbjax.cli import UserError
from dbjax.tasks import Task

BATCH = P(("data", "fsdp"))

# Which axis of an array of one block is split over "fsdp"; the first rule that fits its path.
# Embeddings are whole everywhere: split, the activations they give would have to travel.
RULES = (
    (r"(read_out|out)/kernel$", -2),
    (r"kernel$", -1),
)


def start(distributed: bool):
  """Joins the processes of a run, before anything touches a device.

  JAX finds them by itself on TPU pods, SLURM and Kubernetes; elsewhere
  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name them.

  Raises:
    UserError: it does not find them.
  """
  if not distributed:
    return
  number = lambda name: int(os.environ[name]) if name in os.environ else None
  try:
    jax.distributed.initialize(num_processes=number("JAX_NUM_PROCESSES"),
                               process_id=number("JAX_PROCESS_ID"))
  except (ValueError, RuntimeError) as e:
    raise UserError(f"--distributed: the other processes were not found ({e}): on a TPU pod or "
                    "under srun they are; elsewhere set JAX_COORDINATOR_ADDRESS, "
                    "JAX_NUM_PROCESSES and JAX_PROCESS_ID") from e


def agree(what: str, **ours: Any):
  """Raises UserError where a process has other values than process 0. All must call it."""
  if jax.process_count() == 1:
    return
  text = np.frombuffer(json.dumps(ours).encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.int32(len(text)))
  texts = multihost_utils.process_allgather(np.pad(text, (0, max(lengths) - len(text))))
  first, *others = (json.loads(bytes(t[:n])) for t, n in zip(texts, lengths))
  for process, theirs in enumerate(others, 1):
    differ = [f"{k}={theirs.get(k)} (process {process}) against {first.get(k)} (process 0)"
              for k in sorted(first.keys() | theirs.keys()) if theirs.get(k) != first.get(k)]
    if differ:
      raise UserError(f"the processes of this run differ in {', '.join(differ)}: {what}")


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
  split, micro = shape["data"] * shape["fsdp"], config.train.batch_size // config.train.accumulate
  if micro % split:
    raise UserError(f"train.batch_size={config.train.batch_size} in train.accumulate="
                    f"{config.train.accumulate} parts: {micro} examples do not divide among "
                    f"{split} devices (mesh: data={shape['data']}, fsdp={shape['fsdp']})")
  if config.model.width % shape["fsdp"]:
    raise UserError(f"mesh.fsdp={shape['fsdp']} does not divide model.width={config.model.width}")


def groups(config, rows: int) -> list[tuple[int, ...]]:
  """The blocks of config.train.blocks that are trained at once, in the order of their turns.

  A group is as many blocks as the mesh has rows, or with train.turn="together" all of
  them. They have equally many layers, since they are one stacked program.

  Raises:
    UserError: the blocks do not divide among the rows.
  """
  by_depth = {}
  for b in config.train.blocks:
    by_depth.setdefault(config.layers_per_block[b], []).append(b)
  for depth, blocks in by_depth.items():
    if len(blocks) % rows:
      raise UserError(f"mesh.block={rows}: the blocks to train that have {depth} layers are "
                      f"{', '.join(map(str, blocks))}, which do not divide among {rows} rows of "
                      "the mesh; change mesh.block or train.blocks")
  size = {d: len(blocks) if config.train.turn == "together" else rows
          for d, blocks in by_depth.items()}
  return sorted(tuple(blocks[i:i + size[d]]) for d, blocks in by_depth.items()
                for i in range(0, len(blocks), size[d]))


def row(mesh: Mesh, group: Sequence[int], block: int) -> Mesh:
  """The part of the mesh, axes ("data", "fsdp"), that trains `block` of `group`."""
  return Mesh(mesh.devices[_row(mesh, group, block)], ("data", "fsdp"))


def _row(mesh: Mesh, group: Sequence[int], block: int) -> int:
  return group.index(block) // (len(group) // mesh.shape["block"])


def processes(mesh: Mesh) -> frozenset[int]:
  """The processes that own devices of a mesh; the least of them writes its logs."""
  return frozenset(int(d.process_index) for d in mesh.devices.flat)


def shardings(mesh: Mesh, tree: Any, kind: str = "device") -> Any:
  """The sharding of every array of one block (pytree of shapes), by `RULES`.

  Args:
    mesh: with an axis "fsdp". An array whose axis does not divide is not split.
    tree: arrays or shapes, without the leading axis of blocks.
    kind: of memory: "device" or "pinned_host", the host's.
  """

  def sharding(path, x):
    name = "/".join(str(getattr(p, "key", getattr(p, "name", p))) for p in path)
    spec = [None] * len(x.shape)
    axis = next((axis for pattern, axis in RULES if re.search(pattern, name)), None)
    if axis is not None and x.shape[axis] % mesh.shape["fsdp"] == 0:
      spec[axis] = "fsdp"
    return NamedSharding(mesh, P(*spec), memory_kind=kind)

  return jax.tree_util.tree_map_with_path(sharding, tree)


def stacked_shardings(mesh: Mesh, tree: Any, kind: str = "device") -> Any:
  """The same, of K blocks stacked on a leading axis: the axis "block"."""
  return jax.tree.map(lambda s: NamedSharding(mesh, P("block", *s.spec), memory_kind=kind),
                      shardings(mesh, tree))


def templates(shapes: Any, shardings: Any, leading: tuple[int, ...] = ()) -> Any:
  """Shapes with their shardings: what Orbax restores to and XLA compiles for."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct((*leading, *x.shape), x.dtype, sharding=s),
                      shapes, shardings)


def per_block(f: Callable, mesh: Mesh, size: int, in_axes: Sequence[int | None]) -> Callable:
  """A function of ONE block as one of `size` blocks, stacked and spread over "block".

  Args:
    f: any function of arrays; sees one block, and the mesh axes "data" and "fsdp" only.
    mesh: the whole.
    size: a multiple of the mesh's rows; more than one block in a row is a vmap.
    in_axes: of each argument: 0 is stacked, None the same for all blocks.

  Returns:
    The function; every result has a leading axis of blocks.
  """

  def of_row(*args):
    if size > mesh.shape["block"]:
      return jax.vmap(f, in_axes, axis_name=block_lib.AXIS)(*args)
    squeeze = lambda arg, axis: arg if axis is None else jax.tree.map(lambda x: x[0], arg)
    return jax.tree.map(lambda x: x[None], f(*map(squeeze, args, in_axes)))

  specs = tuple(P() if axis is None else P("block") for axis in in_axes)
  return jax.shard_map(of_row, mesh=mesh, in_specs=specs, out_specs=P("block"),
                       axis_names={"block"}, check_vma=False)


def compile_step(config, task: Task, mesh: Mesh, size: int, some: bool = False):
  """`block.train_step` of `size` blocks like `task` at once, compiled for the mesh.

  Returns:
    (states, batch, blocks, intervals, shared) -> (states, metrics). All but the batch and
    what blocks share have a leading axis of blocks. The states passed in are donated. With
    `some` there is a sixth argument, bools `active`: a block that is not active stays as it
    is.
  """

  def step(state, batch, block, interval, shared, active=None):
    new, metrics = block_lib.train_step(config, task, state, batch, block, interval, shared)
    if active is not None:
      new = jax.tree.map(functools.partial(jnp.where, active), new, state)
    return new, metrics

  shapes = block_lib.abstract_state(config, task)
  of_states, of_blocks = stacked_shardings(mesh, shapes), NamedSharding(mesh, P("block"))
  scalars = lambda dtype: jax.ShapeDtypeStruct((size,), dtype, sharding=of_blocks)
  spread = lambda tree, spec: jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)), tree)
  batch = spread(task.abstract_batch(config.train.batch_size), BATCH)
  shared = spread(task.abstract_shared(), P())
  schedule = schedule_lib.make_schedule(config.schedule, config.num_blocks)
  interval = jax.tree.map(lambda _: scalars(jnp.float32), schedule.training_interval(0))
  # On CPU, XLA's newer kernels for fused products are slower here than its older library.
  on_cpu = mesh.devices.flat[0].platform == "cpu"
  active = (scalars(jnp.bool),) * some
  return jax.jit(
      per_block(step, mesh, size, (0, None, 0, 0, None, 0)[:5 + some]), donate_argnums=0,
      out_shardings=(of_states, of_blocks),  # or fsdp's gradients and weights are replicated
      compiler_options={"xla_cpu_experimental_ynn_fusion_type": ""} if on_cpu else None,
  ).lower(templates(shapes, of_states, (size,)), batch, scalars(jnp.int32), interval,
          shared, *active).compile()


def init(config, task: Task, mesh: Mesh, group: Sequence[int]) -> Any:
  """`block.init` of all blocks of a group, on the mesh.

  Weights are drawn by one device, one block after the other: programs for other meshes would
  round some of them otherwise.
  """
  shapes = block_lib.abstract_state(config, task)
  here = [b for b in group if jax.process_index() in processes(row(mesh, group, b))]
  weights = {b: jax.device_get(block_lib.init_params(config, task, b)) for b in here}
  spread = lambda sharding, shape, *arrays: jax.make_array_from_callback(
      (len(group), *shape.shape), sharding,
      lambda i: np.stack([x[i[1:]] for b, x in zip(here, arrays) if b in group[i[0]]]))
  of_states = stacked_shardings(mesh, shapes)
  params = jax.tree.map(spread, of_states.params, shapes.params, *weights.values())
  of_one = functools.partial(block_lib.from_params, config)
  return jax.jit(per_block(of_one, mesh, len(group), (0,)), out_shardings=of_states)(params)


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
  spread = lambda x: jax.make_array_from_callback(
      (size, *x.shape[1:]), sharding,
      lambda index: x[np.searchsorted(rows, np.arange(size)[index[0]])])
  return jax.tree.map(spread, batch)


def stack(mesh: Mesh, group: Sequence[int], states: dict[int, Any]) -> Any:
  """States of single blocks, each on its row, as one stacked state in the host's memory.

  Args:
    mesh: the whole.
    group: K blocks.
    states: of those blocks of which this process has a part.
  """
  mine = [b for b in group if b in states]

  def leaf(sharding, *arrays):
    parts = {(b, _bounds(s.index)): s.data
             for b, x in zip(mine, arrays) for s in x.addressable_shards}
    return jax.make_array_from_callback(
        (len(group), *arrays[0].shape), sharding,
        lambda i: np.stack([parts[b, _bounds(i[1:])] for b in group[i[0]]]))

  return jax.tree.map(leaf, stacked_shardings(mesh, states[mine[0]], "pinned_host"),
                      *(states[b] for b in mine))


def unstack(mesh: Mesh, group: Sequence[int], stacked: Any, block: int) -> Any:
  """One block's state on its own row, copied to the host's memory: the inverse of `stack`.

  Only processes with a part of that row may call it.
  """
  position = group.index(block)
  mine = row(mesh, group, block)
  if jax.process_count() > 1 and processes(mine) == {jax.process_index()}:
    # Orbax refuses arrays that one process of many has all to itself. It writes the first copy: so
    # let it believe that the other rows have copies too.
    mine = Mesh(np.roll(mesh.devices, -_row(mesh, group, block), 0), mesh.axis_names)

  def leaf(sharding, x):
    parts = {_bounds(s.index[1:]): (s.data, s.index[0].start or 0) for s in x.addressable_shards
             if position in range(len(group))[s.index[0]]}
    def part(index):
      data, first = parts[_bounds(index)]
      return np.asarray(data)[position - first].copy()  # the next step may take x's own memory
    return jax.make_array_from_callback(x.shape[1:], sharding, part)

  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stacked)
  return jax.tree.map(leaf, shardings(mine, shapes, "pinned_host"), stacked)


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


def _bounds(index: tuple[slice, ...]) -> tuple:
  return tuple((s.start, s.stop) for s in index)
