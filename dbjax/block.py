"""The state of ONE block, and its training step.

A block is a pure function of (config, b, n): all that is random comes from
fold_in(fold_in(fold_in(seed, block), step), what), and its optimizer, schedule and EMA
count its own steps. b and the noise interval are inputs of the step, not constants in
it: blocks that are alike share one compiled program.

The state of a block begins at `init`; `train_step` is one step of it. What is trained, and
on what, is the task's to say: `task.Task`.

A batch whose loss or gradient is not finite changes nothing: its step is passed over. Where the
loss is EXPLODES times that of the first step, the weights have been led astray before: they
become their own average again, which has not followed so fast, and the optimizer begins anew.
Both are functions of (config, b, n) as all else is. A loss may be negative: so what counts is how
far it rises above the first, against the size of that, or against 1 where that is less.
"""

import functools
import re
from typing import Any, NamedTuple

from flax import struct
import jax
import jax.numpy as jnp
import optax

from dbjax import optimizers
from dbjax.errors import UserError
from dbjax.fields import shown
from dbjax.optimizers import AXIS
from dbjax.optimizers import optimizer
from dbjax.task import Task

INIT, DRAW, EVALUATE = 0, 1, 2  # `what` a key is for
EXPLODES = 10.0  # times the loss of the first step
HOPELESS = 50  # steps passed over in a row: the block has diverged


class Health(NamedTuple):
  """How training goes: scalars.

  Attributes:
    first_loss: float32, of the first step that was not passed over; inf before it.
    skipped: int32, steps that were passed over, in all.
    in_row: int32, the last so many steps, without one that was not.
  """

  first_loss: jax.Array
  skipped: jax.Array
  in_row: jax.Array


class BlockState(struct.PyTreeNode):
  """All that training a block changes: pytrees of float32, and its own step counter.

  First moments are in `optimizer.moments_dtype`. `ema`, with which samples are drawn, is the
  exponential average of `params`; of optimizer.name=schedule_free it is the average of that method,
  optax.contrib.schedule_free_eval_params (arXiv 2405.15682), and `train.ema_decay` says nothing.
  """

  step: jax.Array
  params: Any
  ema: Any
  opt_state: Any
  health: Health


def block_key(seed: int, block, step, what: int) -> jax.Array:
  """The key of one purpose, at one step of one block."""
  key = jax.random.key(seed)
  for number in (block, step, what):
    key = jax.random.fold_in(key, number)
  return key


def init(task: Task, block) -> BlockState:
  """Block `block` (an index, traced or not) at step 0. Raises UserError: `task` is none."""
  _check_task(task)
  return from_params(task, init_params(task, block))


def _check_task(task: Any):
  if not isinstance(task, Task):
    raise UserError(f"task={shown(task)}: expected a task, as dbjax.make_task(config, block) makes "
                    "it")


@functools.partial(jax.jit, static_argnums=0)
def init_params(task: Task, block) -> Any:
  """The weights of a block at step 0."""
  return task.init(block_key(task.config.seed, block, 0, INIT))


@functools.partial(jax.jit, static_argnums=0)
def from_params(task: Task, params: Any) -> BlockState:
  """A block at step 0 with these weights."""
  zero = lambda: jnp.zeros((), jnp.int32)  # each its own array: they are donated
  return BlockState(step=zero(), params=params, ema=jax.tree.map(jnp.copy, params),
                    opt_state=optimizer(task).init(params),
                    health=Health(jnp.full((), jnp.inf), zero(), zero()))


def abstract_state(task: Task) -> BlockState:
  """The shapes and dtypes of a block's state."""
  return jax.eval_shape(functools.partial(init, task), 0)


def train_step(task: Task, state: BlockState, batch, block, interval,
               frozen=None, active=True) -> tuple[BlockState, dict[str, jax.Array]]:
  """One optimizer step of one block.

  Args:
    task: of this block; static.
    state: of this block.
    batch: the global batch of step `state.step`; leaves (N, ...).
    block: its index, traced or not.
    interval: the noise that it trains on.
    frozen: what all blocks use and none trains: the target embeddings, if any.
    active: a bool, traced or not; False: the block stays as it is.

  Returns:
    The next state; `loss`, `grad_norm` and `skipped` (1 if the step was passed over), float32
    scalars.

  Raises:
    UserError: the task or the state is none.
  """
  _check_task(task)
  if not isinstance(state, BlockState):
    raise UserError(f"state={shown(state)}: expected a BlockState, as dbjax.init makes it")
  return update(task, state, *_gradient(task, state, batch, block, interval, frozen), active)


def _gradient(task: Task, state: BlockState, batch, block, interval, frozen) -> tuple[Any, Any]:
  """The loss and its gradient, of what `train_step` is given."""
  config = task.config
  key = block_key(config.seed, block, state.step, DRAW)
  drawn = task.draw(key, batch, interval)
  loss = functools.partial(task.loss, frozen=frozen)
  return _value_and_grad(loss, state.params, drawn, config.train.accumulate)


