"""Folders of images, as people have them: the right pixels and labels, or one line why not."""

from collections import Counter
import io
import os
import struct
import unicodedata
import zlib

from conftest import load_config
from etils import epath
import numpy as np
from PIL import Image
import pytest

from dbjax import config as config_lib
from dbjax import data
from dbjax import prepare
from dbjax.data import records
from dbjax.data import tfds as tfds_lib
from dbjax.errors import UserError
from dbjax.sources import folder
from dbjax.sources import report

RED = (200, 0, 0)


def file_of(image, kind="PNG", **options):
  """An image or an array as the content of a file."""
  file = io.BytesIO()
  image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
  image.save(file, kind, **options)
  return file.getvalue()


def plain(colour=RED, size=(16, 16)):
  return Image.new("RGB" if isinstance(colour, tuple) else "L", size, colour)


def lay_out(where, files):
  """Writes {path: content, an image or an array}."""
  for name, content in files.items():
    path = where / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else file_of(content))
  return epath.Path(where)


def found(where, files, **options):
  """{split: [class/file, ...]} of the files in a folder."""
  splits = folder.find(lay_out(where, files), **options).splits
  return {s: [f"{name}/{path.name}" if name else path.name for path, name in of_split]
          for s, of_split in splits.items()}


def stored(tmp_path, files, split="train", size=16, **options):
  """The images of a split as they are stored, one after the other; what is said; config fields."""
  source, seen = folder.source(lay_out(tmp_path / "in", files), **options), Counter()
  path = prepare.write(tmp_path / "out", "mine", report.watched(source, seen))
  words, fields = report.of_images(path, seen)
  images = tfds_lib.read_split("mine", split, str(tmp_path / "out"), size)
  images = images.take(np.arange(len(images)))["image"]
  in_order = np.argsort(np.random.default_rng(0).permutation(len(images)))  # as files are
  return (images[in_order], f"{words}\n{source.report()}",
          fields | source.fields())


def palette_with_a_hole():
  """Black, where the file says that colour 0, a dark green, is transparent; a half each."""
  image = Image.new("P", (16, 16), 0)
  image.putpalette([0, 60, 0, 0, 0, 0])
  image.paste(1, (0, 0, 16, 8))
  return file_of(image, transparency=0)


KINDS = {  # of file: its content, and the colour that it has, over a white background
    "rgb.png": (file_of(plain()), RED),
    "palette.png": (file_of(plain().quantize(4)), RED),
    "bits.png": (file_of(Image.new("1", (16, 16), 1)), (255,) * 3),
    "grey.png": (file_of(plain(77)), (77,) * 3),
    "grey_alpha.png": (file_of(Image.new("LA", (16, 16), (100, 51))), (224,) * 3),
    "clear.png": (file_of(Image.new("RGBA", (16, 16), (0, 60, 0, 0))), (255,) * 3),
    "half.png": (file_of(Image.new("RGBA", (16, 16), (200, 0, 0, 128))), (227, 127, 127)),
    "opaque.png": (file_of(Image.new("RGBA", (16, 16), (*RED, 255))), RED),
    "keyed.png": (file_of(plain((1, 2, 3)), transparency=(1, 2, 3)), (255,) * 3),
    "deep.png": (file_of(np.full((16, 16), 50_000, np.uint16)), (195,) * 3),
    "deep_dark.tif": (file_of(np.full((16, 16), 10_000, np.uint16), "TIFF"), (39,) * 3),
    "deep.pgm": (b"P5 16 16 65535\n" + struct.pack(">256H", *[50_000] * 256), (195,) * 3),
    "cmyk.jpg": (file_of(Image.new("CMYK", (16, 16), (0, 255, 255, 55)), "JPEG"), RED),
    "ycc.tiff": (file_of(plain().convert("YCbCr"), "TIFF"), RED),
    "progressive.jpeg": (file_of(plain(), "JPEG", progressive=True, quality=95), RED),
    "moves.gif": (file_of(plain(), "GIF", save_all=True, append_images=[plain((0, 0, 9))]), RED),
    "moves.webp": (file_of(plain(), "WEBP", save_all=True, lossless=True,
                           append_images=[plain((0, 0, 9))]), RED),
    "moves.png": (file_of(plain(), save_all=True, append_images=[plain((0, 0, 9))]), RED),
    "lossless.webp": (file_of(plain(), "WEBP", lossless=True), RED),
    "windows.bmp": (file_of(plain(), "BMP"), RED),
    "named_wrongly.png": (file_of(plain(), "JPEG", quality=95), RED),
    "pixel.png": (file_of(plain(size=(1, 1))), RED),
    "UPPER.PNG": (file_of(plain()), RED),
}


