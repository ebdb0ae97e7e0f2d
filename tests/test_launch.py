"""The launch scripts, with stand-ins that note how they are called: no cloud, no Slurm, no pip."""

import contextlib
import os
from pathlib import Path
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))

# Notes a call in one write (printf makes one a line): arguments | variables, between unusual
# characters.
STAND_IN = r"""#!/bin/bash
call=NAME
for arg; do call+=$'\x1f'$arg; done
call+=$'\x1d'
for variable in ${!JAX_*} ${!XLA_*}; do call+=$variable=${!variable}$'\x1f'; done
printf '%s\x1e' "$call" > CALLS.$$
cat CALLS.$$ >> CALLS
"""

# Nasty for a shell: each must reach dbjax.main as it is.
NASTY = ["--config.a=two  words", "--config.b=it's \"so\", $HOME `id` \\ ; exit 9 & * ? #",
         "--config.c=(1, 2)", "--config.d=", "--config.e=line\nline", "--config.f=ü!~%{x}"]


# What a stand-in does until a signal ends it; not for ever, lest a failed test leave it behind.
LINGER = "for _ in {1..400}; do sleep 0.05; done"


class Sandbox:
  """A small repository, and a PATH whose first commands are stand-ins."""

  def __init__(self, path):
    self.repository = path / "repository"
    self.bin = path / "bin"
    self.worker = path / "worker"  # the home directory on the TPU VM
    self.calls_file = path / "calls.jsonl"
    self.bin.mkdir()
    self.worker.mkdir()
    self.env = {"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(path), "CASE": str(path)}
    shutil.copytree(ROOT / "launch", self.repository / "launch")
    shutil.copy(ROOT / ".gitignore", self.repository)
    for name in ("requirements.txt", "setup.cfg", "pyproject.toml", "dbjax/main.py",
                 "configs/digits.py"):
      self.write(f"repository/{name}", f"# {name}\n")
    self.python("exit 0")
    self.install()

  def write(self, name, text):
    path = self.bin.parent / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path

  def stand_in(self, path, answer="exit 0"):
    """A command that notes its arguments, then answers as this bash script does."""
    note = STAND_IN.replace("NAME", Path(path).name).replace("CALLS", str(self.calls_file))
    self.write(path, note + answer).chmod(0o755)

  def python(self, main, where="repository"):
    """.venv/bin/python, where `python -m dbjax.main` does what the bash script `main` says."""
    self.stand_in(f"{where}/.venv/bin/python",
                  f'case "$1 $2" in "-c "*) exec {sys.executable} "$@" ;; "-m dbjax.main") ;; '
                  f"*) exit 0 ;; esac\n{main}")

  def install(self, where="repository"):
    """Marks all as installed there."""
    for extras in ("", "[plot]", "[cuda]", "[tpu,gcs]"):
      self.write(f"{where}/.venv/installed{extras}", f"{self.bin.parent / where}\n"
                 "# requirements.txt\n# setup.cfg\n# pyproject.toml\n")

  @contextlib.contextmanager
  def start(self, script, *args, **env):
    """The running script: the name of one in launch, or a path."""
    path = script if isinstance(script, Path) else self.repository / "launch" / script
    process = subprocess.Popen(
        ["bash", path, *args], env=self.env | env, cwd=self.bin.parent, text=True,
        start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE)
    try:
      yield process
    finally:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      process.stdout.close()
      process.stderr.close()
      process.wait()

  def run(self, script, *args, **env):
    with self.start(script, *args, **env) as process:
      out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)

  def calls(self, name=None, aside=False):
    """[(arguments, environment), ...] in order; what is asked of Python and pip only if `aside`."""
    calls = []
    for call in self.calls_file.read_text().split("\x1e")[:-1] if self.calls_file.exists() else []:
      argv, env = (part.split("\x1f") for part in call.split("\x1d"))
      if name in (None, argv[0]) and (aside or not {"-c", "pip"} & set(argv[1:3])):
        calls.append((argv[1:], dict(variable.split("=", 1) for variable in env[:-1])))
    return calls

  def argv(self, name=None):
    return [argv for argv, _ in self.calls(name)]


@pytest.fixture
def sandbox(tmp_path):
  return Sandbox(tmp_path)


def _wait_for(condition, what):
  end = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < end, f"waited in vain for {what}"
    time.sleep(0.02)


def _is_one_clear_line(result, *words):
  assert result.returncode == 2, (result.returncode, result.stderr)
  assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
  for word in words:
    assert word in result.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
  shellcheck = Path(sys.executable).parent / "shellcheck"
  result = subprocess.run([shellcheck, "-x", "-P", "SCRIPTDIR", script], capture_output=True,
                          text=True, check=False)
  assert result.returncode == 0, result.stdout + result.stderr


# ---- setup.sh ------------------------------------------------------------------------------------


def test_scripts_that_start_together_set_up_once(sandbox):
  (sandbox.repository / ".venv/installed[plot]").unlink()
  sandbox.stand_in("repository/.venv/bin/python", 'case "$3" in install) sleep 0.5 ;; esac')
  with contextlib.ExitStack() as stack:
    together = [stack.enter_context(sandbox.start("local.sh")) for _ in range(3)]
    assert [process.wait(timeout=60) for process in together] == [0, 0, 0]
  calls = [argv for argv, _ in sandbox.calls("python", aside=True)]
  assert len([argv for argv in calls if argv[2:3] == ["install"]]) == 1
  assert len(sandbox.argv("python")) == 12  # main, sample, evaluate and report, of each


