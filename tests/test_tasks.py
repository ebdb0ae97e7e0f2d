"""The invariant for each task: block b after n steps is a pure function of (config, b, n)."""

import dataclasses
import functools
import json
import random
import shutil

import chex
from conftest import distance
from conftest import load_config
from conftest import states_of
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image
import pytest

from dbjax import assemble
from dbjax import block as block_lib
from dbjax import config as config_lib
from dbjax import data
from dbjax import loading
from dbjax import loop
from dbjax import network as network_lib
from dbjax import prepare
from dbjax import targets
from dbjax import task as task_lib
from dbjax.errors import UserError
from dbjax.sources import text

FILES = {"classify": "digits_classify", "masked": "gcide_masked", "autoregressive": "kjv",
         "recurrent": "kjv_recurrent"}
SMALL = {
    "num_blocks": 2, "model.num_layers": 2, "model.width": 8, "model.num_heads": 2,
    "model.unroll": 1, "train.num_steps": 4, "train.batch_size": 8, "optimizer.warmup_steps": 1,
    "checkpoint.every_steps": 2, "log.every_steps": 2, "sample.batch_size": 8}
OF_TASK = {
    "classify": {"model.patch_size": 4, "model.embedding_width": 4, "task.crop": 0},
    "masked": {"data.name": "letters", "data.length": 8},
    "autoregressive": {"data.name": "octets", "data.length": 8, "data.tokenizer": "bytes",
                       "data.vocab_size": 257, "data.eos": 256, "model.embedding_width": 4,
                       "task.embedding": "pmi"}}
OF_TASK["recurrent"] = OF_TASK["autoregressive"] | {"num_blocks": 1, "model.num_layers": 3}
pytestmark = pytest.mark.usefixtures("steps_once")
TASKS = pytest.mark.parametrize("task", list(FILES))


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
  """A little text, by letters and by bytes: the directory of two data sets."""
  where, rng = tmp_path_factory.mktemp("texts"), random.Random(0)
  lines = [" ".join(rng.choice(["in", "the", "beginning"]) for _ in range(5)) for _ in range(60)]
  (where / "in.txt").write_text("\n".join(lines))
  for name, tokenizer, documents in (("letters", "text8", None), ("octets", "bytes", "line")):
    options = dict(documents=documents) if documents else dict(normalize="text8")
    prepare.write(where, name, text.source(
        str(where / "in.txt"), str(where), tokenizer=tokenizer, length=8, held_out=0.2, **options))
  return str(where)


@pytest.fixture
def small(texts):
  """small(task, **overrides): two blocks of a layer of width 8, four steps; unresolved."""

  def make(task, **overrides):
    where = {} if task == "classify" else {"data.dir": texts}
    return load_config(FILES[task], **SMALL | OF_TASK[task] | where | overrides)

  return make


@pytest.fixture(scope="module")
def reference(tmp_path_factory, texts):
  """reference(task): the states of blocks that took turns on one device, and the workdir."""

  @functools.cache
  def run(task):
    where = {} if task == "classify" else {"data.dir": texts}
    config = config_lib.resolve(load_config(
        FILES[task], **SMALL | OF_TASK[task] | where | {"train.turn": "1"}))
    workdir = tmp_path_factory.mktemp(task)
    loop.train(config, workdir, devices=jax.devices()[:1])
    return states_of(config, workdir, config.train.blocks), workdir

  return run


@pytest.fixture
def trained(small, tmp_path):
  """trained(task, devices, workdir, **overrides): the states of all blocks after training."""

  def run(task, devices=1, workdir=tmp_path / "run", **overrides):
    config = config_lib.resolve(small(task, **overrides))
    loop.train(config, workdir, devices=jax.devices()[:devices])
    return states_of(config, workdir, config.train.blocks)

  return run


@pytest.mark.parametrize("task", [
    "classify", *(pytest.param(t, marks=pytest.mark.slow) for t in ("masked", "autoregressive"))])
def test_a_block_alone_equals_one_among_others(reference, trained, task):
  expected, workdir = reference(task)
  alone = trained(task, **{"train.blocks": (1,)})
  chex.assert_trees_all_equal(alone[1], expected[1])
  assert distance(expected[0].params, expected[1].params) > 0.1
  config = config_lib.load(workdir)
  begun = jax.device_get(block_lib.init_params(task_lib.make_task(config, 1), 1))
  assert distance(alone[1].params, begun) > 1e-3  # it has moved


@pytest.mark.parametrize("task", ["masked", *(pytest.param(name, marks=pytest.mark.slow)
                                               for name in FILES if name != "masked")])
