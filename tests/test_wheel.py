"""From the wheel, in an empty folder: one file with an own network, task and data, all commands.

As a newcomer has it who read only the README. The environment is new and has the wheel; what dbjax
depends on is lent by the environment of the tests.
"""

import email
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile

from conftest import ROOT
import numpy as np
import pytest

pytestmark = pytest.mark.slow

MINE = '''
"""Points on circles: one radius for each class."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

import dbjax


class Net(nn.Module):
  num_layers: int
  width: int = 32

  @nn.compact
  def __call__(self, x, c_noise, label):
    c = nn.Dense(self.width)(c_noise[:, None]) + nn.Embed(2, self.width)(label)
    h = nn.Dense(self.width)(x)
    h = dbjax.stack(Layer, self.num_layers)(h, c)
    return nn.Dense(2)(h)


class Layer(nn.Module):

  @nn.compact
  def __call__(self, h, c):
    return h + nn.Dense(h.shape[-1])(nn.silu(nn.LayerNorm()(h) + c))


class PointsTask(dbjax.Task):
  FIELDS = {**dbjax.GAUSSIAN_FIELDS, "task.radius": dbjax.Field(1.0, "of class 1")}

  def abstract_batch(self, num):
    return dict(point=jax.ShapeDtypeStruct((num, 2), jnp.float32),
                label=jax.ShapeDtypeStruct((num,), jnp.int32))

  def call(self, num):
    point, label = self.abstract_batch(num).values()
    return dbjax.Call((point, jax.ShapeDtypeStruct((num,), jnp.float32), label), (num, 2))

  def draw(self, key, batch, interval):
    sigma_key, noise_key = jax.random.split(key)
    sigma = dbjax.sample_sigma(sigma_key, batch["label"].shape, interval)
    z = batch["point"] + sigma[:, None] * jax.random.normal(noise_key, batch["point"].shape)
    return dict(y=batch["point"], z=z, sigma=sigma, label=batch["label"])

  def loss(self, params, drawn, frozen=None):
    d = self.denoise(params, frozen, drawn["z"], drawn["sigma"], drawn["label"])
    weight = dbjax.edm_weight(drawn["sigma"], self.config.sigma_data)
    return jnp.mean(weight[:, None] * (d - drawn["y"]) ** 2)

  def denoise(self, params, frozen, z, sigma, label):
    network = lambda x, c_noise: self.apply(params, x, c_noise, label)
    return dbjax.denoise(network, z, sigma, self.config.sigma_data)

  def generate(self, model, index, seed, options):
    label = (index % 2).astype(np.int32)
    z = model.solve(model.start(seed, index), options, jnp.asarray(label))
    return np.asarray(z), label

  def evaluate(self, model, dataset, options):
    points, label = model.sample(options["num_samples"])
    radius = np.linalg.norm(points, axis=1)
    return dict(radii=[dict(label=k, radius=float(radius[label == k].mean())) for k in (0, 1)])


def load(config):
  rng = np.random.default_rng(0)
  angle, label = rng.uniform(0, 2 * np.pi, 1000), rng.integers(0, 2, 1000).astype(np.int32)
  radius = np.where(label, config.task.radius, 0.5)[:, None]
  point = (radius * np.stack([np.cos(angle), np.sin(angle)], 1)).astype(np.float32)
  return (dbjax.Arrays(point=point[:900], label=label[:900]),
          dbjax.Arrays(point=point[900:], label=label[900:]))


def get_config():
  return ml_collections.ConfigDict(dict(
      num_blocks=2, task=dict(name="mine:PointsTask"), data=dict(name="mine:load"),
      model=dict(network="mine:Net", num_layers=4),
      train=dict(num_steps=300, batch_size=64, ema_decay=0.98),
      optimizer=dict(learning_rate=3e-3, warmup_steps=20),
      sample=dict(solver="heun", num_steps=20)))
'''

