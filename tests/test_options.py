"""Options, right and wrong ones, from Python and from the command line, many of them at random.

Of each value it is known here whether it is one that dbjax takes. A call with right ones alone
gives an answer; one with a wrong one raises UserError, or ends with exit code 2, in one line.
"""

import random

from conftest import load_config
from conftest import random_params
from conftest import ROOT
from etils import epath
import jax
import ml_collections
import numpy as np
import pytest

import dbjax
from dbjax import block as block_lib
from dbjax import checkpoint
from dbjax import config as config_lib
from dbjax import lookup
from dbjax import paths
from dbjax import prepare
from dbjax import provenance
from dbjax.errors import UserError
from dbjax.sources import text

SMALL = {
    "num_blocks": 2, "model.num_layers": 2, "model.width": 8, "model.num_heads": 2,
    "model.unroll": 1, "train.num_steps": 1, "train.batch_size": 8, "sample.every_steps": 0,
    "sample.num_steps": 2, "sample.batch_size": 4}
TASKS = {
    "image": ("digits", {"model.patch_size": 4}),
    "classify": ("digits_classify", {"model.patch_size": 4, "model.embedding_width": 4,
                                     "task.crop": 0}),
    "masked": ("gcide_masked", {"data.name": "letters", "data.length": 8})}

NAN, INF = float("nan"), float("inf")
NO_INTS = [-1, 2.5, NAN, INF, "2", "", None, True, 2**63, 10**400, (2,), np.ones(2), {}]
NO_FLOATS = [-1, NAN, INF, -INF, 1e39, 10**400, "1", None, True, (1.0,), np.ones(2)]
NO_NAMES = ["", "nothing", None, 3, True, ("euler",), NAN]

# {option: (right, wrong)}: of every task, and of one. Shapes stay as they are: few programs.
COMMON = {
    "num": ([4, np.int32(8), np.array(3), 7], [0, *NO_INTS]),
    "seed": ([0, 2**32 - 1, np.uint32(7), np.int64(5)], [2**32, *NO_INTS]),
    "num_steps": ([0, 1, 2, np.int64(3)], [10**6 + 1, 2**62, *NO_INTS]),
    "batch_size": ([4, np.int8(4)], [0, *NO_INTS])}
OPTIONS = {
    "image": {
        "solver": (["euler", "heun", "dpmpp_2m"], NO_NAMES),
        "grid": (["karras", "equal_mass"], NO_NAMES),
        "guidance": ([1, 1.0, 2, np.float32(1.5)], NO_FLOATS),
        "labels": ([(), [3], (0, 9), np.arange(4)],
                   [3, "3", (10,), (-1,), (1.5,), (2**40,), (10**400,), None, [[1]], (NAN,)])},
    "classify": {
        "temperature": ([0, 1.0, 0.5], NO_FLOATS), "answer": (["mean", "last"], NO_NAMES),
        "bridge": (["soft", "hard"], NO_NAMES), "guidance": ([], [1, 2.0])},
    "masked": {
        "temperature": ([0, 1.0, 0.5], NO_FLOATS), "solver": ([], ["euler", "heun"]),
        "labels": ([], [(1,)])}}
NO_OPTIONS = {"num_step": ([], [2]), "every_steps": ([], [1]), "nothing": ([], [None])}

