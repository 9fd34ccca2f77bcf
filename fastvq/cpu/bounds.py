"""Every constant of the certified search on the CPU, derived in one place.

**Scores.** With a shift ``m`` and a power of two ``s``, tokens become ``x' = s(x - m)`` and codes ``e' = s(e - m)``.
The nearest code has the largest ``S_k = x'·e'_k - h_k``, ``h_k = |e'_k|²/2``; ``|x'|²`` is the same for all codes and
never added. For the inner product and the cosine (codes of norm 1) ``m`` and ``h`` are 0, and every token is divided by
its largest coordinate, because the order of the codes does not depend on the token's length.

**Bound.** Let ``u = 2⁻²⁴`` be float32's unit roundoff, ``a = |x'|`` and ``b_k = |e'_k|``. An inner product of n terms,
in any order and with or without fused operations, errs by at most ``γ_n = nu/(1 - nu)`` times the sum of magnitudes
(Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., section 3.1). To first order the rounding of ``x'``
and ``e'_k`` moves the score by ``2u·a·b_k``, the float32 norms move ``h_k`` by ``(D + 8)u·h_k``, and the product of
``n = D + 2`` terms errs by ``(D + 2)u(a·b_k + h_k)``. With ``c = γ_(2D+16)``, which leaves six u for the arithmetic on
maxima, the computed score is within ``c(a·b_k + h_k)`` of ``S_k``, up to underflow. The bound rides in extra columns of
the product: tokens carry ``(1, c·a)``, codes ``(-(1 - c)h_k, b_k)``, so that the product *is* an upper bound of
``S_k``, and ``2c(a·b_k + h_k)`` less is a lower bound. The largest bound of a group, less this with the largest norms
of the group, is below the best score: a threshold that every candidate reaches.

**Plain codes** (:mod:`fastvq.cpu.scan_scores`), with ``s = 1``. Candidates reach the largest computed score of their
token less the margin ``2c(a·b + h)``, b and h being the largest of all codes. Division of cosine codes by float32 norms
moves a score by less than ``(D/2 + 4)u·a``, for which c has room beside the error of the product.

**Slack.** The oracle rounds too. Its squared distances have a relative error of at most ``(D + 4)2⁻⁵³``, so that the
true score of its winner is below that of any other code by at most ``4(D + 4)2⁻⁵³(a² + b²)``, b being the larger of
both norms. c covers the part in ``b²``, and the whole of it for the other metrics; the part in ``a²`` is subtracted
from the threshold. So is float32 underflow: ``2⁻¹⁵⁰`` per rounded coordinate, times ``b < 2³³√D`` or ``a``, and per
product. Norms get ``2⁻⁶²√D`` on top where they stand for a or b, since squares of smaller coordinates vanish.

**Float64.** The same with ``u = 2⁻⁵³``, the roundoff of the oracle itself. With ``c = γ_(10D+48)`` the ``8(D + 4)u``
beyond ``(2D + 16)u`` cover the oracle's part in ``b²``, h being half of it. For the other metrics they cover its sums,
norm and division, which err by less than ``(3D + 8)u·a·b`` for two codes.

**bfloat16** (:mod:`fastvq.cpu.scan_bf16`). ``x'`` and ``e'_k`` are rounded once more. Their residuals have measured
norms ``r`` and ``r_k ≤ ρ b_k``, which move a score by at most ``r b_k + (a + r) r_k``. A product with float32 sums is
then within ``p b_k + c h_k`` of ``S_k``, with ``p = r + ρ(a + r) + ca``. Tokens have the columns ``(1, 1, p)``, codes
``-(1 - c)h_k`` in two terms and ``b_k``, each rounded up. The six u of c cover the three further terms, since maxima
of bfloat16 need none. Processors take subnormal operands and products for 0; the slack has room for that. The sums are
rounded to bfloat16 as well, which costs little near 0: tokens have a column ``t`` more, and codes 1 there. With
``t ≥ -threshold`` the products of candidates are small and not negative.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Unit roundoffs, smallest normal numbers, and norms of tokens and codes from which on scores might leave the range.
UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
TINY = {torch.float32: 2.0**-126, torch.float64: 2.0**-1022}
LARGEST_NORM = {torch.float32: 2.0**60, torch.float64: 2.0**400}
# Shorter codes lose precision when they are divided by their norm.
LEAST_COSINE_NORM = 2.0**-40
# Largest scaled coordinate of a code: far from overflow, and codes 2^90 times smaller do not underflow.
TOP_EXPONENT = 32
# With more coordinates errors might add up to the size of the scores; in bfloat16 c would not cover the further terms.
MOST_COLUMNS, MOST_COLUMNS_BF16 = 1 << 20, 1 << 14
# Relative error of one rounding to bfloat16, and a factor that makes up for two.
UNIT_BF16 = 2.0**-8
UP_BF16 = 1 + 2.0**-6
# What two terms of a code's bias in bfloat16 may exceed it by, relatively.
TWO_TERMS = 2.0**-13


def error_constant(dim: int, dtype: torch.dtype = torch.float32) -> float:
    """``c``, the relative error of a score: ``γ_(2D+16)``, or ``γ_(10D+48)`` in float64."""
    nu = (2 * dim + 16 if dtype == torch.float32 else 10 * dim + 48) * UNIT[dtype]
    return nu / (1 - nu)


def norm_room(dim: int) -> float:
    """What a float32 norm gets on top: squares of small coordinates vanish."""
    return 2.0**-62 * dim**0.5


def slack(a: Tensor, dim: int, metric: str) -> Tensor:
    """Underflow and the oracle's rounding, for packed tokens of norms ``a [n]``."""
    underflow = (dim + 16) * (2.0**-112 + 2.0**-148 * a)
    return underflow + 4 * (dim + 4) * 2.0**-53 * a.square() if metric == "euclidean" else underflow


