"""What a config must hold: checked and completed before anything is compiled.

A config file is plain `ml_collections`; this module is the one place that knows every
field, its type and its range.
"""

from collections.abc import Mapping
import difflib
import json
import math
import os
import runpy
from typing import Any

from etils import epath
import ml_collections

from dbjax import schedule
from dbjax.cli import UserError
from dbjax.models import dit

_positive = (lambda x: x > 0, "above 0")
_natural = (lambda x: x >= 0, "0 or more")
_fraction = (lambda x: 0 <= x <= 1, "from 0 to 1")
_decay = (lambda x: 0 <= x < 1, "from 0 to below 1")
_any = (lambda x: True, "")
_KINDS = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a string",
          list: "whole numbers"}


BRIDGES = ("soft", "normalized", "hard", "top_k")
GRIDS = ("karras", "equal_mass")


def _one_of(*names):
  return (lambda x: x in names, "one of " + ", ".join(names))


# field: (type, test, what passes it)
Fields = dict[str, tuple[type, Any, str]]

COMMON: Fields = {
    "seed": (int, lambda x: 0 <= x < 2**32, "from 0 to 2**32 - 1"),
    "num_blocks": (int, *_positive),
    "layers_per_block": (tuple, *_any),
    "task.name": (str, lambda x: x in TASKS, "see dbjax/tasks"),
    "data.name": (str, lambda x: x != "", "digits, or the name of a TFDS data set"),
    "data.dir": (str, *_any),
    "data.train": (str, *_any),
    "data.held_out": (str, *_any),
    "data.workers": (int, *_natural),
    "schedule.gamma": (float, *_any),
    "model.num_layers": (int, *_positive),
    "model.width": (int, *_positive),
    "model.num_heads": (int, *_positive),
    "model.mlp_ratio": (float, *_positive),
    "model.dtype": (str, *_one_of("float32", "bfloat16")),
    "model.remat": (bool, *_any),
    "model.unroll": (int, *_positive),
    "optimizer.learning_rate": (float, *_positive),
    "optimizer.schedule": (str, *_one_of("cosine", "constant")),
    "optimizer.warmup_steps": (int, *_natural),
    "optimizer.b1": (float, *_decay),
    "optimizer.b2": (float, *_decay),
    "optimizer.weight_decay": (float, *_natural),
    "optimizer.clip_norm": (float, *_positive),
    "train.num_steps": (int, *_positive),
    "train.batch_size": (int, *_positive),
    "train.accumulate": (int, *_positive),
    "train.ema_decay": (float, *_decay),
    "train.blocks": (tuple, *_any),
    "train.turn": (str, lambda x: x in ("all", "random", "together")
                   or (x.isdecimal() and int(x) > 0), "all, random, together or a number of steps"),
    "checkpoint.every_steps": (int, *_positive),
    "checkpoint.keep": (int, *_positive),
    "log.every_steps": (int, *_positive),
    "mesh.block": (int, *_positive),
    "mesh.data": (int, lambda x: x > 0 or x == -1, "above 0, or -1 for the devices that are left"),
    "mesh.fsdp": (int, *_positive),
    "sample.num_steps": (int, *_natural),  # 0: as many as there are blocks
    "sample.batch_size": (int, *_positive),
    "sample.every_steps": (int, *_natural),
    "evaluate.num_samples": (int, lambda x: x > 1, "2 or more"),
}

_GAUSSIAN: Fields = {
    "sigma_data": (float, *_positive),
    "schedule.P_mean": (float, *_any),
    "schedule.P_std": (float, *_positive),
    "schedule.sigma_min": (float, *_positive),
    "schedule.sigma_max": (float, *_positive),
    "schedule.partition": (str, *_any),
    "sample.grid": (str, *_one_of(*GRIDS)),
}

_IMAGES: Fields = {
    "data.feature": (str, *_one_of("image", "latent")),
    "data.image_size": (int, *_positive),
    "data.channels": (int, *_positive),
    "data.num_classes": (int, *_positive),
    "sample.solver": (str, *_one_of("euler", "heun", "dpmpp_2m")),
    "model.patch_size": (int, *_positive),
    "task.flip": (bool, *_any),
}

_TEXT: Fields = {
    "data.feature": (str, *_one_of("tokens")),
    "data.length": (int, lambda x: x > 1, "2 or more"),
    "data.vocab_size": (int, *_positive),
    "data.tokenizer": (str, lambda x: x != "", "text8, bytes or sentencepiece-..."),
    "data.eos": (int, lambda x: x >= -1, "the token that closes a document, or -1: none does"),
}

