"""Programs for a mesh: what is compiled, and a group's state, stacked."""

import chex
import jax
import numpy as np
import pytest

from dbjax import block as block_lib
from dbjax import config as config_lib
from dbjax import hlo
from dbjax import program
from dbjax import sharding
from dbjax import task as task_lib
from dbjax.models import dense

pytestmark = pytest.mark.usefixtures("steps_once")


@pytest.mark.parametrize("shape", [
    (2, 2, 2), *(pytest.param(x, marks=pytest.mark.nightly) for x in [(4, 2, 1), (2, 1, 4)])])
def test_no_collective_crosses_the_block_axis(tiny, shape):
  """Read from the compiled program; that the reader finds one that does: tests/test_hlo.py."""
  config = config_lib.resolve(tiny(**{
      "num_blocks": 4, "model.num_layers": 4, "mesh.block": shape[0], "mesh.data": shape[1],
      "mesh.fsdp": shape[2]}))
  mesh = sharding.make_mesh(config)
  task, size = task_lib.make_task(config, 0), shape[0]
  axes_of = lambda compiled: {
      a for c in hlo.collectives(compiled.as_text()) for a in hlo.axes(c, mesh.shape)}
  expected = {name for name, size in mesh.shape.items() if size > 1} - {"block"}
  assert axes_of(program.compile_step(task, mesh, size)) == expected
  assert axes_of(program.compile_norms(task, mesh, size)) == expected


@pytest.mark.slow
def test_fsdp_moves_weights_not_activations(tiny):
  """A step of 64 images: any all-gather of activations would be far larger than a kernel."""
  config = config_lib.resolve(tiny(**{"mesh.fsdp": 8, "train.batch_size": 64}))
  mesh = sharding.make_mesh(config)
  task = task_lib.make_task(config, 0)
  compiled = program.compile_step(task, mesh, 1)
  gathered = [c for c in hlo.collectives(compiled.as_text()) if c.kind == "all-gather"]
  kernel = 4 * 256 * 16  # the largest: of the noise embedding
  assert len(gathered) >= 10 and max(c.bytes for c in gathered) <= kernel
  state = program.abstract_state(task, sharding.row(mesh, (0,), 0))
  whole = sum(x.size * 4 for x in jax.tree.leaves(state))
  assert sharding.bytes_per_device(state) < whole / 3  # biases and labels are not split


def test_the_gradient_of_an_embedding_on_a_mesh_is_numpys():
  """Of rows that come often; that TPUs gather nothing for it: tests/test_scale.py."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 4, 2), ("block", "data", "fsdp"),
                           axis_types=(jax.sharding.AxisType.Auto,) * 3)
  rng = np.random.default_rng(0)
  rows, weight = rng.integers(0, 10, (16, 8)), np.float32(rng.normal(size=(16, 8, 4)))
  embed = dense.Embed(10, 4)
  params = embed.init(jax.random.key(0), rows)

  def loss(params, rows, weight):
    return (weight * embed.apply(params, rows)).sum()

  with jax.set_mesh(mesh):
    spread = jax.sharding.NamedSharding(mesh, sharding.BATCH)
    found = jax.jit(jax.grad(loss))(params, *jax.device_put((rows, weight), spread))
  expected = np.zeros((10, 4), np.float32)
  np.add.at(expected, rows, weight)
  np.testing.assert_allclose(found["params"]["embedding"], expected, rtol=1e-5, atol=1e-5)


def test_stack_and_unstack_are_inverse(tiny):
  config = config_lib.resolve(tiny(**{"num_blocks": 4, "model.num_layers": 4, "mesh.block": 2,
                                      "mesh.fsdp": 2}))
  mesh, group = sharding.make_mesh(config), (0, 1, 2, 3)
  stacked = program.init(task_lib.make_task(config, 0), mesh, group)
  states = {b: program.unstack(mesh, group, stacked, b) for b in group}
  for b in group:
    expected = block_lib.init(task_lib.make_task(config, b), b)
    chex.assert_trees_all_equal(jax.device_get(states[b]), jax.device_get(expected))
  again = program.stack(mesh, group, states)
  assert {x.sharding.memory_kind for x in jax.tree.leaves(again)} == {"pinned_host"}
  chex.assert_trees_all_equal(jax.device_get(again), jax.device_get(stacked))
