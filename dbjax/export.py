"""Write a model to share: weights, a sampler, scripts that run without dbjax, and a model card.

    python -m dbjax.export --workdir=DIR --out=FOLDER [--best] [--step=N] [--platforms=cpu,cuda,tpu]
    python -m dbjax.export --workdir=DIR --out=FOLDER --blocks=0,2      # these blocks' files alone

FOLDER is then whole, or is not there:

    block_00.safetensors ..  the averaged weights of a block, under their paths in the network's
                             tree, with all that is recorded of the block: see dbjax/exported.py
    model.safetensors        those of all blocks, under block_00/.. and so on
    config.json              the config, as in a workdir
    model.json               what follows from it: boundaries of the noise, layers and steps of each
                             block, the fields of its network, the sampler's inputs and steps
    sampler.jax              the sampler (StableHLO, by jax.export), for any number of samples
    sample.py                runs it; needs jax, flatbuffers, safetensors and pillow
    sample_torch.py          samples with PyTorch, where the network is the DiT; needs torch, numpy,
                             safetensors and pillow
    README.md                the model card: fill in what is marked with ...

dbjax.load, dbjax.sample and dbjax.evaluate take FOLDER for a workdir, and samples are the same, bit
for bit. dbjax.assemble takes FOLDER, or single files of blocks. What optimizers remember is left
behind, so that blocks cannot be trained further; --config.train.init_from=FOLDER begins anew from
their weights. So are earlier checkpoints: where the config's sample.guide_step names some, give
--guide_step=0; the folder's config has that, and the guidance of this command.

The sampler has no weights in it: it is a function of the blocks' files and of a noise, or a seed.
So it is small, and a block can be replaced by another one. The number of steps, the solver and all
other options of dbjax.sample are fixed when it is written, and are flags here (--num_steps=20);
labels, guidance and temperature are its inputs, for which the flags give what is taken by default.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import importlib.resources
import json
import operator
import os
import re
import string
from typing import Any
import uuid

from absl import flags
from etils import epath
import jax
import jax.export
import jax.numpy as jnp
import numpy as np

import dbjax
from dbjax import block as block_lib
from dbjax import checkpoint
from dbjax import cli
from dbjax import config as config_lib
from dbjax import evaluate as evaluate_lib
from dbjax import exported
from dbjax import loading
from dbjax import lookup
from dbjax import metrics
from dbjax import model as model_lib
from dbjax import paths
from dbjax import provenance
from dbjax import task as task_lib
from dbjax import trust
from dbjax.errors import UserError
from dbjax.fields import at_least
from dbjax.fields import each
from dbjax.fields import Field
from dbjax.fields import one_of

WHOLE, ABOUT, SAMPLER, CARD = "model.safetensors", "model.json", "sampler.jax", "README.md"
STEP = Field(0, "each block's checkpoint of this step; 0: the last", at_least(0))
PLATFORMS = Field(("cpu",), "that the sampler is for; none: there is no sampler",
                  each(one_of("cpu", "cuda", "tpu")), item=str)
_ALONE = {"sample.py": """In JAX, without dbjax (on {platforms}): `python sample.py --help`; or
from a program of your own:

