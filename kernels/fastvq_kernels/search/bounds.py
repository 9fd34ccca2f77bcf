r"""Every constant of the certified search, derived in one place.

**Frames.** A codebook is moved by one float32 vector `m` and scaled by one power of two:
`e' = 2^b (g e - m)` (`g = 1`, for cosine `g = 1/|e|`). A tile of tokens is scaled likewise:
`x' = 2^a (x - m)` for euclidean, `x' = 2^a x` for dot and cosine (`m` then only adds a constant per
token). Powers of two and a common `m` change no ordering. With `c = 2^(a-b)` the code to find maximises

    S_k = x'.e'_k - c h_k,    h_k = |e'_k|^2 / 2  (euclidean),  0  (dot, cosine).

**Upper bound kept by the scan.** Let `x^`, `e^` be the fp16 roundings, `X >= |x'|, |x^|`, `r >= |x' - x^|`,
`n_k >= |e'_k|`, `r_k >= |e'_k - e^_k|`, all measured. Then `x'.e'_k <= x^.e^_k + r n_k + X r_k`
(Cauchy-Schwarz). The tensor core returns `x^.e^_k + bias` up to `A (X |e^_k| + |bias|)`, `|e^_k| <= n_k + r_k`.
So with `G_k = n_k + LAMBDA r_k` and `w = max(r + A X, (1 + A) X / LAMBDA)`

    U_k = fp32_tensor_core(x^.e^_k + c B_k + w G_k)  >=  S_k + c M

where `B_k = M - h_k` rounded up. `LAMBDA = 2^12` makes both arms of `w` equal for ordinary data
(`r` is about `2^-12.3 X`), `2^16` with the split below.
`M` is the mean of `h_k` as measured with the frame, any number would be valid: because the `e'_k` average to zero, some
code has `S_k >= -c M`, so the winner is not negative and the bits of the floats may be compared as int32.

**Split.** For few columns `x' = x1 + x2 + rest` and `e' = e1 + e2 + rest` in fp16, and the packed rows `[x1, x2, x1]`,
`[e1, e1, e2]` give `x1.e1 + x2.e1 + x1.e2`: the rests are about `2^-22`, and the missing `x2.e2 <= |x2| |e2|` counts as
`2^-10 |e2|` in `r_k`, since `|x2| <= 2^-11 X` up to subnormals, which `TINY` covers. `A` then dominates the bound.

**A: tensor-core accumulation.** A block of p products and the accumulator is aligned to its largest addend
and truncated, and so is their sum: at most `p + 2` units in the last place of the largest magnitude, per block
(Fasi, Higham, Mikaitis, Pranesh 2021, "Numerical behavior of NVIDIA tensor cores", PeerJ CS 7:e330;
Khattak and Mikaitis, arXiv 2512.07004, for later generations). Products of two fp16 are exact. Blocks are of 4 or
more products, so D/p blocks cost at most `D (p + 2)/p <= 1.5 D` units of `2^-23` of `sum|x^_j e^_kj| + |bias|`;
one block more for the accumulator start, and a third of that for safety: `A = 2 (D + 16) 2^-23`.

**Lower bound from the scan.** The same steps the other way round: the products exceed `x'.e'_k` by at most
`r n_k + X r_k`, the sum exceeds theirs and the bias by `A X |e^_k| + A |bias|`, and the first three of these terms
together are at most `w G_k`.
With `B_k <= M - h_k + 2 F (h_k + M)`, `F` the relative error of `h_k` and of the sum (`bias_error`, which contains A),

    S_k >= U_k - c M - (2 + A) w G_k - 4 F c (h_k + M),    h_k <= G_k^2 / 2.

So the best code is proved by the scan alone where the bounds of all others stay below this; it is within
`2 w G_k` of its own bound, where the score in fp32 would be within `w G_k`.

**Second scan.** Tokens still open have a lower bound of their best score, so their other codes only have to be compared
with it. There `e' = e^ + e2 + rest` and `x' = x^ + x2 + rest`, and per chunk of at most `CHUNK` columns `x^.e2 + x2.e^`
is summed first, then `x^.e^` on top of it: the small products truncate at their own magnitude, and `A` counts one
chunk only. Chunks and the bias are added in fp32, `2^-24` each of `X n_k`, of the bias and of the slack. The bound is
`U_k` with these smaller constants, the residuals of the split, and `r`, `X` of the token itself instead of its tile.
Where the second-largest bound of a bin in the first scan is below the threshold, only the best code of the bin can
win: a range of such bins is not scanned again, and their best codes that reach the threshold are candidates.

**Refinement.** Codes are evaluated in fp32 from the given values, in chunks of BD columns that
are added elementwise and then reduced. Every product passes at most `D/BD + BD` additions, its two factors carry a
relative error of `2^-23` each (subtraction, scaling, a cast from float64), `h_k` the same again. Hence
`|S~_k - S_k| <= E 2^-24 (X n_k + c h_k)` with `E = D/BD + BD + 16`; for cosine `X UNIT 2^b` more, since
`fl(e fl(1/|e|))` is within `UNIT = 2^-21` of the unit vector where `1/|e|` is a normal number.

**The oracle rounds too.** Its value is a float64 sum of D terms: relative error at most `(D + 4) 2^-53 <= 2^-40`
for `D <= MAX_CERTIFIED_D` of `|x - e_k|^2 <= 2 |x'|^2 + 2 |e'_k|^2` (euclidean), or of `|x| |e_k|` (dot, cosine).
The token's share is `ORACLE |x'|^2 / c`; the code's share is inside `r_k` and `B_k`, and in the refinement `n_k` stands
for `n_k + ORACLE / (E 2^-24) 2^b |e_k|`, since for the dot product `|e_k|` may be far longer than `e'_k`. A proof
therefore speaks about the rounded float64 values, and every comparison in it is strict, so ties are never decided by a
bound.

**Third scan.** In float64 `S_k = x'.e'_k - h_k` of `x' = x - m`, `e'_k = e_k - m` (euclidean), `x.e_k` (dot),
`x.e_k / |e_k|` with the norm that the oracle takes (cosine). Every product, sum, difference and division rounds by
`2^-53`, and so does the oracle: with `x_inf = max_j |x'_j|` and `l_k = sum_j |e'_kj|`, which do not underflow where
squares would, both together err by at most `FLOAT64 (x_inf l_k + h_k + |x'|^2)`, without the last two for products, and
by `TINY64`, before and after the division, where they underflow. A token of zeros is 0 with every code by a product.

**Long codes.** `m`, and the codes that `M` is the mean of, are those of *ordinary* codes, not much longer than the
shortest: codes that nobody uses may be 10^5 times as long, and most of a codebook. Any code has its own residual and
norm, so a long one loosens its own bound. The euclidean scale leaves ordinary codes `2^-24` of the range; coordinates
beyond the range are left out of the product and count in `r_k`. A code with `n_k >= LONGEST = 2^60` counts as one of
that length: `X n - c n^2 / 2` falls with n from `X / c` on, which is at most `2^22 2^38`.

**Range.** All bounds are float32; whatever overflows becomes +inf, proves nothing, and goes to the third scan.
Underflow of scaled values adds at most `TINY`, far below one fp16 unit of the scaled data. A code is outside the range
if a coordinate overflows float32, and for products if `n_k >= LONGEST_PRODUCT`. No threshold exceeds
`X LONGEST_PRODUCT <= 2^47`, or `X^2 / 2 c <= 2^81` for euclidean distances, and in the second scan `c FLT_MAX` stands
for the bound of a code outside, at least `2^-80 FLT_MAX` or `2^-38 FLT_MAX`.
"""

