"""The contract of a network: what is constructed how, called with what, and what breaks it."""

import dataclasses
from typing import Annotated

import chex
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dbjax import block as block_lib
from dbjax import config as config_lib
from dbjax import loading
from dbjax import loop
from dbjax import network
from dbjax import task as task_lib
from dbjax.errors import UserError
from dbjax.fields import above
from dbjax.fields import FREE

HERE = __name__  # networks below are named "test_network:Linen", as a user's are


class Linen(nn.Module):
  """A stack made by `network.stack`."""

  num_layers: int
  num_classes: int
  width: Annotated[int, above(0), "features"] = 8
  remat: Annotated[bool, FREE] = False
  split = ((r"read_out/bias$", 0),)
  parts = dict(layers="layers")

  @nn.compact
  def __call__(self, x, c_noise, label):
    c = nn.Dense(self.width)(c_noise[:, None]) + nn.Embed(self.num_classes + 1, self.width)(label)
    h = nn.Dense(self.width)(x.reshape(len(x), -1))
    h = network.stack(Layer, self.num_layers, remat=self.remat)(h, c)
    return nn.Dense(x[0].size, name="read_out")(h).reshape(x.shape)


class Layer(nn.Module):

  @nn.compact
  def __call__(self, h, c):
    return h + nn.Dense(h.shape[-1])(nn.silu(h + c))


class NNXModel(nnx.Module):

  def __init__(self, num_layers, size, width, rngs):
    self.ends = nnx.List([nnx.Linear(size + 1, width, rngs=rngs),
                          nnx.Linear(width, size, rngs=rngs)])
    self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(num_layers)])

  def __call__(self, x, c_noise):
    h = self.ends[0](jnp.concatenate([x.reshape(len(x), -1), c_noise[:, None]], 1))
    for layer in self.layers:
      h = h + nnx.silu(layer(h))
    return self.ends[1](h).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class NNX:
  """Split into its graph and its parameters, and merged again."""

  num_layers: int
  width: int = 8

  def _model(self, x, key):
    return NNXModel(self.num_layers, x[0].size, self.width, nnx.Rngs(params=key))

  def init(self, key, x, c_noise, label):
    return nnx.to_pure_dict(nnx.state(self._model(x, key), nnx.Param))

  def apply(self, params, x, c_noise, label):
    graph, state = nnx.split(nnx.eval_shape(lambda: self._model(x, jax.random.key(0))))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)(x, c_noise)


@dataclasses.dataclass(frozen=True)
class Functions:
  """Two plain functions."""

  num_layers: int
  width: int = 8

  def init(self, key, x, c_noise, label):
    keys = jax.random.split(key, self.num_layers + 2)
    draw = lambda key, *shape: 0.1 * jax.random.normal(key, shape)
    return dict(read_in=draw(keys[0], x[0].size, self.width),
                layers=[draw(k, self.width, self.width) for k in keys[2:]],
                read_out=draw(keys[1], self.width, x[0].size))

  def apply(self, params, x, c_noise, label):
    h = x.reshape(len(x), -1) @ params["read_in"]
    for w in params["layers"]:
      h = h + jax.nn.silu(h @ w)
    return (h @ params["read_out"]).reshape(x.shape)


def config_of(name, **overrides):
  small = {"model.network": f"{HERE}:{name}", "model.num_layers": 4, "num_blocks": 2,
           "train.num_steps": 4, "train.batch_size": 8, "optimizer.warmup_steps": 1,
           "checkpoint.every_steps": 2, "log.every_steps": 1, "sample.every_steps": 0,
           "sample.num_steps": 4}
  return config_lib.resolve(config_lib.read("digits", small | overrides))


@pytest.mark.parametrize("name", ["Linen", "NNX", "Functions"])
def test_any_network_trains_resumes_and_samples(name, tmp_path):
  """Stopped after two steps of four, bit-equal to the uninterrupted run."""
  config = config_of(name)
  loop.train(config, tmp_path / "once", devices=jax.devices()[:1])
  whole = loading.load(tmp_path / "once")
  samples, labels = whole.sample(4, num_steps=3)
  assert samples.shape == (4, 8, 8, 1) and len(set(labels)) == 4

  task = task_lib.make_task(config, 0)
  state, step = block_lib.init(task, 0), jax.jit(block_lib.train_step, static_argnums=0)
  dataset = whole.dataset()
  for n in range(4):
    state, _ = step(task, state, dataset.batch(0, n, 8), 0,
                    task.make_schedule(config).training_interval(0))
  chex.assert_trees_all_close(whole.params[0], jax.device_get(state.ema), rtol=1e-5, atol=1e-6)


def test_blocks_get_their_share_of_the_layers():
  config = config_of("Linen", **{"layers_per_block": (1, 3)})
  assert [task_lib.make_task(config, b).network.num_layers for b in (0, 1)] == [1, 3]
  assert task_lib.make_task(config, 0).network.num_classes == 10  # by the task


