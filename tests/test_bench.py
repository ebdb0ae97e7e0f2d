"""Benchmarks: turns are taken fairly, and figures are what they are called."""

import argparse
import dataclasses
import json
import subprocess
import sys
import types

from conftest import ROOT
from conftest import synthetic_batch
import jax
import numpy as np
import pytest

from dbjax import block as block_lib
from dbjax import config as config_lib
from dbjax import data
from dbjax import task as task_lib
from dbjax.bench import blocks
from dbjax.bench import data as input_bench
from dbjax.bench import guard
from dbjax.bench import inception
from dbjax.bench import memory
from dbjax.bench import noise
from dbjax.bench import optimizers
from dbjax.bench import race
from dbjax.bench import sampling
from dbjax.bench import scale
from dbjax.bench import step
from dbjax.bench import tradeoff
from dbjax.errors import UserError


def test_competitors_take_turns_and_warm_up():
  order, seconds = [], iter([9.0, 9.0, 1.0, 2.0, 3.0, 12.0, 2.0, 2.0])

  def take(name):
    order.append(name)
    return next(seconds)

  times = race.race({name: lambda name=name: take(name) for name in "ab"}, rounds=3)
  assert order == list("abababab")
  np.testing.assert_array_equal(times["a"], [1, 3, 2])
  np.testing.assert_array_equal(times["b"], [2, 12, 2])
  base, other = race.against(times, "a")
  assert (base["ms"], other["ms"], base["over a"]) == (2000, 2000, 1)
  assert other["over a"] == 2 and (other["from"], other["to"]) == (1.5, 3)  # of 2, 4 and 1


@pytest.mark.parametrize("drop, guidance", [(1.0, 0.0), (0.1, 1.0)])
def test_the_noise_of_a_network_is_judged_by_what_it_was_trained_on(
    drop, guidance, tmp_path, monkeypatch, capsys):
  file = tmp_path / "own.py"
  file.write_text(f"""
from dbjax import config
def get_config():
  return config.read("digits", {{"task.label_drop": {drop}, "sample.guidance": {guidance}}})
""")
  monkeypatch.setattr(noise, "trained", lambda config, dataset: config)
  monkeypatch.setattr(noise.distances, "make_reference", lambda *_: None)

  def score(config, judged, num_samples, guidance):
    noise.image.check_guidance(config, guidance, "guidance")
    return dict(frechet_pixels=guidance)

  monkeypatch.setattr(noise.image, "score", score)
  noise.main([f"--config={file}", "--quick"])
  assert f"seed 0: {guidance:g}" in capsys.readouterr().out


@pytest.mark.parametrize("flags, match", [
    (["--config=imagenet256_latent"], "data.feature=latent: scores by pixels need images"),
    (["--P_std=1.0,0"], "schedule.P_std=0.0: expected a finite number, above 0")])
def test_what_no_noise_can_be_judged_by_is_told_before_all_work(flags, match, monkeypatch):
  monkeypatch.setattr(noise.data, "load", None)  # nothing is read, and so nothing is trained
  with pytest.raises(UserError, match=match):
    noise.main(flags)


def test_latents_have_no_scores_by_pixels():
  task = task_lib.make_task(config_lib.resolve(config_lib.read("imagenet256_latent")), 0)
  with pytest.raises(UserError, match="data.feature=latent: scores by pixels need images"):
    noise.by_pixels(task, None)


def test_too_few_samples_to_be_scored_are_told_before_all_work(tiny):
  with pytest.raises(UserError, match="evaluate.num_samples=2: scores need"):
    noise.check_scored(config_lib.resolve(tiny(**{"evaluate.num_samples": 2})))


@pytest.mark.parametrize("main, flag", [
    (noise.main, "--json=FOLDER"), (sampling.main, "--json=FILE/x"), (scale.main, "--json=FOLDER"),
    (scale.main, "--figure=FILE/x.png"), (scale.main, "--figure=x.doc"),
    (tradeoff.main, "--figure=FOLDER/x.png"), (inception.main, "--record=FOLDER")])
