"""Collectives in HLO: against groups by hand and by numpy, programs compiled here and for v5e."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from dbjax import hlo

MESH = {"block": 2, "data": 2, "fsdp": 2}
ALL = P(("block", "data", "fsdp"))
GLOBAL = "channel_id=1, replica_groups={}, use_global_device_ids=true, to_apply=%add"
EIGHT = np.arange(8)


def module(*lines, header="num_partitions=8", before=""):
  body = "\n".join("  " + line for line in lines)
  return f"HloModule m, {header}\n\n{before}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"


def one(attributes, opcode="all-reduce", shape="f32[8]{0}", **module_args):
  text = module(f"ROOT %x = {shape} {opcode}(%p), {attributes}", **module_args)
  (found,) = hlo.collectives(text)
  return found


def sets(groups):
  return sorted(sorted(int(n) for n in group) for group in groups)


# Groups: every form in which XLA prints them.

@pytest.mark.parametrize("text, expected", [
    ("{{0,1},{2,3},{4,5},{6,7}}", EIGHT.reshape(4, 2)),
    ("{{7,0},{1,2,3},{4,5,6}}", [[0, 7], [1, 2, 3], [4, 5, 6]]),
    ("{}", [EIGHT]),
    ("[2,4]<=[8]", EIGHT.reshape(2, 4)),
    ("[8,1]<=[8]", EIGHT.reshape(8, 1)),
    ("[4,2]<=[2,4]T(1,0)", EIGHT.reshape(2, 4).transpose(1, 0).reshape(4, 2)),
    ("[4,2]<=[2,2,2]T(0,2,1)", EIGHT.reshape(2, 2, 2).transpose(0, 2, 1).reshape(4, 2)),
    ("[2,4]<=[2,2,2]T(2,1,0)", EIGHT.reshape(2, 2, 2).transpose(2, 1, 0).reshape(2, 4)),
    ("mesh['x'=2,'y'=4] {'x'}", EIGHT.reshape(2, 4).T),
    ("mesh['x'=2,'y'=4] {'y'}", EIGHT.reshape(2, 4)),
    ("mesh['x'=2,'y'=1,'z'=4] {'y','z'}", EIGHT.reshape(2, 4)),
    ("mesh['x'=2,'y'=4] {'y','x'}", [EIGHT]),
    ("mesh['x'=2,'y'=4] {}", EIGHT.reshape(8, 1)),
    ("mesh[x=2,y=4] {x}", EIGHT.reshape(2, 4).T),
    # Parts of an axis: (what is before it)its size, as in XLA's replica_group_test.cc.
    ("mesh['x'=8] {'x':(1)2}", EIGHT.reshape(2, 4).T),
    ("mesh['x'=8] {'x':(1)4}", EIGHT.reshape(4, 2).T),
    ("mesh['x'=8] {'x':(2)2}", EIGHT.reshape(2, 2, 2).transpose(0, 2, 1).reshape(4, 2)),
    ("mesh['x'=8] {'x':(4)2}", EIGHT.reshape(4, 2)),
    ("mesh['x'=8] {'x':(1)2,'x':(4)2}", EIGHT.reshape(2, 2, 2).transpose(1, 0, 2).reshape(2, 4)),
    ("mesh['x'=8] {'x':(4)2,'x':(1)2}", EIGHT.reshape(2, 2, 2).transpose(1, 0, 2).reshape(2, 4)),
    ("mesh['x'=2,'y'=4] {'x','y':(2)2}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
    # Devices in another order.
    ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}", EIGHT.reshape(2, 4)),
    ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}", EIGHT.reshape(2, 4).T),
    ("mesh['x'=4,'y'=2], device_ids=(3,1,0,2,7,5,4,6) {'y'}", [[3, 1], [0, 2], [7, 5], [4, 6]]),
    ("mesh['x'=4,'y'=2], device_ids=(3,1,0,2,7,5,4,6) {'x':(1)2}",
     [[3, 7], [1, 5], [0, 4], [2, 6]]),
])
def test_groups_in_every_form(text, expected):
  for more in ("", ', metadata={op_name="jit(f)/psum" stack_frame_id=5}'):
    op = one(GLOBAL.format(text) + more)
    assert sets(op.groups) == sets(expected)
    assert op.kind == "all-reduce"


def test_parts_of_axes_that_are_no_powers_of_two():
  attributes = GLOBAL.format("mesh['a'=6,'b'=6] {'a':(3)2,'b':(1)3}")
  groups = sets(one(attributes, header="num_partitions=36").groups)
  same = lambda m, n: m // 12 == n // 12 and m % 2 == n % 2  # a // 2, b % 2
  assert groups == sets({tuple(n for n in range(36) if same(m, n)) for m in range(36)})


@pytest.mark.parametrize("header, opcode, attributes, expected", [
    # One replica, as in a jit. Without use_global_device_ids, an id is the replica.
    ("num_partitions=4", "all-reduce", "channel_id=1, replica_groups={{0}}", [[0, 1, 2, 3]]),
    ("num_partitions=4", "all-reduce", "replica_groups={{0}}", [[0], [1], [2], [3]]),
    ("num_partitions=4", "all-to-all", "channel_id=1, replica_groups={{0,2},{1,3}}",
     [[0, 2], [1, 3]]),
    ("num_partitions=4", "collective-broadcast", "channel_id=1, replica_groups={}",
     [[0, 1, 2, 3]]),
    ("num_partitions=4", "collective-permute", "channel_id=1, source_target_pairs={{0,0},{3,1}}",
     [[1, 3]]),
    ("num_partitions=4", "collective-permute", "channel_id=1, source_target_pairs={{2,2}}", []),
    # Two replicas of three partitions: device = replica * 3 + partition.
    ("replica_count=2, num_partitions=3", "all-gather", "replica_groups={{0,1}}",
     [[0, 3], [1, 4], [2, 5]]),
    ("replica_count=2, num_partitions=3", "all-gather", "channel_id=1, replica_groups={{0},{1}}",
     [[0, 1, 2], [3, 4, 5]]),
    ("replica_count=2, num_partitions=3", "ragged-all-to-all",
     "channel_id=1, replica_groups={{0,2},{1}}", [[0, 2], [1], [3, 5], [4]]),
    ("replica_count=2, num_partitions=3", "all-gather",
     "channel_id=1, replica_groups={{0,5},{1,2,3,4}}, use_global_device_ids=true",
     [[0, 5], [1, 2, 3, 4]]),
    ("replica_count=4", "collective-permute", "source_target_pairs={{0,1},{1,2}}",
     [[0, 1], [1, 2]]),
])
def test_what_an_id_stands_for(header, opcode, attributes, expected):
  op = one(attributes, opcode, header=header)
  assert op.kind == opcode
  assert sets(op.groups) == expected


# Bytes.

@pytest.mark.parametrize("shape, size", [
    ("f32[]", 4), ("f32[8,128]{1,0:T(8,128)}", 4096), ("bf16[3]{0:T(256)(128)(2,1)S(1)}", 6),
    ("pred[5]{0}", 5), ("s4[3]{0:E(4)}", 2), ("f8e4m3fn[7]{0}", 7), ("f4e2m1fn[5]{0}", 3),
    ("u64[2]{0}", 16), ("c128[2]{0}", 32), ("f32[<=8,2]{1,0}", 64), ("f32[0]{0}", 0),
    ("(f32[2]{0:T(128)}, /*index=1*/bf16[4,2]{1,0:T(8,128)(2,1)})", 24),
])
def test_bytes_of_every_type(shape, size):
  assert one(GLOBAL.format("{}"), shape=shape).bytes == size


@pytest.mark.parametrize("kind, shape, size", [
    ("all-gather", "(f32[2]{0}, f32[8]{0})", 32),
    ("all-gather", "((f32[2]{0}, u8[3]{0}), (f32[8]{0}, u8[12]{0}))", 44),
    ("all-reduce", "f32[8]{0}", 32),
    ("all-reduce", "(f32[8]{0}, f32[4]{0})", 48),
    ("all-reduce", "((f32[8]{0}), f32[8]{0}, u32[])", 32),
    ("reduce-scatter", "((f32[8]{0}), f32[2]{0:T(128)}, u32[]{:S(2)})", 8),
    # libtpu for v5e
    ("collective-permute", "(bf16[24,2048]{1,0:T(8,128)(2,1)S(1)}, bf16[24,2048]{1,0:T(8,128)(2,1)"
     "S(1)}, u32[]{:S(2)}, u32[]{:S(2)})", 24 * 2048 * 2),
])
def test_an_asynchronous_start_counts_once_and_its_result_only(kind, shape, size):
  (op,) = hlo.collectives(module(
      f"%start = {shape} {kind}-start(%p), " + GLOBAL.format("{}"),
      f"ROOT %done = f32[8]{{0}} {kind}-done(%start)"))
  assert (op.kind, op.bytes, op.count) == (kind, size, 1)


# Counts.

ADD = f"%x = f32[8]{{0}} all-reduce(%p), {GLOBAL.format('{}')}"


def computation(name, *lines):
  return f"%{name} (p: f32[8]) -> f32[8] {{\n  " + "\n  ".join(lines) + "\n}\n"


def test_a_wrapped_collective_counts_once():
  before = computation("wrapped", "ROOT " + ADD)
  start = "%a = ((f32[8]{0}), f32[8]{0}, u32[]) async-start(%p), calls=%wrapped"
  for done in ("", ", calls=%wrapped"):
    text = module(start, "%b = f32[8]{0} async-done(%a)" + done, before=before)
    assert [op.count for op in hlo.collectives(text)] == [1]


def test_loops_multiply_and_callers_add():
  loop = ('%{0} = f32[8]{{0}} while(%p), condition=%no, body=%{1}, backend_config='
          '{{"known_induction_variable":{{"tuple_index":"0"}},"known_trip_count":{{"n":"{2}"}}}}')
  text = module(
      "%inner = f32[8]{0} conditional(%p), branch_computations={%outer, %fused}",
      # Instructions may have the names of computations.
      "%f = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused, control-predecessors={%inner}",
      loop.format("w", "outer", 24),
      before=(computation("fused", ADD) + computation("inner", ADD)
              + computation("no", "ROOT %c = pred[] constant(false)")
              + computation("outer", ADD, loop.format("v", "inner", 5))))
  assert [op.count for op in hlo.collectives(text)] == [2, 5 * (1 + 24), 1 + 24]


COUNTER = """
%body (b: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %b = (s32[]{{:T(128)}}, f32[8]{{0:T(128)}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%b), index=0
  %p = f32[8]{{0:T(128)}} get-tuple-element(%b), index=1
  {add}
  %copy.6 = s32[]{{:T(128)S(6)}} copy(%i)
  %one.1..sunk = s32[]{{:T(128)}} constant({step})
  %next = s32[]{{:T(128)}} add(%copy.6, %one.1..sunk)
  ROOT %tuple.54 = (s32[]{{:T(128)}}, f32[8]{{0:T(128)}}) tuple(%{next}, %x)
}}

