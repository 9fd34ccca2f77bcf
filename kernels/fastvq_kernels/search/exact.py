"""The oracle's float64 value of a pair, on the device."""

import triton
import triton.language as tl

# Above every index: the minimum over no codes.
NO_CODE = tl.constexpr(1 << 60)


@triton.jit
def exact_value(p_x, p_e, p_norm, m_e, D, METRIC: tl.constexpr):
    """The value that the nearest code minimises, float64, for codes at p_e (any shape; p_x broadcasts to it).

    Sums run over ascending j, each operation rounded (compile without fusion). Where m_e is False they are arbitrary.
    """
    b_value = tl.zeros(p_e.shape, tl.float64)
    for j in range(D):
        b_e = tl.load(p_e + j, mask=m_e, other=0.0).to(tl.float64)
        b_x = tl.load(p_x + j).to(tl.float64)
        if METRIC == "euclidean":
            b_diff = b_x - b_e
            b_value += b_diff * b_diff
        else:
            b_value += b_x * b_e
    if METRIC == "cosine":
        b_norm = tl.load(p_norm, mask=m_e, other=1.0)
        b_value = tl.where(b_norm > 0.0, b_value / b_norm, 0.0)
    if METRIC != "euclidean":
        b_value = -b_value
    return b_value
