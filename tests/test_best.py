"""The checkpoint of least loss on held-out data stays beside the last one."""

import json

import chex
from conftest import distance
from conftest import states_of
import jax
import numpy as np
import pytest

from dbjax import block as block_lib
from dbjax import checkpoint
from dbjax import config as config_lib
from dbjax import data
from dbjax import loading
from dbjax import loop
from dbjax import task as task_lib
from dbjax.errors import UserError

pytestmark = pytest.mark.usefixtures("steps_once")

# So high a rate that losses rise again.
FIELDS = {"optimizer.learning_rate": 0.3, "checkpoint.every_steps": 1, "num_blocks": 3,
          "train.blocks": (1, 2), "optimizer.schedule": "constant", "train.ema_decay": 0.0}


def _losses(config, workdir, block):
  """{step: the loss that is recorded}."""
  with checkpoint.BlockCheckpoint(workdir, block) as saved:
    return {step: saved.meta(step=step)["held_out"] for step in saved._steps()}


@pytest.mark.slow
def test_the_least_held_out_loss_is_kept_and_is_what_it_says(tiny, tmp_path):
  config = config_lib.resolve(tiny(**FIELDS, **{"checkpoint.best": True, "checkpoint.keep": 100}))
  loop.train(config, tmp_path / "all", devices=jax.devices()[:1])
  kept = config_lib.changed(config, **{"checkpoint.keep": 1})
  loop.train(kept, tmp_path / "best", devices=jax.devices()[:1])
  every = {b: _losses(config, tmp_path / "all", b) for b in (1, 2)}
  best = {b: min(losses, key=losses.get) for b, losses in every.items()}
  assert any(step < 6 for step in best.values())
  for b in (1, 2):
    assert _losses(kept, tmp_path / "best", b) == {
        step: every[b][step] for step in sorted({best[b], 6})}

  plain = config_lib.changed(config, **{"checkpoint.best": False, "mesh.block": 2})
  loop.train(plain, tmp_path / "plain", devices=jax.devices()[:2])
  chex.assert_trees_all_close(*(states_of(config, tmp_path / name, (1, 2))
                                for name in ("all", "plain")), rtol=1e-4, atol=1e-5)

  task, held_out = task_lib.make_task(config, 2), data.load(config).held_out
  state = states_of(config, tmp_path / "all", (2,))[2]
  interval = task.make_schedule(config).training_interval(2)
  def loss(number, batch):
    key = block_lib.block_key(config.seed, 2, number, block_lib.EVALUATE)
    return task.loss(state.ema, task.draw(key, batch, interval))
  by_hand = [jax.jit(loss)(number, held_out.take(np.arange(first, first + 8) % len(held_out)))
             for number, first in enumerate(range(0, len(held_out), 8))]
  np.testing.assert_allclose(every[2][6], np.mean(by_hand), rtol=1e-5)


def test_a_model_is_loaded_at_each_blocks_best(tiny, tmp_path):
  config = config_lib.resolve(tiny(**FIELDS | {
      "train.blocks": (), "checkpoint.best": True, "checkpoint.keep": 1}))
  loop.train(config, tmp_path, devices=jax.devices()[:1])
  model = loading.load(tmp_path, best=True)
  for b, step in enumerate(model.steps):
    with checkpoint.BlockCheckpoint(tmp_path, b) as saved:
      assert step == saved.best()
      losses = _losses(config, tmp_path, b)
      assert losses[step] == min(losses.values())
  last = loading.load(tmp_path)
  assert set(last.steps) == {6} and min(model.steps) < 6
  b = int(np.argmin(model.steps))
  assert distance(model.params[b], last.params[b]) > 1e-3


class Damaged(data.Arrays):
  """Examples of which some cannot be read, once it is `on`."""

  on = False

  def take(self, index):
    if self.on:
      raise UserError("record 7 is damaged")
    return super().take(index)


def test_damaged_held_out_data_do_not_keep_a_block_from_being_saved(
    tiny, tmp_path, capsys, monkeypatch):
  config = config_lib.resolve(tiny(**FIELDS | {
      "checkpoint.best": True, "checkpoint.keep": 100, "train.num_steps": 2, "train.blocks": (1,)}))
  whole = data.load(config)
  held_out = Damaged(**whole.held_out.take(np.arange(20)))
  save = loop._save
  monkeypatch.setattr(loop, "_save", lambda run, *args, **kwargs: (  # at the second save
      setattr(held_out, "on", run.steps[1] == 2), save(run, *args, **kwargs)))
  loop.train(config, tmp_path, data.Dataset(whole.train, held_out), devices=jax.devices()[:1])
  assert "note: saved without a loss on held-out data (record 7 is dam" in capsys.readouterr().out
  with checkpoint.BlockCheckpoint(tmp_path, 1) as saved:
    assert (saved.latest(), saved.best()) == (2, 1)


def test_the_best_is_kept_when_losses_are_no_longer_asked_for(tiny, tmp_path):
  asked = config_lib.resolve(tiny(**FIELDS | {
      "train.blocks": (1,), "checkpoint.keep": 1, "checkpoint.best": True, "train.num_steps": 2}))
  loop.train(asked, tmp_path, devices=jax.devices()[:1])
  with checkpoint.BlockCheckpoint(tmp_path, 1) as saved:
    best = saved.best()
  loop.train(config_lib.changed(asked, **{"checkpoint.best": False, "train.num_steps": 4}),
             tmp_path, devices=jax.devices()[:1])
  with checkpoint.BlockCheckpoint(tmp_path, 1) as saved:
    assert saved._steps() == [best, 4]


def test_what_is_not_finite_is_not_the_best(tiny, tmp_path):
  config = config_lib.resolve(tiny(**FIELDS | {"checkpoint.best": True, "train.num_steps": 3}))
  loop.train(config, tmp_path, devices=jax.devices()[:1])
  first = next(iter(_losses(config, tmp_path, 1)))
  path = tmp_path / f"block_01/{first}/meta/metadata"
  meta = json.loads(path.read_text())
  path.write_text(json.dumps(meta | dict(held_out=float("nan"))))
  with checkpoint.BlockCheckpoint(tmp_path, 1) as saved:
    assert saved.best() not in (None, first)


def test_without_held_out_losses_there_is_no_best(tiny, tmp_path):
  loop.train(tiny(**{"train.num_steps": 1}), tmp_path, devices=jax.devices()[:1])
  with pytest.raises(UserError, match="block_00 has no checkpoint whose loss .*checkpoint.best=Tr"):
    loading.load(tmp_path, best=True)
  with pytest.raises(UserError, match="step=1: expected 0 with best=True"):
    loading.load(tmp_path, step=1, best=True)


@pytest.mark.slow
def test_blocks_side_by_side_are_judged_as_alone(tiny, tmp_path):
  losses = {}
  for name, devices in (("alone", 1), ("mesh", 4)):
    config = config_lib.resolve(tiny(**FIELDS, **{
        "checkpoint.best": True, "mesh.block": 2 if devices > 1 else 1, "train.num_steps": 1}))
    loop.train(config, tmp_path / name, devices=jax.devices()[:devices])
    losses[name] = [_losses(config, tmp_path / name, b)[1] for b in (1, 2)]
  np.testing.assert_allclose(losses["mesh"], losses["alone"], rtol=1e-4)
