"""The image task against numpy, its own definition and numerical derivatives."""

import collections
import dataclasses
import functools
import itertools

from conftest import load_config
from conftest import random_params
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image
import pytest
from references import numpy_dit
from scipy import stats

from dbjax import config as config_lib
from dbjax import data
from dbjax import solvers
from dbjax import task as task_lib
from dbjax.data import images
from dbjax.errors import UserError
from dbjax.model import Model
from dbjax.quality import distances
from dbjax.quality import exposure
from dbjax.tasks import image as image_lib

CONFIG = config_lib.resolve(load_config(**{
    "data.image_size": 4, "data.channels": 2, "num_blocks": 3, "model.num_layers": 6,
    "model.width": 16, "model.num_heads": 2, "model.patch_size": 2, "model.unroll": 1}))
TASK = task_lib.make_task(CONFIG, 1)
SCHEDULE = TASK.make_schedule(CONFIG)


@functools.cache
def params():
  return random_params(TASK.network, *TASK.call(1).inputs)


def batch(n, seed=0):
  rng = np.random.default_rng(seed)
  return dict(image=rng.integers(0, 256, (n, 4, 4, 2), np.uint8),
              label=rng.integers(0, 10, n, np.int32))


draw = jax.jit(TASK.draw)
denoise = jax.jit(functools.partial(TASK.denoise, frozen={}))
value_and_grad = jax.jit(jax.value_and_grad(TASK.loss))


def drawn(n=6):
  return jax.device_get(draw(jax.random.key(0), batch(n), SCHEDULE.training_interval(1)))


def test_denoise_and_loss_agree_with_numpy():
  x = drawn()
  z, y, sigma = (np.float64(x[name]) for name in ("z", "y", "sigma"))
  s = sigma[:, None, None, None]
  f = numpy_dit(params(), z / np.sqrt(s**2 + 0.75**2), np.log(sigma) / 4, x["label"], 2, 2)
  d = (0.75**2 * z + 0.75 * s * np.sqrt(s**2 + 0.75**2) * f) / (s**2 + 0.75**2)
  ours = denoise(params(), z=x["z"], sigma=x["sigma"], label=x["label"])
  np.testing.assert_allclose(ours, d, atol=2e-5)
  weight = (s**2 + 0.75**2) / (0.75 * s) ** 2
  expected = np.mean(weight * (d - y) ** 2)
  np.testing.assert_allclose(value_and_grad(params(), x)[0], expected, rtol=2e-5)


def test_the_learned_weight_and_the_direction_agree_with_numpy():
  config = config_lib.changed(CONFIG, **{"task.learned_weight": True, "task.direction": 0.5})
  task, x, rng = task_lib.make_task(config, 1), drawn(), np.random.default_rng(0)
  z, y, sigma = (np.float64(x[name]) for name in ("z", "y", "sigma"))
  s, u = sigma[:, None, None, None], rng.normal(size=17)
  new = jax.eval_shape(task.init, jax.random.key(0))
  assert new.pop("log_variance").shape == u.shape
  assert jax.tree.structure(new) == jax.tree.structure(params())
  f = numpy_dit(params(), z / np.sqrt(s**2 + 0.75**2), np.log(sigma) / 4, x["label"], 2, 2)
  c_out = 0.75 * s / np.sqrt(s**2 + 0.75**2)
  target = (y - 0.75**2 / (s**2 + 0.75**2) * z) / c_out
  error = np.mean((f - target) ** 2, (1, 2, 3)) + 0.5 * np.array([
      1 - np.vdot(a, b) / np.sqrt((np.vdot(a, a) + 1e-2 * np.vdot(b, b)) * np.vdot(b, b))
      for a, b in zip(f, target)])
  wave = lambda sigma: [1.0, *(g(w * np.log(sigma)) for g in (np.cos, np.sin)
                               for w in 0.25 * 32 ** (np.arange(8) / 7))]
  level = np.array([np.dot(u, wave(each)) for each in sigma])
  loss = jax.jit(task.loss)(params() | {"log_variance": np.float32(u)}, x)
  np.testing.assert_allclose(loss, np.mean(np.exp(-level) * error + level), rtol=5e-5)


