"""The maxima that the scan keeps of a tile of scores, over registers of one thread: no shuffle, no index per pair."""

# Tuples of tensors grow in loops that the compiler unrolls.
# mypy: disable-error-code="assignment, misc"

import triton
import triton.language as tl


@triton.jit
def four(u):
    """The quarters of u [A, B, C, 2, 2]: four [A, B, C], without a move between registers."""
    even, odd = tl.split(u)
    u00, u10 = tl.split(even)
    u01, u11 = tl.split(odd)
    return u00, u01, u10, u11


@triton.jit
def rows_of(u, BM: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr):
    """The rows of a thread's columns, u [BM, LANES, 4, 2, ROWS]: ROWS times [BM, LANES, 8]."""
    tl.static_assert(ROWS == 1 or ROWS == 2 or ROWS == 4 or ROWS == 8)
    if ROWS == 1:
        rows = (tl.reshape(u, [BM, LANES, 8]),)
    elif ROWS == 2:
        rows = tl.split(tl.reshape(u, [BM, LANES, 8, 2]))
    elif ROWS == 4:
        rows = four(tl.reshape(u, [BM, LANES, 8, 2, 2]))
    else:
        even, odd = tl.split(tl.reshape(u, [BM, LANES, 8, 2, 2, 2]))
        u0, u2, u4, u6 = four(even)
        u1, u3, u5, u7 = four(odd)
        rows = (u0, u1, u2, u3, u4, u5, u6, u7)
    return rows


@triton.jit
def max3(a, b, c, ASM: tl.constexpr):
    """The largest of three, one instruction on sm_90: the assembler joins two integer maxima that stand together.

    Its schedule alone joins between half and nine tenths of them, and every change elsewhere moves the share.
    """
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .s32 t; max.s32 t, $1, $2; max.s32 $0, t, $3; }",
            "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return tl.maximum(tl.maximum(a, b), c)


@triton.jit
def row_max(u, BM: tl.constexpr, LANES: tl.constexpr, ASM: tl.constexpr):
    """Maxima [BM, LANES] of a row's eight places u [BM, LANES, 8]."""
    u02, u13, u46, u57 = four(tl.reshape(u, [BM, LANES, 2, 2, 2]))
    a, b = tl.split(u02)
    c, d = tl.split(u13)
    e, f = tl.split(u46)
    g, h = tl.split(u57)
    return tl.maximum(max3(max3(max3(a, b, c, ASM), d, e, ASM), f, g, ASM), h)


@triton.jit
def keep(
    b_u, t, b_step1, b_step2, b_t, b_rows, b_place,
    BM: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Take the scores b_u [BM, BN] of step t into the maxima, which are returned.

    b_step1, b_step2 and b_t [BM, LANES] are those of the best and the second-best step, and the number of the best;
    b_rows, ROWS times [BM, LANES], those of the rows of a thread's columns, b_place [BM, LANES, 8] of places in a row.
    """
    # Column 8 LANES n + 2 LANES j + 2 q + r is thread q's, in row n at place 2 j + r.
    b_u = tl.reshape(b_u.to(b_step1.dtype, bitcast=True), [BM, ROWS, 4, LANES, 2])
    b_u = tl.permute(b_u, [0, 3, 2, 4, 1])  # [BM, LANES, 4, 2, ROWS]
    b_us = rows_of(b_u, BM, LANES, ROWS)
    b_ms = ()
    b_new = ()
    for i in tl.static_range(ROWS):
        b_ms = b_ms + (row_max(b_us[i], BM, LANES, ASM),)
        b_new = b_new + (tl.maximum(b_rows[i], b_ms[i]),)
    b_m = b_ms[0]  # [BM, LANES]
    if ROWS == 1:
        b_place = tl.maximum(b_place, b_us[0])  # [BM, LANES, 8]
    else:
        b_m = tl.maximum(b_m, b_ms[1])
        b_place = max3(b_place, b_us[0], b_us[1], ASM)
        for i in tl.static_range(2, ROWS, 2):
            b_m = max3(b_m, b_ms[i], b_ms[i + 1], ASM)
            b_place = max3(b_place, b_us[i], b_us[i + 1], ASM)
    b_step2 = tl.maximum(b_step2, tl.minimum(b_step1, b_m))
    b_t = tl.where(b_m > b_step1, t, b_t)
    return tl.maximum(b_step1, b_m), b_step2, b_t, b_new, b_place
