"""What is trained how far, in one table, while the run goes on elsewhere: `dbjax.main --status`.

It reads config.json, metrics.jsonl, who owns a block, and what the last checkpoint says of itself.
It writes nothing, waits for nobody, needs neither the config's code nor a device, and takes a
workdir as it finds it: half written, half trained, or in use.
"""

from collections.abc import Mapping
import json
import math
import re
import time
from typing import Any

from etils import epath

from dbjax import logs
from dbjax import metrics
from dbjax import owner
from dbjax import paths
from dbjax import tensors
from dbjax import trust
from dbjax.errors import UserError

_HEADER = ("block", "step", "saved", "loss", "held out", "examples/s", "spent", "left", "reported",
           "trained by")
_BLOCK = re.compile(rf"block_(\d+)(?:{re.escape(tensors.SUFFIX)})?")


def read(workdir: epath.PathLike) -> list[dict[str, Any]]:
  """Of each block what is known of it; None is what is not.

  Args:
    workdir: of dbjax.main, on a disk or gs://; or a folder of dbjax.export.

  Returns:
    Of each block: `block`; `step`, that was reported or saved last; `num_steps`; `at_once`, how
    many blocks train in one step, of which each spends the time of all; `exported`, whether it is
    a file that trains no further; `saved`, the step of the last checkpoint, or of this file, or
    None; `loss`, `examples_per_s`, as reported last; `held_out`, the
    loss of the last checkpoint, where checkpoint.best has it measured; `spent` and `left`, seconds;
    of a block that has reported nothing, `left` is what others need; `reported`, how many seconds
    ago; `owner`, {host, pid, started} of the process that trains it, or None; `alive`, whether that
    is so still.

  Raises:
    UserError: there is no such workdir.
  """
  workdir = paths.expand(workdir, "--workdir")
  config = _config(workdir)
  blocks = range(len(config["layers"])) if config else sorted(
      {int(found[1]) for p in workdir.glob("block_*") if (found := _BLOCK.fullmatch(p.name))})
  if not blocks:
    raise UserError(f"--workdir={workdir}: nothing was trained there: expected a directory of "
                    "dbjax.main")
  own = {b: {name: values[b] for name, values in config.items()} for b in blocks}
  rows = [_of_block(paths.directory(workdir, b), b, own[b].get("num_steps"),
                    own[b].get("at_once", 1)) for b in blocks]
  paces = {b: own[b]["batch_size"] / row["examples_per_s"] / own[b]["layers"]
           for b, row in zip(blocks, rows) if own[b] and row["examples_per_s"]}
  for b, row in zip(blocks, rows):
    if paces and own[b] and not row["exported"]:
      pace = paces.get(b, sum(paces.values()) / len(paces))  # seconds a step and layer
      row["left"] = max(0, row["num_steps"] - row["step"]) * pace * own[b]["layers"]
  return rows


def table(workdir: epath.PathLike) -> str:
  """What `read` has found, in words; in the last row the time of one run that trains all blocks.

  Raises:
    UserError: as `read` does.
  """
  rows = read(workdir)
  clock = lambda seconds: None if seconds is None else metrics.clock(seconds)
  cells = [[row["block"], f"{row['step']}/{row['num_steps'] or '?'}", row["saved"], row["loss"],
            row["held_out"], _count(row["examples_per_s"]), clock(row["spent"]),
            clock(row["left"]), _ago(row["reported"]), _who(row)] for row in rows]
  if len(rows) > 1:
    total = lambda name: clock(sum((row[name] or 0) / row["at_once"] for row in rows))
    cells.append(["all", *[None] * 5, total("spent"), total("left"), None, None])
  return metrics.table(_HEADER, cells)


