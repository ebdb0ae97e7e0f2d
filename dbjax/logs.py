"""What is kept of a block's figures: metrics.jsonl, TensorBoard's events, Weights & Biases.

They live in the block's own directory (`block_00/metrics.jsonl` and event files beside it), so that
machines which train different blocks do not write to one file. `tensorboard --logdir=DIR` shows
them; with log.norms=True it has the norms of gradients and updates too, part by part.

Weights & Biases is for those who ask for it: `pip install wandb`, and log.wandb=PROJECT. Each block
is a run there, called block_00, in the group of its workdir's name, and is sent what metrics.jsonl
has. The run's id is kept in `block_00/wandb.json`: who resumes goes on with it.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import json
import os
import socket
import sys
import time
from typing import Any
import uuid

from etils import epath
import numpy as np
from PIL import Image

from dbjax import paths
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
  """metrics.jsonl, events and the run at W&B of one block; steps that are redone are dropped.

  What cannot be written, because a disk is full or gone, stays in memory and is tried again with
  the next figures: no reason to end a run.
  """

  def __init__(self, directory: epath.Path, step: int, run: Any = None):
    """Of a block that stands at `step`; `run` is at W&B, if there is one."""
    directory.mkdir(parents=True, exist_ok=True)
    self._path = directory / FILE
    self._lines = [line for line in _lines(self._path) if _row(line).get("step", np.inf) <= step]
    self._kept, self._step = len(self._lines), step  # so many lines, to this step, are in all files
    self._whole = False  # metrics.jsonl has these lines, no other, and can grow
    self._failing = False
    self._made: _Events | None = None  # a run that is finished already leaves no empty file
    self._run = run

  def write(self, step: int, scalars: Mapping[str, float], skipped: Sequence[int] = ()):
    """Adds figures of a step; `skipped` are steps that were passed over before it."""
    which = {"skipped_steps": list(skipped)} if skipped else {}
    self._lines.append(json.dumps({"step": step, **scalars, **which}))
    self._keep()
    if self._run:
      self._run.log({"step": step, **scalars, **which}, step=step)

  def _keep(self):
    """Writes the lines that are not in all files yet."""
    fresh = self._lines[self._kept:]
    with self._or_next_time():
      whole, self._whole = self._whole, False
      self._path.parent.mkdir(parents=True, exist_ok=True)  # a disk may come back empty
      if whole and self._path.exists():
        with self._path.open("a") as file:
          file.write("\n".join([*fresh, ""]))
      else:
        anew = self._path.with_name(f"{FILE}.tmp")
        anew.write_text("\n".join([*self._lines, ""]))
        anew.replace(self._path)
      rows = [json.loads(line) for line in fresh]
      for row in rows:
        self._events.add(row["step"], *(self._events.make.scalar(name, x) for name, x in row.items()
                                        if name not in ("step", "skipped_steps")))
      self._kept, self._step = len(self._lines), rows[-1]["step"]
      self._whole = "://" not in os.fspath(self._path)

  def show(self, step: int, path: epath.Path):
    """Adds samples that are in a file: an image, or a text."""
    with self._or_next_time():
      if path.suffix in PICTURES:
        with path.open("rb") as file, Image.open(file) as image:
          pixels = np.asarray(image.convert("RGB"))
        self._events.add(step, self._events.make.image("samples", pixels, dataformats="HWC"))
      elif path.suffix == ".txt":  # TensorBoard reads Markdown, of which four spaces are code
        text = "\n".join("    " + line for line in path.read_text().splitlines())
        self._events.add(step, self._events.make.text("samples", text))

  @property
  def _events(self) -> "_Events":
    self._made = self._made or _Events(self._path.parent, self._step + 1)
    return self._made

  @contextlib.contextmanager
  def _or_next_time(self) -> Iterator[None]:
    """Says, once, where files cannot be written; they are begun anew when they can."""
    try:
      yield
      self._failing = False
    except paths.failures(self._path) as e:
      if not self._failing:
        print(f"note: the figures of {self._path.parent} cannot be written ({paths.reason(e)}): "
              "they are kept in memory meanwhile", flush=True)
      made, self._made, self._failing = self._made, None, True
      with contextlib.suppress(paths.failures(self._path)):
        if made:
          made.close()

  def close(self):
    try:
      if self._kept < len(self._lines):
        self._keep()
      with self._or_next_time():
        if self._made:
          self._made.close()
    finally:
      if self._run:
        self._run.finish()


class _Events:
  """A file of TensorBoard's events. Written here: a thread, as tensorboardX has, fails unseen.

  Attributes:
    make: tensorboardX's `scalar`, `image` and `text`, of which `add` takes what they return.
  """

  def __init__(self, directory: epath.Path, step: int):
    """In a directory; what other files there have of `step` and later is void."""
    hide = "torch" not in sys.modules
    if hide:  # it would be imported too, which takes seconds, to know its tensors
      sys.modules["torch"] = None  # type: ignore[assignment]  # so that importing it fails
    try:
      from tensorboardX import record_writer  # pylint: disable=g-import-not-at-top
      from tensorboardX import summary
      from tensorboardX.proto import event_pb2
    finally:
      if hide:
        del sys.modules["torch"]
    self.make, self._event = summary, event_pb2.Event
    name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{step}"
    file = record_writer.RecordWriter(os.fspath(directory / name))
    self._write, self._flush, self.close = file.write, file.flush, file.close
    self._put(file_version="brain.Event:2")
    self._put(step=step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

  def add(self, step: int, *summaries: Any):
    for summary in summaries:
      self._put(step=step, summary=summary)
    self._flush()  # a run that is killed goes on after these

  def _put(self, **fields: Any):
    self._write(self._event(wall_time=time.time(), **fields).SerializeToString())


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
