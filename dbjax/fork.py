"""Begins an experiment where another has come to, under other fields of the config.

    python -m dbjax.main --config=digits --workdir=NEW --fork_from=OLD \\
        --config.optimizer.learning_rate=1e-4

Weights, averages, optimizer and step are those of the last checkpoints in OLD, which stay as they
are; so train.num_steps counts the steps of OLD too. Where fields differ, whether a loss explodes is
told by the first one in NEW. What was forked from where, and which fields differ, is recorded
beside each block of NEW and kept: a block is then a function of (config, b, n) and of that.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from etils import epath
import jax
import numpy as np

from dbjax import block as block_lib
from dbjax import checkpoint
from dbjax import config as config_lib
from dbjax import paths
from dbjax import provenance
from dbjax import task as task_lib
from dbjax import trust
from dbjax.errors import UserError

# Or weights, or what the optimizer remembers of them, mean nothing.
_SAME = ("num_blocks", "layers_per_block", "task.name", "model.network", "optimizer.name")
_MOMENTS, _B1, _LENGTH = "optimizer.moments_dtype", "optimizer.b1", "train.num_steps"


def fork(origin: epath.Path, workdir: epath.Path, blocks: Iterable[int], config: Any, dataset: Any):
  """Copies the last checkpoints of some blocks to a workdir, where it has none of them.

  Args:
    origin: a workdir of dbjax.main.
    workdir: another.
    blocks: which.
    config: resolved, of the new experiment.
    dataset: the data of the new experiment.

  Raises:
    UserError: a block is missing there or damaged, or of another network, or has no step left to
      train.
  """
  if origin == workdir:
    raise UserError(f"--fork_from={origin}: expected another workdir than --workdir")
  new = [b for b in blocks if not checkpoint.exists(workdir, b)]
  if not new:
    return
  with paths.reached(origin, "--fork_from"):
    there = origin.is_dir()
  if not there:
    raise UserError(f"--fork_from={origin}: there is no such directory: expected a workdir that "
                    "dbjax.main has trained in")
  trust.check_workdir(origin)
  for b in new:
    trust.check_block(paths.directory(origin, b))
    _check_length(origin, b, task_lib.of_block(config, b).train.num_steps)
  for b in new:
    with (checkpoint.BlockCheckpoint(origin, b) as theirs,
          checkpoint.BlockCheckpoint(workdir, b) as ours):
      _copy(theirs, ours, config, dataset)


def _check_length(origin: epath.Path, block: int, num_steps: int):
  """Raises UserError where a block that begins at its last step there has none left to train."""
  with checkpoint.BlockCheckpoint(origin, block) as theirs:
    step = theirs.meta()["step"]
  if num_steps <= step:
    raise UserError(f"{_LENGTH}={num_steps}: --fork_from={theirs.directory} is at step {step} "
                    f"already, which counts: expected more than {step}, or leave block {block} out "
                    "with --config.train.blocks")


def _check_optimizer(theirs: checkpoint.BlockCheckpoint, then: Mapping[str, Any],
                     now: Mapping[str, Any], abstract: Callable[[Any], Any]):
  """Raises UserError where the optimizer remembers other things than it did, such as a count."""
  config = config_lib.unflatten(now)
  own = {name: x for name, x in then.items() if name.startswith("optimizer.") and name in now}
  if now["optimizer.name"] == "schedule_free" and now[_B1] != then[_B1]:
    raise UserError(f"{_B1}={now[_B1]}: --fork_from={theirs.directory} was trained with "
                    f"{then[_B1]}, by which schedule_free averages its weights: a fork must have "
                    "the same")
  parts = lambda config: str(jax.tree.structure(abstract(config).opt_state))
  before = config_lib.changed(config, **own, **{_LENGTH: then[_LENGTH]})  # in which they make sense
  if parts(config) != parts(before):
    differ = config_lib.differences({name: now[name] for name in own}, own)
    raise UserError(f"--fork_from={theirs.directory}: its optimizer remembers other things, for "
                    f"there is {differ}: set these as they were; optimizer.warmup_steps=1 counts "
                    "steps, and is nearly none")


def _copy(theirs: checkpoint.BlockCheckpoint, ours: checkpoint.BlockCheckpoint, config: Any,
          dataset: Any):
  meta, flat = theirs.meta(), config_lib.flatten(config)
  for field in _SAME:
    if meta["config"][field] != flat[field]:
      raise UserError(f"{field}={flat[field]}: --fork_from={theirs.directory} was trained with "
                      f"{meta['config'][field]}: a fork must have the same")
  abstract = lambda config: block_lib.abstract_state(task_lib.make_task(config, theirs.block))
  _check_optimizer(theirs, meta["config"], flat, abstract)
  then = config_lib.changed(config, **{_MOMENTS: meta["config"][_MOMENTS]})
  state = jax.tree.map(lambda x, like: x.astype(like.dtype),
                       theirs.restore(abstract(then), meta), abstract(config))
  sums = meta["checksum"] | dict(opt_state=checkpoint.checksum_of_host(state.opt_state))
  known = provenance.trained_with(config, dataset, provenance.started_from(meta))
  known["forked_from"] = dict(
      directory=str(theirs.directory), step=meta["step"], checksum=meta["checksum"],
      changed=config_lib.differences(*map(config_lib.binding, (flat, meta["config"]))),
      before=meta["trained_with"].get("forked_from"))
  if known["forked_from"]["changed"]:
    state = state.replace(health=state.health._replace(first_loss=np.float32(np.inf)))
  ours.save_frozen(theirs.frozen() or {})
  ours.save(state, config, seconds=meta["seconds"], checksums=sums, trained_with=known)
  ours.wait()
  print(f"block {ours.block} | forked at step {meta['step']} from {theirs.directory}", flush=True)
