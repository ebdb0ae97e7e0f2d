"""It survives: full disks, damaged checkpoints, a second job, readers beside a writer."""

from concurrent import futures
import contextlib
import errno
import os
import resource
import shutil
import signal
import threading
import time
import types

import chex
from conftest import random_workdir
from conftest import states_of
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dbjax import begin
from dbjax import block as block_lib
from dbjax import checkpoint
from dbjax import config as config_lib
from dbjax import data
from dbjax import fork
from dbjax import loading
from dbjax import logs
from dbjax import loop
from dbjax import stopping
from dbjax import task as task_lib
from dbjax.errors import UserError

pytestmark = pytest.mark.usefixtures("steps_once")


@pytest.fixture
def config(tiny):
  """Two blocks, six steps each, saved every two of them."""
  return config_lib.resolve(tiny(**{"num_blocks": 2, "model.num_layers": 2,
                                    "checkpoint.every_steps": 2}))


@pytest.fixture
def train(config, tmp_path):
  """train(): goes on in one and the same workdir, as the same command again does."""
  return lambda: loop.train(config, tmp_path / "run", devices=jax.devices()[:1])


def _uninterrupted(config, tmp_path):
  loop.train(config, tmp_path / "reference", devices=jax.devices()[:1])
  return states_of(config, tmp_path / "reference", (0, 1))


