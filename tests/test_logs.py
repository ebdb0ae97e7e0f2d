"""What is kept of a run's figures: norms, samples, Weights & Biases, the commands."""

import json
import resource
import sys
import types

import chex
from conftest import states_of
from etils import epath
import jax
import numpy as np
from PIL import Image
import pytest

from dbjax import block as block_lib
from dbjax import config as config_lib
from dbjax import logs
from dbjax import loop
from dbjax import metrics
from dbjax import provenance
from dbjax import task as task_lib
from dbjax.errors import UserError

pytestmark = pytest.mark.usefixtures("steps_once")


@pytest.fixture
def train(tiny, tmp_path):
  def run(name="run", command="", **fields):
    config = config_lib.resolve(tiny(**{"train.blocks": (1,), **fields}))
    loop.train(config, tmp_path / name, devices=jax.devices()[:1], command=command)
    return config

  return run


def events(path):
  """Those in a file, as TensorBoard reads them; one that is torn is the end."""
  from tensorboardX.proto import event_pb2

  data = path.read_bytes()
  while len(data) > 12 and len(data) >= 16 + (size := int.from_bytes(data[:8], "little")):
    yield event_pb2.Event.FromString(data[12:12 + size])
    data = data[16 + size:]


def summaries(directory):
  """[(step, tag, value)] of the event files in a directory."""
  return [(event.step, v.tag, v) for path in sorted(directory.glob("events*"))
          for event in events(path) for v in event.summary.value]


# Norms.

@pytest.mark.slow
def test_norms_are_those_of_the_step_by_numpy(tiny):
  """Of the gradient before it is clipped, and of what the step adds to the weights."""
  config = config_lib.resolve(tiny(**{"num_blocks": 1, "optimizer.warmup_steps": 0}))
  task = task_lib.make_task(config, 0)
  interval = task.make_schedule(config).training_interval(0)
  state = block_lib.init(task, 0)
  rng = np.random.default_rng(0)
  state = state.replace(params=jax.tree.map(
      lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), state.params))
  batch = dict(image=rng.integers(0, 256, (8, 8, 8, 1)).astype(np.uint8),
               label=rng.integers(0, 10, 8))
  after, step = block_lib.train_step(task, state, batch, 0, interval)
  found = block_lib.norms(task, state, batch, 0, interval)
  moved = jax.device_get(jax.tree.map(lambda a, b: a - b, after.params, state.params))
  layers = jax.tree.leaves(moved["stack"])
  norm = lambda arrays: np.sqrt(sum(np.square(np.float64(x)).sum() for x in arrays))
  for i in range(3):
    assert found[f"update_norm/stack/{i}"] == pytest.approx(norm([x[i] for x in layers]), rel=1e-4)
  for name in moved.keys() - {"stack"}:
    assert found[f"update_norm/{name}"] == pytest.approx(norm(jax.tree.leaves(moved[name])),
                                                         rel=1e-4)
  parts = {n.partition("/")[2] for n in found}
  assert parts == (moved.keys() - {"stack"}) | {"stack/0", "stack/1", "stack/2"}
  total = norm(v for n, v in found.items() if n.startswith("grad_norm/"))
  assert total == pytest.approx(float(step["grad_norm"]), rel=1e-5)
  assert min(found.values()) > 0


@pytest.mark.parametrize("params", [
    [np.float32([3, 4])], np.float32([3, 4]), {"a": {"b": np.float32([[3], [4]])}}])
def test_parameters_of_any_tree_have_norms(params):
  task = types.SimpleNamespace(network=object())
  (norm,) = block_lib._norm_of_parts(task, params).values()
  assert float(norm) == 5


def test_norms_change_no_weight_and_are_kept(train, tmp_path):
  off = train("off")
  train("on", **{"log.norms": True})
  chex.assert_trees_all_equal(*(states_of(off, tmp_path / n, (1,)) for n in ("off", "on")))
  rows = logs.rows(tmp_path / "on/block_01/metrics.jsonl")
  assert len(rows) == 3 and all("update_norm/stack/0" in row for row in rows)
  plain = logs.rows(tmp_path / "off/block_01/metrics.jsonl")
  assert not any("/" in name for row in plain for name in row)
  assert [row["loss"] for row in rows] == [row["loss"] for row in plain]
  kept = {(step, tag): v.simple_value for step, tag, v in summaries(tmp_path / "on/block_01")}
  assert kept[4, "grad_norm/read_out"] == pytest.approx(rows[1]["grad_norm/read_out"])
  history = metrics.read_history(tmp_path / "on", (1,))
  assert history.metrics[1]["grad_norm/read_out"].shape == (3,)


@pytest.mark.parametrize("fields", [
    pytest.param({"mesh.block": 2, "mesh.fsdp": 2, "mesh.data": 2}, marks=pytest.mark.slow),
    pytest.param({"train.turn": "together"}, marks=pytest.mark.nightly)])
