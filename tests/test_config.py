"""A config is checked and completed before anything is compiled."""

import json
import runpy

from conftest import load_config
from conftest import ROOT
from etils import epath
import numpy as np
import pytest

from dbjax import block as block_lib
from dbjax import config as config_lib
from dbjax import lookup
from dbjax import status
from dbjax import task as task_lib
from dbjax.data import tokenizers
from dbjax.errors import UserError

NAMES = sorted(p.stem for p in (ROOT / "configs").glob("*.py"))


def _variants(name):
  """() and those that the file has, such as ("small",)."""
  code = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))
  return [(), *((variant,) for variant in code.get("VARIANTS", ()))]


def test_every_task_has_a_config():
  assert {load_config(name).task.name for name in NAMES} == set(lookup.modules("dbjax.tasks"))


@pytest.mark.parametrize("name, variant", [(n, v) for n in NAMES for v in _variants(n)])
def test_every_config_resolves(name, variant):
  config = config_lib.resolve(config_lib.read(":".join([name, *variant])))
  assert sum(config.layers_per_block) == config.model.num_layers
  fields = config_lib.fields_of(config_lib.flatten(config))
  assert config_lib.flatten(config).keys() == fields.keys()
  assert all(field.help for field in fields.values())  # for --describe
  if variant:  # smaller, of the same data
    whole = config_lib.resolve(config_lib.read(name))
    same = lambda c: {**c.data, "workers": 0}
    assert same(config) == same(whole)
    assert variant != ("small",) or config.model.width <= 64 < whole.model.width


@pytest.mark.parametrize("name", [n for n in NAMES if ("small",) in _variants(n)])
def test_a_variant_that_is_not_there(name):
  there = ", ".join(variant for (variant,) in filter(None, _variants(name)))
  told = f"{name}.py has no variant smal, only {there}; did you mean s"
  with pytest.raises(UserError, match=told):
    config_lib.read(f"{name}:smal")


@pytest.mark.parametrize("name", NAMES)
def test_a_built_in_tokenizer_is_as_the_config_has_it(name):
  data = load_config(name).data
  if data.get("tokenizer") in tokenizers.BUILT_IN:
    made = tokenizers.load(data.tokenizer)
    assert (data.vocab_size, data.eos) == (made.vocab_size, -1 if made.eos is None else made.eos)