def test_stopped_and_resumed_is_bit_equal(reference, trained, task, tmp_path, capsys):
  expected, workdir = reference(task)
  shutil.copytree(workdir, tmp_path / "run")
  shutil.rmtree(tmp_path / "run/block_00/4")
  got = trained(task, **{"train.turn": "1"})
  assert "block 0 | resumes from step 2 in" in capsys.readouterr().out
  chex.assert_trees_all_equal(got, expected)


@pytest.mark.parametrize("task", [
    "masked", *(pytest.param(name, marks=pytest.mark.slow)
                for name in ("classify", "autoregressive"))])
def test_two_rows_of_a_mesh_are_bit_equal_to_one_device(reference, trained, task):
  chex.assert_trees_all_equal(trained(task, 2, **{"mesh.block": 2}), reference(task)[0])


@TASKS
def test_a_batch_is_shown_as_a_block_sees_it(small, task, tmp_path):
  """The batch of that step, of that block's noise; and in the file what was masked is not told."""
  config = config_lib.resolve(small(task))
  block = config.num_blocks - 1
  drawn = data.show(config, tmp_path / "shown", block=block, step=3, num=4)
  batch = data.load(config).batch(config.seed, 3, 8)
  name = "label" if task == "classify" else "tokens"
  np.testing.assert_array_equal(drawn[name], batch[name])
  interval = task_lib.make_task(config, block).make_schedule(config).training_interval(block)
  if task == "masked":
    assert ((interval.lo <= drawn["time"]) & (drawn["time"] <= interval.hi)).all()
    shown = (tmp_path / "shown.txt").read_text().split("\n\n")
    for hidden, tokens, paragraph in zip(drawn["masked"], drawn["tokens"], shown, strict=False):
      letters = ["_" if h else " abcdefghijklmnopqrstuvwxyz"[t] for h, t in zip(hidden, tokens)]
      assert paragraph.strip("\n").split("\n")[1] == "".join(letters)
    assert len(shown) == 4
  elif task == "classify":
    with Image.open(tmp_path / "shown.png") as picture:
      assert np.asarray(picture).std() > 10
  else:
    assert (drawn["tokens"][0] < 256).any() and "sigma = " in (tmp_path / "shown.txt").read_text()
  with pytest.raises(UserError, match="block=2: expected a whole number, from 0 to 1"):
    data.show(small("classify"), block=2)


@pytest.mark.parametrize("task", ["masked", *(pytest.param(name, marks=pytest.mark.nightly)
                                               for name in FILES if name != "masked")])
def test_eight_devices_give_the_weights_of_one(reference, trained, task):
  got, expected = trained(task, 8, **{"mesh.data": 8}), reference(task)[0]
  for b in expected:
    assert distance(got[b].params, expected[b].params) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classify", "autoregressive", "recurrent"])
def test_the_invariant_holds_for_the_plain_networks_too(trained, task, tmp_path):
  plain = {"task.end_to_end": True}
  expected = trained(task, **plain)
  shutil.rmtree(tmp_path / "run/block_00/4")
  chex.assert_trees_all_equal(trained(task, **plain), expected)  # from step 2
  spread = trained(task, 8, tmp_path / "spread", **plain, **{"mesh.data": 4, "mesh.fsdp": 2})
  assert distance(spread[0].params, expected[0].params) < 1e-5


@pytest.mark.slow
def test_a_block_keeps_the_table_that_it_was_trained_with(trained, tmp_path):
  """The file may change or go; what was trained with another table does not join."""
  rows = np.random.default_rng(0).normal(size=(257, 4))
  np.save(tmp_path / "rows.npy", rows)
  ours = {"task.embedding": str(tmp_path / "rows.npy")}
  expected = trained("autoregressive", **ours)
  before = loading.load(tmp_path / "run").sample(2)[0]

  np.save(tmp_path / "rows.npy", rows[::-1])
  shutil.rmtree(tmp_path / "run/block_01/4")
  chex.assert_trees_all_equal(trained("autoregressive", **ours), expected)
  trained("autoregressive", workdir=tmp_path / "other", **ours, **{"train.blocks": (1,)})
  sources = [tmp_path / "run/block_00", tmp_path / "other/block_01"]
  with pytest.raises(UserError, match="block_01 was trained with another table of targets"):
    assemble.assemble(sources, tmp_path / "joint")
  assert not (tmp_path / "joint").exists()

  (tmp_path / "rows.npy").unlink()
  assemble.assemble([tmp_path / "run/block_00", tmp_path / "run/block_01"], tmp_path / "joint")
  np.testing.assert_array_equal(loading.load(tmp_path / "joint").sample(2)[0], before)


