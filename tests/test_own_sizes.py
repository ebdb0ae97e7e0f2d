"""Blocks of their own width, length of training, learning rate and batch size."""

import types

import chex
from conftest import load_config
from conftest import states_of
import jax
import numpy as np
import pytest

from dbjax import config as config_lib
from dbjax import data
from dbjax import loading
from dbjax import loop
from dbjax import plan
from dbjax import sharding
from dbjax import solvers
from dbjax import task as task_lib
from dbjax.errors import UserError

pytestmark = pytest.mark.usefixtures("steps_once")

OWN = {"model.width": (16, 16, 8), "train.num_steps": (2, 2, 3), "train.batch_size": (8, 8, 4),
       "optimizer.learning_rate": (1e-3, 1e-3, 2e-3)}


def resolved(tiny, **fields):
  return config_lib.resolve(tiny(**fields))


@pytest.mark.slow
def test_a_block_is_the_block_of_a_run_in_which_all_are_as_it_is(tiny, tmp_path):
  """Bit-equal, resumed from step 1 too; and what they make together is Euler's by each in turn."""
  config, device = resolved(tiny, **OWN, **{"train.turn": "1"}), jax.devices()[:1]
  loop.train(config, tmp_path / "own", devices=device)
  own = states_of(config, tmp_path / "own")
  for b in (0, 2):
    alone = resolved(tiny, **{name: values[b] for name, values in OWN.items()},
                     **{"train.blocks": (b,)})
    loop.train(alone, tmp_path / f"{b}", devices=device)
    chex.assert_trees_all_equal(own[b], states_of(alone, tmp_path / f"{b}", (b,))[b])

  model = loading.load(tmp_path / "own")
  assert model.steps == (2, 2, 3)
  options = model.options(dict(num_steps=12))
  z, label = model.start(0, np.arange(2)), np.arange(2)
  sigmas = model.schedule.karras_grid(12)
  assert set(model.schedule.block_of(sigmas)) == {0, 1, 2}
  np.testing.assert_allclose(
      model.solve(z, options, label), solvers.euler(model.denoiser(label), z, sigmas), atol=1e-5)


def test_blocks_that_differ_are_not_stacked(tiny):
  config = resolved(tiny, num_blocks=4, **{
      "model.num_layers": 4, "model.width": (16, 8, 16, 8), "train.num_steps": 2})
  assert sharding.groups(config, 2) == [(0, 2), (1, 3)]
  assert [*task_lib.kinds(config).values()] == [0, 1]
  with pytest.raises(UserError, match="that have 1 layers and the same model.width are 0, .*mesh"):
    sharding.groups(config_lib.changed(config, **{"model.width": (16, 8, 8, 8)}), 2)


@pytest.mark.slow
def test_the_plan_is_that_of_the_largest(tiny):
  devices, fields = jax.devices()[:1], {"mesh.data": 1}
  total = lambda **own: plan.make_plan(resolved(tiny, **fields, **own), devices).total
  assert total(**{"model.width": (8, 32, 16)}) == total(**{"model.width": 32})


def test_as_one_block_the_largest_of_a_list_counts(tiny):
  config = resolved(tiny, **OWN)
  for whole in (plan.end_to_end(config), config_lib.as_one_block(config)):
    assert (whole.num_blocks, whole.layers_per_block) == (1, (3,))
    assert (whole.model.width, whole.train.num_steps, whole.train.batch_size) == (16, 3, 8)
  assert len(data.show(config, block=2)["y"]) == 4


def test_as_one_block_the_network_is_that_of_one_block(tiny):
  """The largest of each would be none: 16 is no multiple of 6."""
  whole = config_lib.as_one_block(resolved(tiny, **{
      "model.width": (12, 16, 16), "model.num_heads": (6, 2, 4)}))
  assert (whole.model.width, whole.model.num_heads) == (16, 4)


def test_every_size_of_a_group_is_planned(tiny, monkeypatch):
  """Two blocks of two layers at once need more than one block of three."""
  asked = []

  def fake(config, mesh, task, size):
    asked.append((task.network.num_layers, size))
    return types.SimpleNamespace(total=task.network.num_layers * size)

  monkeypatch.setattr(plan, "_plan", fake)
  config = resolved(tiny, **{"model.num_layers": 7, "layers_per_block": (3, 2, 2),
                             "train.turn": "together", "mesh.data": 1})
  assert plan.make_plan(config, jax.devices()[:1]).total == 4
  assert sorted(asked) == [(2, 2), (3, 1)]


def test_as_one_block_the_schedule_is_that_of_the_longest(tiny):
  """The largest of each would be none."""
  for steps, (decay, warmup) in (((10, 20, 10), (1, 19)), (10, (9, 0))):
    whole = config_lib.as_one_block(resolved(tiny, **{
        "train.num_steps": steps, "optimizer.schedule": "wsd",
        "optimizer.decay_steps": (9, 1, 1), "optimizer.warmup_steps": (0, 19, 0) if decay == 1
        else (0, 9, 0)}))
    assert (whole.optimizer.decay_steps, whole.optimizer.warmup_steps) == (decay, warmup)


def test_a_plain_network_takes_no_lists():
  with pytest.raises(UserError, match="model.width=64,32,32: expected one value, or one for each "
                                      "of num_blocks=1"):
    config_lib.resolve(load_config("digits_classify", **{
        "task.end_to_end": True, "num_blocks": 3, "model.width": (64, 32, 32)}))


@pytest.mark.parametrize("given", ["16,16,8", "(16, 16, 8)", [16, 16, 8], np.array([16, 16, 8])])
def test_a_list_may_be_written_in_many_ways(tiny, given):
  assert resolved(tiny, **{"model.width": given}).model.width == (16, 16, 8)


def test_a_list_of_one_value_is_that_value(tiny):
  one = resolved(tiny, **{"train.num_steps": (3, 3, 3)})
  assert one.train.num_steps == 3 and task_lib.of_block(one, 1) is one


@pytest.mark.parametrize("fields, message", [
    ({"model.width": (16, 8)},
     "model.width=16,8: expected one value, or one for each of num_blocks=3"),
    ({"model.width": (16, 8, 0)}, "model.width=0: expected a whole number, above 0"),
    ({"model.width": (16, 8, 10)}, "model.width=10: must be a multiple of 4"),
    ({"train.batch_size": (8, 8, 3), "train.accumulate": 2}, "train.batch_size=3 is not a mult"),
    ({"train.num_steps": "5,x,3"}, "train.num_steps=x: expected a whole number"),
    ({"seed": (1, 2, 3)}, "seed=.*expected a whole number"),
    ({"model.width": ((16, 8), (16, 8), (16, 8))}, r"model.width=\(16, 8\): expected a whole num"),
    ({"model.num_layers": (1, 1, 1)}, "model.num_layers=.*expected a whole number")])
def test_what_is_no_list_of_sizes_is_refused(tiny, fields, message):
  with pytest.raises(UserError, match=message):
    resolved(tiny, **fields)
