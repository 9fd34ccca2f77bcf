"""``fastvq demo``: learn a codebook on photographs, encode and decode them, compare with the reference module."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

import fastvq
from fastvq.backends.choose import choose
from fastvq.cli.demo.photos import PatchSampler, Photo, from_tokens, psnr, to_tokens
from fastvq.cli.demo.pictures import Reconstruction, reconstruction_png, training_png
from fastvq.testing.machine import device_name, versions
from fastvq.testing.measure import compare_with_reference, synchronize

# Faster than the usual 0.99: the run is short, and the photographs do not drift.
_EMA_DECAY = 0.8
# One token in five steps. A higher threshold redraws codes that have their place.
_RESTART_THRESHOLD = 0.2
_TOKENS_PER_STEP = 16384
_ORACLE_TOKENS = 4096
# The reference module holds three float32 matrices of this many elements, 1.5 GiB in all.
_REFERENCE_MATRIX = 1 << 27


@dataclass(frozen=True)
class Settings:
    """The options of the demo.

    Raises:
        ValueError: an option is out of its range; the message names it.
    """

    codes: int = 4096
    patch: int = 4
    steps: int = 80
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("codes", 1), ("patch", 1), ("steps", 1), ("seed", 0)):
            if not least <= getattr(self, name) < 2**63:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def tokens_per_step(self) -> int:
        """At least two tokens for every code."""
        return max(_TOKENS_PER_STEP, 2 * self.codes)


class Learned(NamedTuple):
    """A trained codebook, its ``curves [steps, 3]`` (loss, usage, perplexity) and the wall time per step."""

    codebook: fastvq.EMACodebook
    curves: Tensor
    seconds_per_step: float


def check(settings: Settings, photos: Sequence[Photo]) -> None:
    """Raises ValueError where the settings do not suit the photographs."""
    for photo in photos:
        if settings.patch > min(photo.pixels.shape[:2]):
            height, width = photo.pixels.shape[:2]
            raise ValueError(f"patch must fit into {photo.name} ({width} x {height} pixels), got {settings.patch}")
    possible = PatchSampler(photos, settings.patch, torch.device("cpu")).n_positions
    if settings.codes > possible:
        raise ValueError(
            f"codes must be at most {possible}, the number of patches in the photographs, got {settings.codes}"
        )


def run(settings: Settings, photos: Sequence[Photo], device: torch.device, out: Path, console: Console) -> None:
    """The whole demo: learn, encode and decode, compare, then write three files to ``out`` and print the results."""
    start = time.perf_counter()
    torch.manual_seed(settings.seed)
    sampler = PatchSampler(photos, settings.patch, device)
    generator = torch.Generator().manual_seed(settings.seed)
    learned = learn(settings, sampler, generator, console)
    decoded, quality = encode_and_decode(learned.codebook, photos, settings.patch)
    with console.status("comparing with the reference module and the float64 oracle"):
        n_tokens = max(1, min(settings.tokens_per_step, _REFERENCE_MATRIX // settings.codes))
        every = torch.cat([to_tokens(photo.pixels, settings.patch) for photo in photos])
        probes = every[torch.randperm(len(every), generator=generator)[:_ORACLE_TOKENS]].to(device)
        comparison = compare_with_reference(learned.codebook, sampler.draw(n_tokens, generator), probes)

    bits = quality["bits_per_pixel"]["fixed"]
    rows = [
        Reconstruction(f"{photo.name}, {_decibel(entry['psnr_db'])}", photo.pixels, picture)
        for photo, picture, entry in zip(photos, decoded, quality["photos"], strict=True)
    ]
    title = f"{settings.codes} codes of {settings.patch} x {settings.patch} pixels"
    pictures = {
        "reconstruction.png": reconstruction_png(rows, f"reconstruction, {bits:.2f} bits per pixel"),
        "training.png": training_png(
            learned.curves, f"EMA codebook: {title}, {settings.tokens_per_step} patches a step"
        ),
    }
    result = {
        **quality,
        "seconds": {"per_training_step": learned.seconds_per_step, "total": time.perf_counter() - start},
        "comparison": comparison,
        "settings": {
            **asdict(settings),
            "tokens_per_step": settings.tokens_per_step,
            "ema_decay": _EMA_DECAY,
            "restart_thres": _RESTART_THRESHOLD,
        },
        "device": f"{device.type}: {device_name(device)}",
        "backend": choose(device).name,
        "versions": versions(),
    }
    write({**pictures, "result.json": (json.dumps(result, indent=2, allow_nan=False) + "\n").encode()}, out)
    console.print(_result_table(result, title))
    console.print(f"Written to {out}{os.sep}: {', '.join([*pictures, 'result.json'])}", soft_wrap=True)


def learn(settings: Settings, sampler: PatchSampler, generator: torch.Generator, console: Console) -> Learned:
    """Train an EMA codebook on random patches, with a progress bar."""
    device = sampler.device
    codebook = fastvq.EMACodebook(
        settings.codes,
        3 * settings.patch**2,
        no_random_restart=False,
        restart_thres=_RESTART_THRESHOLD,
        ema_decay=_EMA_DECAY,
        device=device,
    )
    history: list[Tensor] = []
    columns = (
        TextColumn("learning"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(compact=True),
    )
    start = time.perf_counter()
    with Progress(*columns, console=console) as progress, torch.no_grad():
        task = progress.add_task("", total=settings.steps)
        for step in range(1, settings.steps + 1):
            loss = codebook(sampler.draw(settings.tokens_per_step, generator)).loss
            history.append(torch.stack([loss, codebook.usage, codebook.perplexity]))
            # Reading a value waits for the GPU: not after every step.
            if step % 10 == 0 or step == settings.steps or device.type == "cpu":
                values = "loss {:.5f}  usage {:.1%}  perplexity {:.0f}".format(*history[-1].tolist())
                progress.update(task, completed=step, description=values)
    synchronize(device)
    seconds = (time.perf_counter() - start) / settings.steps
    return Learned(codebook.eval(), torch.stack(history).cpu(), seconds)


def encode_and_decode(
    codebook: fastvq.EMACodebook, photos: Sequence[Photo], patch: int
) -> tuple[list[Tensor], dict[str, Any]]:
    """Photographs from their indices alone, uint8 ``[H, W, 3]``, and how good they are.

    Bits per pixel: ``log2(K) / p²`` with indices of fixed length, ``H(indices) / p²`` with an entropy coder, where H
    is the entropy of the indices over all photographs.
    """
    decoded, entries = [], []
    histogram = torch.zeros(codebook.n_codes, dtype=torch.int64)
    for photo in photos:
        indices = codebook(to_tokens(photo.pixels, patch).to(codebook.embeddings.device)).indices
        height, width = photo.pixels.shape[:2]
        picture = from_tokens(codebook.dictionary_lookup(indices).cpu(), height, width, patch)
        decoded.append(picture)
        entries.append({"name": photo.name, "size": [width, height], "psnr_db": _finite(psnr(photo.pixels, picture))})
        histogram += torch.bincount(indices.cpu(), minlength=codebook.n_codes)
    shares = histogram.double() / histogram.sum()
    entropy = float(torch.special.entr(shares).sum())  # nats
    originals = torch.cat([photo.pixels.reshape(-1, 3) for photo in photos])
    overall = psnr(originals, torch.cat([picture.reshape(-1, 3) for picture in decoded]))
    return decoded, {
        "photos": entries,
        "psnr_db": _finite(overall),
        "bits_per_pixel": {
            "fixed": math.log2(codebook.n_codes) / patch**2,
            "entropy_coded": entropy / math.log(2) / patch**2,
        },
        "usage": {"training": float(codebook.usage), "photos": float((histogram > 0).double().mean())},
        "perplexity": {"training": float(codebook.perplexity), "photos": math.exp(entropy)},
    }


def write(files: dict[str, bytes], out: Path) -> None:
    """Create ``out`` if needed and write the files: all under temporary names first, then renamed."""
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    temporary = {out / f".{name}.{os.getpid()}": out / name for name in files}
    try:
        for path, content in zip(temporary, files.values(), strict=True):
            path.write_bytes(content)
        for path, final in temporary.items():
            path.replace(final)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
        if is_new and not any(out.iterdir()):
            out.rmdir()


def _finite(value: float) -> float | None:
    """JSON has no infinity: None stands for the PSNR of a lossless reconstruction."""
    return value if math.isfinite(value) else None


def _decibel(value: float | None) -> str:
    return "lossless" if value is None else f"{value:.1f} dB"


def _result_table(result: dict[str, Any], title: str) -> Table:
    compared = result["comparison"]
    ours, reference = compared["fastvq"], compared["reference"]
    table = Table(title=title, caption=f"backend {result['backend']} on {result['device']}")
    table.add_column()
    table.add_column("fastvq", justify="right")
    table.add_column("reference", justify="right")
    table.add_column("ratio", justify="right")
    for entry in result["photos"]:
        table.add_row(f"PSNR of {entry['name']}", _decibel(entry["psnr_db"]))
    bits = result["bits_per_pixel"]
    table.add_row("PSNR overall", _decibel(result["psnr_db"]))
    table.add_row("bits per pixel (entropy-coded)", f"{bits['fixed']:.3f} ({bits['entropy_coded']:.3f})")
    table.add_row("codes in use", f"{result['usage']['training']:.1%}")
    table.add_row("perplexity", f"{result['perplexity']['training']:.0f}", end_section=True)
    table.add_row(
        f"training step, {compared['tokens']} tokens",
        f"{1e3 * ours['seconds']:.1f} ms",
        f"{1e3 * reference['seconds']:.1f} ms",
        f"{compared['speed_up']:.1f}x as fast",
    )
    memory = [entry["peak_extra_bytes"] for entry in (ours, reference)]
    table.add_row(
        "its peak extra memory", *(f"{n / 2**20:.1f} MiB" for n in memory), f"{memory[1] / max(1, memory[0]):.0f}x less"
    )
    equal = [entry["indices_equal_to_oracle"] for entry in (ours, reference)]
    table.add_row(f"equal to float64, {compared['oracle_tokens']} tokens", *(f"{share:.2%}" for share in equal))
    return table
