"""The classifier against numpy, Bayes' rule and its own definition."""

import dataclasses
import functools
import json

from conftest import load_config
from conftest import random_params
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import numpy_vit
from scipy import special

from dbjax import block as block_lib
from dbjax import config as config_lib
from dbjax import data
from dbjax import targets
from dbjax import task as task_lib
from dbjax.errors import UserError
from dbjax.model import Model
from dbjax.tasks import classify

# Images that are wider than the config has it, so that no row passes for a column.
CLASSES, WIDTH, SHAPE = 7, 5, (4, 6, 3)


def make_config(num_blocks=3, **overrides):
  """Blocks of two layers."""
  return config_lib.resolve(load_config("digits_classify", **{
      "num_blocks": num_blocks, "sigma_data": 0.6, "data.image_size": 4, "data.channels": 3,
      "data.num_classes": CLASSES, "model.embedding_width": WIDTH,
      "model.num_layers": 2 * num_blocks, "model.width": 24, "model.num_heads": 2,
      "model.patch_size": 2, "model.unroll": 1, "model.dropout": 0.0, "task.crop": 0,
      **overrides}))


CONFIG = make_config()
TASK = task_lib.make_task(CONFIG, 0)
SCHEDULE = TASK.make_schedule(CONFIG)
TABLE = TASK.frozen(CONFIG)[targets.TABLE]
FROZEN = {targets.TABLE: jnp.asarray(TABLE)}


@functools.cache
def params():
  return random_params(TASK.network, *TASK.call(1).inputs)


def batch(n, seed=0):
  rng = np.random.default_rng(seed)
  return dict(image=rng.integers(0, 256, (n, *SHAPE), np.uint8),
              label=rng.integers(0, CLASSES, n, np.int32))


def drawn(n=4):
  return jax.device_get(jax.jit(TASK.draw)(jax.random.key(0), batch(n),
                                           SCHEDULE.training_interval(1)))


WAYS = {weight: make_config(**{"task.weight": weight})
        for weight in ("none", "edm", "edm_batch_mean")} | {
            "end_to_end": make_config(1, **{"task.weight": "edm", "task.end_to_end": True})}


@jax.jit
def losses(params, x):
  """Of each way to weigh them, and end to end: one program."""
  return {way: task_lib.make_task(config, 0).loss(params, x, FROZEN)
          for way, config in WAYS.items()}


def numpy_logits(z, sigma, image):
  return numpy_vit(params(), z / np.sqrt(sigma**2 + 0.36)[:, None], np.log(sigma) / 4, image,
                   patch=2, heads=2)


def test_loss_agrees_with_numpy():
  """Also the released classifier's: a (N,) loss times a (N, 1) weight, averaged."""
  x = drawn()
  np.testing.assert_allclose(x["image"], batch(4)["image"] / 127.5 - 1, rtol=0, atol=1e-6)
  sigma, label = np.float64(x["sigma"]), x["label"]
  z = TABLE[label] + sigma[:, None] * x["noise"]
  p = special.softmax(numpy_logits(z, sigma, x["image"]), axis=1)
  ce = -np.log(p[np.arange(4), label])
  w = (sigma**2 + 0.36) / (0.6 * sigma) ** 2
  ours = losses(params(), x)
  for weight, expected in (("none", ce.mean()), ("edm", np.mean(w * ce)),
                           ("edm_batch_mean", (ce * w[:, None]).mean())):
    np.testing.assert_allclose(ours[weight], expected, rtol=2e-5)


def test_only_a_loss_without_a_weight_is_steady():
  """With the paper's noise the weights of two batches differ by more than what explodes."""
  steady = {way: task_lib.make_task(config, 0).steady for way, config in WAYS.items()}
  assert steady == dict(none=True, edm=False, edm_batch_mean=False, end_to_end=True)
  sigma = np.exp(np.random.default_rng(0).normal(-1.2, 1.2, (1000, 64))).clip(0.002, 80)
  weight = np.mean((sigma**2 + 0.5**2) / (sigma * 0.5) ** 2, axis=1)
  assert np.mean(weight > block_lib.EXPLODES * np.median(weight)) > 0.005


