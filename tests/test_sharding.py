"""Blocks on a mesh: the same weights as alone on one device, and nothing crosses between them."""

import functools

import chex
import jax
import numpy as np
import pytest

from dbjax import block as block_lib
from dbjax import checkpoint
from dbjax import config as config_lib
from dbjax import data
from dbjax import hlo
from dbjax import schedule as schedule_lib
from dbjax import sharding
from dbjax import tasks
from dbjax import train
from dbjax.errors import UserError

STEPS = 20
EIGHT = {"num_blocks": 8, "model.num_layers": 8, "train.num_steps": STEPS, "train.batch_size": 16}
pytestmark = pytest.mark.usefixtures("steps_once")


def _states(config, workdir):
  states = {}
  for b in range(config.num_blocks):
    template = block_lib.abstract_state(config, tasks.make_task(config, b))
    with checkpoint.BlockCheckpoint(workdir, b) as saved:
      states[b] = saved.restore(template, saved.meta())
  return states


@pytest.fixture(scope="module")
def alone():
  """Each of eight blocks by `block.train_step` on one device, without a mesh: {block: state}."""
  from conftest import load_config

  small = {"model.width": 16, "model.num_heads": 2, "model.unroll": 1, "optimizer.warmup_steps": 2}
  config = config_lib.resolve(load_config(**small, **EIGHT))
  task, dataset = tasks.make_task(config, 0), data.load(config)
  schedule = schedule_lib.make_schedule(config.schedule, 8)
  step = jax.jit(functools.partial(block_lib.train_step, config, task))
  states = {}
  for b in range(8):
    state = block_lib.init(config, task, b)
    for n in range(STEPS):
      state, _ = step(state, dataset.batch(0, n, 16), np.int32(b), schedule.training_interval(b))
    states[b] = jax.device_get(state)
  return states


def _distance(a, b) -> float:
  """|a - b| / |b| over all weights."""
  norm = lambda t: np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(t)))
  return norm(jax.tree.map(np.subtract, a, b)) / norm(b)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 8, 1), (1, 1, 8)])
def test_every_mesh_gives_the_weights_of_one_device(tiny, tmp_path, alone, shape):
  block, batch, fsdp = shape
  config = config_lib.resolve(tiny(**EIGHT, **{
      "train.turn": "together", "checkpoint.every_steps": STEPS, "mesh.block": block,
      "mesh.data": batch, "mesh.fsdp": fsdp}))
  train.train(config, tmp_path / "mesh")
  together = _states(config, tmp_path / "mesh")
  for b in range(8):
    assert together[b].step == STEPS
    assert _distance(together[b].params, alone[b].params) < 1e-5
  if block == 8:  # a device has a whole block, and sums as one device that trains it in turn
    config = config_lib.resolve(tiny(**EIGHT, **{"checkpoint.every_steps": STEPS}))
    train.train(config, tmp_path / "turns", jax.devices()[:1])
    chex.assert_trees_all_equal(together, _states(config, tmp_path / "turns"))


def test_a_run_that_moves_from_mesh_to_mesh_equals_one_that_stayed(tiny, tmp_path):
  """8 devices, all blocks at once -> 1 device in turns -> 4 devices, two rows; saved in between."""
  fields = {"num_blocks": 2, "model.num_layers": 2, "train.num_steps": 9,
            "optimizer.schedule": "constant", "checkpoint.every_steps": 3}
  resolve = lambda **more: config_lib.resolve(tiny(**fields | more))
  stayed = resolve()
  train.train(stayed, tmp_path / "stayed", jax.devices()[:1])
  stages = [({"mesh.block": 2, "mesh.fsdp": 2, "mesh.data": 2}, 8, 3), ({"train.turn": "2"}, 1, 6),
            ({"mesh.block": 2}, 4, 9)]
  for mesh, devices, until in stages:
    config = resolve(**mesh)
    _train_until(config, tmp_path / "moved", jax.devices()[:devices], until)
  moved, reference = _states(stayed, tmp_path / "moved"), _states(stayed, tmp_path / "stayed")
  for b in range(2):
    assert moved[b].step == 9
    assert _distance(moved[b].params, reference[b].params) < 1e-5


def _train_until(config, workdir, devices, step):
  """Stops, as by a signal, when all blocks stand at `step`."""
  turns = train.turns

  def limited(config, groups, steps):
    for group, until in turns(config, groups, steps):
      if min(steps.values()) >= step:
        return
      if min(steps[b] for b in group) < step:
        yield group, min(until, step)

  train.turns = limited
  try:
    train.train(config, workdir, devices)
  finally:
    train.turns = turns


def test_blocks_that_stand_apart_are_trained_at_once(tiny, tmp_path):
  """Block 0 is ahead: it waits, unmoved, until block 1 is where it is. Bit-equal to alone."""
  fields = {"num_blocks": 2, "model.num_layers": 2}
  resolve = lambda **more: config_lib.resolve(tiny(**fields | more))
  one = jax.devices()[:1]
  train.train(resolve(), tmp_path / "alone", one)
  _train_until(resolve(**{"train.blocks": (0,)}), tmp_path / "apart", one, 4)
  train.train(resolve(**{"mesh.block": 2}), tmp_path / "apart", jax.devices()[:2])
  chex.assert_trees_all_equal(_states(resolve(), tmp_path / "apart"),
                              _states(resolve(), tmp_path / "alone"))


