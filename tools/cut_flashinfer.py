"""Cuts FlashInfer's wheel down to its fused all-reduce, for a machine without network.

    pip download --no-deps --only-binary=:all: --python-version 3.12 flashinfer-python apache-tvm-ffi -d build/peers
    python tools/cut_flashinfer.py build/peers/flashinfer_python-*.whl -o build/peers/cut
    pip install --no-deps --no-index build/peers/cut/*.whl build/peers/apache_tvm_ffi-*.whl   # on the other machine

--python-version is the other machine's. The wheel has over 100 MB, nearly all of it other kernels. Kept, as they are:
the modules that flashinfer.comm.allreduce imports, the sources of its kernels with every header that they include, and
the licenses. Written anew, since they import the rest of the package: the files of REPLACED, and what METADATA
requires. The version gets "+comm".

The kernels are compiled at the first call, with the other machine's nvcc and ninja; that takes minutes. Compiled here,
they can be packed: install the cut wheel, and with FLASHINFER_CUDA_ARCH_LIST=9.0a in the environment

    python -c "from flashinfer.jit import comm; comm.gen_trtllm_comm_module().build(verbose=True)"

makes a trtllm_comm.so under ~/.cache/flashinfer, for --module. No GPU is needed, but a libcuda.so to link with: the
driver's, or the stub that comes with CUDA.
"""

import argparse
import ast
import base64
import hashlib
import posixpath
import re
import zipfile
from pathlib import Path

PACKAGE = "flashinfer"
STARTS = ("flashinfer.comm.allreduce", "flashinfer.comm.trtllm_ar", "flashinfer.jit.comm", "flashinfer.fi_trace")
KERNELS = ("trtllm_allreduce.cu", "trtllm_allreduce_fusion.cu", "trtllm_moe_allreduce_fusion.cu", "logging.cc")
INCLUDED_FROM = ("include", "csrc", "spdlog/include")  # of flashinfer/data; CUTLASS and CCCL are not needed
TAG = "comm"
REPLACED = {
    "flashinfer/__init__.py": "from .version import __version__ as __version__\n",
    "flashinfer/comm/__init__.py": """\
from .allreduce import allreduce_fusion as allreduce_fusion
from .allreduce import create_allreduce_fusion_workspace as create_allreduce_fusion_workspace
from .trtllm_ar import AllReduceFusionPattern as AllReduceFusionPattern
""",
    "flashinfer/jit/__init__.py": """\
from . import env as env
from .comm import gen_trtllm_mnnvl_comm_module as gen_trtllm_mnnvl_comm_module
from .core import JitSpec as JitSpec
""",
    # For the sizes of quantised outputs, which nothing here asks for.
    "flashinfer/fp4_quantization.py": """\
def _compute_swizzled_layout_sf_size(*sizes):
    raise NotImplementedError("quantised outputs were cut from this wheel")
""",
}
REQUIRED = ("apache-tvm-ffi<0.2,>=0.1.11", "cuda-python>=12.0", "filelock", "jinja2", "ninja", "numpy", "nvidia-ml-py")
REQUIRED += ("packaging", "torch", "typing_extensions")


class Wheel:
    """The files of a wheel, with those of REPLACED as they will be."""

    def __init__(self, path: Path):
        self.archive = zipfile.ZipFile(path)
        self.names = set(self.archive.namelist())
        if missing := REPLACED.keys() - self.names:
            raise ValueError(f"{path} has no {', '.join(sorted(missing))}: its layout is another one")

    def read(self, name: str) -> bytes:
        return REPLACED[name].encode() if name in REPLACED else self.archive.read(name)

    def file_of(self, module: str) -> str | None:
        path = module.replace(".", "/")
        return next((name for name in (f"{path}/__init__.py", f"{path}.py") if name in self.names), None)


def modules(wheel: Wheel) -> set[str]:
    """The files of all modules that importing STARTS imports."""
    left, found = list(STARTS), set()
    while left:
        module = left.pop()
        file = wheel.file_of(module)
        if file is None or file in found:  # a name that was imported may be a function
            continue
        found.add(file)
        left.append(module.rpartition(".")[0])
        package = module if file.endswith("/__init__.py") else module.rpartition(".")[0]
        left += _imports(ast.parse(wheel.read(file)).body, package)
    return found


def _imports(nodes: list, package: str) -> list[str]:
    """What of the package these statements import, functions left out: they run later, if at all."""
    names, left = [], list(nodes)
    while left:
        node = left.pop()
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else None
            module = ".".join(part for part in (base, node.module) if part)
            names += [module, *(f"{module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            left += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            left += ast.iter_child_nodes(node)
    return [name for name in names if name.split(".")[0] == PACKAGE]


def sources(wheel: Wheel) -> set[str]:
    """KERNELS, and the headers of the wheel that they include. All others come with CUDA and tvm_ffi."""
    data = f"{PACKAGE}/data"
    left, found = [f"{data}/csrc/{name}" for name in KERNELS], set()
    while left:
        file = left.pop()
        if file in found:
            continue
        found.add(file)
        folders = [posixpath.dirname(file), *(f"{data}/{folder}" for folder in INCLUDED_FROM)]
        for header in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', wheel.read(file).decode(), re.MULTILINE):
            candidates = (posixpath.normpath(f"{folder}/{header}") for folder in folders)
            left += [name for name in candidates if name in wheel.names][:1]
    return found


def metadata(text: str) -> tuple[str, str]:
    """METADATA with REQUIRED in place of what the whole package requires, and the version."""
    head, _, description = text.partition("\n\n")
    kept = [line for line in head.split("\n") if not line.startswith(("Requires-Dist:", "Provides-Extra:"))]
    index = next(index for index, line in enumerate(kept) if line.startswith("Version:"))
    version = f"{kept[index].split()[1]}+{TAG}"
    kept[index] = f"Version: {version}"
    return "\n".join([*kept, *(f"Requires-Dist: {name}" for name in REQUIRED)]) + f"\n\n{description}", version


def cut(path: Path, folder: Path, module: Path | None = None) -> Path:
    """Writes the wheel into `folder`, and says where."""
    wheel = Wheel(path)
    about = next(name for name in wheel.names if name.endswith(".dist-info/METADATA")).rpartition("/")[0]
    head, version = metadata(wheel.read(f"{about}/METADATA").decode())
    new_about = f"flashinfer_python-{version}.dist-info"
    files = {name: wheel.read(name) for name in modules(wheel) | sources(wheel)}
    for name in wheel.names:
        if name.startswith(f"{about}/licenses/") or name == f"{about}/WHEEL":
            files[new_about + name.removeprefix(about)] = wheel.read(name)
    files[f"{new_about}/METADATA"] = head.encode()
    if module is not None:
        files[f"{PACKAGE}/data/aot/trtllm_comm/trtllm_comm.so"] = module.read_bytes()
    record = f"{new_about}/RECORD"
    files[record] = "".join([*(_recorded(*item) for item in files.items()), f"{record},,\n"]).encode()
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / f"flashinfer_python-{version}-py3-none-any.whl"
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(files.items()):
            archive.writestr(name, content)
    return written


def _recorded(name: str, content: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(content)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="flashinfer_python-*.whl, 0.7 or newer")
    parser.add_argument("-o", "--output", type=Path, default=Path("."), help="the folder for the cut one")
    parser.add_argument("--module", type=Path, help="a compiled trtllm_comm.so to pack")
    options = parser.parse_args()
    written = cut(options.wheel, options.output, options.module)
    print(f"{written}: {written.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
