"""Photographs as tokens, one per square patch, and back."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

# Share of the training patches that lie on the grid that is encoded later; the rest lie anywhere. Off-grid patches
# show the codes each motif at every phase and cost 0.1 dB against training on the grid alone. No grid costs 1 dB.
_SHARE_ON_GRID = 0.5


@dataclass(frozen=True, eq=False)
class Photo:
    """A photograph: its name and its ``pixels [H, W, 3]``, uint8."""

    name: str
    pixels: Tensor


def load_photos(files: Sequence[Path]) -> list[Photo]:
    """Read photographs from files; without files, take the two bundled with scikit-learn.

    Raises:
        ValueError: a file is not a readable picture; the message names it.
        ModuleNotFoundError: scikit-learn is needed and not installed.
    """
    if files:
        return [_read(file) for file in files]
    from sklearn.datasets import load_sample_images

    bundled = load_sample_images()
    names = [Path(name).name for name in bundled.filenames]
    return [Photo(name, torch.tensor(image)) for name, image in zip(names, bundled.images, strict=True)]


def _read(file: Path) -> Photo:
    try:
        with Image.open(file) as image:
            upright = ImageOps.exif_transpose(image)
            return Photo(file.name, torch.tensor(np.asarray(upright.convert("RGB"))))
    except UnidentifiedImageError:
        raise ValueError(f"cannot read photograph {file}: not a picture in a format that Pillow knows") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # Pillow raises SyntaxError for some broken PNG files.
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"cannot read photograph {file}: {reason}") from None


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 in [0, 255] to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_pixels(values: Tensor) -> Tensor:
    """The inverse of :func:`to_unit`, clamped and rounded to uint8."""
    return ((values + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def pad_to_patches(pixels: Tensor, patch: int) -> Tensor:
    """Repeat the last row and column of ``pixels [H, W, 3]`` until both sides are multiples of ``patch``."""
    rows, columns = (torch.arange(side + -side % patch).clamp(max=side - 1) for side in pixels.shape[:2])
    return pixels[rows][:, columns]


def to_tokens(pixels: Tensor, patch: int) -> Tensor:
    """The patches of ``pixels [H, W, 3]`` uint8, row by row: ``[ceil(H/p) * ceil(W/p), 3p²]`` in [-1, 1]."""
    padded = to_unit(pad_to_patches(pixels, patch))
    rows, columns = padded.shape[0] // patch, padded.shape[1] // patch
    return padded.view(rows, patch, columns, patch, 3).permute(0, 2, 1, 3, 4).reshape(rows * columns, -1)


def from_tokens(tokens: Tensor, height: int, width: int, patch: int) -> Tensor:
    """The inverse of :func:`to_tokens`: uint8 ``[height, width, 3]``."""
    rows, columns = -(-height // patch), -(-width // patch)
    grid = tokens.view(rows, columns, patch, patch, 3).permute(0, 2, 1, 3, 4)
    return to_pixels(grid.reshape(rows * patch, columns * patch, 3))[:height, :width]


class PatchSampler:
    """Draws random training patches, from every photograph in proportion to its number of patch positions.

    A share of ``share_on_grid`` of the patches lies on the grid of :func:`to_tokens`, the rest anywhere.
    """

    def __init__(
        self, photos: Sequence[Photo], patch: int, device: torch.device, share_on_grid: float = _SHARE_ON_GRID
    ) -> None:
        self.patch = patch
        self.share_on_grid = share_on_grid
        self.device = device
        padded = [pad_to_patches(photo.pixels, patch).to(device) for photo in photos]
        # Views: a patch at every position, [H - p + 1, W - p + 1, 3, p, p].
        self._windows = [pixels.unfold(0, patch, 1).unfold(1, patch, 1) for pixels in padded]
        # Number of positions up to and including each photograph.
        self._ends = list(accumulate(windows.shape[0] * windows.shape[1] for windows in self._windows))

    @property
    def n_positions(self) -> int:
        """Number of patch positions over all photographs."""
        return self._ends[-1]

    def draw(self, n_tokens: int, generator: torch.Generator) -> Tensor:
        """``n_tokens`` random patches ``[n_tokens, 3p²]`` in [-1, 1]; ``generator`` is on the CPU."""
        ends = [round(n_tokens * (end / self.n_positions)) for end in self._ends]
        patches = []
        for windows, start, end in zip(self._windows, [0, *ends], ends, strict=False):
            n = end - start
            top, left = (torch.randint(side, (n,), generator=generator) for side in windows.shape[:2])
            on_grid = torch.rand(n, generator=generator) < self.share_on_grid
            top, left = (torch.where(on_grid, at - at % self.patch, at).to(windows.device) for at in (top, left))
            patches.append(windows[top, left].permute(0, 2, 3, 1).reshape(n, -1))
        return to_unit(torch.cat(patches))


def psnr(original: Tensor, decoded: Tensor) -> float:
    """Peak signal-to-noise ratio of uint8 pictures in dB, ``10 log10(255² / mean (a - b)²)``; inf if they are equal."""
    error = F.mse_loss(original.double(), decoded.double())
    return float(10 * torch.log10(255.0**2 / error))