def test_a_failed_installation_is_tried_again(sandbox):
  (sandbox.repository / ".venv/installed[plot]").unlink()
  sandbox.stand_in("repository/.venv/bin/python", 'case "$3" in install) exit 1 ;; esac')
  for _ in range(2):
    assert sandbox.run("local.sh").returncode == 1
  assert sandbox.argv("python") == []
  assert not (sandbox.repository / ".venv/installed[plot]").exists()


def test_a_repository_that_was_moved_is_installed_again(sandbox):
  sandbox.repository = sandbox.repository.rename(sandbox.bin.parent / "moved")
  for _ in range(2):
    assert sandbox.run("local.sh").returncode == 0
  calls = [argv for argv, _ in sandbox.calls("python", aside=True)]
  assert len([argv for argv in calls if argv[2:3] == ["install"]]) == 1


@pytest.mark.parametrize("python, words", [
    ('case "$1 $2" in "-m pip" | "-m ensurepip") exit 1 ;; esac', "no pip: move it away"),
    ('case "$1" in -c) exit 3 ;; esac', "Python older than 3.11: move it away")])
def test_the_environment_of_another_is_not_removed(sandbox, python, words):
  for path in (sandbox.repository / ".venv").glob("installed*"):
    path.unlink()
  sandbox.stand_in("repository/.venv/bin/python", python)
  sandbox.write("repository/.venv/mine", "")
  _is_one_clear_line(sandbox.run("local.sh"), ".venv", words)
  assert (sandbox.repository / ".venv/mine").exists()


def test_an_environment_without_pip_is_given_one(sandbox):
  for path in (sandbox.repository / ".venv").glob("installed*"):
    path.unlink()
  sandbox.stand_in("repository/.venv/bin/python", 'case "$2" in pip) [ -f "$CASE/pip" ] ;; '
                   'ensurepip) : > "$CASE/pip" ;; esac')
  assert sandbox.run("local.sh").returncode == 0
  assert (sandbox.repository / ".venv/installed[plot]").exists()


def test_an_own_environment_without_pip_or_python_is_made_anew(sandbox):
  venv = sandbox.repository / ".venv"
  sandbox.stand_in("bin/python3", 'case $2 in venv) mkdir -p "$3/bin"; cp "$CASE/new" '
                   '"$3/bin/python" ;; esac')
  sandbox.stand_in("new")
  for python in ('case "$2" in pip) exit 1 ;; esac', "exit 127"):
    sandbox.stand_in("repository/.venv/bin/python", python)
    sandbox.write("repository/.venv/damaged", "")
    assert sandbox.run("local.sh").returncode == 0
    assert (venv / "installed[plot]").exists() and not (venv / "damaged").exists()


# ---- versions.sh ---------------------------------------------------------------------------------


@pytest.fixture
def versions(sandbox):
  """Pythons 3.11 and 3.13, and no 3.12; numpy has two versions, jax has one."""
  sandbox.write("repository/requirements.txt",
                "# words\njax>=0.10.2,<0.11\netils[epath]>=1.13  # more words\nnumpy>=2.1\n")
  sandbox.stand_in("inside", """case "$* $0" in
    *list*-oldest/*) printf '%s\n' jax==0.10.2 numpy==2.1.0 pip==26 ;;
    *list*) printf '%s\n' jax==0.10.2 numpy==2.4.6 pip==26 ;;
    -V*) echo "Python ${0##*versions/}" ;;
    *"pip install"*) case $0 in *$BROKEN*) exit 1 ;; esac ;;
    *pytest*) case $0 in *$FAILS*) echo "1 failed in 2s"; exit 1 ;; esac; echo "3 passed in 1s" ;;
  esac""")
  make = ('[ "$1" = -c ] || { mkdir -p "$4/bin"; '
          f'cp {sandbox.bin.parent}/inside "$4/bin/python"; touch "$4/bin/pytest"; '
          'chmod +x "$4/bin/pytest"; }')
  sandbox.stand_in("bin/python3.11", make)
  sandbox.stand_in("bin/python3.12", "exit 127")
  sandbox.stand_in("bin/uv", "exit 2")
  sandbox.stand_in("elsewhere/versions/3.13.0/bin/python", make)
  sandbox.stand_in("bin/python3.13", "exit 127")  # of pyenv, where no version is chosen
  pyenv = str(sandbox.bin.parent / "elsewhere")
  return lambda *args, fails="none", broken="none": sandbox.run(
      "versions.sh", *args, FAILS=fails, BROKEN=broken, PYENV_ROOT=pyenv)


def test_versions_run_the_oldest_and_the_newest_on_each_python(sandbox, versions):
  result = versions("tests/test_block.py", "-k", "two words")
  assert result.returncode == 0, result.stderr
  assert result.stdout.splitlines()[-7:] == [
      "Python 3.11-oldest/bin/python, oldest: jax==0.10.2 numpy==2.1.0: 3 passed in 1s",
      "Python 3.11-newest/bin/python, newest: jax==0.10.2 numpy==2.4.6: 3 passed in 1s",
      "Python 3.11, the oldest is the newest: jax==0.10.2",
      "Python 3.12: not on this machine",
      "Python 3.13-oldest/bin/python, oldest: jax==0.10.2 numpy==2.1.0: 3 passed in 1s",
      "Python 3.13-newest/bin/python, newest: jax==0.10.2 numpy==2.4.6: 3 passed in 1s",
      "Python 3.13, the oldest is the newest: jax==0.10.2"]
  environments = sandbox.repository / ".venv-versions"
  assert (environments / "oldest.txt").read_text() == "jax==0.10.2\netils==1.13\nnumpy==2.1\n"
  assert (environments / "newest.txt").read_text() == ""
  calls = sandbox.calls("inside", aside=True)
  tests = [args for args, _ in calls if "pytest" in args]
  assert len(tests) == 4 and all(args[-3:] == ["tests/test_block.py", "-k", "two words"]
                                 for args in tests)
  wanted = [args[args.index("--constraint") + 1] for args, _ in calls if "--constraint" in args]
  assert wanted == [str(environments / f"{which}.txt") for which in ("oldest", "newest")] * 2
  versions()  # the environments stay
  made = [args for args, _ in sandbox.calls("python3.11", aside=True) if "venv" in args]
  assert len(made) == 2