def test_a_stack_is_its_layers_one_after_another():
  """Against a loop over slices of the stacked parameters; remat and unroll change nothing."""
  net = Linen(num_layers=3, num_classes=10)
  x, c, label = jnp.ones((2, 2, 2, 1)), jnp.ones(2), jnp.zeros(2, int)
  params = net.init(jax.random.key(0), x, c, label)["params"]
  h = nn.Dense(8).apply({"params": params["Dense_1"]}, x.reshape(2, -1))
  cond = (nn.Dense(8).apply({"params": params["Dense_0"]}, c[:, None])
          + params["Embed_0"]["embedding"][label])
  for i in range(3):
    layer = jax.tree.map(lambda p: p[i], params["layers"])  # noqa: B023
    h = Layer().apply({"params": layer}, h, cond)
  expected = nn.Dense(4).apply({"params": params["read_out"]}, h).reshape(x.shape)
  for same in (net, net.clone(remat=True)):
    loss = lambda p: jnp.sum(same.apply({"params": p}, x, c, label) ** 2)  # noqa: B023
    np.testing.assert_allclose(same.apply({"params": params}, x, c, label), expected, rtol=1e-5)
    chex.assert_trees_all_close(jax.grad(loss)(params), jax.grad(
        lambda p: jnp.sum(net.apply({"params": p}, x, c, label) ** 2))(params), rtol=1e-5)


def test_own_rules_split_arrays_over_fsdp(tmp_path):
  """With four parts of the weights the trained ones agree with those of one device."""
  from dbjax import program
  from dbjax import sharding

  config = config_of("Linen", **{"mesh.fsdp": 4, "mesh.data": 1})
  task = task_lib.make_task(config, 0)
  state = program.abstract_states(task, sharding.make_mesh(config, jax.devices()[:4]), 1)
  specs = {jax.tree_util.keystr(path, simple=True, separator="/"): x.sharding.spec
           for path, x in jax.tree_util.tree_leaves_with_path(state.params)}
  assert specs["read_out/bias"] == jax.P("block", "fsdp")
  assert specs["layers/Dense_0/kernel"] == jax.P("block", None, None, "fsdp")
  loop.train(config, tmp_path / "four", devices=jax.devices()[:4])
  loop.train(config_of("Linen"), tmp_path / "one", devices=jax.devices()[:1])
  chex.assert_trees_all_close(loading.load(tmp_path / "four").params,
                              loading.load(tmp_path / "one").params, rtol=1e-4, atol=1e-5)


class WrongShape(Linen):

  @nn.compact
  def __call__(self, x, c_noise, label):
    return nn.Dense(3)(x)


class HasStatistics(Linen):

  @nn.compact
  def __call__(self, x, c_noise, label):
    return nn.BatchNorm(use_running_average=False)(x)


class Raises(Linen):

  @nn.compact
  def __call__(self, x, c_noise, label):
    return x @ jnp.ones((7, 7))


class Refuses(Linen):

  def check(self):
    raise ValueError("model.width=8: must be odd")


@dataclasses.dataclass(frozen=True)
class NoApply:
  num_layers: int

  def init(self, key, *inputs):
    return {}


@dataclasses.dataclass(frozen=True)
class Bfloat16(Functions):

  def init(self, key, *inputs):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), super().init(key, *inputs))


class NotHashable:

  def __init__(self, num_layers: int):
    self.num_layers = num_layers

  __hash__ = None


@pytest.mark.parametrize("name, words", [
    ("WrongShape", r"expected an array of shape \[2, 8, 8, 1\], found \[2, 8, 8, 3\]"),
    ("HasStatistics", "keeps batch_stats besides params"),
    ("Raises", r"called with float32\[2, 8, 8, 1\].*test_network.py, line \d+: TypeError"),
    ("Refuses", "model.width=8: must be odd"),
    ("NoApply", "has no apply"),
    ("Bfloat16", "float32 arrays, found bfloat16"),
    ("NotHashable", "TypeError: unhashable"),
    ("Missing", "test_network has no Missing"),
    ("HERE", "expected a class or a function, found str"),
])
def test_a_broken_contract_is_one_line_before_anything_is_compiled(name, words, monkeypatch):
  compiled = []
  monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_, **__: compiled.append(1))
  with pytest.raises(UserError, match=words) as e:
    task_lib.check(task_lib.make_task(config_of(name), 0))
  assert "\n" not in str(e.value) and not compiled


def test_fields_are_the_class_s_own():
  config = config_lib.read("digits", {"model.network": f"{HERE}:Linen", "model.num_layers": 4})
  assert config.model.to_dict() == dict(
      network=f"{HERE}:Linen", num_layers=4, width=8, remat=False)  # not the task's num_classes
  with pytest.raises(UserError, match="model.widht=9: .* did you mean model.width?"):
    config_lib.read("digits", {"model.network": f"{HERE}:Linen", "model.widht": 9})
  with pytest.raises(UserError, match="model.width=0: expected a whole number, above 0"):
    config_of("Linen", **{"model.width": 0})