def test_every_kind_of_file_has_its_colours(tmp_path):
  """All of them in one folder, so that what comes first, a grey one, says nothing of the others."""
  files = {f"train/a/{name}": content for name, (content, _) in KINDS.items()}
  first = {"train/a/0.png": plain(3), "test/a/0.png": plain(3)}
  images, words, _ = stored(tmp_path, files | first)
  names = sorted(["0.png", *KINDS])
  for name, image in zip(names, images, strict=True):
    expected = KINDS[name][1] if name in KINDS else (3, 3, 3)
    tolerance = 3 if image.shape != (16, 16, 3) or name.endswith(("g", "tiff")) else 0
    assert abs(image.astype(int) - expected).max() <= tolerance, name
  for part in ("3 of 16 bits", "3 first frame of several", "5 transparent, over the background",
                "1 from CMYK", "1 to 16 x 1 to 16 pixels (width x height), stored in colour"):
    assert part in words, words


def test_a_hole_shows_the_background(tmp_path):
  files = {"a/0.png": palette_with_a_hole(), "a/1.png": palette_with_a_hole()}
  for colour, expected in (("white", 255), ("#808080", 128)):
    (image,), *_ = stored(tmp_path / colour, files, background=colour)
    assert image.shape == (16, 16, 3)
    assert image[:8].max() == 0 and (image[8:] == expected).all()
  with pytest.raises(UserError, match="--background=whyte: expected a colour, such as white"):
    folder.source(epath.Path(tmp_path / "white/in"), background="whyte")


@pytest.mark.parametrize("orientation, turn", [
    (1, lambda x: x), (2, np.fliplr), (3, lambda x: np.rot90(x, 2)), (4, np.flipud),
    (5, lambda x: x.transpose(1, 0, 2)), (6, lambda x: np.rot90(x, -1)),
    (7, lambda x: np.rot90(x.transpose(1, 0, 2), 2)), (8, np.rot90)])
def test_rotation_by_exif_is_applied(tmp_path, orientation, turn):
  pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
  exif = Image.Exif()
  exif[0x0112] = orientation
  content = file_of(pixels, exif=exif)
  (tmp_path / "x.png").write_bytes(content)
  _, image, as_it_is, _ = folder._read(epath.Path(tmp_path / "x.png"), "RGB", (255,) * 3)
  np.testing.assert_array_equal(np.asarray(image), turn(pixels))
  assert as_it_is == (orientation == 1)  # else its bytes would still be turned


def test_images_that_are_all_grey_have_one_channel(tmp_path):
  grey = Image.new("P", (16, 16), 1)
  grey.putpalette([9, 9, 9, 77, 77, 77])
  files = {"a/0.png": plain(77), "a/1.gif": file_of(plain(77), "GIF"), "a/2.png": grey,
           "a/3.png": Image.new("LA", (16, 16), (77, 255)), "a/4.jpg": file_of(plain(77), "JPEG")}
  images, words, fields = stored(tmp_path, files)
  assert images.shape == (4, 16, 16, 1) and (images == 77).all()
  assert fields["data.channels"] == 1


def enormous():
  """A PNG that says it has 20,000 x 20,000 pixels, in a few bytes."""
  chunk = lambda kind, x: struct.pack(">I", len(x)) + kind + x + struct.pack(
      ">I", zlib.crc32(kind + x))
  header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99)))


@pytest.mark.parametrize("name, content, words", [
    ("bad.png", b"no image", "is no image of a kind that Pillow reads: mend or remove it"),
    ("bad.png", b"", "is no image of a kind"),
    ("bad.jpg", file_of(np.zeros((64, 64, 3), "u1"), "JPEG")[:-200], "runcated.*mend or remove it"),
    ("bad.png", file_of(Image.effect_noise((8, 8), 9))[:50], "can be read .*mend or remove it"),
    ("bad.png", enormous(), "is too large .*400000000 pixels.*scale it down, or remove it"),
    ("bad.tif", file_of(np.ones((8, 8), np.float32), "TIFF"), "has numbers of 32 bits.*8 or 16"),
    ("bad.tif", file_of(np.ones((8, 8), np.int32), "TIFF"), "has numbers of 32 bits.*8 or 16"),
])
def test_what_is_no_image_is_named_and_leaves_nothing(tmp_path, name, content, words):
  files = {"train/a/0.png": plain(), f"train/a/{name}": content, "test/a/0.png": plain()}
  with pytest.raises(UserError, match=f"train/a/{name} .*{words}") as error:
    stored(tmp_path, files)
  assert "\n" not in str(error.value) and "0x" not in str(error.value)
  assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
  (tmp_path / "in/train/a" / name).unlink()
  images, *_ = stored(tmp_path, {})
  assert len(images) == 1


