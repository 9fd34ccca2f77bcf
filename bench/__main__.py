"""Speed, memory and accuracy side by side: `python -m bench`.

Results are stored as they come: an interrupted run goes on where it was when it is started again with the same folder.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from typer import Option

from bench.harness.machine import facts, limit_memory
from bench.harness.options import Options
from bench.harness.run import Group, run
from bench.harness.store import Store
from bench.plans import accuracy, kmeans, means, memory, models, roofline, scaling, worst
from bench.report import files as report

PLANS: dict[str, Callable[[Options], Iterator[Group]]] = {
    "search": models.search,
    "train": models.train,
    "worst": worst.plan,
    "memory": memory.plan,
    "accuracy": accuracy.plan,
    "means": means.plan,
    "scaling": scaling.plan,
    "kmeans": kmeans.plan,
}

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Out = Annotated[Path, Option(help="Folder for results, tables and pictures.")]


def _command(name: str, plans: Sequence[str], help_text: str, quickly: bool = False) -> None:
    @app.command(name, help=help_text)
    def command(
        shapes: Annotated[str, Option(help="Models (esm3,llamagen) or sizes tokens×codes×dim. Default: all.")] = "",
        device: Annotated[str, Option(help="auto, cpu or cuda; auto takes a GPU if there is one.")] = "auto",
        dtype: Annotated[str, Option(help="float32, bfloat16 or float16. Default: float32; accuracy: all.")] = "",
        contenders: Annotated[str, Option(help="Names, with commas. Default: all that offer the operation.")] = "",
        out: Out = Path("bench-out"),
        threads: Annotated[int | None, Option(min=1, help="CPU threads. Default: those of PyTorch.")] = None,
        repeats: Annotated[int | None, Option(min=1, help="Timed calls. Default: 5 on a CPU, 25 on a GPU.")] = None,
        quick: Annotated[bool, Option("--quick", help="Few and small sizes.")] = quickly,
    ) -> None:
        with _user_errors():
            if threads:
                torch.set_num_threads(threads)
            options = Options.checked(device, dtype, shapes, contenders, repeats, quick)
            groups = {plan: list(PLANS[plan](options)) for plan in plans}
        measure(groups, options, out)


for _name, _plan in PLANS.items():
    _command(
        _name, ["accuracy", "means"] if _name == "accuracy" else [_name], str(_plan.__doc__).partition(";")[0] + "."
    )
_command("quick", list(PLANS), "Everything at few and small sizes; the set of `make bench`.", quickly=True)


@app.command("report")
def rebuild(
    results: Annotated[list[Path] | None, typer.Argument(help="Files of results. Default: OUT/results.json.")] = None,
    out: Out = Path("bench-out"),
    readme: Annotated[Path | None, Option(help="Fill the marked sections and the pictures of this file.")] = None,
) -> None:
    """Tables and pictures from stored results, without measuring anything; with --readme, from bench/results/."""
    with _user_errors():
        paths = results or ([out / "results.json"] if readme is None else report.kept())
        if missing := [str(path) for path in paths if not path.exists()]:
            raise ValueError(f"results must be files of an earlier run, got {', '.join(missing)}")
        stores = [Store(path) for path in paths]
        if readme is not None:
            report.fill(readme, stores)
            return
    for store in stores:
        report.write(store, out, _console())


def measure(plans: dict[str, list[Group]], options: Options, out: Path) -> None:
    """Run groups by name of benchmark, then write and print what the store has of these benchmarks."""
    out.mkdir(parents=True, exist_ok=True)
    store = Store(out / "results.json")
    store.measured_on(facts(options.device))
    if options.device.type == "cpu":
        limit_memory()
    console = Console(stderr=True)
    try:
        if plans.keys() & {"search", "train", "scaling"}:
            run("roofline", roofline.plan(options), store, console)
        for name, groups in plans.items():
            run(name, groups, store, console)
    except KeyboardInterrupt:
        console.print(f"interrupted; {store.path} has {len(store.rows)} rows, the same command goes on from there")
        raise typer.Exit(130) from None
    report.write(store, out, _console(), list(plans))


def _console() -> Console:
    """A console for tables; a log file has no width, and Rich would fold the tables to 80 columns."""
    return Console(width=None if sys.stdout.isatty() else 150)


@contextmanager
def _user_errors() -> Iterator[None]:
    """Turn a ValueError into one line and exit code 2."""
    try:
        yield
    except ValueError as error:
        typer.echo(f"bench: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
