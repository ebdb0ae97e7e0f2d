"""Attention, by the kernel that suits the platform: `model.attention` of every network.

    xla      XLA's own operations, with all scores (N, H, L, L) in memory: any platform, any shape.
    splash   flash attention for TPU: JAX's Pallas kernel, which passes over blocks of scores that
             nobody sees, and keeps none. On a CPU it is interpreted: a slow rehearsal.
    cudnn    flash attention of NVIDIA's library: heads of up to 128 features, in bfloat16.
    auto     splash on TPU from SPLASH_FROM positions on, cudnn on an NVIDIA GPU where it can,
             else xla.

They agree to rounding. A text may share its row with others: a segment is a run of equal numbers
in `segment` (N, L), and none sees another.
"""

from collections.abc import Callable
import functools
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from dbjax.errors import UserError
from dbjax.fields import FREE
from dbjax.fields import one_of
from dbjax.models import on_mesh

Kernel = Annotated[str, one_of("auto", "xla", "splash", "cudnn"), FREE,
                   "attention's kernel; auto: what suits the platform"]

SPLASH_FROM = 512  # positions: below, the scores of one head are few blocks of splash
_LANES = 128  # splash takes positions by this many
_BLOCK = 512  # positions, of splash's blocks: larger ones reuse more of what is loaded


def attend(q: jax.Array, k: jax.Array, v: jax.Array, *, kernel: str = "xla",
           segment: jax.Array | None = None, causal: bool = False, remat: bool = False
           ) -> jax.Array:
  """Multi-head attention of each position to all that it sees, itself among them.

  Args:
    q, k, v: (N, L, H, d).
    kernel: see above.
    segment: (N, L) int, or None: all see one another.
    causal: none sees a later position.
    remat: xla's scores are computed again in the backward pass, not kept.

  Returns:
    (N, L, H, d), in the dtype of v.

  Raises:
    UserError: the kernel does not allow the platform, the dtype or the shapes.
  """
  kernel = _choose(kernel, q)
  if kernel == "splash":
    length = _padded(q.shape[1])
    mask = np.tri(length, dtype=bool) if causal else np.ones((length, length), bool)
    return _splash(q, [k], [v], mask, segment)
  mask = None if segment is None else same_segment(segment)
  if causal:
    ahead = jnp.tri(q.shape[1], dtype=bool)
    mask = ahead if mask is None else mask & ahead
  plain = _heads_first if on_mesh.device().platform == "cpu" else jax.nn.dot_product_attention
  if kernel == "cudnn":
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
  return _recomputed(functools.partial(plain, mask=mask), remat)(q, k, v)


def attend_to_others(q: jax.Array, k: jax.Array, v: jax.Array, others_k: jax.Array,
                     others_v: jax.Array, *, segment: jax.Array, kernel: str = "xla",
                     remat: bool = False) -> jax.Array:
  """Attention of position i to the others' j < i, and to itself.

  Args:
    q, k, v: (N, L, H, d), of the positions themselves.
    others_k, others_v: (N, L, H, d), of the others.
    segment, kernel, remat: as in `attend`.

  Returns:
    (N, L, H, d).

  Raises:
    UserError: as `attend`.
  """
  kernel = _choose(kernel, q)
  if kernel == "splash":
    length = _padded(q.shape[1])
    mask = np.concatenate([np.tri(length, k=-1, dtype=bool), np.eye(length, dtype=bool)], axis=1)
    return _splash(q, [others_k, k], [others_v, v], mask, segment)
  if kernel == "cudnn":
    itself = jnp.broadcast_to(jnp.eye(q.shape[1], dtype=bool), (len(q), 1, *[q.shape[1]] * 2))
    mask = jnp.concatenate([see_before(segment) & ~itself, itself], axis=-1)
    keys, values = jnp.concatenate([others_k, k], 1), jnp.concatenate([others_v, v], 1)
    return jax.nn.dot_product_attention(q, keys, values, mask=mask, implementation="cudnn")
  return _recomputed(_to_others, remat)(q, k, v, others_k, others_v, see_before(segment))


def same_segment(segment: jax.Array) -> jax.Array:
  """Who may see whom, for all heads: (N, L) int -> (N, 1, L, L) bool."""
  return (segment[:, :, None] == segment[:, None])[:, None]


def see_before(segment: jax.Array) -> jax.Array:
  """The same, and none a later one."""
  return same_segment(segment) & jnp.tri(segment.shape[1], dtype=bool)


