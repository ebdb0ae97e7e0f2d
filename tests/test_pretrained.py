"""Blocks that start from a pretrained network: against the original DiT (recorded), and scratch.

original.npz was written, with PyTorch, timm and the authors' code (github.com/facebookresearch/DiT,
of which DIR holds a copy), by
    python tests/test_pretrained.py DIR
"""

import dataclasses
import io
import json
import os
from pathlib import Path
import pickle
import re
import shutil
import sys
import zipfile

from conftest import load_config
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dbjax
from dbjax import assemble
from dbjax import block as block_lib
from dbjax import checkpoint
from dbjax import config as config_lib
from dbjax import loading
from dbjax import loop
from dbjax import pretrained
from dbjax import program
from dbjax import provenance
from dbjax import sharding
from dbjax import task as task_lib
from dbjax.data.dataset import Arrays
from dbjax.data.dataset import Dataset
from dbjax.errors import UserError

RECORDED = Path(__file__).with_name("original.npz")
SMALL = {"model.name": "", "model.num_layers": 3, "model.num_heads": 2, "model.patch_size": 2,
         "model.unroll": 1, "train.batch_size": 32, "train.ema_decay": 0.99,
         "optimizer.warmup_steps": 10, "checkpoint.every_steps": 100, "log.every_steps": 100,
         "sample.every_steps": 0}
ORIGINAL = {"model.width": 8, "sigma_data": 0.5, "data.channels": 3}  # of the recorded network


@pytest.fixture(scope="module")
def original(tmp_path_factory):
  """The recorded network as a file of PyTorch's, its inputs, and what it made of them."""
  with np.load(RECORDED) as arrays:
    recorded = dict(arrays)
  path = tmp_path_factory.mktemp("original") / "dit.pt"
  path.write_bytes(recorded.pop("weights").tobytes())
  return path, recorded


def make_config(init_from="", num_blocks=3, **fields):
  return config_lib.resolve(load_config(**{
      **SMALL, "num_blocks": num_blocks, "train.init_from": str(init_from), **fields}))


def write_safetensors(path, state, **header):
  """The file by hand; `header` is added to its header, or replaces entries."""
  entries, content = {"__metadata__": {"format": "pt"}}, b""
  for name, x in state.items():
    kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}[x.dtype.name]
    entries[name] = dict(dtype=kind, shape=x.shape,
                         data_offsets=[len(content), len(content) + x.nbytes])
    content += np.ascontiguousarray(x).tobytes()
  text = json.dumps(entries | header).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text + content)
  return path


def refusal(config):
  """The one line in which `load` refuses what is in train.init_from."""
  with pytest.raises(UserError) as error:
    pretrained.load(config)
  line = str(error.value)
  assert "\n" not in line
  return line


# Files: the original DiT.


def test_a_whole_network_computes_what_the_original_computes(original):
  """To float rounding, given the conditioning vector that the original made of its timesteps."""
  path, recorded = original
  config = make_config(path, 1, **ORIGINAL)
  start, task = pretrained.load(config), task_lib.make_task(config, 0)
  assert start.drawn == ()
  params = start.block(0)
  # Each example has a label of its own, whose embedding is the whole conditioning vector.
  num = len(recorded["x"])
  table = params["label_embedding"]["embedding"][recorded["y"]] + recorded["embedded"]
  given = params | dict(label_embedding=dict(embedding=np.concatenate([table, table, table[:1]])),
                        noise_embedding=jax.tree.map(np.zeros_like, params["noise_embedding"]))
  x, eps = (recorded[k].transpose(0, 2, 3, 1)[..., :3] for k in ("x", "out"))
  assert recorded["out"].shape[1] == 6 and np.abs(eps).mean() > 0.1  # eps, and variances
  answer = task.apply(given, x, jnp.zeros(num), jnp.arange(num))
  np.testing.assert_allclose(answer, -eps, atol=2e-6 * np.abs(eps).max())

  # With our own embedding of the noise level it is near, because these weights are smooth in it.
  sigma = np.exp(np.interp(recorded["t"], np.arange(1000), np.log(recorded["sigma"])))
  np.testing.assert_allclose(pretrained.timesteps(sigma / 2, 0.5), recorded["t"], atol=1e-3)
  answer = task.apply(params, x, np.float32(np.log(sigma * config.sigma_data) / 4), recorded["y"])
  assert np.linalg.norm(answer + eps) < 0.02 * np.linalg.norm(eps)


