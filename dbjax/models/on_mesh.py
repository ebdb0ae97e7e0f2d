"""What a network knows of the mesh that it is compiled for, if there is one."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P


def device() -> Any:
  """One of the devices that are compiled for, or what stands for it: platform, device_kind."""
  return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def is_there() -> bool:
  """Whether there is a mesh."""
  return not jax.sharding.get_abstract_mesh().empty


def batch_axes() -> tuple[str, ...]:
  """The axes over which a block's batch is spread."""
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types)
               if kind == jax.sharding.AxisType.Auto)


def on_each_device(f: Callable, out_specs: P | None = None) -> Callable:
  """f of each device's part of its arguments, leading axis N: what the partitioner cannot split.

  Args:
    f: of arrays.
    out_specs: of its result; by default it is spread as the arguments are.
  """
  axes = batch_axes()
  if not axes:
    return f
  return jax.shard_map(f, in_specs=P(axes), out_specs=P(axes) if out_specs is None else out_specs,
                       axis_names=set(axes), check_vma=False)


def whole(weight: jax.Array) -> jax.Array:
  """A weight that a mesh keeps in parts, put together for as long as it is used.

  Without this the partitioner may move activations instead, which are larger.
  """
  return _whole(weight) if is_there() else weight


@jax.custom_vjp
def _whole(weight: jax.Array) -> jax.Array:
  return jax.lax.with_sharding_constraint(weight, P())


# Of itself a gradient would be whole too: a sum of which each device keeps a part costs half.
_whole.defvjp(lambda weight: (_whole(weight), None), lambda _, gradient: (gradient,))
