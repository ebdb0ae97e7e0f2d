"""Blocks on a mesh: the same weights as alone on one device, and nothing crosses between them."""

import functools

import chex
from conftest import distance
from conftest import load_config
from conftest import states_of
import jax
import numpy as np
import pytest

from dbjax import block as block_lib
from dbjax import config as config_lib
from dbjax import data
from dbjax import loop
from dbjax import sharding
from dbjax import task as task_lib
from dbjax.errors import UserError

STEPS = 20
EIGHT = {"num_blocks": 8, "model.num_layers": 8, "train.num_steps": STEPS, "train.batch_size": 16}
pytestmark = pytest.mark.usefixtures("steps_once")


@pytest.fixture(scope="module")
def alone():
  """Each of eight blocks by `block.train_step` on one device, without a mesh: {block: state}."""
  small = {"model.width": 16, "model.num_heads": 2, "model.unroll": 1, "optimizer.warmup_steps": 2}
  config = config_lib.resolve(load_config(**small, **EIGHT))
  task, dataset = task_lib.make_task(config, 0), data.load(config)
  schedule = task.make_schedule(config)
  step = jax.jit(functools.partial(block_lib.train_step, task))
  states = {}
  for b in range(8):
    state = block_lib.init(task, b)
    for n in range(STEPS):
      state, _ = step(state, dataset.batch(0, n, 16), np.int32(b), schedule.training_interval(b))
    states[b] = jax.device_get(state)
  return states


def _states(config, workdir):
  return states_of(config, workdir, range(config.num_blocks))


@pytest.mark.parametrize("shape", [
    (8, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow),
    *(pytest.param(x, marks=pytest.mark.nightly) for x in [(2, 4, 1), (1, 8, 1), (1, 1, 8)])])
def test_every_mesh_gives_the_weights_of_one_device(tiny, tmp_path, alone, shape):
  block, batch, fsdp = shape
  config = config_lib.resolve(tiny(**EIGHT, **{
      "train.turn": "together", "checkpoint.every_steps": STEPS, "mesh.block": block,
      "mesh.data": batch, "mesh.fsdp": fsdp}))
  loop.train(config, tmp_path / "mesh")
  together = _states(config, tmp_path / "mesh")
  for b in range(8):
    assert together[b].step == STEPS
    assert distance(together[b].params, alone[b].params) < 1e-5
  if block == 8:  # a device has a whole block, and sums as one device that trains it in turn
    config = config_lib.resolve(tiny(**EIGHT, **{"checkpoint.every_steps": STEPS}))
    loop.train(config, tmp_path / "turns", devices=jax.devices()[:1])
    chex.assert_trees_all_equal(together, _states(config, tmp_path / "turns"))


@pytest.mark.slow
def test_a_run_that_moves_from_mesh_to_mesh_equals_one_that_stayed(tiny, tmp_path):
  """8 devices, all blocks at once -> 1 device in turns -> 4 devices, two rows; saved in between."""
  fields = {"num_blocks": 2, "model.num_layers": 2, "train.num_steps": 9,
            "optimizer.schedule": "constant", "checkpoint.every_steps": 3}
  resolve = lambda **more: config_lib.resolve(tiny(**fields | more))
  stayed = resolve()
  loop.train(stayed, tmp_path / "stayed", devices=jax.devices()[:1])
  stages = [({"mesh.block": 2, "mesh.fsdp": 2, "mesh.data": 2}, 8, 3), ({"train.turn": "2"}, 1, 6),
            ({"mesh.block": 2}, 4, 9)]
  for mesh, devices, until in stages:
    config = resolve(**mesh)
    _train_until(config, tmp_path / "moved", jax.devices()[:devices], until)
  moved, reference = _states(stayed, tmp_path / "moved"), _states(stayed, tmp_path / "stayed")
  for b in range(2):
    assert moved[b].step == 9
    assert distance(moved[b].params, reference[b].params) < 1e-5


def _train_until(config, workdir, devices, step):
  """Stops, as by a signal, when all blocks stand at `step`."""
  turns = loop.turns

  def limited(config, groups, steps):
    for group, until in turns(config, groups, steps):
      if min(steps.values()) >= step:
        return
      if min(steps[b] for b in group) < step:
        yield group, min(until, step)

  loop.turns = limited
  try:
    loop.train(config, workdir, devices=devices)
  finally:
    loop.turns = turns


@pytest.mark.slow
def test_blocks_that_stand_apart_are_trained_at_once(tiny, tmp_path):
  """Block 0 is ahead: it waits, unmoved, until block 1 is where it is. Bit-equal to alone."""
  fields = {"num_blocks": 2, "model.num_layers": 2}
  resolve = lambda **more: config_lib.resolve(tiny(**fields | more))
  one = jax.devices()[:1]
  loop.train(resolve(), tmp_path / "alone", devices=one)
  _train_until(resolve(**{"train.blocks": (0,)}), tmp_path / "apart", one, 4)
  loop.train(resolve(**{"mesh.block": 2}), tmp_path / "apart", devices=jax.devices()[:2])
  chex.assert_trees_all_equal(_states(resolve(), tmp_path / "apart"),
                              _states(resolve(), tmp_path / "alone"))


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
    loop.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_uneven_blocks_are_grouped_by_depth(tiny):
  config = config_lib.resolve(tiny(**{
      "num_blocks": 4, "model.num_layers": 6, "layers_per_block": (1, 2, 1, 2)}))
  assert sharding.groups(config, 2) == [(0, 2), (1, 3)]
  assert sharding.groups(config, 1) == [(0,), (1,), (2,), (3,)]
