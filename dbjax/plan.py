"""Will it fit, what does it cost, and on which mesh: compiled without the hardware.

    python -m dbjax.plan --config=configs/imagenet64.py --topology=v5e:4x4 [--json=out.json]

compiles the real training step, end to end (the plain network, where the task has one;
else num_blocks=1) and as blocks, each with and without remat, and prints for one device
and one step:

parameters  and optimizer (what it remembers, and the EMA), gradients, and activations: all
            else that the step holds at its peak. table is what blocks share and nothing
            trains. total is the sum of these five, as the compiler has it.
own         what of the state belongs to a block's own embedders and read-out, which every
            block has and end to end has once: it is not divided by the number of blocks.
            In it are embedding, of tokens, patches and labels, and of learned tables; and
            head, the read-out.
matmul TF   10^12 floating-point operations in matrix products, recomputation included; a
            loop of unknown length (Huginn's runs that have no gradient) counts once.
fits        whether the compiler accepts it for this device.
largest     global batch that fits (--nolargest saves the compilations that it takes).

Then the traffic by mesh axis, what a device sends to others in a step; and a mesh: the one
with the most blocks side by side (they exchange nothing), then without remat, then with the
least fsdp.

--topology is a TPU slice such as v5e:4x4, v5p:4x4x4, v6e:16x16 (needs libtpu: pip install
'dbjax[tpu]'), cpu:8, or left out: the devices at hand. --config.mesh and
--config.train.batch_size say what is compiled; data need not be there.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import importlib.util
import json
import os
import re
from typing import Any

from absl import flags
import jax
from jax.experimental import topologies
import jax.numpy as jnp
import numpy as np

from dbjax import block as block_lib
from dbjax import cli
from dbjax import config as config_lib
from dbjax import hlo
from dbjax import metrics
from dbjax import paths
from dbjax import program
from dbjax import sharding
from dbjax import task as task_lib
from dbjax.errors import UserError

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Plan:
  """What one step of one program costs on one device. Bytes, unless it says otherwise."""

  num_blocks: int
  end_to_end: bool
  remat: bool
  mesh: dict[str, int]
  batch_size: int  # global
  parameters: int
  optimizer: int
  gradients: int
  activations: int
  table: int
  total: int
  own: int | None
  embedding: int | None
  head: int | None
  matmul_flops: float
  fits: bool
  traffic: dict[str, float] | None  # bytes sent, by mesh axes; None where it did not compile


def make_plan(config, devices: Sequence[jax.Device]) -> Plan:
  """Compiles the step of the group of blocks, trained at once, that needs most.

  If blocks differ in nothing but their layers, that is the deepest group of some size, and one of
  each size is compiled; if they differ in more, a group of each kind is.

  Args:
    config: resolved; its mesh must fit the devices.
    devices: real, or of a topology.

  Raises:
    UserError: the mesh does not fit.
  """
  mesh = sharding.make_mesh(config, devices)
  groups = sorted(sharding.groups(config, mesh.shape["block"]),
                  key=lambda g: (config.layers_per_block[g[0]], len(g)))
  kinds = [*dict.fromkeys((task_lib.make_task(config, g[0]), len(g)) for g in groups)]
  if not task_lib.per_block(config):
    kinds = [*{size: (task, size) for task, size in kinds}.values()]
  return max((_plan(config, mesh, task, size) for task, size in kinds), key=lambda p: p.total)


def _plan(config: Any, mesh: jax.sharding.Mesh, task: task_lib.Task, size: int) -> Plan:
  """Of `size` blocks like `task` at once."""
  task_lib.check(task)
  state = program.abstract_states(task, mesh, size)
  parameters = sharding.bytes_per_device(state.params)
  state_bytes = sharding.bytes_per_device(state)
  table = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(task.abstract_frozen()))
  total, traffic = _compile(task, mesh, size)
  gradients = min(parameters, total - state_bytes)
  return Plan(
      num_blocks=config.num_blocks, end_to_end=config_lib.is_plain(config),
      remat=config.model.get("remat", False), mesh=dict(mesh.shape),
      batch_size=task.config.train.batch_size, parameters=parameters,
      optimizer=state_bytes - parameters, gradients=gradients,
      activations=total - state_bytes - gradients - table, table=table, total=total,
      **_ends(task, state),
      matmul_flops=size * matmul_flops(task) / mesh.size,
      fits=traffic is not None and total <= capacity(mesh.devices.flat[0]), traffic=traffic)


def _compile(task: task_lib.Task, mesh: jax.sharding.Mesh, size: int
             ) -> tuple[int, dict[str, float] | None]:
  """Bytes of the compiled step on a device, and its traffic by mesh axes: None if it is refused."""
  try:
    compiled = program.compile_step(task, mesh, size)
  except jax.errors.JaxRuntimeError as e:
    return _bytes_needed(e), None
  traffic: dict[str, float] = {}
  for c in hlo.collectives(compiled.as_text()):  # type: ignore[arg-type]  # it has a text
    axes = "+".join(hlo.axes(c.groups, mesh.shape))
    traffic[axes] = traffic.get(axes, 0) + c.count * c.sent
  return bytes_of(compiled), traffic


def bytes_of(compiled: Any) -> int:
  """Bytes on a device while a compiled program runs, what it is given included."""
  memory = compiled.memory_analysis()
  return (memory.argument_size_in_bytes + memory.output_size_in_bytes
          - memory.alias_size_in_bytes + memory.temp_size_in_bytes)


def _ends(task: task_lib.Task, state: Any) -> dict[str, int | None]:
  """Bytes of the state of a block's own ends, by `parts` of its network; None where it says none.

  What the optimizer remembers of a parameter stands under its name.
  """
  parts = getattr(task.network, "parts", {})
  if "layers" not in parts or not isinstance(state.params, dict):
    return dict(own=None, embedding=None, head=None)
  of = lambda path: next((p.key for p in path if getattr(p, "key", None) in state.params), None)
  named = [(of(path), x) for path, x in jax.tree_util.tree_leaves_with_path(state)]
  size = lambda test: sharding.bytes_per_device([x for name, x in named if name and test(name)])
  part = lambda part: size(lambda name: re.match(parts[part], name)) if part in parts else None
  embedding, learned = part("embedding"), size(lambda name: name in task.joint)
  return dict(own=size(lambda name: not re.match(parts["layers"], name)),
              embedding=None if embedding is None else embedding + learned, head=part("head"))


def end_to_end(config):
  """The plain network, where the task has one; or the same as one block."""
  return config_lib.as_one_block(
      config, **task_lib.find(config.task.name).PLAIN, **{"mesh.data": -1})


def _remats(config) -> list[dict[str, bool]]:
  """Without and with remat, if the network has it."""
  return [{"model.remat": remat} for remat in (False, True)] if "remat" in config.model else [{}]


def largest_batch(config, plan: Callable[..., Plan], limit: int) -> int:
  """The largest global batch that fits, or 0; not proven to be the largest but close.

  Args:
    config: resolved.
    plan: from a resolved config to its Plan.
    limit: bytes of a device's memory. They grow about linearly with the batch.
  """
  if isinstance(config.train.batch_size, tuple):  # the answer is one number for all blocks
    config = config_lib.changed(config, **{"train.batch_size": max(config.train.batch_size)})
  start = plan(config)
  split = start.mesh["data"] * start.mesh["fsdp"] * config.train.accumulate
  fixed = start.parameters + start.optimizer + start.gradients + start.table
  points = {0: fixed, start.batch_size: start.total}
  fits, fails = (start.batch_size, None) if start.fits else (0, start.batch_size)
  for _ in range(6):
    (b0, m0), (b1, m1) = sorted(points.items(), key=lambda p: abs(p[1] - limit))[:2]
    guess = b0 + (limit - m0) * (b1 - b0) / (m1 - m0) if m1 != m0 else 0
    guess = int(min(max(guess, fits + split), fails - split if fails else 2**20)) // split * split
    if guess <= fits:
      break
    found = plan(config_lib.changed(config, **{"train.batch_size": guess}))
    points[guess] = found.total
    if found.fits:
      fits = guess
    else:
      fails = guess
    if fails and fails - fits <= max(split, fits // 50):
      break
  return fits


def choose_mesh(config, plan: Callable[..., Plan], num_devices: int, limit: int):
  """The resolved config with the mesh and remat to train with, or None where nothing fits.

  Most blocks side by side first: they exchange nothing. Then without remat, which costs a
  third more compute; then the least fsdp, which costs traffic.
  """
  divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
  for block in reversed(divisors):
    for remat in _remats(config):
      excess = None  # bytes, of the last that did not fit, without the state
      for fsdp in divisors:
        if num_devices % (block * fsdp):
          continue
        try:
          shape = {"mesh.block": block, "mesh.fsdp": fsdp, "mesh.data": -1, **remat}
          candidate = config_lib.changed(config, **shape)
          sharding.check(candidate, sharding.mesh_shape(candidate, num_devices))
        except UserError:
          continue
        if excess is not None and excess > limit:
          break
        found = plan(candidate)
        if found.fits:
          return candidate
        excess = found.activations + found.table  # more fsdp divides all but these
  return None


@functools.cache
def capacity(device: jax.Device) -> int:
  """Bytes that a program can have on a device."""
  if device.platform == "tpu":
    one = jax.sharding.SingleDeviceSharding(device)
    try:  # the compiler knows: ask for too much
      jax.jit(lambda x: x + 1).lower(
          jax.ShapeDtypeStruct((2**40,), jnp.float32, sharding=one)).compile()
    except jax.errors.JaxRuntimeError as e:
      return _bytes(re.search(r"available HBM \(([\d.]+)([KMGT]?)\)", str(e)), e)
  stats = device.memory_stats()
  if stats:
    return stats["bytes_limit"]
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.device_count()


def _bytes_needed(error: jax.errors.JaxRuntimeError) -> int:
  """What a program that does not fit would use, from XLA's refusal."""
  if "RESOURCE_EXHAUSTED" not in str(error):
    raise error
  return _bytes(re.search(r"Used ([\d.]+)([KMGT]?) of|HLO temporaries \(([\d.]+)([KMGT]?)\)",
                          str(error)), error)