def test_the_direction_of_a_new_network_does_not_drown_the_loss():
  """Its F is 0, which has none."""
  x, norms = drawn(), []
  for weight in (0.0, 0.5):
    task = task_lib.make_task(config_lib.changed(CONFIG, **{"task.direction": weight}), 1)
    grads = jax.jit(jax.grad(task.loss))(task.init(jax.random.key(0)), x)
    norms.append(optax.tree.norm(grads))
  assert norms[1] < 5 * norms[0]


def test_blocks_of_a_model_agree_in_what_samples_and_scores_take_of_the_first():
  assert {"task.learned_weight", "task.label_drop"} <= config_lib.joint(
      config_lib.flatten(CONFIG)).keys()


def test_what_is_drawn():
  n, interval = 20_000, SCHEDULE.training_interval(1)
  given = batch(n)
  x = jax.device_get(draw(jax.random.key(0), given, interval))
  np.testing.assert_allclose(x["y"], given["image"] / 127.5 - 1, rtol=0, atol=1e-6)
  eps = (x["z"] - x["y"]) / x["sigma"][:, None, None, None]
  assert stats.kstest(eps[:, 1, 2, 0], "norm").pvalue > 1e-3
  pixel, ln_sigma = eps[:, 0, 0, 0], np.log(np.float64(x["sigma"]))
  for other in (eps[:, 0, 0, 1], np.roll(pixel, 1), ln_sigma):
    assert abs(np.corrcoef(pixel, other)[0, 1]) < 5 / n**0.5
  assert abs(np.corrcoef(eps.ravel()[:n], ln_sigma)[0, 1]) < 5 / n**0.5  # not from one key
  lo, hi = SCHEDULE.training_range(1)
  law = stats.truncnorm(*((np.log([lo, hi]) + 1.2) / 1.2), loc=-1.2, scale=1.2)
  assert stats.kstest(ln_sigma, law.cdf).pvalue > 1e-3
  dropped = x["label"] == 10
  assert stats.binomtest(int(dropped.sum()), n, 0.1).pvalue > 1e-3
  np.testing.assert_array_equal(x["label"][~dropped], given["label"][~dropped])


def test_a_draw_is_a_function_of_its_key():
  x, rest = drawn(), (batch(6), SCHEDULE.training_interval(1))
  again = jax.jit(lambda *args: TASK.draw(*args))(jax.random.key(0), *rest)  # traced anew
  other = draw(jax.random.key(1), *rest)
  for name in x:
    np.testing.assert_array_equal(x[name], again[name])
  assert not np.any(x["sigma"] == other["sigma"]) and not np.any(x["z"] == other["z"])


def test_guidance():
  x = drawn()
  z, sigma, label = x["z"], x["sigma"], np.arange(6, dtype=np.int32)
  run = lambda label, **options: denoise(params(), z=z, sigma=sigma, label=label, **options)
  with_label, without = run(label), run(np.full(6, 10, np.int32))
  assert np.abs(with_label - without).max() > 0.05
  for guidance, expected in ((0.0, without), (1.0, with_label)):
    np.testing.assert_allclose(run(label, guidance=guidance), expected, atol=1e-5)
  np.testing.assert_allclose(run(label, guidance=2.0), 2 * with_label - without, rtol=0, atol=1e-5)


def test_answer_rounds_and_clips():
  level = np.array([0, 1, 127, 128, 254, 255])
  for offset in (-0.49, 0, 0.49):
    z = np.float32((level + offset) / 127.5 - 1).reshape(6, 1, 1, 1)
    ours = TASK.answer(z)
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours.ravel(), level)
  np.testing.assert_array_equal(TASK.answer(np.array([-1e4, -1.1, 1.1, 1e4])), [0, 0, 255, 255])
  every = np.arange(256, dtype=np.uint8)
  np.testing.assert_array_equal(TASK.answer(images.to_float(every)), every)


def test_prior_is_noise_of_sigma_max():
  z = jax.vmap(TASK.prior, (0, None))(jax.random.split(jax.random.key(0), 500), 80.0)
  assert z.shape == (500, 4, 4, 2)
  assert stats.kstest(np.ravel(z) / 80, "norm").pvalue > 1e-3


@pytest.mark.parametrize("part", ["patch_embedding", "noise_embedding", "label_embedding", "stack",
                                  "modulation", "read_out"])
