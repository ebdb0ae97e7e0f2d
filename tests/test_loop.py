"""The invariant: block b after n steps is a pure function of (config, b, n)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types

import chex
from conftest import BIT_EQUAL
from conftest import random_workdir
from conftest import ROOT
from conftest import states_of
from etils import epath
import jax
import numpy as np
import pytest

from dbjax import block as block_lib
from dbjax import config as config_lib
from dbjax import loop
from dbjax import task as task_lib
from dbjax.errors import UserError
from dbjax.tasks import image

pytestmark = pytest.mark.usefixtures("steps_once")


def _train(config, workdir):
  return loop.train(config, workdir, devices=jax.devices()[:1])


@pytest.fixture
def trained(tiny, tmp_path):
  """trained(**overrides): the states after training, in a workdir that is kept by name."""

  def run(name="run", **overrides):
    config = config_lib.resolve(tiny(**overrides))
    _train(config, tmp_path / name)
    return states_of(config, tmp_path / name, config.train.blocks)

  return run


@pytest.mark.parametrize("size, words", [(3, "of 1 layer in 0 s"), (1, "of 3 layers in 0 s")])
def test_layers_are_counted_in_good_english(tiny, monkeypatch, capsys, size, words):
  task = task_lib.make_task(config_lib.resolve(tiny(num_blocks=size)), 0)
  compiled = types.SimpleNamespace(memory_analysis=lambda: types.SimpleNamespace(
      alias_size_in_bytes=0, temp_size_in_bytes=0))
  monkeypatch.setattr(loop.program, "compile_step", lambda *_: compiled)
  loop._compile(None, task, 1, False)
  assert f"compiled the step {words} | " in capsys.readouterr().out


def test_turns_change_nothing(trained, tmp_path):
  """Bit-equal: all at a stretch, turns of 1, 4 (which divides nothing) and random ones."""
  once = {"checkpoint.every_steps": 6}
  reference = trained("all", **{"train.turn": "all"})
  for turn in ("1", "4", "random"):
    chex.assert_trees_all_equal(trained(turn, **once, **{"train.turn": turn}), reference)
  alone = trained("alone", **once, **{"train.blocks": (1,)})
  assert not (tmp_path / "alone/block_00").exists()
  chex.assert_trees_all_equal(alone[1], reference[1])
  others = trained("alone", **once, **{"train.blocks": (0, 2)})  # the same workdir, another day
  chex.assert_trees_all_equal({**alone, **others}, reference)


def test_uneven_blocks_are_independent_too(trained):
  uneven = {"num_blocks": 2, "layers_per_block": (1, 2), "checkpoint.every_steps": 6}
  together = trained("together", **uneven, **{"train.turn": "random"})
  alone = trained("alone", **uneven, **{"train.blocks": (1,)})
  chex.assert_trees_all_equal(together[1], alone[1])


def test_the_end_to_end_baseline_is_one_block(trained):
  states = trained(**{"num_blocks": 1})
  assert states[0].step == 6
  assert states[0].params["stack"]["layers"]["modulation"]["bias"].shape[0] == 3


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_stopped_and_resumed_is_bit_equal(trained, tiny, tmp_path, monkeypatch, capsys, dtype):
  """Stopped after 5 steps of turns of 2, so blocks stand at 2, 2, 1; then run again."""
  moments = {"optimizer.moments_dtype": dtype}
  reference = trained("uninterrupted", **{"checkpoint.every_steps": 6, **moments})
  assert dtype in {x.dtype.name for x in jax.tree.leaves(reference[0].opt_state)}
  before = loop.metrics.Progress.add

  def add(self, *args):
    before(self, *args)
    add.count += 1
    if add.count == 5:
      os.kill(os.getpid(), signal.SIGTERM)

  add.count = 0
  monkeypatch.setattr(loop.metrics.Progress, "add", add)
  config = config_lib.resolve(tiny(**{"train.turn": "2", **moments}))
  assert _train(config, tmp_path / "stopped").stopped == signal.SIGTERM
  assert [int(s.step) for s in states_of(config, tmp_path / "stopped").values()] == [2, 2, 1]
  assert "stopped and saved" in capsys.readouterr().out
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  _train(config, tmp_path / "stopped")
  assert "block 2 | resumes from step 1 in" in capsys.readouterr().out
  chex.assert_trees_all_equal(states_of(config, tmp_path / "stopped"), reference)


def test_killed_without_warning_is_bit_equal(trained, tiny, tmp_path):
  """SIGKILL in another process, somewhere after its first checkpoint; then resumed here."""
  overrides = {"train.turn": "3", "train.num_steps": 20, "checkpoint.every_steps": 5}
  reference = trained("uninterrupted", **overrides | {"checkpoint.every_steps": 20})
  config = config_lib.resolve(tiny(**overrides))
  flags = [f"--config.{k}={v}" for k, v in config_lib.flatten(tiny(**overrides)).items()
           if v is not None and not isinstance(v, list)]
  process = subprocess.Popen(
      [sys.executable, "-m", "dbjax.main", "--config=configs/digits.py",
       f"--workdir={tmp_path / 'killed'}", *flags],
      cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, "XLA_FLAGS": BIT_EQUAL})
  deadline = time.time() + 120
  complete = lambda b: any(p.name.isdecimal() for p in (tmp_path / f"killed/block_0{b}").glob("*"))
  while not (complete(0) and complete(1)):
    assert process.poll() is None and time.time() < deadline
    time.sleep(0.01)
  process.kill()
  assert process.wait() == -signal.SIGKILL
  assert sum(int(s.step) for s in states_of(config, tmp_path / "killed", (0,)).values()) < 20
  _train(config, tmp_path / "killed")
  chex.assert_trees_all_equal(states_of(config, tmp_path / "killed"), reference)


def test_a_finished_run_is_left_alone(trained, tmp_path, capsys):
  first = trained()
  written = lambda: {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("[0-9]*/*/*")}
  before = written()
  capsys.readouterr()
  chex.assert_trees_all_equal(trained(), first)
  assert before and written() == before
  assert "loss" not in capsys.readouterr().out


def test_progress_reaches_console_jsonl_and_tensorboard(trained, tmp_path, capsys):
  trained(**{"sample.every_steps": 6})
  lines = [line for line in capsys.readouterr().out.splitlines() if "| loss" in line]
  assert len(lines) == 9  # three blocks, every second step of six
  assert lines[0].startswith("block 0 | step      2/6 | loss ") and "examples/s | left" in lines[0]
  records = [json.loads(line) for line in
             (tmp_path / "run/block_01/metrics.jsonl").read_text().splitlines()]
  assert [r["step"] for r in records] == [2, 4, 6]
  assert all(np.isfinite(list(r.values())).all() and r["examples_per_s"] > 0 for r in records)
  events = b"".join(p.read_bytes() for p in (tmp_path / "run/block_01").glob("events*"))
  assert b"loss" in events and b"examples_per_s" in events
  assert [p.name for p in (tmp_path / "run/samples").iterdir()] == ["block_02_step_000006.png"]


def test_samples_that_cannot_be_saved_end_no_run(tiny, tmp_path, monkeypatch, capsys):
  """Those of a task that saves none, and of a full disk."""
  config, shown = config_lib.resolve(tiny()), []
  random_workdir(tmp_path, config)
  run = types.SimpleNamespace(config=config, workdir=epath.Path(tmp_path), saved={}, debug=False,
                              progress=types.SimpleNamespace(show=lambda *x: shown.append(x)))
  monkeypatch.setattr(loop, "_SHOWN", 2)
  with monkeypatch.context() as patch:
    patch.setattr(image.ImageTask, "save", task_lib.Task.save)
    loop._picture(run, (0,), None, blocks=(0,), step=2)
  assert not shown and not capsys.readouterr().out
  (tmp_path / "samples/block_00_step_000002.png").mkdir()
  loop._picture(run, (0,), None, blocks=(0,), step=2)
  assert not shown and "note: no samples (" in capsys.readouterr().out


@pytest.mark.parametrize("turn, expected", [
    ("all", [(0, 6), (2, 6)]), ("together", [(0, 6), (2, 6)]),
    ("4", [(0, 4), (2, 4), (0, 6), (2, 6)])])
def test_the_order_of_turns(tiny, turn, expected):
  config = config_lib.resolve(tiny(**{"train.turn": turn}))
  steps, seen = {0: 0, 2: 0}, []
  for (b,), until in loop.turns(config, [(0,), (2,)], steps):
    seen.append((b, until))
    steps[b] = until
  assert seen == expected


def test_random_turns_are_fair_and_resume_where_they_were(tiny):
  config = config_lib.resolve(tiny(**{"train.turn": "random", "train.num_steps": 300}))

  def run(steps, limit):
    for _, ((b,), until) in zip(range(limit), loop.turns(config, [(0,), (1,), (2,)], steps)):
      yield b
      steps[b] = until

  steps = dict.fromkeys(range(3), 0)
  straight = list(run(steps, 600))
  assert all(150 < straight.count(b) < 250 for b in range(3))
  steps = dict.fromkeys(range(3), 0)
  halves = list(run(steps, 250))
  assert halves + list(run(steps, 350)) == straight


def test_only_the_active_block_is_on_the_device(tiny, tmp_path, monkeypatch):
  """While a block trains, the device holds its state, a batch and scalars; no other block's."""
  config = config_lib.resolve(tiny(**{"train.turn": "1"}))
  task = task_lib.make_task(config, 0)
  one = sum(np.dtype(x.dtype).itemsize * x.size
            for x in jax.tree.leaves(block_lib.abstract_state(task)))
  before = {id(x) for x in jax.live_arrays()}
  held, add = [], loop.metrics.Progress.add

  def measure(self, *args):
    held.append(sum(x.nbytes for x in jax.live_arrays()
                    if id(x) not in before and x.sharding.memory_kind == "device"))
    add(self, *args)

  monkeypatch.setattr(loop.metrics.Progress, "add", measure)
  _train(config, tmp_path)
  assert len(held) == 18
  assert one <= max(held) < 1.2 * one