def test_a_step_of_denoising_agrees_with_numpy():
  x, sigma = drawn(), 1.7
  z = np.float32(np.random.default_rng(1).normal(size=(4, WIDTH)))
  logits, d = jax.jit(TASK.answer, static_argnums=(5, 6))(
      params(), FROZEN, z, np.full(4, sigma, np.float32), x["image"], "soft", 1)
  expected = numpy_logits(z, np.full(4, sigma), x["image"])
  np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)
  np.testing.assert_allclose(d, special.softmax(expected, axis=1) @ TABLE, rtol=0, atol=2e-5)


def test_what_z_tells_by_itself_is_not_left_to_the_network():
  """With task.likelihood the network's softmax is a prior, and Bayes' rule does the rest."""
  told = task_lib.make_task(make_config(**{"task.likelihood": True}), 0)
  x, sigma = drawn(), np.float64([0.2, 1, 4, 20])
  z = np.float32(TABLE[x["label"]] + sigma[:, None] * x["noise"])
  logits, d = jax.jit(told.answer, static_argnums=(5, 6))(
      params(), FROZEN, z, np.float32(sigma), x["image"], "soft", 1)
  prior = special.softmax(numpy_vit(
      params(), z / (1 + WIDTH * sigma**2)[:, None], np.log(sigma) / 4, x["image"], patch=2,
      heads=2), axis=1)
  density = np.exp(-((z[:, None] - TABLE) ** 2).sum(-1) / (2 * sigma[:, None] ** 2))
  posterior = prior * density / (prior * density).sum(1, keepdims=True)
  np.testing.assert_allclose(special.softmax(logits, axis=1), posterior, rtol=0, atol=2e-5)
  np.testing.assert_allclose(d, posterior @ TABLE, rtol=0, atol=2e-5)
  assert np.abs(posterior - prior).max() > 0.1  # z tells something
  loss = jax.jit(told.loss)(params(), x | dict(sigma=np.float32(sigma)), FROZEN)
  np.testing.assert_allclose(loss, -np.log(posterior[np.arange(4), x["label"]]).mean(), rtol=1e-4)


def test_denoise_is_the_mean_embedding_under_the_softmax():
  x, sigma = drawn(), np.float32([0.2, 1, 4, 20])
  z = np.float32(np.random.default_rng(3).normal(size=(4, WIDTH)))
  logits, d = jax.jit(lambda *args: (TASK.logits(params(), FROZEN, *args),
                                     TASK.denoise(params(), FROZEN, *args)))(z, sigma, x["image"])
  np.testing.assert_allclose(d, targets.bridge(logits, TABLE, "soft", 0), rtol=0, atol=1e-6)
  assert np.abs(np.diff(d, axis=0)).max(1).min() > 0.01  # the images and levels tell


def test_denoise_of_a_learned_table_brings_its_rows_to_norm_1():
  learned = task_lib.make_task(make_config(**{
      "task.shared_embeddings": True, "train.turn": "together"}), 0)
  x, sigma = drawn(), np.float32([0.2, 1, 4, 20])
  z = np.float32(np.random.default_rng(3).normal(size=(4, WIDTH)))
  both = params() | {targets.TABLE: 3 * TABLE}
  np.testing.assert_allclose(
      jax.jit(learned.denoise)(both, {}, z, sigma, x["image"]),
      jax.jit(TASK.denoise)(params(), FROZEN, z, sigma, x["image"]), rtol=0, atol=1e-6)


@dataclasses.dataclass(frozen=True)
class Named:
  """A network whose parameters are a dict with one name, or a tuple."""

  num_layers: int
  name: str

  def init(self, key, *inputs):
    return {self.name: jnp.ones(CLASSES)} if self.name else (jnp.ones(CLASSES),)

  def apply(self, params, x, *inputs):
    (weights,) = jax.tree.leaves(params)
    return x[:, :1] * weights


@pytest.mark.parametrize("name", ["", targets.TABLE, "weights"])
def test_a_learned_table_is_beside_the_parameters_of_the_network(name):
  """And where none is learned, these may be, and be called, as they like."""
  task = classify.ClassifyTask(config=CONFIG, network=Named(2, name))
  assert np.isfinite(task.loss(task.init(jax.random.key(0)), drawn(), FROZEN))
  shared = make_config(**{"task.shared_embeddings": True, "train.turn": "together"})
  learned = classify.ClassifyTask(config=shared, network=Named(2, name))
  if name == "weights":
    assert set(learned.init(jax.random.key(0))) == {"weights", targets.TABLE}
    return
  with pytest.raises(UserError, match="the task adds the parameter table: expected a network whos"):
    learned.init(jax.random.key(0))


