"""What pictures show, against the numbers that they are of."""

import dataclasses
import json
import re
import shutil
import types
import xml.etree.ElementTree as ET

from conftest import small_config
from conftest import untrained
import jax
import jax.numpy as jnp
from matplotlib import colors
from matplotlib import image as image_lib
from matplotlib import patches
import numpy as np
import pytest
from scipy import stats

import dbjax
from dbjax import config as config_lib
from dbjax import masking
from dbjax import metrics
from dbjax import plan as plan_lib
from dbjax import plots
from dbjax import schedule as schedule_lib
from dbjax.data import text
from dbjax.errors import UserError

# ---- colours, and how figures are made -----------------------------------------------------------


def luminance(color):
  """Relative, as WCAG 2.2 defines it."""
  r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4
             for x in colors.to_rgb(color))
  return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_blocks_have_colours_of_their_own_that_stand_out_on_white_and_on_dark():
  shades = [plots.color(b) for b in range(10)]
  assert len(set(shades)) == 10 and plots.color(10) == shades[0]
  for shade in shades:
    for ground in ("#ffffff", "#1d2026"):
      light, dark = sorted((luminance(shade), luminance(ground)), reverse=True)
      assert (light + 0.05) / (dark + 0.05) > 3


def history(loss, steps=None):
  """Of {block: losses}."""
  loss = {b: np.array(x, float) for b, x in loss.items()}
  steps = {b: np.arange(1, len(x) + 1) * 100 if steps is None else steps for b, x in loss.items()}
  return metrics.History(steps=steps, loss=loss, metrics={b: {} for b in loss}, stopped=None)


@pytest.fixture
def figure():
  return plots.losses(history({0: [3, 2, 1.5], 1: [4, 3, 2.5]}))


def test_nothing_is_left_open_and_a_notebook_shows_it(python):
  done = python("-c", "import sys; from dbjax import plots, make_schedule; "
                "figure = plots.noise(make_schedule({}, 3)); "
                "assert 'matplotlib.pyplot' not in sys.modules; "
                "print(figure._repr_png_()[1:4].decode())")
  assert done.stdout == "PNG\n", done.stderr


def test_without_matplotlib_the_cure_is_named(python, tmp_path):
  for run in (["-c", "import sys; sys.modules['matplotlib'] = None; import dbjax; "
               "print(dbjax.read_config('digits').num_blocks)\ntry: dbjax.plots\n"
               "except dbjax.UserError as e: print(e)"],
              ["-c", "import sys; sys.modules['matplotlib'] = None; "
               f"sys.argv = ['report', '--workdir={tmp_path}', '--out={tmp_path}/x.html']; "
               "import runpy; runpy.run_module('dbjax.report', run_name='__main__')"]):
    done = python(*run)
    assert 'pip install "dbjax[plot]"' in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_figures_are_saved_as_their_name_says(figure, tmp_path):
  for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
    path = plots.save(figure, tmp_path / f"a.{kind}")
    assert path.read_bytes().startswith(start)
  for name, words in (("a.doc", "expected a name that ends in one of"), ("a", "expected a name"),
                      ("none/a.png", "cannot be written")):
    with pytest.raises(UserError, match=words):
      plots.save(figure, tmp_path / name)


def test_a_figure_in_a_page_takes_its_colour_and_font(figure):
  text_of = plots.svg(figure, "one")
  assert text_of == plots.svg(figure, "one")  # no date, no random ids
  root = ET.fromstring(text_of)
  words = [x for x in root.iter() if x.tag.endswith("}text")]
  assert {"block 0", "block 1", "training loss"} <= {"".join(x.itertext()) for x in words}
  assert all("currentColor" in x.attrib["style"] and "DejaVu" not in x.attrib["style"]
             for x in words)
  ids = re.findall(r'\bid="([^"]*)"', text_of)
  assert ids and all(name.startswith("one-") for name in ids)
  uses = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', text_of)
  assert uses and {a or b for a, b in uses} <= set(ids)
  assert not re.search(r'(?:href|src)="(?!#|data:)', text_of)


def test_names_are_not_read_as_formulas(tmp_path):
  figure = plots.losses(history({0: [1, 2]}), history({0: [2, 1]}), names=["a$b$", r"$\frac"])
  assert {"block 0, a$b$", r"block 0, $\frac"} <= set(re.findall(r">([^<]+)</text>",
                                                                 plots.svg(figure, "x")))