def test_a_file_that_cannot_be_written_is_told_before_all_work(main, flag, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "FILE").write_text("as it was")
  (tmp_path / "FOLDER/x.png").mkdir(parents=True)
  for module, name in ((noise.config_lib, "read"), (sampling.loading, "load"),
                       (scale, "measure"), (tradeoff.evidence, "configs"),
                       (inception, "random_state")):
    monkeypatch.setattr(module, name, None)
  with pytest.raises(UserError, match=f"{flag}( cannot be written|: expected a name)"):
    main([flag] + ["--workdir=x"] * (main is sampling.main))
  assert (tmp_path / "FILE").read_text() == "as it was" and not (tmp_path / "x.doc").exists()


def test_a_file_that_can_be_written_is_left_as_it_was(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "there").write_text("a line\n")
  for given in ("~/new/x", "~/there"):
    args = race.arguments(argparse.ArgumentParser(), [f"--json={given}"])
    assert args.json == given.replace("~", str(tmp_path))
  assert [x.name for x in tmp_path.rglob("*") if x.is_file()] == ["there"]
  assert (tmp_path / "there").read_text() == "a line\n"


def test_a_disk_that_is_full_in_the_end_is_one_line(capsys):
  with pytest.raises(UserError, match="--json=/dev/full cannot be written .No space left"):
    race.report("part", "title", [dict(what="x")], "/dev/full")


def test_rounds_and_the_file_of_figures(tmp_path, capsys):
  parse = lambda *argv: race.arguments(argparse.ArgumentParser(), list(argv), rounds=9, quick=2)
  assert (parse().rounds, parse("--quick").rounds, parse("--quick", "--rounds=5").rounds) == (
      9, 2, 5)
  with pytest.raises(UserError, match="--rounds=-1: expected 1 or more"):
    parse("--rounds=-1")
  for part, wrong in ((noise, "--seeds=0"), (noise, "--steps=0"), (guard, "--turns=0"),
                      (input_bench, "--rounds=0"), (input_bench, "--images=31")):
    with pytest.raises(UserError, match=f"{wrong}: expected"):
      part.main([wrong])
  for n in range(2):
    race.report("part", "title", [dict(what="x", ms=float(n))], str(tmp_path / "figures.json"))
  lines = [json.loads(line) for line in (tmp_path / "figures.json").read_text().splitlines()]
  assert [line["rows"] for line in lines] == [[dict(what="x", ms=n)] for n in (0.0, 1.0)]
  assert lines[0]["cores"] > 0 and {"processor", "jax", "dbjax", "date"} <= lines[0].keys()
  assert capsys.readouterr().out.count("part: title") == 2


@pytest.mark.slow
def test_blocks_against_end_to_end(tiny, capsys, tmp_path):
  make = lambda b: config_lib.resolve(tiny(**{"num_blocks": b, "train.batch_size": 4}))
  batch = synthetic_batch(task_lib.make_task(make(1), 0), 0)
  blocks._compare("tiny", make, (1, 3), batch, 4, 3, str(tmp_path / "x"))
  steps, samples = (json.loads(line) for line in (tmp_path / "x").read_text().splitlines())
  assert [row["what"] for row in steps["rows"]] == ["B = 1", "B = 3"]
  one, three = samples["rows"]
  assert three["B times, over B = 1"] == pytest.approx(3 * three["over B = 1"])
  assert one["over B = 1"] == one["B times, over B = 1"] == 1


@pytest.mark.parametrize("case, fields", [
    ("dit", {"data.image_size": 8}), ("vit", {"data.image_size": 8}),
    ("masked", {"data.length": 12}), ("autoregressive", {"data.length": 12})])
def test_a_network_and_its_twin_in_pytorch_have_the_same_loss_and_gradient(case, fields, tmp_path):
  torch = pytest.importorskip("torch")
  from dbjax.bench import torch_networks  # here, because it needs PyTorch

  config = step.make_config(case, **fields | {
      "model.num_layers": 2, "model.width": 16, "model.num_heads": 2, "train.batch_size": 3})
  example, ours = step._example(config, step.random_batch(config))
  np.savez(tmp_path / "case.npz", **example)
  network, drawn, batch = torch_networks.read(tmp_path / "case.npz")
  loss = network.loss(**drawn)
  loss.backward()
  norm = torch.nn.utils.get_total_norm([p.grad for p in network.parameters()])
  np.testing.assert_allclose((loss.item(), norm.item()), ours, rtol=2e-5)
  assert all(p.grad.abs().sum() for p in network.parameters())  # nothing is left out
  again = network.draw(batch)
  assert {k: (v.shape, v.dtype) for k, v in again.items()} == {
      k: (v.shape, v.dtype) for k, v in drawn.items()}


