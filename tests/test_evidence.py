"""Evidence: runs that are there are not run again, and a curve has the checkpoints' scores."""

import json
import pathlib
import re

from conftest import load_config
from etils import epath
import jax
import pytest

from dbjax import config as config_lib
from dbjax import loading
from dbjax import model as model_lib
from dbjax import plan
from dbjax.bench import evidence
from dbjax.bench import sampling
from dbjax.bench import tradeoff
from dbjax.errors import UserError

SMALL = {"model.num_layers": 2, "model.width": 16, "model.num_heads": 2,
         "train.num_steps": 4, "evaluate.num_samples": 20, "sample.num_steps": 2,
         "checkpoint.every_steps": 2}


@pytest.fixture
def small(monkeypatch):
  """One table of two small models, one seed."""
  monkeypatch.setattr(evidence, "SEEDS", (0,))
  monkeypatch.setattr(evidence, "EXPERIMENTS", {"digits, small": evidence.Experiment(
      models=evidence.split(1, 2), fields=SMALL, points=2,
      options={"features": ("pixels",), "guidance": (1.0,)})})


@pytest.mark.slow
def test_a_run_its_curve_and_its_point(small, tmp_path, capsys):
  results, figure = tmp_path / "results.jsonl", tmp_path / "figure.png"
  command = ["--run", f"--workdir={tmp_path}", f"--results={results}", f"--figure={figure}"]
  evidence.main([*command, "--only=B = 1"])
  first = results.read_text()
  evidence.main(command)
  assert results.read_text().startswith(first)  # as it was, and not run again
  found = [json.loads(line) for line in results.read_text().splitlines()]
  assert [r["model"] for r in found] == ["B = 1", "B = 2"]
  printed = capsys.readouterr().out
  assert "B = 2" in printed

  # The point in the middle of the curve is what the model of that step scores.
  point, end = found[1]["curve"]
  model = loading.load(tmp_path / "digits_small_B_2_seed_0", step=2)
  scores = model.evaluate(features=("pixels",), guidance=(1.0,))
  held_out = model.dataset().held_out
  assert point["step"] == 2
  assert point["losses"] == pytest.approx(model.losses(held_out, overlap=False))
  assert point["losses"] != pytest.approx(scores["losses"], rel=1e-6)
  assert point["frechet_pixels"] == pytest.approx(scores["quality"][0]["frechet_pixels"])
  last = found[1]["scores"][0]["frechet_pixels"]
  assert point["frechet_pixels"] != last == end["frechet_pixels"]
  curve = next(line for line in printed.splitlines() if "B = 2" in line and "frechet_pix" in line)
  assert f"{point['frechet_pixels']:.4g} (" in curve and f"{last:.4g} (" in curve

  # Its memory is the plan's.
  wanted = {(d, m, s): c for d, m, s, c in evidence.configs("")}
  fresh = evidence.current(results, wanted)
  one, two = tradeoff.points(fresh, wanted, "pixels", "digits, small", "")
  assert (one.model, two.model) == ("B = 1", "B = 2") and two.mib < one.mib
  config = wanted["digits, small", "B = 2", 0]
  assert two.mib * 2**20 == plan.make_plan(config, jax.devices()[:1]).total
  assert two.distances == [found[1]["scores"][0]["frechet_pixels"]]

  # Ways to sample start from the same, and go elsewhere.
  both = ("guidance=1", "guidance=1,churn=2")
  sampling.main([f"--workdir={tmp_path / 'digits_small_B_2_seed_0'}", f"--json={tmp_path / 'ways'}",
                 *(f"--way={way}" for way in both)])
  plain, churned = json.loads((tmp_path / "ways").read_text())["rows"]
  assert (plain["way"], churned["way"]) == both
  assert plain["frechet_pixels"] == last
  assert churned["frechet_pixels"] != plain["frechet_pixels"]


@pytest.fixture
def there(small, tmp_path, monkeypatch):
  """Results of both models, without a run; and what runs is noted: (file, runs)."""
  results, ran = tmp_path / "results.jsonl", []
  curve = [dict(step=k, losses=[0.75], frechet_pixels=9.5) for k in (2, 4)]
  found = dict(scores=[dict(solver="euler", guidance=1.0, frechet_pixels=7.25)], held_out={},
               losses=[0.5], curve=curve,
               tables=dict(exposure=[dict(sigma=1.0, gap=0.1, gap_error=0.01)]))
  results.write_text("".join(json.dumps(dict(
      found, data=data, model=model, seed=seed, config=evidence.identity(config))) + "\n"
                             for data, model, seed, config in evidence.configs("")))

  def run(name, model, config, workdir):
    ran.append(model)
    return found

  monkeypatch.setattr(evidence, "run", run)
  return results, ran


def test_a_pattern_is_of_what_is_run_and_of_what_is_printed(there, tmp_path, capsys):
  results, ran = there
  evidence.main([f"--results={results}", "--only=B = 2"])
  printed = capsys.readouterr().out
  assert "B = 2" in printed and "B = 1" not in printed and "not drawn" not in printed
  evidence.main(["--run", f"--results={tmp_path / 'new'}", "--only=B = 2"])
  assert ran == ["B = 2"] and "B = 1" not in capsys.readouterr().out


@pytest.mark.parametrize("pattern, words", [
    ("[", "--only=.: expected a pattern of Python's re"),
    ("digits, B = 7", "--only=digits, B = 7: no run is called so.*tables are digits, small")])
def test_a_pattern_of_no_run_is_one_line(there, pattern, words):
  for run in ([], ["--run"]):
    with pytest.raises(UserError, match=words):
      evidence.main([f"--results={there[0]}", f"--only={pattern}", *run])


