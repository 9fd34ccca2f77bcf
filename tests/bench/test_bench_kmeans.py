"""k-means side by side: the same tokens and seeds, inertias in float64, a table and a picture."""

import pytest
import torch
from rich.console import Console

from bench.contenders import CONTENDERS, offering
from bench.contenders.base import Contender
from bench.harness.options import Options
from bench.harness.store import Store
from bench.plans import kmeans
from bench.report import files as report
from fastvq import reference


def measured(shapes="300x10x3", contenders=""):
    options = Options.checked("cpu", "", shapes, contenders, 1, quick=True)
    return [row for group in kmeans.plan(options) for row in group.measure()]


def test_every_library_clusters_the_same_tokens():
    rows = {row["contender"]: row for row in measured()}
    assert list(rows) == offering("cluster") == ["fastvq", "faiss", "scikit-learn"]
    x = kmeans.gaussian(300, 3)
    for name, row in rows.items():
        assert (row["status"], row["n_tokens"], row["dim"]) == ("ok", 300, 3)
        codes = CONTENDERS[name].cluster(x, 10, kmeans._QUICK_ITERATIONS, 0)
        distances = (x.double() - codes.double()[reference.nearest_code(x, codes)]).square().sum()
        # faiss adds in an order that depends on its threads.
        assert row["inertias"][0] == pytest.approx(float(distances), rel=1e-2 if name == "faiss" else 1e-9)
        assert row["inertia"] < 1.3 * min(one["inertia"] for one in rows.values())


def test_a_contender_without_kmeans_is_a_row_that_says_so(monkeypatch):
    monkeypatch.setitem(CONTENDERS, "broken", Contender(lambda: "broken 1.0", cluster=lambda *_: 1 / 0))
    rows = measured(contenders="fastvq,cdist,broken")
    assert [row["status"] for row in rows] == ["ok", "does not apply", "failed"]


@pytest.mark.parametrize("name", [*kmeans._QUICK_CASES])
def test_tokens_are_finite_and_the_same_each_time(name):
    make, codes = kmeans._QUICK_CASES[name]
    x = make()
    assert x.dtype == torch.float32
    assert x.isfinite().all()
    assert len(x) > 20 * codes
    assert torch.equal(x, make())


def test_the_table_divides_inertias_by_greedy_ones_and_times_by_ours(tmp_path):
    store = Store(tmp_path / "results.json")
    versions = {"device": "a machine", "versions": {"torch": "2.0"}, "date": "2026-01-02T03:04:05+00:00"}
    store.measured_on(versions)
    row = {
        "benchmark": "kmeans",
        "codes": 5,
        "dim": 3,
        "n_tokens": 1000,
        "dtype": "float32",
        "operation": "9 iterations",
    }
    row |= {"status": "ok", "note": "", "version": "tool 1.0"}
    values = {"fastvq": (1.0, 9.0), "faiss": (3.0, 15.0), "scikit-learn": (2.0, 10.0)}
    for name in ("blobs", "digits"):
        store.put([
            {**row, "name": name, "contender": contender, "seconds": s, "inertia": i, "inertias": [i, i]}
            for contender, (s, i) in values.items()
        ])  # fmt: skip
    store.put([{**row, "name": "digits", "contender": "absent", "status": "not installed", "inertias": []}])
    report.write(store, tmp_path, Console(record=True, width=160), ["kmeans"])
    table = (tmp_path / "tables.md").read_text()
    assert "| blobs | 1,000 × 5 × 3 | 9 | 0.900 | 1.500 | 1.00 | 3.00 | 2.00 |" in table
    assert "Not measured: absent (not installed)." in table
    assert (tmp_path / "kmeans.png").read_bytes().startswith(b"\x89PNG")
