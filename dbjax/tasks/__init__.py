"""The tasks: what is noised, what conditions it, the loss, the answer, its metric.

A task is one file. To the training loop it is a `Task`, which sees ONE block, and
`make_task(config, block)`, which makes it. Its module has besides

    shared(config, dataset) -> pytree of arrays that blocks share and nothing trains
    generate(model, index, seed, **overrides) -> samples number `index`, labels or None
    save(model, samples, labels, path) -> the file beside samples.npz to look at
    evaluate(model, dataset, options) -> {name: rows}, tables of what matters here

where `model` is a `sample.Model`: it knows that there are several blocks; a task does not.
"""

import types
from typing import Any, Protocol

import jax

from dbjax.tasks import autoregressive
from dbjax.tasks import classify
from dbjax.tasks import image
from dbjax.tasks import masked
from dbjax.tasks import recurrent


class Task(Protocol):
  """A task as one block sees it: frozen, hashable, equal for blocks with as many layers."""

  network: Any  # with `num_layers`, those of the block

  def init(self, key: jax.Array) -> Any:
    """Parameters of a new block: a pytree of float32."""

  def abstract_batch(self, num: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a batch of `num`."""

  def abstract_shared(self) -> Any:
    """The shapes and dtypes of what blocks share: an empty pytree if nothing."""

  def draw(self, key: jax.Array, batch: dict[str, jax.Array],
           interval: Any) -> dict[str, jax.Array]:
    """Everything random in the loss, for the whole batch at once: leading axis N."""

  def loss(self, params: Any, drawn: dict[str, jax.Array], shared: Any) -> jax.Array:
    """The mean over what was drawn, or over a part of it: float32 scalar."""


_MODULES = dict(autoregressive=autoregressive, classify=classify, image=image, masked=masked,
                recurrent=recurrent)


def module(config) -> types.ModuleType:
  """The file of a config's task."""
  return _MODULES[config.task.name]


def make_task(config, block: int) -> Task:
  """The task of a resolved config for one block."""
  return module(config).make_task(config, block)
