'''Your own task: what is noised, what conditions it, the loss, and how an answer is read off.

    config.task.name = "my_task:PointsTask"

names a subclass of `Task` in a file of yours: that is all that registers it, and every command
knows it. The tasks of dbjax, `dbjax/tasks/*.py`, are written in just this way; "image" is short
for "dbjax.tasks.image:ImageTask".

A task declares its config fields in `FIELDS`, under the names that they have in a config:
`task.*` are its own, and it may declare fields of `data`, `schedule` and `sample` too, and say
another default of a common one (such as `model.network`). See `python -m pydoc dbjax.fields` for
types, ranges and roles. The defaults of `FIELDS` are part of the experiment: a new field's
default must leave the results of before as they are.

To training, a task is an instance that sees ONE block: its network, and the resolved
config as that block sees it: of a list with a value for each block, its own.
Its methods are pure, and are traced inside jit:

    call(num)                        how the network is called
    abstract_batch(num)              the shapes of a batch
    draw(key, batch, interval)       everything random in the loss
    loss(params, drawn, frozen)      a float32 scalar

That trains. For samples and scores, a task is also given the whole `model.Model`:

    denoise(params, frozen, z, sigma, *condition)     D, for solvers and `Model.denoise`
    generate(model, index, seed, options)             samples number `index`
    save(model, samples, labels, path)                a file to look at
    evaluate(model, dataset, options)                 tables of what matters here
    headline(tables)                                  the few figures that say most
    strip(model, number, seed, options)               one sample as it comes to be
    program(model, options)                           an answer as one pure function, to be exported

Noise is Gaussian unless `make_schedule` says otherwise. The smallest useful task is in
configs/examples/signals.py.
'''

from collections.abc import Callable, Mapping
import dataclasses
import functools
import inspect
import operator
from typing import Any, ClassVar, NamedTuple, TYPE_CHECKING

from etils import epath
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dbjax import fields as fields_lib
from dbjax import lookup
from dbjax import network as network_lib
from dbjax import schedule as schedule_lib
from dbjax.errors import UserError
from dbjax.fields import Field
from dbjax.fields import shown

if TYPE_CHECKING:  # it stands above
  from dbjax.model import Model

Batch = Mapping[str, jax.Array]

# Besides the numbers of config.model, these may be a list: one value for each block.
PER_BLOCK = ("train.num_steps", "train.batch_size", "train.ema_decay", "optimizer.learning_rate",
             "optimizer.warmup_steps", "optimizer.decay_steps", "optimizer.weight_decay")


class Input(NamedTuple):
  """What a `Program` takes besides the weights.

  Attributes:
    shape: of one sample's.
    dtype: of it.
    values: what is taken where nothing is given: by samples in turn. Empty: noise, seed and index
      are made, any other must be given.
    shared: whether it is the same for all samples.
  """

  shape: tuple[int, ...] = ()
  dtype: Any = jnp.float32
  values: tuple[Any, ...] = ()
  shared: bool = False


SEED = {"seed": Input((), jnp.uint32, (0,), shared=True), "index": Input((), jnp.int32)}


class Program(NamedTuple):
  """An answer as one pure function: what `dbjax.export` compiles.

  Attributes:
    inputs: {name: Input}. Three names are known to whoever calls it: `noise` is drawn from
      Normal(0, 1), by the key that `Model.keys` makes of a seed and a sample's number; these are
      `seed` and `index`, see SEED.
    run: (model, **inputs) -> array, leading axis N, which is 1. Traced, with a `model.Model` whose
      weights are traced too.
    about: of the program, for those who write it anew without JAX: as it is to stand in a JSON.
    scripts: files of dbjax/scripts that do so.
  """

  inputs: Mapping[str, Input]
  run: Callable[..., jax.Array]
  about: Mapping[str, Any] = {}
  scripts: tuple[str, ...] = ()


