"""What comes from strangers is data: checked before memory is taken, never run."""

import json
import os
import shutil
import subprocess
import zipfile

from conftest import load_config
from conftest import random_workdir
from etils import epath
import numpy as np
import pytest
import tensorstore as ts

from dbjax import assemble
from dbjax import checkpoint
from dbjax import config as config_lib
from dbjax import fork
from dbjax import loading
from dbjax import pretrained
from dbjax import trust
from dbjax.errors import UserError

SMALL = {"num_blocks": 1, "model.num_layers": 1, "model.width": 16, "model.num_heads": 2,
         "model.unroll": 1}


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
  """A workdir of one block."""
  workdir = tmp_path_factory.mktemp("honest") / "run"
  random_workdir(workdir, config_lib.resolve(load_config(**SMALL)))
  return workdir


@pytest.fixture
def workdir(honest, tmp_path):
  """A copy of it, to be changed."""
  return shutil.copytree(honest, tmp_path / "run")


def refused(workdir, match):
  """Loading and assembling both say so in one line."""
  for use in (lambda: loading.load(workdir),
              lambda: assemble.assemble([workdir], workdir.parent / "out")):
    with pytest.raises(UserError, match=match) as error:
      use()
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
  assert not (workdir.parent / "out").exists()


def edit(path, **fields):
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_an_honest_workdir_is_read_through_links_of_the_users_own(workdir, tmp_path):
  expected = checkpoint.checksum(loading.load(workdir).params)
  (tmp_path / "link").symlink_to(workdir)
  assert checkpoint.checksum(loading.load(tmp_path / "link").params) == expected
  shutil.move(workdir / "block_00", tmp_path / "other disk")
  (workdir / "block_00").symlink_to(tmp_path / "other disk")
  assert checkpoint.checksum(loading.load(workdir).params) == expected
  item = workdir / "block_00/5/ema"  # a link that stays inside
  shutil.move(item / "_METADATA", item / "inside")
  (item / "_METADATA").symlink_to("inside")
  assert checkpoint.checksum(loading.load(workdir).params) == expected


@pytest.mark.parametrize("what", ["5", "5/ema", "5/ema/_METADATA", "5/meta/metadata"])
def test_a_link_out_of_a_block_is_refused(workdir, tmp_path, what):
  path = workdir / "block_00" / what
  shutil.move(path, tmp_path / "outside")
  path.symlink_to(tmp_path / "outside")
  refused(workdir, f"block_00/{what} is a link to .*outside, outside .*: nothing there is read")


@pytest.mark.parametrize("change, match", [
    (lambda path: path.rename(path.parent.parent / "outside") and path.symlink_to(
        path.parent.parent / "outside"), "block_00/5 is a link to .*outside"),
    (lambda path: edit(path / "meta/metadata", seconds=7.0), "block_00.*metadata")])
def test_a_fork_and_a_start_read_no_more_than_load(workdir, tmp_path, change, match):
  trust.write_sums(workdir / "block_00")
  change(workdir / "block_00/5")
  config = load_config(**SMALL | {"train.init_from": str(workdir)})
  uses = (lambda: pretrained.load(config_lib.resolve(config)),
          lambda: fork.fork(epath.Path(workdir), epath.Path(tmp_path / "new"), (0,),
                            config_lib.resolve(load_config(**SMALL)), None))
  for use in uses:
    with pytest.raises(UserError, match=match):
      use()
  assert not (tmp_path / "new").exists()


def test_a_config_that_is_a_link_out_of_the_workdir_is_refused(workdir, tmp_path):
  shutil.move(workdir / "config.json", tmp_path / "outside")
  (workdir / "config.json").symlink_to(tmp_path / "outside")
  with pytest.raises(UserError, match="config.json is a link to .*outside, outside "):
    loading.load(workdir)


def test_a_pipe_in_a_block_is_refused_and_not_waited_for(workdir):
  (workdir / "block_00/5/meta/metadata").unlink()
  os.mkfifo(workdir / "block_00/5/meta/metadata")
  with pytest.raises(UserError, match="metadata is neither a file nor a directory"):
    loading.load(workdir)


