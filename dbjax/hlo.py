"""What a compiled program does, read from its optimised HLO: compiled.as_text().

`collectives`: which devices talk, and how much they send. `operations`: what a device runs, one
after the other, with the matrix products in it and the bytes that it moves.

What is compiled is what runs, so this text proves which devices talk. Therefore nothing is
skipped in silence: what cannot be read raises ValueError. Written after XLA's printer
(hlo_instruction.cc, replica_group.cc, mesh_and_axis.cc), its counting of operations
(hlo_cost_analysis.cc), and what CPU and libtpu print.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
import functools
import itertools
import math
import re
from typing import NamedTuple

import numpy as np

REDUCING = ("all-reduce", "all-gather", "reduce-scatter")
KINDS = (*REDUCING, "all-to-all", "collective-permute", "collective-broadcast", "ragged-all-to-all")
_RUN_OTHERS = ("while", "conditional", "call", "async-start")
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all",
         "opt-barrier", "partition-id", "replica-id", "add-dependency", "domain")
_SLICES = ("dynamic-slice", "slice", "gather")


class Collective(NamedTuple):
  """One collective instruction.

  Attributes:
    kind: one of KINDS. TPU's fusion all-reduce-scatter is a reduce-scatter.
    bytes: of its result on one device, each time it runs: all arrays of a tuple, without the
      padding of tiles. Of the tuple of an asynchronous start, the result only: no operands, no
      contexts.
    count: how often it runs in one call of the program: the product of the trip counts of the
      loops around it (1 where unknown), summed over the places that call it. Each branch of a
      conditional counts as taken.
    groups: the device positions that talk to each other, a tuple a group. For a
      collective-permute, its pairs (source, target), without those of a device with itself.
  """

  kind: str
  bytes: int
  count: int
  groups: tuple[tuple[int, ...], ...]

  @property
  def sent(self) -> float:
    """Bytes that a device sends to others, and receives from them, each time it runs.

    In a ring of the k devices of a group, which is the least that any algorithm sends: of n bytes
    2 n (k - 1) / k for an all-reduce, and half of that to gather n, to scatter the sum of n, or to
    exchange n all to all. A permutation or a broadcast sends its n. Of groups the largest counts.
    """
    k = max(map(len, self.groups), default=1)
    if k == 1:
      return 0.0
    if self.kind in ("collective-permute", "collective-broadcast"):
      return float(self.bytes)
    whole = self.bytes * (k if self.kind == "reduce-scatter" else 1)
    return whole * (k - 1) / k * (2 if self.kind == "all-reduce" else 1)


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
    count: how often it runs in one call of the program; see `Collective`.
  """

  name: str
  opcode: str
  parts: tuple[tuple[str, str], ...]
  products: tuple[tuple[str, float], ...]
  bytes: int
  count: int


def collectives(text: str) -> list[Collective]:
  """The collectives of a compiled program, in the order of its text.

  A program for several TPU slices is compiled for one of them: positions are those in a slice,
  and what crosses slices is a send to megascale, which raises.

  Args:
    text: compiled.as_text() of one module.

  Raises:
    ValueError: with the instruction, if data leaves a device and it cannot be told where to:
      unknown groups, a send, a kernel that communicates, a collective that nothing calls.
  """
  header, entry, computations = _parse(text)
  executions = _executions(entry, computations)
  found = []
  for name, body in computations.items():
    # TPU prints a collective that overlaps compute in the fusions that begin, advance and end it.
    begins = any('_target="AsyncCollectiveStart"' in i.attributes for i in body.values())
    for i in body.values():
      try:
        kind = _kind(i)
        if not kind:
          continue
        shape = _result(i)
        if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
          kind, shape = "reduce-scatter", _root(body).shape
        if not executions(name):
          raise ValueError(f"nothing calls %{name}")
        op = Collective(kind, _bytes(shape), executions(name), _groups(i, kind, header))
      except (ValueError, LookupError, TypeError) as e:
        raise ValueError(f"cannot read ({e}): {i.line.strip()}") from e
      chain = re.search(r'\bchain_id="\d+"', i.attributes)
      found.append((op, chain and (chain[0], op.kind, op.groups), begins))
  begun = {chain for _, chain, begins in found if chain and begins}
  return [op for op, chain, begins in found if begins or chain not in begun]


def product_flops(text: str) -> float:
  """Floating-point operations of the matrix products in one call of a compiled program.

  What nobody reads has been left out of it; products that became calls of a library are not seen.

  Args:
    text: compiled.as_text() of one module.
  """
  return sum(op.count * sum(flops for _, flops in op.products) for op in operations(text))


