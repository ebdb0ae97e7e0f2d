"""Programs for a mesh: the training step of several blocks at once, and a group's state.

What is written for ONE block, `block.train_step`, runs here for as many as a group has, stacked on
a leading axis and spread over the mesh axis "block". Where arrays live is `sharding.py`'s to say.
Under `jax.disable_jit` nothing is compiled: the same functions run in Python, op by op.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from dbjax import block as block_lib
from dbjax import sharding
from dbjax import startup
from dbjax.sharding import BATCH
from dbjax.task import Task


def in_python() -> bool:
  """Whether nothing is compiled, as `jax.disable_jit` has it."""
  return jax.config.jax_disable_jit  # type: ignore[attr-defined]  # jax makes it as it runs


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

  if in_python():  # one device, and shard_map does not run so
    return of_row
  specs = tuple(P() if axis is None else P("block") for axis in in_axes)
  return jax.shard_map(of_row, mesh=mesh, in_specs=specs, out_specs=P("block"),
                       axis_names={"block"}, check_vma=False)


def abstract_states(task: Task, mesh: Mesh, size: int) -> Any:
  """Shapes, dtypes and shardings of the stacked state of `size` blocks like `task`."""
  shapes = block_lib.abstract_state(task)
  spread = sharding.shardings(mesh, shapes, rules=getattr(task.network, "split", ()))
  spread = jax.tree.map(lambda s: NamedSharding(mesh, P("block", *s.spec)), spread)
  return sharding.templates(shapes, spread, (size,))


def abstract_state(task: Task, row: Mesh, kind: str = "device") -> Any:
  """Shapes, dtypes and shardings of the state of one block on its row of the mesh."""
  shapes = block_lib.abstract_state(task)
  return sharding.templates(shapes, sharding.shardings(
      row, shapes, kind, getattr(task.network, "split", ())))


def _shardings_of(tree: Any) -> Any:
  return jax.tree.map(lambda x: x.sharding, tree)


def compile_step(task: Task, mesh: Mesh, size: int, some: bool = False) -> jax.stages.Compiled:
  """`block.train_step` of `size` blocks like `task` at once, compiled for the mesh.

  Returns:
    (states, batch, blocks, intervals, frozen) -> (states, metrics). All but the batch and
    the frozen arrays have a leading axis of blocks. The states passed in are donated. With
    `some` there is a sixth argument, bools `active`: a block that is not active stays as it
    is.
  """

  step = functools.partial(block_lib.train_step, task)
  state, *others = _arguments(task, mesh, size)
  of_blocks = NamedSharding(mesh, P("block"))
  active = (jax.ShapeDtypeStruct((size,), jnp.bool, sharding=of_blocks),) * some
  return _compile(
      per_block(step, mesh, size, (0, None, 0, 0, None, 0)[:5 + some]), mesh,
      (state, *others, *active), donate_argnums=0,
      # Or fsdp's gradients and weights are replicated.
      out_shardings=(_shardings_of(state), of_blocks))


def compile_norms(task: Task, mesh: Mesh, size: int) -> Callable:
  """`block.norms` of `size` blocks like `task` at once, compiled for the mesh.

  Returns:
    (states, batch, blocks, intervals, frozen) -> norms, all but the batch and the frozen arrays
    with a leading axis of blocks. Nothing is donated.
  """
  norms = functools.partial(block_lib.norms, task)
  return _compile(per_block(norms, mesh, size, (0, None, 0, 0, None)), mesh,
                  _arguments(task, mesh, size), out_shardings=NamedSharding(mesh, P("block")))


def _arguments(task: Task, mesh: Mesh, size: int) -> tuple[Any, ...]:
  """Shapes, dtypes and shardings of (states, batch, blocks, intervals, frozen)."""
  scalars = lambda dtype: jax.ShapeDtypeStruct(
      (size,), dtype, sharding=NamedSharding(mesh, P("block")))
  spread = lambda tree, spec: jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)), tree)
  interval = task.make_schedule(task.config).training_interval(0)
  return (abstract_states(task, mesh, size),
          spread(task.abstract_batch(task.config.train.batch_size), BATCH), scalars(jnp.int32),
          jax.tree.map(lambda x: scalars(np.asarray(x).dtype), interval),
          spread(task.abstract_frozen(), P()))


def _compile(f: Callable, mesh: Mesh, arguments: Sequence[Any], **options: Any) -> Any:
  """A function as a program for the mesh; the options are those of jit."""
  if in_python():
    return lambda *args: jax.device_put(f(*args), options["out_shardings"])
  on_cpu = mesh.devices.flat[0].platform == "cpu"
  return jax.jit(f, compiler_options={startup.FUSION: ""} if on_cpu else None, **options
                 ).lower(*arguments).compile()


def of_group(task: Task, mesh: Mesh, group: Sequence[int]) -> tuple[Any, Any]:
  """The numbers of a group's blocks and the noise that they train on, on the mesh."""
  schedule = task.make_schedule(task.config)
  intervals = jax.tree.map(lambda *x: np.stack(x), *map(schedule.training_interval, group))
  return tuple(sharding.put(mesh, P("block"), x)
               for x in (np.array(group, np.int32), intervals))


