"""A trace of some steps: which, where it lies, and what is refused."""

import gzip
import json
import shutil

from etils import epath
import jax
import pytest

from dbjax import loop
from dbjax import profiler
from dbjax.errors import UserError

pytestmark = pytest.mark.usefixtures("steps_once")


def traced(directory):
  """The steps that the traces in a block's directory name, one list a trace."""
  found = []
  for path in sorted(directory.glob("plugins/profile/*/*.trace.json.gz")):
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = {int(e["args"]["step_num"]) for e in events
             if e.get("name") == "train" and "step_num" in e.get("args", {})}
    found.append(sorted(steps))
    assert path.with_name(path.name.replace(".trace.json.gz", ".xplane.pb")).stat().st_size > 1000
  return found


@pytest.fixture
def train(tiny, tmp_path):
  def run(steps, **fields):
    config = tiny(**{"train.blocks": (1,), "log.profile_steps": steps, **fields})
    loop.train(config, tmp_path / "run", devices=jax.devices()[:1])
    return traced(tmp_path / "run/block_01")

  return run


def test_the_steps_of_the_window_are_traced_and_no_others(train, capsys, tmp_path):
  assert train((3, 4)) == [[3, 4]]
  assert f"profile: {tmp_path}/run/block_01/plugins/profile" in capsys.readouterr().out
  assert not (tmp_path / "run/block_00").exists()


@pytest.mark.parametrize("steps, expected", [
    ((3, 4), [1, 2, "start", 3, 4, "stop", 5, 6]), ((1, 1), ["start", 1, "stop", 2, 3, 4, 5, 6]),
    ((5, 9), [1, 2, 3, 4, "start", 5, 6, "stop"]), ((), [1, 2, 3, 4, 5, 6])])
def test_when_a_trace_begins_and_ends(monkeypatch, tmp_path, steps, expected):
  seen = []
  monkeypatch.setattr(jax.profiler, "start_trace", lambda _: seen.append("start"))
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append("stop"))
  with profiler.Window(steps, epath.Path(tmp_path)) as window:
    for number in range(1, 7):
      with window.step(number):
        seen.append(number)
      window.done(number, ())
  assert seen == expected


def test_a_window_that_was_begun_by_a_run_before(train, tmp_path):
  train(())
  shutil.rmtree(tmp_path / "run/block_01/6")
  assert train((3, 6)) == [[5, 6]]  # from step 4 on


def test_a_window_of_steps_that_are_trained_already_is_told(train, tmp_path, capsys):
  train(())
  assert "not traced" not in capsys.readouterr().out
  train((1, 2))  # nothing goes on
  assert "not traced" not in capsys.readouterr().out
  shutil.rmtree(tmp_path / "run/block_01/6")
  assert train((3, 4)) == []
  assert "note: log.profile_steps=3,4 are not traced of block(s) 1:" in capsys.readouterr().out


def test_a_trace_under_way_is_written_when_the_run_fails(train, tmp_path, monkeypatch):
  add = loop.metrics.Progress.add

  def fail(self, *args):
    add(self, *args)
    if self._steps[1] == 3:
      raise RuntimeError

  monkeypatch.setattr(loop.metrics.Progress, "add", fail)
  with pytest.raises(RuntimeError):
    train((2, 5))
  assert traced(tmp_path / "run/block_01") == [[2, 3]]


@pytest.mark.parametrize("steps, words", [
    ((5, 7), "log.profile_steps=5,7: the last step of a block is train.num_steps=6"),
    ((3,), "log.profile_steps=.3,.: expected whole numbers, none or two: first,last"),
    ((4, 3), "none or two"), ((0, 3), "none or two"), ((1, 2, 3), "none or two")])
def test_windows_that_there_cannot_be(train, tmp_path, steps, words):
  with pytest.raises(UserError, match=words):
    train(steps)
  assert not (tmp_path / "run").exists()
