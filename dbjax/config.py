"""Configs: read, completed with defaults, checked before anything is compiled, kept, compared.

A config file is plain `ml_collections`: `get_config()` returns a ConfigDict of what differs from
the defaults, and VARIANTS, where there are some, says what differs in each: {"small": {...}}. The
fields that every experiment has are here, in COMMON; those of a task are declared by the task,
those of `config.model` by the network: see `fields.py`.

A number that says how large a block is or how it is trained may also be a list, one number for each
block: `model.width=(256, 128, 64)`. A block sees its own (`task.of_block`).

Two forms of a config: complete, with every field, some of which may still be open (None); and
resolved, with nothing open, checked and frozen, so that it is hashable. A flat one is a dict
{"train.num_steps": 1500, ...}.
"""

from collections.abc import Mapping
import dataclasses
import importlib.resources
import inspect
import json
import os
from pathlib import Path
import runpy
from typing import Any

from etils import epath
import ml_collections

from dbjax import fields as fields_lib
from dbjax import lookup
from dbjax import network as network_lib
from dbjax import paths
from dbjax import schedule as schedule_lib
from dbjax import task as task_lib
from dbjax import trust
from dbjax.errors import UserError
from dbjax.fields import above
from dbjax.fields import at_least
from dbjax.fields import below
from dbjax.fields import between
from dbjax.fields import Field
from dbjax.fields import FREE
from dbjax.fields import JOINT
from dbjax.fields import one_of
from dbjax.fields import Range

