"""What a device runs in a compiled program, with its matrix products and the bytes that it moves.

Read from the optimised HLO, by `hlo.py`. Counts are after XLA's (hlo_cost_analysis.cc).
"""

import math
import re
from typing import NamedTuple

import numpy as np

from dbjax import hlo

_RUN_OTHERS = ("while", "conditional", "call", "async-start")
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all",
         "opt-barrier", "partition-id", "replica-id", "add-dependency", "domain")
_SLICES = ("dynamic-slice", "slice", "gather")


class Operation(NamedTuple):
  """One instruction that a device runs: a fusion, a product, a copy.

  Attributes:
    name: of the instruction, unique in a program.
    opcode: of the instruction: fusion, copy, convolution, ...
    parts: (opcode, JAX's name of it) of every instruction in a fusion, or of itself alone.
    products: (JAX's name of it, floating-point operations) of each matrix product or convolution
      in it, each time it runs. Zeros that a convolution sees in padding and holes do not count.
    bytes: that it reads from the device's main memory and writes to it, each time it runs, with the
      padding of tiles: what lies in a TPU's vector memory, S(1), costs nothing, and of an array
      that is sliced or updated in place only the slice counts.
    count: how often it runs in one call of the program; see `hlo.Collective`.
  """

  name: str
  opcode: str
  parts: tuple[tuple[str, str], ...]
  products: tuple[tuple[str, float], ...]
  bytes: int
  count: int  # type: ignore[assignment]  # hides tuple.count


def product_flops(text: str | None) -> float:
  """Floating-point operations of the matrix products in one call of a compiled program.

  What nobody reads has been left out of it; products that became calls of a library are not seen.

  Args:
    text: compiled.as_text() of one module.
  """
  return sum(op.count * sum(flops for _, flops in op.products) for op in read(text))


def read(text: str | None) -> list[Operation]:
  """What a device runs in one call of a compiled program, in the order of its text.

  What costs nothing is left out: parameters, constants, tuples, views, and loops and conditionals
  themselves; what they run is there.

  Args:
    text: compiled.as_text() of one module.

  Raises:
    ValueError: with the instruction, if it cannot be told what it moves or computes.
  """
  _, entry, computations = hlo.parse(text)
  executions = hlo.executions_of(entry, computations)
  found, names = [], [entry]
  for name in names:  # grows: what is run in loops, branches and calls
    for i in computations[name].values():
      try:
        if i.opcode in _RUN_OTHERS:
          names += [callee for callee in hlo.callees(i) if callee not in names]
        elif not _is_free(i):
          found.append(Operation(
              i.name, i.opcode, tuple(_parts(computations, i)),
              tuple(_products(computations, computations[name], i)),
              _moved(computations, computations[name], i), executions(name)))
      except (ValueError, LookupError, TypeError) as e:
        raise ValueError(f"cannot read ({e}): {i.line.strip()}") from e
  return found


def _parts(computations, i):
  """(opcode, JAX's name) of all instructions in a fusion, or of the instruction itself."""
  if i.opcode == "fusion":
    for j in _fused(computations, i).values():
      yield from _parts(computations, j)
  elif i.opcode not in _FREE:
    name = re.search(r'\bop_name="((?:[^"\\]|\\.)*)"', i.line)
    yield i.opcode, name[1] if name else ""


def _is_free(i):
  """Whether a device does nothing for it, or has done it when its start ran."""
  return (i.opcode in _FREE or i.opcode.endswith(("-done", "-update"))
          or '"AllocateBuffer"' in i.attributes)


def _fused(computations, i):
  return computations[hlo.group(r"\bcalls=%([\w.-]+)", i.attributes)]


def _products(computations, body, i):
  """(JAX's name, floating-point operations) of the matrix products in instruction i of `body`."""
  if i.opcode == "fusion":
    inside = _fused(computations, i)
    for j in inside.values():
      yield from _products(computations, inside, j)
    return
  count = {"dot": _dot_flops, "convolution": _convolution_flops, "custom-call": _kernel_flops}
  if i.opcode in count and (flops := count[i.opcode](body, i)):
    ((_, name),) = _parts(computations, i)
    yield name, float(flops)


