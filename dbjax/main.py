"""Train blocks of a DiffusionBlocks model, each alone.

    python -m dbjax.main --config=configs/digits.py --workdir=/tmp/digits

Any field of the config can be set from the command line:

    --config.num_blocks=4            how many blocks; 1 is the end-to-end baseline
    --config.layers_per_block=2,4    an uneven split
    --config.train.blocks=0,2        train these blocks only, here and now
    --config.train.turn=100          blocks take turns of 100 steps; or all, or random
    --config.mesh.block=2            two rows of devices, which train two blocks at once;
                                     also mesh.data (-1: what is left) and mesh.fsdp

On many hosts start the same command with --distributed on each; launch/ has scripts for
TPU pods, SLURM, and a rehearsal on one machine. The same command again resumes, on these
or other machines. Then
`python -m dbjax.sample --workdir=...` and `python -m dbjax.evaluate --workdir=...`.
"""

import sys

from absl import flags
from ml_collections import config_flags

from dbjax import cli
from dbjax import config as config_lib
from dbjax import sharding
from dbjax import train


def main():
  config = config_lib.resolve(cli.config())
  sharding.start(flags.FLAGS.distributed)
  stopped = train.train(config, cli.require("workdir"))
  if stopped:
    sys.exit(128 + stopped)  # as a shell says it, so that scripts stop too


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "A config file, such as configs/digits.py.")
  flags.DEFINE_string("workdir", None, "Where checkpoints and logs go; resumes what is there.")
  flags.DEFINE_boolean("distributed", False, "Join the other processes of this run.")
  cli.run(main, __doc__)
