"""Times builds of libtp_fused side by side on one GPU, in seconds:

    python3 -m tools.compare_builds ../before/build/tp_fused/libtp_fused.so tp_fused/libtp_fused.so --cases 64,1024

For choosing between two ways to write a kernel. Ranks are streams of this one process, with as many blocks each as
ranks that share a card have, and call the C API (csrc/tp_fused.h). A graph holds several calls of all ranks, and the
graphs of all builds are replayed in turn. Every result is checked. With one rank (--world-size 1) the last column is
torch's product of the same operands. What ranks take that are processes, and what else there is to compare with,
`python -m bench` tells: streams begin together, processes do not, and the two have been seen to differ in which of two
builds is the faster one.
"""

import argparse
import ctypes
import faulthandler
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.cases import EPS, steps_apart
from tp_fused import reference
from tp_fused.native import _C, DTYPE_CODES

HIDDEN, WIDTHS = 7168, (1536, 512, 64)  # of DeepSeek-V3
LATENT = sum(WIDTHS)
MOST_TOKENS = 16384
TIMEOUT_NS = 2_000_000_000
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
Pointer = ctypes.c_void_p


# ---- csrc/tp_fused.h; tests/test_compare_builds.py compares the layouts ----


class Call(ctypes.Structure):
    _fields_ = [
        ("op", ctypes.c_uint32),
        ("dtype", ctypes.c_uint32),
        ("num_tokens", ctypes.c_int64),
        ("hidden_size", ctypes.c_uint32),
        ("columns", ctypes.c_uint32),
        ("group_size", ctypes.c_uint32),
        ("variant", ctypes.c_uint32),
        ("kv_columns", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("source", ctypes.c_int64),
    ]


class Team(ctypes.Structure):
    _fields_ = [
        ("rank", ctypes.c_int32),
        ("world_size", ctypes.c_int32),
        ("region", Pointer * 8),
        ("slot_bytes", ctypes.c_int64),
        ("timeout_ns", ctypes.c_int64),
        ("max_ctas", ctypes.c_int32),
        ("liveness_fd", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("mailbox", Pointer),
    ]


class Symm(ctypes.Structure):
    _fields_ = [("base", Pointer * 8), ("offset", ctypes.c_int64)]


class Projection(ctypes.Structure):
    _fields_ = [
        ("input", Pointer),
        ("scale", Pointer),
        ("scale_row_stride", ctypes.c_int64),
        ("scale_group_stride", ctypes.c_int64),
        ("weight", Pointer),
        ("weight_scale", Pointer),
        ("bias", Pointer),
        ("q_a_weight", Pointer),
        ("kv_a_weight", Pointer),
        ("q_columns", ctypes.c_int32),
        ("kv_columns", ctypes.c_int32),
        ("eps", ctypes.c_float),
    ]


STRUCTS = {"tpf_call": Call, "tpf_team": Team, "tpf_symm": Symm, "tpf_projection": Projection}
FUNCTIONS = {
    "tpf_barrier_cuda": [ctypes.POINTER(Team), Pointer],
    "tpf_rs_rmsnorm_cuda": [
        *(Pointer, Pointer, Pointer, ctypes.POINTER(Symm), Pointer, Pointer, ctypes.POINTER(Team)),
        *(ctypes.c_int64, ctypes.c_int32, ctypes.c_int, ctypes.c_float, ctypes.c_uint32, Pointer),
    ],
    "tpf_qkv_a_proj_ag_cuda": [
        *(ctypes.POINTER(Pointer), ctypes.POINTER(Projection), ctypes.POINTER(Team), ctypes.POINTER(Call), Pointer)
    ],
}


class Build:
    """A library with a workspace of its own for every rank."""

    def __init__(self, path: Path, world_size: int, slot_bytes: int):
        self.path, self.world_size = path, world_size
        self.library = ctypes.CDLL(str(path.resolve()))  # symbols stay apart from those of the other builds
        for name, arguments in FUNCTIONS.items():
            getattr(self.library, name).argtypes = arguments
        self.library.tpf_region_bytes.argtypes = [ctypes.c_int64, ctypes.c_int32]
        self.library.tpf_region_bytes.restype = ctypes.c_int64
        size = self.library.tpf_region_bytes(slot_bytes, 1)
        self.regions = [torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in range(world_size)]
        self.mailboxes = [torch.zeros(64, dtype=torch.int32).pin_memory() for _ in range(world_size)]
        self.slot_bytes = slot_bytes
        self.most_ctas = torch.cuda.get_device_properties(0).multi_processor_count // world_size

    def team(self, rank: int, max_ctas: int | None = None) -> Team:
        """max_ctas: at most as many blocks as fit on the card with those of all other ranks, the default."""
        max_ctas = min(max_ctas or self.most_ctas, self.most_ctas)
        regions = (Pointer * 8)(*(region.data_ptr() for region in self.regions))
        mailbox = self.mailboxes[rank].data_ptr()
        return Team(rank, self.world_size, regions, self.slot_bytes, TIMEOUT_NS, max_ctas, -1, 0, mailbox)

    def check(self) -> None:
        torch.cuda.synchronize()
        faults = [f"rank {rank}: status {mail[0]}" for rank, mail in enumerate(self.mailboxes) if mail[0] != 0]
        if faults:
            raise RuntimeError(f"{self.path}: {'; '.join(faults)}")


@dataclass
class Case:
    """launch(build, rank, stream) calls the op on a rank. clear() and wrong() are about what all ranks have written.

    product() is torch's, of what one rank multiplies.
    """

    name: str
    launch: Callable[[Build, int, int], int]
    clear: Callable[[], None]
    wrong: Callable[[], int]
    calls: int  # of a graph
    product: Callable[[], torch.Tensor] | None = None


def reductions(world_size: int) -> list[Case]:
    """rs_rmsnorm with a residual: T tokens read in place; T-staged; T-ctas8, with at most eight blocks a rank."""
    *inputs, residual = (torch.randn(MOST_TOKENS, HIDDEN, device="cuda").to(BF16) for _ in range(world_size + 1))
    weight = (1 + torch.randn(HIDDEN, device="cuda") / 8).to(BF16)
    outputs = torch.empty(world_size, 2, MOST_TOKENS // world_size, HIDDEN, dtype=BF16, device="cuda")
    symm = Symm((Pointer * 8)(*(tensor.data_ptr() for tensor in inputs)), 0)

    def case(tokens: int, calls: int, max_ctas: int | None = None, staged: bool = False) -> Case:
        own = tokens // world_size

        def launch(build: Build, rank: int, stream: int) -> int:
            places = outputs[rank, 0].data_ptr(), outputs[rank, 1].data_ptr(), inputs[rank].data_ptr()
            source = None if staged else ctypes.byref(symm)
            rest = residual[own * rank :].data_ptr(), weight.data_ptr(), ctypes.byref(build.team(rank, max_ctas))
            return build.library.tpf_rs_rmsnorm_cuda(
                *places, source, *rest, tokens, HIDDEN, DTYPE_CODES[BF16], EPS, _C.RESIDUAL, stream
            )

        def wrong() -> int:
            stored = reference.sum_in_rank_order([tensor[:tokens] for tensor in inputs], residual[:tokens])
            output, residual_out = (outputs[:, i, :own].reshape(tokens, HIDDEN) for i in (0, 1))
            far = steps_apart(output, reference.rms_norm(stored, weight, EPS)) > 1
            return int((steps_apart(residual_out, stored) > 0).sum() + far.sum())

        name = f"{tokens}{'-staged' * staged}{f'-ctas{max_ctas}' if max_ctas else ''}"
        return Case(name, launch, lambda: outputs.fill_(float("nan")), wrong, calls)

    return [
        *(case(tokens, calls) for tokens, calls in ((8, 32), (32, 32), (64, 32), (512, 32), (1024, 24), (16384, 4))),
        *(case(tokens, calls, staged=True) for tokens, calls in ((64, 32), (16384, 2))),
        case(16384, 4, max_ctas=8),
    ]


def projections(world_size: int) -> list[Case]:
    """qkv_a_proj_ag: projT tokens, projT-norm with the latent norms, projT-fp8. Each rank has a weight of its own."""
    drawn = torch.randn(MOST_TOKENS, HIDDEN, device="cuda")
    weight = torch.randn(LATENT, HIDDEN, device="cuda")
    rows = {BF16: drawn.to(BF16), E4M3: drawn.to(E4M3)}
    weights = {dtype: [weight.to(dtype) for _ in range(world_size)] for dtype in rows}
    scale = torch.rand(MOST_TOKENS, HIDDEN // 128, device="cuda") + 0.5
    weight_scale = torch.rand(-(-LATENT // 128), HIDDEN // 128, device="cuda") + 0.5
    norms = [(1 + torch.randn(width, device="cuda") / 8).to(BF16) for width in WIDTHS[:2]]
    outputs = torch.empty(world_size, MOST_TOKENS * LATENT, dtype=BF16, device="cuda")

    def case(tokens: int, op: int, calls: int) -> Case:
        own, normed = tokens // world_size, op == _C.QKV_A_PROJ_AG_NORM
        dtype = E4M3 if op == _C.QKV_A_PROJ_AG_FP8 else BF16
        code = DTYPE_CODES[dtype]
        call = Call(op, code, tokens, HIDDEN, LATENT, WIDTHS[0] * normed, 0, WIDTHS[1] * normed, 0, -1)
        starts = [tokens * sum(WIDTHS[:part]) for part in range(3 if normed else 1)]

        def launch(build: Build, rank: int, stream: int) -> int:
            places = (Pointer * 3)(*(outputs[rank, start:].data_ptr() for start in starts))
            scales = scale[own * rank :].data_ptr(), HIDDEN // 128, 1
            projection = Projection(
                *(rows[dtype][own * rank :].data_ptr(), *scales),
                *(weights[dtype][rank].data_ptr(), weight_scale.data_ptr(), None),
                *(norms[0].data_ptr(), norms[1].data_ptr(), *WIDTHS[:2], EPS),
            )
            team = ctypes.byref(build.team(rank))
            return build.library.tpf_qkv_a_proj_ag_cuda(
                places, ctypes.byref(projection), team, ctypes.byref(call), stream
            )

        def wrong() -> int:
            """Looks for NaN everywhere, and at the values of some rows."""
            some = torch.arange(0, tokens, max(1, tokens // 64), device="cuda")
            if dtype == E4M3:
                exact = reference.project_fp8(rows[E4M3][some], scale[some], weights[E4M3][0], weight_scale)
            else:
                exact = rows[BF16][some].float() @ weights[BF16][0].float().T
            parts = reference.split_and_norm(exact, *norms, EPS) if normed else [exact]
            count = int(outputs[:, : tokens * LATENT].isnan().sum())
            for start, part in zip(starts, parts, strict=True):
                width = part.shape[1]
                for written in outputs[:, start : start + tokens * width]:
                    off = written.view(tokens, width)[some].float() - part
                    count += int((off.abs() > part.abs().max() / 64).sum())
            return count

        operands = rows[dtype][:tokens], weights[dtype][0].t()
        # cuBLAS wants the rows' scales column-major.
        scales = scale[:tokens].t().contiguous().t(), weight_scale.t()

        def product() -> torch.Tensor:
            return torch._scaled_mm(*operands, *scales, out_dtype=BF16) if dtype == E4M3 else torch.mm(*operands)

        name = f"proj{tokens}{'-norm' * normed}{'-fp8' * (dtype == E4M3)}"
        alone = world_size == 1 and not normed
        return Case(name, launch, lambda: outputs.fill_(float("nan")), wrong, calls, product if alone else None)

    return [
        *(
            case(tokens, _C.QKV_A_PROJ_AG, calls)
            for tokens, calls in ((64, 8), (512, 8), (2048, 8), (4096, 6), (8192, 3), (16384, 2))
        ),
        case(16384, _C.QKV_A_PROJ_AG_NORM, 2),
        *(case(tokens, _C.QKV_A_PROJ_AG_FP8, calls) for tokens, calls in ((512, 8), (2048, 8), (4096, 6), (16384, 2))),
    ]


def barrier() -> list[Case]:
    """A bare barrier, fenced."""

    def launch(build: Build, rank: int, stream: int) -> int:
        return build.library.tpf_barrier_cuda(ctypes.byref(build.team(rank)), stream)

    return [Case("barrier", launch, lambda: None, lambda: 0, 32)]


def capture(case: Case, build: Build, streams: list[torch.cuda.Stream]) -> torch.cuda.CUDAGraph:
    """A graph of the case's calls: a branch a rank."""

    def call() -> None:
        for rank, stream in enumerate(streams):
            if status := case.launch(build, rank, stream.cuda_stream):
                raise RuntimeError(f"{build.path}: {case.name} on rank {rank} returned status {status}")

    torch.cuda.synchronize()
    call()
    torch.cuda.synchronize()
    graph, root = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=root, capture_error_mode="relaxed"):
        for stream in streams:
            stream.wait_stream(root)
        for _ in range(case.calls):
            call()
        for stream in streams:
            root.wait_stream(stream)
    return graph


def capture_product(product: Callable[[], torch.Tensor], calls: int) -> torch.cuda.CUDAGraph:
    product()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            product()
    return graph


def times(case: Case, builds: list[Build], rounds: int) -> tuple[list[float], list[int]]:
    """The median of each build, in us a call, and what it has got wrong; then torch's, if the case has a product."""
    streams = [torch.cuda.Stream() for _ in range(builds[0].world_size)]
    graphs, wrong = [], []
    for build in builds:
        graphs.append(capture(case, build, streams))
        case.clear()
        torch.cuda.synchronize()
        graphs[-1].replay()
        build.check()
        wrong.append(case.wrong())
    if case.product is not None:
        graphs.append(capture_product(case.product, case.calls))
        wrong.append(0)
    taken = [[] for _ in graphs]
    for _ in range(rounds):
        events = []
        torch.cuda._sleep(100_000)  # the card is busy until the first graph is queued
        for graph in graphs:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        for samples, (begin, end) in zip(taken, events, strict=True):
            samples.append(begin.elapsed_time(end) * 1e3 / case.calls)
    for build in builds:
        build.check()
    return [statistics.median(samples) for samples in taken], wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="+", type=Path, metavar="LIBRARY", help="the first is compared with")
    parser.add_argument("--cases", default="", metavar="NAME,...", help="these; by default all")
    parser.add_argument("--world-size", type=int, default=8, choices=(1, 2, 4, 8), help="ranks")
    parser.add_argument("--rounds", type=int, default=20, help="samples of each")
    parser.add_argument("--timeout", type=float, default=120, help="seconds until all is ended")
    options = parser.parse_args()
    # Streams wait for each other on the card: none may share a queue with another, and no kernel be loaded meanwhile.
    os.environ |= {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "CUDA_MODULE_LOADING": "EAGER"}
    if not torch.cuda.is_available():
        parser.error("there is no GPU")
    faulthandler.dump_traceback_later(options.timeout, exit=True)
    torch.manual_seed(0)
    wanted = [name for name in options.cases.split(",") if name]
    world_size = options.world_size
    known = [*barrier(), *reductions(world_size), *projections(world_size)]
    if unknown := set(wanted) - {case.name for case in known}:
        parser.error(f"no case is called {', '.join(sorted(unknown))}: {', '.join(case.name for case in known)}")
    slot_bytes = MOST_TOKENS * HIDDEN * BF16.itemsize
    builds = [Build(path, world_size, slot_bytes) for path in options.libraries]
    print(f"# {torch.cuda.get_device_name()}; us a call, and how many times as long as the first; !: wrong elements")
    total_wrong = 0
    for case in known:
        if wanted and case.name not in wanted:
            continue
        medians, wrong = times(case, builds, options.rounds)
        total_wrong += sum(wrong)
        cells = [
            f"{median:9.2f} {median / medians[0]:6.3f} x" + (f" !{count}" if count else "")
            for median, count in zip(medians, wrong, strict=True)
        ]
        print(f"{case.name:<16}" + " |".join(cells), flush=True)
    sys.exit(1 if total_wrong else 0)


if __name__ == "__main__":
    main()