COMMON = {
    "seed": Field(0, "of all that is random", between(0, 2**32 - 1)),
    "num_blocks": Field(3, "B: how many blocks; 1 is the end-to-end baseline", above(0), JOINT),
    "layers_per_block": Field((), "() is an even split; or by hand, as in 1,2,3", role=JOINT),

    "task.name": Field(str, "of dbjax/tasks, or your own as module:Class", role=JOINT),

    "data.name": Field("digits", "digits, a TFDS data set, or your own as module:function",
                       Range(str.strip, "digits, a TFDS data set, or module:function"), JOINT),
    "data.dir": Field("", "where TFDS keeps its data sets; empty: as TFDS has it", role=FREE),
    "data.train": Field("train", "the split to train on", role=JOINT),
    "data.held_out": Field("test", "the split that is held out", role=JOINT),
    "data.workers": Field(0, "processes that decode, for each group of blocks that takes turns; "
                          "0: threads", at_least(0), FREE),

    "schedule.gamma": schedule_lib.GAMMA,

    "model.network": Field(str, "module:Class", role=JOINT),
    "model.name": Field("", "a size, where the network has some: DiT-S/2", role=FREE),
    "model.num_layers": Field(int, "of all blocks together", above(0), JOINT),

    "optimizer.name": Field("adamw", "see dbjax/optimizers.py",
                            one_of("adamw", "muon", "schedule_free", "adafactor", "lion")),
    "optimizer.learning_rate": Field(1e-3, "the highest", above(0)),
    "optimizer.schedule": Field("cosine", "after the warm-up; wsd: constant, then at the end a "
                                "decay", one_of("cosine", "constant", "wsd")),
    "optimizer.warmup_steps": Field(100, "from 0 to the learning rate", at_least(0)),
    "optimizer.decay_steps": Field(0, "of wsd: the last ones, in which the rate falls to 0",
                                   at_least(0)),
    "optimizer.b1": Field(0.9, "of the first moment; adafactor with 0 has none", below(1)),
    "optimizer.b2": Field(0.99, "of AdamW's second moment, and where muon and schedule_free use "
                          "AdamW's; of lion's momentum", below(1)),
    "optimizer.moments_dtype": Field("float32", "of first moments; bfloat16 saves 2 bytes a "
                                     "parameter", one_of("float32", "bfloat16")),
    "optimizer.weight_decay": Field(0.01, "times the learning rate, in each step", at_least(0)),
    "optimizer.clip_norm": Field(1.0, "gradients are scaled down to this norm", above(0)),

    "train.num_steps": Field(1000, "optimizer steps of each block", above(0)),
    "train.batch_size": Field(64, "examples in a step, on all devices together", above(0)),
    "train.accumulate": Field(1, "parts of a batch that pass one after the other", above(0), FREE),
    "train.ema_decay": Field(0.999, "of the averaged weights, which samples are drawn with; "
                             "schedule_free has an average of its own", below(1)),
    "train.init_from": Field("", "weights to start from: a workdir of one block, or a file; empty: "
                             "random ones. See dbjax.pretrained", role=FREE),
    "train.init_layout": Field("dbjax.pretrained:dit", "what the tensors of that file mean",
                               role=JOINT),
    "train.blocks": Field((), "which blocks to train; () is all", role=FREE),
    "train.turn": Field("all", "whose turn when: each all its steps, a number of them, random; or "
                        "together", Range(
                            lambda x: x in ("all", "random", "together")
                            or (x.isdecimal() and int(x) > 0),
                            "all, random, together or a number of steps"), FREE),

    "mesh.block": Field(1, "rows of devices, each of which trains blocks of its own", above(0),
                        FREE),
    "mesh.data": Field(-1, "parts of a batch in a row; -1: the devices that are left",
                       Range(lambda x: x > 0 or x == -1, "above 0, or -1"), FREE),
    "mesh.fsdp": Field(1, "parts of a batch and of the weights in a row", above(0), FREE),

    "checkpoint.every_steps": Field(1000, "steps of a block", above(0), FREE),
    "checkpoint.keep": Field(2, "the last few of each block", above(0), FREE),
    "checkpoint.keep_every": Field(0, "also those of every so-manieth step; 0: no others",
                                   at_least(0), FREE),
    "checkpoint.best": Field(False, "also that of each block whose loss on held-out data is least",
                             role=FREE),
    "log.every_steps": Field(100, "steps of a block", above(0), FREE),
    "log.norms": Field(False, "also norms of gradients and updates, layer by layer: one more step "
                       "for each report", role=FREE),
    "log.profile_steps": Field((), "the first and the last that a profiler traces; () is none",
                               Range(lambda x: not x or len(x) == 2 and 0 < x[0] <= x[1],
                                     "none or two: first,last"), FREE),
    "log.wandb": Field("", "a project at Weights & Biases; empty: not there", role=FREE),

    "sample.num_steps": Field(50, "of the sampler; 0: as many as there are blocks", at_least(0),
                              FREE),
    "sample.batch_size": Field(100, "samples drawn at a time", above(0), FREE),
    "sample.every_steps": Field(0, "show samples while training; 0: never", at_least(0), FREE),
    "evaluate.num_samples": Field(1000, "that are scored", at_least(2), FREE),
}

# What makes the learning rate's schedule, of a block.
_SCHEDULE = ("train.num_steps", "optimizer.decay_steps", "optimizer.warmup_steps")

# Of sample.num_steps, whichever default and range a task says: more there is no room to list.
STEPS = Field(0, "of a sampler", between(0, 10**6))


def shipped() -> dict[str, Path]:
  """{name: file} of the configs that come with dbjax."""
  inside = Path(str(importlib.resources.files("dbjax"))) / "configs"  # in a wheel
  folder = inside if inside.is_dir() else Path(__file__).parents[1] / "configs"
  return {path.stem: path for path in sorted(folder.glob("*.py"))}


