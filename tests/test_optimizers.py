"""Every optimizer of a config: against optax by hand, and what it must not break."""

import functools

import chex
from conftest import distance
from conftest import load_config
from conftest import ROOT
from conftest import states_of
import jax
import numpy as np
import optax
from optax import contrib
import pytest

from dbjax import block as block_lib
from dbjax import config as config_lib
from dbjax import fork
from dbjax import loop
from dbjax import optimizers
from dbjax import sharding
from dbjax import task as task_lib
from dbjax.errors import UserError
from dbjax.tasks.image import ImageTask

pytestmark = pytest.mark.usefixtures("steps_once")

NAMES = ("muon", "schedule_free", "adafactor", "lion")
CONSTANT = {"optimizer.schedule": "constant"}
RATE, DECAY, WARM = 0.03, 0.2, 3


def fields_of(name, **more):
  """A config of this optimizer."""
  own = CONSTANT if name == "schedule_free" else {}
  return {"optimizer.name": name, "optimizer.learning_rate": RATE, "optimizer.weight_decay": DECAY,
          "optimizer.warmup_steps": WARM, "optimizer.clip_norm": 2.0, **own, **more}


def task_of(tiny, name, **more):
  return task_lib.make_task(config_lib.resolve(tiny(**fields_of(name, **more))), 1)


def weights(seed=0, width=16):
  """Two layers, with q, k and v in one kernel and a SwiGLU, and what stands around them."""
  kernel = lambda *shape: dict(kernel=np.zeros(shape), bias=np.zeros((*shape[:-2], shape[-1])))
  d = width
  layers = dict(
      attention=dict(qkv=kernel(2, d, 3 * d), out=kernel(2, d, d)),
      mlp=dict(hidden=kernel(2, d, 4 * d), out=kernel(2, 2 * d, d)), modulation=kernel(2, d, 6 * d))
  return random_like(dict(token_embedding=np.zeros((7, d)), stack=dict(layers=layers),
                          read_out=kernel(d, 6)), seed)


def random_like(tree, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), tree)


def clipped(grads):
  """To a norm of 2, those that are larger."""
  norm = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in jax.tree.leaves(grads)))
  return jax.tree.map(lambda g: np.float32(g * 2 / max(norm, 2)), grads)


def scheduled(name, steps=6):
  """The rate of each step, in numpy: a warm-up, then a cosine or a constant."""
  n = np.arange(steps)
  fall = 1 if name == "schedule_free" else 0.5 * (
      1 + np.cos(np.pi * np.maximum(n - WARM, 0) / (steps - WARM)))
  return RATE * np.minimum(n / WARM, 1) * fall


def by_optax(name, dtype, rate):
  """The same optimizer of optax, of weights that are no kernels, with a rate that is a number."""
  moment = np.float32(0.9)
  return {
      "muon": lambda: optax.nadamw(rate, moment, 0.99, weight_decay=DECAY, mu_dtype=dtype),
      "lion": lambda: optax.lion(rate, moment, np.float32(0.99), dtype, DECAY),
      "adafactor": lambda: optax.adafactor(
          rate, multiply_by_parameter_scale=False, momentum=None, weight_decay_rate=rate * DECAY),
      "schedule_free": lambda: contrib.schedule_free_adamw(RATE, WARM, 0.9, 0.99,
                                                           weight_decay=DECAY)}[name]()


@pytest.mark.parametrize("name, dtype", [
    ("muon", "float32"), ("muon", "bfloat16"), ("lion", "float32"), ("lion", "bfloat16"),
    ("adafactor", "float32"), ("schedule_free", "float32")])
def test_a_step_is_that_of_optax(tiny, name, dtype):
  """Of a bias and of what stands outside the layers; a rate of each step as numpy has it."""
  b1 = {"optimizer.b1": 0.0} if name == "adafactor" else {}
  task = task_of(tiny, name, **{"optimizer.moments_dtype": dtype}, **b1)
  params = expected = weights()
  ours, state = optimizers.optimizer(task), optimizers.optimizer(task).init(params)
  state_there, step = by_optax(name, dtype, RATE).init(params), jax.jit(ours.update)

  @jax.jit
  def step_there(grads, state, params, rate):
    return by_optax(name, dtype, rate).update(grads, state, params)

  for n, rate in enumerate(scheduled(name)):
    grads = jax.tree.map(lambda g, n=n: g * 10.0**-(n % 3), random_like(params, n + 1))
    updates, state = step(grads, state, params)
    params = optax.apply_updates(params, updates)
    updates, state_there = step_there(clipped(grads), state_there, expected, rate)
    expected = optax.apply_updates(expected, updates)
  if name == "muon":
    for tree in (params, expected):
      for part in ("attention", "mlp"):
        for leaf in tree["stack"]["layers"][part].values():
          del leaf["kernel"]
  chex.assert_trees_all_close(params, expected, rtol=2e-5, atol=2e-6)
  assert dtype in {x.dtype.name for x in jax.tree.leaves(state)}