def _bytes(match: re.Match | None, error: Exception) -> int:
  if not match:
    raise error
  number, unit = (x for x in match.groups() if x is not None)
  return int(float(number) * _UNITS[unit])


def matmul_flops(task: task_lib.Task) -> float:
  """Floating-point operations in matrix products of one training step of one block."""
  step = functools.partial(block_lib.train_step, task)
  traced = jax.make_jaxpr(step, axis_env=[(block_lib.AXIS, 1)])(
      block_lib.abstract_state(task), task.abstract_batch(task.config.train.batch_size),
      np.int32(0), task.make_schedule(task.config).training_interval(0), task.abstract_frozen())
  return _matmul_flops(traced.jaxpr)


def _matmul_flops(jaxpr) -> float:
  total = 0
  for eqn in jaxpr.eqns:
    vectors = any(len(x.aval.shape) == 1 for x in eqn.invars)  # those make no product of matrices
    if eqn.primitive.name == "dot_general" and not vectors:
      (contracted, _), _ = eqn.params["dimension_numbers"]
      lhs = eqn.invars[0].aval.shape
      total += 2 * float(np.prod(eqn.outvars[0].aval.shape)) * np.prod([lhs[i] for i in contracted])
    parts = jax.tree.leaves(eqn.params, is_leaf=_is_jaxpr)
    inner = [_matmul_flops(getattr(x, "jaxpr", x)) for x in parts if _is_jaxpr(x)]
    if inner:  # of the branches of a conditional one is taken
      times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
      total += times * (max(inner) if eqn.primitive.name == "cond" else sum(inner))
  return total