def test_gradient_against_central_differences(part):
  """Along a random direction in one part of the network, scaled so that the slope is 1."""
  x, rng = drawn(), np.random.default_rng(0)
  weights, grad = params()[part], value_and_grad(params(), x)[1][part]
  uphill = lambda g: np.abs(rng.normal(size=g.shape)) * np.where(g < 0, -1, 1)
  direction = jax.tree.map(uphill, grad)
  rate = sum(np.vdot(*pair) for pair in zip(*map(jax.tree.leaves, (grad, direction))))

  def loss(h):
    moved = jax.tree.map(lambda w, d: np.float32(w + h * d / rate), weights, direction)
    return value_and_grad({**params(), part: moved}, x)[0]

  # The loss, about 2, has float32 rounding of 2e-7: 1e-5 of what 2 h changes.
  assert (loss(0.01) - loss(-0.01)) / 0.02 == pytest.approx(1, abs=1e-3)


def model_of(**fields):
  """Three blocks of random weights, 3 steps, 20 samples, of images 4 x 4 of 2 channels."""
  config = config_lib.changed(CONFIG, **{"sample.num_steps": 3, "sample.batch_size": 8,
                                         "sample.grid": "equal_mass", **fields})
  tasks = tuple(task_lib.make_task(config, b) for b in range(config.num_blocks))
  return Model(config=config, schedule=tasks[0].make_schedule(config), tasks=tasks,
               params=(params(),) * len(tasks), steps=(0,) * len(tasks))


@pytest.mark.parametrize("drop, fits", [(0.0, [1.0]), (1.0, [0.0]), (0.1, [0.0, 0.5, 1.0, 2.0])])
@pytest.mark.parametrize("num_classes", [1, 10])
def test_guidance_needs_what_was_trained(drop, fits, num_classes):
  """Also of one class, whose label has weights of its own. Refused before anything is computed."""
  fields = {"data.num_classes": num_classes, "task.label_drop": drop}
  model = model_of(**fields, **{"sample.guidance": fits[0]})
  config, task = model.config, model.tasks[0]
  for guidance in (0.0, 0.5, 1.0, 2.0):
    words = (f"guidance={guidance:g}: with task.label_drop={drop:g} a denoiser of "
             f"{'labels' if drop else 'no label'} is not trained; set it to {fits[0]:g}, or train")
    for ask in (
        lambda g: config_lib.changed(config, **{"sample.guidance": g}),
        lambda g: task.generate(model, np.arange(2), 0, model.options(dict(guidance=g))),
        lambda g: task.evaluate(model, None, dict(guidance=(fits[0], g), guide_step=0))):
      if guidance not in fits:
        with pytest.raises(UserError, match=f"^(sample.)?{words}"):
          ask(guidance)
  for guidance in fits:
    config_lib.changed(config, **{"sample.guidance": guidance})
    image_lib.check_guidance(config, guidance, "guidance")


def test_without_labels_the_exposure_is_that_of_no_label(monkeypatch):
  seen = []
  monkeypatch.setattr(image_lib.exposure, "exposure", lambda model, y, label: seen.append(label))
  held_out = data.Arrays(**batch(5))
  for drop, guidance, expected in ((1.0, 0.0, np.full(5, 10)), (0.1, 1.0, batch(5)["label"])):
    model = model_of(**{"task.label_drop": drop, "sample.guidance": guidance,
                        "data.feature": "latent"})  # whose samples are not scored unasked
    model.tasks[0].evaluate(model, data.Dataset(held_out, held_out), options_of(model))
    np.testing.assert_array_equal(seen.pop(), expected)


def options_of(model, **given):
  return {name: field.default for name, field in model.tasks[0].EVALUATE.items()} | dict(
      num_samples=20) | given


