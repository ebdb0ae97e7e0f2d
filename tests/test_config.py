"""A config is checked and completed before anything is compiled."""

import functools
import inspect
import runpy

from conftest import load_config
from conftest import ROOT
from etils import epath
import jax
import numpy as np
import pytest

from dbjax import block as block_lib
from dbjax import config as config_lib
from dbjax import schedule as schedule_lib
from dbjax import tasks
from dbjax.data import tokenizers
from dbjax.errors import UserError

NAMES = sorted(p.stem for p in (ROOT / "configs").glob("*.py"))


def _variants(name):
  """() and, where the file has it, ("small",)."""
  get_config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]
  return [(), ("small",)] if inspect.signature(get_config).parameters else [()]


def test_every_task_has_a_config():
  assert {load_config(name).task.name for name in NAMES} == config_lib.TASKS.keys()


@pytest.mark.parametrize("name, variant", [(n, v) for n in NAMES for v in _variants(n)])
def test_every_config_resolves(name, variant):
  config = config_lib.resolve(config_lib.read(ROOT / "configs" / f"{name}.py", *variant))
  assert sum(config.layers_per_block) == config.model.num_layers
  fields = config_lib.COMMON | config_lib.TASKS[config.task.name]
  assert config_lib.flatten(config).keys() == fields.keys()
  if variant:  # smaller, of the same data
    whole = config_lib.resolve(config_lib.read(ROOT / "configs" / f"{name}.py"))
    same = lambda c: {**c.data, "workers": 0}
    assert same(config) == same(whole)
    assert config.model.width <= 64 < whole.model.width


@pytest.mark.parametrize("name", [n for n in NAMES if _variants(n) != [()]])
def test_a_variant_that_is_not_there(name):
  with pytest.raises(ValueError, match="'large': there is only the variant small"):
    config_lib.read(ROOT / "configs" / f"{name}.py", "large")


@pytest.mark.parametrize("name", NAMES)
def test_a_built_in_tokenizer_is_as_the_config_has_it(name):
  data = load_config(name).data
  if data.get("tokenizer") in tokenizers.BUILT_IN:
    made = tokenizers.load(data.tokenizer)
    assert (data.vocab_size, data.eos) == (made.vocab_size, -1 if made.eos is None else made.eos)


@functools.cache
def _step_of(task):
  """A compiled step, with the optimizer of digits: many configs are one program when shrunk."""
  config = config_lib.resolve(load_config())
  return config, jax.jit(functools.partial(block_lib.train_step, config, task))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_every_config(name):
  whole = config_lib.resolve(load_config(name))
  d, flat = whole.data, config_lib.flatten(whole)
  recurrent = whole.task.name == "recurrent"
  shrunk = {
      "layers_per_block": (), "model.num_layers": 3 if recurrent else whole.num_blocks,
      "model.prelude": 1, "model.coda": 1, "task.iterations": 2, "task.backprop": 1,
      "model.width": 16, "model.num_heads": 2, "model.embedding_width": 16, "model.patch_size": 2,
      "model.unroll": 1, "model.remat": False, "model.dtype": "float32",
      "data.image_size": 4, "data.num_classes": 10, "data.length": 8, "data.eos": 1,
      "data.vocab_size": min(50, d.get("vocab_size", 50))}
  config = config_lib.unflatten(flat | {k: v for k, v in shrunk.items() if k in flat})
  task, rng = tasks.make_task(config, 0), np.random.default_rng(0)
  assert task.network.num_layers == (3 if recurrent else 1)

  tops = dict(image=256, label=10, tokens=shrunk["data.vocab_size"])
  batch = {k: rng.integers(0, tops[k], x.shape).astype(x.dtype)
           for k, x in task.abstract_batch(8).items()}
  shared = tasks.module(config).shared(config, None)
  assert jax.tree.map(np.shape, shared) == jax.tree.map(lambda x: x.shape, task.abstract_shared())
  interval = schedule_lib.make_schedule(whole.schedule, whole.num_blocks).training_interval(0)
  compiled, step = _step_of(task)
  state = jax.tree.map(lambda x: 0.1 * rng.random(x.shape).astype(x.dtype),
                       block_lib.abstract_state(compiled, task))
  state, metrics = step(state, batch, 0, interval, shared)
  assert state.step == 1
  assert np.isfinite(metrics["loss"]) and 0 < metrics["grad_norm"] < np.inf

  # Its own optimizer: where the gradient stays the same, AdamW's second step is the rate.
  o, weights = whole.optimizer, dict(x=np.ones(2, np.float32))
  optimizer = block_lib.optimizer(whole)
  _, opt_state = optimizer.update(weights, optimizer.init(weights), weights)
  moved, _ = optimizer.update(weights, opt_state, weights)
  rate = o.learning_rate / max(o.warmup_steps, 1)
  np.testing.assert_allclose(moved["x"], -rate * (1 + o.weight_decay), rtol=1e-3)


