"""The native library, `_C`, and what it asks of Python: the one product that torch has no C function for."""

import functools
import warnings

import torch

try:
    from . import _C as _C
except ImportError as error:
    raise ImportError(
        f"tp_fused's native library is missing or does not load: build it with `pip install .`, or `make build` in a "
        f"checkout ({error})"
    ) from error

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
