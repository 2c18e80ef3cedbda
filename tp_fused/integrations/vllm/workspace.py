"""What the models share: the workspace of vLLM's tensor-parallel group, the words in the log, and a count of calls."""

import collections
import logging
import os

import torch
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.layernorm import RMSNorm

from ... import faults
from ...groups import init

logger = logging.getLogger(__name__)

calls = collections.Counter()  # of the ops, in this process


def say_left(reason: str) -> None:
    logger.warning("tp_fused leaves vLLM's model as it is: %s", reason)


def make(vllm_config, max_num_tokens: int, hidden_size: int, latent_size: int) -> str | None:
    """Collective. None, or why there is no workspace, the same on all ranks."""
    group = get_tp_group()
    try:
        workspace = init(
            group.device_group,
            max_num_tokens=max_num_tokens,
            hidden_size=hidden_size,
            latent_size=latent_size,
            dtype=vllm_config.model_config.dtype,
            device=torch.device(group.device).type,
        )
    except (ValueError, TypeError, MemoryError, RuntimeError, faults.CollectiveFault) as error:  # on every rank
        return f"tp_fused.init: {error}"
    if workspace.backend == "reference" and os.environ.get("TP_FUSED_BACKEND") != "reference":
        workspace.close()
        return f"no kernels for this group: {workspace.reason}"
    logger.info(
        "tp_fused: scattered residual for up to %d tokens, backend %s", workspace.max_num_tokens, workspace.backend
    )
    return None


def is_context_parallel(parallel_config) -> bool:
    sizes = ("decode_context_parallel_size", "prefill_context_parallel_size")
    return any(getattr(parallel_config, size, 1) > 1 for size in sizes)


def is_offloading(vllm_config) -> bool:
    """vLLM then holds weights elsewhere, and may put a forward of its own before that of a layer's class."""
    offload = vllm_config.offload_config
    return offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0


def is_batch_invariant() -> bool:
    return os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0")


def is_plain(norm) -> bool:
    """An RMSNorm as the ops compute it: of all columns, with a weight."""
    return type(norm) is RMSNorm and norm.variance_size_override is None and norm.has_weight
