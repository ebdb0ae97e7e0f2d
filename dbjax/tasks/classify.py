"""Image classification: the label is generated, given the image (DiffusionBlocks, section 4.1).

Noised: the embedding of the label, z = y + sigma eps. Condition: the image's patches, which
every block sees clean. Loss: the cross-entropy of the label. Answer: a few denoising steps,
in which D is the mean embedding under the network's softmax. From pure noise (temperature 1,
the paper's) the last step's softmax is a draw from the posterior, right as often as chance has
it; from the mean of the noise (temperature 0) it tends to the likeliest class, and the mean
over steps is less sure of itself. Metric: accuracy and calibration, for each number of steps.

With task.end_to_end the same network is an ordinary ViT: one pass, nothing noised.
"""

import dataclasses
import functools
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from dbjax import augment
from dbjax import data
from dbjax import pictures
from dbjax import schedule
from dbjax import targets
from dbjax.models.vit import ViT
from dbjax.tasks.image import to_float

_BINS = 15  # of the calibration error


@dataclasses.dataclass(frozen=True)
class ClassifyTask:
  """The task as ONE block sees it; equal for blocks with as many layers."""

  network: ViT
  image_shape: tuple[int, int, int]
  embedding_width: int
  sigma_data: float
  weight: str
  flip: bool
  crop: int
  rand_augment: int
  magnitude: int
  learned: bool
  end_to_end: bool

  def init(self, key: jax.Array):
    """Parameters of a new block: a pytree of float32."""
    params = self.network.init(key, jnp.zeros((1, self.embedding_width)), jnp.zeros(1),
                               jnp.zeros((1, *self.image_shape)))["params"]
    if self.learned:  # the same for all blocks, whatever their key
      table = jax.random.normal(jax.random.key(0), self._table_shape)
      params = {**params, "shared": targets.unit(table)}
    return params

  def abstract_batch(self, num: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a batch of `num`, as `draw` takes it."""
    return dict(image=jax.ShapeDtypeStruct((num, *self.image_shape), jnp.uint8),
                label=jax.ShapeDtypeStruct((num,), jnp.int32))

  def abstract_shared(self) -> dict[str, jax.ShapeDtypeStruct]:
    """The frozen table, if it is."""
    return {} if self.learned else dict(
        table=jax.ShapeDtypeStruct(self._table_shape, jnp.float32))

  def draw(self, key: jax.Array, batch: dict[str, jax.Array],
           interval: schedule.Interval) -> dict[str, jax.Array]:
    """Everything random in the loss, for the whole batch at once.

    Args:
      key: of this block and step.
      batch: image (N, H, W, C) uint8, label (N,) int32.
      interval: of the block.

    Returns:
      image (N, H, W, C) in [-1, 1], label (N,), sigma (N,), noise (N, E), key (N,).
    """
    sigma_key, noise_key, *keys = jax.random.split(key, 6)
    image, label = batch["image"], batch["label"]
    num = len(label)
    flip_key, crop_key, augment_key, dropout_key = (jax.random.split(k, num) for k in keys)
    if self.flip:
      image = augment.flip(flip_key, image)
    if self.crop:
      image = augment.crop(crop_key, image, self.crop)
    if self.rand_augment:
      image = augment.rand_augment(augment_key, image, self.rand_augment, self.magnitude)
    return dict(image=to_float(image), label=label, key=dropout_key,
                sigma=schedule.sample_sigma(sigma_key, (num,), interval),
                noise=jax.random.normal(noise_key, (num, self.embedding_width)))

  def loss(self, params, drawn: dict[str, jax.Array], shared=None) -> jax.Array:
    """The (weighted) cross-entropy, mean over all: float32 scalar."""
    label, sigma = drawn["label"], drawn["sigma"]
    z = self.table(params, shared)[label] + sigma[:, None] * drawn["noise"]
    logits = self.logits(params, z, sigma, drawn["image"], drawn["key"])
    weight = "none" if self.end_to_end else self.weight
    return targets.cross_entropy(logits, label, sigma, weight, self.sigma_data)

  def table(self, params, shared) -> jax.Array:
    """The embedding of the labels: (num_classes, E), unit rows."""
    return targets.unit(params["shared"]) if self.learned else shared["table"]

  def logits(self, params, z: jax.Array, sigma: jax.Array, image: jax.Array,
             keys: jax.Array | None = None) -> jax.Array:
    """z (N, E), sigma (N,), image (N, H, W, C), keys (N,) of dropout -> (N, num_classes)."""
    c_in = jax.lax.rsqrt(sigma**2 + self.sigma_data**2)
    x, c_noise = c_in[:, None] * z, jnp.log(sigma) / 4
    if self.end_to_end:
      x, c_noise = jnp.zeros_like(x), jnp.zeros_like(c_noise)
    network = {name: p for name, p in params.items() if name != "shared"}
    return self.network.apply({"params": network}, x, c_noise, image, keys)

  def prior(self, key: jax.Array, sigma_max: float) -> jax.Array:
    """Where an answer starts: (E,) of pure noise."""
    return sigma_max * jax.random.normal(key, (self.embedding_width,))

  @property
  def _table_shape(self) -> tuple[int, int]:
    return self.network.num_classes, self.embedding_width


def make_task(config, block: int) -> ClassifyTask:
  """The task of a resolved config for one block."""
  m, d, t = config.model, config.data, config.task
  network = ViT(config.layers_per_block[block], m.width, m.num_heads, m.patch_size, d.num_classes,
                m.mlp_ratio, m.dropout, jnp.dtype(m.dtype), m.remat, m.unroll)
  return ClassifyTask(
      network, (d.image_size, d.image_size, d.channels), m.embedding_width, config.sigma_data,
      t.weight, t.flip, t.crop, t.rand_augment, t.magnitude,
      t.shared_embeddings, t.end_to_end)


def shared(config, dataset) -> dict[str, Any]:
  """What blocks share: the frozen table of the labels."""
  if config.task.shared_embeddings:
    return {}
  return dict(table=targets.make_table(config, config.data.num_classes, dataset))


def probabilities(model: Any, image: np.ndarray, index: np.ndarray, seed: int,
                  visit=lambda block, sigma, z: None, **overrides) -> np.ndarray:
  """Of the classes: the softmax of the last denoising step, or (sample.answer=mean) of the mean
  of all steps' log-probabilities.

  Args:
    model: all blocks, a `sample.Model`.
    image: (n, H, W, C) uint8.
    index: (n,) numbers of the images: where each starts is a function of (seed, index), unless
      sample.temperature, which scales the noise there, is 0.
    seed: of the starts.
    visit: called with every state z (n, E) that is denoised.
    **overrides: of config.sample.

  Returns:
    (n, num_classes) float32.
  """
  options, image = model.options(overrides), to_float(image)
  route, found = model.router(), []

  def denoise(z, sigma):
    task, params = route(sigma)
    visit(int(model.schedule.block_of(sigma)), sigma, z)
    logits, d = _step(task, options["bridge"], options["top_k"], params, z, jnp.float32(sigma),
                      image, model.shared)
    found.append(jax.nn.log_softmax(logits))
    return d

  if model.tasks[0].end_to_end:
    options["num_steps"] = 1
  model.solve(denoise, options["temperature"] * model.start(seed, index), options)
  steps = found if options["answer"] == "mean" else found[-1:]
  return np.asarray(jax.nn.softmax(sum(steps) / len(steps)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _step(task, bridge, top_k, params, z, sigma, image, shared):
  """One evaluation: (logits, D)."""
  logits = task.logits(params, z, jnp.full(z.shape[:1], sigma), image)
  return logits, targets.bridge(logits, task.table(params, shared), bridge, top_k)


@functools.lru_cache(maxsize=2)
def _held_out(config):
  return data.load(config).held_out


def generate(model: Any, index: np.ndarray, seed: int,
             **overrides) -> tuple[np.ndarray, np.ndarray]:
  """Answers (n,) int32 to held-out images number `index` (n,), and their labels (n,)."""
  images = _held_out(model.config)
  batch = images.take(index % len(images))
  answers = probabilities(model, batch["image"], index, seed, **overrides).argmax(1)
  return answers.astype(np.int32), batch["label"]


def save(model: Any, samples: np.ndarray, labels: np.ndarray, path: epath.Path) -> epath.Path:
  """A grid of the first held-out images as PNG, each under its answer, and the label if wrong."""
  image = _held_out(model.config).take(np.arange(len(samples)) % len(_held_out(model.config)))
  path = path.with_name(f"{path.name}.png")
  words = [str(a) if a == y else f"{a} ({y})" for a, y in zip(samples, labels)]
  pictures.save_grid(path, image["image"], np.array(words), 10)
  return path


def evaluate(model: Any, dataset: data.Dataset, options: dict[str, Any]) -> dict[str, Any]:
  """Accuracy and calibration per number of steps; the cross-entropy on noised labels and on the
  sampler's own states.

  Args:
    model: all blocks, a `sample.Model`.
    dataset: that it was trained on.
    options: num_samples, held-out images to answer.

  Returns:
    accuracy: rows of num_steps, temperature, answer, accuracy, nll (nats), ece (the expected
    calibration error, Guo et al. 2017): for each number of steps by the config's temperature and
    answer, and for the config's number of steps by the paper's; exposure: rows of block, sigma,
    ce, ce_trajectory.
  """
  total = min(len(dataset.held_out),
              options.get("num_samples") or model.config.evaluate.num_samples)
  num_blocks, size = len(model.tasks), model.config.sample.batch_size
  batches = [np.arange(i, min(i + size, total)) for i in range(0, total, size)]
  own = model.config.sample
  steps = sorted({1, num_blocks, 2 * num_blocks, 4, own.num_steps})
  ways = [dict(num_steps=n, temperature=own.temperature, answer=own.answer) for n in steps]
  paper = dict(num_steps=own.num_steps, temperature=1.0, answer="last")
  if model.tasks[0].end_to_end:
    ways = ways[:1]
  elif paper not in ways:
    ways.append(paper)
  rows = []
  for way in ways:
    found, labels = [], []
    for index in batches:
      batch = dataset.held_out.take(index)
      found.append(probabilities(model, batch["image"], index, model.config.seed, **way))
      labels.append(batch["label"])
    rows.append(way | calibration(np.concatenate(found), np.concatenate(labels)))
  result = dict(accuracy=rows)
  if not model.tasks[0].end_to_end:
    result["exposure"] = _exposure(model, dataset.held_out.take(batches[0]), batches[0])
  return result


def calibration(p: np.ndarray, label: np.ndarray) -> dict[str, float]:
  """accuracy, nll and ece of probabilities (N, C) for labels (N,)."""
  right, sure = p.argmax(1) == label, p.max(1)
  bins = np.minimum((sure * _BINS).astype(int), _BINS - 1)
  gaps = np.bincount(bins, right - sure.astype(np.float64), _BINS)
  nll = -np.log(np.maximum(p[np.arange(len(p)), label].astype(np.float64), 1e-30)).mean()
  return dict(accuracy=float(right.mean()), nll=float(nll),
              ece=float(np.abs(gaps).sum() / len(p)))


def _exposure(model, batch, index) -> list[dict[str, Any]]:
  """The cross-entropy at the levels of the sampler: on its own states, and on noised labels."""
  rows, image, label = [], to_float(batch["image"]), jnp.asarray(batch["label"])

  def visit(block, sigma, z):
    task, params = model.tasks[block], model.params[block]
    noise = jax.random.normal(model.key(block, len(rows)), z.shape)
    noised = jnp.asarray(task.table(params, model.shared))[label] + sigma * noise
    answers = (_step(task, "soft", 0, params, x, jnp.float32(sigma), image, model.shared)[0]
               for x in (noised, z))
    ce = [float(targets.token_cross_entropy(logits, label).mean()) for logits in answers]
    rows.append(dict(block=block, sigma=float(sigma), ce=ce[0], ce_trajectory=ce[1]))

  probabilities(model, batch["image"], index, model.config.seed, visit)
  return rows