def test_adafactor_has_a_momentum_of_the_directions_and_factors_large_kernels(tiny):
  """Rows and columns, by numpy: arXiv 1804.04235, algorithm 4; clipping is at an RMS of 1."""
  task = task_of(tiny, "adafactor", **{
      "optimizer.clip_norm": 1e6, "optimizer.warmup_steps": 0, **CONSTANT})
  params = dict(w=np.float32(np.random.default_rng(0).normal(size=(3, 128, 160))))
  ours = optimizers.optimizer(task)
  state, row, column, m = ours.init(params), 0, 0, 0
  assert max(x.size for x in jax.tree.leaves(optax.tree.get(state, "v_row"))) == 3 * 128
  for n in range(1, 4):
    g = random_like(params, n)["w"].astype(np.float64)
    updates, state = ours.update(dict(w=np.float32(g)), state, params)
    decay = 1 - n**-0.8
    row = decay * row + (1 - decay) * (g**2).mean(2, keepdims=True)
    column = decay * column + (1 - decay) * (g**2).mean(1, keepdims=True)
    u = g / np.sqrt(row * column / row.mean(1, keepdims=True))
    m = 0.9 * m + 0.1 * u / max(1, np.sqrt((u**2).mean()))
    np.testing.assert_allclose(updates["w"], -RATE * (m + DECAY * params["w"]), rtol=2e-4,
                               atol=1e-6)


def newton_schulz(m):
  """Muon's five steps towards U V^T of the SVD of m (in, out): numpy, float64."""
  x = m / np.linalg.norm(m)
  for _ in range(5):
    a = x @ x.T
    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
  return x


def conditioned(x):
  """Matrices (..., in, out) with the same singular vectors, and singular values from 1 to 20."""
  u, values, v = np.linalg.svd(x, full_matrices=False)
  return np.float32(u * np.geomspace(20, 1, values.shape[-1]) @ v)


def test_muon_makes_each_matrix_of_each_layer_orthogonal(tiny):
  """q, k and v, and the two halves of a SwiGLU, each by itself; and scales it as AdamW's steps."""
  task = task_of(tiny, "muon", **CONSTANT, **{
      "optimizer.warmup_steps": 0, "optimizer.weight_decay": 0.0, "optimizer.clip_norm": 1e6})
  params, grads = weights(), weights(1)
  counts = dict(attention=dict(qkv=3, out=1), mlp=dict(hidden=2, out=1))
  split = lambda x, count: np.stack(np.split(np.asarray(x), count, axis=-1))
  for part, leaves in counts.items():
    for leaf, count in leaves.items():
      of = grads["stack"]["layers"][part][leaf]
      of["kernel"] = np.concatenate(conditioned(split(of["kernel"], count)), axis=-1)
  ours = optimizers.optimizer(task)
  updates, _ = jax.jit(ours.update)(grads, ours.init(params), params)
  layers, gradient = updates["stack"]["layers"], grads["stack"]["layers"]
  for part, leaves in counts.items():
    for leaf, count in leaves.items():
      found, raw = (split(x[part][leaf]["kernel"], count) for x in (layers, gradient))
      size = max(raw.shape[-2:])
      found = found.astype(np.float64) / (-RATE * 0.2 * np.sqrt(size))
      values = np.linalg.svd(found, compute_uv=False)
      assert values.shape == (count, 2, 16) and 0.6 < values.min() and values.max() < 1.3
      u, _, v = np.linalg.svd(raw, full_matrices=False)
      assert np.sum(found * (u @ v)) > 0.8 * values.size  # U V^T: every value would be 1
      for one, g in zip(found.reshape(-1, *raw.shape[-2:]), raw.reshape(-1, *raw.shape[-2:])):
        np.testing.assert_allclose(one, newton_schulz(np.float64(g)), atol=2e-3)
  by_adam = [updates["read_out"], updates["token_embedding"], layers["modulation"],
             layers["attention"]["qkv"]["bias"]]
  for x in jax.tree.leaves(by_adam):  # optax has Nesterov's momentum here too
    np.testing.assert_allclose(np.abs(x), RATE * (1 + 0.9 * 0.1 / (1 - 0.9**2)), rtol=1e-4)


