"""The page of a run: what it says, that it needs nothing else, and how it looks in a browser."""

import base64
import contextlib
import dataclasses
import html.parser
import io
import json
import os
import re
import select
import shutil
import subprocess
import types

from conftest import fingerprint
from conftest import small_config
from conftest import untrained
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

import dbjax
from dbjax import block as block_lib
from dbjax import checkpoint
from dbjax import config as config_lib
from dbjax import export
from dbjax import model as model_lib
from dbjax import paths
from dbjax import provenance
from dbjax import report
from dbjax import task as task_lib
from dbjax import trust
from dbjax import workdir as workdir_lib
from dbjax.errors import UserError
from dbjax.tasks import image

FORK = dict(forked_from=dict(step=7, directory="/old/block_00"))
NASTY = '<script>alert(1)</script><img src="http://x/y.png" onerror=a>"\'&$x$'


def save(workdir, config, blocks=None, steps=30, seconds=75.0):
  """A workdir as training would leave it, of random weights; metrics are made up."""
  model = untrained(config)
  for b in range(config.num_blocks) if blocks is None else blocks:
    state = block_lib.from_params(model.tasks[b], model.params[b])
    state = state.replace(step=np.int32(steps), ema=model.params[b])
    with checkpoint.BlockCheckpoint(workdir, b) as saved:
      sums = {name: int(x) for name, x in checkpoint.examine(state)[1].items()}
      saved.save_frozen(model.frozen)
      saved.save(state, config, seconds=seconds, trained_with=dict(
          dbjax="0.1.0", code={}, data=fingerprint(config), init_from=""), checksums=sums | dict(
              frozen=int(checkpoint.checksum(model.frozen))))
    (saved.directory / "metrics.jsonl").write_text("".join(json.dumps(dict(
        step=10 * i, loss=2.0 / i + b, examples_per_s=1234.0, seconds=5.0 * i,
        device_bytes=3 * 2**20)) + "\n" for i in (1, 2, 3)))
  config_lib.save(workdir, config, task_lib.find(config.task.name).files(config))
  return workdir


class Page(html.parser.HTMLParser):
  """Its tags, their attributes, and its words."""

  def __init__(self, text):
    super().__init__()
    self.text, self.tags, self.words, self.open = text, [], [], []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in ("meta", "link", "img", "br"):
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):  # of SVG
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open and self.open.pop() == tag, tag  # each is closed, in order

  def handle_data(self, data):
    self.words.append(" ".join(data.split()))

  def count(self, tag):
    return sum(name == tag for name, _ in self.tags)


def test_blocks_that_trained_at_once_have_spent_one_time(tmp_path):
  config = config_lib.changed(small_config("digits"), **{"train.turn": "together"})
  run = workdir_lib.read(save(tmp_path / "run", config))
  assert report._facts(run)["of training, all blocks"] == "1 min 15 s"


def check_alone(page):
  """It is whole, runs nothing and asks nobody."""
  assert page.open == [] and page.text.startswith("<!DOCTYPE html>")
  tags = {tag for tag, _ in page.tags}
  assert not tags & {"script", "iframe", "object", "embed", "form", "base"}
  for tag, attributes in page.tags:
    for name, value in attributes.items():
      assert not name.startswith("on"), (tag, name)
      if name in ("src", "href", "xlink:href", "data", "action", "poster"):
        assert value.startswith(("data:", "#")), (tag, value[:60])
      if not name.startswith("xmlns"):
        assert "//" not in (value or "") or "base64," in value, (tag, name, value[:60])
  style = re.search("<style>(.*?)</style>", page.text, re.DOTALL)[1]
  assert "url(" not in style and "@import" not in style
  ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
  assert len(ids) == len(set(ids))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
  workdir = save(tmp_path_factory.mktemp("report") / "my digits", small_config("digits"))
  rows = [dict(block=b, sigma=s, loss=0.5, gap=0.1, gap_error=0.01)
          for b, s in ((0, 10.0), (0, 1.0), (1, 0.3), (1, 0.01))]
  (workdir / "scores.json").write_text(json.dumps(dict(
      losses=[0.25, 0.375], exposure=rows, quality=[
          dict(guidance=1.0, num_samples=500, accuracy=0.875, frechet_pixels=1.625)])))
  return workdir


