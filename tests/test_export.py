"""What is shared: weights that are the same bits, samplers that need no dbjax, files of strangers.

The package safetensors and PyTorch are the independent truth of what the files mean.
"""

import dataclasses
import json
import os
from pathlib import Path
import pickle
import re
import runpy
import shutil
import subprocess
import sys
import types

import chex
from conftest import load_config
from conftest import random_workdir
from conftest import ROOT
from conftest import small_config
from etils import epath
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import dbjax
from dbjax import assemble
from dbjax import begin
from dbjax import config as config_lib
from dbjax import export
from dbjax import exported
from dbjax import loading
from dbjax import loop
from dbjax import model as model_lib
from dbjax import pretrained
from dbjax import task as task_lib
from dbjax import tensors
from dbjax import trust
from dbjax.errors import UserError
from dbjax.tasks import classify
from dbjax.tasks import image

TINY = {"num_blocks": 2, "model.num_layers": 3, "layers_per_block": (1, 2), "model.width": 16,
        "model.num_heads": 2, "model.unroll": 1, "sample.num_steps": 4, "sample.batch_size": 8}
NEW = {"model.norm": "rms", "model.mlp": "swiglu", "model.qk_norm": True, "model.rotary": "fixed",
       "model.noise": "line"}
SLOW, NIGHTLY = pytest.mark.slow, pytest.mark.nightly  # the latter repeat others on more
CONFIGS = ["digits", "digits_classify", "text8", pytest.param("imagenet256_latent", marks=NIGHTLY),
           pytest.param("kjv", marks=SLOW), pytest.param("kjv_recurrent", marks=NIGHTLY)]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A workdir of two blocks of digits."""
  return random_workdir(tmp_path_factory.mktemp("export") / "work dir", resolved())


@pytest.fixture(scope="module")
def honest(workdir):
  """What was exported of it."""
  return export.export(workdir, workdir.with_name("shared model"))


@pytest.fixture
def folder(honest, tmp_path):
  """A copy, to be changed."""
  return epath.Path(shutil.copytree(honest, tmp_path / "folder"))


def resolved(**fields):
  return config_lib.resolve(load_config(**TINY | fields))


def sampler(folder):
  """What model.json says of the sampler, and the sampler as a function of its inputs."""
  about = json.loads((folder / "model.json").read_text())
  program = jax.export.deserialize(bytearray((folder / about["sampler"]["file"]).read_bytes()))
  blocks = [load_file(folder / block["file"]) for block in about["blocks"]]
  return about["sampler"], lambda **inputs: np.asarray(program.call(blocks, inputs))


def noise_of(model, seed, index):
  """Of variance 1, by the keys of samples: as sample.py makes it."""
  shape = model.tasks[0].prior(jax.random.key(0), 1.0).shape
  return jax.vmap(lambda key: jax.random.normal(key, shape))(model.keys(seed, index))


# The files.


@pytest.mark.parametrize("name", CONFIGS)
def test_the_folder_is_the_model_bit_for_bit(name, tmp_path):
  random_workdir(tmp_path / "work", small_config(name))
  made = export.export(tmp_path / "work", tmp_path / "out", num_steps=2)
  work, out = dbjax.load(tmp_path / "work"), dbjax.load(made)
  chex.assert_trees_all_equal(out.params, work.params)
  chex.assert_trees_all_equal(out.frozen, work.frozen)
  assert (out.steps, out.metas) == (work.steps, work.metas)
  if name != "imagenet256_latent":
    options = dict(num_steps=2, seed=3)
    np.testing.assert_array_equal(out.sample(3, **options)[0], work.sample(3, **options)[0])


def test_others_read_the_files(honest, workdir):
  """Names, shapes and numbers by the package safetensors; metadata, boundaries and fields."""
  model = dbjax.load(workdir)
  whole = load_file(honest / "model.safetensors")
  for b, params in enumerate(model.params):
    with safe_open(honest / f"block_{b:02d}.safetensors", "np") as file:
      assert file.metadata()["dbjax"] == dbjax.__version__
      assert json.loads(file.metadata()["block"])["config"]["model.width"] == 16
      for name in file.keys():
        leaf = params
        for part in name.split("/"):
          leaf = leaf[part]
        np.testing.assert_array_equal(file.get_tensor(name), leaf)
        np.testing.assert_array_equal(whole.pop(f"block_{b:02d}/{name}"), leaf)
  assert not whole
  about = json.loads((honest / "model.json").read_text())
  assert about["boundaries"] == list(model.schedule.boundaries)
  assert about["layers_per_block"] == [1, 2] and about["sigma_data"] == 0.75
  assert [b["network"]["num_layers"] for b in about["blocks"]] == [1, 2]
  assert config_lib.load(honest) == config_lib.load(epath.Path(workdir))


def test_frozen_tables_go_with_every_block(tmp_path):
  model = dbjax.load(random_workdir(tmp_path / "work", small_config("digits_classify")))
  made = export.export(model, tmp_path / "out")
  for name in ("block_00", "block_01", "model"):
    np.testing.assert_array_equal(
        load_file(made / f"{name}.safetensors")["frozen/table"], model.frozen["table"])


def test_the_files_of_a_task_go_with_it(tmp_path, monkeypatch):
  work = random_workdir(tmp_path / "work", resolved())
  files = staticmethod(lambda config, workdir: {"tokenizer.model": b"pieces"})
  monkeypatch.setattr(type(task_lib.make_task(resolved(), 0)), "files", files)
  assert (export.export(work, tmp_path / "out") / "tokenizer.model").read_bytes() == b"pieces"


def test_the_card_says_what_there_is(workdir, tmp_path, monkeypatch):
  work = epath.Path(shutil.copytree(workdir, tmp_path / "work"))
  model = dbjax.load(work)
  card = (export.export(model, tmp_path / "no scores") / "README.md").read_text()
  assert "before exporting" in card
  (work / "scores.json").write_text(json.dumps(dict(
      losses=[0.5, 0.25], quality=[dict(guidance=1.0, accuracy=0.875)])))
  card = (export.export(work, tmp_path / "scored") / "README.md").read_text()
  assert "0.875" in card and "0.5, 0.25" in card and "Licence**: ..." in card
  assert "sample_torch.py" in card and 'dbjax.load("scored")' in card
  (work / "scores.json").write_text("[1]")
  monkeypatch.setattr(export, "_sampler", None)  # what is refused is refused before all work
  with pytest.raises(UserError, match="scores.json cannot be read"):
    export.export(work, tmp_path / "damaged")
  (work / "scores.json").rename(tmp_path / "scores.json")
  os.symlink(tmp_path / "scores.json", work / "scores.json")
  with pytest.raises(UserError, match="scores.json is a link: put a copy in its place"):
    export.export(work, tmp_path / "damaged")
  assert not [path for path in tmp_path.iterdir() if "damaged" in path.name]


def test_a_folder_is_written_whole_or_not_at_all(workdir, tmp_path, monkeypatch):
  with pytest.raises(UserError, match="exists: choose another"):
    export.export(workdir, workdir)
  monkeypatch.setattr(export, "card", lambda *_: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    export.export(workdir, tmp_path / "out")
  assert not list(tmp_path.iterdir())
  monkeypatch.setattr(export.uuid, "uuid4", lambda: types.SimpleNamespace(hex="x"))
  (tmp_path / "out.x.tmp").mkdir()  # another's
  with pytest.raises(UserError, match="out cannot be written .File exists"):
    with export._whole(epath.Path(tmp_path / "out")):
      pass
  assert (tmp_path / "out.x.tmp").exists()


def test_what_cannot_be_shared_is_refused(workdir, tmp_path):
  model = dbjax.load(workdir)
  worse = jax.tree.map(lambda x: x * np.float32(np.nan), model.params)
  for given, options, match in [
      (dataclasses.replace(model, params=worse), {}, "block 0: .* is not all finite"),
      (dataclasses.replace(model, metas=()), {}, "expected a model that dbjax.load has read"),
      (model, dict(platforms=("cpu", "gpu")), "platforms=.*: expected .*one of cpu, cuda, tpu"),
      (model, dict(num_step=3), "no such option.*did you mean num_steps"),
      (model, dict(labels=(10,)), "labels=10: expected classes from 0 to 9"),
      (model, dict(guide_step=5), "guided by no label, and not by another model: set guide_step"),
      (tmp_path / "nowhere", {}, "config.json does not exist")]:
    with pytest.raises(UserError, match=match):
      export.export(given, tmp_path / "out", **options)
  assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def led(tmp_path_factory):
  """A workdir whose config has samples guided by an earlier checkpoint."""
  return random_workdir(tmp_path_factory.mktemp("led") / "work", resolved(**{
      "sample.guide_step": 3, "sample.guidance": 2.0}))


def test_a_folder_is_not_guided_by_checkpoints_that_it_has_not(led, tmp_path):
  made = export.export(led, tmp_path / "out", guide_step=0, guidance=1.5, platforms=())
  np.testing.assert_array_equal(
      dbjax.load(made).sample(4)[0], dbjax.load(led).sample(4, guide_step=0, guidance=1.5)[0])
  for platforms in ((), ("cpu",)):
    with pytest.raises(UserError, match="set guide_step to 0"):
      export.export(led, tmp_path / "none", platforms=platforms)
  assert not (tmp_path / "none").exists()


def test_options_of_a_sampler_that_is_not_written_are_refused(workdir, tmp_path):
  for options in (dict(num_steps=3), dict(guidance=2.0), dict(guide_step=0)):
    name = next(iter(options))
    with pytest.raises(UserError, match=f"--{name}: without --platforms there is no sampler"):
      export.export(workdir, tmp_path / "out", platforms=(), **options)
  assert not list(tmp_path.iterdir())


def test_a_block_that_there_is_not_is_told_by_its_flag(workdir, tmp_path):
  with pytest.raises(UserError, match="--blocks=7: num_blocks=2 has blocks 0 to 1"):
    export.export_blocks(workdir, tmp_path / "out", (0, 7))


@pytest.mark.parametrize("inside", ["block_00/z", "block_01/5/z", "block_01/../block_00/x/z",
                                    "block_07"])
def test_nothing_is_exported_into_a_block(workdir, inside):
  for write in (lambda out: export.export(dbjax.load(workdir), out),
                lambda out: export.export_blocks(workdir, out, (0,))):
    with pytest.raises(UserError, match="is of a block of this workdir.*choose another folder"):
      write(workdir / inside)
  assert not (workdir / inside).exists()


def test_what_holds_one_block_says_so(workdir, tmp_path, monkeypatch, capsys):
  for blocks, words in (((1,), "holds block 1: "), ((0, 1), "holds blocks 0,1: ")):
    out = epath.Path(tmp_path / f"{len(blocks)}")
    chosen = dict(workdir=epath.Path(workdir), out=out)
    monkeypatch.setattr(export.cli, "path", chosen.get)
    given = FakeFlags(blocks=blocks, platforms=types.SimpleNamespace(present=0), step=0, best=False)
    monkeypatch.setattr(export, "flags", types.SimpleNamespace(FLAGS=given))
    export.main({})
    assert words in capsys.readouterr().out


class FakeFlags(types.SimpleNamespace):
  """Of the command line: by name, as attributes and as items."""

  __getitem__ = types.SimpleNamespace.__getattribute__


def test_weights_of_one_s_own_are_exported_too(workdir, tmp_path):
  """Such as an average of two models: the checksum is theirs."""
  model = dbjax.load(workdir)
  halved = dataclasses.replace(model, params=jax.tree.map(lambda x: x / 2, model.params))
  made = export.export(halved, tmp_path / "out")
  chex.assert_trees_all_equal(dbjax.load(made).params, halved.params)


# The sampler.


@pytest.mark.parametrize("solver", ["euler", pytest.param("heun", marks=NIGHTLY)])
def test_the_sampler_draws_what_the_model_draws(workdir, tmp_path, solver):
  """Any number of images from one file, with guidance in an interval, and with churn."""
  model = dbjax.load(workdir)
  options = dict(solver=solver, num_steps=5, guidance_to=10.0, guidance_from=0.1,
                 churn=2.0 * (solver == "heun"))
  about, draw = sampler(export.export(model, tmp_path / "out", **options))
  for num in (1, 5):
    index = np.arange(num, dtype=np.int32)
    label = index % 3
    keys = dict(seed=np.uint32(7), index=index) if "seed" in about["inputs"] else {}
    for guidance in (1.0, 3.0):
      ours, _ = model.sample(num, seed=7, guidance=guidance, labels=(0, 1, 2), **options)
      theirs = draw(noise=noise_of(model, 7, index), label=label, guidance=np.float32(guidance),
                    **keys)
      assert theirs.dtype == np.uint8 and theirs.shape == (num, 8, 8, 1)
      assert np.abs(theirs.astype(int) - ours).max() <= 1
  assert ("seed" in about["inputs"]) == (solver == "heun")


@SLOW
def test_labels_and_guidance_are_inputs_where_they_were_trained(tmp_path):
  for drop, guidance, expected in [(0.0, 1.0, {"noise", "label"}), (1.0, 0.0, {"noise"})]:
    work = random_workdir(tmp_path / f"{drop}", resolved(**{
        "task.label_drop": drop, "sample.guidance": guidance}))
    about, draw = sampler(export.export(work, tmp_path / f"{drop} out"))
    assert about["inputs"].keys() == expected
    model, index = dbjax.load(work), np.arange(3, dtype=np.int32)
    inputs = dict(noise=noise_of(model, 0, index), label=index)
    ours = model.sample(3)[0]
    theirs = draw(**{name: inputs[name] for name in expected})
    assert np.abs(theirs.astype(int) - ours).max() <= 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_classifier_answers_with_log_probabilities(tmp_path, temperature):
  model = dbjax.load(random_workdir(tmp_path / "work", small_config("digits_classify")))
  options = model.options(dict(temperature=temperature))
  about, answer = sampler(export.export(model, tmp_path / "out", temperature=temperature))
  index = np.arange(4, dtype=np.int32)
  image = model.dataset().held_out.take(index)["image"]
  noise = dict(noise=noise_of(model, 0, index)) if temperature else {}
  assert about["inputs"].keys() == {"image", *noise}
  found = answer(image=image, **noise)
  expected = classify.probabilities(model, image, index, 0, options)
  np.testing.assert_allclose(np.exp(found), expected, rtol=1e-4)


@pytest.mark.parametrize("name, fields", [
    ("text8", {}), ("kjv", {}),
    pytest.param("text8", {"schedule.alpha": "cosine"}, marks=NIGHTLY),
    pytest.param("kjv_recurrent", {}, marks=NIGHTLY),
    pytest.param("kjv", {"num_blocks": 1, "task.end_to_end": True}, marks=SLOW)])
def test_text_is_written_of_a_seed(name, fields, tmp_path):
  config = small_config(name)
  config = config_lib.as_one_block(config, **fields) if "num_blocks" in fields else (
      config_lib.changed(config, **fields))
  model = dbjax.load(random_workdir(tmp_path / "work", config))
  _, write = sampler(export.export(model, tmp_path / "out", num_steps=4))
  for temperature in (0.0, 1.0):
    ours, _ = model.sample(5, seed=1, num_steps=4, temperature=temperature)
    theirs = write(seed=np.uint32(1), index=np.arange(5, dtype=np.int32),
                   temperature=np.float32(temperature))
    assert theirs.shape == ours.shape and np.mean(theirs == ours) > 0.9  # a tie may fall otherwise


def test_one_file_serves_three_platforms(workdir, tmp_path):
  made = export.export(workdir, tmp_path / "out", platforms=("cpu", "cuda", "tpu"))
  about, draw = sampler(made)
  assert about["platforms"] == ["cpu", "cuda", "tpu"]
  assert draw(noise=np.zeros((2, 8, 8, 1), np.float32), label=np.arange(2, dtype=np.int32),
              guidance=np.float32(1)).shape == (2, 8, 8, 1)
  assert (made / "sampler.jax").stat().length < 200_000  # the weights are not in it


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_a_kernel_of_one_platform_does_not_hinder(workdir, tmp_path, kernel):
  model = dbjax.load(workdir).with_config(**{"model.attention": kernel})
  assert (export.export(model, tmp_path / "out") / "sampler.jax").exists()


@pytest.mark.parametrize("name", ["digits", "digits_classify", "text8"])
def test_the_code_on_the_card_runs_without_dbjax(name, tmp_path):
  model = dbjax.load(random_workdir(tmp_path / "work", small_config(name)))
  made = export.export(model, tmp_path / "out", num_steps=4)
  code = re.search("program of your own:\n\n```python\n(.*?)```", (made / "README.md").read_text(),
                   re.S)[1]
  assert len(code.splitlines()) <= 20
  script = made / "own.py"
  script.write_text(code + "np.save('own.npy', samples)\n")
  run_without_dbjax(script, cwd=made)
  theirs = np.load(made / "own.npy")
  index = np.arange(4, dtype=np.int32)
  noise = np.random.default_rng(1).standard_normal((4, 8, 8, 1), np.float32)
  ours = {"digits": lambda draw: draw(noise=noise, label=index, guidance=np.float32(1)),
          "digits_classify": lambda draw: draw(image=np.zeros((4, 8, 8, 1), np.uint8)),
          "text8": lambda draw: draw(seed=np.uint32(0), index=index, temperature=np.float32(1))}
  np.testing.assert_array_equal(theirs, ours[name](sampler(made)[1]))


@SLOW
def test_a_block_can_be_exchanged(workdir, honest, tmp_path):
  """The sampler reads the files of the blocks, so that another block's is another sample."""
  other = dbjax.load(workdir)
  halved = dataclasses.replace(other, params=(
      other.params[0], jax.tree.map(lambda x: x / 2, other.params[1])))
  made = export.export(halved, tmp_path / "out")
  index = np.arange(2, dtype=np.int32)
  inputs = dict(noise=noise_of(other, 0, index), label=index, guidance=np.float32(1))
  (_, ours), (_, theirs) = sampler(honest), sampler(made)
  expected = theirs(**inputs)
  assert (ours(**inputs) != expected).any()
  mixed = shutil.copytree(honest, tmp_path / "mixed")
  shutil.copy(made / "block_01.safetensors", mixed)
  np.testing.assert_array_equal(sampler(epath.Path(mixed))[1](**inputs), expected)
  np.testing.assert_array_equal(dbjax.load(mixed).sample(2)[0], halved.sample(2)[0])