# Of targets that are classes or tokens: their embedding, the loss, and the way back (the bridge).
_DISCRETE: Fields = {
    "task.weight": (str, *_one_of("none", "edm", "edm_batch_mean")),
    "sample.bridge": (str, *_one_of(*BRIDGES)),
    "sample.top_k": (int, *_positive),
    "task.embedding": (str, lambda x: x != "", "random, or pmi, or a file .npy"),
    "task.shared_embeddings": (bool, *_any),
    "task.end_to_end": (bool, *_any),
    "model.embedding_width": (int, *_positive),
}

_TEMPERATURE: Fields = {
    "sample.temperature": (float, *_natural),
}

_NEXT_TOKEN: Fields = {
    **_GAUSSIAN, **_TEXT, **_DISCRETE, **_TEMPERATURE,
    "task.likelihood": (bool, *_any),
    "sample.solver": (str, *_one_of("ancestral", "euler")),
}

# Those of a task, besides the common ones.
TASKS: dict[str, Fields] = {
    "image": {
        **_GAUSSIAN, **_IMAGES,
        "model.name": (str, *_one_of(
            "DiT", *(f"{s}/{p}" for s in dit.SIZES for p in dit.PATCH_SIZES))),
        "task.label_drop": (float, *_fraction),
        "sample.guidance": (float, *_natural),
    },
    "classify": {
        **_GAUSSIAN, **_IMAGES, **_DISCRETE, **_TEMPERATURE,
        "data.feature": (str, *_one_of("image")),
        "sample.answer": (str, *_one_of("mean", "last")),
        "task.crop": (int, *_natural),
        "task.rand_augment": (int, *_natural),
        "task.magnitude": (int, lambda x: 0 <= x <= 30, "from 0 to 30"),
        "model.dropout": (float, *_decay),
    },
    "masked": {
        **_TEXT, **_TEMPERATURE,
        "schedule.alpha": (str, *_one_of("linear", "cosine")),
    },
    "autoregressive": _NEXT_TOKEN,
    "recurrent": {
        **_NEXT_TOKEN,
        "model.prelude": (int, *_positive),
        "model.coda": (int, *_positive),
        "task.iterations": (int, *_positive),
        "task.backprop": (int, *_positive),
    },
}

# What the name of a size, such as DiT-S/2, sets.
SIZE_FIELDS = ("model.num_layers", "model.width", "model.num_heads", "model.patch_size")

# Says when, where and in which parts blocks are computed, saved and used: a block's weights are
# the same up to the order in which floats are summed. (A model's name has done its work when the
# config is resolved.)
FREE = ("model.name", "model.remat", "model.unroll", "train.accumulate", "train.blocks",
        "train.turn", "data.dir", "data.workers", "mesh.", "checkpoint.", "log.", "sample.",
        "evaluate.")

# What blocks must agree on to be one model, however each of them was trained.
SHARED = ("num_blocks", "layers_per_block", "sigma_data", "task.name", "task.embedding",
          "task.shared_embeddings", "task.likelihood", "task.end_to_end", "data.", "schedule.",
          "model.num_layers", "model.width", "model.num_heads", "model.patch_size",
          "model.mlp_ratio", "model.embedding_width", "model.prelude", "model.coda")


def read(path: epath.PathLike, *variant: str) -> ml_collections.ConfigDict:
  """What `get_config(variant)` of a config file returns, unresolved: for benchmarks, notebooks."""
  return runpy.run_path(str(path))["get_config"](*variant)