def update(task: Task, state: BlockState, loss, grads,
           active=True) -> tuple[BlockState, dict[str, jax.Array]]:
  """What `train_step` does once it has the loss, a scalar, and the gradient, like the params."""
  config, grad_norm = task.config, optax.tree.norm(grads)
  finite, health = jnp.isfinite(loss) & jnp.isfinite(grad_norm), state.health
  first = health.first_loss
  most = first + (EXPLODES - 1) * jnp.maximum(jnp.abs(first), 1)
  exploded = finite & (loss > most) & task.steady
  good = finite & ~exploded
  if task.joint and config.num_blocks > 1:  # what they learn together must stay the same
    good, exploded = jax.lax.pmin(good, AXIS), jax.lax.pmax(exploded, AXIS)
  updates, opt_state = optimizers.update(task, grads, state, good=good, exploded=exploded,
                                         active=active)
  good, exploded, bad = good & active, exploded & active, ~good & active
  params = jax.tree.map(lambda p, u, e: jnp.where(good, p + u, jnp.where(exploded, e, p)),
                        state.params, updates, state.ema)
  step = state.step + 1
  first = jnp.where(good & jnp.isinf(first), loss, first)
  in_row = jnp.where(good & (health.in_row < HOPELESS), 0, health.in_row + bad)  # once is for good
  state = BlockState(
      step=jnp.where(active, step, state.step), params=params,
      ema=_average(config, state, params, opt_state, good), opt_state=opt_state,
      health=Health(first, health.skipped + bad, in_row))
  return state, dict(loss=loss, grad_norm=grad_norm, skipped=jnp.float32(bad))


def norms(task: Task, state: BlockState, batch, block, interval, frozen=None
          ) -> dict[str, jax.Array]:
  """How large, part by part, the gradient of the next step is, and what it adds to the weights.

  It computes that step once more and keeps nothing of it: the program that trains stays what it is,
  bit for bit, whether somebody looks or not.

  Args:
    As of `train_step`.

  Returns:
    {"grad_norm/PART": .., "update_norm/PART": ..}: float32 scalars, before clipping and after all.
    A part is what has a name at the top of the parameters, such as read_out; layers that are
    stacked, by `parts` of the network, are a part each: stack/0 is the first of the block.
  """
  loss, grads = _gradient(task, state, batch, block, interval, frozen)
  after, _ = update(task, state, loss, grads)
  moved = jax.tree.map(jnp.subtract, after.params, state.params)
  return {f"{what}/{part}": norm for what, tree in (("grad_norm", grads), ("update_norm", moved))
          for part, norm in _norm_of_parts(task, tree).items()}


def _norm_of_parts(task: Task, tree: Any) -> dict[str, jax.Array]:
  """{part: the norm of all arrays in it} of a tree like the params."""
  layers = getattr(task.network, "parts", {}).get("layers")
  squares: dict[str, Any] = {}
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    top = jax.tree_util.keystr(path[:1], simple=True) or "params"
    if layers and x.ndim and re.match(layers, top):
      each = jnp.sum(jnp.square(x), range(1, x.ndim))
      found = {f"{top}/{i}": each[i] for i in range(len(x))}
    else:
      found = {top: jnp.sum(jnp.square(x))}
    squares |= {part: squares.get(part, 0.0) + square for part, square in found.items()}
  return {part: jnp.sqrt(square) for part, square in squares.items()}


def _average(config: Any, state: BlockState, params: Any, opt_state: Any, good) -> Any:
  """The averaged weights after a step that was `good`, or as they are in `state`."""
  own = optimizers.own_average(config, opt_state, params)
  if own is not None:
    return jax.tree.map(lambda e, x: jnp.where(good, x, e), state.ema, own)
  # A young average forgets faster, or it would remember little but the initial weights.
  step = state.step + 1
  decay = jnp.minimum(config.train.ema_decay, (1 + step) / (10 + step))
  decay = jnp.where(good, decay, 1.0)
  return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, params)


def _value_and_grad(loss, params, drawn, accumulate: int):
  """Mean loss and gradient over `accumulate` micro-batches, one at a time in memory."""
  value_and_grad = jax.value_and_grad(loss)
  if accumulate == 1:
    return value_and_grad(params, drawn)
  # Every accumulate-th image, so that a batch spread over devices stays where it is.
  micro = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), drawn)
  zero = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params))
  add = lambda total, part: (jax.tree.map(jnp.add, total, value_and_grad(params, part)), None)
  total, _ = jax.lax.scan(add, zero, micro)
  return jax.tree.map(lambda x: x / accumulate, total)