def run_without_dbjax(script, *arguments, cwd=None):
  """Runs a script as a program in which dbjax cannot be imported."""
  code = ("import runpy, sys; sys.modules['dbjax'] = None; sys.argv = sys.argv[1:]; "
          "runpy.run_path(sys.argv[0], run_name='__main__')")
  done = subprocess.run([sys.executable, "-P", "-c", code, *map(str, [script, *arguments])],
                        capture_output=True, text=True, check=False,
                        cwd=cwd or Path(script).parents[1])
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_a_script_draws_without_dbjax(workdir, honest, tmp_path):
  out = tmp_path / "drawn"
  run_without_dbjax(honest / "sample.py", "--num=4", "--seed=2", "--label=3,7", "--guidance=2",
                    f"--out={out}")
  with np.load(f"{out}.npz") as arrays:
    theirs = arrays["samples"]
  ours, _ = dbjax.load(workdir).sample(4, seed=2, labels=(3, 7), guidance=2.0)
  assert np.abs(theirs.astype(int) - ours).max() <= 1
  np.testing.assert_array_equal(np.asarray(Image.open(f"{out}.png")),
                                np.concatenate(theirs, 1)[..., 0])


@SLOW
@pytest.mark.parametrize("name", ["digits_classify", "text8", "kjv"])
def test_the_script_serves_every_task(name, tmp_path):
  random_workdir(tmp_path / "work", small_config(name))
  made = export.export(tmp_path / "work", tmp_path / "out", num_steps=2)
  np.save(tmp_path / "image.npy", np.zeros((3, 8, 8, 1), np.uint8))
  given = [f"--image={tmp_path / 'image.npy'}"] if name == "digits_classify" else []
  said = run_without_dbjax(made / "sample.py", "--num=3", f"--out={tmp_path / 'x'}", *given)
  assert said.startswith(f"{tmp_path / 'x'}.npz: ") and "(3, " in said