def test_norms_on_a_mesh_are_those_of_one_device(tiny, tmp_path, fields):
  """Of blocks in rows, and of several that share one; of weights that are in parts."""
  small = {"num_blocks": 2, "model.num_layers": 4, "log.norms": True, "log.every_steps": 3,
           "train.num_steps": 3}
  one = config_lib.resolve(tiny(**small))
  loop.train(one, tmp_path / "one", devices=jax.devices()[:1])
  mesh = config_lib.resolve(tiny(**small, **fields))
  loop.train(mesh, tmp_path / "mesh", devices=jax.devices()[:8 if "mesh.block" in fields else 1])
  for b in (0, 1):
    (a,), (m,) = (logs.rows(tmp_path / n / f"block_0{b}/metrics.jsonl") for n in ("one", "mesh"))
    names = [n for n in a if "/" in n]
    assert len(names) == 14 and a.keys() == m.keys()
    np.testing.assert_allclose([m[n] for n in names], [a[n] for n in names], rtol=2e-3, atol=1e-6)


# The file.

def in_tensorboard(directory):
  """[(step, tag, value)], without what a later file makes void."""
  from tensorboardX.proto import event_pb2

  found = []
  for path in sorted(directory.glob("events*"), key=lambda p: int(p.name.rpartition(".")[2])):
    for event in events(path):
      if event.session_log.status == event_pb2.SessionLog.START:
        found = [row for row in found if row[0] < event.step]
      found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
  return found


def test_figures_of_a_full_disk_are_written_when_there_is_room(tmp_path, capsys):
  kept, path = logs.BlockLogs(epath.Path(tmp_path), 0), tmp_path / "metrics.jsonl"
  kept.write(2, dict(loss=2.0))
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, before[1]))
  try:
    kept.write(4, dict(loss=4.0), [3])
    assert path.read_text().endswith('}\n{"ste') and [r["step"] for r in logs.rows(path)] == [2]
    kept.write(6, dict(loss=6.0))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  kept.write(8, dict(loss=8.0))
  kept.close()
  assert [json.loads(line) for line in path.read_text().splitlines()] == [
      dict(step=2, loss=2.0), dict(step=4, loss=4.0, skipped_steps=[3]), dict(step=6, loss=6.0),
      dict(step=8, loss=8.0)]
  assert in_tensorboard(tmp_path) == [(n, "loss", n) for n in (2, 4, 6, 8)]
  said = capsys.readouterr().out
  assert said.count("note:") == 1 and "cannot be written (File too large)" in said


@pytest.mark.parametrize("room", [True, False])
def test_the_last_figures_are_tried_again_at_the_end(tmp_path, room):
  """And the run at W&B is ended, whatever comes of it."""
  run = types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: ended.append(1))
  kept, ended = logs.BlockLogs(epath.Path(tmp_path / "block_00"), 0, run), []
  (tmp_path / "block_00").rmdir()
  (tmp_path / "block_00").write_text("in its place")
  kept.write(2, dict(loss=1.0))
  if room:
    (tmp_path / "block_00").unlink()
  kept.close()
  found = sorted(path.name.partition(".")[0] for path in tmp_path.rglob("*.*"))
  assert ended and found == ["events", "metrics"] * room


def test_a_line_is_added_to_the_file_which_is_cut_where_a_run_resumes(tmp_path):
  path, row = tmp_path / "metrics.jsonl", lambda n: json.dumps(dict(step=n, loss=1.0)) + "\n"
  path.write_text(row(2) + row(4) + row(6) + '{"step": 8, "lo')
  kept = logs.BlockLogs(epath.Path(tmp_path), 4)
  kept.write(5, dict(loss=1.0))
  assert path.read_text() == row(2) + row(4) + row(5)
  number = path.stat().st_ino
  kept.write(7, dict(loss=1.0))
  assert path.read_text() == row(2) + row(4) + row(5) + row(7) and path.stat().st_ino == number
  path.unlink()  # as where a disk comes back empty
  kept.write(9, dict(loss=1.0))
  assert path.read_text() == "".join(map(row, (2, 4, 5, 7, 9)))
  assert [step for step, _, _ in in_tensorboard(tmp_path)] == [5, 7, 9]


# Samples.

def test_pictures_of_samples_come_to_tensorboard(train, tmp_path):
  train(**{"train.blocks": (), "sample.every_steps": 6})
  (step, value), = [(s, v) for s, tag, v in summaries(tmp_path / "run/block_02")
                    if tag == "samples"]
  with Image.open(tmp_path / "run/samples/block_02_step_000006.png") as image:
    assert (value.image.height, value.image.width, step) == (image.height, image.width, 6)


def test_a_text_of_samples_comes_as_text(tmp_path):
  kept = logs.BlockLogs(epath.Path(tmp_path / "block_00"), 0)
  (tmp_path / "x.txt").write_text("one *two*\n\nthree\n")
  (tmp_path / "x.npy").write_text("nothing to look at")
  kept.show(3, epath.Path(tmp_path / "x.txt"))
  kept.show(3, epath.Path(tmp_path / "x.npy"))
  kept.close()
  (step, tag, value), = summaries(tmp_path / "block_00")
  assert step == 3 and tag.startswith("samples")
  assert value.tensor.string_val[0].decode() == "    one *two*\n    \n    three"