@pytest.mark.parametrize("labels, expected", [
    ((), np.arange(10)), ([3, 1], [3, 1]), ((9,), [9]), (np.array([0, 4]), [0, 4]),
    ((10,), "labels=10: expected classes from 0 to 9$"),
    ((0, -1), "labels=0,-1: expected classes from 0 to 9$"),
    ((2**40,), "labels=1099511627776: expected classes from 0 to 9$"),
    (3, "labels=3: expected whole numbers"), (np.int32(3), "labels=.*3.*: expected whole numbers"),
    ((True,), r"labels=\(True,\): expected whole numbers"), (True, "labels=True: expected whole"),
    ((1.0,), r"labels=\(1.0,\): expected whole numbers"), ("3", "labels='3': expected whole"),
    (np.array([0.5]), "labels=.*0.5.*: expected whole numbers"),
    (None, "labels=None: expected whole numbers"),
    (((1, 2),), r"labels=\(\(1, 2\),\): expected whole numbers"),
])
def test_labels_are_checked_before_anything_is_computed(labels, expected, monkeypatch):
  model = model_of()
  monkeypatch.setattr(Model, "start", lambda *_: pytest.fail("it has begun"))
  if isinstance(expected, str):
    with pytest.raises(UserError, match=expected) as e:
      model.sample(4, labels=labels)
    assert "\n" not in str(e.value)
    return
  monkeypatch.setattr(Model, "start", lambda self, seed, index: None)
  monkeypatch.setattr(Model, "solve", lambda *_, **__: np.zeros((4, 4, 4, 2)))
  np.testing.assert_array_equal(model.sample(4, labels=labels)[1], np.resize(expected, 4))


DECODERS = """
import numpy as np
grey = lambda latents: np.full((len(latents), 16, 16, 3), 128, np.uint8)
floats = lambda latents: grey(latents) / 255.0
flat = lambda latents: grey(latents)[0]
one = lambda latents: grey(latents)[:1]
growing = lambda latents: np.full((len(latents), 8 + 8 * len(latents), 16, 3), 128, np.uint8)
small = lambda latents: grey(latents)[:, :8, :8]
words = lambda latents: "an image"
number = 3
def breaks(latents):
  raise RuntimeError("no VAE here,\\nnor there")
"""


@pytest.fixture
def decoders(tmp_path, monkeypatch):
  (tmp_path / "decoders_of_test.py").write_text(DECODERS)
  monkeypatch.syspath_prepend(tmp_path)
  return "decoders_of_test"


@pytest.mark.parametrize("name, num, words", [
    ("floats", 1, r"made float64 \(1, 16, 16, 3\) of latents \(1, 4, 4, 2\), expected uint8 "
     r"\(1, height, width, channels\)"),
    ("flat", 1, r"made uint8 \(16, 16, 3\) of latents \(1, 4, 4, 2\), expected"),
    ("one", 2, r"made uint8 \(1, 16, 16, 3\) of .*, expected uint8 \(2, 16, 16, 3\)"),
    ("growing", 2, r"made uint8 \(2, 24, 16, 3\) of .*, expected uint8 \(2, 16, 16, 3\)"),
    ("words", 1, r"made <U8 \(\) of"),
    ("number", 1, "number: TypeError: 'int' object is not callable"),
    ("breaks", 1, "decoders_of_test.py, line 12: RuntimeError: no VAE here, nor there$"),
    ("nothing", 1, "decoders_of_test has no nothing"),
])
def test_what_a_decoder_does_wrong_is_one_line(decoders, name, num, words):
  with pytest.raises(UserError, match=f"^--decode={decoders}:{name}.*{words}") as e:
    image_lib.Decoder(f"{decoders}:{name}", (4, 4, 2))(np.zeros((num, 4, 4, 2), np.float32))
  assert "\n" not in str(e.value)


def a_dataset(num, held_out):
  """Images 4 x 4 of 2 channels."""
  return data.Dataset(data.Arrays(**batch(num)), data.Arrays(**batch(held_out, seed=1)))


@pytest.fixture
def no_exposure(monkeypatch, tmp_path):
  """And statistics of real images are not kept."""
  monkeypatch.setattr(image_lib.exposure, "exposure", lambda *_: [])
  monkeypatch.setattr(distances.paths, "cache", lambda: tmp_path)