@pytest.fixture(scope="module")
def page(digits):
  return Page(report.page([workdir_lib.read(digits)], num_samples=20))


def test_a_page_needs_no_other(page):
  check_alone(page)


def test_the_figures_that_say_most_come_first(page):
  words = list(filter(None, page.words))
  first = words[words.index("my digits"):][:14]
  assert first[1] == ("DiT of 4 layers as 2 blocks of 2, each trained alone. Task image, data "
                      "digits.")
  assert first[2:6] == ["0.875", "accuracy, guidance 1", "1.625",
                        "Frechet distance, guidance 1, lower is better"]
  assert first[6:8] == ["30", "steps of each block"] and "2 min 30 s" in first


def test_samples_are_the_model_s_and_figures_are_there(page, digits):
  images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
  assert len(images) == 1
  grid = Image.open(io.BytesIO(base64.b64decode(images[0].partition("base64,")[2])))
  drawn = dbjax.load(digits).sample(20)[0]
  cell = np.asarray(grid)[12:60:6, 0:48:6, 0]  # the first, of 8x8 pixels six times as large
  np.testing.assert_array_equal(cell, drawn[0, ..., 0])
  sections = [attributes.get("id") for tag, attributes in page.tags if tag == "section"]
  assert sections == ["strip", "samples", "loss", "levels", "noise", "blocks", "scores", "config",
                      "commands", "provenance"]
  assert page.count("svg") == 4


def test_what_differs_from_the_defaults_comes_before_the_rest(page):
  tables = re.search('id=config>(.*?)</section>', page.text, re.DOTALL)[1]
  differ, rest = tables.split("<details>")
  assert "optimizer.warmup_steps" in differ and "<td>5</td>" in differ
  assert "optimizer.clip_norm" in rest and "optimizer.clip_norm" not in differ


@pytest.mark.parametrize("name, fields", [
    ("digits", {}), ("digits", {"num_blocks": 2, "train.num_steps": 7, "model.norm": "rms"}),
    ("kjv", {"task.end_to_end": True}), ("text8", {"data.dir": "/a b/$c"}),
    ("digits", {"model.width": (128, 64, 32), "model.num_heads": 2})])
def test_its_command_makes_the_same_config(name, fields):
  config = config_lib.resolve(config_lib.read(name, fields))
  made = workdir_lib.command(config)
  import shlex
  given = dict(word.removeprefix("--").split("=", 1) for word in shlex.split(made))
  overrides = {k.removeprefix("config."): v for k, v in given.items() if k != "config"}
  assert config_lib.resolve(config_lib.read(given["config"], overrides)) == config


def test_its_command_is_found_however_a_config_is_written(tmp_path, monkeypatch):
  path = tmp_path / "mine.py"
  path.write_text(config_lib.shipped()["digits"].read_text().replace('"', "'"))
  monkeypatch.setattr(config_lib, "shipped", lambda: {"mine": path})
  assert workdir_lib.command(config_lib.resolve(config_lib.read("mine"))) == "--config=mine"


def test_the_blocks_are_told_with_their_times(page):
  table = re.search('id=blocks>(.*?)</section>', page.text, re.DOTALL)[1]
  for words in ("1 min 15 s", "30 of 30", "1,234", "<td>3.0</td>", "0.6667", "0.375"):
    assert words in table, words
  for b in range(2):
    assert f"background:{dbjax.plots.color(b)}" in table


# ---- whatever the workdir is ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits_classify", "gcide_masked",
                                  pytest.param("kjv", marks=pytest.mark.slow),
                                  pytest.param("kjv_recurrent", marks=pytest.mark.nightly),
                                  "imagenet256_latent"])
