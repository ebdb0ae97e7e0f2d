"""The training loop: blocks take turns on a mesh, each a pure function of (config, b, n).

A group is as many blocks as the mesh has rows: one on a single device. Only the active
group's state is on the devices; the others wait in the host's memory. How blocks are
grouped and how the turns fall changes nothing in the result, because nothing passes
between blocks.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import functools
import os
import signal
import threading
import time
from typing import Any

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

from dbjax import block as block_lib
from dbjax import checkpoint
from dbjax import cli
from dbjax import config as config_lib
from dbjax import data
from dbjax import metrics
from dbjax import sample
from dbjax import schedule as schedule_lib
from dbjax import sharding
from dbjax import tasks

Group = tuple[int, ...]
_SHOWN = 100  # samples in a picture


def train(config, workdir: epath.PathLike,
          devices: Sequence[jax.Device] | None = None) -> int | None:
  """Trains `config.train.blocks` to `config.train.num_steps`, from where they are.

  Args:
    config: resolved.
    workdir: of the experiment; made if need be. The same call again resumes.
    devices: that make up the mesh; all of this run by default.

  Returns:
    The signal that stopped it early (everything is saved), or None.

  Raises:
    UserError: the mesh does not fit, the workdir is of another experiment, the processes
      of the run differ, a checkpoint or the data are damaged (at a bad record all blocks are
      saved first, if this is the only process), or a block has diverged.
  """
  workdir = epath.Path(workdir)
  sharding.agree("start all of them with the same command",
                 workdir=str(workdir), **config_lib.flatten(config))
  mesh = sharding.make_mesh(config, devices)
  config_lib.check(workdir, config)
  dataset = data.load(config)
  groups = sharding.groups(config, mesh.shape["block"])
  rows = {b: sharding.row(mesh, group, b) for group in groups for b in group}
  here = [b for b in rows if jax.process_index() in sharding.processes(rows[b])]

  with contextlib.ExitStack() as stack:
    stop = stack.enter_context(_StopSignal())
    saved = {b: stack.enter_context(checkpoint.BlockCheckpoint(
        workdir, b, config.checkpoint.keep, sharding.processes(rows[b]))) for b in rows}
    steps = {b: saved[b].latest() or 0 for b in rows}
    sharding.agree("--workdir must be one that all of them share",
                   **{f"block {b}'s last checkpoint": step for b, step in steps.items()})
    _check_together(config, steps)
    trained_with = (saved[b].shared() for b in rows if steps[b])
    shared = next((x for x in trained_with if x), None) or tasks.module(config).shared(
        config, dataset)
    of_shared = int(checkpoint.checksum(shared))
    sharding.agree("they have other files or texts", **{"task.embedding's table": of_shared})
    states, seconds = {}, dict.fromkeys(rows, 0.0)
    for group in groups:
      metas = {b: saved[b].meta(config, config_lib.binding)
               for b in group if b in here and steps[b]}
      for b, meta in metas.items():
        saved[b].check_shared(meta, of_shared)
      seconds |= {b: meta["seconds"] for b, meta in metas.items()}
      new = [b for b in group if not steps[b]]
      states[group] = _load(config, mesh, group, new, saved, metas)
    if jax.process_index() == 0:
      config_lib.save(workdir, config)
      if config.data.feature == "tokens":  # what is written can be read without the data set
        data.tokenizer_of(config).save(workdir)
    led = [b for b in here if min(sharding.processes(rows[b])) == jax.process_index()]
    for b in led:
      saved[b].save_shared(shared)
    progress = stack.enter_context(contextlib.closing(metrics.Progress(
        config, workdir, groups, steps, seconds, led)))
    compiled = functools.cache(functools.partial(_compile, config, mesh))
    stepper = functools.cache(functools.partial(
        _stepper, config, mesh, compiled, sharding.put(mesh, jax.P(), shared)))
    examine = functools.cache(lambda size: jax.jit(
        sharding.per_block(checkpoint.examine, mesh, size, (0,))))

    def save(group, state, blocks):
      finite, checksums = jax.tree.map(sharding.local_values, examine(len(group))(state))
      mine = [b for b in blocks if b in here]
      for b in mine:
        position = group.index(b)
        if not finite[position]:  # must not replace a good checkpoint
          continue
        saved[b].save(sharding.unstack(mesh, group, state, b), config, progress.seconds[b],
                      {name: values[position] for name, values in checksums.items()}
                      | dict(shared=of_shared))
      for b in mine:
        if not finite[group.index(b)]:
          raise _diverged(b, steps[b], saved[b].latest() or 0)

    batches, bad_data = {}, None
    stack.callback(lambda: [b.close() for b in batches.values()])
    for group, until in turns(config, groups, steps):
      train_step = stepper(group)
      state = sharding.move(states.pop(group), "device")
      progress.start_turn()
      while (step := min(steps[b] for b in group)) < until and not stop.asked():
        active = [b for b in group if steps[b] == step]
        if group not in batches:
          batches[group] = _batches(config, mesh, dataset, step)
        try:
          batch = next(batches[group])
        except cli.UserError as e:
          if jax.process_count() > 1:  # the others wait in the step: nobody can save
            raise
          bad_data = e
          break
        state, step_metrics = train_step(state, batch, active)
        steps |= dict.fromkeys(active, step + 1)
        progress.add(group, active, step_metrics)
        if (step + 1) % config.checkpoint.every_steps == 0 or step + 1 == config.train.num_steps:
          save(group, state, active)
        if config.sample.every_steps and (step + 1) % config.sample.every_steps == 0:
          progress.end_turn(group)
          name = "_".join(f"{b:02d}" for b in active)
          _picture(config, workdir, saved, f"block_{name}_step_{step + 1:06d}")
          progress.start_turn()
      states[group], state = sharding.move(state, "pinned_host"), None
      progress.end_turn(group)
      if not sharding.has_room(states[group]):
        jax.block_until_ready(states[group])  # off the device before the next is on it
      if min(steps[b] for b in group) == config.train.num_steps:
        batches.pop(group).close()
      if stop.signal or bad_data:
        break
    for group in groups:
      unsaved = [b for b in group if b in here and steps[b] > (saved[b].latest() or 0)]
      if unsaved:
        save(group, sharding.move(states[group], "device"), unsaved)

  if bad_data:
    raise bad_data
  if stop.signal:
    print("stopped and saved: the same command goes on from here", flush=True)
  return stop.signal


def turns(config, groups: Sequence[Group],
          steps: Mapping[int, int]) -> Iterator[tuple[Group, int]]:
  """Whose turn it is, and until which of its own steps: (group, until), to the end.

  `config.train.turn` is "all" or "together" (one group after the other), a number of
  steps, or "random" (the paper: one step of a random block).

  Args:
    config: resolved.
    groups: of blocks that are trained at once. A group is where the last of its blocks is.
    steps: of each block to train; the caller counts them up.
  """
  total = config.train.num_steps
  done = lambda group: min(steps[b] for b in group)
  while left := [group for group in groups if done(group) < total]:
    if config.train.turn == "random":
      rng = np.random.default_rng([config.seed, sum(map(done, groups)), 1])  # data: [seed, epoch]
      group = left[rng.choice(len(left))]
      yield group, done(group) + 1
    elif config.train.turn in ("all", "together"):
      yield left[0], total
    else:
      for group in left:
        yield group, min(total, done(group) + int(config.train.turn))


def _load(config, mesh, group: Group, new: Sequence[int], saved, metas):
  """The group's stacked state in the host's memory: `new` blocks, and restored ones."""
  task = tasks.make_task(config, group[0])
  shapes = block_lib.abstract_state(config, task)
  states = {}
  for b, meta in metas.items():
    on_row = sharding.shardings(sharding.row(mesh, group, b), shapes, "pinned_host")
    states[b] = saved[b].restore(sharding.templates(shapes, on_row), meta)
    print(f"block {b} | resumes from step {meta['step']} in {saved[b].directory}", flush=True)
  if new:
    fresh = sharding.init(config, task, mesh, group)
    if not states:
      return sharding.move(fresh, "pinned_host")
    here = {b for b in new if jax.process_index() in saved[b].processes}
    states |= {b: sharding.unstack(mesh, group, fresh, b) for b in here}
  return sharding.stack(mesh, group, states)


def _batches(config, mesh, dataset: data.Dataset, step: int) -> Iterator[Any]:
  """The batches from `step` on, on the mesh; one more is under way there."""
  size = config.train.batch_size
  rows = sharding.batch_rows(mesh, size)
  last = None
  with contextlib.closing(dataset.stream(
      config.seed, range(step, config.train.num_steps), size, rows,
      config.data.workers)) as stream:
    for batch in stream:
      batch = sharding.put_batch(mesh, size, rows, batch)
      if last is not None:
        yield last
      last = batch
    yield last


def _stepper(config, mesh, compiled, shared, group: Group):
  """(state, batch, active blocks) -> (state, metrics) of a group."""
  step = functools.partial(compiled, tasks.make_task(config, group[0]), len(group))
  step_all = step(False)  # now: the clock of the turn does not run yet
  schedule = schedule_lib.make_schedule(config.schedule, config.num_blocks)
  intervals = [schedule.training_interval(b) for b in group]
  of_blocks = functools.partial(sharding.put, mesh, jax.P("block"))
  blocks = of_blocks(np.array(group, np.int32))
  intervals = of_blocks(jax.tree.map(lambda *x: np.stack(x), *intervals))

  def take(state, batch, active):
    if len(active) == len(group):
      return step_all(state, batch, blocks, intervals, shared)
    return step(True)(state, batch, blocks, intervals, shared, of_blocks(np.isin(group, active)))

  return take


def _compile(config, mesh, task, size: int, some: bool):
  """The training step of `size` blocks like `task`, or of some of them; see `sharding`."""
  begin = time.perf_counter()
  compiled = sharding.compile_step(config, task, mesh, size, some)
  if jax.process_index() == 0:
    seconds, memory = time.perf_counter() - begin, compiled.memory_analysis()
    what = "some of " * some + f"{size} blocks of " * (size > 1)
    print(f"compiled the step of {what}{task.network.num_layers} layers in {seconds:.0f} s | "
          f"on each device {memory.alias_size_in_bytes / 1e6:,.1f} MB of state, "
          f"{memory.temp_size_in_bytes / 1e6:,.1f} MB of temporaries", flush=True)
  return compiled


def _check_together(config, steps: Mapping[int, int]):
  """Raises UserError where blocks that learn one table do not stand at one step."""
  if config.task.get("shared_embeddings", False) and len(set(steps.values())) > 1:
    words = ", ".join(f"block {b} at step {step}" for b, step in steps.items())
    raise cli.UserError(f"task.shared_embeddings=True, but the last checkpoints are of {words}: "
                        "move those of later steps away, so that all go on from one")


def _diverged(b: int, step: int, kept: int) -> cli.UserError:
  return cli.UserError(
      f"block {b} has diverged by step {step}: its weights are not finite; the last checkpoint, "
      f"step {kept}, is kept. Try a lower optimizer.learning_rate in a new --workdir")


def _picture(config, workdir, saved, name: str):
  """Samples to look at, once every block has a checkpoint. Drawn by process 0."""
  for b in saved.values():
    b.wait()
  sharding.wait_for_all(name)
  if jax.process_index() == 0 and all(checkpoint.exists(workdir, b)
                                      for b in range(config.num_blocks)):
    try:
      model = sample.load(workdir)
    except cli.UserError as e:  # a block that another process is writing: no reason to end this run
      print(f"note: no samples ({e})", flush=True)
      return
    (workdir / "samples").mkdir(parents=True, exist_ok=True)
    path = tasks.module(config).save(model, *sample.collect(model.generate(_SHOWN)),
                                     workdir / "samples" / name)
    print(f"samples: {path}", flush=True)


class _StopSignal(contextlib.AbstractContextManager):
  """SIGINT or SIGTERM to any process: the loop ends after the step under way, and saves.

  `signal` is the one that was received, or None.
  """

  def __init__(self):
    self.signal = None
    self._before = {}
    self._steps = 0

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      # Many processes agree on the step to stop after through JAX, which watches for SIGTERM.
      watched = (signal.SIGINT, signal.SIGTERM)[:1 if jax.process_count() > 1 else 2]
      for number in watched:
        self._before[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def asked(self) -> bool:
    """To be called once before each step, by every process."""
    if jax.process_count() > 1:
      self._steps += 1
      if multihost_utils.reached_preemption_sync_point(self._steps):
        self.signal = signal.SIGTERM
    return self.signal is not None

  def _handle(self, number, _):
    if self.signal:
      raise KeyboardInterrupt  # asked twice: now
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      self.signal = number
