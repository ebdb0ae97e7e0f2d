"""Operations in HLO: written by hand as TPUs have them, and compiled here."""

import jax
import jax.numpy as jnp
import pytest

from dbjax import operations

LOOP = """\
HloModule m, num_partitions=1

%product.clone (param_0: bf16[6,1024,4096], param_1: bf16[256,1024]) -> bf16[256,4096] {
  %param_0 = bf16[6,1024,4096]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_2 = s32[]{:T(128)S(6)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %slice = bf16[1,1024,4096]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_0, %param_2, %zero, %zero), \
dynamic_slice_sizes={1,1024,4096}
  %weights = bf16[1024,4096]{1,0:T(8,128)(2,1)} bitcast(%slice)
  %param_1 = bf16[256,1024]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %product = bf16[256,4096]{1,0:T(8,128)(2,1)} convolution(%param_1, %weights), \
dim_labels=bf_io->bf, metadata={op_name="jit(f)/while/body/layer/dot_general" stack_frame_id=3}
}

%outer (param_0.1: bf16[6,1024,4096], param_1.1: bf16[256,1024]) -> bf16[256,4096] {
  %param_0.1 = bf16[6,1024,4096]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1 = bf16[256,1024]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %param_2.1 = s32[]{:T(128)S(6)} parameter(2)
  %inner = bf16[256,4096]{1,0:T(8,128)(2,1)} fusion(%param_0.1, %param_1.1, %param_2.1), \
kind=kOutput, calls=%product.clone
  ROOT %tanh = bf16[256,4096]{1,0:T(8,128)(2,1)} tanh(%inner), metadata={op_name="jit(f)/tanh"}
}

%in_place (param_0.2: f32[6,10,72], param_1.2: f32[10,72]) -> (f32[6,10,72], f32[10,72]) {
  %param_0.2 = f32[6,10,72]{2,1,0:T(8,128)} parameter(0)
  %param_1.2 = f32[10,72]{1,0:T(8,128)} parameter(1)
  %update = f32[1,10,72]{2,1,0:T(8,128)} bitcast(%param_1.2)
  %dynamic = f32[6,10,72]{2,1,0:T(8,128)} dynamic-update-slice(%param_0.2, %update, %c, %c, %c)
  ROOT %both = (f32[6,10,72]{2,1,0:T(8,128)}, f32[10,72]{1,0:T(8,128)}) tuple(%dynamic, %param_1.2)
}

%body (b: (s32[], f32[8])) -> (s32[], f32[8]) {
  %b = (s32[]{:T(128)}, bf16[6,1024,4096]{2,1,0:T(8,128)(2,1)}, f32[6,10,72]{2,1,0:T(8,128)}, \
/*index=3*/f32[10,72]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%b), index=0
  %w = bf16[6,1024,4096]{2,1,0:T(8,128)(2,1)} get-tuple-element(%b), index=1
  %all = f32[6,10,72]{2,1,0:T(8,128)} get-tuple-element(%b), index=2
  %one = f32[10,72]{1,0:T(8,128)} get-tuple-element(%b), index=3
  %x = bf16[256,1024]{1,0:T(8,128)(2,1)} custom-call(), custom_call_target="AllocateBuffer"
  %copy-start = (bf16[256,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[256,1024]{1,0:T(8,128)(2,1)}, \
u32[]{:S(2)}) copy-start(%x)
  %copy-done = bf16[256,1024]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %fusion.1 = bf16[256,4096]{1,0:T(8,128)(2,1)} fusion(%w, %copy-done, %i), kind=kOutput, \
calls=%outer
  %fusion.2 = (f32[6,10,72]{2,1,0:T(8,128)}, f32[10,72]{1,0:T(8,128)}) fusion(%all, %one), \
kind=kLoop, calls=%in_place
  %n = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)S(6)} add(%i, %n)
  ROOT %t = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%next, %w, %all, %one)
}

%condition (c: (s32[], f32[8])) -> pred[] {
  %c = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  ROOT %no = pred[]{:T(512)S(6)} constant(false)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  ROOT %while = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%p), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"6"}}
}
"""


def test_what_a_loop_of_tpu_runs_computes_and_moves():
  copy, product, in_place, add = operations.read(LOOP)
  assert [op.name for op in (copy, product, in_place, add)] == [
      "copy-start", "fusion.1", "fusion.2", "next"]
  assert {op.count for op in (copy, product, in_place, add)} == {6}
  assert copy.bytes == 256 * 1024 * 2  # from main memory; the other end is not in it
  assert product.products == (("jit(f)/while/body/layer/dot_general", 2 * 256 * 1024 * 4096),)
  assert product.bytes == (1024 + 256) * 4096 * 2  # one layer's weights, and the result
  assert ("tanh", "jit(f)/tanh") in product.parts
  assert in_place.bytes == 2 * 16 * 128 * 4  # 10 x 72 in tiles of 8 x 128, read and written
  assert add.bytes == 4 and not add.products  # the constant


