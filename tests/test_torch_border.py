"""The border to torch: what is called of it is as torch declares it, and what a torch lacks is told by name."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tp_fused import native
from tp_fused.native import _C

ROOT = Path(__file__).resolve().parents[1]


def test_declarations_are_those_of_torch(tmp_path):
    """The C functions are looked up by name: nothing else would notice other parameters."""
    source = tmp_path / "declarations.cpp"
    source.write_text(
        """
        #define USE_CUDA
        #include <torch/csrc/inductor/aoti_torch/c/shim.h>
        #include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
        #include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
        #include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
        #include <torch/csrc/stable/c/shim.h>
        #include <type_traits>
        #include "torch_api.h"
        static_assert(std::is_same_v<tpf::Tensor, AtenTensorHandle> && std::is_same_v<tpf::Value, StableIValue>);
        static_assert(tpf::kTorchVersion == TORCH_VERSION_2_10_0);
        #define SAME(name, parameters) static_assert(std::is_same_v<decltype(&name), int32_t(*) parameters>, #name);
        TPF_TORCH_FUNCTIONS(SAME)
        TPF_TORCH_CUDA_FUNCTIONS(SAME)
        """
    )
    include = Path(torch.__file__).parent / "include"
    command = ["g++", "-std=c++20", "-fsyntax-only", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += [f"-I{include}", f"-I{ROOT / 'csrc'}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def run_python(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, *arguments, "-c", script]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


LOAD = f"""
import ctypes, importlib.util, sys, types
sys.modules["torch"] = types.SimpleNamespace(__version__="2.9.1")
spec = importlib.util.spec_from_file_location("_C", {_C.__file__!r})
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
"""


@pytest.mark.parametrize("missing", ["libtorch_cpu.so", "torch_library_impl"])
def test_torch_without_a_function_is_told_by_name(tmp_path, missing):
    """As at the import of tp_fused, with a torch that has one function, or none."""
    script = LOAD
    if missing == "torch_library_impl":
        library = tmp_path / "libtorch_cpu.so"
        source = "void aoti_torch_library_init_impl() {}"
        command = ["gcc", "-shared", "-Wl,-soname,libtorch_cpu.so", "-x", "c", "-", "-o", library]
        subprocess.run(command, input=source, text=True, check=True)
        script += f"ctypes.CDLL({str(library)!r})\n"
    done = run_python(script + "native.register_kernel('rs_rmsnorm', 'CPU', 'T?Tfsb', print)")
    assert f"ImportError: tp_fused needs torch 2.10 or newer: torch 2.9.1 has no {missing}\n" in done.stderr


def test_every_schema_is_the_one_that_its_kernel_reads():
    """Whose memory on the dispatcher's stack a kernel frees follows from the types of its arguments."""
    for kinds in ("T?Tfs", "TTTfsb", "T?Tfsbb"):
        with pytest.raises(ImportError, match=f"tp_fused::rs_rmsnorm says: {kinds}".replace("?", r"\?")):
            _C.register_kernel("rs_rmsnorm", "CPU", kinds, print)
    with pytest.raises(ImportError, match="tp_fused::nothing"):
        _C.register_kernel("nothing", "CPU", "T", print)


def test_a_torch_that_is_newer_than_any_tested_one_is_told_once():
    script = "import torch; torch.__version__ = '99.0.1+cpu'; import tp_fused, importlib, tp_fused.ops"
    done = run_python(script)
    assert done.returncode == 0 and done.stderr.count("UserWarning: torch 99.0.1+cpu is newer than 2.13") == 1


def test_the_hosted_workflow_tries_every_torch():
    workflow, project = (ROOT / name for name in (".github/workflows/torch.yml", "pyproject.toml"))
    tried = re.search(r"for torch in (.*); do", workflow.read_text())[1].split()
    oldest = re.search(r"torch>=2\.(\d+)", project.read_text())[1]
    assert tried == [f"2.{minor}" for minor in range(int(oldest), native.NEWEST_TESTED_TORCH[1] + 1)]


def test_a_process_with_kernels_ends_quietly():
    done = run_python("import tp_fused")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
