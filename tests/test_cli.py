"""Commands as a user types them: help, mistakes, and one whole run."""

import contextlib
import functools
import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys

from absl import flags
from conftest import ROOT
from etils import epath
import jax
import numpy as np
from PIL import Image
import pytest

from dbjax import cli
from dbjax import loop
from dbjax import provenance
from dbjax.errors import UserError

SMALL = ("--config=configs/digits.py", "--config.model.num_layers=2", "--config.num_blocks=2",
         "--config.model.width=16", "--config.model.num_heads=2", "--config.model.unroll=1",
         "--config.train.num_steps=4", "--config.train.batch_size=8",
         "--config.checkpoint.every_steps=2", "--config.checkpoint.keep=2",
         "--config.log.every_steps=2", "--config.sample.num_steps=4")


@pytest.mark.parametrize("module, words", [
    ("main", ["--config=configs/digits.py", "--config.train.blocks=0,2", "--workdir"]),
    ("sample", ["--num_samples: How many", "--guidance", "--seed: Sample i is", "--labels"]),
    ("partition", ["--by: What is divided", "--pilot_steps: ", "--num_examples: ", "--[no]layers"]),
    ("evaluate", ["--workdir", "--json", "--guidance"]),
    ("bench", ["step"]),
])
def test_help_shows_what_a_newcomer_needs(command, module, words):
  result = command(module, "--help")
  assert result.returncode == 0 and not result.stderr
  assert all(word in result.stdout for word in words)


def test_importing_dbjax_starts_no_backend(python):
  result = python("-c",
      "import pkgutil, importlib, dbjax\n"
      "skip = ('bench.torch_networks', '__main__', 'scripts.sample', 'scripts.sample_torch')\n"
      "for m in pkgutil.walk_packages(dbjax.__path__, 'dbjax.'):\n"
      "  if not m.name.endswith(skip): importlib.import_module(m.name)\n"
      "from jax._src import xla_bridge\n"
      "print(xla_bridge.backends_are_initialized())")
  assert result.stdout.split() == ["False"], result.stderr


def _is_one_clear_line(result, *words):
  assert result.returncode == 2, result.stderr
  assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
  for word in words:
    assert word in result.stderr


@pytest.mark.parametrize("arguments, words", [
    (["--config.train.num_step=3"], ["train.num_step='3'", "did you mean train.num_steps?"]),
    (["--config.train.num_steps=abc"], ["train.num_steps=abc: expected a whole number, above 0"]),
    (["--config.layers_per_block=1,x"], ["layers_per_block=1,x: expected whole numbers"]),
    (["--config.task.flip=perhaps"], ["task.flip=perhaps: expected True or False"]),
    (["--config.num_blocks=9"], ["num_blocks=9", "model.num_layers=6"]),
    (["--config=configs/nothing.py"], ["configs/nothing.py", "no such file"]),
    (["--config=requirements.txt"], ["--config=requirements.txt: its name does not end in .py"]),
    (["--config=digits:small"], ["--config=digits:small", "has no variant small"]),
    (["--config=cifar10:smal"], ["has no variant smal, only small; did you mean small?"]),
    (["--config.model.mlp_ratio=inf"], ["model.mlp_ratio=inf", "finite"]),
    (["--workdir="], ["--workdir is missing"]),
    (["--confg.seed=1"], ["confg"]),
    (["stray"], ["stray"]),
])
def test_a_mistake_in_the_command_is_one_line(forked, tmp_path, arguments, words):
  result = forked("main", "--config=configs/digits.py", f"--workdir={tmp_path / 'w'}", *arguments)
  _is_one_clear_line(result, *words)
  assert not (tmp_path / "w").exists()


def test_a_command_without_a_config_takes_no_field_of_one(forked, tmp_path):
  _is_one_clear_line(forked("sample", f"--workdir={tmp_path}", "--config.sample.num_steps=3"),
                     "--config.sample.num_steps: this command takes the config of its --workdir")


