"""Blocks from machines that never met, made one model."""

import shutil

import chex
from conftest import random_workdir
from conftest import states_of
from etils import epath
import jax
import numpy as np
import pytest

from dbjax import assemble
from dbjax import begin
from dbjax import checkpoint
from dbjax import config as config_lib
from dbjax import loading
from dbjax import loop
from dbjax.errors import UserError
from dbjax.tasks import image

pytestmark = pytest.mark.usefixtures("steps_once")


def test_fields_in_which_blocks_were_trained_otherwise_become_lists(tiny):
  config = lambda **fields: config_lib.resolve(tiny(**fields))
  merged = assemble._merged({
      0: config(**{"train.blocks": (0,)}), 1: config(**{"train.num_steps": (6, 4, 5)}),
      2: config(**{"train.num_steps": 9, "optimizer.learning_rate": 0.5})})
  rate = config().optimizer.learning_rate
  assert merged == config(**{"train.num_steps": (6, 4, 9),
                             "optimizer.learning_rate": (rate, rate, 0.5)})
  wsd = config(**{"optimizer.schedule": "wsd", "optimizer.decay_steps": 4})
  assert assemble._merged({0: wsd, 1: config(**{"train.num_steps": 3}), 2: wsd}) == wsd


@pytest.fixture
def machine(tiny, tmp_path):
  """machine("name", blocks, ...) trains those blocks in a workdir of their own."""

  def run(name, *blocks, **overrides):
    config = config_lib.resolve(tiny(**{
        "train.blocks": blocks, "checkpoint.every_steps": 6, **overrides}))
    loop.train(config, tmp_path / name, devices=jax.devices()[:1])
    return tmp_path / name

  return run


def _samples(workdir):
  return loading.load(workdir).sample(8)[0]


@pytest.mark.slow
def test_assembled_samples_are_those_of_the_run_that_trained_all(machine, tmp_path):
  """Block 0 as a workdir; 1 and 2 as single directories that travelled without their workdir."""
  together = machine("together", 0, 1, 2)
  one, two = machine("one", 0), machine("two", 1, 2)
  for b in ("block_01", "block_02"):
    shutil.copytree(two / b, tmp_path / "mail" / b)
  shutil.rmtree(two)
  assemble.assemble([one, tmp_path / "mail/block_01", tmp_path / "mail/block_02"],
                    tmp_path / "joint")
  shutil.rmtree(one)
  np.testing.assert_array_equal(_samples(tmp_path / "joint"), _samples(together))


def test_an_assembled_model_can_be_trained_further(machine, tmp_path):
  straight = machine("straight", 0, 1, 2, **{"train.num_steps": 6})
  assemble.assemble([machine("one", 0), machine("two", 1, 2)], tmp_path / "joint")
  machine("joint", 0, 1, 2)
  np.testing.assert_array_equal(_samples(tmp_path / "joint"), _samples(straight))


def test_a_block_is_held_to_its_own_value_of_a_list(tiny, tmp_path):
  """What others have in a list does not bind it; what no list can say, such as a seed, does."""
  config = lambda rate, **more: config_lib.resolve(tiny(**{
      "num_blocks": 2, "model.num_layers": 2, "optimizer.schedule": "constant",
      "optimizer.learning_rate": rate, **more}))

  def check(name, now, then, block):
    random_workdir(tmp_path / name, then)
    with checkpoint.BlockCheckpoint(tmp_path / name, block) as saved:
      meta = saved.meta()
      begin._check_saved(saved, now, meta["checksum"]["frozen"], meta["trained_with"])

  both = config((1e-3, 3e-4))
  check("one", both, config(1e-3), 0)
  check("two", both, config(3e-4), 1)
  check("lists", both, config((2e-3, 3e-4)), 1)
  for name, then, words in [
      ("rate", config((1e-3, 2e-4)), "optimizer.learning_rate=0.0003 .here. against 0.0002"),
      ("seed", config(3e-4, seed=5), "seed=0 .here. against 5"),
      ("width", config(3e-4, **{"model.width": (32, 16)}), "model.width=16 .here. against .32, 16")
  ]:
    with pytest.raises(UserError, match=f"block_01 belongs to another experiment: {words}"):
      check(name, both, then, 1)


