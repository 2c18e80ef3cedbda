"""Builds libtp_fused and _C with CMake. Everything else about the package is in pyproject.toml.

torch is not imported: one build serves every torch from 2.10 on. With an nvcc (on PATH, in CUDA_HOME or CUDACXX) the
CUDA sources are compiled in; TP_FUSED_CUDA=0 leaves them out, TP_FUSED_CUDA=1 insists on them.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def cuda_arguments() -> list[str]:
    switch = {None: "AUTO", "": "AUTO", "0": "OFF", "1": "ON"}.get(os.environ.get("TP_FUSED_CUDA"))
    if switch is None:
        raise SystemExit(f"TP_FUSED_CUDA must be 0 or 1, not {os.environ['TP_FUSED_CUDA']!r}")
    arguments = [f"-DTPF_CUDA={switch}"]
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if switch != "OFF" and home and "CUDACXX" not in os.environ:
        arguments.append(f"-DCMAKE_CUDA_COMPILER={home}/bin/nvcc")
    if architectures := os.environ.get("TP_FUSED_CUDA_ARCHITECTURES"):
        arguments.append(f"-DTPF_CUDA_ARCHITECTURES={architectures}")
    else:  # CMakeLists.txt has the default, but a kept build folder remembers what was asked for last
        arguments.append("-UTPF_CUDA_ARCHITECTURES")
    return arguments


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        import pybind11

        package_dir = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        cmake = shutil.which("cmake") or "cmake"
        configure = [
            cmake,
            *("-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_INSTALL_PREFIX={package_dir}",
            *cuda_arguments(),
        ]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build_dir), "--target", "install"], check=True)

    def copy_extensions_to_source(self) -> None:
        """Builds in place (editable installs too) get the library beside the extension that is linked to it."""
        super().copy_extensions_to_source()
        for extension in self.extensions:
            built = Path(self.get_ext_fullpath(extension.name)).resolve().parent
            with_library = Path(self.build_lib).resolve() / "tp_fused" / "libtp_fused.so"
            shutil.copy2(with_library, built / "libtp_fused.so")


setup(ext_modules=[Extension("tp_fused._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
