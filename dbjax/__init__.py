"""dbjax: DiffusionBlocks (arXiv 2506.14202) in JAX.

A network of L layers is cut into B blocks; each is trained alone, as a diffusion
denoiser for its own interval of noise. Block b after n steps is a pure function of
(config, b, n).

    config = dbjax.read_config("digits")        # or a file; then change fields
    history = dbjax.train(config, workdir)      # steps, loss per block
    model = dbjax.load(workdir)
    samples, labels = model.sample(100)

To take it apart: `make_task` makes ONE block of a config, with `init`, `draw` and `loss`;
`init` and `train_step` are its state and a step of it; `make_schedule`, `denoise`, `euler`, `heun`
and `dpmpp_2m` are the mathematics. To put your own in:
`python -m pydoc dbjax.network`, `dbjax.task`, `dbjax.data`. On many machines: `dbjax.sharding`.
To look at: `dbjax.plots`, and `python -m dbjax.report`.
When it goes wrong: `dbjax.errors`.

Data flows one way: schedule -> denoiser -> block -> model -> tasks -> loop -> main.
"""

import importlib as _importlib

__version__ = "0.1.0"

_PUBLIC = dict(
    read_config="config:read", resolve="config:resolve", train="loop:train", load="loading:load",
    Model="model:Model", load_data="data:load", Arrays="data:Arrays", Dataset="data:Dataset",
    make_task="task:make_task", Task="task:Task", Call="network:Call", stack="network:stack",
    Field="fields:Field", fields="fields", GAUSSIAN_FIELDS="solvers:FIELDS", init="block:init",
    train_step="block:train_step", BlockState="block:BlockState", optimizer="optimizers:optimizer",
    make_schedule="schedule:make_schedule", Schedule="schedule:Schedule",
    sample_sigma="schedule:sample_sigma", denoise="denoiser:denoise",
    edm_weight="denoiser:edm_weight", euler="solvers:euler", heun="solvers:heun",
    dpmpp_2m="solvers:dpmpp_2m", pictures="pictures", plots="plots", export="export",
    make_plan="plan:make_plan", find_devices="plan:find_devices", Strip="task:Strip",
    UserError="errors:UserError")

__all__ = list(_PUBLIC)


def __getattr__(name):  # nothing is imported before it is used
  if name not in _PUBLIC:
    raise AttributeError(f"module 'dbjax' has no attribute {name!r}")
  module, _, attribute = _PUBLIC[name].partition(":")
  found = _importlib.import_module(f"dbjax.{module}")
  return getattr(found, attribute) if attribute else found


def __dir__():
  return __all__
