"""What is kept of a block's figures: metrics.jsonl, TensorBoard's events, Weights & Biases.

They live in the block's own directory (`block_00/metrics.jsonl` and event files beside it), so that
machines which train different blocks do not write to one file. `tensorboard --logdir=DIR` shows
them; with log.norms=True it has the norms of gradients and updates too, part by part.

Weights & Biases is for those who ask for it: `pip install wandb`, and log.wandb=PROJECT. Each block
is a run there, called block_00, in the group of its workdir's name, and is sent what metrics.jsonl
has. The run's id is kept in `block_00/wandb.json`: who resumes goes on with it.
"""

from collections.abc import Mapping, Sequence
import json
import sys
from typing import Any
import uuid

from etils import epath
import numpy as np
from PIL import Image

from dbjax.errors import UserError

FILE = "metrics.jsonl"
_WANDB = "wandb.json"
PICTURES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif"}


def rows(path: epath.Path) -> list[dict[str, Any]]:
  """The lines of a metrics.jsonl, those that are whole; somebody may be writing it."""
  return [row for row in map(_row, _lines(path)) if row]


def _lines(path: epath.Path) -> list[str]:
  try:
    return path.read_bytes().decode(errors="replace").splitlines()
  except FileNotFoundError:
    return []


def _row(line: str) -> dict[str, Any]:
  """What a line says; nothing if it was torn by a crash, or is not written yet."""
  try:
    row = json.loads(line)
    return row if isinstance(row["step"], int) else {}
  except (ValueError, TypeError, KeyError):
    return {}


class BlockLogs:
  """metrics.jsonl, events and the run at W&B of one block; steps that are redone are dropped."""

  def __init__(self, directory: epath.Path, step: int, run: Any = None):
    """Of a block that stands at `step`; `run` is at W&B, if there is one."""
    directory.mkdir(parents=True, exist_ok=True)
    self._path = directory / FILE
    self._lines = [line for line in _lines(self._path) if _row(line).get("step", np.inf) <= step]
    self._make_events = lambda: _events(directory, step + 1)
    self._made = None  # a run that is finished already leaves no empty file
    self._run = run

  def write(self, step: int, scalars: Mapping[str, float], skipped: Sequence[int] = ()):
    """Adds figures of a step; `skipped` are steps that were passed over before it."""
    which = {"skipped_steps": list(skipped)} if skipped else {}
    self._lines.append(json.dumps({"step": step, **scalars, **which}))
    self._path.parent.mkdir(parents=True, exist_ok=True)  # a disk may come back empty
    fresh = self._path.with_name(f"{FILE}.tmp")
    fresh.write_text("\n".join(self._lines) + "\n")
    fresh.replace(self._path)
    for name, value in scalars.items():
      self._events.add_scalar(name, value, step)
    self._events.flush()  # a run that is killed goes on after these
    if self._run:
      self._run.log({"step": step, **scalars, **which}, step=step)

  def show(self, step: int, path: epath.Path):
    """Adds samples that are in a file: an image, or a text."""
    if path.suffix in PICTURES:
      with path.open("rb") as file, Image.open(file) as image:
        self._events.add_image("samples", np.asarray(image.convert("RGB")), step,
                               dataformats="HWC")
    elif path.suffix == ".txt":  # TensorBoard reads Markdown, of which four spaces are code
      lines = path.read_text().splitlines()
      self._events.add_text("samples", "\n".join("    " + line for line in lines), step)
    self._events.flush()

  @property
  def _events(self) -> Any:
    self._made = self._made or self._make_events()
    return self._made

  def close(self):
    if self._made:
      self._made.close()
    if self._run:
      self._run.finish()


def _events(directory: epath.Path, step: int) -> Any:
  hide = "torch" not in sys.modules
  if hide:  # it would be imported too, which takes seconds, to know its tensors
    sys.modules["torch"] = None  # type: ignore[assignment]  # so that importing it fails
  try:
    import tensorboardX  # pylint: disable=g-import-not-at-top
  finally:
    if hide:
      del sys.modules["torch"]
  return tensorboardX.SummaryWriter(str(directory), purge_step=step)


def check_wandb(project: str):
  """Raises UserError where log.wandb names a project and the package is not there."""
  if project:
    try:
      import wandb  # noqa: F401  # only where it is asked for
    except ImportError as e:
      raise UserError(f"log.wandb={project}: the package is not installed ({e}): pip install "
                      "wandb, or leave log.wandb empty") from e


def wandb_run(project: str, directory: epath.Path, config: Mapping[str, Any]) -> Any:
  """The run of a block at W&B, a new one or the one of before; None without a project.

  Args:
    project: log.wandb.
    directory: of the block.
    config: flat, shown there.

  Raises:
    UserError: W&B refuses.
  """
  if not project:
    return None
  import wandb  # only where it is asked for

  kept = directory / _WANDB
  try:
    known = json.loads(kept.read_text())
  except (FileNotFoundError, ValueError):
    known = {}
  if known.get("project") != project:
    known = dict(project=project, id=uuid.uuid4().hex[:8])
  try:
    # The console is this run's own, with bars; and several blocks are several runs at once.
    run = wandb.init(project=project, id=known["id"], resume="allow", group=directory.parent.name,
                     name=directory.name, config=dict(config), reinit="create_new",
                     settings=dict(console="off"))
  except Exception as e:  # whatever W&B raises: no login, no network
    raise UserError(f"log.wandb={project}: W&B refuses ({e}): run wandb login, set "
                    "WANDB_MODE=offline, or leave log.wandb empty") from e
  directory.mkdir(parents=True, exist_ok=True)
  kept.write_text(json.dumps(known))
  return run
