"""Checkpoints: a block on its own, whole or refused."""

import json
import os
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dbjax
from dbjax import block as block_lib
from dbjax import checkpoint
from dbjax import config as config_lib
from dbjax import program
from dbjax import sharding
from dbjax import task as task_lib
from dbjax.errors import UserError

WITH = dict(dbjax=dbjax.__version__, code={}, data=7)  # what blocks are trained with, here


@pytest.fixture
def saved(tiny, tmp_path):
  """Block 2, saved at steps 3 and 5 in tmp_path: (config, state, template)."""
  config = config_lib.resolve(tiny())
  task = task_lib.make_task(config, 2)
  state = jax.device_get(block_lib.init(task, 2))
  rng = np.random.default_rng(0)
  state = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), state)
  with checkpoint.BlockCheckpoint(tmp_path, 2, keep=2) as blocks:
    for step in (3, 5):
      state = state.replace(step=np.int32(step))
      blocks.save(state, config, seconds=1.5, checksums=checkpoint.examine(state)[1],
                  trained_with=WITH)
  return config, state, block_lib.abstract_state(task)


def test_a_state_comes_back_bit_equal(saved, tmp_path):
  config, state, template = saved
  with checkpoint.BlockCheckpoint(tmp_path, 2) as blocks:
    assert blocks.latest() == 5
    meta = blocks.meta(config)
    restored = blocks.restore(template, meta)
    chex.assert_trees_all_equal(blocks.restore_ema(template.ema, meta), state.ema)
  chex.assert_trees_all_equal(restored, state)
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  assert (meta["block"], meta["step"], meta["seconds"]) == (2, 5, 1.5)


def test_moments_in_bfloat16_come_back_on_any_mesh_and_damage_to_them_is_found(tiny, tmp_path):
  config = config_lib.resolve(tiny(**{"optimizer.moments_dtype": "bfloat16", "mesh.fsdp": 2}))
  task, rng = task_lib.make_task(config, 2), np.random.default_rng(0)
  mesh = sharding.make_mesh(config, jax.devices()[:2])
  spread = program.abstract_state(task, sharding.row(mesh, (2,), 2))
  state = jax.tree.map(lambda x: jax.device_put(
      rng.normal(size=x.shape).astype(x.dtype), x.sharding), spread).replace(step=jnp.int32(3))
  assert any(x.dtype == jnp.bfloat16 and not x.sharding.is_fully_replicated
             for x in jax.tree.leaves(state.opt_state))
  with checkpoint.BlockCheckpoint(tmp_path, 2) as blocks:
    blocks.save(state, config, seconds=0.0, checksums=checkpoint.examine(state)[1],
                trained_with=WITH)
    blocks.wait()
    meta = blocks.meta(config)
    for template in (spread, block_lib.abstract_state(task)):
      chex.assert_trees_all_equal(blocks.restore(template, meta), state)
    theirs = block_lib.abstract_state(task_lib.make_task(config_lib.changed(
        config, **{"optimizer.moments_dtype": "float32"}), 2))
    with pytest.raises(UserError, match="opt_state: .*mu.* is bfloat16.*, expected <f4"):
      blocks.restore(theirs, meta)
    for victim in (tmp_path / "block_02/3/opt_state/ocdbt.process_0/d").iterdir():
      _flip(victim)
    with pytest.raises(UserError, match="block_02/3/opt_state cannot be read"):
      blocks.restore(block_lib.abstract_state(task), meta)


def test_a_block_holds_nothing_of_another(saved, tmp_path):
  config, state, _ = saved
  assert [p.name for p in tmp_path.iterdir()] == ["block_02"]
  stored = json.loads((tmp_path / "block_02/5/meta/metadata").read_text())
  assert stored["config"] == json.loads(json.dumps(config_lib.flatten(config)))
  bytes_on_disk = sum(p.stat().st_size for p in (tmp_path / "block_02/5").rglob("*") if p.is_file())
  bytes_of_block = sum(x.nbytes for x in jax.tree.leaves(state))
  assert bytes_on_disk < 1.5 * bytes_of_block + 60_000  # Orbax's own metadata


def test_a_missing_block_says_how_to_train_it(saved, tmp_path):
  with checkpoint.BlockCheckpoint(tmp_path, 1) as blocks, pytest.raises(UserError) as error:
    blocks.meta()
  assert "block_01 has no checkpoint" in str(error.value)
  assert "--config.train.blocks=1" in str(error.value)
  assert not (tmp_path / "block_01").exists()


