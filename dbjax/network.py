'''Your own network: any stack of layers between embedders and a read-out.

    config.model.network = "my_net:Net"

names a class (or a function that returns an object) in a file of yours. It is found where the
command is run, on PYTHONPATH, or beside the config file. It is constructed by keyword; its
arguments are the fields of `config.model`, with the type, default, range and meaning that the
class gives them (see `python -m pydoc dbjax.fields`), besides those that the task gives:

    num_layers   how many layers the block has. Required: config.model.num_layers is that of
                 all blocks together, and each block is constructed with its share, which it
                 keeps as its attribute num_layers.
    others       what `Task.OFFERS` of the task says: num_classes of the task image, for
                 instance; given to a class that asks for it by name.

An instance is a network of ONE block, with its own embedders and read-out. It is hashable and
equal to one of the same arguments. It is called as the task says in `Task.call`: the task image
calls F(x, c_noise, label) and expects the shape of x. There are two kinds:

A Linen module as it is, if all of its variables are in the collection `params`:

    from flax import linen as nn

    class Net(nn.Module):
      num_layers: int
      num_classes: int
      width: int = 64

      @nn.compact
      def __call__(self, x, c_noise, label):
        c = nn.Embed(self.num_classes + 1, self.width)(label)
        c = c + nn.Dense(self.width)(c_noise[:, None])
        h = nn.Dense(self.width)(x.reshape(len(x), -1))
        for _ in range(self.num_layers):
          h = h + nn.Dense(self.width)(nn.silu(nn.LayerNorm()(h) + c))
        return nn.Dense(x[0].size)(h).reshape(x.shape)

Anything else by two pure functions, `init(key, *inputs) -> params`, a pytree of float32 arrays,
and `apply(params, *inputs) -> output`. A frozen dataclass is hashable by itself. An NNX model is
split into its graph and its parameters, and merged again (Equinox partitions and combines):

    @dataclasses.dataclass(frozen=True)
    class Net:
      num_layers: int
      width: int = 64

      def model(self, key):
        return Model(self.num_layers, self.width, rngs=nnx.Rngs(params=key))

      def init(self, key, *inputs):
        return nnx.to_pure_dict(nnx.state(self.model(key), nnx.Param))

      def apply(self, params, *inputs):
        graph, state = nnx.split(nnx.eval_shape(lambda: self.model(jax.random.key(0))))
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)(*inputs)

Four attributes of the class are optional.

    sizes    {name: {field: value}}: what config.model.name may say instead of single fields.
    parts    {"layers": .., "embedding": .., "head": ..}: patterns of the names of parameters
             at the top of the tree, by which the planner tells a block's own ends from its layers.
             In "layers" the layers are stacked, in order, on the leading axis of every array:
             `stack` makes such ones. Then train.init_from can cut a pretrained network, and
             optimizer.name=muon finds its matrices: the arrays called kernel.
    split    ((pattern, axis), ...): which axis of an array is spread over the mesh axis fsdp,
             before the rules for arrays called kernel in `sharding.RULES`.
    check()  a method that raises ValueError where arguments do not go together.

`stack` repeats a layer as one scanned axis: then compile time does not grow with depth, and
the field `remat` recomputes each layer's activations in the backward pass.

The contract is checked before anything is compiled; where it is broken, one line says how.
'''

from collections.abc import Callable, Mapping
import functools
import inspect
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from dbjax import fields
from dbjax import lookup
from dbjax.errors import UserError


class Call(NamedTuple):
  """How a task calls a network.

  Attributes:
    inputs: arrays (or their shapes and dtypes), and numbers that are no arrays.
    output: the shape that comes back.
    method: of the network; "__call__" is `apply` of what is no Linen module.
  """

  inputs: tuple[Any, ...]
  output: tuple[int, ...]
  method: str = "__call__"


def find(name: str) -> Callable:
  """The class that config.model.network names. Raises UserError where there is none."""
  found = lookup.find(name, "model.network")
  if not callable(found):
    raise UserError(f"model.network={name}: expected a class or a function, found "
                    f"{type(found).__name__}")
  return found


def make(model: Mapping[str, Any], num_layers: int, offered: Mapping[str, Any]) -> Any:
  """The network of one block.

  Args:
    model: config.model, resolved.
    num_layers: of the block.
    offered: by the task.

  Raises:
    UserError: its constructor or its `check` refuses its arguments.
  """
  cls = find(model["network"])
  asked = inspect.signature(cls).parameters
  given = {k: model[k] for k in fields.of_class(cls, offered)} | {
      k: v for k, v in offered.items() if k in asked} | dict(num_layers=num_layers)
  if "dtype" in given:
    given["dtype"] = jnp.dtype(given["dtype"])
  try:
    network = cls(**given)
    getattr(network, "check", lambda: None)()
    hash(network)
    if getattr(network, "num_layers", None) != num_layers:
      raise UserError(f"model.network={model['network']}: expected an attribute num_layers, the "
                      f"{num_layers} that it was constructed with")
  except UserError:
    raise
  except ValueError as e:
    raise UserError(str(e)) from e
  except Exception as e:  # whatever the user's class raises
    raise UserError(f"model.network={model['network']}: "
                    f"{lookup.own_words(e, model['network'])}") from e
  return network