@pytest.mark.slow
def test_where_one_block_diverges_another_goes_on_with_its_own_batches(tiny, trained, tmp_path,
                                                                       monkeypatch):
  """Block 0 begins at step 4 and waits; block 1, at step 0, is lost at step 2."""
  fields = {"optimizer.schedule": "constant", "train.turn": "together"}
  alone = trained("alone", **fields, **{"train.blocks": (0,)})
  trained("run", **fields, **{"train.blocks": (0,), "train.num_steps": 4})
  examine = loop.checkpoint.examine

  def lose(state):
    good, sums = examine(state)
    return good & (state.step != 2), sums

  monkeypatch.setattr(loop.checkpoint, "examine", lose)
  with pytest.raises(UserError, match="block 1 has diverged by step 2"):
    trained("run", **fields, **{"train.blocks": (0, 1)})
  found = states_of(config_lib.resolve(tiny(**fields)), tmp_path / "run", (0,))
  chex.assert_trees_all_close(found, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stop_at", [None, 3])
def test_a_block_that_diverges_keeps_its_last_checkpoint(tiny, tmp_path, monkeypatch, stop_at):
  """From step 3 on its weights are nan: neither the next save nor a stop may store them."""
  config = config_lib.resolve(tiny(**{"train.blocks": (1,), "checkpoint.keep": 1}))
  compile_step = loop.program.compile_step

  def compile_diverging(*args):
    step = compile_step(*args)

    def diverge(state, *args):
      bad = int(state.step[0]) == 2
      state, metrics = step(state, *args)
      if bad and stop_at:
        os.kill(os.getpid(), signal.SIGTERM)
      if bad:
        state = state.replace(params=jax.tree.map(lambda x: x * np.nan, state.params))
      return state, metrics

    diverge.memory_analysis = step.memory_analysis
    return diverge

  monkeypatch.setattr(loop.program, "compile_step", compile_diverging)
  with pytest.raises(UserError, match="block 1 has diverged by step .*step 2, is kept"):
    _train(config, tmp_path)
  state = states_of(config, tmp_path, (1,))[1]
  assert state.step == 2
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_a_copied_block_of_another_seed_is_refused(trained, tiny, tmp_path):
  trained("one")
  config = config_lib.resolve(tiny(seed=1, **{"train.blocks": (0,)}))
  shutil.copytree(tmp_path / "one/block_00", tmp_path / "two/block_00")
  with pytest.raises(UserError, match="two/block_00 belongs to another experiment: seed=1"):
    _train(config, tmp_path / "two")
  assert not (tmp_path / "two/config.json").exists()
