"""What a user installs and imports."""

import os
import zipfile

import pytest
from checkout import ROOT, run


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    done = run("-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("fastvq_triton-*.whl"))


def python(code, site, **environment):
    """Run ``code`` with ``site`` on the path and the checkout off it."""
    hide = (
        f"import sys; sys.path[:] = [p for p in sys.path if p not in ({str(ROOT)!r}, {str(ROOT / 'kernels')!r}, '')]\n"
    )
    done = run("-c", hide + code, cwd=site, env={**os.environ, "PYTHONPATH": str(site), **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_wheel_has_two_top_level_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"fastvq", "fastvq_kernels"}
    assert {"fastvq/py.typed", "fastvq_kernels/py.typed"} <= set(names)


def test_installed_wheel_leaves_transformers_as_it_was(wheel, tmp_path):
    ask = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    before = python(ask, tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    assert python("import fastvq; print(fastvq.__file__)", tmp_path).startswith(str(tmp_path))
    assert python(ask, tmp_path) == before


def in_checkout(code):
    """What ``code`` prints in a fresh process with the bare checkout on the path."""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_bare_checkout_needs_torch_triton_and_numpy_only():
    code = """
import sys
for name in ("typer", "rich", "matplotlib", "sklearn", "PIL", "scipy", "transformers"):
    sys.modules[name] = None  # as if it were not installed
import torch, fastvq, fastvq_kernels.search.pipeline, fastvq_kernels.update.accumulate
print(fastvq.EMACodebook(4, 2)(torch.randn(5, 2)).indices.shape)
"""
    assert in_checkout(code) == "torch.Size([5])"


def test_kernels_folder_is_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_import_allocates_nothing_changes_no_setting_and_leaves_out_what_only_some_calls_need():
    code = """
import sys, torch

def settings():
    matmul = torch.backends.mkldnn.matmul.fp32_precision, torch.are_deterministic_algorithms_enabled()
    return *matmul, torch.get_num_threads(), torch.get_rng_state().tolist(), torch.get_default_dtype()

before = settings()
for name in ("empty", "zeros", "ones", "full", "tensor", "arange", "randn", "rand"):
    setattr(torch, name, lambda *args, name=name, **options: sys.exit(f"torch.{name} was called"))
import fastvq
assert settings() == before
print({"triton", "fastvq_kernels", "typer", "rich", "matplotlib", "sklearn"} & set(sys.modules))
"""
    assert in_checkout(code) == "set()"