# Weights & Biases.

@pytest.fixture
def wandb(monkeypatch):
  """In the place of the package: what it was given."""
  runs = []

  class Run:
    def __init__(self, **options):
      self.options, self.rows, self.ended = options, [], False
      runs.append(self)

    def log(self, row, step):
      assert row["step"] == step
      self.rows.append(row)

    def finish(self):
      self.ended = True

  module = types.ModuleType("wandb")
  module.init = lambda **options: Run(**options)
  monkeypatch.setitem(sys.modules, "wandb", module)
  return runs


def test_weights_and_biases_has_what_the_file_has(train, wandb, tmp_path):
  train(**{"log.wandb": "mine", "train.blocks": (0, 1), "log.norms": True})
  for b, run in enumerate(wandb):
    assert run.rows == logs.rows(tmp_path / f"run/block_0{b}/metrics.jsonl") and run.ended
    assert (run.options["project"], run.options["group"], run.options["name"]) == (
        "mine", "run", f"block_0{b}")
    assert run.options["config"]["train.num_steps"] == 6
  assert len({run.options["id"] for run in wandb}) == 2 == len(wandb)


@pytest.mark.slow
def test_a_resumed_run_goes_on_there_too(train, wandb, tmp_path):
  for total in (4, 6):
    train(**{"log.wandb": "mine", "train.num_steps": total, "optimizer.schedule": "constant"})
  first, second = wandb
  assert first.options["id"] == second.options["id"] and second.options["resume"] == "allow"
  assert [row["step"] for row in first.rows + second.rows] == [2, 4, 6]
  train(**{"log.wandb": "mine", "optimizer.schedule": "constant"})
  assert len(wandb) == 2  # nothing is left to send
  train(**{"log.wandb": "other", "train.num_steps": 8, "optimizer.schedule": "constant"})
  assert wandb[2].options["id"] != first.options["id"]


def test_nobody_asks_for_weights_and_biases(train, wandb):
  train()
  assert not wandb


def test_weights_and_biases_that_is_not_there_is_one_line(train, monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(UserError, match="log.wandb=mine: the package is not .*pip install wandb"):
    train(**{"log.wandb": "mine"})
  assert not (tmp_path / "run").exists()


def test_weights_and_biases_that_refuses_is_one_line(train, wandb, monkeypatch):
  def refuse(**_):
    raise RuntimeError("api_key not configured")

  monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
  monkeypatch.setattr(loop.program, "compile_step", None)  # nothing is compiled before
  with pytest.raises(UserError, match="W&B refuses .api_key not .*: run wandb login"):
    train(**{"log.wandb": "mine"})


def test_runs_there_are_ended_where_the_next_is_refused(train, wandb, monkeypatch):
  init = sys.modules["wandb"].init
  monkeypatch.setattr(sys.modules["wandb"], "init",
                      lambda **options: 1 / 0 if wandb else init(**options))
  with pytest.raises(UserError, match="W&B refuses"):
    train(**{"log.wandb": "mine", "train.blocks": (0, 1)})
  assert [run.ended for run in wandb] == [True]


# Commands.

def test_the_commands_that_trained_blocks_are_kept(train, tmp_path):
  train(command="a 'b c'", **{"train.blocks": (0, 1), "train.num_steps": 4,
                              "optimizer.schedule": "constant"})
  train(command="more", **{"optimizer.schedule": "constant"})
  train(command="nothing to do", **{"optimizer.schedule": "constant"})
  with (tmp_path / "run/block_01/commands.jsonl").open("ab") as file:
    file.write(b'{"time": "x"}\n[]\n\xff\n{"ti')
  found = provenance.commands(tmp_path / "run", range(3))
  assert [(row["command"], row["steps"]) for row in found] == [
      ("a 'b c'", {0: 0, 1: 0}), ("more", {1: 4})]
  assert found[0]["time"] <= found[1]["time"]
  line = json.loads((tmp_path / "run/block_00/commands.jsonl").read_text())
  # And nothing of the environment. Of those of before devices are not known.
  assert line.keys() == {"time", "command", "dbjax", "devices", "step"}
  assert found[0]["devices"] == "1 x cpu"
  old = {name: line[name] for name in ("time", "command", "dbjax")}
  (tmp_path / "run/block_00/commands.jsonl").write_text(json.dumps(old | dict(step=0)))
  assert provenance.commands(tmp_path / "run", [0])[0] == old | dict(devices="", steps={0: 0})


def test_figures_wait_while_storage_is_out(storage, capsys):
  """What gs:// raises is no OSError."""
  kept = logs.BlockLogs(epath.Path("gs://bucket/w/block_00"), 0)
  storage.down = True
  kept.write(2, dict(loss=2.0))
  kept.write(4, dict(loss=4.0))
  said = capsys.readouterr().out
  assert said.count("note:") == 1 and "cannot be written (Service Unavailable, 503)" in said
  assert len(kept._lines) == 2 and not kept._kept