def init(task: Task, mesh: Mesh, group: Sequence[int],
         weights: Callable[[int], Any] | None = None) -> Any:
  """`block.init` of all blocks of a group, on the mesh.

  Weights are drawn by one device, one block after the other: programs for other meshes would
  round some of them otherwise.

  Args:
    task: of any block of the group.
    mesh: the whole.
    group: of blocks.
    weights: block -> the parameters that it starts from; drawn by default.
  """
  states = abstract_states(task, mesh, len(group))
  here = [b for b in group
          if jax.process_index() in sharding.processes(sharding.row(mesh, group, b))]
  weights = weights or functools.partial(block_lib.init_params, task)
  weights = {b: jax.device_get(weights(b)) for b in here}

  def spread(template, *arrays):
    part: Any = lambda i: np.stack([x[i[1:]] for b, x in zip(here, arrays) if b in group[i[0]]])
    return jax.make_array_from_callback(template.shape, template.sharding, part)

  params = jax.tree.map(spread, states.params, *weights.values())
  of_one = functools.partial(block_lib.from_params, task)
  begin, there = per_block(of_one, mesh, len(group), (0,)), _shardings_of(states)
  if in_python():
    return jax.device_put(begin(params), there)
  return jax.jit(begin, out_shardings=there)(params)


def stack(mesh: Mesh, group: Sequence[int], states: dict[int, Any]) -> Any:
  """States of single blocks, each on its row, as one stacked state in the host's memory.

  Args:
    mesh: the whole.
    group: K blocks.
    states: of those blocks of which this process has a part.
  """
  mine = [b for b in group if b in states]

  def leaf(*arrays: Any):
    spread = NamedSharding(mesh, P("block", *arrays[0].sharding.spec), memory_kind="pinned_host")
    parts = {(b, _bounds(s.index)): s.data
             for b, x in zip(mine, arrays) for s in x.addressable_shards}
    part: Any = lambda i: np.stack([parts[b, _bounds(i[1:])] for b in group[i[0]]])
    return jax.make_array_from_callback((len(group), *arrays[0].shape), spread, part)

  return jax.tree.map(leaf, *(states[b] for b in mine))


def unstack(mesh: Mesh, group: Sequence[int], stacked: Any, block: int) -> Any:
  """One block's state on its own row, copied to the host's memory: the inverse of `stack`.

  Only processes with a part of that row may call it.
  """
  position = group.index(block)
  mine = sharding.row(mesh, group, block)
  if jax.process_count() > 1 and sharding.processes(mine) == {jax.process_index()}:
    # Orbax refuses arrays that one process of many has all to itself. It writes the first copy: so
    # let it believe that the other rows have copies too.
    mine = Mesh(np.roll(mesh.devices, -sharding.row_number(mesh, group, block), 0), mesh.axis_names)

  def leaf(x):
    spread = NamedSharding(mine, P(*x.sharding.spec[1:]), memory_kind="pinned_host")
    parts = {_bounds(s.index[1:]): (s.data, s.index[0].start or 0) for s in x.addressable_shards
             if position in range(len(group))[s.index[0]]}
    def part(index):
      data, first = parts[_bounds(index)]
      return np.asarray(data)[position - first].copy()  # the next step may take x's own memory
    return jax.make_array_from_callback(x.shape[1:], spread, part)

  return jax.tree.map(leaf, stacked)


def _bounds(index: tuple[slice, ...]) -> tuple:
  return tuple((s.start, s.stop) for s in index)