# ---- noise ---------------------------------------------------------------------------------------


def area(collection):
  """Under a filled curve over ln x, by the trapezoid rule."""
  x, y = collection.get_paths()[0].vertices.T
  top = [(a, b) for a, b in zip(x, y) if b > 0]
  x, y = np.array(sorted(dict(top).items())).T
  return np.trapezoid(y, np.log(x))


def bars(axes):
  """{(colour, opacity): (from, to)} of the bars below a curve."""
  return {(colors.to_hex(p.get_facecolor()), p.get_alpha()): (
      p.get_x(), p.get_x() + p.get_width()) for p in axes.patches
          if isinstance(p, patches.Rectangle)}


@pytest.mark.parametrize("partition", ["equal_mass", "uniform", "0.5,0.05"])
def test_noise_shows_the_density_in_the_blocks_shares_and_what_they_train_on(partition):
  schedule = dbjax.make_schedule(dict(partition=partition, gamma=0.2), 3)
  axes, = plots.noise(schedule).axes
  z = (np.log(schedule.boundaries) + 1.2) / 1.2
  expected = stats.norm.cdf(z[:-1]) - stats.norm.cdf(z[1:])
  fills = [c for c in axes.collections if len(c.get_paths())]
  np.testing.assert_allclose([area(c) for c in fills], expected, rtol=0.01)
  assert [colors.to_hex(c.get_facecolor()[0]) for c in fills] == [plots.color(b) for b in range(3)]
  drawn = bars(axes)
  for b in range(3):
    hi, lo = schedule.boundaries[b:b + 2]
    assert sorted(drawn[plots.color(b), 1.0]) == pytest.approx([lo, hi])
    wide = [max(lo / (hi / lo) ** 0.2, 0.002), min(hi * (hi / lo) ** 0.2, 80)]
    assert sorted(drawn[plots.color(b), 0.35]) == pytest.approx(wide)
  assert axes.get_xlim() == (80.0, 0.002)  # falls, and block 0 stands at the left


@pytest.mark.parametrize("alpha", ["linear", "cosine"])
def test_noise_of_masks(alpha):
  schedule = masking.Masking(alpha, 2, 0.1)
  axes, = plots.noise(schedule).axes
  half = 0.5 if alpha == "linear" else 1 - 2 / np.pi * np.arccos(0.5)
  drawn = bars(axes)
  assert sorted(drawn[plots.color(0), 1.0]) == pytest.approx([half, 1])
  assert sorted(drawn[plots.color(1), 1.0]) == pytest.approx([0, half])
  assert min(drawn[plots.color(0), 0.35]) < half < max(drawn[plots.color(1), 0.35])
  assert axes.get_xlim() == (1, 0)


def test_noise_of_a_task_s_own_schedule_has_no_picture():
  with pytest.raises(UserError, match="of a SimpleNamespace there is no picture"):
    plots.noise(types.SimpleNamespace(boundaries=(1.0, 0.5, 0.0)))


def test_one_level_is_all_that_its_interval_holds():
  schedule = dbjax.make_schedule({}, 3)
  for b in range(3):
    levels = schedule.levels(b, 5)
    sigmas = [level["sigma"] for level, _ in levels]
    np.testing.assert_allclose(sigmas, np.geomspace(*schedule.training_range(b)[::-1], 5))
    for sigma, interval in zip(sigmas, [interval for _, interval in levels]):
      drawn = schedule_lib.sample_sigma(jax.random.key(0), (50,), interval)
      np.testing.assert_allclose(drawn, sigma, rtol=1e-6)
  masks = masking.Masking("cosine", 2, 0.0)
  times = [level["time"] for b in range(2) for level, _ in masks.levels(b, 4)]
  assert times == sorted(times, reverse=True) and 0 < times[-1] < times[0] < 1
  for level, interval in masks.levels(1, 4):
    np.testing.assert_allclose(masking.sample_time(jax.random.key(0), 9, interval), level["time"],
                               rtol=1e-6)


# ---- losses --------------------------------------------------------------------------------------


def lines(axes):
  """{label: (x, y, colour, style)}."""
  return {line.get_label(): (line.get_xdata(), line.get_ydata(), line.get_color(),
                             line.get_linestyle()) for line in axes.lines}