def test_the_script_is_as_short_as_it_claims():
  for name, limit in [("sample.py", 60), ("sample_torch.py", 120)]:
    lines = (ROOT / "dbjax/scripts" / name).read_text().partition('"""\n\n')[2].splitlines()
    assert len([line for line in lines if line.strip()]) < limit
    assert "dbjax" not in "".join(line for line in lines if "import" in line)


# PyTorch.


FORMS = {
    "dit": {},
    "new and own sizes": NEW | {"model.width": (16, 24), "model.mlp_ratio": (4.0, 2.0)},
    "learned": {"model.rotary": "learned", "model.positions": "learned", "model.norm": "rms"},
    "none": {"model.positions": "none", "model.rotary": "fixed", "model.mlp": "swiglu",
             "model.qk_norm": True},
    "heun": {"sample.solver": "heun", "sample.grid": "equal_mass"},
    "multistep": NEW | {"sample.solver": "dpmpp_2m", "sample.guidance_to": 5.0},
    "churn": {"sample.solver": "heun", "sample.churn": 2.0},
    "learned weight": {"task.learned_weight": True, "model.patch_size": 4},
    "colour": {"data.channels": 3, "data.image_size": 16, "data.name": "cifar10"},
}


@pytest.mark.parametrize("form", [form if form.startswith("new") else pytest.param(form, marks=SLOW)
                                  for form in FORMS])