def _dot_flops(body, i):
  (lhs,), (out,) = hlo.arrays(body[i.operands[0]].shape), hlo.arrays(i.shape)
  contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
  contracted = hlo.numbers(contracted[1]) if contracted and contracted[1] else []
  return 2 * math.prod(out.dims) * math.prod(lhs.dims[n] for n in contracted)


def _convolution_flops(body, i):
  """As XLA counts: libtpu writes products of batches as windows that mostly see holes."""
  (lhs,), (rhs,), (out,) = (hlo.arrays(x.shape) for x in (*(body[o] for o in i.operands[:2]), i))
  labels = re.split("_|->", hlo.group(r"\bdim_labels=([\w?]+->[\w?]+)", i.attributes))
  size = lambda array, n, label: array.dims[labels[n].index(label)]
  window = re.search(r"\bwindow=\{(.*?)\}", i.attributes)
  window = dict(field.split("=") for field in window[1].split()) if window else {}
  count = lambda key: int(m[1]) if (m := re.search(rf"\b{key}=(\d+)", i.attributes)) else 1
  total = (size(lhs, 0, "b") // count("batch_group_count") * size(out, 2, "f")
           * size(lhs, 0, "f") // count("feature_group_count"))
  for label in filter(str.isdigit, labels[2]):
    of = lambda key, n=int(label): window[key].split("x")[n] if key in window else "1"
    pad = int(of("pad").split("_")[0]) if "pad" in window else 0
    taps = (np.arange(size(out, 2, label))[:, None] * int(of("stride"))
            + np.arange(size(rhs, 1, label)) * int(of("rhs_dilate")) - pad)
    places = (size(lhs, 0, label) - 1) * int(of("lhs_dilate")) + 1
    total *= int(((0 <= taps) & (taps < places) & (taps % int(of("lhs_dilate")) == 0)).sum())
  return 2 * total


def _kernel_flops(_, i):
  """What a Pallas kernel says of itself."""
  if "tpu_custom_call" not in i.attributes:
    return 0
  if not (m := re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', i.attributes)):
    raise ValueError("a kernel that does not say what it computes")
  return int(m[1])


def _moved(computations, body, i):
  """Bytes that instruction i of `body` reads from main memory and writes to it."""
  read = sum(_read_by(computations, body, i, n) for n, operand in enumerate(i.operands)
             if operand in body and all(a.in_main_memory for a in hlo.arrays(body[operand].shape)))
  return read + _written(computations, body, i, hlo.arrays(hlo.result(i)))


def _read_by(computations, body, i, n):
  """Bytes of its operand n that instruction i of `body` reads."""
  whole = sum(a.stored for a in hlo.arrays(body[i.operands[n]].shape))
  if i.opcode == "fusion":
    inside = _fused(computations, i)
    (name,) = (j.name for j in inside.values()
               if j.opcode == "parameter" and j.operands == [str(n)])
    return min(whole, _read(computations, inside, name))
  if i.opcode == "bitcast":
    return min(whole, _read(computations, body, i.name))
  if i.opcode == "tuple" or i.opcode == "dynamic-update-slice" and n == 0:
    return 0
  if i.opcode.removesuffix("-start") in _SLICES and n == 0:
    return min(whole, sum(a.stored for a in hlo.arrays(hlo.result(i))))
  return whole


def _read(computations, body, name):
  """Bytes of an array in a fusion that the instructions after it read."""
  return sum(_read_by(computations, body, i, n) for i in body.values()
             for n, operand in enumerate(i.operands) if operand == name)


def _written(computations, body, i, results):
  """Bytes that instruction i of `body` writes to main memory, where its `results` lie there."""
  if i.opcode == "fusion":
    inside = _fused(computations, i)
    root = hlo.root(inside)
    parts = [inside[o] for o in root.operands] if root.opcode == "tuple" else [root]
    if len(parts) == len(results):
      return sum(_written(computations, inside, part, [array])
                 for part, array in zip(parts, results))
    return _written(computations, inside, root, results)
  if i.opcode == "bitcast":
    return _written(computations, body, body[i.operands[0]], results)
  if i.opcode == "parameter":  # handed on
    return 0
  if i.opcode == "dynamic-update-slice" and results[0].in_main_memory:
    return sum(a.stored for a in hlo.arrays(body[i.operands[1]].shape))
  return sum(a.stored for a in results if a.in_main_memory)