def test_timesteps_are_embedded_as_by_the_original(original):
  path, recorded = original
  state = pretrained.read_torch(path.read_bytes())
  hidden = pretrained.timestep_features(np.float64(recorded["t"])) @ (
      state["t_embedder.mlp.0.weight"].T) + state["t_embedder.mlp.0.bias"]
  hidden = hidden / (1 + np.exp(-hidden))
  made = hidden @ state["t_embedder.mlp.2.weight"].T + state["t_embedder.mlp.2.bias"]
  np.testing.assert_allclose(made, recorded["embedded"], atol=1e-4)


def test_every_format_holds_the_same_network(original, tmp_path):
  path, _ = original
  state = pretrained.read_torch(path.read_bytes())
  same = write_safetensors(tmp_path / "dit.safetensors", dict(reversed(state.items())))
  first, second = (pretrained.load(make_config(p, **ORIGINAL)) for p in (path, same))
  assert (first.checksum, first.params_checksum) == (second.checksum, second.params_checksum)
  half = {k: x.astype(jnp.bfloat16) for k, x in state.items()}
  half = pretrained.load(make_config(
      write_safetensors(tmp_path / "half.safetensors", half), **ORIGINAL))
  assert half.checksum != first.checksum
  for name, x in first.params.items():
    np.testing.assert_allclose(half.params[name], x, atol=0.02 * np.abs(x).max())


@pytest.mark.parametrize("split", [(), (1, 2)])
def test_blocks_have_the_layers_of_the_original_in_order(original, split):
  path, _ = original
  config = make_config(path, len(split) or 3, layers_per_block=split, **ORIGINAL)
  state = pretrained.read_torch(path.read_bytes())
  start, first = pretrained.load(config), 0
  for b, n in enumerate(config.layers_per_block):
    params = start.block(b)
    for i in range(n):
      for ours, theirs in [("attention/qkv", "attn.qkv"), ("mlp/out", "mlp.fc2"),
                           ("modulation", "adaLN_modulation.1")]:
        layer = params["stack"]["layers"]
        for part in ours.split("/"):
          layer = layer[part]
        np.testing.assert_array_equal(layer["kernel"][i],
                                      state[f"blocks.{first + i}.{theirs}.weight"].T)
    np.testing.assert_array_equal(params["label_embedding"]["embedding"],
                                  state["y_embedder.embedding_table.weight"])
    first += n
  assert first == 3


def test_weights_are_the_same_however_blocks_are_grouped(original):
  """And the averaged weights start from them."""
  config = make_config(original[0], **ORIGINAL)
  start, task = pretrained.load(config), task_lib.make_task(config, 0)
  for rows in (1, 3):
    together = config_lib.changed(config, **{"mesh.block": rows, "train.turn": "together"})
    mesh = sharding.make_mesh(together, jax.devices()[:rows])
    state = program.init(task, mesh, (0, 1, 2), start.block)
    for b in range(3):
      for tree in (state.params, state.ema):
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x: x[b], tree),  # noqa: B023
                     start.block(b))


