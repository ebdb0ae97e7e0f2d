"""What chips send: compiled programs against parameters counted by hand."""

import os
import subprocess
import sys

from conftest import ROOT
import jax
import pytest

from dbjax import block as block_lib
from dbjax import config as config_lib
from dbjax import sharding
from dbjax import task as task_lib
from dbjax.bench import scale

pytestmark = pytest.mark.usefixtures("steps_once")


def sizes(config):
  """{path: number} of the parameters of a block."""
  params = block_lib.abstract_state(task_lib.make_task(config, 0)).params
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {jax.tree_util.keystr(path): x.size for path, x in leaves}


@pytest.mark.slow
@pytest.mark.parametrize("num_blocks", [1, 2])
def test_data_parallel_rows_send_their_gradients_twice_round_a_ring(tiny, num_blocks):
  """Float32, on 8 / B devices a row: what is compiled, and the formula."""
  config = config_lib.resolve(tiny(**{
      "num_blocks": num_blocks, "model.num_layers": 4, "mesh.block": num_blocks}))
  k, found = 8 // num_blocks, scale.measure(config, jax.devices())
  by_hand = 2 * 4 * sum(sizes(config).values()) * (k - 1) / k / 1e6
  assert found["formula"] == pytest.approx(by_hand)
  assert found["MB"] == pytest.approx(by_hand, rel=0.02)  # and the loss
  assert found["ratio"] == pytest.approx(found["MB"] / by_hand)
  assert found["across blocks"] == 0


@pytest.mark.parametrize("remat, gathers", [(False, 1), (True, 2)])
def test_the_formula_of_fsdp_is_that_by_hand(tiny, remat, gathers):
  config = config_lib.resolve(tiny(**{
      "num_blocks": 1, "mesh.data": 2, "mesh.fsdp": 4, "model.remat": remat}))
  mesh, task = sharding.make_mesh(config), task_lib.make_task(config, 0)
  split = sum(n for path, n in sizes(config).items() if "kernel" in path)
  whole = sum(sizes(config).values()) - split
  expected = 4 * ((gathers + 1) * split * 3 / 4 + 2 * split / 4 / 2 + 2 * whole * 7 / 8)
  assert scale.formula(task, mesh) == pytest.approx(expected)


@pytest.mark.parametrize("model", scale.MODELS)
@pytest.mark.parametrize("chips", [4, 1024])
def test_all_schemes_do_the_same_work_on_every_chip(model, chips):
  for scheme in scale.SCHEMES:
    config = scale.make_config(model, scheme, chips)
    shape = sharding.mesh_shape(config, chips)
    sharding.check(config, shape)
    layers = sum(config.layers_per_block) / shape["block"]
    examples = config.train.batch_size / (shape["data"] * shape["fsdp"])
    assert layers * examples == scale.BATCH * config.model.num_layers
    assert (shape["block"] > 1) == scheme.blocks
    assert (shape["fsdp"] > 1) == (scheme.fsdp and chips > shape["block"])


def on_tpu(script):
  """The last line that a script prints which compiles for TPU."""
  done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True,
                        check=False, env=dict(os.environ))
  assert done.returncode == 0, done.stderr[-2000:]
  return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_fsdp_on_tpu_scatters_gradients():
  """Sums that every chip had whole would send half as much again as the formula says."""
  ratio = on_tpu("""
from dbjax import config, plan
from dbjax.bench import scale
c = config.resolve(config.read("imagenet64", {
    "num_blocks": 1, "model.name": "", "model.num_layers": 4, "model.width": 512,
    "model.num_heads": 8, "model.patch_size": 4, "mesh.fsdp": 8, "train.batch_size": 64}))
print(scale.measure(c, plan.find_devices("v5e:2x4"))["ratio"])
""")
  assert 0.9 < float(ratio) < 1.3


@pytest.mark.slow
def test_data_parallel_text_on_tpu_gathers_nothing():
  """As the gradients of all tokens of all chips would be, for the embedding's."""
  kinds = on_tpu("""
from dbjax import config, hlo, plan, program, sharding, task
c = config.resolve(config.read("lm1b", {
    "data.tokenizer": "sentencepiece-00000000", "model.num_layers": 4, "model.width": 128,
    "model.num_heads": 2, "model.embedding_width": 128, "model.unroll": 1, "train.batch_size": 32,
    "data.length": 64, "mesh.block": 4}))
mesh = sharding.make_mesh(c, plan.find_devices("v5e:4x4"))
text = program.compile_step(task.make_task(c, 0), mesh, 4).as_text()
print(*sorted({op.kind for op in hlo.collectives(text)}))
""")
  assert kinds == "all-reduce"
