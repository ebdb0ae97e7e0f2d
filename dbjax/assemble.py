"""Make one model from blocks that were trained apart.

    python -m dbjax.assemble --out=DIR WORKDIR_OR_BLOCK...

Each argument is a --workdir of dbjax.main or a folder of dbjax.export, of which all blocks are
taken, or one block, as it came from another machine: its own directory (block_02) or file
(block_02.safetensors). A block holds its config, so nothing else is needed. Together they must have
every block once. Blocks may differ in how they were trained (seed, steps, optimizer) but not in
what makes them one model: what does not belong together is refused with the reason, and nothing is
written.

DIR is then a workdir like any other. Fields of which a config may hold a list, one value for each
block, hold one where blocks were trained otherwise. All but two kinds of blocks can be trained
further: those that were exported, for what their optimizer remembered is gone, and those that were
trained otherwise than block 0 in a field that holds no list, such as the seed.

    python -m dbjax.assemble --sums WORKDIR_OR_BLOCK...

writes SHA256SUMS into each, or with --out into DIR, for whoever gets it from you: `sha256sum -c
SHA256SUMS` checks it, and so does every command that reads it.
"""

from collections.abc import Mapping, Sequence
import operator
import re
from typing import Any

from absl import flags
from etils import epath
import jax
import numpy as np

from dbjax import block as block_lib
from dbjax import checkpoint
from dbjax import cli
from dbjax import config as config_lib
from dbjax import exported
from dbjax import loading
from dbjax import paths
from dbjax import provenance
from dbjax import task as task_lib
from dbjax import tensors
from dbjax import trust
from dbjax.errors import UserError


def assemble(sources: Sequence[epath.PathLike], out: epath.PathLike):
  """Copies the last checkpoint of every block to `out`, a new workdir.

  Args:
    sources: workdirs or exported folders, or directories or files of single blocks.
    out: does not exist yet, or is empty.

  Raises:
    UserError: a block is missing, there twice, damaged, or of another model.
  """
  out = paths.expand(out, "--out")
  paths.check_directory(out, "--out")
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise UserError(f"--out={out} exists: choose another")
  found = _find(sources)
  metas = {b: _meta(path, b) for b, path in found.items()}
  configs = {b: config_lib.unflatten(meta["config"]) for b, meta in metas.items()}
  config = next(iter(configs.values()))
  _belong_together(found, configs)
  provenance.check_one_start({found[b]: provenance.started_from(meta) for b, meta in metas.items()})
  try:
    for b, path in found.items():
      step = _copy(path, b, configs[b], out)
      print(f"block {b} | step {step} from {path}", flush=True)
    files = _files(config, [path.parent for path in found.values()])
    config_lib.save(out, _merged(configs), files)
    loading.load(out)  # refuses blocks that learned, or were trained with, different tables
  except BaseException:
    if out.exists():
      out.rmtree()
    raise


def _merged(configs: Mapping[int, Any]) -> Any:
  """The first block's config, with lists of those fields in which others were trained otherwise."""
  own = [task_lib.of_block(config, b) for b, config in configs.items()]
  of_blocks = {name: tuple(map(operator.attrgetter(name), own)) for name in task_lib.PER_BLOCK}
  first = config_lib.changed(next(iter(configs.values())), **{"train.blocks": ()})
  try:
    return config_lib.changed(first, **of_blocks)
  except UserError:  # other schedules, say, of which the lengths of one make no sense in another
    return first


def _copy(path: epath.Path, block: int, config: Any, out: epath.Path) -> int:
  """Copies one block to a new workdir, and returns its step. Raises UserError: it is damaged."""
  task = task_lib.make_task(config, block)
  template = block_lib.abstract_state(task)
  with _open(path, block) as theirs:
    meta, frozen = theirs.meta(), theirs.frozen(task.abstract_frozen()) or {}
    if path.is_file():
      ema = theirs.restore_ema(template.ema, meta)
      _check_finite(path, all(np.isfinite(x).all() for x in jax.tree.leaves(ema)))
      exported.write(exported.path_of(out, block), ema, frozen, meta)
      return meta["step"]
    state = theirs.restore(template, meta)
    _check_finite(path / str(meta["step"]), checkpoint.examine(state)[0])
    with checkpoint.BlockCheckpoint(out, block) as ours:
      ours.save_frozen(frozen)
      ours.save(state, config, seconds=meta["seconds"], checksums=meta["checksum"],
                trained_with=meta["trained_with"], held_out=meta.get("held_out"))
  return meta["step"]