@pytest.mark.slow
def test_latents_are_scored_as_the_images_that_they_are_decoded_to(
    decoders, array_records, no_exposure, capsys):
  model = model_of(**{"data.feature": "latent", "data.dir": str(array_records)})
  asked = dict(decode=f"{decoders}:grey", images="mini", features=("pixels",))
  evaluate = lambda **given: model.tasks[0].evaluate(
      model, a_dataset(30, 4), options_of(model, **asked | given))
  found = evaluate()
  assert found["held_out"]["num_samples"] == 20  # of `mini`, not of the latents
  assert found["quality"][0]["recall_pixels"] == 0 and found["quality"][0]["num_samples"] == 20
  note, = capsys.readouterr().out.splitlines()
  assert "20 samples and 60 training images and 20 held-out images is singular" in note
  for given, words in [
      (dict(decode=f"{decoders}:small"), r"--images=mini: its images are of shape \(16, 16, 3\), "
       r"and --decode makes \(8, 8, 3\)"),
      (dict(decode=f"{decoders}:growing"), r"made uint8 \(8, 72, 16, 3\) of latents \(8, 4, "),
      (dict(decode=f"{decoders}:one"), r"made uint8 \(1, 16, 16, 3\) of latents \(8, 4, 4, 2\)"),
      (dict(images=""), "--images is missing")]:
    with pytest.raises(UserError, match=words):
      evaluate(**given)


@pytest.mark.parametrize("given, words", [
    (dict(features=("pixel",)), "features 'pixel': expected one of pixels, inception"),
    (dict(features=("pixels", "inception")), "'inception'.* have 2 channels, expected 1 or 3"),
    (dict(num_samples=3), "num_samples=3: scores need 4 samples or more"),
    (dict(inception="w.pth"), "--inception=w.pth: nothing is seen by it without --features=incep"),
    (dict(decode="os:getcwd"), "--decode=os:getcwd is for latents, .*data.feature=image"),
    (dict(images="mini"), "--images=mini is for latents"),
    (dict(guide_step=5, guidance=(1.0, 2.0)), "guide_step=5: expected a model that dbjax.load has"),
    (dict(guidance_from=5, guidance_to=2), "guidance_from=5 is above sample.guidance_to=2"),
])
def test_what_makes_no_sense_is_refused_before_anything_is_computed(given, words, monkeypatch):
  monkeypatch.setattr(image_lib.exposure, "exposure", lambda *_: pytest.fail("it has begun"))
  model = model_of()
  with pytest.raises(UserError, match=words):
    model.tasks[0].evaluate(model, a_dataset(30, 4), options_of(model, **given))


def test_evaluate_says_of_how_many_images_and_where_they_are_too_few(no_exposure, capsys):
  """Two scores of the same features: one line."""
  model = model_of()
  evaluate = lambda dataset, **given: model.tasks[0].evaluate(
      model, dataset, options_of(model, **given))
  found = evaluate(a_dataset(40, 50), guidance=(1.0, 2.0), features=("pixels", "pixels"))
  assert [(row["guidance"], row["num_samples"]) for row in found["quality"]] == [(1, 20), (2, 20)]
  assert found["held_out"]["num_samples"] == 50
  note, = capsys.readouterr().out.splitlines()
  assert note.startswith("note: features 'pixels' are 32 numbers of an image: the covariance of 20 "
                         "samples is singular")
  found = evaluate(a_dataset(40, 3), num_samples=33)
  assert "held_out" not in found and found["quality"][0]["num_samples"] == 33
  note, = capsys.readouterr().out.splitlines()
  assert note.startswith("note: the held-out images are 3: only 4 or more have scores")


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("feature", ["image", "latent"])
def test_a_picture_shows_at_most_three_channels(feature, channels, tmp_path):
  task = task_lib.make_task(config_lib.changed(
      CONFIG, **{"data.feature": feature, "sigma_data": 0.5}), 0)
  of_latents = np.zeros((2, 48, 48, channels), np.float32) + [1.5, 0, -1.5, 9, 9][:channels]
  answers = of_latents if feature == "latent" else np.uint8(127.5 * (of_latents / 1.5 + 1))
  path = task.save(None, answers, np.array([3, 1]), tmp_path / "grid")
  with Image.open(path) as grid:
    found = grid.getpixel((20, 30))
  expected = (255, 128, 0) if channels > 2 else (255,) * 3
  np.testing.assert_allclose(found, expected, atol=1)


class Bent(image_lib.ImageTask):
  """Whose network is compiled at once: each block and each label bends x in its own way."""

  def apply(self, params, x, c_noise, label, method="__call__"):
    return params["by"] * jnp.tanh(x + 0.2 * label[:, None, None, None])


