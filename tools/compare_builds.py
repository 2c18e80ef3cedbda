"""Times builds of libtp_fused side by side, in seconds:

    tools/with_mps.sh python3 -m tools.compare_builds ../before/build/tp_fused/libtp_fused.so \\
        tp_fused/libtp_fused.so --cases 64,1024

For choosing between two ways to write a kernel. Every rank is a process, with a card of its own or, where ranks share
one, with as many blocks as fit on it beside the others'. The builds' C API (csrc/tp_fused.h) is called directly, and
timed as `python -m bench` times: graphs of several calls, replayed in turn, of which the slowest rank counts. Every
result is checked. With one rank (--world-size 1) the last column is torch's product of the same operands. What else
there is to compare with, the benchmark tells.
"""

import argparse
import ctypes
import faulthandler
import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem

from bench.cases import EPS, steps_apart
from bench.context import Host
from bench.timing import Program, measure
from tp_fused import partition, reference
from tp_fused.launch import launch, take_device
from tp_fused.native import _C, DTYPE_CODES

from .c_api import Call, Pointer, Projection, Symm, Team, load

HIDDEN, WIDTHS = 7168, (1536, 512, 64)  # of DeepSeek-V3
LATENT = sum(WIDTHS)
MOST_TOKENS = 16384
SLOT_BYTES = MOST_TOKENS * HIDDEN * 2
TIMEOUT_NS = 2_000_000_000
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


class Ranks(Host):
    """This process's place among the ranks, and what bench.timing asks of a run."""

    def __init__(self, rounds: int):
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        place = take_device("cuda")
        self.device, self.sentence = place.device, place.sentence()
        num_sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        self.most_ctas = num_sms // place.ranks_per_card
        self.options = SimpleNamespace(warmup=1, iters=rounds, budget_s=1.0)
        self.builds: list[Build] = []
        self._handles = []

    def symmetric(self, num_bytes: int) -> list[torch.Tensor]:
        """Every rank's bytes, as they are mapped here. Collective."""
        own = symm_mem.empty(num_bytes, dtype=torch.uint8, device=self.device)
        handle = symm_mem.rendezvous(own, dist.group.WORLD.group_name)
        self._handles.append((own, handle))
        return [handle.get_buffer(rank, (num_bytes,), torch.uint8) for rank in range(self.world_size)]

    def meet(self) -> None:
        self.builds[0].barrier()

    def settle(self) -> None:
        torch.cuda.synchronize()
        for build in self.builds:
            build.check()


class Build:
    """A library with a workspace of its own."""

    def __init__(self, path: Path, ranks: Ranks):
        self.path, self.ranks = path, ranks
        self.library = load(path)
        self.library.tpf_region_bytes.argtypes = [ctypes.c_int64, ctypes.c_int32]
        self.library.tpf_region_bytes.restype = ctypes.c_int64
        regions = ranks.symmetric(self.library.tpf_region_bytes(SLOT_BYTES, 1))
        regions[ranks.rank].zero_()
        self.regions = (Pointer * 8)(*(region.data_ptr() for region in regions))
        self.mailbox = torch.zeros(64, dtype=torch.int32).pin_memory()

    def team(self, max_ctas: int | None = None) -> Team:
        """max_ctas: at most as many blocks as fit on the card with those of all other ranks, the default."""
        ranks = self.ranks
        max_ctas = min(max_ctas or ranks.most_ctas, ranks.most_ctas)
        place = ranks.rank, ranks.world_size, self.regions, SLOT_BYTES, TIMEOUT_NS
        return Team(*place, max_ctas, -1, ranks.device.index, self.mailbox.data_ptr(), None, 0)

    def call(self, name: str, *arguments) -> None:
        """A function of the library, on torch's stream."""
        status = getattr(self.library, name)(*arguments, torch.cuda.current_stream().cuda_stream)
        if status:
            raise RuntimeError(f"{self.path}: {name} returned status {status} on rank {self.ranks.rank}")

    def barrier(self) -> None:
        self.call("tpf_barrier_cuda", ctypes.byref(self.team()))

    def check(self) -> None:
        if status := self.mailbox[0].item():
            raise RuntimeError(f"{self.path}: rank {self.ranks.rank} has met a fault, status {status}")