NOTEBOOK = '''
from mine import *


class Wide(Net):  # a class of __main__
  width: int = 48


config = dbjax.read_config("mine.py", {"model.network": "__main__:Wide", "train.num_steps": 50})
assert config.model.width == 48
for workdir in ("first", "second"):  # twice in one process
  history = dbjax.train(config, workdir, dataset=load(dbjax.resolve(config)))
  assert history.steps[1][-1] == 50 and history.loss[1].shape == history.steps[1].shape
first, second = (dbjax.load(w) for w in ("first", "second"))
points, label = first.sample(20, seed=1)
np.testing.assert_array_equal(points, second.sample(20, seed=1)[0])
d = first.denoise(points, 0.3, label)
assert d.shape == points.shape
print(first.evaluate(num_samples=50)["radii"])
from absl import flags
assert not flags.FLAGS.is_parsed()
'''


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """An environment with the wheel, and an empty folder with one file."""
  where = tmp_path_factory.mktemp("wheel")
  pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
  source = where / "source"  # a build leaves files behind, which the next would ship
  shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "tests"))
  subprocess.run([*pip, "wheel", "--no-deps", "-w", where, source], check=True)
  subprocess.run([sys.executable, "-m", "venv", "--without-pip", where / "venv"], check=True)
  python = where / "venv" / "bin" / "python"
  site = Path(subprocess.run(
      [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
      capture_output=True, text=True, check=True).stdout.strip())
  subprocess.run([*pip, "--python", python, "install", "--no-deps", next(where.glob("*.whl"))],
                 check=True)
  # A .pth file inside is not read again: an editable dbjax of the tests stays out.
  (site / "lent.pth").write_text(sysconfig.get_path("purelib"))
  (where / "home").mkdir()
  (where / "home" / "mine.py").write_text(MINE)
  return python, where / "home"


def run(home, *words):
  python, folder = home
  environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
  return subprocess.run([python, *map(str, words)], cwd=folder, capture_output=True, text=True,
                        check=False, env=environment)


def ok(home, module, *words):
  done = run(home, "-m", f"dbjax.{module}", *words)
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_it_is_the_wheel(home):
  found = run(home, "-c", "import dbjax, os; print(dbjax.__file__); print(os.listdir()); "
              "print(dbjax.read_config('digits').num_blocks)").stdout.split("\n")
  assert found[0].startswith(str(home[0].parents[1])) and found[1:3] == ["['mine.py']", "3"]


def test_nothing_is_left_out(home):
  """Every module and config, the results that `dbjax.bench evidence` shows, the model card."""
  wheel = next(home[0].parents[2].glob("*.whl"))
  shipped = set(zipfile.ZipFile(wheel).namelist())
  modules = {p.relative_to(ROOT) for p in (ROOT / "dbjax").rglob("*.py")}
  configs = {Path("dbjax") / p.relative_to(ROOT) for p in (ROOT / "configs").rglob("*.py")}
  assert not {str(p) for p in modules | configs} - shipped
  assert "dbjax/bench/evidence.jsonl" in shipped and "dbjax/configs/examples/mixer.py" in shipped
  assert "dbjax/scripts/card.md" in shipped
  shown = run(home, "-c", "from dbjax.bench import evidence; print(evidence.RESULTS.exists())")
  assert shown.stdout == "True\n", shown.stderr


def test_nothing_else_is_in_it(home):
  """No tests, no caches; and the metadata say what it runs on, and which extras there are."""
  with zipfile.ZipFile(next(home[0].parents[2].glob("*.whl"))) as wheel:
    names = wheel.namelist()
    (described,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(wheel.read(described))
  top = {Path(name).parts[0] for name in names}
  assert top == {"dbjax", f"dbjax-{metadata['Version']}.dist-info"}
  assert not [n for n in names if "__pycache__" in n or Path(n).name.startswith(("test_", "."))]
  extras = set(metadata.get_all("Provides-Extra"))
  assert {"tpu", "cuda", "plot", "bench", "lite0"} <= extras
  assert metadata["License-Expression"] == "Apache-2.0" and metadata["Requires-Python"] == ">=3.11"
  pythons = re.findall(r"Python :: (3\.\d+)", " ".join(metadata.get_all("Classifier")))
  versions = (ROOT / "launch" / "versions.sh").read_text()
  assert f"for number in {' '.join(pythons)}; do" in versions


def test_every_command_knows_a_file_of_one_s_own(home):
  ok(home, "main", "--config=mine.py", "--workdir=whole", "--config.train.blocks=0")
  again = ok(home, "main", "--config=mine.py", "--workdir=whole")
  assert "block 0 | resumes from step 300" in again and "block 1 | step    300/300" in again
  ok(home, "main", "--config=mine.py", "--workdir=apart", "--config.train.blocks=1")
  ok(home, "assemble", "--out=joined", "whole/block_00", "apart/block_01")
  for workdir in ("whole", "joined"):
    ok(home, "sample", f"--workdir={workdir}", f"--out={workdir}.npz", "--num_samples=40",
       "--num_steps=10")
  with np.load(home[1] / "whole.npz") as whole, np.load(home[1] / "joined.npz") as joined:
    np.testing.assert_array_equal(whole["samples"], joined["samples"])  # the invariant
  ok(home, "export", "--workdir=joined", "--out=shared", "--num_steps=10")
  ok(home, "sample", "--workdir=shared", "--out=shared.npz", "--num_samples=40", "--num_steps=10")
  alone = run(home, "shared/sample.py", "--num=40", "--label=0,1", "--out=alone")
  assert alone.returncode == 0, alone.stderr
  with (np.load(home[1] / "whole.npz") as whole, np.load(home[1] / "shared.npz") as shared,
        np.load(home[1] / "alone.npz") as alone):
    np.testing.assert_array_equal(whole["samples"], shared["samples"])
    np.testing.assert_allclose(whole["samples"], alone["samples"], atol=1e-4)
  ok(home, "evaluate", "--workdir=joined", "--json=scores.json", "--num_samples=100")
  inner, outer = json.loads((home[1] / "scores.json").read_text())["radii"]
  assert abs(inner["radius"] - 0.5) < 0.15 and abs(outer["radius"] - 1.0) < 0.15

  ok(home, "report", "--workdir=joined", "--workdir=whole", "--out=page.html")
  assert "joined, whole: dbjax</title>" in (home[1] / "page.html").read_text()

  described = ok(home, "main", "--config=mine.py", "--describe")
  assert "task.radius" in described and "of class 1" in described
  mistyped = run(home, "-m", "dbjax.main", "--config=mine.py", "--workdir=x",
                 "--config.task.radus=2")
  assert mistyped.returncode == 2 and "did you mean task.radius?" in mistyped.stderr
  planned = ok(home, "plan", "--config=mine.py", "--topology=v5e:4x4", "--nolargest",
               "--config.train.batch_size=64")
  assert "16 x TPU v5" in planned and "mesh: --config.mesh.block=2" in planned

  (home[1] / "mine.py").write_text(MINE + "# changed\n")
  assert "another content of the module of" in ok(
      home, "sample", "--workdir=joined", "--out=joined.npz", "--num_samples=2")


def test_a_notebook_has_it_too(home):
  (home[1] / "mine.py").write_text(MINE)
  (home[1] / "notebook.py").write_text(NOTEBOOK)
  done = run(home, "notebook.py")
  assert done.returncode == 0, done.stderr
