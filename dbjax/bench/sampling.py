"""What guidance, its interval, a weaker guide and churn are worth, on models that are trained.

    python -m dbjax.bench sampling --workdir=DIR [--workdir=DIR2 ...] [--guide=WEAKER]
        [--way=guidance=1.5,guidance_to=2 ...]

Scores samples of each workdir, of one config but for the seed, in each way: by their distance to
the training images in pixels, and by the class that a classifier finds in them (see
`quality/distances.py`). A way is a list of options of `dbjax.sample`. Without --way some common
ones are compared; with --guide those of a weaker model, in whose direction no sample should go.
"""

import argparse
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dbjax import config as config_lib
from dbjax import loading
from dbjax import model as model_lib
from dbjax import paths
from dbjax.bench import noise
from dbjax.bench import race
from dbjax.errors import UserError
from dbjax.fields import Field
from dbjax.tasks import image

WAYS = ("guidance=1", "guidance=1.25", "guidance=1.25,guidance_from=0.3,guidance_to=3",
        "guidance=1.5", "guidance=1.5,guidance_from=0.3,guidance_to=3", "guidance=2",
        "guidance=2,guidance_from=0.3,guidance_to=3", "guidance=1,churn=5", "guidance=1,churn=20")
GUIDED = ("guidance=1", "guidance=1.25", "guidance=1.5", "guidance=2",
          "guidance=2,guidance_from=0.3,guidance_to=3")


def options(way: str, fields: Mapping[str, Field]) -> dict[str, Any]:
  """The options of `Model.generate` that a way names; `fields` are those that there are."""
  found = {}
  for option in way.split(","):
    name, _, value = option.partition("=")
    if name not in fields:
      raise UserError(f"--way={way}: {name!r} is no option; expected NAME=VALUE, with a NAME of "
                      f"{', '.join(sorted(fields))}")
    found[name] = fields[name].parse(f"--way: {name}", value)
  return found


def check(workdir: Path, config: Any):
  """Raises UserError where a workdir's samples are none that can be scored."""
  if config.task.name != "image":
    raise UserError(f"--workdir={workdir}: its task is {config.task.name}, expected image")
  try:
    noise.check_scored(config)
  except UserError as e:
    raise UserError(f"--workdir={workdir}: {e}") from None


def check_alike(configs: Mapping[Path, Any], given: Collection[str]):
  """Raises UserError where scores of two workdirs would be of different things.

  Args:
    configs: {workdir: resolved config}; they may differ in their seed, and in what no score depends
      on.
    given: options that every way names, so that the configs' own do not count.
  """
  others = {f"sample.{name}" for name in (*given, "every_steps", "batch_size")}

  def compared(config: Any) -> dict[str, Any]:
    flat = config_lib.flatten(config)
    drawn = {name: x for name, x in flat.items() if name.startswith(("sample.", "evaluate."))}
    return {name: x for name, x in (config_lib.binding(flat) | drawn).items()
            if name != "seed" and name not in others}

  first, *rest = configs
  ours = compared(configs[first])
  for workdir in rest:
    theirs = compared(configs[workdir])
    for name in ours | theirs:
      if ours.get(name) != theirs.get(name):
        raise UserError(f"--workdir={workdir}: {name}={theirs.get(name)}, but {ours.get(name)} in "
                        f"{first}: expected workdirs of one config but for the seed: score them "
                        "one by one")


def main(argv: list[str]):
  parser = argparse.ArgumentParser(prog="python -m dbjax.bench sampling", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", type=Path, action="append", required=True, help="of a model")
  parser.add_argument("--guide", type=Path, default=None, help="of a weaker model")
  parser.add_argument("--way", action="append", default=None, help="options of dbjax.sample")
  args = race.arguments(parser, argv)
  ways = args.way or list(GUIDED if args.guide else WAYS)
  found: dict[str, list[dict[str, float]]] = {
      way: [] for way in (ways[:2] if args.quick else ways)}
  configs = {workdir: config_lib.load(paths.expand(workdir, "--workdir"))
             for workdir in args.workdir}
  for workdir, config in configs.items():
    check(workdir, config)
  fields = model_lib.sample_fields(configs[args.workdir[0]])
  chosen = {way: options(way, fields) for way in found}
  check_alike(configs, set.intersection(*map(set, chosen.values())))
  for workdir in args.workdir:
    model = loading.load(workdir, guide=args.guide)
    judged = noise.by_pixels(model.tasks[0], model.dataset())
    for way, scores in found.items():
      scores.append(image.score(model, judged, model.config.evaluate.num_samples, **chosen[way]))
      print(f"{workdir}: {way}: {scores[-1]['frechet_pixels']:.4g}", flush=True)
  rows = []
  for way, scores in found.items():
    mean = {name: sum(s[name] for s in scores) / len(scores) for name in scores[0]
            if not name.startswith("kid")}
    each = [s["frechet_pixels"] for s in scores]
    rows.append({"way": way} | mean | {"from": min(each), "to": max(each)})
  race.report("sampling", f"{len(args.workdir)} of {args.workdir[0]}", rows, args.json)