@pytest.fixture
def define(monkeypatch):
  """define(out=None, status=False): these are the flags, and there are no others."""

  def run(**defaults):
    values = flags.FlagValues()
    for name, default in defaults.items():
      of = flags.DEFINE_boolean if isinstance(default, bool) else flags.DEFINE_string
      of(name, default, "", flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    return values

  return run


@pytest.mark.parametrize("argument, words", [
    ("--foo=3", "--foo=3: there is no such flag: see --help\n"),
    ("--ouf=3", "--ouf=3: there is no such flag: see --help; did you mean out?\n"),
    ("-x", "-x: there is no such flag: see --help\n"),
    ("--config.seed=1", "--config.seed: this command takes no field of a config: see --help\n")])
def test_a_flag_among_arguments_is_refused(define, capsys, argument, words):
  define(out=None)
  with pytest.raises(SystemExit) as ended:
    cli._parse(["assemble", "--out=x", argument, "workdir"], arguments=True)
  assert (ended.value.code, capsys.readouterr().err) == (2, f"error: {words}")


def test_an_argument_may_begin_with_a_hyphen_behind_two(define):
  values = define(out=None)
  rest = cli._parse(["assemble", "--out=x", "workdir", "--", "--foo"], arguments=True)
  assert (rest, values.out) == (["assemble", "workdir", "--foo"], "x")


@pytest.mark.parametrize("given, words", [
    (["--status", "--describe"], "--status only prints, and has no use for --describe: leave one"),
    (["--describe", "--fork_from=OLD"], "--describe only prints, and has no use for --fork_from=O"),
    (["--status", "--fork_from=OLD"], "--status only prints"),
    (["--describe", "--debug"], "--describe only prints, and has no use for --debug"),
    (["--status"], ""), (["--describe"], ""), (["--debug", "--fork_from=OLD"], "")])
def test_main_does_one_thing(define, given, words):
  main = importlib.import_module("dbjax.main")
  define(status=False, describe=False, debug=False, fork_from=None)(["main", *given])
  with pytest.raises(UserError, match=words) if words else contextlib.nullcontext():
    main._check_modes()


@pytest.mark.parametrize("flag, words", [
    ("--num_samples=x", "--num_samples=x: expected a whole number, from 1 to 2147483647"),
    ("--workdir=/nowhere", "/nowhere/config.json does not exist")])
def test_help_with_a_mistake_is_one_line(forked, flag, words):
  result = forked("sample", flag, "--help")
  assert (result.returncode, result.stderr.count("\n")) == (2, 1) and words in result.stderr


def _run(*words, stdout=subprocess.PIPE, **environment):
  """A command in another environment."""
  return subprocess.run([sys.executable, "-m", *map(str, words)], cwd=ROOT, stdout=stdout,
                        stderr=subprocess.PIPE, text=True, env=os.environ | environment,
                        check=False)


@pytest.mark.parametrize("platform", [
    "cuda", pytest.param("nothing", marks=pytest.mark.slow)])
def test_a_platform_that_is_not_there_is_one_line(tmp_path, platform):
  if platform == "cuda" and shutil.which("nvidia-smi"):
    pytest.skip("it may be there")
  _is_one_clear_line(_run("dbjax.main", *SMALL, f"--workdir={tmp_path / 'w'}",
                          JAX_PLATFORMS=platform),
                     f"JAX_PLATFORMS={platform}: JAX finds no such platform", "JAX_PLATFORMS=cpu")
  assert not (tmp_path / "w").exists()


def test_errors_of_jax_that_are_none_of_a_platform_keep_their_trace():
  for error in (RuntimeError("ours"), AssertionError):
    with pytest.raises((RuntimeError, AssertionError)), cli.one_line_errors():
      raise error


def test_a_name_that_the_locale_cannot_say_is_one_line(tmp_path):
  """TensorStore would raise RuntimeError in the middle of the run."""
  result = _run("dbjax.main", *SMALL, f"--workdir={tmp_path / 'wäöü'}", LC_ALL="C", LANG="",
                PYTHONUTF8="0")
  _is_one_clear_line(result, "--workdir=", "w\\udcc3\\udca4", "set LC_ALL=C.UTF-8")
  assert not any(tmp_path.iterdir())


@pytest.fixture
def unread():
  """A pipe to write to that nobody reads."""
  end, pipe = os.pipe()
  os.close(end)
  yield pipe
  os.close(pipe)


@pytest.mark.parametrize("words", [
    ["main", "--help"],
    *(pytest.param(words, marks=pytest.mark.slow) for words in (
        ["main", "--config=digits", "--describe"], ["sample", "--help"], ["plan", "--help"]))])
def test_a_command_that_nobody_reads_ends_silently(unread, words):
  result = _run("dbjax." + words[0], *words[1:], stdout=unread)
  assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.usefixtures("steps_once")
def test_training_that_loses_its_reader_stops_and_is_saved(tiny, tmp_path, monkeypatch):
  """In mid-run; and the same call again goes on from there."""
  config = tiny(**{"checkpoint.every_steps": 100, "train.blocks": (0,), "train.num_steps": 40})
  train = functools.partial(loop.train, config, tmp_path / "run", devices=jax.devices()[:1])
  end, pipe = os.pipe()
  add = loop.metrics.Progress.add

  def leave(self, group, active, metrics):
    if self._steps[0] == 5:
      os.close(end)
    add(self, group, active, metrics)

  with monkeypatch.context() as patch, os.fdopen(pipe, "w") as stdout:
    patch.setattr(loop.metrics.Progress, "add", leave)
    patch.setattr(sys, "stdout", stdout)
    history = train()
  assert history.stopped == signal.SIGPIPE
  saved = [int(p.name) for p in (tmp_path / "run/block_00").iterdir() if p.name.isdecimal()]
  assert len(saved) == 1 and 5 < saved[0] < 10
  assert train().stopped is None
  assert (tmp_path / "run/block_00/40").is_dir()


@pytest.mark.slow  # in parts: the two above
def test_the_exit_code_of_training_that_nobody_reads(tmp_path, unread):
  result = _run("dbjax.main", *SMALL, f"--workdir={tmp_path / 'w'}", stdout=unread)
  assert (result.returncode, result.stderr) == (141, "")
  assert _run("dbjax.main", *SMALL, f"--workdir={tmp_path / 'w'}").returncode == 0


def test_missing_flags_are_named(forked, tmp_path):
  _is_one_clear_line(forked("main", "--config=configs/digits.py"), "--workdir")
  _is_one_clear_line(forked("sample", f"--workdir={tmp_path}"), "--out")
  _is_one_clear_line(forked("evaluate", f"--workdir={tmp_path}"), "config.json does not exist")


def test_a_whole_run_and_what_can_go_wrong_after_it(command, forked, tmp_path):
  """Train one block, sample too early, train the other, sample, score, damage, repair."""
  work = f"--workdir={tmp_path / 'w'}"
  out = tmp_path / "out" / "samples.npz"
  sample = ("sample", work, f"--out={out}", "--num_samples=7", "--labels=3,1", "--guidance=2")

  assert command("main", *SMALL, work, "--config.train.blocks=1").returncode == 0
  _is_one_clear_line(forked(*sample), "block_00 has no checkpoint", "--config.train.blocks=0")
  assert not out.exists()

  result = forked("main", *SMALL, work)
  assert result.returncode == 0, result.stderr
  assert "block 1 | resumes from step 4" in result.stdout
  typed = [shlex.join(["python", "-m", "dbjax.main", *SMALL, work, *more])
           for more in (["--config.train.blocks=1"], [])]
  assert [row["command"] for row in provenance.commands(tmp_path / "w", (0, 1))] == typed
  status = forked("main", "--status", work).stdout
  assert [line.split()[1] for line in status.splitlines()[1:3]] == ["4/4", "4/4"]
  assert command(*sample).returncode == 0
  with np.load(out) as file:
    assert file["samples"].shape == (7, 8, 8, 1) and file["samples"].dtype == np.uint8
    assert file["labels"].tolist() == [3, 1, 3, 1, 3, 1, 3]
  with Image.open(out.with_suffix(".png")) as grid:
    assert grid.width > 7 * 48

  scores = tmp_path / "scores.json"
  result = command("evaluate", work, f"--json={scores}", "--num_samples=20", "--guidance=1,2")
  assert result.returncode == 0, result.stderr
  scores = json.loads(scores.read_text())
  assert len(scores["losses"]) == 2
  assert [row["guidance"] for row in scores["quality"]] == [1, 2]
  assert scores["held_out"]["accuracy"] > 0.98 and scores["quality"][0]["frechet_pixels"] > 0

  _is_one_clear_line(forked(*sample, "--labels=10"), "labels=10", "0 to 9")
  _is_one_clear_line(forked("main", *SMALL, work, "--config.seed=1"), "another experiment",
                     "seed=1 (here) against 0 (there)")

  checkpoint = tmp_path / "w/block_01/4"
  files = [p for p in (checkpoint / "ema").rglob("*") if p.is_file()]
  largest = max(files, key=lambda p: p.stat().st_size)
  largest.write_bytes(b"no")
  result = forked(*sample)
  assert result.returncode == 0 and "block_01/4 cannot be read" in result.stdout
  assert "step 2 is used in its place" in result.stdout


def test_fields_are_written_in_any_of_absl_s_ways(forked):
  result = forked("main", "--config=digits", "--config.task.flip", "--config.train.blocks=(0,2)",
                  "--config.train.turn", "7", "--noconfig.model.remat", "--describe")
  assert result.returncode == 0, result.stderr
  rows = {line.split()[0]: line.split()[1] for line in result.stdout.splitlines()}
  assert (rows["task.flip"], rows["train.blocks"], rows["train.turn"], rows["model.remat"]) == (
      "True", "0,2", "7", "False")


def test_importing_dbjax_imports_nothing_else(python):
  result = python("-c", "import sys, dbjax\n"
                  "loaded = {m.partition('.')[0] for m in sys.modules}\n"
                  "print(sorted(loaded & {'jax', 'flax', 'orbax', 'tensorflow', 'numpy', 'absl'}), "
                  "[n for n in dir(dbjax) if n.startswith('_')])")
  assert result.stdout.split() == ["[]", "[]"], result.stderr


def test_every_public_name_is_there_and_documented(python):
  result = python("-c", "import dbjax\n"
                  "print([n for n in dir(dbjax) if not getattr(dbjax, n).__doc__])")
  assert result.stdout.split() == ["[]"], result.stderr


def test_a_result_that_cannot_be_written_in_storage_is_one_line(storage, monkeypatch):
  storage.down = True
  monkeypatch.setattr(cli, "path", lambda _: epath.Path("gs://bucket/x.png"))
  with pytest.raises(UserError, match="--out=gs://bucket/x.png cannot be written .Service Unav"):
    cli.writable("out")