def read(name: epath.PathLike, overrides: Mapping[str, Any] | None = None
         ) -> ml_collections.ConfigDict:
  """A complete config, to change and to train with.

  Args:
    name: of a config that comes with dbjax, such as "digits", or a file; a variant of it follows
      a colon: "cifar10:small".
    overrides: {"train.num_steps": 100, ...}: values, or text as on a command line. Whoever
      wants another task or network says so here, since fields depend on it; those of the file that
      the other one does not have are left out.

  Raises:
    UserError: there is no such config, or its file fails, or a field is none.
  """
  if not isinstance(overrides, Mapping | None) or not all(
      isinstance(field, str) for field in overrides or {}):
    raise UserError(f"overrides={fields_lib.shown(overrides)}: expected a dict of fields, such as "
                    "{'train.num_steps': 100}")
  path, variant = _locate(name)
  given, overrides = _given(path, variant, f"--config={name}"), dict(overrides or {})
  others = {field: overrides[field] for field in ("task.name", "model.network")
            if field in overrides}
  if any(not isinstance(name, str) or name != given.get(field) for field, name in others.items()):
    fields = fields_of(given | overrides)  # the file's own are of another task or network
    given = {field: value for field, value in given.items() if field in fields}
  try:
    return complete(given | overrides)
  except UserError as e:
    if str(e).partition("=")[0] in overrides:
      raise
    raise UserError(f"{e} (in {path})") from None


def _given(path: Path, variant: str, words: str) -> dict[str, Any]:
  """What a file's config and its variant say, flat.

  Args:
    path: of the file.
    variant: or "".
    words: that an error begins with.

  Raises:
    UserError: with the user's own file and line.
  """
  lookup.search_beside(path)
  try:
    code = runpy.run_path(str(path))
    if not callable(code.get("get_config")):
      raise UserError(f"{words}: {path} has no function get_config")
    make = code["get_config"]
    own = variant and inspect.signature(make).parameters  # it sees to its variants itself
    differs = _variant(code.get("VARIANTS", {}), variant, f"{words}: {path}") if (
        variant and not own) else {}
    config = make(variant) if own else make()
  except UserError:
    raise
  except (Exception, SystemExit) as e:  # whatever the user's file raises
    raise UserError(f"{words}: {lookup.own_words(e, str(path))}") from e
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(f"{words}: get_config() of {path} returns {type(config).__name__}, expected a "
                    "ConfigDict")
  return flatten(config) | flatten(differs)


def _variant(variants: Any, name: str, words: str) -> Mapping[str, Any]:
  """What differs in a variant."""
  if not isinstance(variants, Mapping):
    raise UserError(f"{words}: VARIANTS={fields_lib.shown(variants)}: expected a dict, such as "
                    "{'small': {'train': {'num_steps': 100}}}")
  if name not in variants:
    known = f"only {', '.join(map(str, variants))}" if variants else "nor any other"
    raise UserError(f"{words} has no variant {name}, {known}"
                    + fields_lib.did_you_mean(name, [*map(str, variants)]))
  if not isinstance(variants[name], Mapping | ml_collections.ConfigDict):
    raise UserError(f"{words}: the variant {name} is {fields_lib.shown(variants[name])}: expected "
                    "a dict of what differs")
  return variants[name]


