"""Reads the optimised HLO of a compiled program, compiled.as_text(), and the collectives in it.

What is compiled is what runs, so this text proves which devices talk. Therefore nothing is
skipped in silence: what cannot be read raises ValueError. Written after XLA's printer
(hlo_instruction.cc, replica_group.cc, mesh_and_axis.cc) and what CPU and libtpu print.
`operations.py` reads by the same functions what a device computes and moves.
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
  count: int  # type: ignore[assignment]  # hides tuple.count
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
  header, entry, computations = parse(text)
  executions = executions_of(entry, computations)
  found = []
  for name, body in computations.items():
    # TPU prints a collective that overlaps compute in the fusions that begin, advance and end it.
    begins = any('_target="AsyncCollectiveStart"' in i.attributes for i in body.values())
    for i in body.values():
      try:
        kind = _kind(i)
        if not kind:
          continue
        shape = result(i)
        if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
          kind, shape = "reduce-scatter", root(body).shape
        if not executions(name):
          raise ValueError(f"nothing calls %{name}")
        op = Collective(kind, _bytes(shape), executions(name), _groups(i, kind, header))
      except (ValueError, LookupError, TypeError) as e:
        raise ValueError(f"cannot read ({e}): {i.line.strip()}") from e
      chain = re.search(r'\bchain_id="\d+"', i.attributes)
      found.append((op, chain and (chain[0], op.kind, op.groups), begins))
  begun = {chain for _, chain, begins in found if chain and begins}
  return [op for op, chain, begins in found if begins or chain not in begun]


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


class Instruction(NamedTuple):
  is_root: str | None
  name: str
  shape: str  # with layouts, without comments
  opcode: str
  operands: list[str]
  attributes: str
  line: str


def parse(text):
  """(what precedes the computations, name of the entry, {computation: {name: instruction}})."""
  entry, blocks = None, dict[str, list[str]]()
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
  return Instruction(root, name, shape, opcode, [o.lstrip("%") for o in operands.split(", ")],
                      attributes, line.partition(", backend_config=")[0])


def root(body):
  """The instruction whose value a computation returns."""
  return [i for i in body.values() if i.is_root][0]


def executions_of(entry, computations):
  """A function of a computation's name: how often it runs in one call of the program."""
  callers = defaultdict(list)
  for name, body in computations.items():
    for i in body.values():
      for callee in callees(i):
        callers[callee].append((name, _trips(computations, name, i)))

  @functools.cache
  def executions(name):
    return 1 if name == entry else sum(trips * executions(by) for by, trips in callers[name])

  return executions


def group(pattern, text):
  """The group of a pattern where it is found in a text. Raises ValueError where it is not."""
  if m := re.search(pattern, text):
    return m[1]
  raise ValueError(f"{pattern} is not found in it")


def callees(i):
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
    return int(group(r"index=(\d+)", element.attributes))

  try:
    caller, condition, body = computations[name], *(
        computations[group(rf"\b{key}=%([\w.-]+)", i.attributes)]
        for key in ("condition", "body"))
    test, after, before = root(condition), root(body), operand(caller, i, 0)
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


def result(i):
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
  return sum(array.bytes for array in arrays(shape))


class Array(NamedTuple):
  """An array of a shape; `layout` is what stands in its braces."""

  dtype: str
  dims: tuple[int, ...]
  layout: str

  @property
  def bytes(self):
    if self.dtype in ("token", "opaque"):
      return 0
    bits = 8 if self.dtype == "pred" else int(group(r"[a-z]+(\d+)", self.dtype))
    return -(-bits * math.prod(self.dims) // 8)

  @property
  def stored(self):
    """Its bytes with the padding of tiles: {1,0:T(8,128)(2,1)} are minor to major, and tiles."""
    dims = list(self.dims)
    if m := re.match(r"([\d,]+):T\(([\d,]+)\)", self.layout):
      for axis, size in zip(numbers(m[1]), reversed(numbers(m[2]))):
        dims[axis] = -(-dims[axis] // size) * size
    return self._replace(dims=tuple(dims)).bytes

  @property
  def in_main_memory(self):
    """Not in a TPU's vector memory, S(1), or among its scalars and flags."""
    return not re.search(r"S\([1-9]", self.layout)


def arrays(shape):
  """Of a shape: one, or those of a tuple."""
  return [Array(dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d), layout)
          for dtype, dims, layout in re.findall(r"(\w+)\[([^]]*)\](?:\{([^}]*)\})?", shape)]


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
    return [numbers(group) for group in m[1].split("},{")]
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
    ids = np.arange(total).reshape(numbers(m[1]))
    return ids.transpose(numbers(m[2]) if m[2] else None)
  ids = np.array(numbers(text))
  if sorted(ids) != list(range(total)):
    raise ValueError("not every device, once")
  return ids


def numbers(text):
  """Of "1,2" or "{1,2}"."""
  return [int(n) for n in text.strip("{}").split(",")]