def test_every_task_has_a_page_though_its_data_are_gone(name, tmp_path):
  fields = {"data.dir": str(tmp_path / "nothing")}
  if name == "imagenet256_latent":
    fields |= {"data.image_size": 4, "model.patch_size": 2}
  config = config_lib.changed(small_config(name), **fields, **{
      "sample.num_steps": 4, "sample.batch_size": 4})
  page = Page(report.page([workdir_lib.read(save(tmp_path / name, config))], num_samples=4))
  check_alone(page)
  sections = [attributes.get("id") for tag, attributes in page.tags if tag == "section"]
  assert {"strip", "samples", "loss", "blocks", "config", "commands"} <= set(sections)
  gone = "Left out: " in page.text
  assert gone == (name != "digits_classify")  # the bundled digits are never gone
  assert ("noise" in sections) == (config.num_blocks > 1)
  assert ("share unmasked" in page.words) == (name == "gcide_masked")


@pytest.mark.parametrize("blocks", [(), (1,)])
def test_blocks_that_are_not_trained_yet(blocks, tmp_path):
  workdir = save(tmp_path / "w", small_config("digits"), blocks=blocks, steps=20)
  page = Page(report.page([workdir_lib.read(workdir)]))
  check_alone(page)
  words = " ".join(page.words)
  assert "of 2 not trained yet" in words and "There is no" not in words
  assert page.count("img") == 0
  (workdir / "scores.json").write_text(json.dumps(dict(losses=[0.5, 0.25])))
  run = workdir_lib.read(workdir, evaluate=3)
  assert run.scores == dict(losses=[0.5, 0.25])
  assert any(note.startswith("--evaluate=3: not scored: ") for note in run.notes)
  if blocks:
    assert "block 1 at step 20 of 30" in words and "Block 0 of 2 not trained yet" in words
    assert "goes on from where it is" in words


@pytest.mark.parametrize("item", ["meta", "ema"])
@pytest.mark.parametrize("missing", [False, True])
def test_a_damaged_checkpoint_is_passed_over(item, missing, digits, tmp_path):
  workdir = shutil.copytree(digits, tmp_path / "w")
  shutil.copytree(workdir / "block_00/30", workdir / "block_00/60")
  kept = workdir / "block_00/60/meta/metadata"
  kept.write_text("{" if item == "meta" else json.dumps(json.loads(kept.read_text()) | dict(
      step=60)))
  if item == "ema":
    (workdir / "block_00/60/ema/manifest.ocdbt").unlink()
  if missing:
    shutil.rmtree(workdir / "block_01")
  run = workdir_lib.read(workdir)
  assert [meta and meta["step"] for meta in run.metas] == [30, None if missing else 30]


@pytest.mark.parametrize("missing", [False, True])
def test_files_that_differ_from_their_sums_are_refused(missing, digits, tmp_path):
  workdir = tmp_path / "w"
  shutil.copytree(digits, workdir)
  if missing:
    shutil.rmtree(workdir / "block_01")
  trust.write_sums(workdir)
  (workdir / "block_00/metrics.jsonl").write_text("{}\n")
  with pytest.raises(UserError, match="differs from its sum"):
    workdir_lib.read(workdir)


def test_links_to_other_files_are_not_shown(tmp_path):
  workdir = save(tmp_path / "w", small_config("digits"), blocks=())
  (tmp_path / "private.json").write_text(json.dumps(dict(table=[dict(word="secret")])))
  for name in ("scores.json", "plan.json"):
    (workdir / name).symlink_to(tmp_path / "private.json")
  page = report.page([workdir_lib.read(workdir)])
  assert "secret" not in page
  assert "scores.json is a link" in page and "plan.json is a link" in page
  (workdir / "block_00").mkdir()
  (workdir / "block_00/metrics.jsonl").symlink_to(tmp_path / "private.json")
  assert "metrics.jsonl is a link" in report.page([workdir_lib.read(workdir)])


def test_it_is_named_as_its_directory_is(digits, monkeypatch):
  monkeypatch.chdir(digits / "block_00")
  assert workdir_lib.read("..").name == "my digits"