def test_losses_are_a_line_a_block(figure):
  drawn = lines(figure.axes[0])
  for b, loss in ((0, [3, 2, 1.5]), (1, [4, 3, 2.5])):
    x, y, color, _ = drawn[f"block {b}"]
    np.testing.assert_array_equal(x, [100, 200, 300])
    np.testing.assert_array_equal(y, loss)
    assert color == plots.color(b)


def test_losses_of_runs_and_of_workdirs(tiny, tmp_path):
  config = config_lib.resolve(tiny())
  for name, losses in (("first", [2.0, 1.0]), ("second", [4.0, 0.5])):
    config_lib.save(tmp_path / name, config, {})
    (tmp_path / name / "block_01").mkdir()
    (tmp_path / name / "block_01/metrics.jsonl").write_text("".join(
        json.dumps(dict(step=10 * i + 10, loss=x)) + "\n" for i, x in enumerate(losses)))
  drawn = lines(plots.losses(tmp_path / "first", str(tmp_path / "second")).axes[0])
  assert list(drawn) == ["block 1, first", "block 1, second"]  # others have reported nothing
  x, y, color, style = drawn["block 1, second"]
  assert (x.tolist(), y.tolist(), color, style) == ([10, 20], [4.0, 0.5], plots.color(1), "--")
  assert drawn["block 1, first"][3] == "-"
  twin = shutil.copytree(tmp_path / "second", tmp_path / "old/second")
  drawn = lines(plots.losses(tmp_path / "second", history({0: [1, 2]}), twin).axes[0])
  assert list(drawn) == [f"block 1, {tmp_path / 'second'}", "block 0, run 1", f"block 1, {twin}"]
  with pytest.raises(UserError, match="expected as many as runs, 2"):
    plots.losses(tmp_path / "second", twin, names=["one"])


def test_losses_that_are_restless_or_missing():
  noisy = np.random.default_rng(0).normal(5, 1, 600)
  raw, smooth = plots.losses(history({0: noisy})).axes[0].lines
  np.testing.assert_array_equal(raw.get_ydata(), noisy)
  assert np.std(smooth.get_ydata()) < 0.5 * np.std(noisy)
  assert abs(np.mean(smooth.get_ydata()) - 5) < 0.2
  assert "nothing has been reported yet" in plots.svg(plots.losses(history({0: []})), "x")
  plots.svg(plots.losses(history({0: [np.nan, 1.0, np.inf]})), "x")
  noisy[[7, 300]] = np.nan, np.inf
  gaps = plots.losses(history({0: noisy})).axes[0].lines[1].get_ydata()
  away = np.abs(np.arange(len(gaps)) + 4.5 - 7) > 10  # a mean of ten
  away &= np.abs(np.arange(len(gaps)) + 4.5 - 300) > 10
  np.testing.assert_allclose(gaps[away], smooth.get_ydata()[away])
  assert np.abs(gaps - 5).max() < 3
  noisy[100:120] = np.nan
  broken = plots.losses(history({0: noisy})).axes[0].lines[1].get_ydata()
  assert np.isnan(broken).sum() == 11  # where there is nothing at all


def test_blocks_of_one_colour_have_dots_of_their_own():
  drawn = plots.losses(history({b: [3, 2, 1.5] * 10 for b in (0, 10, 20)})).axes[0].lines
  assert len({line.get_color() for line in drawn}) == 1
  assert len({line.get_marker() for line in drawn}) == 3
  rows = [dict(block=b, sigma=s, loss=1.0) for b in (0, 10) for s in (2.0, 1.0)]
  one, other = plots.loss_by_noise(rows).axes[0].lines
  assert one.get_color() == other.get_color() and one.get_marker() != other.get_marker()


@pytest.mark.parametrize("num_blocks", [7, 8, 24])
def test_the_legend_of_many_blocks_does_not_cover_their_noise(num_blocks):
  figure = plots.noise(dbjax.make_schedule({}, num_blocks))
  (legend,) = figure.legends or [figure.axes[0].get_legend()]
  assert len(legend.get_texts()) == num_blocks
  figure.draw_without_rendering()
  apart = not legend.get_window_extent().overlaps(figure.axes[0].get_window_extent())
  assert apart == (num_blocks > 7)


def levels(gap=True):
  rows = [dict(block=b, sigma=s, loss=0.1 * s + b) for b, s in ((0, 10.0), (0, 2.0), (1, 0.5))]
  return [row | dict(gap=0.25, gap_error=0.1) for row in rows] if gap else rows


