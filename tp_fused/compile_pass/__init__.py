"""torch.compile puts the ops into a model that does not know of them.

    from tp_fused import compile_pass

    tp_fused.init(max_num_tokens=..., hidden_size=...)
    compile_pass.install()
    model = torch.compile(model)

The model is one that all-reduces its row-parallel products (functional collectives, or `torch.distributed.all_reduce`,
which torch traces to them). Inductor's graphs are then rewritten:

    all_reduce -> + residual -> RMSNorm -> linear      rs_rmsnorm, qkv_a_proj_ag: for replicated, narrow linears
    all_reduce -> + residual -> RMSNorm -> others      rs_rmsnorm_ag
    reduce_scatter -> + residual -> RMSNorm            rs_rmsnorm

The residual stays scattered from one to the next, and is gathered where something else reads it. `report()` has a line
for every reduction: what it has become, or why it was left.
"""

from .passes import MLA_PROJECTIONS, TpFusedPass, install, report, uninstall
from .report import GraphReport, Report, Site

__all__ = ["MLA_PROJECTIONS", "GraphReport", "Report", "Site", "TpFusedPass", "install", "report", "uninstall"]