def test_what_a_block_began_with():
  words = provenance.beginning
  assert words(dict(init_from="")) == "random weights"
  assert words(dict(init_from="0123456789abcdef")) == "the pretrained weights 0123456789ab"
  assert words(FORK) == "step 7 of /old/block_00"


@pytest.mark.parametrize("seconds, words", [
    (0, "0 s"), (59.6, "1 min 0 s"), (3600, "1 h 0 min"), (90_061, "1 d 1 h"),
    (float("nan"), "unknown")])
def test_durations_in_words(seconds, words):
  assert report._duration(seconds) == words


def test_runs_of_one_name_are_told_apart(tmp_path):
  workdirs = [save(tmp_path / x / "run", small_config("digits"), blocks=()) for x in "ab"]
  for workdir in workdirs:
    (workdir / "scores.json").write_text(json.dumps(dict(
        quality=[dict(guidance=1.0, accuracy=0.75)])))
  words = Page(report.page([workdir_lib.read(w) for w in workdirs])).words
  assert "run" not in words
  for workdir in workdirs:
    assert words.count(str(workdir)) > 4
  assert words.count("accuracy, guidance 1") == 2  # above the only figure that there is, too


@pytest.mark.slow
def test_several_runs_side_by_side(digits, tmp_path):
  other = save(tmp_path / "my digits", config_lib.changed(
      small_config("digits"), num_blocks=1, layers_per_block=(), **{"train.blocks": ()}))
  (other / "scores.json").write_text(json.dumps(dict(
      quality=[dict(guidance=1.0, accuracy=0.75, frechet_pixels=3.5)])))
  page = Page(report.page([workdir_lib.read(digits), workdir_lib.read(other)], num_samples=10))
  check_alone(page)
  text = page.text[page.text.index("<h2>Side by side"):]
  assert text.index("0.875") < text.index("0.750") < text.index("num_blocks")
  assert str(digits) in text and str(other) in text  # their names alone do not tell them apart
  assert page.count("img") == 2


@pytest.mark.slow
def test_what_a_stranger_wrote_is_words_and_nothing_else(tmp_path, monkeypatch):
  """In the config, in the names, in scores, in metrics, in plans."""
  config = config_lib.changed(small_config("digits"), **{
      "data.dir": NASTY, "train.init_layout": NASTY})
  workdir = save(tmp_path / f"w {NASTY.replace('/', '')}", config)
  (workdir / "scores.json").write_text(json.dumps({
      "losses": [0.5, NASTY], NASTY: [{NASTY: NASTY, "block": NASTY}], "quality": [NASTY],
      "exposure": [dict(block=0, sigma=1.0, loss=0.5, gap=NASTY)], "deep": [[[[NASTY]]]],
      "wide": [{str(i): i for i in range(100)}], "long": [dict(a=NASTY)] * 500}))
  (workdir / "plan.json").write_text(json.dumps(dict(plans=[dict(total=NASTY)], device_kind=NASTY)))
  (workdir / "block_00/metrics.jsonl").write_text(json.dumps(dict(step=NASTY, loss=NASTY)) + "\n")
  page = Page(report.page([workdir_lib.read(workdir)], num_samples=2))
  check_alone(page)
  assert page.count("img") == 1 and "alert(1)" in " ".join(page.words)
  assert "Loss of each block over its steps" in page.words  # of the block whose figures are some
  for text in ("[", "3", '"x"', "null", '{"quality": 3}', "[1, 2]"):
    (workdir / "scores.json").write_text(text)
    check_alone(Page(report.page([workdir_lib.read(workdir)], num_samples=0)))