def test_versions_without_any_python_fail(sandbox, versions):
  sandbox.stand_in("bin/python3.11", "exit 127")
  shutil.rmtree(sandbox.bin.parent / "elsewhere")
  result = versions()
  assert result.returncode == 1 and result.stdout.count("not on this machine") == 3


@pytest.mark.parametrize("how, line", [
    (dict(fails="3.13-oldest"), "numpy==2.1.0: 1 failed in 2s"),
    (dict(broken="3.13-oldest"), "Python 3.13, oldest: cannot be installed")])
def test_versions_one_that_fails_is_told_and_the_others_run(versions, how, line):
  result = versions(**how)
  assert result.returncode == 1
  assert result.stdout.count("3 passed in 1s\n") == 3 + 3 and line in result.stdout


# ---- local.sh ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler, guidance", [
    ('{"sample": {"num_steps": 5}}', []),
    ('{"sample": {"guidance": 1.0}}', ["--guidance=1,2"])])
def test_local_trains_samples_scores_and_reports(sandbox, sampler, guidance):
  w = sandbox.write("w w/config.json", sampler).parent
  result = sandbox.run("local.sh", f"--workdir={w}", *NASTY)
  assert result.returncode == 0, result.stderr
  config = sandbox.repository / "configs/digits.py"
  assert sandbox.calls("python") == [
      (["-m", "dbjax.main", f"--config={config}", f"--workdir={w}", *NASTY], {}),
      (["-m", "dbjax.sample", f"--workdir={w}", f"--out={w}/samples.npz", "--num_samples=100"],
       {}),
      (["-m", "dbjax.evaluate", f"--workdir={w}", *guidance, f"--json={w}/scores.json"], {}),
      (["-m", "dbjax.report", f"--workdir={w}", f"--out={w}/report.html"], {})]


def test_local_a_workdir_may_be_at_home(sandbox):
  assert sandbox.run("local.sh", "--workdir=~/a b").returncode == 0
  assert f"--workdir={sandbox.env['HOME']}/a b" in sandbox.argv("python")[0]


def test_local_some_blocks_are_not_sampled(sandbox):
  result = sandbox.run("local.sh", "--config.train.blocks=0,2")
  assert result.returncode == 0 and "0,2 only" in result.stdout
  assert [argv[1] for argv in sandbox.argv("python")] == ["dbjax.main"]


@pytest.mark.parametrize("before, after", [
    ({}, "--xla_force_host_platform_device_count=4"),
    ({"XLA_FLAGS": "--xla_a=1 --xla_b=2"},
     "--xla_a=1 --xla_b=2 --xla_force_host_platform_device_count=4"),
])
def test_local_devices_are_made_of_the_cpu_for_training_alone(sandbox, before, after):
  assert sandbox.run("local.sh", "--devices=4", **before).returncode == 0
  (argv, env), *others = sandbox.calls("python")
  assert "--distributed" not in argv and not [arg for arg in argv if arg.startswith("--devices")]
  assert env["JAX_PLATFORMS"] == "cpu" and env["XLA_FLAGS"].strip() == after
  assert [env for _, env in others] == [before] * 3


def test_local_processes_make_one_pod(sandbox):
  sandbox.python('for i in {1..50}; do printf "%s of process" $i; printf " %s\\n" $JAX_PROCESS_ID; '
                 'echo e$i >&2; done')
  result = sandbox.run("local.sh", "--processes=3", "--devices=2", "--workdir=/w", *NASTY)
  assert result.returncode == 0, result.stderr
  *pod, sample, evaluate, report = sandbox.calls("python")
  config = sandbox.repository / "configs/digits.py"
  assert all(argv == ["-m", "dbjax.main", "--distributed", f"--config={config}", "--workdir=/w",
                      *NASTY] for argv, _ in pod)
  assert sorted(env["JAX_PROCESS_ID"] for _, env in pod) == ["0", "1", "2"]
  for key in ("JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS"):
    assert {env[key] for _, env in pod} == {pod[0][1]["JAX_COORDINATOR_ADDRESS"]}
  assert re.fullmatch(r"127\.0\.0\.1:\d+", pod[0][1]["JAX_COORDINATOR_ADDRESS"])
  assert {(env["JAX_NUM_PROCESSES"], env["JAX_PLATFORMS"], env["XLA_FLAGS"].strip())
          for _, env in pod} == {("3", "cpu", "--xla_force_host_platform_device_count=2")}
  assert sample[1] == evaluate[1] == report[1] == {}

  for process, label in enumerate(["", "[1] ", "[2] "]):
    lines = [line for line in result.stdout.splitlines() if line.endswith(f"process {process}")]
    assert lines == [f"{label}{i} of process {process}" for i in range(1, 51)]
    assert result.stderr.splitlines().count(f"{label}e50") == 1


def test_local_one_process_is_a_pod_too(sandbox):
  assert sandbox.run("local.sh", "--processes=1").returncode == 0
  argv, env = sandbox.calls("python")[0]
  assert "--distributed" in argv and env["JAX_NUM_PROCESSES"] == "1"
  assert env["XLA_FLAGS"].strip() == "--xla_force_host_platform_device_count=1"


