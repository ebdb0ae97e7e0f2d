"""The training loop: blocks take turns on one device, each a pure function of (config, b, n).

Only the active block's state is on the device; the others wait in host memory. How the
turns fall changes nothing in the result, because nothing passes between blocks.
"""

from collections.abc import Iterator, Mapping
import contextlib
import functools
import signal
import threading
import time

from etils import epath
import jax
import numpy as np

from dbjax import block as block_lib
from dbjax import checkpoint
from dbjax import cli
from dbjax import config as config_lib
from dbjax import data
from dbjax import metrics
from dbjax import sample
from dbjax import schedule as schedule_lib
from dbjax.tasks import image


def train(config, workdir: epath.PathLike) -> int | None:
  """Trains `config.train.blocks` to `config.train.num_steps`, from where they are.

  Args:
    config: resolved.
    workdir: of the experiment; made if need be. The same call again resumes.

  Returns:
    The signal that stopped it early (everything is saved), or None.

  Raises:
    UserError: the workdir is of another experiment, a checkpoint is damaged, or a block
      has diverged.
  """
  workdir = epath.Path(workdir)
  config_lib.check(workdir, config)
  dataset = data.load(config)
  schedule = schedule_lib.make_schedule(config.schedule, config.num_blocks)
  tasks = {b: image.make_task(config, b) for b in config.train.blocks}

  with contextlib.ExitStack() as stack:
    stop = stack.enter_context(_StopSignal())
    saved = {b: stack.enter_context(checkpoint.BlockCheckpoint(workdir, b, config.checkpoint.keep))
             for b in tasks}
    states, seconds = {}, {}  # on the host
    for b in tasks:
      states[b], seconds[b] = _restore_or_init(config, tasks[b], saved[b])
    steps = {b: int(state.step) for b, state in states.items()}
    config_lib.save(workdir, config)
    progress = stack.enter_context(
        contextlib.closing(metrics.Progress(config, workdir, steps, seconds)))
    compiled = functools.cache(functools.partial(_compile, config))

    def save(b, state):
      _require_finite(b, state, saved[b])
      saved[b].save(state, config, progress.seconds[b])

    state = None
    for b, until in turns(config, steps):
      train_step = compiled(tasks[b])
      interval = schedule.training_interval(b)
      state = jax.device_put(states[b])
      progress.start_turn()
      while steps[b] < until and not stop.signal:
        batch = dataset.batch(config.seed, steps[b], config.train.batch_size)
        state, step_metrics = train_step(state, batch, np.int32(b), interval)
        steps[b] += 1
        progress.add(b, steps[b], step_metrics)
        if steps[b] % config.checkpoint.every_steps == 0 or steps[b] == config.train.num_steps:
          save(b, state)
        if config.sample.every_steps and steps[b] % config.sample.every_steps == 0:
          jax.block_until_ready(state)
          progress.end_turn(b)
          _picture(config, workdir, saved, f"block_{b:02d}_step_{steps[b]:06d}")
          progress.start_turn()
      states[b], state = jax.device_get(state), None  # off the device before the next is on it
      progress.end_turn(b)
      if stop.signal:
        break
    for b, state in states.items():
      if steps[b] > (saved[b].latest() or 0):
        save(b, state)

  if stop.signal:
    print("stopped and saved: the same command goes on from here", flush=True)
  return stop.signal


def turns(config, steps: Mapping[int, int]) -> Iterator[tuple[int, int]]:
  """Whose turn it is, and until which of its own steps: (block, until), to the end.

  `config.train.turn` is "all" (one block after the other), a number of steps, or
  "random" (the paper: one step of a random block).

  Args:
    config: resolved.
    steps: of each block to train; the caller counts them up.
  """
  total = config.train.num_steps
  while left := [b for b, step in steps.items() if step < total]:
    if config.train.turn == "random":
      rng = np.random.default_rng([config.seed, sum(steps.values()), 1])  # data: [seed, epoch]
      b = int(rng.choice(left))
      yield b, steps[b] + 1
    elif config.train.turn == "all":
      yield left[0], total
    else:
      for b in left:
        yield b, min(total, steps[b] + int(config.train.turn))


def _restore_or_init(config, task, saved) -> tuple[block_lib.BlockState, float]:
  """The block's state on the host, and the seconds it has been trained."""
  if saved.latest() is None:
    return jax.device_get(block_lib.init(config, task, saved.block)), 0.0
  meta = saved.meta(config=config_lib.binding(config))
  state = saved.restore(block_lib.abstract_state(config, task))
  print(f"block {saved.block} | resumes from step {meta['step']} in {saved.directory}", flush=True)
  return state, meta["seconds"]


def _compile(config, task):
  """The training step for blocks of this task, compiled; their states are donated."""
  begin = time.perf_counter()
  compiled = block_lib.compile_step(config, task)
  print(f"compiled the step of {task.network.num_layers} layers in "
        f"{time.perf_counter() - begin:.0f} s", flush=True)
  return compiled


def _require_finite(b: int, state: block_lib.BlockState, saved):
  """A diverged block must not replace a good checkpoint."""
  if not all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state))):
    raise cli.UserError(
        f"block {b} has diverged by step {int(state.step)}: its weights are not finite; the last "
        f"checkpoint, step {saved.latest() or 0}, is kept. Try a lower optimizer.learning_rate in "
        "a new --workdir")


def _picture(config, workdir, saved, name: str):
  """A grid of samples, once every block has a checkpoint."""
  for blocks in saved.values():
    blocks.wait()
  if all(checkpoint.exists(workdir, b) for b in range(config.num_blocks)):
    model = sample.load(workdir)
    columns = min(config.data.num_classes, 10)
    samples, labels = sample.collect(
        sample.generate(model, 10 * columns, labels=tuple(range(columns))))
    path = workdir / "samples" / f"{name}.png"
    metrics.save_grid(path, samples, labels, columns)
    print(f"samples: {path}", flush=True)


class _StopSignal(contextlib.AbstractContextManager):
  """SIGINT or SIGTERM sets `signal`: the loop ends after the step under way, and saves."""

  def __init__(self):
    self.signal = None
    self._before = {}

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGINT, signal.SIGTERM):
        self._before[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _handle(self, number, _):
    if self.signal:
      raise KeyboardInterrupt  # asked twice: now
    self.signal = number
