"""One run a block: a second one is refused, and one that is gone does not stand in the way."""

from concurrent import futures
import json
import os
import subprocess
import sys
import threading
import time

from etils import epath
import pytest

from dbjax import owner
from dbjax.errors import UserError


@pytest.fixture
def directory(tmp_path):
  return epath.Path(tmp_path / "w/block_00")


def claim(directory, **fields):
  """Writes an owner's file, as another process would have."""
  directory.mkdir(parents=True, exist_ok=True)
  (directory / owner.FILE).write_text(json.dumps(owner.this_process(os.getpid()) | fields))


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
    ({"host": "elsewhere", "boot": "its own"}, False),
])
def test_who_is_gone(directory, fields, gone):
  claim(directory, **fields)
  with owner.Owner() as mine:
    if gone:
      mine.take(directory)
    else:
      with pytest.raises(UserError, match="is being trained by"):
        mine.take(directory)


def test_an_owner_on_another_host_is_gone_when_it_shows_no_life(directory, monkeypatch):
  claim(directory, host="elsewhere")
  long_ago = time.time() - owner.STALE - 5
  os.utime(directory / owner.FILE, (long_ago, long_ago))
  with owner.Owner() as mine:
    mine.take(directory)
  monkeypatch.setattr(owner, "_TOUCH", 0.01)
  with owner.Owner() as mine:
    mine.take(directory)
    os.utime(directory / owner.FILE, (long_ago, long_ago))
    time.sleep(0.5)
    assert (directory / owner.FILE).stat().mtime > time.time() - 60  # it shows that it lives


def test_a_damaged_file_is_named(directory):
  directory.mkdir(parents=True)
  (directory / owner.FILE).write_text("{")
  with owner.Owner() as mine, pytest.raises(UserError, match="remove .*block_00/owner.json"):
    mine.take(directory)


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