def test_cases_that_there_are_not_are_an_error():
  pytest.importorskip("torch")
  with pytest.raises(UserError, match="--only=dit,vitt: there is no vitt; expected some of dit"):
    step.main(["--only=dit,vitt"])


@pytest.mark.parametrize("per_layer, most", [(7, 141), (260, 3), (999, 1), (1001, 0)])
def test_the_most_layers_that_fit(monkeypatch, per_layer, most):
  """Against a memory of 1000 for blocks that need a little more than linearly many."""
  seen = []

  def fake(layers, _):
    seen.append(layers)
    total = per_layer * layers // 2 + 3 * layers**0.5 if layers else 0
    return types.SimpleNamespace(total=total, fits=total <= 1000, parameters=0, remat=True)

  monkeypatch.setattr(memory.plan, "make_plan", fake)
  monkeypatch.setattr(memory.plan, "capacity", lambda _: 1000)
  layers, total = memory.deepest(lambda layers: layers, 2, [None], 4)
  assert fake(2 * layers, None).fits and not fake(2 * layers + 2, None).fits
  assert total == fake(2 * layers, None).total and layers == pytest.approx(most, abs=6)
  assert len(seen) < 14


def test_parameters_are_those_of_the_whole_network():
  """DiT-L/2 has 458 million (arXiv 2212.09748, table 1; here labels and noise enter otherwise)."""
  assert memory.num_parameters(memory.dit(1, False)) == pytest.approx(458e6, rel=0.01)
  one, two = (memory.num_parameters(memory.language_model(256, 1, n)) for n in (1, 2))
  ends = 2 * 32_000 * 256
  assert ends < one < 1.1 * ends + 18 * 256**2
  assert two - one == pytest.approx(18 * 256**2, rel=0.03)  # attention, SwiGLU and modulation


@pytest.mark.slow
def test_measured_memory_is_what_the_compiler_says():
  done = subprocess.run(
      [sys.executable, "-c", "from dbjax.bench import memory; memory.measure(6, False)"],
      cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
  compiled, peak = json.loads(done.stdout.splitlines()[-1])
  assert compiled > 2e8 and 0.9 < peak / compiled < 1.3


@pytest.mark.parametrize("name, held", [
    ("AdamW", 8), ("AdamW, first moment bfloat16", 6), ("Lion, momentum bfloat16", 2),
    ("schedule-free AdamW", 8)])
def test_bytes_that_an_optimizer_holds(tiny, name, held):
  config = config_lib.resolve(tiny(**optimizers.OPTIMIZERS[name][0]))
  assert optimizers.bytes_held(config) == pytest.approx(held, rel=1e-3)  # it counts its steps


@pytest.mark.parametrize("best", [0.125, 1.0, 3.0, 40.0])
def test_the_best_rate_has_neighbours(best):
  found = optimizers.scan(lambda rate: dict(held_out=[np.log(rate / best)**2 if rate < 90 else
                                                      np.nan]), 1.0)
  rates = list(found)
  least = min(rates, key=lambda rate: found[rate]["held_out"][0])
  assert rates == sorted(rates) and rates[0] < least < rates[-1]
  assert abs(np.log2(least / best)) < 0.5


@pytest.mark.slow
def test_adamw_by_hand_is_the_step_of_a_block(tiny):
  config = config_lib.resolve(tiny(**{"optimizer.learning_rate": 0.01}))
  found = optimizers.train(config, 0, 0.01)
  dataset, params, losses = data.load(config), [], []
  step = jax.jit(block_lib.train_step, static_argnums=0)
  for b in range(3):
    task = task_lib.make_task(config, b)
    state, interval = block_lib.init(task, b), task.make_schedule(config).training_interval(b)
    for n in range(6):
      state, metrics = step(task, state, dataset.batch(0, n, 8), b, interval)
      losses.append(metrics["loss"])
    params.append(state.params)
  model = dataclasses.replace(blocks.untrained(config), params=tuple(params))
  np.testing.assert_allclose(found["held_out"], model.losses(dataset.held_out), rtol=1e-4)
  np.testing.assert_allclose(found["loss"], np.mean(losses), rtol=1e-4)
  assert found["loss"] < 0.999 * np.mean(losses[::6])
