"""Programs of others that have to be set up: FlashInfer's fused all-reduce, and NCCL over registered windows.

`python -m bench.peers` compiles FlashInfer's kernels, which takes minutes the first time.
"""

import copy
import dataclasses
import importlib.util
import os

import torch
import torch.distributed as dist

from .timing import Program, measure
from .transports import OverTorch

WORLD_SIZES = (2, 4, 8)  # that FlashInfer's kernels are compiled for
# Of one of its three one-shot buffers. Its kernel has the offset of the last one in 32 bits.
ONE_SHOT_BYTES = 2**30
_BYTES_A_THREAD, _FEWEST_THREADS, _MOST_BLOCKS = 16, 128, 8  # of a cluster, which computes a token


class LeftOut(Exception):
    """A baseline cannot be set up: why. Raised on all ranks alike."""


def on_all_ranks(context, set_up):
    """What `set_up` returns; LeftOut where it raises, on this rank or on another."""
    made = problem = None
    try:
        made = set_up()
    except Exception as error:
        problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if context.host_sum(problem is not None):
        raise LeftOut(problem or "another rank could not set it up")
    return made


# ---- FlashInfer ----


def why_no_flashinfer(context) -> str | None:
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer-python is not installed; the extra `peers` names it"
    if context.world_size not in WORLD_SIZES:
        return f"its kernels are for {', '.join(map(str, WORLD_SIZES))} ranks"
    if torch.cuda.get_device_capability(context.device)[0] < 9:
        return "its kernels are for Hopper and newer"
    if not any(ways(context, tokens) for tokens in context.options.tokens):
        return f"its grid has no bound, and no size's blocks, {context.ranks_per_card} ranks', fit on half of the card"
    return None