@pytest.mark.slow
def test_blocks_of_other_rates_can_be_trained_further(machine, tmp_path):
  """Each as it would have gone on alone; the joint run has what both were trained with."""
  rates, length = {0: 1e-3, 1: 3e-4}, {"optimizer.schedule": "constant", "num_blocks": 2,
                                       "model.num_layers": 2}
  train = lambda name, *blocks, rate, num_steps: machine(name, *blocks, **length, **{
      "optimizer.learning_rate": rate, "train.num_steps": num_steps})
  assemble.assemble([train(f"{b}", b, rate=rates[b], num_steps=4) for b in rates],
                    tmp_path / "joint")
  joint = train("joint", 0, 1, rate=tuple(rates.values()), num_steps=6)
  for b, rate in rates.items():
    alone = train(f"{b}", b, rate=rate, num_steps=6)
    got, expected = (states_of(config_lib.load(where), where, (b,)) for where in (joint, alone))
    assert got[b].step == 6
    chex.assert_trees_all_equal(got, expected)


@pytest.mark.slow
def test_blocks_may_differ_in_the_dtype_of_their_moments(machine, tmp_path, capsys):
  halved = machine("halved", 1, 2, **{"optimizer.moments_dtype": "bfloat16"})
  assemble.assemble([machine("full", 0), halved], tmp_path / "joint")
  assert "optimizer.moments_dtype=float32 (here) against bfloat16" in capsys.readouterr().out
  config = config_lib.load(epath.Path(halved))
  joint, alone = (states_of(config, where, (2,)) for where in (tmp_path / "joint", halved))
  chex.assert_trees_all_equal(joint, alone)


@pytest.mark.slow
def test_what_does_not_belong_together_is_refused(machine, tmp_path):
  one, out = machine("one", 0), tmp_path / "out"
  for sources, message in [
      ([one], "of the 3 blocks 1,2 are missing: train them with --config.train.blocks=1,2"),
      ([one, machine("twin", 0, 1)], "block 0 is in .*one/block_00 and in .*twin/block_00"),
      ([one, machine("wide", 1, 2, **{"model.width": 32})],
       "not of one model: model.width=16 .here. against 32 .there."),
      ([one, machine("four", 3, **{"num_blocks": 4, "model.num_layers": 4})], "num_blocks=3 .here"),
      ([tmp_path / "nowhere"], "nowhere: there is no such directory"),
      ([tmp_path], "holds no block: expected a --workdir"),
  ]:
    with pytest.raises(UserError, match=message):
      assemble.assemble(sources, out)
    assert not out.exists()
  with pytest.raises(UserError, match="one exists: choose another"):
    assemble.assemble([one], one)


def test_a_damaged_block_leaves_nothing_behind(machine, tmp_path):
  one, two = machine("one", 0), machine("two", 1, 2)
  for path in (two / "block_02").rglob("ocdbt.process_0/d/*"):
    path.write_bytes(b"")
  with pytest.raises(UserError, match="block_02/6/.* cannot be read"):
    assemble.assemble([one, two], tmp_path / "out")
  assert not (tmp_path / "out").exists()


def _tokenizer(config, workdir):
  """As `data.text.files`, of a data set that is not here."""
  path = workdir / "tokenizer.model"
  if not path.exists():
    raise UserError(f"data.name={config.data.name}: not found")
  return {path.name: path.read_bytes()}


def test_a_model_of_text_keeps_its_tokenizer(machine, tmp_path, monkeypatch, capsys):
  """From whichever workdir has it. Without it the model is whole, and one line says what is not."""
  one, two = machine("one", 0), machine("two", 1, 2)
  monkeypatch.setattr(image.ImageTask, "files", _tokenizer)
  assemble.assemble([one, two], tmp_path / "mute")
  assert "came with none of these blocks: data.name=digits: not f" in capsys.readouterr().out
  assert not (tmp_path / "mute/tokenizer.model").exists()
  (two / "tokenizer.model").write_bytes(b"pieces")
  assemble.assemble([one, two / "block_01", two / "block_02"], tmp_path / "joint")
  assert (tmp_path / "joint/tokenizer.model").read_bytes() == b"pieces"
  assert "note" not in capsys.readouterr().out


@pytest.mark.nightly
def test_blocks_of_other_seeds_may_join(machine, tmp_path, capsys):
  assemble.assemble([machine("one", 0), machine("two", 1, 2, seed=5)], tmp_path / "joint")
  assert "were trained with seed=0 (here) against 5 (there)" in capsys.readouterr().out
  assert _samples(tmp_path / "joint").shape == (8, 8, 8, 1)


def test_the_command(machine, command, tmp_path):
  done = command("assemble", f"--out={tmp_path / 'out'}", machine("all", 0, 1, 2))
  assert done.returncode == 0 and "holds all blocks" in done.stdout
  failed = command("assemble", f"--out={tmp_path / 'out2'}")
  assert failed.returncode == 2 and failed.stderr.startswith("error: no workdir or block")
