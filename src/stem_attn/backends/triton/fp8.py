"""Attention with 8-bit products on Hopper: round q, k and v, then launch the kernel that multiplies such numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from stem_attn.backends.triton import attention
from stem_attn.backends.triton.attention import addressable, rows_of
from stem_attn.backends.triton.attention_launches import geometry_of, switches_of
from stem_attn.backends.triton.boxes import Boxes
from stem_attn.backends.triton.devices import gluon_runs_on
from stem_attn.backends.triton.launch import Launch, run_on
from stem_attn.backends.triton.layouts import Layouts, alignment_of, layouts_of, padded
from stem_attn.backends.triton.logits import Logits, sinks_of
from stem_attn.backends.triton.quantize_kernels import combine_kernel, measure_kernel, quantize_kernel
from stem_attn.backends.triton.tiles import choose_fp8_tile
from stem_attn.blocks import BlockGrid, BlockSelection
from stem_attn.call import Call
from stem_attn.fallbacks import note_on_device
from stem_attn.layout import Part

CHUNKS = 64
"""Runs of a head's keys that are measured apart: with 8 KV heads, four programs a multiprocessor."""
MEASURED = 32
"""Keys and values that are measured at once; half as many of more than 128 dims."""
TOKENS = 64
"""Queries, keys or values that are rounded at once: two programs of 8 warps share a multiprocessor; likewise."""
RUN = 16
"""Such tiles a program, which makes the rotation once."""


def why_unsupported(call: Call) -> str | None:
    """Say why a call that the backend takes in the precision of its inputs cannot be computed in 8 bits."""
    q = call.q
    head_dims = q.shape[3], call.v.shape[3]
    if call.block_size not in (64, 128):
        return f"with precision='fp8' its block sizes are 64 and 128, got {call.block_size}"
    if q.element_size() != 2:
        return f"with precision='fp8' it takes float16 and bfloat16, got {q.dtype}"
    if min(head_dims) <= 32:
        return f"with precision='fp8' its head dims go from 33 to 256, got {head_dims[0]} and {head_dims[1]}"
    if not gluon_runs_on(q.device):
        return (
            f"precision='fp8' needs a Hopper GPU (compute capability 9.0) and Triton 3.6 to 3.9, got {_got(q.device)}"
        )
    return None