```python
import json
import jax.export
import numpy as np
from safetensors.numpy import load_file

about = json.load(open("model.json"))
program = jax.export.deserialize(open("sampler.jax", "rb").read())
blocks = [load_file(block["file"]) for block in about["blocks"]]
given, num, rng = about["sampler"]["inputs"], 4, np.random.default_rng(seed=1)
samples = program.call(blocks, dict({inputs}
))
```""",
          "sample_torch.py": "In PyTorch, without JAX: `python sample_torch.py --help`."}
BLOCKS = Field((), "write the files of these blocks alone; (): all of a whole model",
               each(at_least(0)))


def export(model: model_lib.Model | epath.PathLike, out: epath.PathLike, *,
           platforms: Sequence[str] = ("cpu",), **options: Any) -> epath.Path:
  """Writes a model to share.

  Args:
    model: as dbjax.load has it, or the workdir of one.
    out: a folder that does not exist yet.
    platforms: of cpu, cuda and tpu: those that the sampler is for; none: there is no sampler.
    **options: of the sampler, as of `Model.sample`.

  Returns:
    The folder.

  Raises:
    UserError: the model is not whole, not finite, or not of a workdir; the folder exists, lies in a
      block of the workdir, or cannot be written; an option makes no sense, or has no use.
  """
  out = _new(out)
  if not isinstance(model, model_lib.Model):
    model = loading.load(model)
  platforms = PLATFORMS.check("platforms", tuple(platforms))
  _check(model)
  _check_beside(out, model.workdir)
  if not platforms:
    _check_unused(model, options)
  options = model.options(options)
  scores = _scores(model.workdir)
  sampler, program = _sampler(model, options, platforms)
  files = task_lib.find(model.config.task.name).files(model.config, model.workdir)
  shared = _shared(model.config, options)
  with _whole(out) as folder:
    _write(model, folder, shared, files)
    about = _about(model, program, options)
    if program:
      (folder / SAMPLER).write_bytes(sampler.serialize())
      about["sampler"] |= dict(file=SAMPLER, platforms=list(sampler.platforms),
                               output=_array(sampler.out_avals[0]),
                               scripts=["sample.py", *program.scripts])
      _copy_scripts(folder, about["sampler"]["scripts"])
    (folder / ABOUT).write_text(evaluate_lib.as_json(about) + "\n")
    (folder / CARD).write_text(card(model, out.name, about, scores))
  return out


def export_blocks(workdir: epath.PathLike, out: epath.PathLike, blocks: Sequence[int], *,
                  step: int = 0, best: bool = False) -> epath.Path:
  """Writes the files of single blocks, for `dbjax.assemble`; the others need not be there.

  Args:
    workdir: that they were trained in.
    out: a folder that does not exist yet.
    blocks: their numbers.
    step, best: as of dbjax.load.

  Returns:
    The folder.

  Raises:
    UserError: there is no such block, or it is missing or damaged; the folder exists, lies in a
      block of the workdir, or cannot be written.
  """
  out, workdir = _new(out), paths.expand(workdir, "workdir")
  _check_beside(out, workdir)
  trust.check_workdir(workdir)
  config, blocks = config_lib.load(workdir), BLOCKS.check("blocks", tuple(blocks))
  if more := [b for b in blocks if b >= config.num_blocks]:
    raise UserError(f"--blocks={','.join(map(str, more))}: num_blocks={config.num_blocks} has "
                    f"blocks 0 to {config.num_blocks - 1}")
  with _whole(out) as folder:
    for b in blocks:
      task = task_lib.make_task(config, b)
      with exported.open_block(workdir, b) as saved:
        meta, params = loading.read_block(saved, task, config, step=step, best=best)
        frozen = saved.frozen(task.abstract_frozen()) or task.frozen(config)
        saved.check_frozen(meta, int(checkpoint.checksum(frozen)))
      _check_finite(b, params)
      exported.write(exported.path_of(folder, b), params, frozen, meta)
  return out


def _new(out: epath.PathLike) -> epath.Path:
  """The folder to write. Raises UserError where there is one, or none can be made."""
  out = paths.expand(out, "--out")
  paths.check_directory(out, "--out")
  if out.exists():
    raise UserError(f"--out={out} exists: choose another")
  return out


def _check_beside(out: epath.Path, workdir: epath.Path | None):
  """Raises UserError where a folder would lie in the directory of a block, or be one."""
  if workdir is None:
    return
  whole = out if "://" in os.fspath(out) else out.resolve()
  for inside in (whole, *whole.parents):
    if inside.parent == paths.directory(workdir, 0).parent and re.fullmatch(
        r"block_\d+", inside.name):
      raise UserError(f"--out={out}: {inside} is of a block of this workdir, and its checkpoints: "
                      "choose another folder")


def _check_unused(model: model_lib.Model, options: Mapping[str, Any]):
  """Raises UserError where options are given that nothing has a use for, without a sampler.

  The config that is written still needs those of `_shared`.
  """
  of_config = ("guide_step", "guidance") if model.config.sample.get("guide_step") else ()
  for name in options:
    if name not in of_config:
      raise UserError(f"--{name}: without --platforms there is no sampler, which it is for: leave "
                      "it out, or give --platforms=cpu")
  if model.options(options).get("guide_step"):
    raise UserError("sample.guide_step: earlier checkpoints are not exported, and cannot guide: "
                    "set guide_step to 0")


def _shared(config: Any, options: Mapping[str, Any]) -> Any:
  """The config of what is shared: of all blocks, and guided by no checkpoint that is not there."""
  fields: dict[str, Any] = {"train.blocks": ()}
  if config.sample.get("guide_step"):
    fields |= {"sample.guide_step": 0, "sample.guidance": options["guidance"]}
  return config_lib.changed(config, **fields)


@contextlib.contextmanager
def _whole(out: epath.Path) -> Iterator[epath.Path]:
  """A folder to write to, that becomes `out` once it is whole; else nothing is left of it."""
  fresh = out.with_name(f"{out.name}.{uuid.uuid4().hex}.tmp")
  try:
    fresh.mkdir(parents=True)
    try:
      yield fresh
      fresh.rename(out)
    finally:
      if fresh.exists():
        fresh.rmtree()
  except OSError as e:
    raise UserError(f"--out={out} cannot be written ({e.strerror or e}): choose another") from e


def _check(model: model_lib.Model):
  """Raises UserError where there is nothing to share."""
  if len(model.metas) != len(model.params):
    raise UserError("expected a model that dbjax.load has read: of any other nobody knows how it "
                    "was trained")
  for b, params in enumerate(model.params):
    _check_finite(b, params)


def _check_finite(block: int, params: Any):
  for name, x in exported.named(params).items():
    if not np.isfinite(x).all():
      raise UserError(f"block {block}: {name} is not all finite, so the block has diverged: train "
                      "it again")


def _write(model: model_lib.Model, folder: epath.Path, config: Any, files: Mapping[str, bytes]):
  """Writes weights, config, and the task's files."""
  whole: dict[str, np.ndarray] = {}
  for b, (params, meta) in enumerate(zip(model.params, model.metas)):
    params, path = jax.tree.map(np.asarray, params), exported.path_of(folder, b)
    sums = meta["checksum"] | dict(ema=checkpoint.checksum_of_host(params))
    exported.write(path, params, model.frozen, meta | dict(checksum=sums))
    whole |= {f"{path.stem}/{name}": x for name, x in exported.named(params).items()}
  whole |= {exported.FROZEN + name: x for name, x in model.frozen.items()}
  exported.write_file(folder / WHOLE, whole,
                      dict(config=json.dumps(config_lib.flatten(model.config))))
  config_lib.save(folder, config, files)


