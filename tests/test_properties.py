"""Whatever a config or a file holds, dbjax takes it or says in one line why it does not.

DBJAX_EXAMPLES says how many examples of each are tried: 2000 for a night.
"""

import contextlib
import json
import os
import runpy
import shutil

from conftest import as_tfrecord
from conftest import ROOT
from conftest import small_config
from conftest import synthetic_batch
from etils import epath
from hypothesis import given
from hypothesis import HealthCheck
from hypothesis import settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from dbjax import block as block_lib
from dbjax import checkpoint
from dbjax import config as config_lib
from dbjax import data
from dbjax import loading
from dbjax import prepare
from dbjax import provenance
from dbjax import task as task_lib
from dbjax.errors import UserError
from dbjax.sources import text

LENGTH = int(os.environ.get("DBJAX_EXAMPLES", "0"))
BRIEF = dict(deadline=None, database=None, derandomize=not LENGTH,
             suppress_health_check=list(HealthCheck))


def _configs():
  """Of every config and variant its name, and its fields, flat."""
  found = {}
  for path in sorted((ROOT / "configs").glob("*.py")):
    for variant in ("", *runpy.run_path(str(path)).get("VARIANTS", ())):
      name = f"{path.stem}:{variant}" if variant else path.stem
      found[name] = config_lib.flatten(config_lib.read(name))
  return found


CONFIGS = _configs()

NUMBERS = st.one_of(
    st.sampled_from([10**400, -10**400, 10**18, 2**31, 2**63, 2**64, 7, 0, -1, 1, 2, 3]),
    st.integers(-10, 100))
ODD = st.one_of(
    NUMBERS, st.sampled_from([np.nan, np.inf, -np.inf, 1e308, -1e308, 1e-320, 0.0, -0.0, 0.5, 1.0]),
    st.floats(), st.booleans(), st.none(), st.binary(max_size=3), st.text(max_size=6),
    st.sampled_from(["", " ", "a:b", ":", "os:path", "subprocess:Popen", "x" * 10_000, "\0", "\n",
                     "../..", "1e400", "nan", "9" * 5000, "(1,2", "1,,2", "digits", "\ud800"]),
    st.sampled_from([object(), object, np.float32(3), np.zeros(2), np.zeros((2, 2)), 1j, len]))
VALUES = st.one_of(
    ODD, st.lists(ODD, max_size=3), st.tuples(ODD, ODD), st.sets(st.integers(), max_size=2),
    st.dictionaries(st.one_of(st.text(max_size=4), st.integers()), ODD, max_size=2),
    st.lists(st.lists(ODD, max_size=2), max_size=2))


@st.composite
def mutated(draw):
  """The name of a config, and one to three of its fields with other values; some unknown."""
  name = draw(st.sampled_from(sorted(CONFIGS)))
  fields = st.one_of(st.sampled_from(sorted(CONFIGS[name])), st.sampled_from(sorted(CONFIGS[name])),
                     st.text(max_size=8), st.sampled_from(["model", "model.", "train.x", ".", ""]))
  return name, draw(st.dictionaries(fields, VALUES, min_size=1, max_size=3))


def _one_line(error):
  """The words of a UserError, which stand on one line that is not endless."""
  assert str(error) and "\n" not in str(error) and len(str(error)) < 5000
  return str(error)


@contextlib.contextmanager
def taken_or_refused(what, refused):
  """Adds `what` to a list where a UserError is raised inside; anything else fails, and names it."""
  try:
    yield
  except UserError as e:
    _one_line(e)
    refused.append(what)
  except Exception as e:
    raise AssertionError(what) from e


@settings(max_examples=LENGTH or 40, **BRIEF)
@given(mutated())
def test_any_config_resolves_or_is_refused_in_one_line(change):
  name, fields = change
  try:
    config = config_lib.unflatten(CONFIGS[name] | fields)
  except UserError as e:
    _one_line(e)
    return
  for b in range(min(config.num_blocks, 2)):
    task_lib.make_task(config, b)


