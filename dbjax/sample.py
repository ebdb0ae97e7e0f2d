"""Sample from a model whose blocks were trained apart.

    python -m dbjax.sample --workdir=DIR --num_samples=1000 --out=samples.npz

writes the arrays `samples` and, where there are any, `labels` (N,), and beside it the first
hundred to look at: of images (N, H, W, C) uint8 a labelled grid as PNG, of tokens (N, L)
their text; of a classifier the answers (N,) to held-out images. Solver, steps and guidance
are the config's unless given. Sample i depends on --seed and i alone, not on how many are
drawn.

The probability-flow ODE dz / dsigma = (z - D(z, sigma)) / sigma is solved from sigma_max
to 0 (EDM, arXiv 2206.00364, section 3). At each noise level one block is the denoiser,
and only its weights are on the device. A solver sees nothing of that: what it
remembers, z and past values of D, belongs to the trajectory and crosses the seams.
(Text is written by a reversal of the noising too: see tasks/autoregressive.py.)
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import itertools
from typing import Any

from absl import flags
from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from dbjax import block as block_lib
from dbjax import checkpoint
from dbjax import cli
from dbjax import config as config_lib
from dbjax import schedule as schedule_lib
from dbjax import tasks as tasks_lib

Denoise = Callable[[jax.Array, float], jax.Array]  # (z, sigma) -> D


def euler(denoise: Denoise, z: jax.Array, sigmas: np.ndarray) -> jax.Array:
  """Order 1: z' = (s'/s) z + (1 - s'/s) D(z, s). One evaluation a step.

  Args:
    denoise: D(z, sigma).
    z: (N, ...) noise of level sigmas[0].
    sigmas: descending, at most the last is 0.

  Returns:
    (N, ...) at level sigmas[-1].
  """
  for sigma, sigma_next in itertools.pairwise(sigmas):
    ratio = sigma_next / sigma
    z = ratio * z + (1 - ratio) * denoise(z, sigma)
  return z


def heun(denoise: Denoise, z: jax.Array, sigmas: np.ndarray) -> jax.Array:
  """Order 2: EDM's Algorithm 1 without churn. Two evaluations a step, one in a step to 0."""
  for sigma, sigma_next in itertools.pairwise(sigmas):
    slope = (z - denoise(z, sigma)) / sigma
    ahead = z + (sigma_next - sigma) * slope
    if sigma_next > 0:
      slope = (slope + (ahead - denoise(ahead, sigma_next)) / sigma_next) / 2
      ahead = z + (sigma_next - sigma) * slope
    z = ahead
  return z


def dpmpp_2m(denoise: Denoise, z: jax.Array, sigmas: np.ndarray) -> jax.Array:
  """Order 2, multistep: DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2). One evaluation a step.

  D is extrapolated in lambda = -ln sigma to the middle of the step, from the last two
  evaluations; the first step and a step to 0 are Euler's.
  """
  last, h_last = None, None
  for sigma, sigma_next in itertools.pairwise(sigmas):
    d = denoised = denoise(z, sigma)
    if sigma_next > 0:
      h = np.log(sigma / sigma_next)
      if last is not None:
        d = denoised + h / (2 * h_last) * (denoised - last)
      last, h_last = denoised, h
    ratio = sigma_next / sigma
    z = ratio * z + (1 - ratio) * d
  return z


SOLVERS = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}