def operations(text: str) -> list[Operation]:
  """What a device runs in one call of a compiled program, in the order of its text.

  What costs nothing is left out: parameters, constants, tuples, views, and loops and conditionals
  themselves; what they run is there.

  Args:
    text: compiled.as_text() of one module.

  Raises:
    ValueError: with the instruction, if it cannot be told what it moves or computes.
  """
  _, entry, computations = _parse(text)
  executions = _executions(entry, computations)
  found, names = [], [entry]
  for name in names:  # grows: what is run in loops, branches and calls
    for i in computations[name].values():
      try:
        if i.opcode in _RUN_OTHERS:
          names += [callee for callee in _callees(i) if callee not in names]
        elif not _is_free(i):
          found.append(Operation(
              i.name, i.opcode, tuple(_parts(computations, i)),
              tuple(_products(computations, computations[name], i)),
              _moved(computations, computations[name], i), executions(name)))
      except (ValueError, LookupError, TypeError) as e:
        raise ValueError(f"cannot read ({e}): {i.line.strip()}") from e
  return found


def axes(
    groups: Collective | Sequence[Sequence[int]], mesh_shape: Mapping[str, int],
) -> tuple[str, ...]:
  """The mesh axes along which the members of some group differ, in mesh order.

  Args:
    groups: a collective or its groups. A group of one spans no axis.
    mesh_shape: axis name -> size. Devices are numbered in row-major order, as jit numbers them.

  Raises:
    ValueError: if a position lies outside the mesh.
  """
  spans = np.zeros(len(mesh_shape), bool)
  for group in groups.groups if isinstance(groups, Collective) else groups:
    places = np.array(np.unravel_index(group, tuple(mesh_shape.values())))  # [axis, member]
    spans |= (places != places[:, :1]).any(1)
  return tuple(itertools.compress(mesh_shape, spans))


class _Instruction(NamedTuple):
  is_root: str | None
  name: str
  shape: str  # with layouts, without comments
  opcode: str
  operands: list[str]
  attributes: str
  line: str


def _parse(text):
  """(what precedes the computations, name of the entry, {computation: {name: instruction}})."""
  entry, blocks = None, {}
  lines = header = [""]
  for line in text.split("\n"):
    if m := re.match(r"(ENTRY )?%(\S+) .*\{$", line):
      lines = blocks[m[2]] = []
      entry = m[2] if m[1] else entry
    elif re.match(r"\s+(ROOT )?%\S+ = ", line):
      lines.append(line)
    elif lines and not re.fullmatch(r"\}(, execution_thread=.*)?", line):
      # A constant or an attribute goes on.
      lines[-1] += "\n" + line
  if entry is None:
    raise ValueError("no ENTRY computation: not the text of a compiled program")
  return header[0], entry, {
      name: {i.name: i for i in map(_instruction, lines)} for name, lines in blocks.items()}


def _instruction(line):
  # Of strings, only single words stay: an op_name must not pass for an attribute.
  text = re.sub(r'"((?:[^"\\\n]|\\.)*)"',
                lambda m: m[0] if re.fullmatch(r"\w*", m[1]) else '""', line)
  m = re.match(r"\s+(ROOT )?%(\S+) = (.*?) ([\w-]+)\((.*?)\)(.*)", text, re.DOTALL)
  if not m:
    raise ValueError(f"cannot read: {line.strip()}")
  root, name, shape, opcode, operands, attributes = m.groups()
  shape, operands = (re.sub(r"/\*.*?\*/", "", x) for x in (shape, operands))
  return _Instruction(root, name, shape, opcode, [o.lstrip("%") for o in operands.split(", ")],
                      attributes, line.partition(", backend_config=")[0])


def _root(body):
  return [i for i in body.values() if i.is_root][0]


def _executions(entry, computations):
  """A function of a computation's name: how often it runs in one call of the program."""
  callers = defaultdict(list)
  for name, body in computations.items():
    for i in body.values():
      for callee in _callees(i):
        callers[callee].append((name, _trips(computations, name, i)))

  @functools.cache
  def executions(name):
    return 1 if name == entry else sum(trips * executions(by) for by, trips in callers[name])

  return executions


def _callees(i):
  """The computations that an instruction calls: those that its attributes name."""
  if i.opcode.endswith(("-update", "-done")):
    return  # of what its start has called
  for key, value in re.findall(r"([\w-]+)=(%[\w.-]+|\{%[^}]*\})", i.attributes):
    if key != "control-predecessors":
      yield from re.findall(r"%([\w.-]+)", value)