# Of a command: text, for python -m dbjax.main --config.FIELD=TEXT --describe.
NO_INT_TEXTS = ["-1", "1.5", "nan", "", "x", "1e3", "9" * 30, "9" * 5000]
NO_FLOAT_TEXTS = ["-1", "nan", "inf", "", "x", "1e39", "1e999", "1,2"]
FIELDS = {
    "seed": (["0", "4294967295"], ["4294967296", *NO_INT_TEXTS]),
    "num_blocks": (["1", "2", "3"], ["0", "7", "4", *NO_INT_TEXTS]),
    "train.num_steps": (["1", "10000000"], ["0", *NO_INT_TEXTS]),
    "train.blocks": (["", "0", "(0)", "[0,]"], ["9", "-1", "x", "0,x", "1.5"]),
    "train.turn": (["all", "7", "random"], ["0", "-1", "x", "", "1.5"]),
    "optimizer.learning_rate": (["1e-3", "1", ".5"], ["0", *NO_FLOAT_TEXTS]),
    "optimizer.name": (["adamw", "lion", "adafactor"], ["", "x", "schedule_free"]),
    "optimizer.schedule": (["cosine", "constant"], ["", "x"]),
    "task.flip": (["True", "false", "1"], ["2", "yes", "", "None"]),
    "task.label_drop": (["0.5", ".2"], ["1.5", *NO_FLOAT_TEXTS]),
    "sample.solver": (["euler", "heun"], ["", "x", "('euler',)"]),
    "sample.num_steps": (["0", "5"], ["1000001", *NO_INT_TEXTS]),
    "sample.guidance": (["1", "2.5"], NO_FLOAT_TEXTS),
    "data.name": (["digits", "mine"], [""]),
    "data.workers": (["0", "2"], NO_INT_TEXTS),
    "model.network": ([], ["", "x", "os:getcwdd", "nothing_of_this_name:Net", "a:b:c"]),
    "task.name": (["image"], ["", "imag", "None", "('image',)", "os:path"]),
    "schedule.sigma_max": (["80", "50.5"], ["0.001", *NO_FLOAT_TEXTS]),
    "schedule.partition": (["uniform", "equal_mass"], ["x", "1,x", "nan"]),
    "train.num_step": ([], ["3"]), "nothing.at_all": ([], ["1"])}

# Text, for python -m dbjax.sample --OPTION=TEXT.
FLAGS = {
    "num_samples": (["4"], ["0", "2147483648", *NO_INT_TEXTS]),
    "seed": (["0", "7"], ["4294967296", *NO_INT_TEXTS]),
    "num_steps": (["1", "2"], ["1000001", *NO_INT_TEXTS]), "batch_size": (["4"], ["0", "x"]),
    "solver": (["euler", "heun"], ["", "x"]), "labels": (["", "3", "0,9"], ["10", "-1", "x"]),
    "guidance": (["1"], NO_FLOAT_TEXTS), "nothing": ([], ["1"]),
    "config.seed": ([], ["1"]), "workdir": ([], ["", "/nowhere", "/dev/null", "~nobody_of_this/x"])}


def draw(rng, known, most):
  """A few of the options, with values, and whether all are right."""
  given, right = {}, True
  names = rng.sample(list(known), rng.randint(1, most))
  for name in names:
    good, bad = known[name]
    wrong = not good or rng.random() < 0.4 / len(names)
    given[name] = rng.choice(bad if wrong else good)
    right = right and not wrong
  return given, right


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
  """A little text by letters: the directory of the data set."""
  where, rng = tmp_path_factory.mktemp("letters"), random.Random(0)
  (where / "in.txt").write_text(" ".join(rng.choice(["in", "the", "end"]) for _ in range(300)))
  prepare.write(where, "letters", text.source(
      str(where / "in.txt"), str(where), tokenizer="text8", length=8, normalize="text8",
      held_out=0.2))
  return str(where)


@pytest.fixture(scope="module")
def models():
  """{task: a model of it, of two blocks with random weights}."""
  return {task: make_model(task) for task in TASKS}


def make_model(name):
  config = dbjax.resolve(load_config(TASKS[name][0], **SMALL | TASKS[name][1]))
  tasks = tuple(dbjax.make_task(config, b) for b in range(2))
  weights = tuple(random_params(task.network, *task.call(1).inputs, seed=b)
                  for b, task in enumerate(tasks))
  return dbjax.Model(config=config, schedule=tasks[0].make_schedule(config), tasks=tasks,
                     params=weights, steps=(0, 0), frozen=tasks[0].frozen(config))


@pytest.fixture(scope="module")
def workdir(models, tmp_path_factory):
  """Of the model of images, as a run writes it."""
  where, model = epath.Path(tmp_path_factory.mktemp("image")), models["image"]
  config_lib.save(where, model.config, {})
  trained_with = provenance.trained_with(model.config, dbjax.load_data(model.config))
  for b, (task, params) in enumerate(zip(model.tasks, model.params)):
    state = block_lib.from_params(task, params)
    _, checksums = checkpoint.examine(state)
    with checkpoint.BlockCheckpoint(where, b) as saved:
      saved.save(state, model.config, seconds=0.0, trained_with=trained_with,
                 checksums=checksums | dict(frozen=checkpoint.checksum({})))
  return where


