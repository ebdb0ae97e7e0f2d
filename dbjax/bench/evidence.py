"""Is a network trained block by block as good as one trained end to end?

    python -m dbjax.bench evidence                       the tables of what is there
    python -m dbjax.bench evidence --figure=FILE.png     and the figure of its images
    python -m dbjax.bench evidence --run --workdir=DIR   first runs what is missing: hours

--only=PATTERN takes the runs whose table and model it fits, --seeds=0,1 those of these seeds: no
others are run, printed or drawn.

At equal layer evaluations: B blocks of L / B layers take as many steps each as the whole
network does. Three seeds of everything. Of images, beside end to end and B: the partition of
the noise range (equal mass against uniform in ln sigma, without overlap; and, with overlap, as
`dbjax.partition` cuts it for the data), the overlap gamma, and the solver at equal evaluations
of D (NFE). Of the other tasks: against the same network trained plainly, and what blocks share;
of autoregressive text, against a plain network with the layers of one block too. A block of
autoregressive text carries two streams, so that its layers cost twice as much as the plain
network's.

Results stand in evidence.jsonl beside this file, one line a run; a run that was stopped goes
on, and one that is there under the same config is not run again: --results=NEW.jsonl runs all anew.
The data sets must have been prepared: see the files in configs/.
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping
import json
from pathlib import Path
import re
import sys
from typing import Any, NamedTuple

import numpy as np

from dbjax import config as config_lib
from dbjax import loading
from dbjax import loop
from dbjax import metrics
from dbjax import model as model_lib
from dbjax import paths
from dbjax.bench import finetune
from dbjax.bench import race
from dbjax.errors import UserError
from dbjax.model import Model
from dbjax.tasks.autoregressive import load_judge

RESULTS = Path(__file__).with_name("evidence.jsonl")
SEEDS = (0, 1, 2)


class Experiment(NamedTuple):
  """A table. It is named as its config is, up to a comma.

  Attributes:
    models: {name: fields of the config}.
    fields: of all of them.
    options: of `Model.evaluate`.
    solvers: {name: number of steps}, of images beside Euler.
    points: how many checkpoints are scored, the last one included: more than 1 make a curve.
  """

  models: Mapping[str, Mapping[str, Any]]
  fields: Mapping[str, Any] = {}
  options: Mapping[str, Any] = {}
  solvers: Mapping[str, int] = {}
  points: int = 1


def shallow(layers: int, steps: int) -> dict[str, dict[str, Any]]:
  """A network trained end to end in the memory of one block, for the steps of all blocks."""
  return {f"B = 1, {layers} layers": {
      "num_blocks": 1, "model.num_layers": layers, "model.unroll": layers,
      "train.num_steps": steps}}


def split(*numbers: int) -> dict[str, dict[str, Any]]:
  """Models of as many blocks."""
  return {f"B = {b}": {"num_blocks": b} for b in numbers}


EQUAL = {"num_blocks": 3, "schedule.gamma": 0.0}
IMAGES: dict[str, Mapping[str, Any]] = {
    "B = 3, gamma 0": EQUAL,
    "B = 3, gamma 0, uniform": EQUAL | {"schedule.partition": "uniform"}}
PLAIN = {"end to end": {"task.end_to_end": True}}
LEARNED = {"task.shared_embeddings": True, "train.turn": "together"}
TWICE = {"features": ("pixels",), "guidance": (1.0, 2.0)}
SEEN = {"features": ("pixels", "efficientnet_lite0"), "guidance": (1.0,)}
DEEP = {"model.num_layers": 12, "model.unroll": 12, "train.num_steps": 1000}
WRITERS = {  # of the models that are named, other solvers: the paper's, its bridges, a step a block
    **{name: [("euler", 8, "soft"), ("ancestral", 1, "soft")] for name in ("B = 1", "one pass")},
    "B = 2": [*[("euler", 8, bridge) for bridge in ("soft", "normalized", "hard", "top_k")],
              ("euler", 2, "soft"), ("ancestral", 2, "soft")]}
# By python -m dbjax.partition, with the fields of the experiment and --config.num_blocks=B --by=...
CUT = {
    "loss": {3: "0.45456,0.15432", 6: "0.91044,0.45456,0.26214,0.15432,0.081316"},
    "similarity": {3: "0.85738,0.5192", 6: "1.6946,1.1422,0.82692,0.61713,0.43003"},
    "information": {3: "1.732,1.0147", 6: "2.6139,1.732,1.3019,1.0147,0.77273"}}
# The paper's network with newer parts, and Muon.
NEW = {"model.norm": "rms", "model.mlp": "swiglu", "model.qk_norm": True, "model.rotary": "fixed",
       "optimizer.name": "muon"}
# The same as the paper has them.
OLD = {"model.norm": "layer", "model.mlp": "gelu", "model.qk_norm": False, "model.rotary": "none",
       "optimizer.name": "adamw"}
# What to train on, for P_mean = -1.2 and P_std = 1.2.
LEVELS: dict[str, Mapping[str, Any]] = {
    "B = 3, P_mean=-0.8, P_std=1": {
        "num_blocks": 3, "schedule.P_mean": -0.8, "schedule.P_std": 1.0},
    "B = 3, P_std=1.4": {"num_blocks": 3, "schedule.P_std": 1.4}}
# Of the loss: EDM2's log-variance, and LightningDiT's error of direction with its weight.
TERMS = {"task.learned_weight": True, "task.direction": 1.0}
# What mended next tokens: z's own likelihood in the logits, and the level of noise as one vector.
TOLD: dict[str, Mapping[str, Any]] = {
    "B = 1, likelihood": {"num_blocks": 1, "task.likelihood": True},
    "B = 3, likelihood": {"num_blocks": 3, "task.likelihood": True},
    "B = 3, noise=line": {"num_blocks": 3, "model.noise": "line"}}

EXPERIMENTS = {
    "digits": Experiment(
        models={**split(1, 2, 3, 4, 6), **IMAGES,
                "B = 3, gamma 0.1": {"num_blocks": 3, "schedule.gamma": 0.1}},
        fields=DEEP, options=TWICE,
        solvers=dict(heun=25, dpmpp_2m=50)),  # 49 and 50 evaluations; Euler's are 50
    "digits, cut": Experiment(
        models={f"B = {b}, by {by}": {"num_blocks": b, "schedule.partition": partition}
                for by, cuts in CUT.items() for b, partition in cuts.items()},
        fields=DEEP, options=TWICE),
    "digits, new form": Experiment(
        models=split(1, 2, 3, 4, 6) | shallow(4, 3000),
        fields={**DEEP, **NEW, "optimizer.learning_rate": 0.004},
        options=TWICE, solvers=dict(heun=25, dpmpp_2m=50)),
    "digits, noise": Experiment(
        models=LEVELS, options=TWICE,
        fields={**DEEP, **NEW, "optimizer.learning_rate": 0.004}),
    "fashion_mnist": Experiment(models={**split(1, 2, 3), **IMAGES}, options=SEEN),
    "fashion_mnist, cut": Experiment(
        models={"B = 3, by loss": {"num_blocks": 3, "schedule.partition": "0.35413,0.11653"},
                "B = 3, by similarity": {"num_blocks": 3, "schedule.partition": "3.1643,1.8245"},
                "B = 3, layers by loss": {"num_blocks": 3, "layers_per_block": (1, 2, 3)}},
        options=SEEN),
    "digits, 6 layers": Experiment(models=split(1, 2, 3), options=TWICE),
    "digits, 6 layers, new form": Experiment(
        models=split(1, 2, 3, 6), fields=NEW, options=TWICE, solvers=dict(heun=25, dpmpp_2m=50)),
    "digits, 6 layers, parts": Experiment(
        models={**{f"B = 3, {name.partition('.')[2]}={value}": {"num_blocks": 3, name: value}
                   for name, value in (NEW | TERMS).items()},
                "B = 3, AdamW": {"num_blocks": 3, **NEW, "optimizer.name": "adamw"}},
        options={"features": ("pixels",), "guidance": (1.0,)}),
    "fashion_mnist, new form": Experiment(
        models=split(1, 3) | shallow(2, 6000), fields=NEW, options=SEEN),
    "fashion_mnist, noise": Experiment(models=LEVELS, fields=NEW, options=SEEN),
    # Twice as many steps, of half as many images.
    "fashion_mnist, half batches": Experiment(
        models={**split(1, 3), "B = 3, P_std=1.2": {"num_blocks": 3, "schedule.P_std": 1.2},
                "B = 3, older parts": {"num_blocks": 3, **OLD}},
        fields={**NEW, "train.batch_size": 32, "train.num_steps": 4000, "train.ema_decay": 0.999,
                "optimizer.learning_rate": 0.003, "schedule.P_std": 1.4},
        options=SEEN),
    # Sixteen epochs.
    "fashion_mnist, long": Experiment(
        models={f"{model}{suffix}": fields | more
                for suffix, more in (("", {}), (", newer parts", NEW))
                for model, fields in (split(1, 2, 3) | shallow(2, 45000)).items()},
        fields={"train.num_steps": 15000, "train.ema_decay": 0.999,
                "optimizer.learning_rate": 0.002},
        options=SEEN, points=5),
    # Forty epochs of clip art, in colour, by a narrower network with newer parts.
    "openclipart": Experiment(
        models=split(1, 3) | shallow(2, 12000),
        fields={"model.width": 128, "model.num_heads": 4, "train.num_steps": 4000,
                "train.ema_decay": 0.999},
        options=SEEN, points=5),
    "digits_classify": Experiment(
        models={**PLAIN, **split(1, 2, 3),
                "B = 3, paper's noise": {
                    "schedule.P_mean": -1.2, "schedule.P_std": 1.2, "schedule.sigma_min": 0.002,
                    "schedule.sigma_max": 80.0},
                "B = 3, learned together": LEARNED, **TOLD}),
    "fashion_classify": Experiment(models={**PLAIN, **split(1, 3), **TOLD}),
    "gcide_masked": Experiment(models=split(1, 3)),
    # One pass over the characters. The masked network always turns its heads.
    "gcide_masked, long": Experiment(
        models=split(1, 3),
        fields={**{k: v for k, v in NEW.items() if k != "model.rotary"},
                "optimizer.learning_rate": 0.004, "train.num_steps": 15000,
                "train.ema_decay": 0.999},
        points=5),
    "kjv": Experiment(
        models={**PLAIN, "end to end, 2 layers": {**PLAIN["end to end"], "model.num_layers": 2},
                **split(1, 2),
                "B = 2, network reads z": {"task.likelihood": False},
                "B = 2, pmi": {"task.embedding": "pmi"}, "B = 2, learned together": LEARNED,
                "B = 2, sigma_min 0.1": {"schedule.sigma_min": 0.1},
                "B = 2, edm weight": {"task.weight": "edm"}}),
    "kjv_recurrent": Experiment(models={**PLAIN, "one pass": {}}),
}


def configs(data_dir: str) -> Iterator[tuple[str, str, int, Any]]:
  """All runs: (data set, model, seed, resolved config), a whole table of one seed first."""
  for seed in SEEDS:
    for name, experiment in EXPERIMENTS.items():
      for model, fields in experiment.models.items():
        config = config_lib.read(name.partition(",")[0], {
            **experiment.fields, **fields, "seed": seed, "sample.every_steps": 0,
            "data.dir": data_dir})
        if experiment.points > 1:
          config.checkpoint.keep_every = config.train.num_steps // experiment.points
        yield name, model, seed, config_lib.resolve(config)


def identity(config) -> dict[str, Any]:
  """The fields that a result depends on. Those that dbjax has gained since do not make it stale."""
  flat = config_lib.flatten(config)
  scored = {k: v for k, v in flat.items()
            if k.startswith(("sample.", "evaluate.")) or k == "train.num_steps"}
  return config_lib.binding(flat) | scored


def current(path: Path, wanted: Mapping[tuple[str, str, int], Any]
            ) -> dict[tuple[str, str, int], dict[str, Any]]:
  """The results in a file, {(data set, model, seed): result}, of runs whose configs are as wanted.

  Args:
    path: of evidence.jsonl; it need not exist.
    wanted: {(data set, model, seed): resolved config}.
  """
  lines = path.read_text().splitlines() if path.exists() else []
  results = [json.loads(line) for line in lines]
  key_of = lambda r: (r["data"], r["model"], r["seed"])
  fresh = {key_of(r): r for r in results if key_of(r) in wanted
           and identity(wanted[key_of(r)]) == _since(wanted[key_of(r)]) | r["config"]}
  if len(fresh) < len(results):
    print(f"note: {len(results) - len(fresh)} of {len(results)} runs in {path} are stale: "
          "their configs have changed")
  return fresh


def _since(config) -> dict[str, Any]:
  """What a result says of fields that dbjax has gained since: their defaults."""
  fields = config_lib.fields_of(config_lib.flatten(config))
  plain = lambda x: list(x) if isinstance(x, tuple) else x
  return {name: plain(fields[name].default) for name in identity(config)}


def train(config, workdir: Path) -> Model:
  """The model of a config. A signal ends the program, once all is saved."""
  history = loop.train(config, workdir)
  if history.stopped:
    sys.exit(128 + history.stopped)
  return loading.load(workdir)


def run(name: str, model_name: str, config, workdir: Path) -> dict[str, Any]:
  """Trains and scores one model."""
  model, experiment = train(config, workdir), EXPERIMENTS[name]
  options, judge = dict(experiment.options), None
  writes = "judge" in model_lib.evaluate_fields(config)
  if writes:
    options["judge"] = str(workdir.parent / "judge")
    train(config_lib.read("kjv", {"seed": 100, "task.end_to_end": True,
                                  "data.dir": config.data.dir}), Path(options["judge"]))
    judge = load_judge(options["judge"], config)
  tables = model.evaluate(**options)
  losses, held_out = tables.pop("losses"), tables.pop("held_out", {})
  scores = _headlines(config, tables)
  curve = _curve(config, workdir, options, scores[0])
  if config.num_blocks == 3 and config.schedule.gamma == 0.05:
    for solver, steps in experiment.solvers.items():
      other = model.with_config(**{"sample.solver": solver, "sample.num_steps": steps})
      scores += _headlines(other.config, other.evaluate(**options | dict(guidance=(1.0,))))
  if writes and model_name in WRITERS:
    write = lambda model, *way: dict(solver=_way(*way)) | finetune.written(model, judge, *way)
    scores += [scores[0] | write(model, *way) for way in WRITERS[model_name]]
    if len(model.tasks) > 1:
      tuned = finetune.fine_tune(model, model.dataset())
      scores += [scores[0] | write(tuned, *way) | dict(solver=f"{_way(*way)}, fine-tuned")
                 for way in (("euler", 8, "soft"), ("ancestral", 8, "soft"))]
  return dict(scores=scores, held_out=held_out, losses=losses, tables=tables, curve=curve)


def _curve(config, workdir: Path, options: Mapping[str, Any], last: Mapping[str, Any]
           ) -> list[dict[str, Any]]:
  """Step and first scores of each checkpoint that was kept; those of the last are given.

  And of images the blocks' losses. They leave out the overlap, as the bits of text do, so that
  means of different splits are comparable.
  """
  rows, every = [], config.checkpoint.keep_every
  for step in range(every, config.train.num_steps + 1, every) if every else ():
    model = loading.load(workdir, step=step)
    scores = last if step == config.train.num_steps else _headlines(
        config, model.evaluate(**options))[0]
    row = dict(step=step, **scores)
    if config.task.name == "image":
      row["losses"] = model.losses(model.dataset().held_out, overlap=False)
    rows.append(row)
  return rows


def _headlines(config, tables: dict[str, Any]) -> list[dict[str, Any]]:
  """The figures of a task that go into the table."""
  if config.task.name == "image":
    shown = lambda row: {k: v for k, v in row.items() if k != "num_samples"}
    return [dict(solver=config.sample.solver, **shown(row)) for row in tables["quality"]]
  if config.task.name == "classify":
    steps = 1 if config.task.end_to_end else config.sample.num_steps
    return [dict(solver=f"{row['answer']}, temperature {row['temperature']:g}",
                 **{k: row[k] for k in ("accuracy", "nll", "ece")})
            for row in tables["accuracy"] if row["num_steps"] == steps]
  if config.task.name == "masked":
    return [dict(bits_per_token=tables["bits_per_token"][-1]["bits"])]
  at_sigma_max = tables["cross_entropy"][0]["nats"]  # of a plain network: its only one
  nats = at_sigma_max if config.task.end_to_end else tables["bound"][-1]["nats"]
  written = {k: v for k, v in tables["written"][0].items() if k != "text"}
  s = config.sample
  way = {} if config.task.end_to_end else dict(solver=_way(s.solver, s.num_steps, s.bridge))
  return [dict(**way, nats=nats, at_sigma_max=at_sigma_max, **written)]


def _way(solver: str, num_steps: int, bridge: str) -> str:
  return f"{solver}, {num_steps} steps" + (f", {bridge}" if bridge != "soft" else "")


def table(results: list[dict[str, Any]], name: str) -> str:
  """Mean (least to most over seeds) of each model's scores."""
  mine = [r for r in results if r["data"] == name]
  rows = []
  for model in EXPERIMENTS[name].models:
    runs = [r for r in mine if r["model"] == model]
    kinds = [(s.get("solver", ""), s.get("guidance", "")) for s in runs[0]["scores"]
             ] if runs else []
    for i, (solver, guidance) in enumerate(kinds):
      scores = {k: [r["scores"][i][k] for r in runs] for k in runs[0]["scores"][i]
                if k not in ("solver", "guidance") and "error" not in k}
      rows.append([model, solver, guidance, len(runs), *map(_spread, scores.values())])
  if not rows:
    return f"{name}: nothing yet"
  if mine[0]["held_out"]:
    rows.append(["held out", "", "", "", *(f"{mine[0]['held_out'][k]:.4g}" for k in scores)])
  return metrics.table([name, "solver", "guidance", "seeds", *scores], rows)