def test_end_to_end_sees_neither_z_nor_sigma():
  x = drawn()
  rng = np.random.default_rng(2)
  other = x | dict(noise=np.float32(rng.normal(size=x["noise"].shape)), sigma=3 * x["sigma"])
  before, after = losses(params(), x), losses(params(), other)
  assert before["end_to_end"] == after["end_to_end"] and before["none"] != after["none"]
  p = special.softmax(numpy_vit(params(), 0 * x["noise"], 0 * x["sigma"], x["image"], 2, 2), 1)
  np.testing.assert_allclose(before["end_to_end"], -np.log(p[np.arange(4), x["label"]]).mean(),
                             rtol=2e-5)  # nor a weight
  changed = losses(params(), x | dict(image=-x["image"]))
  assert changed["end_to_end"] != before["end_to_end"]


class Perfect(classify.ClassifyTask):
  """Logits by Bayes' rule: the image's first pixel tells the prior, z the likelihood."""

  def logits(self, params, frozen, z, sigma, image, keys=None):
    log_prior = jnp.float32(np.log(PRIORS))[(image[:, 0, 0, 0] > 0).astype(int)]
    return z @ TABLE.T / sigma[:, None] ** 2 + log_prior


PRIORS = np.array([[0.6, 0.3, 0.02, 0.02, 0.02, 0.02, 0.02], [0, 0, 0, 0, 0, 0, 1.0]]) + 1e-9


def perfect(num_blocks=3, **overrides):
  """A model of perfect blocks."""
  config = make_config(num_blocks, **overrides)
  task = Perfect(config=config, network=task_lib.make_task(config, 0).network)
  return Model(config=config, schedule=task.make_schedule(config), tasks=(task,) * num_blocks,
               params=({},) * num_blocks, steps=(0,) * num_blocks, frozen=FROZEN)


def ask(model, image, index=None, seed=0, **options):
  """Probabilities of the classes."""
  index = np.arange(len(image)) if index is None else np.array(index)
  return classify.probabilities(model, image, index, seed, model.options(options))


def states_of(model, num, **options):
  """The states (K, num, E) that the sampler denoises, of black images."""
  black = np.zeros((num, *SHAPE), np.uint8)
  return classify.trace(model, black, np.arange(num), 0, model.options(options))[1]


PAPER = dict(temperature=1.0, answer="last")


@pytest.mark.parametrize("num_steps", [1, 3, 40])
def test_a_perfect_network_draws_answers_from_the_posterior(num_steps):
  """From noise: as often as the prior has them, and certain ones surely."""
  num = 2000
  image = np.zeros((num, *SHAPE), np.uint8)
  image[1::2] = 255
  p = ask(perfect(), image, num_steps=num_steps, **PAPER)
  assert p.shape == (num, CLASSES)
  np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)
  assert np.all(p[1::2].argmax(1) == 6) and p[1::2, 6].min() > 0.999
  if num_steps == 1:  # at sigma_max z tells almost nothing: all say the likeliest
    assert np.mean(p[::2].argmax(1) == 0) > 0.95
    np.testing.assert_allclose(p[::2].mean(0), PRIORS[0], atol=0.02)
  if num_steps == 40:
    shares = np.bincount(p[::2].argmax(1), minlength=CLASSES) / (num / 2)
    np.testing.assert_allclose(shares, PRIORS[0], atol=0.1)  # Euler's error is larger than chance
    assert p[::2].max(1).mean() > 0.95  # and each is sure of it


@pytest.mark.parametrize("num_steps", [1, 3, 40])
@pytest.mark.parametrize("answer", ["last", "mean"])
def test_from_the_mean_of_the_noise_a_perfect_network_answers_by_the_likeliest_class(
    num_steps, answer):
  """Bayes' decision, which is right most often, where a draw is right 0.45 of the time."""
  image = np.zeros((4, *SHAPE), np.uint8)
  image[1::2] = 255
  p = ask(perfect(), image, num_steps=num_steps, temperature=0.0, answer=answer)
  np.testing.assert_array_equal(p.argmax(1), [0, 6, 0, 6])
  np.testing.assert_allclose(p[:2], p[2:], rtol=1e-6)  # whatever its number
  if num_steps == 1:  # z is 0: the prior itself
    np.testing.assert_allclose(p[:2], PRIORS, atol=1e-5)