def test_files_of_the_system_and_no_images_are_passed_over(tmp_path):
  """None becomes a class, none moves a label, and how many there were is said."""
  files = {f"{split}/{name}/{i}.png": plain(size=(4, 4)) for split in ("train", "test")
           for name in ("cat", "dog") for i in range(2)}
  junk = ["._x", "__MACOSX/train/cat/._0.png", "train/.ipynb_checkpoints/0-checkpoint.png",
          "train/cat/._0.png", "train/cat/.DS_Store", "train/dog/Thumbs.db", "train/desktop.ini"]
  others = ["README.md", "train/cat/notes.txt", "train/cat/LICENSE"]
  where = lay_out(tmp_path, files | dict.fromkeys(junk + others, b"junk"))
  got = folder.find(where)
  assert got.classes == ["cat", "dog"]
  assert {s: len(x) for s, x in got.splits.items()} == dict(train=4, test=4)
  assert got.passed_over == {"hidden, or the system's own": 7, "no image: .md": 1,
                             "no image: .txt": 1, "no image: no suffix": 1}


def test_folders_inside_a_class_are_of_the_class(tmp_path):
  files = {"train/cat/0.png": plain(), "train/cat/b/c/1.png": plain(), "train/cat/a/2.png": plain(),
           "test/cat/x/3.png": plain()}
  assert found(tmp_path, files) == dict(train=["cat/0.png", "cat/2.png", "cat/1.png"],
                                        test=["cat/3.png"])


def test_links(tmp_path):
  """To files and folders they are followed, in a circle they are not, and broken ones are named."""
  lay_out(tmp_path / "in", {"train/a/0.png": plain(), "test/a/0.png": plain()})
  lay_out(tmp_path / "elsewhere", {"1.png": plain(), "b/2.png": plain()})
  os.symlink(tmp_path / "elsewhere/1.png", tmp_path / "in/train/a/link.png")
  os.symlink(tmp_path / "elsewhere/b", tmp_path / "in/train/a/b")
  os.symlink(tmp_path / "in/train/a", tmp_path / "in/train/a/round")
  got = folder.find(epath.Path(tmp_path / "in"))
  assert [path.name for path, _ in got.splits["train"]] == ["0.png", "2.png", "link.png"]
  assert got.passed_over == {"a link to a folder around it": 1}
  os.symlink(tmp_path / "in/train/a/0.png", tmp_path / "in/test/a/again.png")
  got = folder.find(epath.Path(tmp_path / "in"))
  assert [path.name for path, _ in got.splits["test"]] == ["0.png"]
  assert got.passed_over["an image that is here already"] == 1
  os.symlink(tmp_path / "nothing.png", tmp_path / "in/train/a/broken.png")
  with pytest.raises(UserError, match="train/a/broken.png is no image that can be read .*No such"):
    stored(tmp_path, {})


def test_what_is_named_is_left_out(tmp_path):
  files = {"train/a/0.png": plain(), "train/a/old/1.png": plain(), "train/b/big.png": plain(),
           "train/c/2_old.png": plain(), "test/a/3.png": plain()}
  assert found(tmp_path, files, skip=["old", "big.png", "*_old.png"]) == dict(
      train=["a/0.png"], test=["a/3.png"])  # b and c are no classes any more
  with pytest.raises(UserError, match="--skip=olf: no image in .* is called so, nor a folder ar"):
    found(tmp_path, files, skip=["old", "olf"])


def test_names_of_classes(tmp_path):
  """In the letters of any language; the same letters written in two ways are one class."""
  one, other = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
  assert one != other
  files = {f"train/{one}/0.png": plain(1), "train/犬 2/0.png": plain(2),
           f"test/{other}/0.png": plain(3), "test/犬 2/0.png": plain(4)}
  *_, fields = stored(tmp_path, files)
  split = records.Split("mine", "test", str(tmp_path / "out"))
  assert split.features["label"].names == [one, "犬 2"]
  assert [e["label"] for e in split.read(np.arange(2))] == [0, 1]
  assert fields["data.num_classes"] == 2


