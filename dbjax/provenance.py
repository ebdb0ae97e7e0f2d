"""What a block was trained with, besides its config: code, data, the weights that it started from.

Recorded beside each block (`trained_with` in its `meta`), so that what differs is named, and what
does not belong together is refused. The commands that trained it, in `block_00/commands.jsonl`, are
there to be read: nothing depends on them.
"""

from collections.abc import Iterable, Mapping
import datetime
import json
from typing import Any

from etils import epath
import jax

import dbjax
from dbjax import lookup
from dbjax import paths
from dbjax.data.dataset import Arrays
from dbjax.data.dataset import COMPARED
from dbjax.data.dataset import fingerprint
from dbjax.errors import UserError

COMMANDS = "commands.jsonl"
_ROW = ("time", "command", "dbjax", "devices")


def trained_with(config: Any, dataset: Any, init_from: str = "") -> dict[str, Any]:
  """What a block is trained with, besides its config: to be recorded beside it.

  Args:
    config: resolved.
    dataset: the data.
    init_from: checksum of the pretrained weights that blocks start from, if they do.

  Returns:
    dbjax, its version; code, of each field that names some of the user's: its name and the
    SHA-256 of its file; init_from; and `data_of`.
  """
  known, layout = code_of(config), config.train.init_layout
  if init_from and not layout.startswith("dbjax."):
    known["code"]["train.init_layout"] = lookup.source_of(layout)
  return known | data_of(dataset) | dict(init_from=init_from)


def data_of(dataset: Any) -> dict[str, int | None]:
  """What data are known by: fingerprints of the examples to train on.

  Returns:
    data, of three of them; examples, of a hundred more. That is None of records in TFDS's files:
    to meet a damaged one must not end a run before it begins.
  """
  train = dataset.train
  in_files = hasattr(train, "identity") and not isinstance(train, Arrays)
  return dict(data=fingerprint(train), examples=None if in_files else fingerprint(train, COMPARED))


def same_data(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
  """Whether nothing differs of what two `data_of`, or more or less, both know."""
  known = [(then.get(name), now.get(name)) for name in ("data", "examples")]
  return all(a == b for a, b in known if None not in (a, b))


def code_of(config: Any) -> dict[str, Any]:
  """Of `trained_with`, what the config alone tells: dbjax and code."""
  names = {"task.name": config.task.name, "model.network": config.model.network,
           "data.name": config.data.name}
  return dict(dbjax=dbjax.__version__, code={
      field: lookup.source_of(name) for field, name in names.items()
      if lookup.names_code(name) and not name.startswith("dbjax.")})


def started_from(meta: dict[str, Any]) -> str:
  """The checksum of the pretrained weights that a block started from; empty: random ones."""
  return meta["trained_with"].get("init_from", "")


def beginning(trained_with: Mapping[str, Any]) -> str:
  """What a block began with, in words.

  Args:
    trained_with: of its `meta`; or less.
  """
  fork, start = trained_with.get("forked_from"), trained_with.get("init_from")
  if isinstance(fork, Mapping):
    return f"step {fork.get('step')} of {fork.get('directory')}"
  return f"the pretrained weights {start[:12]}" if start else "random weights"


def check_one_start(starts: dict[epath.Path, str]):
  """Raises UserError where blocks of one model did not start from the same weights.

  Args:
    starts: {directory of a block: `started_from`}.
  """
  (first, start), *others = starts.items()
  words = lambda checksum: beginning(dict(init_from=checksum))
  for directory, other in others:
    if other != start:
      raise UserError(f"{directory} started from {words(other)}, {first} from {words(start)}: "
                      "blocks of one model must start from the same (train.init_from)")


def check(directory: epath.Path, meta: dict[str, Any], now: dict[str, Any]):
  """Prints what is not as it was when a block was trained: code, version.

  Args:
    directory: of the block.
    meta: of its checkpoint.
    now: as `trained_with` makes it; or less.

  Raises:
    UserError: the data differ, or the weights that it started from.
  """
  then, start = meta["trained_with"], started_from(meta)
  if start != now.get("init_from", start):
    raise UserError(f"{directory} started from {beginning(dict(init_from=start))}, this run from "
                    f"{beginning(now)}: set train.init_from as it was, or choose "
                    "another --workdir")
  if not same_data(then, now):
    raise UserError(f"{directory} was trained with other data of the same name: bring them "
                    "back, or choose another --workdir")
  changed = [f"dbjax {then['dbjax']} (now {now['dbjax']})"] * (then["dbjax"] != now["dbjax"])
  changed += [f"another content of the module of {field}={code['name']}"
              for field, code in then["code"].items()
              if code["sha256"] != now["code"].get(field, code)["sha256"]]
  if changed:
    print(f"note: {directory} was trained with {', '.join(changed)}", flush=True)


def record(command: str, steps: Mapping[epath.Path, int], mesh: jax.sharding.Mesh):
  """Adds a command to those that have trained some blocks.

  Args:
    command: as it was typed.
    steps: {directory of a block: the step from which it goes on}; its owner alone writes there.
    mesh: of the run.
  """
  row = dict(time=datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds"), command=command,
             dbjax=dbjax.__version__, devices=f"{mesh.size} x {mesh.devices.flat[0].device_kind}")
  for directory, step in steps.items():
    path = directory / COMMANDS
    before = path.read_bytes() if path.exists() else b""
    directory.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.tmp")
    fresh.write_bytes(before + json.dumps(row | dict(step=step)).encode() + b"\n")
    fresh.replace(path)


def commands(workdir: epath.PathLike, blocks: Iterable[int]) -> list[dict[str, Any]]:
  """What `record` has written of some blocks, each command once, in the order of time.

  Returns:
    Of each `time`, its start in UTC; `command`; `dbjax`, the version; `devices`, how many of which
    kind; `steps`, {block: the step from which it went on}. What is not as `record` writes it is
    left out.
  """
  found: dict[tuple[str, ...], dict[int, int]] = {}
  for b in blocks:
    path = paths.directory(workdir, b) / COMMANDS
    for line in path.read_bytes().splitlines() if path.exists() else []:
      try:
        row = {"devices": ""} | json.loads(line)  # which dbjax did not always record
        found.setdefault(tuple(str(row[name]) for name in _ROW), {})[b] = int(row["step"])
      except (ValueError, TypeError, KeyError, OverflowError):
        continue
  return [dict(zip(_ROW, row)) | dict(steps=steps) for row, steps in sorted(found.items())]
