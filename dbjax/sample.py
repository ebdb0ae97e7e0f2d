"""Sample from a model whose blocks were trained apart.

    python -m dbjax.sample --workdir=DIR --num_samples=1000 --out=samples.npz

writes the arrays `samples` (N, H, W, C) uint8 and `labels` (N,), and a labelled grid of
the first hundred as PNG beside it. Solver, steps and guidance are the config's unless
given. Sample i depends on --seed and i alone, not on how many are drawn.

The probability-flow ODE dz / dsigma = (z - D(z, sigma)) / sigma is solved from sigma_max
to 0 (EDM, arXiv 2206.00364, section 3). At each noise level one block is the denoiser,
and only its weights are on the device. A solver sees nothing of that: what it
remembers, z and past values of D, belongs to the trajectory and crosses the seams.
"""

from collections.abc import Callable, Iterator
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
from dbjax import metrics
from dbjax import schedule as schedule_lib
from dbjax.tasks import image

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
    schedule: routes sigma to blocks.
    tasks: one a block.
    params: one pytree of numpy arrays a block: the averaged weights.
    steps: how long each block has been trained.
  """

  config: Any
  schedule: schedule_lib.Schedule
  tasks: tuple[image.ImageTask, ...]
  params: tuple[Any, ...]
  steps: tuple[int, ...]

  def denoiser(self, label: jax.Array, guidance: float) -> Denoise:
    """D(z, sigma) for these labels (N,): the right block's, whose weights replace the last's."""
    resident, params = None, None
    denoise_block = _denoise if guidance == 1 else _denoise_guided

    def denoise(z, sigma):
      nonlocal resident, params
      block = int(self.schedule.block_of(sigma))
      if block != resident:
        resident, params = block, None  # free the last one's weights first
        params = jax.device_put(self.params[block])
      sigma = jnp.full(z.shape[:1], sigma, jnp.float32)
      return denoise_block(self.tasks[block], params, z, sigma, label, guidance)

    return denoise

  def start(self, seed: int, index: np.ndarray) -> jax.Array:
    """The noise from which samples number `index` (N,) begin: (N, ...)."""
    key = jax.random.key(seed)
    prior = lambda i: self.tasks[0].prior(jax.random.fold_in(key, i), self.schedule.sigma_max)
    return jax.vmap(prior)(index)


@functools.partial(jax.jit, static_argnums=0)
def _denoise_guided(task, params, z, sigma, label, guidance):
  return task.denoise_guided(params, z, sigma, label, guidance)


@functools.partial(jax.jit, static_argnums=0)
def _denoise(task, params, z, sigma, label, _):
  return task.denoise(params, z, sigma, label)


def load(workdir: epath.PathLike) -> Model:
  """The model in a workdir: the last checkpoint of every block.

  Raises:
    UserError: a block is missing, damaged, or of another model.
  """
  workdir = epath.Path(workdir)
  config = config_lib.load(workdir)
  tasks = tuple(image.make_task(config, b) for b in range(config.num_blocks))
  params, steps = [], []
  for b, task in enumerate(tasks):
    with checkpoint.BlockCheckpoint(workdir, b) as saved:
      meta = saved.meta(config)
      steps.append(meta["step"])
      params.append(saved.restore_ema(block_lib.abstract_state(config, task).ema, meta))
  schedule = schedule_lib.make_schedule(config.schedule, config.num_blocks)
  return Model(config, schedule, tasks, tuple(params), tuple(steps))


def describe(model: Model):
  """Prints how far each block has come."""
  total = model.config.train.num_steps
  print("blocks trained for " + ", ".join(map(str, model.steps)) + f" of {total} steps", flush=True)


def generate(model: Model, num_samples: int, *, seed: int = 0, labels: tuple[int, ...] = (),
             first: int = 0, **overrides) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Draws samples, a batch at a time, so that memory does not grow with their number.

  Args:
    model: all blocks.
    num_samples: how many.
    seed: sample i is a function of (seed, i) and its label.
    labels: the classes, taken in turn; all of them by default.
    first: the number of the first sample.
    **overrides: of config.sample: solver, grid, num_steps, guidance, batch_size.

  Yields:
    samples (n, H, W, C), uint8 or latents, and labels (n,) int32.
  """
  options = {**model.config.sample, **overrides}
  labels = np.array(labels or range(model.config.data.num_classes), np.int32)
  sigmas = model.schedule.grid(options["grid"], options["num_steps"])
  size = min(options["batch_size"], num_samples)
  for start in range(first, first + num_samples, size):
    index = np.arange(start, start + size)  # the last batch may run over: one shape, one compile
    label = labels[index % len(labels)]
    denoise = model.denoiser(jnp.asarray(label), float(options["guidance"]))
    z = SOLVERS[options["solver"]](denoise, model.start(seed, index), sigmas)
    keep = min(size, first + num_samples - start)
    yield model.tasks[0].answer(z)[:keep], label[:keep]


def collect(batches: Iterator[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
  """All batches of `generate` as two arrays."""
  samples, labels = zip(*batches)
  return np.concatenate(samples), np.concatenate(labels)


def _labels(text: str | None, num_classes: int) -> tuple[int, ...]:
  if text is None:
    return ()
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
  if f.guidance is not None and not np.isfinite(f.guidance):
    raise cli.UserError(f"--guidance={f.guidance}: expected a finite number")
  model = load(cli.require("workdir"))
  out = cli.writable("out")
  describe(model)
  overrides = {k: f[k].value for k in ("solver", "grid", "num_steps", "guidance", "batch_size")
               if f[k].value is not None}
  labels = _labels(f.labels, model.config.data.num_classes)
  batches = []
  for batch in generate(model, f.num_samples, seed=f.seed, labels=labels, **overrides):
    batches.append(batch)
    print(f"{sum(len(b[1]) for b in batches)}/{f.num_samples} samples", flush=True)
  samples, labels = collect(iter(batches))
  with out.open("wb") as file:
    np.savez(file, samples=samples, labels=labels)
  pictures = model.tasks[0].picture(samples[:100])
  metrics.save_grid(out.with_suffix(".png"), pictures, labels[:100], 10)
  print(f"{out} and {out.with_suffix('.png')}")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "Directory that dbjax.main trained in.")
  flags.DEFINE_string("out", None, "The .npz file to write.")
  flags.DEFINE_integer("num_samples", 100, "How many samples.", lower_bound=1)
  flags.DEFINE_integer("seed", 0, "Sample i is a function of (seed, i).", lower_bound=0,
                       upper_bound=2**32 - 1)
  flags.DEFINE_string("labels", None, "Classes to draw, taken in turn: 3 or 0,1,2 [all].")
  flags.DEFINE_float("guidance", None, "1 is none [the config's].", lower_bound=0)
  flags.DEFINE_integer("num_steps", None, "Solver steps [the config's].", lower_bound=1)
  flags.DEFINE_enum("solver", None, list(SOLVERS), "[the config's]")
  flags.DEFINE_enum("grid", None, ["karras", "equal_mass"], "Noise levels [the config's].")
  flags.DEFINE_integer("batch_size", None, "Samples at a time [the config's].", lower_bound=1)
  cli.run(main, __doc__)