def test_150_calls_from_python_answer_or_are_refused_in_one_line(models):
  rng, answered, refused = random.Random(0), 0, 0
  shapes = {"image": (8, 8, 1), "classify": (), "masked": (8,)}
  for i in range(150):
    task = list(TASKS)[i % 3]
    given, right = draw(rng, COMMON | OPTIONS[task] | (NO_OPTIONS if i % 5 == 0 else {}), 4)
    asked = {"num": 4, **given}
    if right:
      samples, labels = models[task].sample(**asked)
      assert samples.shape == (asked["num"], *shapes[task]), given
      assert (labels is None) == (task == "masked")
      answered += 1
      continue
    with pytest.raises(UserError) as error:
      models[task].sample(**asked)
      pytest.fail(f"{task} takes {given}")
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    assert any(message.startswith(f"{name}=") for name in given), (message, given)
    refused += 1
  assert answered > 40 and refused > 40


def _command_line(forked, module, always, known, prefix, number, seed):
  """Random calls of a command: how many gave an answer, and how many were refused."""
  rng, answered = random.Random(seed), 0
  for _ in range(number):
    given, right = draw(rng, known, 3)
    words = [f"--{prefix}{name}={value}" for name, value in given.items()]
    done = forked(module, *always, *words)
    assert done.returncode == (0 if right else 2), (words, done.stderr[-1000:])
    assert right or (done.stderr.startswith("error: ") and done.stderr.count("\n") == 1), (
        words, done.stderr[-1000:])
    assert len(done.stderr) < 500
    answered += right
  return answered, number - answered


@pytest.mark.parametrize("number, seed", [
    (8, 1), pytest.param(112, 2, marks=pytest.mark.nightly)])
def test_calls_of_main_answer_or_are_refused_in_one_line(forked, number, seed):
  answered, refused = _command_line(
      forked, "main", ["--config=digits", "--describe"], FIELDS, "config.", number, seed)
  assert min(answered, refused) >= number // 4


@pytest.mark.parametrize("number, seed", [
    (3, 1), pytest.param(27, 2, marks=pytest.mark.slow)])
def test_calls_of_sample_answer_or_are_refused_in_one_line(forked, workdir, tmp_path, number,
                                                           seed):
  always = [f"--workdir={workdir}", f"--out={tmp_path / 'x.npz'}", "--num_samples=4"]
  answered, refused = _command_line(forked, "sample", always, FLAGS, "", number, seed)
  assert min(answered, refused) > 0


@pytest.mark.parametrize("name, value", [
    ("seed", -1), ("seed", 2**32), ("num_steps", 10**6 + 1), ("batch_size", 0), ("guidance", NAN)])
def test_python_and_the_command_line_say_the_same(forked, workdir, tmp_path, name, value):
  with pytest.raises(UserError) as error:
    dbjax.load(workdir).sample(1, **{name: value})
  done = forked("sample", f"--workdir={workdir}", f"--out={tmp_path / 'x.npz'}",
                f"--{name}={value}")
  flag = name if name == "num_steps" else f"--{name}"  # that one is checked with the config's
  assert done.stderr == f"error: {str(error.value).replace(name, flag, 1)}\n"


@pytest.mark.parametrize("config", [
    None, 3, "digits", [1], {}, {1: 2}, {"task": 3}, {"task": None}, {"task": {"name": "image"}},
    {"seed": 3}, {"task": {"name": ["image"]}}])
def test_what_is_no_config_is_refused_alike(config, tmp_path):
  for call in (dbjax.resolve, lambda config: dbjax.train(config, tmp_path / "run")):
    with pytest.raises(UserError) as error:
      call(config)
    assert "\n" not in str(error.value)
  assert not (tmp_path / "run").exists()


def test_a_config_may_be_complete_or_not_frozen_or_a_dict():
  config = dbjax.read_config("digits", SMALL | {"model.patch_size": 4})
  resolved = dbjax.resolve(config)
  for same in (resolved, config.to_dict(), resolved.to_dict(), resolved.as_configdict()):
    assert dbjax.resolve(same) == resolved


