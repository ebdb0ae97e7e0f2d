"""Image generation: a label-conditional denoiser of pixels or latents (method: EDM, DiT).

Noised: the image y in [-1, 1], or its latent. Condition: its class, dropped now and then so that
one network also learns the unconditional denoiser, for guidance (arXiv 2207.12598).
Loss: w(sigma) |D(y + sigma eps, sigma, label) - y|^2. Answer: the last denoised z.
Metric: is it the class that was asked for, and is it distributed as the data are.
"""

from collections.abc import Mapping
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from dbjax import augment
from dbjax import denoiser
from dbjax import pictures
from dbjax import schedule
from dbjax import solvers
from dbjax.data import Dataset
from dbjax.data import images
from dbjax.data import tfds
from dbjax.errors import UserError
from dbjax.fields import at_least
from dbjax.fields import between
from dbjax.fields import each
from dbjax.fields import Field
from dbjax.fields import FREE
from dbjax.fields import JOINT
from dbjax.lookup import find
from dbjax.model import Model
from dbjax.network import Call
from dbjax.quality import distances
from dbjax.quality import exposure
from dbjax.quality import features as features_lib
from dbjax.quality import inception
from dbjax.task import Task

_HELD_OUT = 2000  # images, at most, that the exposure gap is measured on


class ImageTask(Task):
  """The task as ONE block sees it; equal for blocks with as many layers."""

  FIELDS = {
      **solvers.FIELDS, **images.FIELDS,
      "model.network": Field("dbjax.models.dit:DiT", "module:Class", role=JOINT),
      "task.label_drop": Field(0.1, "share of labels dropped, for guidance", between(0, 1)),
      "sample.guidance": Field(1.0, "1 is none", at_least(0), FREE),
  }
  SAMPLE = {
      "labels": Field((), "classes to draw, taken in turn [all]"),
  }
  EVALUATE = {
      "guidance": Field((), "score samples at each of these [the config's]", each(at_least(0)),
                        item=float),
      "features": Field((), "to see samples by: " + ", ".join(features_lib.NAMES)
                        + " [pixels, if images are small]", item=str),
      "inception": Field("", "weights: " + inception.URL),
      "decode": Field("", "of latents: module:function, to images uint8"),
      "images": Field("", "of latents: the TFDS data set of their images"),
  }
  OFFERS = {"num_classes": "data.num_classes"}

  @classmethod
  def check(cls, config: Any):
    """Raises UserError where patches do not cover the image."""
    images.check_patches(config)

  @classmethod
  def check_data(cls, config: Any, dataset: Dataset):
    """Raises UserError where images are not what the config says: they are what is noised."""
    images.check(config, dataset)
    images.check_sigma_data(config, dataset)

  @property
  def _shape(self) -> tuple[int, int, int]:
    return images.shape(self.config)

  @property
  def _dtype(self) -> Any:
    return jnp.uint8 if self.config.data.feature == "image" else jnp.float16

  def call(self, num: int) -> Call:
    """F(c_in z, c_noise, label): (N, H, W, C), (N,), (N,) int32 -> (N, H, W, C)."""
    array = jax.ShapeDtypeStruct
    shape = (num, *self._shape)
    return Call((array(shape, jnp.float32), array((num,), jnp.float32), array((num,), jnp.int32)),
                shape)

  def abstract_batch(self, num: int) -> dict[str, jax.ShapeDtypeStruct]:
    """image (N, H, W, C) uint8, or float16 latents; label (N,) int32."""
    return dict(image=jax.ShapeDtypeStruct((num, *self._shape), self._dtype),
                label=jax.ShapeDtypeStruct((num,), jnp.int32))

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
    y = images.to_float(batch["image"])
    if self.config.task.flip:
      y = augment.flip(jax.random.split(jax.random.fold_in(key, 3), len(y)), y)
    sigma = schedule.sample_sigma(sigma_key, y.shape[:1], interval)
    z = y + sigma[:, None, None, None] * jax.random.normal(noise_key, y.shape)
    dropped = jax.random.bernoulli(drop_key, self.config.task.label_drop, sigma.shape)
    label = jnp.where(dropped, self.config.data.num_classes, batch["label"])
    return dict(y=y, z=z, sigma=sigma, label=label)

  def loss(self, params: Any, drawn: Mapping[str, jax.Array], frozen: Any = None) -> jax.Array:
    """EDM's weighted L2 (arXiv 2206.00364, equation 2), mean over all: float32 scalar."""
    d = self.denoise(params, frozen, drawn["z"], drawn["sigma"], drawn["label"])
    weight = denoiser.edm_weight(drawn["sigma"], self.config.sigma_data)
    return jnp.mean(weight * jnp.mean(jnp.square(d - drawn["y"]), axis=(1, 2, 3)))

  def denoise(self, params: Any, frozen: Any, z: jax.Array, sigma: jax.Array, label: jax.Array,
              guidance: jax.Array | None = None) -> jax.Array:
    """D(z, sigma, label). z (N, H, W, C), sigma (N,), label (N,) -> (N, H, W, C).

    With `guidance` it is D_none + guidance (D_label - D_none), at twice the cost.
    """
    if guidance is not None:
      twice = lambda x: jnp.concatenate([x, x])
      none = jnp.full_like(label, self.config.data.num_classes)
      labels = jnp.concatenate([label, none])
      d_label, d_none = jnp.split(self.denoise(params, frozen, twice(z), twice(sigma), labels), 2)
      return d_none + guidance * (d_label - d_none)
    network = lambda x, c_noise: self.apply(params, x, c_noise, label)
    return denoiser.denoise(network, z, sigma, self.config.sigma_data)

  def prior(self, key: jax.Array, sigma_max: float) -> jax.Array:
    """Where a sample starts: (H, W, C) of pure noise."""
    return sigma_max * jax.random.normal(key, self._shape)

  def answer(self, z: jax.Array) -> np.ndarray:
    """The sampler's last z as images: (N, H, W, C) uint8; latents as they are, float32."""
    if self._dtype != jnp.uint8:
      return np.asarray(z)
    return np.asarray(jnp.clip(jnp.round(127.5 * (z + 1)), 0, 255).astype(jnp.uint8))

  def picture(self, answers: np.ndarray) -> np.ndarray:
    """Answers to look at: uint8, one or three channels; of latents the first three."""
    if answers.dtype == np.uint8:
      return answers
    shown = answers[..., :3 if answers.shape[-1] > 2 else 1]
    values = 127.5 * (shown / (3 * self.config.sigma_data) + 1)
    return np.clip(np.round(values), 0, 255).astype(np.uint8)

  def generate(self, model: Model, index: np.ndarray, seed: int, options: Mapping[str, Any]
               ) -> tuple[np.ndarray, np.ndarray]:
    """Samples number `index` (n,), of options["labels"] in turn (all classes by default).

    Returns:
      (n, H, W, C) uint8 or latents, and their labels (n,) int32.
    """
    num_classes = self.config.data.num_classes
    classes = np.array(options["labels"] or range(num_classes), np.int32)
    if not ((classes >= 0) & (classes < num_classes)).all():
      raise UserError(f"labels={','.join(map(str, options['labels']))}: expected classes from 0 to "
                      f"{num_classes - 1}, such as 3 or 0,1,2")
    label = classes[index % len(classes)]
    guidance = [] if options["guidance"] == 1 else [float(options["guidance"])]
    denoise = model.denoiser(jnp.asarray(label), *guidance)
    z = model.solve(denoise, model.start(seed, index), options)
    return self.answer(z), label

  def save(self, model: Model, samples: np.ndarray, labels: np.ndarray,
           path: epath.Path) -> epath.Path:
    """A grid as PNG, each image under its label."""
    path = path.with_name(f"{path.name}.png")
    pictures.save_grid(path, self.picture(samples), labels, 10)
    return path

  def evaluate(self, model: Model, dataset: Dataset, options: Mapping[str, Any]
               ) -> dict[str, Any]:
    """The exposure gap on held-out images, and the quality of samples.

    Of latents --decode=module:function says what decodes them, and --images whose images they are
    to equal.

    Returns:
      exposure: the loss at each noise level on the states that the sampler itself reaches, beside
      that on truly noised data: see `quality/exposure.py`.
      quality: of samples, for each guidance: distances to the training images in the features asked
      for (see `quality/features.py` and `quality/distances.py`; FID is that of inception). For
      small images also accuracy: the share that a classifier fitted to the training images gives
      the class asked for.
      held_out: the same of held-out images, which no model need beat.
    """
    few = dataset.held_out.take(np.arange(min(len(dataset.held_out), _HELD_OUT)))
    result = dict(exposure=exposure.exposure(model, images.to_float(few["image"]), few["label"]))
    judged = self._judged(dataset, options)
    if judged is None:
      print("note: samples are not scored: say by which --features, and of latents --decode")
      return result
    decode = find(options["decode"], "--decode") if options["decode"] else (lambda x: x)
    guidances = options["guidance"] or (self.config.sample.guidance,)
    num_samples = options["num_samples"]
    result["quality"] = [
        dict(guidance=g, num_samples=num_samples,
             **score(model, judged, num_samples, decode, guidance=g)) for g in guidances]
    return result | dict(held_out=judged.held_out)

  def _judged(self, dataset: Dataset, options: Mapping[str, Any]) -> distances.Reference | None:
    """What samples are compared with, if anything: images, in the features asked for."""
    names, d, shape = options["features"], self.config.data, self._shape
    if d.feature == "latent":
      if not options["decode"]:
        return None
      decode = find(options["decode"], "--decode")
      one = np.asarray(decode(np.zeros((1, *shape), np.float32)))
      if one.dtype != np.uint8 or one.ndim != 4:
        raise UserError(f"--decode made {one.dtype} {one.shape} of one latent, expected uint8 "
                        "(1, height, width, channels)")
      if not options["images"]:
        raise UserError("--images is missing: the TFDS data set of which these are the latents")
      shape = one.shape[1:]
      dataset = Dataset(*(tfds.read_split(options["images"], split, d.dir, shape[0])
                          for split in (d.train, d.held_out)))
    elif not names and np.prod(shape) <= features_lib.MAX_PIXELS:
      names = ["pixels"]
    if not names:
      return None
    features = [features_lib.load(name, shape, options["inception"] or None
                                  if name == "inception" else None) for name in names]
    return distances.make_reference(dataset.train, dataset.held_out, features)


def score(model: Model, reference: distances.Reference, num_samples: int, decode=lambda x: x,
          **options) -> dict[str, float]:
  """The scores of `num_samples` samples; options as of `Model.generate`."""
  batches = model.generate(num_samples, seed=model.config.seed, **options)
  return reference.scores((decode(samples), labels) for samples, labels in batches)