def test_loss_by_noise_on_data_and_on_the_trajectory():
  axes, = plots.loss_by_noise(dict(quality=[dict(accuracy=1.0)], exposure=levels())).axes
  drawn = lines(axes)
  np.testing.assert_allclose(drawn["block 0"][0], [10, 2])
  np.testing.assert_allclose(drawn["block 0"][1], [1.0, 0.2])
  assert drawn["block 1"][2] == plots.color(1)
  rings = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
  assert [list(map(float, ring.get_ydata())) for ring in rings[:2]] == [[1.25, 0.45], [1.3]]
  left, right = axes.get_xlim()
  assert left > 10 > 0.5 > right
  unsure = [levels()[0] | dict(gap=50.0, gap_error=60.0), *levels()[1:]]
  faint, = [line for line in plots.loss_by_noise(unsure).axes[0].lines if line.get_alpha() == 0.3]
  assert list(faint.get_ydata()) == [51.0] and faint.axes.get_ylim()[1] < 2
  other = [dict(block=0, sigma=1.0, ce=0.5, ce_trajectory=0.75)]
  figure = plots.loss_by_noise(other)
  assert [list(line.get_ydata()) for line in figure.axes[0].lines[:2]] == [[0.5], [0.75]]
  assert figure.axes[0].get_ylabel() == "cross-entropy, nats"


def test_loss_by_noise_takes_none_but_numbers():
  bad = [dict(block=0, sigma=float("nan"), loss=1.0), dict(block="x", sigma=1.0, loss=1.0),
         dict(block=0, sigma=-1.0, loss=1.0), dict(block=0, sigma=1.0, loss="<b>"),
         dict(block=0, sigma=1.0), dict(block=-1, sigma=1.0, loss=1.0), "row", None,
         dict(block=0, sigma=1.0, loss=1.0, gap=0.1, gap_error="x")]
  assert plots.find_levels(dict(a=bad, b=3, c="text")) == []
  assert plots.find_levels(dict(a=bad, b=levels(False))) == levels(False)
  own = [{name: (np.int64 if name == "block" else jnp.float32)(x) for name, x in row.items()}
         for row in levels(False)]
  for row, same in zip(plots.find_levels(own), levels(False), strict=True):
    assert type(row["block"]) is int and row == pytest.approx(same)
  with pytest.raises(UserError, match="no loss per noise level"):
    plots.loss_by_noise(dict(a=bad))


def test_losses_by_noise_are_those_of_an_untouched_block():
  """A new DiT returns 0, so that D = c_skip z, whose loss is known."""
  config = small_config("digits")
  model = untrained(config)
  new = tuple(jax.jit(task.init)(jax.random.key(0)) for task in model.tasks)
  model = dataclasses.replace(model, params=new)
  held_out = model.dataset().held_out
  y = held_out.take(np.arange(100))["image"] / 127.5 - 1
  rows = model.losses_by_noise(held_out, num=4)
  assert [row["block"] for row in rows] == [0] * 4 + [1] * 4
  for row in rows:
    s2, d2 = row["sigma"] ** 2, config.sigma_data**2
    skip = d2 / (s2 + d2)
    expected = (s2 + d2) / (s2 * d2) * ((1 - skip) ** 2 * np.mean(y**2) + skip**2 * s2)
    assert row["loss"] == pytest.approx(expected, rel=0.05)
  model = dataclasses.replace(model, schedule=types.SimpleNamespace())  # of a task that says none
  assert model.losses_by_noise(held_out) == []


# ---- memory, comparison --------------------------------------------------------------------------


def plan(**fields):
  return plan_lib.Plan(**dict(
      num_blocks=1, end_to_end=True, remat=False, mesh={}, batch_size=8, parameters=2**30,
      optimizer=3 * 2**30, gradients=2**30, activations=5 * 2**30, table=0, total=10 * 2**30,
      own=None, embedding=None, head=None, matmul_flops=1.0, fits=False, traffic=None) | fields)


