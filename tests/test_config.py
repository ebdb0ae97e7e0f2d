"""A config is checked and completed before anything is compiled."""

from conftest import load_config
from conftest import ROOT
from etils import epath
import pytest

from dbjax import config as config_lib
from dbjax.cli import UserError

NAMES = sorted(p.stem for p in (ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("name, variant", [
    *((name, ()) for name in NAMES), *((name, ("small",)) for name in NAMES if name != "digits")])
def test_every_config_resolves(name, variant):
  config = config_lib.resolve(config_lib.read(ROOT / "configs" / f"{name}.py", *variant))
  assert sum(config.layers_per_block) == config.model.num_layers
  fields = config_lib.COMMON | config_lib.TASKS[config.task.name]
  assert config_lib.flatten(config).keys() == fields.keys()


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