import math

import triton.language as tl

# Constants that kernels name; the numbers below reach kernels as arguments, since they depend on D.
ROUNDED = tl.constexpr(2.0**-22)  # shift, factors and cast round a value before its residual is measured
LEFT_OUT = tl.constexpr(2.0**-10)  # of |e2|: x2.e2, which the three products leave out
HALF_LIMIT = tl.constexpr(65000.0)  # below the largest fp16
LARGEST = tl.constexpr(3.4028234663852886e38)  # fp32: h_k of a code outside the range
IN_RANGE = tl.constexpr(3.0e38)  # what scores and bounds stay below

ORACLE = 2.0**-40
UNIT = 2.0**-21
TINY = 2.0**-30
LONGEST, LONGEST_PRODUCT = 2.0**60, 2.0**25
# log2 c at least: of euclidean distances, and of products.
LOWEST_RATIO, LOWEST_RATIO_PRODUCT = -38, -80
TINY64 = 2.0**-1050  # of at most 2^20 underflows of 2^-1074
LARGEST64 = 1e300  # sums of magnitudes below it do not overflow
MAX_CERTIFIED_D = 4096
CHUNK = 64
# Bounds are themselves computed in fp32: a few roundings of 2^-24 each, taken as one factor.
UP = 1.0 + 2.0**-20


def longest(metric: str) -> float:
    """Length at which the range of a code ends."""
    return LONGEST if metric == "euclidean" else LONGEST_PRODUCT


def lowest_ratio(metric: str) -> int:
    """Smallest exponent of c = 2^(a-b)."""
    return LOWEST_RATIO if metric == "euclidean" else LOWEST_RATIO_PRODUCT


def float64_error(d: int) -> float:
    """FLOAT64: error of a score in float64 and of the oracle's value together."""
    return 4.0 * (d + 16) * 2.0**-53


def balance(split: bool) -> float:
    """LAMBDA: weight of a code's residual norm against its norm in the slack."""
    return 2.0**16 if split else 2.0**12


def accumulation(d: int) -> float:
    """A: error of a tensor-core sum of d products and a start value, relative to the sum of magnitudes."""
    return 2.0 * (d + 16) * 2.0**-23


def fine_accumulation(width: int) -> float:
    """A of the second scan, whose sums of `width` products are made in chunks."""
    return accumulation(min(width, CHUNK)) * (1.0 + 2.0**-8) + (math.ceil(width / CHUNK) + 4) * 2.0**-24


def fine_bias_error(d: int, width: int, split: bool) -> float:
    """`bias_error` of the second scan. With the split the compiler starts the only product with the bias."""
    return refinement(d, 32) + ORACLE + (accumulation(width) if split else 4 * 2.0**-24)


def norm_inflation(d: int) -> float:
    """Factor that turns an fp32 root of a sum of d squares into an upper bound of the true norm."""
    return 1.0 + (d + 16) * 2.0**-23


def bias_error(d: int, width: int) -> float:
    """Relative error of c B_k beside h_k + M: of h_k itself, and of the bias in the tensor-core sum."""
    return refinement(d, 32) + accumulation(width) + ORACLE


def refinement(d: int, chunk: int) -> float:
    """E 2^-24: error of a refined score relative to X n_k + c h_k."""
    return (math.ceil(d / chunk) + chunk + 16) * 2.0**-24
