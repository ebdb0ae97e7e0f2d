"""The watch over several processes, without JAX: who is lost is said by all others, in one line."""

import contextlib
import json
import os
from pathlib import Path
import re
import signal
import subprocess
import sys
import time

from conftest import ROOT
from etils import epath
import pytest

from dbjax import owner
from dbjax import sharding
from dbjax import watch
from dbjax.errors import UserError

# For each line [DIRECTORY, [SCRIPT, ...]] forks the processes of a run, and answers with their exit
# codes. Each does what its script says, once all have met; what it writes goes to a file.
PODS = """
import json, os, signal, sys, time
from pathlib import Path
from etils import epath
from dbjax import watch
from dbjax.errors import UserError

watch.STALE, watch.JOIN, watch._LOOK, watch._GRACE = 2, 1, 0.1, 0.8

def meet(number, tell):
  (where / f"{number}.new").write_text(json.dumps(watch.member()))
  (where / f"{number}.new").rename(where / f"{number}.met")
  paths = [where / f"{i}.met" for i in range(len(scripts))]
  while not all(p.exists() for p in paths):
    time.sleep(0.02)
  tell(process=number, members=[json.loads(p.read_text()) for p in paths])
  time.sleep(0.3)

def act(number):
  os.dup2(os.open(where / f"{number}.err", os.O_WRONLY | os.O_CREAT), 2)
  with watch.watched(epath.Path(where / "w")) as tell:
    tell(joining="this is one of several")
    if scripts[number] == "never":
      time.sleep(100)
    if scripts[number] == "alone":
      raise __import__("jax").errors.JaxRuntimeError("DEADLINE_EXCEEDED: while they meet")
    meet(number, tell)
    exec(scripts[number])
  (where / f"{number}.done").write_text("")

for line in iter(sys.stdin.readline, ""):
  where, scripts = json.loads(line)
  where, pids, codes = Path(where), {}, {}
  for number in range(len(scripts)):
    pids[os.fork()] = number
    if 0 in pids:
      act(number)
      sys.stdout.flush()
      os._exit(0)
    (where / f"{number}.pid").write_text(str(list(pids)[-1]))
  while pids:
    pid, status = os.wait()
    codes[pids.pop(pid)] = os.waitstatus_to_exitcode(status)
  print([codes[number] for number in range(len(scripts))], flush=True)
"""
HANG = "time.sleep(100)"
KILL_ALL = "os.kill(os.getppid(), signal.SIGKILL); time.sleep(100)"
CRASH = ("os.write(2, b'E1128 20:06 agent.cc:289] Polled an error\\n'); time.sleep(0.3)\n"
         "os.write(2, b'Fatal Python error: Aborted\\n'); os.abort()")


@pytest.fixture(scope="module")
def pods():
  """One process, which has imported everything, that all runs are forked from."""
  with subprocess.Popen([sys.executable, "-c", PODS], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE) as process:
    yield process
    process.stdin.close()


@pytest.fixture
def pod(pods, tmp_path):
  """pod(script, script, ...): [(exit code, stderr), ...], and the seconds that it took."""

  def run(*scripts):
    begin = time.monotonic()
    print(json.dumps([str(tmp_path), scripts]), file=pods.stdin, flush=True)
    ends = [(code, (tmp_path / f"{i}.err").read_text())
            for i, code in enumerate(json.loads(pods.stdout.readline()))]
    return ends, time.monotonic() - begin

  return run


def _names(line, process, count, *words):
  assert line.count("\n") == 1, line
  assert re.match(rf"error: process {process} of {count} \(host \S+, pid \d+\) ", line), line
  for word in (*words, "the same command goes on from the last checkpoints in "):
    assert word in line, line


def test_a_normal_end_leaves_nothing_behind(pod, tmp_path):
  ends, _ = pod("", "print('a warning', file=sys.stderr)", "time.sleep(1)")
  assert ends == [(0, ""), (0, "a warning\n"), (0, "")]
  assert not (tmp_path / "w").exists()


def test_a_failure_of_jax_while_they_meet_is_one_line(pod):
  """As when another is killed that early: nobody knows it by name."""
  ends, _ = pod("alone")
  (code, err), = ends
  assert code == watch.EXIT_CODE and err.count("\n") == 1, err
  assert err.startswith("error: another process was lost, or the network"), err


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_is_named_by_all_others(pod, tmp_path, lost):
  """The others hang in a collective, or crash as JAX does."""
  (tmp_path / "w/block_00").mkdir(parents=True)
  scripts = [HANG, CRASH, "raise __import__('jax').errors.JaxRuntimeError('closed by peer')"]
  scripts.insert(lost, KILL_ALL)
  ends, seconds = pod(*scripts)
  assert ends.pop(lost) == (-signal.SIGKILL, "")
  pid = (tmp_path / f"{lost}.pid").read_text()
  for code, err in ends:
    assert code == watch.EXIT_CODE
    _names(err, lost, 4, "was killed", f"pid {pid})")
  assert seconds < 15
  assert [p.name for p in (tmp_path / "w").iterdir()] == ["block_00"]  # the last removes all files


def test_the_training_killed_alone_is_named_by_its_watcher_too(pod):
  ((code, err), (other, line)), _ = pod("os.kill(os.getpid(), signal.SIGKILL)", HANG)
  assert code == 137 and err.count("\n") == 1 and "was ended by SIGKILL" in err
  assert other == watch.EXIT_CODE
  _names(line, 0, 2, "was ended by SIGKILL, perhaps for want of memory")