def _got(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return f"{name} and Triton {triton.__version__}"


def attend(call: Call, selections: Sequence[BlockSelection], out: Tensor, lse: Tensor | None) -> None:
    """Attend over the kept blocks, one part after the other; see `Backend.attend`."""
    for part, selection in zip(call.parts, selections, strict=True):
        attend_part(call, part, selection, out[:, :, part.tokens], lse)


def attend_part(call: Call, part: Part, selection: BlockSelection, out: Tensor, lse: Tensor | None) -> None:
    """Attend within one part with 8-bit products; the arguments are those of `attention.attend_part`.

    Heads whose numbers reach too far for 8 bits are computed in the inputs' precision. The device finds out which: both
    kernels are launched, and each passes over the other's heads.
    """
    q, k, v, scale = addressable(call, part.q, part.k, part.v)
    logits = Logits.of(call, scale)
    shifts = lse is not None or call.sinks is not None or call.softcap is not None
    x = quantize(q, k, v, part.k_len, part.pages, call.block_size, shifts=shifts)
    launch(x, call, logits, rows_of(selection), selection.counts, out, lse, part.k_len)
    note_on_device(
        "triton: heads whose numbers 8 bits do not hold are computed in the inputs' precision", x.unsafe.sum()
    )
    others = x.unsafe.bool().repeat_interleave(q.shape[1] // k.shape[1], 1, output_size=q.shape[1])[:, :, None]
    attention.attend_part(call, part, selection, out, lse, others)


@dataclass(frozen=True, slots=True, eq=False)
class Rounded:
    """Queries, keys and values in e4m3, in whole blocks; see `quantize_kernels`.

    Args:
        q: [B, Hq, Qb * block_size, D], D padded to a power of two, as Dv below.
        k: [B, Hkv, Kb * block_size, D], less its mean.
        v: [B, Hkv, Kb * Dv, block_size], blocks transposed, keys in an order of their own.
        q_scales: float32 [B, Hq, Qb * block_size].
        kv_scales: float32 [2, B, Hkv], of k and v.
        unsafe: int32 [B, Hkv], 1 where the numbers of a head reach too far.
        shifts: float32 [B, Hq, Qb * block_size], the dot products of q with the mean of k; None: not wanted.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_scales: Tensor
    kv_scales: Tensor
    unsafe: Tensor
    shifts: Tensor | None


def quantize(
    q: Tensor, k: Tensor, v: Tensor, k_len: int, pages: Tensor | None, block_size: int, *, shifts: bool
) -> Rounded:
    """Round to e4m3.

    Args:
        q: [B, Hq, Tq, D], last stride 1.
        k: [B, Hkv, Tk, D] or [pages, Hkv, page_size, D], last stride 1.
        v: [B, Hkv, Tk, Dv], likewise.
        k_len: Tk.
        pages: int32, the sequence's pages, last stride 1; None where nothing is in pages.
        block_size: Tokens a block, 64 or 128.
        shifts: Whether the dot products with the mean key are wanted.
    """
    batch, heads, q_len, head_dim = q.shape
    kv_heads, v_head_dim = k.shape[1], v.shape[3]
    grid = BlockGrid(q_len, k_len, block_size)
    q_tokens, k_tokens = grid.q_blocks * block_size, grid.k_blocks * block_size
    pad, pad_v = padded(head_dim), padded(v_head_dim)
    dims = max(pad, pad_v)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    measured, means = new(batch * kv_heads, CHUNKS, 5, dims), new(batch * kv_heads, dims)
    x = Rounded(
        new(batch, heads, q_tokens, pad, dtype=torch.float8_e4m3fn),
        new(batch, kv_heads, k_tokens, pad, dtype=torch.float8_e4m3fn),
        new(batch, kv_heads, grid.k_blocks * pad_v, block_size, dtype=torch.float8_e4m3fn),
        new(batch, heads, q_tokens),
        new(2, batch, kv_heads),
        new(batch, kv_heads, dtype=torch.int32),
        new(batch, heads, q_tokens) if shifts else None,
    )
    table = means if pages is None else pages
    key = layouts_of(q, k, v), q.dtype, q.device, alignment_of(q, k, v)
    measure, combine, write = _rounding_launches(*key, grid, pages is not None, shifts)
    run_on(q.device, measure, k, v, measured, table)
    run_on(q.device, combine, measured, means, x.kv_scales, x.unsafe)
    written = x.q, x.k, x.v, x.unsafe, x.q_scales, x.q_scales if x.shifts is None else x.shifts
    run_on(q.device, write, q, k, v, means, x.kv_scales, *written, table)
    return x


@lru_cache(maxsize=1024)
def _rounding_launches(
    layouts: Layouts,
    dtype: torch.dtype,
    device: torch.device,
    alignment: tuple[bool, ...],
    grid: BlockGrid,
    paged: bool,
    shifts: bool,
) -> tuple[Launch, Launch, Launch]:
    """Make the launches that calls of equal layouts share: measure, combine, quantize."""
    (batch, heads, q_len, head_dim), (_, kv_heads, page, _), v_head_dim = layouts[0][0], layouts[1][0], layouts[2][0][3]
    k_len, block_size, blocks = grid.k_len, grid.block_size, (grid.q_blocks, grid.k_blocks)
    pad, pad_v = padded(head_dim), padded(v_head_dim)
    dims = {"D_PAD": pad, "DV_PAD": pad_v, "DIMS": max(pad, pad_v)}
    constants = dims | {"D": head_dim, "DV": v_head_dim, "PAGE": page if paged else 0}
    strides = tuple(layout[1][:3] for layout in layouts)
    measured, tokens = (MEASURED, TOKENS) if dims["DIMS"] <= 128 else (MEASURED // 2, TOKENS // 2)
    chunk = -(-k_len // (CHUNKS * measured)) * measured
    rows, kv_rows = batch * heads, batch * kv_heads
    measure = Launch(
        measure_kernel,
        (CHUNKS, kv_rows),
        (*strides[1:], kv_heads, k_len, chunk),
        constants | {"TOKENS": measured},
        num_warps=8,
    )
    combine = Launch(combine_kernel, (kv_rows, 1), (k_len,), dims | {"CHUNKS": CHUNKS}, num_warps=4)
    numbers = rows, kv_rows, heads // kv_heads, kv_heads, grid.offset % block_size, q_len, k_len, *blocks, RUN
    constants |= {"BLOCK": block_size, "TOKENS": tokens, "SHIFTS": shifts}
    q_runs, k_runs = (-(-n * (block_size // tokens) // RUN) for n in blocks)
    programs = rows * q_runs + 2 * kv_rows * k_runs
    write = Launch(quantize_kernel, (programs, 1), (*strides, *numbers), constants, num_warps=8, num_stages=3)
    return measure, combine, write


def launch(
    x: Rounded,
    call: Call,
    logits: Logits,
    indices: Tensor,
    counts: Tensor,
    out: Tensor,
    lse: Tensor | None,
    k_len: int,
) -> None:
    """Run the 8-bit kernel over one part, on the device of its inputs, on its current stream.

    Args:
        x: The inputs.
        call: Whose properties the kernel computes.
        logits: How it makes logits.
        indices: int32 [B, Hq, R, S], last stride 1; slots past a row's count are not read.
        counts: int32 [B, Hq, R].
        out: [B, Hq, Tq, Dv], last stride 1; written, but for unsafe heads.
        lse: float32 [B, Hq, Tq] contiguous, or None; likewise.
        k_len: Tokens of the sequence.
    """
    tensors = (out, out if lse is None else lse, indices, counts)
    key = layouts_of(x.q, x.k, x.v, out, indices, counts), out.dtype, out.device, alignment_of(*tensors)
    plan, boxes = _attention_launch(*key, logits, call.window, lse is not None, k_len)
    inputs = (box.of(t) for t, box in zip((x.q, x.k, x.v), boxes, strict=True))
    shifts = x.q_scales if x.shifts is None else x.shifts
    read = x.q_scales, x.kv_scales, x.unsafe, shifts
    run_on(out.device, plan, *inputs, *read, *tensors, sinks_of(call.sinks, counts))


@lru_cache(maxsize=1024)
def _attention_launch(
    layouts: Layouts,
    dtype: torch.dtype,
    device: torch.device,
    alignment: tuple[bool, ...],
    logits: Logits,
    window: int | None,
    lse: bool,
    k_len: int,
) -> tuple[Launch, list[Boxes]]:
    """Make the launch that calls of equal layouts share, and its descriptors."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    from stem_attn.backends.triton.hopper_fp8_kernel import box_layout, hopper_fp8_kernel

    (_, _, k_tokens, pad), (_, _, v_rows, block_size) = layouts[1][0], layouts[2][0]
    pad_v = v_rows * block_size // k_tokens
    tile = choose_fp8_tile(block_size, pad, pad_v)
    (_, _, q_len, v_head_dim), strides = layouts[3]
    (programs, batch, _), numbers = geometry_of(layouts, q_len, k_len, logits, window)
    switches = switches_of(logits, dtype, device, window, lse)
    constants = {"DV": v_head_dim, "STAGES": tile.stages, **switches, "BLOCK": block_size}
    numbers = (strides, *layouts[4][1][:3], *layouts[5][1], *numbers)
    # A multiprocessor's threads share 64 Ki registers; the kernel deals its own out anew.
    options = {"num_warps": 4, "maxnreg": tile.registers}
    grid = programs * (block_size // tile.keys), batch

    def boxes(rows: int, columns: int) -> Boxes:
        layout = box_layout(rows, columns)
        return Boxes(lambda x: GluonDescriptor.from_tensor(x, [1, 1, rows, columns], layout))

    plan = Launch(hopper_fp8_kernel, grid, numbers, constants, **options)
    return plan, [boxes(64, pad), boxes(tile.keys, pad), boxes(pad_v, tile.keys)]