def test_the_mean_answer_is_the_mean_of_log_probabilities_over_steps():
  image, way = np.zeros((3, *SHAPE), np.uint8), dict(num_steps=4, temperature=0.5)
  mean, last = (ask(perfect(), image, answer=answer, **way) for answer in ("mean", "last"))
  states, table = states_of(perfect(), 3, **way), perfect().table(perfect().options(way))
  prior = np.log(PRIORS[0])
  logs = [np.log(special.softmax(np.asarray(z) @ TABLE.T / sigma**2 + prior, axis=1))
          for z, sigma in zip(states, table.sigma, strict=True)]
  np.testing.assert_allclose(mean, special.softmax(np.mean(logs, 0), axis=1), atol=1e-5)
  np.testing.assert_allclose(last, np.exp(logs[-1]), atol=1e-5)
  # The controls: there are four states, of half the noise.
  assert len(logs) == 4 and np.abs(mean - last).max() > 0.01
  np.testing.assert_allclose(states[0], 0.5 * perfect().start(0, np.arange(3)), rtol=1e-6)


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 5])
def test_as_many_steps_as_blocks_call_each_once(num_blocks):
  model, way = perfect(num_blocks), dict(num_steps=num_blocks)
  sigmas = model.table(model.options(way)).sigma
  assert [(start, stop) for start, stop, _, _ in model.stretches(sigmas)] == [
      (b, b + 1) for b in range(num_blocks)]
  assert states_of(model, 2, **way).shape == (num_blocks, 2, WIDTH)
  assert sigmas[0] == 20 and np.all(np.diff(sigmas) < 0)


def test_end_to_end_is_one_pass_whatever_is_asked_for():
  assert len(states_of(perfect(1, **{"task.end_to_end": True}), 2, num_steps=9)) == 1


def test_an_answer_is_a_function_of_its_number_not_of_its_batch():
  image = np.zeros((6, *SHAPE), np.uint8)
  run = lambda index, seed=0: ask(
      perfect(), image[:len(index)], index, seed, num_steps=6, **PAPER)
  whole = run(range(6))
  np.testing.assert_allclose(run([4, 2]), whole[[4, 2]], atol=1e-5)
  assert np.abs(run(range(6), 1) - whole).max() > 0.01


def test_calibration_by_hand():
  p = np.array([[0.8, 0.2], [0.8, 0.2], [0.3, 0.7], [1.0, 0.0]], np.float32)
  found = classify.calibration(p, np.array([0, 1, 1, 0]))
  # Bins of 1/15: 0.8 twice, half of them right; 0.7, right; 1, right.
  assert found["accuracy"] == 0.75
  assert found["nll"] == pytest.approx(-np.log([0.8, 0.2, 0.7, 1]).mean(), rel=1e-5)
  assert found["ece"] == pytest.approx((2 * 0.3 + 0.3 + 0) / 4, rel=1e-5)
  sure = classify.calibration(np.array([[0.0, 1.0]]), np.array([0]))
  assert sure == dict(accuracy=0.0, balanced_accuracy=0.0, nll=pytest.approx(-np.log(1e-30)),
                      ece=1.0)
  rng = np.random.default_rng(0)  # answers as often right as they say
  p = rng.dirichlet(np.ones(3), 50_000)
  label = (p.cumsum(1) < rng.random((50_000, 1))).sum(1)
  assert classify.calibration(p, label)["ece"] < 0.01


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true",
                            "ignore:A single label was found")
@pytest.mark.parametrize("num, num_classes, seed", [
    (500, 7, 0), (40, 7, 1), (5, 30, 2), (1, 3, 3), (200, 2, 4), (9, 1, 5)])