@pytest.mark.parametrize("name, overrides, words", [
    (None, None, "--config=None: expected a path"), (3, None, "--config=3: expected a path"),
    (b"digits", None, "expected a path"), ("", None, "expected a path"),
    ("digit", None, "did you mean digits"), ("a\0b", None, "expected a path"),
    ("digits", 3, "overrides=3: expected a dict"), ("digits", "x", "overrides='x': expected"),
    ("digits", {1: 2}, "overrides={1: 2}: expected"),
    ("digits", {"train": {"num_steps": 3}}, "train={'num_steps': 3}: there is no such"),
])
def test_what_read_config_is_given_is_checked(name, overrides, words):
  with pytest.raises(UserError) as error:
    dbjax.read_config(name, overrides)
  assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("workdir, words", [
    (None, "expected a path"), (3, "expected a path"), ("", "expected a path"),
    (b"x", "expected a path"), ("a\0b", "expected a path"), ("\udce4", "not UTF-8"),
    ("FILE", "is a file"), ("FILE/inside/deep", "is a file"), ("/dev/null/x", "is a file"),
])
def test_what_is_no_workdir_is_refused(tmp_path, monkeypatch, workdir, words):
  (tmp_path / "FILE").write_text("")
  monkeypatch.chdir(tmp_path)
  config = load_config("digits", **SMALL | {"model.patch_size": 4})
  with pytest.raises(UserError) as error:
    dbjax.train(config, workdir, devices=jax.devices()[:1])
  assert words in str(error.value) and "\n" not in str(error.value)
  with pytest.raises(UserError, match="expected a path|not UTF-8|does not exist"):
    dbjax.load(workdir)
  assert [path.name for path in tmp_path.iterdir()] == ["FILE"]


def test_a_directory_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(paths.os, "access", lambda *_: False)  # root may all
  with pytest.raises(UserError, match="--out=.*/a/b: .* cannot be written"):
    paths.check_directory(paths.expand(tmp_path / "a/b", "--out"), "--out")
  paths.check_directory(paths.expand("gs://bucket/x", "--out"), "--out")  # not looked at


