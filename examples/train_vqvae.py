"""A small convolutional VQ-VAE on photographs, on one process or on many.

    python examples/train_vqvae.py --out vqvae-out
    torchrun --nproc-per-node 2 examples/train_vqvae.py --out vqvae-two

Ctrl-C saves; the same command continues where it stopped, on a CPU bit for bit. Needs the extra ``demo``, which brings
scikit-learn's two photographs. Their middle is held out; crops of the rest train the model.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastvq
from fastvq.cli.demo.photos import PatchSampler, Photo, load_photos, psnr, to_pixels, to_tokens
from fastvq.cli.demo.pictures import pairs_png, training_png
from fastvq.testing.machine import pick_device

LEARNING_RATE = 5e-4
WIDTH = 64  # channels between the layers
PANELS = ("loss", "PSNR of the batch, dB", "codes in use", "perplexity (effective number of codes)")


class Residual(nn.Sequential):
    """``x + f(x)`` with two convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """``x [b, width, h, w]`` to the same shape."""
        return x + super().forward(x)


class VQVAE(nn.Module):
    """Encoder, codebook of ``codes`` vectors of ``dim`` elements, decoder. One token stands for 4 x 4 pixels."""

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, WIDTH, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 4, stride=2, padding=1),
            Residual(WIDTH),
            Residual(WIDTH),
            nn.Conv2d(WIDTH, dim, 1),
        )
        self.codebook = fastvq.EMACodebook(
            codes,
            dim,
            ema_decay=0.9,  # the run is short, and the encoder moves fast
            channel_first=True,
            no_random_restart=False,
            restart_threshold_relative=0.05,
            restart_resets_statistics=True,
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(dim, WIDTH, 3, padding=1),
            Residual(WIDTH),
            Residual(WIDTH),
            nn.ReLU(),
            nn.ConvTranspose2d(WIDTH, WIDTH, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(WIDTH, 3, 4, stride=2, padding=1),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``images [b, 3, h, w]`` in [-1, 1] to their reconstructions and the commitment loss."""
        quantized, _, commitment = self.codebook(self.encoder(images))
        return self.decoder(quantized), commitment


def main(
    codes: Annotated[int, typer.Option(min=1, help="Size of the codebook.")] = 512,
    dim: Annotated[int, typer.Option(min=1, help="Elements of a code.")] = 32,
    steps: Annotated[int, typer.Option(min=1, help="Total number of training steps.")] = 700,
    batch: Annotated[int, typer.Option(min=1, help="Crops per step and process.")] = 16,
    crop: Annotated[int, typer.Option(min=8, max=160, help="Edge of a crop in pixels, a multiple of 4.")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=2**32, help="Seed of all random draws.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    save_every: Annotated[int, typer.Option(min=1, help="Steps from one saved state to the next.")] = 100,
    out: Annotated[Path, typer.Option(help="Directory for state and pictures.")] = Path("vqvae-out"),
) -> None:
    """Train a VQ-VAE, or continue the run in OUT. Writes state.pt, pictures.png and training.png."""
    if crop % 4:
        raise typer.BadParameter(f"crop must be a multiple of 4, got {crop}")
    with process_group(pick_device(device)) as (target, rank, world_size):
        torch.manual_seed(seed)
        model = VQVAE(codes, dim).to(target)
        optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
        options = {"codes": codes, "dim": dim, "batch": batch, "crop": crop, "seed": seed, "processes": world_size}
        history: list[list[float]] = []  # a row of PANELS for every step
        if (out / "state.pt").exists():
            state = torch.load(out / "state.pt", map_location=target)
            if state["options"] != options:
                raise typer.BadParameter(f"{out} holds a run with {state['options']}, this one has {options}")
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            history = state["history"]

        def save() -> None:
            if rank == 0:
                state = {"options": options, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
                save_atomically({**state, "history": history}, out / "state.pt")

        training, held_out = split(load_photos([]), crop)
        sampler = PatchSampler(training, crop, target, share_on_grid=0)
        trained = DistributedDataParallel(model) if world_size > 1 else model
        console = Console(quiet=rank != 0)
        start = time.perf_counter()
        with stop_on_interrupt() as interrupted, progress_bar(console) as progress:
            task = progress.add_task("", total=steps, completed=len(history))
            for step in range(len(history), steps):
                # Each step and rank has its own seed, so that a continued run needs no saved random state.
                torch.manual_seed(seed * 1_000_003 + step * world_size + rank)
                images = to_images(sampler.draw(batch, torch.default_generator), crop)
                decoded, commitment = trained(images)
                error = F.mse_loss(decoded, images)
                loss = error + commitment
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

                # All ranks stop in the same step, even if the signal reached them in different ones.
                stop = torch.tensor(float(interrupted.is_set()), device=target)
                sums = torch.stack([loss.detach(), error.detach(), stop])
                if world_size > 1:
                    dist.all_reduce(sums)
                mean_loss, mean_error, stopping = (sums / world_size).tolist()
                decibel = 10 * math.log10(4 / mean_error)  # the values span [-1, 1]
                usage, perplexity = float(model.codebook.usage), float(model.codebook.perplexity)
                history.append([mean_loss, decibel, usage, perplexity])
                text = f"loss {mean_loss:.4f}  PSNR {decibel:.1f} dB  usage {usage:.0%}  perplexity {perplexity:.0f}"
                progress.update(task, completed=step + 1, description=text)
                if (step + 1) % save_every == 0 or step + 1 == steps or stopping:
                    save()
                if stopping:
                    break

        if len(history) < steps:
            console.print(f"interrupted after step {len(history)}; the same command continues")
        else:
            check_same_codebook(model.codebook, world_size)
            if rank == 0:
                seconds = time.perf_counter() - start
                quality = write_pictures(model.eval(), held_out, crop, torch.tensor(history), out)
                console.print(f"{seconds:.0f} s, PSNR of the held-out crops {quality:.2f} dB; written to {out}{os.sep}")
    if len(history) < steps:
        raise typer.Exit(130)


@contextmanager
def process_group(device: torch.device) -> Iterator[tuple[torch.device, int, int]]:
    """Device and rank of this process, and the number of processes. Without torchrun: rank 0 of 1."""
    if "RANK" not in os.environ:
        yield device, 0, 1
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield device, dist.get_rank(), dist.get_world_size()
        # A process aborts if it ends while gloo's threads still hold tensors of the last exchange.
        dist.barrier()
    finally:
        dist.destroy_process_group()


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of raising, so that the step ends before the state is saved."""
    event = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def progress_bar(console: Console) -> Progress:
    """One line with bar, steps, values and time left."""
    columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.description}"))
    return Progress(*columns, TimeRemainingColumn(compact=True), console=console)


def split(photos: list[Photo], crop: int) -> tuple[list[Photo], list[Photo]]:
    """Training and held-out parts: the middle two columns of crops are held out. Sides are cut to whole crops."""
    training, held_out = [], []
    for photo in photos:
        rows, columns = (side // crop for side in photo.pixels.shape[:2])
        middle = (columns - 2) // 2 * crop
        pixels = photo.pixels[: rows * crop, : columns * crop]
        left, center, right = pixels.tensor_split([middle, middle + 2 * crop], dim=1)
        training += [Photo(photo.name, left), Photo(photo.name, right)]
        held_out.append(Photo(photo.name, center))
    return training, held_out


def to_images(tokens: Tensor, crop: int) -> Tensor:
    """Crops ``[n, 3 crop²]``, as ``fastvq.cli.demo.photos`` draws them, to ``[n, 3, crop, crop]``."""
    # A view with channels last. Convolutions keep this layout, so that the codebook reads its tokens without a copy.
    return tokens.view(-1, crop, crop, 3).permute(0, 3, 1, 2)


def save_atomically(state: dict[str, Any], file: Path) -> None:
    """Save so that a run killed meanwhile leaves the earlier state."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}")
    torch.save(state, unfinished)
    unfinished.replace(file)


def check_same_codebook(codebook: fastvq.EMACodebook, world_size: int) -> None:
    """Raise RuntimeError if the codes of two ranks differ in a bit."""
    if world_size > 1:
        codes = [torch.empty_like(codebook.embeddings) for _ in range(world_size)]
        dist.all_gather(codes, codebook.embeddings)
        if not all(torch.equal(codes[0], others) for others in codes):
            raise RuntimeError("the codebooks of the ranks differ")


@torch.no_grad()
def write_pictures(model: VQVAE, photos: list[Photo], crop: int, history: Tensor, out: Path) -> float:
    """Reconstruct all crops of ``photos``, write pictures of eight of them, and return the PSNR of all."""
    tokens = torch.cat([to_tokens(photo.pixels, crop) for photo in photos])
    images = to_images(tokens, crop).to(model.codebook.embeddings.device)
    originals, decoded = (to_pixels(x.permute(0, 2, 3, 1)).cpu() for x in (images, model(images)[0]))
    quality = psnr(originals, decoded)
    shown = torch.linspace(0, len(originals) - 1, min(8, len(originals))).round().long()
    bits = math.log2(model.codebook.n_codes) / 16
    title = f"held-out crops, {bits:.2f} bits per pixel, PSNR {quality:.1f} dB"
    (out / "pictures.png").write_bytes(pairs_png(originals[shown], decoded[shown], title))
    (out / "training.png").write_bytes(training_png(history, "VQ-VAE on photographs", PANELS))
    return quality


if __name__ == "__main__":
    typer.run(main)