def _spread(values: list[float]) -> str:
  return f"{np.mean(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def curves(results: list[dict[str, Any]], name: str) -> str:
  """What each model has reached on the way: mean (least to most) over seeds.

  The loss is that of held-out data without the overlap of blocks, in the mean of the blocks.
  """
  points = EXPERIMENTS[name].points
  shares = [f"{k / points:.0%} of its steps" for k in range(1, points + 1)]
  rows = []
  for model in EXPERIMENTS[name].models:
    ways = [r["curve"] for r in results if (r["data"], r["model"]) == (name, model)]
    for measure in [k for k in ways[0][-1] if k.startswith(("frechet_", "bits_"))] if ways else ():
      rows.append([model, measure, *(_spread([p[measure] for p in at]) for at in zip(*ways))])
    if ways and "losses" in ways[0][-1]:
      rows.append([model, "loss", *(_spread([np.mean(p["losses"]) for p in at])
                                    for at in zip(*ways))])
  return metrics.table([f"{name}, after", "", *shares], rows)


def drawn(results: list[dict[str, Any]]) -> list[str]:
  """The tables of images among these results, which the figure is of."""
  return [name for name, experiment in EXPERIMENTS.items()
          if "features" in experiment.options and any(r["data"] == name for r in results)]


def figure(results: list[dict[str, Any]], path: Path):
  """Frechet distances over B, all seeds; and the exposure gap over noise levels of seed 0."""
  from matplotlib import pyplot as plt  # pylint: disable=g-import-not-at-top

  names = drawn(results)
  _, axes = plt.subplots(2, len(names), figsize=(5 * len(names), 6.5), squeeze=False)
  for name, (top, bottom) in zip(names, axes.T):
    mine = [r for r in results if r["data"] == name]
    measure = f"frechet_{EXPERIMENTS[name].options['features'][-1]}"
    present = [m for m in EXPERIMENTS[name].models if any(r["model"] == m for r in mine)]
    for i, model in enumerate(present):
      values = [r["scores"][0][measure] for r in mine if r["model"] == model]
      top.plot([i] * len(values), values, "o", color=f"C{i}", alpha=0.6)
      top.plot([i - 0.25, i + 0.25], [np.mean(values)] * 2, color=f"C{i}")
      first = next(r for r in mine if r["model"] == model)
      exposure = first.get("tables", first)["exposure"]
      bottom.errorbar(*zip(*((e["sigma"], e["gap"]) for e in exposure)),
                      [e["gap_error"] for e in exposure], marker=".", color=f"C{i}", label=model)
    top.set(title=name, ylabel=measure, ylim=(0, 1.05 * top.dataLim.ymax),
            xticks=range(len(present)))
    top.set_xticklabels(present, rotation=30, ha="right", fontsize=8)
    bottom.set(xscale="log", xlabel="sigma", ylabel="exposure gap", ylim=(-0.05, 0.25),
               xlim=(0.0015, 12))  # above, it is less than its error
    bottom.axhline(0, color="black", linewidth=0.5)
    bottom.legend(fontsize=6, ncols=3, loc="upper center")
  plt.tight_layout()
  with paths.writing(path, "--figure"):
    plt.savefig(path, dpi=100)
  plt.close()