def test_classes_are_judged_as_scikit_learn_has_it(num, num_classes, seed):
  """Unbalanced ones; also those that are never answered, or that do not occur."""
  from sklearn import metrics

  rng = np.random.default_rng(seed)
  p = rng.dirichlet(1 / np.arange(1, num_classes + 1), num)
  label = np.int32(num_classes * rng.random(num) ** 3)
  label[::3] = p.argmax(1)[::3]
  answers, every = p.argmax(1), np.arange(num_classes)
  assert classify.calibration(p, label)["balanced_accuracy"] == pytest.approx(
      metrics.balanced_accuracy_score(label, answers), rel=1e-12)

  found = classify.by_class(answers, label, num_classes)
  counts = metrics.confusion_matrix(label, answers, labels=every)
  assert found["confusion"] == [
      {"class": c} | {str(answer): counts[c, answer] for answer in every} for c in every]
  precision, recall, _, support = metrics.precision_recall_fscore_support(
      label, answers, labels=every, zero_division=np.nan)
  off = counts * (1 - np.eye(num_classes))
  number = lambda x: np.nan if x is None else x
  assert sorted(row["class"] for row in found["classes"]) == every.tolist()
  for row in found["classes"]:
    c = row["class"]
    assert row["num"] == support[c]
    np.testing.assert_allclose(number(row["precision"]), precision[c], rtol=1e-12)
    np.testing.assert_allclose(number(row["accuracy"]), recall[c] if support[c] else np.nan,
                               rtol=1e-12)
    if off[c].any():
      assert row["taken_for"] != c and off[c, row["taken_for"]] == off[c].max()
      assert row["taken_share"] == pytest.approx(off[c].max() / support[c], rel=1e-12)
    else:
      assert row["taken_for"] is row["taken_share"] is None
  of_some = [row["accuracy"] for row in found["classes"] if row["num"]]
  assert of_some == sorted(of_some)  # the worst first, and last those that do not occur
  assert all(row["num"] == 0 for row in found["classes"][len(of_some):])
  json.dumps(found, allow_nan=False)


def test_importing_the_tasks_does_not_import_scikit_learn(python):
  """It takes a second. Evaluating classes does without, too."""
  done = python("-c", "import sys, numpy as np\n"
                "from dbjax.tasks import classify, image\n"
                "classify.by_class(np.array([0, 1]), np.array([1, 1]), 2)\n"
                "sys.exit('sklearn' in sys.modules)")
  assert done.returncode == 0, done.stderr


def evaluate(of, image, label, num_samples=1000):
  """The tables of examples that are held out."""
  held_out = data.Arrays(image=image, label=np.int32(label))
  return of.tasks[0].evaluate(
      of, data.Dataset(train=held_out, held_out=held_out), dict(num_samples=num_samples))


@pytest.mark.parametrize("overrides", [
    {}, {"sample.num_steps": 3, "sample.temperature": 1.0, "sample.answer": "last"}])
def test_classes_are_judged_by_the_configs_own_way(overrides):
  """Ten images of class 0, 2 of class 1, 1 of class 6; a perfect network says 0, or 6."""
  of = perfect(2, **overrides)
  image = np.zeros((13, *SHAPE), np.uint8)
  image[12] = 255
  label = np.array([0] * 10 + [1] * 2 + [6])
  found = evaluate(of, image, label)
  answers = ask(of, image).argmax(1)
  if not overrides:
    np.testing.assert_array_equal(answers, [0] * 12 + [6])
    assert found["classes"][:3] == [
        {"class": 1, "num": 2, "accuracy": 0, "precision": None, "taken_for": 0, "taken_share": 1},
        {"class": 0, "num": 10, "accuracy": 1, "precision": 10 / 12, "taken_for": None,
         "taken_share": None},
        {"class": 6, "num": 1, "accuracy": 1, "precision": 1, "taken_for": None,
         "taken_share": None}]
    own = next(row for row in found["accuracy"] if row["num_steps"] == 2)
    assert own["accuracy"] == 11 / 13 and own["balanced_accuracy"] == pytest.approx(2 / 3)
  else:  # draws, some of which are wrong
    assert np.any(answers != [0] * 12 + [6])
  expected = classify.by_class(answers, label, CLASSES)
  assert {name: found[name] for name in expected} == expected


def test_evaluate_of_fewer_images_than_classes_and_of_a_plain_network():
  image, label = np.zeros((3, *SHAPE), np.uint8), [0, 0, 3]
  found = evaluate(perfect(1, **{"task.end_to_end": True}), image, label, num_samples=4)
  assert set(found) == {"accuracy", "classes", "confusion"}
  assert [row["num"] for row in found["classes"]] == [1, 2, 0, 0, 0, 0, 0]
  assert found["accuracy"][0]["balanced_accuracy"] == 0.5


def test_a_held_out_label_that_is_no_class_is_refused():
  """A table is read at its end, or from behind, without an error."""
  for wrong in (7, -1):
    with pytest.raises(UserError, match=f"data.num_classes=7: .* has the label {wrong}, .* 0 to 6"):
      evaluate(perfect(2), np.zeros((3, *SHAPE), np.uint8), [0, wrong, 1])