@pytest.mark.slow
def test_text_by_command(forked, reference, trained, tmp_path):
  """Sampled and scored as a user does; and the judges that cannot judge."""
  workdir = reference("autoregressive")[1]
  out, scores = tmp_path / "out.npz", tmp_path / "scores.json"
  result = forked("sample", f"--workdir={workdir}", f"--out={out}", "--num_samples=3",
                  "--solver=euler", "--bridge=hard", "--temperature=0.5", "--num_steps=3")
  assert result.returncode == 0, result.stderr
  with np.load(out) as file:
    assert file["samples"].shape == (3, 8) and file["samples"].dtype == np.int32
  assert out.with_suffix(".txt").read_text().count("\n\n") >= 2

  trained("autoregressive", workdir=tmp_path / "judge", **{"task.end_to_end": True})
  evaluate = ("evaluate", f"--workdir={workdir}", f"--json={scores}", "--num_samples=4")
  result = forked(*evaluate, f"--judge={tmp_path / 'judge'}")
  assert result.returncode == 0, result.stderr
  strictly = lambda word: pytest.fail(f"{word} is no JSON")
  found = json.loads(scores.read_text(), parse_constant=strictly)
  assert found["written"][0]["perplexity"] > 1 and found["bound"][-1]["block"] == "all"

  letters = reference("masked")[1]
  for arguments, message in [
      ((*evaluate, f"--judge={workdir}"), "expected a model that predicts the next token"),
      ((*evaluate, f"--judge={letters}"), "expected a model that predicts the next token"),
      (("evaluate", f"--workdir={letters}", f"--judge={workdir}"),
       f"--judge={workdir}: there is no such flag; the options of this task are num_samples"),
      ((*evaluate, "--guidance=2"),
       "--guidance=2: there is no such flag; the options of this task are num_samples, judge"),
      (("sample", f"--workdir={workdir}", f"--out={out}", "--solver=heun"),
       "--solver='heun': expected one of ancestral, euler"),
      (("sample", f"--workdir={letters}", f"--out={out}", "--bridge=hard"),
       "--bridge=hard: there is no such flag; the options of this task are")]:
    result = forked(*arguments)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert message in result.stderr

  trained("autoregressive", workdir=tmp_path / "other", **{
      "task.end_to_end": True, "data.name": "letters", "data.tokenizer": "text8",
      "data.vocab_size": 27, "data.eos": -1})
  result = forked(*evaluate, f"--judge={tmp_path / 'other'}")
  assert "was trained with data.tokenizer=text8, --workdir with bytes" in result.stderr


