"""The roofline: compiled programs against operations and bytes counted by hand."""

import json
import os
import subprocess
import sys

from conftest import ROOT
import jax
import pytest

from dbjax import block as block_lib
from dbjax import config as config_lib
from dbjax import operations
from dbjax import plan
from dbjax import task as task_lib
from dbjax.bench import roofline
from dbjax.errors import UserError

CHIP = roofline.Chip(flops=1e12, bandwidth=1e9)


@pytest.fixture(scope="module")
def step():
  """(task, text of its compiled gradient) of a DiT of three layers, batch 8, 16 tokens."""
  config = config_lib.resolve(config_lib.read("digits", {
      "num_blocks": 1, "model.num_layers": 3, "model.width": 32, "model.num_heads": 2,
      "model.unroll": 1, "train.batch_size": 8}))
  task = task_lib.make_task(config, 0)
  interval = task.make_schedule(config).training_interval(0)
  drawn = jax.eval_shape(lambda batch: task.draw(jax.random.key(0), batch, interval),
                         task.abstract_batch(8))
  params = block_lib.abstract_state(task).params
  return task, jax.jit(jax.grad(task.loss)).lower(params, drawn).compile().as_text()


def test_products_are_those_of_the_traced_step(step):
  """By the operations of its jaxpr, which knows nothing of HLO; the rest of a step has none."""
  task, text = step
  found = roofline.costs(text, CHIP)
  assert sum(c.flops for c in found) == pytest.approx(plan.matmul_flops(task), rel=0.01)


def test_products_of_attention_are_those_by_hand(step):
  _, text = step
  rows = {row["kind"]: row for row in roofline.by_kind(roofline.costs(text, CHIP))}
  n, heads, t, d, layers = 8, 2, 16, 16, 3
  forward = 2 * 2 * n * heads * t * t * d
  assert rows["products of attention"]["GFLOP"] == pytest.approx(3 * layers * forward / 1e9)
  assert {"products of layers", "products of ends", "softmax", "elementwise"} <= rows.keys()
  assert sum(row["share"] for row in rows.values()) == pytest.approx(1)


def test_the_larger_of_both_is_the_bound():
  """At 10^12 operations and 10^9 bytes a second: 2 ms of products, 1 ms of bytes; and 4 ms."""
  rows = roofline.by_kind([
      roofline.Cost("a", "kept", 2e9, 1e6, compute=2, memory=1),
      roofline.Cost("b", "kept", 0, 4e6, compute=0, memory=4),
      roofline.Cost("c", "copies", 1e9, 2e6, compute=1, memory=2)])
  assert rows == [
      {"kind": "kept", "GFLOP": 2, "MB": 5, "bound ms": 6, "share": 0.75, "memory-bound ms": 4,
       "beyond compute ms": 4},
      {"kind": "copies", "GFLOP": 1, "MB": 2, "bound ms": 2, "share": 0.25, "memory-bound ms": 2,
       "beyond compute ms": 1}]


@pytest.mark.parametrize("opcode, parts, expected", [
    ("fusion", [("exponential", "jit(f)/jvp(DiT)/stack/attention/vmap()/exp")], "softmax"),
    ("fusion", [("add", "jit(f)/jvp(DiT)/stack/attention/qkv/add")], "elementwise"),
    ("fusion", [("tanh", "jit(f)/transpose(jvp(DiT))/stack/mlp/tanh")], "elementwise"),
    ("fusion", [("tanh", "jit(f)/jvp(DiT)/stack/mlp/tanh"),
                ("dynamic-update-slice", "jit(f)/jvp(DiT)/while/dynamic_update_slice")], "kept"),
    ("copy-start", [("copy-start", "")], "prefetch"), ("copy", [("copy", "")], "copies"),
    ("fusion", [("convert", ""), ("slice", "jit(f)/jvp(DiT)/slice")], "copies"),
    ("fusion", [("xor", "jit(f)/jit(_threefry_split)/xor")], "noise"),
    ("fusion", [("multiply", "jit(f)/mul"), ("sqrt", "jit(f)/sqrt")], "update")])
def test_kinds(opcode, parts, expected):
  assert roofline.kind(operations.Operation("x", opcode, tuple(parts), (), 8, 1)) == expected


@pytest.mark.parametrize("argument, message", [
    ("--topology=v9:1x1", "expected a chip whose peaks are known: v5e, v5p, v6e"),
    ("--topology=cpu:1", "expected a chip whose peaks are known")])
def test_other_chips_are_refused(argument, message):
  with pytest.raises(UserError, match=message):
    roofline.main([argument])


@pytest.mark.slow
def test_the_step_of_a_tpu_computes_what_was_traced():
  """And what XLA counts, which sees loops once, and counts what is not a product too."""
  script = """
import json
from dbjax import config, operations, plan, program, sharding, task
c = config.resolve(config.read("imagenet64", {
    "num_blocks": 1, "model.name": "", "model.num_layers": 4, "model.width": 512,
    "model.num_heads": 8, "model.patch_size": 4, "train.batch_size": 16}))
step, mesh = task.make_task(c, 0), sharding.make_mesh(c, plan.find_devices("v5e:1x1"))
compiled = program.compile_step(step, mesh, 1)
ops = operations.read(compiled.as_text())
flops = lambda op: sum(n for _, n in op.products)
print(json.dumps([sum(op.count * flops(op) for op in ops), plan.matmul_flops(step),
                  sum(map(flops, ops)), compiled.cost_analysis()["flops"]]))
"""
  done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True,
                        check=False, env=dict(os.environ))
  assert done.returncode == 0, done.stderr[-2000:]
  found, traced, once, xla = json.loads(done.stdout.splitlines()[-1])
  assert found == pytest.approx(traced, rel=0.01)
  assert 0.9 * xla < once < xla