def _is_jaxpr(x) -> bool:
  return hasattr(getattr(x, "jaxpr", x), "eqns")


def find_devices(topology: str | None) -> list[jax.Device]:
  """The devices that --topology names, real or not.

  Raises:
    UserError: there is no such topology, or no libtpu.
  """
  if topology is None:
    return jax.devices()
  if not topology:
    raise UserError("--topology=: expected a slice of TPUs, such as v5e:4x4, or cpu:8; leave it "
                    "out for the devices at hand")
  kind, _, size = topology.partition(":")
  if kind == "cpu":
    if not re.fullmatch("[1-9][0-9]{0,3}", size):
      raise UserError(f"--topology={topology}: expected a number of devices up to 9999, such as "
                      "cpu:8")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(size))
    return jax.devices()
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(f"--topology={topology}: compiling for TPU needs libtpu (no TPU): "
                    "pip install 'dbjax[tpu]'")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or it looks for the machine that it is on
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU is opened: planners may meet
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_enable_compilation_cache", False)  # programs for them cannot be read back
  describe = functools.partial(topologies.get_topology_desc, topology, platform="tpu")
  try:
    try:
      return describe().devices
    except jax.errors.JaxRuntimeError as e:
      if "chips_per_host_bounds" not in str(e):
        raise
      return describe(chips_per_host_bounds=(1, 1, 1)).devices  # smaller than a host
  except jax.errors.JaxRuntimeError as e:
    raise UserError(f"--topology={topology}: libtpu knows no such slice ({str(e)[:150]}); expected "
                    "a name such as v5e:4x4, v5p:4x4x4, v6e:16x16, or cpu:8") from e