@dataclass
class Case:
    """launch(build) calls the op. clear() and wrong() are about what it writes. product() is torch's, of one rank."""

    name: str
    launch: Callable[[Build], None]
    clear: Callable[[], None]
    wrong: Callable[[], int]
    product: Callable[[], torch.Tensor] | None = None


def reductions(ranks: Ranks) -> list[Case]:
    """rs_rmsnorm with a residual: T tokens read in place; T-staged; T-ctas8, with at most eight blocks a rank.

    T-ag: rs_rmsnorm_ag of tokens read in place.
    """
    inputs = [
        memory.view(BF16).view(MOST_TOKENS, HIDDEN) for memory in ranks.symmetric(MOST_TOKENS * HIDDEN * BF16.itemsize)
    ]
    input = inputs[ranks.rank]
    generator = torch.Generator(ranks.device).manual_seed(ranks.rank)
    input.normal_(generator=generator)
    residual = torch.randn(MOST_TOKENS, HIDDEN, device=ranks.device, dtype=BF16)
    weight = (1 + torch.randn(HIDDEN, device=ranks.device) / 8).to(BF16)
    outputs = torch.empty(MOST_TOKENS, HIDDEN, dtype=BF16, device=ranks.device)
    residuals_out = torch.empty(-(-MOST_TOKENS // ranks.world_size), HIDDEN, dtype=BF16, device=ranks.device)
    symm = Symm((Pointer * 8)(*(tensor.data_ptr() for tensor in inputs)), 0, 1)

    def clear() -> None:
        for tensor in (outputs, residuals_out):
            tensor.fill_(float("nan"))

    def case(tokens: int, max_ctas: int | None = None, staged: bool = False, gathered: bool = False) -> Case:
        own = partition.row_slice(tokens, ranks.rank, ranks.world_size)
        count = own.stop - own.start

        def launch(build: Build) -> None:
            build.call(
                f"tpf_rs_rmsnorm{'_ag' * gathered}_cuda",
                *(outputs.data_ptr(), residuals_out.data_ptr(), input.data_ptr()),
                *(None if staged else ctypes.byref(symm), residual[own].data_ptr(), weight.data_ptr()),
                *(ctypes.byref(build.team(max_ctas)), tokens, HIDDEN, DTYPE_CODES[BF16], EPS, 0.0, _C.RESIDUAL),
            )

        def wrong() -> int:
            """Of what rs_rmsnorm_ag gathers, looks at this rank's own rows, and for NaN at the others."""
            stored = reference.sum_in_rank_order([tensor[own] for tensor in inputs], residual[own])
            output = outputs[own] if gathered else outputs[:count]
            far = steps_apart(output, reference.rms_norm(stored, weight, EPS)) > 1
            missing = outputs[: tokens if gathered else count].isnan()
            return int((steps_apart(residuals_out[:count], stored) > 0).sum() + far.sum() + missing.sum())

        name = f"{tokens}{'-staged' * staged}{f'-ctas{max_ctas}' if max_ctas else ''}{'-ag' * gathered}"
        return Case(name, launch, clear, wrong)

    return [
        *(case(tokens) for tokens in (8, 32, 64, 128, 129, 256, 512, 1024, 2048, 16384)),
        *(case(tokens, staged=True) for tokens in (64, 128, 129, 256, 512, 1024, 16384)),
        case(16384, max_ctas=8),
        *(case(tokens, gathered=True) for tokens in (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384)),
        *(case(tokens, staged=True, gathered=True) for tokens in (64, 256, 512)),
    ]


def projections(ranks: Ranks) -> list[Case]:
    """qkv_a_proj_ag: projT tokens, projT-norm with the latent norms, projT-fp8. -complete: all ranks have the rows."""
    generator = torch.Generator(ranks.device).manual_seed(0)  # all ranks know all rows
    random = functools.partial(torch.rand, generator=generator, device=ranks.device)
    drawn, weight = (
        torch.randn(rows, HIDDEN, generator=generator, device=ranks.device) for rows in (MOST_TOKENS, LATENT)
    )
    rows, weights = ({dtype: tensor.to(dtype) for dtype in (BF16, E4M3)} for tensor in (drawn, weight))
    scale = random(MOST_TOKENS, HIDDEN // 128) + 0.5
    weight_scale = random(-(-LATENT // 128), HIDDEN // 128) + 0.5
    norms = [(0.9 + random(width) / 4).to(BF16) for width in WIDTHS[:2]]
    outputs = torch.empty(MOST_TOKENS * LATENT, dtype=BF16, device=ranks.device)

    def case(tokens: int, op: int, complete: bool = False) -> Case:
        first = 0 if complete else partition.row_slice(tokens, ranks.rank, ranks.world_size).start
        normed, variant = op == _C.QKV_A_PROJ_AG_NORM, _C.COMPLETE if complete else 0
        dtype = E4M3 if op == _C.QKV_A_PROJ_AG_FP8 else BF16
        code = DTYPE_CODES[dtype]
        sizes = {"num_tokens": tokens, "hidden_size": HIDDEN, "columns": LATENT, "source": -1}
        split = {"q_columns": WIDTHS[0] * normed, "kv_columns": WIDTHS[1] * normed}
        call = Call(op=op, dtype=code, variant=variant, **sizes, **split)
        starts = [tokens * sum(WIDTHS[:part]) for part in range(3 if normed else 1)]
        places = (Pointer * 3)(*(outputs[start:].data_ptr() for start in starts))
        projection = Projection(
            *(rows[dtype][first:].data_ptr(), scale[first:].data_ptr(), HIDDEN // 128, 1),
            *(weights[dtype].data_ptr(), weight_scale.data_ptr(), None),
            *(norms[0].data_ptr(), norms[1].data_ptr(), *WIDTHS[:2], EPS),
        )

        def launch(build: Build) -> None:
            team = ctypes.byref(build.team())
            build.call("tpf_qkv_a_proj_ag_cuda", places, ctypes.byref(projection), team, ctypes.byref(call))

        def wrong() -> int:
            """Looks for NaN everywhere, and at the values of some rows."""
            some = torch.arange(0, tokens, max(1, tokens // 64), device=ranks.device)
            if dtype == E4M3:
                exact = reference.project_fp8(rows[E4M3][some], scale[some], weights[E4M3], weight_scale)
            else:
                exact = rows[BF16][some].float() @ weights[BF16].float().T
            parts = reference.split_and_norm(exact, *norms, EPS) if normed else [exact]
            count = int(outputs[: tokens * LATENT].isnan().sum())
            for start, part in zip(starts, parts, strict=True):
                written = outputs[start : start + tokens * part.shape[1]].view(tokens, -1)[some]
                count += int(((written.float() - part).abs() > part.abs().max() / 64).sum())
            return count

        operands = rows[dtype][:tokens], weights[dtype].t()
        # cuBLAS wants the rows' scales column-major.
        scales = scale[:tokens].t().contiguous().t(), weight_scale.t()

        def product() -> torch.Tensor:
            return torch._scaled_mm(*operands, *scales, out_dtype=BF16) if dtype == E4M3 else torch.mm(*operands)

        name = f"proj{tokens}{'-norm' * normed}{'-fp8' * (dtype == E4M3)}{'-complete' * complete}"
        alone = ranks.world_size == 1 and not normed
        return Case(name, launch, lambda: outputs.fill_(float("nan")), wrong, product if alone else None)

    return [
        *(case(tokens, _C.QKV_A_PROJ_AG) for tokens in (1, 8, 64, 512, 1024, 2048, 4096, 8192, 16384)),
        *(case(tokens, _C.QKV_A_PROJ_AG_NORM) for tokens in (4096, 8192, 16384)),
        *(case(tokens, _C.QKV_A_PROJ_AG_FP8) for tokens in (64, 512, 2048, 4096, 8192, 16384)),
        *(case(tokens, _C.QKV_A_PROJ_AG, True) for tokens in (1, 8, 32, 64)),
        *(case(tokens, _C.QKV_A_PROJ_AG_NORM, True) for tokens in (1, 8, 64)),
        *(case(tokens, _C.QKV_A_PROJ_AG_FP8, True) for tokens in (1, 8, 64)),
    ]


def barrier() -> list[Case]:
    """A bare barrier, fenced."""
    return [Case("barrier", Build.barrier, lambda: None, lambda: 0)]


def gathers(ranks: Ranks) -> list[Case]:
    """all_gather_rows of latents: gatherT tokens."""
    generator = torch.Generator(ranks.device).manual_seed(0)  # all ranks know all rows
    rows = torch.randn(MOST_TOKENS, LATENT, dtype=BF16, generator=generator, device=ranks.device)
    output = torch.empty_like(rows)

    def case(tokens: int) -> Case:
        own = rows[tokens // ranks.world_size * ranks.rank :]

        def launch(build: Build) -> None:
            team = ctypes.byref(build.team())
            rest = tokens, LATENT, DTYPE_CODES[BF16]
            build.call("tpf_all_gather_rows_cuda", output.data_ptr(), own.data_ptr(), team, *rest)

        def wrong() -> int:
            return int((output[:tokens] != rows[:tokens]).sum())

        return Case(f"gather{tokens}", launch, lambda: output.fill_(float("nan")), wrong)

    return [case(tokens) for tokens in (64, 512, 2048, 4096, 16384)]


def count_wrong(case: Case, builds: list[Build], ranks: Ranks) -> list[int]:
    """The wrong elements of each build, of all ranks."""
    wrong = []
    for build in builds:
        case.clear()
        case.launch(build)
        ranks.settle()
        wrong.append(case.wrong())
    return ranks.host_reduce(wrong, dist.ReduceOp.SUM).int().tolist()


def run_rank(options: argparse.Namespace) -> None:
    faulthandler.dump_traceback_later(options.timeout, exit=True)
    ranks = Ranks(options.rounds)
    known = [*barrier(), *reductions(ranks), *gathers(ranks), *projections(ranks)]
    wanted = [name for name in options.cases.split(",") if name]
    show = functools.partial(print, flush=True) if ranks.rank == 0 else lambda *text, **where: None
    if unknown := set(wanted) - {case.name for case in known}:
        names = ", ".join(case.name for case in known)
        show(f"no case is called {', '.join(sorted(unknown))}: {names}", file=sys.stderr)
        sys.exit(2)
    ranks.builds = builds = [Build(path, ranks) for path in options.libraries]
    torch.cuda.synchronize()
    ranks.host_barrier()  # all regions are zeroed
    where = ranks.sentence or torch.cuda.get_device_name()
    show(f"# {where}; us a call, and how many times as long as the first; !: wrong elements")
    total_wrong = 0
    for case in known:
        if wanted and case.name not in wanted:
            continue
        wrong = count_wrong(case, builds, ranks)
        programs = {index: Program(functools.partial(case.launch, build)) for index, build in enumerate(builds)}
        if case.product is not None:
            programs["torch"], wrong = Program(case.product), [*wrong, 0]
        medians = [samples.median * 1e6 for samples in measure(ranks, programs).values()]
        total_wrong += sum(wrong)
        cells = [
            f"{median:9.2f} {median / medians[0]:6.3f} x" + (f" !{count}" if count else "")
            for median, count in zip(medians, wrong, strict=True)
        ]
        show(f"{case.name:<16}" + " |".join(cells))
    ranks.host_barrier()  # nobody takes its memory away while others read it
    if total_wrong:
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="+", type=Path, metavar="LIBRARY", help="the first is compared with")
    parser.add_argument("--cases", default="", metavar="NAME,...", help="these; by default all")
    parser.add_argument("--world-size", type=int, default=8, choices=(1, 2, 4, 8), help="ranks")
    parser.add_argument("--rounds", type=int, default=20, help="samples of each")
    parser.add_argument("--timeout", type=float, default=120, help="seconds until all is ended")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU")
    try:
        for library in options.libraries:
            load(library)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    # No kernel is loaded while others wait for each other; and ranks may share a card.
    os.environ |= {"CUDA_MODULE_LOADING": "EAGER", "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
    try:
        launch(run_rank, options.world_size, options)
    except torch.multiprocessing.ProcessExitedException as ended:  # the rank has said why
        sys.exit(max(ended.exit_code, 1))


if __name__ == "__main__":
    main()
