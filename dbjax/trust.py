"""What is checked of workdirs and blocks that come from somebody else, before memory is taken.

They are data: nothing in them is unpickled or run. Names, shapes, dtypes and sizes are read first
and compared with what the config says; no link in a block's directory leads out of it. The README
says what is trusted. `SHA256SUMS`, as `sha256sum` writes it, tells whether files are still those
that somebody sent; it does not tell whether they are any good.
"""

from collections.abc import Iterator, Mapping, Sequence
import hashlib
import json
import os
from pathlib import Path
import re
import stat
from typing import Any
import zipfile

from etils import epath
import jax
import numpy as np
import tensorstore as ts

from dbjax import fields
from dbjax.errors import UserError

SUMS = "SHA256SUMS"
_MOST = 2**24  # bytes of a file in JSON: ours have thousands
_READ = r"config\.json|tokenizer\.model|block_\d{2,}\.safetensors"  # of files beside block_00


def read_json(path: epath.PathLike) -> Any:
  """What a file in JSON says. Raises OSError or ValueError; an enormous one is not read."""
  size = epath.Path(path).stat().length
  if size > _MOST:
    raise ValueError(f"it has {size} bytes, expected at most {_MOST}")
  try:
    return json.loads(epath.Path(path).read_text())
  except RecursionError:
    raise ValueError("it is nested too deep") from None


def check_files(directory: epath.Path):
  """Raises UserError where something in a block's directory leads out of it, or is no file.

  The directory itself may be a link, as may the workdir: whoever names them has chosen them.
  """
  if "://" in os.fspath(directory):
    return
  root = os.path.realpath(directory)
  for folder, folders, files in os.walk(root):
    for path in (os.path.join(folder, name) for name in (*folders, *files)):
      try:
        mode = os.lstat(path).st_mode
      except FileNotFoundError:  # a writer has just replaced it
        continue
      if stat.S_ISLNK(mode):
        target = os.path.realpath(path)
        if not target.startswith(root + os.sep):
          raise UserError(f"{path} is a link to {target}, outside {directory}: nothing there is "
                          "read; put a copy in its place if you trust it")
      elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{path} is neither a file nor a directory: remove it")


def check_beside(workdir: epath.Path):
  """Raises UserError where a file that is read in a workdir itself is a link out of it."""
  if "://" in os.fspath(workdir) or not os.path.isdir(workdir):
    return
  for path in (path for path in sorted(Path(workdir).iterdir()) if re.fullmatch(_READ, path.name)):
    target = os.path.realpath(path)
    if path.is_symlink() and not target.startswith(os.path.realpath(workdir) + os.sep):
      raise UserError(f"{path} is a link to {target}, outside {workdir}: put a copy in its place "
                      "if you trust it")


def check_workdir(workdir: epath.Path):
  """Raises UserError where a file in a workdir itself is a link out of it, or not as SHA256SUMS
  says. Then `check_block`, of each that is read.
  """
  check_beside(workdir)
  check_sums(workdir)


def check_block(directory: epath.Path):
  """Raises UserError as `check_files` and `check_sums` do."""
  check_files(directory)
  check_sums(directory)


def beside(directory: epath.Path, name: str) -> epath.Path | None:
  """A file in a directory, if it is there, to be shown to others.

  Raises:
    UserError: it is a link: what is shared shall show nothing else of this machine.
  """
  path = directory / name
  if os.path.islink(path):
    raise UserError(f"{path} is a link: put a copy in its place")
  return path if path.exists() else None


def arrays_in(item: epath.Path) -> dict[str, dict[str, Any]]:
  """Of each array in an item of a checkpoint, what its metadata say; no array is read.

  Raises:
    ValueError: it is no item, or has files that are never read of ours.
  """
  for name in ("_METADATA", "_sharding", "manifest.ocdbt"):
    if (item / name).exists() and (size := (item / name).stat().length) > _MOST:
      raise ValueError(f"{name} has {size} bytes, expected at most {_MOST}")
  if not (item / "manifest.ocdbt").exists():
    raise ValueError("manifest.ocdbt is missing")
  where = os.fspath(item)
  base = where + "/" if "://" in where else {"driver": "file", "path": where + "/"}
  store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
  names = [name.decode() for name in store.list().result()]
  if any(name.endswith("zarr.json") for name in names):
    raise ValueError("it holds arrays of zarr 3, expected zarr 2")
  reads = {name.removesuffix("/.zarray"): store.read(name.encode())
           for name in names if name.endswith("/.zarray")}
  found = {name: json.loads(read.result().value) for name, read in reads.items()}
  if not all(isinstance(claim, dict) for claim in found.values()):
    raise ValueError("what it says of an array is no object in JSON")
  return found


