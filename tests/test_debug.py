"""Training in Python: the same losses, values to look at, and where the first nan arose."""

import re
import textwrap

import jax
import pytest

from dbjax import debug as debug_lib
from dbjax import loop
from dbjax.errors import UserError

NET = '''
from flax import linen as nn
import jax.numpy as jnp

seen = []

class Net(nn.Module):
  num_layers: int
  kind: str = "good"

  @nn.compact
  def __call__(self, x, c_noise, label):
    h = nn.Dense(4)(x.reshape(len(x), -1)) + c_noise[:, None]
    seen.append(h)
    if self.kind == "start":
      h = h + jnp.log(jnp.minimum(h, -1.0))
    if self.kind == "forward":
      h = h + jnp.log(1 - jnp.abs(x).max())
    if self.kind == "backward":
      h = h + jnp.sqrt(0 * h)  # 0, whose gradient is none
    return nn.Dense(x[0].size)(h).reshape(x.shape)
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
  """own(kind): a config of a small network in a file, and that module."""
  (tmp_path / "own_debug_net.py").write_text(textwrap.dedent(NET))
  monkeypatch.syspath_prepend(tmp_path)

  def make(kind="good", **fields):
    from dbjax import config as config_lib

    return config_lib.read("digits", {
        "model.network": "own_debug_net:Net", "model.num_layers": 2, "model.kind": kind,
        "num_blocks": 2, "train.num_steps": 3, "train.batch_size": 8, "log.every_steps": 1,
        "optimizer.warmup_steps": 2, "sample.every_steps": 0, "checkpoint.every_steps": 2,
        **fields})

  return make


def debug(config, workdir):
  return loop.train(config, workdir, devices=jax.devices()[:1], debug=True)


def losses(capsys):
  return [(m[1], m[2], pytest.approx(float(m[3]), abs=2e-4)) for m in re.finditer(
      r"block (\d) \| step +(\d)/\d \| loss ([\d.]+)", capsys.readouterr().out)]


@pytest.mark.slow
def test_losses_are_those_of_a_compiled_run_and_the_workdir_stays(own, tmp_path, capsys):
  config = own(**{"mesh.block": 2})  # a debug run has one device
  debug(config, tmp_path / "run")
  found = losses(capsys)
  assert len(found) == 6 and not (tmp_path / "run").exists()
  assert not jax.config.jax_disable_jit and not jax.config.jax_debug_nans
  config.train.blocks = (0,)
  config.mesh.block = 1
  loop.train(config, tmp_path / "run", devices=jax.devices()[:1])
  assert found[:3] == losses(capsys)
  written = lambda: {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
  before = written()
  config.train.blocks = (0, 1)
  debug(config, tmp_path / "run")  # goes on where the workdir stands
  out = capsys.readouterr().out
  assert "block 0 | resumes from step 3" in out and "block 1 | step      3/3" in out
  assert written() == before


def test_a_network_sees_values(own, tmp_path):
  import sys

  config = own(**{"train.blocks": (1,), "train.num_steps": 1})
  debug(config, tmp_path)
  h = sys.modules["own_debug_net"].seen[-1]
  primal = getattr(h, "primal", h)  # it is being differentiated
  assert float(abs(primal).sum()) > 0


@pytest.mark.parametrize("kind, words", [
    ("start", r"before the first step: invalid value \(nan\) encountered in log, at .*"
     r"own_debug_net.py, line 16, in __call__: h = h \+ jnp.log\(jnp.minimum\(h, -1.0\)\)"),
    ("forward", r"block 1, step 1: invalid value \(nan\) encountered in log, at .*"
     r"own_debug_net.py, line 18, in __call__: h = h \+ jnp.log\(1 - jnp.abs"),
    ("backward", r"block 1, step 1: invalid value \(nan\) encountered in mul in the backward pass, "
     r"at .*own_debug_net.py, line 20, in __call__: h = h \+ jnp.sqrt"),
])
def test_the_first_nan_is_named(own, tmp_path, kind, words):
  config = own(kind, **{"train.blocks": (1,)})
  with pytest.raises(UserError, match=words):
    debug(config, tmp_path)


def test_a_checkout_called_dbjax_hides_no_library():
  code = "def fail():\n  raise FloatingPointError('nan')"
  exec(compile(code, "/x/dbjax/.venv/lib/python3.12/site-packages/flax/core.py", "exec"),
       found := {})
  with pytest.raises(UserError, match=f"step 3: nan, at {re.escape(__file__)}, line"):
    with debug_lib.nan_named((0,), 3):
      found["fail"]()


def test_the_command_ends_with_one_line(own, forked, tmp_path):
  (tmp_path / "own_debug.py").write_text(
      "import ml_collections\n\ndef get_config():\n  return ml_collections.ConfigDict(dict(\n"
      "      sigma_data=0.75, task=dict(name='image'),\n"
      "      data=dict(image_size=8, channels=1, num_classes=10),\n"
      "      model=dict(network='own_debug_net:Net', num_layers=3, "
      "kind='start')))\n")
  result = forked("main", f"--config={tmp_path / 'own_debug.py'}", "--debug",
                  f"--workdir={tmp_path / 'run'}")
  assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
  assert result.stderr.startswith("error: before the first step: invalid value (nan) encountered")
  assert "saves nothing" in result.stdout and not (tmp_path / "run").exists()


def test_what_debug_cannot_do_is_refused(own, tmp_path, monkeypatch):
  with pytest.raises(UserError, match="--fork_from=.*--debug writes nothing: fork first"):
    loop.train(own(), tmp_path / "new", fork_from=tmp_path / "old", debug=True)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(UserError, match="--debug: .*leave --distributed out"):
    debug(own(), tmp_path / "new")


@pytest.mark.nightly  # a thousand operations are compiled, each by itself
def test_a_transformer_takes_the_steps_of_a_compiled_one(tiny, tmp_path, capsys):
  config = tiny(**{"train.blocks": (0,), "train.num_steps": 2, "log.every_steps": 1})
  debug(config, tmp_path / "no")
  found = losses(capsys)
  loop.train(config, tmp_path / "run", devices=jax.devices()[:1])
  assert found == losses(capsys) and len(found) == 2


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["digits_classify", "gcide_masked", "kjv", "kjv_recurrent"])
def test_no_task_makes_a_nan_on_the_way(name):
  """Where a choice hides it, a compiled step is none the wiser, but this one would end."""
  from conftest import small_config
  from conftest import synthetic_batch

  from dbjax import block as block_lib
  from dbjax import task as task_lib

  task = task_lib.make_task(small_config(name), 0)
  interval = task.make_schedule(task.config).training_interval(0)
  frozen = task.frozen(task.config)
  state = block_lib.init(task, 0)
  with debug_lib.in_python():
    for step in range(2):
      state, metrics = block_lib.train_step(task, state, synthetic_batch(task, step), 0, interval,
                                            frozen)
  assert metrics["loss"] > 0