%condition (c: (s32[], f32[8])) -> pred[] {{
  %n = s32[]{{:T(128)}} constant({stop})
  %c = (s32[]{{:T(128)}}, f32[8]{{0:T(128)}}) parameter(0)
  %j = s32[]{{:T(128)}} get-tuple-element(%c), index={index}
  ROOT %lt.10 = pred[]{{:T(512)}} compare(%j, %n), direction={direction}
}}
"""


@pytest.mark.parametrize("fields, count", [
    ({}, 6), (dict(start=2), 4), (dict(step=4), 2), (dict(start=1, stop=8, step=3), 3),
    (dict(direction="NE"), 1), (dict(index=1), 1), (dict(next="i"), 1), (dict(step=0), 1),
    (dict(stop="{...}"), 1)])
def test_a_loop_of_tpu_is_counted_by_its_counter(fields, count):
  fields = {**dict(add=ADD, start=0, stop=6, step=1, direction="LT", index=0, next="next"),
            **fields}
  text = module(
      f"%zero = s32[]{{:T(128)}} constant({fields['start']})",
      "%copy.3 = s32[]{:T(128)} copy(%zero)",
      "%tuple.64 = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%copy.3, %p)",
      "ROOT %while.28 = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%tuple.64), "
      "condition=%condition, body=%body", before=COUNTER.format(**fields))
  assert [op.count for op in hlo.collectives(text)] == [count]


# What libtpu prints for v5e:4x4, cut to what matters here.

V5E = """\
HloModule jit_step, is_scheduled=true, num_partitions=16, frontend_attributes={arg="default"}