@contextlib.contextmanager
def no_room():
  """No file can grow above 4 kB: what a program sees of a disk that is full."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
  try:
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_waited_for(config, train, tmp_path, monkeypatch, capsys):
  """Training goes on when there is room again, and nothing was lost."""
  expected, waited = _uninterrupted(config, tmp_path), []
  kept = tmp_path / "run/block_00/metrics.jsonl"
  kept.parent.mkdir(parents=True)
  kept.write_text(f'{{"step": 0, "{"x" * 5000}": 0}}\n')  # so that the figures have no room either
  with no_room() as make_room:
    def sleep(seconds):
      waited.append(seconds)
      if len(waited) == 3:
        make_room()

    monkeypatch.setattr(loop.time, "sleep", sleep)
    train()
  # Once more where Orbax's threads are still writing what has failed.
  assert len(waited) < 5 and waited[:3] == list(loop._PATIENCE[:3])
  out = capsys.readouterr().out
  assert "cannot be saved in" in out and "it needs 0." in out and "MB are free" in out
  assert "it is tried again in 10 s, 5 times in the next 460 s" in out
  assert f"note: the figures of {kept.parent} cannot be written (File too large)" in out
  assert [row["step"] for row in logs.rows(kept)] == [0, 2, 4, 6]
  chex.assert_trees_all_equal(states_of(config, tmp_path / "run", (0, 1)), expected)
  assert not list((tmp_path / "run").rglob("*tmp*"))  # nor is what was torn left lying


@pytest.mark.slow
def test_a_full_disk_is_waited_for_where_samples_are_drawn(config, tmp_path, monkeypatch, capsys):
  """Which waits for the save, and learns there that it has failed."""
  expected = _uninterrupted(config, tmp_path)
  shown = config_lib.changed(config, **{"sample.every_steps": 2})
  with no_room() as make_room:
    monkeypatch.setattr(loop.time, "sleep", lambda seconds: make_room())
    loop.train(shown, tmp_path / "run", devices=jax.devices()[:1])
  out = capsys.readouterr().out
  assert "block 0, step 2, cannot be saved" in out and "block_00 is saved" in out
  chex.assert_trees_all_equal(states_of(config, tmp_path / "run", (0, 1)), expected)


def test_whatever_data_raise_all_is_saved_first(config, train, tmp_path, monkeypatch):
  class Broken(data.Arrays):
    def take(self, index):
      return super().take(index) if len(count) < 3 else {}[f"a bug of the user's, {index[0]}"]

  expected, count, add = _uninterrupted(config, tmp_path), [], loop.metrics.Progress.add
  monkeypatch.setattr(loop.metrics.Progress, "add",
                      lambda *args: [count.append(1), add(*args)])
  whole = data.load(config)
  broken = data.Dataset(Broken(**whole.train.arrays), whole.held_out)
  with pytest.raises(KeyError, match="a bug of the user's"):
    loop.train(config, tmp_path / "run", broken, devices=jax.devices()[:1])
  assert [int(s.step) for s in states_of(config, tmp_path / "run", (0,)).values()] == [len(count)]
  train()
  chex.assert_trees_all_equal(states_of(config, tmp_path / "run", (0, 1)), expected)


def test_two_signals_of_one_cause_save_and_a_second_ctrl_c_does_not():
  with stopping.StopSignal() as stop:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
      os.kill(os.getpid(), number)
    assert stop.asked() and stop.signal == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)


def test_a_second_ctrl_c_ends_one_of_several_processes_before_they_agree(monkeypatch):
  sent = []
  monkeypatch.setattr(stopping.jax, "process_count", lambda: 2)
  monkeypatch.setattr(stopping.os, "kill", lambda pid, number: sent.append(number))
  monkeypatch.setattr(stopping.multihost_utils, "reached_preemption_sync_point", lambda n: n > 1)
  with stopping.StopSignal() as stop:
    signal.raise_signal(signal.SIGINT)
    assert sent == [signal.SIGTERM] and not stop.asked()  # JAX tells the others
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
    assert stop.asked() and stop.signal == signal.SIGINT


def test_a_disk_that_stays_full_ends_the_run_in_order(config, train, tmp_path, monkeypatch):
  monkeypatch.setattr(loop.time, "sleep", lambda seconds: None)
  expected = _uninterrupted(config, tmp_path)
  with no_room(), pytest.raises(UserError, match="step 4, cannot be saved .*goes on from step 0"):
    train()
  train()
  chex.assert_trees_all_equal(states_of(config, tmp_path / "run", (0, 1)), expected)


@pytest.mark.slow
def test_a_disk_that_has_become_read_only_ends_the_run_in_order(
    config, train, tmp_path, monkeypatch, capsys):
  """As a file system is after an error of its disk. What was saved before stays."""
  monkeypatch.setattr(loop.time, "sleep", lambda seconds: None)
  expected, save = _uninterrupted(config, tmp_path), checkpoint.ocp.CheckpointManager.save

  def refuse(self, step, *args, **kwargs):
    if step >= 4 and self.directory.name == "block_01":
      raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self.directory))
    return save(self, step, *args, **kwargs)

  with monkeypatch.context() as patch, pytest.raises(
      UserError, match="block 1, step 6, cannot be saved .*Read-only file system.*from step 2"):
    patch.setattr(checkpoint.ocp.CheckpointManager, "save", refuse)
    train()
  assert capsys.readouterr().out.count("Read-only file system") == len(loop._PATIENCE)
  train()
  assert "block 1 | resumes from step 2" in capsys.readouterr().out
  chex.assert_trees_all_equal(states_of(config, tmp_path / "run", (0, 1)), expected)


def test_a_block_whose_directory_has_vanished_is_saved_anew(config, train, tmp_path, monkeypatch):
  """As where a disk is unmounted and comes back empty."""
  expected, save = _uninterrupted(config, tmp_path), loop._save

  def vanish(run, group, *args):
    if run.steps[1] == 4:
      run.saved[1].wait()
      shutil.rmtree(tmp_path / "run/block_01")
    save(run, group, *args)

  monkeypatch.setattr(loop, "_save", vanish)
  train()
  chex.assert_trees_all_equal(states_of(config, tmp_path / "run", (0, 1)), expected)
  assert sorted(p.name for p in (tmp_path / "run/block_01").glob("[0-9]*")) == ["4", "6"]


@pytest.mark.slow
def test_a_save_that_takes_longer_than_the_interval_is_waited_for(
    config, train, tmp_path, monkeypatch):
  """Saves of one block never overtake one another, and none is left out."""
  expected, verify, order = _uninterrupted(config, tmp_path), checkpoint.BlockCheckpoint._verify, []

  def slow(self, meta, template):
    order.append((self.block, meta["step"], "begins"))
    time.sleep(0.7)
    verify(self, meta, template)
    order.append((self.block, meta["step"], "ends"))

  monkeypatch.setattr(checkpoint.BlockCheckpoint, "_verify", slow)
  train()
  assert [(step, what) for b, step, what in order if b == 1] == [
      (step, what) for step in (2, 4, 6) for what in ("begins", "ends")]
  chex.assert_trees_all_equal(states_of(config, tmp_path / "run", (0, 1)), expected)


def test_a_disk_that_holds_no_checkpoint_is_refused_before_training(train, tmp_path, monkeypatch):
  """In all processes."""
  told = []
  monkeypatch.setattr(checkpoint, "free", lambda path: 1000)
  monkeypatch.setattr(begin.sharding, "agree", lambda what, **ours: told.append(ours))
  with pytest.raises(UserError, match=r"take up to 1.\d MB more in .*run, 0.0 MB are free .*: mak"):
    train()
  assert "make room" in told[-1]["failed"]
  assert not (tmp_path / "run/config.json").exists()


def test_a_run_that_goes_on_needs_room_for_what_is_to_come(tiny, tmp_path, monkeypatch, capsys):
  config = config_lib.resolve(tiny(**{"checkpoint.keep": 1, "checkpoint.keep_every": 2}))
  state = block_lib.abstract_state(task_lib.make_task(config, 0))
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  monkeypatch.setattr(checkpoint, "free", lambda path: 3 * size)
  for step, words in ((0, "not enough"), (4, "are free there")):  # of six: three, and one, stay
    begin.check_room(config, tmp_path, {0: step})
    assert capsys.readouterr().out.endswith(f"{words}\n")


def damage(path, how):
  """Does something to the largest file under a path."""
  victim = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  if how == "flip":
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 0x10
    victim.write_bytes(bytes(content))
  elif how == "truncate":
    os.truncate(victim, victim.stat().st_size // 2)
  elif how == "remove":
    victim.unlink()
  elif how == "directory":
    victim.unlink()
    victim.mkdir()
  else:
    shutil.rmtree(path)


@pytest.mark.parametrize("item, how", [
    ("params", "flip"), ("ema", "remove"), *(pytest.param(*x, marks=pytest.mark.slow) for x in [
        ("opt_state", "truncate"), ("meta", "truncate"), ("meta", "directory"),
        ("params", "all of it")])])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(
    config, train, tmp_path, capsys, item, how):
  train()
  expected = states_of(config, tmp_path / "run", (0, 1))
  whole = checkpoint.checksum(loading.load(tmp_path / "run").params)
  for b in (0, 1):
    damage(tmp_path / f"run/block_0{b}/6/{item}", how)
  capsys.readouterr()

  if item in ("ema", "meta"):  # a reader changes nothing, and says what it takes
    assert loading.load(tmp_path / "run").steps == (4, 4)
    assert "block_01/6 cannot be read" in (out := capsys.readouterr().out)
    assert "step 4 is used in its place" in out
    assert not list((tmp_path / "run/block_00").glob("*.damaged"))
  train()
  assert "block_00/6 cannot be read" in (out := capsys.readouterr().out)
  assert "it is set aside as 6.damaged" in out and "block 0 | resumes from step 4" in out
  assert (tmp_path / "run/block_01/6.damaged").is_dir()
  chex.assert_trees_all_equal(states_of(config, tmp_path / "run", (0, 1)), expected)
  assert checkpoint.checksum(loading.load(tmp_path / "run").params) == whole


def test_all_checkpoints_damaged_is_a_new_start(config, train, tmp_path):
  train()
  expected = states_of(config, tmp_path / "run", (0, 1))
  for step in (4, 6):
    damage(tmp_path / f"run/block_01/{step}/params", "flip")
    damage(tmp_path / f"run/block_01/{step}/ema", "flip")
  with pytest.raises(UserError, match="block_01/6/ema cannot be read, it may be damaged"):
    loading.load(tmp_path / "run")
  train()
  chex.assert_trees_all_equal(states_of(config, tmp_path / "run", (0, 1)), expected)
  assert {p.name for p in (tmp_path / "run/block_01").glob("*.damaged")} == {
      "4.damaged", "6.damaged"}


@pytest.fixture
def block(config):
  """save(saved, step): a block of random numbers; and its shapes."""
  task = task_lib.make_task(config, 0)
  abstract, rng = block_lib.abstract_state(task), np.random.default_rng(0)

  def save(saved, step, **wrong):
    state = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), abstract)
    state = state.replace(step=np.int32(step))
    checksums = jax.device_get(checkpoint.examine(state)[1])
    saved.save(state, config, seconds=0.0, checksums=checksums | wrong,
               trained_with=dict(dbjax="", code={}, data=0))
    return state

  return save, abstract


def steps_in(directory):
  return sorted(int(p.name) for p in directory.iterdir() if p.name.isdecimal())


def test_nothing_old_is_deleted_before_its_successor_is_read_back(block, tmp_path):
  save, _ = block
  with checkpoint.BlockCheckpoint(tmp_path, 0, keep=1) as saved:
    save(saved, 1)
    save(saved, 2)
    saved.wait()
    assert steps_in(tmp_path / "block_00") == [2]
    save(saved, 3, params=1)  # what is on disk is not what was in memory
    with pytest.raises(checkpoint.SaveFailed, match="step 3, cannot be saved .*checksum is wrong"):
      saved.wait()
    assert 2 in steps_in(tmp_path / "block_00")


def test_some_checkpoints_are_kept_for_ever(block, tmp_path):
  save, _ = block
  with checkpoint.BlockCheckpoint(tmp_path, 0, keep=2, keep_every=4) as saved:
    for step in range(1, 12):
      save(saved, step)
  assert steps_in(tmp_path / "block_00") == [4, 8, 10, 11]


def test_steps_to_be_kept_are_saved_whatever_the_others_are(config, tmp_path):
  few = config_lib.changed(config, **{
      "checkpoint.every_steps": 4, "checkpoint.keep_every": 3, "checkpoint.keep": 1})
  loop.train(few, tmp_path, devices=jax.devices()[:1])
  assert steps_in(tmp_path / "block_00") == [3, 6]


@pytest.mark.slow
def test_a_reader_never_fails_because_of_a_writer(block, config, tmp_path, capsys):
  """Of one who keeps a single checkpoint, and replaces it all the time."""
  save, abstract = block
  sums, read = {}, []

  def reads(done):
    while not done.is_set():
      with checkpoint.BlockCheckpoint(tmp_path, 0) as saved:
        meta, ema = saved.restore_newest(abstract.ema, config)
      read.append((meta["step"], checkpoint.checksum_of_host(ema)))

  with (checkpoint.BlockCheckpoint(tmp_path, 0, keep=1) as saved,
        futures.ThreadPoolExecutor() as pool):
    done = threading.Event()
    for step in range(1, 31):
      sums[step] = checkpoint.checksum_of_host(save(saved, step).ema)
      if step == 2:
        saved.wait()
        reader = pool.submit(reads, done)
    done.set()
    reader.result()
  assert len({step for step, _ in read}) > 5
  assert all(sums[step] == found for step, found in read)
  assert "cannot be read" not in capsys.readouterr().out


def test_a_second_job_is_refused_and_harms_nothing(config, train, tmp_path, monkeypatch):
  """While the first is between two steps, the second comes."""
  expected, refused = _uninterrupted(config, tmp_path), []
  before = loop.metrics.Progress.add

  def add(self, *args):
    before(self, *args)
    if not refused:
      with pytest.raises(UserError, match="block_00 is being trained by process") as error:
        train()
      refused.append(error)

  monkeypatch.setattr(loop.metrics.Progress, "add", add)
  train()
  assert refused
  chex.assert_trees_all_equal(states_of(config, tmp_path / "run", (0, 1)), expected)
  assert not list((tmp_path / "run").rglob("owner.json*"))


@pytest.mark.slow
def test_a_closed_terminal_saves_the_step_in_hand(config, train, tmp_path, monkeypatch):
  expected, count = _uninterrupted(config, tmp_path), []
  before = loop.metrics.Progress.add

  def add(self, *args):
    before(self, *args)
    count.append(1)
    if len(count) == 5:
      os.kill(os.getpid(), signal.SIGHUP)

  monkeypatch.setattr(loop.metrics.Progress, "add", add)
  assert train().stopped == signal.SIGHUP
  assert [int(s.step) for s in states_of(config, tmp_path / "run", (0,)).values()] == [5]
  train()
  chex.assert_trees_all_equal(states_of(config, tmp_path / "run", (0, 1)), expected)


@pytest.mark.parametrize("rate", [
    pytest.param({"optimizer.schedule": "constant"}, marks=pytest.mark.slow),
    {"optimizer.schedule": "wsd", "optimizer.decay_steps": 2}])
def test_a_run_can_be_made_longer(tiny, tmp_path, rate):
  """It is then what it had been if it had been as long from the start."""
  small = {"num_blocks": 1, "model.num_layers": 1, "checkpoint.every_steps": 2,
           "checkpoint.keep": 9, "train.num_steps": 6, **rate}
  make = lambda **more: config_lib.resolve(tiny(**small | more))
  run = lambda config, name: loop.train(config, tmp_path / name, devices=jax.devices()[:1])
  short, longer = make(), make(**{"train.num_steps": 10})
  run(short, "made longer")
  run(longer, "at once")
  if rate["optimizer.schedule"] == "wsd":
    with pytest.raises(UserError, match="at step 6 its learning rate falls already, from step 4"):
      run(longer, "made longer")
    shutil.rmtree(tmp_path / "made longer/block_00/6")
  run(longer, "made longer")
  got, expected = (states_of(longer, tmp_path / name, (0,)) for name in ("made longer", "at once"))
  assert got[0].step == 10
  chex.assert_trees_all_equal(got, expected)
  assert config_lib.load(tmp_path / "made longer").train.num_steps == 10


def test_a_cosine_run_cannot_be_made_longer(config, train, tmp_path):
  train()
  with pytest.raises(UserError, match="num_steps=9 .here. against 6 .*schedule=cosine every st"):
    loop.train(config_lib.changed(config, **{"train.num_steps": 9}), tmp_path / "run",
               devices=jax.devices()[:1])


@pytest.mark.slow
def test_a_fork_goes_on_from_another_run_with_changed_fields(config, train, tmp_path, capsys):
  """Of the same fields it is the run that had been as long; with others it says what differs."""
  cut = config_lib.changed(config, **{"optimizer.schedule": "constant", "train.num_steps": 4})
  whole = config_lib.changed(cut, **{"train.num_steps": 8})
  one = dict(devices=jax.devices()[:1])
  loop.train(cut, tmp_path / "old", **one)
  before = states_of(cut, tmp_path / "old", (0, 1))
  loop.train(whole, tmp_path / "at once", **one)
  loop.train(whole, tmp_path / "new", fork_from=tmp_path / "old", **one)
  got, expected = (states_of(whole, tmp_path / name, (0, 1)) for name in ("new", "at once"))
  chex.assert_trees_all_equal(got, expected)
  chex.assert_trees_all_equal(states_of(cut, tmp_path / "old", (0, 1)), before)

  slower = config_lib.changed(whole, **{"optimizer.learning_rate": 1e-5})
  loop.train(slower, tmp_path / "slower", fork_from=tmp_path / "old", **one)
  loop.train(slower, tmp_path / "slower", **one)  # the same again, without the flag
  meta = checkpoint.BlockCheckpoint(tmp_path / "slower", 1).meta()
  forked = meta["trained_with"]["forked_from"]
  assert (meta["step"], forked["step"]) == (8, 4)
  assert forked["changed"] == "optimizer.learning_rate=1e-05 (here) against 0.002 (there)"
  assert "block 1 | forked at step 4 from" in capsys.readouterr().out
  halved = config_lib.changed(whole, **{"optimizer.moments_dtype": "bfloat16"})
  fork.fork(tmp_path / "old", tmp_path / "halved", (0,), halved, data.load(halved))
  got = states_of(halved, tmp_path / "halved", (0,))[0]
  like = block_lib.abstract_state(task_lib.make_task(halved, 0))
  expected = jax.tree.map(lambda x, y: x.astype(y.dtype), before[0], like)
  assert expected.health.first_loss > 0
  chex.assert_trees_all_equal(got, expected.replace(
      health=expected.health._replace(first_loss=np.float32(np.inf))))
  with pytest.raises(UserError, match="remembers other things, for there is optimizer.warmup_step"):
    loop.train(config_lib.changed(whole, **{"optimizer.warmup_steps": 0}), tmp_path / "no count",
               fork_from=tmp_path / "old", **one)
  with pytest.raises(UserError, match="num_blocks=1: --fork_from=.* was trained with 2: a fork m"):
    loop.train(config_lib.changed(whole, **{
        "num_blocks": 1, "layers_per_block": (), "train.blocks": ()}), tmp_path / "other",
               fork_from=tmp_path / "old", **one)


def test_a_warm_up_that_does_not_end_is_said(config, capsys):
  long = config_lib.changed(config, **{"optimizer.warmup_steps": (7, 6)})  # of six steps
  begin._note_warm_up(long, {0: 0, 1: 5})
  assert capsys.readouterr().out == (
      "note: optimizer.warmup_steps=7: the learning rate of block(s) 0, 1 is never reached in "
      "train.num_steps=6: set fewer\n")
  begin._note_warm_up(long, {0: 6, 1: 6})  # done
  begin._note_warm_up(config_lib.changed(config, **{"optimizer.warmup_steps": 5}), {0: 0, 1: 0})
  assert not capsys.readouterr().out


def test_a_fork_that_has_nothing_to_train_is_refused(config, tmp_path):
  """Before a block is copied: `random_workdir` is at step 5."""
  random_workdir(tmp_path / "old", config)
  for num_steps, words in [(3, "num_steps=3: "), (5, "num_steps=5: "), ((6, 5), "num_steps=5: ")]:
    short = config_lib.changed(config, **{"train.num_steps": num_steps})
    with pytest.raises(UserError, match=f"{words}--fork_from=.* is at step 5 already, which count"):
      fork.fork(tmp_path / "old", tmp_path / "new", (0, 1), short, None)
    assert not (tmp_path / "new").exists()
  with pytest.raises(UserError, match="--fork_from=.*nowhere: there is no such directory"):
    fork.fork(tmp_path / "nowhere", tmp_path / "new", (0, 1), config, None)
  fork.fork(tmp_path / "nowhere", tmp_path / "old", (0, 1), config, None)  # it has all: it goes on


def test_a_fork_may_be_of_another_length_where_the_optimizer_remembers_the_same(config):
  def check(then, now):
    flat = [config_lib.flatten(config_lib.changed(config, **x)) for x in (then, now)]
    fork._check_optimizer(types.SimpleNamespace(directory="/old"), *flat, lambda config: (
        block_lib.abstract_state(task_lib.make_task(config, 0))))

  wsd = {"optimizer.schedule": "wsd", "train.num_steps": 100, "optimizer.decay_steps": 20}
  check(wsd, wsd | {"train.num_steps": 15, "optimizer.decay_steps": 8})
  check(wsd, {"optimizer.schedule": "wsd", "train.num_steps": 300, "optimizer.decay_steps": 150})
  free = {"optimizer.name": "schedule_free", "optimizer.schedule": "constant"}
  check(free, free | {"train.num_steps": 99})
  with pytest.raises(UserError, match="optimizer.b1=0.5: --fork_from=/old was trained with 0.9, "):
    check(free, free | {"optimizer.b1": 0.5})


def test_the_checksum_of_the_host_is_that_of_the_device():
  rng = np.random.default_rng(0)
  tree = {"a": rng.normal(size=(3, 4, 5)).astype(np.float32), "b": np.float32(2.5),
          "c": [rng.integers(0, 99, 7).astype(np.int32), np.zeros((2, 0), np.float32)],
          "d": rng.normal(size=(4, 3)).astype(jnp.bfloat16)}
  found = [checkpoint.checksum_of_host(tree)]
  assert found == [int(checkpoint.checksum(tree))]
  for bits in (tree["a"].view(np.uint32), tree["d"].view(np.uint16)):
    bits.flat[-2] ^= 1
    found.append(checkpoint.checksum_of_host(tree))
    assert found[-1] == int(checkpoint.checksum(tree))
  assert len(set(found)) == 3
