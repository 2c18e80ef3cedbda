"""What tools/sanitize.py watches: two ranks, small calls of every kernel of libtp_fused in every form, faults too.

Of the projections' tiles there are those that so small calls take.
"""

import dataclasses
import faulthandler
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import tp_fused
from tp_fused.launch import launch
from tp_fused.native import _C

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from programs import REDUCTIONS, Call
from ranks import outcome, settled, workspace

WORLD_SIZE = 2
MAX_CTAS = 2
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LIMIT_S = 240

# (num_tokens, hidden_size, dtype), which choose the body of rs_rmsnorm_kernel and its width.
FORMS = [
    *((3, 256, dtype) for dtype in (BF16, FP16, FP32)),  # a row a block
    (2, 2048, BF16),  # a row for a cluster of blocks
    *((29, 256, dtype) for dtype in (BF16, FP16, FP32)),  # rows that the copy engine brings, in chunks
    (9, 8192, BF16),
    (3, 8192, BF16),  # rows too wide for these bodies
    (9, 16384, BF16),
]
FP8_OPTIONS = {"keep_output": True, "scale_layout": "column"}


def calls(device: str) -> list[Call]:
    reductions = [
        Call(op, *form, "full", device=device, options=FP8_OPTIONS if op == "rs_rmsnorm_fp8" else {})
        for op in REDUCTIONS
        for form in FORMS
    ]
    complete = [Call(op, 29, 256, BF16, device=device, options={"complete": True}) for op in REDUCTIONS[:2]]
    # Rows of whole 16 bytes, few and more than a few for the copy engine, and others.
    gathers = [Call("all_gather_rows", 29, columns, torch.uint8, device=device) for columns in (4096, 16384, 1001)]
    projections = [
        Call(op, count, 256, dtype, device=device)
        for op in ("qkv_a_proj_ag", "qkv_a_proj_ag_norm")
        for count in (29, 300)
        for dtype in (BF16, FP16, FP32)
    ]
    # Scales of four blocks of K that lie together, and others.
    fp8 = [
        Call("qkv_a_proj_ag_fp8", 300, hidden_size, FP32, device=device, options={"scale_layout": layout})
        for hidden_size, layout in ((512, "row"), (256, "column"))
    ]
    return [*reductions, *complete, *gathers, *projections, *fp8]


def run(call: Call, memory: torch.Tensor | None) -> None:
    """One call, checked. memory: symmetric memory for its input."""
    rank = dist.get_rank()
    arguments = call.arguments(rank, WORLD_SIZE)
    if memory is not None:
        place = memory[: arguments["input"].numel()].view(arguments["input"].shape)
        arguments["input"] = place.copy_(arguments["input"])
    call.check(call.run(rank, WORLD_SIZE, arguments), rank, WORLD_SIZE)


def run_all(device: str) -> None:
    """Runs on a rank."""
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    rank, number = dist.get_rank(), 0
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    sizes = {"max_num_tokens": 300, "hidden_size": 16384, "max_ctas": MAX_CTAS, "timeout_s": 60.0}
    with workspace(device, device, **sizes) as made:
        memories = {dtype: tp_fused.symm_empty((9 * 16384,), dtype, device=device) for dtype in (BF16, FP16, FP32)}
        for call in calls(device):
            run(call, None)
            number += 1
            if call.op in REDUCTIONS:
                run(call, memories[call.dtype])
                number += 1
        if device == "cuda":
            assert _C.barrier(made.team, torch.cuda.current_stream().cuda_stream) == 0
            torch.cuda.synchronize()
            made.check()
            number += 1
    # Ranks that disagree: the record is written and the outputs are filled with NaN.
    for call in calls(device):
        if call.num_tokens == 29 and not call.options.get("complete"):
            other = dataclasses.replace(call, num_tokens=call.num_tokens - rank)
            with workspace(device, device, **sizes) as made:
                error, _ = outcome(settled, made, other.run, rank, WORLD_SIZE)
                assert isinstance(error, tp_fused.CollectiveFault), error
                dist.barrier()
            number += 1
    if rank == 0:
        print(f"{number} calls on {WORLD_SIZE} ranks went as they should", flush=True)


if __name__ == "__main__":
    launch(run_all, WORLD_SIZE, "cuda")
