"""Builds libtp_fused and _C with CMake. Everything else about the package is in pyproject.toml.

torch is not imported: one build serves every torch from 2.10 on. The CUDA sources take minutes, and are compiled where
there are a GPU and an nvcc (on PATH, in CUDA_HOME or CUDACXX). TP_FUSED_CUDA=1 compiles them without a GPU, as for
another machine; TP_FUSED_CUDA=0 leaves them out.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_NVCC = (12, 8)


def has_gpu() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()  # dxg: under Windows


def check_cxx() -> None:
    """Whether the compiler that CMake will find, or that CXX names, knows C++20."""
    cxx = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    needed = "a C++20 compiler is needed, g++ 11 or newer: apt-get install g++, or name one in CXX"
    if cxx is None:
        raise SystemExit(f"tp_fused: there is no C++ compiler on PATH; {needed}")
    program = "#include <concepts>\n#if !defined __clang__ && __GNUC__ < 11\n#error older than g++ 11\n#endif\n"
    command = [*cxx.split(), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    try:
        done = subprocess.run(command, input=program, capture_output=True, text=True)
        wrong = done.returncode != 0 and (done.stderr.strip().splitlines() or ["it fails"])[0]
    except OSError as error:
        wrong = error.strerror
    if wrong:
        raise SystemExit(f"tp_fused: {cxx} does not compile C++20 ({wrong}); {needed}")


def find_nvcc() -> str | None:
    """In CUDACXX, CUDA_HOME or on PATH, the first of them that is set; its version is checked."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which(os.environ.get("CUDACXX") or (f"{home}/bin/nvcc" if home else "nvcc"))
    if nvcc is None:
        return None
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", told)
    if release and tuple(map(int, release.groups())) < OLDEST_NVCC:
        raise SystemExit(
            f"tp_fused: {nvcc} is of CUDA {release[1]}.{release[2]}, the CUDA kernels need one from "
            f"{'.'.join(map(str, OLDEST_NVCC))} on: name it in CUDA_HOME, or build without them, TP_FUSED_CUDA=0"
        )
    return nvcc


def cuda_arguments() -> list[str]:
    asked = os.environ.get("TP_FUSED_CUDA") or "auto"
    if asked not in ("auto", "0", "1"):
        raise SystemExit(f"tp_fused: TP_FUSED_CUDA must be 0 or 1, not {asked!r}")
    nvcc = None
    if asked == "1" or (asked == "auto" and has_gpu()):
        nvcc = find_nvcc()
        if nvcc is None and asked == "1":
            names = [name for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
            where = f"where {names[0]}={os.environ[names[0]]} says" if names else "on PATH or in CUDA_HOME"
            raise SystemExit(f"tp_fused: TP_FUSED_CUDA=1, but there is no nvcc {where}")
        if nvcc is None:
            say("a GPU, but no nvcc on PATH or in CUDA_HOME: without CUDA kernels")
    elif asked == "auto":
        say("no GPU here: without CUDA kernels (TP_FUSED_CUDA=1 compiles them all the same)")
    arguments = ["-DTPF_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc else ["-DTPF_CUDA=OFF"]
    if architectures := os.environ.get("TP_FUSED_CUDA_ARCHITECTURES"):
        arguments.append(f"-DTPF_CUDA_ARCHITECTURES={architectures}")
    else:  # CMakeLists.txt has the default, but a kept build folder remembers what was asked for last
        arguments.append("-UTPF_CUDA_ARCHITECTURES")
    return arguments


def say(words: str) -> None:
    print(f"tp_fused: {words}", file=sys.stderr, flush=True)


def run(command: list[str], doing: str) -> None:
    """Runs what nobody wants to read unless it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        print(done.stdout, file=sys.stderr)
        raise SystemExit(f"tp_fused: {doing} failed, see above")


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        try:
            import pybind11
        except ImportError:
            raise SystemExit("tp_fused: pybind11 is needed: pip install pybind11") from None
        cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
        if cmake is None or ninja is None:
            raise SystemExit("tp_fused: cmake and ninja are needed: pip install cmake ninja")
        check_cxx()
        package_dir = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        configure = [
            cmake,
            *("-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"),
            # A kept build folder may remember the one of an environment that pip has removed since.
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_INSTALL_PREFIX={package_dir}",
            *cuda_arguments(),
        ]
        run(configure, "configuring the build")
        say("compiling")
        # ninja tells how far it is.
        if subprocess.run([cmake, "--build", str(build_dir)]).returncode != 0:
            raise SystemExit("tp_fused: compiling failed, see above")
        run([cmake, "--install", str(build_dir)], "installing what was built")

    def copy_extensions_to_source(self) -> None:
        """Builds in place (editable installs too) get the library beside the extension that is linked to it."""
        super().copy_extensions_to_source()
        for extension in self.extensions:
            built = Path(self.get_ext_fullpath(extension.name)).resolve().parent
            with_library = Path(self.build_lib).resolve() / "tp_fused" / "libtp_fused.so"
            shutil.copy2(with_library, built / "libtp_fused.so")


setup(ext_modules=[Extension("tp_fused._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