def check_arrays(path: epath.Path, found: Mapping[str, Mapping[str, Any]], template: Any):
  """Raises UserError where an item's arrays are not those of the template, or fill the memory.

  Args:
    path: of the item, for the words of an error.
    found: by `arrays_in`.
    template: the tree of shapes and dtypes to expect.
  """
  leaves = jax.tree_util.tree_leaves_with_path(template)
  expected = {jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in leaves}
  _check_names(path, found, expected)
  for name, x in expected.items():
    claim = found[name]
    shape, chunks = claim.get("shape"), claim.get("chunks")
    if (shape, claim.get("dtype")) != (list(x.shape), _in_zarr(x.dtype)) or not (
        isinstance(chunks, list) and len(chunks) == x.ndim
        and all(isinstance(c, int) and 0 < c <= max(n, 1) for c, n in zip(chunks, x.shape))):
      raise UserError(f"{path}: its arrays have other shapes than this network's: {name} is "
                      f"{fields.shorten(str(claim.get('dtype')))}{fields.shown(shape)} in parts of "
                      f"{fields.shown(chunks)}, expected {_in_zarr(x.dtype)}{list(x.shape)}")
  check_memory(path, sum(x.size * np.dtype(x.dtype).itemsize for _, x in leaves))


def check_claims(path: epath.Path, found: Mapping[str, Any], expected: Mapping[str, Any]):
  """As `check_arrays`, of a file of tensors: both are {name: what has a shape and a dtype}."""
  _check_names(path, found, expected)
  for name, x in expected.items():
    claim = found[name]
    if (tuple(claim.shape), claim.dtype) != (tuple(x.shape), np.dtype(x.dtype)):
      raise UserError(f"{path}: its arrays have other shapes than this network's: {name} is "
                      f"{claim.dtype}{fields.shown(list(claim.shape))}, expected "
                      f"{np.dtype(x.dtype)}{list(x.shape)}")
  check_memory(path, sum(x.size * np.dtype(x.dtype).itemsize for x in expected.values()))


def _check_names(path: epath.Path, found: Mapping[str, Any], expected: Mapping[str, Any]):
  if found.keys() != expected.keys():
    name = min(found.keys() ^ expected.keys())
    there, here = ("has", "lacks") if name in found else ("lacks", "has")
    raise UserError(f"{path} {there} the array {fields.shorten(name)}, which this network {here}: "
                    "it is a checkpoint of another one")


def _in_zarr(dtype: Any) -> str:
  """A dtype's name in the metadata of an array of zarr 2."""
  return "bfloat16" if dtype == "bfloat16" else np.dtype(dtype).str  # of that numpy knows no name


def check_memory(path: epath.Path, size: int):
  """Raises UserError where this machine has less memory than so many bytes."""
  there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  if size > there:
    raise UserError(f"{path} holds {size / 1e9:,.1f} GB, and this machine has {there / 1e9:,.1f}: "
                    "use a larger one")


def check_npz(path: epath.Path, expected: Mapping[str, Any] | None = None):
  """Reads what a file .npz claims to hold, and none of it.

  Args:
    path: of the file.
    expected: shapes and dtypes by name, where they are known.

  Raises:
    ValueError: it claims more than it has, or is compressed, so that nobody can tell.
    UserError: it holds other arrays than those expected.
  """
  claims, total = {}, path.stat().length
  with path.open("rb") as file, zipfile.ZipFile(file) as archive:
    for info in archive.infolist():
      if info.compress_type != zipfile.ZIP_STORED or not info.filename.endswith(".npy"):
        raise ValueError(f"{fields.shorten(info.filename)} is compressed, or no .npy")
      with archive.open(info) as member:
        shape, dtype = _npy_header(member)
        room = min(info.file_size, total) - member.tell()
      size = dtype.itemsize
      for n in shape:
        size *= n
      if size != room:
        raise ValueError(f"{fields.shorten(info.filename)} claims {size} bytes, and has {room}")
      claims[info.filename.removesuffix(".npy")] = (tuple(shape), dtype)
  wanted = None if expected is None else {
      name: (tuple(x.shape), np.dtype(x.dtype)) for name, x in expected.items()}
  if wanted is not None and claims != wanted:
    words = lambda arrays: ", ".join(f"{n} {d}{list(s)}" for n, (s, d) in arrays.items()) or "none"
    raise UserError(f"{path} holds {fields.shorten(words(claims))}, expected "
                    f"{fields.shorten(words(wanted))}, by the config beside it")
  check_memory(path, total)


