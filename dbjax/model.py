"""A model: all of its blocks, on the host. One block at a time is on the device.

    model = dbjax.load(workdir)
    samples, labels = model.sample(100, seed=1)

It knows that there are several blocks, and which denoises a noise level; what is generated, and
how it is scored, is the task's to say. A task sees ONE block.
"""

from collections.abc import Callable, Container, Iterator, Mapping
import contextlib
import dataclasses
import functools
import inspect
import itertools
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from dbjax import block as block_lib
from dbjax import config as config_lib
from dbjax import data
from dbjax import fields as fields_lib
from dbjax import provenance
from dbjax import solvers
from dbjax import task as task_lib
from dbjax.errors import UserError
from dbjax.fields import above
from dbjax.fields import between
from dbjax.fields import described
from dbjax.fields import Field
from dbjax.fields import Range

_HELD_OUT = 2000  # examples, at most, that losses are averaged over
_ROUNDING = 1e-6  # of a noise level in float32

NUM = Field(100, "How many samples.", between(1, 2**31 - 1))  # sample i is of an int32


@dataclasses.dataclass(frozen=True)
class Model:
  """All blocks of one model, on the host.

  Attributes:
    config: resolved.
    schedule: routes noise levels to blocks.
    tasks: one a block.
    params: one pytree of numpy arrays a block: the averaged weights.
    steps: how long each block has been trained.
    frozen: what blocks use and none trains, as the task has it.
    workdir: where it was loaded from.
    guide: a weaker model of the same split, by which samples may be guided: see `loading.load`.
    metas: what is recorded of each block, as `checkpoint.BlockCheckpoint.meta` returns it.
    earlier: models of earlier checkpoints, by workdir and step: `loading.weaker` reads each once.
  """

  config: Any
  schedule: Any
  tasks: tuple[task_lib.Task, ...]
  params: tuple[Any, ...]
  steps: tuple[int, ...]
  frozen: Any = None
  workdir: epath.Path | None = None
  guide: "Model | None" = None
  metas: tuple[dict[str, Any], ...] = ()
  earlier: dict[tuple[epath.Path, int], "Model"] = dataclasses.field(
      default_factory=dict, repr=False, compare=False)

  def sample(self, num: int, *, seed: int = 0, **options: Any
             ) -> tuple[np.ndarray, np.ndarray | None]:
    """Draws samples.

    Args:
      num: how many.
      seed: sample i is a function of (seed, i) and its options.
      **options: of config.sample (solver, grid, num_steps, batch_size, and the task's: guidance,
        churn, temperature, ...) and of the task (`labels`, the classes of images, in turn).

    Returns:
      samples (num, ...): images (num, H, W, C) uint8, or as the task has it; and their labels
      (num,) int32, or None.

    Raises:
      UserError: there is no such option, or its value makes no sense.
    """
    samples, labels = zip(*self.generate(num, seed=seed, **options))
    return np.concatenate(samples), None if labels[0] is None else np.concatenate(labels)

  def generate(self, num: int, *, seed: int = 0, **options: Any
               ) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """As `sample`, a batch at a time, so that memory does not grow with their number."""
    num, seed = NUM.check("num", num), config_lib.COMMON["seed"].check("seed", seed)
    checked = self.options(options)
    size = min(checked["batch_size"], num)
    for start in range(0, num, size):
      with _enough_memory(size):
        index = np.arange(start, start + size)  # the last may run over: one shape, one compile
        samples, labels = self.tasks[0].generate(self, index, seed, checked)
      keep = min(size, num - start)
      yield samples[:keep], None if labels is None else labels[:keep]

  def watch(self, number: int, seed: int, options: Mapping[str, Any]) -> task_lib.Strip | None:
    """Sample `number` at every evaluation of D: the state z before it, scaled to the size of data,
    and D; each as the task makes an answer of it. None where the task does not ask `solve` or
    `trace`.
    """
    of = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    notes: dict[str, Any] = {}
    self.tasks[0].generate(_Watched(**of, notes=notes), np.array([number]), seed, options)
    if not notes:
      return None
    sigma, size = notes["sigma"], self.config.get("sigma_data", 0.5)
    like_data = size / np.sqrt(size**2 + sigma**2).reshape(-1, *[1] * (notes["z"].ndim - 1))
    rows, index = {}, np.full(len(sigma), number)
    for name, states in (("state", notes["z"] * np.float32(like_data)), ("estimate", notes["d"])):
      rows[name], label = self.tasks[0].generate(
          _Watched(**of, answer=jnp.asarray(states)), index, seed, options)
    return task_lib.Strip(
        self.schedule.block_of(sigma), np.array([f"σ {s:.2g}" for s in sigma]), rows,
        "" if label is None else f"Sample {number}, label {label[0]}")

  def denoise(self, z: jax.Array, sigma: float, *condition: Any) -> jax.Array:
    """D(z, sigma): the estimate of what was noised, by the block of this noise level.

    Args:
      z: (N, ...) noised: images in [-1, 1], or embeddings.
      sigma: the noise level of all of them.
      *condition: of images their labels (N,); of labels the images; of tokens those before.

    Returns:
      (N, ...), float32.

    Raises:
      UserError: one of them is not what the task takes, or the noise is none of the schedule's.
    """
    z, condition = self._check_inputs(z, condition)
    least, most = self.schedule.sigma_min, self.schedule.sigma_max
    levels = Range(lambda x: least * (1 - _ROUNDING) <= x <= most * (1 + _ROUNDING),
                   f"from {least:.6g} to {most:.6g}, of the schedule")
    sigma = Field(float, range=levels).check("sigma", sigma)
    return self.denoiser(*condition)(z, sigma)

  def _check_inputs(self, z: Any, condition: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """z and the condition of `denoise` as arrays."""
    task = self.tasks[0]
    arguments = [*inspect.signature(task.denoise).parameters.values()][4:]
    names = [argument.name for argument in arguments]
    required = sum(argument.default is argument.empty and argument.kind is
                   argument.POSITIONAL_OR_KEYWORD for argument in arguments)
    try:
      z, *arrays = [x if isinstance(x, jax.Array) else np.asarray(x) for x in (z, *condition)]
    except ValueError as e:  # lists of several lengths
      raise UserError(f"denoise(z, sigma, {', '.join(names)}): expected arrays ({e})") from None
    words = f"denoise(z {described(z)}, sigma, " + ", ".join(map(described, arrays)) + ")"
    if not jnp.issubdtype(z.dtype, jnp.floating) or z.ndim < 1:
      raise UserError(f"{words}: expected z of floats, noised: (N, ...)")
    if len(arrays) < required:
      raise UserError(f"{words}: {names[len(arrays)]} is missing, after z and sigma")
    for name, x in zip(names, arrays[:required]):
      if x.shape[:1] != z.shape[:1] or not jnp.issubdtype(x.dtype, jnp.number):
        raise UserError(f"{words}: expected {name} ({len(z)}, ...) of numbers, one for each z")
    try:
      out = jax.eval_shape(task.denoise, self.params[0], self.frozen, z,
                           jnp.ones(z.shape[:1]), *arrays)
    except UserError:
      raise
    except Exception as e:  # whatever a network makes of other shapes
      raise UserError(f"{words}: the task takes none such "
                      f"({fields_lib.shorten(str(e))})") from e
    if out.shape != z.shape:
      raise UserError(f"{words}: expected z and {', '.join(names[:required])} that make "
                      f"{list(z.shape)}, found {list(out.shape)}")
    return z, tuple(arrays)

  def evaluate(self, dataset: Any = None, **options: Any) -> dict[str, Any]:
    """How good each block is, and what they make together.

    Args:
      dataset: what it was trained on; read by config.data if it is not given.
      **options: of the task: see `EVALUATE` of its class; num_samples. Those that are fields of
        config.sample have the config's values unless they are given.

    Returns:
      losses, each block's on held-out data as it is trained on them, whatever terms the config has
      added; and the task's tables: {name: rows}.
    """
    dataset = self.dataset(dataset)
    known, own = evaluate_fields(self.config), sample_fields(self.config)
    shared = {name: value for name, value in self.config.sample.items()
              if name in known and known[name] is own.get(name)}
    defaults = {name: field.default for name, field in known.items()} | shared | dict(
        num_samples=self.config.evaluate.num_samples)
    checked = defaults | fields_lib.check_all(options, known)
    tables = self.tasks[0].evaluate(self, dataset, checked)  # it may refuse: so it comes first
    return dict(losses=self.losses(dataset.held_out)) | tables

  def losses(self, held_out: Any, passes: int = 8, overlap: bool = True) -> list[float]:
    """Each block's training loss on held-out data, averaged over `passes` draws of the noise.

    Args:
      held_out: examples, such as model.dataset().held_out.
      passes: draws of the noise for each example.
      overlap: False leaves out the noise of its neighbours that a block trains on too (gamma), so
        that the mean over blocks of equal mass is of the same noise as that of a single block.

    Raises:
      UserError: the data are none of the task's.
    """
    passes = Field(8, range=above(0)).check("passes", passes)
    self._check_examples(held_out)
    parts = [batch for _, batch in data.batches(
        held_out, self.config.sample.batch_size, _HELD_OUT)]
    weights = [len(next(iter(part.values()))) for part in parts] * passes
    losses = []
    schedule = self.schedule if overlap else dataclasses.replace(self.schedule, gamma=0.0)
    for b, task, params in self.blocks():
      interval = schedule.training_interval(b)
      values = [_loss(task, params, self.key(b, n * len(parts) + i), part, interval, self.frozen)
                for n in range(passes) for i, part in enumerate(parts)]
      losses.append(float(np.average(values, weights=weights)))
    return losses

  def losses_by_noise(self, held_out: Any, num: int = 12) -> list[dict[str, Any]]:
    """Each block's training loss on held-out data at single noise levels.

    Args:
      held_out: as of `losses`; sample.batch_size of them are used.
      num: of levels, over all that the block trains on, its overlap with others included.

    Returns:
      Rows of block, sigma (of masks: time) and loss, from the most noise on; none where the
      task's schedule does not say its `levels`.

    Raises:
      UserError: the data are none of the task's.
    """
    self._check_examples(held_out)
    if not hasattr(self.schedule, "levels"):
      return []
    part = held_out.take(data.some(len(held_out), self.config.sample.batch_size))
    return [{"block": b, **level, "loss": float(_loss(
        task, params, self.key(b, i), part, interval, self.frozen))}
            for b, task, params in self.blocks()
            for i, (level, interval) in enumerate(self.schedule.levels(b, num))]

  def _check_examples(self, held_out: Any):
    """Raises UserError where they are not what is held out."""
    if not (hasattr(held_out, "__len__") and callable(getattr(held_out, "take", None))):
      raise UserError(f"held_out={fields_lib.shown(held_out)}: expected examples, with len and "
                      "take(numbers), such as model.dataset().held_out")
    if not len(held_out):
      raise UserError("held_out: has no examples")
    batch = held_out.take(np.arange(1))
    for name, expected in self.tasks[0].abstract_batch(1).items():
      if not isinstance(batch, Mapping) or name not in batch:
        raise UserError(f"held_out.take returns no {name}, expected {described(expected)}")
      found = described(np.asarray(batch[name]))
      if found != described(expected):
        raise UserError(f"held_out.take returns {name} {found}, expected {described(expected)}")

  def dataset(self, given: Any = None) -> data.Dataset:
    """The data that it was trained on: those given, or read by config.data once.

    Raises:
      UserError: they do not fit, or config.data names others than it was trained on.
    """
    if given is not None:
      return data.load(self.config, given)
    found, known = _dataset(self.config)
    if not all(provenance.same_data(meta["trained_with"], known) for meta in self.metas):
      raise UserError("config.data names other data than the model was trained with: pass them, as "
                      "dataset=(train, held_out); or say where they are, with data.dir, or "
                      "dbjax.evaluate --data_dir")
    return found

  def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
    """config.sample and the task's own options, with what is given otherwise, checked."""
    known = sample_fields(self.config)
    defaults = {name: field.default for name, field in known.items()} | dict(self.config.sample)
    checked = defaults | fields_lib.check_all(given, known)
    config_lib.STEPS.check("num_steps", checked["num_steps"])
    return checked | dict(num_steps=checked["num_steps"] or self.config.num_blocks)

  def with_config(self, **fields: Any) -> "Model":
    """The same blocks under a config with other fields, such as data.dir on another machine."""
    config = config_lib.changed(self.config, **fields)
    tasks = tuple(task_lib.make_task(config, b) for b in range(config.num_blocks))
    return dataclasses.replace(self, config=config, tasks=tasks)

  def beside(self, other: "Model", blocks: Container[int]) -> "Model":
    """This model with another's blocks at hand: each task is a pair, and so are its weights.

    For a `trace` by a denoiser that asks both. Of a block that is not among `blocks` the other's
    weights are None, and do not go to the device.
    """
    params = tuple((own, theirs if b in blocks else None)
                   for b, (own, theirs) in enumerate(zip(self.params, other.params)))
    tasks: Any = tuple(zip(self.tasks, other.tasks))
    return dataclasses.replace(self, tasks=tasks, params=params)

  def describe(self, options: Mapping[str, Any] | None = None):
    """Prints how far each block has come, and which ones are never asked for samples.

    Args:
      options: of `sample`, or of `evaluate`, as far as they are not as config.sample has them.
    """
    total = self.config.train.num_steps
    of = ", ".join(map(str, total)) if isinstance(total, tuple) else total
    print(f"blocks trained for {', '.join(map(str, self.steps))} of {of} steps", flush=True)
    way = {name: x for name, x in (options or {}).items() if name in ("grid", "num_steps")}
    if idle := ", ".join(map(str, self.idle(checked := self.options(way)))):
      print(f"note: num_steps={checked['num_steps']} on grid={checked['grid']} leave out block(s) "
            f"{idle}: take more steps" + (", or grid=equal_mass" * (checked["grid"] == "karras")),
            flush=True)

  def idle(self, options: Mapping[str, Any]) -> list[int]:
    """Blocks whose noise levels the sampler steps over; `options` as `options` checks them."""
    if "grid" not in options or not hasattr(self.schedule, "grid"):
      return []
    levels = self.schedule.grid(options["grid"], options["num_steps"])[:-1]
    return sorted({*range(len(self.tasks))} - {*map(int, self.schedule.block_of(levels))})

  def blocks(self) -> Iterator[tuple[int, task_lib.Task, Any]]:
    """(number, task, weights on the device) of each block; they replace the last one's."""
    for b, task in enumerate(self.tasks):
      yield b, task, jax.device_put(self.params[b])

  def key(self, block: int, number: int) -> jax.Array:
    """Of the draw of this number when a block is evaluated."""
    return block_lib.block_key(self.config.seed, block, number, block_lib.EVALUATE)

  def keys(self, seed: int, index: np.ndarray) -> jax.Array:
    """Of samples number `index` (n,): (n,)."""
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(index)

  def start(self, seed: int, index: np.ndarray) -> jax.Array:
    """The noise from which samples number `index` (n,) begin: (n, ...)."""
    prior = lambda key: self.tasks[0].prior(key, self.schedule.sigma_max)
    return jax.vmap(prior)(self.keys(seed, index))

  def stretches(self, levels: np.ndarray) -> Iterator[tuple[int, int, task_lib.Task, Any]]:
    """Who denoises a sequence of noise levels (K,), one block after the other.

    The next block's weights are on their way to the device while the caller's program, which it
    has begun when it asks for more, still runs.

    Yields:
      (start, stop, task, params): levels[start:stop] are this block's, whose weights are on the
      device.
    """
    owners = self.schedule.block_of(levels)
    cuts = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(levels)]
    following = jax.device_put(self.params[owners[0]])
    for start, stop in itertools.pairwise(cuts):
      params, following = following, None
      yield start, stop, self.tasks[owners[start]], params
      del params  # freed as soon as that program is done
      if stop < len(levels):
        following = jax.device_put(self.params[owners[stop]])

  def denoiser(self, *condition: Any) -> solvers.Denoise:
    """D(z, sigma), by the right block's `Task.denoise` with this condition."""
    resident, params = None, None

    def denoise(z, sigma):
      nonlocal resident, params
      block = int(self.schedule.block_of(sigma))
      if block != resident:
        resident, params = block, None  # free the last one's weights first
        params = jax.device_put(self.params[block])
      return _denoise(self.tasks[block], params, self.frozen, z,
                      jnp.full(z.shape[:1], sigma, jnp.float32), *condition)

    return denoise

  def table(self, options: Mapping[str, Any]) -> solvers.Table:
    """The evaluations of D, from sigma_max to 0, by options["solver"] on options["grid"]."""
    grid = self.schedule.grid(options["grid"], options["num_steps"])
    return solvers.table(options, grid)

  def solve(self, z: jax.Array, options: Mapping[str, Any], *condition: Any,
            keys: jax.Array | None = None) -> jax.Array:
    """z from sigma_max to 0, by options["solver"] on options["grid"].

    Args:
      z: (N, ...) noise, as `start` makes it.
      options: as `options` checks them.
      *condition: what `Task.denoise` takes besides z and sigma: arrays, or pytrees of them.
      keys: (N,), as `keys` makes them: of the noise that a solver adds on the way.

    Raises:
      UserError: the solver adds noise, and there are no keys.
    """
    return self.trace(z, options, _seeing_nothing, *condition, keys=keys)[0]

  def trace(self, z: jax.Array, options: Mapping[str, Any], denoise: Callable, *condition: Any,
            keys: jax.Array | None = None) -> tuple[jax.Array, Any]:
    """`solve` by another denoiser, with what it sees on the way.

    All steps of one block are one compiled program, the same for every block with as many layers,
    every solver, and any number of steps up to 64.

    Args:
      z, options, *condition, keys: as of `solve`.
      denoise: (task, params, frozen, z, sigma (N,), *condition) -> (D, seen), traced: `seen` is a
        pytree of arrays. The same function in every call, or it is compiled again.

    Returns:
      z at 0; `seen` of all evaluations, stacked: leading axis K.
    """
    table = self.table(options)
    carry: Any = None
    single, keys = jax.tree.map(padded, table), _needed(keys, table, options)
    for start, stop, task, params in self.stretches(table.sigma):
      if carry is None:
        carry = _begin(denoise, task, params, self.frozen, z, len(single.sigma), condition)
      carry = _solve(denoise, task, params, self.frozen, carry, single, start, stop, condition,
                     keys)
    return carry[0], jax.tree.map(lambda x: x[:len(table.sigma)], carry[2])