@pytest.mark.parametrize("name", NAMES)
def test_the_optimizer_of_every_config(name):
  """Where the gradient stays the same, AdamW's second step is the rate."""
  config = config_lib.resolve(load_config(name, **{"optimizer.name": "adamw"}))
  o, weights = config.optimizer, dict(x=np.ones(2, np.float32))
  optimizer = block_lib.optimizer(task_lib.make_task(config, 0))
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
    ({"schedule.gamma": -0.1}, "schedule.gamma=-0.1: expected a finite number, 0 or more"),
    ({"schedule.sigma_min": 80.0}, "schedule.sigma_min=80"),
    ({"schedule.sigma_max": 0.001}, "schedule.sigma_max=0.001"),
    ({"schedule.partition": "equal"}, "schedule.partition='equal'"),
    ({"schedule.partition": "0.5"}, "num_blocks=3 needs 2"),
    ({"schedule.partition": "0.5,90"}, "between sigma_min=0.002 and sigma_max=80"),
    ({"train.blocks": (0, 3)}, "train.blocks=[3]"),
    ({"train.blocks": (0.5,)}, "train.blocks=(0.5,): expected whole numbers"),
    ({"train.accumulate": 3}, "train.batch_size=64 is not a multiple of train.accumulate=3"),
    ({"train.turn": "sometimes"}, "train.turn='sometimes': expected all, random, together or"),
    ({"model.name": "DiT-S/3"}, "model.name='DiT-S/3': expected one of"),
    ({"model.name": ""}, "model.num_layers is not set"),
    ({"seed": 2**32}, "seed=4294967296: expected a whole number, from 0 to 4294967295"),
    ({"sigma_data": float("nan")}, "sigma_data=nan: expected a finite number, above 0"),
    ({"model.mlp_ratio": 0.001}, "model.mlp_ratio=0.001"),
    ({"model.mlp_ratio": 0.01, "model.mlp": "swiglu"}, "model.mlp_ratio=0.01: leaves the MLP no"),
    ({"model.positions": "none"}, "model.positions=none: with model.rotary=none no token knows"),
    ({"model.width": 130}, "model.width=130"),
    ({"model.patch_size": 3}, "data.image_size=8 is not a multiple of model.patch_size=3"),
    ({"train.batch_size": 0}, "train.batch_size=0: expected a whole number, above 0"),
    ({"sample.solver": "rk4"}, "sample.solver='rk4': expected one of euler"),
])
def test_bad_values_name_the_field(override, message):
  """The same words from Python's values as from those of a command line."""
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
    ("kjv", {"model.mlp_ratio": 0.001}, "model.mlp_ratio=0.001: leaves the MLP no hidden feature"),
    ("kjv_recurrent", {"model.mlp_ratio": 0.001}, "model.mlp_ratio=0.001: leaves the MLP no"),
    ("cifar100", {"model.positions": "none"}, "model.positions=none: with model.rotary=none"),
    ("kjv", {"task.weight": "edm_batch_mean", "train.accumulate": 2},
     "train.accumulate=2: task.weight=edm_batch_mean is of a whole batch: set it to 1"),
    ("cifar100", {"task.weight": "edm_batch_mean", "train.accumulate": 2}, "train.accumulate=2: t"),
    ("kjv", {"model.width": 100}, "model.width=100 with model.num_heads=4: a head of text must"),
    ("gcide_masked", {"model.width": 100}, "model.width=100 with model.num_heads=4: a head of"),
    ("cifar100", {"task.embedding": "pmi"}, "task.embedding=pmi: labels keep no company"),
    ("digits_classify", {"task.crop": 8}, "task.crop=8: expected less than data.image_size=8"),
    ("cifar100", {"data.channels": 4}, "data.channels=4: task.rand_augment=2 needs 1 or 3"),
    ("kjv", {"task.iterations": 8},
     "task.iterations=8: there is no such config field of the task autoregressive"),
    ("kjv", {"task.name": "autoregresive"}, "task.name='autoregresive': expected one of auto"),
    ("kjv_recurrent", {"num_blocks": 2},
     "num_blocks=2: the task recurrent splits nothing, its core is one block: set num_blocks=1"),
    ("kjv_recurrent", {"model.num_layers": 2},
     "model.num_layers=2: model.prelude=1 and model.coda=1 leave the core no layer: set 3 or more"),
    ("kjv_recurrent", {"model.prelude": 3}, "model.prelude=3 and model.coda=1 leave the core no"),
    ("kjv", {"task.shared_embeddings": True},
     "train.turn=all, mesh.block=1: all blocks train table as one: set train.turn=together"),
    ("cifar100", {"task.shared_embeddings": True, "train.turn": "together", "mesh.block": 3},
     "train.turn=together, mesh.block=3: all blocks train table as one: set"),
    ("cifar100", {"task.shared_embeddings": True, "train.turn": "together",
                  "layers_per_block": (2, 4, 6)},
     "layers_per_block=[2, 4, 6]: all blocks train table as one: they must have equally many"),
    ("cifar100", {"task.shared_embeddings": True, "train.turn": "together",
                  "train.blocks": (0, 2)}, "train.blocks=[0, 2]: all blocks train table as one"),
])
def test_bad_values_of_a_task(name, override, message):
  flat = config_lib.flatten(load_config(name)) | override
  with pytest.raises(UserError) as error:
    config_lib.unflatten(flat)
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
  assert config_lib.resolve(config).train.turn == "all"  # its default
  with config.unlocked():
    del config.data.num_classes
  with pytest.raises(UserError, match="data.num_classes is not set: expected a whole number"):
    config_lib.resolve(config)


def test_a_named_size_sets_what_is_left_open():
  sizes = lambda c: [config_lib.resolve(c).model[k] for k in (
      "num_layers", "width", "num_heads", "patch_size")]
  assert sizes(load_config(**{"model.name": "DiT-B/4"})) == [12, 768, 12, 4]
  mixed = load_config(**{"model.name": "DiT-S/2", "model.num_layers": 3})
  assert sizes(mixed) == [3, 384, 6, 2]
  custom = {"model.num_layers": 6, "model.width": 128, "model.num_heads": 4, "model.patch_size": 2}
  same = load_config(**{"model.name": "", **custom})
  assert config_lib.binding(_flat(same)) == config_lib.binding(_flat(load_config()))


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("steps, words", [(5, "5"), ((0, 5, 2), "0,5,2")])
def test_a_decay_without_a_use_is_refused_but_read(schedule, steps, words):
  """A run that once had one goes on without it: no weight depends on it."""
  fields = {"optimizer.schedule": schedule, "optimizer.decay_steps": steps}
  with pytest.raises(UserError, match=f"^optimizer.decay_steps={words}: optimizer.schedule="
                                      f"{schedule} has no use for it: set it to 0, or .*=wsd"):
    config_lib.resolve(load_config(**fields))
  old = config_lib.unflatten(config_lib.flatten(load_config(**fields)))
  none = load_config(**fields | {"optimizer.decay_steps": 0})
  assert config_lib.flatten(old)["optimizer.decay_steps"] != 0
  assert config_lib.binding(config_lib.flatten(old)) == config_lib.binding(_flat(none))
  wsd = [config_lib.binding(_flat(load_config(**fields | {
      "optimizer.schedule": "wsd", "optimizer.decay_steps": n}))) for n in (5, 6)]
  assert wsd[0] != wsd[1]


