"""Builds libtp_fused and _C with CMake. Everything else about the package is in pyproject.toml.

torch is not imported: one build serves every torch from 2.10 on. The CUDA sources take minutes, and are compiled where
there are a GPU and an nvcc (on PATH, in CUDA_HOME or CUDACXX). TP_FUSED_CUDA=1 compiles them without a GPU, as for
another machine; TP_FUSED_CUDA=0 leaves them out.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def has_gpu() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()  # dxg: under Windows


def cuda_arguments() -> list[str]:
    switch = {None: "", "": "", "0": "OFF", "1": "ON"}.get(os.environ.get("TP_FUSED_CUDA"))
    if switch is None:
        raise SystemExit(f"TP_FUSED_CUDA must be 0 or 1, not {os.environ['TP_FUSED_CUDA']!r}")
    if not switch:
        switch = "AUTO"
        if not has_gpu():
            switch = "OFF"
            say("no GPU here: without CUDA kernels (TP_FUSED_CUDA=1 compiles them all the same)")
    arguments = [f"-DTPF_CUDA={switch}"]
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if switch != "OFF" and home and "CUDACXX" not in os.environ:
        arguments.append(f"-DCMAKE_CUDA_COMPILER={home}/bin/nvcc")
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
        raise SystemExit(
            f"tp_fused: {doing} failed, see above. A compiler for C++20 (g++ 11 or newer) is needed and, for the CUDA "
            f"kernels, an nvcc from 12.8 on; TP_FUSED_CUDA=0 builds without them."
        )


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        import pybind11

        package_dir = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        cmake = shutil.which("cmake")
        if cmake is None or shutil.which("ninja") is None:
            raise SystemExit("tp_fused: cmake and ninja are needed: pip install cmake ninja")
        configure = [
            cmake,
            *("-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"),
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