def _npy_header(member: Any) -> tuple[tuple[int, ...], np.dtype]:
  """The shape and dtype in the header of a .npy file. Raises ValueError."""
  version = np.lib.format.read_magic(member)
  read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
  if version not in read:
    raise ValueError(f"its version {version} is none of ours")
  shape, _, dtype = read[version](member)
  if dtype.hasobject or min(shape, default=0) < 0:
    raise ValueError(f"it holds {dtype}, expected numbers")
  return shape, dtype


def write_sums(directory: epath.Path) -> Path:
  """Writes SHA256SUMS of all files in a workdir or a block's directory; `sha256sum -c` checks it.

  Raises:
    UserError: a name cannot stand in such a file, or it cannot be written.
  """
  root = _local(directory)
  names = sorted(_names(root))
  odd = next((name for name in names if re.search(r"[\n\r\\]", name)), None)
  if odd:
    raise UserError(f"{root}/{odd!r}: such a name cannot stand in {SUMS}: rename the file")
  try:
    text = "".join(f"{_sum(root / name)}  {name}\n" for name in names)
    fresh = root / f"{SUMS}.{os.getpid()}"
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(root / SUMS)
  except OSError as e:
    raise UserError(f"{root / SUMS} cannot be written ({e.strerror or e})") from e
  return root / SUMS


def check_sums(directory: epath.Path, only: Sequence[str] | None = None):
  """Raises UserError where a file is not as SHA256SUMS says, if there is one in the directory.

  Args:
    directory: that has it.
    only: names of files; None: all of them.
  """
  if "://" in os.fspath(directory) or not os.path.lexists(Path(directory) / SUMS):
    return
  root = Path(directory)
  known, found = _read_sums(root / SUMS), set(_names(root) if only is None else only)
  known = {name: known[name] for name in known if only is None or name in only}
  cure = (f"get the files again; or, if they are yours and have changed since, python -m "
          f"dbjax.assemble --sums {root}")
  added = {name for name in found - known.keys() if "/" in name or re.fullmatch(_READ, name)}
  for name in sorted(known.keys() | added):
    if name not in found:
      raise UserError(f"{root / name} is missing, and {root / SUMS} names it: {cure}")
    if name not in known:
      raise UserError(f"{root / name} was added: {root / SUMS} does not name it: {cure}")
    try:
      same = _sum(root / name) == known[name]
    except OSError as e:
      raise UserError(f"{root / name} cannot be read ({e.strerror or e}): {cure}") from e
    if not same:
      raise UserError(f"{root / name} differs from its sum in {root / SUMS}: {cure}")


def _local(directory: epath.Path) -> Path:
  if "://" in os.fspath(directory):
    raise UserError(f"{directory}: sums are written on a disk: copy it there first")
  if not directory.is_dir():
    raise UserError(f"{directory}: there is no such directory")
  return Path(directory)


def _names(root: Path) -> Iterator[str]:
  """The files of a directory, and of those in it, which may be links; relative, with slashes."""
  for top in sorted(root.iterdir()):
    if top.is_dir():
      check_files(epath.Path(top))
      for folder, _, files in os.walk(top):
        yield from (os.path.relpath(os.path.join(folder, name), root) for name in files)
    elif top.name != SUMS and top.is_file():
      yield top.name


def _read_sums(path: Path) -> dict[str, str]:
  """{name: SHA-256} of a file that sha256sum could have written."""
  known = {}
  try:
    if path.stat().st_size > _MOST or not path.is_file():
      raise ValueError(f"no file of at most {_MOST} bytes")
    for line in path.read_text(encoding="utf-8").splitlines():
      match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)", line)
      if not match or os.path.isabs(match[2]) or ".." in match[2].split("/"):
        raise ValueError(f"{line[:80]!r}: expected a sum and a name in this directory")
      known[match[2]] = match[1].lower()
  except (OSError, ValueError) as e:
    raise UserError(f"{path} cannot be read ({e}): expected what sha256sum writes; remove it to "
                    "read the files unchecked") from e
  return known


def _sum(path: Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
