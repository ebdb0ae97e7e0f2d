"""Benchmarks: turns are taken fairly, and figures are what they are called."""

import argparse
import json

from conftest import synthetic_batch
import numpy as np
import pytest

from dbjax import config as config_lib
from dbjax import task as task_lib
from dbjax.bench import blocks
from dbjax.bench import race
from dbjax.bench import step
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


def test_rounds_and_the_file_of_figures(tmp_path, capsys):
  parse = lambda *argv: race.arguments(argparse.ArgumentParser(), list(argv), rounds=9, quick=2)
  assert (parse().rounds, parse("--quick").rounds, parse("--quick", "--rounds=5").rounds) == (
      9, 2, 5)
  with pytest.raises(UserError, match="--rounds=-1: expected 1 or more"):
    parse("--rounds=-1")
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
