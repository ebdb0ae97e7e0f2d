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


def train(config, workdir: epath.PathLike):
  """Trains `config.train.blocks` to `config.train.num_steps`, from where they are.

  Args:
    config: resolved.
    workdir: of the experiment; made if need be. The same call again resumes.

  Raises:
    UserError: the workdir is of another experiment, or a checkpoint is damaged.
  """
  workdir = epath.Path(workdir)
  dataset = data.load(config)
  schedule = schedule_lib.make_schedule(config.schedule, config.num_blocks)
  tasks = {b: image.make_task(config, b) for b in config.train.blocks}
  config_lib.save(workdir, config)

  with contextlib.ExitStack() as stack:
    saved = {b: stack.enter_context(checkpoint.BlockCheckpoint(workdir, b, config.checkpoint.keep))
             for b in tasks}
    states, seconds = {}, {}  # on the host
    for b in tasks:
      states[b], seconds[b] = _restore_or_init(config, tasks[b], saved[b])
    steps = {b: int(state.step) for b, state in states.items()}
    progress = stack.enter_context(
        contextlib.closing(metrics.Progress(config, workdir, steps, seconds)))
    stop = stack.enter_context(_stop_signal())
    compiled = functools.cache(functools.partial(_compile, config))

    def save(b, state):
      saved[b].save(state, config_lib.fingerprint(config), progress.seconds[b])

    state = None
    for b, until in turns(config, steps):
      train_step = compiled(tasks[b])
      interval = schedule.training_interval(b)
      state = jax.device_put(states[b])
      progress.start_turn()
      while steps[b] < until and not stop.is_set():
        batch = dataset.batch(config.seed, steps[b], config.train.batch_size)
        state, step_metrics = train_step(state, batch, np.int32(b), interval)
        steps[b] += 1
        progress.add(b, steps[b], step_metrics)
        if steps[b] % config.checkpoint.every_steps == 0 or steps[b] == config.train.num_steps:
          _require_finite(b, steps[b], step_metrics, saved[b])
          save(b, state)
        if config.sample.every_steps and steps[b] % config.sample.every_steps == 0:
          progress.end_turn(b)
          _picture(config, workdir, saved[b], sum(steps.values()))
          progress.start_turn()
      states[b], state = jax.device_get(state), None  # off the device before the next is on it
      progress.end_turn(b)
      if stop.is_set():
        break
    for b, state in states.items():
      if steps[b] > (saved[b].latest() or 0):
        save(b, state)

  if stop.is_set():
    print("stopped and saved: the same command goes on from here", flush=True)


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
      rng = np.random.default_rng([config.seed, sum(steps.values())])
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
  meta = saved.meta(config_lib.fingerprint(config))
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


def _require_finite(b: int, step: int, step_metrics, saved):
  """A diverged block must not replace a good checkpoint."""
  values = {name: float(x) for name, x in step_metrics.items()}
  if not np.isfinite(list(values.values())).all():
    raise cli.UserError(
        f"block {b} has diverged at step {step} ({values}): its last checkpoint, step "
        f"{saved.latest() or 0}, is kept; try a lower optimizer.learning_rate in a new --workdir")


def _picture(config, workdir, saved, step: int):
  """A grid of samples, once every block has a checkpoint."""
  saved.wait()
  if all(checkpoint.exists(workdir, b) for b in range(config.num_blocks)):
    model = sample.load(workdir)
    samples, labels = sample.collect(sample.generate(model, 10 * config.data.num_classes))
    path = workdir / "samples" / f"{step:08d}.png"
    metrics.save_grid(path, samples, labels, config.data.num_classes)
    print(f"samples: {path}", flush=True)


@contextlib.contextmanager
def _stop_signal() -> Iterator[threading.Event]:
  """Set by SIGINT or SIGTERM: the loop ends after the step under way and saves."""
  stop = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield stop
    return
  signals = (signal.SIGINT, signal.SIGTERM)
  def handle(*_):
    if stop.is_set():
      raise KeyboardInterrupt  # asked twice: now
    stop.set()

  before = [signal.signal(s, handle) for s in signals]
  try:
    yield stop
  finally:
    for s, handler in zip(signals, before):
      signal.signal(s, handler)
