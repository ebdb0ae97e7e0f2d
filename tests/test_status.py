"""What is trained how far: against what was trained, and workdirs as they may be found."""

import json
import os
import shutil
import time

from conftest import load_config
from conftest import ROOT
import jax
import pytest

from dbjax import config as config_lib
from dbjax import export
from dbjax import loop
from dbjax import metrics
from dbjax import owner
from dbjax import status
from dbjax.errors import UserError


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """Of three blocks the first two have 6 steps of 6 and 4 of 8, the last none."""
  path = tmp_path_factory.mktemp("status") / "a run"
  small = {"model.num_layers": 3, "model.width": 16, "model.num_heads": 2, "model.unroll": 1,
           "train.batch_size": 8, "optimizer.warmup_steps": 2, "checkpoint.every_steps": 2,
           "log.every_steps": 2, "sample.every_steps": 0, "checkpoint.best": True,
           "optimizer.schedule": "constant"}
  run = lambda **fields: loop.train(load_config(**small, **fields), path,
                                    devices=jax.devices()[:1])
  run(**{"train.num_steps": (6, 4, 8), "train.blocks": (0, 1)})
  run(**{"train.num_steps": (6, 8, 8), "train.blocks": (0,)})  # and block 1 is behind
  return path


@pytest.fixture
def copy(workdir, tmp_path):
  return shutil.copytree(workdir, tmp_path / "copy")


def test_it_tells_what_the_run_has_told(workdir):
  rows = status.read(workdir)
  history = metrics.read_history(workdir, (0, 1))
  assert [(r["block"], r["step"], r["num_steps"], r["saved"]) for r in rows] == [
      (0, 6, 6, 6), (1, 4, 8, 4), (2, 0, 8, None)]
  for b in (0, 1):
    row, last = rows[b], {k: v[-1] for k, v in history.metrics[b].items()}
    meta = json.loads((workdir / f"block_0{b}/{row['saved']}/meta/metadata").read_text())
    assert row["loss"] == last["loss"] and row["spent"] == last["seconds"]
    assert row["held_out"] == meta["held_out"] > 0
    assert row["left"] == pytest.approx((row["num_steps"] - row["step"]) * 8
                                        / last["examples_per_s"])
    assert 0 <= row["reported"] < 600 and row["owner"] is None
  pace = sum(8 / rows[b]["examples_per_s"] for b in (0, 1)) / 2
  assert rows[2]["left"] == pytest.approx(8 * pace)
  assert (rows[2]["loss"], rows[2]["reported"], rows[2]["spent"]) == (None, None, None)


def test_the_table_says_it_in_words(workdir):
  header, *rows, everything = status.table(workdir).splitlines()
  assert header.split()[:3] == ["block", "step", "saved"]
  assert [row.split()[:2] for row in rows] == [["0", "6/6"], ["1", "4/8"], ["2", "0/8"]]
  assert rows[0].endswith("ago        done") and rows[1].endswith("nobody")
  assert everything.split()[0] == "all"


def test_it_writes_nothing_and_starts_no_backend(python, workdir):
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
  result = python("-c", "import sys, runpy; from jax._src import xla_bridge\n"
                  f"sys.argv = ['dbjax.main', '--status', '--workdir={workdir}']\n"
                  "try: runpy.run_module('dbjax.main', run_name='__main__')\n"
                  "except SystemExit: pass\n"
                  "print(xla_bridge.backends_are_initialized(), 'orbax' in sys.modules)")
  assert result.stdout.splitlines()[-1] == "False False", result.stderr
  assert "4/8" in result.stdout
  assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == before


@pytest.mark.parametrize("turn, rows, share", [("1", 1, 1), ("1", 3, 3), ("together", 1, 3)])
def test_blocks_that_train_at_once_spend_the_same_time(copy, turn, rows, share):
  """Each is told the time of the step in which all of them train."""
  config = json.loads((copy / "config.json").read_text())
  config["train"] |= dict(turn=turn, num_steps=6)
  config["mesh"]["block"] = rows
  (copy / "config.json").write_text(json.dumps(config))
  for b in range(3):
    (copy / f"block_0{b}").mkdir(exist_ok=True)
    (copy / f"block_0{b}/metrics.jsonl").write_text(json.dumps(dict(
        step=4, seconds=120.0, examples_per_s=0.1)) + "\n")
    shutil.rmtree(copy / f"block_0{b}/6", ignore_errors=True)
  assert [row["left"] for row in status.read(copy)] == pytest.approx([2 * 8 / 0.1] * 3)
  clock = lambda seconds: metrics.clock(seconds / share)
  assert status.table(copy).splitlines()[-1].split() == ["all", clock(3 * 120), clock(3 * 160)]


def test_blocks_of_other_sizes_do_not_train_at_once(copy):
  config = json.loads((copy / "config.json").read_text())
  config["train"]["turn"], config["model"]["width"] = "together", [32, 16, 16]
  (copy / "config.json").write_text(json.dumps(config))
  assert [row["at_once"] for row in status.read(copy)] == [1, 2, 2]


