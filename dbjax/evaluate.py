"""How good each block is, and what they make together.

    python -m dbjax.evaluate --workdir=DIR [--guidance=1,2] [--features=pixels,inception] \\
        [--inception=pt_inception-2015-12-05-6726825d.pth] [--json=out.json]

Prints, on held-out data:

loss        per block, over the noise that it trains on; and per noise level.
exposure    the loss at each noise level on the states that the sampler itself reaches,
            beside that on truly noised data. A block never trains on what its
            predecessors really produce: the difference is what that costs.
quality     of samples, for each guidance: distances to the training images in the
            features asked for (see `features.py` and `quality.py`; FID is that of
            inception), beside those of held-out images, which no model need beat. For
            small images also accuracy: the share that a classifier fitted to the
            training images gives the class asked for. Of latents say what decodes them
            (--decode=module:function) and whose images they are to equal (--images).

A state z of the sampler has no y to compare D(z) with. But for z = y + sigma eps, with
y of ANY distribution, Stein's unbiased risk estimate gives the same loss without it:

    E |D(z) - y|^2 = E [ |D(z) - z|^2 + 2 sigma^2 div D(z) ] - d sigma^2

(div by Hutchinson's estimator, one probe; |z - mean|^2, whose mean is known, as control
variate.) Evaluated on both kinds of states it agrees on them where the sampler's states
are distributed as noised data are. So a gap of either sign is a departure from that, in
units of the loss; 0 is a perfect chain. It sees only what D reacts to: where D is little
more than c_skip z, at the highest noise or in an untrained block, any state has gap 0.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import functools
import json
import os
from typing import Any

from absl import flags
from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from dbjax import block as block_lib
from dbjax import cli
from dbjax import config as config_lib
from dbjax import data
from dbjax import denoiser
from dbjax import features as features_lib
from dbjax import metrics
from dbjax import quality as quality_lib
from dbjax import sample
from dbjax.models import inception
from dbjax.tasks import image

_HELD_OUT = 2000  # images, at most, that losses are averaged over
_JUDGED_PIXELS, _JUDGE_IMAGES = 1024, 5000  # a judge of pixels is fitted to at most so many
_AT_ONCE = 100  # images seen by features at a time


def block_losses(model: sample.Model, held_out: data.Images, passes: int = 8) -> list[float]:
  """Each block's training loss on held-out data, averaged over `passes` draws of the noise."""
  size = model.config.sample.batch_size
  parts = [dict(image=held_out.image[i:i + size], label=held_out.label[i:i + size])
           for i in range(0, len(held_out), size)]
  losses = []
  for b, (task, params) in enumerate(zip(model.tasks, model.params)):
    params = jax.device_put(params)
    interval = model.schedule.training_interval(b)
    key = lambda n, b=b: block_lib.block_key(model.config.seed, b, n, block_lib.EVALUATE)
    values = [_loss(task, params, key(n * len(parts) + i), part, interval)
              for n in range(passes) for i, part in enumerate(parts)]
    losses.append(float(np.average(values, weights=[len(p["label"]) for p in parts] * passes)))
  return losses


@functools.partial(jax.jit, static_argnums=0)
def _loss(task, params, key, batch, interval):
  return task.loss(params, task.draw(key, batch, interval))


def exposure(model: sample.Model, held_out: data.Images, levels: int = 4,
             **overrides) -> list[dict[str, Any]]:
  """Loss per noise level on noised data and on the sampler's trajectory.

  Args:
    model: all blocks.
    held_out: images, of which the first sample.batch_size are used; the trajectory is
      sampled for their labels.
    levels: noise levels per block, out of those that the sampler visits.
    **overrides: of config.sample, as in `sample.generate`; guidance is always 1, since
      the loss is that of the unguided D.

  Returns:
    One dict per level, from the highest noise: block, sigma, loss (against y), sure and
    sure_trajectory (Stein's estimate on noised data and on the trajectory), gap (their
    difference) and gap_error, its standard error.
  """
  options = {**model.config.sample, **overrides}
  sigmas = model.schedule.grid(options["grid"], options["num_steps"])
  label = jnp.asarray(held_out.label[:options["batch_size"]])
  denoise = model.denoiser(label, 1.0)
  mine = [[s for s in sigmas[:-1] if model.schedule.block_of(s) == b]
          for b in range(len(model.tasks))]
  spread = lambda n: np.unique(np.linspace(0, n - 1, min(levels, n)).round().astype(int))
  chosen = [[of_block[i] for i in spread(len(of_block))] for of_block in mine]
  visited = {}  # sigma: z; Heun asks twice, and its second z is the corrected one

  def record(z, sigma):
    if any(sigma in of_block for of_block in chosen):
      visited[sigma] = np.asarray(z)
    return denoise(z, sigma)

  start = model.start(model.config.seed, np.arange(len(label)))
  sample.SOLVERS[options["solver"]](record, start, sigmas)

  y = image.to_float(jnp.asarray(held_out.image[:len(label)]))
  rows = []
  for b, task in enumerate(model.tasks):
    params = jax.device_put(model.params[b])
    for i, sigma in enumerate(chosen[b]):
      key = block_lib.block_key(model.config.seed, b, i, block_lib.EVALUATE)
      loss, sure, sure_trajectory = jax.device_get(_losses(
          task, params, key, y, visited[sigma], jnp.float32(sigma), label))
      gap = sure_trajectory - sure
      rows.append(dict(
          block=b, sigma=float(sigma), loss=float(loss.mean()), sure=float(sure.mean()),
          sure_trajectory=float(sure_trajectory.mean()), gap=float(gap.mean()),
          gap_error=float(gap.std() / len(gap) ** 0.5)))
  return rows