FunctionNames
1 "<lambda>"

%fused_computation.28 (param_0.92: bf16[1,2048,2048]) -> (bf16[1,2048,2048], bf16[1,4096,2048]) {
  %param_0.92 = bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.27 = bf16[1,4096,2048]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.92), channel_id=14, \
replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=8], device_ids=([8,2]T(1,0)) {'axis_0'}, \
dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
  ROOT %custom-call.2 = (bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)S(1)}, bf16[1,4096,2048]{2,1,0:T(8,\
128)(2,1)S(1)}, s32[2]{0:S(4)}, u32[]{:S(2)}, u32[]{:S(2)}, /*index=5*/u32[]{:S(2)}) \
custom-call(%all-gather.27), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.78 (param_0.96: bf16[1,2048,2048]) -> bf16[1,4096,2048] {
  %param_0.96 = bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.29 = bf16[1,4096,2048]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%param_0.96), \
channel_id=14, replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=8], device_ids=([8,2]T(1,0)) \
{'axis_0'}, dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
}

%fused_computation.30 (param_0.98: bf16[1,2048,2048]) -> bf16[1,4096,2048] {
  %param_0.98 = bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.31 = bf16[1,4096,2048]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.98), channel_id=14, \
replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=8], device_ids=([8,2]T(1,0)) {'axis_0'}, \
dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
  ROOT %custom-call.4 = bf16[1,4096,2048]{2,1,0:T(8,128)(2,1)S(1)} custom-call(%param_0.98, \
%all-gather.31), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1.clone.1 (input.4: bf16[4096,2048]) -> bf16[2072,2048] {
  %input.4 = bf16[4096,2048]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %constant.158 = bf16[] constant(0)
  %pad.2 = bf16[4144,2048]{1,0:T(8,128)(2,1)} pad(%input.4, %constant.158), padding=0_48x0_0
  %all-reduce.10 = bf16[4144,2048]{1,0:T(8,128)(2,1)} all-reduce(%pad.2), channel_id=11, \
replica_groups={{0,1},{2,3},{4,5},{6,7},{8,9},{10,11},{12,13},{14,15}}, \
use_global_device_ids=true, to_apply=%add.2.clone, \
frontend_attributes={from-cross-replica-sharding="true"}, backend_config={"flag_configs":[],\
"barrier_config":{"barrier_type":"CUSTOM","id":"2"},"scoped_memory_configs":[]}
  %constant.shard_id_table.5 = u32[16]{0:T(128)} constant({...})
  ROOT %dynamic-slice.42 = bf16[2072,2048]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%all-reduce.10, \
%multiply.11, %constant.160), dynamic_slice_sizes={2072,2048}
}

