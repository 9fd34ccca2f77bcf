"""Every shipped kernel, compiled offline for the chips it is meant for."""

import json

import checkout
import pytest

KERNELS = {
    "scan_kernel",
    "measure_columns_kernel",
    "frame_kernel",
    "pack_codes_kernel",
    "pack_tokens_kernel",
    "refine_kernel",
    "rescan_kernel",
    "decide_kernel",
    "exhaustive_kernel",
    "measure_rows_kernel",
    "scan_float64_kernel",
    "code_norms_kernel",
    "accumulate_kernel",
    "sum_runs_kernel",
    "ema_kernel",
}


def run_static(**environment):
    env = {name: value for name, value in checkout.environment().items() if name != "TRITON_INTERPRET"} | environment
    return checkout.run("-m", "bench.static", "--json", env=env, cwd=checkout.ROOT)


@pytest.fixture(scope="module")
def rows():
    done = run_static()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compiled(rows):
    return [row for row in rows if "registers" in row]


def scans(compiled, target):
    return {row["D"]: row for row in compiled if row["kernel"] == "scan_kernel" and row["target"] == target}


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_is_compiled(compiled, target):
    assert {row["kernel"] for row in compiled if row["target"] == target} >= KERNELS


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_finite_unit_codes_are_not_told_by_a_contracted_difference(compiled, target):
    """Of ``g e - g e == 0`` the compiler makes ``fma(g, e, -(g e)) == 0``, which holds where no rounding happens."""
    measuring = [row for row in compiled if row["kernel"] == "measure_columns_kernel" and row["target"] == target]
    assert [row["float32_fma"] for row in measuring if row.get("metric") == "cosine"] == [0]


def test_no_kernel_spills_registers(compiled):
    assert [row for row in compiled if row["spill_bytes"]] == []


def test_shared_memory_fits_the_chip(compiled):
    assert [row for row in compiled if row["shared_bytes"] > row["shared_limit_bytes"]] == []


def test_small_chips_of_the_sm_80_family_have_enough_shared_memory(compiled):
    # sm_86, sm_89 and sm_120 run the sm_80 configuration with 99 KiB.
    assert [row for row in scans(compiled, "sm_80").values() if row["shared_bytes"] > 99 * 1024] == []


def test_both_scans_use_matrix_instructions(compiled):
    for target, names in {"sm_80": {"HMMA"}, "sm_90": {"HGMMA"}, "sm_100": {"UTCHMMA"}, "gfx942": {"v_mfma"}}.items():
        both = [row for row in compiled if row["kernel"] in ("scan_kernel", "rescan_kernel")]
        for row in both:
            assert row["target"] != target or set(row["matrix_instructions"]) == names, row


def test_scan_is_lean_on_hopper(compiled):
    """Instructions per (token, code) pair; a search that keeps an index for every pair needs 6.1 and 4.5."""
    for width, row in scans(compiled, "sm_90").items():
        if width <= 64:
            assert row["slots_per_pair"] <= 3.0, row
            assert row["alu_per_pair"] <= 1.5, row
        elif width <= 256:
            assert row["slots_per_pair"] <= 4.5, row
        else:  # rows are loaded in chunks; bound by the tensor cores all the same
            assert row["limiter"] == "tensor", row
    plain = next(row for row in compiled if row["kernel"] == "max_with_index" and row["target"] == "sm_90")
    assert plain["slots_per_pair"] > 2 * scans(compiled, "sm_90")[64]["slots_per_pair"]


def test_offline_compilation_refuses_the_interpreter():
    done = run_static(TRITON_INTERPRET="1")
    assert done.returncode != 0
    assert "unset TRITON_INTERPRET" in done.stderr


def test_what_follows_the_scan_is_small_beside_it(rows):
    """Modelled, on Gaussian data: at most 15 % of the scan from 4096 codes on, 40 % from 1024 on."""
    modelled = [row for row in rows if "share_of_scan" in row and row["data"] == "gaussian" and row["codes"] >= 1024]
    assert {"encodec", "speechtokenizer", "esm3", "1M-k4096-d512"} < {row["shape"] for row in modelled}
    for row in modelled:
        assert row["share_of_scan"] <= (0.15 if row["codes"] >= 4096 else 0.40), row


def test_the_worst_case_is_at_most_three_times_the_formula(rows):
    """Modelled: every token scanned three times, the last time in float64."""
    ratios = {row["D"]: row["ratio_to_formula"] for row in rows if row["kernel"] == "worst-case model"}
    assert set(ratios) == {8, 64, 256, 1024}
    assert all(ratio <= 3.0 for ratio in ratios.values())


@pytest.mark.parametrize(("target", "name"), [("sm_80", "DMMA"), ("sm_90", "DMMA"), ("gfx942", "v_mfma")])
def test_the_third_scan_uses_float64_matrix_instructions(compiled, target, name):
    thirds = [row for row in compiled if row["kernel"] == "scan_float64_kernel" and row["target"] == target]
    assert [set(row["matrix_instructions"]) for row in thirds] == [{name}] * len(thirds)
    assert thirds