@functools.partial(jax.jit, static_argnums=0)
def _losses(task, params, key, y, visited, sigma, label):
  """Per-image losses at one noise level: (loss, sure, sure on the trajectory), each (N,)."""
  noise_key, probe_key = jax.random.split(key)
  sigmas = jnp.full(y.shape[:1], sigma)
  weight = denoiser.edm_weight(sigma, task.sigma_data)
  mean = lambda x: jnp.mean(x, axis=tuple(range(1, x.ndim)))
  probe = jax.random.rademacher(probe_key, y.shape, y.dtype)

  # The best linear D shrinks z towards the mean image: then |D - z|^2 is shrink |z - center|^2.
  center = jnp.mean(y, axis=0)
  spread = jnp.mean((y - center) ** 2) + sigma**2  # of z, per pixel
  shrink = (sigma**2 / spread) ** 2

  def sure(z):
    d, d_probe = jax.jvp(lambda z: task.denoise(params, z, sigmas, label), (z,), (probe,))
    risk = mean((d - z) ** 2) + sigma**2 * (2 * mean(probe * d_probe) - 1)
    return weight * (risk - shrink * (mean((z - center) ** 2) - spread)), d

  risk, d = sure(y + sigma * jax.random.normal(noise_key, y.shape))
  return weight * mean((d - y) ** 2), risk, sure(visited)[0]