ENTRY %main.5_spmd (param.4: bf16[1,2048,2048]) -> bf16[2072,2048] {
  %async-collective-start = (bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)S(1)}, bf16[1,4096,2048]\
{2,1,0:T(8,128)(2,1)S(1)}, s32[2]{0:S(4)}, u32[]{:S(2)}) fusion(%param.4), kind=kCustom, \
output_to_operand_aliasing={{0}: (0, {})}, calls=%fused_computation.28
  %fusion.78 = (bf16[512,4096]{1,0:T(8,128)(2,1)S(1)}, bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)S(1)})\
 fusion(%get-tuple-element.341), kind=kOutput, calls=%async_collective_fusion.78
  %async-collective-done = bf16[1,4096,2048]{2,1,0:T(8,128)(2,1)S(1)} fusion(%fusion.78), \
kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%fused_computation.30
  %fusion.76 = bf16[2072,2048]{1,0:T(8,128)(2,1)S(1)} fusion(%fusion.75), kind=kCustom, \
calls=%all-reduce-scatter.1.clone.1, metadata={op_name="jit(step)/dot_general" stack_frame_id=17}
  ROOT %all-reduce.12 = (bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)S(1)}, bf16[1,2048,2048]{2,1,0:T(8,\
128)(2,1)S(1)}) all-reduce(%bitcast.97, %dynamic-slice_bitcast_fusion.11), channel_id=10, \
replica_groups=mesh['axis_0'=1,'axis_1'=2,'axis_2'=8], device_ids=([8,2]T(1,0)) {'axis_2'}, \
use_global_device_ids=true, to_apply=%add.1.clone
}
"""


def test_what_libtpu_prints():
  gather, scatter, reduce = hlo.collectives(V5E)
  pairs = EIGHT[:, None] * 2 + [0, 1]
  assert gather[:3] == ("all-gather", 4096 * 2048 * 2, 1)
  assert scatter[:3] == ("reduce-scatter", 2072 * 2048 * 2, 1)
  assert reduce[:3] == ("all-reduce", 2 * 2048 * 2048 * 2, 1)
  assert sets(gather.groups) == sets(scatter.groups) == sets(pairs)
  assert sets(reduce.groups) == sets(pairs.T)

  shape = {"block": 2, "data": 4, "fsdp": 2}
  assert [hlo.axes(op, shape) for op in (gather, scatter, reduce)] == [
      ("fsdp",), ("fsdp",), ("block", "data")]


def test_a_chain_that_was_not_seen_to_begin_is_kept():
  text = V5E.replace("AsyncCollectiveStart", "Unknown")
  assert [op.kind for op in hlo.collectives(text)].count("all-gather") == 3


# What a device sends.

@pytest.mark.parametrize("kind, size, groups, sent", [
    # A ring of four passes on three quarters of what each has; for a sum twice.
    ("all-reduce", 32, [[0, 1, 2, 3]], 2 * 3 * 8), ("all-gather", 32, [[0, 1, 2, 3]], 3 * 8),
    ("reduce-scatter", 8, [[0, 1, 2, 3]], 3 * 8), ("all-to-all", 32, [[0, 1, 2, 3]], 3 * 8),
    ("ragged-all-to-all", 32, [[0, 1], [2, 3]], 16), ("all-reduce", 32, [[0, 1], [2, 3]], 32),
    ("all-reduce", 12, [[0, 1, 2], [3]], 16), ("all-gather", 12, [[0, 1, 2], [3]], 8),
    ("collective-permute", 32, [[0, 1], [1, 2]], 32), ("collective-permute", 32, [], 0),
    ("collective-broadcast", 32, [[0, 1, 2]], 32),
    *((kind, 32, [[0], [1]], 0) for kind in hlo.KINDS)])
def test_what_a_device_sends_in_a_ring(kind, size, groups, sent):
  assert hlo.Collective(kind, size, 7, tuple(map(tuple, groups))).sent == sent


# An exchange that cannot be told is an error, never silence.

MEGASCALE = """%send = (bf16[32,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) send(%bitcast, \
%after-all), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_\
name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce_0",_xla_megascale_target=\
"{1,2}x{0:15}",_xla_megascale_transfer_type="ALL_REDUCE"}"""
KERNEL = """%shard_map.12 = bf16[64,1024]{1,0:T(8,128)(2,1)S(1)} custom-call(%param.1), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"mesh_axes":"[\\"block\\", \\"data\\", \\"fsdp\\"]"
}}, backend_config={"custom_call_config":{"body":"TUzvUg==","has_communication":true}}"""


@pytest.mark.parametrize("line", [
    MEGASCALE,
    KERNEL,
    "%x = (f32[8], u32[], token[]) send(%p, %t), channel_id=2",
    "%x = f32[8] all-reduce(%p), channel_id=1, use_global_device_ids=true",
    "%x = f32[8] all-everything(%p), channel_id=1, replica_groups={{0,1}}",
    "%x = f32[8] permute-all(%p), channel_id=1, source_target_pairs={{0,1}}",
    "%x = f32[8] collective-permute(%p), channel_id=1",
    "%x = strange[8] all-reduce(%p), " + GLOBAL.format("{{0,1}}"),
    "%x = f32[?] all-reduce(%p), " + GLOBAL.format("{{0,1}}"),
    "%x = f32[8] all-reduce %p, " + GLOBAL.format("{{0,1}}"),
    *("%x = f32[8] all-reduce(%p), " + GLOBAL.format(groups) for groups in (
        "{{0,8}}", "{{0,1},{2,x}}", "{0,1}", "[2,4]", "[2,4]<=[4]", "[2,4]<=[8]R(0)",
        "[4,2]<=[2,4]T(1,2)", "@mesh<x=8> {x}", "mesh['x'=4] {'x'}", "mesh['x'=8] {'y'}",
        "mesh['x'=8], device_ids=(0,1) {'x'}", "mesh['x'=8], device_ids=(0,1,2,3,4,5,6,6) {'x'}",
        "mesh['x'=8], devices=(0) {'x'}", "mesh['x'=8] {'x':(2)3}", "mesh['x'=8] {'x':(4)4}",
        "maximal_mesh[device_id=5] {}", "every"))])
def test_what_cannot_be_read_is_refused_with_its_line(line):
  with pytest.raises(ValueError) as error:
    hlo.collectives(module("%before = f32[8] copy(%p)", line))
  assert line.partition(", backend_config")[0] in str(error.value)


def test_a_collective_that_nothing_calls_is_refused():
  with pytest.raises(ValueError, match="nothing calls %lost.*%x = f32"):
    hlo.collectives(module("%y = f32[8] copy(%p)", before=computation("lost", ADD)))


@pytest.mark.parametrize("text", ["", "not HLO", "HloModule m\n\n%f (p: f32[]) -> f32[] {\n}\n"])
def test_other_text_is_refused(text):
  with pytest.raises(ValueError, match="ENTRY"):
    hlo.collectives(text)


def test_what_only_looks_like_a_collective():
  words = r"all-reduce(\"known_trip_count\":{\"n\":\"5\"}), replica_groups={{0,1}}, calls=%fast"
  assert not hlo.collectives(module(
      f'%all-reduce.1 = f32[8] copy(%p), metadata={{op_name="jit(f)/{words}" stack_frame_id=6}}',
      "%get-tuple-element.9 = f32[8] get-tuple-element(%all-reduce.1), index=0",
      # jax.debug.callback, compiled for v5e: to the device's own host
      "%debug_callback.20 = (bf16[]{:T(256)}, u32[], token[]) send(%p, %debug_callback.19), "
      "channel_id=1, is_host_transfer=true, sharding={{manual}, {manual}, {manual}}, "
      'frontend_attributes={_xla_host_transfer_handler_name="pjrt_rendezvous"}',
      "%c = s32[2,2]{1,0} constant({\n  { 1, 2 },\n  { 3, 4 }\n})"))


# Axes.

@pytest.mark.parametrize("groups, expected", [
    ([[0, 1], [2, 3]], ("fsdp",)), ([[0, 2], [1, 3]], ("data",)), ([[0, 4]], ("block",)),
    ([[0, 6]], ("block", "data")), ([[0, 1], [0, 4]], ("block", "fsdp")),
    ([range(8)], ("block", "data", "fsdp")), ([[5], [2]], ()), ([], ()),
])
def test_axes(groups, expected):
  assert hlo.axes(groups, MESH) == expected
  op = hlo.Collective("all-reduce", 4, 1, tuple(map(tuple, groups)))
  assert hlo.axes(op, MESH) == expected
  assert hlo.axes(op, {"batch": 1, **MESH, "one": 1}) == expected


def test_a_position_outside_the_mesh_is_refused():
  with pytest.raises(ValueError):
    hlo.axes([[0, 8]], MESH)


# Programs compiled here, for eight devices.

def sharded(shape, spec, dtype=jnp.float32, order=range(8)):
  mesh = Mesh(np.array([jax.devices()[n] for n in order]).reshape(2, 2, 2), tuple(MESH))
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def compiled(f, *args):
  return hlo.collectives(jax.jit(f).lower(*args).compile().as_text())


def mapped(f, shape=(32, 16), dtype=jnp.float32):
  """The collectives of f on every device's part of an array."""
  x = sharded(shape, ALL, dtype)
  return compiled(jax.shard_map(f, mesh=x.sharding.mesh, in_specs=ALL, out_specs=ALL,
                                check_vma=False), x)


@pytest.mark.parametrize("names", [
    ("block",), ("data",), ("fsdp",), ("data", "fsdp"), ("block", "fsdp"),
    ("block", "data", "fsdp")])
def test_a_sum_is_found_on_its_axes(names):
  (op,) = mapped(lambda x: jax.lax.psum(x, names))
  assert op[:3] == ("all-reduce", 4 * 16 * 4, 1)
  assert hlo.axes(op, MESH) == names
  assert {len(group) for group in op.groups} == {2 ** len(names)}


@pytest.mark.parametrize("f, kind, size, names, groups", [
    (lambda x: jax.lax.all_gather(x, "data"), "all-gather", 2 * 4 * 16 * 2, ("data",),
     [[0, 2], [1, 3], [4, 6], [5, 7]]),
    (lambda x: jax.lax.psum_scatter(x, ("block", "fsdp"), scatter_dimension=1, tiled=True),
     "reduce-scatter", 4 * 16 * 2 // 4, ("block", "fsdp"), [[0, 1, 4, 5], [2, 3, 6, 7]]),
    (lambda x: jax.lax.all_to_all(x, "fsdp", 1, 0, tiled=True), "all-to-all", 4 * 16 * 2,
     ("fsdp",), [[0, 1], [2, 3], [4, 5], [6, 7]]),
    (lambda x: jax.lax.ppermute(x, "block", [(0, 1)]), "collective-permute", 4 * 16 * 2,
     ("block",), [[0, 4], [1, 5], [2, 6], [3, 7]]),
    (lambda x: jax.lax.ppermute(x, ("block", "data"), [(0, 3), (1, 1), (2, 2)]),
     "collective-permute", 4 * 16 * 2, ("block", "data"), [[0, 6], [1, 7]]),
])
def test_collectives_of_shard_map(f, kind, size, names, groups):
  (op,) = mapped(f, dtype=jnp.uint16)
  assert op[:3] == (kind, size, 1)
  assert sets(op.groups) == groups
  assert hlo.axes(op, MESH) == names


def test_a_scan_counts_its_trips():
  def layers(x):
    step = lambda x, _: (jax.lax.psum(x, "data") / 2, None)
    outer = lambda x, _: (jax.lax.scan(step, jax.lax.psum(x, "fsdp"), None, length=7)[0], None)
    return jax.lax.psum(jax.lax.scan(outer, x, None, length=3)[0], "block")

  assert {hlo.axes(op, MESH): op.count for op in mapped(layers)} == {
      ("data",): 21, ("fsdp",): 3, ("block",): 1}


def test_both_branches_of_a_cond_are_found():
  ops = mapped(lambda x: jax.lax.cond(
      x[0, 0] > 0, lambda x: jax.lax.psum(x, "block"), lambda x: jax.lax.psum(x, "data"), x))
  assert sorted(hlo.axes(op, MESH) for op in ops) == [("block",), ("data",)]


def test_a_name_fools_nobody():
  @jax.named_scope('all-reduce(), replica_groups={{0,1}}, "known_trip_count":{"n":"5"}')
  def step(x, _):
    return jax.lax.psum(x, "data"), None

  (op,) = mapped(lambda x: jax.lax.scan(step, x, None, length=3)[0])
  assert (op.count, hlo.axes(op, MESH)) == (3, ("data",))
  assert not mapped(jax.named_scope("all-reduce")(lambda x: x * 2))


@pytest.mark.parametrize("axis, names", [(0, ("block",)), (1, ("data", "fsdp"))])
def test_the_partitioner_numbers_places_in_the_mesh_and_not_devices(axis, names):
  x = sharded((8, 16), P("block", ("data", "fsdp")), order=[3, 1, 0, 2, 7, 5, 4, 6])
  assert [hlo.axes(op, MESH) for op in compiled(lambda x: x.sum(axis), x)] == [names]
  assert not compiled(lambda x: x * 2, x)


def test_importing_starts_nothing(python):
  done = python("-c", "import sys; from dbjax import hlo; print('jax' in sys.modules)")
  assert done.stdout.strip() == "False", done.stderr