def test_patterns_of_the_pages_are_of_runs_that_are_there():
  keys = [key for *key, _ in evidence.configs("")]
  there = {tuple(json.loads(line)[k] for k in ("data", "model"))
           for line in evidence.RESULTS.read_text().splitlines()}
  root = pathlib.Path(__file__).parent.parent
  patterns = [pattern for page in ("README.md", "RESULTS.md")
              for pattern in re.findall(r"--only='(.*?)'", (root / page).read_text())]
  assert len(patterns) > 10
  for pattern in patterns:
    assert there & {tuple(key[:2]) for key in evidence.chosen(pattern, "", keys)}, pattern


def test_a_seed_that_there_is_not_is_one_line(there):
  for seeds, words in (("1", "'1' is no seed, expected some of 0"), ("0,", "'' is no seed")):
    with pytest.raises(UserError, match=f"--seeds={seeds}: {words}"):
      evidence.main([f"--results={there[0]}", f"--seeds={seeds}"])


def test_the_new_form_that_was_measured_is_the_one_of_the_config():
  measured = {(data, model): config for data, model, seed, config in evidence.configs("")}
  run = evidence.identity(measured["fashion_mnist, half batches", "B = 3"])
  new = evidence.identity(config_lib.resolve(config_lib.read("fashion_mnist:new")))
  assert {k for k in run.keys() | new if run.get(k) != new.get(k)} <= {
      "seed", "sample.every_steps", "data.dir"}


def test_runs_that_are_all_there_are_told(there, capsys):
  results, ran = there
  evidence.main([f"--results={results}", "--run", "--only=B = 1"])
  assert f"nothing to run, 1 of 1 runs are in {results}" in capsys.readouterr().out and not ran
  evidence.main([f"--results={results}"])
  assert "nothing to run" not in capsys.readouterr().out


def test_a_figure_is_drawn_where_it_is_asked_for(there, tmp_path, monkeypatch, capsys):
  pytest.importorskip("matplotlib")
  results, _ = there
  monkeypatch.setattr(evidence, "RESULTS", results)
  evidence.main([f"--results={results}"])
  assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]
  evidence.main([f"--results={results}", f"--figure={tmp_path / 'x.png'}"])
  assert (tmp_path / "x.png").stat().st_size > 1000
  plain = evidence.EXPERIMENTS["digits, small"]._replace(options={})
  monkeypatch.setattr(evidence, "EXPERIMENTS", {"digits, small": plain})
  evidence.main([f"--results={results}", f"--figure={tmp_path / 'y.png'}"])
  assert "y.png is not drawn: it is of images" in capsys.readouterr().out


def test_results_and_figure_that_cannot_be_written_are_told_before_all_runs(there, tmp_path):
  for flag in (f"--results={tmp_path}", f"--figure={tmp_path / 'results.jsonl/x.png'}"):
    with pytest.raises(UserError, match=f"{flag} cannot be written"):
      evidence.main([f"--results={tmp_path / 'new'}", flag, "--run"])
  assert not there[1]


@pytest.mark.parametrize("way, words", [
    ("", "'' is no option"), ("guidance=2;churn=1", "guidance=2;churn=1: expected a finite"),
    ("churning=1", "'churning' is no option"), ("solver=rk45", "'rk45': expected one of euler")])
def test_a_way_to_sample_that_there_is_not_is_an_error(way, words):
  with pytest.raises(UserError, match=words):
    sampling.options(way, model_lib.sample_fields(load_config()))


@pytest.mark.parametrize("fields, words", [
    ({"seed": 1, "sample.batch_size": 3, "sample.guidance": 2.0, "data.dir": "x"}, None),
    ({"model.width": 32, "seed": 1}, "two: model.width=32, but 16 in .*one: expected workdirs of "
                                     "one config but for the seed"),
    ({"sample.num_steps": 3}, "two: sample.num_steps=3, but 2 in"),
    ({"evaluate.num_samples": 30}, "two: evaluate.num_samples=30, but 20 in"),
    ({"evaluate.num_samples": 2}, "two: evaluate.num_samples=2: scores need"),
    ({"data.feature": "latent", "data.name": "x"}, "two: data.feature=latent: scores by pixels")])
def test_workdirs_that_are_averaged_are_of_one_config(fields, words, tmp_path, monkeypatch):
  for name, own in (("one", {}), ("two", fields)):
    config = config_lib.resolve(load_config(**SMALL | {"num_blocks": 2} | own))
    config_lib.save(epath.Path(tmp_path / name), config, {})
  monkeypatch.setattr(sampling.loading, "load", lambda *_, **__: 1 / 0)  # all work comes after
  with pytest.raises(UserError if words else ZeroDivisionError, match=words):
    sampling.main([f"--workdir={tmp_path / name}" for name in ("one", "two")])


def test_results_of_other_configs_are_stale(small, tmp_path, capsys):
  wanted = {(d, m, s): c for d, m, s, c in evidence.configs("")}
  key, config = next(iter(wanted.items()))
  line = lambda config: json.dumps(dict(zip(("data", "model", "seed"), key), config=config)) + "\n"
  same = evidence.identity(config)
  results = tmp_path / "results.jsonl"
  results.write_text(line(same) + line(same | {"train.num_steps": 5}))
  fresh = evidence.current(results, wanted)
  assert list(fresh) == [key] and fresh[key]["config"]["train.num_steps"] == 4
  assert "1 of 2 runs" in capsys.readouterr().out
  # Fields that dbjax has gained since a run do not make it stale, where they have their defaults.
  results.write_text(line({k: v for k, v in same.items() if k != "model.norm"}))
  assert list(evidence.current(results, wanted)) == [key]
  results.write_text(line({k: v for k, v in same.items() if k != "train.num_steps"}))
  assert not evidence.current(results, wanted)
