"""When it goes wrong: what dbjax says, and what to do.

A mistake that the user can mend is a `UserError`: one line that names the field or the file, the
value, what was expected, and the cure. A command prints it and ends with exit code 2, before
anything is compiled or written. A stack trace is a mistake of ours: please report it.

**There is no such config field.** The line names the nearest one that there is.
`python -m dbjax.main --config=FILE --describe` prints every field with its range and meaning. A
field belongs to the task or to the network: another task has other fields.

**There is no module my_net.** Code is looked for where the command is run, on PYTHONPATH, and
beside the config file. dbjax.sample and others have no config file: run them where the module
lies. A module inside a workdir is refused, because workdirs come from strangers.

**The network, called with ..., expected ....** Its output has another shape than the task expects:
see `python -m pydoc dbjax.network`.

**The data set is not found.** The line says where dbjax looked, and which command prepares it.

**DIR holds another experiment.** A workdir belongs to one config. The line names the fields that
differ; take another workdir, or the config that it was started with. Fields on which no weight
depends, such as train.turn, mesh and sample, may change.

**A checkpoint cannot be read.** It is damaged. When training goes on it is set aside as
STEP.damaged, and the block goes on from the step before it; other blocks lose nothing. Whoever
samples meanwhile gets the step before it, and a line that says so. Nothing is deleted.

**DIR/block_00 is being trained by process ....** Another run trains this block: one run a block.
Other blocks of the same workdir are free. An owner that was killed does not stand in the way. One
on another host, or in another container, cannot be asked: a note says so, and the run waits until
that one shows a sign of life, and is refused; or, for 150 seconds at most, shows none, and goes on
in its place. Ctrl-C or SIGTERM ends the wait.

**--workdir=gs://... cannot be reached.** The line says what the storage answers: there is no such
bucket, this machine has no right to it, or no network.

**A block cannot be saved.** The disk is full, read-only or gone. The state stays in memory, and the
save is tried again for some minutes; make room meanwhile. Then the run ends, and the same command
goes on from the last checkpoint. Figures that cannot be written wait in memory too, and samples are
left out.

**A block passed over batches.** Their loss or gradient was not finite, so they changed nothing; or
the loss was above the first step's by nine times its size (by nine, where that is more), and the
averaged weights took the place of the weights. Which steps these were is in metrics.jsonl, and is
the same in every run. The same command with --debug goes on from the last checkpoint in Python, and
names the first operation that makes a nan.

**A block has diverged.** Fifty batches in a row were passed over. Its last good checkpoint is kept,
and other blocks go on. Try a lower optimizer.learning_rate or a longer optimizer.warmup_steps in a
new workdir, or fork this one: `python -m dbjax.main --fork_from=OLD --workdir=NEW ...`.

**The run was stopped.** After Ctrl-C, SIGTERM or SIGHUP (a closed terminal) the step under way is
finished and saved; after a second Ctrl-C nothing is, and nothing is damaged. The same command goes
on from there. After a power cut it goes on from the last checkpoint.

**The run shall be longer.** With optimizer.schedule=constant train.num_steps may be raised at any
time; with wsd (warm-up, stable, decay) until the decay begins. With cosine every step depends on
it: fork the run.

**A process of several was lost.** Each of the others prints one line, which names it (number, host,
pid) and how it ended, and ends with exit code 75 ("try again"): within seconds where it was killed
or had an error of its own, within a minute or two where its whole machine is gone. Look at what it
wrote last; where it was killed, memory is the first suspect. Then start the same command on all
hosts again: it goes on from the last checkpoints. A process that had an error itself prints that,
and ends with 2, as do all of them where their configs, files or versions differ.

**It does not fit into memory.** `python -m dbjax.plan --config=FILE --topology=v5e:1x1` says what a
step needs, and which mesh fits. Less is needed with more blocks, model.remat=True,
train.accumulate=4, or mesh.fsdp.

**The loss does not fall.** Compare blocks, not the mean: those of high noise have a lower loss to
begin with. The data must have a standard deviation near sigma_data: dbjax.main checks that of
images. num_blocks=1 is the end-to-end baseline: if that does not learn, blocks will not.
"""


class UserError(ValueError):
  """A mistake that the user can mend: names the field or file, the value, the cure. One line."""

  def __init__(self, message: str = ""):
    super().__init__(" ".join(str(message).split()))