@dataclasses.dataclass(frozen=True)
class _Watched(Model):
  """A model for `watch`: `trace` notes what passes by; or it answers in the place of all blocks.

  Attributes:
    notes: is given sigma (K,), z and d (K, ...) of the first example.
    answer: (N, ...).
  """

  notes: dict[str, Any] = dataclasses.field(default_factory=dict)
  answer: jax.Array | None = None

  def trace(self, z, options, denoise, *condition, keys=None):
    """See `Model.trace`."""
    if self.answer is not None:
      return self.answer, ()
    z, (seen, before, d) = super().trace(z, options, _watching(denoise), *condition, keys=keys)
    self.notes.update(sigma=self.table(options).sigma, z=np.asarray(before[:, 0]),
                      d=np.asarray(d[:, 0]))
    return z, seen


@functools.cache
def _watching(denoise: Callable) -> Callable:
  """A denoiser of `Model.trace` that sees its z and D, too."""

  def watched(task, params, frozen, z, sigma, *condition):
    d, seen = denoise(task, params, frozen, z, sigma, *condition)
    return d, (seen, z, d)

  return watched


def padded(rows: np.ndarray) -> np.ndarray:
  """A plan (K, ...) in float32, with rows of zeros up to a multiple of 64: so that plans of other
  lengths run by the same program.
  """
  return np.pad(np.float32(rows), [(0, -len(rows) % 64)] + [(0, 0)] * (np.ndim(rows) - 1))