@settings(max_examples=LENGTH or 40, **BRIEF)
@given(mutated())
def test_any_override_is_taken_or_refused_in_one_line(change):
  name, fields = change
  try:
    config_lib.resolve(config_lib.read(name, fields))
  except UserError as e:
    _one_line(e)


STEPS = {"optimizer.learning_rate", "optimizer.clip_norm", "optimizer.b1", "optimizer.weight_decay",
         "optimizer.warmup_steps", "schedule.gamma", "model.width", "model.num_heads",
         "model.mlp_ratio", "sigma_data", "train.ema_decay", "num_blocks", "seed", "task.flip"}


@settings(max_examples=max(3, LENGTH // 40), **BRIEF)
@given(st.sampled_from(["digits", "digits_classify", "kjv", "gcide_masked"]),
       st.sampled_from(sorted(STEPS)), ODD)
def test_a_small_config_takes_a_step_or_is_refused_in_one_line(name, field, value):
  """Of those that resolve, and are of few numbers."""
  flat = config_lib.flatten(small_config(name))
  try:
    config = config_lib.unflatten(flat | {field: value})
    task = task_lib.make_task(config, 0)
    if config.model.width > 64:
      return
    state = block_lib.init(task, 0)
    interval = task.make_schedule(config).training_interval(0)
    after, metrics = jax.jit(block_lib.train_step, static_argnums=0)(
        task, state, synthetic_batch(task, 0), np.int32(0), interval, task.frozen(config, None))
  except UserError as e:
    _one_line(e)
    return
  assert after.step == 1 and metrics["loss"].shape == ()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A workdir of two checkpoints of one block, and the checksum of the averaged weights."""
  config = config_lib.unflatten(config_lib.flatten(config_lib.read("digits")) | {
      "num_blocks": 1, "model.num_layers": 1, "model.width": 16, "model.num_heads": 2,
      "model.unroll": 1, "layers_per_block": ()})
  where, rng = tmp_path_factory.mktemp("whole"), np.random.default_rng(0)
  abstract = block_lib.abstract_state(task_lib.make_task(config, 0))
  sums = {}
  with checkpoint.BlockCheckpoint(where, 0) as blocks:
    for step in (1, 2):
      state = jax.tree.map(lambda x: np.asarray(rng.normal(size=x.shape)).astype(x.dtype),
                           abstract).replace(step=np.int32(step))
      found = jax.device_get(checkpoint.examine(state)[1])
      sums[step] = int(found["ema"])
      frozen = dict(frozen=int(checkpoint.checksum({})))
      blocks.save(state, config, seconds=0.0, checksums=found | frozen,
                  trained_with=provenance.code_of(config) | dict(data=0))
  config_lib.save(epath.Path(where), config, {})
  return where, sums


def damage(where, rng):
  """Does something to one file under a directory."""
  files = sorted(p for p in where.rglob("*") if p.is_file())
  victim, other = (files[i] for i in rng.integers(0, len(files), 2))
  content = bytearray(victim.read_bytes())
  how = rng.choice(["flip", "cut", "empty", "swap", "delete", "directory", "json", "noise"])
  if how == "flip" and content:
    for place in rng.integers(0, len(content), rng.integers(1, 4)):
      content[place] ^= 1 << rng.integers(0, 8)
  elif how == "cut":
    del content[rng.integers(0, len(content) + 1):]
  elif how == "empty":
    content.clear()
  elif how == "swap":
    theirs = other.read_bytes()
    other.write_bytes(bytes(content))
    content = theirs
  elif how == "json":
    content = _edited(content, rng)
  elif how == "noise":
    content = rng.bytes(rng.integers(1, 3000))
  victim.unlink()
  if how == "directory":
    victim.mkdir()
  elif how != "delete":
    victim.write_bytes(bytes(content))
  return f"{how} {victim}"


def _edited(content, rng):
  """JSON with some value, deep inside too, in the place of which stands another."""
  try:
    tree = node = json.loads(bytes(content))
  except ValueError:
    return content
  while isinstance(node, dict | list) and node:
    key = rng.choice([*node]) if isinstance(node, dict) else int(rng.integers(0, len(node)))
    key = str(key) if isinstance(node, dict) else key
    if not isinstance(node[key], dict | list) or rng.integers(0, 4) == 0:
      node[key] = [None, -1, 10**30, "x", [], {}, [[1]], {"a": 1}, True, 1e300, float("nan")][
          rng.integers(0, 11)]
      break
    node = node[key]
  return json.dumps(tree).encode()


def test_any_damaged_checkpoint_is_right_or_refused_in_one_line(saved, tmp_path, capsys):
  """Read as samplers do, and whole, as training does."""
  where, sums = saved
  noticed = []
  for number in range(LENGTH // 4 or 25):
    rng, run = np.random.default_rng(number), tmp_path / "run"
    shutil.copytree(where, run)
    what = number, [damage(run, rng) for _ in range(rng.integers(1, 4))]
    with taken_or_refused(what, noticed):
      model = loading.load(run)
      assert checkpoint.checksum_of_host(model.params[0]) == sums[model.steps[0]], what
      noticed += [what] * (model.steps[0] == 1)  # the one before
    with taken_or_refused(what, noticed):
      config = config_lib.load(epath.Path(run))
      template = block_lib.abstract_state(task_lib.make_task(config, 0))
      with checkpoint.BlockCheckpoint(run, 0) as blocks:
        state = blocks.restore(template, blocks.meta(config))
        assert checkpoint.checksum_of_host(state.ema) == sums[int(state.step)], what
      with checkpoint.BlockCheckpoint(run, 0) as blocks:
        blocks.set_damaged_aside(template)
    shutil.rmtree(run)
  assert noticed


@pytest.fixture(params=["images, array_record", "images, tfrecord", "texts"])
def records(request, array_records, tmp_path):
  """A small data set: where it is, the config that reads it, and the shape of an example."""
  target, shape = tmp_path / "whole", (16, 16, 3)
  fields = {"data.name": "mini", "data.image_size": 16, "data.channels": 3, "model.patch_size": 8,
            "sigma_data": 0.58, "train.batch_size": 8}
  if request.param == "texts":
    (tmp_path / "in.txt").write_text("in the beginning was the word\n" * 60)
    prepare.write(target, "mini", text.source(
        str(tmp_path / "in.txt"), str(target), tokenizer="text8", length=8, held_out=0.2,
        normalize="text8"))
    fields, shape = {"data.name": "mini", "data.length": 8, "train.batch_size": 8}, (8,)
  elif request.param == "images, tfrecord":
    as_tfrecord(array_records / "mini/1.0.0", target / "mini/1.0.0")
  else:
    shutil.copytree(array_records, target)
  return target, config_lib.read("gcide_masked" if len(shape) == 1 else "digits", fields), shape


def test_any_damaged_record_is_read_or_refused_in_one_line(records, tmp_path):
  where, config, shape = records
  key, refused = "tokens" if len(shape) == 1 else "image", []
  for number in range(LENGTH // 20 or 6):
    rng, damaged = np.random.default_rng(number), tmp_path / "damaged"
    shutil.copytree(where, damaged)
    with taken_or_refused((number, damage(damaged, rng)), refused):
      here = config_lib.unflatten(config_lib.flatten(config) | {"data.dir": str(damaged)})
      dataset = data.load(here)
      found = dataset.train.take(np.arange(len(dataset.train)))[key]
      assert found.shape[1:] == shape and np.issubdtype(found.dtype, np.integer)
    shutil.rmtree(damaged)
  assert refused
