'''Your own data: what to train on, and what is held out.

    config.data.name = "my_data:load"

names a function in a file of yours, found as `python -m pydoc dbjax.network` says. It is
called with the resolved config, whose `data.*` fields your task may declare, and returns what to
train on and what is held out: two objects (or a `Dataset` of them), each with

    len(examples)            how many
    examples.take(numbers)   a batch: a dict of arrays (n, ...), of an array of numbers (n,)

`take` must be pure: the same numbers, the same arrays. The names, shapes and dtypes are those that
the task says in `abstract_batch`; the task image takes image (n, H, W, C) uint8, or float16 with
data.feature=latent, and label (n,) int32. Arrays in memory are wrapped by `Arrays`:

    def load(config):
      x, y = ...
      return dbjax.Arrays(image=x[:900], label=y[:900]), dbjax.Arrays(image=x[900:], label=y[900:])

From Python the same objects are passed as `dbjax.train(config, workdir, dataset=...)`. One object
alone is both what is trained on and what is held out.

In which order examples are seen is not the data's to say: batch n is a function of (seed, n), see
`dataset.py`. A fingerprint of the examples is kept beside each block; other data are named
when a run resumes.

`dbjax.data.show(config, path)` writes a picture, or a text, of a batch as a block sees it.

"digits" is short for "dbjax.data.digits:load". Any other name is a data set of TFDS, prepared in
`data.dir`: see `tfds.py`, and `python -m dbjax.prepare --help`, which makes one of files.
'''

from collections.abc import Callable
from typing import Any

from etils import epath
import jax
import numpy as np

from dbjax import block as block_lib
from dbjax import config as config_lib
from dbjax import lookup
from dbjax import paths
from dbjax import task as task_lib
from dbjax.data.dataset import Arrays
from dbjax.data.dataset import batches
from dbjax.data.dataset import Dataset
from dbjax.data.dataset import fingerprint
from dbjax.data.dataset import some
from dbjax.errors import UserError
from dbjax.fields import at_least
from dbjax.fields import Field

__all__ = ["Arrays", "Dataset", "batches", "fingerprint", "load", "show", "some"]

_STEP = Field(0, range=at_least(0))
_OURS = {"digits": "dbjax.data.digits:load"}  # all others are TFDS's


def load(config: Any, given: Any = None) -> Dataset:
  """The data of a resolved config, or those that are given from Python, checked.

  Raises:
    UserError: they are not there or damaged, or are not what the config says.
  """
  task_lib.check_resolved(config)
  name = config.data.name
  if given is not None:
    dataset, source = _dataset(given, "dataset"), "dataset"
  else:
    code = _OURS.get(name, name if lookup.names_code(name) else "dbjax.data.tfds:load")
    make, source = lookup.find(code, "data.name"), f"data.name={name}"
    try:
      made = make(config)
    except UserError:
      raise
    except Exception as e:  # whatever the user's function raises
      if code.startswith("dbjax."):
        raise
      raise UserError(f"{source}: {lookup.own_words(e, code)}") from e
    dataset = _dataset(made, source)
  task = task_lib.make_task(config, 0)
  size = max(task_lib.of_block(config, b).train.batch_size for b in range(config.num_blocks))
  parts = [(getattr(dataset, part), task, f"{source}: {part}") for part in ("train", "held_out")]
  for part in parts if given is not None or lookup.names_code(name) else ():
    _check_batch(*part, lambda x: (len(x.shape), x.dtype))  # what `check_data` may rely on
  task.check_data(config, dataset)
  if len(dataset.train) < size:
    raise UserError(f"{source}: {len(dataset.train)} examples to train on are fewer than "
                    f"train.batch_size={size}")
  for part in parts:
    _check_batch(*part, lambda x: (x.shape, x.dtype))
  return dataset


def show(config: Any, path: epath.PathLike | None = None, dataset: Any = None, *, block: int = 0,
         step: int = 0, num: int = 10) -> dict[str, np.ndarray]:
  """A batch as the network of a block sees it: moved, noised or masked, as the task does.

  Args:
    config: a ConfigDict, complete or not.
    path: of a file to look at; the task says what it shows, and its suffix.
    dataset: if not what config.data names.
    block: which block.
    step: which of its steps.
    num: how many examples the file shows.

  Returns:
    What `Task.draw` makes of the batch of that step: arrays (N, ...).

  Raises:
    UserError: the config is none, or the data are not there or do not fit.
  """
  config = config_lib.resolve(config)
  task = task_lib.make_task(config, block)
  step = _STEP.check("step", step)
  batch: Any = load(config, dataset).batch(config.seed, step, task.config.train.batch_size)
  key = block_lib.block_key(config.seed, block, step, block_lib.DRAW)
  interval = task.make_schedule(config).training_interval(block)
  drawn = jax.device_get(task.draw(key, batch, interval))
  if path is not None:
    task.show(jax.tree.map(lambda x: x[:num], drawn), paths.expand(path, "path"))
  return drawn


def _dataset(made: Any, source: str) -> Dataset:
  if isinstance(made, tuple | list) and len(made) == 2:
    made = Dataset(*map(_examples, made))
  elif not isinstance(made, Dataset):
    made = _examples(made)
    made = Dataset(train=made, held_out=made)
  for examples in (made.train, made.held_out):
    if not (hasattr(examples, "__len__") and callable(getattr(examples, "take", None))):
      raise UserError(f"{source}: expected what to train on and what is held out, each with len "
                      f"and take(numbers), found {type(examples).__name__}")
    if not len(examples):
      raise UserError(f"{source}: has no examples to train on, or none held out")
  return made


def _examples(made: Any) -> Any:
  return Arrays(**made) if isinstance(made, dict) else made


def _check_batch(examples: Any, task: task_lib.Task, source: str, kind: Callable[[Any], Any]):
  """Raises UserError where a batch is not, in its arrays' `kind`, what the task takes."""
  num = min(2, len(examples))
  batch = examples.take(np.arange(num))
  expected = task.abstract_batch(num)
  words = lambda x: f"{np.dtype(x.dtype)}{list(x.shape)}"
  for name, x in expected.items():
    if not isinstance(batch, dict) or name not in batch:
      names = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
      raise UserError(f"{source}.take returns {names}, expected {name} {words(x)}")
    found = np.asarray(batch[name])
    if kind(found) != kind(x):
      raise UserError(f"{source}.take returns {name} {words(found)}, expected {words(x)}, by the "
                      "config's data fields")