@pytest.mark.parametrize("value", ["0", "", "-1", "1.5", "two", "03", "1 2"])
@pytest.mark.parametrize("flag", ["--devices", "--processes"])
def test_local_counts_are_positive_numbers(sandbox, flag, value):
  _is_one_clear_line(sandbox.run("local.sh", f"{flag}={value}"), f"{flag}={value}")
  assert sandbox.argv("python") == []


def test_local_reads_its_arguments_before_it_sets_up(sandbox):
  shutil.rmtree(sandbox.repository / ".venv")
  _is_one_clear_line(sandbox.run("local.sh", "digits"), "digits: write flags as --name=value")
  assert not (sandbox.repository / ".venv").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("to_all", [False, True], ids=["kill", "terminal"])
def test_local_passes_a_signal_on_once(sandbox, number, to_all):
  """A terminal signals the script and its whole group, and process 0 ends before process 1."""
  sandbox.python('id=$JAX_PROCESS_ID; note() { echo "saved $id"; trap "exit $1" EXIT; }\n'
                 "trap 'note 143' TERM; trap 'note 130' INT; : > $CASE/ready$id\n"
                 "for ((i = 0; i < 10 + 20 * id; i++)); do sleep 0.05; done; exit 1")
  with sandbox.start("local.sh", "--processes=2") as process:
    _wait_for(lambda: len(list(sandbox.bin.parent.glob("ready?"))) == 2, "both processes")
    (os.killpg if to_all else os.kill)(process.pid, number)
    out, _ = process.communicate(timeout=60)
  assert process.returncode == 128 + number
  assert sorted(out.splitlines()) == ["[1] saved 1", "saved 0"]
  assert len(sandbox.argv("python")) == 2  # neither sampled nor scored


def test_local_single_process_is_signalled_too(sandbox):
  sandbox.python(f"trap 'echo saved; exit 143' TERM; : > $CASE/ready; {LINGER}")
  with sandbox.start("local.sh") as process:
    _wait_for((sandbox.bin.parent / "ready").exists, "training")
    process.terminate()
    out, _ = process.communicate(timeout=60)
  assert (process.returncode, out) == (143, "saved\n")


@pytest.mark.slow
def test_local_a_failing_process_ends_the_others(sandbox):
  sandbox.python('if [ "$JAX_PROCESS_ID" = 1 ]; then sleep 0.3; exit 7; fi\n'
                 f"trap 'echo ended $JAX_PROCESS_ID; exit 143' TERM; {LINGER}")
  result = sandbox.run("local.sh", "--processes=3")
  assert result.returncode == 7
  assert sorted(result.stdout.splitlines()) == ["[2] ended 2", "ended 0"]
  assert len(sandbox.argv("python")) == 3


# ---- slurm.sh ------------------------------------------------------------------------------------


@pytest.fixture
def slurm(sandbox):
  """slurm(*args, code=0, **env) runs the job as Slurm does: a copy of the script, elsewhere."""
  spool = sandbox.bin.parent / "spool/job100/slurm_script"
  spool.parent.mkdir(parents=True)
  shutil.copy(sandbox.repository / "launch/slurm.sh", spool)
  sandbox.env |= {"SLURM_JOB_ID": "100", "SLURM_SUBMIT_DIR": str(sandbox.repository)}
  sandbox.stand_in("bin/scontrol")

  def run(*args, code=0, **env):
    sandbox.stand_in("bin/srun", f"exit {code}")
    return sandbox.run(spool, *args, **env)

  run.spool = spool
  return run


SRUN = ["--kill-on-bad-exit=0", ".venv/bin/python", "-m", "dbjax.main", "--distributed"]


def test_slurm_one_job_is_one_step(sandbox, slurm):
  result = slurm("--workdir=/w", *NASTY)
  assert result.returncode == 0, result.stderr
  assert sandbox.calls() == [([*SRUN, "--workdir=/w", *NASTY], {})]


def test_slurm_a_process_takes_all_gpus_of_its_node(sandbox, slurm):
  assert slurm("--workdir=/w", SLURM_GPUS_ON_NODE="4", SLURM_NTASKS_PER_NODE="1",
               SLURM_CPUS_PER_TASK="8").returncode == 0
  assert sandbox.calls("srun") == [
      ([SRUN[0], "--cpus-per-task=8", *SRUN[1:], "--workdir=/w"],
       {"JAX_LOCAL_DEVICE_IDS": "0,1,2,3"})]


def test_slurm_or_one_gpu_each(sandbox, slurm):
  slurm("--workdir=/w", SLURM_GPUS_ON_NODE="4", SLURM_NTASKS_PER_NODE="4")
  assert sandbox.calls("srun") == [([*SRUN, "--workdir=/w"], {})]  # JAX picks by SLURM_LOCALID


@pytest.mark.parametrize("given, ids", [("1", "0"), ("2", "0,1"), ("gpu:h100:2", "0,1")])
def test_slurm_or_what_each_task_asks_for(sandbox, slurm, given, ids):
  slurm("--workdir=/w", SLURM_GPUS_ON_NODE="4", SLURM_NTASKS_PER_NODE="4",
        SLURM_GPUS_PER_TASK=given)
  assert sandbox.calls("srun") == [([*SRUN, "--workdir=/w"], {"JAX_LOCAL_DEVICE_IDS": ids})]


@pytest.mark.parametrize("env, extras", [
    ({}, "."), ({"SLURM_GPUS_ON_NODE": "1"}, ".[cuda]"), ({"EXTRAS": "[gcs]"}, ".[gcs]"),
    ({"SLURM_GPUS_ON_NODE": "1", "EXTRAS": ""}, "."),
])
def test_slurm_installs_what_the_job_needs(sandbox, slurm, env, extras):
  for path in (sandbox.repository / ".venv").glob("installed*"):
    path.unlink()
  slurm("--workdir=/w", **env)
  calls = [argv for argv, _ in sandbox.calls("python", aside=True)]
  assert [argv[-1] for argv in calls if argv[2:3] == ["install"]] == [extras]