@pytest.mark.parametrize("shape", [(2, 2, 2), (4, 2, 1), (2, 1, 4)])
def test_no_collective_crosses_the_block_axis(tiny, shape):
  """Read from the compiled program; that the reader finds one that does: tests/test_hlo.py."""
  config = config_lib.resolve(tiny(**{
      "num_blocks": 4, "model.num_layers": 4, "mesh.block": shape[0], "mesh.data": shape[1],
      "mesh.fsdp": shape[2]}))
  mesh = sharding.make_mesh(config)
  compiled = sharding.compile_step(config, tasks.make_task(config, 0), mesh, shape[0])
  axes = {a for c in hlo.collectives(compiled.as_text()) for a in hlo.axes(c, mesh.shape)}
  assert axes == {name for name, size in mesh.shape.items() if size > 1} - {"block"}


def test_fsdp_moves_weights_not_activations(tiny):
  """A step of 64 images: any all-gather of activations would be far larger than a kernel."""
  config = config_lib.resolve(tiny(**{"mesh.fsdp": 8, "train.batch_size": 64}))
  mesh = sharding.make_mesh(config)
  compiled = sharding.compile_step(config, tasks.make_task(config, 0), mesh, 1)
  gathered = [c for c in hlo.collectives(compiled.as_text()) if c.kind == "all-gather"]
  kernel = 4 * 256 * 16  # the largest: of the noise embedding
  assert len(gathered) >= 10 and max(c.bytes for c in gathered) <= kernel
  shapes = block_lib.abstract_state(config, tasks.make_task(config, 0))
  state = sharding.templates(shapes, sharding.shardings(mesh, shapes))
  whole = sum(x.size * 4 for x in jax.tree.leaves(shapes))
  assert sharding.bytes_per_device(state) < whole / 3  # biases and labels are not split


def test_a_batch_is_spread_over_data_and_fsdp(tiny):
  config = config_lib.resolve(tiny(**{"train.batch_size": 16, "mesh.data": 4, "mesh.fsdp": 2}))
  mesh = sharding.make_mesh(config)
  rows = sharding.batch_rows(mesh, 16)
  np.testing.assert_array_equal(rows, np.arange(16))  # one process needs them all
  batch = sharding.put_batch(mesh, 16, rows, dict(image=rows[:, None] * 10))["image"]
  np.testing.assert_array_equal(batch[:, 0], np.arange(16) * 10)
  assert batch.addressable_shards[3].data.shape == (2, 1)
  dataset = data.load(config)
  whole = dataset.batch(0, 93, 16)  # across two epochs
  part = dataset.batch(0, 93, 16, np.array([2, 3, 10]))
  np.testing.assert_array_equal(part["image"], whole["image"][[2, 3, 10]])


def test_stack_and_unstack_are_inverse(tiny):
  config = config_lib.resolve(tiny(**{"num_blocks": 4, "model.num_layers": 4, "mesh.block": 2,
                                      "mesh.fsdp": 2}))
  mesh, group = sharding.make_mesh(config), (0, 1, 2, 3)
  stacked = sharding.init(config, tasks.make_task(config, 0), mesh, group)
  states = {b: sharding.unstack(mesh, group, stacked, b) for b in group}
  for b in group:
    expected = block_lib.init(config, tasks.make_task(config, b), b)
    chex.assert_trees_all_equal(jax.device_get(states[b]), jax.device_get(expected))
  again = sharding.stack(mesh, group, states)
  assert {x.sharding.memory_kind for x in jax.tree.leaves(again)} == {"pinned_host"}
  chex.assert_trees_all_equal(jax.device_get(again), jax.device_get(stacked))


@pytest.mark.parametrize("fields, message", [
    ({"mesh.block": 3, "num_blocks": 3}, "product is 8, the devices of this run"),
    ({"mesh.data": 3}, "mesh.data=3, mesh.fsdp=1: expected three numbers whose product is 8"),
    ({"mesh.block": 2}, "mesh.block=2: the blocks to train that have 1 layers are 0, 1, 2, which"),
    ({"train.batch_size": 12}, "train.batch_size=12 .* 12 examples do not divide among 8 devices"),
    ({"train.accumulate": 2}, "2 parts: 4 examples do not divide among 8 devices"),
    ({"mesh.fsdp": 8, "model.width": 12, "train.batch_size": 8}, "mesh.fsdp=8 does not divide"),
    ({"mesh.block": 2, "num_blocks": 2, "layers_per_block": (1, 2)}, "that have 1 layers are 0,"),
])
def test_a_mesh_that_does_not_fit_is_refused(tiny, tmp_path, fields, message):
  config = config_lib.resolve(tiny(**fields))
  with pytest.raises(UserError, match=message):
    train.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_uneven_blocks_are_grouped_by_depth(tiny):
  config = config_lib.resolve(tiny(**{
      "num_blocks": 4, "model.num_layers": 6, "layers_per_block": (1, 2, 1, 2)}))
  assert sharding.groups(config, 2) == [(0, 2), (1, 3)]
  assert sharding.groups(config, 1) == [(0,), (1,), (2,), (3,)]
