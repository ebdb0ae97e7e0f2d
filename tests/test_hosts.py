"""Several processes, as on several hosts: gloo over localhost, one CPU device each.

DBJAX_KILLS=50 kills one of two more often than the suite has time for.
"""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading

import chex
from conftest import BIT_EQUAL
from conftest import ROOT
from conftest import states_of
import jax
import numpy as np
import pytest

from dbjax import block as block_lib
from dbjax import checkpoint
from dbjax import config as config_lib
from dbjax import loop
from dbjax import owner
from dbjax import task as task_lib
from dbjax import watch

FIELDS = {"num_blocks": 2, "model.num_layers": 2}
KILLS = int(os.environ.get("DBJAX_KILLS", "2"))
pytestmark = pytest.mark.usefixtures("steps_once")


# A fault that a process does to itself: before the step of that number, counted over both blocks.
FAULT = """
import itertools, os, runpy, signal, sys, time
import dbjax, jax
from dbjax import checkpoint, data, loop, provenance
from dbjax.errors import UserError

def before_step(number, act):
  steps, next_batch = itertools.count(), loop._next_batch
  def next_batch_or_fault(*args):
    if next(steps) == number:
      act()
    return next_batch(*args)

  loop._next_batch = next_batch_or_fault

def fail(*_, **__):
  raise UserError("record 7 is damaged")

{}
runpy.run_module("dbjax.main", run_name="__main__", alter_sys=True)
"""
KILL = "before_step(5, lambda: (os.kill(os.getppid(), signal.SIGKILL), time.sleep(99)))"


@pytest.fixture
def hosts(tiny, tmp_path):
  """hosts(2, "name", {fields}, {fields}): runs dbjax.main so on each; [(exit code, stderr)].

  `faults`: {process: Python code}, what goes wrong in it. `devices`: of each process. `kill`:
  (process, seconds), when it is killed with -9, counted from the start.
  """

  def run(count, name, *fields, faults=(), devices=1, kill=None):
    with socket.socket() as s:
      s.bind(("localhost", 0))
      address = f"localhost:{s.getsockname()[1]}"
    started = []
    for i in range(count):
      config = tiny(**FIELDS | fields[i % len(fields)])
      flags = [f"--config.{k}={v}" for k, v in config_lib.flatten(config).items()
               if v is not None and not isinstance(v, list)]
      how = ["-c", FAULT.format(faults[i])] if i in faults else ["-m", "dbjax.main"]
      started.append(subprocess.Popen(
          [sys.executable, *how, "--distributed", "--config=configs/digits.py",
           f"--workdir={tmp_path / name}", *flags],
          cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
          env={**os.environ, "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count),
               "JAX_PROCESS_ID": str(i),
               "XLA_FLAGS": BIT_EQUAL
                            + f" --xla_force_host_platform_device_count={devices}"}))
    if kill:
      threading.Timer(kill[1], started[kill[0]].kill).start()  # in vain, where it has ended
    return [(p.returncode, err) for p in started for _, err in [p.communicate(timeout=300)]]

  return run


def _params(config, workdir):
  params = []
  for b in range(2):
    template = block_lib.abstract_state(task_lib.make_task(config, b))
    with checkpoint.BlockCheckpoint(workdir, b) as saved:
      state = saved.restore(template, saved.meta())
    assert state.step == config.train.num_steps
    params.append(np.concatenate([x.ravel() for x in jax.tree.leaves(state.params)]))
  return params


@pytest.fixture
def reference(tiny, tmp_path):
  config = config_lib.resolve(tiny(**FIELDS))
  loop.train(config, tmp_path / "alone", devices=jax.devices()[:1])
  return config, _params(config, tmp_path / "alone")


def test_two_processes_with_a_block_each_are_bit_equal_to_one(hosts, reference, tmp_path):
  config, expected = reference
  assert [code for code, _ in hosts(2, "two", {"mesh.block": 2})] == [0, 0]
  np.testing.assert_array_equal(_params(config, tmp_path / "two"), expected)


@pytest.mark.slow  # in parts: the test above, the one below, and the meshes of test_sharding.py
def test_four_processes_equal_one_and_move_to_one(hosts, reference, tmp_path):
  """Two rows of two: each block is written by two processes, and read by one."""
  config, expected = reference
  fields = {"mesh.block": 2, "mesh.fsdp": 2}
  assert [code for code, _ in hosts(4, "four", fields)] == [0] * 4
  for ours, theirs in zip(_params(config, tmp_path / "four"), expected):
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)
  for b in range(2):  # goes on from step 4
    with checkpoint.BlockCheckpoint(tmp_path / "four", b) as saved:
      assert saved.latest() == 6
    shutil.rmtree(tmp_path / f"four/block_0{b}/6")
  loop.train(config, tmp_path / "four", devices=jax.devices()[:1])
  for ours, theirs in zip(_params(config, tmp_path / "four"), expected):
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


