"""One run a block: a second one is refused, and one that is gone does not stand in the way."""

from concurrent import futures
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time

from etils import epath
import pytest

from dbjax import begin
from dbjax import owner
from dbjax import stopping
from dbjax.errors import UserError


@pytest.fixture
def directory(tmp_path):
  return epath.Path(tmp_path / "w/block_00")


def claim(directory, **fields):
  """Writes an owner's file, as another process would have."""
  directory.mkdir(parents=True, exist_ok=True)
  (directory / owner.FILE).write_text(json.dumps(owner.this_process(os.getpid()) | fields))


def own(mine, directories):
  """As the loop does, while it notes what asks it to stop."""
  with stopping.StopSignal() as stop:
    begin.own(mine, directories, stop)
  return stop.signal


def last_seen(directory, seconds):
  """Lets an owner have shown its last sign of life so many seconds ago."""
  os.utime(directory / owner.FILE, (time.time() - seconds,) * 2)


def last_seen_again(directory, after):
  """Waits for a sign of life after a time; fails where there is none for long."""
  end = time.monotonic() + 20
  while (directory / owner.FILE).stat().mtime <= after:
    assert time.monotonic() < end
    time.sleep(0.02)


@pytest.fixture
def quick(monkeypatch):
  """Waits are short: an owner is gone when it shows no sign of life for 0.5 s."""
  monkeypatch.setattr(owner, "STALE", 0.5)
  monkeypatch.setattr(owner, "_WATCH", 0.2)
  monkeypatch.setattr(begin, "_PAUSE", 0.02)


def test_a_second_run_is_refused_until_the_first_has_left(directory):
  with owner.Owner() as first, owner.Owner() as second:
    first.take(directory)
    words = rf"block_00 is being trained by process {os.getpid()} on .*, since 20\d\d-.*wait for"
    with pytest.raises(UserError, match=words):
      second.take(directory)
    second.take(directory.parent / "block_01")  # another block is free
  with owner.Owner() as third:
    third.take(directory)
  assert [p.name for p in directory.iterdir()] == []


def test_a_process_that_was_killed_is_gone(directory):
  code = ("from etils import epath; from dbjax import owner; import sys, time\n"
          "owner.Owner().take(epath.Path(sys.argv[1])); print('mine', flush=True); time.sleep(99)")
  process = subprocess.Popen([sys.executable, "-c", code, str(directory)], stdout=subprocess.PIPE)
  assert process.stdout.readline() == b"mine\n"
  with owner.Owner() as mine:
    with pytest.raises(UserError, match=f"by process {process.pid} on"):
      mine.take(directory)
    process.kill()
    process.wait()
    mine.take(directory)


@pytest.mark.parametrize("fields, gone", [
    ({}, False),
    ({"boot": "before the power cut"}, True),
    ({"born": "1"}, True),  # the number of the process has been given to another
    ({"host": "elsewhere", "boot": "its own"}, None),
    ({"namespace": "pid:[7]", "pid": 1, "born": "1"}, None),  # of another container on this host
])
def test_who_is_gone(directory, fields, gone):
  """None: nobody knows at the first look."""
  claim(directory, **fields)
  with owner.Owner() as mine:
    if gone:
      assert mine.take(directory) is None
    elif gone is None:
      assert mine.take(directory).directory == directory
    else:
      with pytest.raises(UserError, match="is being trained by"):
        mine.take(directory)


def test_a_file_of_before_has_no_namespace(directory):
  process = owner.this_process(os.getpid())
  del process["namespace"]
  assert owner.dead(process) is False and owner.dead(process | dict(born="1")) is True


@pytest.mark.parametrize("age, seconds", [
    (0, 150), (-3600, 150), (50, 100), (140, 75), (300, 75), (601, 0)])
def test_how_long_an_owner_on_another_host_is_watched(directory, age, seconds):
  """A clock that is behind, or ahead, neither ends the wait at once nor lets it last for ever."""
  claim(directory, host="elsewhere")
  last_seen(directory, age)
  with owner.Owner() as mine:
    wait = mine.take(directory)
    assert (wait.seconds if wait else 0) == pytest.approx(seconds, abs=5)


def test_an_owner_shows_that_it_lives(directory, monkeypatch):
  monkeypatch.setattr(owner, "_TOUCH", 0.01)
  with owner.Owner() as mine:
    mine.take(directory)
    last_seen(directory, 300)
    last_seen_again(directory, after=time.time() - 60)


def test_blocks_of_a_machine_that_is_gone_are_waited_for_at_once(
    directory, quick, monkeypatch, capsys):
  """All at the same time, and said once."""
  monkeypatch.setattr(owner, "STALE", 1)
  monkeypatch.setattr(owner, "_WATCH", 1)
  directories = [directory.parent / f"block_0{b}" for b in range(3)]
  for each in directories:
    claim(each, host="elsewhere")
  with owner.Owner() as mine:
    start = time.monotonic()
    own(mine, directories)
    assert 0.9 < time.monotonic() - start < 2.5  # not thrice as long
    assert all(owner.read(each)["host"] != "elsewhere" for each in directories)
  out = capsys.readouterr().out
  assert out.count("\n") == 1 and "process" in out and "on elsewhere" in out
  assert "and 2 more: " in out and "no sign of life for 1 s, this run goes on" in out