def test_evaluate_has_a_row_for_each_number_of_steps_and_each_state():
  of = perfect(2)
  image = np.zeros((8, *SHAPE), np.uint8)
  image[::2] = 255
  label = np.where(np.arange(8) % 2, 0, 6).astype(np.int32)
  held_out = data.Arrays(image=image, label=label)
  found = of.tasks[0].evaluate(
      of, data.Dataset(train=held_out, held_out=held_out), dict(num_samples=8))
  assert set(found) == {"accuracy", "classes", "confusion", "exposure"}
  assert [(r["num_steps"], r["temperature"], r["answer"]) for r in found["accuracy"]] == [
      (1, 0, "mean"), (2, 0, "mean"), (4, 0, "mean"), (2, 1, "last")]
  for row in found["accuracy"]:
    way = {k: row[k] for k in ("num_steps", "temperature", "answer")}
    p = ask(of, image, **way)
    assert row == dict(**way, **{k: pytest.approx(v, rel=1e-4)
                                 for k, v in classify.calibration(p, label).items()})
  first, last = found["exposure"]
  assert (first["block"], first["sigma"], last["block"]) == (0, 20, 1) and last["sigma"] < 1
  # At sigma_max neither state tells of the label: the prior alone decides; at the end z shows it.
  prior = -np.log(PRIORS[0, 0]) / 2
  assert first["ce"] == pytest.approx(first["ce_trajectory"], abs=0.1)
  assert first["ce"] == pytest.approx(prior, abs=0.1) and last["ce"] < 0.1


@pytest.mark.slow
def test_accumulation_changes_neither_dropout_nor_augmentation():
  task = task_lib.make_task(make_config(**{
      "model.num_layers": 3, "model.dropout": 0.3, "task.flip": True, "task.crop": 1}), 0)
  x = jax.jit(task.draw)(jax.random.key(3), batch(8), SCHEDULE.training_interval(1))
  pixels = np.asarray(x["image"])
  assert np.mean(np.any(pixels != batch(8)["image"] / 127.5 - 1, axis=(1, 2, 3))) > 0.5
  assert len(np.unique(jax.random.key_data(x["key"]), axis=0)) == 8
  weights = params() | dict(stack=jax.tree.map(lambda w: w[:1], params()["stack"]))
  value_and_grad = lambda n, x: jax.jit(
      lambda p, x: block_lib._value_and_grad(functools.partial(task.loss, frozen=FROZEN), p, x, n))(
          weights, x)
  (value, grad), (value_, grad_) = (value_and_grad(n, x) for n in (1, 2))
  np.testing.assert_allclose(value, value_, rtol=1e-5)
  for g, g_ in zip(jax.tree.leaves(grad), jax.tree.leaves(grad_)):
    np.testing.assert_allclose(g, g_, rtol=0, atol=1e-5 * np.abs(g).max())
  other = dict(x, key=x["key"][::-1])  # the control: dropout is at work
  assert abs(jax.jit(task.loss)(weights, other, FROZEN) - value) > 1e-4


def test_generate_answers_held_out_images():
  from sklearn import datasets

  config = config_lib.resolve(load_config("digits_classify", **{
      "num_blocks": 2, "model.num_layers": 2, "model.width": 8, "model.num_heads": 2,
      "model.patch_size": 4, "model.unroll": 1}))
  task = task_lib.make_task(config, 0)
  weights = random_params(task.network, *task.call(1).inputs)
  answering = Model(config=config, schedule=task.make_schedule(config), tasks=(task,) * 2,
                    params=(weights,) * 2, steps=(0, 0), frozen=task.frozen(config))
  index = np.arange(295, 303)  # of 297
  answers, labels = task.generate(answering, index, 0, answering.options({}))
  assert answers.dtype == np.int32 and answers.shape == (8,)
  digits = datasets.load_digits()
  order = np.random.default_rng(0).permutation(len(digits.target))[1500:]
  order = order[index % 297]
  np.testing.assert_array_equal(labels, digits.target[order])
  image = np.round(digits.images[order][..., None] * (255 / 16)).astype(np.uint8)
  p = ask(answering, image, index)
  np.testing.assert_array_equal(answers, p.argmax(1))
