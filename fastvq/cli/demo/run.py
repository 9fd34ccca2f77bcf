"""The work of ``fastvq demo``: learn a codebook on photographs, encode and decode them, and compare."""

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
from rich.table import Column, Table
from torch import Tensor

import fastvq
from fastvq.backends.choose import choose
from fastvq.cli.demo.photos import PatchSampler, Photo, from_tokens, psnr, to_tokens
from fastvq.cli.demo.pictures import Reconstruction, reconstruction_png, training_png
from fastvq.testing.machine import device_name, versions
from fastvq.testing.measure import compare_with_reference, synchronize

# Faster than the usual 0.99: the run is short, and the photographs do not drift.
_EMA_DECAY = 0.8
# One token in five steps. A higher threshold would redraw codes that are in use.
_RESTART_THRESHOLD = 0.2
_TOKENS_PER_STEP = 16384
_ORACLE_TOKENS = 4096
# Most elements of a matrix of the reference module. It holds three in float32, 1.5 GiB in all.
_REFERENCE_MATRIX = 1 << 27


@dataclass(frozen=True)
class Settings:
    """Options of the demo; raises a ValueError that names an option out of its range."""

    codes: int
    patch: int
    steps: int
    seed: int

    def __post_init__(self) -> None:
        for name, least in (("codes", 1), ("patch", 1), ("steps", 1), ("seed", 0)):
            if not least <= getattr(self, name) < 2**63:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def tokens_per_step(self) -> int:
        """At least two tokens for every code."""
        return max(_TOKENS_PER_STEP, 2 * self.codes)


class Learned(NamedTuple):
    """A trained codebook, its ``curves [steps, 3]`` of loss, usage and perplexity, and the wall time of a step."""

    codebook: fastvq.EMACodebook
    curves: Tensor
    seconds_per_step: float


def check(settings: Settings, photos: Sequence[Photo]) -> None:
    """Raise ValueError if a photograph is smaller than a patch, or has fewer patches than there are codes."""
    for photo in photos:
        height, width = photo.pixels.shape[:2]
        if settings.patch > min(height, width):
            raise ValueError(f"patch must fit into {photo.name} ({width} x {height} pixels), got {settings.patch}")
    possible = PatchSampler(photos, settings.patch, torch.device("cpu")).n_positions
    if settings.codes > possible:
        raise ValueError(
            f"codes must be at most {possible}, the number of patches in the photographs, got {settings.codes}"
        )


def run(settings: Settings, photos: Sequence[Photo], device: torch.device, out: Path, console: Console) -> None:
    """Learn, encode and decode, and compare; then write three files to ``out`` and print the results."""
    start = time.perf_counter()
    torch.manual_seed(settings.seed)
    sampler = PatchSampler(photos, settings.patch, device)
    generator = torch.Generator().manual_seed(settings.seed)
    learned = learn(settings, sampler, generator, console)
    decoded, quality = encode_and_decode(learned.codebook, photos, settings.patch)
    with console.status("comparing with the reference module and the float64 oracle"):
        n_tokens = max(1, min(settings.tokens_per_step, _REFERENCE_MATRIX // settings.codes))
        tokens = torch.cat([to_tokens(photo.pixels, settings.patch) for photo in photos])
        probes = tokens[torch.randperm(len(tokens), generator=generator)[:_ORACLE_TOKENS]].to(device)
        comparison = compare_with_reference(learned.codebook, sampler.draw(n_tokens, generator), probes)

    rows = [
        Reconstruction(f"{photo.name}, {_decibel(entry['psnr_db'])}", photo.pixels, picture)
        for photo, picture, entry in zip(photos, decoded, quality["photos"], strict=True)
    ]
    decoded_title = f"reconstruction, {quality['bits_per_pixel']['fixed']:.2f} bits per pixel"
    title = f"{settings.codes} codes of {settings.patch} x {settings.patch} pixels"
    curves_title = f"EMA codebook: {title}, {settings.tokens_per_step} patches a step"
    pictures = {
        "reconstruction.png": reconstruction_png(rows, decoded_title),
        "training.png": training_png(learned.curves, curves_title),
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
    codebook = fastvq.EMACodebook(
        settings.codes,
        3 * settings.patch**2,
        no_random_restart=False,
        restart_thres=_RESTART_THRESHOLD,
        ema_decay=_EMA_DECAY,
        device=sampler.device,
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
            # Reading a value waits for the GPU, so it is rare there.
            if step % 10 == 0 or step == settings.steps or sampler.device.type == "cpu":
                values = "loss {:.5f}  usage {:.1%}  perplexity {:.0f}".format(*history[-1].tolist())
                progress.update(task, completed=step, description=values)
    synchronize(sampler.device)
    seconds = (time.perf_counter() - start) / settings.steps
    return Learned(codebook.eval(), torch.stack(history).cpu(), seconds)


def encode_and_decode(
    codebook: fastvq.EMACodebook, photos: Sequence[Photo], patch: int
) -> tuple[list[Tensor], dict[str, Any]]:
    """Photographs rebuilt from their indices alone, uint8 ``[H, W, 3]``, and measures of their quality.

    Bits per pixel are ``log2(K) / p²`` for indices of fixed length, and ``H / p²`` for an entropy coder, where H is
    the entropy of the indices over all photographs.
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
    """Write the files into ``out``, which is created if needed: first under temporary names, then renamed."""
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
    """None for the infinite PSNR of a lossless reconstruction, because JSON has no infinity."""
    return value if math.isfinite(value) else None


def _decibel(value: float | None) -> str:
    return "lossless" if value is None else f"{value:.1f} dB"


def _result_table(result: dict[str, Any], title: str) -> Table:
    bits, compared = result["bits_per_pixel"], result["comparison"]
    modules = compared["fastvq"], compared["reference"]
    milliseconds = [f"{1e3 * module['seconds']:.1f} ms" for module in modules]
    memory = [module["peak_extra_bytes"] for module in modules]
    mebibytes = [f"{n / 2**20:.1f} MiB" for n in memory]
    equal = [f"{module['indices_equal_to_oracle']:.2%}" for module in modules]

    columns = (Column(name, justify="right") for name in ("fastvq", "reference", "ratio"))
    table = Table("", *columns, title=title, caption=f"backend {result['backend']} on {result['device']}")
    for photo in result["photos"]:
        table.add_row(f"PSNR of {photo['name']}", _decibel(photo["psnr_db"]))
    table.add_row("PSNR overall", _decibel(result["psnr_db"]))
    table.add_row("bits per pixel (entropy-coded)", f"{bits['fixed']:.3f} ({bits['entropy_coded']:.3f})")
    table.add_row("codes in use", f"{result['usage']['training']:.1%}")
    table.add_row("perplexity", f"{result['perplexity']['training']:.0f}", end_section=True)
    table.add_row(f"training step, {compared['tokens']} tokens", *milliseconds, f"{compared['speed_up']:.1f}x as fast")
    table.add_row("its peak extra memory", *mebibytes, f"{memory[1] / max(1, memory[0]):.0f}x less")
    table.add_row(f"equal to float64, {compared['oracle_tokens']} tokens", *equal)
    return table
