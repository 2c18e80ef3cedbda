"""Fused collective kernels for tensor-parallel LLM inference."""

from ._version import __version__
from .diagnose import Diagnosis, diagnose
from .explain import explain
from .faults import CollectiveFault
from .groups import init, symm_empty
from .ops import (
    all_gather_rows,
    qkv_a_proj_ag,
    qkv_a_proj_ag_fp8,
    qkv_a_proj_ag_norm,
    reduce_scatter_rows,
    rs_rmsnorm,
    rs_rmsnorm_ag,
    rs_rmsnorm_fp8,
)
from .partition import row_count, row_slice, row_start
from .workspace import Workspace

__all__ = [
    "CollectiveFault",
    "Diagnosis",
    "Workspace",
    "__version__",
    "all_gather_rows",
    "diagnose",
    "explain",
    "init",
    "qkv_a_proj_ag",
    "qkv_a_proj_ag_fp8",
    "qkv_a_proj_ag_norm",
    "reduce_scatter_rows",
    "row_count",
    "row_slice",
    "row_start",
    "rs_rmsnorm",
    "rs_rmsnorm_ag",
    "rs_rmsnorm_fp8",
    "symm_empty",
]