def bent(by=(0.3, -0.4, 0.5), cls=Bent, **fields):
  """Three blocks; answers are latents, which are not rounded."""
  model = model_of(**{"data.feature": "latent", "sample.num_steps": 12, "sample.grid": "karras",
                      "sample.batch_size": 4, **fields})
  tasks = tuple(cls(config=task.config, network=task.network) for task in model.tasks)
  return dataclasses.replace(model, tasks=tasks, params=tuple(dict(by=np.float32(x)) for x in by))


SIGMAS = SCHEDULE.karras_grid(12)
LOW, HIGH = SIGMAS[9], SIGMAS[3]  # inside of blocks
SPAN = dict(guidance_from=LOW, guidance_to=HIGH)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m"])
def test_guidance_inside_an_interval_of_noise(solver):
  """From above the first to the second, inclusive."""
  model, label = bent(), np.arange(4)
  one, two = model.denoiser(label), model.denoiser(label, 3.0)
  sample = lambda guidance=3.0, **span: model.sample(4, solver=solver, guidance=guidance, **span)[0]
  expected = solvers.solve(
      solver, lambda z, sigma: (two if LOW < sigma <= HIGH else one)(z, sigma),
      model.start(0, np.arange(4)), SIGMAS)
  np.testing.assert_allclose(sample(**SPAN), expected, rtol=0, atol=2e-4)
  everywhere, nowhere = sample(), sample(1.0)
  assert min(np.abs(x - expected).max() for x in (everywhere, nowhere)) > 0.02
  for whole in (dict(guidance_to=80), dict(guidance_from=0.0019, guidance_to=1e6)):
    np.testing.assert_array_equal(sample(**whole), everywhere)
  for empty in (dict(guidance_from=1.0, guidance_to=1.0), dict(guidance_from=80),
                dict(guidance_to=0.001)):
    np.testing.assert_array_equal(sample(**empty), nowhere)


class Counted(Bent):
  """Counts how many images its network is asked about at each noise level, when it runs."""

  asked = collections.Counter()

  def apply(self, params, x, c_noise, label, method="__call__"):
    jax.debug.callback(lambda c: self.asked.update({level(np.exp(4 * c)): len(x)}), c_noise[0])
    return super().apply(params, x, c_noise, label)


level = lambda sigma: f"{float(sigma):.4g}"


@pytest.mark.parametrize("by_model", [False, True])
def test_outside_of_its_interval_guidance_costs_nothing(by_model):
  """One evaluation of a batch there, two inside; of Heun's steps two, of the last one."""
  model = bent(cls=Counted)
  model = dataclasses.replace(model, guide=model) if by_model else model
  for span, times in ((SPAN, [2 if 3 <= k < 9 else 1 for k in range(12)]),
                      (dict(guidance_to=0.001), [1] * 12), (dict(), [2] * 12)):
    Counted.asked.clear()
    model.sample(4, solver="heun", guidance=2.0, **span)
    jax.effects_barrier()
    assert dict(Counted.asked) == {level(sigma): 4 * (2 if k else 1) * times[k]
                                   for k, sigma in enumerate(SIGMAS[:-1])}


@pytest.mark.parametrize("span", [{}, SPAN])
def test_a_model_of_no_label_is_asked_once(span):
  model = bent(cls=Counted, **{"task.label_drop": 1.0, "sample.guidance": 0.0})
  Counted.asked.clear()
  found = model.sample(4, **span)[0]
  jax.effects_barrier()
  assert set(Counted.asked.values()) == {4}
  expected = solvers.euler(model.denoiser(np.full(4, 10)), model.start(0, np.arange(4)), SIGMAS)
  np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("low, high", [(0.0, 1e20), (LOW, HIGH)])
