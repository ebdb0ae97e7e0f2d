"""Make one model from blocks that were trained apart.

    python -m dbjax.assemble --out=DIR WORKDIR_OR_BLOCK...

Each argument is a --workdir of dbjax.main, of which all blocks are taken, or a block's
own directory (block_02), as it came from another machine: a block's checkpoint holds its
config, so nothing else is needed. Together they must have every block once. Blocks may
differ in how they were trained (seed, steps, optimizer) but not in what makes them one
model: what does not belong together is refused with the reason, and nothing is written.

DIR is then a workdir like any other.

    python -m dbjax.assemble --sums WORKDIR_OR_BLOCK...

writes SHA256SUMS into each, or with --out into DIR, for whoever gets it from you: `sha256sum -c
SHA256SUMS` checks it, and so does every command that reads it.
"""

from collections.abc import Sequence
import re

from absl import flags
from etils import epath

from dbjax import block as block_lib
from dbjax import checkpoint
from dbjax import cli
from dbjax import config as config_lib
from dbjax import model as model_lib
from dbjax import paths
from dbjax import provenance
from dbjax import task as task_lib
from dbjax import trust
from dbjax.errors import UserError


def assemble(sources: Sequence[epath.PathLike], out: epath.PathLike):
  """Copies the last checkpoint of every block to `out`, a new workdir.

  Args:
    sources: workdirs, or directories of single blocks.
    out: does not exist yet, or is empty.

  Raises:
    UserError: a block is missing, there twice, damaged, or of another model.
  """
  out = paths.expand(out, "--out")
  paths.check_directory(out, "--out")
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise UserError(f"--out={out} exists: choose another")
  found = _find(sources)
  metas = {b: _meta(d, b) for b, d in found.items()}
  configs = {b: config_lib.unflatten(meta["config"]) for b, meta in metas.items()}
  config = next(iter(configs.values()))
  _belong_together(found, configs)
  provenance.check_one_start({found[b]: provenance.started_from(meta) for b, meta in metas.items()})
  try:
    for b, directory in found.items():
      task = task_lib.make_task(configs[b], b)
      template = block_lib.abstract_state(task)
      with (checkpoint.BlockCheckpoint(directory.parent, b) as theirs,
            checkpoint.BlockCheckpoint(out, b) as ours):
        meta = theirs.meta()
        state = theirs.restore(template, meta)
        if not checkpoint.examine(state)[0]:
          raise UserError(f"{directory / str(meta['step'])}: its weights are not all finite, so "
                          "the block has diverged: train it again")
        ours.save_frozen(theirs.frozen(task.abstract_frozen()) or {})
        ours.save(state, configs[b], seconds=meta["seconds"], checksums=meta["checksum"],
                  trained_with=meta["trained_with"], held_out=meta.get("held_out"))
      print(f"block {b} | step {meta['step']} from {directory}", flush=True)
    files = _files(config, [directory.parent for directory in found.values()])
    config_lib.save(out, config_lib.changed(config, **{"train.blocks": ()}), files)
    model_lib.load(out)  # refuses blocks that learned, or were trained with, different tables
  except BaseException:
    if out.exists():
      out.rmtree()
    raise


def _find(sources: Sequence[epath.PathLike]) -> dict[int, epath.Path]:
  """The directory of every block, in the order of the blocks."""
  found: dict[int, epath.Path] = {}
  for source in (paths.expand(source, "a workdir") for source in sources):
    if not source.is_dir():
      raise UserError(f"{source}: there is no such directory")
    inside = [source] if _number(source) is not None else sorted(source.glob("block_*"))
    blocks = {b: d for d in inside if (b := _number(d)) is not None
              and checkpoint.exists(d.parent, b)}
    if not blocks:
      raise UserError(f"{source} holds no block: expected a --workdir of dbjax.main, or a "
                      "directory in one such as block_00, with a checkpoint")
    for directory in {source, *blocks.values()}:
      trust.check_sums(directory)
    for b, directory in blocks.items():
      trust.check_files(directory)
      if b in found and found[b] != directory:
        raise UserError(f"block {b} is in {found[b]} and in {directory}: name one of them")
      found[b] = directory
  return dict(sorted(found.items()))


def _number(directory: epath.Path) -> int | None:
  match = re.fullmatch(r"block_(\d{2,})", directory.name)
  return match and int(match[1])


def _meta(directory: epath.Path, block: int):
  with checkpoint.BlockCheckpoint(directory.parent, block) as saved:
    return saved.meta()


def _files(config, workdirs: Sequence[epath.Path]) -> dict[str, bytes]:
  """`Task.files`, from the first workdir that has them; a block may have come without its own."""
  for workdir in dict.fromkeys(workdirs):
    try:
      return task_lib.find(config.task.name).files(config, workdir)
    except UserError as e:
      why = e
  print(f"note: {why}")
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
    raise UserError(f"of the {config.num_blocks} blocks {numbers} is missing: train it with "
                    f"--config.train.blocks={numbers}, and name its directory too")


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
