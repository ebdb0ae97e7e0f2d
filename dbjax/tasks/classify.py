"""Image classification: the label is generated, given the image (DiffusionBlocks, section 4.1).

Noised: the embedding of the label, z = y + sigma eps. Condition: the image's patches, which
every block sees clean. Loss: the cross-entropy of the label. Answer: a few denoising steps,
in which D is the mean embedding under the network's softmax. From pure noise (temperature 1,
the paper's) the last step's softmax is a draw from the posterior, right as often as chance has
it; from the mean of the noise (temperature 0) it tends to the likeliest class, and the mean
over steps is less sure of itself. Metric: accuracy and calibration, for each number of steps, and
which classes are taken for which.

With task.end_to_end the same network is an ordinary ViT: one pass, nothing noised.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from dbjax import augment
from dbjax import data
from dbjax import denoiser
from dbjax import pictures
from dbjax import schedule
from dbjax import solvers
from dbjax import targets
from dbjax.data import images
from dbjax.errors import UserError
from dbjax.fields import above
from dbjax.fields import at_least
from dbjax.fields import between
from dbjax.fields import Field
from dbjax.fields import FREE
from dbjax.fields import JOINT
from dbjax.fields import one_of
from dbjax.model import Model
from dbjax.network import Call
from dbjax.task import Input
from dbjax.task import Program
from dbjax.task import Strip

_BINS = 15  # of the calibration error


class ClassifyTask(targets.EmbeddedTask):
  """The task as ONE block sees it; equal for blocks that are alike."""

  FIELDS = {
      **solvers.FIELDS, **images.FIELDS, **targets.FIELDS,
      "model.network": Field("dbjax.models.vit:ViT", "module:Class", role=JOINT),
      "data.feature": Field("image", "what is read", one_of("image"), JOINT),
      "schedule.P_mean": Field(0.7, "mean of ln sigma in training", role=JOINT),
      "schedule.P_std": Field(1.0, "standard deviation of ln sigma", above(0), JOINT),
      "schedule.sigma_min": Field(0.2, "the least noise", above(0), JOINT),
      "schedule.sigma_max": Field(20.0, "the most noise", above(0), JOINT),
      "task.crop": Field(0, "pixels by which images are moved at random", at_least(0)),
      "task.rand_augment": Field(0, "operations of RandAugment on each image", at_least(0)),
      "task.magnitude": Field(9, "of RandAugment", between(0, 30)),
      "task.likelihood": Field(False, "what z tells by itself is added to the logits: blocks need "
                               "not learn to read it", role=JOINT),
      "sample.grid": Field("equal_mass", "noise levels", one_of(*schedule.GRIDS), FREE),
      "sample.num_steps": Field(0, "denoising steps; 0: as many as blocks", at_least(0), FREE),
      "sample.temperature": Field(0.0, "scales the noise that is started from; the paper's is 1",
                                  at_least(0), FREE),
      "sample.answer": Field("mean", "over steps, or of the last, the paper's",
                             one_of("mean", "last"), FREE),
  }
  OFFERS = {"num_classes": "data.num_classes", "embedding_width": "model.embedding_width"}

  @classmethod
  def check(cls, config: Any):
    """Raises UserError where fields do not go together."""
    super().check(config)
    images.check_patches(config)
    if config.task.embedding == "pmi":
      raise UserError("task.embedding=pmi: labels keep no company; set random, or a file .npy")
    if config.task.crop >= config.data.image_size:
      raise UserError(f"task.crop={config.task.crop}: expected less than data.image_size="
                      f"{config.data.image_size}, or nothing of the image may be left")
    if config.task.rand_augment and config.data.channels not in (1, 3):
      raise UserError(f"data.channels={config.data.channels}: task.rand_augment="
                      f"{config.task.rand_augment} needs 1 or 3; set it to 0")

  @classmethod
  def check_data(cls, config: Any, dataset: data.Dataset):
    """Raises UserError where images or labels are not what the config says."""
    images.check(config, dataset)

  @classmethod
  def frozen(cls, config: Any, dataset: Any = None) -> dict[str, np.ndarray]:
    """The table of the labels, unless it is learned."""
    if config.task.shared_embeddings:
      return {}
    return {targets.TABLE: targets.make_table(config, config.data.num_classes, dataset)}

  def call(self, num: int) -> Call:
    """F(c_in z, c_noise, image): (N, E), (N,), (N, H, W, C) -> logits (N, num_classes).

    While training it is given keys (N,) of dropout besides.
    """
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    inputs = (array((num, self.config.model.embedding_width)), array((num,)),
              array((num, *images.shape(self.config))))
    return Call(inputs, (num, self.config.data.num_classes))

  @property
  def joint(self) -> tuple[str, ...]:
    """The table of the labels, if it is learned."""
    return (targets.TABLE,) * self.config.task.shared_embeddings

  def abstract_batch(self, num: int) -> dict[str, jax.ShapeDtypeStruct]:
    """image (N, H, W, C) uint8, label (N,) int32."""
    return dict(image=jax.ShapeDtypeStruct((num, *images.shape(self.config)), jnp.uint8),
                label=jax.ShapeDtypeStruct((num,), jnp.int32))

  def abstract_frozen(self) -> dict[str, jax.ShapeDtypeStruct]:
    """The frozen table, if it is."""
    return {} if self.joint else {
        targets.TABLE: jax.ShapeDtypeStruct(self._table_shape, jnp.float32)}

  def draw(self, key: jax.Array, batch: Mapping[str, jax.Array],
           interval: schedule.Interval) -> dict[str, jax.Array]:
    """Everything random in the loss, for the whole batch at once.

    Args:
      key: of this block and step.
      batch: image (N, H, W, C) uint8, label (N,) int32.
      interval: of the block.

    Returns:
      image (N, H, W, C) in [-1, 1], label (N,), sigma (N,), noise (N, E), key (N,).
    """
    t = self.config.task
    sigma_key, noise_key, *keys = jax.random.split(key, 6)
    image, label = batch["image"], batch["label"]
    num = len(label)
    flip_key, crop_key, augment_key, dropout_key = (jax.random.split(k, num) for k in keys)
    if t.flip:
      image = augment.flip(flip_key, image)
    if t.crop:
      image = augment.crop(crop_key, image, t.crop)
    if t.rand_augment:
      image = augment.rand_augment(augment_key, image, t.rand_augment, t.magnitude)
    return dict(image=images.to_float(image), label=label, key=dropout_key,
                sigma=schedule.sample_sigma(sigma_key, (num,), interval),
                noise=jax.random.normal(noise_key, (num, self.config.model.embedding_width)))

  def show(self, drawn: Mapping[str, np.ndarray], path: epath.Path) -> epath.Path:
    """The images as PNG, moved as they are for training, each under its label."""
    path = path.with_name(f"{path.name}.png")
    pixels = np.clip(np.round(127.5 * (drawn["image"] + 1)), 0, 255).astype(np.uint8)
    pictures.save_grid(path, pixels, drawn["label"], 10)
    return path

  def loss(self, params: Any, drawn: Mapping[str, jax.Array], frozen: Any = None) -> jax.Array:
    """The (weighted) cross-entropy, mean over all: float32 scalar."""
    label, sigma, t = drawn["label"], drawn["sigma"], self.config.task
    z = self.table(params, frozen)[label] + sigma[:, None] * drawn["noise"]
    logits = self.logits(params, frozen, z, sigma, drawn["image"], drawn["key"])
    weight = "none" if t.end_to_end else t.weight
    return targets.cross_entropy(logits, label, sigma, weight, self.config.sigma_data)

  def logits(self, params: Any, frozen: Any, z: jax.Array, sigma: jax.Array, image: jax.Array,
             *keys: jax.Array) -> jax.Array:
    """z (N, E), sigma (N,), image (N, H, W, C), keys (N,) of dropout -> (N, num_classes)."""
    t = self.config.task
    c_noise = denoiser.noise_level(sigma)
    if t.end_to_end:
      return self.apply(params, jnp.zeros_like(z), jnp.zeros_like(c_noise), image, *keys)
    if not t.likelihood:
      x = denoiser.input_scale(sigma, self.config.sigma_data)[:, None] * z
      return self.apply(params, x, c_noise, image, *keys)
    logits = self.apply(params, targets.linear_estimate(z, sigma), c_noise, image, *keys)
    return logits + targets.log_likelihood(z, self.table(params, frozen), sigma)

  def denoise(self, params: Any, frozen: Any, z: jax.Array, sigma: jax.Array, image: jax.Array
              ) -> jax.Array:
    """D(z, sigma), the mean embedding: z (N, E), sigma (N,), image (N, H, W, C) in [-1, 1]."""
    return self.answer(params, frozen, z, sigma, image, "soft", 0)[1]

  def answer(self, params: Any, frozen: Any, z: jax.Array, sigma: jax.Array, image: jax.Array,
             bridge: str, top_k: int) -> tuple[jax.Array, jax.Array]:
    """One evaluation: logits (N, num_classes), and D (N, E) by a bridge."""
    logits = self.logits(params, frozen, z, sigma, image)
    return logits, targets.bridge(logits, self.table(params, frozen), bridge, top_k)

  def prior(self, key: jax.Array, sigma_max: float) -> jax.Array:
    """Where an answer starts: (E,) of pure noise."""
    return sigma_max * jax.random.normal(key, (self.config.model.embedding_width,))

  @property
  def _table_shape(self) -> tuple[int, int]:
    return self.config.data.num_classes, self.config.model.embedding_width

  def generate(self, model: Model, index: np.ndarray, seed: int, options: Mapping[str, Any]
               ) -> tuple[np.ndarray, np.ndarray]:
    """Answers (n,) int32 to held-out images number `index` (n,), and their labels (n,)."""
    held_out = _held_out(model)
    batch = held_out.take(index % len(held_out))
    answers = probabilities(model, batch["image"], index, seed, options).argmax(1)
    return answers.astype(np.int32), batch["label"]

  def program(self, model: Model, options: Mapping[str, Any]) -> Program:
    """The log-probabilities (N, num_classes) of images; of noise too, if the answer depends on it.
    """
    inputs = dict(image=Input(images.shape(self.config), jnp.uint8))
    width = self.config.model.embedding_width
    if options["temperature"]:
      inputs["noise"] = Input((width,))

    def run(model, image, noise=0.0):
      start = model.schedule.sigma_max * jnp.broadcast_to(noise, (len(image), width))
      logs, _ = _trace_from(model, images.to_float(image), start, options)
      return jax.nn.log_softmax(_over_steps(logs, options))

    return Program(inputs, run)

  def save(self, model: Model, samples: np.ndarray, labels: np.ndarray,
           path: epath.Path) -> epath.Path:
    """A grid of the first held-out images as PNG, each under its answer, and the label if wrong."""
    held_out = _held_out(model)
    image = held_out.take(np.arange(len(samples)) % len(held_out))["image"]
    path = path.with_name(f"{path.name}.png")
    words = [str(a) if a == y else f"{a} ({y})" for a, y in zip(samples, labels)]
    pictures.save_grid(path, image, np.array(words), 10)
    return path

  def evaluate(self, model: Model, dataset: data.Dataset, options: Mapping[str, Any]
               ) -> dict[str, list[dict[str, Any]]]:
    """Accuracy and calibration per number of steps; each class; the cross-entropy on noised labels
    and on the sampler's own states.

    Returns:
      accuracy: rows of num_steps, temperature, answer, accuracy, balanced_accuracy (the mean over
      the classes that there are), nll (nats), ece (the expected calibration error, Guo et al.
      2017): for each number of steps by the config's temperature and answer, and for the config's
      number of steps by the paper's; classes and confusion, by the config's: see `by_class`;
      exposure: rows of block, sigma, ce, ce_trajectory.

    Raises:
      UserError: a held-out image has a label that is no class.
    """
    own, seed, plain = self.config.sample, self.config.seed, self.config.task.end_to_end
    parts = list(data.batches(dataset.held_out, own.batch_size, options["num_samples"]))
    label = np.concatenate([batch["label"] for _, batch in parts])
    _check_labels(label, self.config.data.num_classes)
    steps = [1] if plain else sorted({1, len(model.tasks), 2 * len(model.tasks), 4, own.num_steps})
    ways = [dict(num_steps=n, temperature=own.temperature, answer=own.answer) for n in steps]
    mine = ways[0 if plain else steps.index(own.num_steps)]
    paper = dict(num_steps=own.num_steps, temperature=1.0, answer="last")
    if not plain and paper not in ways:
      ways.append(paper)
    rows, answers = [], []
    for way in ways:
      p = np.concatenate([probabilities(model, batch["image"], index, seed, {**own, **way})
                          for index, batch in parts])
      rows.append(way | calibration(p, label))
      answers.append(p.argmax(1))
    by = by_class(answers[ways.index(mine)], label, self.config.data.num_classes)
    return dict(accuracy=rows, **by) | (
        {} if plain else dict(exposure=_exposure(model, *parts[0])))


  def headline(self, tables: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy and calibration, by the config's steps."""
    own = {} if self.config.task.end_to_end else self.config.sample
    row = next(row for row in tables["accuracy"] if all(
        row[name] == own[name] for name in ("num_steps", "temperature", "answer") if own))
    return {"accuracy": row["accuracy"], "nats of the true class, lower is better": row["nll"],
            "calibration error, lower is better": row["ece"]}

  def strip(self, model: Model, number: int, seed: int, options: Mapping[str, Any]
            ) -> Strip | None:
    """How likely each class of a held-out image is by each denoising step, if there are several."""
    if self.config.task.end_to_end:
      return None
    held_out, index = _held_out(model), np.array([number])
    batch = held_out.take(index % len(held_out))
    logs, _ = trace(model, images.to_float(batch["image"]), index, seed, options)
    sigma = model.table(options).sigma
    likely = np.exp(np.asarray(logs[:, 0]))
    words = [f"σ {s:.2g}: {p.argmax()}, {p.max():.0%}" for s, p in zip(sigma, likely)]
    return Strip(model.schedule.block_of(sigma), np.array(words),
                 {"how likely, is each class": likely},
                 f"Image {number}, label {batch['label'][0]}", batch["image"][0])