def _trips(computations, name, i):
  """How often instruction i of computation `name` runs what it calls; 1 where unknown.

  CPU and GPU print a loop's trip count. TPU doesn't: there a counter is followed that goes from
  a constant, by a constant, to less than a constant, as those of scan and fori_loop do.
  """
  if i.opcode != "while":
    return 1
  if m := re.search(r'"known_trip_count":\{"n":"(\d+)"', i.attributes):
    return int(m[1])

  def operand(where, instruction, n):
    found = where[instruction.operands[n]]
    return operand(where, found, 0) if found.opcode == "copy" else found

  def index(element):
    return int(re.search(r"index=(\d+)", element.attributes)[1])

  try:
    caller, condition, body = computations[name], *(
        computations[re.search(rf"\b{key}=%([\w.-]+)", i.attributes)[1]]
        for key in ("condition", "body"))
    test, after, before = _root(condition), _root(body), operand(caller, i, 0)
    counter, stop = operand(condition, test, 0), operand(condition, test, 1)
    start, add = operand(caller, before, index(counter)), operand(body, after, index(counter))
    again, step = operand(body, add, 0), operand(body, add, 1)
    opcodes = " ".join(x.opcode for x in (test, after, before, add, start, stop, step))
    if (opcodes == "compare tuple tuple add constant constant constant"
        and "direction=LT" in test.attributes and index(again) == index(counter)):
      return len(range(*(int(x.operands[0]) for x in (start, stop, step))))
  except (LookupError, TypeError, ValueError):
    pass
  return 1


def _kind(i):
  """Kind of a collective; None if the instruction moves nothing between devices, or only ends."""
  kind = i.opcode.removesuffix("-start")
  if kind in KINDS:
    return kind
  # A callback also sends, but to its own host only.
  sends = i.opcode in ("send", "recv") and (
      "is_host_transfer=true" not in i.attributes or "megascale" in i.attributes)
  grouped = re.search(r"\b(replica_groups|source_target_pairs)=", i.attributes)
  if sends or grouped or '"has_communication":true' in i.attributes:
    raise ValueError("not a known collective")
  return None


def _result(i):
  """Shape of the result; an asynchronous start has ((operands), (results), contexts...)."""
  if not i.opcode.endswith("-start"):
    return i.shape
  if i.opcode == "all-reduce-start" and not i.shape.startswith("(("):
    return i.shape  # as of all-reduce
  return _elements(i.shape)[i.opcode != "copy-start"]  # of which the result comes first


def _elements(shape):
  """The shapes in a tuple."""
  found, depth = [""], 0
  for c in shape[1:-1]:
    depth += (c in "([{") - (c in ")]}")
    if c == "," and not depth:
      found.append("")
    else:
      found[-1] += c
  return found


def _bytes(shape):
  """Bytes of an array, or of all arrays of a tuple."""
  return sum(array.bytes for array in _arrays(shape))


class _Array(NamedTuple):
  """An array of a shape; `layout` is what stands in its braces."""

  dtype: str
  dims: tuple[int, ...]
  layout: str

  @property
  def bytes(self):
    if self.dtype in ("token", "opaque"):
      return 0
    bits = 8 if self.dtype == "pred" else int(re.match(r"[a-z]+(\d+)", self.dtype)[1])
    return -(-bits * math.prod(self.dims) // 8)

  @property
  def stored(self):
    """Its bytes with the padding of tiles: {1,0:T(8,128)(2,1)} are minor to major, and tiles."""
    dims = list(self.dims)
    if m := re.match(r"([\d,]+):T\(([\d,]+)\)", self.layout):
      for axis, size in zip(_numbers(m[1]), reversed(_numbers(m[2]))):
        dims[axis] = -(-dims[axis] // size) * size
    return self._replace(dims=tuple(dims)).bytes

  @property
  def in_main_memory(self):
    """Not in a TPU's vector memory, S(1), or among its scalars and flags."""
    return not re.search(r"S\([1-9]", self.layout)


def _arrays(shape):
  return [_Array(dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d), layout)
          for dtype, dims, layout in re.findall(r"(\w+)\[([^]]*)\](?:\{([^}]*)\})?", shape)]


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
  return computations[re.search(r"\bcalls=%([\w.-]+)", i.attributes)[1]]


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
  (lhs,), (out,) = _arrays(body[i.operands[0]].shape), _arrays(i.shape)
  contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
  contracted = _numbers(contracted[1]) if contracted and contracted[1] else []
  return 2 * math.prod(out.dims) * math.prod(lhs.dims[n] for n in contracted)


def _convolution_flops(body, i):
  """As XLA counts: libtpu writes products of batches as windows that mostly see holes."""
  (lhs,), (rhs,), (out,) = (_arrays(x.shape) for x in (*(body[o] for o in i.operands[:2]), i))
  labels = re.split("_|->", re.search(r"\bdim_labels=([\w?]+->[\w?]+)", i.attributes)[1])
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
             if operand in body and all(a.in_main_memory for a in _arrays(body[operand].shape)))
  return read + _written(computations, body, i, _arrays(_result(i)))


