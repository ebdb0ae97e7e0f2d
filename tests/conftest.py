"""The digits config, shrunk until a step takes milliseconds."""

import copy
import functools
import io
import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import types

import pytest

ROOT = Path(__file__).parents[1]
pytest.register_assert_rewrite("language")

# Tests, and the commands they start, compile small programs, and the same ones over and over: a
# third of the time without fusion emitters. What two programs compute then differs in the last
# bit, so that training steps are compiled with them, here and in commands with BIT_EQUAL.
BIT_EQUAL = "--xla_backend_optimization_level=0"
os.environ.setdefault("XLA_FLAGS", BIT_EQUAL + " --xla_cpu_use_fusion_emitters=false")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XDG_CACHE_HOME"] = str(ROOT / ".pytest_cache")
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".pytest_cache" / "xla")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def pytest_configure():
  """Eight devices for tests in this process, one for the commands that they start."""
  import jax  # here, because jax reads the environment when imported

  # Ignored where the tests run in the background of a shell, and what is ignored is inherited.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  jax.config.update("jax_num_cpu_devices", 8)
  jax.stages.Lowered.compile = functools.partialmethod(
      jax.stages.Lowered.compile, compiler_options={"xla_cpu_use_fusion_emitters": True})


def load_config(name="digits", **overrides):
  """The config `name`, complete, with dotted overrides: **{"train.turn": "2"}."""
  from dbjax import config as config_lib  # here, for the same reason

  return config_lib.read(ROOT / "configs" / f"{name}.py", overrides)


def random_params(network, *inputs, seed=0):
  """Weights of size 1 / sqrt(fan-in) for all that a Linen module has, so that nothing is zero."""
  import jax  # here, for the same reason
  import numpy as np

  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
  draw = lambda s: rng.normal(size=s.shape) / np.sqrt(s.shape[-2] if len(s.shape) > 1 else 4)
  return jax.tree.map(lambda s: np.float32(draw(s)), shapes)


def fingerprint(config):
  """That of the data to train on; 7 where they are not on this machine."""
  from dbjax import data  # here, for the same reason
  from dbjax.errors import UserError

  try:
    return data.fingerprint(data.load(config).train)
  except UserError:
    return 7


def random_workdir(workdir, config, scale=1.0):
  """Writes a workdir of blocks of random numbers, at step 5; small ones, so that nothing explodes.
  """
  from etils import epath  # here, for the same reason
  import jax
  import numpy as np

  from dbjax import block as block_lib
  from dbjax import checkpoint
  from dbjax import config as config_lib
  from dbjax import provenance
  from dbjax import task as task_lib

  rng = np.random.default_rng(0)

  def draw(x):
    fan_in = x.shape[-2] if len(x.shape) > 1 else 4
    return np.asarray(scale * rng.normal(size=x.shape) / np.sqrt(fan_in)).astype(x.dtype)

  frozen = task_lib.find(config.task.name).frozen(config)
  for b in range(config.num_blocks):
    template = block_lib.abstract_state(task_lib.make_task(config, b))
    state = jax.tree.map(draw, template).replace(step=np.int32(5))
    sums = jax.device_get(checkpoint.examine(state)[1]) | dict(
        frozen=int(checkpoint.checksum(frozen)))
    with checkpoint.BlockCheckpoint(workdir, b) as saved:
      saved.save_frozen(frozen)
      saved.save(state, config, seconds=0.0, checksums=sums,
                 trained_with=provenance.code_of(config) | dict(data=fingerprint(config)))
  config_lib.save(epath.Path(workdir), config, {})
  return workdir


def states_of(config, workdir, blocks=(0, 1, 2)):
  """{block: its whole state, from disk}."""
  from dbjax import block as block_lib  # here, for the same reason
  from dbjax import checkpoint
  from dbjax import task as task_lib

  states = {}
  for b in blocks:
    template = block_lib.abstract_state(task_lib.make_task(config, b))
    with checkpoint.BlockCheckpoint(workdir, b) as saved:
      states[b] = saved.restore(template, saved.meta())
  return states


def distance(a, b):
  """|a - b| / |b| over all weights."""
  import jax  # here, for the same reason
  import numpy as np

  norm = lambda t: np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(t)))
  return norm(jax.tree.map(np.subtract, a, b)) / norm(b)


