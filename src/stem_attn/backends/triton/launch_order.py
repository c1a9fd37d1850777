"""The order in which attention kernels take up the rows, long ones never last; and what they are not specialised on."""

from __future__ import annotations

import triton
import triton.language as tl

UNSPECIALISED = (
    *("index_batch", "index_head", "index_row"),
    *("count_batch", "count_head", "count_row"),
    *("rows", "lead", "q_len", "k_len"),
)
"""Numbers of every attention kernel that change from call to call in a server.

Nothing is compiled anew for those that happen to be 1 or to divide by 16.
"""
LEAD_ROWS = 8
"""A prompt's last query blocks, which see the most keys and may keep them all, start first, those of all heads.

One that starts among the last programs runs on while the rest of the device idles: at 32K tokens, two full rows of the
last head took a sixth of the time (docs/log.md).
"""


@triton.jit
def row_and_head(rows, lead, programs: tl.constexpr = 1):
    """Return which row of which head this program computes, of a grid (rows * heads * programs, batch).

    The last `lead` rows of all heads come first. The others follow head by head, the last row first: neighbouring
    programs share a KV head then, and its keys and values stay in L2.
    """
    program = tl.program_id(0) // programs
    heads = tl.num_programs(0) // (rows * programs)
    if program < lead * heads:
        row = rows - 1 - program // heads
        head = program % heads
    else:
        later = program - lead * heads
        row = rows - lead - 1 - later % (rows - lead)
        head = later // (rows - lead)
    return row, head