def test_the_baseline_is_one_override():
  config = config_lib.resolve(load_config(**{
      "num_blocks": 1, "layers_per_block": (1, 2, 3), "schedule.partition": "0.5,0.18"}))
  assert config.layers_per_block == (6,)


def test_resolving_is_idempotent_and_survives_the_disk(tmp_path):
  config = config_lib.resolve(load_config())
  assert config_lib.resolve(config).to_dict() == config.to_dict()
  config_lib.save(epath.Path(tmp_path), config, {})
  assert config_lib.load(epath.Path(tmp_path)).to_dict() == config.to_dict()


def test_another_experiment_is_refused(tmp_path):
  workdir = epath.Path(tmp_path)
  config_lib.save(workdir, config_lib.resolve(load_config()), {})
  changed = {"optimizer.learning_rate": 0.5, "model.mlp_ratio": 2.0}
  other = config_lib.resolve(load_config(**changed))
  with pytest.raises(UserError, match="model.mlp_ratio=2.0 .* optimizer.learning_rate=0.5"):
    config_lib.check(workdir, other)
  free = config_lib.resolve(load_config(**{"train.blocks": (1,), "sample.guidance": 3.0}))
  config_lib.check(workdir, free)  # changes no weights, so it may change


@pytest.mark.parametrize("use", [
    lambda workdir: config_lib.check(workdir, None), config_lib.load, status.read])
def test_a_workdir_in_storage_that_refuses_is_one_line(storage, use):
  """As without the right to read: an error of gcsfs is no OSError."""
  storage.down = True
  with pytest.raises(UserError) as error:
    use(epath.Path("gs://bucket/w"))
  assert str(error.value).startswith(
      "--workdir=gs://bucket/w cannot be reached (Service Unavailable, 503): see whether")


def test_a_config_that_cannot_be_saved_in_storage_is_one_line(storage):
  config, storage.down = config_lib.resolve(load_config()), True
  with pytest.raises(UserError, match="w cannot be written .Service Unavailable, 503.: choose"):
    config_lib.save(epath.Path("gs://bucket/w"), config, {})