@pytest.mark.parametrize("override, message", [
    ({"num_blocks": 7}, "num_blocks=7 is more than model.num_layers=6"),
    ({"num_blocks": 4}, "model.num_layers=6 does not divide into num_blocks=4"),
    ({"layers_per_block": (2, 2, 3)}, "layers_per_block=(2, 2, 3) sums to 7"),
    ({"layers_per_block": (3, 3)}, "layers_per_block=(3, 3)"),
    ({"layers_per_block": (3, 3, 0)}, "layers_per_block=(3, 3, 0)"),
    ({"schedule.gamma": -0.1}, "schedule.gamma=-0.1"),
    ({"schedule.sigma_min": 80.0}, "schedule.sigma_min=80"),
    ({"schedule.sigma_max": 0.001}, "schedule.sigma_max=0.001"),
    ({"schedule.partition": "equal"}, "schedule.partition='equal'"),
    ({"schedule.partition": "0.5"}, "num_blocks=3 needs 2"),
    ({"schedule.partition": "0.5,90"}, "between sigma_min=0.002 and sigma_max=80"),
    ({"train.blocks": (0, 3)}, "train.blocks=[3]"),
    ({"train.blocks": (0.5,)}, "train.blocks=[0.5]"),
    ({"train.accumulate": 3}, "train.batch_size=64 is not a multiple of train.accumulate=3"),
    ({"train.turn": "sometimes"}, "train.turn='sometimes': expected all, random, together or"),
    ({"model.name": "DiT-S/3"}, "model.name='DiT-S/3': expected one of"),
    ({"model.name": "DiT"}, "model.num_layers is not set"),
    ({"seed": 2**32}, "seed=4294967296: expected a whole number, from 0 to 2**32 - 1"),
    ({"sigma_data": float("nan")}, "sigma_data=nan: expected a finite number, above 0"),
    ({"model.mlp_ratio": 0.001}, "model.mlp_ratio=0.001"),
    ({"model.width": 130}, "model.width=130"),
    ({"model.patch_size": 3}, "data.image_size=8 is not a multiple of model.patch_size=3"),
    ({"train.batch_size": 0}, "train.batch_size=0: expected a whole number, above 0"),
    ({"sample.solver": "rk4"}, "sample.solver='rk4': expected one of euler"),
])
def test_bad_values_name_the_field(override, message):
  with pytest.raises(UserError) as error:
    config_lib.resolve(load_config(**override))
  assert message in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, override, message", [
    ("gcide_masked", {"sample.guidance": 2.0},
     "sample.guidance=2.0: there is no such config field of the task masked"),
    ("gcide_masked", {"sigma_data": 0.5},
     "sigma_data=0.5: there is no such config field of the task masked"),
    ("cifar10", {"task.end_to_end": True},
     "task.end_to_end=True: there is no such config field of the task image"),
    ("cifar10", {"sample.temperature": 1.0},
     "sample.temperature=1.0: there is no such config field of the task image"),
    ("cifar100", {"sample.answer": "first"},
     "sample.answer='first': expected one of mean, last"),
    ("kjv", {"sample.solver": "heun"}, "sample.solver='heun': expected one of ancestral, euler"),
    ("kjv", {"model.width": 100}, "model.width=100 with model.num_heads=4: a head of text must"),
    ("gcide_masked", {"model.width": 100}, "model.width=100 with model.num_heads=4: a head of"),
    ("cifar100", {"task.embedding": "pmi"}, "task.embedding=pmi: labels keep no company"),
    ("cifar100", {"data.channels": 4}, "data.channels=4: task.rand_augment=2 needs 1 or 3"),
    ("kjv", {"task.iterations": 8},
     "task.iterations=8: there is no such config field of the task autoregressive"),
    ("kjv", {"task.name": "autoregresive"}, "task.name='autoregresive': expected one of image,"),
    ("kjv_recurrent", {"num_blocks": 2},
     "num_blocks=2: the task recurrent splits nothing, its core is one block: set num_blocks=1"),
    ("kjv_recurrent", {"model.num_layers": 2},
     "model.num_layers=2: model.prelude=1 and model.coda=1 leave the core no layer: set 3 or more"),
    ("kjv_recurrent", {"model.prelude": 3}, "model.prelude=3 and model.coda=1 leave the core no"),
    ("kjv", {"task.shared_embeddings": True},
     "task.shared_embeddings=True with train.turn=all, mesh.block=1"),
    ("cifar100", {"task.shared_embeddings": True, "train.turn": "together", "mesh.block": 3},
     "task.shared_embeddings=True with train.turn=together, mesh.block=3"),
    ("cifar100", {"task.shared_embeddings": True, "train.turn": "together",
                  "layers_per_block": (2, 4, 6)}, "with equally many layers each"),
    ("cifar100", {"task.shared_embeddings": True, "train.turn": "together",
                  "train.blocks": (0, 2)}, "so train.blocks must be all of them"),
])
def test_bad_values_of_a_task(name, override, message):
  config = load_config(name)
  with config.unlocked():
    for field, value in override.items():
      *parents, leaf = field.split(".")
      functools.reduce(getattr, parents, config)[leaf] = value
  with pytest.raises(UserError) as error:
    config_lib.resolve(config)
  assert message in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["cifar100", "kjv", "kjv_recurrent"])