@pytest.mark.parametrize("lost", [0, 1])
def test_an_error_of_one_process_ends_the_others(pod, lost):
  scripts = [HANG]
  scripts.insert(lost, "raise UserError('photo.png is\\nno image')")
  ends, _ = pod(*scripts)
  assert ends.pop(lost) == (2, "error: photo.png is no image\n")
  assert ends[0][0] == watch.EXIT_CODE
  _names(ends[0][1], lost, 2, "ended with an error, to be mended first (photo.png is no image)")


def test_an_error_of_all_is_said_by_all(pod):
  """As where they find that their configs differ: one may be slower."""
  wrong = "raise UserError('they differ')"
  ends, _ = pod(wrong, f"time.sleep(0.2); {wrong}", wrong)
  assert ends == [(2, "error: they differ\n")] * 3


def test_a_mistake_of_ours_keeps_its_stack_trace(pod):
  ((code, err), (other, line)), _ = pod("1 / 0", HANG)
  assert code == 1 and err.startswith("Traceback") and "ZeroDivisionError" in err
  assert other == watch.EXIT_CODE
  _names(line, 0, 2, "ended with a ZeroDivisionError")


@pytest.mark.slow  # its parts are quick, its waiting is not
def test_a_process_that_shows_no_life_is_lost(pod, tmp_path):
  """Stopped, it looks as if its machine were gone."""
  wake = f"time.sleep(12); os.kill(int(Path(r'{tmp_path}/1.pid').read_text()), signal.SIGCONT)"
  ends, _ = pod(HANG, "os.kill(os.getppid(), signal.SIGSTOP); " + HANG, "import subprocess; "
                f"subprocess.Popen([sys.executable, '-c', {_detached(wake)!r}]); {HANG}")
  for i in (0, 2):
    assert ends[i][0] == watch.EXIT_CODE
    _names(ends[i][1], 1, 3, "has given no sign of life for")
  assert ends[1][0] == watch.EXIT_CODE  # awake again, it finds the others gone


def _detached(code):
  return f"import os, signal, time; from pathlib import Path; {code}"


def test_who_waits_for_others_in_vain_says_so(pod):
  ((code, err),), _ = pod("never")
  assert code == watch.EXIT_CODE and err.count("\n") == 1
  assert "this is one of several, and not all have come within 1 s: start each" in err


def test_a_signal_is_passed_on_once(pod):
  trap = ("signal.signal(signal.SIGTERM, lambda *_: (print('saved', file=sys.stderr), "
          "sys.exit(143)))")
  ends, _ = pod(f"{trap}; os.kill(os.getppid(), signal.SIGTERM); {HANG}",
                f"{trap}; os.kill(os.getppid(), signal.SIGTERM); {HANG}")
  assert ends == [(143, "saved\n")] * 2


def test_what_is_no_crash_is_only_late(pod):
  ends, _ = pod("print('Traceback of a thread', file=sys.stderr); time.sleep(1)", "time.sleep(1)")
  assert ends == [(0, "Traceback of a thread\n"), (0, "")]


def test_no_process_outlives_its_watcher(pod, tmp_path):
  note = f"Path(r'{tmp_path}/child').write_text(str(os.getpid()))"
  pod(f"{note}; {KILL_ALL}")
  pid = int((tmp_path / "child").read_text())
  end = time.monotonic() + 10
  while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
    assert time.monotonic() < end
    time.sleep(0.05)


def test_a_workdir_that_cannot_be_written_is_one_line(pod, tmp_path):
  (tmp_path / "w").write_text("a file")
  ends, _ = pod(HANG, HANG)
  for code, err in ends:
    assert code == 2 and err.count("\n") == 1
    assert f"--workdir={tmp_path}/w cannot be written" in err


def test_files_of_dead_runs_are_forgotten(pod, tmp_path):
  long_ago = time.time() - 1000
  for name, when in (("old", long_ago), ("young", time.time())):
    path = tmp_path / "w/.alive" / name / "0"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    os.utime(path, (when, when))
  ends, _ = pod("", "")
  assert ends == [(0, ""), (0, "")]
  assert [p.name for p in (tmp_path / "w/.alive").iterdir()] == ["young"]


def test_an_outage_of_storage_does_not_end_the_watch(storage, monkeypatch):
  """Nobody is lost for it, and nothing is raised."""
  monkeypatch.setattr(watch, "_LOOK_REMOTE", 0)
  members = [owner.this_process(os.getpid()) | dict(run="run")] * 2
  workdir = epath.Path("gs://bucket/w")
  first, second = (watch._Peers(workdir, process, members) for process in range(2))
  first._pace = second._pace = 0
  for peers in (first, second):
    peers.look()
  storage.down = True
  for peers in (first, second):
    peers.look()
  first.end(watch.End(0), linger=False)
  first.clear()
  storage.down = False
  first.end(watch.End(2, "has failed"), linger=False)
  second.look()
  assert not first.lost and second.lost.endswith("has failed")


def test_a_workdir_in_storage_that_refuses_is_one_line(storage):
  storage.down = True
  members = [owner.this_process(os.getpid()) | dict(run="run")] * 2
  watcher = watch._Watcher(epath.Path("gs://bucket/w"), 0, os.open(os.devnull, os.O_RDONLY),
                           os.open(os.devnull, os.O_RDONLY))
  watcher._hear(process=1, members=members)
  assert watcher._end.code == 2
  assert "--workdir=gs://bucket/w cannot be written (Service Unavailable" in watcher._end.line


def test_storage_that_refuses_is_found_before_the_others_are_waited_for(storage, monkeypatch):
  storage.down = True
  monkeypatch.setattr(watch, "watched", lambda _: contextlib.nullcontext(lambda **_: None))
  monkeypatch.setattr(sharding, "_initialize", lambda: pytest.fail("it waits for others"))
  with (pytest.raises(UserError, match="--workdir=gs://bucket/w cannot be reached .Service Unav"),
        sharding.joined(True, epath.Path("gs://bucket/w"))):
    pass