def test_guidance_by_a_weaker_model(solver, low, high):
  """Of another width, with the label in both: D_weak + g (D - D_weak) (arXiv 2406.02507)."""
  strong, weak = bent(), bent((0.1, 0.2, -0.1), **{"model.width": 8})
  good, bad = (model.denoiser(np.arange(4)) for model in (strong, weak))

  def denoise(z, sigma):
    d, d_weak = good(z, sigma), bad(z, sigma)
    return d_weak + 2.5 * (d - d_weak) if low < sigma <= high else d

  model, options = dataclasses.replace(strong, guide=weak), dict(solver=solver, guidance=2.5)
  found = model.sample(4, guidance_from=low, guidance_to=high, **options)[0]
  expected = solvers.solve(solver, denoise, model.start(0, np.arange(4)), SIGMAS)
  np.testing.assert_allclose(found, expected, rtol=0, atol=5e-4)
  plain = strong.sample(4, solver=solver)[0]
  assert np.abs(found - plain).max() > 0.02
  for unguided in (dict(guidance=1.0), dict(guidance_to=0.0)):
    np.testing.assert_array_equal(model.sample(4, **options | unguided)[0], plain)


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_a_guide_needs_neither_labels_nor_their_absence(drop):
  """Where only labels, or only none, were trained, both models are asked for what was."""
  fields = {"task.label_drop": drop, "sample.guidance": 1.0 - drop}
  model, weak = bent(**fields), bent((0.1, 0.2, -0.1), **fields)
  good, bad = (m.denoiser(np.full(4, 10) if drop else np.arange(4)) for m in (model, weak))
  denoise = lambda z, sigma: bad(z, sigma) + 2 * (good(z, sigma) - bad(z, sigma))
  expected = solvers.euler(denoise, model.start(0, np.arange(4)), SIGMAS)
  found, labels = dataclasses.replace(model, guide=weak).sample(4, guidance=2.0)
  np.testing.assert_allclose(found, expected, rtol=0, atol=5e-4)
  np.testing.assert_array_equal(labels, None if drop else np.arange(4))
  config_lib.changed(model.config, **{"sample.guidance": 2.0, "sample.guide_step": 5})


@pytest.mark.parametrize("fields", [{}, {"task.label_drop": 1.0, "sample.guidance": 0.0}])
def test_samples_of_the_guide_alone_are_refused(fields):
  """Where no label was trained, a guidance of 0 is the config's own."""
  model = dataclasses.replace(bent(**fields), guide=bent(**fields))
  for ask in (lambda: model.sample(4, guidance=0.0),
              lambda: model.tasks[0].evaluate(model, a_dataset(40, 5), options_of(
                  model, guidance=(2.0, 0.0)))):
    with pytest.raises(UserError, match="^guidance=0: samples would be those of the weaker"):
      ask()


def test_labels_for_a_model_of_none_are_refused():
  model = bent(**{"task.label_drop": 1.0, "sample.guidance": 0.0})
  with pytest.raises(UserError, match="^labels=3,5: the model was trained without labels"):
    model.sample(4, labels=(3, 5))


def test_a_guide_that_the_config_needs_may_be_left_out_in_scoring(no_exposure, monkeypatch):
  """Without it the config's own guidance would make no sense."""
  monkeypatch.setattr(image_lib, "score", lambda *_, **__: {})
  model = model_of(**{"task.label_drop": 0.0, "sample.guidance": 2.0, "sample.guide_step": 2})
  tables = model.tasks[0].evaluate(model, a_dataset(40, 5), options_of(
      model, guide_step=0, guidance=(1.0,)))
  assert tables["quality"] == [dict(guidance=1.0)]


def test_guidance_and_churn_together():
  """Both by the noise level to which a step is raised: as in a loop of its own."""
  model, index = bent(), np.arange(4)
  options = dict(solver="euler", guidance=3.0, **SPAN, churn=6.0, churn_from=0.01, churn_to=50.0)
  one, two = model.denoiser(np.arange(4)), model.denoiser(np.arange(4), 3.0)
  z, keys = model.start(2, index), model.keys(2, index)
  for i, (sigma, sigma_next) in enumerate(itertools.pairwise(SIGMAS)):
    hat = min(sigma * (1 + min(6 / 12, 2**0.5 - 1) * (0.01 <= sigma <= 50)), 80)
    normal = np.stack([jax.random.normal(jax.random.fold_in(k, i), z.shape[1:]) for k in keys])
    z = z + np.sqrt(hat**2 - sigma**2) * normal
    d = (two if LOW < hat <= HIGH else one)(z, hat)
    z = z + (sigma_next - hat) * (z - d) / hat
  np.testing.assert_allclose(model.sample(4, seed=2, **options)[0], z, rtol=0, atol=5e-4)