@pytest.mark.slow
def test_the_command(digits, tmp_path, forked):
  out = tmp_path / "deep" / "page.html"
  done = forked("report", f"--workdir={digits}", f"--out={out}", "--num_samples=4")
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-1] == str(out)
  check_alone(Page(out.read_text(encoding="utf-8")))
  before = out.read_bytes()
  (tmp_path / "file").write_text("")
  for flags, words in (
      ([f"--out={out}"], "--workdir is missing"),
      ([f"--workdir={tmp_path}", f"--out={out}"], "config.json does not exist"),
      ([f"--workdir={digits}", f"--workdir={tmp_path}", f"--out={out}"], "does not exist"),
      ([f"--workdir={digits}", f"--out={tmp_path}/page.txt"], "expected a name that ends in .html"),
      ([f"--workdir={digits}", f"--out={tmp_path}/file/page.html"], "cannot be written"),
      ([f"--workdir={digits}", f"--out={out}", "--num_samples=-1"], "--num_samples=-1"),
      ([f"--workdir={digits}", f"--out={out}", "--evaluate=x"], "--evaluate=x")):
    done = forked("report", *flags)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1
  assert out.read_bytes() == before


def words_of(workdir):
  page = Page(report.page([workdir_lib.read(workdir)], num_samples=0))
  check_alone(page)
  return " ".join(page.words)


def test_the_commands_that_trained_it_are_shown_as_they_were_typed(tmp_path):
  workdir = save(tmp_path / "run", small_config("digits"))
  assert "--config=digits" in words_of(workdir)  # none is kept: one that makes the same config
  command = "python -m dbjax.main --config=mine.py '--config.data.name=<b>x</b>'"
  provenance.record(command, {paths.directory(workdir, b): 7 for b in (0, 1)},
                    jax.make_mesh((len(jax.devices()),), ("data",)))
  words = words_of(workdir)
  assert f"on {len(jax.devices())} x cpu: block 0 from step 7" in words
  assert command in words and "block 0 from step 7, block 1 from step 7" in words
  assert "--config=digits" not in words
  kept = paths.directory(workdir, 0) / provenance.COMMANDS
  kept.rename(tmp_path / "elsewhere")
  os.symlink(tmp_path / "elsewhere", kept)
  with pytest.raises(UserError, match="is a link"):
    words_of(workdir)


def test_an_exported_folder(digits, tmp_path):
  folder = export.export(digits, tmp_path / "shared", platforms=())
  words = words_of(folder)
  assert "dbjax.main" not in words and f"dbjax.sample --workdir={folder}" in words
  assert "30 steps of each block" in words
  assert "from random weights" in (folder / "README.md").read_text()
  model = dbjax.load(folder)
  forked = dataclasses.replace(model, metas=tuple(
      meta | dict(trained_with=meta["trained_with"] | FORK) for meta in model.metas))
  folder = export.export(forked, tmp_path / "forked", platforms=())
  assert "from step 7 of /old/block_00." in (folder / "README.md").read_text()


def test_one_exported_block_among_others(digits, tmp_path):
  workdir = shutil.copytree(digits, tmp_path / "w")
  export.export_blocks(digits, tmp_path / "one", (1,))
  shutil.rmtree(workdir / "block_01")
  shutil.copy(tmp_path / "one/block_01.safetensors", workdir)
  assert "dbjax.main" not in words_of(workdir)


# ---- whatever the task does ----------------------------------------------------------------------


def test_an_error_in_a_task_is_told_with_its_line(digits, monkeypatch):
  """And none of them is taken for a damaged file."""
  def fail(error):
    def raises(*_, **__):
      raise error
    return raises

  monkeypatch.setattr(image.ImageTask, "strip", fail(AttributeError("of strip")))
  monkeypatch.setattr(image.ImageTask, "generate", fail(TypeError("of generate")))
  monkeypatch.setattr(image.ImageTask, "evaluate", fail(ValueError("of evaluate")))
  monkeypatch.setattr(image.ImageTask, "headline", fail(KeyError("of headline")))
  run = workdir_lib.read(digits, evaluate=2)
  assert run.source == "from scores.json"
  assert run.headline == {"held-out loss of block 0": 0.25, "held-out loss of block 1": 0.375}
  text = " ".join(Page(report.page([run], num_samples=2)).words)
  for words in ("Left out: {}AttributeError: of strip", "Left out: {}TypeError: of generate",
                "--evaluate=2: not scored: {}ValueError: of evaluate",
                "No figures of these scores: {}KeyError: 'of headline'"):
    assert re.search(words.format(rf"{re.escape(__file__)}, line \d+: "), text), words
  assert "cannot be read" not in text


