"""Attention's kernels, against attention under a dense mask, written out."""

import functools
import os
import subprocess
import sys

from conftest import random_params
from conftest import ROOT
from conftest import small_config
from conftest import synthetic_batch
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dbjax import config as config_lib
from dbjax import program
from dbjax import sharding
from dbjax import task as task_lib
from dbjax.errors import UserError
from dbjax.models import attention

HEADS, SIZE = 2, 16
rng = np.random.default_rng(0)


def segments(length):
  """Two texts in the first row, one in the second."""
  return np.array([[3] * (length // 3) + [4] * (length - length // 3), [7] * length])


def written_out(q, k, v, mask):
  """softmax(q k' / sqrt(d)) v in float64, where mask (N, L, M) says who is seen."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  scores = np.einsum("nqhd,nkhd->nhqk", q, k) / np.sqrt(q.shape[-1])
  weights = np.where(mask[:, None], np.exp(scores), 0)
  return np.einsum("nhqk,nkhd->nqhd", weights / weights.sum(-1, keepdims=True), v)


def seen(length, segment, causal):
  mask = np.ones((2, length, length), bool)
  if segment is not None:
    mask &= segment[:, :, None] == segment[:, None]
  return mask & np.tri(length, dtype=bool) if causal else mask


def arrays(count, length):
  return [np.float32(rng.normal(size=(2, length, HEADS, SIZE))) for _ in range(count)]


@pytest.mark.parametrize("kernel", ["xla", "splash"])
@pytest.mark.parametrize("length, packed, causal", [
    (128, False, False), (70, False, False), (150, True, False), (150, True, True),
    (7, False, True)])
def test_attention_is_what_it_says(kernel, length, packed, causal):
  """Splash takes 128 positions at a time: others are made up, and seen by nobody."""
  q, k, v = arrays(3, length)
  segment = segments(length) if packed else None
  ours = attention.attend(q, k, v, kernel=kernel, segment=segment, causal=causal)
  expected = written_out(q, k, v, seen(length, segment, causal))
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel", ["xla", "splash"])
@pytest.mark.parametrize("length", [20, 260])
def test_attention_to_others_is_attention_under_the_dense_mask(kernel, length):
  """Keys and values of others before, then one's own: L x 2L scores of which most are masked."""
  q, k, v, others_k, others_v = arrays(5, length)
  segment = segments(length)
  ours = attention.attend_to_others(q, k, v, others_k, others_v, segment=segment, kernel=kernel)
  itself = np.eye(length, dtype=bool)
  mask = np.concatenate([seen(length, segment, True) & ~itself, np.stack([itself] * 2)], axis=2)
  expected = written_out(q, np.concatenate([others_k, k], 1), np.concatenate([others_v, v], 1),
                         mask)
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel", ["xla", "splash"])
def test_gradients_are_the_slopes(kernel):
  """Along a random direction, against differences of the sum that is written out."""
  length, at = 40, 1e-3
  inputs, ways = arrays(5, length), arrays(5, length)
  weight, segment = arrays(1, length)[0], segments(length)
  itself = np.eye(length, dtype=bool)
  mask = np.concatenate([seen(length, segment, True) & ~itself, np.stack([itself] * 2)], axis=2)

  def total(q, k, v, others_k, others_v):
    return (weight * written_out(q, np.concatenate([others_k, k], 1),
                                 np.concatenate([others_v, v], 1), mask)).sum()

  attend = functools.partial(attention.attend_to_others, segment=segment, kernel=kernel, remat=True)
  grads = jax.grad(lambda x: jnp.sum(weight * attend(*x)))(inputs)
  for i in range(5):
    ahead, behind = list(map(np.float64, inputs)), list(map(np.float64, inputs))
    ahead[i] += at * ways[i]
    behind[i] -= at * ways[i]
    slope = (total(*ahead) - total(*behind)) / (2 * at)
    np.testing.assert_allclose(np.vdot(np.float64(grads[i]), ways[i]), slope, rtol=1e-4, atol=1e-4)


def test_cudnn_gets_the_same_masks(monkeypatch):
  """As on an NVIDIA GPU, with XLA in place of its library, which is not here."""
  asked, plain = [], jax.nn.dot_product_attention

  def library(*args, implementation, **rest):
    asked.append(implementation)
    return plain(*args, **rest)

  monkeypatch.setattr(attention, "_choose", lambda kernel, q: kernel)
  monkeypatch.setattr(jax.nn, "dot_product_attention", library)
  (q, k, v, *others), segment = arrays(5, 9), segments(9)
  for name, args, options in (("attend", (q, k, v), {}), ("attend", (q, k, v), {"causal": True}),
                              ("attend_to_others", (q, k, v, *others), {})):
    attend = functools.partial(getattr(attention, name), *args, segment=segment, **options)
    np.testing.assert_allclose(attend(kernel="cudnn"), attend(kernel="xla"), rtol=0, atol=1e-5)
  assert asked.count("cudnn") == 3


@pytest.mark.parametrize("kernel, message", [
    ("cudnn", "model.attention=cudnn: expected bfloat16 .* found float32 and heads of 16 on cpu")])
def test_what_a_kernel_cannot_do_is_one_line(kernel, message):
  with pytest.raises(UserError, match=message) as e:
    attention.attend(*arrays(3, 4), kernel=kernel)
  assert "\n" not in str(e.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kjv", "gcide_masked"])
def test_on_a_mesh_splash_is_what_xla_is_on_one_device(name):
  """Two blocks, each on a row of 2 x 2 devices: loss and gradient of random weights."""
  found = {}
  for kernel, shape in (("splash", (2, 2, 2)), ("xla", (1, 1, 1))):
    config = config_lib.changed(small_config(name), **{
        "model.attention": kernel, "train.turn": "together",
        **dict(zip(("mesh.block", "mesh.data", "mesh.fsdp"), shape))})
    task = task_lib.make_task(config, 0)
    mesh = sharding.make_mesh(config, jax.devices()[:np.prod(shape)])
    inputs = [jnp.zeros(x.shape, x.dtype) for x in task.call(4).inputs]
    weights = functools.partial(lambda drawn, block: drawn, random_params(task.network, *inputs))
    state = program.init(task, mesh, (0, 1), weights)
    row = sharding.put(mesh, jax.P("block"), (np.arange(2, dtype=np.int32), jax.tree.map(
        lambda *x: np.stack(x), *map(task.make_schedule(config).training_interval, range(2)))))
    batch = sharding.put(mesh, sharding.BATCH, synthetic_batch(task, 0))
    frozen = sharding.put(mesh, jax.P(), task.frozen(config))
    found[kernel] = program.compile_step(task, mesh, 2)(state, batch, *row, frozen)[1]
  assert found["xla"]["grad_norm"].min() > 0.01
  for measure in ("loss", "grad_norm"):
    np.testing.assert_allclose(found["splash"][measure], found["xla"][measure], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:1x1"])
def test_on_tpu_no_score_is_kept(topology):
  """Two streams of 3,072 tokens, as openwebtext has: by default as splash."""
  script = """
import functools, sys
import jax, jax.numpy as jnp
from dbjax import plan
from dbjax.models import attention
mesh = jax.sharding.Mesh(plan.find_devices(sys.argv[1]), ("data",))
spread = jax.sharding.NamedSharding(mesh, jax.P())
array = lambda dtype, *shape: jax.ShapeDtypeStruct((2, 3072, *shape), dtype, sharding=spread)
stream = array(jnp.bfloat16, 12, 64)
for kernel in ("auto", "splash", "xla"):
  def loss(q, k, v, others_k, others_v, segment):
    options = dict(segment=segment, kernel=kernel, remat=True)
    clean = attention.attend(others_k, others_k, others_v, causal=True, **options)
    noisy = attention.attend_to_others(q, k, v, others_k, others_v, **options)
    return (clean * noisy).sum()
  step = jax.shard_map(jax.grad(loss, range(5)), mesh=mesh, in_specs=jax.P(), out_specs=jax.P(),
                       check_vma=False)
  step = jax.jit(step).lower(*[stream] * 5, array(jnp.int32)).compile()
  print(step.memory_analysis().temp_size_in_bytes, step.as_text().count("splash_mha"))
"""
  done = subprocess.run([sys.executable, "-c", script, topology], cwd=ROOT, capture_output=True,
                        text=True, check=False, env=dict(os.environ))
  assert done.returncode == 0, done.stderr[-2000:]
  auto, splash, xla = ([int(x) for x in line.split()] for line in done.stdout.splitlines()[-3:])
  assert auto == splash and splash[1] and not xla[1]
  assert splash[0] < xla[0] / 2
