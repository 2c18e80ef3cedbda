"""`pip install .`: what is in the wheel, and that building it asks neither for torch nor for nvcc."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("pybind11", reason="the build needs pybind11")

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.packaging


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The sources alone, without what has been built in place."""
    folder = tmp_path_factory.mktemp("wheel") / "tp_fused"
    built = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "tests", "bench", "docs")
    shutil.copytree(ROOT, folder, ignore=built)
    return folder


def build_wheel(checkout: Path, **environment: str) -> subprocess.CompletedProcess:
    """Builds with a torch that cannot be imported, and with no nvcc in reach; what is compiled is not optimised."""
    poison = checkout.parent / "poison"
    poison.mkdir(exist_ok=True)
    (poison / "torch.py").write_text("raise ImportError('the build imports torch')\n")
    compiler = poison / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0 -fno-lto\n')
    compiler.chmod(0o755)
    reachable = [entry for entry in os.environ["PATH"].split(":") if not os.access(f"{entry}/nvcc", os.X_OK)]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA", "TP_FUSED"))}
    path = ":".join([str(Path(sys.executable).parent), *reachable])
    return subprocess.run(
        [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", str(checkout.parent)],
        cwd=checkout,
        env={**inherited, "PATH": path, "PYTHONPATH": str(poison), "CXX": str(compiler), **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.fixture(scope="module")
def architectures(checkout) -> list[str]:
    """Those that two builds in the same folder are for: the first is asked for one, the second for none."""
    seen = []
    for environment in ({"TP_FUSED_CUDA_ARCHITECTURES": "90a-real"}, {}):
        done = build_wheel(checkout, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        (cache,) = checkout.glob("build/temp.*/CMakeCache.txt")
        seen.append(re.search(r"^TPF_CUDA_ARCHITECTURES:STRING=(.*)$", cache.read_text(), re.MULTILINE)[1])
    return seen


@pytest.fixture(scope="module")
def installed(checkout, architectures) -> Path:
    """A folder with the contents of the last wheel."""
    (wheel,) = checkout.parent.glob("*.whl")
    folder = checkout.parent / "installed"
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_contents(installed):
    files = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    modules = {str(path.relative_to(ROOT)) for path in ROOT.glob("tp_fused/**/*.py")}
    assert modules <= files
    assert "tp_fused/libtp_fused.so" in files
    assert [name for name in files if name.startswith("tp_fused/_C.")]
    strangers = [name for name in files if not name.startswith(("tp_fused/", "tp_fused-"))]
    assert strangers == []


def test_the_wheel_works(installed):
    """Away from the checkout; the extension finds the library beside it."""
    script = "import tp_fused; print(tp_fused.__file__, tp_fused.native._C.rows_of(10, 1, 4))"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=installed, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == f"{installed}/tp_fused/__init__.py (3, 3)\n", done.stderr


def test_a_kept_build_folder_forgets_the_architectures_asked_for_last(architectures):
    (default,) = re.findall(r'set\(TPF_CUDA_ARCHITECTURES "(.*)" CACHE', (ROOT / "CMakeLists.txt").read_text())
    assert architectures == ["90a-real", default]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"TP_FUSED_CUDA": "2"}, "TP_FUSED_CUDA must be 0 or 1, not '2'"),
        ({"TP_FUSED_CUDA": "1", "CUDACXX": "/nowhere/nvcc"}, "/nowhere/nvcc"),
    ],
)
def test_what_cannot_be_built_says_so(checkout, environment, message):
    done = build_wheel(checkout, **environment)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


def test_import_without_the_library_says_what_to_do(checkout):
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(
        [sys.executable, "-c", "import tp_fused"],
        cwd=checkout.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "tp_fused's native library is missing or does not load: build it with `pip install .`" in done.stderr