def test_a_damaged_config_file_is_named(tmp_path):
  for content in ('{"seed": 0, ', "3", "[1]", ""):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="config.json is damaged"):
      config_lib.load(epath.Path(tmp_path))
  (tmp_path / "config.json").write_text('{"seed": {"1": 2}, "task": 3}')
  with pytest.raises(UserError, match="config.json: task.name=None: expected one of"):
    config_lib.load(epath.Path(tmp_path))
  with pytest.raises(UserError, match="nowhere/config.json does not exist"):
    config_lib.load(epath.Path(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_frozen_has_the_shapes_that_its_task_says(name):
  config = load_config(name)
  if "vocab_size" in config.data:
    config.data.vocab_size = min(config.data.vocab_size, 50)
    config.data.eos = min(config.data.eos, 1)
  config = config_lib.resolve(config)
  task = task_lib.make_task(config, 0)
  shapes = lambda arrays: {k: (x.shape, x.dtype) for k, x in arrays.items()}
  assert shapes(task.frozen(config)) == shapes(task.abstract_frozen())


def _flat(config):
  return config_lib.flatten(config_lib.resolve(config))


def test_joint_fields_are_what_one_model_needs():
  base = config_lib.joint(_flat(load_config()))
  same = load_config(**{"optimizer.learning_rate": 0.5, "seed": 7, "model.remat": True})
  assert config_lib.joint(_flat(same)) == base
  for field, value in {"num_blocks": 2, "sigma_data": 0.5, "schedule.gamma": 0.1,
                       "model.mlp_ratio": 2.0, "data.num_classes": 11}.items():
    other = config_lib.joint(_flat(load_config(**{field: value})))
    assert field in config_lib.differences(base, other)
  of_text = [config_lib.joint(_flat(load_config("kjv", **{"task.likelihood": given})))
             for given in (True, False)]
  assert "task.likelihood" in config_lib.differences(*of_text)


def test_a_workdir_of_before_a_new_field_has_its_default(tmp_path):
  config = config_lib.resolve(load_config())
  tree = config.to_dict()
  del tree["train"]["ema_decay"], tree["data"]["workers"], tree["schedule"]["gamma"]
  (tmp_path / "config.json").write_text(json.dumps(tree))
  expected = config_lib.changed(config, **{"train.ema_decay": 0.999})  # of digits it is 0.995
  assert config_lib.load(epath.Path(tmp_path)) == expected


@pytest.mark.parametrize("field, value, words", [
    ("task.label_drop", 10**400, "expected a finite number, from 0 to 1"),
    ("task.name", ("image",), "expected one of"),
    ("task.name", 3, "expected one of"),
    ("model.network", 3, "expected a string"),
    ("data.name", 3, "expected digits"),
    ("train.num_steps", True, "expected a whole number"),
    ("train.num_steps", 1.0, "expected a whole number"),
    ("task.flip", 1, "expected True or False"),
    ("layers_per_block", 3, "expected whole numbers"),
    ("schedule", 3, "there is no such config field"),
    ("nothing.at_all", 3, "there is no such config field"),
])
def test_values_of_other_types_are_one_line(field, value, words):
  with pytest.raises(UserError) as error:
    config_lib.unflatten(config_lib.flatten(load_config()) | {field: value})
  assert str(error.value).startswith(field) and words in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("field, value, words", [
    ("train.num_steps", 10**400, "expected a whole number, above 0, at most 9.2e+18"),
    ("data.num_classes", 2**63, "expected a whole number, above 0, at most 9.2e+18"),
    ("layers_per_block", (10**30,), "expected whole numbers, at most 9.2e+18"),
    ("optimizer.learning_rate", 1e39, "expected a finite number, above 0, at most 3.4e+38"),
    ("sample.num_steps", 10**6 + 1, "expected a whole number, from 0 to 1000000"),
    *[(field, value, "expected") for field in ("task.name", "model.network", "data.name")
      for value in (("image",), 3, True, {"a": 1}, 10**20, "", "\n")],
    ("task.name", None, "expected one of"),
])
def test_values_that_are_too_large_or_no_names_are_one_line(field, value, words):
  """As they are, in a ConfigDict, and as an override."""
  flat = config_lib.flatten(load_config()) | {field: value}
  for call in (lambda: config_lib.unflatten(flat),
               lambda: config_lib.resolve(config_lib.read("digits", {field: value}))):
    with pytest.raises(UserError) as error:
      call()
    message = str(error.value)
    assert message.startswith(field) and words in message
    assert "\n" not in message and len(message) < 300


@pytest.mark.parametrize("content, words", [
    ("VARIANTS = [3]", "mine.py: VARIANTS=[3]: expected a dict, such as"),
    ("VARIANTS = {'quick': 3}", "mine.py: the variant quick is 3: expected a dict"),
    ("VARIANTS = {1: {}}", "mine.py has no variant quick, only 1"),
    ("VARIANTS = {'quik': {}}", "mine.py has no variant quick, only quik; did you mean quik?"),
    ("VARIANTS = {'quick': {'train': {'num_step': 3}}}",
     "train.num_step=3: there is no such config field of the task image; did you mean "
     "train.num_steps? (in "),
    ("VARIANTS = {'quick': {'seed': 1.5}}", "seed=1.5: expected a whole number, from 0 to"),
    ("VARIANTS = {'quick': {'seed': {'a': 1}}}", "seed.a=1: there is no such config field"),
    ("get_config = 3", "mine.py has no function get_config"),
    ("import sys\nsys.exit('enough')", "mine.py, line {}: SystemExit: enough"),
    ("quit()", "mine.py, line {}: SystemExit"),
    ("def get_config(a, b): ...", "mine.py: TypeError: get_config() missing"),
    ("VARIANTS = dict(quick={})\ndef get_config(): raise KeyError('x')",
     "mine.py, line {}: KeyError: 'x'"),
    ("import mine_that_fails", "mine_that_fails.py, line 2: ZeroDivisionError"),
    ("x = '\0'", "mine.py: SyntaxError: source code string cannot contain null bytes"),
    ("x = '\udce4'", "mine.py, line {}: SyntaxError"),
])
def test_a_file_and_its_variants_fail_in_one_line(tmp_path, content, words):
  own = (ROOT / "configs/digits.py").read_text() + "\n"
  (tmp_path / "mine.py").write_bytes((own + content).encode(errors="surrogateescape"))
  (tmp_path / "mine_that_fails.py").write_text("x = 1\ny = x / 0")
  with pytest.raises(UserError) as error:
    config_lib.read(f"{tmp_path / 'mine.py'}:quick")
  lines = (own + content).count("\n") + 1
  assert words.format(lines) in str(error.value) or words.format(lines - 1) in str(error.value)
  assert "\n" not in str(error.value) and "site-packages" not in str(error.value)
  assert str(tmp_path) in str(error.value)


def test_a_variant_changes_what_it_says(tmp_path):
  """Whole numbers in the place of others, tuples, and fields that the config does not have."""
  (tmp_path / "mine.py").write_text(
      (ROOT / "configs/digits.py").read_text()
      + "\nVARIANTS = {'quick': {'train': {'num_steps': 3, 'blocks': (1,)}, 'sigma_data': 1}}")
  whole, quick = (config_lib.flatten(config_lib.read(f"{tmp_path / 'mine.py'}{variant}"))
                  for variant in ("", ":quick"))
  assert {k: v for k, v in quick.items() if v != whole[k]} == {
      "train.num_steps": 3, "train.blocks": [1], "sigma_data": 1}


def test_what_is_no_file_says_what_it_is(tmp_path):
  (tmp_path / "folder.py").mkdir()
  (tmp_path / "mine.txt").write_text("")
  for name, words in [("folder.py", "is a directory"), ("mine.txt", "does not end in .py"),
                      ("none.py", "no such file")]:
    with pytest.raises(UserError, match=f"--config=.*{name}: .*{words}, and none of cifar10"):
      config_lib.read(tmp_path / name)


@pytest.mark.parametrize("content, words", [
    ("x = 1", "has no function get_config"),
    ("def get_config():\n  return 3", "returns int, expected a ConfigDict"),
    ("def get_config():\n  return 1 / 0", "mine.py, line 2: ZeroDivisionError"),
    ("def get_config(:", "mine.py, line 1: SyntaxError"),
    ("import nothing_of_this_name", "mine.py, line 1: ModuleNotFoundError"),
])
def test_a_file_that_fails_says_where(tmp_path, content, words):
  path = tmp_path / "mine.py"
  path.write_text(content)
  with pytest.raises(UserError) as error:
    config_lib.read(path)
  assert words in str(error.value) and "\n" not in str(error.value)


def test_a_file_may_import_its_neighbour_and_have_variants(tmp_path):
  (tmp_path / "neighbour_of_mine.py").write_text("STEPS = 7")
  (tmp_path / "mine.py").write_text(
      "import ml_collections\nfrom neighbour_of_mine import STEPS\n"
      "def get_config(variant=''):\n"
      "  return ml_collections.ConfigDict(dict(task=dict(name='image'), seed=len(variant), "
      "data=dict(image_size=8, num_classes=10), model=dict(name='DiT-Ti/2'), "
      "train=dict(num_steps=STEPS)))")
  config = config_lib.read(f"{tmp_path / 'mine.py'}:abc", {"train.batch_size": "16"})
  assert (config.train.num_steps, config.seed, config.train.batch_size) == (7, 3, 16)
  (tmp_path / "other.py").write_text(
      (tmp_path / "mine.py").read_text().replace("variant=''", "").replace("len(variant)", "2")
      + "\nVARIANTS = {'quick': {'train': {'num_steps': 2}}}")
  config = config_lib.read(f"{tmp_path / 'other.py'}:quick")
  assert (config.train.num_steps, config.seed) == (2, 2)
  with pytest.raises(UserError, match="digits_classify.py has no variant small, nor any other"):
    config_lib.read("digits_classify:small")
  with pytest.raises(UserError, match="no such file, and none of cifar10.*did you mean digits"):
    config_lib.read("digit")


def test_another_network_or_task_leaves_out_what_it_does_not_have():
  config = config_lib.read("digits", {
      "task.name": "classify", "model.num_layers": 6, "model.width": 16, "model.num_heads": 2,
      "model.patch_size": 2})
  assert "label_drop" not in config.task and config.model.network == "dbjax.models.vit:ViT"
  assert config.data.name == "digits" and config.train.num_steps == 1500


def test_every_field_is_described():
  rows = {row[0]: row for row in config_lib.describe(load_config())}
  assert rows["train.num_steps"] == (
      "train.num_steps", "1500", "1000", "a whole number, above 0; or one for each block",
      "optimizer steps of each block")
  assert rows["model.width"][1:3] == ("128", "")  # by the size; it has no default
