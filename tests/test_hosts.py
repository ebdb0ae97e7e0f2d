"""Several processes, as on several hosts: gloo over localhost, one CPU device each."""

import os
import shutil
import socket
import subprocess
import sys

from conftest import ROOT
import jax
import numpy as np
import pytest

from dbjax import block as block_lib
from dbjax import checkpoint
from dbjax import config as config_lib
from dbjax import loop
from dbjax import task as task_lib

FIELDS = {"num_blocks": 2, "model.num_layers": 2}
pytestmark = pytest.mark.usefixtures("steps_once")


@pytest.fixture
def hosts(tiny, tmp_path):
  """hosts(2, "name", {fields}, {fields}): runs dbjax.main so on each; [(exit code, stderr)]."""

  def run(count, name, *fields):
    with socket.socket() as s:
      s.bind(("localhost", 0))
      address = f"localhost:{s.getsockname()[1]}"
    started = []
    for i in range(count):
      config = tiny(**FIELDS | fields[i % len(fields)])
      flags = [f"--config.{k}={v}" for k, v in config_lib.flatten(config).items()
               if v is not None and not isinstance(v, list)]
      started.append(subprocess.Popen(
          [sys.executable, "-m", "dbjax.main", "--distributed", "--config=configs/digits.py",
           f"--workdir={tmp_path / name}", *flags],
          cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
          env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0",  # as `steps_once`
               "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count),
               "JAX_PROCESS_ID": str(i)}))
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