def test_a_layout_of_ones_own(original, tmp_path, monkeypatch):
  path, _ = original
  (tmp_path / "my_layout.py").write_text(
      "from dbjax import pretrained\n\n"
      "def other_classes(state, config):\n"
      "  del state['y_embedder.embedding_table.weight']\n"
      "  return pretrained.dit(state, config)\n\n"
      "def typo(state, config):\n"
      "  return dict(stak=0.0)\n\n"
      "def bug(state, config):\n"
      "  return state['nothing']\n")
  monkeypatch.syspath_prepend(tmp_path)
  fields = ORIGINAL | {"train.init_layout": "my_layout:other_classes"}
  config = make_config(path, **fields)
  start = pretrained.load(config)
  assert start.drawn == ("label_embedding/embedding",)
  drawn = [start.block(b)["label_embedding"]["embedding"] for b in range(2)]
  fresh = block_lib.init_params(task_lib.make_task(config, 1), 1)
  np.testing.assert_array_equal(drawn[1], fresh["label_embedding"]["embedding"])
  assert not np.array_equal(*drawn)
  as_it_is = pretrained.load(make_config(path, **ORIGINAL))
  assert start.checksum == as_it_is.checksum and as_it_is.drawn == ()
  data = Dataset(Arrays(a=np.zeros(3)), None)
  code = provenance.trained_with(config, data, start.checksum)["code"]
  assert code["train.init_layout"]["name"] == "my_layout:other_classes"
  line = refusal(make_config(path, **fields | {"train.init_layout": "my_layout:typo"}))
  assert "stak is no parameter of this network" in line
  line = refusal(make_config(path, **fields | {"train.init_layout": "my_layout:bug"}))
  assert "my_layout.py, line 11: KeyError: 'nothing'" in line
  line = refusal(make_config(path, **fields | {"train.init_layout": "my_layout:none"}))
  assert "my_layout has no none" in line


def test_what_does_not_fit_the_network_is_refused_in_one_line(original, tmp_path):
  path, _ = original
  state = pretrained.read_torch(path.read_bytes())
  for fields, words in [
      ({"model.width": 16}, "y_embedder.embedding_table.weight has shape [11, 8], expected"),
      ({"model.num_layers": 6}, "it has 3 layers (blocks.0 and so on), expected model.num_layers=6"
       ),
      ({"model.mlp_ratio": 2.0}, "blocks.0.mlp.fc1.weight has shape [32, 8], expected [16, 8]"),
      ({"data.num_classes": 7}, "has shape [11, 8], expected [8, 8]"),
      ({"data.channels": 1}, "x_embedder.proj.weight has shape [8, 3, 2, 2], expected [8, 1, 2, 2"),
  ]:
    line = refusal(make_config(path, **ORIGINAL | fields))
    assert line.startswith(f"train.init_from={path}: ") and words in line
  for name, value in dict(norm="rms", mlp="swiglu", qk_norm=True, positions="learned").items():
    line = refusal(make_config(path, **ORIGINAL | {f"model.{name}": value}))
    assert f"model.{name}={value}: the layout dbjax.pretrained:dit is of a network with" in line
  for changes, words in [
      ({"final_layer.linear.bias": None}, "it has no tensor final_layer.linear.bias"),
      ({"blocks.1.attn.proj.bias": np.full(8, np.nan, np.float32)},
       "stack/layers/attention/out/bias is not finite"),
      ({"pos_embed": np.zeros((1, 16, 8), np.float32)}, "pos_embed differs from the fixed"),
  ]:
    changed = {k: x for k, x in (state | changes).items() if x is not None}
    file = write_safetensors(tmp_path / "changed.safetensors", changed)
    assert words in refusal(make_config(file, **ORIGINAL))
  text = config_lib.resolve(load_config("text8", **{"train.init_from": str(path)}))
  assert "is of the network DiT, not of model.network=dbjax.models" in refusal(text)


