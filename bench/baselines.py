"""The programs that an op is timed beside: what each one is, and when it can run. The cases say how."""

from collections.abc import Callable
from dataclasses import dataclass

# Blocks of torch's symmetric-memory kernels wait for the peers' and all have to run at once: from five ranks on they
# do not fit on one card.
_MOST_RANKS_OF_SYMM_MEM_ON_A_CARD = 4


def _always(context) -> bool:
    return True


def _over_torch(context) -> bool:
    return context.has_collectives


def _on_cuda(context) -> bool:
    return context.workspace.backend == "cuda"


def _symm_mem(context) -> bool:
    fits = context.ranks_per_card == 1 or context.world_size <= _MOST_RANKS_OF_SYMM_MEM_ON_A_CARD
    return _on_cuda(context) and fits and context.world_size in (2, 4, 8) and context.options.dtype != "fp16"


def _no_flashinfer(context) -> str | None:
    from .peers import why_no_flashinfer

    return why_no_flashinfer(context)


def _over_nccl(context) -> bool:
    return context.device.type == "cuda" and context.has_collectives


def _no_windows(context) -> str | None:
    from .peers import why_no_windows

    return why_no_windows(context)


def _block_scaled_mm(context) -> bool:
    import torch

    # cuBLAS multiplies with 1x128 and 128x128 scales on Hopper only, since CUDA 12.9.
    return (
        context.device.type == "cuda"
        and torch.cuda.get_device_capability() == (9, 0)
        and tuple(map(int, torch.version.cuda.split("."))) >= (12, 9)
    )


@dataclass(frozen=True)
class Baseline:
    meaning: str  # printed above the table
    available: Callable[[object], bool] = _always
    # Why it is left out where it is available: a line for the reader, who may be able to change that.
    why_not: Callable[[object], str | None] = lambda context: None
    empty: bool = False  # whether it can run without tokens: the collectives of torch refuse empty tensors


BASELINES = {
    "dist": Baseline("unfused over torch.distributed", _over_torch),
    "allreduce": Baseline("torch.distributed's all-reduce, then every rank adds and norms all rows", _over_torch),
    "own": Baseline("unfused over tp_fused's transport", empty=True),
    "dist-rs": Baseline("the scattered program, nothing fused, over torch.distributed", _over_torch),
    "own-rs": Baseline("the scattered program, nothing fused, over tp_fused's transport", empty=True),
    "symm": Baseline("torch's symm_mem.reduce_scatter_out alone, which neither adds nor norms", _symm_mem),
    "twoshot": Baseline("torch's symm_mem.two_shot_all_reduce_, then all rows on every rank", _symm_mem),
    "oneshot": Baseline("torch's symm_mem.one_shot_all_reduce, then all rows on every rank", _symm_mem),
    "nccl-symm": Baseline(
        "NCCL's reduce-scatter or all-reduce over symmetric windows, the rest as in dist or allreduce",
        _over_nccl,
        _no_windows,
    ),
    "flashinfer": Baseline(
        "FlashInfer's all-reduce + add + RMSNorm in one kernel, the faster of one-shot and two-shot; all rows on every "
        "rank",
        _on_cuda,
        _no_flashinfer,
    ),
    "rs_rmsnorm": Baseline("the fused op without the quantisation or the gather", empty=True),
    "rs_rmsnorm_ag": Baseline("the fused op without the quantisation", empty=True),
    "qkv_a_proj_ag": Baseline("the fused op of this rank's rows alone, by all of the weight", empty=True),
    "mla_prologue": Baseline("the fused op in 16 bits, of the same numbers", empty=True),
    "copies": Baseline("the projection, a barrier, then copies out of every peer's memory", _on_cuda),
    "gemm": Baseline("this rank's matrix product alone, nothing travels"),
    "scaled_mm": Baseline(
        "torch._scaled_mm with block scales, a bare barrier where ranks share a card, then all_gather_rows",
        _block_scaled_mm,
    ),
    "ag+norm": Baseline("qkv_a_proj_ag, then two RMSNorms and the split", empty=True),
    "ag_fp8+norm": Baseline("qkv_a_proj_ag_fp8, then two RMSNorms, the quantisation and the split", empty=True),
    "chain": Baseline("own rows by all of the weight: rs_rmsnorm, then qkv_a_proj_ag_norm", empty=True),
    "all-rows": Baseline("all rows by a share: rs_rmsnorm_ag, then qkv_a_proj_ag_norm(complete=True)", empty=True),
    "alone": Baseline("the fused op with nothing beside it", empty=True),
    "barrier": Baseline("a bare barrier of the ranks, fenced as for rows that were written", _on_cuda, empty=True),
}
