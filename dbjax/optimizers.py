"""The optimizer of a block, by `optimizer.name`: all of them are optax's.

    adamw          Adam with decoupled weight decay (arXiv 1711.05101).
    muon           Kernels of the layers move along their momentum (0.95) made orthogonal, all else
                   by AdamW with Nesterov's momentum (arXiv 2502.16982). Its updates are as large as
                   AdamW's, and so is its rate.
    schedule_free  AdamW whose average takes the place of a falling rate (arXiv 2405.15682). That
                   average is the block's: `train.ema_decay` says nothing.
    adafactor      Second moments by rows and columns (arXiv 1804.04235) where both are 128 or more,
                   and as arXiv 2106.04560 has it: with a momentum, and a rate that does not follow
                   the size of weights. With b1=0 there is no momentum, and of wide networks next
                   to nothing to remember.
    lion           The sign of a momentum (arXiv 2302.06675). It wants a fifth of AdamW's rate, and
                   five times its weight decay.

Each clips the gradient by its norm, has the learning rate of the block's own steps, of which those
passed over do not count, and a weight decay that goes with the rate. What differs between them
stands here, and nowhere else.
"""

from collections.abc import Callable, Mapping
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from dbjax.errors import UserError
from dbjax.task import Task

AXIS = "blocks"  # the name of the axis of blocks, for those that share what they learn
_RMS = 0.2  # of Muon's updates: that of AdamW's (arXiv 2502.16982, section 2.2)
_BETA = np.float32(0.95)  # of Muon's momentum, optax's own


def optimizer(task: Task, *, good=True, exploded=False, active=True, rate: Any = None
              ) -> optax.GradientTransformation:
  """Clipping and the optimizer of the config.

  Of parameters that blocks train together (`Task.joint`) they average the gradient, and so keep
  them equal.

  Args:
    task: of this block.
    good, exploded, active: see `update`; of AdamW alone.
    rate: a function of the step, in place of the config's learning rate.

  Raises:
    UserError: there is nothing for Muon, when the state is made.
  """
  o, joint = task.config.optimizer, task.joint if task.config.num_blocks > 1 else ()
  rate = learning_rate(task.config) if rate is None else rate
  average = lambda grads, _: grads | {
      name: jax.lax.pmean(grads[name], AXIS) for name in joint}

  def clip(grads, _):
    scale = o.clip_norm / jnp.maximum(optax.tree.norm(grads), o.clip_norm)
    return jax.tree.map(lambda g: jnp.where(good, scale * g, 0), grads)

  of = _adamw(o, rate, good, exploded, active) if o.name == "adamw" else _OTHERS[o.name](task, rate)
  return optax.chain(optax.stateless(clip), *[optax.stateless(average)] * bool(joint), of)


def update(task: Task, grads: Any, state: Any, *, good, exploded, active) -> tuple[Any, Any]:
  """One step of the optimizer, or none.

  AdamW stands still by its own numbers: b1 = b2 = 1 without a gradient keeps the moments, b1 = b2 =
  0 makes them zero. Choosing among whole results instead, as for the others, reads and writes them
  once more, which is half of an update's time.

  Args:
    task: of this block.
    grads: like the params.
    state: a `block.BlockState`.
    good: a bool, traced or not; False: the state stays, whatever the gradient is.
    exploded: where not `good`: the state is as at the first step, of weights that are `state.ema`;
      only the learning rate goes on.
    active: False: the state stays, whatever else holds.

  Returns:
    What is to be added to the params, to be discarded where it is not `good`, and may not be finite
    there; the optimizer's next state.
  """
  alone = task.config.optimizer.name == "adamw"  # but for its counts
  of = optimizer(task, **dict(good=good, exploded=exploded, active=active) if alone else {})
  updates, after = of.update(grads, state.opt_state, state.params)
  good, exploded = good & active, exploded & active
  fresh = _but_the_rate(of.init(state.ema), state.opt_state)
  return updates, jax.tree.map(
      lambda n, f, o: n if alone and n.dtype != jnp.int32 else jnp.where(
          good, n, jnp.where(exploded, f, o)), after, fresh, state.opt_state)


def _but_the_rate(fresh: Any, before: Any) -> Any:
  """A fresh state, with the steps that learning rates have counted before."""
  average = lambda x: isinstance(x, contrib.ScheduleFreeState)
  counts = lambda x: average(x) or isinstance(x, optax.ScaleByScheduleState)

  def kept(new, old):
    if average(new):  # it weighs its terms by the learning rate, whose steps it counts itself
      return new._replace(step_count=old.step_count, base_optimizer_state=_but_the_rate(
          new.base_optimizer_state, old.base_optimizer_state))
    return old if counts(new) else new

  return jax.tree.map(kept, fresh, before, is_leaf=counts)


def own_average(config: Any, opt_state: Any, params: Any) -> Any:
  """The average of weights that an optimizer makes itself, like `params`; or None.

  Of schedule_free it is x of arXiv 2405.15682, equation 5, where the params are y.
  """
  if config.optimizer.name != "schedule_free":
    return None
  return contrib.schedule_free_eval_params(opt_state[-1], params)