def resolve(config: ml_collections.ConfigDict) -> ml_collections.FrozenConfigDict:
  """A checked, frozen (so hashable) copy with nothing left open: model sizes, splits, blocks.

  Raises:
    UserError: names the field, its value, and what was expected.
  """
  config = ml_collections.ConfigDict(_tuples(config.to_dict(preserve_field_references=False)))
  with config.unlocked():
    _check_names(config)
    _check_values(config)
    _fill_model(config.model)
    _fill_blocks(config)
  schedule.make_schedule(config.schedule, config.num_blocks)
  return ml_collections.FrozenConfigDict(config)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """{"train.num_steps": 1500, ...}, sorted as the config is; tuples as lists, as in JSON."""
  flat = {}
  for name, value in config.items():
    if isinstance(value, Mapping | ml_collections.ConfigDict):
      flat |= flatten(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = list(value) if isinstance(value, tuple) else value
  return flat


def unflatten(flat: Mapping[str, Any]) -> ml_collections.FrozenConfigDict:
  """The resolved config that `flatten` made flat. Raises UserError where it is none."""
  tree = {}
  for name, value in flat.items():
    *parents, leaf = name.split(".")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = value
  return resolve(ml_collections.ConfigDict(tree))


def fingerprint(flat: dict[str, Any]) -> dict[str, Any]:
  """The fields of a resolved, flat config on which all blocks of one model must agree."""
  return {k: v for k, v in flat.items() if k.startswith(SHARED) and not k.startswith(FREE)}


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
  """"model.width=128 (here) against 64 (there), ..."; empty if they agree."""
  return ", ".join(f"{k}={ours.get(k)} (here) against {theirs.get(k)} (there)"
                   for k in sorted(ours.keys() | theirs.keys()) if ours.get(k) != theirs.get(k))


def binding(flat: dict[str, Any]) -> dict[str, Any]:
  """The fields of a resolved, flat config that a block's weights are a function of."""
  return {k: v for k, v in flat.items() if not k.startswith(FREE)}


def check(workdir: epath.Path, config: ml_collections.FrozenConfigDict):
  """Raises UserError if the workdir cannot be had or holds another experiment. Writes nothing."""
  try:
    exists = (workdir / "config.json").exists()
  except ImportError as e:
    raise UserError(f"--workdir={workdir} needs a package: pip install 'dbjax[gcs]' ({e})") from e
  if exists:
    differ = differences(binding(flatten(config)), binding(flatten(load(workdir))))
    if differ:
      raise UserError(f"{workdir} holds another experiment: {differ}; choose another --workdir "
                      "or the config that it was started with")


def save(workdir: epath.Path, config: ml_collections.FrozenConfigDict):
  """Writes workdir/config.json, whole or not at all. Raises UserError where it cannot."""
  path, text = workdir / "config.json", json.dumps(config.to_dict(), indent=2) + "\n"
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
      fresh = path.with_name(f"config.json.{os.getpid()}")
      fresh.write_text(text)
      fresh.replace(path)
  except OSError as e:
    raise UserError(f"--workdir={workdir} cannot be written ({e.strerror}): choose another") from e


def load(workdir: epath.Path) -> ml_collections.FrozenConfigDict:
  """The resolved config of the experiment in `workdir`.

  Raises:
    UserError: there is none, or it is damaged.
  """
  path = workdir / "config.json"
  if not path.exists():
    raise UserError(f"{path} does not exist: --workdir must name a directory that "
                    "dbjax.main has trained in")
  try:
    config = ml_collections.ConfigDict(dict(json.loads(path.read_text())))
  except (TypeError, ValueError) as e:
    raise UserError(f"{path} is damaged ({e}): restore it, or run dbjax.main with the "
                    "experiment's config in an empty --workdir") from None
  return resolve(config)


def _tuples(tree):
  """JSON has lists where a config has tuples."""
  if isinstance(tree, Mapping):
    return {name: _tuples(value) for name, value in tree.items()}
  return tuple(tree) if isinstance(tree, list) else tree


def _fields(given: Mapping[str, Any]) -> Fields:
  """All fields of a task. `given` is a flat config."""
  name = given.get("task.name", "image")
  if name not in TASKS:
    raise UserError(f"task.name={name!r}: expected one of {', '.join(TASKS)}")
  return COMMON | TASKS[name]


def _check_names(config):
  given = flatten(config)
  fields = _fields(given)
  for name in given:
    if name not in fields:
      near = difflib.get_close_matches(name, fields, 1)
      hint = f"; did you mean {near[0]}?" if near else ""
      of_task = f" of the task {given['task.name']}" * any(name in f for f in TASKS.values())
      raise UserError(f"{name}={given[name]!r}: there is no such config field{of_task}{hint}")
  for name in fields:
    if name not in given:
      raise UserError(f"{name} is missing from the config: add it, as the files in configs/ of the "
                      "same task have it")


def _check_values(config):
  given = flatten(config)
  fields = _fields(given)
  for name, value in given.items():
    if name in SIZE_FIELDS and value is None and "model.name" in given:
      continue  # model.name may set it
    kind, test, expected = fields[name]
    if kind is tuple:
      kind, test = list, lambda v: all(type(x) is int for x in v)
    ok = isinstance(value, (int, float) if kind is float else kind)
    ok = ok and (kind is bool or not isinstance(value, bool))
    ok = ok and (kind is not float or math.isfinite(value))
    if not ok or not test(value):
      words = [_KINDS[kind]] * (kind is not str or not expected) + [expected] * bool(expected)
      raise UserError(f"{name}={value!r}: expected {', '.join(words)}")


def _fill_model(model):
  """A size from the DiT paper sets those of four fields that are not given by hand."""
  if "name" not in model:
    return
  size, _, patch = model.name.partition("/")
  preset = {**dit.SIZES[size], "patch_size": int(patch)} if patch else {}
  for field in SIZE_FIELDS:
    name = field.removeprefix("model.")
    given, expected = model[name], preset.get(name)
    if given is None and expected is None:
      raise UserError(f"{field} is not set: give a number, or a model.name with a size, "
                      "such as DiT-S/2")
    model[name] = expected if given is None else given


def _fill_blocks(config):
  if config.task.get("end_to_end", False):
    config.num_blocks = 1  # the baseline is one override
  model, data, num_blocks = config.model, config.data, config.num_blocks
  _check_recurrent(config)
  if model.width % 4 or model.width % model.num_heads:
    raise UserError(f"model.width={model.width}: must be a multiple of 4 and of "
                    f"model.num_heads={model.num_heads}")
  if data.feature == "tokens" and model.width // model.num_heads % 2:
    raise UserError(f"model.width={model.width} with model.num_heads={model.num_heads}: a head of "
                    "text must have an even width, for rotary positions")
  if config.task.name == "classify" and config.task.embedding == "pmi":
    raise UserError("task.embedding=pmi: labels keep no company; set random, or a file .npy")
  if config.task.get("rand_augment", 0) and data.channels not in (1, 3):
    raise UserError(f"data.channels={data.channels}: task.rand_augment={config.task.rand_augment} "
                    "needs 1 or 3; set it to 0")
  if model.width * model.mlp_ratio < 1:
    raise UserError(f"model.mlp_ratio={model.mlp_ratio:g}: leaves the MLP no hidden feature")
  if "patch_size" in model and data.image_size % model.patch_size:
    raise UserError(f"data.image_size={data.image_size} is not a multiple of "
                    f"model.patch_size={model.patch_size}")
  if num_blocks > model.num_layers:
    raise UserError(f"num_blocks={num_blocks} is more than model.num_layers={model.num_layers}: "
                    "a block needs at least one layer")
  config.layers_per_block = _split(num_blocks, model.num_layers, tuple(config.layers_per_block))
  if config.train.batch_size % config.train.accumulate:
    raise UserError(f"train.batch_size={config.train.batch_size} is not a multiple of "
                    f"train.accumulate={config.train.accumulate}")
  wrong = [b for b in config.train.blocks if not 0 <= b < num_blocks]
  if wrong:
    raise UserError(f"train.blocks={wrong}: num_blocks={num_blocks} has blocks "
                    f"0 to {num_blocks - 1}")
  config.train.blocks = tuple(sorted(set(config.train.blocks))) or tuple(range(num_blocks))
  config.sample.num_steps = config.sample.num_steps or num_blocks
  _check_shared_embeddings(config)


def _check_recurrent(config):
  if config.task.name != "recurrent":
    return
  if config.num_blocks != 1:
    raise UserError(f"num_blocks={config.num_blocks}: the task recurrent splits nothing, its core "
                    "is one block: set num_blocks=1")
  model = config.model
  if model.num_layers <= model.prelude + model.coda:
    raise UserError(f"model.num_layers={model.num_layers}: model.prelude={model.prelude} and "
                    f"model.coda={model.coda} leave the core no layer: set "
                    f"{model.prelude + model.coda + 1} or more")


def _check_shared_embeddings(config):
  if not config.task.get("shared_embeddings", False) or config.num_blocks == 1:
    return
  if config.train.turn != "together" or config.mesh.block != 1:
    raise UserError(f"task.shared_embeddings=True with train.turn={config.train.turn}, mesh.block="
                    f"{config.mesh.block}: blocks that learn one table are trained together: set "
                    "train.turn=together and mesh.block=1")
  if len(config.train.blocks) < config.num_blocks or len(set(config.layers_per_block)) > 1:
    raise UserError("task.shared_embeddings=True: all blocks train at once, so train.blocks must "
                    "be all of them, with equally many layers each")


def _split(num_blocks: int, num_layers: int, split: tuple[int, ...]) -> tuple[int, ...]:
  if num_blocks == 1:  # end to end, whatever the split: the baseline is one override
    return (num_layers,)
  if not split:
    if num_layers % num_blocks:
      raise UserError(f"model.num_layers={num_layers} does not divide into num_blocks="
                      f"{num_blocks}: give layers_per_block, {num_blocks} numbers")
    return (num_layers // num_blocks,) * num_blocks
  if len(split) != num_blocks or sum(split) != num_layers or min(split) < 1:
    raise UserError(f"layers_per_block={split} sums to {sum(split)}: expected num_blocks="
                    f"{num_blocks} numbers of 1 or more with sum model.num_layers={num_layers}")
  return split
