"""Image generation: a label-conditional denoiser of pixels or latents (method: EDM, DiT).

Noised: the image y in [-1, 1], or its latent. Condition: its class, dropped now and then so that
one network also learns the unconditional denoiser, for guidance (arXiv 2207.12598).
Loss: w(sigma) |D(y + sigma eps, sigma, label) - y|^2. Answer: the last denoised z.
Metric: is it the class that was asked for, and is it distributed as the data are.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from dbjax import augment
from dbjax import denoiser
from dbjax import loading
from dbjax import network as network_lib
from dbjax import pictures
from dbjax import schedule
from dbjax import solvers
from dbjax.data import Dataset
from dbjax.data import images
from dbjax.data import some
from dbjax.data import tfds
from dbjax.errors import UserError
from dbjax.fields import at_least
from dbjax.fields import between
from dbjax.fields import each
from dbjax.fields import Field
from dbjax.fields import FREE
from dbjax.fields import JOINT
from dbjax.lookup import find
from dbjax.lookup import own_words
from dbjax.model import Model
from dbjax.models.dit import DiT
from dbjax.network import Call
from dbjax.quality import distances
from dbjax.quality import exposure
from dbjax.quality import features as features_lib
from dbjax.quality import inception
from dbjax.task import Input
from dbjax.task import Program
from dbjax.task import SEED
from dbjax.task import Strip
from dbjax.task import Task

_LABELS = 2000  # images, at most, whose classes are counted
_DISTANCES = {"fid": "FID", "frechet": "Frechet distance"}

# How samples are drawn; options of `evaluate` too.
_SAMPLER = {
    "sample.guidance_from": Field(0.0, "guides only above this sigma", at_least(0), FREE),
    "sample.guidance_to": Field(solvers.ALL_NOISE, "guides only up to this sigma", at_least(0),
                                FREE),
    "sample.guide_step": Field(0, "guides by each block's own checkpoint of this step; 0: by no "
                               "label, or by --guide", at_least(0), FREE),
    **solvers.CHURN,
}


class ImageTask(Task):
  """The task as ONE block sees it; equal for blocks that are alike."""

  FIELDS = {
      **solvers.FIELDS, **images.FIELDS,
      "model.network": Field("dbjax.models.dit:DiT", "module:Class", role=JOINT),
      "task.learned_weight": Field(False, "each block learns u(sigma), and its loss is exp(-u) "
                                   "error + u", role=JOINT),
      "task.direction": Field(0.0, "weight of the error in F's direction, which is added to the "
                              "loss", at_least(0)),
      "task.label_drop": Field(0.1, "share of labels dropped, for guidance", between(0, 1), JOINT),
      "sample.guidance": Field(1.0, "1 is none", at_least(0), FREE), **_SAMPLER,
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
      **{name.removeprefix("sample."): field for name, field in _SAMPLER.items()},
  }
  OFFERS = {"num_classes": "data.num_classes"}

  @classmethod
  def check(cls, config: Any):
    """Raises UserError where fields do not go together."""
    images.check_patches(config)
    if config.task.flip and config.data.feature == "latent":
      raise UserError("task.flip=True: the mirror image of a latent is no latent of the mirrored "
                      "image; set it to False, or data.feature to image")
    check_sampler(config.sample, "sample.")
    if not config.sample.guide_step:
      check_guidance(config, config.sample.guidance, "sample.guidance")

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

  def init(self, key: jax.Array) -> Any:
    """The network's, and u(sigma) where it is learned."""
    params = super().init(key)
    if not self.config.task.learned_weight:
      return params
    return network_lib.extended(
        params, {denoiser.LOG_VARIANCE: jnp.array(denoiser.NEW_LOG_VARIANCE)})

  def apply(self, params: Any, *inputs: Any, method: str = "__call__") -> Any:
    """The network, which knows nothing of u(sigma)."""
    if self.config.task.learned_weight:
      params = {name: x for name, x in params.items() if name != denoiser.LOG_VARIANCE}
    return super().apply(params, *inputs, method=method)

  def draw(self, key: jax.Array, batch: Mapping[str, jax.Array],
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

  def show(self, drawn: Mapping[str, np.ndarray], path: epath.Path) -> epath.Path:
    """Images as PNG under their labels, and below each the noised one under its sigma."""
    path, none = path.with_name(f"{path.name}.png"), self.config.data.num_classes
    pictures.save_grid(
        path, self.picture(self.answer(np.concatenate([drawn["y"], drawn["z"]]))),
        np.array([*("none" if y == none else str(y) for y in drawn["label"]),
                  *(f"{sigma:.2g}" for sigma in drawn["sigma"])]), len(drawn["y"]))
    return path

  def loss(self, params: Any, drawn: Mapping[str, jax.Array], frozen: Any = None) -> jax.Array:
    """EDM's weighted L2 (arXiv 2206.00364, equation 2), mean over all: float32 scalar.

    With task.learned_weight it is EDM2's (`denoiser.log_variance`); task.direction adds its share.
    """
    sigma, sigma_data, task = drawn["sigma"], self.config.sigma_data, self.config.task
    d = self.denoise(params, frozen, drawn["z"], sigma, drawn["label"])
    weight = denoiser.edm_weight(sigma, sigma_data)
    error = weight * jnp.mean(jnp.square(d - drawn["y"]), axis=(1, 2, 3))
    if task.direction:
      error += task.direction * denoiser.direction_error(
          d, drawn["y"], drawn["z"], sigma, sigma_data)
    if task.learned_weight:
      u = denoiser.log_variance(params[denoiser.LOG_VARIANCE], sigma)
      error = jnp.exp(-u) * error + u
    return jnp.mean(error)

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

  def answer(self, z: jax.Array | np.ndarray) -> np.ndarray:
    """The sampler's last z as images: (N, H, W, C) uint8; latents as they are, float32."""
    return np.asarray(self._answer(z))

  def _answer(self, z: Any) -> Any:
    if self._dtype != jnp.uint8:
      return z
    return jnp.clip(jnp.round(127.5 * (z + 1)), 0, 255).astype(jnp.uint8)

  def picture(self, answers: np.ndarray) -> np.ndarray:
    """Answers to look at: uint8."""
    if answers.dtype == np.uint8:
      return answers
    values = 127.5 * (answers / (3 * self.config.sigma_data) + 1)
    return np.clip(np.round(values), 0, 255).astype(np.uint8)

  def generate(self, model: Model, index: np.ndarray, seed: int, options: Mapping[str, Any]
               ) -> tuple[np.ndarray, np.ndarray | None]:
    """Samples number `index` (n,), of options["labels"] in turn (all classes by default).

    Returns:
      (n, H, W, C) uint8 or latents, and their labels (n,) int32; None where no label was trained.

    Raises:
      UserError: there is no such class, the guidance needs what was not trained, or options do not
        go together.
    """
    check_sampler(options)
    _check_guided(model, options, options["guidance"])
    classes = self._classes(options["labels"])
    label = classes[index % len(classes)]
    z = self._flow(model, self.known_label(label), seed, index, options)
    return self.answer(z), None if self.config.task.label_drop == 1 else label

  def _flow(self, model: Model, label: np.ndarray, seed: int, index: np.ndarray,
            options: Mapping[str, Any]) -> jax.Array:
    """Where noise number `index` (n,) flows to, under the labels (n,): (n, H, W, C).

    Where there is nothing to choose on the way, it is one denoiser without a choice in it.
    """
    start, keys, label = model.start(seed, index), model.keys(seed, index), jnp.asarray(label)
    guidance, levels = float(options["guidance"]), model.table(options).sigma
    span = _span(options)
    inside = _is_inside(span, np.float32(levels))
    if guidance == 1 or not inside.any():
      return model.solve(start, options, label, keys=keys)
    guide = loading.weaker(model, options["guide_step"])
    if guide:
      if self.config.task.label_drop == 1 and guide.config.task.label_drop == 0:
        raise UserError(f"guide={guide.workdir}: it was trained with task.label_drop=0, and knows "
                        "no image without a label, which is all that this model makes")
      pair = model.beside(guide, set(model.schedule.block_of(levels[inside])))
      return pair.trace(start, options, _guided_by_guide, label, guidance, span, keys=keys)[0]
    if self.config.task.label_drop == 1:  # one denoiser, whatever the guidance
      return model.solve(start, options, label, keys=keys)
    if inside.all():
      return model.solve(start, options, label, guidance, keys=keys)
    return model.trace(start, options, _guided_inside, label, guidance, span, keys=keys)[0]

  def _classes(self, labels: tuple[int, ...]) -> np.ndarray:
    num = self.config.data.num_classes
    if labels and self.config.task.label_drop == 1:
      raise UserError(f"labels={','.join(map(str, labels))}: the model was trained without labels "
                      "(task.label_drop=1); leave it out")
    if not all(0 <= label < num for label in labels):
      raise UserError(f"labels={','.join(map(str, labels))}: expected classes from 0 to {num - 1}")
    return np.array(labels or range(num), np.int32)

  def program(self, model: Model, options: Mapping[str, Any]) -> Program:
    """Images of noise and labels; guidance is one number, and 1 costs nothing.

    Raises:
      UserError: options do not go together, or another model guides.
    """
    check_sampler(options)
    if _guided_by_model(model, options):
      raise UserError("an exported sampler is guided by no label, and not by another model: set "
                      "guide_step to 0, and give no guide")
    _check_guided(model, options, options["guidance"])
    drop, table = self.config.task.label_drop, model.table(options)
    inputs = dict(noise=Input(self._shape))
    if drop < 1:
      inputs["label"] = Input((), jnp.int32, tuple(self._classes(options["labels"]).tolist()))
    if 0 < drop < 1:
      inputs["guidance"] = Input((), jnp.float32, (options["guidance"],), shared=True)
    if table.noise.any():
      inputs |= SEED
    span = _span(options)

    def run(model, noise, label=0, guidance=1.0, seed=None, index=None):
      keys = None if seed is None else model.keys(seed, index)
      label = jnp.broadcast_to(self.known_label(label), noise.shape[:1]).astype(jnp.int32)
      z = model.trace(model.schedule.sigma_max * noise, options, _guided_inside, label, guidance,
                      span, keys=keys)[0]
      return self._answer(z)

    about = dict(sigma_max=model.schedule.sigma_max, no_label=self.config.data.num_classes,
                 steps=_steps(model, table, span))
    known = type(self) is ImageTask and all(type(task.network) is DiT for task in model.tasks)
    return Program(inputs, run, about, ("sample_torch.py",) * known)

  def save(self, model: Model, samples: np.ndarray, labels: np.ndarray | None,
           path: epath.Path) -> epath.Path:
    """A grid as PNG, each image under its label, if it has one."""
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
      quality: of samples, for each guidance: how many; distances to the training images in the
      features asked for (see `quality/features.py` and `quality/distances.py`; FID is that of
      inception). For small images also accuracy: the share that a classifier fitted to the training
      images gives the class asked for. Samples are of all classes alike: a line says so where the
      images are not.
      held_out: the same of held-out images, which no model need beat, if there are four.

    Raises:
      UserError: what is asked for makes no sense; before anything is computed.
    """
    guidances = options["guidance"] or (self.config.sample.guidance,)
    for guidance in guidances:
      _check_guided(model, options, guidance)
      if guidance != 1 and _guided_by_model(model, options):
        loading.weaker(model, options["guide_step"])  # is read now, and refused where there is none
    scoring = self._scoring(dataset, options)
    model = model.with_config(**{
        name: options[name.removeprefix("sample.")] for name in _SAMPLER
    }, **{"sample.guidance": unguided(self.config)})
    few = dataset.held_out.take(some(len(dataset.held_out), self.config.sample.batch_size))
    result = dict(exposure=exposure.exposure(
        model, images.to_float(few["image"]), self.known_label(few["label"])))
    if scoring is None:
      print("note: samples are not scored: say by which --features, and of latents --decode")
      return result
    real, features, decode = scoring
    judged = distances.make_reference(real.train, real.held_out, features)
    judged.note_few(options["num_samples"])
    self._note_shares(dataset.train, options["num_samples"])
    result["quality"] = [
        dict(guidance=guidance) | score(model, judged, options["num_samples"], decode,
                                        guidance=guidance) for guidance in guidances]
    return result | ({"held_out": judged.held_out} if judged.held_out else {})

  def headline(self, tables: Mapping[str, Any]) -> dict[str, float]:
    """Of samples by each guidance the share that is recognised, and the distance to the data."""
    found: dict[str, float] = {}
    for row in tables.get("quality", ()):
      by = f"guidance {row['guidance']:g}"
      distances = {name: x for name, x in row.items() if name.partition("_")[0] in _DISTANCES}
      name = next(iter(distances), None)
      words = f"{_DISTANCES.get((name or '').partition('_')[0])}, {by}, lower is better"
      found |= {f"accuracy, {by}": row["accuracy"]} if "accuracy" in row else {}
      found |= {words: row[name]} if name else {}
    return found

  def strip(self, model: Model, number: int, seed: int, options: Mapping[str, Any]
            ) -> Strip | None:
    """As `Task.strip`, and latents as pictures."""
    found = super().strip(model, number, seed, options)
    return found and found._replace(rows={
        name: self.picture(x) for name, x in found.rows.items()})

  def known_label(self, label: Any) -> Any:
    """The labels (n,) themselves, or no label, if only that was trained."""
    none = self.config.task.label_drop == 1
    return 0 * label + self.config.data.num_classes if none else label

  def _note_shares(self, train: Any, num_samples: int):
    """Prints a line where samples, of each class in turn, have other shares than the data."""
    if self.config.task.label_drop == 1:
      return
    num = self.config.data.num_classes
    label = train.take(some(len(train), _LABELS))["label"]
    shares = lambda x: np.bincount(x, minlength=num) / len(x)
    found, drawn = shares(label), shares(self._classes(())[np.arange(num_samples) % num])
    apart = np.abs(found - drawn).sum() / 2
    if apart > 0.1 + np.sqrt(found * (1 - found) / len(label)).sum() / 2:  # and by chance
      print(f"note: samples are of {min(num, num_samples)} classes in turn; of the training images "
            f"the largest class has {found.max():.1%}, and the smallest {found.min():.1%}: the "
            "distances include that difference", flush=True)

  def _scoring(self, dataset: Dataset, options: Mapping[str, Any]
               ) -> tuple[Dataset, list[features_lib.Features], Callable] | None:
    """What samples are scored by: real images, the features to see both by, and what decodes
    samples. None if nothing is asked for.
    """
    names, d, shape, decode = options["features"], self.config.data, self._shape, lambda x: x
    if options["inception"] and "inception" not in names:
      raise UserError(f"--inception={options['inception']}: nothing is seen by it without "
                      "--features=inception")
    if d.feature == "latent":
      if not options["decode"]:
        return None
      decode = Decoder(options["decode"], shape)
      shape = decode.shape
      dataset = _images_of(options["images"], d, shape)
    else:
      for name in ("decode", "images"):
        if options[name]:
          raise UserError(f"--{name}={options[name]} is for latents, and this model makes images "
                          "(data.feature=image)")
      if not names and np.prod(shape) <= features_lib.MAX_PIXELS:
        names = ["pixels"]
    if not names:
      return None
    if options["num_samples"] < distances.MIN_IMAGES:
      raise UserError(f"num_samples={options['num_samples']}: scores need {distances.MIN_IMAGES} "
                      "samples or more")
    weights = {"inception": options["inception"] or None}
    features = [features_lib.load(name, shape, weights.get(name)) for name in dict.fromkeys(names)]
    return dataset, features, decode


def _guided_by_model(model: Model, options: Mapping[str, Any]) -> bool:
  """Whether samples are guided by another model, and not by this one without a label."""
  return bool(options["guide_step"]) or model.guide is not None


def unguided(config: Any) -> float:
  """The guidance under which a model's samples are those of one denoiser."""
  return 0.0 if config.task.label_drop == 1 else 1.0


def _check_guided(model: Model, options: Mapping[str, Any], guidance: float):
  """Raises UserError where samples cannot be guided so."""
  if not _guided_by_model(model, options):
    check_guidance(model.config, guidance, "guidance")
  elif guidance == 0:
    raise UserError("guidance=0: samples would be those of the weaker model alone; set another, "
                    "such as 2")


def _span(options: Mapping[str, Any]) -> list[np.float32]:
  """Between which sigmas samples are guided."""
  return [np.float32(options[name]) for name in ("guidance_from", "guidance_to")]


def _guided_inside(task, params, frozen, z, sigma, label, guidance, span):
  """D with guidance, if it is not 1, where sigma, which all examples share, is in the span; else
  without it.
  """
  return jax.lax.cond(
      _is_inside(span, sigma[0]) & (guidance != 1),
      lambda: task.denoise(params, frozen, z, sigma, label, guidance),
      lambda: task.denoise(params, frozen, z, sigma, label)), ()


def _guided_by_guide(tasks, params, frozen, z, sigma, label, guidance, span):
  """D_guide + guidance (D - D_guide) where sigma is in the span (arXiv 2406.02507), else D.

  Of a `Model.beside`: tasks and params are those of both, and a guide may have no weights, where
  no sigma of the block is in the span.
  """
  (task, guide), (own, weaker) = tasks, params
  plain = lambda: task.denoise(own, frozen, z, sigma, label)
  if weaker is None:
    return plain(), ()

  def guided():
    d_guide = guide.denoise(weaker, frozen, z, sigma, guide.known_label(label))
    return d_guide + guidance * (plain() - d_guide)

  return jax.lax.cond(_is_inside(span, sigma[0]), guided, plain), ()


def _is_inside(span, sigma: jax.typing.ArrayLike) -> Any:
  """Whether it is guided at a noise level: where it is not, nothing is paid (arXiv 2404.07724)."""
  return (span[0] < sigma) & (sigma <= span[1])


def _steps(model: Model, table: solvers.Table, span: Sequence[Any]) -> list[dict[str, Any]]:
  """The rows of a solver's table, with the block at work, and whether it is guided."""
  blocks, guided = model.schedule.block_of(table.sigma), _is_inside(span, np.float32(table.sigma))
  return [dict(block=int(block), guided=bool(inside)) | {
      name: x.tolist() for name, x in zip(table._fields, row)}
      for block, inside, *row in zip(blocks, guided, *table)]


def check_sampler(options: Mapping[str, Any], prefix: str = ""):
  """Raises UserError where the options of a sampler, named with a prefix, do not go together."""
  solvers.check_interval(options, "guidance", prefix)
  solvers.churn_of(options, prefix)


def check_guidance(config: Any, guidance: float, name: str):
  """Raises UserError where a guidance, called `name`, needs a denoiser that was never trained.

  Guidance 1 is the denoiser of a label alone, 0 that of none, and any other is made of both. So
  with a single class too, whose label has weights of its own, as no label has.
  """
  drop = config.task.label_drop
  if drop == 0 and guidance != 1:
    raise UserError(f"{name}={guidance:g}: with task.label_drop=0 a denoiser of no label is not "
                    "trained; set it to 1, or train with task.label_drop=0.1")
  if drop == 1 and guidance != 0:
    raise UserError(f"{name}={guidance:g}: with task.label_drop=1 a denoiser of labels is not "
                    "trained; set it to 0, or train with task.label_drop=0.1")


class Decoder:
  """A user's function of latents (n, h, w, c) float32, whose images (n, H, W, C) uint8 it checks.

  Attributes:
    shape: (H, W, C).
  """

  def __init__(self, name: str, latent_shape: tuple[int, int, int]):
    """Tries it. `name`: module:function. Raises UserError where there is none, or it fails."""
    self._name, self._decode = name, find(name, "--decode")
    self.shape: tuple[int, ...] = ()
    self.shape = self(np.zeros((1, *latent_shape), np.float32)).shape[1:]

  def __call__(self, latents: np.ndarray) -> np.ndarray:
    try:
      made = np.asarray(self._decode(latents))
    except UserError:
      raise
    except Exception as e:  # whatever the user's function raises
      raise UserError(f"--decode={self._name}: {own_words(e, self._name)}") from e
    size = self.shape or made.shape[1:]
    if made.dtype != np.uint8 or made.ndim != 4 or made.shape != (len(latents), *size):
      expected = "height, width, channels" if not self.shape else ", ".join(map(str, size))
      raise UserError(f"--decode={self._name} made {made.dtype} {made.shape} of latents "
                      f"{latents.shape}, expected uint8 ({len(latents)}, {expected})")
    return made


def _images_of(name: str, data: Any, shape: tuple[int, ...]) -> Dataset:
  """The images that latents are of, in a TFDS data set, of the shape that they are decoded to."""
  if not name:
    raise UserError("--images is missing: the TFDS data set of which these are the latents")
  found = Dataset(*(tfds.read_split(name, split, data.dir, shape[0])
                    for split in (data.train, data.held_out)))
  if found.train.shape != shape:
    raise UserError(f"--images={name}: its images are of shape {found.train.shape}, and --decode "
                    f"makes {shape}")
  return found


def score(model: Model, reference: distances.Reference, num_samples: int, decode=lambda x: x,
          **options) -> dict[str, float]:
  """The scores of `num_samples` samples; options as of `Model.generate`."""
  batches = model.generate(num_samples, seed=model.config.seed, **options)
  return reference.scores((decode(samples), labels) for samples, labels in batches)