def learning_rate(config: Any) -> Any:
  """The learning rate, a function of the block's own step; or a number."""
  o, num_steps = config.optimizer, config.train.num_steps
  if o.schedule == "cosine":
    steps = max(num_steps, o.warmup_steps + 1)
    return optax.warmup_cosine_decay_schedule(0.0, o.learning_rate, o.warmup_steps, steps)
  if o.schedule == "wsd":  # warm-up, stable, decay
    return optax.join_schedules(
        [optax.linear_schedule(0.0, o.learning_rate, o.warmup_steps) if o.warmup_steps else
         optax.constant_schedule(o.learning_rate),
         optax.linear_schedule(o.learning_rate, 0.0, o.decay_steps)], [num_steps - o.decay_steps])
  if o.warmup_steps:
    return optax.linear_schedule(0.0, o.learning_rate, o.warmup_steps)
  return o.learning_rate


def _adamw(o: Any, rate: Any, good, exploded, active) -> optax.GradientTransformation:
  b1, b2 = (jnp.where(good, b, jnp.where(exploded, 0.0, 1.0)) for b in (o.b1, o.b2))
  b1, b2 = (jnp.where(active, b, 1.0) for b in (b1, b2))
  b1 = jnp.asarray(b1, jnp.float32)  # not weakly so, or bfloat16 moments would round b1 as well
  return optax.adamw(rate, b1, b2, weight_decay=o.weight_decay, mu_dtype=o.moments_dtype)


def _schedule_free(task: Task, rate: Any) -> optax.GradientTransformation:
  o = task.config.optimizer
  return contrib.schedule_free_adamw(rate, b1=o.b1, b2=o.b2, weight_decay=o.weight_decay)


def _adafactor(task: Task, rate: Any) -> optax.GradientTransformation:
  o = task.config.optimizer
  direction = optax.adafactor(  # given the rate, optax would not scale the weight decay by it
      None, multiply_by_parameter_scale=False, momentum=np.float32(o.b1) if o.b1 else None,
      dtype_momentum=o.moments_dtype, weight_decay_rate=o.weight_decay)
  return optax.chain(direction, optax.scale_by_learning_rate(rate, flip_sign=False))


def _lion(task: Task, rate: Any) -> optax.GradientTransformation:
  o = task.config.optimizer
  return optax.lion(rate, np.float32(o.b1), np.float32(o.b2), mu_dtype=o.moments_dtype,
                    weight_decay=o.weight_decay)


def _muon(task: Task, rate: Any) -> optax.GradientTransformation:
  """Muon sees kernels that hold several matrices side by side as stacks of these."""
  o = task.config.optimizer

  def seen(params):
    counts = matrices(task, params)
    if not any(jax.tree.leaves(counts)):
      raise UserError(f"optimizer.name=muon: model.network={task.config.model.network} has no "
                      "arrays called kernel (L, in, out) in its layers: choose another optimizer")
    of = contrib.muon(
        rate, beta=_BETA, weight_decay=o.weight_decay, mu_dtype=o.moments_dtype,
        adam_b1=np.float32(o.b1), adam_b2=o.b2, adam_weight_decay=o.weight_decay,
        muon_weight_dimension_numbers=jax.tree.map(
            lambda n: contrib.MuonDimensionNumbers(-2, -1) if n else None, counts),
        consistent_rms=_RMS)
    return of, lambda tree: jax.tree.map(_apart, tree, counts)

  def init(params):
    of, apart = seen(params)
    return of.init(apart(params))

  def step(grads, state, params):
    of, apart = seen(params)
    updates, state = of.update(apart(grads), state, apart(params))
    return jax.tree.map(_together, updates, params), state

  return optax.GradientTransformation(init, step)


def matrices(task: Task, params: Any) -> Any:
  """How many matrices each array holds that Muon makes orthogonal, for each of its layers.

  They are the kernels of the layers, by `parts` of the network, but for the modulation: how noise
  conditions a layer is more like an embedding. A kernel that makes k times what the kernel `out`
  beside it takes holds k side by side: q, k and v; the gate and the other half of a SwiGLU.

  Args:
    task: whose network says in `parts` which parameters are the layers.
    params: arrays or shapes.

  Returns:
    A tree like `params` of ints: 0 of what AdamW moves.
  """
  name = lambda path: tuple(str(getattr(p, "key", getattr(p, "name", p))) for p in path)
  shapes = {name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(params)}

  def count(path, x):
    *where, layer, last = ("", *name(path))
    if not re.match(task.network.parts["layers"], name(path)[0]) or last != "kernel" or (
        layer == "modulation" or x.ndim not in (2, 3)):
      return 0
    beside = shapes.get((*where[1:], "out", "kernel"))
    takes = x.shape[-1] if beside is None or layer == "out" else beside[-2]
    return 1 if x.shape[-1] % takes else x.shape[-1] // takes

  return jax.tree_util.tree_map_with_path(count, params)


def _apart(x: jax.Array, count: int) -> jax.Array:
  """(..., in, count * out) -> (..., count, in, out), if there are several."""
  if count < 2:
    return x
  return jnp.moveaxis(x.reshape(*x.shape[:-1], count, x.shape[-1] // count), -2, -3)


def _together(x: jax.Array, like: jax.Array) -> jax.Array:
  """The inverse of `_apart`, to the shape of `like`."""
  return x if x.shape == like.shape else jnp.moveaxis(x, -3, -2).reshape(like.shape)


_OTHERS: Mapping[str, Callable[[Task, Any], optax.GradientTransformation]] = {
    "muon": _muon, "schedule_free": _schedule_free, "adafactor": _adafactor, "lion": _lion}