def test_evaluate_draws_samples_as_it_is_told(no_exposure, monkeypatch):
  """The options given, over those of the config."""
  seen = []
  monkeypatch.setattr(image_lib, "score", lambda model, *_, **options: seen.append(
      (dict(model.config.sample), options)) or {})
  model = model_of(**{"sample.guidance_to": 4.0})
  given = options_of(model, churn=3.0, guidance_from=2.0, guidance_to=4.0, guidance=(1.5,))
  model.tasks[0].evaluate(model, a_dataset(40, 5), given)
  (sample, options), = seen
  assert options == dict(guidance=1.5) and sample == dict(model.config.sample) | dict(
      churn=3.0, guidance_from=2.0)


@pytest.mark.parametrize("drop, largest, words", [
    (0.1, 4, ""),
    (0.1, 30, "note: samples are of 10 classes in turn; of the training images the largest class "
              "has 75.0%, and the smallest 2.5%"),
    (1.0, 30, "")])
def test_other_shares_of_classes_than_the_data_have_are_noted(
    no_exposure, monkeypatch, capsys, drop, largest, words):
  monkeypatch.setattr(image_lib, "score", lambda *_, **__: {})
  model = model_of(**{"task.label_drop": drop, "sample.guidance": 1.0 * (drop < 1)})
  label = np.append(np.zeros(largest), np.resize(np.arange(1, 10), 40 - largest)).astype(np.int32)
  dataset = data.Dataset(data.Arrays(**batch(40) | dict(label=label)), data.Arrays(**batch(5)))
  model.tasks[0].evaluate(model, dataset, options_of(model))
  notes = [x for x in capsys.readouterr().out.splitlines() if "in turn" in x]
  assert len(notes) == bool(words) and all(x.startswith(words) for x in notes)


def test_samples_of_no_label_have_none(tmp_path):
  model = model_of(**{"task.label_drop": 1.0, "sample.guidance": 0.0})
  samples, labels = model.sample(3)
  assert labels is None
  assert model.tasks[0].save(model, samples, labels, tmp_path / "samples").exists()


@pytest.mark.parametrize("fields, words", [
    ({"sample.guidance_from": 3.0, "sample.guidance_to": 2.0},
     "sample.guidance_from=3 is above sample.guidance_to=2"),
    ({"sample.churn": 3.0, "sample.solver": "dpmpp_2m"},
     "sample.churn=3: expected 0 with sample.solver=dpmpp_2m"),
    ({"sample.churn": 3.0, "sample.churn_from": 3.0, "sample.churn_to": 2.0},
     "sample.churn_from=3 is above sample.churn_to=2"),
    ({"sample.guide_step": -1}, "sample.guide_step=-1: expected a whole number, 0 or more"),
    ({"data.feature": "latent", "task.flip": True}, "task.flip=True: the mirror image of a latent"),
])
def test_a_config_that_makes_no_sense_is_refused(fields, words):
  with pytest.raises(UserError, match=f"^{words}") as e:
    config_lib.changed(CONFIG, **fields)
  assert "\n" not in str(e.value)


def test_the_exposure_is_that_of_the_sampler_with_churn():
  """At the levels that steps are raised to, on the states that are found there."""
  y, label = np.random.default_rng(0).normal(0, 0.75, (4, 4, 4, 2)), np.arange(4)
  model = bent(**{"sample.churn": 6.0, "sample.solver": "heun"})
  rows = exposure.exposure(model, np.float32(y), label)
  raised = model.table(model.options({})).sigma
  assert {row["sigma"] for row in rows} <= set(raised[::2]) and set(raised[::2]).isdisjoint(
      raised[1::2])  # Heun's second levels
  assert len(set(raised) - set(SIGMAS)) == 11
  levels = [row["sigma"] for row in rows]
  assert levels == sorted(levels, reverse=True)
  plain = exposure.exposure(bent(**{"sample.solver": "heun"}), np.float32(y), label)
  assert all(np.isfinite(row["gap"]) for row in rows + plain)
  assert rows[-1]["sure_trajectory"] != plain[-1]["sure_trajectory"]
