"""The planner, against what a run really holds."""

import importlib.util
import json
import os
import re
import subprocess
import sys

from conftest import load_config
from conftest import ROOT
import jax
import numpy as np
import pytest

from dbjax import config as config_lib
from dbjax import loop
from dbjax import plan
from dbjax import sharding
from dbjax import task as task_lib
from dbjax.errors import UserError


@pytest.mark.slow
def test_the_plan_agrees_with_live_buffers(tiny, tmp_path, monkeypatch):
  """Of the fullest device while training on a mesh, within 5%."""
  config = config_lib.resolve(tiny(**{
      "mesh.data": 4, "mesh.fsdp": 2, "model.width": 64, "train.num_steps": 3,
      "checkpoint.every_steps": 3, "train.batch_size": 64}))
  planned = plan.make_plan(config, jax.devices())
  before = {id(x) for x in jax.live_arrays()}
  held, add = [], loop.metrics.Progress.add

  def measure(self, *args):
    live = [x for x in jax.live_arrays()
            if id(x) not in before and x.sharding.memory_kind == "device"]
    held.append(max(sum(s.data.nbytes for x in live for s in x.addressable_shards
                        if s.device == d) for d in jax.devices()))
    add(self, *args)

  monkeypatch.setattr(loop.metrics.Progress, "add", measure)
  loop.train(config, tmp_path)
  assert abs(np.median(held) / (planned.parameters + planned.optimizer) - 1) < 0.05