@pytest.mark.parametrize("claim, match", [
    (dict(shape=[10**6, 10**7], chunks=[10**6, 10**7]), "other shapes .* expected <f4"),
    (dict(chunks=[10**6, 10**7]), "in parts of .10000"),
    (dict(chunks=None), "in parts of None"), (dict(chunks=[1, "1"]), "in parts of .1, '1'"),
    (dict(dtype="<f8"), "expected <f4"), (dict(dtype="|O"), "expected <f4"),
    ([1, 2], "no object in JSON")])
def test_an_array_that_claims_another_shape_is_refused_unread(workdir, claim, match):
  for item in ("ema", "params"):
    base = dict(driver="file", path=f"{workdir}/block_00/5/{item}/")
    store = ts.KvStore.open(dict(driver="ocdbt", base=base)).result()
    name = next(n for n in store.list().result() if n.endswith(b"kernel/.zarray"))
    meta = json.loads(store.read(name).result().value)
    claimed = meta | claim if isinstance(claim, dict) else claim
    store.write(name, json.dumps(claimed).encode()).result()
  refused(workdir, match)


def test_arrays_that_the_config_does_not_have_are_refused(workdir):
  path = workdir / "block_00/5/meta/metadata"
  config = json.loads(path.read_text())["config"]
  edit(path, config=config | {"model.width": 2**14})  # terabytes
  flat = config_lib.unflatten(config | {"model.width": 2**14})
  (workdir / "config.json").write_text(json.dumps(flat.to_dict()))
  refused(workdir, "other shapes than this network's")


def test_more_than_the_memory_is_refused(tmp_path):
  with pytest.raises(UserError, match="holds 1,000,000.0 GB, and this machine has"):
    trust.check_memory(epath.Path("ema"), 10**15)


@pytest.mark.parametrize("where", ["config.json", "block_00/5/meta/metadata"])
@pytest.mark.parametrize("content", ["huge", "[" * 100_000, "[]", "7", '{"a": ', "\0", "{}"])
def test_json_that_is_enormous_or_none(workdir, where, content):
  if content == "huge":
    with (workdir / where).open("wb") as file:
      file.truncate(10**11)  # it takes no room on the disk
  else:
    (workdir / where).write_text(content)
  with pytest.raises(UserError) as error:
    loading.load(workdir)
  assert "\n" not in str(error.value)
  if content == "huge":
    assert "it has 100000000000 bytes, expected at most" in str(error.value)


@pytest.mark.parametrize("fields", [
    dict(checksum=7), dict(checksum={"ema": "x"}), dict(health=["a"]), dict(seconds=None),
    dict(trained_with=[]), dict(trained_with={"dbjax": 1, "code": {"a": 1}, "data": 0}),
    dict(config=[1]), dict(step="5"), dict(block=None)])
def test_a_meta_of_wrong_types(workdir, fields):
  edit(workdir / "block_00/5/meta/metadata", **fields)
  refused(workdir, "meta cannot be read, .* is not as dbjax writes it")


@pytest.fixture
def frozen(tmp_path):
  """The table of a workdir that has one."""
  config = config_lib.resolve(load_config("digits_classify", **SMALL))
  random_workdir(tmp_path / "run", config)
  (path,) = (tmp_path / "run").rglob("frozen.npz")
  return path


def write_npz(path, shape, dtype="<f4", content=b"", how=zipfile.ZIP_STORED):
  with np.load(path) as arrays:
    names = list(arrays)
  header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
  with zipfile.ZipFile(path, "w", how) as archive:
    for name in names:
      archive.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little")
                       + header.encode() + content)


@pytest.mark.parametrize("wrong, match", [
    (dict(shape=(10**5, 250_000)), "claims 100000000000 bytes, and has 0"),
    (dict(shape=(1,), dtype="|O", content=b"x" * 8), "it holds object, expected numbers"),
    (dict(shape=(3, 2), content=b"x" * 24), r"frozen.npz holds .*\[3, 2\], expected"),
    (dict(shape=(2**20,), content=bytes(2**22), how=zipfile.ZIP_DEFLATED), "is compressed")])