def test_exported_blocks(copy, tmp_path):
  """One file a block: they have a step, and go on nowhere."""
  export.export_blocks(copy, tmp_path / "some", (0, 1))
  before = status.read(copy)
  for folder in (tmp_path / "some", copy):
    for b in (0, 1):
      if folder == copy:  # as a folder of dbjax.export, which has a config
        shutil.rmtree(copy / f"block_0{b}")
        shutil.copy(tmp_path / f"some/block_0{b}.safetensors", copy)
    lines = status.table(folder).splitlines()[1:]
    for old, row, line in zip(before, status.read(folder)[:2], lines):
      assert row["exported"] and row["step"] == row["saved"] == old["saved"]
      assert (row["held_out"], row["left"]) == (old["held_out"], None) and row["spent"] > 0
      assert line.endswith("exported")
  (copy / "block_00.safetensors").write_bytes(b"\x10" * 9)
  first, second, last = status.read(copy)
  assert (first["step"], first["saved"], second["saved"], last["exported"]) == (0, None, 4, False)


@pytest.mark.parametrize("tail", ['{"step": 6, "lo', '{"step"', "nan", "[1]", "\x00\x00"])
def test_a_line_that_is_not_whole_is_passed_over(copy, tail):
  path = copy / "block_01/metrics.jsonl"
  expected = status.read(copy)[1]
  path.write_text(path.read_text() + tail)
  found = status.read(copy)[1]
  assert found | dict(reported=0) == expected | dict(reported=0)
  assert metrics.read_history(copy, (1,)).steps[1].tolist() == [2, 4]


@pytest.mark.parametrize("fields, age, words", [
    ({}, 0, ", process {pid}"),
    ({"boot": "before"}, 0, "is gone"),
    ({"host": "elsewhere", "pid": 7}, 60, "elsewhere, process 7"),
    ({"host": "elsewhere", "pid": 7}, owner.STALE + 60, "nobody: elsewhere, process 7, is gone"),
])
def test_who_trains_a_block(copy, fields, age, words):
  path = copy / "block_02" / owner.FILE
  path.parent.mkdir()
  path.write_text(json.dumps(owner.this_process(os.getpid()) | fields))
  os.utime(path, (time.time() - age,) * 2)
  row, line = status.read(copy)[2], status.table(copy).splitlines()[3]
  assert line.endswith(words.format(pid=os.getpid()))
  assert row["alive"] == ("is gone" not in line)
  assert row["owner"]["pid"] == fields.get("pid", os.getpid())


def test_while_a_run_goes_on(copy, monkeypatch):
  """Read between two of its steps, before its first report."""
  seen, add = [], loop.metrics.Progress.add

  def look(self, *args):
    seen.append(status.read(copy)[1])
    add(self, *args)

  monkeypatch.setattr(loop.metrics.Progress, "add", look)
  config = config_lib.changed(config_lib.load(copy), **{"train.blocks": (1,)})
  loop.train(config, copy, devices=jax.devices()[:1])
  assert [row["step"] for row in seen] == [4, 4, 4, 6]
  assert all(row["alive"] and row["owner"]["pid"] == os.getpid() for row in seen)
  assert status.read(copy)[1]["owner"] is None and status.read(copy)[1]["step"] == 8


def test_a_workdir_that_has_just_begun(tmp_path):
  """Blocks are owned before config.json is written."""
  (tmp_path / "block_01").mkdir()
  (row,) = status.read(tmp_path)
  assert (row["block"], row["step"], row["num_steps"], row["left"]) == (1, 0, None, None)
  assert status.table(tmp_path).splitlines()[1].split() == ["1", "0/?", "nobody"]


def test_damaged_checkpoints_and_records_are_passed_over(copy):
  (copy / "block_00/6/meta/metadata").write_text("{")
  (copy / "block_01/owner.json").write_text("{")
  (copy / "block_01/metrics.jsonl").unlink()
  first, second, _ = status.read(copy)
  assert (first["step"], first["saved"]) == (6, 4)
  assert (second["step"], second["loss"], second["owner"]) == (4, None, None)


@pytest.mark.parametrize("make, words", [
    (lambda path: path / "nothing", "there is no such directory"),
    (lambda path: path, "nothing was trained there"),
    (lambda path: ROOT / "setup.cfg", "there is no such directory")])
def test_what_is_no_workdir_is_one_line(forked, tmp_path, make, words):
  result = forked("main", "--status", f"--workdir={make(tmp_path)}")
  assert (result.returncode, result.stderr.count("\n")) == (2, 1)
  assert result.stderr.startswith("error: --workdir=") and words in result.stderr


def test_a_config_that_is_damaged_is_one_line(copy):
  short = '{"layers_per_block": [1, 1], "train": {"num_steps": [1], "batch_size": 1}}'
  for text in ("{", "[]", '{"layers_per_block": 3}', '{"layers_per_block": [1]}', short):
    (copy / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json is damaged"):
      status.read(copy)