def _sampler(model: model_lib.Model, options: Mapping[str, Any], platforms: Sequence[str]
             ) -> tuple[Any, task_lib.Program | None]:
  """The task's program, compiled for any number of samples; (None, None) if that cannot be."""
  if not platforms:
    return None, None
  if model.config.model.get("attention") in ("auto", "splash", "cudnn"):  # kernels of one platform
    model = model.with_config(**{"model.attention": "xla"})
  try:
    program = model.tasks[0].program(model, options)
    if program:
      return _lower(model, program, platforms), program
    why = "the task does not say how it answers in one program: see Task.program in dbjax/task.py"
  except UserError:
    raise
  except Exception as e:  # whatever the user's code raises
    why = lookup.own_words(e, model.config.model.network)
  print(f"note: no sampler is written ({why})", flush=True)
  return None, None


def _lower(model: model_lib.Model, program: task_lib.Program, platforms: Sequence[str]) -> Any:
  """The program as a function of (blocks, inputs): [{name: array}], {name: array}.

  It is that of ONE sample, mapped over their number n, which is a symbol. So a network may look at
  the size of its batch, and no sample depends on the others.
  """
  templates = [block_lib.abstract_state(task).ema for task in model.tasks]
  fixed = model.tasks[0].abstract_frozen()

  def run(blocks, inputs):
    whole = dataclasses.replace(
        model, params=tuple(map(exported.unnamed, blocks, templates)),
        frozen={name: blocks[0][exported.FROZEN + name] for name in fixed})

    def one(inputs):
      return program.run(whole, **{name: x if program.inputs[name].shared else x[None]
                                   for name, x in inputs.items()})[0]

    axes = {name: None if given.shared else 0 for name, given in program.inputs.items()}
    return jax.vmap(one, in_axes=(axes,))(inputs)

  size, = jax.export.symbolic_shape("n")
  inputs = {name: jax.ShapeDtypeStruct(x.shape if x.shared else (size, *x.shape), x.dtype)
            for name, x in program.inputs.items()}
  blocks = [exported.contents(template, fixed) for template in templates]
  return jax.export.export(jax.jit(run), platforms=platforms)(blocks, inputs)


