"""Which noise should an image network be trained on? A short scan of P_mean and P_std.

    python -m dbjax.bench noise --config=digits --P_mean=-1.6,-1.2,-0.8 --P_std=1.0,1.2,1.4

Of each pair the whole network is trained in memory, for --steps steps with the rate falling to 0 in
them, with the same weights to begin with and the same images; what differs is ln sigma's mean and
standard deviation in training. Losses under other noise cannot be compared: so samples are, by
their Frechet distance to the training images in pixels, without guidance. The data set must have
been prepared: see the file in configs/.
"""

import argparse
import itertools
from typing import Any

from dbjax import config as config_lib
from dbjax import data
from dbjax import pilot
from dbjax import task as task_lib
from dbjax.bench import race
from dbjax.errors import UserError
from dbjax.model import Model
from dbjax.quality import distances
from dbjax.quality import features
from dbjax.tasks import image


def trained(config: Any, dataset: data.Dataset) -> Model:
  """The whole network of a resolved config of one block, trained in memory."""
  task = task_lib.make_task(config, 0)
  params = pilot.train(task, dataset, task.frozen(config, dataset))
  return Model(config=config, schedule=task.make_schedule(config), tasks=(task,), params=(params,),
               steps=(config.train.num_steps,))


def check_scored(config: Any):
  """Raises UserError where samples of a resolved config of images have no scores by pixels."""
  if config.data.feature != "image":
    raise UserError(f"data.feature={config.data.feature}: scores by pixels need images, expected "
                    "data.feature=image; python -m dbjax.evaluate scores what latents are decoded "
                    "to")
  if config.evaluate.num_samples < distances.MIN_IMAGES:
    raise UserError(f"evaluate.num_samples={config.evaluate.num_samples}: scores need "
                    f"{distances.MIN_IMAGES} samples or more")


def by_pixels(task: task_lib.Task, dataset: data.Dataset) -> distances.Reference:
  """What samples of an image task are scored by: the pixels of the images to train on.

  Raises:
    UserError: as `check_scored`.
  """
  check_scored(task.config)
  pixels = features.load("pixels", task.call(1).output[1:], None)
  return distances.make_reference(dataset.train, dataset.held_out, [pixels])


def main(argv: list[str]):
  parser = argparse.ArgumentParser(prog="python -m dbjax.bench noise", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  numbers = lambda text: [float(x) for x in text.split(",")]
  parser.add_argument("--config", default="digits", help="a file, or a name")
  parser.add_argument("--P_mean", type=numbers, default=[-1.6, -1.2, -0.8], help="some")
  parser.add_argument("--P_std", type=numbers, default=[1.0, 1.2, 1.4], help="some")
  parser.add_argument("--steps", type=int, default=500, help="of each training")
  parser.add_argument("--seeds", type=int, default=1, help="of each pair")
  parser.add_argument("--data_dir", default="", help="where TFDS keeps its data sets")
  args = race.arguments(parser, argv)
  race.at_least(args, steps=1, seeds=1)
  given = config_lib.read(args.config, {"data.dir": args.data_dir})
  if given.task.name != "image":
    raise UserError(f"--config={args.config}: its task is {given.task.name}, expected image")
  if args.quick:
    args.P_mean, args.P_std, args.steps, args.seeds = args.P_mean[:1], args.P_std[:1], 50, 1
  config = pilot.short(config_lib.as_one_block(given), args.steps)
  check_scored(config)
  grid = {(mean, std): [config_lib.changed(
      config, **{"schedule.P_mean": mean, "schedule.P_std": std, "seed": seed})
                        for seed in range(args.seeds)]
          for mean, std in itertools.product(args.P_mean, args.P_std)}
  dataset = data.load(config)
  judged = by_pixels(task_lib.make_task(config, 0), dataset)
  rows = []
  for (mean, std), configs in grid.items():
    found = []
    for own in configs:
      scores = image.score(
          trained(own, dataset), judged, config.evaluate.num_samples,
          guidance=image.unguided(config))
      found.append(scores["frechet_pixels"])
      print(f"P_mean={mean:g} P_std={std:g} seed {own.seed}: {found[-1]:.4g}", flush=True)
    rows.append({"P_mean": mean, "P_std": std, "frechet_pixels": sum(found) / len(found),
                 "from": min(found), "to": max(found)})
  rows.sort(key=lambda row: row["frechet_pixels"])
  race.report("noise", f"{args.config}, {args.steps} steps of the whole network", rows, args.json)
  best = rows[0]
  print(f"\n--config.schedule.P_mean={best['P_mean']:g} --config.schedule.P_std={best['P_std']:g}")
