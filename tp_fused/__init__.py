"""Fused collective kernels for tensor-parallel LLM inference."""

from ._version import __version__
from .diagnose import Diagnosis, diagnose
from .explain import explain
from .faults import CollectiveFault
from .groups import init, symm_empty
from .ops import *  # noqa: F403
from .ops import __all__ as _ops
from .partition import row_count, row_slice, row_start
from .projections import *  # noqa: F403
from .projections import __all__ as _projections
from .prologue import *  # noqa: F403
from .prologue import __all__ as _prologue
from .workspace import Workspace

__all__ = [
    "CollectiveFault",
    "Diagnosis",
    "Workspace",
    "__version__",
    "diagnose",
    "explain",
    "init",
    "row_count",
    "row_slice",
    "row_start",
    "symm_empty",
    *_ops,
    *_projections,
    *_prologue,
]
