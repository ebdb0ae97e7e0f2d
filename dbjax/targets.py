"""Targets that are classes or tokens: their embedding, what the loss counts, and the way back.

A class or token is noised as a unit vector, the row of a table. The table is frozen: a
function of the config and, if it comes from counts, of the data; so it is all that blocks
share, and none trains it (unless task.shared_embeddings asks for the learned one of the
DiffusionBlocks paper). A network answers with logits; the bridge turns them into D, the
estimate of the vector.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dbjax import data
from dbjax import denoiser
from dbjax import network as network_lib
from dbjax import paths
from dbjax.errors import UserError
from dbjax.fields import above
from dbjax.fields import Field
from dbjax.fields import FREE
from dbjax.fields import JOINT
from dbjax.fields import one_of
from dbjax.fields import Range
from dbjax.task import Task

BRIDGES = ("soft", "normalized", "hard", "top_k")
TABLE = "table"  # the parameter, or the frozen array, that embeds targets

FIELDS = {
    "task.weight": Field("none", "of the cross-entropy; edm_batch_mean is the authors' code",
                         one_of("none", "edm", "edm_batch_mean")),
    "task.embedding": Field("random", "of the targets: random, or pmi, or a file .npy",
                            Range(bool, "random, or pmi, or a file .npy"), JOINT),
    "task.shared_embeddings": Field(False, "targets' embedding is learned by all blocks together, "
                                    "as the paper has it", role=JOINT),
    "task.end_to_end": Field(False, "the same network trained plainly: nothing is noised",
                             role=JOINT),
    "model.embedding_width": Field(128, "E, of the space in which targets are noised", above(0),
                                   JOINT),
    "sample.bridge": Field("soft", "from logits to D; not of the solver ancestral, which draws a "
                           "token in its place", one_of(*BRIDGES), FREE),
    "sample.top_k": Field(5, "of the bridge top_k", above(0), FREE),
}

_WINDOW = 4  # tokens to either side that count as company
_COUNTED = 20_000_000  # tokens, at most
_MAX_COUNTED_VOCAB = 8_000  # some minutes, and 4 GB


def make_table(config, num: int, dataset: Any) -> np.ndarray:
  """The frozen table of config.task.embedding: (num, model.embedding_width) float32, unit rows.

  Args:
    config: resolved.
    num: of classes or tokens.
    dataset: of tokens, for "pmi"; None: the config's.

  Raises:
    UserError: a file that is missing or holds something else.
  """
  kind, width = config.task.embedding, config.model.embedding_width
  if kind == "random":
    # numpy's Philox: the same on every machine and accelerator.
    table = np.random.Generator(np.random.Philox(0)).standard_normal((num, width))
  elif kind == "pmi":
    table = _pmi_table(dataset or data.load(config), num, width)
  else:
    path = paths.expand(kind, "task.embedding")
    if not path.exists() or path.is_dir():
      raise UserError(f"task.embedding={kind}: expected random, pmi, or a file .npy")
    with path.open("rb") as file:
      try:
        table = np.load(file, allow_pickle=False)
      except (ValueError, EOFError) as e:
        raise UserError(f"task.embedding={kind} is no .npy file ({e})") from e
    if not isinstance(table, np.ndarray) or table.dtype.kind not in "fiu":
      raise UserError(f"task.embedding={kind} is no .npy file of real numbers")
    if table.shape != (num, width):
      raise UserError(f"task.embedding={kind} has the shape {table.shape}: expected ({num}, "
                      f"{width}): a row for each class or token, of model.embedding_width numbers")
  norm = np.linalg.norm(table, axis=1, keepdims=True)
  if not (np.isfinite(norm) & (norm > 0)).all():
    raise UserError(f"task.embedding={kind}: some rows are zero or not finite")
  return np.asarray(table / norm, np.float32)


def _pmi_table(dataset: Any, num: int, width: int) -> np.ndarray:
  """Positive pointwise mutual information of tokens and their company, factored by an SVD.

  Levy & Goldberg (NeurIPS 2014), section 3: no backpropagation, and deterministic.
  """
  if num > _MAX_COUNTED_VOCAB:
    raise UserError(f"task.embedding=pmi: a vocabulary of {num} tokens is too large to count pairs "
                    f"of; expected {_MAX_COUNTED_VOCAB} or fewer: use random, or a file .npy")
  counts = np.zeros(num * num)
  sequences = dataset.train
  length = len(sequences.take(np.arange(1))["tokens"][0])
  total = min(len(sequences), -(-_COUNTED // length))
  for start in range(0, total, 1000):
    tokens = sequences.take(np.arange(start, min(start + 1000, total)))["tokens"].astype(np.int64)
    for distance in range(1, _WINDOW + 1):
      pairs = tokens[:, :-distance] * num + tokens[:, distance:]
      counts += np.bincount(pairs.ravel(), minlength=num * num)
  counts = counts.reshape(num, num)
  counts += counts.T + 1 / num  # a token that is never seen has a row too
  chance = np.outer(counts.sum(1), counts.sum(0)) / counts.sum()
  information = np.maximum(np.log(counts / chance), 0)
  left, singular, _ = np.linalg.svd(information, hermitian=True)
  table = left * np.sqrt(singular)
  table *= np.sign(table[np.abs(table).argmax(0), np.arange(num)])  # the SVD's sign is arbitrary
  table = np.pad(table, ((0, 0), (0, max(0, width - num))))[:, :width]
  return table + 1e-6 * np.random.Generator(np.random.Philox(0)).standard_normal(table.shape)


def cross_entropy(logits: jax.Array, target: jax.Array, sigma: jax.Array, weight: str,
                  sigma_data: float) -> jax.Array:
  """The mean cross-entropy: float32 scalar.

  Args:
    logits: (..., V).
    target: (...,) int.
    sigma: (...,) noise levels.
    weight: "none"; "edm", w(sigma) of each, as the paper writes; or "edm_batch_mean", what
      the authors' code does: a (N,) loss times a (N, 1) weight averages to the product of
      their means.
    sigma_data: of w.
  """
  loss = token_cross_entropy(logits, target)
  if weight == "none":
    return jnp.mean(loss)
  w = denoiser.edm_weight(sigma, sigma_data)
  return jnp.mean(w * loss) if weight == "edm" else jnp.mean(w) * jnp.mean(loss)


def token_cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
  """-ln p(target): logits (..., V), target (...,) int -> (...,) float32, nats."""
  logits = logits.astype(jnp.float32)
  chosen = jnp.take_along_axis(logits, target[..., None].astype(jnp.int32), -1)[..., 0]
  return jax.nn.logsumexp(logits, -1) - chosen


def log_likelihood(z: jax.Array, table: jax.Array, sigma: jax.Array) -> jax.Array:
  """ln N(z; y, sigma^2) of every row y of a table, less what all of them share.

  By Bayes' rule the logits of y given z are those of y not given z and this. A network whose
  logits it is added to need not learn to read z, as c_skip z spares it in EDM.

  Args:
    z: (..., E) float32.
    table: (V, E), unit rows.
    sigma: (...,).

  Returns:
    (..., V) float32.
  """
  # Exactly: at small sigma a rounding would be blown up.
  product = jnp.matmul(z, table.T, precision=jax.lax.Precision.HIGHEST)
  return product / sigma[..., None]**2


def linear_estimate(z: jax.Array, sigma: jax.Array) -> jax.Array:
  """The best linear estimate of y from z = y + sigma eps, y a unit vector in E dimensions.

  Where z says nothing it is next to nothing. c_in z, of unit variance at every level, is all noise
  there, and a network that is told the likelihood of z has to learn to ignore it.

  Args:
    z: (..., E) float32.
    sigma: (...,).

  Returns:
    (..., E) float32.
  """
  width = z.shape[-1]
  return z / (1 + width * sigma[..., None] ** 2)


def bridge(logits: jax.Array, table: jax.Array, kind: str, top_k: int) -> jax.Array:
  """D, the estimate of the target's vector: logits (..., V), table (V, E) -> (..., E).

  Args:
    logits: of the classes or tokens.
    table: unit rows.
    kind: "soft", the mean under softmax, the posterior mean of a perfect network; it is short
      where the network is unsure. "normalized": the same with unit norm. "hard": the likeliest
      row. "top_k": the mean over the k likeliest.
    top_k: k.
  """
  if kind == "hard":
    return table[jnp.argmax(logits, -1)]
  if kind == "top_k":
    least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  mean = jax.nn.softmax(logits.astype(jnp.float32), -1) @ table
  if kind == "normalized":
    mean = mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)
  return mean


def unit(table: jax.Array) -> jax.Array:
  """Rows scaled to norm 1: a learned table collapses otherwise."""
  return table / jnp.linalg.norm(table, axis=-1, keepdims=True)


def new_table(shape: tuple[int, int]) -> jax.Array:
  """A table to be learned: the same for all blocks, whatever their key."""
  return unit(jax.random.normal(jax.random.key(0), shape))


def without_table(params: Any) -> Any:
  """The parameters of the network alone."""
  return {name: p for name, p in params.items() if name != TABLE}


class EmbeddedTask(Task):
  """What tasks have in common whose targets are rows of a table.

  A child says in `joint` whether the table is learned.
  """

  PLAIN = {"task.end_to_end": True}

  @classmethod
  def fill(cls, config: Any):
    """The plain network is one block."""
    if config.task.end_to_end:
      config.num_blocks = 1

  @classmethod
  def check(cls, config: Any):
    """Raises UserError where parts of a batch would have weights of their own."""
    if config.task.weight == "edm_batch_mean" and config.train.accumulate > 1:
      raise UserError(f"train.accumulate={config.train.accumulate}: task.weight=edm_batch_mean is "
                      "of a whole batch: set it to 1, or task.weight to edm")

  def init(self, key: jax.Array) -> Any:
    """Parameters of a new block: a pytree of float32."""
    params = super().init(key)
    if not self.joint:
      return params
    return network_lib.extended(params, {TABLE: new_table(self._table_shape)})

  def apply(self, params: Any, *inputs: Any, method: str = "__call__") -> Any:
    """The network, which knows nothing of a table that is learned."""
    params = without_table(params) if self.joint else params
    return super().apply(params, *inputs, method=method)

  @property
  def steady(self) -> bool:
    """Not with EDM's weight, which is large where there is little noise."""
    return self.config.task.end_to_end or self.config.task.weight == "none"

  def table(self, params: Any, frozen: Any) -> jax.Array:
    """The embedding of the targets: (V, E), unit rows."""
    return unit(params[TABLE]) if self.joint else frozen[TABLE]

  @property
  def _table_shape(self) -> tuple[int, int]:
    """(V, E): of how many classes or tokens, and the width of their embedding."""
    raise NotImplementedError