def _flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0x55
  path.write_bytes(bytes(content))


@pytest.mark.parametrize("item", ["params", "ema", "opt_state"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_any_damage_is_found_and_named(saved, tmp_path, item, damage):
  _, _, template = saved
  files = sorted((tmp_path / f"block_02/5/{item}/ocdbt.process_0/d").iterdir(),
                 key=lambda p: p.stat().st_size)
  victim = files[-1]
  if damage == "flip":
    _flip(victim)
  elif damage == "truncate":
    os.truncate(victim, victim.stat().st_size // 2)
  else:
    victim.unlink()
  with checkpoint.BlockCheckpoint(tmp_path, 2) as blocks, pytest.raises(UserError) as error:
    blocks.restore(template, blocks.meta())
  message = str(error.value)
  assert f"block_02/5/{item} cannot be read, it may be damaged" in message
  assert "\n" not in message
  assert "goes on from step 3" in message


def test_a_checkpoint_that_disagrees_with_its_checksum_is_refused(saved, tmp_path):
  _, _, template = saved
  path = tmp_path / "block_02/5/meta/metadata"
  meta = json.loads(path.read_text())
  meta["checksum"]["ema"] ^= 1
  path.write_text(json.dumps(meta))
  with checkpoint.BlockCheckpoint(tmp_path, 2) as blocks:
    with pytest.raises(UserError, match="5/ema cannot be read.*its checksum is wrong"):
      blocks.restore_ema(template.ema, blocks.meta())


def test_after_the_advice_is_followed_the_step_before_is_used(saved, tmp_path):
  shutil.rmtree(tmp_path / "block_02/5")
  with checkpoint.BlockCheckpoint(tmp_path, 2) as blocks:
    assert blocks.restore(saved[2], blocks.meta()).step == 3


def test_a_block_of_another_model_is_refused(saved, tmp_path, tiny):
  theirs = config_lib.resolve(tiny(sigma_data=0.1))
  with checkpoint.BlockCheckpoint(tmp_path, 2) as blocks:
    with pytest.raises(UserError, match="experiment: sigma_data=0.1 .here. against 0.75"):
      blocks.meta(theirs)


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"block": 2}'])
def test_a_damaged_meta_is_one_line_too(saved, tmp_path, content):
  (tmp_path / "block_02/5/meta/metadata").write_text(content)
  with checkpoint.BlockCheckpoint(tmp_path, 2) as blocks:
    with pytest.raises(UserError, match="block_02/5/meta cannot be read"):
      blocks.meta()


def test_a_renamed_block_is_refused(saved, tmp_path):
  """Block order is a trap: block 2 under the name of block 0 would denoise the wrong noise."""
  shutil.move(tmp_path / "block_02", tmp_path / "block_00")
  with checkpoint.BlockCheckpoint(tmp_path, 0) as blocks:
    with pytest.raises(UserError, match="block_00/5 holds block 2, step 5"):
      blocks.restore(saved[2], blocks.meta())


def test_a_network_of_another_width_is_refused(saved, tmp_path, tiny):
  config = config_lib.resolve(tiny(**{"model.width": 32}))
  template = block_lib.abstract_state(task_lib.make_task(config, 2))
  with checkpoint.BlockCheckpoint(tmp_path, 2) as blocks:
    with pytest.raises(UserError, match="params"):
      blocks.restore(template, blocks.meta())


def test_a_block_of_another_seed_is_not_trained_further(saved, tmp_path, tiny):
  theirs = config_lib.resolve(tiny(seed=5))
  with checkpoint.BlockCheckpoint(tmp_path, 2) as blocks:
    with pytest.raises(UserError, match="another experiment: seed=5 .here. against 0"):
      blocks.meta(theirs, config_lib.binding)
    blocks.meta(theirs)  # but may be used beside the others


def test_a_save_that_failed_says_so_though_what_it_left_cannot_be_removed(tmp_path, monkeypatch):
  """As while gs:// is out: the save is tried again for SaveFailed alone."""
  def refuse(*_):
    raise RuntimeError("503")

  saved = checkpoint.BlockCheckpoint(tmp_path, 0)
  saved._failed = checkpoint.SaveFailed("no room")
  monkeypatch.setattr(checkpoint.BlockCheckpoint, "_remove_torn", refuse)
  with pytest.raises(checkpoint.SaveFailed, match="no room"):
    saved.wait()