def test_pytorch_draws_the_same_images(form, tmp_path, monkeypatch):
  torch = pytest.importorskip("torch")
  work = random_workdir(tmp_path / "work", resolved(**{"sample.num_steps": 12} | FORMS[form]))
  script = runpy.run_path(str(export.export(work, tmp_path / "out") / "sample_torch.py"))
  model, label = dbjax.load(work), np.array([3, 7, 0], np.int32)
  noise = np.asarray(noise_of(model, 1, np.arange(3)))
  options, keys = model.options({}), model.keys(1, np.arange(3))
  span = [np.float32(options[name]) for name in ("guidance_from", "guidance_to")]
  for guidance in (1.0, 2.5):
    ours = model.trace(model.schedule.sigma_max * noise, options, image._guided_inside,
                       jnp.asarray(label), guidance, span, keys=keys)[0]
    added = (torch.tensor(np.asarray(model_lib._noise(keys, k, noise.shape[1:])))
             for k, row in enumerate(model.table(options).noise) if row)
    monkeypatch.setattr(torch, "randn_like", lambda _, added=added: next(added))
    theirs = script["sample"](torch.tensor(noise), torch.tensor(label).long(), guidance).numpy()
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    assert np.std(ours) > 0.1 and np.abs(ours[0] - ours[1]).max() > 0.01
    assert not list(added)