def _check_finite(path: epath.Path, finite: Any):
  if not finite:
    raise UserError(f"{path}: its weights are not all finite, so the block has diverged: train it "
                    "again")


def _find(sources: Sequence[epath.PathLike]) -> dict[int, epath.Path]:
  """The directory or file of every block, in the order of the blocks."""
  found: dict[int, epath.Path] = {}
  for source in (paths.expand(source, "a workdir") for source in sources):
    if source.is_file():
      trust.check_sums(source.parent, (source.name,))
      blocks = {_meta(source)["block"]: source}
    elif source.is_dir():
      blocks = _inside(source)
    else:
      raise UserError(f"{source}: there is no such directory or file")
    for b, path in blocks.items():
      if b in found and found[b] != path:
        raise UserError(f"block {b} is in {found[b]} and in {path}: name one of them")
      found[b] = path
  return dict(sorted(found.items()))


def _inside(source: epath.Path) -> dict[int, epath.Path]:
  """The blocks in a workdir, an exported folder, or the directory of one block."""
  inside = [source] if _number(source) is not None else sorted(source.glob("block_*"))
  blocks: dict[int, epath.Path] = {}
  for path in inside:
    b = _number(path)
    if b is not None and (path.is_file() or checkpoint.exists(path.parent, b)):
      if b in blocks:
        raise UserError(f"block {b} is in {blocks[b]} and in {path}: name one of them")
      blocks[b] = path
  if not blocks:
    raise UserError(f"{source} holds no block: expected a --workdir of dbjax.main or a folder of "
                    "dbjax.export, or what holds a block in one, such as block_00 or "
                    "block_00.safetensors")
  trust.check_beside(source)
  for directory in {source, *(path for path in blocks.values() if path.is_dir())}:
    trust.check_sums(directory)
  for path in blocks.values():
    if path.is_dir():
      trust.check_files(path)
  return blocks


def _number(path: epath.Path) -> int | None:
  match = re.fullmatch(rf"block_(\d{{2,}})(?:{re.escape(tensors.SUFFIX)})?", path.name)
  return match and int(match[1])


def _open(path: epath.Path, block: Any) -> Any:
  """What reads a block: see `exported.open_block`."""
  return exported.ExportedBlock(path, block) if path.is_file() else checkpoint.BlockCheckpoint(
      path.parent, block)


def _meta(path: epath.Path, block: int | None = None) -> dict[str, Any]:
  with _open(path, block) as saved:
    return saved.meta()


def _files(config, workdirs: Sequence[epath.Path]) -> dict[str, bytes]:
  """`Task.files`, from the first workdir that has them; a block may have come without its own."""
  for workdir in dict.fromkeys(workdirs):
    try:
      return task_lib.find(config.task.name).files(config, workdir)
    except UserError as e:
      why = e
  print(f"note: a file that samples need came with none of these blocks: {why}; or copy it to "
        "--out from a workdir in which one of them was trained")
  return {}


def _belong_together(found, configs):
  (first, config), *others = configs.items()
  for b, theirs in others:
    flat, flat_theirs = config_lib.flatten(config), config_lib.flatten(theirs)
    differ = config_lib.differences(*map(config_lib.joint, (flat, flat_theirs)))
    if differ:
      raise UserError(f"{found[first]} (here) and {found[b]} (there) are not of one model: "
                      f"{differ}")
    differ = config_lib.differences(*map(config_lib.binding, (flat, flat_theirs)))
    if differ:
      print(f"note: block {first} (here) and block {b} (there) were trained with {differ}")
  missing = sorted(set(range(config.num_blocks)) - set(found))
  if missing:
    numbers = ",".join(map(str, missing))
    is_missing, it, its = ("are missing", "them", "their directories") if len(missing) > 1 else (
        "is missing", "it", "its directory")
    raise UserError(f"of the {config.num_blocks} blocks {numbers} {is_missing}: train {it} with "
                    f"--config.train.blocks={numbers}, and name {its} too")


def main(arguments: list[str]):
  if not arguments:
    raise UserError("no workdir or block to assemble: see --help")
  sums = flags.FLAGS.sums
  if sums and not flags.FLAGS.out:
    for given in arguments:
      print(trust.write_sums(paths.expand(given, "a workdir")))
    return
  out = cli.path("out")
  assemble(arguments, out)
  if sums:
    trust.write_sums(out)
  print(f"{out} holds all blocks: python -m dbjax.sample --workdir={out} --out=samples.npz")


if __name__ == "__main__":
  flags.DEFINE_string("out", None, "The new workdir.")
  flags.DEFINE_boolean("sums", False, "Write SHA256SUMS.")
  cli.run(main, __doc__, arguments=True)