def _needed(keys: jax.Array | None, table: solvers.Table, options: Mapping[str, Any]
            ) -> jax.Array | None:
  """The keys where a table adds noise, else None. Raises UserError where they are missing."""
  if not table.noise.any():
    return None
  if keys is None:
    raise UserError(f"churn={options['churn']:g}: expected keys=model.keys(seed, index), of which "
                    "the noise is drawn; the task gives none: set it to 0")
  return keys


def _seeing_nothing(task, params, frozen, z, sigma, *condition):
  return task.denoise(params, frozen, z, sigma, *condition), ()


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
def _begin(denoise, task, params, frozen, z, num, condition):
  """z, what a solver remembers, and room for what `num` evaluations see."""
  seen = jax.eval_shape(functools.partial(denoise, task), params, frozen, z,
                        jnp.ones(z.shape[:1]), *condition)[1]
  room = jax.tree.map(lambda x: jnp.zeros((num, *x.shape), x.dtype), seen)
  return jnp.copy(z), jnp.zeros_like(z), room


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _solve(denoise, task, params, frozen, carry, table, start, stop, condition, keys):
  """Rows start to stop of a solver's table, all of them one block's.

  Noise is added before them where there are `keys` (N,): see `_noise`.
  """

  def evaluate(k, carry):
    z, m, room = carry
    if keys is not None:
      z += table.noise[k] * _noise(keys, k, z.shape[1:])
    sigma = jnp.full(z.shape[:1], table.sigma[k])
    d, seen = denoise(task, params, frozen, z, sigma, *condition)
    z, m = solvers.advance(z, d, m, table.move[k], table.keep[k])
    return z, m, jax.tree.map(lambda all, one: all.at[k].set(one), room, seen)

  return jax.lax.fori_loop(start, stop, evaluate, carry)