@pytest.mark.parametrize("files, expected", [
    # no splits: an even share is held out
    ({f"{c}/{i}.png": 0 for c in "ab" for i in range(10)},
     dict(train=[f"{c}/{i}.png" for c in "ab" for i in range(10) if i not in (2, 7)],
          test=["a/2.png", "a/7.png", "b/2.png", "b/7.png"])),
    # one split is as none
    ({f"train/a/{i}.png": 0 for i in range(5)},
     dict(train=["a/0.png", "a/1.png", "a/3.png", "a/4.png"], test=["a/2.png"])),
    # no classes
    ({f"{s}/{i}.png": 0 for s in ("train", "val") for i in range(2)},
     dict(train=["0.png", "1.png"], val=["0.png", "1.png"])),
    ({"0.png": 0, "1.png": 0}, dict(train=["0.png"], test=["1.png"])),
    # classes that are called as splits are, among others
    ({"train/0.png": 0, "bus/0.png": 0, "bus/1.png": 0},
     dict(train=["bus/0.png", "train/0.png"], test=["bus/1.png"])),
])
def test_layouts(tmp_path, files, expected):
  share = {} if "val" in expected else dict(held_out=0.2)  # val is a split already
  assert found(tmp_path, dict.fromkeys(files, b""), **share) == expected


def test_splits_of_other_names_are_said_by_a_flag(tmp_path):
  files = dict.fromkeys(["a/cat/0.png", "b/cat/0.png", "c/cat/0.png"], b"")
  with pytest.raises(UserError, match=r"c lies beside the splits a, b: .*--splits=train,test"):
    found(tmp_path, files, names=("a", "b"))
  assert found(tmp_path, {}, names=("a", "b", "c")) == dict.fromkeys("abc", ["cat/0.png"])
  with pytest.raises(UserError, match="--splits=a,d: .* has no folder d, only a, b, c"):
    found(tmp_path, {}, names=("a", "d"))


@pytest.mark.parametrize("files, words", [
    ([], "expected a folder of images"),
    (["train/a/notes.txt"], "there are no images in it, of .png.*CLASS/FILE"),
    (["train/cat/0.png", "test/cat/0.png", "train/dog/x.txt"], "the class dog has no images: rem"),
    (["train/Cat/0.png", "test/cat/0.png"], "the classes cat and Cat differ in case only"),
    (["train/cat/0.png", "train/1.png", "test/cat/0.png"], "train/1.png lies beside folders of c"),
    (["train/cat/0.png", "test/cat/0.png", "2.png"], "2.png lies beside the splits test, t"),
    (["train/cat/0.png", "test/0.png"], "some splits have folders of classes,"),
    (["train/ cat/0.png", "test/ cat/0.png"], "the class ' cat' begins or ends with a space"),
    (["a/0.png"], "one image cannot be trained on and be held out too"),
])
def test_what_is_not_clear_is_refused(tmp_path, files, words):
  with pytest.raises(UserError, match=words) as error:
    found(tmp_path / "in", dict.fromkeys(files, b""))
  assert "\n" not in str(error.value)


def test_images_may_be_scaled_beforehand(tmp_path):
  """They are then what would be read of those that were not."""
  rng = np.random.default_rng(0)
  sizes = [(300, 200), (16, 40), (20, 20), (5, 7)]
  files = {f"train/a/{i}.png": rng.integers(0, 256, (*size, 3)).astype(np.uint8)
           for i, size in enumerate(sizes)} | {"test/a/0.png": plain()}
  late, *_ = stored(tmp_path / "late", files, size=20)
  early, words, fields = stored(tmp_path / "early", files, image_size=20)
  np.testing.assert_array_equal(early, late)
  assert fields["data.image_size"] == 20 and "4 scaled to 20 x 20" in words
  split = records.Split("mine", "train", str(tmp_path / "early/out"))
  assert tuple(split.features["image"].shape) == (20, 20, 3)


