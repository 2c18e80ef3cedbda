"""Wheels: what is in them, that they work where torch is alone, and that the build needs neither torch nor nvcc."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tp_fused.native import _C

pytest.importorskip("pybind11", reason="the build needs pybind11")

ROOT = Path(__file__).resolve().parents[1]
OTHER_PYTHONS = [f"3.{minor}" for minor in (14, 13, 12, 11, 10) if minor != sys.version_info.minor]
pytestmark = pytest.mark.packaging


@pytest.fixture(scope="module")
def checkout(kept, tmp_path_factory) -> Path:
    """The sources alone, without what has been built in place; and object files of the last time."""
    folder = tmp_path_factory.mktemp("wheel") / "tp_fused"
    built = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "tests", "bench", "docs")
    shutil.copytree(ROOT, folder, ignore=built)
    (folder.parent / "objects").symlink_to(kept)
    return folder


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def run(command, cwd: Path, environment: dict, timeout: int = 280) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


def away_from_here(**more: str) -> dict[str, str]:
    """An environment in which nothing of this checkout is found by chance."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA", "TP_FUSED", "PYTHONPATH"))}
    return {**kept, **more}


def build_environment(checkout: Path, **more: str) -> dict[str, str]:
    """A torch that cannot be imported, no nvcc in reach; what is compiled is not optimised, and kept."""
    poison = checkout.parent / "poison"
    keep = f"{sys.executable} -SE {ROOT / 'tests/kept_objects.py'} {checkout.parent / 'objects'}"
    compiler = script(poison / "c++", f'exec {keep} {os.environ.get("CXX", "c++")} "$@" -O0 -fno-lto')
    (poison / "torch.py").write_text("raise ImportError('the build imports torch')\n")
    reachable = [entry for entry in os.environ["PATH"].split(":") if not os.access(f"{entry}/nvcc", os.X_OK)]
    path = ":".join([str(Path(sys.executable).parent), *reachable])
    return away_from_here(**{"PATH": path, "PYTHONPATH": str(poison), "CXX": str(compiler), **more})


def build_wheel(checkout: Path, *pip_options: str, **environment: str) -> subprocess.CompletedProcess:
    to = str(checkout.parent / "wheels")
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", to]
    command = [sys.executable, "-m", "pip", *pip_options, "wheel", ".", *options]
    return run(command, checkout, build_environment(checkout, **environment))


def the_wheel(checkout: Path, python: str) -> Path:
    (wheel,) = checkout.parent.glob(f"wheels/*-cp{python.replace('.', '')}-*.whl")
    return wheel


@pytest.fixture(scope="module")
def architectures(checkout) -> list[str]:
    """Those that two builds in the same folder are for: the first is asked for one, the second for none."""
    seen = []
    # The first one ends before anything is compiled.
    cmake = script(checkout.parent / "half/cmake", f'[ "$1" != --build ] && exec {shutil.which("cmake")} "$@"')
    path = f"{cmake.parent}:{build_environment(checkout)['PATH']}"
    for environment in ({"TP_FUSED_CUDA_ARCHITECTURES": "90a-real", "PATH": path}, {}):
        done = build_wheel(checkout, **environment)
        assert (done.returncode != 0) == ("PATH" in environment), done.stdout + done.stderr
        (cache,) = checkout.glob("build/temp.*/CMakeCache.txt")
        seen.append(re.search(r"^TPF_CUDA_ARCHITECTURES:STRING=(.*)$", cache.read_text(), re.MULTILINE)[1])
    return seen


def link_distributions(site_packages: Path, *names: str) -> None:
    """Puts distributions of this environment, and what they require, into another one."""
    wanted, linked = list(names), set()
    while wanted:
        name = wanted.pop()
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # of another platform, or Python
            continue
        if name in linked:
            continue
        linked.add(name)
        wanted += [
            re.match(r"[\w.-]+", line)[0] for line in distribution.requires or [] if not re.search(r"\bextra\b", line)
        ]
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            link = site_packages / top
            if not link.exists():
                link.symlink_to(distribution.locate_file(top))