def test_memory_is_a_bar_of_parts_for_each_program(tmp_path):
  plans = [plan(), plan(num_blocks=3, end_to_end=False, remat=True, fits=True, parameters=2**29,
                        optimizer=2**29, gradients=0, activations=2**30, total=2 * 2**30)]
  whole = dict(plans=list(map(dataclasses.asdict, plans)), bytes_per_device=8 * 2**30,
               device_kind="TPU v5 lite")
  (tmp_path / "plan.json").write_text(json.dumps(whole))
  for given in (whole, plans, tmp_path / "plan.json", str(tmp_path / "plan.json")):
    axes, = plots.memory(given).axes
    assert [x.get_text() for x in axes.get_yticklabels()] == ["end to end", "B = 3, remat"]
    parts = {c.get_label(): [r.get_width() for r in c] for c in axes.containers}
    assert parts["optimizer"] == [3, 0.5] and parts["activations"] == [5, 1]
    assert [max(r.get_x() + r.get_width() for c in axes.containers for r in [c[i]])
            for i in (0, 1)] == [10, 2]
    words = [x.get_text() for x in axes.texts]
    assert words == ["10 GiB, does not fit", "2 GiB"]
    marks = [line.get_xdata()[0] for line in axes.lines]
    assert marks == ([] if given is plans else [8])


@pytest.mark.parametrize("bad", [
    {}, [], "nowhere.json", dict(plans=[dict(total=1)]), dict(plans=3), 7,
    dict(plans=[dataclasses.asdict(plan(total=float("nan")))])])
def test_memory_of_no_plan_is_refused(bad, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match="dbjax.plan"):
    plots.memory(bad)


def test_models_are_compared_figure_by_figure():
  figure = plots.compare({"a": {"accuracy": 0.5, "distance": 2.0}, "b": {"accuracy": 0.75}})
  first, second = figure.axes
  assert [p.get_width() for p in first.patches] == [0.5, 0.75]
  assert [p.get_width() for p in second.patches] == [2.0]  # b has none
  assert [x.get_text() for x in first.get_yticklabels()] == ["a", "b"]
  assert first.get_title(loc="left") == "accuracy"
  shade, = {colors.to_hex(p.get_facecolor()) for axes in figure.axes for p in axes.patches}
  assert shade not in map(plots.color, range(10))  # a model is no block


# ---- one sample as it comes to be ----------------------------------------------------------------


def pictures(figure):
  return [np.asarray(x.get_array()) for x in figure.axes[0].get_children()
          if isinstance(x, image_lib.AxesImage)]


def band(figure):
  """The colours of the blocks' band, from left to right."""
  return [colors.to_hex(p.get_facecolor()) for p in figure.axes[0].patches]