def slack_bf16(slack: Tensor, a: Tensor, threshold: Tensor, dim: int) -> Tensor:
    """The slack in bfloat16: subnormal operands, squares of residuals, and errors that come from the shift."""
    return 2 * error_constant(dim) * threshold.abs() + slack * 2.0**23 + 2.0**-61 * dim**0.5 * a


class Margin(NamedTuple):
    """How far below the best computed score the score of a candidate may be: a polynomial in the norm of the token."""

    constant: Tensor  # []
    linear: Tensor  # []
    quadratic: float

    def of(self, norms: Tensor) -> Tensor:
        """For norms ``[n, 1]`` of tokens; infinite or NaN where scores may overflow."""
        return torch.addcmul(self.constant, torch.add(self.linear, norms, alpha=self.quadratic), norms)


def margin(b: float, rows: Tensor, metric: str) -> Margin:
    """For plain codes, ``rows [K, D]``, whose largest norm is ``b``.

    Coordinates and products may be subnormal here, and be taken for 0: ``(1 + a + b)2⁻¹²⁶`` each, at most
    ``(2 + b + a²)2⁻¹²⁶``. From ``a = 2⁶⁴`` on the square is infinite in float32.
    """
    dim, dtype = rows.shape[1], rows.dtype
    c, tiny, room = error_constant(dim, dtype), (dim + 16) * TINY[dtype], norm_room(dim)
    h, oracle = (0.5 * b * b, 4 * (dim + 4) * 2.0**-53) if metric == "euclidean" else (0.0, 0.0)
    quadratic = oracle + tiny
    linear = 2 * c * b + 2 * quadratic * room
    constant = 2 * c * h + (2 + b) * tiny + linear * room
    up = 1 + 2.0**-20  # for the roundings of the polynomial
    return Margin(rows.new_tensor(up * constant), rows.new_tensor(up * linear), up * quadratic)


def out_of_range(values: Tensor) -> Tensor:
    """Float64 values so large or small that scaling them, or the oracle itself, could leave the range."""
    magnitudes = values.abs()
    return (magnitudes > 2.0**400) | ((magnitudes < 2.0**-400) & (magnitudes > 0))
