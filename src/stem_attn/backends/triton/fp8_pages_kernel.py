"""The kernel of fp8_pages.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widen_kernel(
    cache,  # float8e4nv [pages, heads, page_size, width]
    pages,  # int32 [used pages]
    scales,  # float32 [2, heads]
    out,  # [used pages, heads, page_size, width], contiguous
    page_stride,
    head_stride,
    token_stride,
    heads,
    page_size,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    n, head = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, COLUMNS)
    scale = tl.load(scales + tl.where(column < width // 2, 0, heads) + head)
    base = cache + tl.load(pages + n).to(tl.int64) * page_stride + head.to(tl.int64) * head_stride
    to = out + (n.to(tl.int64) * heads + head) * page_size * width
    for first in range(0, page_size, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < page_size)[:, None] & (column < width)[None]
        stored = tl.load(base + row[:, None] * token_stride + column[None], mask=inside)
        value = stored.to(tl.float32) * scale[None]
        tl.store(to + row[:, None] * width + column[None], value.to(out.dtype.element_ty), mask=inside)