def shrink(picture):
  """One channel, one value a pixel of the 8x8 image."""
  step = len(picture) // 8
  return picture[step // 2::step, step // 2::step, 0]


@pytest.mark.parametrize("solver, guidance", [("euler", 1.0), ("heun", 1.0), ("euler", 2.0)])
def test_a_strip_begins_in_noise_and_ends_in_the_sample(solver, guidance):
  model = untrained(small_config("digits"))
  options = dict(num_steps=6, solver=solver, guidance=guidance)
  sample = model.sample(4, seed=5, **options)[0][3, ..., 0]
  figure = plots.strip(model, 3, seed=5, frames=100, **options)
  shown = pictures(figure)
  levels = model.table(model.options(options)).sigma
  assert len(shown) == 2 * len(levels)  # above what a step starts from, below what is made of it
  np.testing.assert_array_equal(shrink(shown[-1]), sample)
  start = np.asarray(model.start(5, np.array([3])))[0, ..., 0]
  sigma, size = levels[0], model.config.sigma_data
  start = start * size / np.hypot(size, sigma)
  expected = np.clip(np.round(127.5 * (start + 1)), 0, 255)
  np.testing.assert_allclose(shrink(shown[0]), expected, atol=1)
  blocks = model.schedule.block_of(levels)
  turns = [plots.color(b) for b, before in zip(blocks, [-1, *blocks]) if b != before]
  assert band(figure) == turns
  assert "label 3" in figure.axes[0].get_title(loc="left")


def test_a_strip_shows_each_block_at_work():
  blocks = np.array([0] * 40 + [1] * 2 + [2] * 8)
  for num in (3, 10, 50):
    keep = plots._frames(blocks, num)
    assert set(blocks[keep]) == {0, 1, 2} and len(keep) <= num
    assert keep[0] == 0 and keep[-1] == 49 or num < 4
  assert len(plots._frames(np.arange(30), 10)) == 30  # none is left out


def test_a_strip_of_a_task_of_one_s_own(python, tmp_path):
  """Without a line of code for it; of signals the curves end in the sample."""
  code = """
import sys; sys.path[:0] = ["tests", "configs/examples"]
from conftest import untrained
import numpy as np
import dbjax
config = dbjax.resolve(dbjax.read_config("configs/examples/signals.py", {"sample.num_steps": 5}))
model = untrained(config)
figure = dbjax.plots.strip(model, 1, frames=100)
curves = [line.get_ydata() for line in figure.axes[0].lines]
sample = model.sample(2)[0][1]
print(len(curves), np.corrcoef(curves[-1], sample)[0, 1] > 0.99999, len(sample) == len(curves[-1]))
"""
  done = python("-c", code)
  assert done.stdout == "18 True True\n", done.stderr  # Heun asks 9 times in 5 steps


def test_a_strip_of_a_classifier_has_the_probabilities():
  model = untrained(small_config("digits_classify"))
  figure = plots.strip(model, 2, frames=100, num_steps=4, temperature=1.0, seed=1)
  image = model.dataset().held_out.take(np.array([2]))
  np.testing.assert_array_equal(shrink(pictures(figure)[0]), image["image"][0, ..., 0])
  options = model.options(dict(num_steps=4, temperature=1.0, answer="last"))
  from dbjax.tasks import classify  # what `sample` answers by
  p = classify.probabilities(model, image["image"], np.array([2]), 1, options)[0]
  heights = [x.get_height() for x in figure.axes[0].patches if 0 < x.get_width() < 0.2]
  assert len(heights) == 4 * 10
  np.testing.assert_allclose(np.array(heights[-10:]) / heights[-10:][p.argmax()], p / p.max(),
                             atol=1e-5)
  assert f"label {image['label'][0]}" in figure.axes[0].get_title(loc="left")
  plain = config_lib.as_one_block(model.config, **{"task.end_to_end": True})
  with pytest.raises(UserError, match="no steps of denoising"):
    plots.strip(untrained(plain))


def words(figure):
  return [x.get_text() for x in figure.axes[0].texts]


def test_a_strip_of_masked_text_settles_token_by_token():
  model = untrained(small_config("gcide_masked"))
  options = dict(num_steps=5, temperature=1.0)
  found = model.tasks[0].strip(model, 1, 3, model.options(options))
  rows = found.rows["tokens"]
  sample = model.sample(2, seed=3, **options)[0][1]
  expected = text.pieces(model.config, None, sample)
  assert rows.shape == (5, 12) and rows[-1].tolist() == expected.tolist()
  for before, after in zip(rows, rows[1:]):  # what is written stays
    assert all(a == b for a, b in zip(before, after) if a)
  assert found.block.tolist() == [0, 0, 1, 1, 1] or found.block.tolist() == [0, 0, 0, 1, 1]
  figure = plots.strip(model, 1, seed=3, **options)
  shades = {colors.to_hex(p.get_facecolor()) for p in figure.axes[0].patches}
  settled = found.block[(rows != "").argmax(0)]
  assert shades == {plots.color(b) for b in settled}
  by_last = figure.axes[0].patches[-12:]
  assert [colors.to_hex(p.get_facecolor()) for p in by_last] == [plots.color(b) for b in settled]


@pytest.mark.parametrize("config", [
    "kjv", pytest.param("kjv_recurrent", marks=pytest.mark.slow)])
def test_a_strip_of_next_tokens_ends_in_what_is_written(config):
  model = untrained(small_config(config))
  options = dict(num_steps=4)
  found = model.tasks[0].strip(model, 1, 3, model.options(options))
  sample = model.sample(2, seed=3, **options)[0][1]
  expected = text.pieces(model.config, None, sample)
  assert found.rows["tokens"].shape == (4, 12)
  assert found.rows["tokens"][-1].tolist() == expected.tolist()
  figure = plots.strip(model, 1, seed=3, **options)
  assert sum(word.startswith("σ") for word in words(figure)) == 4
  plain = config_lib.as_one_block(model.config, **{"task.end_to_end": True})
  assert untrained(plain).tasks[0].strip(untrained(plain), 0, 0, {}) is None


def test_pieces_are_one_line_and_never_empty():
  config = small_config("kjv")
  tokens = np.array([[ord("a"), ord("\n")], [0, ord(" ")]])
  assert text.pieces(config, None, tokens).tolist() == [["a", "□"], ["□", " "]]
  ends = config_lib.changed(config, **{"data.eos": 7})
  assert text.pieces(ends, None, np.array([7])).tolist() == ["¶"]


def test_a_mistake_in_an_option_is_named():
  model = untrained(small_config("digits"))
  with pytest.raises(UserError, match="guidence"):
    plots.strip(model, guidence=2.0)
