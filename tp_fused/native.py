"""The native library, `_C`, and what it asks of Python: the one product that torch has no C function for."""

import functools
import importlib.machinery
import sys
import warnings
from pathlib import Path

import torch


def _why_missing(error: ImportError) -> str:
    """What keeps `_C` from being imported, and what to type."""
    here = Path(__file__).parent
    built = sorted(path.name for path in here.glob("_C.*.so"))
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    if any(name.endswith(suffix) for name in built for suffix in suffixes):
        return f"tp_fused's native library in {here} does not load ({error}): build it again, `pip install .`"
    how = "`make build` there" if (here.parent / "Makefile").is_file() else "`pip install .` in a checkout"
    found = f"was built for another Python ({', '.join(built)})" if built else "has not been built"
    others = [entry for entry in sys.path if Path(entry or ".").resolve() != here.parent]
    hidden = importlib.machinery.PathFinder.find_spec("tp_fused", others)
    if hidden is not None and hidden.origin is not None:
        return (
            f"{here} {found}, and hides the tp_fused that is installed in {Path(hidden.origin).parent}: "
            f"start Python in another folder than {here.parent}, or build this one, {how}"
        )
    return f"tp_fused's native library is missing: {here} {found}; build it, {how}"


try:
    from . import _C as _C
except ImportError as error:
    raise ImportError(_why_missing(error)) from None

NEWEST_TESTED_TORCH = (2, 13)
if tuple(map(int, torch.__version__.split(".")[:2])) > NEWEST_TESTED_TORCH:
    warnings.warn(
        f"torch {torch.__version__} is newer than {'.'.join(map(str, NEWEST_TESTED_TORCH))}, the newest that this "
        f"tp_fused was tested with: run tests/test_smoke.py of it first",
        stacklevel=2,
    )

DTYPE_CODES = {
    torch.bfloat16: 0,
    torch.float16: 1,
    torch.float32: 2,
    torch.float8_e4m3fn: 3,
    torch.uint8: 4,
}


@functools.cache
def triton_projection():
    """(tp_fused.triton.qkv_a_proj_ag, None), or (None, what keeps it from being there)."""
    try:
        from .triton import qkv_a_proj_ag as module
    except ImportError as error:
        return None, str(error)
    return module, None


def project_fp8(q, scale, weight, weight_scale, out, max_ctas: int) -> None:
    """Writes this rank's rows of the product to `out`, for csrc/torch_projections.cpp.

    A Triton kernel is compiled at its first call: not while a graph is being captured.
    """
    from . import reference  # not above: it imports faults.py, which imports this module

    triton = triton_projection()[0] if q.is_cuda else None
    with torch.no_grad(), torch._C._DisableAutocast():
        if triton is not None:
            triton.project_fp8(q, scale, weight, weight_scale, out=out, max_ctas=max_ctas)
        else:
            out.copy_(reference.project_fp8(q, scale, weight, weight_scale))
