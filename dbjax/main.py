"""Train blocks of a DiffusionBlocks model, each alone.

    python -m dbjax.main --config=configs/digits.py --workdir=/tmp/digits

--config is a file, or the name of a config that comes with dbjax: digits, cifar10:small. Any
field of the config can be set from the command line:

    --config.num_blocks=4            how many blocks; 1 is the end-to-end baseline
    --config.layers_per_block=2,4    an uneven split
    --config.train.blocks=0,2        train these blocks only, here and now
    --config.train.turn=100          blocks take turns of 100 steps; or all, or random
    --config.mesh.block=2            two rows of devices, which train two blocks at once;
                                     also mesh.data (-1: what is left) and mesh.fsdp

    --fork_from=OLD                  begin where another workdir has come to, with changed fields

--describe prints every field, its value, default, range and meaning, and trains nothing.

--status, with --workdir alone, prints what is trained how far, and by whom, while the run goes on
elsewhere; it only reads.

--debug runs in Python, op by op: a breakpoint or a print in your network or task shows arrays, and
the first operation that makes a nan ends the run, in a line that says which, where, and in which
step. It goes on from where the workdir stands, on one device, and saves nothing. It is slow, and
the first step compiles every operation by itself: take small sizes and few steps.

On a terminal a run shows a bar for each block, elsewhere a line every log.every_steps. TensorBoard
finds the figures and samples in the workdir, with --config.log.norms=True also norms of gradients
and updates, layer by layer, and with --config.log.profile_steps=10,13 a trace of these steps.
--config.log.wandb=PROJECT sends the figures to Weights & Biases, if that is installed.

On many hosts start the same command with --distributed on each; launch/ has scripts for
TPU pods, SLURM, and a rehearsal on one machine. The same command again resumes, on these
or other machines. Then
`python -m dbjax.sample --workdir=...` and `python -m dbjax.evaluate --workdir=...`.

Exit code 0: done; 2: a mistake, in one line; 75: another process of this run was lost, which one
line names, and the same command goes on; 130, 143: stopped by Ctrl-C or SIGTERM, and saved; 141:
nobody reads the output any more (| head), or it cannot be written: stopped, and saved.
"""

import shlex
import sys

from absl import flags

from dbjax import cli
from dbjax import config as config_lib
from dbjax import metrics
from dbjax import sharding
from dbjax import status
from dbjax.errors import UserError


def _check_modes():
  """Raises UserError where one flag leaves another without an effect."""
  given = {name: flags.FLAGS[name].serialize() for name in ("status", "describe", "debug",
                                                            "fork_from")
           if flags.FLAGS[name].value}
  only = next((given[name] for name in ("status", "describe") if name in given), None)
  if only and len(given) > 1:
    others = " and ".join(text for text in given.values() if text != only)
    raise UserError(f"{only} only prints, and has no use for {others}: leave one of them out")


def main():
  _check_modes()
  if flags.FLAGS.status:
    print(status.table(cli.path("workdir")))
    return
  config = config_lib.resolve(cli.config())
  if flags.FLAGS.describe:
    print(metrics.table(["field", "value", "default", "expected", "meaning"],
                        config_lib.describe(config), left=True))
    return
  workdir = cli.path("workdir")
  fork_from = cli.path("fork_from") if flags.FLAGS.fork_from else None
  from dbjax import loop  # it takes a second, which --status has no use for

  with sharding.joined(flags.FLAGS.distributed, workdir):
    history = loop.train(config, workdir, fork_from=fork_from, debug=flags.FLAGS.debug,
                         command=shlex.join(["python", "-m", "dbjax.main", *sys.argv[1:]]))
  if history.stopped:
    sys.exit(128 + history.stopped)  # as a shell says it, so that scripts stop too


if __name__ == "__main__":
  flags.DEFINE_string("config", None, "A config: a file, or a name such as digits.")
  flags.DEFINE_string("workdir", None, "Where checkpoints and logs go; resumes what is there.")
  flags.DEFINE_string("fork_from", None, "Another workdir, whose last checkpoints a new one begins "
                      "with, under the changed fields of its config.")
  flags.DEFINE_boolean("distributed", False, "Join the other processes of this run.")
  flags.DEFINE_boolean("describe", False, "Print every field of the config, and stop.")
  flags.DEFINE_boolean("status", False, "Print what is trained how far in --workdir, and stop.")
  flags.DEFINE_boolean("debug", False, "Run in Python, op by op, to the first nan; save nothing.")
  cli.run(main, __doc__)