def test_muon_moves_the_kernels_of_layers_and_nothing_else(tiny):
  for config, several in ((tiny(), {3, 1}), (load_config("kjv"), {3, 1, 2}),
                          (load_config("kjv_recurrent"), {3, 1, 2})):
    task = task_lib.make_task(config_lib.changed(config, **{"optimizer.name": "muon"}), 0)
    counts = optimizers.matrices(task, block_lib.abstract_state(task).params)
    taken = {jax.tree_util.keystr(path): n
             for path, n in jax.tree_util.tree_leaves_with_path(counts) if n}
    assert set(taken.values()) == several
    assert all(path.startswith("['stack") and path.endswith("['kernel']")
               and "modulation" not in path for path in taken)
    assert len(taken) == 4 * sum(name.startswith("stack") for name in counts)


def test_muon_splits_a_kernel_only_where_one_beside_it_says_of_what(tiny):
  task = task_lib.make_task(config_lib.changed(tiny(), **{"optimizer.name": "muon"}), 0)
  kernel = lambda *shape: dict(kernel=np.zeros(shape))
  counts = optimizers.matrices(task, dict(stack=dict(
      mlp=dict(fc1=kernel(16, 64), fc2=kernel(64, 16)),
      attention=dict(qkv=kernel(16, 48), out=kernel(16, 16)))))
  assert counts == dict(stack=dict(mlp=dict(fc1=dict(kernel=1), fc2=dict(kernel=1)),
                                   attention=dict(qkv=dict(kernel=3), out=dict(kernel=1))))


_update = jax.jit(block_lib.update, static_argnums=0)


def stepped(task, state, n, loss=1.0, grads=None, active=True):
  """The state after an update by random gradients, or those given."""
  grads = random_like(state.params, 10 + n) if grads is None else grads
  return _update(task, state, np.float32(loss), grads, active)


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_batch_changes_nothing_and_an_explosion_begins_afresh(tiny, name):
  task = task_of(tiny, name)
  state = block_lib.from_params(task, weights())
  for n in range(4):
    state, _ = stepped(task, state, n)
  bad = random_like(state.params, 3)
  bad["stack"]["layers"]["mlp"]["out"]["kernel"][0, 0, 0] = np.nan
  for more in (dict(loss=np.nan), dict(grads=bad)):
    after, metrics = stepped(task, state, 4, **more)
    assert metrics["skipped"] == 1 and after.step == 5
    chex.assert_trees_all_equal(*((s.params, s.ema, s.opt_state) for s in (after, state)))
  after, metrics = stepped(task, state, 4, active=False)
  assert metrics["skipped"] == 0
  chex.assert_trees_all_equal(after, state)

  after, metrics = stepped(task, state, 4, loss=1e3)
  assert metrics["skipped"] == 1
  chex.assert_trees_all_equal(after.params, state.ema)
  chex.assert_trees_all_equal(after.ema, state.ema)
  fresh = optimizers.optimizer(task).init(state.ema)
  counts = lambda tree: [int(x.count) for x in jax.tree.leaves(
      tree, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState)) if hasattr(x, "count")]
  assert set(counts(after.opt_state)) == {4} and set(counts(fresh)) == {0}  # the rate goes on
  rate = lambda x: isinstance(x, optax.ScaleByScheduleState)
  if name == "schedule_free":  # so does that by which it weighs its average, which counts from 1
    own, fresh_own = after.opt_state[-1], fresh[-1]
    assert (own.step_count, fresh_own.step_count) == (5, 1) and own.weight_sum == 0
    fresh = (*fresh[:-1], fresh_own._replace(step_count=own.step_count))
  same = lambda tree: jax.tree.map(lambda x: 0 if rate(x) else x, tree, is_leaf=rate)
  chex.assert_trees_all_equal(same(after.opt_state), same(fresh))
  again, metrics = stepped(task, after, 5)
  assert metrics["skipped"] == 0 and distance(again.params, after.params) > 1e-4


class Unsteady(ImageTask):
  """Whose batches may have any loss."""

  steady = False


@pytest.mark.parametrize("first, most", [
    (2.0, 20.0), (0.5, 9.5), (0.0, 9.0), (-0.2, 8.8), (-3.0, 24.0)])
