"""What tools/sanitize.py watches: two ranks, calls of every kernel of libtp_fused in every form, faults too.

Rows come in several chunks, through several rounds of a block's ring of row buffers, and products in several turns of
tiles. Of the projections' tiles there are those that such calls take.
"""

import dataclasses
import faulthandler
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import tp_fused
from tp_fused import reference
from tp_fused.launch import launch
from tp_fused.native import _C

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from programs import REDUCTIONS, Call, same_bits
from ranks import outcome, settled, workspace

WORLD_SIZE = 2
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LIMIT_S = 190

# (num_tokens, hidden_size, dtype), which choose the body of rs_rmsnorm_kernel and its width, by the blocks of a rank.
FORMS = {
    2: [
        *((3, 256, dtype) for dtype in (BF16, FP16, FP32)),  # a row a block
        # Rows that TMA brings: 41 a block in seven chunks, through a ring of 32 buffers, three a row.
        (163, 768, BF16),
        (163, 256, FP16),
        (163, 1024, FP32),
        (30, 8192, BF16),  # through a ring of 10
        (3, 8192, BF16),
        (37, 16384, BF16),  # two blocks share each row, in seven chunks
        (21, 16384, FP32),  # too wide for that
    ],
    1: [(9, 16384, BF16), (9, 16384, FP16)],
    # A row for a cluster of eight, four and two blocks; the first two post their pieces. Many for clusters of two and
    # four.
    8: [(2, 8192, BF16), (4, 4096, FP32), (6, 2048, FP16), (37, 16384, BF16), (21, 16384, FP32)],
    20: [(40, 7168, BF16)],  # a row a block, too large for all ranks to add up all
}
# Of rs_rmsnorm_ag alone, whose ranks all add up all of fewer rows.
LARGER = [(163, 3072, BF16), (163, 3072, FP16)]
# Of rs_rmsnorm_ag_fp8, whose ranks all quantise all rows: one for a cluster of eight or two blocks, one a block, many a
# block, by scales of a group and of a row. The last ones' owners do.
QUANTISED = {
    2: [
        ((2, 256, BF16), {}),
        ((3, 256, FP32), {"group_size": 64}),
        ((163, 256, FP16), {"group_size": 256}),
        ((163, 768, BF16), {}),
        ((30, 8192, BF16), {}),
    ],
    8: [((1, 8192, BF16), {"group_size": 8192}), ((1, 4096, FP16), {}), ((4, 4096, FP32), {})],
}
FEW = 29  # tokens of the calls that ranks disagree on
FP8_OPTIONS = {"keep_output": True, "scale_layout": "column"}


def reduction(device: str, op: str, form: tuple, residual: str | None = "full", **options) -> Call:
    if op in ("rs_rmsnorm_fp8", "rs_rmsnorm_ag_fp8"):
        options |= FP8_OPTIONS
    return Call(op, *form, residual, device=device, options=options)


def reductions(device: str, max_ctas: int) -> list[Call]:
    calls = [reduction(device, op, form) for op in REDUCTIONS for form in FORMS[max_ctas]]
    calls += [reduction(device, "rs_rmsnorm_ag_fp8", form, **options) for form, options in QUANTISED.get(max_ctas, [])]
    if max_ctas == 2:
        calls += [reduction(device, op, (163, 768, BF16), None) for op in REDUCTIONS[:3]]
        calls += [reduction(device, "rs_rmsnorm_ag", form) for form in LARGER]
        calls += [reduction(device, op, (163, 256, BF16), complete=True) for op in REDUCTIONS[:2]]
    return calls


def others(device: str, tool: str) -> list[Call]:
    # Rows of whole 16 bytes, few and more than a few for TMA, in several chunks, and others.
    shapes = ((29, 4096), (29, 16384), (160, 16384), (29, 1001))
    gathers = [Call("all_gather_rows", *shape, torch.uint8, device=device) for shape in shapes]
    # Two or three waves of tiles, each through its ring of operands more than once; fp32 is gathered after the product.
    forms = ((29, 256, BF16), (29, 256, FP16), (29, 256, FP32), (300, 256, FP32), (1100, 1024, BF16), (1100, 512, FP16))
    projections = [Call(op, *form, device=device) for op in ("qkv_a_proj_ag", "qkv_a_proj_ag_norm") for form in forms]
    projections.append(Call("qkv_a_proj_ag", 300, 256, BF16, device=device, options={"bias": True}))
    # Scales of four blocks of K that lie together, and others.
    fp8 = [
        Call("qkv_a_proj_ag_fp8", count, hidden_size, FP32, device=device, options={"scale_layout": layout})
        for count, hidden_size, layout in ((1100, 1024, "row"), (1100, 768, "column"), (29, 256, "column"))
    ]
    # In one kernel, its blocks in pairs that share out K; of fp32 and of more rows, a product first.
    rows = ((FEW, 1024), (300, 256))
    products = {"qkv_a_proj_ag": BF16, "qkv_a_proj_ag_norm": FP16, "qkv_a_proj_ag_fp8": FP32}
    forms = [(op, *shape, dtype) for op, dtype in products.items() for shape in rows]
    forms.append(("qkv_a_proj_ag_norm", FEW, 256, FP32))
    if tool == "initcheck":  # which does not see what TMA writes: such products' results, that a kernel then gathers
        forms = [form for form in forms if form[1] == FEW] + [(op, *rows[1], FP32) for op in list(products)[:2]]
    complete = [Call(*form, device=device, options={"complete": True}) for form in forms]
    return [*gathers, *projections, *fp8, *complete]