def _read_by(computations, body, i, n):
  """Bytes of its operand n that instruction i of `body` reads."""
  whole = sum(a.stored for a in _arrays(body[i.operands[n]].shape))
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
    return min(whole, sum(a.stored for a in _arrays(_result(i))))
  return whole


def _read(computations, body, name):
  """Bytes of an array in a fusion that the instructions after it read."""
  return sum(_read_by(computations, body, i, n) for i in body.values()
             for n, operand in enumerate(i.operands) if operand == name)


def _written(computations, body, i, results):
  """Bytes that instruction i of `body` writes to main memory, where its `results` lie there."""
  if i.opcode == "fusion":
    inside = _fused(computations, i)
    root = _root(inside)
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
    return sum(a.stored for a in _arrays(body[i.operands[1]].shape))
  return sum(a.stored for a in results if a.in_main_memory)


def _groups(i, kind, header):
  """Groups of device positions: replica * partitions + partition. A jit has one replica."""
  replicas, partitions = (int(m[1]) if (m := re.search(rf"\b{key}=(\d+)", header)) else 1
                          for key in ("replica_count", "num_partitions"))
  devices = np.arange(replicas * partitions).reshape(replicas, partitions)
  # Which devices an id stands for: [those that exchange apart, id, those that exchange together].
  if "use_global_device_ids=true" in i.attributes:
    devices = devices.reshape(1, -1, 1)
  elif "channel_id=" not in i.attributes:  # an id is a replica
    devices = devices.T[:, :, None]
  elif kind in REDUCING:  # an id is a replica with all its partitions
    devices = devices[None]
  else:  # an id is a partition
    devices = devices[:, :, None]
  _, key, text = re.split(r"\b(replica_groups|source_target_pairs)=", i.attributes)
  groups = _ids(text, devices.shape[1])
  if key == "source_target_pairs":
    groups = [pair for pair in groups if len(set(pair)) == 2]
  return tuple(tuple(apart[list(group)].ravel().tolist()) for apart in devices for group in groups)


def _ids(text, total):
  """Groups of ids below `total`, in any of the forms that XLA prints, at the start of `text`."""
  end = r"(?=, [a-z]|\s*$)"
  if re.match(r"\{\}" + end, text):
    return [range(total)]
  if m := re.match(r"\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}" + end, text):
    return [_numbers(group) for group in m[1].split("},{")]
  if m := re.match(r"\[(\d+),(\d+)\]<=(\[\S+?)" + end, text):  # [4,2]<=[2,4]T(1,0)
    return _iota(m[3], total).reshape(int(m[1]), int(m[2]))
  # mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y','x':(2)2}
  m = re.match(r"mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}" + end, text)
  if not m:
    raise ValueError("unknown groups")
  axis = r"('(?:[^'\\]|\\.)*'|[\w.-]+)"
  sizes = {name: int(size) for name, size in re.findall(rf"{axis}=(\d+)", m[1])}
  # 'x':(2)3 is the digit of x that takes 3 values and has 2 before it: x = (2, 3, ...).
  parts = [(name, int(before or 1), int(size or sizes[name]))
           for name, before, size in re.findall(rf"{axis}(?::\((\d+)\)(\d+))?", m[3])]
  places = dict(zip(sizes, np.indices(tuple(sizes.values())).reshape(len(sizes), -1)))
  for name, before, size in parts:
    unit, rest = divmod(sizes[name], before * size)
    if rest:
      raise ValueError(f"no part of {name}")
    places[name] -= places[name] // unit % size * unit
  order = np.lexsort(list(places.values()))  # without these digits, a group is in one place
  ids = _iota(m[2] or f"[{total}]", total).reshape(len(order))
  return ids[order].reshape(-1, math.prod(size for _, _, size in parts))


def _iota(text, total):
  """Ids below `total` in the order of [2,4]T(1,0), or as listed: 3,1,2,0."""
  if m := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
    ids = np.arange(total).reshape(_numbers(m[1]))
    return ids.transpose(_numbers(m[2]) if m[2] else None)
  ids = np.array(_numbers(text))
  if sorted(ids) != list(range(total)):
    raise ValueError("not every device, once")
  return ids


def _numbers(text):
  return [int(n) for n in text.strip("{}").split(",")]