def complete(given: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """A config with every field: what is `given`, and defaults.

  Args:
    given: a flat config. None: left open. Text is parsed where a field is no string.

  Raises:
    UserError: some name is no field, or a value is not what the field takes.
  """
  fields = fields_of(given)
  for name, value in given.items():
    if name not in fields:
      raise UserError(f"{name}={fields_lib.shown(value)}: there is no such config field of the "
                      f"task {given['task.name']}"
                      f"{fields_lib.did_you_mean(name, fields)}")
  sizes = getattr(_network(given, fields), "sizes", {}).values()
  sized = {f"model.{name}" for size in sizes for name in size}
  flat = {}
  for name, field in fields.items():
    value = given.get(name)
    if isinstance(value, str) and field.kind is not str:
      value = field.parse(name, value)
    if value is None:
      value = None if field.required or name in sized else field.default
    flat[name] = value if value is None else field.check(name, value)
  config = ml_collections.ConfigDict(_nest(flat), type_safe=False)
  config.lock()
  return config


def fields_of(given: Mapping[str, Any]) -> dict[str, Field]:
  """All fields of a flat config's task and network."""
  task = task_lib.find(given.get("task.name"))
  fields = COMMON | dict(task.FIELDS)
  network = _network(given, fields)
  own = fields_lib.of_class(network, task.OFFERS)
  fields |= {f"model.{k}": field for k, field in own.items()}
  fields |= {name: dataclasses.replace(fields[name], per_block=True)
             for name in task_lib.listable(own)}
  if not getattr(network, "sizes", None):
    del fields["model.name"]
  return fields


def _network(given: Mapping[str, Any], fields: Mapping[str, Field]) -> Any:
  name = given.get("model.network")
  if not isinstance(name, str):
    if fields["model.network"].required:
      raise UserError(f"model.network={fields_lib.shown(name)}: expected module:Class, such as "
                      "my_net:Net")
    name = fields["model.network"].default
  return network_lib.find(name)


def resolve(config: ml_collections.ConfigDict | ml_collections.FrozenConfigDict
            ) -> ml_collections.FrozenConfigDict:
  """A checked, frozen (so hashable) copy with nothing left open: model sizes, splits, blocks.

  Raises:
    UserError: names the field, its value, and what was expected.
  """
  config = _resolve(complete(flatten(config)))
  _check_decay(config)
  return config


def _resolve(config: ml_collections.ConfigDict) -> ml_collections.FrozenConfigDict:
  """`resolve`, of a complete config; takes what was once taken, as checkpoints may hold it."""
  task = task_lib.find(config.task.name)
  with config.unlocked():
    _fill_open(config)
    task.fill(config)
    _fill_lists(config)
    _fill_blocks(config)
  config = ml_collections.FrozenConfigDict(config)
  for own in dict.fromkeys(task_lib.of_block(config, b) for b in range(config.num_blocks)):
    _check_lengths(own)
    task.check(own)
  task.make_schedule(config)
  _check_optimizer(config)
  kinds = task_lib.kinds(config)
  joint = {name for kind in kinds for name in kind.joint}
  if joint and config.num_blocks > 1:
    _check_joint(config, joint, len(kinds))
  return config


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """{"train.num_steps": 1500, ...}, in the config's order; tuples as lists, as in JSON.

  Raises:
    UserError: it is no config, or holds what is no field.
  """
  if not isinstance(config, Mapping | ml_collections.ConfigDict):
    raise UserError(f"config={fields_lib.shown(config)}: expected a ConfigDict, such as "
                    "dbjax.read_config('digits')")
  if isinstance(config, ml_collections.ConfigDict) and not prefix:
    try:
      config = config.to_dict(preserve_field_references=False)
    except ml_collections.config_dict.RequiredValueError as e:
      raise UserError(f"config: a field of it must still be set ({e})") from None
  flat: dict[str, Any] = {}
  for name, value in config.items():
    if not isinstance(name, str):
      raise UserError(f"config: {fields_lib.shown(name)} is no name of a field, expected a string")
    if isinstance(value, Mapping | ml_collections.ConfigDict):
      flat |= flatten(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = list(value) if isinstance(value, tuple) else value
  return flat


def unflatten(flat: Mapping[str, Any]) -> ml_collections.FrozenConfigDict:
  """The resolved config of a flat one, as a checkpoint may hold it.

  Raises:
    UserError: it is none.
  """
  return _resolve(complete(flat))


def changed(config: Any, **fields: Any) -> ml_collections.FrozenConfigDict:
  """The resolved config with other fields, checked: changed(config, **{"mesh.data": 4})."""
  return unflatten(flatten(config) | fields)


def as_one_block(config: Any, **fields: Any) -> ml_collections.FrozenConfigDict:
  """The resolved config of the whole network as one block.

  Args:
    config: complete or resolved, or flat. Of a list with a value for each block the largest counts.
      But lists that make a schedule count together, by the block that is trained the longest; and
      so do those of the network, by the block in which the first of them is the largest.
    **fields: others.
  """
  flat = flatten(config) if not isinstance(config, dict) else config
  lists = {name: flat[name] for name, field in fields_of(flat).items()
           if field.per_block and isinstance(flat[name], list | tuple)}
  largest = {name: max(values) for name, values in lists.items()}
  num = max(map(len, lists.values()), default=1)
  for names in (_SCHEDULE, [name for name in lists if name.startswith("model.")]):
    of_blocks = zip(*(lists.get(name, [flat[name]] * num) for name in names))
    largest |= dict(zip(names, max(of_blocks, default=())))
  return unflatten(flat | largest | {
      "num_blocks": 1, "layers_per_block": (), "train.blocks": (), "mesh.block": 1} | fields)


def is_plain(config: Any) -> bool:
  """Whether a resolved config is the plain network that blocks are compared with."""
  flat, plain = flatten(config), task_lib.find(config.task.name).PLAIN
  return config.num_blocks == 1 and all(flat[name] == value for name, value in plain.items())


def binding(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of a resolved, flat config that a block's weights after n steps are a function of.

  Where the learning rate does not depend on it, train.num_steps is none, and may be raised; and
  optimizer.decay_steps counts as 0.
  """
  fields, schedule = fields_of(flat), flat["optimizer.schedule"]
  unused = {} if schedule == "wsd" else {"optimizer.decay_steps": 0}
  return {k: unused.get(k, v) for k, v in flat.items()
          if fields[k].role != FREE and (schedule == "cosine" or k != "train.num_steps")}


def binding_of_block(flat: Mapping[str, Any], block: int) -> dict[str, Any]:
  """What `binding` says of one block: of a list with a value for each, its own alone.

  But fields on which all blocks of a model must agree stand as they are, whole.
  """
  own = task_lib.of_block(unflatten(flat), block)
  return binding(flatten(own)) | joint(flat)


def check_length(ours: Mapping[str, Any], theirs: Mapping[str, Any], step: int):
  """Raises UserError where a block at this step can't go on under another train.num_steps.

  Args:
    ours, theirs: resolved and flat, of now and of when it was saved; they agree in `binding`.
    step: that it has reached.
  """
  total = min(ours["train.num_steps"], theirs["train.num_steps"])
  if ours["optimizer.schedule"] == "wsd" and ours["train.num_steps"] != theirs["train.num_steps"]:
    stable = total - ours["optimizer.decay_steps"]
    if step > stable:
      raise UserError(
          f"train.num_steps={ours['train.num_steps']} against {theirs['train.num_steps']} (there): "
          f"at step {step} its learning rate falls already, from step {stable} on: move the "
          "checkpoints after that step away, and it goes on from one before")


def joint(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of a resolved, flat config on which all blocks of one model must agree."""
  fields = fields_of(flat)
  return {k: v for k, v in flat.items() if fields[k].role == JOINT}


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
  """"model.width=128 (here) against 64 (there), ..."; empty if they agree."""
  differ = [k for k in sorted(ours.keys() | theirs.keys()) if ours.get(k) != theirs.get(k)]
  words = ", ".join(f"{k}={ours.get(k)} (here) against {theirs.get(k)} (there)" for k in differ)
  return words + " (with optimizer.schedule=cosine every step depends on it)" * (
      "train.num_steps" in differ)


def describe(config: Any) -> list[tuple[str, ...]]:
  """Of every field (name, value, default, range, meaning), in words."""
  flat = flatten(resolve(config))
  words = lambda x: ",".join(map(str, x)) if isinstance(x, list | tuple) else str(x)
  return [(name, words(flat[name]), "" if field.required else words(field.default),
           field.expected + "; or one for each block" * field.per_block, field.help)
          for name, field in fields_of(flat).items()]


def check(workdir: epath.Path, config: ml_collections.FrozenConfigDict):
  """Raises UserError if the workdir cannot be had or holds another experiment. Writes nothing."""
  paths.check_directory(workdir, "--workdir")
  with paths.reached(workdir, "--workdir"):
    exists = (workdir / "config.json").exists()
  if exists:
    differ = differences(binding(flatten(config)), binding(flatten(load(workdir))))
    if differ:
      raise UserError(f"{workdir} holds another experiment: {differ}; choose another --workdir "
                      "or the config that it was started with")


def save(workdir: epath.Path, config: ml_collections.FrozenConfigDict, files: Mapping[str, bytes]):
  """Writes workdir/config.json and other files, each whole or not at all.

  Raises:
    UserError: it cannot.
  """
  text = json.dumps(config.to_dict(), indent=2) + "\n"
  with paths.writing(workdir, "--workdir"):
    workdir.mkdir(parents=True, exist_ok=True)
    for name, content in {**files, "config.json": text.encode()}.items():  # that one last
      path = workdir / name
      if not path.exists() or path.read_bytes() != content:
        fresh = path.with_name(f"{name}.{os.getpid()}")
        fresh.write_bytes(content)
        fresh.replace(path)


def load(workdir: epath.Path) -> ml_collections.FrozenConfigDict:
  """The resolved config of the experiment in `workdir`.

  Fields that dbjax has gained since have their defaults.

  Raises:
    UserError: there is none, or it is damaged.
  """
  path = workdir / "config.json"
  with paths.reached(workdir, "--workdir"):
    if not path.exists():
      raise UserError(f"{path} does not exist: --workdir must name a directory that "
                      "dbjax.main has trained in")
    try:
      flat = flatten(dict(trust.read_json(path)))
    except (OSError, TypeError, ValueError) as e:
      raise UserError(f"{path} is damaged ({e}): restore it, or run dbjax.main with the "
                      "experiment's config in an empty --workdir") from None
  try:
    return unflatten(flat)
  except UserError as e:
    raise UserError(f"{path}: {e}") from None


def _locate(given: epath.PathLike) -> tuple[Path, str]:
  """The file and the variant that a name means."""
  known, file = shipped(), paths.expand(given, "--config")
  name = os.fspath(given)
  for name_of, variant in ((name, ""), name.rpartition(":")[::2]):
    if name_of in known:
      return known[name_of], variant
    path = Path(paths.expand(name_of, "--config")) if name_of else Path()
    if path.suffix == ".py" and path.is_file():
      return path, variant
  what = "is a directory" if file.is_dir() else "no such file" if (
      not file.exists()) else "its name does not end in .py"
  stem = Path(name.rpartition(":")[0] or name).stem
  raise UserError(f"--config={name}: {what}, and none of {', '.join(known)}"
                  + fields_lib.did_you_mean(stem, known))


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for name, value in flat.items():
    *parents, leaf = name.split(".")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = value
  return tree


def _fill_open(config):
  """Gives every open field what the size says, or else its default."""
  fields = fields_of(flatten(config))
  sizes = getattr(network_lib.find(config.model.network), "sizes", {})
  size = config.model.get("name", "")
  if size and size not in sizes:
    raise UserError(f"model.name={fields_lib.shown(size)}: expected one of {', '.join(sizes)}"
                    + fields_lib.did_you_mean(size, sizes))
  preset = {f"model.{name}": value for name, value in sizes.get(size, {}).items()}
  for name, field in fields.items():
    section, _, leaf = name.rpartition(".")
    node = config[section] if section else config
    if node[leaf] is not None:
      continue
    node[leaf] = preset.get(name, None if field.required else field.default)
    if node[leaf] is None:
      hint = f", or give a model.name with a size, such as {next(iter(sizes), None)}" * (
          section == "model" and bool(sizes))
      raise UserError(f"{name} is not set: expected {field.expected}{hint}")


def _fill_blocks(config):
  num_blocks, num_layers = config.num_blocks, config.model.num_layers
  if num_blocks > num_layers:
    raise UserError(f"num_blocks={num_blocks} is more than model.num_layers={num_layers}: "
                    "a block needs at least one layer")
  config.layers_per_block = _split(num_blocks, num_layers, tuple(config.layers_per_block))
  train = config.train
  wrong = [b for b in train.blocks if not 0 <= b < num_blocks]
  if wrong:
    raise UserError(f"train.blocks={wrong}: num_blocks={num_blocks} has blocks "
                    f"0 to {num_blocks - 1}")
  train.blocks = tuple(sorted(set(train.blocks))) or tuple(range(num_blocks))
  STEPS.check("sample.num_steps", config.sample.num_steps)
  config.sample.num_steps = config.sample.num_steps or num_blocks


def _fill_lists(config):
  """Checks lists of a value for each block; one of equal values is that value."""
  for name, field in fields_of(flatten(config)).items():
    section, _, leaf = name.rpartition(".")
    values = config[section][leaf] if field.per_block else None
    if isinstance(values, tuple):
      if len(values) != config.num_blocks:
        raise UserError(f"{name}={','.join(map(str, values))}: expected one value, or one for each "
                        f"of num_blocks={config.num_blocks}")
      if len(set(values)) == 1:
        config[section][leaf] = values[0]


def _check_lengths(config):
  """Raises UserError where the steps and the batch of a block cannot be divided as they are to."""
  o, train = config.optimizer, config.train
  if o.schedule == "wsd" and not 0 < o.decay_steps <= train.num_steps - o.warmup_steps:
    raise UserError(f"optimizer.decay_steps={o.decay_steps}: with optimizer.schedule=wsd expected "
                    "from 1 to train.num_steps - optimizer.warmup_steps="
                    f"{train.num_steps - o.warmup_steps}")
  if train.batch_size % train.accumulate:
    raise UserError(f"train.batch_size={train.batch_size} is not a multiple of "
                    f"train.accumulate={train.accumulate}")


def _check_decay(config):
  """Raises UserError where a decay is asked for that the learning rate's schedule does not have.

  Of a user's config alone: one that was trained with must stay one.
  """
  o = config.optimizer
  if o.schedule != "wsd" and o.decay_steps:
    steps = o.decay_steps if isinstance(o.decay_steps, tuple) else (o.decay_steps,)
    raise UserError(f"optimizer.decay_steps={','.join(map(str, steps))}: "
                    f"optimizer.schedule={o.schedule} has no use for it: set it to 0, or "
                    "optimizer.schedule=wsd")


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


def _check_optimizer(config):
  """Raises UserError where fields of the optimizer do not go together."""
  o = config.optimizer
  words, free = f"with optimizer.name={o.name}", o.name == "schedule_free"
  if free and o.schedule != "constant":
    raise UserError(f"optimizer.schedule={o.schedule}: {words} an average takes the place of a "
                    "falling rate: set optimizer.schedule=constant")
  if free and not o.b1:
    raise UserError(f"optimizer.b1=0: {words} expected above 0: it is the average's share")
  no_moment = free or o.name == "adafactor" and not o.b1
  if no_moment and o.moments_dtype != "float32":
    raise UserError(f"optimizer.moments_dtype={o.moments_dtype}: {words}"
                    f"{' and optimizer.b1=0' * (not free)} there is no first moment: set it to "
                    "float32")
  if o.name == "muon" and "layers" not in getattr(
      task_lib.make_task(config, 0).network, "parts", {}):
    raise UserError(f"optimizer.name=muon: model.network={config.model.network} does not say in "
                    "`parts` which of its parameters are the layers: see dbjax/network.py, or "
                    "choose another optimizer")


def _check_joint(config, joint: set[str], kinds: int):
  """Raises UserError where blocks, of so many kinds, could not train these parameters together."""
  t, layers = config.train, config.layers_per_block
  words = f"all blocks train {', '.join(sorted(joint))} as one"
  if t.turn != "together" or config.mesh.block != 1:
    raise UserError(f"train.turn={t.turn}, mesh.block={config.mesh.block}: {words}: set "
                    "train.turn=together and mesh.block=1")
  if config.checkpoint.best:
    raise UserError(f"checkpoint.best=True: {words}: their best checkpoints would be of several "
                    "steps, and of as many tables; set it to False")
  if len(t.blocks) < config.num_blocks:
    raise UserError(f"train.blocks={list(t.blocks)}: {words}: it must be all of them")
  if len(set(layers)) > 1:
    raise UserError(f"layers_per_block={list(layers)}: {words}: they must have equally many layers")
  if kinds > 1:
    name = task_lib.per_block(config)[0]
    raise UserError(f"{name} has a value for each block: {words}: they must have the same")
