"""Where tokens lie whose keys and values are kept in pages, for kernels that take both kinds.

PAGE is a compile-time number of tokens, 0 for keys and values that are not paged: then nothing here is left in the
compiled kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_pages(
    block_table,  # int32 [pages of the sequence]; garbage past its last token
    first,  # a multiple of KEYS
    length,  # tokens of the sequence
    KEYS: tl.constexpr,  # a power of two
    PAGE: tl.constexpr,
):
    """Load the page of KEYS tokens: one number where a page holds them all, else one a token."""
    if PAGE % KEYS == 0:
        return tl.load(block_table + first // PAGE, mask=first < length, other=0)
    else:
        token = first + tl.arange(0, KEYS)
        return tl.load(block_table + token // PAGE, mask=token < length, other=0)


@triton.jit
def page_of(
    block_table,  # int32 [pages of the sequence]
    token,  # int32, of any shape
    held,  # bool, likewise: of the others no page is read
    PAGE: tl.constexpr,
):
    """Return the page of each token, for `token_offset`; any number where keys and values are not paged."""
    if PAGE > 0:
        return tl.load(block_table + token // PAGE, mask=held, other=0)
    else:
        return token


@triton.jit
def token_offset(token, page, strides, PAGE: tl.constexpr):
    """Return how far tokens lie from the first token of [B, H, T, D], or of page 0 in [pages, H, PAGE, D]."""
    if PAGE > 0:
        return page.to(tl.int64) * strides[0] + (token % PAGE).to(tl.int64) * strides[2]
    else:
        return token.to(tl.int64) * strides[2]