@SLOW
def test_the_noise_that_pytorch_adds_is_of_the_seed(tmp_path, monkeypatch):
  torch = pytest.importorskip("torch")
  work = random_workdir(tmp_path / "work", resolved(**FORMS["churn"]))
  script = export.export(work, tmp_path / "out") / "sample_torch.py"
  drawn = []
  for seed in (1, 1, 2):
    torch.seed()
    monkeypatch.setattr(sys, "argv", ["x", f"--seed={seed}", f"--out={tmp_path / 'x'}"])
    runpy.run_path(str(script), run_name="__main__")
    drawn.append((tmp_path / "x.png").read_bytes())
  assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("script", ["sample.py", "sample_torch.py"])
def test_a_script_refuses_what_dbjax_refuses(honest, folder, monkeypatch, capsys, script):
  """And what is no input of this sampler."""
  if script == "sample_torch.py":
    pytest.importorskip("torch")
  about = json.loads((folder / "model.json").read_text())
  del about["sampler"]["inputs"]["guidance"]
  (folder / "model.json").write_text(json.dumps(about))
  for where, wrong in [(honest, "--label=3,10"), (honest, "--label=-1"), (honest, "--label=3.7"),
                       (folder, "--guidance=2")]:
    monkeypatch.setattr(sys, "argv", ["x", wrong])
    with pytest.raises(SystemExit, match="2"):
      runpy.run_path(str(where / script), run_name="__main__")
    assert wrong.partition("=")[0] in capsys.readouterr().err.splitlines()[-1]


@SLOW
def test_the_pytorch_script_runs_without_jax(honest, tmp_path):
  pytest.importorskip("torch")
  code = ("import runpy, sys; sys.modules.update(dbjax=None, jax=None); sys.argv = sys.argv[1:]; "
          "runpy.run_path(sys.argv[0], run_name='__main__')")
  subprocess.run([sys.executable, "-P", "-c", code, honest / "sample_torch.py", "--num=3",
                  f"--out={tmp_path / 'x'}"], check=True)
  assert Image.open(tmp_path / "x.png").size == (24, 8)