def test_end_to_end_is_one_block(name):
  config = config_lib.resolve(load_config(name, **{"task.end_to_end": True}))
  assert config.num_blocks == 1
  assert config.layers_per_block == (config.model.num_layers,)
  assert config.train.blocks == (0,)


@pytest.mark.parametrize("name", ["cifar100", "kjv"])
def test_blocks_that_learn_one_table_train_together(name):
  shared = {"task.shared_embeddings": True, "train.turn": "together"}
  assert config_lib.resolve(load_config(name, **shared)).num_blocks > 1
  # One block shares with nobody.
  alone = {"task.shared_embeddings": True, "task.end_to_end": True, "train.turn": "all"}
  config_lib.resolve(load_config(name, **alone))


def test_misspelt_and_missing_fields_in_a_file():
  config = load_config()
  with config.unlocked():
    config.train.num_step = 10
  with pytest.raises(UserError, match="train.num_step=10.*did you mean train.num_steps"):
    config_lib.resolve(config)
  config = load_config()
  with config.unlocked():
    del config.train.turn
  with pytest.raises(UserError, match="train.turn is missing"):
    config_lib.resolve(config)


def test_a_named_size_sets_what_is_left_open():
  sizes = lambda c: [config_lib.resolve(c).model[k] for k in (
      "num_layers", "width", "num_heads", "patch_size")]
  assert sizes(load_config(**{"model.name": "DiT-B/4"})) == [12, 768, 12, 4]
  mixed = load_config(**{"model.name": "DiT-S/2", "model.num_layers": 3})
  assert sizes(mixed) == [3, 384, 6, 2]
  custom = dict(zip(config_lib.SIZE_FIELDS, (6, 128, 4, 2)))
  same = load_config(**{"model.name": "DiT", **custom})
  assert config_lib.binding(_flat(same)) == config_lib.binding(_flat(load_config()))


def test_the_baseline_is_one_override():
  config = config_lib.resolve(load_config(**{
      "num_blocks": 1, "layers_per_block": (1, 2, 3), "schedule.partition": "0.5,0.18"}))
  assert config.layers_per_block == (6,)


def test_resolving_is_idempotent_and_survives_the_disk(tmp_path):
  config = config_lib.resolve(load_config())
  assert config_lib.resolve(config).to_dict() == config.to_dict()
  config_lib.save(epath.Path(tmp_path), config)
  assert config_lib.load(epath.Path(tmp_path)).to_dict() == config.to_dict()


def test_another_experiment_is_refused(tmp_path):
  workdir = epath.Path(tmp_path)
  config_lib.save(workdir, config_lib.resolve(load_config()))
  changed = {"optimizer.learning_rate": 0.5, "model.mlp_ratio": 2.0}
  other = config_lib.resolve(load_config(**changed))
  with pytest.raises(UserError, match="model.mlp_ratio=2.0 .* optimizer.learning_rate=0.5"):
    config_lib.check(workdir, other)
  free = config_lib.resolve(load_config(**{"train.blocks": (1,), "sample.guidance": 3.0}))
  config_lib.check(workdir, free)  # changes no weights, so it may change


def test_a_damaged_config_file_is_named(tmp_path):
  for content in ('{"seed": 0, ', "3", "[1]", ""):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="config.json is damaged"):
      config_lib.load(epath.Path(tmp_path))
  with pytest.raises(UserError, match="nowhere/config.json does not exist"):
    config_lib.load(epath.Path(tmp_path / "nowhere"))


def _flat(config):
  return config_lib.flatten(config_lib.resolve(config))


def test_the_fingerprint_is_what_the_joint_model_needs():
  base = config_lib.fingerprint(_flat(load_config()))
  same = load_config(**{"optimizer.learning_rate": 0.5, "seed": 7, "model.remat": True})
  assert config_lib.fingerprint(_flat(same)) == base
  for field, value in {"num_blocks": 2, "sigma_data": 0.5, "schedule.gamma": 0.1,
                       "model.mlp_ratio": 2.0, "data.num_classes": 11}.items():
    other = config_lib.fingerprint(_flat(load_config(**{field: value})))
    assert field in config_lib.differences(base, other)
  of_text = [config_lib.fingerprint(_flat(load_config("kjv", **{"task.likelihood": given})))
             for given in (True, False)]
  assert "task.likelihood" in config_lib.differences(*of_text)