def test_slurm_array_is_a_task_a_block(sandbox, slurm):
  for block in "02":
    slurm("--workdir=/w", SLURM_ARRAY_JOB_ID="90", SLURM_ARRAY_TASK_ID=block)
  assert sandbox.argv("srun") == [[*SRUN, "--workdir=/w", "--config.train.blocks=0"],
                                  [*SRUN, "--workdir=/w", "--config.train.blocks=2"]]


@pytest.mark.parametrize("env, job", [
    ({}, "100"), ({"SLURM_ARRAY_JOB_ID": "90", "SLURM_ARRAY_TASK_ID": "2"}, "90_2")])
def test_slurm_stopped_job_goes_to_the_queue_again(sandbox, slurm, env, job):
  assert slurm("--workdir=/w", code=143, **env).returncode == 143
  assert sandbox.argv("scontrol") == [["requeue", job]]


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_slurm_other_ends_are_ends(sandbox, slurm, code):
  assert slurm("--workdir=/w", code=code).returncode == code
  assert sandbox.argv("scontrol") == []


def test_slurm_requeue_that_fails_is_told(sandbox, slurm):
  sandbox.stand_in("bin/scontrol", "exit 1")
  result = slurm("--workdir=/w", code=143)
  assert result.returncode == 143 and "submit the same command" in result.stderr


def test_slurm_cancelled_job_stays_cancelled(sandbox, slurm):
  """scancel signals the steps and this shell; the time limit signals the steps alone."""
  sandbox.stand_in("bin/srun", f"trap 'exit 143' TERM; : > $CASE/ready; {LINGER}")
  with sandbox.start(slurm.spool, "--workdir=/w") as process:
    _wait_for((sandbox.bin.parent / "ready").exists, "srun")
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
  assert process.returncode == 143 and sandbox.argv("scontrol") == []