def test_other_networks_have_no_script_for_pytorch(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(ROOT / "configs/examples")
  config = dbjax.resolve(dbjax.read_config(ROOT / "configs/examples/mixer.py", {
      "model.width": 8, "sample.num_steps": 3}))
  made = export.export(random_workdir(tmp_path / "work", config), tmp_path / "out")
  assert (made / "sample.py").exists() and not (made / "sample_torch.py").exists()
  card = (made / "README.md").read_text()
  assert "mixer:Mixer` (SHA-256" in card and "sample_torch.py" not in card
  assert "(on cpu): `python sample.py" in card


class Halved(image.ImageTask):
  """A denoiser of one's own, and a figure of numpy's in model.json."""

  def denoise(self, *args):
    return super().denoise(*args) / 2

  def program(self, model, options):
    made = super().program(model, options)
    return made._replace(about=made.about | dict(half=np.float32(0.5)))


def test_a_task_s_own_denoiser_has_no_script_for_pytorch(tmp_path):
  work = random_workdir(tmp_path / "work", resolved(**{"task.name": f"{__name__}:Halved"}))
  made = export.export(work, tmp_path / "out")
  assert (made / "sample.py").exists() and not (made / "sample_torch.py").exists()
  assert json.loads((made / "model.json").read_text())["sampler"]["half"] == 0.5


# A user's own.


@pytest.mark.parametrize("name", ["mixer", "signals"])
def test_an_example_is_exported(name, tmp_path, monkeypatch):
  """A network and a task that know nothing of it."""
  monkeypatch.syspath_prepend(ROOT / "configs/examples")
  config = dbjax.resolve(dbjax.read_config(ROOT / f"configs/examples/{name}.py", {
      "model.width": 8, "sample.num_steps": 3}))
  model = dbjax.load(random_workdir(tmp_path / "work", config))
  made = export.export(model, tmp_path / "out")
  index = np.arange(4, dtype=np.int32)
  guidance = dict(guidance=np.float32(1)) if name == "mixer" else {}
  _, draw = sampler(made)
  theirs = draw(noise=noise_of(model, 0, index), label=index % 3, **guidance)
  labels = dict(labels=(0, 1, 2)) if name == "mixer" else {}
  ours, _ = model.sample(4, **labels)
  scale = 1 if name == "mixer" else 1e-4 * np.abs(ours).max()  # of random weights they are large
  np.testing.assert_allclose(theirs.astype(float), ours, atol=scale)
  np.testing.assert_array_equal(dbjax.load(made).sample(4, **labels)[0], ours)


@dataclasses.dataclass(frozen=True)
class Stubborn:
  """A network that takes no batch of one, as that of one sample has it."""

  num_layers: int

  def init(self, key, *inputs):
    return dict(scale=jnp.ones(self.num_layers))

  def apply(self, params, x, c_noise, label):
    if not isinstance(x, jax.ShapeDtypeStruct) and isinstance(x, jax.core.Tracer) and len(x) == 1:
      raise TypeError("a network for two or more")
    return x * params["scale"][0]


def test_what_cannot_be_compiled_is_shared_without_a_sampler(tmp_path, capsys):
  config = config_lib.resolve(load_config(**{
      "model.network": f"{__name__}:Stubborn", "model.num_layers": 2, "num_blocks": 2}))
  made = export.export(random_workdir(tmp_path / "work", config), tmp_path / "out")
  said = capsys.readouterr().out
  assert "note: no sampler is written (" in said and "a network for two or more" in said
  assert not (made / "sampler.jax").exists() and not (made / "sample.py").exists()
  card = (made / "README.md").read_text()
  assert "no sampler was written" in card and ".py" not in card
  assert dbjax.load(made).steps == (5, 5)


def test_a_task_without_a_solver_exports_its_denoiser(workdir):
  """D(z, sigma) by the block of this noise; sigma is an input."""
  model = dbjax.load(workdir)
  options = {name: x for name, x in model.options({}).items() if name != "solver"}
  program = task_lib.Task.program(model.tasks[0], model, options)
  assert program.inputs.keys() == {"z", "sigma", "label"}
  z, label = np.asarray(noise_of(model, 0, np.arange(2))), np.arange(2)
  run = jax.jit(lambda sigma: program.run(model, z=z, sigma=sigma, label=label))
  bounds = model.schedule.boundaries
  for sigma in (80.0, bounds[1] * 1.01, bounds[1] * 0.99, 0.002):
    np.testing.assert_allclose(run(sigma), model.denoise(z, sigma, label), atol=1e-6)


# Blocks taken in one by one.


def test_exported_blocks_are_assembled(workdir, honest, tmp_path):
  """A folder; files by any name; a file and a directory of checkpoints."""
  expected, _ = dbjax.load(workdir).sample(3)
  mail = tmp_path / "mail"
  mail.mkdir()
  shutil.copy(honest / "block_00.safetensors", mail / "block_00 (1).safetensors")
  for n, sources in enumerate([
      [honest], [mail / "block_00 (1).safetensors", honest / "block_01.safetensors"],
      [honest / "block_00.safetensors", workdir / "block_01"]]):
    assemble.assemble(sources, tmp_path / f"{n}")
    np.testing.assert_array_equal(dbjax.load(tmp_path / f"{n}").sample(3)[0], expected)
  again = export.export(tmp_path / "2", tmp_path / "again")
  np.testing.assert_array_equal(dbjax.load(again).sample(3)[0], expected)


def test_single_blocks_are_exported_where_others_are_missing(workdir, tmp_path):
  """Each on the machine that trained it; frozen tables go with each."""
  for name, config in [("image", resolved()), ("classify", small_config("digits_classify"))]:
    work = random_workdir(tmp_path / name, config)
    expected = dbjax.load(work).sample(2)[0]
    parts = []
    for b in (0, 1):
      alone = epath.Path(shutil.copytree(work, tmp_path / f"{name} {b}"))
      (alone / f"block_0{1 - b}").rmtree()
      parts.append(export.export_blocks(alone, tmp_path / f"{name} part {b}", (b,)))
      assert [path.name for path in parts[-1].iterdir()] == [f"block_0{b}.safetensors"]
      with pytest.raises(UserError, match=f"block_0{1 - b} has no checkpoint"):
        export.export(alone, tmp_path / "out")
      with pytest.raises(UserError, match=f"block_0{1 - b} has no checkpoint"):
        export.export_blocks(alone, tmp_path / "out", (0, 1))
    assemble.assemble(parts, tmp_path / f"{name} joined")
    np.testing.assert_array_equal(dbjax.load(tmp_path / f"{name} joined").sample(2)[0], expected)
  assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_blocks_that_do_not_belong_together_are_refused(workdir, honest, tmp_path):
  wide = random_workdir(tmp_path / "wide", resolved(**{"model.width": 32}))
  wide = export.export(wide, tmp_path / "wide out")
  first = honest / "block_00.safetensors"
  for sources, match in [
      ([first], "of the 2 blocks 1 is missing"),
      ([first, wide / "block_01.safetensors"], "not of one model: model.width=16 .here. against"),
      ([first, honest], None), ([honest, workdir], "block 0 is in .* and in .*: name one"),
      ([honest / "model.safetensors"], "holds no block that dbjax.export has written"),
      ([honest / "README.md"], "cannot be read, it may be damaged"),
      ([tmp_path / "none.safetensors"], "no such directory or file")]:
    if match is None:
      assemble.assemble(sources, tmp_path / "twice the same is one")
      continue
    with pytest.raises(UserError, match=match):
      assemble.assemble(sources, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_single_blocks_are_refused_as_a_model_is(workdir, tmp_path):
  work = epath.Path(shutil.copytree(workdir, tmp_path / "work"))
  with pytest.raises(UserError, match="step=5: expected 0 with best=True"):
    export.export_blocks(work, tmp_path / "out", (0,), step=5, best=True)
  trust.write_sums(work / "block_00")
  (work / "block_00/added").write_text("")
  (work / "block_00/added").rename(work / "block_00/5/added")
  with pytest.raises(UserError, match="block_00/5/added was added"):
    export.export_blocks(work, tmp_path / "out", (0,))
  export.export_blocks(work, tmp_path / "out", (1,))


def test_neighbours_that_are_exported_are_looked_at(folder, tmp_path):
  """They started from random weights, and a model has one start."""
  config = config_lib.changed(config_lib.load(folder), **{"train.blocks": (1,)})
  with pytest.raises(UserError, match="this run started from the pretrained weights 123, .*block_0"
                     "0.safetensors from random weights"):
    begin._check_neighbours(config, folder, dict(init_from="123"))


def test_an_exported_block_is_not_trained_further(folder):
  before = sorted(path.name for path in folder.iterdir())
  with pytest.raises(UserError, match="block_00.safetensors is an exported block.*init_from"):
    loop.train(config_lib.load(folder), folder, devices=jax.devices()[:1])
  assert sorted(path.name for path in folder.iterdir()) == before


def test_training_begins_anew_from_an_exported_network(tmp_path):
  one = {"num_blocks": 1, "layers_per_block": ()}
  made = export.export(random_workdir(tmp_path / "work", resolved(**one)), tmp_path / "out")
  config = resolved(**TINY | {"train.init_from": str(made)})
  start, whole = pretrained.load(config), dbjax.load(made).params[0]
  cut = start.block(1)["stack"]["layers"]["mlp"]["out"]["kernel"]
  np.testing.assert_array_equal(cut, whole["stack"]["layers"]["mlp"]["out"]["kernel"][1:])


@pytest.mark.slow
def test_training_begins_anew_from_exported_blocks(honest, tmp_path):
  """Each from its own, with a fresh optimizer; on other data, but in the same network."""
  model = dbjax.load(honest)
  config = resolved(**{"train.init_from": str(honest), "train.num_steps": 1, "train.batch_size": 4,
                       "optimizer.warmup_steps": 0, "optimizer.learning_rate": 1e-9,
                       "optimizer.weight_decay": 0.0})
  start = pretrained.load(config)
  for b in (0, 1):
    chex.assert_trees_all_equal(start.block(b), model.params[b])
  loop.train(config, tmp_path / "new", devices=jax.devices()[:1])
  chex.assert_trees_all_close(dbjax.load(tmp_path / "new").params, model.params, atol=1e-6)
  with pytest.raises(UserError, match="or the same blocks: model.width=32 .here. against 16"):
    pretrained.load(resolved(**{"train.init_from": str(honest), "model.width": 32}))


# Of strangers.


def refused(folder, match):
  """Loading the folder, assembling it, and assembling its first block say so in one line."""
  out = folder.parent / "assembled"
  for use in (lambda: loading.load(folder), lambda: assemble.assemble([folder], out)):
    with pytest.raises(UserError, match=match) as error:
      use()
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
  assert not out.exists()


def rewrite(path, change, content=None):
  """Changes the header of a file, given as a dict; its tensors stay, or are `content`."""
  old = path.read_bytes()
  length = int.from_bytes(old[:8], "little")
  header = json.loads(old[8:8 + length])
  change(header)
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text
                   + (old[8 + length:] if content is None else content))


KERNEL = "stack/layers/mlp/out/kernel"


def claim(**fields):
  return lambda header: header[KERNEL].update(fields)


@pytest.mark.parametrize("change, match", [
    (claim(shape=[10**6, 10**7]), "should have 40000000000000 bytes"),
    (claim(shape=[2**63, 2**63]), "cannot be read, it may be damaged"),
    (claim(dtype="I32"), "mlp/out/kernel is int32.*expected float32"),
    (claim(shape=[64, 1, 16]), r"is float32\[64, 1, 16\], expected float32\[1, 64, 16\]"),
    (claim(dtype="O"), "is of type O, expected one of"),
    (claim(data_offsets=[0, 10]), "cannot be read, it may be damaged"),
    (lambda h: h.update({"more": h.pop(KERNEL)}), "lacks the array|has the array"),
    (lambda h: h.update(__metadata__={}), "holds no block that dbjax.export has written"),
    (lambda h: h.update(__metadata__=7), "its header is damaged"),
    (lambda h: h["__metadata__"].update(block="[" * 100_000), "holds no block"),
    (lambda h: h["__metadata__"].update(block="{}"), "fields are missing"),
    (lambda h: h["__metadata__"].update(block=h["__metadata__"]["block"].replace(
        '"step": 5', '"step": "5"')), "step is not as dbjax writes it"),
    (lambda h: h["__metadata__"].update(block=h["__metadata__"]["block"].replace(
        '"block": 0', '"block": 1')), "holds block 1: give it its name back"),
    (lambda h: h["__metadata__"].update(block=h["__metadata__"]["block"].replace(
        '"model.width": 16', '"model.width": 65536')), "belongs to another|not of one model"),
    (lambda h: h["__metadata__"].update(block=h["__metadata__"]["block"].replace(
        '"task.name": "image"', '"task.name": "os:system"')), "its config cannot be used: .*os")])
def test_a_header_that_lies(folder, change, match):
  rewrite(folder / "block_00.safetensors", change)
  refused(folder, match)


def test_terabytes_that_the_config_asks_for_too(folder):
  """Every claim agrees with every other, but the bytes are not there."""
  wider = lambda h: h["__metadata__"].update(block=h["__metadata__"]["block"].replace(
      '"model.width": 16', '"model.width": 1048576'))
  for b in (0, 1):
    rewrite(folder / f"block_0{b}.safetensors", wider)
  config = json.loads((folder / "config.json").read_text())
  config["model"]["width"] = 1048576
  (folder / "config.json").write_text(json.dumps(config))
  refused(folder, "its arrays have other shapes than this network's")


@pytest.mark.parametrize("what, match", [
    ("cut", "no whole .safetensors file"), ("longer", "bytes at its end belong to no tensor"),
    ("bit", "its checksum is wrong"), ("pickle", "no whole .safetensors file"),
    ("empty", "its header is cut off"), ("huge", "header is cut off|at most")])
def test_a_damaged_file(folder, what, match):
  path = folder / "block_00.safetensors"
  content = bytearray(path.read_bytes())
  if what == "bit":
    content[-2] ^= 1
  made = dict(cut=content[:-5], longer=content + b"\0" * 4, bit=content, empty=b"",
              pickle=pickle.dumps(dict(a=np.zeros(3))), huge=(2**40).to_bytes(8, "little") * 4)
  path.write_bytes(bytes(made[what]))
  refused(folder, match)


def test_a_file_that_is_a_link_out_of_the_folder(folder, tmp_path):
  shutil.move(folder / "block_00.safetensors", tmp_path / "elsewhere")
  os.symlink(tmp_path / "elsewhere", folder / "block_00.safetensors")
  refused(folder, "block_00.safetensors is a link to .*elsewhere, outside")


def test_a_pipe_is_not_waited_for(folder):
  (folder / "block_00.safetensors").unlink()
  os.mkfifo(folder / "block_00.safetensors")
  with pytest.raises(UserError, match="it is no file"):
    loading.load(folder)


def test_a_block_that_is_there_twice(folder, workdir):
  shutil.copytree(workdir / "block_00", folder / "block_00")
  refused(folder, "block 0 is (there twice|in)")


def test_sums_of_a_folder(folder, tmp_path):
  (folder / "README.md").write_text("Filled in.")
  trust.write_sums(folder)
  loading.load(folder)
  path = folder / "block_01.safetensors"
  path.write_bytes(path.read_bytes()[:-1] + b"\1")
  refused(folder, "block_01.safetensors differs from its sum")
  with pytest.raises(UserError, match="block_01.safetensors differs from its sum"):
    assemble.assemble([path], tmp_path / "out")
  shutil.copy(folder / "block_00.safetensors", folder / "block_02.safetensors")
  with pytest.raises(UserError, match="block_02.safetensors was added|differs from its sum"):
    loading.load(folder)


def test_weights_that_are_not_finite_are_not_assembled(folder, workdir, tmp_path):
  model = dbjax.load(workdir)
  worse = jax.tree.map(lambda x: x * np.float32(np.nan), model.params[0])
  sums = model.metas[0]["checksum"] | dict(ema=exported.checkpoint.checksum_of_host(worse))
  exported.write(folder / "block_00.safetensors", worse, {}, model.metas[0] | dict(checksum=sums))
  with pytest.raises(UserError, match="its weights are not all finite"):
    assemble.assemble([folder], tmp_path / "out")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64", "bool", "uint8", "float16"])
def test_written_tensors_are_read_by_all(tmp_path, dtype):
  """Scalars and empty arrays too."""
  arrays = {f"{n}": np.asarray(np.arange(np.prod(shape, dtype=int)).reshape(shape)).astype(
      jnp.dtype(dtype)) for n, shape in enumerate([(3, 5), (), (0, 4), (7,)])}
  path = tmp_path / "x.safetensors"
  with path.open("wb") as file:
    tensors.write(file, arrays, dict(key="é"))
  for found in (tensors.read(path.read_bytes()), {} if dtype == "bfloat16" else load_file(path)):
    for name in found:
      assert found[name].dtype == arrays[name].dtype and found[name].shape == arrays[name].shape
      np.testing.assert_array_equal(found[name], arrays[name])
  with safe_open(path, "np") as file:
    assert file.metadata() == dict(key="é")


def test_a_type_that_the_format_has_not_is_one_line(tmp_path):
  path = epath.Path(tmp_path / "x.safetensors")
  with pytest.raises(UserError, match="x.safetensors cannot be written: b is of type complex64"):
    exported.write_file(path, dict(a=np.zeros(2), b=np.zeros(2, np.complex64)), {})
  assert not path.stat().length


def test_options_of_a_checkpoint_are_refused_of_a_folder(folder):
  with pytest.raises(UserError, match="is the block at step 5, and has no other, expected 3"):
    dbjax.load(folder, step=3)
  assert dbjax.load(folder, step=5).steps == (5, 5)
  with pytest.raises(UserError, match="is of one checkpoint"):
    dbjax.load(folder, best=True)


@SLOW
def test_the_commands(workdir, forked, tmp_path):
  out = tmp_path / "a b"
  made = forked("export", f"--workdir={workdir}", f"--out={out}", "--num_steps=3", "--guidance=2")
  assert made.returncode == 0, made.stderr
  assert f"{out} holds the model" in made.stdout
  about = json.loads((out / "model.json").read_text())["sampler"]
  assert len(about["steps"]) == 3 and about["inputs"]["guidance"]["values"] == [2.0]
  drawn = forked("sample", f"--workdir={out}", f"--out={tmp_path / 'x.npz'}", "--num_samples=2")
  assert drawn.returncode == 0, drawn.stderr
  scored = forked("evaluate", f"--workdir={out}", "--num_samples=4")
  assert scored.returncode == 0 and "held-out loss" in scored.stdout, scored.stderr
  again = forked("export", f"--workdir={workdir}", f"--out={out}")
  assert again.returncode == 2 and "exists: choose another" in again.stderr
  wrong = forked("export", f"--workdir={workdir}", f"--out={tmp_path / 'y'}", "--platforms=gpu")
  assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1
  wrong = forked("export", f"--workdir={workdir}", f"--out={tmp_path / 'y'}", "--blocks=0",
                 "--platforms=cuda")
  assert wrong.stderr.startswith("error: --platforms: single blocks have no sampler")