@pytest.mark.slow  # in parts: the test of two processes, and those of test_records.py
def test_two_processes_read_records_as_one_does(hosts, tiny, tmp_path, array_records):
  """Each its part of every batch of a TFDS data set; stopped at step 4, ended by one process.

  A block's weights are spread over both: written by two processes, and read by one.
  """
  fields = {"data.name": "mini", "data.dir": str(array_records), "data.image_size": 16,
            "data.channels": 3, "sigma_data": 0.58, "model.patch_size": 8, "train.batch_size": 8}
  config = config_lib.resolve(tiny(**FIELDS | fields))
  loop.train(config, tmp_path / "one", devices=jax.devices()[:1])
  assert [code for code, _ in hosts(2, "two", fields | {"mesh.fsdp": 2})] == [0, 0]
  for ours, theirs in zip(_params(config, tmp_path / "two"), _params(config, tmp_path / "one")):
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)
  for b in range(2):
    shutil.rmtree(tmp_path / f"two/block_0{b}/6")
  loop.train(config, tmp_path / "two", devices=jax.devices()[:1])
  for ours, theirs in zip(_params(config, tmp_path / "two"), _params(config, tmp_path / "one")):
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


def test_processes_with_different_configs_are_refused(hosts, tmp_path):
  for code, err in hosts(2, "differ", {}, {"train.batch_size": 16}):
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(lines) == 1
    assert "differ in train.batch_size=16 (process 1) against 8 (process 0)" in lines[0]
  assert not (tmp_path / "differ").exists()


def _names(end, process, *words):
  """Whether a process has ended with the one line that says that another is lost."""
  code, err = end
  assert code == watch.EXIT_CODE and err.count("\n") == 1, (code, err)
  assert re.match(rf"error: process {process} of 2 \(host \S+, pid \d+\) ", err), err
  for word in (*words, "the same command goes on from the last checkpoints in "):
    assert word in err


@pytest.mark.slow  # tests/test_watch.py has it without JAX
def test_when_process_0_is_killed_the_other_says_so(hosts, tmp_path):
  """JAX's own service dies with it: without the watch, the other ends with a C++ stack trace."""
  ends = hosts(2, "run", {"mesh.fsdp": 2}, faults={0: KILL})
  assert ends[0] == (-9, "")
  _names(ends[1], 0, "was killed")
  assert not (tmp_path / "run/.alive").exists()


@pytest.mark.nightly  # repeats the one of random moments, and says who was lost
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("fields", [{"mesh.block": 2}, {"mesh.fsdp": 2}], ids=["block", "fsdp"])
def test_after_a_loss_the_same_command_goes_on_to_the_same_result(hosts, tmp_path, lost, fields):
  assert [code for code, _ in hosts(2, "whole", fields)] == [0, 0]
  ends = hosts(2, "run", fields, faults={lost: KILL})
  _names(ends[1 - lost], lost, "was killed")
  assert any((tmp_path / "run").glob("block_0*/owner.json"))  # nobody has tidied up
  assert hosts(2, "run", fields) == [(0, ""), (0, "")]
  ours, theirs = (states_of(config_lib.load(tmp_path / name), tmp_path / name, (0, 1))
                  for name in ("run", "whole"))
  chex.assert_trees_all_equal(ours, theirs)


@pytest.mark.nightly  # tests/test_watch.py has it without JAX
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("fault", [
    "data.load = fail", "before_step(3, fail)", "checkpoint.BlockCheckpoint.save = fail"])
def test_an_error_of_one_process_ends_the_others(hosts, lost, fault):
  ends = hosts(2, "run", {"mesh.fsdp": 2}, faults={lost: fault})
  assert ends[lost] == (2, "error: record 7 is damaged\n")
  _names(ends[1 - lost], lost, "ended with an error, to be mended first (record 7 is damaged)")


@pytest.mark.slow
@pytest.mark.parametrize("fields", [
    {"mesh.fsdp": 2}, pytest.param({"mesh.block": 2}, marks=pytest.mark.nightly)])
def test_held_out_data_damaged_for_one_process_do_not_end_the_run(hosts, reference, tmp_path,
                                                                  fields):
  config, expected = reference
  damaged = """
opened = loop._open
def _open(*args):
  run = opened(*args)
  run.dataset.held_out.take = fail
  return run
loop._open = _open"""
  ends = hosts(2, "run", fields | {"checkpoint.best": True}, faults={1: damaged})
  assert ends == [(0, "")] * 2
  for ours, theirs in zip(_params(config, tmp_path / "run"), expected):
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)
  for b in range(2):
    with checkpoint.BlockCheckpoint(tmp_path / "run", b) as saved:
      assert (saved.latest(), saved.best()) == (config.train.num_steps, None)


