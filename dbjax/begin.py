"""How a run begins: whose blocks are whose, where each stands, and what does not go together.

All that can be refused is refused here, before anything is compiled or trained. Where a run has
several processes, what one cannot do is an error of all; but one that cannot open its logs is lost
to the others, as `watch.py` says.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import signal
import time
from typing import Any, NamedTuple

from etils import epath
import jax
import numpy as np

from dbjax import block as block_lib
from dbjax import checkpoint
from dbjax import config as config_lib
from dbjax import data
from dbjax import exported
from dbjax import logs
from dbjax import owner
from dbjax import paths
from dbjax import pretrained
from dbjax import program
from dbjax import provenance
from dbjax import sharding
from dbjax import stopping
from dbjax import task as task_lib
from dbjax.errors import UserError

_PAUSE = 2  # seconds between looks at an owner that is waited for


def by_first(what: str, do: Callable, *arguments: Any):
  """Lets process 0 do something; a UserError there is one in every process."""
  failed = ""
  try:
    if jax.process_index() == 0:
      do(*arguments)
  except UserError as e:
    failed = str(e)
  sharding.agree(what, failed=failed)
  if failed:
    raise UserError(failed)


def own(mine: owner.Owner, directories: Sequence[epath.Path], stop: stopping.StopSignal):
  """Becomes the owner of blocks.

  Where some have an owner on another host, it waits, for all at once, until it is known whether
  that lives. Many processes wait together, and look at one another all the time: a collective that
  hangs for minutes may be an error.

  Args:
    mine: what becomes the owner.
    directories: of the blocks.
    stop: what may end the wait.

  Raises:
    UserError: one of them cannot; in every process.
    SystemExit, KeyboardInterrupt: it is asked to stop meanwhile; in every process too.
  """
  noted = False
  while True:
    failed, waits = _take(mine, directories)
    found = sharding.union({n for n, x in enumerate((failed, waits)) if x}, 2)
    if found != {1}:  # some have failed, or none waits
      break
    if waits and not noted:
      _note(waits)
      noted = True
    if stop.asked() and stop.signal:
      print("stopped while it waited: the same command goes on from here", flush=True)
      if stop.signal == signal.SIGINT and jax.process_count() == 1:
        raise KeyboardInterrupt
      raise SystemExit(128 + stop.signal)
    time.sleep(_PAUSE)
  if jax.process_count() > 1:
    sharding.agree("a block has one owner", owner=failed)
  if failed:
    raise UserError(failed)


def _take(mine: owner.Owner, directories: Sequence[epath.Path]) -> tuple[str, list[owner.Wait]]:
  """Tries to become the owner of blocks: what failed, if anything, and what is to be waited for."""
  waits = []
  for directory in directories:
    try:
      waits.append(mine.take(directory))
    except UserError as e:
      return str(e), []
    except paths.failures(directory) as e:
      return f"{directory} cannot be written ({paths.reason(e)}): choose another --workdir", []
  return "", [x for x in waits if x]


def _note(waits: Sequence[owner.Wait]):
  longest = max(waits, key=lambda wait: wait.seconds)
  others = f" and {len(waits) - 1} more" * (len(waits) > 1)
  print(f"note: {longest.directory}{others}: the last owner, {longest.owner}, has not said that it "
        f"left: if it shows no sign of life for {longest.seconds:.0f} s, this run goes on in its "
        "place", flush=True)


def check_log(config: Any):
  """Raises UserError where what a run is to show cannot be shown."""
  logs.check_wandb(config.log.wandb)
  window, total = config.log.profile_steps, config.train.num_steps
  longest = max(total) if isinstance(total, tuple) else total
  if window and window[1] > longest:
    raise UserError(f"log.profile_steps={window[0]},{window[1]}: the last step of a block is "
                    f"train.num_steps={longest}")


def open_logs(config: Any, workdir: epath.Path, block: int, step: int) -> logs.BlockLogs:
  """Where the figures of a block that stands at `step` are kept."""
  directory, own = paths.directory(workdir, block), task_lib.of_block(config, block)
  project = config.log.wandb if step < own.train.num_steps else ""
  return logs.BlockLogs(directory, step, logs.wandb_run(
      project, directory, config_lib.flatten(own)))


def check_room(config: Any, workdir: epath.Path, steps: Mapping[int, int]):
  """Says whether the disk will hold the checkpoints. Raises UserError if it holds none."""
  there, every = checkpoint.free(workdir), config.checkpoint
  tasks = {b: task_lib.make_task(config, b) for b in steps}
  total = {b: task.config.train.num_steps for b, task in tasks.items()}
  sizes = {b: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(
      block_lib.abstract_state(tasks[b]))) for b in steps if steps[b] < total[b]}
  if there is None or not sizes:
    return
  passed = lambda steps: steps // every.keep_every if every.keep_every else 0
  kept = lambda b: passed(total[b]) - passed(steps[b])
  number = lambda b: min(every.keep + 1, 1 + (total[b] - steps[b] - 1) // every.every_steps)
  needed = sum(size * (number(b) + kept(b) + every.best) for b, size in sizes.items())
  words = (f"checkpoints will take up to {needed / 1e6:,.1f} MB more in {workdir}, "
           f"{there / 1e6:,.1f} MB are free there")
  if there < max(sizes.values()):
    raise UserError(f"{words}: make room, or choose another --workdir")
  print(words if there >= needed else f"note: {words}: not enough", flush=True)


class Found(NamedTuple):
  """Where the blocks of a run stand, and with what they go on.

  Attributes:
    steps: {block: that of its last checkpoint, or 0}.
    metas: {block: of that checkpoint}, of those of which this process has a part.
    states: {group: its stacked state in the host's memory}.
    frozen, frozen_checksum: what blocks use and none trains.
    trained_with: as `provenance` records it.
  """

  steps: dict[int, int]
  metas: dict[int, dict[str, Any]]
  states: dict[tuple[int, ...], Any]
  frozen: dict[str, np.ndarray]
  frozen_checksum: int
  trained_with: dict[str, Any]


def find(config: Any, workdir: epath.Path, mesh: jax.sharding.Mesh, *, dataset: data.Dataset,
         groups: Sequence[tuple[int, ...]], saved: Mapping[int, checkpoint.BlockCheckpoint],
         here: Sequence[int], writes: Sequence[int]) -> Found:
  """Restores the blocks that have a checkpoint, and makes the others.

  Args:
    config: resolved.
    workdir, mesh, dataset: of the run.
    groups: blocks that are trained at once.
    saved: of all blocks to train.
    here: those of which this process has a part.
    writes: those whose files it writes.

  Raises:
    UserError: something does not go together; in every process.
  """
  steps = _last_steps(config, saved, writes)
  frozen = _frozen_of(config, dataset, [saved[b] for b in saved if steps[b]])
  frozen_checksum = int(checkpoint.checksum(frozen))
  start = _start_of(config)
  trained_with = provenance.trained_with(config, dataset, start.checksum if start else "")
  sharding.agree("they have other files, texts or versions", frozen=frozen_checksum, **trained_with)
  metas = {b: _check_saved(saved[b], config, frozen_checksum, trained_with)
           for b in here if steps[b]}
  _check_neighbours(config, workdir, trained_with)
  states = {group: _load(config, mesh, group, saved, metas, start) for group in groups}
  if jax.process_index() == 0:
    _note_untraced(config, steps)
    _note_warm_up(config, steps)
  return Found(steps=steps, metas=metas, states=states, frozen=frozen,
               frozen_checksum=frozen_checksum, trained_with=trained_with)


def _note_untraced(config: Any, steps: Mapping[int, int]):
  """Says of which blocks no step is traced, because they go on behind log.profile_steps."""
  window = config.log.profile_steps
  behind = [b for b, step in steps.items() if window and window[1] <= step < task_lib.of_block(
      config, b).train.num_steps]
  if behind:
    print(f"note: log.profile_steps={window[0]},{window[1]} are not traced of block(s) "
          f"{', '.join(map(str, behind))}: they are trained already; set later ones", flush=True)


def _note_warm_up(config: Any, steps: Mapping[int, int]):
  """Says of which blocks the learning rate never comes to what the config says."""
  own = {b: task_lib.of_block(config, b) for b in steps}
  lengths = {b: (x.optimizer.warmup_steps, x.train.num_steps) for b, x in own.items()}
  short = [b for b, (warm_up, total) in lengths.items() if steps[b] < total <= warm_up]
  if short:
    warm_up, total = lengths[short[0]]
    print(f"note: optimizer.warmup_steps={warm_up}: the learning rate of block(s) "
          f"{', '.join(map(str, short))} is never reached in train.num_steps={total}: set fewer",
          flush=True)


def _last_steps(config: Any, saved: Mapping[int, checkpoint.BlockCheckpoint], led: Sequence[int]
               ) -> dict[int, int]:
  """At which step each block stands, once damaged checkpoints are out of the way."""
  for b in led:
    saved[b].set_damaged_aside(block_lib.abstract_state(task_lib.make_task(config, b)))
  sharding.wait_for_all("damaged checkpoints are set aside")
  steps = {b: saved[b].latest() or 0 for b in saved}
  sharding.agree("--workdir must be one that all of them share",
                 **{f"block {b}'s last checkpoint": step for b, step in steps.items()})
  _check_together(config, steps)
  return steps


def _frozen_of(config: Any, dataset: data.Dataset, saved: Sequence[checkpoint.BlockCheckpoint]
               ) -> dict[str, np.ndarray]:
  """What blocks use and none trains: as the first block that is saved has it, or made anew."""
  expected = task_lib.make_task(config, 0).abstract_frozen()
  kept = next((x for x in (s.frozen(expected) for s in saved) if x), None)
  return kept or task_lib.find(config.task.name).frozen(config, dataset)


def _check_saved(saved: checkpoint.BlockCheckpoint, config: Any, frozen_checksum: int,
                 trained_with: dict[str, Any]) -> dict[str, Any]:
  """The meta of a block's last checkpoint, if it is of this experiment."""
  meta = saved.meta(config, functools.partial(config_lib.binding_of_block, block=saved.block))
  own = lambda config: config_lib.flatten(task_lib.of_block(config, saved.block))
  config_lib.check_length(own(config), own(config_lib.unflatten(meta["config"])), meta["step"])
  saved.check_frozen(meta, frozen_checksum)
  provenance.check(saved.directory, meta, trained_with)
  return meta


def _start_of(config: Any) -> pretrained.Pretrained | None:
  """What new blocks start from, the same for all processes; None: random weights."""
  if not config.train.init_from:
    return None
  start, failed = None, ""
  try:
    start = pretrained.load(config)
  except UserError as e:  # of one process, perhaps: the others must not wait for it
    failed = str(e)
  sharding.agree("all of them must read the same weights",
                 weights=start.params_checksum if start else failed)
  if failed:
    raise UserError(failed)
  return start


def _check_neighbours(config: Any, workdir: epath.Path, trained_with: dict[str, Any]):
  """Raises UserError where a block that does not train now started from other weights."""
  for b in set(range(config.num_blocks)).difference(config.train.blocks):
    try:
      with exported.open_block(workdir, b) as saved:
        start = provenance.started_from(saved.meta())
    except UserError:  # not there, damaged, or being written by another run
      continue
    provenance.check_one_start({saved.directory: start,
                                "this run": trained_with["init_from"]})


def _load(config: Any, mesh: jax.sharding.Mesh, group: tuple[int, ...],
          saved: Mapping[int, checkpoint.BlockCheckpoint], metas: Mapping[int, Any],
          start: pretrained.Pretrained | None) -> Any:
  """The group's stacked state in the host's memory: of new blocks, and of restored ones."""
  task = task_lib.make_task(config, group[0])
  states = {}
  for b in [b for b in group if b in metas]:
    template = program.abstract_state(task, sharding.row(mesh, group, b), "pinned_host")
    states[b] = saved[b].restore(template, metas[b])
    print(f"block {b} | resumes from step {metas[b]['step']} in {saved[b].directory}", flush=True)
  new = [b for b in group if not saved[b].latest()]
  if new:
    fresh = program.init(task, mesh, group, start.block if start else None)
    if start and jax.process_index() == 0:
      for b in new:
        print(f"block {b} | starts from {config.train.init_from}"
              + f", but drawn anew: {', '.join(start.drawn)}" * bool(start.drawn), flush=True)
    if not states:
      return sharding.move(fresh, "pinned_host")
    here = {b for b in new if jax.process_index() in (saved[b].processes or ())}
    states |= {b: program.unstack(mesh, group, fresh, b) for b in here}
  return program.stack(mesh, group, states)


def _check_together(config: Any, steps: Mapping[int, int]):
  """Raises UserError where blocks that train something together do not stand at one step."""
  if task_lib.make_task(config, 0).joint and len(set(steps.values())) > 1:
    words = ", ".join(f"block {b} at step {step}" for b, step in steps.items())
    raise UserError(f"blocks that learn one table are trained together, but the last checkpoints "
                    f"are of {words}: move those of later steps away, so that all go on from one")