class Strip(NamedTuple):
  """One sample as it comes to be, in K steps of denoising: see `plots.strip`.

  Attributes:
    block: (K,) int, which denoises.
    words: (K,) str, of the noise that there is: "σ 80".
    rows: {name: what there is to see of each step}: pictures (K, H, W, C) uint8; numbers (K, ...);
      or tokens (K, L) of str, "" where one is not known yet.
    title: what comes to be.
    given: a picture (H, W, C) uint8 of the condition, or None.
  """

  block: np.ndarray
  words: np.ndarray
  rows: dict[str, np.ndarray]
  title: str = ""
  given: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
  """A task as ONE block sees it; equal for blocks that are alike.

  Attributes:
    config: resolved, as the block sees it: see `of_block`.
    network: of the block.

  Class attributes:
    FIELDS: {name in a config: Field}.
    SAMPLE: {name: Field}, options of `generate` besides the fields of config.sample; flags of
      dbjax.sample, arguments of `Model.sample`.
    EVALUATE: the same of `evaluate`.
    OFFERS: {argument: name in a config}, what a network is given besides config.model if its
      constructor asks for it by name.
    PLAIN: {name in a config: value}, what makes the plain network that blocks are compared with,
      besides num_blocks=1.
  """

  config: Any
  network: Any

  FIELDS: ClassVar[Mapping[str, Field]] = {}
  SAMPLE: ClassVar[Mapping[str, Field]] = {}
  EVALUATE: ClassVar[Mapping[str, Field]] = {}
  OFFERS: ClassVar[Mapping[str, str]] = {}
  PLAIN: ClassVar[Mapping[str, Any]] = {}

  # What a config of this task must be, and what belongs to it besides blocks.

  @classmethod
  def fill(cls, config: Any):
    """Sets, in a complete config that is not yet frozen, what follows from other fields."""

  @classmethod
  def check(cls, config: Any):
    """Raises UserError where the fields of a resolved config do not go together."""

  @classmethod
  def check_data(cls, config: Any, dataset: Any):
    """Raises UserError where a `data.Dataset` is not what the config says."""

  @classmethod
  def make_schedule(cls, config: Any) -> Any:
    """The noise and its split into blocks; routes a noise level to its block."""
    return schedule_lib.make_schedule(config.schedule, config.num_blocks)

  @classmethod
  def frozen(cls, config: Any, dataset: Any = None) -> dict[str, np.ndarray]:
    """Arrays that all blocks use and none trains; kept beside each block."""
    return {}

  @classmethod
  def files(cls, config: Any, workdir: epath.Path | None = None) -> dict[str, bytes]:
    """{name: content} of files beside config.json, without which an answer cannot be read.

    Args:
      config: resolved.
      workdir: where they are, if not with the data set.
    """
    return {}

  # Of ONE block: pure.

  def call(self, num: int) -> network_lib.Call:
    """How the network is called with a batch of `num`, and what comes back."""
    raise NotImplementedError

  def init(self, key: jax.Array) -> Any:
    """Parameters of a new block: a pytree of float32 arrays."""
    return network_lib.init(self.network, key, self.call(1))

  def apply(self, params: Any, *inputs: Any, method: str = "__call__") -> Any:
    """The network."""
    return network_lib.apply(self.network, params, *inputs, method=method)

  @property
  def joint(self) -> tuple[str, ...]:
    """Names of parameters, at the top of the tree, that all blocks of a model train together: the
    gradient is the mean of theirs.
    """
    return ()

  @property
  def steady(self) -> bool:
    """Whether a loss many times that of the first batch tells that training has gone astray; not
    where noise weighs batches so unevenly that some of them always have one.
    """
    return True

  def abstract_batch(self, num: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a batch of `num`, as `draw` takes it: leading axis N."""
    raise NotImplementedError

  def abstract_frozen(self) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of `frozen`."""
    return {}

  def draw(self, key: jax.Array, batch: Batch, interval: Any) -> dict[str, jax.Array]:
    """Everything random in the loss, for the whole batch at once: leading axis N.

    Args:
      key: of this block and step.
      batch: as `abstract_batch` says.
      interval: of the noise that the block trains on, by `make_schedule`.
    """
    raise NotImplementedError

  def show(self, drawn: Mapping[str, np.ndarray], path: epath.Path) -> epath.Path | None:
    """Writes what was drawn to look at, named as `path` with a suffix, and returns its path."""
    return None

  def loss(self, params: Any, drawn: Mapping[str, jax.Array], frozen: Any = None) -> jax.Array:
    """The mean over what was drawn, or over a part of it: float32 scalar."""
    raise NotImplementedError

  def denoise(self, params: Any, frozen: Any, z: jax.Array, sigma: jax.Array,
              *condition: Any) -> jax.Array:
    """D(z, sigma): the estimate of y. z (N, ...), sigma (N,) -> (N, ...)."""
    raise UserError(f"task.name={self.config.task.name} has no denoiser of one noise level")

  def prior(self, key: jax.Array, sigma_max: float) -> jax.Array:
    """Where a sample starts: Gaussian noise, of one example, as the network returns it."""
    return sigma_max * jax.random.normal(key, self.call(1).output[1:])

  # Of the whole model; `self` is the task of its first block.

  def generate(self, model: "Model", index: np.ndarray, seed: int, options: Mapping[str, Any]
               ) -> tuple[np.ndarray, np.ndarray | None]:
    """Samples number `index` (n,), and their labels (n,) or None.

    Sample i is a function of (seed, i) and its options, whatever the others are.

    Args:
      model: all blocks, a `model.Model`.
      index: numbers of samples.
      seed: of all of them.
      options: config.sample and `SAMPLE`, with what the caller says otherwise.
    """
    raise UserError(f"task.name={self.config.task.name} does not generate samples")

  def save(self, model: "Model", samples: np.ndarray, labels: Any, path: epath.Path
           ) -> epath.Path | None:
    """Writes a file to look at, named as `path` with a suffix, and returns its path."""
    return None

  def evaluate(self, model: "Model", dataset: Any, options: Mapping[str, Any]
               ) -> dict[str, list[dict[str, Any]]]:
    """Tables {name: rows} of what matters in the task.

    Args:
      model: all blocks, a `model.Model`.
      dataset: with `train` and `held_out`.
      options: `EVALUATE`, with what the caller says otherwise.
    """
    return {}

  def program(self, model: "Model", options: Mapping[str, Any]) -> Program | None:
    """An answer as one pure function of a seed or a noise, for `dbjax.export`.

    Unless a task says otherwise: where noise of variance 1, times sigma_max, flows to under what
    `denoise` takes besides z and sigma, as `draw` returns it under the same names. Of a task that
    has no sample.solver it is D(z, sigma), by the block of this noise level. None: there is nothing
    of the kind, as where draw returns no z.

    Args:
      model: all blocks.
      options: as of `generate`.

    Raises:
      UserError: the options do not go together.
    """
    interval = model.schedule.training_interval(0)
    drawn = jax.eval_shape(self.draw, jax.random.key(0), self.abstract_batch(1), interval)
    names = [name for name, x in [*inspect.signature(self.denoise).parameters.items()][4:]
             if x.default is x.empty]
    if type(self).denoise is Task.denoise or not drawn.keys() >= {"z", *names}:
      return None
    inputs = {name: Input(drawn[name].shape[1:], drawn[name].dtype) for name in ("z", *names)}
    if "solver" in options:
      noise = inputs.pop("z")
      run = lambda model, noise, **condition: model.solve(
          model.schedule.sigma_max * noise, options, *(condition[name] for name in names))
      return Program(dict(noise=noise) | inputs, run)
    run = lambda model, z, sigma, **condition: _denoise(
        model, z, sigma, *(condition[name] for name in names))
    return Program(inputs | dict(sigma=Input(shared=True)), run)

  def headline(self, tables: Mapping[str, Any]) -> dict[str, float]:
    """Of what `evaluate` returned, the few figures that say most, under names for people.

    By default those in the first row of each table that is not one of blocks or noise levels.
    """
    first = {name: rows[0] if isinstance(rows, list | tuple) else rows
             for name, rows in tables.items() if rows}
    return {f"{name}, {column}": value for name, row in first.items()
            if isinstance(row, Mapping) and "block" not in row
            for column, value in row.items() if isinstance(value, float)}

  def strip(self, model: "Model", number: int, seed: int, options: Mapping[str, Any]
            ) -> Strip | None:
    """Sample `number` as it comes to be; None where there are no steps to see.

    By default what `generate` makes of the state from which each of `Model.solve`'s steps starts,
    and of the block's estimate.

    Args:
      model, seed, options: as of `generate`.
      number: of the sample.
    """
    return model.watch(number, seed, options)

  @functools.cached_property
  def _identity(self):
    return type(self), *(getattr(self, field.name) for field in dataclasses.fields(self))

  @functools.cached_property
  def _hash(self) -> int:
    return hash(self._identity)

  def __hash__(self) -> int:  # jit asks for it at every call
    return self._hash

  def __eq__(self, other: Any) -> bool:
    return self is other or (isinstance(other, Task) and self._hash == other._hash
                             and self._identity == other._identity)


def _denoise(model: "Model", z: jax.Array, sigma: jax.Array, *condition: jax.Array) -> jax.Array:
  """D(z, sigma) of a traced sigma (), by the block whose noise it is."""
  block = jnp.sum(sigma < jnp.float32(model.schedule.boundaries[1:-1]))
  of_block = lambda task, params: lambda z, *condition: task.denoise(
      params, model.frozen, z, jnp.full(z.shape[:1], sigma), *condition)
  return jax.lax.switch(block, [*map(of_block, model.tasks, model.params)], z, *condition)


def find(name: object) -> type[Task]:
  """The class that config.task.name names. Raises UserError where there is none."""
  ours = lookup.modules("dbjax.tasks")
  if not isinstance(name, str) or not (name in ours or lookup.names_code(name)):
    raise UserError(f"task.name={shown(name)}: expected one of {', '.join(ours)}, or your own "
                    "as module:Class")
  short = name in ours
  found = lookup.find(f"dbjax.tasks.{name}:{name.title()}Task" if short else name, "task.name")
  if not (isinstance(found, type) and issubclass(found, Task)):
    raise UserError(f"task.name={name}: expected a subclass of dbjax.Task")
  return found


def listable(of_network: Mapping[str, Field]) -> list[str]:
  """The fields of a config that may hold a list of values, one for each block.

  Args:
    of_network: what the network declares, by `fields.of_class`.
  """
  numbers = [name for name, field in of_network.items() if field.kind in (int, float)]
  return [*PER_BLOCK, *(f"model.{name}" for name in numbers if name != "num_layers")]


def per_block(config: Any) -> list[str]:
  """The fields of a resolved config that do hold such a list."""
  own = fields_lib.of_class(network_lib.find(config.model.network), find(config.task.name).OFFERS)
  return [name for name in listable(own)
          if isinstance(operator.attrgetter(name)(config), tuple)]


@functools.lru_cache(maxsize=256)
def of_block(config: Any, block: int) -> Any:
  """A resolved config as one block sees it: of each list of values, its own."""
  lists = per_block(config)
  if not lists:
    return config
  mine = ml_collections.ConfigDict(config.to_dict(), type_safe=False)
  for name in lists:
    section, leaf = name.split(".")
    mine[section][leaf] = operator.attrgetter(name)(config)[block]
  return ml_collections.FrozenConfigDict(mine)


def kinds(config: Any) -> dict[Task, int]:
  """The different tasks of a resolved config's blocks, and the first block of each."""
  found: dict[Task, int] = {}
  for b in range(len(config.layers_per_block)):
    found.setdefault(make_task(config, b), b)
  return found


def make_task(config: Any, block: int) -> Task:
  """The task of a resolved config for one block; its config is the block's own view.

  Raises:
    UserError: it is not resolved, or has no such block.
  """
  check_resolved(config)
  block = schedule_lib.check_block(block, len(config.layers_per_block))
  config, num_layers = of_block(config, block), config.layers_per_block[block]
  cls = find(config.task.name)
  offered = {name: operator.attrgetter(field)(config) for name, field in cls.OFFERS.items()}
  return cls(config=config, network=network_lib.make(config.model, num_layers, offered))


def check_resolved(config: Any):
  """Raises UserError where a config is none, or is not resolved."""
  if not isinstance(config, ml_collections.FrozenConfigDict) or not config.get("layers_per_block"):
    raise UserError(f"config={shown(config)}: expected a config that is resolved: "
                    "dbjax.resolve(config)")


@functools.lru_cache(maxsize=64)
def check(task: Task):
  """Raises UserError where the network of a block is not what its task calls; compiles nothing."""
  network_lib.check(task.network, task.call(2), task.config.model.network)