def test_matmul_flops_are_those_counted_by_hand(tiny):
  """Three products (forward, and for each operand backward) of every kernel and of attention."""
  config = config_lib.resolve(tiny(num_blocks=1))
  task = task_lib.make_task(config, 0)
  n, t, d, layers, heads = 8, 16, 16, 3, 2
  per_layer = n * t * (3 * d * d + d * d + 2 * 4 * d * d) + n * 6 * d * d  # kernels
  attention = 2 * n * heads * t * t * (d // heads)
  rest = n * t * (4 * d + d * 4) + n * (256 * d + d * d + 2 * d * d)
  forward = 2 * (layers * (per_layer + attention) + rest)
  inputs = 2 * n * t * 4 * d + 2 * n * 256 * d  # z and c_noise need no gradient
  assert plan.matmul_flops(task) == 3 * forward - inputs


@pytest.mark.slow
def test_a_first_moment_in_bfloat16_saves_two_bytes_a_parameter(tiny):
  full, halved = [plan.make_plan(config_lib.resolve(tiny(**{
      "optimizer.moments_dtype": dtype})), jax.devices()[:1]) for dtype in ("float32", "bfloat16")]
  assert full.parameters == halved.parameters == full.gradients
  assert full.optimizer - halved.optimizer == 2 * (full.parameters // 4)
  assert halved.total < full.total


@pytest.mark.nightly
def test_blocks_that_learn_one_table_are_planned_together():
  """All are on the device at once, each with a copy of the table."""
  small = {"model.num_layers": 3, "model.width": 16, "model.num_heads": 2,
           "model.embedding_width": 16, "model.unroll": 1, "train.batch_size": 8}
  shared = {"task.shared_embeddings": True, "train.turn": "together"}
  frozen, learned = [plan.make_plan(config_lib.resolve(load_config("digits_classify", **c)),
                                    jax.devices()) for c in (small, small | shared)]
  assert learned.parameters == 3 * (frozen.parameters + 4 * 10 * 16)
  assert learned.matmul_flops > 3 * frozen.matmul_flops > 0  # the table's gradient
  assert (frozen.table, learned.table) == (4 * 10 * 16, 0)


@pytest.mark.slow
def test_what_a_block_of_text_has_of_its_own():
  """By hand, four times: the parameters, AdamW's two moments, and the EMA."""
  v, d, e = 1000, 16, 8
  config = config_lib.resolve(load_config("kjv", **{
      "model.width": d, "model.num_heads": 2, "model.embedding_width": e, "model.unroll": 1,
      "train.batch_size": 8, "data.length": 16}))
  block, plain = (plan.make_plan(c, jax.devices()[:1]) for c in (config, plan.end_to_end(config)))
  assert (block.num_blocks, block.end_to_end) == (2, False)
  assert (plain.num_blocks, plain.end_to_end) == (1, True)
  near = lambda x: pytest.approx(x, rel=1e-4)  # the count of steps is state too
  assert block.head == near(4 * 4 * (d * v + v)) and plain.head == near(block.head)
  tokens = 4 * 4 * (v + 1) * d
  assert plain.embedding == near(tokens)
  assert block.embedding == near(tokens + 4 * 4 * (e * d + d))
  assert (plain.table, block.table) == (0, 4 * v * e)
  assert block.own > block.embedding + block.head
  parts = ("parameters", "optimizer", "gradients", "activations", "table")
  assert block.total == sum(getattr(block, part) for part in parts)


@pytest.mark.parametrize("batch_size", [8, (8, 4, 4)])
def test_the_largest_batch_is_found(tiny, batch_size):
  """Against memory that is 1000 + 7 a batch in steps of two devices; it is one for all blocks."""
  config = config_lib.resolve(tiny(**{"mesh.data": 2, "train.batch_size": batch_size}))

  def fake(c):
    total = 1000 + 7 * c.train.batch_size
    return plan.Plan(3, False, False, dict(block=1, data=2, fsdp=1), c.train.batch_size, 400, 480,
                     100, total - 1000, 20, total, 0, 0, 0, 0.0, total <= 5000, None)

  assert plan.largest_batch(config, fake, 5000) == 570


def test_the_mesh_has_most_blocks_side_by_side_then_no_remat_then_least_fsdp(tiny):
  config = config_lib.resolve(tiny(**{"num_blocks": 4, "model.num_layers": 4}))

  def fake(c):
    shape = sharding.mesh_shape(c, 8)
    state, activations = 1200 // shape["fsdp"], 100 if c.model.remat else 300
    total = state + activations
    return plan.Plan(4, False, c.model.remat, shape, 8, state, 0, 0, activations, 0, total, 0, 0,
                     0, 0.0, total <= fake.limit, None)

  for limit, expected in [(2000, (4, False, 1)), (1000, (4, False, 2)), (720, (4, True, 2)),
                          (450, (2, True, 4)), (100, None)]:
    fake.limit = limit
    chosen = plan.choose_mesh(config, fake, 8, limit)
    found = chosen and (chosen.mesh.block, chosen.model.remat, chosen.mesh.fsdp)
    assert found == expected, limit


@pytest.mark.slow  # test_readme.py runs a shorter one
def test_the_command_plans_for_cpu_devices(command, tmp_path):
  done = command("plan", "--config=configs/digits.py", "--topology=cpu:3", "--nolargest",
                 "--config.train.batch_size=24", "--config.model.unroll=1",
                 "--config.model.width=16", "--config.model.num_heads=2",
                 f"--json={tmp_path / 'plan.json'}")
  assert done.returncode == 0, done.stderr
  result = json.loads((tmp_path / "plan.json").read_text())
  assert [(p["num_blocks"], p["remat"]) for p in result["plans"]] == [
      (1, False), (1, True), (3, False), (3, True)]
  assert result["chosen"]["mesh"] == {"block": 3, "data": 1, "fsdp": 1}
  assert "traffic of B = 3, remat no: " in done.stdout and "along data" in done.stdout


@pytest.mark.parametrize("topology, message", [
    ("cpu:many", "--topology=cpu:many: expected a number of devices"),
    ("cpu:5", "do not divide among 5 devices"),
    ("v5e:2x2", "pip install 'dbjax\\[tpu\\]'" if importlib.util.find_spec("libtpu") is None
     else "do not divide"),
])
def test_a_wrong_topology_is_one_line(forked, topology, message):
  done = forked("plan", "--config=configs/digits.py", f"--topology={topology}",
                "--config.train.batch_size=63")
  assert done.returncode == 2
  errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
  assert len(errors) == 1 and re.search(message, errors[0])


def test_a_topology_of_no_name_is_refused():
  with pytest.raises(UserError, match="^--topology=: expected a slice of TPUs, .* leave it out"):
    plan.find_devices("")


@pytest.mark.parametrize("topology", [pytest.param("v5e:16x16", marks=pytest.mark.slow),
                                      pytest.param("v6e:16x16", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("fields", [[], [
    "--config.model.name=DiT-XL/2", "--config.data.image_size=32", "--config.data.channels=4"]],
    ids=["imagenet64", "DiT-XL/2"])
def test_no_collective_crosses_blocks_on_a_pod(topology, fields):
  """ImageNet at 64 x 64, and DiT-XL/2 of 28 layers, B = 4: from the HLO that libtpu makes."""
  script = """
import sys
from dbjax import config, hlo, plan, program, sharding, task
topology, block, data, fsdp, *rest = sys.argv[1:]
fields = dict(field.removeprefix("--config.").split("=") for field in rest)
c = config.resolve(config.read("imagenet64", {
    **fields, "mesh.block": block, "mesh.data": data, "mesh.fsdp": fsdp}))
mesh = sharding.make_mesh(c, plan.find_devices(topology))
text = program.compile_step(task.make_task(c, 0), mesh, int(block)).as_text()
print(sorted({a for op in hlo.collectives(text) for a in hlo.axes(op, mesh.shape)}))
"""
  done = subprocess.run([sys.executable, "-c", script, topology, "4", "16", "4", *fields],
                        cwd=ROOT, capture_output=True, text=True, check=False, env=dict(os.environ))
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.splitlines()[-1] == "['data', 'fsdp']"


@pytest.mark.slow
def test_blocks_fit_where_the_whole_network_does_not(command, tmp_path):
  """The README's table: DiT-L/2, 256 tokens, batch 32, one v5e chip. Memory falls by B."""
  done = command("plan", "--config=configs/imagenet64.py", "--topology=v5e:1x1", "--nolargest",
                 "--config.model.name=DiT-L/2", "--config.num_blocks=3",
                 "--config.data.image_size=32", "--config.data.channels=4",
                 "--config.train.batch_size=32", f"--json={tmp_path / 'plan.json'}")
  assert done.returncode == 0, done.stderr
  plans = {(p["num_blocks"], p["remat"]): p
           for p in json.loads((tmp_path / "plan.json").read_text())["plans"]}
  assert {key: p["fits"] for key, p in plans.items()} == {
      (1, False): False, (1, True): True, (3, False): True, (3, True): True}
  block, whole = plans[3, True], plans[1, True]
  assert block["total"] - block["own"] <= 1.08 / 3 * whole["total"]