def test_slurm_header(slurm):
  """The signal is for the steps, not (B:) for the shell, and leaves minutes to save."""
  options = re.findall(r"^#SBATCH (\S+)$", slurm.spool.read_text(), re.MULTILINE)
  assert {"--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= set(options)
  assert [o for o in options if o.startswith("--signal")] == ["--signal=TERM@300"]


@pytest.mark.parametrize("args, env, words", [
    (["--workdir=/w"], {"SLURM_JOB_ID": ""}, ["sbatch", "launch/local.sh"]),
    (["--workdir=/w"], {"SLURM_SUBMIT_DIR": "/"}, ["/ is not the repository", "cd"]),
    (["--workdir", "/w"], {}, ["--workdir", "--name=value"]),
    (["--config.train.blocks=1"], {"SLURM_ARRAY_TASK_ID": "1"}, ["--config.train.blocks=1"]),
])
def test_slurm_mistakes(sandbox, slurm, args, env, words):
  _is_one_clear_line(slurm(*args, **env), *words)
  assert sandbox.argv() == []


# ---- tpu_vm.sh -----------------------------------------------------------------------------------

PLACE = ["--name=my-tpu", "--zone=us-west4-a"]
TYPE = ["--type=v5litepod-16"]
TRAIN = ["--config=configs/digits.py", "--workdir=gs://bucket/w"]

# Answers from $CASE/<verb>: a line a call, a state or an exit code; "on" calls the worker. Without
# such a file all is well.
GCLOUD = r"""
verb=$4 answer=$CASE/$4
case $verb:$* in ssh:*on_worker*) ;; ssh:*) answer=$CASE/unpack ;; esac
next=$(head -n 1 "$answer" 2>/dev/null) && sed -i 1d "$answer" 2>/dev/null
case $verb in
  describe)
    case $next in
      NOT_FOUND) echo "ERROR: (gcloud) NOT_FOUND: Resource 'my-tpu' was not found" >&2; exit 1 ;;
      ERROR) echo "ERROR: (gcloud) PERMISSION_DENIED" >&2; exit 1 ;;
      *) echo "a warning" >&2; echo "${next:-READY}"; exit 0 ;;
    esac ;;
  scp) cp "$5" "$CASE/worker/${6#*:}" ;;
  ssh)
    for arg; do case $arg in --command=*) command=${arg#*=} ;; esac; done
    case ${next:-on} in on) cd "$CASE/worker"; HOME=$PWD exec bash -c "$command" ;; esac ;;
esac
exit "${next:-0}"
"""


@pytest.fixture
def tpu(sandbox):
  """tpu(command, *args, ssh=["255", "on"], ...) with what gcloud answers, call by call."""
  subprocess.run(["git", "init", "--quiet", sandbox.repository], check=True)
  subprocess.run(["git", "-C", sandbox.repository, "add", "."], check=True)
  sandbox.stand_in("bin/gcloud", GCLOUD)
  sandbox.stand_in("bin/python3")  # new enough
  shutil.copytree(sandbox.repository / ".venv", sandbox.worker / "dbjax/.venv")
  sandbox.install("worker/dbjax")

  def answer(**answers):
    for verb, lines in answers.items():
      sandbox.write(verb, "".join(f"{line}\n" for line in lines))

  def run(command, *args, **answers):
    answer(**answers)
    return sandbox.run("tpu_vm.sh", command, *PLACE, *args)

  run.answer = answer
  return run


def _verbs(sandbox):
  """describe, create, ...; ssh as what it does there."""
  verbs = []
  for argv in sandbox.argv("gcloud"):
    does = re.search(r"on_worker (\w+)", " ".join(argv)) if argv[3] == "ssh" else None
    verbs.append("unpack" if argv[3] == "ssh" and not does else does[1] if does else argv[3])
  return verbs


NEW = ["create", "scp", "unpack", "run"]


@pytest.mark.parametrize("command, args, describe, verbs", [
    ("create", [*TYPE, "--spot", "--project=my project"], [], ["create"]),
    ("copy", [], [], ["scp", "unpack"]),
    ("run", [*TYPE, *TRAIN, *NASTY], ["NOT_FOUND"], ["describe", *NEW]),
    ("status", [], ["READY"], ["describe", "status"]),
    ("stop", ["--project=p"], [], ["stop"]),
    ("delete", [], [], ["delete"]),
])
def test_tpu_dry_run_prints_what_would_run(sandbox, tpu, command, args, describe, verbs):
  sandbox.stand_in("bin/date", "echo 1700000000")
  ssh = ["0"]  # the worker itself has tests below
  dry = tpu(command, *args, "--dry-run")
  assert dry.returncode == 0, dry.stderr
  assert sandbox.argv("gcloud") == [] and not (sandbox.repository / ".runs/my-tpu.tar.gz").exists()
  real = tpu(command, *args, describe=describe, ssh=ssh)
  assert real.returncode == 0, real.stderr
  calls = sandbox.argv("gcloud")
  assert _verbs(sandbox) == verbs

  sandbox.calls_file.unlink()
  tpu.answer(ssh=ssh)
  pasted = sandbox.run(sandbox.write("pasted", dry.stdout))
  assert pasted.returncode == 0, pasted.stderr
  assert sandbox.argv("gcloud") == calls


def test_tpu_exact_commands(sandbox, tpu):
  tpu("create", *TYPE, "--spot", "--project=p")
  tpu("delete")
  tpu("status", ssh=["0"])
  place = ["--zone=us-west4-a", "--quiet"]
  gcloud = ["compute", "tpus", "tpu-vm"]
  create, delete, describe, ssh = sandbox.argv("gcloud")
  assert create == [*gcloud, "create", "my-tpu", "--accelerator-type=v5litepod-16",
                    "--version=v2-alpha-tpuv5-lite", "--spot", place[0], "--project=p", place[1]]
  assert delete == [*gcloud, "delete", "my-tpu", *place]
  assert describe == [*gcloud, "describe", "my-tpu", "--format=value(state)", *place]
  assert ssh[:6] == [*gcloud, "ssh", "my-tpu", "--worker=0"] and ssh[-2:] == place


@pytest.mark.parametrize("name, version", [
    ("v4-8", "tpu-ubuntu2204-base"), ("v5litepod-1", "v2-alpha-tpuv5-lite"),
    ("v5p-8", "v2-alpha-tpuv5"), ("v6e-256", "v2-alpha-tpuv6e"),
])
def test_tpu_version_suits_the_type(tpu, name, version):
  assert f"--version={version} " in tpu("create", f"--type={name}", "--dry-run").stdout
  assert "--version=mine " in tpu("create", f"--type={name}", "--version=mine", "--dry-run").stdout


def test_tpu_copies_what_git_sees_and_keeps_the_environment(sandbox, tpu):
  sandbox.write("repository/configs/new.py", "not added yet")
  sandbox.write("repository/.runs/digits/large", "ignored")
  for name in ("gone.py", ".venv/kept", ".runs/kept"):
    sandbox.write(f"worker/dbjax/{name}", "was there")
  (sandbox.repository / "launch/slurm.sh").unlink()  # and git has not been told
  result = tpu("copy")
  assert result.returncode == 0, result.stderr
  there = {str(path.relative_to(sandbox.worker / "dbjax"))
           for path in (sandbox.worker / "dbjax").rglob("*") if path.is_file()}
  assert {"dbjax/main.py", "launch/tpu_vm.sh", "configs/new.py", ".venv/kept", ".runs/kept",
          ".venv/bin/python"} <= there
  assert not {"gone.py", ".runs/digits/large", "launch/slurm.sh"} & there
  assert all(path.startswith(".venv/") or "venv" not in path for path in there)


def test_tpu_run_makes_copies_sets_up_and_trains(sandbox, tpu):
  sandbox.python('echo "trains in $PWD"; exit 5', where="worker/dbjax")
  after = ["--", "--", "--name=not mine", "--verbosity", "1"]
  result = tpu("run", "--pause=0", *TYPE, *TRAIN, *NASTY, *after, describe=["NOT_FOUND", "READY"])
  assert result.returncode == 5
  assert f"trains in {sandbox.worker}/dbjax" in result.stdout
  assert "delete --name=my-tpu --zone=us-west4-a" in result.stderr
  assert sandbox.argv("python") == [
      ["-m", "dbjax.main", "--distributed", *TRAIN, *NASTY, *after[1:]]]
  assert _verbs(sandbox) == ["describe", *NEW, "describe"]

  result = tpu("status")
  assert result.returncode == 0
  assert "my-tpu: READY" in result.stdout and "exit code 5" in result.stdout
  assert "trains in" in result.stdout


def test_tpu_run_goes_on_where_it_was_lost(sandbox, tpu):
  sandbox.python('for i in {1..30}; do echo step $i; done\n'
                 'for _ in {1..400}; do [ -f "$CASE/go" ] || sleep 0.05; done; echo done',
                 where="worker/dbjax")
  steps = [f"step {i}\n" for i in range(1, 31)]
  tpu("copy")
  with sandbox.start("tpu_vm.sh", "run", *PLACE, *TYPE, *TRAIN) as process:
    assert [process.stdout.readline() for _ in steps] == steps
  other = _without_gcloud(tpu("run", *TYPE, *TRAIN, "--config.seed=1"))
  _is_one_clear_line(other, "another run", "stop")
  assert "goes on" in tpu("status").stdout
  with sandbox.start("tpu_vm.sh", "run", *PLACE, *TYPE, *TRAIN) as process:
    assert [process.stdout.readline() for _ in steps[-20:]] == steps[-20:]
    sandbox.write("go", "")
    out, _ = process.communicate(timeout=60)
  assert (process.returncode, out) == (0, "done\n")
  assert len(sandbox.argv("python")) == 1

  tpu("run", *TYPE, *TRAIN)  # a run that has ended is started anew: it resumes
  assert len(sandbox.argv("python")) == 2

  # But gcloud itself repeats a command whose connection broke: not to start another run.
  command = next(arg for arg in sandbox.argv("gcloud")[-1] if arg.startswith("--command="))
  repeated = subprocess.run(["bash", "-c", command.removeprefix("--command=")], cwd=sandbox.worker,
                            env=sandbox.env, capture_output=True, text=True, check=False)
  assert repeated.returncode == 0 and repeated.stdout.endswith("done\n")
  assert len(sandbox.argv("python")) == 2


def _without_gcloud(result):
  """Without what this script says of the VM after the worker's own line."""
  result.stderr = "".join(line for line in result.stderr.splitlines(keepends=True)
                          if not line.startswith("exit code"))
  return result


def test_tpu_stop_lets_the_run_save(sandbox, tpu):
  sandbox.python(f"trap 'echo saved; exit 143' TERM; echo step 1; {LINGER}", where="worker/dbjax")
  tpu("copy")
  with sandbox.start("tpu_vm.sh", "run", *PLACE, *TYPE, *TRAIN, "--pause=0") as process:
    assert process.stdout.readline() == "step 1\n"
    # Deleted right after: the script that waits must not make the VM again.
    result = tpu("stop", describe=["NOT_FOUND"])
    assert result.returncode == 0 and "saved" in result.stdout
    out, _ = process.communicate(timeout=60)
  assert process.returncode == 143 and out.endswith("saved\n")
  assert "create" not in _verbs(sandbox)[2:]
  assert "no run goes on" in tpu("stop").stdout
  # A run that is started after the stop is made again, as any.
  answers = {"describe": ["READY", "PREEMPTED"], "ssh": ["255", "0"]}
  assert tpu("run", *TYPE, *TRAIN, "--pause=0", **answers).returncode == 0


def test_tpu_set_up_can_be_stopped(sandbox, tpu):
  (sandbox.worker / "dbjax/.venv/installed[tpu,gcs]").unlink()
  sandbox.stand_in("worker/dbjax/.venv/bin/python",
                   'case $3 in install) echo installs; : > "$CASE/ready"; sleep 20 ;; esac')
  tpu("copy")
  with sandbox.start("tpu_vm.sh", "run", *PLACE, *TYPE, *TRAIN, "--pause=0") as process:
    _wait_for((sandbox.bin.parent / "ready").exists, "pip")
    assert tpu("stop").returncode == 0
    process.communicate(timeout=60)
  assert process.returncode == 143 and sandbox.argv("python") == []
  assert not (sandbox.worker / "dbjax/.venv/installed[tpu,gcs]").exists()


def test_tpu_failed_installation_is_no_run(sandbox, tpu):
  marker = sandbox.worker / "dbjax/.venv/installed[tpu,gcs]"
  marker.unlink()
  sandbox.stand_in("worker/dbjax/.venv/bin/python", 'case $3 in install) exit 9 ;; esac')
  tpu("copy")
  assert tpu("run", *TYPE, *TRAIN, "--pause=0").returncode == 9
  assert sandbox.argv("python") == [] and not marker.exists()


def test_tpu_without_copy_says_so(sandbox, tpu):
  shutil.rmtree(sandbox.worker / "dbjax")
  _is_one_clear_line(_without_gcloud(tpu("run", *TYPE, *TRAIN)), "copy")


def test_tpu_old_python_is_replaced(sandbox, tpu):
  """Ubuntu 22.04 has Python 3.10: uv brings a newer one, and .venv is made with that."""
  shutil.move(sandbox.worker / "dbjax/.venv", sandbox.worker / "venv")
  sandbox.stand_in("bin/python3", 'case $1 in -c) exit 1 ;; esac\nmkdir -p ~/.local/bin\n'
                   'mv "$CASE/uv" ~/.local/bin/uv')
  sandbox.stand_in("uv", 'case $2 in find) echo "$CASE/python3.12" ;; esac')
  sandbox.stand_in("python3.12", 'case $2 in venv) mv "$HOME/venv" "$3" ;; esac')
  tpu("copy")
  result = tpu("run", *TYPE, *TRAIN)
  assert result.returncode == 0, result.stdout + result.stderr
  assert len(sandbox.argv("python")) == 1
  assert [argv[:2] for argv in sandbox.argv("uv")] == [["python", "install"], ["python", "find"]]


# Each: what describe says call by call, other answers, exit code, the calls.
@pytest.mark.parametrize("describe, answers, code, verbs", [
    pytest.param(["READY"], {"ssh": ["0"]}, 0, ["describe", "run"], id="all is well"),
    pytest.param(["READY", "PREEMPTED"], {"ssh": ["255", "0"]}, 0,
                 ["describe", "run", "describe", "delete", *NEW], id="preempted"),
    pytest.param(["READY", "TERMINATED"], {"ssh": ["143", "0"]}, 0,
                 ["describe", "run", "describe", "delete", *NEW], id="terminated, having saved"),
    pytest.param(["NOT_FOUND", "PREEMPTED", "PREEMPTED"], {"ssh": ["1", "255", "0"]}, 0,
                 ["describe", *NEW, *2 * ["describe", "delete", *NEW]], id="preempted twice"),
    pytest.param(["READY", "NOT_FOUND"], {"ssh": ["255", "0"]}, 0,
                 ["describe", "run", "describe", *NEW], id="gone"),
    pytest.param(["PREEMPTED"], {"ssh": ["0"]}, 0, ["describe", "delete", *NEW],
                 id="was preempted before"),
    pytest.param(["READY", "PREEMPTED", "NOT_FOUND", "NOT_FOUND"],
                 {"ssh": ["255", "0"], "create": ["1", "1", "0"]}, 0,
                 ["describe", "run", "describe", "delete", *2 * ["create", "describe"], *NEW],
                 id="no capacity for a while"),
    pytest.param(["NOT_FOUND", "PREEMPTED"], {"scp": ["255", "0"], "ssh": ["0"]}, 0,
                 ["describe", "create", "scp", "describe", "delete", *NEW],
                 id="preempted while copying"),
    pytest.param(["READY", "ERROR", "PREEMPTED"], {"ssh": ["255", "0"]}, 0,
                 ["describe", "run", "describe", "describe", "delete", *NEW],
                 id="the answer is lost once"),
    pytest.param(["READY", "READY"], {"ssh": ["7"]}, 7, ["describe", "run", "describe"],
                 id="a failure"),
    pytest.param(["READY", "READY"], {"ssh": ["255"]}, 255, ["describe", "run", "describe"],
                 id="a lost connection"),
    pytest.param(["READY"], {"ssh": ["2"]}, 2, ["describe", "run"], id="a mistake"),
    pytest.param(["NOT_FOUND"], {"create": ["1"]}, 1, ["describe", "create"], id="cannot create"),
    pytest.param(["NOT_FOUND", "READY"], {"unpack": ["3"]}, 3,
                 ["describe", "create", "scp", "unpack", "describe"], id="cannot copy"),
    pytest.param(["ERROR"], {}, 1, ["describe"], id="no permission"),
    pytest.param(["CREATING"], {}, 2, ["describe"], id="not ready"),
])
def test_tpu_run_outlives_preemption_alone(sandbox, tpu, describe, answers, code, verbs):
  result = tpu("run", *TYPE, *TRAIN, "--pause=0", describe=describe, **answers)
  assert result.returncode == code, result.stderr
  assert _verbs(sandbox) == verbs
  runs = [argv for argv in sandbox.argv("gcloud") if "on_worker run" in " ".join(argv)]
  assert all(argv == runs[0] for argv in runs)


def test_tpu_pauses_between_tries(sandbox, tpu):
  sandbox.stand_in("bin/sleep")
  tpu("run", *TYPE, *TRAIN, ssh=["255", "0"], describe=["READY", "PREEMPTED"])
  tpu("run", *TYPE, *TRAIN, "--pause=90", ssh=["255", "0"], describe=["READY", "PREEMPTED"])
  assert sandbox.argv("sleep") == [["30"], ["90"]]


@pytest.mark.parametrize("args, words", [
    ([], ["what to do", "--help"]),
    (["start", *PLACE], ["start", "create, copy, run"]),
    (["delete", "--zone=z"], ["--name is missing"]),
    (["delete", "--name=n"], ["--zone is missing"]),
    (["delete", "--name=N/x", "--zone=z"], ["--name=N/x"]),
    (["delete", *PLACE, "--force=1"], ["--force=1", "delete"]),
    (["delete", *PLACE, "now"], ["now", "--name=value"]),
    (["create", *PLACE], ["--type is missing"]),
    (["create", *PLACE, "--type=v9-8"], ["--version is missing", "v9-8", "versions list"]),
    (["run", *PLACE, *TRAIN], ["--type is missing"]),
    (["run", *PLACE, *TYPE, TRAIN[1]], ["--config is missing"]),
    (["run", *PLACE, *TYPE, TRAIN[1], "--config=no.py"], ["--config=no.py", "repository"]),
    (["run", *PLACE, *TYPE, TRAIN[1], "--config=digitz"], ["--config=digitz", "name of one in"]),
    (["run", *PLACE, *TYPE, TRAIN[0]], ["--workdir=:", "gs://"]),
    (["run", *PLACE, *TYPE, TRAIN[0], "--workdir=/tmp/w"], ["--workdir=/tmp/w", "gs://"]),
    (["run", *PLACE, *TYPE, *TRAIN, "--workdir", "x"], ["--workdir:", "--name=value"]),
    (["run", *PLACE, *TYPE, *TRAIN, "--pause=x"], ["--pause=x", "seconds"]),
])
def test_tpu_mistakes(sandbox, tpu, args, words):
  _is_one_clear_line(sandbox.run("tpu_vm.sh", *args), *words)
  assert sandbox.argv() == []


@pytest.mark.parametrize("config", ["digits", "digits:small", "configs/digits.py:small"])
def test_tpu_takes_a_config_by_its_name(tpu, config):
  result = tpu("run", *TYPE, TRAIN[1], f"--config={config}", "--dry-run")
  assert result.returncode == 0 and f"--config={config}" in result.stdout, result.stderr


def test_tpu_gcloud_is_missing(sandbox, tmp_path):
  few = tmp_path / "few"
  few.mkdir()
  for name in ("bash", "dirname"):
    (few / name).symlink_to(shutil.which(name))
  _is_one_clear_line(sandbox.run("tpu_vm.sh", "delete", *PLACE, PATH=str(few)), "gcloud is missing")


def test_help_is_the_header(sandbox):
  result = sandbox.run("tpu_vm.sh", "--help")
  assert result.returncode == 0
  assert all(word in result.stdout for word in ("run ", "--zone", "--dry-run", "gs://", "delete"))
  assert not any(line.startswith(("#", "set ")) for line in result.stdout.splitlines())