def _heads_first(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
  """`jax.nn.dot_product_attention`, which puts heads after positions in its products: XLA on CPU
  then writes weights and their gradients twice, once transposed.
  """
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  scores = jnp.einsum("nhqd,nhkd->nhqk", q, k, preferred_element_type=jnp.float32)
  scores = scores / np.sqrt(q.shape[-1]).astype(np.float32)
  if mask is not None:
    scores = jnp.where(mask, scores, -jnp.inf)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum("nhqk,nhkd->nhqd", weights, v).swapaxes(1, 2)


def _to_others(q: jax.Array, k: jax.Array, v: jax.Array, others_k: jax.Array, others_v: jax.Array,
               mask: jax.Array) -> jax.Array:
  """`attend_to_others`, where the diagonal of the others' scores is free for one's own."""
  # Zeros on the diagonal, not a difference after the sum: rounding would leak.
  itself = jnp.eye(q.shape[1], dtype=bool)
  scores = jnp.einsum("nqhd,nkhd->nhqk", q, others_k, preferred_element_type=jnp.float32)
  own = jnp.einsum("nqhd,nqhd->nhq", q, k, preferred_element_type=jnp.float32)
  scores = jnp.where(itself, own[..., None], scores) / np.sqrt(q.shape[-1])
  weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
  own = jnp.where(itself, weights, 0).sum(-1).swapaxes(1, 2)[..., None].astype(v.dtype)
  weights = jnp.where(itself, 0, weights).astype(v.dtype)
  return jnp.einsum("nhqk,nkhd->nqhd", weights, others_v) + own * v


def _recomputed(f: Callable, remat: bool) -> Callable:
  return jax.checkpoint(f) if remat else f


def _choose(kernel: str, q: jax.Array) -> str:
  """The kernel for the devices that are compiled for."""
  device = on_mesh.device()
  is_tpu, is_nvidia = device.platform == "tpu", "NVIDIA" in device.device_kind
  flash = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] <= 128 and not q.shape[-1] % 8
  if kernel == "auto":
    if is_tpu and q.shape[1] >= SPLASH_FROM:
      return "splash"
    return "cudnn" if is_nvidia and flash else "xla"
  if kernel == "cudnn" and not (is_nvidia and flash):
    raise UserError(f"model.attention=cudnn: expected bfloat16 and heads of a multiple of 8 "
                    f"features up to 128, on an NVIDIA GPU; found {q.dtype} and heads of "
                    f"{q.shape[-1]} on {device.device_kind}: set model.attention=auto")
  if kernel == "splash" and device.platform not in ("tpu", "cpu"):
    raise UserError(f"model.attention=splash: expected a TPU, found {device.device_kind}: set "
                    "model.attention=auto")
  return kernel


def _padded(length: int) -> int:
  """Positions that splash has room for."""
  return -(-length // _LANES) * _LANES


def _splash(q: jax.Array, keys: list[jax.Array], values: list[jax.Array], mask: np.ndarray,
            segment: jax.Array | None) -> jax.Array:
  """Attention to several streams of as many positions, side by side.

  Args:
    q, keys, values: (N, L, H, d) each.
    mask: (P, number of streams * P), P as L is `_padded`.
    segment: (N, L), or None.
  """
  # Not where it is not used: it imports much.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  length, heads, size = q.shape[1:]
  padded = _padded(length)
  block = next(b for b in (_BLOCK, 384, 256, _LANES) if padded % b == 0)
  names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute",
           "block_q_dq", "block_kv_dq")
  sizes: dict[str, Any] = dict.fromkeys(names, block)
  with jax.ensure_compile_time_eval():  # constants, whatever is traced around
    run = splash.make_splash_mha(
        splash.MultiHeadMask([splash.NumpyMask(mask)] * heads), head_shards=1, q_seq_shards=1,
        block_sizes=splash.BlockSizes(**sizes),
        interpret=on_mesh.device().platform == "cpu")
  if segment is None and padded > length:
    segment = jnp.zeros(q.shape[:2], jnp.int32)

  def of_device(q, k, v, segment):
    ids = None if segment is None else splash.SegmentIds(segment, jnp.tile(segment, len(keys)))
    return jax.vmap(run)(q, k, v, segment_ids=ids)

  def stream(x):  # (N, L, H, d) -> (N, H, P, d)
    return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padded - length), (0, 0)))

  if segment is not None:  # room that is left over sees itself alone
    segment = jnp.pad(segment, ((0, 0), (0, padded - length)), constant_values=-1)
  scale = np.float32(size**-0.5)  # splash has none
  out = on_mesh.on_each_device(of_device)(
      stream(q * scale.astype(q.dtype)), jnp.concatenate([stream(k) for k in keys], 2),
      jnp.concatenate([stream(v) for v in values], 2), segment)
  return out[:, :, :length].swapaxes(1, 2)
