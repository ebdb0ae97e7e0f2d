"""Sample from a model whose blocks were trained apart.

    python -m dbjax.sample --workdir=DIR --num_samples=1000 --out=samples.npz

writes the arrays `samples` and, where there are any, `labels` (N,), and beside it the first
hundred to look at: of images (N, H, W, C) uint8 a labelled grid as PNG, of tokens (N, L)
their text; of a classifier the answers (N,) to held-out images. Sample i depends on --seed and i
alone, not on how many are drawn.

Every field of config.sample but every_steps is a flag, and so are the task's own: --num_steps=20
--solver=heun --guidance=2 --labels=3,7. Those that a model has are listed by --workdir=DIR --help.
Images may be guided by a weaker model, in --guide=DIR.
"""

from typing import Any

from absl import flags
import numpy as np

from dbjax import cli
from dbjax import config as config_lib
from dbjax import fields as fields_lib
from dbjax import loading
from dbjax import model as model_lib
from dbjax import paths
from dbjax.errors import UserError


def fields() -> dict[str, fields_lib.Field]:
  """The flags that a workdir's task adds."""
  return model_lib.sample_fields(config_lib.load(cli.path("workdir")))


def main(options: dict[str, Any]):
  f = flags.FLAGS
  if cli.path("out").suffix != ".npz":
    raise UserError(f"--out={f.out}: expected a name that ends in .npz")
  model = loading.load(cli.path("workdir"), best=f.best,
                       guide=cli.path("guide") if f.guide else None)
  loading.check_given(model, f.guide, options)
  out = cli.writable("out")
  model.describe(options)
  batches, drawn = [], 0
  for batch in model.generate(f.num_samples, seed=f.seed, **options):
    batches.append(batch)
    drawn += len(batch[0])
    print(f"{drawn}/{f.num_samples} samples", flush=True)
  samples, labels = (None if parts[0] is None else np.concatenate(parts) for parts in zip(*batches))
  arrays: dict[str, Any] = dict(samples=samples) | ({} if labels is None else dict(labels=labels))
  with paths.writing(out, "--out"), out.open("wb") as file:
    np.savez(file, **arrays)
  few = {name: x[:100] for name, x in arrays.items()}
  shown = model.tasks[0].save(model, few["samples"], few.get("labels"), out.with_suffix(""))
  print(" and ".join(map(str, filter(None, [out, shown]))))


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "Directory that dbjax.main trained in.")
  flags.DEFINE_boolean("best", False, "Take each block's checkpoint of the least held-out loss.")
  flags.DEFINE_string("guide", None, "Directory of a weaker model of images, to guide samples by.")
  flags.DEFINE_string("out", None, "The .npz file to write.")
  cli.define("num_samples", model_lib.NUM)
  cli.define("seed", config_lib.COMMON["seed"], "Sample i is a function of (seed, i).")
  cli.run(main, __doc__, options=fields)