def _about(model: model_lib.Model, program: task_lib.Program | None, options: Mapping[str, Any]
           ) -> dict[str, Any]:
  """What model.json says."""
  config = model.config
  blocks = [dict(file=exported.path_of(epath.Path(), b).name, steps=meta["step"],
                 seconds=meta["seconds"], network=_network(task))
            for b, (task, meta) in enumerate(zip(model.tasks, model.metas))]
  about = dict(dbjax=dbjax.__version__, jax=jax.__version__, task=config.task.name,
               network=config.model.network, num_blocks=config.num_blocks,
               layers_per_block=list(config.layers_per_block),
               boundaries=list(getattr(model.schedule, "boundaries", ())),
               sigma_data=config.get("sigma_data"), blocks=blocks)
  if program:
    about["sampler"] = dict(
        options=options, inputs={name: _array(x) | dict(values=x.values, shared=x.shared)
                                 for name, x in program.inputs.items()}, **program.about)
  return about


def _network(task: task_lib.Task) -> dict[str, Any]:
  """What the network of a block was constructed with."""
  config = task.config
  offered = {name: operator.attrgetter(field)(config) for name, field in task.OFFERS.items()}
  return {**config.model, **offered, "num_layers": task.network.num_layers}


def _array(x: Any) -> dict[str, Any]:
  """Shape and dtype, for a JSON; a symbol by its name."""
  return dict(shape=[n if isinstance(n, int) else str(n) for n in x.shape],
              dtype=jnp.dtype(x.dtype).name)


def _copy_scripts(folder: epath.Path, names: Sequence[str]):
  for name in names:
    content = importlib.resources.files("dbjax.scripts").joinpath(name).read_bytes()
    (folder / name).write_bytes(content)


def card(model: model_lib.Model, name: str, about: Mapping[str, Any], scores: str) -> str:
  """The model card, in Markdown.

  Args:
    model: what it is of.
    name: of the folder.
    about: what model.json says.
    scores: in words.
  """
  config = model.config
  code = sorted({f"`{code['name']}` (SHA-256 of its file: {code['sha256'] or 'not known'})"
                 for meta in model.metas for code in meta["trained_with"]["code"].values()})
  sampler = about.get("sampler", {})
  template = importlib.resources.files("dbjax.scripts").joinpath("card.md").read_text()
  return string.Template(template).substitute(
      name=name, num_blocks=config.num_blocks, task=config.task.name, version=about["dbjax"],
      data=config.data.name, split=config.data.train, network=config.model.network,
      start=", ".join({provenance.beginning(meta["trained_with"]): 0 for meta in model.metas}),
      code="".join(f"\nNot in this folder, and needed by dbjax: {x}.\n" for x in code),
      trained=_trained(model, about), scores=scores, alone="\n\n".join(
          _ALONE[script].format(platforms=", ".join(sampler["platforms"]), inputs="".join(
              f"\n    {name}={_expression(name, **x)}" for name, x in sampler["inputs"].items()))
          for script in sampler.get("scripts", ())) or "Without dbjax: no sampler was written.")


