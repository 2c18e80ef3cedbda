"""Imports SGLang where there is no GPU: from a folder of its own, with stand-ins for what only a GPU has."""

import importlib.abc
import importlib.machinery
import os
import sys
import types
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "build/engines"

# Neither their code nor their numbers take part in what the tests run.
_ABSENT = (
    *("torchvision", "torchaudio", "torchcodec", "decord", "sgl_kernel", "flashinfer", "deep_gemm"),
    *("IPython", "fastapi", "starlette", "uvicorn", "gguf", "vllm"),
)


def missing(release: str) -> str | None:
    """What the tests of a release lack, in words."""
    lacks = [name for name in (f"sglang-{release}", "requirements") if not (FOLDER / name).is_dir()]
    return f"{' and '.join(lacks)} not in build/engines: make test-sglang" if lacks else None


def install(release: str) -> None:
    """In this process `import sglang` is of this release from here on."""
    sys.path[:0] = [str(FOLDER / f"sglang-{release}")]
    sys.path.append(str(FOLDER / "requirements"))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers.utils import import_utils

    # Asked before the stand-ins are there, transformers finds that these are absent, and remembers it.
    for name in ("is_torchvision_available", "is_torchaudio_available", "is_torchcodec_available"):
        getattr(import_utils, name, bool)()
    sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in _ABSENT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


class _Module(types.ModuleType):
    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        # SGLang 0.5.6 takes vLLM's classes on such a machine; here it keeps its own.
        own = {
            "vllm.model_executor.layers.layernorm": "sglang.srt.layers.layernorm",
            "vllm.model_executor.layers.activation": "sglang.srt.layers.activation",
        }.get(self.__name__)
        return getattr(sys.modules[own], name) if own else _Anything()


class _Anything:
    """A function, decorator or base class that nobody calls."""

    def __init__(self, *arguments, **options):
        pass

    def __call__(self, *arguments, **options):
        return arguments[0] if len(arguments) == 1 and callable(arguments[0]) else _Anything()

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()

    def __mro_entries__(self, bases):
        return (object,)