def as_tfrecord(source, target):
  """Copies a data set in ARRAY_RECORD as TFRECORD in two shards, by another's writer."""
  from array_record.python import array_record_data_source  # here, for the same reason
  from tensorboardX.record_writer import RecordWriter

  target.mkdir(parents=True)
  shutil.copy(source / "features.json", target)
  info = json.loads((source / "dataset_info.json").read_text())
  info["fileFormat"] = "tfrecord"
  for split in info["splits"]:
    stem = f"{info['name']}-{split['name']}"
    path = next(source.glob(f"{stem}.array_record*"))
    records = array_record_data_source.ArrayRecordDataSource(str(path))
    third = len(records) // 3
    parts = [range(third), range(third, len(records))]
    split["shardLengths"] = [str(len(part)) for part in parts]
    split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    for i, part in enumerate(parts):
      writer = RecordWriter(str(target / f"{stem}.tfrecord-{i:05}-of-00002"))
      for number in part:
        writer.write(records[number])
      writer.close()
  (target / "dataset_info.json").write_text(json.dumps(info))


def fake(total, seed=0, shape=(16, 16, 3), num_classes=10):
  """Random images (total, *shape) uint8, and labels."""
  import numpy as np  # here, for the same reason

  rng = np.random.default_rng(seed)
  image = rng.integers(0, 256, (total, *shape)).astype(np.uint8)
  return image, rng.integers(0, num_classes, total)


def png(image):
  """A file in memory."""
  from PIL import Image  # here, for the same reason

  file = io.BytesIO()
  Image.fromarray(image).save(file, "PNG")
  file.seek(0)
  return file


@pytest.fixture(scope="session")
def array_records(tmp_path_factory):
  """The data set `mini`, as ARRAY_RECORD: 60 images to train on and 20 to test."""
  import tensorflow_datasets as tfds  # here, for the same reason

  from dbjax import prepare
  from dbjax.sources import Source

  where = tmp_path_factory.mktemp("array_record")
  features = tfds.features.FeaturesDict(dict(
      image=tfds.features.Image(shape=(16, 16, 3)), label=tfds.features.ClassLabel(num_classes=10)))
  splits = {s: (dict(image=png(x), label=int(y)) for x, y in zip(*fake(n, seed)))
            for seed, (s, n) in enumerate([("train", 60), ("test", 20)])}
  prepare.write(where, "mini", Source(features, splits))
  return where


def small_config(name):
  """The config `name`, resolved, so small that a step of batch 4 takes milliseconds."""
  from dbjax import config as config_lib  # here, for the same reason

  config = config_lib.flatten(config_lib.read(name))
  recurrent = config["task.name"] == "recurrent"
  fields = {"num_blocks": 1 if recurrent else 2, "model.num_layers": 6 if recurrent else 4,
            "model.width": 16, "model.num_heads": 2, "model.unroll": 1, "train.num_steps": 30,
            "train.batch_size": 4, "optimizer.warmup_steps": 5,
            "optimizer.learning_rate": 1e-2}
  if "data.length" in config:
    fields |= {"data.length": 12, "data.vocab_size": 19, "data.tokenizer": "bytes"}
  else:
    fields |= {"data.image_size": 8, "model.patch_size": 4}
  if "model.embedding_width" in config:
    fields["model.embedding_width"] = 8
  return config_lib.unflatten(config | fields)


def synthetic_batch(task, step):
  """The batch of a step: of random pixels, labels, tokens."""
  import numpy as np  # here, for the same reason

  data = task.config.data
  rng = np.random.Generator(np.random.Philox([step, 7]))
  above = dict(image=256, label=data.get("num_classes"),
               tokens=data.get("vocab_size"))
  return {name: rng.standard_normal(x.shape).astype(x.dtype)
          if np.issubdtype(x.dtype, np.floating)
          else rng.integers(0, above[name], x.shape).astype(x.dtype)
          for name, x in sorted(task.abstract_batch(4).items())}

def untrained(config):
  """The Model of a resolved config, in memory; weights are moved at random: no output is zero."""
  import jax  # here, for the same reason
  import numpy as np

  from dbjax import task as task_lib
  from dbjax.model import Model

  tasks = tuple(task_lib.make_task(config, b) for b in range(config.num_blocks))
  rng = np.random.default_rng(0)
  move = lambda x: np.float32(x + 0.1 * rng.normal(size=x.shape))
  params = tuple(jax.tree.map(move, jax.jit(task.init)(jax.random.key(b)))
                 for b, task in enumerate(tasks))
  return Model(config=config, schedule=tasks[0].make_schedule(config), tasks=tasks, params=params,
               steps=(0,) * len(tasks), frozen=tasks[0].frozen(config))