def _noise(keys, k, shape):
  """What is added to each sample before row k: a function of its own key and k alone."""
  return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, k), shape))(keys)


def sample_fields(config: Any) -> dict[str, fields_lib.Field]:
  """The options of `Model.sample`: fields of config.sample, and those of the task."""
  fields = config_lib.fields_of(config_lib.flatten(config))
  own = {name.removeprefix("sample."): field for name, field in fields.items()
         if name.startswith("sample.") and name != "sample.every_steps"}
  return own | dict(task_lib.find(config.task.name).SAMPLE)


def evaluate_fields(config: Any) -> dict[str, fields_lib.Field]:
  """The options of `Model.evaluate`: those of the task, and how many samples."""
  own = task_lib.find(config.task.name).EVALUATE
  return {"num_samples": config_lib.COMMON["evaluate.num_samples"], **own}


@contextlib.contextmanager
def _enough_memory(size: int) -> Iterator[None]:
  """Raises UserError where so many samples at a time do not fit."""
  try:
    yield
  except (MemoryError, jax.errors.JaxRuntimeError) as e:
    if isinstance(e, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(e):
      raise
    raise UserError(f"batch_size={size}: so many samples at a time do not fit into memory: set a "
                    "smaller one") from e


@functools.lru_cache(maxsize=2)
def _dataset(config) -> tuple[data.Dataset, dict[str, int | None]]:
  """The data that a config names, and what they are known by."""
  found = data.load(config)
  return found, provenance.data_of(found)


@functools.partial(jax.jit, static_argnums=0)
def _denoise(task, params, frozen, z, sigma, *condition):
  return task.denoise(params, frozen, z, sigma, *condition)


@functools.partial(jax.jit, static_argnums=0)
def _loss(task, params, key, batch, interval, frozen):
  return task.loss(params, task.draw(key, batch, interval), frozen)
