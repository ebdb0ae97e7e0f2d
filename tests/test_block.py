"""One block: a pure function of (config, b, n), and of nothing that another block has."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dbjax import block as block_lib
from dbjax import config as config_lib
from dbjax import data
from dbjax import schedule as schedule_lib
from dbjax import task as task_lib
from dbjax.errors import UserError
from dbjax.tasks.image import ImageTask

_step = jax.jit(block_lib.train_step, static_argnums=0)  # once for all tests of the same task


def _setup(config, b=1):
  config = config_lib.resolve(config)
  task = task_lib.make_task(config, b)
  interval = schedule_lib.make_schedule(config.schedule, config.num_blocks).training_interval(b)
  return config, task, interval, functools.partial(_step, task)


def _run(config, steps, b=1):
  """The state after some steps, and the loss of each."""
  config, task, interval, step = _setup(config, b)
  dataset = data.load(config)
  state, losses = block_lib.init(task, b), []
  for n in range(steps):
    state, metrics = step(state, dataset.batch(config.seed, n, config.train.batch_size),
                          np.int32(b), interval)
    losses.append(float(metrics["loss"]))
  return state, losses


class Spoiled(ImageTask):
  """Batches of white images have a loss that is not finite, of black ones one that explodes."""

  def loss(self, params, drawn, frozen=None):
    bad = jnp.where(drawn["y"].mean() > 0.99, jnp.nan, 1e6)
    return super().loss(params, drawn, frozen) * jnp.where(abs(drawn["y"]).min() > 0.99, bad, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pixel", [255, 0])
def test_a_bad_batch_is_passed_over(tiny, pixel, dtype):
  """Not finite, it leaves all as it was; exploding, the average takes the place of the weights."""
  config = config_lib.resolve(tiny(**{"optimizer.moments_dtype": dtype}))
  task = Spoiled(config=config, network=task_lib.make_task(config, 1).network)
  interval = task.make_schedule(config).training_interval(1)
  step = functools.partial(_step, task)
  batch = lambda n: data.load(config).batch(0, n, 8)
  state = block_lib.init(task, 1)
  for n in range(3):
    state, metrics = step(state, batch(n), np.int32(1), interval)
    assert metrics["skipped"] == 0
  bad = batch(3) | dict(image=np.full_like(batch(3)["image"], pixel))
  after, metrics = step(state, bad, np.int32(1), interval)
  assert metrics["skipped"] == 1 and (after.step, after.health.skipped) == (4, 1)
  chex.assert_trees_all_equal(after.ema, state.ema)
  chex.assert_trees_all_equal(after.params, state.params if pixel else state.ema)
  leaves = jax.tree.leaves(after.opt_state)
  assert {x.dtype.name for x in leaves} == {"int32", "float32", dtype}
  rate = lambda x: isinstance(x, optax.ScaleByScheduleState)
  kept = jax.tree.map(lambda x: x if pixel or rate(x) else jnp.zeros_like(x), state.opt_state,
                      is_leaf=rate)
  chex.assert_trees_all_equal(after.opt_state, kept)
  assert {int(x) for x in leaves if x.dtype == jnp.int32} == {3 if pixel else 0, 3}
  again, metrics = step(after, batch(4), np.int32(1), interval)
  assert metrics["skipped"] == 0 and again.health.in_row == 0
  for before, later in ((block_lib.HOPELESS - 1, 0), (block_lib.HOPELESS, block_lib.HOPELESS)):
    health = after.health._replace(in_row=jnp.int32(before))
    assert step(after.replace(health=health), batch(4), np.int32(1), interval)[
        0].health.in_row == later  # whether it has diverged depends not on when one looks
  if pixel:  # the next batch is seen by the weights that were good, at its own step and key
    expected, _ = step(state.replace(step=jnp.int32(4)), batch(4), np.int32(1), interval)
    chex.assert_trees_all_equal(again.params, expected.params)


def test_warm_up_stable_decay(tiny):
  config = config_lib.resolve(tiny(**{
      "optimizer.schedule": "wsd", "optimizer.warmup_steps": 4, "optimizer.decay_steps": 5,
      "train.num_steps": 20, "optimizer.learning_rate": 0.5, "optimizer.weight_decay": 0.0}))
  optimizer, weights = block_lib.optimizer(task_lib.make_task(config, 0)), np.ones(1, np.float32)
  state, moved = optimizer.init(weights), []
  for _ in range(20):  # of a gradient that stays the same AdamW makes the rate
    update, state = optimizer.update(weights, state, weights)
    moved.append(-float(update[0]))
  rate = np.minimum(np.arange(20) / 4, 1) * np.minimum((20 - np.arange(20)) / 5, 1) * 0.5
  np.testing.assert_allclose(moved, rate, rtol=1e-3, atol=1e-6)
  with pytest.raises(UserError, match="optimizer.decay_steps=17: .* from 1 to .*warmup_steps=16"):
    config_lib.resolve(tiny(**{**config_lib.flatten(config), "optimizer.decay_steps": 17}))


def test_the_gradient_across_blocks_is_exactly_zero(tiny):
  """d loss[b] / d params[c], of all blocks computed together, as a mesh computes them."""
  config, task, _, _ = _setup(tiny())
  schedule = schedule_lib.make_schedule(config.schedule, 3)
  intervals = jax.tree.map(lambda *x: jnp.stack(x), *map(schedule.training_interval, range(3)))
  params = jax.vmap(task.init)(jax.random.split(jax.random.key(0), 3))
  params = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(1), x.shape), params)
  batch = data.load(config).batch(0, 0, 8)

  def loss_of(b, params):
    def loss(params, c, interval):
      key = block_lib.block_key(0, c, 0, block_lib.DRAW)
      return task.loss(params, task.draw(key, batch, interval))
    return jax.vmap(loss)(params, jnp.arange(3), intervals)[b]

  gradient = jax.jit(jax.grad(loss_of, argnums=1))
  for b in range(3):
    wrt = gradient(b, params)
    norms = [float(optax.tree.norm(jax.tree.map(lambda x, c=c: x[c], wrt))) for c in range(3)]
    assert norms[b] > 0
    assert all(norms[c] == 0 for c in range(3) if c != b)


def test_the_step_is_adamw_with_clipping_and_ema_written_by_hand(tiny):
  """Two steps against numpy float64, from the gradients of the same draws."""
  config, task, interval, step = _setup(tiny(**{
      "optimizer.clip_norm": 0.05, "optimizer.weight_decay": 2.0}))
  o, n_total = config.optimizer, config.train.num_steps
  state = block_lib.init(task, 1)
  first = lambda tree: np.asarray(tree["patch_embedding"]["kernel"], np.float64).copy()
  p, ema = first(state.params), first(state.ema)
  m = v = np.zeros_like(p)
  for n in range(4):
    batch = data.load(config).batch(config.seed, n, 8)
    drawn = task.draw(block_lib.block_key(config.seed, 1, n, block_lib.DRAW), batch, interval)
    grads = jax.grad(task.loss)(state.params, drawn)
    norm = float(optax.tree.norm(grads))
    assert norm > o.clip_norm
    g = first(grads) * o.clip_norm / norm
    m, v = o.b1 * m + (1 - o.b1) * g, o.b2 * v + (1 - o.b2) * g**2
    if n < o.warmup_steps:
      rate = o.learning_rate * n / o.warmup_steps
    else:
      rate = o.learning_rate * 0.5 * (1 + np.cos(np.pi * (n - o.warmup_steps)
                                                 / (n_total - o.warmup_steps)))
    update = m / (1 - o.b1 ** (n + 1)) / (np.sqrt(v / (1 - o.b2 ** (n + 1))) + 1e-8)
    p = p - rate * (update + o.weight_decay * p)
    decay = min(config.train.ema_decay, (n + 2) / (n + 11))
    ema = decay * ema + (1 - decay) * p
    state, metrics = step(state, batch, np.int32(1), interval)
    np.testing.assert_allclose(float(metrics["grad_norm"]), norm, rtol=1e-4)
  undecayed = np.abs(p).max() * o.learning_rate * o.weight_decay
  assert undecayed > 1e-4  # so that a forgotten decay would show
  np.testing.assert_allclose(first(state.params), p, rtol=0, atol=2e-6)
  np.testing.assert_allclose(first(state.ema), ema, rtol=0, atol=2e-6)


def test_a_first_moment_in_bfloat16_is_rounded_once_a_step(tiny):
  """Bit-equal to numpy: neither b1 nor its product is rounded, and the update sees no rounding."""
  config = config_lib.resolve(tiny(**{
      "optimizer.moments_dtype": "bfloat16", "optimizer.clip_norm": 1e6,
      "optimizer.schedule": "constant", "optimizer.warmup_steps": 0}))
  o, rng, params = config.optimizer, np.random.default_rng(0), np.ones(1000, np.float32)
  optimizer = block_lib.optimizer(task_lib.make_task(config, 0))
  state, f = optimizer.init(params), np.float32
  m, v = params.astype(jnp.bfloat16) * 0, 0 * params
  for n in range(1, 13):
    g = rng.normal(1, 1, 1000).astype(f)
    fresh = (f(1) - f(o.b1)) * g + f(o.b1) * m.astype(f)
    m, v = fresh.astype(jnp.bfloat16), (f(1) - f(o.b2)) * g**2 + f(o.b2) * v
    update, state = optimizer.update(g, state, params)
    np.testing.assert_array_equal(optax.tree.get(state, "mu"), m)
    expected = fresh / (1 - o.b1**n) / (np.sqrt(v / (1 - o.b2**n)) + 1e-8) + o.weight_decay
    np.testing.assert_allclose(update, -o.learning_rate * expected, rtol=1e-5, atol=1e-8)
  assert np.abs(m.astype(f) / fresh - 1).max() > 1e-3  # so that rounding would show


def test_blocks_steps_and_seeds_draw_different_noise(tiny):
  states = [_run(tiny(**override), 2, b)[0].params
            for override, b in (({}, 1), ({}, 2), ({"seed": 1}, 1))]
  kernels = [np.asarray(s["patch_embedding"]["kernel"]) for s in states]
  assert len({k.tobytes() for k in kernels}) == 3
  keys = {tuple(jax.random.key_data(block_lib.block_key(0, b, n, what)).tolist())
          for b in range(4) for n in range(4) for what in range(3)}
  assert len(keys) == 48


@pytest.mark.parametrize("accumulate", [2, 8])
def test_accumulated_gradients_are_those_of_the_whole_batch(tiny, accumulate):
  """The draws are the same, so only the order of the sum differs."""
  whole, whole_losses = _run(tiny(), 4)
  parts, parts_losses = _run(tiny(**{"train.accumulate": accumulate}), 4)
  np.testing.assert_allclose(whole_losses, parts_losses, rtol=1e-5)
  chex.assert_trees_all_close(whole.params, parts.params, rtol=0, atol=1e-5)


def test_vmapped_blocks_equal_single_ones(tiny):
  """A leading axis of blocks: the form in which a mesh trains them."""
  config, task, _, step = _setup(tiny())
  schedule = schedule_lib.make_schedule(config.schedule, 3)
  blocks = np.arange(3)
  stack = lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
  intervals = [schedule.training_interval(b) for b in blocks]
  batch = data.load(config).batch(0, 0, 8)
  init = functools.partial(block_lib.init, task)
  together = jax.vmap(init)(blocks)
  many = jax.jit(jax.vmap(functools.partial(block_lib.train_step, task),
                          in_axes=(0, None, 0, 0)))
  for _ in range(3):
    together, _ = many(together, batch, blocks, stack(*intervals))
  for b in blocks:
    alone = init(b)
    for _ in range(3):
      alone, _ = step(alone, batch, b, intervals[b])
    mine = jax.tree.map(lambda x, b=b: x[b], together)
    chex.assert_trees_all_close(mine, alone, rtol=1e-5, atol=1e-6)


def test_a_block_learns(tiny):
  """A loss of 1 is what F = 0 has; a block that trains falls below it."""
  _, losses = _run(tiny(**{"train.num_steps": 150, "train.batch_size": 32,
                           "optimizer.learning_rate": 1e-2}), 150)
  assert 0.8 < losses[0] < 1.3
  assert losses[-1] < 0.75


@pytest.mark.parametrize("schedule, warmup", [("constant", 0), ("constant", 3), ("cosine", 0)])
def test_the_learning_rate_counts_the_blocks_own_steps(tiny, schedule, warmup):
  config = config_lib.resolve(tiny(**{
      "optimizer.schedule": schedule, "optimizer.warmup_steps": warmup,
      "optimizer.weight_decay": 0.0, "optimizer.b1": 0.0, "optimizer.b2": 0.0}))
  optimizer = block_lib.optimizer(task_lib.make_task(config, 0))
  state, rates = optimizer.init(jnp.zeros(())), []
  for _ in range(6):  # with b1 = b2 = 0 an update is -rate * sign(gradient)
    update, state = optimizer.update(jnp.ones(()), state, jnp.zeros(()))
    rates.append(-float(update) / config.optimizer.learning_rate)
  ramp = np.minimum(np.arange(6) / warmup, 1) if warmup else np.ones(6)
  cosine = 0.5 * (1 + np.cos(np.pi * np.arange(6) / 6)) if schedule == "cosine" else 1
  np.testing.assert_allclose(rates, ramp * cosine, atol=1e-5)