def test_classes_are_mixed_in_what_is_written(tmp_path):
  """A slice, such as train[:50%], has all of them; images keep their labels."""
  files = {f"{name}/{i}.png": plain(value + i, size=(4, 4)) for name, value in
           (("cat", 0), ("dog", 100), ("eel", 200)) for i in range(30)}
  path = prepare.write(tmp_path / "out", "mine", folder.source(lay_out(tmp_path / "in", files)))
  images = tfds_lib.read_split("mine", "train[:50%]", str(path.parents[1]), 4)
  batch = images.take(np.arange(len(images)))
  assert (np.bincount(batch["label"], minlength=3) > 5).all()
  np.testing.assert_array_equal(batch["label"], batch["image"][:, 0, 0, 0] // 100)


@pytest.mark.parametrize("files, options, words", [
    ({"my train/a/0.png": plain(), "test/a/0.png": plain()}, dict(names=("my train", "test")),
     "the split 'my train': expected letters, digits and underscores"),
    ({os.fsdecode(b"caf\xe9/0.png"): plain(), "tea/0.png": plain()}, {},
     r"the class 'caf\\udce9' is no UTF-8: rename its folders"),
])
def test_names_that_cannot_be_written_are_refused_before_any_work(tmp_path, files, options, words):
  with pytest.raises(UserError, match=words) as error:
    stored(tmp_path, files, **options)
  str(error.value).encode()
  assert not (tmp_path / "out").exists()


def test_the_report_counts_measures_and_shows(tmp_path):
  files = {"train/cat/0.png": plain(0), "train/cat/1.png": plain(255), "train/dog/0.png": plain(0),
           "test/cat/0.png": plain(9)}
  images, words, fields = stored(tmp_path, files)
  table = [line.split() for line in words.splitlines()]
  assert table[1:4] == [["cat", "2", "1"], ["dog", "1", "0"], ["all", "3", "1"]]
  assert ["note:", "test", "has", "no", "images", "of", "dog"] in table
  values = images / 127.5 - 1
  assert f"mean {values.mean():.3f} and standard deviation {values.std():.3f}" in words
  with Image.open(tmp_path / "out/mine/1.0.0" / report.PREVIEW) as preview:
    assert np.asarray(preview.convert("L")).std() > 10 and preview.width > preview.height


@pytest.mark.parametrize("share, words", [(0, "none is held out"), (1, "none is trained on")])
def test_both_splits_are_to_have_images(tmp_path, share, words):
  with pytest.raises(UserError, match=f"--held_out={share}: of the 2 images .* {words}"):
    found(tmp_path, {"0.png": b"", "1.png": b""}, held_out=share)


@pytest.mark.parametrize("share", [float("nan"), float("inf"), -0.1, 1.5])
def test_a_share_is_a_number_from_0_to_1(tmp_path, share):
  with pytest.raises(UserError, match=f"^--held_out={share}: expected a finite number, from 0"):
    found(tmp_path, {"0.png": b"", "1.png": b""}, held_out=share)


def test_splits_that_are_there_leave_no_share_to_hold_out(tmp_path):
  files = {"train/0.png": b"", "test/1.png": b""}
  assert found(tmp_path, files) == dict(train=["0.png"], test=["1.png"])
  with pytest.raises(UserError, match="^--held_out=0.1: .* has the splits t.*, t.* already: leave"):
    found(tmp_path, files, held_out=0.1)


@pytest.mark.parametrize("arguments, words", [
    (["--what=folder", "--tokenizer=bytes"],
     "--tokenizer=bytes: expected only with --what=text, and not with folder: leave it out"),
    (["--what=folder", "--vocab_size=8000"], "--vocab_size=8000: expected only with --what=text"),
    (["--what=folder", "--encode=a:b"], "--encode=a:b: expected only with --what=latents"),
    (["--what=text", "--image_size=32"], "--image_size=32: expected only with --what=folder or "
     "latents, and not with text: leave it out"),
    (["--what=text", "--splits=train,test"], "--splits=train,test: expected only with"),
    (["--what=fashion_mnist", "--held_out=0.05"], "--held_out=0.05: expected only with")])
def test_flags_of_another_source_are_refused(forked, tmp_path, arguments, words):
  done = forked("prepare", *arguments, f"--source={tmp_path}", "--name=mine")
  assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


def test_what_the_command_prints_is_a_config_that_fits(forked, tmp_path):
  rng = np.random.default_rng(0)
  lay_out(tmp_path / "in", {f"{name}/{i}.png": rng.integers(0, 256, (20, 16)).astype(np.uint8)
                            for name in ("cat", "dog") for i in range(40)})
  arguments = ("prepare", "--what=folder", f"--source={tmp_path / 'in'}", "--name=pets",
               f"--data_dir={tmp_path / 'out'}", "--held_out=0.25", "--image_size=16")
  done = forked(*arguments)
  assert done.returncode == 0, done.stderr
  assert ["all", "60", "20"] in [line.split() for line in done.stdout.splitlines()]
  fields = dict(word.removeprefix("--config.").split("=") for word in done.stdout.split()
                if word.startswith("--config."))
  config = config_lib.resolve(load_config(**fields, **{"train.batch_size": 8}))
  dataset = data.load(config)
  assert (len(dataset.train), len(dataset.held_out)) == (60, 20)
  again = forked(*arguments)
  assert again.returncode == 2 and "pets/1.0.0 exists: remove it first" in again.stderr
  (tmp_path / "out/pets/1.0.0").rename(tmp_path / "out/pets/3.0.2")  # would be read in its place
  again = forked(*arguments)
  assert again.returncode == 2 and "pets/3.0.2 exists: remove it first" in again.stderr