def disagreed(device: str) -> list[Call]:
    few = [reduction(device, op, (FEW, 256, BF16)) for op in (*REDUCTIONS, "rs_rmsnorm_ag_fp8")]
    few += [Call("all_gather_rows", FEW, columns, torch.uint8, device=device) for columns in (4096, 16384)]
    names = ("qkv_a_proj_ag", "qkv_a_proj_ag_norm", "qkv_a_proj_ag_fp8")
    return few + [Call(op, FEW, 256, FP32 if op.endswith("fp8") else BF16, device=device) for op in names]


def run(call: Call, memory: torch.Tensor | None = None) -> int:
    """One call, checked; 1. memory: symmetric memory for its input."""
    rank = dist.get_rank()
    arguments = call.arguments(rank, WORLD_SIZE)
    if memory is not None:
        place = memory[: arguments["input"].numel()].view(arguments["input"].shape)
        arguments["input"] = place.copy_(arguments["input"])
    call.check(call.run(rank, WORLD_SIZE, arguments), rank, WORLD_SIZE)
    return 1


def run_reductions(device: str, max_ctas: int) -> int:
    """Each staged and in place; how many calls."""
    calls = reductions(device, max_ctas)
    sizes = {
        dtype: max(c.num_tokens * c.hidden_size for c in calls if c.dtype == dtype)
        for dtype in dict.fromkeys(c.dtype for c in calls)
    }
    with workspace(device, device, max_num_tokens=163, hidden_size=16384, max_ctas=max_ctas, timeout_s=60.0):
        memories = {dtype: tp_fused.symm_empty((size,), dtype, device=device) for dtype, size in sizes.items()}
        return sum(run(call, memory) for call in calls for memory in (None, memories[call.dtype]))


def quantize_latent(device: str, tool: str) -> int:
    """qkv_a_proj_ag_norm_fp8, beside itself with a quantised q_a: on the way or, of few columns, afterwards."""
    number = 0
    for latent in ((96, 40, 8), (512, 72, 16)):
        for num_tokens, complete in ((FEW, False), (1100, False), (FEW, True), (5, True)):
            if tool == "initcheck" and not complete:  # TMA stores q_a
                continue
            options = {"complete": complete}
            call = Call("qkv_a_proj_ag_fp8", num_tokens, 256, FP32, device=device, latent=latent, options=options)
            given = call.arguments(dist.get_rank(), WORLD_SIZE)
            for name, size in zip(("q_a_weight", "kv_a_weight"), latent[:2], strict=True):
                given[name] = torch.ones(size, dtype=BF16, device=device)
            q_a, *_ = tp_fused.qkv_a_proj_ag_norm_fp8(**given)
            q, scale, *_ = tp_fused.qkv_a_proj_ag_norm_fp8(**given, quantize_q_a=True)
            same_bits((q, scale), reference.quantize_e4m3(q_a))
            number += 2
    return number


def run_others(device: str, tool: str) -> int:
    with workspace(device, device, max_num_tokens=1100, hidden_size=4096, max_ctas=2, timeout_s=60.0) as made:
        number = sum(map(run, others(device, tool))) + quantize_latent(device, tool)
        if device == "cuda":
            assert _C.barrier(made.team, torch.cuda.current_stream().cuda_stream) == 0
            torch.cuda.synchronize()
            made.check()
            number += 1
    return number


def run_disagreed(device: str) -> int:
    """Ranks that disagree: the record is written and the outputs are filled with NaN."""
    rank, calls = dist.get_rank(), disagreed(device)
    for call in calls:
        other = dataclasses.replace(call, num_tokens=call.num_tokens - rank)
        with workspace(device, device, max_num_tokens=FEW, hidden_size=4096, max_ctas=2, timeout_s=60.0) as made:
            error, _ = outcome(settled, made, other.run, rank, WORLD_SIZE)
            assert isinstance(error, tp_fused.CollectiveFault), error
            dist.barrier()
    return len(calls)


def run_all(device: str, tool: str) -> None:
    """Runs on a rank. tool: that watches it."""
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    # initcheck does not see what TMA writes. Outputs are NaN at first: what stays unwritten is a wrong result.
    torch.use_deterministic_algorithms(tool == "initcheck", warn_only=True)
    number = sum(run_reductions(device, max_ctas) for max_ctas in FORMS)
    number += run_others(device, tool) + run_disagreed(device)
    if dist.get_rank() == 0:
        print(f"{number} calls on {WORLD_SIZE} ranks went as they should", flush=True)


if __name__ == "__main__":
    device, tool = sys.argv[1:]
    launch(run_all, WORLD_SIZE, device, tool)