@dataclasses.dataclass(frozen=True)
class Model:
  """All blocks of one model, on the host.

  Attributes:
    config: resolved.
    schedule: routes noise levels to blocks.
    tasks: one a block.
    params: one pytree of numpy arrays a block: the averaged weights.
    steps: how long each block has been trained.
    shared: what blocks share and nothing trains, as the task has it.
    workdir: where it was loaded from.
  """

  config: Any
  schedule: schedule_lib.Schedule | schedule_lib.Masking
  tasks: tuple[tasks_lib.Task, ...]
  params: tuple[Any, ...]
  steps: tuple[int, ...]
  shared: Any = None
  workdir: epath.Path | None = None

  def key(self, block: int, number: int) -> jax.Array:
    """Of the draw of this number when a block is evaluated."""
    return block_lib.block_key(self.config.seed, block, number, block_lib.EVALUATE)

  def options(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """config.sample with what a call says otherwise."""
    return {**self.config.sample, **overrides}

  def router(self) -> Callable[[float], tuple[tasks_lib.Task, Any]]:
    """level -> (task, params) of its block, on the device; they replace the last block's."""
    resident, params = None, None

    def route(level):
      nonlocal resident, params
      block = int(self.schedule.block_of(level))
      if block != resident:
        resident, params = block, None  # free the last one's weights first
        params = jax.device_put(self.params[block])
      return self.tasks[block], params

    return route

  def denoiser(self, *condition: Any) -> Denoise:
    """D(z, sigma), by the right block's `task.denoise(params, z, sigma (N,), *condition)`."""
    route = self.router()

    def denoise(z, sigma):
      task, params = route(sigma)
      return _denoise(task, params, z, jnp.full(z.shape[:1], sigma, jnp.float32), *condition)

    return denoise

  def solve(self, denoise: Denoise, z: jax.Array, options: Mapping[str, Any]) -> jax.Array:
    """z from sigma_max to 0, by options["solver"] on options["grid"]."""
    sigmas = self.schedule.grid(options["grid"], options["num_steps"])
    return SOLVERS[options["solver"]](denoise, z, sigmas)

  def start(self, seed: int, index: np.ndarray) -> jax.Array:
    """The noise from which samples number `index` (N,) begin: (N, ...)."""
    key = jax.random.key(seed)
    prior = lambda i: self.tasks[0].prior(jax.random.fold_in(key, i), self.schedule.sigma_max)
    return jax.vmap(prior)(index)

  def generate(self, num_samples: int, *, seed: int = 0, first: int = 0,
               **overrides) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Draws samples, a batch at a time, so that memory does not grow with their number.

    Args:
      num_samples: how many.
      seed: sample i is a function of (seed, i) and its label.
      first: the number of the first sample.
      **overrides: of config.sample: solver, bridge, grid, num_steps, guidance,
        temperature, batch_size; `labels`, the classes of images, taken in turn.

    Yields:
      samples (n, ...) and labels (n,) int32 or None: see the task.
    """
    draw = tasks_lib.module(self.config).generate
    size = min(self.options(overrides)["batch_size"], num_samples)
    for start in range(first, first + num_samples, size):
      index = np.arange(start, start + size)  # the last batch may run over: one shape, one compile
      samples, labels = draw(self, index, seed, **overrides)
      keep = min(size, first + num_samples - start)
      yield samples[:keep], None if labels is None else labels[:keep]


@functools.partial(jax.jit, static_argnums=0)
def _denoise(task, params, z, sigma, *condition):
  return task.denoise(params, z, sigma, *condition)


def load(workdir: epath.PathLike) -> Model:
  """The model in a workdir: the last checkpoint of every block.

  Raises:
    UserError: a block is missing, damaged, or of another model.
  """
  workdir = epath.Path(workdir)
  config = config_lib.load(workdir)
  tasks = tuple(tasks_lib.make_task(config, b) for b in range(config.num_blocks))
  params, steps, shared = [], [], None
  for b, task in enumerate(tasks):
    with checkpoint.BlockCheckpoint(workdir, b) as saved:
      meta = saved.meta(config)
      if shared is None:
        shared = saved.shared() or tasks_lib.module(config).shared(config, None)
        checksum = int(checkpoint.checksum(shared))
      saved.check_shared(meta, checksum)
      steps.append(meta["step"])
      params.append(saved.restore_ema(block_lib.abstract_state(config, task).ema, meta))
      if not np.array_equal(params[b].get("shared"), params[0].get("shared")):
        raise cli.UserError(f"{saved.directory} has learned another table than block 0: with "
                            "task.shared_embeddings=True all blocks are of one run and one step")
  schedule = schedule_lib.make_schedule(config.schedule, config.num_blocks)
  return Model(config, schedule, tasks, tuple(params), tuple(steps), shared, workdir)


def describe(model: Model):
  """Prints how far each block has come."""
  total = model.config.train.num_steps
  print("blocks trained for " + ", ".join(map(str, model.steps)) + f" of {total} steps", flush=True)


def collect(batches: Iterator[tuple[np.ndarray, np.ndarray | None]]
            ) -> tuple[np.ndarray, np.ndarray | None]:
  """All batches of `Model.generate` as two arrays."""
  samples, labels = zip(*batches)
  return np.concatenate(samples), None if labels[0] is None else np.concatenate(labels)


def _overrides(config) -> dict[str, Any]:
  """What the flags say otherwise than config.sample."""
  f = flags.FLAGS
  options = ("solver", "bridge", "grid", "num_steps", "guidance", "temperature", "batch_size")
  given = {k: f[k].value for k in options if f[k].value is not None}
  for name in given:
    if name not in config.sample:
      known = ", ".join(k for k in options if k in config.sample)
      raise cli.UserError(f"--{name}={given[name]}: the task {config.task.name} has no such "
                          f"option: expected one of {known}")
  config_lib.unflatten(config_lib.flatten(config) | {f"sample.{k}": v for k, v in given.items()})
  if f.labels is not None:
    given["labels"] = _labels(f.labels, config)
  return given


def _labels(text: str, config) -> tuple[int, ...]:
  if "label_drop" not in config.task:
    raise cli.UserError(f"--labels={text}: the task {config.task.name} draws no classes")
  num_classes = config.data.num_classes
  try:
    labels = tuple(int(x) for x in text.split(","))
  except ValueError:
    labels = (-1,)
  if not all(0 <= x < num_classes for x in labels):
    raise cli.UserError(f"--labels={text}: expected classes from 0 to {num_classes - 1}, "
                        "such as 3 or 0,1,2")
  return labels


def main():
  f = flags.FLAGS
  if epath.Path(cli.require("out")).suffix != ".npz":
    raise cli.UserError(f"--out={f.out}: expected a name that ends in .npz")
  model = load(cli.require("workdir"))
  out = cli.writable("out")
  describe(model)
  batches, drawn = [], 0
  for batch in model.generate(f.num_samples, seed=f.seed, **_overrides(model.config)):
    batches.append(batch)
    drawn += len(batch[0])
    print(f"{drawn}/{f.num_samples} samples", flush=True)
  samples, labels = collect(iter(batches))
  arrays = dict(samples=samples) if labels is None else dict(samples=samples, labels=labels)
  with out.open("wb") as file:
    np.savez(file, **arrays)
  shown = tasks_lib.module(model.config).save(
      model, samples[:100], None if labels is None else labels[:100], out.with_suffix(""))
  print(f"{out} and {shown}")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "Directory that dbjax.main trained in.")
  flags.DEFINE_string("out", None, "The .npz file to write.")
  flags.DEFINE_integer("num_samples", 100, "How many samples.", lower_bound=1)
  flags.DEFINE_integer("seed", 0, "Sample i is a function of (seed, i).", lower_bound=0,
                       upper_bound=2**32 - 1)
  flags.DEFINE_string("labels", None, "Classes to draw, taken in turn: 3 or 0,1,2 [all].")
  flags.DEFINE_float("guidance", None, "1 is none [the config's].", lower_bound=0)
  flags.DEFINE_float("temperature", None, "0 is the likeliest [the config's].", lower_bound=0)
  flags.DEFINE_integer("num_steps", None, "Solver steps [the config's].", lower_bound=1)
  flags.DEFINE_enum("solver", None, [*SOLVERS, "ancestral"], "[the config's]")
  flags.DEFINE_enum("bridge", None, config_lib.BRIDGES, "From logits to D [the config's].")
  flags.DEFINE_enum("grid", None, config_lib.GRIDS, "Noise levels [the config's].")
  flags.DEFINE_integer("batch_size", None, "Samples at a time [the config's].", lower_bound=1)
  cli.run(main, __doc__)