def chosen(pattern: str, seeds: str, keys: Iterable[tuple[str, str, int]]
           ) -> list[tuple[str, str, int]]:
  """The runs whose table and model have a pattern in them, of the seeds in a list or of all.

  Raises:
    UserError: there are none, it is no pattern, or a seed is none of SEEDS.
  """
  known = [str(seed) for seed in SEEDS]
  if unknown := set(asked := seeds.split(",") if seeds else known) - set(known):
    raise UserError(f"--seeds={seeds}: {min(unknown)!r} is no seed, expected some of "
                    f"{','.join(known)}")
  try:
    found = [key for key in keys if re.search(pattern, f"{key[0]}, {key[1]}")
             and str(key[2]) in asked]
  except re.error as e:
    raise UserError(f"--only={pattern}: expected a pattern of Python's re, such as "
                    f"'digits, B = [123]$' ({e})") from None
  if not found:
    raise UserError(f"--only={pattern}: no run is called so; expected a pattern of a table and a "
                    f"model, such as 'digits, B = [123]$'; tables are {'; '.join(EXPERIMENTS)}")
  return found


def main(argv: list[str]):
  parser = argparse.ArgumentParser(prog="python -m dbjax.bench evidence", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--run", action="store_true", help="run what is missing")
  parser.add_argument("--workdir", type=Path, default=Path(".runs/evidence"), help="of the runs")
  parser.add_argument("--data_dir", default="", help="where TFDS keeps its data sets")
  parser.add_argument("--only", default="", help="a pattern, such as 'digits, B = [123]$'")
  parser.add_argument("--seeds", default="", help="some, such as 0,1 [all three]")
  parser.add_argument("--results", type=Path, default=RESULTS, help="one line a run")
  parser.add_argument("--figure", type=Path, default=None, help="a PNG to draw (needs matplotlib)")
  args = parser.parse_args(argv)
  race.drawable(args)
  if args.run:
    race.writable(args, "results")
  wanted = {(name, model, seed): config for name, model, seed, config in configs(args.data_dir)}
  keys = chosen(args.only, args.seeds, wanted)
  fresh = current(args.results, wanted)
  missing = [key for key in keys if key not in fresh] if args.run else []
  if args.run and not missing:
    print(f"note: nothing to run, {len(keys)} of {len(keys)} runs are in {args.results}: to run "
          "them anew, give --results=NEW.jsonl", flush=True)

  for key in missing:
    name, model, seed = key
    print(f"{name}, {model}, seed {seed}", flush=True)
    workdir = args.workdir / re.sub(r"\W+", "_", f"{name} {model} seed {seed}")
    fresh[key] = dict(data=name, model=model, seed=seed, config=identity(wanted[key]),
                      **run(name, model, wanted[key], workdir))
    with paths.writing(args.results, "--results"), args.results.open("a") as file:
      file.write(json.dumps(fresh[key]) + "\n")

  results = [fresh[key] for key in keys if key in fresh]
  if not results:
    of = f" of --only={args.only}" if args.only else ""
    raise UserError(f"--results={args.results} has no results{of}: see --help")
  for name in dict.fromkeys(name for name, _, _ in keys):
    print(table(results, name) + "\n")
    if EXPERIMENTS[name].points > 1 and any(r["data"] == name for r in results):
      print(curves(results, name) + "\n")
  if args.figure and drawn(results):
    figure(results, args.figure)
    print(args.figure)
  elif args.figure:
    print(f"note: {args.figure} is not drawn: it is of images, and none of these runs are")