def init(network: Any, key: jax.Array, call: Call) -> Any:
  """Parameters of a new network: a pytree of float32 arrays."""
  inputs = [jnp.zeros(x.shape, x.dtype) if hasattr(x, "shape") else x for x in call.inputs]
  if not isinstance(network, nn.Module):
    return network.init(key, *inputs)
  variables = network.init(key, *inputs, method=call.method)
  others = sorted(variables.keys() - {"params"})
  if others:
    raise UserError(f"model.network={type(network).__name__} keeps {', '.join(others)} besides "
                    "params: expected a network without other variables")
  return variables["params"]


def extended(params: Any, own: Mapping[str, Any]) -> dict[str, Any]:
  """A network's parameters and those that a task adds. Raises UserError where they are in the way.
  """
  if not isinstance(params, Mapping) or own.keys() & params.keys():
    raise UserError(f"model.network: the task adds the parameter {', '.join(own)}: expected a "
                    "network whose parameters are a dict without that name; rename its own")
  return {**params, **own}


def apply(network: Any, params: Any, *inputs: Any, method: str = "__call__") -> Any:
  """What the network makes of its inputs."""
  if isinstance(network, nn.Module):
    return network.apply({"params": params}, *inputs, method=method)
  return getattr(network, "apply" if method == "__call__" else method)(params, *inputs)


def check(network: Any, call: Call, name: str):
  """Raises UserError where a network breaks the contract; nothing is compiled.

  Args:
    network: of one block.
    call: what the task calls it with, and expects.
    name: of the network in the config.
  """
  words = f"model.network={name}"
  if not isinstance(network, nn.Module):
    for method in ("init", "apply"):
      if not callable(getattr(network, method, None)):
        raise UserError(f"{words}: expected a Linen module, or an object with the methods init and "
                        f"apply; {type(network).__name__} has no {method}")
  is_array = [hasattr(x, "shape") for x in call.inputs]
  arrays = [x for x, a in zip(call.inputs, is_array) if a]

  def run(params, *arrays):
    rest = iter(arrays)
    inputs = [next(rest) if a else x for x, a in zip(call.inputs, is_array)]
    return apply(network, params, *inputs, method=call.method)

  shapes = ", ".join(map(fields.described, arrays))
  try:
    params = jax.eval_shape(lambda key: init(network, key, call), jax.random.key(0))
    out = jax.eval_shape(run, params, *arrays)
  except UserError:
    raise
  except Exception as e:  # whatever the user's network raises
    raise UserError(f"{words}, called with {shapes}: {lookup.own_words(e, name)}") from e
  wrong = [str(x.dtype) for x in jax.tree.leaves(params) if x.dtype != jnp.float32]
  if wrong or not jax.tree.leaves(params):
    raise UserError(f"{words}: expected parameters that are float32 arrays, found "
                    f"{wrong[0] if wrong else 'none'}")
  if not hasattr(out, "shape") or out.shape != call.output:
    found = list(out.shape) if hasattr(out, "shape") else type(out).__name__
    raise UserError(f"{words}, called with {shapes}: expected an array of shape "
                    f"{list(call.output)}, found {found}")


def stack(layer: Callable[..., nn.Module], num_layers: int, *, remat: bool = False,
          unroll: int = 1, name: str = "layers") -> Callable:
  """`num_layers` Linen modules as one, called x = layer(x, *others), of a scanned axis.

  To be called in a compact method. Parameters are stacked on a leading axis.

  Args:
    layer: a module's class, or a function of `name` that makes one.
    num_layers: how many.
    remat: recompute a layer's activations in the backward pass.
    unroll: layers per iteration of the loop; more is faster on CPU.
    name: of the parameters.

  Returns:
    (x, *others) -> x. `others` are the same for all layers.
  """
  step = lambda module, x, *others: (module(x, *others), None)
  if remat:  # without a loop around it, CSE would undo the recomputation
    step = nn.remat(step, prevent_cse=unroll > 1)

  def run(x: Any, *others: Any) -> Any:
    scan = nn.scan(step, length=num_layers, in_axes=nn.broadcast, variable_axes={"params": 0},
                   split_rngs={"params": True}, unroll=min(unroll, num_layers))
    return scan(layer(name=name), x, *others)[0]

  return functools.wraps(step)(run)