class Environment:
    """A fresh one of a Python, without pip: this one's serves it."""

    def __init__(self, folder: Path, python: Path | None = None):
        self.python, self.folder = folder / "bin/python", folder
        if python is None:
            venv.create(folder, symlinks=True)
        else:
            subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True, timeout=60)
        (self.site_packages,) = folder.glob("lib/python*/site-packages")

    def install(self, wheel: Path, *options: str) -> None:
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--no-index", *options, wheel]
        done = run(command, self.folder, away_from_here())
        assert done.returncode == 0, done.stdout + done.stderr

    def run(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
        return run([self.python, *arguments], cwd or self.folder, away_from_here(), timeout=120)


@pytest.fixture(scope="module")
def installed(checkout, architectures) -> Environment:
    """The wheel, in an environment with torch alone."""
    environment = Environment(checkout.parent / "environment")
    link_distributions(environment.site_packages, "torch")
    environment.install(the_wheel(checkout, f"{sys.version_info.major}.{sys.version_info.minor}"))
    return environment


def test_contents(installed):
    record = importlib.metadata.PathDistribution(next(installed.site_packages.glob("tp_fused-*.dist-info")))
    files = {str(file) for file in record.files if "__pycache__" not in file.parts}
    modules = {str(path.relative_to(ROOT)) for path in ROOT.glob("tp_fused/**/*.py")}
    assert modules <= files
    assert {"tp_fused/libtp_fused.so", "tp_fused/include/tp_fused.h", "tp_fused/py.typed", "tp_fused/_C.pyi"} <= files
    assert [name for name in files if name.startswith("tp_fused/_C.")]
    strangers = [name for name in files if not name.startswith(("tp_fused/", "tp_fused-", "../../../bin/tp-fused"))]
    assert strangers == []


def test_ranks_run_where_there_is_nothing_but_torch(installed):
    done = installed.run("-c", "import tp_fused; print(tp_fused.__file__)")
    assert done.stdout == f"{installed.site_packages}/tp_fused/__init__.py\n", done.stderr
    done = installed.run("-m", "tp_fused", "doctor", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    (tried,) = [finding for finding in json.loads(done.stdout)["findings"] if finding["check"] == "2 ranks on cpu"]
    assert tried["state"] == "ok", tried


def test_a_c_program_finds_header_and_library(installed, tmp_path):
    package = installed.site_packages / "tp_fused"
    source = tmp_path / "version.c"
    source.write_text(
        '#include <stdio.h>\n#include "tp_fused.h"\n'
        "int main(void) {\n"
        '  printf("%d %d", tpf_version() == TPF_VERSION, tpf_sizeof("tpf_team") == sizeof(tpf_team));\n}\n'
    )
    program = tmp_path / "version"
    flags = [f"-I{package}/include", f"-L{package}", "-ltp_fused", f"-Wl,-rpath,{package}"]
    subprocess.run(["cc", source, *flags, "-o", program], check=True, timeout=60)
    assert subprocess.run([program], check=True, capture_output=True, text=True, timeout=60).stdout == "1 1"


def test_a_checkout_that_hides_it_says_so(installed, checkout):
    done = installed.run("-c", "import tp_fused", cwd=checkout)
    told = done.stderr.splitlines()[-1]
    assert told.endswith(
        f"{checkout}/tp_fused has not been built, and hides the tp_fused that is installed in "
        f"{installed.site_packages}/tp_fused: start Python in another folder than {checkout}, or build this one, "
        f"`make build` there"
    )


def test_without_the_library_it_says_what_to_do(checkout, tmp_path):
    environment = Environment(tmp_path / "environment")
    link_distributions(environment.site_packages, "torch")
    done = environment.run("-c", "import tp_fused", cwd=checkout)
    told = done.stderr.splitlines()[-1]
    assert told.endswith(
        f"tp_fused's native library is missing: {checkout}/tp_fused has not been built; build it, `make build` there"
    )


def test_a_kept_build_folder_forgets_the_architectures_asked_for_last(architectures):
    (default,) = re.findall(r'set\(TPF_CUDA_ARCHITECTURES "(.*)" CACHE', (ROOT / "CMakeLists.txt").read_text())
    assert architectures == ["90a-real", default]


def other_python() -> tuple[str, Path]:
    """Another version than this one: its number and where it is."""
    for version in OTHER_PYTHONS:
        command = [f"python{version}", "-c", "import sys; print(sys.executable)"]
        # For pyenv, whose python3.x refuses unless that version has been chosen.
        try:
            done = run(command, ROOT, {**os.environ, "PYENV_VERSION": version}, timeout=60)
        except FileNotFoundError:
            continue
        if done.returncode == 0:
            return version, Path(done.stdout.strip())
    pytest.skip(f"needs another Python on PATH, one of {', '.join(OTHER_PYTHONS)}")


def test_another_python(checkout):
    """Its wheel is built and installed there. torch is rarely there, too: then the extension alone is loaded."""
    version, python = other_python()
    environment = Environment(checkout.parent / f"python{version}", python)
    link_distributions(environment.site_packages, "setuptools", "wheel", "pybind11")  # which are pure Python
    done = build_wheel(checkout, "--python", str(environment.python))
    assert done.returncode == 0, done.stdout + done.stderr
    environment.install(the_wheel(checkout, version), "--no-deps")
    loads = (
        "import glob, importlib.util as util\n"
        f"(path,) = glob.glob('{environment.site_packages}/tp_fused/_C.*.so')\n"
        "spec = util.spec_from_file_location('tp_fused._C', path)\n"
        "_C = util.module_from_spec(spec)\n"
        "spec.loader.exec_module(_C)\n"
        "print(_C.rows_of(10, 1, 4))\n"
    )
    done = environment.run("-c", loads)
    assert done.stdout == "(3, 3)\n", done.stderr


def names(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """What a stub's module or class declares; dunders aside."""
    named = {
        getattr(node, "name", None) or node.target.id: node
        for node in body
        if hasattr(node, "target") or hasattr(node, "name")
    }
    return {name: node for name, node in named.items() if not name.startswith("_")}


def test_the_stub_of_the_library_has_its_names():
    stub = names(ast.parse((ROOT / "tp_fused/_C.pyi").read_text()).body)
    assert set(stub) == {name for name in dir(_C) if not name.startswith("_")}
    for name in ("Segment", "Caller", "Team"):
        members = {member for member in dir(getattr(_C, name)) if not member.startswith("_")}
        assert set(names(stub[name].body)) == members


# ---- what cannot be built ----


def old_nvcc(folder: Path) -> str:
    return str(script(folder / "nvcc", "echo 'Cuda compilation tools, release 12.4, V12.4.131'"))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"TP_FUSED_CUDA": "2"}, "TP_FUSED_CUDA must be 0 or 1, not '2'"),
        ({"TP_FUSED_CUDA": "1"}, "TP_FUSED_CUDA=1, but there is no nvcc on PATH or in CUDA_HOME"),
        (
            {"TP_FUSED_CUDA": "1", "CUDACXX": "/nowhere/nvcc"},
            "TP_FUSED_CUDA=1, but there is no nvcc where CUDACXX=/nowhere/nvcc says",
        ),
        (
            {"TP_FUSED_CUDA": "1", "CUDACXX": old_nvcc},
            "nvcc is of CUDA 12.4, the CUDA kernels need one from 12.8 on: name it in CUDA_HOME, or build without "
            "them, TP_FUSED_CUDA=0",
        ),
        (
            {"CXX": "/nowhere/c++"},
            "tp_fused: /nowhere/c++ does not compile C++20 (No such file or directory); a C++20 compiler is needed, "
            "g++ 11 or newer: apt-get install g++, or name one in CXX",
        ),
        (
            {"CXX": lambda folder: str(script(folder / "c++", "echo \"error: '-std=c++20'\" >&2; exit 1"))},
            "c++ does not compile C++20 (error: '-std=c++20'); a C++20 compiler is needed",
        ),
        ({"CXX": "", "PATH": ""}, "tp_fused: there is no C++ compiler on PATH; a C++20 compiler is needed"),
    ],
)
def test_what_cannot_be_built_says_so_in_a_sentence(checkout, tmp_path, environment, message):
    environment = {name: value(tmp_path) if callable(value) else value for name, value in environment.items()}
    if environment.get("PATH") == "":
        for tool in ("cmake", "ninja"):
            script(tmp_path / tool, "")
        environment["PATH"] = str(tmp_path)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-temp", str(tmp_path / "build")]
    done = run(command, checkout, build_environment(checkout, **environment))
    assert done.returncode == 1
    (told,) = [line for line in done.stderr.splitlines() if "no GPU here" not in line]
    assert message in told