def test_an_explosion_is_told_by_the_first_finite_loss_of_any_sign(tiny, first, most):
  task = task_of(tiny, "adamw")
  state, metrics = stepped(task, block_lib.from_params(task, weights()), 0, loss=np.nan)
  assert metrics["skipped"] == 1
  state, _ = stepped(task, state, 1, loss=first)
  state, metrics = stepped(task, state, 2, loss=0.9 * first)
  assert metrics["skipped"] == 0 and state.health.first_loss == np.float32(first)
  for loss, skipped in ((most - 0.1, 0), (most + 0.1, 1)):
    assert stepped(task, state, 3, loss=loss)[1]["skipped"] == skipped
  if first == 2:
    task = Unsteady(config=task.config, network=task.network)
    assert [stepped(task, state, 3, loss=loss)[1]["skipped"] for loss in (1e6, np.inf)] == [0, 1]


def test_the_average_of_schedule_free_is_its_own(tiny):
  """x of the paper, by hand: a mean of z, weighted by the square of the highest rate so far."""
  task = task_of(tiny, "schedule_free")
  state, total = block_lib.from_params(task, weights()), 0
  of = lambda tree: np.float64(tree["read_out"]["kernel"])
  average = of(state.params)
  for n in range(6):
    state, _ = stepped(task, state, n)
    z, weight = of(state.opt_state[-1].z), min((n + 1) / WARM, 1) ** 2
    total += weight
    average = average + weight / total * (z - average)
    np.testing.assert_allclose(of(state.ema), average, atol=5e-6)
    np.testing.assert_allclose(of(state.params), 0.9 * average + 0.1 * z, atol=5e-6)  # y
  assert distance(state.ema, state.params) > 1e-3


class Joint(ImageTask):
  """Whose blocks train a table together."""

  joint = ("token_embedding",)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (
    name in ("adafactor", "lion"))) for name in NAMES])
def test_blocks_side_by_side_are_single_ones_with_one_table(tiny, name):
  """Its gradient is the mean, and whether a step is passed over is one for all."""
  config = task_of(tiny, name, **{"optimizer.clip_norm": 1e6}).config
  task = Joint(config=config, network=task_lib.make_task(config, 1).network)
  alone = task_lib.make_task(config, 1)
  stack = lambda trees: jax.tree.map(lambda *x: np.stack(x), *trees)
  start = [weights(b) | dict(token_embedding=np.ones((7, 16), np.float32)) for b in range(2)]
  singles = [block_lib.from_params(alone, params) for params in start]
  update = jax.jit(jax.vmap(functools.partial(block_lib.update, task), axis_name=block_lib.AXIS))
  together = stack([block_lib.from_params(task, params) for params in start])
  for n in range(3):
    grads = [random_like(s.params, 2 * n + b) for b, s in enumerate(singles)]
    together, _ = update(together, np.ones(2, np.float32), stack(grads))
    table = np.mean([g["token_embedding"] for g in grads], axis=0)
    singles = [stepped(alone, s, n, grads=g | dict(token_embedding=table))[0]
               for s, g in zip(singles, grads)]
  for b in range(2):
    mine = jax.tree.map(lambda x, b=b: x[b], together)
    chex.assert_trees_all_close((mine.params, mine.ema), (singles[b].params, singles[b].ema),
                                rtol=1e-4, atol=1e-5)
  same = [together.params["token_embedding"], together.ema["token_embedding"]]
  chex.assert_trees_all_equal([x[0] for x in same], [x[1] for x in same])
  after, metrics = update(together, np.array([1, np.nan], np.float32), stack(grads))
  chex.assert_trees_all_equal(after.params, together.params)
  assert metrics["skipped"].sum() == 2


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (
    name in ("schedule_free", "lion"))) for name in NAMES])
def test_an_update_in_parts_is_that_of_one_device(tiny, name):
  """Of fsdp, on two devices; what is large lies in parts, also what Adafactor sums."""
  task = task_of(tiny, name)
  params = weights(width=128 if name == "adafactor" else 32)
  state = one = block_lib.from_params(task, params)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]).reshape(1, 2), ("data", "fsdp"))
  spread = sharding.shardings(mesh, jax.eval_shape(lambda: state))
  parts = jax.device_put(state, spread)
  whole = sum(x.nbytes for x in jax.tree.leaves(state.opt_state))
  assert sharding.bytes_per_device(parts.opt_state) < 0.55 * whole
  step = jax.jit(functools.partial(block_lib.update, task), out_shardings=(spread, None))
  for n in range(3):
    grads = random_like(params, n)
    one, _ = stepped(task, one, n, grads=grads)
    parts, _ = step(parts, np.float32(1), jax.device_put(grads, spread.params))
  assert distance(jax.device_get(parts.params), one.params) < 1e-5
  assert distance(jax.device_get(parts.ema), one.ema) < 1e-5
  assert distance(one.params, params) > 1e-3