MODULE = "HloModule m\n\nENTRY %main (p: f32[8]) -> f32[8] {\n  LINE\n}\n"
PALLAS = """%pallas.1 = f32[256,256]{1,0:T(8,128)} custom-call(%p), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={}}, \
metadata={op_name="jit(f)/pallas_call" stack_frame_id=4}, backend_config={"flag_configs":[],\
"custom_call_config":{"body":"TUzvUg==",COST"needs_layout_passes":true}}"""


def test_a_kernel_says_what_it_computes_or_is_refused():
  cost = '"cost_estimate":{"flops":"12345","transcendentals":"0","bytes_accessed":"7"},'
  (op,) = operations.read(MODULE.replace("LINE", PALLAS.replace("COST", cost)))
  assert op.products == (("jit(f)/pallas_call", 12345),) and op.bytes == 256 * 256 * 4
  with pytest.raises(ValueError, match="does not say what it computes.*%pallas.1"):
    operations.read(MODULE.replace("LINE", PALLAS.replace("COST", "")))


# Operations compiled here, on one device.

def run(f, *shapes):
  text = jax.jit(f).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile()
  return operations.read(text.as_text())


def flops(ops):
  return sum(op.count * flops for op in ops for _, flops in op.products)


def test_products_in_scanned_layers_are_counted():
  """Six layers: forward, and backward for the weights and for the input."""
  def loss(weights, x):
    layer = lambda x, w: (jnp.tanh(x @ w), None)
    return jnp.sum(jax.lax.scan(layer, x, weights)[0])

  assert flops(run(jax.grad(loss, (0, 1)), (6, 48, 48), (32, 48))) == 3 * 6 * 2 * 32 * 48 * 48


@pytest.mark.parametrize("equation, left, right, macs", [
    ("nqhd,nkhd->nhqk", (2, 24, 3, 16), (2, 40, 3, 16), 2 * 24 * 40 * 3 * 16),
    ("nhqk,nkhd->nqhd", (2, 3, 24, 40), (2, 40, 3, 16), 2 * 24 * 40 * 3 * 16),
    ("ij,jk->ik", (7, 300), (300, 5), 7 * 300 * 5)])
def test_products_of_batches_are_counted(equation, left, right, macs):
  assert flops(run(lambda a, b: jnp.einsum(equation, a, b), left, right)) == 2 * macs


@pytest.mark.parametrize("options", [
    dict(window_strides=(1, 1), padding="SAME"),
    dict(window_strides=(2, 3), padding=((3, 0), (-1, 4))),
    dict(window_strides=(1, 2), padding=((4, 4), (2, 5)), lhs_dilation=(3, 2)),
    dict(window_strides=(1, 1), padding="VALID", rhs_dilation=(2, 3)),
    dict(window_strides=(1, 1), padding="VALID", feature_group_count=2),
    dict(window_strides=(1, 1), padding="VALID", batch_group_count=2),
])
def test_convolutions_are_counted_without_padding_and_holes(options):
  """Ones by ones: each output is the number of its products that are not by zero."""
  features = 8 // options.get("feature_group_count", 1)
  left, right = (4, 16, 15, 8), (3, 4, features, 6)
  f = lambda x, w: jax.lax.conv_general_dilated(
      x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)
  expected = f(jnp.ones(left), jnp.ones(right)).sum()
  assert flops(run(f, left, right)) == 2 * expected


def test_a_layer_reads_its_slice_of_stacked_weights():
  """Twice as many layers move twice as much, not four times."""
  layers = lambda x, weights: jax.lax.scan(lambda x, w: (x + w, None), x, weights)[0]
  moved = lambda n: sum(op.count * op.bytes for op in run(layers, (4096,), (n, 4096)))
  assert moved(80) / moved(40) == pytest.approx(2, rel=0.05)
  assert 80 <= moved(80) / (4 * 4096) <= 80 * 5  # at least the weights, once


def test_flops_of_products_that_somebody_reads():
  def f(x, weights, unread):
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]
    _ = x @ unread
    return jnp.einsum("bij,bkj->bik", x, x)

  shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((3, 7, 30), (5, 30, 30), (30, 30))]
  text = jax.jit(f).lower(*shapes).compile().as_text()
  assert operations.product_flops(text) == 5 * 2 * 3 * 7 * 30 * 30 + 2 * 3 * 7 * 7 * 30
