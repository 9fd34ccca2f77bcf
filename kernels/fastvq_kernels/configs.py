"""Launch configurations: one default per kernel and backend, the reason beside each odd entry."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NearestConfig:
    """Tile sizes and compiler options of the search kernel."""

    BN: int  # tokens per program
    BK: int  # codes per step of the loop
    BD: int  # dimensions per matrix product
    precision: str  # of the float32 matrix product
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class AccumulateConfig:
    """Tile sizes of the scatter-add kernel."""

    BN: int  # tokens per program
    BD: int  # dimensions per program
    num_warps: int


# Three TF32 products per float32 product: the tensor cores of sm_80, sm_90 and sm_100 have no float32 form.
NEAREST_CUDA = NearestConfig(BN=64, BK=64, BD=32, precision="tf32x3", num_warps=4, num_stages=2)
# MFMA multiplies float32 as it is; 64 KiB of shared memory leave no room for a third stage.
NEAREST_HIP = NearestConfig(BN=64, BK=64, BD=32, precision="ieee", num_warps=4, num_stages=2)

ACCUMULATE = AccumulateConfig(BN=32, BD=128, num_warps=4)


def nearest_config(is_hip: bool | None = None) -> NearestConfig:
    """The search configuration of this machine's backend, or of the one named."""
    if is_hip is None:
        is_hip = torch.version.hip is not None
    return NEAREST_HIP if is_hip else NEAREST_CUDA