@pytest.fixture
def tiny():
  """tiny(**overrides): three layers of width 16, six steps of batch 8."""

  def make(**overrides):
    small = {"model.num_layers": 3, "model.width": 16, "model.num_heads": 2, "model.unroll": 1,
             "train.num_steps": 6, "train.batch_size": 8, "optimizer.warmup_steps": 2,
             "checkpoint.every_steps": 2, "log.every_steps": 2, "sample.every_steps": 0,
             "sample.num_steps": 5, "sample.batch_size": 8}
    return load_config(**{**small, **overrides})

  return make


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
  """A compiled program has memory maps, of which a process may have 65,530 in all."""
  yield
  import jax  # here, for the same reason

  jax.clear_caches()


_compiled = {}


@pytest.fixture
def steps_once(monkeypatch):
  """Training steps are traced and compiled once a session, for each config that a step may see.

  It is made from a config that lacks what it may not depend on, so a step that reads one of
  these raises AttributeError here.
  """
  import ml_collections  # here, for the same reason

  from dbjax import program

  compile_step = program.compile_step

  def once(task, mesh, size, some=False):
    seen = copy.deepcopy(task.config.to_dict())
    del seen["train"]["turn"], seen["train"]["blocks"], seen["train"]["init_from"]
    del seen["checkpoint"], seen["log"], seen["sample"]
    key = type(task)(config=ml_collections.FrozenConfigDict(seen), network=task.network)
    if (key, mesh, size, some) not in _compiled:
      _compiled[key, mesh, size, some] = compile_step(key, mesh, size, some)
    return _compiled[key, mesh, size, some]

  monkeypatch.setattr(program, "compile_step", once)


@pytest.fixture
def python():
  """python("-c", ...) runs the interpreter as a user would, in the repository.

  `env` changes the environment: a string sets a variable, None removes it.
  """

  def run(*args, env=None):
    changed = {k: v for k, v in {**os.environ, **(env or {})}.items() if v is not None}
    return subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True,
                          text=True, check=False, env=changed)

  return run


@pytest.fixture
def command(python):
  """command("sample", "--workdir=...") is python -m dbjax.sample --workdir=..."""
  return lambda module, *args: python("-m", f"dbjax.{module}", *args)


# Forks an interpreter that has imported what commands need, for each line on its stdin.
@pytest.fixture
def storage(tmp_path):
  """gs://bucket, which lies in tmp_path: `storage.down = True` is an outage.

  What is raised then is no OSError, as errors of gcsfs are not.
  """
  from etils import epath  # here, for the same reason

  here = types.SimpleNamespace(down=False)
  local = lambda path: str(path).replace("gs:/", str(tmp_path), 1)

  def call(original, path, *args, **kwargs):
    if here.down:
      raise RuntimeError("Service Unavailable,\n503")
    return original(local(path), *(local(x) if "gs:/" in str(x) else x for x in args), **kwargs)

  names = ("exists", "isdir", "listdir", "makedirs", "mkdir", "open", "remove", "rename", "replace",
           "rmtree", "stat")
  with epath.testing.mock_epath(**dict.fromkeys(names, call)):
    yield here


FORK = """
import json, os, runpy, sys
import dbjax.loop
import tensorboardX

for line in sys.stdin:
  argv, out, err = json.loads(line)
  child = os.fork()
  if not child:
    break
  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
  sys.exit()
for stream, path in enumerate((os.devnull, out, err)):
  os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), stream)
sys.argv = argv
sys.modules.pop(argv[0], None)  # imported for another, it would be run a second time: a warning
runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="session")
def forked(tmp_path_factory):
  """As `command`, without the seconds of imports: for a module that a test starts afresh, too."""
  where = tmp_path_factory.mktemp("forked")
  with subprocess.Popen([sys.executable, "-c", FORK], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:

    def run(module, *args):
      argv = [f"dbjax.{module}", *map(str, args)]
      out, err = where / "out", where / "err"
      for path in (out, err):
        path.unlink(missing_ok=True)
      server.stdin.write(json.dumps([argv, str(out), str(err)]) + "\n")
      server.stdin.flush()
      code = int(server.stdout.readline())
      return subprocess.CompletedProcess(argv, code, out.read_text(), err.read_text())

    yield run
    server.stdin.close()