def test_the_home_directory(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert paths.expand("~/x", "x") == tmp_path / "x"
  (tmp_path / "mine.py").write_text((ROOT / "configs/digits.py").read_text())
  assert dbjax.read_config("~/mine.py") == dbjax.read_config("digits")


def test_without_a_home_directory_nothing_called_so_is_made(python, tmp_path):
  """Of a user that the system does not know: from a config, TFDS, a cache and a workdir."""
  done = python("-c", f"""
import os, pwd
for name in ("HOME", "XDG_CACHE_HOME", "TFDS_DATA_DIR"): os.environ.pop(name, None)
def nobody(*_): raise KeyError
pwd.getpwuid = pwd.getpwnam = nobody
import dbjax
from dbjax import paths
from dbjax.data import records
os.chdir({str(tmp_path)!r})
import tensorflow_datasets
for call in (lambda: dbjax.read_config("~/mine.py"), lambda: dbjax.load("~/x"),
             lambda: records.data_dir(""), lambda: dbjax.train(dbjax.read_config("digits"), "~/x"),
             lambda: dbjax.resolve(dbjax.read_config("~nobody/x.py"))):
  try:
    print("took", call())
  except dbjax.UserError as e:
    print(e)
print(paths.cache())
print(os.listdir("."))
""")
  lines = done.stdout.splitlines()
  assert len(lines) == 7, done.stderr
  assert all("no home directory is known here: set HOME" in line for line in lines[:5])
  assert not lines[5].startswith("~") and lines[6] == "[]"


def prepared(where, name):
  """A directory that looks like a prepared data set."""
  path = where / name / "1.0.0"
  path.mkdir(parents=True)
  (path / "dataset_info.json").write_text("{}")


@pytest.mark.parametrize("config, fields, words", [
    ("kjv", {}, ["--what=text --source=FILE --name=NAME", "--tokenizer=sentencepiece --length=128",
                 "--vocab_size="]),
    ("gcide_masked", {}, ["--what=text", "--tokenizer=text8 --length=256 --normalize=text8"]),
    ("cifar10", {"data.feature": "latent", "task.flip": False}, [
        "--what=latents --source=IMAGES --name=NAME", "--encode=my_vae:encode"]),
    ("cifar10", {}, ["--what=folder --source=DIR --name=NAME", "--image_size=32"]),
    ("cifar10", {"data.name": "cifar10"}, ["tfds build cifar10 --file_format=array_record"]),
    ("cifar10", {"data.name": "imagenet_resized/64x64"}, ["tfds build imagenet_resized/64x64 "]),
    ("cifar10", {"data.name": "fashion_mnist"}, ["tfds build fashion_mnist", "--what=fashion_mnist "
                                                 "--source=/usr/share/datasets/fashion-mnist"]),
])
def test_a_missing_data_set_is_answered_with_the_command_that_makes_it(tmp_path, config, fields,
                                                                       words):
  prepared(tmp_path, "my_texts")
  (tmp_path / "my_text_").mkdir()  # has none
  asked = {"data.name": "my_text", "data.dir": str(tmp_path)} | fields
  with pytest.raises(UserError) as error:
    dbjax.load_data(dbjax.resolve(load_config(config, **asked)))
  message = str(error.value)
  assert message.startswith(f"data.name={asked['data.name']}: not found in {tmp_path}")
  assert "\n" not in message and f"--data_dir={tmp_path}" in message
  for word in words:
    assert word.replace("NAME", asked["data.name"]) in message
  assert ("did you mean my_texts?" in message) == (asked["data.name"] == "my_text")


def test_which_data_sets_tfds_can_make_is_known_without_tensorflow(python):
  done = python("-c", "import sys\nfrom dbjax.data import records\n"
                "print(*map(records.known_to_tfds, ['mnist', 'lm1b', 'my_text', 'digits_of_mine']),"
                " 'tensorflow' in sys.modules)")
  assert done.stdout.split() == ["True", "True", "False", "False", "False"], done.stderr


@pytest.mark.parametrize("field", ["data.train", "data.held_out"])
def test_a_missing_split_names_the_field(letters, field):
  config = load_config("gcide_masked", **SMALL | TASKS["masked"][1] | {
      "data.dir": letters, field: "validation"})
  with pytest.raises(UserError, match=f"^{field}=validation: letters has no split validation: "
                                      "expected train, test, or a part such as"):
    dbjax.load_data(dbjax.resolve(config))


def test_modules_of_one_name_beside_two_configs_are_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(lookup.sys, "path", [*lookup.sys.path])
  for folder, steps in (("one", 1), ("two", 2), ("same", 1)):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "options_neighbour.py").write_text(f"STEPS = {steps}")
    (tmp_path / folder / "mine.py").write_text(
        (ROOT / "configs/digits.py").read_text() + "\nimport options_neighbour\n")
  for _ in range(2):
    dbjax.read_config(tmp_path / "one/mine.py")
    with pytest.raises(UserError, match="two/options_neighbour.py and .*one/options_neighbour.py"):
      dbjax.read_config(tmp_path / "two/mine.py")
  dbjax.read_config(tmp_path / "same/mine.py")  # it is no matter which


@pytest.mark.parametrize("config", [
    None, 3, "digits", {}, {"task": {"name": "image"}}, ml_collections.ConfigDict()])
def test_what_is_not_resolved_is_refused_alike(config):
  for call in (lambda: dbjax.make_task(config, 0), lambda: dbjax.load_data(config)):
    with pytest.raises(UserError, match="^config=.*: expected a config that is resolved") as error:
      call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("block", [-1, 2, None, "0", 1.5, True, 10**30])
def test_a_block_that_there_is_not_is_refused(models, block):
  with pytest.raises(UserError, match="^block=.*: expected a whole number, from 0 to 1"):
    dbjax.make_task(models["image"].config, block)


def test_what_make_schedule_is_given_is_checked():
  for num_blocks in (-1, 0, None, "0", 1.5, True, 10**30):
    with pytest.raises(UserError, match="^num_blocks=.*: expected a whole number, above 0"):
      dbjax.make_schedule({}, num_blocks)
  for config in (None, 3, "x", ml_collections.ConfigDict(), {"gamma": NAN}, {"sigma": 1}):
    with pytest.raises(UserError):
      dbjax.make_schedule(config, 2)


def test_the_pieces_of_one_block_say_what_they_are_given(models):
  task = models["image"].tasks[0]
  for call in (lambda: dbjax.init("image", 0), lambda: dbjax.train_step(None, None, {}, 0, None)):
    with pytest.raises(UserError, match="^task=.*: expected a task, as dbjax.make_task"):
      call()
  with pytest.raises(UserError, match="^state=.*: expected a BlockState, as dbjax.init makes it"):
    dbjax.train_step(task, {}, {}, 0, None)