def test_an_owner_on_another_host_that_lives_is_found_out_soon(directory, quick, monkeypatch):
  monkeypatch.setattr(owner, "STALE", 99)
  claim(directory, host="elsewhere")
  done = threading.Event()

  def live():
    while not done.wait(0.1):
      os.utime(directory / owner.FILE)

  thread, start = threading.Thread(target=live), time.monotonic()
  thread.start()
  with owner.Owner() as mine, pytest.raises(UserError, match="is being trained by .* elsewhere"):
    own(mine, [directory])
  done.set()
  thread.join()
  assert time.monotonic() - start < 60


def test_a_damaged_file_is_waited_for(directory, quick):
  """It may be one that is being written, where a file system knows no hard links."""
  directory.mkdir(parents=True)
  (directory / owner.FILE).write_text("{")
  with owner.Owner() as mine:
    assert mine.take(directory)
    (directory / owner.FILE).write_text("{}")
    with pytest.raises(UserError, match="remove .*block_00/owner.json"):
      mine.take(directory)
  with owner.Owner() as mine:
    own(mine, [directory])


@pytest.mark.parametrize("number, raised", [
    (signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit), (signal.SIGHUP, SystemExit)])
def test_a_signal_ends_the_wait(directory, quick, monkeypatch, number, raised):
  monkeypatch.setattr(owner, "STALE", 99)
  claim(directory, host="elsewhere")
  other = directory.parent / "block_01"
  before = signal.getsignal(number)
  monkeypatch.setattr(begin, "_note", lambda _: os.kill(os.getpid(), number))
  with owner.Owner() as mine, pytest.raises(raised) as error:
    own(mine, [other, directory])
  assert number == signal.SIGINT or error.value.code == 128 + number
  assert signal.getsignal(number) is before
  assert owner.read(other) is None and owner.read(directory)["host"] == "elsewhere"


def test_a_signal_while_nothing_is_waited_for_is_passed_on(directory, monkeypatch):
  """To what watches over the steps."""
  monkeypatch.setattr(owner.Owner, "take", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
  with owner.Owner() as mine:
    assert own(mine, [directory]) == signal.SIGTERM


@pytest.mark.parametrize("number", ["EPERM", "ENOTSUP", "EOPNOTSUPP", "ENOSYS"])
def test_a_file_system_without_hard_links_will_do(directory, monkeypatch, number):
  def refuse(*_):
    raise OSError(getattr(errno, number), "as gcsfuse, exFAT and others")

  monkeypatch.setattr(os, "link", refuse)
  with owner.Owner() as first, owner.Owner() as second:
    first.take(directory)
    with pytest.raises(UserError, match="is being trained by process"):
      second.take(directory)
  assert list(directory.iterdir()) == []


def test_an_owner_that_was_taken_for_gone_leaves_the_next_one_its_place(storage, monkeypatch):
  """As one whose machine slept; on gs:// it would name itself again."""
  monkeypatch.setattr(owner, "_TOUCH", 0.02)
  directory = epath.Path("gs://bucket/w/block_00")
  with owner.Owner() as mine:
    mine.take(directory)
    while owner.read(directory)["host"] != "elsewhere":  # or a touch is under way
      claim(directory, host="elsewhere")
      time.sleep(0.1)
    time.sleep(0.3)
    assert owner.read(directory)["host"] == "elsewhere"
  assert owner.read(directory)["host"] == "elsewhere"


def test_storage_that_refuses_is_one_line(storage):
  directory, storage.down = epath.Path("gs://bucket/w/block_00"), True
  with owner.Owner() as mine, pytest.raises(UserError) as error:
    own(mine, [directory])
  assert str(error.value) == (f"{directory} cannot be written (Service Unavailable, 503): choose "
                              "another --workdir")


def test_an_error_without_words_of_the_system_is_said_in_its_own(directory, monkeypatch):
  """As gcsfs raises them: strerror is None."""
  def refuse(*_):
    raise OSError("Forbidden: bucket/w")

  monkeypatch.setattr(owner.Owner, "take", refuse)
  with owner.Owner() as mine, pytest.raises(UserError, match="cannot be written .Forbidden: b"):
    own(mine, [directory])


def test_an_outage_of_storage_does_not_end_the_signs_of_life(storage, monkeypatch):
  monkeypatch.setattr(owner, "_TOUCH", 0.02)
  directory = epath.Path("gs://bucket/w/block_00")
  with owner.Owner() as mine:
    mine.take(directory)
    storage.down = True
    time.sleep(0.3)
    storage.down = False
    last_seen_again(directory, after=(directory / owner.FILE).stat().mtime)
  assert not (directory / owner.FILE).exists()


def test_of_many_that_find_a_dead_owner_at_once_one_takes_its_place(directory):
  claim(directory, boot="before")
  barrier = threading.Barrier(8)

  def race(_):
    with owner.Owner() as mine:
      barrier.wait()
      try:
        mine.take(directory)
        return 1
      except UserError:
        return 0
      finally:
        barrier.wait()  # nobody leaves before all have tried

  with futures.ThreadPoolExecutor(8) as pool:
    assert sum(pool.map(race, range(8))) == 1
