"""The training loop: blocks take turns on a mesh, each a pure function of (config, b, n).

A group is as many blocks as the mesh has rows: one on a single device. Only the active
group's state is on the devices; the others wait in the host's memory. How blocks are
grouped and how the turns fall changes nothing in the result, because nothing passes
between blocks. How a run begins stands in `begin.py`.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import time
from typing import Any

from etils import epath
import jax
import numpy as np

from dbjax import begin
from dbjax import block as block_lib
from dbjax import checkpoint
from dbjax import config as config_lib
from dbjax import data
from dbjax import debug as debug_lib
from dbjax import fork
from dbjax import loading
from dbjax import metrics
from dbjax import owner
from dbjax import paths
from dbjax import profiler
from dbjax import program
from dbjax import provenance
from dbjax import sharding
from dbjax import stopping
from dbjax import task as task_lib
from dbjax.errors import UserError

Group = tuple[int, ...]
_SHOWN = 100  # samples in a picture
_HELD_OUT = 2000  # examples, at most, by which the best checkpoint is found
_PATIENCE = (1, 10, 30, 60, 120, 240)  # seconds, each before another try to save


def train(config: Any, workdir: epath.PathLike, dataset: Any = None, *,
          devices: Sequence[jax.Device] | None = None, fork_from: epath.PathLike | None = None,
          command: str = "", debug: bool = False) -> metrics.History:
  """Trains `config.train.blocks` to `config.train.num_steps`, from where they are.

  Args:
    config: a ConfigDict, complete or not.
    workdir: of the experiment; made if need be. The same call again resumes.
    dataset: what to train on and what is held out, if not what config.data names: see
      `dbjax/data/__init__.py`.
    devices: that make up the mesh; all of this run by default.
    fork_from: another workdir, where blocks that have no checkpoint here begin: see `fork.py`.
    command: that was typed, to be recorded beside the blocks.
    debug: run in Python, op by op, end at the first nan, and leave the workdir as it is: see
      `debug.py`.

  Returns:
    The history of the blocks: steps, loss, and the signal that stopped it early, if one did
    (everything is saved).

  Raises:
    UserError: the config is none, the mesh does not fit, the workdir is of another experiment, the
      processes of the run differ, a checkpoint or the data are damaged (at a bad record all
      blocks are saved first, if this is the only process), or a block has diverged; with
      `debug`, a nan.
  """
  config, workdir = config_lib.resolve(config), paths.expand(workdir, "workdir")
  fork_from = paths.expand(fork_from, "fork_from") if fork_from else None
  with contextlib.ExitStack() as stack:
    if debug:
      config = debug_lib.prepare(config, fork_from)
      devices = (jax.devices() if devices is None else devices)[:1]
      stack.enter_context(debug_lib.in_python())
    run = _open(config, workdir, dataset, devices, fork_from, debug, stack)
    if command and not debug:
      provenance.record(command, {run.saved[b].directory: run.steps[b] for b in run.led
                                  if run.steps[b] < run.total(b)}, run.mesh)
    bad_data = None
    for group, until in turns(run.config, run.groups, run.steps):
      try:
        _take_turn(run, group, until)
      except _BadData as e:
        bad_data = e.__cause__
      if run.stop.signal or bad_data:
        break
    _save_all(run)
  if run.diverged:
    raise UserError("; ".join(run.diverged.values()) + ". Other blocks have gone on. Try a lower "
                    "optimizer.learning_rate in a new --workdir")
  if bad_data:
    raise bad_data
  if run.stop.signal and not debug:
    print("stopped and saved: the same command goes on from here", flush=True)
  return metrics.read_history(run.workdir, run.config.train.blocks, run.stop.signal)


@dataclasses.dataclass(frozen=True)
class _Run:
  """What a run holds while it lasts; `steps`, `states` and `batches` change."""

  config: Any
  workdir: epath.Path
  mesh: jax.sharding.Mesh
  dataset: data.Dataset
  groups: list[Group]
  here: list[int]  # the blocks of which this process has a part
  led: list[int]  # those whose files this process writes
  saved: dict[int, checkpoint.BlockCheckpoint]
  steps: dict[int, int]  # done, of each block
  states: dict[Group, Any]  # in the host's memory, of those that wait
  batches: dict[Group, Generator[Any, None, None]]  # from the next step of the group on
  progress: metrics.Progress
  stop: stopping.StopSignal
  stepper: Callable[[Group], Callable]
  examine: Callable[[int], Callable]
  held_out_losses: Callable[[Group], Callable]
  norms: Callable[[Group], Callable]
  frozen_checksum: int
  trained_with: dict[str, Any]
  forked: dict[int, dict[str, Any]]  # of blocks that began in another workdir
  debug: bool  # nothing is written
  diverged: dict[int, str] = dataclasses.field(default_factory=dict)  # and what is said of them

  def total(self, block: int) -> int:
    """The steps that a block is to have."""
    return task_lib.of_block(self.config, block).train.num_steps


def _open(config: Any, workdir: epath.Path, dataset: Any, devices: Any,
          fork_from: epath.Path | None, debug: bool, stack: contextlib.ExitStack) -> _Run:
  """Agrees, restores or initialises, and opens files; compiles nothing."""
  begin.check_log(config)
  sharding.agree("start all of them with the same command", workdir=str(workdir),
                 fork_from=str(fork_from), **config_lib.flatten(config))
  for kind in task_lib.kinds(config):
    task_lib.check(kind)
  mesh = sharding.make_mesh(config, devices)
  config_lib.check(workdir, config)
  dataset = data.load(config, dataset)
  groups = sharding.groups(config, mesh.shape["block"])
  rows = {b: sharding.row(mesh, group, b) for group in groups for b in group}
  owners = {b: sharding.processes(row) for b, row in rows.items()}
  here = [b for b in rows if jax.process_index() in owners[b]]
  led = [b for b in here if min(owners[b]) == jax.process_index()]

  stop = stack.enter_context(stopping.StopSignal())
  writes = [] if debug else led
  begin.own(stack.enter_context(owner.Owner()),
            [paths.directory(workdir, b) for b in writes], stop)
  if fork_from:
    begin.by_first("a fork must succeed", fork.fork, fork_from, workdir, list(rows), config,
                   dataset)
  saved = {b: stack.enter_context(checkpoint.BlockCheckpoint(
      workdir, b, keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every,
      processes=owners[b])) for b in rows}
  found = begin.find(config, workdir, mesh, dataset=dataset, groups=groups, saved=saved,
                     here=here, writes=writes)
  if not debug:
    begin.by_first("there must be room", begin.check_room, config, workdir, found.steps)
    begin.by_first("the config must be saved", lambda: config_lib.save(
        workdir, config, task_lib.find(config.task.name).files(config, workdir)))
  for b in writes:
    saved[b].save_frozen(found.frozen)
  seconds = {b: found.metas[b]["seconds"] if b in found.metas else 0.0 for b in rows}
  kept = {b: stack.enter_context(contextlib.closing(
      begin.open_logs(config, workdir, b, found.steps[b]))) for b in writes}
  progress = stack.enter_context(contextlib.closing(metrics.Progress(
      config, groups, found.steps, seconds, led, kept)))
  batches: dict[Group, Generator[Any, None, None]] = {}
  stack.callback(_close, batches, groups)
  return _Run(
      config=config, workdir=workdir, mesh=mesh, dataset=dataset, groups=groups, here=here,
      led=led, saved=saved, steps=found.steps, states=found.states, batches=batches,
      progress=progress, stop=stop, frozen_checksum=found.frozen_checksum,
      trained_with=found.trained_with, debug=debug, forked={
          b: dict(forked_from=meta["trained_with"]["forked_from"])
          for b, meta in found.metas.items() if "forked_from" in meta["trained_with"]},
      **_programs(config, mesh, dataset, sharding.put(mesh, jax.P(), found.frozen)))


def _close(batches: dict[Group, Generator[Any, None, None]], groups: Sequence[Group]):
  """Ends the streams of some groups, where they have begun."""
  for group in groups:
    if group in batches:
      batches.pop(group).close()


def _programs(config: Any, mesh: jax.sharding.Mesh, dataset: data.Dataset, frozen: Any
              ) -> dict[str, Any]:
  """What computes, by its name in a `_Run`: each made when it is first asked for, and kept."""
  compiled = functools.cache(functools.partial(_compile, mesh))
  return dict(
      stepper=functools.cache(functools.partial(_stepper, config, mesh, compiled, frozen)),
      examine=functools.cache(lambda size: jax.jit(
          program.per_block(checkpoint.examine, mesh, size, (0,)))),
      held_out_losses=functools.cache(functools.partial(
          _held_out_losses, config, mesh, dataset.held_out, frozen)),
      norms=functools.cache(functools.partial(_norms, config, mesh, frozen)))


def _take_turn(run: _Run, group: Group, until: int):
  """Trains a group until its last block is at step `until`, or the run is to stop.

  Raises:
    _BadData: the next batch cannot be read; the group is where it was before it.
  """
  config, steps, progress = task_lib.of_block(run.config, group[0]), run.steps, run.progress
  every = [x for x in (config.checkpoint.every_steps, config.checkpoint.keep_every) if x]
  train_step = run.stepper(group)
  norms = run.norms(group) if config.log.norms else None
  window = _window(run, group)
  state = sharding.move(run.states.pop(group), "device")
  progress.start_turn()
  bad_data = None
  with window:
    while (step := min(steps[b] for b in group)) < until and not run.stop.asked():
      active, number = [b for b in group if steps[b] == step], step + 1
      try:
        batch = _next_batch(run, group, step)
      except _BadData as e:
        bad_data = e
        break
      with window.step(number), debug_lib.nan_named(active, number):
        looked = norms(state, batch) if norms and progress.is_due(group, number) else {}
        state, step_metrics = train_step(state, batch, active)
      window.done(number, step_metrics)
      steps.update(dict.fromkeys(active, number))
      progress.add(group, active, step_metrics | looked)
      if number == config.train.num_steps or not all(number % x for x in every):
        _save(run, group, state, active)
      if config.sample.every_steps and number % config.sample.every_steps == 0:
        progress.end_turn(group)
        _picture(run, group, state, blocks=active, step=number)
        progress.start_turn()
  run.states[group], state = sharding.move(state, "pinned_host"), None
  progress.end_turn(group)
  if not sharding.has_room(run.states[group]):
    jax.block_until_ready(run.states[group])  # off the device before the next is on it
  if bad_data:
    raise bad_data
  if min(steps[b] for b in group) == config.train.num_steps:
    _close(run.batches, [group])


class _BadData(Exception):
  """A batch that cannot be read, where what is trained can still be saved."""


def _next_batch(run: _Run, group: Group, step: int) -> Any:
  if group not in run.batches:
    run.batches[group] = _batches(task_lib.of_block(run.config, group[0]), run.mesh, run.dataset,
                                  step)
  try:
    return next(run.batches[group])
  except Exception as e:  # of the user's own data too, or of a process that decoded them
    if jax.process_count() > 1:  # the others wait in the step: nobody can save
      raise
    raise _BadData from e


def _save(run: _Run, group: Group, state: Any, blocks: Sequence[int], now: bool = False):
  """Saves some blocks of a group, whose stacked state is on the devices.

  Args:
    run, group, state, blocks: what.
    now: returns when they are on disk, not before.

  A block that has diverged is not saved, and trains no more.

  Raises:
    UserError: one cannot be written.
  """
  if run.debug:
    return
  trains, checksums = jax.tree.map(sharding.local_values, run.examine(len(group))(state))
  mine = [b for b in blocks if b in run.here and b not in run.diverged]
  held_out = run.held_out_losses(group)(state) if run.config.checkpoint.best else {}
  lost = sharding.union({b for b in mine if not trains[group.index(b)]}, run.config.num_blocks)
  for b in lost:
    run.diverged[b] = (
        f"block {b} has diverged by step {run.steps[b]}: its loss or its weights are not finite, "
        f"or explode; the last checkpoint, step {run.saved[b].latest() or 0}, is kept")
    run.steps[b] = run.total(b)  # its turns are over
  if lost:  # the others may be at another step, and so at another batch
    run.progress.lost |= lost
    _close(run.batches, [group])
  for b in mine:
    position = group.index(b)
    if b in lost:  # must not replace a good checkpoint
      continue
    _save_block(run.saved[b], now, functools.partial(
        run.saved[b].save, program.unstack(run.mesh, group, state, b), run.config,
        seconds=run.progress.seconds[b],
        checksums={name: values[position] for name, values in checksums.items()}
        | dict(frozen=run.frozen_checksum), trained_with=run.trained_with | run.forked.get(b, {}),
        held_out=held_out.get(position)))


def _save_block(saved: checkpoint.BlockCheckpoint, now: bool, save: Callable[[], None]):
  """Saves a block; where that fails, waits and tries again, while its state is in memory.

  Raises:
    UserError: it has failed too often.
  """
  try:
    save()
    if now:
      saved.wait()
    return
  except checkpoint.SaveFailed as e:
    failed = e
  for number, seconds in enumerate(_PATIENCE[:None if jax.process_count() == 1 else 0]):
    print(f"note: {failed}: it is tried again in {seconds} s, {len(_PATIENCE) - number} times in "
          f"the next {sum(_PATIENCE[number:])} s", flush=True)
    time.sleep(seconds)
    try:
      save()
      saved.wait()
      print(f"note: {saved.directory} is saved", flush=True)
      return
    except checkpoint.SaveFailed as e:
      failed = e
  raise UserError(f"{failed}: make room, and start the same command again; it goes on from step "
                  f"{saved.latest() or 0}") from failed


def _save_all(run: _Run):
  """Saves what is not: at the end, or where the run was stopped. Returns when all is on disk."""
  if run.debug:
    return
  for group in run.groups:
    unsaved = sharding.union({b for b in group if b in run.here and b not in run.diverged
                              and not _is_saved(run.saved[b], run.steps[b])},
                             run.config.num_blocks)
    if unsaved:
      _save(run, group, sharding.move(run.states[group], "device"), sorted(unsaved), now=True)


def _is_saved(saved: checkpoint.BlockCheckpoint, step: int) -> bool:
  _is_written(saved)
  return step <= (saved.latest() or 0)


def _is_written(saved: checkpoint.BlockCheckpoint) -> bool:
  """Whether what was last to be saved is on disk, once it can be known."""
  try:
    saved.wait()
  except checkpoint.SaveFailed as e:
    print(f"note: {e}", flush=True)
    return False
  return True


def turns(config, groups: Sequence[Group],
          steps: Mapping[int, int]) -> Iterator[tuple[Group, int]]:
  """Yields (group, until): the group that trains next, and the step at which its turn ends.

  `config.train.turn` is "all" or "together" (one group after the other), a number of
  steps, or "random" (the paper: one step of a random block).

  Args:
    config: resolved.
    groups: of blocks that are trained at once. A group is where the last of its blocks is.
    steps: of each block to train; the caller counts them up.
  """
  total = {group: task_lib.of_block(config, group[0]).train.num_steps for group in groups}
  done = lambda group: min(steps[b] for b in group)
  while left := [group for group in groups if done(group) < total[group]]:
    if config.train.turn == "random":
      rng = np.random.default_rng([config.seed, sum(map(done, groups)), 1])  # data: [seed, epoch]
      group = left[rng.choice(len(left))]
      yield group, done(group) + 1
    elif config.train.turn in ("all", "together"):
      yield left[0], total[left[0]]
    else:
      for group in left:
        yield group, min(total[group], done(group) + int(config.train.turn))


def _batches(config: Any, mesh: jax.sharding.Mesh, dataset: data.Dataset, step: int
             ) -> Generator[Any, None, None]:
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


def _stepper(config: Any, mesh: jax.sharding.Mesh, compiled: Callable, frozen: Any, group: Group
             ) -> Callable:
  """(state, batch, active blocks) -> (state, metrics) of a group."""
  task = task_lib.make_task(config, group[0])
  step_all = compiled(task, len(group), False)  # now: the clock of the turn does not run yet
  blocks, intervals = program.of_group(task, mesh, group)

  def take(state, batch, active):
    if len(active) == len(group):
      return step_all(state, batch, blocks, intervals, frozen)
    step_some = compiled(task, len(group), True)
    active = sharding.put(mesh, jax.P("block"), np.isin(group, active))
    return step_some(state, batch, blocks, intervals, frozen, active)

  return take


def _held_out_losses(config: Any, mesh: jax.sharding.Mesh, held_out: Any, frozen: Any, group: Group
                     ) -> Callable:
  """state -> {position in the group: the mean loss of that block's averaged weights}.

  The same examples and the same draws whenever it is called, so that what differs is the weights;
  fewer draws than `Model.losses` makes. Of blocks of which this process has a part; of none where
  some process finds its part of the examples damaged.
  """
  task = task_lib.make_task(config, group[0])
  size = task.config.train.batch_size // task.config.train.accumulate
  numbers = data.some(len(held_out), _HELD_OUT)
  blocks, intervals = program.of_group(task, mesh, group)
  rows = sharding.batch_rows(mesh, size)

  def one(ema, batch, number, block, interval, frozen):
    key = block_lib.block_key(config.seed, block, number, block_lib.EVALUATE)
    return task.loss(ema, task.draw(key, batch, interval), frozen)

  loss = jax.jit(program.per_block(one, mesh, len(group), (0, None, None, 0, 0, None)))

  def losses(state) -> dict[int, float]:
    found = []
    for number, first in enumerate(range(0, len(numbers), size)):  # the last one begins anew
      batch, damage = None, "another process cannot read its part"
      try:
        batch = held_out.take(numbers[(first + rows) % len(numbers)])
      except UserError as e:
        damage = str(e)
      if sharding.union({0} if batch is None else set(), 1):  # all go on, or none
        print(f"note: saved without a loss on held-out data ({damage})", flush=True)
        return {}
      batch = sharding.put_batch(mesh, size, rows, batch)
      found.append(loss(state.ema, batch, np.int32(number), blocks, intervals, frozen))
    found = [sharding.local_values(x) for x in found]
    return {i: float(np.mean([x[i] for x in found])) for i in found[0]}

  return losses


def _norms(config: Any, mesh: jax.sharding.Mesh, frozen: Any, group: Group) -> Callable:
  """(state, batch) -> the norms of the group's next step, by `block.norms`."""
  task = task_lib.make_task(config, group[0])
  norms = program.compile_norms(task, mesh, len(group))
  blocks, intervals = program.of_group(task, mesh, group)
  return lambda state, batch: norms(state, batch, blocks, intervals, frozen)


def _window(run: _Run, group: Group) -> profiler.Window:
  """What traces the steps of a group, if this process leads one of its blocks."""
  mine = [b for b in group if b in run.led and not run.debug]
  return profiler.Window(run.config.log.profile_steps, run.saved[mine[0]].directory if mine
                         else None)


def _compile(mesh: jax.sharding.Mesh, task: task_lib.Task, size: int, some: bool) -> Callable:
  """The training step of `size` blocks like `task`, or of some of them; see `program`."""
  started = time.perf_counter()
  compiled = program.compile_step(task, mesh, size, some)
  if jax.process_index() == 0 and not program.in_python():
    seconds = time.perf_counter() - started
    memory: Any = compiled.memory_analysis()
    what, layers = "some of " * some + f"{size} blocks of " * (size > 1), task.network.num_layers
    print(f"compiled the step of {what}{layers} layer{'s' * (layers > 1)} in {seconds:.0f} s | "
          f"on each device {memory.alias_size_in_bytes / 1e6:,.1f} MB of state, "
          f"{memory.temp_size_in_bytes / 1e6:,.1f} MB of temporaries", flush=True)
  return compiled


def _picture(run: _Run, group: Group, state: Any, *, blocks: Sequence[int], step: int):
  """Samples to look at, once every block has a checkpoint. Drawn by process 0.

  Blocks of this group whose last save has failed are saved again; others are in their next turn.

  Args:
    run, group, state, blocks: as of `_save`.
    step: at which these blocks are.
  """
  if run.debug:
    return
  name = "_".join(["block", *(f"{b:02d}" for b in blocks), f"step_{step:06d}"])
  failed = sharding.union({b for b, saved in run.saved.items() if not _is_written(saved)},
                          run.config.num_blocks)
  if again := sorted(failed.intersection(blocks)):
    _save(run, group, state, again, now=True)
  sharding.wait_for_all(name)
  if jax.process_index() == 0 and all(checkpoint.exists(run.workdir, b)
                                      for b in range(run.config.num_blocks)):
    try:
      model = loading.load(run.workdir)
      samples, labels = model.sample(_SHOWN)
      (run.workdir / "samples").mkdir(parents=True, exist_ok=True)
      path = model.tasks[0].save(model, samples, labels, run.workdir / "samples" / name)
    except (UserError, OSError) as e:  # another process writes a block, a disk is full: go on
      print(f"note: no samples ({e})", flush=True)
      return
    if path is not None:
      run.progress.show(blocks, path)