def test_a_table_that_claims_too_much(frozen, wrong, match):
  write_npz(frozen, **wrong)
  refused(frozen.parents[1], match)


def test_weights_that_are_not_finite_are_not_assembled(tmp_path):
  with np.errstate(invalid="ignore"):
    random_workdir(tmp_path / "run", config_lib.resolve(load_config(**SMALL)), scale=np.nan)
  with pytest.raises(UserError, match="its weights are not all finite"):
    assemble.assemble([tmp_path / "run"], tmp_path / "out")


@pytest.mark.parametrize("field", ["task.name", "model.network", "data.name"])
@pytest.mark.parametrize("name", ["subprocess:Popen", "os:system", "planted:Net",
                                  "run.block_00.planted:Net"])
def test_no_code_comes_out_of_a_workdir(workdir, tmp_path, monkeypatch, field, name):
  """Nor is any of Python's own called by a name in it."""
  monkeypatch.chdir(workdir.parent if name.startswith("run.") else workdir)
  for folder in (workdir, workdir / "block_00"):
    (folder / "planted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
  section, _, leaf = field.partition(".")
  config = json.loads((workdir / "config.json").read_text())
  config[section][leaf] = name
  (workdir / "config.json").write_text(json.dumps(config))
  meta = workdir / "block_00/5/meta/metadata"
  edit(meta, config=json.loads(meta.read_text())["config"] | {field: name})
  with pytest.raises(UserError, match=f"{field}={name}: .*(is run|Python's own)"):
    loading.load(workdir).dataset()
  assert not (tmp_path / "ran").exists()


def test_sums_are_those_of_sha256sum(workdir):
  path = trust.write_sums(epath.Path(workdir))
  subprocess.run(["sha256sum", "--check", "--strict", "--quiet", path.name], cwd=workdir,
                 check=True)
  (workdir / "samples.npz").write_bytes(b"")  # nobody reads it
  loading.load(workdir)
  trust.write_sums(epath.Path(workdir / "block_00"))
  theirs = subprocess.run("find . -type f ! -name SHA256SUMS | xargs sha256sum", shell=True,
                          cwd=workdir, capture_output=True, check=True).stdout
  (workdir / "SHA256SUMS").write_bytes(theirs)
  with pytest.raises(UserError, match="block_00/SHA256SUMS was added"):
    loading.load(workdir)
  (workdir / "block_00/SHA256SUMS").unlink()
  loading.load(workdir)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("what, match", [
    ("change", "block_00/5/_CHECKPOINT_METADATA differs from its sum"),
    ("remove", "block_00/5/_CHECKPOINT_METADATA is missing"),
    ("add", "block_00/5/new was added")])
def test_a_file_that_is_not_as_its_sum(workdir, what, match, whole):
  trust.write_sums(epath.Path(workdir if whole else workdir / "block_00"))
  path = workdir / "block_00/5/_CHECKPOINT_METADATA"
  if what == "change":
    path.write_bytes(path.read_bytes() + b" ")
  elif what == "remove":
    path.unlink()
  else:
    path.with_name("new").write_text("")
  refused(workdir, match)


@pytest.mark.parametrize("line", ["x", f"{'0' * 64}  /etc/passwd", f"{'0' * 64}  ../x", "\0"])
def test_sums_that_are_none(workdir, line):
  (workdir / "SHA256SUMS").write_text(line + "\n")
  refused(workdir, "SHA256SUMS cannot be read")


@pytest.mark.slow
def test_the_command_writes_sums(workdir, forked, tmp_path):
  made = forked("assemble", "--sums", workdir)
  assert (made.returncode, made.stdout.split()) == (0, [str(workdir / "SHA256SUMS")]), made.stderr
  made = forked("assemble", "--sums", f"--out={tmp_path / 'out'}", workdir / "block_00")
  assert made.returncode == 0, made.stderr
  edit(tmp_path / "out/config.json", seed=3)
  made = forked("sample", f"--workdir={tmp_path / 'out'}", f"--out={tmp_path / 'x.npz'}")
  assert made.returncode == 2 and "config.json differs from its sum" in made.stderr
  assert len(made.stderr.splitlines()) == 1