def probabilities(model: Model, image: np.ndarray, index: np.ndarray, seed: int,
                  options: Mapping[str, Any]) -> np.ndarray:
  """Of the classes: the softmax of the last denoising step, or (sample.answer=mean) of the mean
  of all steps' log-probabilities.

  Args:
    model: all blocks, a `model.Model`.
    image: (n, H, W, C) uint8.
    index: (n,) numbers of the images: where each starts is a function of (seed, index), unless
      sample.temperature, which scales the noise there, is 0.
    seed: of the starts.
    options: as config.sample.

  Returns:
    (n, num_classes) float32.
  """
  logs, _ = trace(model, images.to_float(image), index, seed, options)
  return np.asarray(jax.nn.softmax(_over_steps(logs, options)))


def _over_steps(logs: jax.Array, options: Mapping[str, Any]) -> jax.Array:
  """Of log-probabilities (K, n, C) the mean, or the last: (n, C), but for a constant."""
  return jnp.mean(logs if options["answer"] == "mean" else logs[-1:], 0)


def trace(model: Model, image: jax.Array, index: np.ndarray, seed: int,
          options: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
  """Of each evaluation: log-probabilities (K, n, C), and the states (K, n, E) that it denoised."""
  return _trace_from(model, image, model.start(seed, index), options)


def _trace_from(model: Model, image: jax.Array, start: jax.Array, options: Mapping[str, Any]
                ) -> tuple[jax.Array, jax.Array]:
  if model.config.task.end_to_end:
    options = {**options, "num_steps": 1}
  reader = _reader(options["bridge"], options["top_k"])
  return model.trace(options["temperature"] * start, options, reader, image)[1]


@functools.cache
def _reader(bridge: str, top_k: int) -> Callable:
  """A denoiser that also sees its log-probabilities and what it denoised."""

  def denoise(task, params, frozen, z, sigma, image):
    logits, d = task.answer(params, frozen, z, sigma, image, bridge, top_k)
    return d, (jax.nn.log_softmax(logits), z)

  return denoise


def _held_out(model: Model) -> Any:
  return model.dataset().held_out


def _check_labels(label: np.ndarray, num_classes: int):
  """Raises UserError where a label (N,) is no class: a table would be read beyond its end."""
  wrong = label[(label < 0) | (label >= num_classes)]
  if len(wrong):
    raise UserError(f"data.num_classes={num_classes}: a held-out image has the label {wrong[0]}, "
                    f"expected 0 to {num_classes - 1}")


def calibration(p: np.ndarray, label: np.ndarray) -> dict[str, float]:
  """accuracy, balanced_accuracy, nll and ece of probabilities (N, C) for labels (N,)."""
  right, sure = p.argmax(1) == label, p.max(1)
  bins = np.minimum((sure * _BINS).astype(int), _BINS - 1)
  gaps = np.bincount(bins, right - sure.astype(np.float64), _BINS)
  nll = -np.log(np.maximum(p[np.arange(len(p)), label].astype(np.float64), 1e-30)).mean()
  balanced = np.mean([right[label == c].mean() for c in np.unique(label)])
  return dict(accuracy=float(right.mean()), balanced_accuracy=float(balanced), nll=float(nll),
              ece=float(np.abs(gaps).sum() / len(p)))


def by_class(answers: np.ndarray, label: np.ndarray, num_classes: int
             ) -> dict[str, list[dict[str, Any]]]:
  """What is answered (N,) to images of each label (N,).

  Returns:
    classes: a row a class, those that are recognised worst first: class; num, how many images it
    has; accuracy, the share of them that are recognised; precision, the share of answers of this
    class that are right; taken_for and taken_share, the other class that is answered most often,
    and how often. None stands where there is no such image, answer or mistake.
    confusion: a row a class, which has the number of its images by answer.
  """
  counts = np.bincount(label * num_classes + answers, minlength=num_classes**2)
  counts = counts.reshape(num_classes, num_classes)
  share = lambda part, whole: float(part / whole) if whole else None
  rows = []
  for c, (mine, answered) in enumerate(zip(counts, counts.sum(0))):
    wrong = np.where(np.arange(num_classes) == c, 0, mine)
    row = {"class": c, "num": int(mine.sum()), "accuracy": share(mine[c], mine.sum()),
           "precision": share(mine[c], answered), "taken_for": None, "taken_share": None}
    if wrong.any():
      row |= dict(taken_for=int(wrong.argmax()), taken_share=share(wrong.max(), mine.sum()))
    rows.append(row)
  rows.sort(key=lambda row: (not row["num"], row["accuracy"]))  # equal ones stay in order
  return dict(classes=rows, confusion=[
      {"class": c, **{str(answer): int(n) for answer, n in enumerate(mine)}}
      for c, mine in enumerate(counts)])


def _exposure(model: Model, index: np.ndarray, batch: Mapping[str, np.ndarray]
              ) -> list[dict[str, Any]]:
  """The cross-entropy at the levels of the sampler: on its own states, and on noised labels."""
  rows, label = [], jnp.asarray(batch["label"])
  image, options = images.to_float(batch["image"]), model.options({})
  _, states = trace(model, image, index, model.config.seed, options)
  levels = model.table(options).sigma
  for start, stop, task, params in model.stretches(levels):
    table = jnp.asarray(task.table(params, model.frozen))  # type: ignore[attr-defined]  # has one
    for k in range(start, stop):
      block = int(model.schedule.block_of(levels[k]))
      noise = jax.random.normal(model.key(block, k), states[k].shape)
      ce = [float(_cross_entropy(task, params, model.frozen, z, jnp.float32(levels[k]), image,
                                 label)) for z in (table[label] + levels[k] * noise, states[k])]
      rows.append(dict(block=block, sigma=float(levels[k]), ce=ce[0], ce_trajectory=ce[1]))
  return rows


@functools.partial(jax.jit, static_argnums=0)
def _cross_entropy(task, params, frozen, z, sigma, image, label):
  logits = task.answer(params, frozen, z, jnp.full(z.shape[:1], sigma), image, "soft", 0)[0]
  return targets.token_cross_entropy(logits, label).mean()
