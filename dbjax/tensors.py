"""Files FILE.safetensors: 8 bytes, a header of that length in JSON, and the bytes of the tensors.

Readers in many languages know the format. Nothing in such a file is run, and no memory is taken for
what it claims before that is compared with the bytes that it has.
"""

from collections.abc import Mapping
import io
import json
import math
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

SUFFIX = ".safetensors"
_DTYPES = {name: np.dtype(dtype) for name, dtype in {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": jnp.bfloat16, "I64": "<i8", "I32": "<i4",
    "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}.items()}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MOST = 2**26  # bytes of a header: one of ten thousand tensors has a million


class Claim(NamedTuple):
  """What a header says of a tensor; the file is long enough for it.

  `begin` is where its bytes begin in the file.
  """

  dtype: np.dtype
  shape: tuple[int, ...]
  begin: int


def read_header(file: BinaryIO, size: int) -> tuple[dict[str, str], dict[str, Claim]]:
  """The metadata of a file of so many bytes, and what it says of each tensor, which is not read.

  Raises:
    ValueError: the file is not whole, or has bytes that belong to no tensor or to two.
  """
  length = int.from_bytes(file.read(8), "little")
  if size < 8 or length > size - 8:
    raise ValueError("no whole .safetensors file: its header is cut off")
  if length > _MOST:
    raise ValueError(f"its header has {length} bytes, expected at most {_MOST}")
  start, room = 8 + length, size - 8 - length
  try:
    header = json.loads(file.read(length).decode(), object_pairs_hook=_without_twins)
    metadata = header.pop("__metadata__", {})
    if not all(isinstance(x, str) for x in metadata.values()):
      raise ValueError("its metadata are not all text")
    entries = sorted((*entry["data_offsets"], name, entry["dtype"], tuple(entry["shape"]))
                     for name, entry in header.items())
    numbers = [n for begin, end, _, _, shape in entries for n in (begin, end, *shape)]
    if not all(type(n) is int and n >= 0 for n in numbers):
      raise ValueError("offsets and shapes are not all whole numbers")
  except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
    raise ValueError(f"no .safetensors file: its header is damaged ({type(e).__name__}: {e})"
                     ) from e
  claims, position = {}, 0
  for begin, end, name, dtype, shape in entries:
    if str(dtype) not in _DTYPES:
      raise ValueError(f"{name} is of type {dtype}, expected one of {', '.join(_DTYPES)}")
    bytes_of = math.prod(shape) * _DTYPES[dtype].itemsize
    if begin != position or end != begin + bytes_of or end > room:
      raise ValueError(f"no whole .safetensors file: {name} should have {bytes_of} bytes from "
                       f"{position} on, and has {begin} to {end} of {room}")
    claims[name] = Claim(_DTYPES[dtype], shape, start + begin)
    position = end
  if position != room:
    raise ValueError(f"no whole .safetensors file: {room - position} bytes at its end belong to no "
                     "tensor")
  return metadata, claims


def read(content: bytes) -> dict[str, np.ndarray]:
  """The tensors of a file, which share its memory. Raises ValueError as `read_header`."""
  _, claims = read_header(io.BytesIO(content), len(content))
  return {name: np.ndarray(claim.shape, claim.dtype, content, claim.begin)
          for name, claim in claims.items()}


def write(file: BinaryIO, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]):
  """Writes a file of arrays, in their order, with metadata.

  Raises:
    ValueError: one has a type that the format has not; nothing is written.
  """
  header: dict[str, Any] = dict(__metadata__=dict(metadata))
  position = 0
  for name, x in arrays.items():
    if x.dtype not in _NAMES:
      raise ValueError(f"{name} is of type {x.dtype}, expected one of "
                       f"{', '.join(map(str, _NAMES))}")
    header[name] = dict(dtype=_NAMES[x.dtype], shape=x.shape,
                        data_offsets=(position, position + x.nbytes))
    position += x.nbytes
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)  # so that numbers lie where processors want them
  file.write(len(text).to_bytes(8, "little") + text)
  for x in arrays.values():
    file.write(np.ascontiguousarray(x).tobytes())


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) != len(pairs):
    raise ValueError("a name is there twice")
  return found
