"""Reads a model: all blocks of a workdir, or of a folder that `dbjax.export` wrote.

    model = dbjax.load(workdir, guide=weaker_workdir)
"""

from collections.abc import Mapping
import dataclasses
import operator
from typing import Any

from etils import epath
import numpy as np

from dbjax import block as block_lib
from dbjax import checkpoint
from dbjax import config as config_lib
from dbjax import exported
from dbjax import paths
from dbjax import provenance
from dbjax import task as task_lib
from dbjax import trust
from dbjax.errors import UserError
from dbjax.fields import at_least
from dbjax.fields import described
from dbjax.fields import Field
from dbjax.model import Model

_STEP = Field(0, range=at_least(0))


def load(workdir: epath.PathLike, *, step: int = 0, best: bool = False,
         guide: epath.PathLike | None = None) -> Model:
  """The model in a workdir.

  Args:
    workdir: that it was trained in; or a folder that `dbjax.export` wrote.
    step: 0: the last checkpoint of every block; or that of this step.
    best: that whose loss on held-out data is least, which checkpoint.best=True keeps.
    guide: another workdir, of a weaker model with the same split of noise: shorter trained,
      smaller, or both. Where its task can be guided, it is what samples are guided by (arXiv
      2406.02507) when their guidance is not 1.

  Raises:
    UserError: a block is missing, damaged, or of another model, or a file is not as SHA256SUMS
      says; a block has no such checkpoint; or that model cannot guide this one.
  """
  workdir = paths.expand(workdir, "workdir")
  trust.check_workdir(workdir)
  config = config_lib.load(workdir)
  tasks = tuple(task_lib.make_task(config, b) for b in range(config.num_blocks))
  params, metas, starts, frozen, checksum = [], [], {}, None, None
  for b, task in enumerate(tasks):
    with exported.open_block(workdir, b) as saved:
      meta, ema = read_block(saved, task, config, step=step, best=best)
      if frozen is None:
        frozen = saved.frozen(task.abstract_frozen()) or task.frozen(config)
        checksum = int(checkpoint.checksum(frozen))
      saved.check_frozen(meta, checksum)
      provenance.check(saved.directory, meta, provenance.code_of(config))
      starts[saved.directory] = provenance.started_from(meta)
      provenance.check_one_start(starts)
      metas.append(meta)
      params.append(ema)
      if not all(np.array_equal(params[b][name], params[0][name]) for name in task.joint):
        raise UserError(f"{saved.directory} has learned another table than block 0: blocks that "
                        "learn one together are all of one run and one step")
  model = Model(config=config, schedule=tasks[0].make_schedule(config), tasks=tasks,
                params=tuple(params), steps=tuple(meta["step"] for meta in metas), frozen=frozen,
                workdir=workdir, metas=tuple(metas))
  return model if guide is None else dataclasses.replace(model, guide=_load_guide(model, guide))


def read_block(saved: Any, task: task_lib.Task, config: Any, *, step: int = 0, best: bool = False
               ) -> tuple[dict[str, Any], Any]:
  """What is recorded of one block, and its averaged weights.

  Args:
    saved: as `exported.open_block` returns it.
    task: of the block.
    config: resolved, of all blocks.
    step, best: as of `load`.

  Raises:
    UserError: as `load`.
  """
  step = _STEP.check("step", step)
  if step and best:
    raise UserError(f"step={step}: expected 0 with best=True: give one of them")
  trust.check_sums(saved.directory)
  template = block_lib.abstract_state(task).ema
  chosen = saved.need_best() if best else step
  return (saved.restore_step(template, config, chosen) if chosen
          else saved.restore_newest(template, config))


def _load_guide(model: Model, workdir: epath.PathLike) -> Model:
  """The model that guides another one. Raises UserError where it cannot."""
  if "guide_step" not in model.config.sample:
    raise UserError(f"guide={workdir}: expected a model of images, and task.name="
                    f"{model.config.task.name} is not guided; leave it out")
  path = paths.expand(workdir, "guide")
  try:
    guide = load(path)
  except UserError as e:
    raise UserError(f"guide={workdir}: {e}") from e
  ours, theirs = _answers_to(model), _answers_to(guide)
  for name in ours:
    if theirs.get(name) != ours[name]:
      raise UserError(f"guide={workdir}: its {name} is {theirs.get(name)}, expected "
                      f"{ours[name]}, as of the model that it guides")
  return guide


def weaker(model: Model, step: int) -> Model | None:
  """The model that guides another one.

  Args:
    model: that is guided.
    step: 0: its `guide`, if there is one. Or the one that guides is that of this step's
      checkpoints: those of `guide`, or else the model's own.

  Raises:
    UserError: a block has no such checkpoint, or the model was not loaded from a workdir.
  """
  if not step:
    return model.guide
  workdir = (model.guide or model).workdir
  if workdir is None:
    raise UserError(f"guide_step={step}: expected a model that dbjax.load has read, whose "
                    "workdir has checkpoints; set it to 0")
  try:
    if (workdir, step) not in model.earlier:
      model.earlier[workdir, step] = load(workdir, step=step)
    return model.earlier[workdir, step]
  except UserError as e:
    raise UserError(f"guide_step={step}: {e}") from e


def check_given(model: Model, guide: str, options: Mapping[str, Any]):
  """Raises UserError where a command is given what has no effect: a guide, an interval of guidance
  or of churn, where no sample is guided, or none churned.

  Args:
    guide: the flag of this name.
    options: that are given: guidance is a number, or several.
  """
  given = ({"guide": guide} if guide else {}) | {k: v for k, v in options.items() if v}
  for names, amount, none, such in (
      (("guide", "guide_step", "guidance_from", "guidance_to"), "guidance", 1, "2"),
      (("churn_from", "churn_to", "churn_noise"), "churn", 0, "40")):
    named = next((name for name in names if name in given), None)
    if named and set(np.ravel(options.get(amount, model.config.sample.get(amount)))) == {none}:
      raise UserError(f"--{named}={given[named]}: with --{amount}={none} it is without effect: "
                      f"give another, such as --{amount}={such}")


def _answers_to(model: Model) -> dict[str, Any]:
  """What two models must have in common, for one to answer in the other's place."""
  task, schedule = model.tasks[0], model.schedule
  fields = {name: operator.attrgetter(name)(model.config)
            for name in ("task.name", *task.OFFERS.values())}
  shapes = {f"batch of {name}": described(x) for name, x in task.abstract_batch(1).items()}
  return fields | {"split of noise": getattr(schedule, "boundaries", schedule)} | shapes