def grid_blocks(num_tokens: int, row_bytes: int, world_size: int, one_shot: bool) -> int:
    """Of FlashInfer's kernels, on a card with more SMs: a cluster for each token that a rank sums."""
    threads = row_bytes // _BYTES_A_THREAD
    cluster = _MOST_BLOCKS
    while threads % cluster:
        cluster //= 2
    while cluster > 1 and threads // cluster < _FEWEST_THREADS:
        cluster //= 2
    return cluster * (num_tokens if one_shot else -(-num_tokens // world_size))


def ways(context, num_tokens: int) -> tuple[str, ...]:
    """Those of FlashInfer's two that can run at this size.

    Blocks wait for the peers', and no argument bounds the grid. Where ranks share a card, all of them have to fit on
    half of it: the other half is for what a late rank still has to run, thread block clusters among it.
    """
    row_bytes = context.options.hidden * context.dtype.itemsize
    possible = {
        "one-shot": 0 < num_tokens * row_bytes * context.world_size < ONE_SHOT_BYTES,
        "two-shot": num_tokens > context.world_size,
    }
    if context.ranks_per_card > 1:
        card = torch.cuda.get_device_properties(context.device).multi_processor_count
        for way in possible:
            blocks = grid_blocks(num_tokens, row_bytes, context.world_size, way == "one-shot")
            possible[way] = possible[way] and 2 * blocks * context.ranks_per_card <= card
    return tuple(way for way, can_run in possible.items() if can_run)


def fastest(context, programs: dict[str, Program]) -> Program:
    """Timed on the spot, on all ranks, who agree. Its `way` is its name."""
    way = next(iter(programs))
    if len(programs) > 1:
        brief = copy.copy(context)
        brief.options = dataclasses.replace(context.options, warmup=1, iters=20)
        samples = measure(brief, programs)
        way = min(samples, key=lambda name: samples[name].median)
    return dataclasses.replace(programs[way], way=way)


class FlashInfer:
    """All-reduce, residual add and RMSNorm in one kernel of FlashInfer's, one way of two, and the memory for it.

    Every rank holds the whole residual. Collective to make.
    """

    def __init__(self, context, way: str):
        # Torch's symmetric memory in place of FlashInfer's own, which asks for handles that not every driver gives out.
        os.environ.setdefault("FLASHINFER_CONFIDENTIAL_COMPUTE", "1")
        for compiles in (context.rank == 0, True):  # one at a time, or a rank may load a library that another writes
            on_all_ranks(context, load_flashinfer if compiles else lambda: None)
        from flashinfer import comm

        self.comm, self.one_shot = comm, way == "one-shot"
        self.workspace = on_all_ranks(context, lambda: self._make_workspace(context, way))

    def _make_workspace(self, context, way: str):
        workspace = self.comm.create_allreduce_fusion_workspace(
            backend="trtllm",  # the other one needs NVLink multicast
            world_size=context.world_size,
            rank=context.rank,
            max_token_num=max(tokens for tokens in context.options.tokens if way in ways(context, tokens)),
            hidden_dim=context.options.hidden,
            dtype=context.dtype,
            group=context.group,
        )
        context.settle()  # a peer writes into the buffers as soon as the ranks have met
        return workspace

    def all_reduce_norm(self, input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float):
        """(output, residual_out), all rows. As engines call it: summed in fp32, with PDL."""
        output, residual_out = torch.empty_like(input), torch.empty_like(input)
        self.comm.allreduce_fusion(
            input=input,
            workspace=self.workspace,
            pattern=self.comm.AllReduceFusionPattern.kARResidualRMSNorm,
            launch_with_pdl=True,
            residual_in=residual,
            residual_out=residual_out,
            norm_out=output,
            rms_gamma=weight,
            rms_eps=eps,
            use_oneshot=self.one_shot,
            fp32_acc=True,
        )
        return output, residual_out

    def close(self) -> None:
        self.workspace.destroy()


def load_flashinfer() -> None:
    """Imports it, and compiles its kernels where they are not yet."""
    from flashinfer.comm.trtllm_ar import get_trtllm_comm_module

    get_trtllm_comm_module()


# ---- NCCL ----


def why_no_windows(context) -> str | None:
    version = torch.cuda.nccl.version()
    if version < (2, 27):
        return f"NCCL {'.'.join(map(str, version))} has no symmetric windows, 2.27 has"
    if os.environ.get("NCCL_WIN_ENABLE") == "0":
        return "NCCL_WIN_ENABLE=0"
    return None


class NcclWindows:
    """Input and output of the largest size, in memory that is registered with NCCL's communicator. Collective."""

    def __init__(self, context):
        group, share = context.group, context.row_count(context.options.max_tokens, 0)
        dist.all_reduce(torch.zeros(1, device=context.device), group=group)  # the first one makes the communicator
        self.backend = group._get_backend(context.device)
        self.pool = torch.cuda.MemPool(self.backend.mem_allocator)
        shape = {"dtype": context.dtype, "device": context.device}
        with torch.cuda.use_mem_pool(self.pool):
            self.input = torch.zeros(context.world_size * share, context.options.hidden, **shape)
            self.output = torch.zeros(share, context.options.hidden, **shape)
        self.backend.register_mem_pool(self.pool, symm=True)  # what is allocated later would not be a window

    def close(self) -> None:
        self.backend.deregister_mem_pool(self.pool)


class OverNcclWindows(OverTorch):
    """torch.distributed, with what NCCL reads and writes in symmetric windows, where its symmetric kernels may run.

    NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=TUNING tells whether they do. An engine allocates its activations there.
    """

    def __init__(self, context, num_tokens: int, input: torch.Tensor):
        super().__init__(context, num_tokens, input)
        windows = context.keep("windows", lambda: on_all_ranks(context, lambda: NcclWindows(context)))
        self.padded = windows.input[: self.padded.shape[0]].copy_(self.padded)
        self.output, self.scratch = windows.output[: self.share], windows.input[:num_tokens]

    def reduce_scatter(self) -> torch.Tensor:
        return self.reduce_scatter_into(self.output)


if __name__ == "__main__":
    load_flashinfer()
