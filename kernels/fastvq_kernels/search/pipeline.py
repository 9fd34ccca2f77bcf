"""The certified search: pack, scan, refine, rescan, decide, scan in float64, walk; without a host synchronisation."""

from collections.abc import Callable

from torch import Tensor, int64

from ..launch import dense
from .decide import decide
from .exhaustive import exhaustive
from .pack_codes import PackedCodebook, pack_codebook
from .pack_tokens import pack_tokens
from .refine import refine
from .rescan import rescan
from .scan import scan
from .scan_float64 import scan_float64


def nearest_code(
    x: Tensor, codebook: Tensor, metric: str, pack: Callable[[Tensor, str], PackedCodebook] = pack_codebook
) -> Tensor:
    """Index of the nearest code of every token, exactly as float64 gives it, the lowest on ties.

    Args:
        x: tokens ``[N, D]`` or ``[H, N, D]``, any floating dtype.
        codebook: codes ``[K, D]`` or ``[H, K, D]``, any floating dtype.
        metric: ``"euclidean"``, ``"cosine"`` or ``"dot"``.
        pack: `pack_codebook`, or a cache of its result.

    Returns:
        int64 ``[N]`` or ``[H, N]``; -1 for a token with a NaN or an infinity. A code with one is never chosen.
    """
    if x.numel() == 0:
        return x.new_empty(x.shape[:-1], dtype=int64)
    heads = x if x.dim() == 3 else x[None]
    return certified_search(heads, pack(codebook, metric))[0].view(x.shape[:-1])


def certified_search(x: Tensor, packed: PackedCodebook) -> tuple[Tensor, Tensor]:
    """Indices ``[H, N]`` int64 of ``x [H, N, D]``, and how many tokens the first scan leaves open, ``[H]`` int32."""
    x = dense(x)
    tokens = pack_tokens(x, packed)
    bins = scan(tokens, x.shape[1], packed)
    indices, open_list = refine(x, packed, tokens, bins)
    crowded = decide(x, packed, open_list, rescan(packed, tokens, bins, open_list), indices)
    exhaustive(x, packed, crowded, scan_float64(x, packed, crowded), indices)
    return indices, open_list.count