def _config(workdir: epath.Path) -> dict[str, list[int]]:
  """What is needed of the config, by block: layers, num_steps, batch_size, at_once.

  Nothing, where it is not written yet.
  """
  with paths.reached(workdir, "--workdir"):
    there = workdir.is_dir()
  if not there:
    raise UserError(f"--workdir={workdir}: there is no such directory")
  path = workdir / "config.json"
  try:
    config = trust.read_json(path)
    layers = [int(n) for n in config["layers_per_block"]]
    each = lambda name: [int(n) for n, _ in zip(
        config["train"][name] if isinstance(config["train"][name], list)
        else [config["train"][name]] * len(layers), layers, strict=True)]
    found = dict(layers=layers, num_steps=each("num_steps"), batch_size=each("batch_size"))
    lists = [x for section in ("model", "train", "optimizer") for name, x in config[section].items()
             if isinstance(x, list) and len(x) == len(layers) and name != "blocks"]
    alike, together = list(zip(layers, *lists)), config["train"]["turn"] == "together"
    return found | dict(at_once=[alike.count(kind) if together
                                 else int(config["mesh"]["block"]) or 1 for kind in alike])
  except FileNotFoundError:
    return {}
  except (OSError, TypeError, ValueError, KeyError) as e:
    raise UserError(f"{path} is damaged ({e}): restore it") from None


def _of_block(directory: epath.Path, block: int, num_steps: int | None, at_once: int
              ) -> dict[str, Any]:
  """What is known of one block, but for how much time is left."""
  kept, file = directory / logs.FILE, directory.with_name(directory.name + tensors.SUFFIX)
  last, exported = (logs.rows(kept) or [{}])[-1], file.is_file()
  meta = _meta_of_file(file) if exported else _meta(directory)
  saved, process = meta.get("step"), owner.read(directory)
  return dict(
      block=block, step=max(last.get("step", 0), saved or 0), num_steps=num_steps, at_once=at_once,
      exported=exported, saved=saved, loss=_number(last.get("loss")),
      held_out=_number(meta.get("held_out")), examples_per_s=_number(last.get("examples_per_s")),
      spent=_number(last.get("seconds", meta.get("seconds"))), left=None,
      reported=_seconds_since(kept) if last else None, owner=process or None,
      alive=owner.is_alive(directory, process) if process else False)


def _meta(directory: epath.Path) -> dict[str, Any]:
  """What the last checkpoint that can be read says of itself; nothing if there is none."""
  names = [p.name for p in directory.iterdir()] if directory.is_dir() else []
  for step in sorted((int(name) for name in names if name.isdecimal()), reverse=True):
    try:
      meta = trust.read_json(directory / str(step) / "meta" / "metadata")
      if isinstance(meta, dict) and isinstance(meta.get("step"), int):
        return meta
    except (OSError, ValueError):  # damaged, or just replaced
      continue
  return {}


def _meta_of_file(path: epath.Path) -> dict[str, Any]:
  """The same of a block that dbjax.export has written; no array is read."""
  try:
    with path.open("rb") as file:
      metadata, _ = tensors.read_header(file, path.stat().length)
    meta = json.loads(metadata["block"])
    return meta if isinstance(meta["step"], int) else {}
  except (OSError, ValueError, TypeError, KeyError, RecursionError):  # damaged, or none of ours
    return {}


def _number(value: Any) -> float | None:
  return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _seconds_since(path: epath.Path) -> float | None:
  try:
    return max(0.0, time.time() - path.stat().mtime)
  except OSError:
    return None


def _count(number: float | None) -> str | None:
  return None if number is None else f"{number:,.0f}"


def _ago(seconds: float | None) -> str | None:
  if seconds is None:
    return None
  size, unit = next(((n, u) for n, u in ((86400, "d"), (3600, "h"), (60, "min")) if seconds >= n),
                    (1, "s"))
  return f"{seconds / size:.0f} {unit} ago"


def _who(row: Mapping[str, Any]) -> str:
  """Who trains a block, in words."""
  if row["owner"]:
    name = f"{row['owner'].get('host')}, process {row['owner'].get('pid')}"
    return name if row["alive"] else f"nobody: {name}, is gone"
  if row["exported"]:
    return "exported"
  done = row["num_steps"] is not None and (row["saved"] or 0) >= row["num_steps"]
  return "done" if done else "nobody"
