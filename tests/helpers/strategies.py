"""Data on which a search that rounds picks wrong codes."""

from functools import partial

import torch
from hypothesis import strategies as st

from fastvq.testing.worst import WORST

METRICS = ("euclidean", "cosine", "dot")
_SCALES = st.sampled_from([1e-42, 1e-38, 1e-30, 1e-20, 1e-6, 1.0, 1e6, 1e18, 1e30])


@st.composite
def problems(draw, max_tokens=90, max_codes=150, dims=(1, 2, 3, 4, 8, 17, 64, 130)):
    """Tokens ``[N, D]`` and codes ``[K, D]`` built to make scores collide, cancel, overflow and underflow; a metric."""
    seed = draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    n, k = draw(st.integers(1, max_tokens)), draw(st.integers(1, max_codes))
    d = draw(st.sampled_from(dims))
    x, codebook = torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)
    if draw(st.booleans()):  # lattice: many exact ties
        x, codebook = (2 * x).round(), (2 * codebook).round()
    kind = draw(
        st.sampled_from(["none", "duplicates", "equal", "permuted", "one ulp", "outlier", "midpoints", "worst"])
    )
    if kind == "duplicates":
        codebook = codebook[torch.randint(k, (k,), generator=generator) // 2]
    elif kind == "equal":
        codebook = codebook[:1].repeat(k, 1)
    elif kind == "permuted":
        codebook = torch.stack([codebook[0][torch.randperm(d, generator=generator)] for _ in range(k)])
        x = x[:, :1].repeat(1, d)
    elif kind == "one ulp":
        codebook = codebook[:1].repeat(k, 1)
        codebook[torch.arange(k), torch.randint(d, (k,), generator=generator)] *= 1 + 2.0**-23
    elif kind == "outlier":
        codebook[draw(st.integers(0, k - 1))] *= draw(st.sampled_from([1e3, 1e6, 1e19]))
    elif kind == "worst":
        make = WORST[draw(st.sampled_from(sorted(WORST)))]
        x, codebook = make(partial(torch.randn, generator=generator), n, k, d)
    elif kind == "midpoints":
        a, b = torch.randint(k, (2, n), generator=generator)
        x = (codebook[a] + codebook[b]) / 2
    if draw(st.booleans()):
        offset = draw(st.sampled_from([1.0, 30.0, 1e4]))
        x, codebook = x + offset, codebook + offset
    if draw(st.booleans()):  # a token that does not share the scale of its neighbours
        x[draw(st.integers(0, n - 1))] *= draw(st.sampled_from([1e-20, 1e3, 1e19]))
    scale = draw(_SCALES)
    x, codebook = x * scale, codebook * draw(st.one_of(st.just(scale), _SCALES))
    if draw(st.booleans()):  # mixed magnitudes within a row
        factors = 10.0 ** torch.randint(-20, 20, (d,), generator=generator)
        x, codebook = x * factors, codebook * factors
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    return x.to(dtype), codebook.to(dtype), draw(st.sampled_from(METRICS))