@dataclasses.dataclass(frozen=True)
class Reference:
  """What samples are compared with.

  Attributes:
    features: to see images by.
    statistics: of the training images in each of them.
    judge: images -> classes; None if the images are large.
    held_out: the scores of real images that were not trained on.
  """

  features: tuple[features_lib.Features, ...]
  statistics: tuple[quality_lib.Statistics, ...]
  judge: Callable[[np.ndarray], np.ndarray] | None
  held_out: dict[str, float]

  def scores(self, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Of images (n, H, W, C) uint8 and their labels (n,), a batch at a time."""
    seen = [quality_lib.Accumulator(f.name) for f in self.features]
    right = total = 0
    for images, labels in batches:
      for features, accumulator in zip(self.features, seen):
        accumulator.add(np.asarray(features(images)))
      if self.judge:
        right, total = right + np.sum(self.judge(images) == labels), total + len(labels)
    scores = dict(accuracy=float(right / total)) if self.judge else {}
    for accumulator, real in zip(seen, self.statistics):
      scores |= quality_lib.scores(accumulator.statistics(), real)
    return scores


def make_reference(train, held_out, features: Sequence[features_lib.Features]) -> Reference:
  """The reference of a data set; the statistics of its images are cached.

  Args:
    train, held_out: `data.Images` or `data.Records` of pixels.
    features: to see them by.
  """
  cache = epath.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dbjax"
  statistics = tuple(quality_lib.reference(
      cache, f, train.identity, len(train), lambda: (image for image, _ in _batches(train)))
      for f in features)
  judge = None
  if np.prod(train.shape) <= _JUDGED_PIXELS and train.num_classes > 1:
    few = train.take(np.arange(min(len(train), _JUDGE_IMAGES)))
    judge = image.fit_judge(few["image"], few["label"])
  reference = Reference(tuple(features), statistics, judge, {})
  return dataclasses.replace(reference, held_out=reference.scores(_batches(held_out)))


def _batches(images) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  for i in range(0, len(images), _AT_ONCE):
    batch = images.take(np.arange(i, min(i + _AT_ONCE, len(images))))
    yield batch["image"], batch["label"]


def quality(model: sample.Model, reference: Reference, num_samples: int,
            decode: Callable[[np.ndarray], np.ndarray] = lambda x: x,
            **overrides) -> dict[str, float]:
  """The scores of `num_samples` samples; overrides as in `sample.generate`."""
  batches = sample.generate(model, num_samples, seed=model.config.seed, **overrides)
  return reference.scores((decode(samples), labels) for samples, labels in batches)


def main():
  f = flags.FLAGS
  model = sample.load(cli.require("workdir"))
  try:
    guidances = [float(g) for g in f.guidance] or [model.config.sample.guidance]
    if not all(0 <= g < float("inf") for g in guidances):
      raise ValueError
  except ValueError:
    raise cli.UserError(f"--guidance={','.join(f.guidance)}: expected numbers, 0 or more, such as "
                        "1,2") from None
  path = cli.writable("json") if f.json else None
  sample.describe(model)
  config = model.config
  if f.data_dir is not None:  # of another machine
    config = config_lib.unflatten(config_lib.flatten(config) | {"data.dir": f.data_dir})
  dataset = data.load(config)
  decode, images, names = lambda x: x, dataset, f.features
  if config.data.feature == "latent" and f.decode:
    decode = cli.function("decode")
    one = np.asarray(decode(np.zeros((1, *dataset.train.shape), np.float32)))
    if one.dtype != np.uint8 or one.ndim != 4:
      raise cli.UserError(f"--decode={f.decode}: it made {one.dtype} {one.shape} of one latent, "
                          "expected uint8 (1, height, width, channels)")
    images = data.Dataset(*(
        data.read_split(cli.require("images"), split, config.data.dir, one.shape[1])
        for split in (config.data.train, config.data.held_out)))
  elif config.data.feature == "latent":
    names = []
  elif not names and np.prod(dataset.train.shape) <= features_lib.MAX_PIXELS:
    names = ["pixels"]
  features = [
      features_lib.load(name, images.train.shape, f.inception if name == "inception" else None)
      for name in names]
  few = data.Images(**dataset.held_out.take(np.arange(min(len(dataset.held_out), _HELD_OUT))))
  result = dict(losses=block_losses(model, few))
  print(metrics.table(["block", "sigma from", "to", "held-out loss"], [
      (b, *model.schedule.boundaries[b:b + 2], loss) for b, loss in enumerate(result["losses"])]))

  result["exposure"] = exposure(model, few)
  header = ["block", "sigma", "loss", "sure", "sure_trajectory", "gap", "gap_error"]
  print("\n" + metrics.table(header, [[row[h] for h in header] for row in result["exposure"]]))

  if features:
    _print_quality(model, images, features, decode, guidances, result)
  else:
    print("\nnote: samples are not scored: say by which --features, and of latents --decode")
  if path:
    path.write_text(json.dumps(result, indent=2) + "\n")


def _print_quality(model, images: data.Dataset, features, decode, guidances, result):
  reference = make_reference(images.train, images.held_out, features)
  num_samples = flags.FLAGS.num_samples or model.config.evaluate.num_samples
  result["held_out"] = reference.held_out
  result["quality"] = [
      dict(guidance=g, num_samples=num_samples,
           **quality(model, reference, num_samples, decode, guidance=g)) for g in guidances]
  rows = [*result["quality"], dict(guidance="held out", num_samples=len(images.held_out),
                                   **reference.held_out)]
  print("\n" + metrics.table(list(rows[0]), [row.values() for row in rows]))


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "Directory that dbjax.main trained in.")
  flags.DEFINE_list("guidance", [], "Score samples at each of these [the config's].")
  flags.DEFINE_integer("num_samples", None, "Samples to score [the config's].", lower_bound=2)
  flags.DEFINE_list("features", [], "To see samples by: " + ", ".join(features_lib.NAMES)
                    + " [pixels, if images are small].")
  flags.DEFINE_string("inception", None, "Weights: " + inception.URL)
  flags.DEFINE_string("data_dir", None, "Where TFDS keeps its data sets [the config's].")
  flags.DEFINE_string("decode", None, "Of latents: module:function, to images uint8.")
  flags.DEFINE_string("images", None, "Of latents: the TFDS data set of their images.")
  flags.DEFINE_string("json", None, "Also write all figures to this file.")
  cli.run(main, __doc__)