def _expression(name: str, shape: Sequence[int], dtype: str, values: Sequence[Any], shared: bool
                ) -> str:
  """What a program may give as this input of the sampler: the values that are taken by default."""
  whole = f"({', '.join(map(str, ('num', *shape)))})"
  if name == "noise":
    return f"rng.standard_normal({whole}, np.{dtype}),"
  if name == "index":
    return f"np.arange(num, dtype=np.{dtype}),"
  if shared:
    return f"np.{dtype}({values[0]}),"
  if values:
    return f'np.resize(np.{dtype}(given["{name}"]["values"]), num),'
  return f"np.zeros({whole}, np.{dtype}),  # yours"


def _trained(model: model_lib.Model, about: Mapping[str, Any]) -> str:
  """A table of how each block was trained."""
  bounds = about["boundaries"] or [None] * (len(model.params) + 1)
  rows = [(b, *bounds[b:b + 2], block["network"]["num_layers"],
           sum(x.size for x in jax.tree.leaves(model.params[b])), block["steps"],
           block["seconds"] / 3600, model.metas[b].get("held_out"))
          for b, block in enumerate(about["blocks"])]
  return metrics.table(["block", "noise from", "to", "layers", "parameters", "steps", "hours",
                        "held-out loss"], rows)


def _scores(workdir: epath.Path | None) -> str:
  """The tables of `dbjax.evaluate --json=WORKDIR/scores.json`, if they were written."""
  path = workdir and trust.beside(workdir, "scores.json")
  if not path:
    return ("... (`python -m dbjax.evaluate --workdir=. --json=scores.json`, in the workdir, "
            "before exporting)")
  try:
    scores = dict(trust.read_json(path))
    parts = [f"held-out loss of each block: {', '.join(f'{x:.4g}' for x in scores.pop('losses'))}"]
    parts += [f"{name}\n" + evaluate_lib.words([rows] if isinstance(rows, dict) else rows)
              for name, rows in scores.items()]
  except (OSError, AttributeError, KeyError, TypeError, ValueError) as e:
    raise UserError(f"{path} cannot be read ({e}): write it again by dbjax.evaluate, or move it "
                    "away") from e
  return "```\n" + "\n\n".join(parts) + "\n```"


def fields() -> dict[str, Field]:
  """The flags that a workdir's task adds."""
  return model_lib.sample_fields(config_lib.load(cli.path("workdir")))


def main(options: dict[str, Any]):
  f = flags.FLAGS
  workdir, out = cli.path("workdir"), _new(cli.path("out"))
  if f.blocks:
    if options or f["platforms"].present:
      raise UserError(f"--{next(iter(options), 'platforms')}: single blocks have no sampler: leave "
                      "it out, or leave out --blocks")
    export_blocks(workdir, out, f.blocks, step=f.step, best=f.best)
    print(f"{out} holds block{'s' * (len(f.blocks) > 1)} {','.join(map(str, f.blocks))}: python -m "
          "dbjax.assemble joins blocks to a model")
    return
  model = loading.load(workdir, best=f.best, step=f.step)
  model.describe(options)
  export(model, out, platforms=f.platforms, **options)
  print(f"{out} holds the model: fill in {out / CARD}, and share it")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "Directory that dbjax.main trained in.")
  flags.DEFINE_string("out", None, "The folder to write.")
  flags.DEFINE_boolean("best", False, "Take each block's checkpoint of the least held-out loss.")
  cli.define("step", STEP)
  cli.define("platforms", PLATFORMS)
  cli.define("blocks", BLOCKS)
  cli.run(main, __doc__, options=fields)