SLOW = [pytest.param(name, marks=[pytest.mark.slow] * (name != "schedule_free")) for name in NAMES]


@pytest.mark.parametrize("name", SLOW)
def test_resumed_is_bit_equal_to_uninterrupted(tiny, tmp_path, name):
  """Stopped at step 2 of 4, beside another block or alone."""
  small = {"num_blocks": 2, "model.num_layers": 2, "train.num_steps": 4}
  make = lambda **more: config_lib.resolve(tiny(**fields_of(name, **small), **more))
  run = lambda config, where: loop.train(config, tmp_path / where, devices=jax.devices()[:1])
  run(make(**{"checkpoint.every_steps": 4, "train.blocks": (1,)}), "once")
  config, turns = make(**{"train.turn": "1"}), loop.turns

  def half(config, groups, steps):
    for group, until in turns(config, groups, steps):
      if min(steps.values()) == 2:
        return
      yield group, until

  loop.turns = half
  try:
    run(config, "resumed")
  finally:
    loop.turns = turns
  assert states_of(config, tmp_path / "resumed", (1,))[1].step == 2
  run(config, "resumed")
  chex.assert_trees_all_equal(*(states_of(config, tmp_path / where, (1,))
                                for where in ("resumed", "once")))
  other = config_lib.changed(config, **{"optimizer.name": "adamw", "train.num_steps": 6})
  with pytest.raises(UserError, match=f"optimizer.name=adamw: .*was trained with {name}: a fork"):
    fork.fork(tmp_path / "once", tmp_path / "fork", (1,), other, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_trained_on_a_mesh_it_equals_one_device(tiny, tmp_path, name):
  """Two rows of two devices, each of which has half of a block, against one device."""
  small = {"num_blocks": 2, "model.num_layers": 4, "train.num_steps": 4, "model.width": 128,
           "checkpoint.every_steps": 4, "optimizer.learning_rate": 1e-3}
  make = lambda **more: config_lib.resolve(tiny(**{**fields_of(name), **small, **more}))
  run = lambda config, num: loop.train(config, tmp_path / str(num), devices=jax.devices()[:num])
  one, spread = make(), make(**{"mesh.block": 2, "mesh.fsdp": 2, "train.turn": "together"})
  run(one, 1)
  run(spread, 4)
  alone, parts = (states_of(one, tmp_path / str(num), (0, 1)) for num in (1, 4))
  for b in (0, 1):
    # Lion takes signs: that of a moment next to zero falls as rounding has it, and moves a weight
    # by twice the rate. In these steps Lion moves all weights together by 0.022.
    limit = 4e-4 if name == "lion" else 1e-4
    assert distance(parts[b].params, alone[b].params) < limit
    assert distance(parts[b].ema, alone[b].ema) < limit
    assert distance(alone[b].params, block_lib.init(task_lib.make_task(one, b), b).params) > 1e-3


@pytest.mark.parametrize("fields, message", [
    ({"optimizer.name": "adam"}, "optimizer.name='adam': expected one of adamw, muon, sched"),
    ({"optimizer.name": "schedule_free"}, "optimizer.schedule=cosine: with optimizer.name=schedul"
     ".*set optimizer.schedule=constant"),
    ({"optimizer.name": "schedule_free", "optimizer.b1": 0.0, **CONSTANT},
     "optimizer.b1=0: with optimizer.name=schedule_free expected above 0"),
    ({"optimizer.name": "schedule_free", "optimizer.moments_dtype": "bfloat16", **CONSTANT},
     "optimizer.moments_dtype=bfloat16: with optimizer.name=schedule_free there is no first mom"),
    ({"optimizer.name": "adafactor", "optimizer.moments_dtype": "bfloat16", "optimizer.b1": 0.0},
     "moments_dtype=bfloat16: with optimizer.name=adafactor and optimizer.b1=0 there is no"),
])
def test_what_does_not_go_together_is_refused(tiny, fields, message):
  with pytest.raises(UserError, match=message):
    config_lib.resolve(tiny(**fields))


def test_muon_needs_to_know_the_layers(tiny):
  with pytest.raises(UserError, match="=muon: model.network=mixer:Mixer does not say in `parts`"):
    config_lib.resolve(config_lib.read(ROOT / "configs/examples/mixer.py",
                                       {"optimizer.name": "muon"}))
  optimizer = optimizers.optimizer(task_of(tiny, "muon"))
  with pytest.raises(UserError, match="=muon: model.network=.*:DiT has no arrays called kernel"):
    optimizer.init(dict(stack=dict(scale=np.ones((2, 3))), read_out=weights()["read_out"]))