@pytest.mark.parametrize("suffix, words", [
    (".jpeg", 'src="data:image/jpeg;base64,AQI="'), (".gif", 'src="data:image/gif;base64,AQI="'),
    (".wav", "the task has saved them as samples.wav")])
def test_samples_in_files_of_other_kinds(suffix, words, digits, monkeypatch):
  def save_as(self, model, samples, labels, path):
    path = path.with_name(path.name + suffix)
    path.write_bytes(bytes([1, 2]))
    return path

  monkeypatch.setattr(image.ImageTask, "save", save_as)
  monkeypatch.setattr(model_lib.Model, "sample", lambda self, num: (np.zeros((num, 8, 8, 1)), None))
  run = workdir_lib.read(digits)
  assert words in report._topic("samples", "Samples", [run], lambda run: report._samples(run, 2))


def test_a_schedule_of_the_task_s_own_has_no_picture(tmp_path, monkeypatch):
  workdir = save(tmp_path / "w", small_config("digits"), blocks=())
  monkeypatch.setattr(image.ImageTask, "make_schedule",
                      staticmethod(lambda config: types.SimpleNamespace()))
  assert "Left out: schedule: of a SimpleNamespace there is no picture" in words_of(workdir)


def test_scores_that_are_numpy_s_or_jax_s_are_shown(digits, monkeypatch):
  rows = [dict(guidance=np.float64(1), accuracy=jnp.float32(0.625), num_samples=np.int64(7))]
  monkeypatch.setattr(model_lib.Model, "evaluate", lambda self, num_samples: dict(
      losses=[np.float32(0.5), 0.5], quality=rows))
  run = workdir_lib.read(digits, evaluate=7)
  assert run.scores == dict(losses=[0.5, 0.5], quality=[
      dict(guidance=1.0, accuracy=0.625, num_samples=7)])
  assert run.headline == {"accuracy, guidance 1": 0.625} and "of 7 samples" in run.source


@pytest.mark.slow
def test_scores_can_be_made_with_the_page(digits, tmp_path):
  run = workdir_lib.read(digits, evaluate=20)
  assert run.scores["quality"][0]["num_samples"] == 20
  assert "of 20 samples, made with this page" in report.page([run], num_samples=0)


# ---- in a browser --------------------------------------------------------------------------------