SHARED = {"task.shared_embeddings": True, "train.turn": "together"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_shared_table_is_one_and_takes_the_step_of_the_mean_gradient(
    small, trained, tmp_path, dtype):
  """The fourth step, from the third, by optax alone; each block clips its own gradient."""
  fields = SHARED | {"optimizer.schedule": "constant", "optimizer.warmup_steps": 0,
                     "optimizer.clip_norm": 0.02, "checkpoint.every_steps": 1,
                     "optimizer.moments_dtype": dtype}
  after = trained("classify", **fields)
  chex.assert_trees_all_equal(*(
      [getattr(s, name)[targets.TABLE] for name in ("params", "ema")] for s in after.values()))
  own = [targets.without_table(s.params) for s in after.values()]
  assert distance(*own) > 0.1  # nothing else is one
  config = config_lib.resolve(small("classify", **fields))
  shutil.rmtree(tmp_path / "run/block_00/4")
  with pytest.raises(UserError, match="block 0 at step 3, block 1 at step 4: move those of later"):
    loop.train(config, tmp_path / "run", devices=jax.devices()[:1])
  shutil.rmtree(tmp_path / "run/block_01/4")
  before = states_of(config, tmp_path / "run", (0, 1))
  task, o = task_lib.make_task(config, 0), config.optimizer
  batch = data.load(config).batch(config.seed, 3, config.train.batch_size)
  clip = optax.clip_by_global_norm(o.clip_norm)

  @jax.jit
  def clipped(params, b, interval):
    drawn = task.draw(block_lib.block_key(config.seed, b, 3, block_lib.DRAW), batch, interval)
    grads = jax.grad(task.loss)(params, drawn)
    return optax.tree.norm(grads), clip.update(grads, clip.init(grads))[0]

  interval = task.make_schedule(config).training_interval
  (norm, grads), (norm_1, grads_1) = (clipped(before[b].params, b, interval(b)) for b in (0, 1))
  assert min(norm, norm_1) > o.clip_norm
  assert distance(grads[targets.TABLE], grads_1[targets.TABLE]) > 0.1
  mean = (grads[targets.TABLE] + grads_1[targets.TABLE]) / 2
  adamw = optax.adamw(o.learning_rate, np.float32(o.b1), o.b2, weight_decay=o.weight_decay)
  updates, _ = adamw.update(grads | {targets.TABLE: mean}, before[0].opt_state[-1],
                            before[0].params)
  table = before[1].params[targets.TABLE]
  expected = table + updates[targets.TABLE]
  assert distance(expected, table) > 5e-4
  np.testing.assert_allclose(after[1].params[targets.TABLE], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("task", ["classify", "autoregressive"])
@pytest.mark.parametrize("fields, message", [
    ({"train.turn": "all"}, "train.turn=all, .*train table as one: set train.turn=together"),
    ({"train.turn": "random"}, "train.turn=random, mesh.block=1: "),
    ({"mesh.block": 2}, "mesh.block=2: .*and mesh.block=1"),
    ({"train.blocks": (1,)}, r"train.blocks=\[1\]: .*must be all of them"),
    ({"model.num_layers": 3, "layers_per_block": (1, 2)},
     r"layers_per_block=\[1, 2\]: .*equally many layers")])
def test_a_shared_table_needs_all_blocks_together(small, task, fields, message):
  with pytest.raises(UserError, match=message):
    config_lib.resolve(small(task, **SHARED | fields))
  config_lib.resolve(small(task, **SHARED))


@pytest.mark.parametrize("task, fields, message", [
    ("masked", {"data.name": "octets"}, "data.tokenizer=text8: octets was prepared with bytes"),
    ("autoregressive", {"data.vocab_size": 300}, "data.vocab_size=300: octets was prepared w"),
    ("autoregressive", {"data.eos": -1}, "data.eos=-1: octets was prepared with 256"),
    ("autoregressive", {"task.embedding": "none.npy"}, "task.embedding=none.npy: expected random"),
    ("classify", {"task.embedding": "none.npy"}, "task.embedding=none.npy: expected random"),
    ("classify", {"data.num_classes": 5}, "data.num_classes=5: digits has labels from 0 to 9"),
])
def test_data_and_tables_that_do_not_fit_are_refused(trained, task, fields, message):
  with pytest.raises(UserError, match=message):
    trained(task, **fields)


CALLS = pytest.mark.parametrize("name, plain", [
    ("image", False), ("classify", False), ("classify", True), ("masked", False),
    ("autoregressive", False), ("autoregressive", True), ("recurrent", False),
    ("recurrent", True)])


def task_of(small, name, plain):
  if name == "image":
    of_image = {k: v for k, v in SMALL.items() if k != "model.name"} | {"model.patch_size": 4}
    return task_lib.make_task(config_lib.resolve(load_config(**of_image)), 0)
  fields = {"task.end_to_end": True} if plain else {}
  return task_lib.make_task(config_lib.resolve(small(name, **fields)), 0)


class Stub:
  """A network that answers with zeros of a shape, however it is called, and writes down how."""

  def __init__(self, shape):
    self.shape, self.called = shape, []

  def init(self, key, *inputs):
    return {"w": jnp.zeros(1)}

  def __getattr__(self, method):
    if method not in ("apply", "next_token", "iterate"):
      raise AttributeError(method)

    def call(params, *inputs):
      self.called.append((method, [
          (x.shape, x.dtype) if hasattr(x, "shape") and x.shape else None for x in inputs]))
      return jnp.zeros(self.shape) + params["w"]

    return call


@CALLS
def test_a_network_is_called_as_its_task_says(small, name, plain):
  """`network.check` passes, and the loss calls it so."""
  task, num = task_of(small, name, plain), 3
  task_lib.check(task)
  call = task.call(num)
  stub = Stub(call.output)
  of_stub = dataclasses.replace(task, network=stub)
  batch = {k: jnp.zeros(x.shape, x.dtype) for k, x in task.abstract_batch(num).items()}
  frozen = {k: jnp.ones(x.shape, x.dtype) for k, x in task.abstract_frozen().items()}
  params = {"w": jnp.zeros(1)} | {name: jnp.ones((10, 4)) for name in task.joint}
  drawn = task.draw(jax.random.key(0), batch, task.make_schedule(task.config).training_interval(0))
  assert jax.eval_shape(of_stub.loss, params, drawn, frozen).shape == ()
  (method, inputs), = stub.called
  assert method == call.method.replace("__call__", "apply")
  dropout = [((num,), drawn["key"].dtype)] if "key" in drawn else []  # only while training
  assert inputs == [(x.shape, x.dtype) if hasattr(x, "shape") else None
                    for x in call.inputs] + dropout


@CALLS
def test_a_network_of_another_shape_is_refused_in_one_line(small, name, plain):
  task = task_of(small, name, plain)
  call = task.call(2)
  of_other = dataclasses.replace(task, network=Stub((2, 99)))
  with pytest.raises(UserError) as error:
    task_lib.check(of_other)
  message = str(error.value)
  x = call.inputs[0]
  assert message.startswith(f"model.network={task.config.model.network}, called with "
                            f"{x.dtype}{list(x.shape)}")
  assert message.endswith(f": expected an array of shape {list(call.output)}, found [2, 99]")
  assert "\n" not in message
  network_lib.check(Stub(call.output), call, "mine:Stub")  # the control