@pytest.mark.slow
@pytest.mark.parametrize("fault, words", [
    ("dbjax.__version__ = '0'; jax.__version__ = '0'",
     "differ in dbjax=0 (process 1) against"),
    ("provenance.fingerprint = lambda *_: 7", "differ in data=7 (process 1) against")])
def test_processes_with_other_versions_or_data_are_refused(hosts, fault, words):
  for code, err in hosts(2, "run", {"mesh.fsdp": 2}, faults={1: fault}):
    assert code == 2 and err.count("\n") == 1 and words in err


@pytest.mark.slow
@pytest.mark.parametrize("fault", [
    "os.kill(os.getpid(), 9)", pytest.param("sys.exit(3)", marks=pytest.mark.nightly)])
def test_a_process_that_never_comes_is_missed(hosts, fault):
  ends = hosts(2, "run", {"mesh.fsdp": 2}, faults={0: "from dbjax import watch; watch.JOIN = 5",
                                                   1: fault})
  assert ends[0][0] == watch.EXIT_CODE and ends[0][1].count("\n") == 1
  assert "this is process 0 of 2, of which the first is at localhost:" in ends[0][1]


@pytest.mark.slow
def test_a_signal_to_one_process_saves_and_stops_all(hosts, tmp_path, reference):
  config, expected = reference
  fault = "before_step(2, lambda: (os.kill(os.getppid(), signal.SIGTERM), time.sleep(3)))"
  ends = hosts(2, "run", {"mesh.block": 2}, faults={1: fault})
  assert [code for code, _ in ends] == [143, 143] and not (tmp_path / "run/.alive").exists()
  for _, err in ends:  # JAX may note the signal
    assert all("SIGTERM" in line for line in err.splitlines()), err
  assert [code for code, _ in hosts(2, "run", {"mesh.block": 2})] == [0, 0]
  np.testing.assert_array_equal(_params(config, tmp_path / "run"), expected)


def _left_by_a_machine_that_is_gone(directory):
  """Its owner.json, as if it had just shown its last sign of life."""
  directory.mkdir(parents=True)
  process = owner.this_process(os.getpid()) | dict(host="elsewhere")
  (directory / owner.FILE).write_text(json.dumps(process))


@pytest.mark.slow
def test_processes_wait_together_for_the_owner_of_one_block(hosts, tmp_path, reference):
  config, expected = reference
  _left_by_a_machine_that_is_gone(tmp_path / "run/block_01")
  soon = "from dbjax import owner; owner.STALE = owner._WATCH = 5"
  assert hosts(2, "run", {"mesh.block": 2}, faults={1: soon}) == [(0, "")] * 2
  np.testing.assert_array_equal(_params(config, tmp_path / "run"), expected)


@pytest.mark.slow
def test_a_signal_while_one_of_them_waits_stops_all(hosts, tmp_path):
  _left_by_a_machine_that_is_gone(tmp_path / "run/block_01")
  fault = "from dbjax import begin; begin._note = lambda _: os.kill(os.getppid(), signal.SIGTERM)"
  ends = hosts(2, "run", {"mesh.block": 2}, faults={1: fault})
  assert [code for code, _ in ends] == [143, 143]
  for _, err in ends:  # JAX may note the signal
    assert all("SIGTERM" in line for line in err.splitlines()), err
  left = [p.parent.name for p in (tmp_path / "run").rglob("owner.json*")]
  assert left == ["block_01"] and not (tmp_path / "run/.alive").exists()


@pytest.mark.slow
def test_one_of_two_killed_at_random_moments_is_bit_equal(hosts, tmp_path):
  """Starting, meeting, compiling, stepping, saving: wherever it falls; two devices each."""
  fields = {"mesh.fsdp": 2, "mesh.block": 2, "train.turn": "7", "train.num_steps": 60,
            "checkpoint.every_steps": 5, "checkpoint.keep": 1}
  assert hosts(2, "whole", fields, devices=2) == [(0, "")] * 2
  expected = states_of(config_lib.load(tmp_path / "whole"), tmp_path / "whole", (0, 1))
  soon = dict.fromkeys(range(2), "from dbjax import watch; watch.JOIN = 40")
  rng, kills, number = random.Random(0), 0, 0
  while kills < KILLS:
    number, done = number + 1, False
    while not done:
      lost, seconds = rng.randrange(2), rng.uniform(0, 12)
      ends = hosts(2, f"run{number}", fields, devices=2, faults=soon,
                   kill=(lost, seconds) if kills < KILLS else None)
      done = ends == [(0, "")] * 2
      if not done:
        kills += 1
        assert ends[lost] == (-signal.SIGKILL, ""), (ends, lost, seconds)
        code, err = ends[1 - lost]
        assert code in (0, watch.EXIT_CODE) and err.count("\n") <= 1, (ends, lost, seconds)
    run = tmp_path / f"run{number}"
    chex.assert_trees_all_equal(states_of(config_lib.load(run), run, (0, 1)), expected)
  print(f"{kills} kills over {number} runs")