def test_damaged_files_are_refused_in_one_line(original, tmp_path):
  path, _ = original
  content = path.read_bytes()
  state = pretrained.read_torch(content)
  whole = write_safetensors(tmp_path / "whole.safetensors", state).read_bytes()
  torch, safe = tmp_path / "cut.pt", tmp_path / "cut.safetensors"
  for n in (0, 5, 100, len(content) // 2, len(content) - 1):
    torch.write_bytes(content[:n])
    assert "no whole PyTorch file of tensors" in refusal(make_config(torch, **ORIGINAL))
  for n in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
    safe.write_bytes(whole[:n])
    assert "no whole .safetensors file" in refusal(make_config(safe, **ORIGINAL))
  safe.write_bytes(whole + b"more")
  assert "4 bytes at its end belong to no tensor" in refusal(make_config(safe, **ORIGINAL))
  bad = dict(dtype="F32", shape=[2], data_offsets=[0, 8])
  for entry, words in [
      (bad, "should have"),  # bytes of another
      (bad | dict(data_offsets=[0]), "its header is damaged"),
      (bad | dict(data_offsets=["0", 8]), "its header is damaged"),
      (bad | dict(shape=[-2]), "its header is damaged"),
      (bad | dict(shape=[2.5]), "its header is damaged"),
      (dict(dtype="F32"), "its header is damaged"),
      (7, "its header is damaged"),
      (bad | dict(dtype="F4"), "is of type F4, expected one of F64"),
      (bad | dict(shape=[10**30]), "should have"),
  ]:
    write_safetensors(safe, state, extra=entry)
    assert words in refusal(make_config(safe, **ORIGINAL))
  for text in (b"[]", b"{", b"\xff\xff", b'{"a": 1, "a": 2}', b"[" * 100_000):
    safe.write_bytes(len(text).to_bytes(8, "little") + text)
    assert "its header is damaged" in refusal(make_config(safe, **ORIGINAL))


def test_a_pickle_that_asks_for_code_is_refused(tmp_path):
  class Attack:
    def __reduce__(self):
      return os.system, (f"touch {tmp_path / 'harm'}",)

  for name, state in [("attack", dict(a=Attack())), ("nested", dict(ema=dict(a=1)))]:
    path = tmp_path / f"{name}.pth"
    with zipfile.ZipFile(path, "w") as archive:
      archive.writestr("archive/data.pkl", pickle.dumps(state, protocol=2))
    line = refusal(make_config(path, **ORIGINAL))
    asked = f"it asks for {os.system.__module__}.system, which is refused"
    assert (asked if name == "attack" else "it holds no tensor by name") in line
    assert "save the state_dict alone: torch.save(checkpoint['ema'], FILE)" in line
  assert not (tmp_path / "harm").exists()


def test_what_is_no_file_of_weights_is_refused(tmp_path):
  for path, words in [(tmp_path / "none.pt", "it cannot be read (No such file or directory)"),
                      (tmp_path / "none", "there is no such file or directory"),
                      (tmp_path, "it is a directory, but none that dbjax.main has trained in")]:
    assert words in refusal(make_config(path, **ORIGINAL))


# Workdirs.


def save_whole(workdir, config):
  """A workdir of a network with random weights, as if it had been trained."""
  rng = np.random.default_rng(0)
  state = jax.tree.map(lambda x: np.asarray(rng.normal(size=x.shape)).astype(x.dtype),
                       block_lib.abstract_state(task_lib.make_task(config, 0)))
  with checkpoint.BlockCheckpoint(workdir, 0) as saved:
    saved.save(state, config, seconds=0.0, checksums=checkpoint.examine(state)[1],
               trained_with=provenance.code_of(config) | dict(data=0))
  config_lib.save(workdir, config, {})
  return state.ema


@dataclasses.dataclass(frozen=True)
class NoParts:
  """A network that does not say which of its parameters are its layers."""

  num_layers: int

  def init(self, key, x, c_noise, label):
    return dict(w=jax.random.normal(key, (self.num_layers,)))

  def apply(self, params, x, c_noise, label):
    return params["w"].sum() * x


@dataclasses.dataclass(frozen=True)
class WrongParts(NoParts):
  parts = dict(layers="w")

  def init(self, key, x, c_noise, label):
    return dict(w=jax.random.normal(key, (4, self.num_layers)))


@dataclasses.dataclass(frozen=True)
class Parts(NoParts):
  parts = dict(layers="w")


def test_any_network_that_names_its_layers_is_cut(tmp_path):
  def load(cls, num_blocks):
    fields = {"model.network": f"{__name__}:{cls.__name__}", "model.num_layers": 3}
    read = lambda **more: config_lib.resolve(config_lib.complete({
        "task.name": "image", "data.image_size": 8, "data.channels": 1, "data.num_classes": 10,
        **fields, **more}))
    ema = save_whole(tmp_path / cls.__name__, read(num_blocks=1))
    return ema, pretrained.load(read(num_blocks=num_blocks, **{
        "train.init_from": str(tmp_path / cls.__name__)}))

  ema, start = load(Parts, 3)
  np.testing.assert_array_equal([start.block(b)["w"] for b in range(3)], ema["w"][:, None])
  ema, start = load(NoParts, 1)
  np.testing.assert_array_equal(start.block(0)["w"], ema["w"])
  with pytest.raises(UserError, match="NoParts does not say in `parts` which of its parameters"):
    load(NoParts, 3)
  with pytest.raises(UserError, match=r"w has shape \[4, 1\] in a block of 1 layers"):
    load(WrongParts, 3)


def test_a_learned_table_is_taken_too(tmp_path):
  fields = {"model.num_layers": 2, "model.width": 16, "model.num_heads": 2, "model.patch_size": 4,
            "task.shared_embeddings": True, "train.turn": "together"}
  config = lambda **more: config_lib.resolve(load_config("digits_classify", **{**fields, **more}))
  ema = save_whole(tmp_path, config(num_blocks=1))
  start = pretrained.load(config(num_blocks=2, **{"train.init_from": str(tmp_path)}))
  assert start.drawn == ()
  for b in range(2):
    np.testing.assert_array_equal(start.block(b)["table"], ema["table"])


def test_a_plain_text_network_can_be_cut(tmp_path):
  """What only a denoiser has is drawn anew, and named."""
  fields = {"model.num_layers": 2, "model.width": 16, "model.num_heads": 2, "data.length": 8,
            "data.name": "text", "model.embedding_width": 8}
  config = lambda **more: config_lib.resolve(load_config("kjv", **{**fields, **more}))
  plain = config(num_blocks=1, **{"task.end_to_end": True})
  save_whole(tmp_path, plain)
  start = pretrained.load(config(num_blocks=2, **{"train.init_from": str(tmp_path)}))
  assert {name.split("/")[0] for name in start.drawn} == {"noisy_embedding", "level"}
  assert start.block(1)["noisy_embedding"]["kernel"].shape == (8, 16)


def test_another_workdir_is_refused_in_one_line(tmp_path):
  one = make_config(num_blocks=1, **{"model.width": 16})
  save_whole(tmp_path / "one", one)
  for fields, words in [
      ({"model.width": 32}, "it holds another network: model.width=32 (here) against 16 (there)"),
      ({"model.num_heads": 4}, "model.num_heads=4 (here) against 2 (there)"),
      ({"data.num_classes": 7},
       "label_embedding/embedding has shape [11, 16], expected [8, 16]")]:
    assert words in refusal(make_config(tmp_path / "one", **{"model.width": 16} | fields))
  config_lib.save(tmp_path / "three", make_config(**{"model.width": 16}), {})
  assert "it holds 3 blocks, expected a whole network: num_blocks=1" in refusal(
      make_config(tmp_path / "three", 1, **{"model.width": 16}))
  config_lib.save(tmp_path / "empty", one, {})
  assert "block_00 has no checkpoint" in refusal(
      make_config(tmp_path / "empty", **{"model.width": 16}))


DIGITS = {"model.width": 32}
STEPS = 20  # of blocks


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
  """(data, a whole network of 200 steps, blocks from it, blocks from scratch): workdirs."""
  where = tmp_path_factory.mktemp("digits")
  whole = make_config(num_blocks=1, **DIGITS | {"train.num_steps": 200})
  dataset = dbjax.load_data(whole)
  paths = [where / name for name in ("whole", "cut", "scratch")]
  cut = {"train.num_steps": STEPS, "train.turn": "together"}
  for path, config in zip(paths, (whole, make_config(paths[0], **DIGITS | cut),
                                  make_config(**DIGITS | cut))):
    loop.train(config, path, dataset, devices=jax.devices()[:1])
  return dataset, *paths


@pytest.mark.slow
def test_blocks_from_a_whole_network_beat_those_from_scratch(digits):
  """Each of them, after 20 steps. Measured: 0.64, 0.64, 0.79 against 0.95, 0.94, 1.00."""
  dataset, _, cut, scratch = digits
  from_whole, from_scratch = (np.array(loading.load(w).losses(dataset.held_out, 2))
                              for w in (cut, scratch))
  print("held-out losses, cut and from scratch:", from_whole, from_scratch)
  assert (from_whole < from_scratch - 0.15).all()


@pytest.mark.slow
def test_a_run_goes_on_only_from_the_same_weights(digits, tmp_path):
  dataset, whole, cut, _ = digits
  moved, other = tmp_path / "moved", tmp_path / "other"
  shutil.copytree(whole, moved)
  shutil.copytree(whole, other)
  shutil.rmtree(other / "block_00/200")  # step 100 is left
  train = lambda init_from: loop.train(
      make_config(init_from, **DIGITS | {"train.num_steps": STEPS, "train.turn": "together"}),
      cut, dataset, devices=jax.devices()[:1])
  train(moved)  # nothing is left to do
  for init_from, words in [("", "this run from random weights: set train.init_from as it was"),
                           (other, "this run from the pretrained weights")]:
    with pytest.raises(UserError, match="block_0. started from the pretrained weights .*" + words):
      train(init_from)
  alone = tmp_path / "alone"
  shutil.copytree(cut / "block_00", alone / "block_00")
  with pytest.raises(UserError, match="this run started from random weights, .*block_00 from the"):
    loop.train(make_config(**DIGITS | {"train.num_steps": STEPS, "train.blocks": (1,)}), alone,
               dataset, devices=jax.devices()[:1])
  meta = checkpoint.BlockCheckpoint(cut, 1).meta()
  assert re.fullmatch("[0-9a-f]{64}", meta["trained_with"]["init_from"])


@pytest.mark.slow
def test_blocks_of_another_start_are_not_joined(digits, tmp_path):
  _, _, cut, scratch = digits
  words = r"block_01 started from random weights, .*block_00 from the pretrained weights \w{12}:"
  sources = [cut / "block_00", scratch / "block_01", scratch / "block_02"]
  with pytest.raises(UserError, match=words):
    assemble.assemble(sources, tmp_path / "out")
  assert not (tmp_path / "out").exists()
  for source in sources:
    shutil.copytree(source, tmp_path / "mixed" / source.name)
  shutil.copy(cut / "config.json", tmp_path / "mixed")
  with pytest.raises(UserError, match=words):
    loading.load(tmp_path / "mixed")
  assemble.assemble([cut / f"block_0{b}" for b in range(3)], tmp_path / "joined")
  assert provenance.started_from(checkpoint.BlockCheckpoint(tmp_path / "joined", 2).meta())


def record(folder):
  """Writes original.npz: a tiny network of the authors' code, with random weights."""
  sys.path.insert(0, folder)
  from diffusion.gaussian_diffusion import get_named_beta_schedule
  from models import DiT
  import torch

  torch.manual_seed(0)
  net = DiT(input_size=8, patch_size=2, in_channels=3, hidden_size=8, depth=3, num_heads=2,
            num_classes=10).eval()
  for p in net.parameters():
    if p.requires_grad:  # gates and read-out would be zero
      p.data += 0.2 * torch.randn_like(p)
  for first in (0, 128):  # smooth in the timestep, as our fit can follow
    net.t_embedder.mlp[0].weight.data[:, first:first + 40] *= 0.01
  file = io.BytesIO()
  torch.save(net.state_dict(), file)
  x, t = torch.randn(5, 3, 8, 8), torch.tensor([0, 10, 333.25, 700, 999])
  y = torch.tensor([0, 3, 9, 10, 5])
  kept = np.cumprod(1 - get_named_beta_schedule("linear", 1000))
  with torch.no_grad():
    np.savez_compressed(
        RECORDED, weights=np.frombuffer(file.getvalue(), np.uint8), x=x, t=t, y=y, out=net(x, t, y),
        embedded=net.t_embedder(t), sigma=np.sqrt((1 - kept) / kept))


if __name__ == "__main__":
  record(sys.argv[1])
