"""Train encodec's residual quantizer twice, as it is and with its search replaced, and compare codes and times.

    python examples/replace_search.py

The replacement is one function: ``codebook.quantize = lambda x: fastvq.nearest_code(x, codebook.embed)``. Both models
start alike and see the same batches, with encodec's own random initialisation, in which most codes are not used and
grow long. Needs the package ``encodec``, which the extra ``dev`` brings.
"""

import importlib.util
import statistics
import sys
import time
from types import ModuleType
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import fastvq

CHANNELS = 16  # of the signal that the models encode


class Step(NamedTuple):
    """What a training step gives: indices ``[levels, batch, frames]``, the loss, and the time it took."""

    indices: Tensor
    loss: float
    seconds: float


def residual_quantizer(dim: int, codes: int, levels: int) -> nn.Module:
    """Encodec's class with ``levels`` codebooks ``[codes, dim]``, initialised at random."""
    if "encodec" not in sys.modules:
        # The package's first line imports its audio functions, and with them torchaudio, whose wheels want CUDA.
        spec = importlib.util.find_spec("encodec")
        if spec is None:
            raise ModuleNotFoundError('this example needs encodec: pip install "fastvq-triton[dev]"')
        package = ModuleType("encodec")
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules["encodec"] = package
    from encodec.quantization.core_vq import ResidualVectorQuantization

    return ResidualVectorQuantization(dim=dim, codebook_size=codes, num_quantizers=levels, kmeans_init=False)


def replace_search(quantizer: Any) -> None:
    """Let every level find its codes with fastvq."""
    for layer in quantizer.layers:
        codebook = layer._codebook
        codebook.quantize = lambda x, codebook=codebook: fastvq.nearest_code(x, codebook.embed)


class Trainer:
    """A small autoencoder around the quantizer. Equal seeds give equal models."""

    def __init__(self, dim: int, codes: int, levels: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.encoder, self.decoder = nn.Conv1d(CHANNELS, dim, 3, padding=1), nn.Conv1d(dim, CHANNELS, 3, padding=1)
        self.quantizer = residual_quantizer(dim, codes, levels)
        self.optimizer = torch.optim.Adam([*self.encoder.parameters(), *self.decoder.parameters()], 3e-4)

    def step(self, batch: Tensor, seed: int) -> Step:
        """One step on ``batch [batch, CHANNELS, frames]``; ``seed`` decides which tokens take the place of codes."""
        torch.manual_seed(seed)
        start = time.perf_counter()
        quantized, indices, losses = self.quantizer(self.encoder(batch))
        loss = F.mse_loss(self.decoder(quantized), batch) + losses.mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return Step(indices, float(loss.detach()), time.perf_counter() - start)


def train_side_by_side(
    dim: int, codes: int, levels: int, batch: int, frames: int, steps: int, seed: int = 0
) -> tuple[list[Step], list[Step]]:
    """The steps of encodec as it is, and those with the search replaced, taken in turns."""
    models = [Trainer(dim, codes, levels, seed) for _ in range(2)]
    replace_search(models[1].quantizer)
    history: tuple[list[Step], list[Step]] = ([], [])
    draws = torch.Generator().manual_seed(seed)
    for step in range(steps):
        signal = torch.randn(batch, CHANNELS, frames, generator=draws)
        for which in (0, 1) if step % 2 else (1, 0):
            history[which].append(models[which].step(signal, seed + step))
    return history


def main(
    codes: Annotated[int, typer.Option(min=2, help="Codes of each level.")] = 1024,
    dim: Annotated[int, typer.Option(min=1, help="Elements of a code.")] = 128,
    levels: Annotated[int, typer.Option(min=1, help="Codebooks, one after the other.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Signals in a batch.")] = 8,
    frames: Annotated[int, typer.Option(min=1, help="Tokens of a signal.")] = 150,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all random draws.")] = 0,
) -> None:
    """Train both and print medians of the step times, their ratio, and how many codes are the same."""
    theirs, ours = train_side_by_side(dim, codes, levels, batch, frames, steps, seed)
    before, after = (1e3 * statistics.median(step.seconds for step in history) for history in (theirs, ours))
    same = sum(int((a.indices == b.indices).sum()) for a, b in zip(theirs, ours, strict=True))
    total = sum(step.indices.numel() for step in ours)
    typer.echo(f"encodec {before:.0f} ms a step, with fastvq's search {after:.0f} ms: {after / before:.2f} of the time")
    typer.echo(f"{same} of {total} codes are the same; last losses {theirs[-1].loss:.6f} and {ours[-1].loss:.6f}")


if __name__ == "__main__":
    typer.run(main)