class Browser:
  """Headless Chromium, spoken to by its DevTools protocol over two pipes."""

  def __init__(self, program, profile):
    down, up = os.pipe(), os.pipe()
    self._process = subprocess.Popen(
        ["bash", "-c", f'exec "$@" 3<&{down[0]} 4>&{up[1]}', "bash", program, "--headless",
         "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe",
         f"--user-data-dir={profile}"], pass_fds=(down[0], up[1]), stderr=subprocess.DEVNULL)
    os.close(down[0])
    os.close(up[1])
    self._to, self._from, self._rest, self._number = down[1], up[0], b"", 0
    self.events = []

  def close(self):
    with contextlib.suppress(OSError):
      self.send("Browser.close")
    os.close(self._to)
    os.close(self._from)
    self._process.wait(timeout=60)

  def _next(self):
    while b"\0" not in self._rest:
      assert select.select([self._from], [], [], 120)[0], "Chromium does not answer"
      part = os.read(self._from, 2**20)
      assert part, "Chromium has ended"
      self._rest += part
    message, _, self._rest = self._rest.partition(b"\0")
    return json.loads(message)

  def send(self, method, session=None, **params):
    """The result of a command; events that come before it are noted."""
    self._number += 1
    message = dict(id=self._number, method=method, params=params) | (
        dict(sessionId=session) if session else {})
    os.write(self._to, json.dumps(message).encode() + b"\0")
    while (answer := self._next()).get("id") != self._number:
      self.events.append(answer)
    assert "error" not in answer, answer
    return answer["result"]

  def open(self, path, width, height, scheme):
    """A page in a window of its own, once it has loaded; returns what evaluates there."""
    self.events.clear()
    target = self.send("Target.createTarget", url="about:blank")["targetId"]
    session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"):
      self.send(f"{domain}.enable", session)
    self.send("Emulation.setDeviceMetricsOverride", session, width=width, height=height,
              deviceScaleFactor=1, mobile=width < 800)
    self.send("Emulation.setEmulatedMedia", session, features=[
        dict(name="prefers-color-scheme", value=scheme)])
    self.send("Page.navigate", session, url=path.as_uri())
    while not any(event["method"] == "Page.loadEventFired" for event in self.events):
      self.events.append(self._next())
    evaluate = lambda script: self.send("Runtime.evaluate", session, expression=script,
                                        returnByValue=True)["result"].get("value")
    shot = lambda: base64.b64decode(self.send("Page.captureScreenshot", session)["data"])
    return evaluate, shot


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
  program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser",
                                                 "google-chrome"))), None)
  if program is None:
    missing = "no Chromium here: apt-get install chromium"
    (pytest.fail if os.environ.get("DBJAX_BROWSER") else pytest.skip)(missing)
  opened = Browser(program, tmp_path_factory.mktemp("chromium"))
  yield opened
  opened.close()


@pytest.fixture(scope="module")
def pages(digits, tmp_path_factory):
  """Files: of one run, of two, of a text and of one that is not trained yet."""
  where = tmp_path_factory.mktemp("pages")
  text = config_lib.changed(small_config("gcide_masked"), **{"sample.num_steps": 4})
  long = save(where / ("a-very-long-name-without-a-break-" * 4), small_config("digits"), blocks=())
  runs = dict(one=[digits], two=[digits, save(where / "text", text)], bare=[long])
  for name, workdirs in runs.items():
    (where / f"{name}.html").write_text(
        report.page([workdir_lib.read(w) for w in workdirs], num_samples=10), encoding="utf-8")
  return {name: where / f"{name}.html" for name in runs}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width, height", [(390, 844), (1280, 900)])
@pytest.mark.parametrize("name", ["one", "two", "bare"])
def test_in_a_browser_nothing_overflows_and_all_has_loaded(browser, pages, name, width, height,
                                                           scheme):
  evaluate, shot = browser.open(pages[name], width, height, scheme)
  assert evaluate("innerWidth") == width
  assert evaluate("document.scrollingElement.scrollWidth") <= width
  outside = evaluate("""[...document.querySelectorAll('main *')].filter(x => {
    for (let box = x.parentElement; box; box = box.parentElement)
      if (getComputedStyle(box).overflowX != 'visible') return false;
    return x.getBoundingClientRect().right > innerWidth + 1; }).map(x => x.outerHTML.slice(0, 99))
    .join()""")
  assert outside == ""
  loaded = evaluate("[...document.images].every(x => x.complete && x.naturalWidth > 0)")
  assert loaded and evaluate("document.images.length") == dict(one=1, two=1, bare=0)[name]
  noise = [event for event in browser.events if event["method"] in (
      "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded",
      "Network.loadingFailed")]
  assert noise == []
  asked = {event["params"]["request"]["url"].partition(":")[0] for event in browser.events
           if event["method"] == "Network.requestWillBeSent"}
  assert asked <= {"file", "data"}
  seen = np.asarray(Image.open(io.BytesIO(shot())).convert("L"), float)
  assert seen.shape == (height, width)
  assert (np.median(seen) > 200) == (scheme == "light") and seen.std() > 10  # ink on a ground
  ink = evaluate("getComputedStyle(document.querySelector('svg text')).fill")  # "rgb(27, 29, 33)"
  assert (max(map(int, re.findall(r"\d+", ink))) < 100) == (scheme == "light")