def main():
  f = flags.FLAGS
  config = config_lib.resolve(cli.config())
  path = cli.writable("json") if f.json else None
  devices = find_devices(f.topology)
  sharding.make_mesh(config, devices)
  limit = capacity(devices[0])
  print(f"{len(devices)} x {devices[0].device_kind}, {_gib(limit)} GiB each", flush=True)

  @functools.cache
  def plan(config):
    found = make_plan(config, devices)
    print(f"compiled {_name(found)}, remat {found.remat}, mesh {_words(found.mesh)}, batch "
          f"{found.batch_size}: {_gib(found.total)} GiB", flush=True)
    return found

  variants = [config_lib.changed(c, **remat)
              for c in dict.fromkeys((end_to_end(config), config)) for remat in _remats(c)]
  plans = [plan(v) for v in variants]
  largest = [largest_batch(v, plan, limit) if f.largest else None for v in variants]
  chosen = choose_mesh(config, plan, len(devices), limit)

  sizes = ("parameters", "optimizer", "gradients", "activations", "table", "total", "own",
           "embedding", "head")
  print("\n" + metrics.table(
      ["GiB a device", "remat", "mesh", "batch", *sizes, "matmul TF", "fits"]
      + ["largest"] * f.largest,
      [[_name(p), "yes" if p.remat else "no", _words(p.mesh), p.batch_size,
        *(_gib(getattr(p, size)) for size in sizes), p.matmul_flops / 1e12,
        "yes" if p.fits else "no"] + [batch] * f.largest for p, batch in zip(plans, largest)]))
  for p in plans:
    if p.traffic:
      print(f"traffic of {_name(p)}, remat {'yes' if p.remat else 'no'}: " + ", ".join(
          f"{n / 1e6:,.1f} MB along {axes}" for axes, n in p.traffic.items() if axes))
  if chosen:
    p = plan(chosen)
    print(f"\nmesh: --config.mesh.block={p.mesh['block']} --config.mesh.data={p.mesh['data']} "
          f"--config.mesh.fsdp={p.mesh['fsdp']}"
          f"{f' --config.model.remat={p.remat}' * ('remat' in chosen.model)} "
          f"({_gib(p.total)} GiB a device)")
  else:
    print("\nmesh: none fits; take more devices, a smaller train.batch_size, more blocks, or "
          "train.accumulate")
  if path:
    text = json.dumps(dict(
        topology=f.topology, num_devices=len(devices), device_kind=devices[0].device_kind,
        bytes_per_device=limit,
        plans=[dataclasses.asdict(p) | {"largest_batch": b} for p, b in zip(plans, largest)],
        chosen=dataclasses.asdict(plan(chosen)) if chosen else None), indent=2) + "\n"
    with paths.writing(path, "--json"):
      path.write_text(text)


def _name(plan: Plan) -> str:
  return "end to end" if plan.end_to_end else f"B = {plan.num_blocks}"


def _words(mesh: dict[str, int]) -> str:
  return ",".join(map(str, mesh.values()))


def _gib(n: int | None) -> str | None:
  if n is None:
    return None
  return f"{n / 2**30:.2f}" if n >= 2**30 / 10 else f"{n / 2**30:.2g}"


if __name__ == "__main__":
  flags.DEFINE_string("config", None, "A config: a file, or a name such as imagenet64.")
  flags.DEFINE_string("topology", None, "v5e:4x4, cpu:8, ... [the devices at hand]")
  flags.DEFINE_boolean("largest", True, "Look for the largest batch that fits.")
  flags.DEFINE_string("json", None, "Also write all figures to this file.")
  cli.run(main, __doc__)
