"""Image generation: a label-conditional denoiser of pixels or latents (method: EDM, DiT).

Noised: the image y in [-1, 1], or its latent. Condition: its class, dropped now and then so that
one network also learns the unconditional denoiser, for guidance (arXiv 2207.12598).
Loss: w(sigma) |D(y + sigma eps, sigma, label) - y|^2. Answer: the last denoised z.
Metric: is it the class that was asked for, and is it distributed as the data are.
"""

import dataclasses
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from dbjax import augment
from dbjax import data
from dbjax import denoiser
from dbjax import exposure
from dbjax import features as features_lib
from dbjax import pictures
from dbjax import quality
from dbjax import schedule
from dbjax.cli import UserError
from dbjax.models.dit import DiT


@dataclasses.dataclass(frozen=True)
class ImageTask:
  """The task as ONE block sees it; equal for blocks with as many layers."""

  network: DiT
  image_shape: tuple[int, int, int]
  sigma_data: float
  label_drop: float
  flip: bool = False
  dtype: Any = jnp.uint8  # of the data: pixels, or float16 latents

  def init(self, key: jax.Array):
    """Parameters of a new block: a pytree of float32."""
    z = jnp.zeros((1, *self.image_shape))
    return self.network.init(key, z, jnp.zeros(1), jnp.zeros(1, jnp.int32))["params"]

  def abstract_batch(self, num: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a batch of `num`, as `draw` takes it."""
    return dict(image=jax.ShapeDtypeStruct((num, *self.image_shape), self.dtype),
                label=jax.ShapeDtypeStruct((num,), jnp.int32))

  def abstract_shared(self) -> dict[str, Any]:
    """Blocks share nothing but the space of images."""
    return {}

  def draw(self, key: jax.Array, batch: dict[str, jax.Array],
           interval: schedule.Interval) -> dict[str, jax.Array]:
    """Everything random in the loss, for the whole batch at once.

    Args:
      key: of this block and step.
      batch: image (N, H, W, C) uint8 or latents, label (N,) int32.
      interval: of the block.

    Returns:
      y (N, H, W, C), z (N, H, W, C), sigma (N,), label (N,), leading axis N.
    """
    sigma_key, noise_key, drop_key = jax.random.split(key, 3)
    y = to_float(batch["image"])
    if self.flip:
      y = augment.flip(jax.random.split(jax.random.fold_in(key, 3), len(y)), y)
    sigma = schedule.sample_sigma(sigma_key, y.shape[:1], interval)
    z = y + sigma[:, None, None, None] * jax.random.normal(noise_key, y.shape)
    dropped = jax.random.bernoulli(drop_key, self.label_drop, sigma.shape)
    label = jnp.where(dropped, self.network.num_classes, batch["label"])
    return dict(y=y, z=z, sigma=sigma, label=label)

  def loss(self, params, drawn: dict[str, jax.Array], shared=None) -> jax.Array:
    """EDM's weighted L2 (arXiv 2206.00364, equation 2), mean over all: float32 scalar."""
    error = self.denoise(params, drawn["z"], drawn["sigma"], drawn["label"]) - drawn["y"]
    weight = denoiser.edm_weight(drawn["sigma"], self.sigma_data)
    return jnp.mean(weight * jnp.mean(jnp.square(error), axis=(1, 2, 3)))

  def denoise(self, params, z: jax.Array, sigma: jax.Array, label: jax.Array,
              guidance: jax.Array | None = None) -> jax.Array:
    """D(z, sigma, label). z (N, H, W, C), sigma (N,), label (N,) -> (N, H, W, C).

    With `guidance` it is D_none + guidance (D_label - D_none), at twice the cost.
    """
    if guidance is not None:
      twice = lambda x: jnp.concatenate([x, x])
      none = jnp.full_like(label, self.network.num_classes)
      labels = jnp.concatenate([label, none])
      d_label, d_none = jnp.split(self.denoise(params, twice(z), twice(sigma), labels), 2)
      return d_none + guidance * (d_label - d_none)
    network = lambda x, c_noise: self.network.apply({"params": params}, x, c_noise, label)
    return denoiser.denoise(network, z, sigma, self.sigma_data)

  def prior(self, key: jax.Array, sigma_max: float) -> jax.Array:
    """Where a sample starts: (H, W, C) of pure noise."""
    return sigma_max * jax.random.normal(key, self.image_shape)

  def answer(self, z: jax.Array) -> np.ndarray:
    """The sampler's last z as images: (N, H, W, C) uint8; latents as they are, float32."""
    if self.dtype != jnp.uint8:
      return np.asarray(z)
    return np.asarray(jnp.clip(jnp.round(127.5 * (z + 1)), 0, 255).astype(jnp.uint8))

  def picture(self, answers: np.ndarray) -> np.ndarray:
    """Answers to look at: uint8, one or three channels; of latents the first three."""
    if answers.dtype == np.uint8:
      return answers
    values = 127.5 * (answers[..., :3 if answers.shape[-1] > 2 else 1] / (3 * self.sigma_data) + 1)
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def make_task(config, block: int) -> ImageTask:
  """The task of a resolved config for one block."""
  m, d = config.model, config.data
  network = DiT(config.layers_per_block[block], m.width, m.num_heads, m.patch_size, d.num_classes,
                m.mlp_ratio, jnp.dtype(m.dtype), m.remat, m.unroll)
  shape = (d.image_size, d.image_size, d.channels)
  dtype = jnp.uint8 if d.feature == "image" else jnp.float16
  return ImageTask(network, shape, config.sigma_data, config.task.label_drop, config.task.flip,
                   dtype)


def to_float(image: jax.typing.ArrayLike) -> jax.Array:
  """uint8 (over the wire) to float32 in [-1, 1]; latents only to float32."""
  y = jnp.asarray(image, jnp.float32)
  return y / 127.5 - 1 if image.dtype == jnp.uint8 else y


def shared(config, dataset) -> dict[str, Any]:
  """What blocks share: nothing."""
  return {}


def generate(model: Any, index: np.ndarray, seed: int, labels: tuple[int, ...] = (),
             **overrides) -> tuple[np.ndarray, np.ndarray]:
  """Samples number `index` (n,), of `labels` in turn (all classes by default).

  Returns:
    (n, H, W, C) uint8 or latents, and their labels (n,) int32.
  """
  options = model.options(overrides)
  classes = np.array(labels or range(model.config.data.num_classes), np.int32)
  label = classes[index % len(classes)]
  guidance = [] if options["guidance"] == 1 else [float(options["guidance"])]
  denoise = model.denoiser(jnp.asarray(label), *guidance)
  z = model.solve(denoise, model.start(seed, index), options)
  return model.tasks[0].answer(z), label


def save(model: Any, samples: np.ndarray, labels: np.ndarray, path: epath.Path) -> epath.Path:
  """A grid as PNG, each image under its label."""
  path = path.with_name(f"{path.name}.png")
  pictures.save_grid(path, model.tasks[0].picture(samples), labels, 10)
  return path


def evaluate(model: Any, dataset: data.Dataset, options: dict[str, Any]) -> dict[str, Any]:
  """The exposure gap on held-out images, and the quality of samples.

  Args:
    model: all blocks, a `sample.Model`.
    dataset: that it was trained on.
    options: guidances, num_samples, features (names), inception (a file), decode (latents ->
      images uint8, or None) and images (the data set of what latents decode to).

  Returns:
    exposure: rows of `exposure.exposure`; quality: the scores at each guidance; held_out:
    those of held-out images.
  """
  few = dataset.held_out.take(np.arange(min(len(dataset.held_out), 2000)))
  result = dict(exposure=exposure.exposure(model, to_float(few["image"]), few["label"]))
  judged = _judged(model.config.data, dataset, options)
  if judged is None:
    print("note: samples are not scored: say by which --features, and of latents --decode")
    return result
  decode = options.get("decode") or (lambda x: x)
  guidances = options.get("guidances") or [model.config.sample.guidance]
  num_samples = options.get("num_samples") or model.config.evaluate.num_samples
  result["quality"] = [
      dict(guidance=g, num_samples=num_samples,
           **score(model, judged, num_samples, decode, guidance=g)) for g in guidances]
  return result | dict(held_out=judged.held_out)


def score(model: Any, reference: quality.Reference, num_samples: int, decode=lambda x: x,
          **overrides) -> dict[str, float]:
  """The scores of `num_samples` samples; overrides as in `Model.generate`."""
  batches = model.generate(num_samples, seed=model.config.seed, **overrides)
  return reference.scores((decode(samples), labels) for samples, labels in batches)


def _judged(d, dataset: data.Dataset, options: dict[str, Any]) -> quality.Reference | None:
  """What samples are compared with, if anything: images, in the features asked for."""
  names = options.get("features", [])
  if d.feature == "latent":
    if not options.get("decode"):
      return None
    one = np.asarray(options["decode"](np.zeros((1, *dataset.train.shape), np.float32)))
    if one.dtype != np.uint8 or one.ndim != 4:
      raise UserError(f"--decode made {one.dtype} {one.shape} of one latent, expected uint8 "
                      "(1, height, width, channels)")
    if not options.get("images"):
      raise UserError("--images is missing: the TFDS data set of which these are the latents")
    dataset = data.Dataset(*(data.read_split(options["images"], split, d.dir, one.shape[1])
                             for split in (d.train, d.held_out)))
  elif not names and np.prod(dataset.train.shape) <= features_lib.MAX_PIXELS:
    names = ["pixels"]
  if not names:
    return None
  features = [
      features_lib.load(name, dataset.train.shape,
                        options.get("inception") if name == "inception" else None)
      for name in names]
  return quality.make_reference(dataset.train, dataset.held_out, features)
