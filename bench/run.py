"""What every rank does: check an op, then time it, size by size."""

import contextlib
import sys
import time

import torch

import tp_fused

from . import cases, fp8, projections
from .context import Context
from .report import Report, result_row
from .timing import copy_bandwidth, host_calls, host_time, link_bandwidth, measure

CASES = {
    case.op: case
    for case in (
        cases.RsRmsnorm,
        fp8.RsRmsnormFp8,
        cases.RsRmsnormAg,
        fp8.RsRmsnormAgFp8,
        cases.ReduceScatterRows,
        cases.AllGatherRows,
        projections.QkvAProjAg,
        projections.QkvAProjAgComplete,
        fp8.QkvAProjAgFp8,
        projections.QkvAProjAgNorm,
        fp8.QkvAProjAgNormFp8,
        projections.Chain,
        projections.MlaPrologue,
        fp8.MlaPrologueFp8,
        projections.BesideGemm,
    )
}

WRONG, BAD_SETUP, FAULT = 1, 2, 3  # exit codes


def run_rank(options, registry=CASES, header: bool = True) -> None:
    """Runs on every rank of an initialised process group. Ends the process with a code when something is wrong."""
    rank = torch.distributed.get_rank()
    try:
        context = Context(options)
    except (ValueError, TypeError, MemoryError) as error:
        if rank == 0:  # it is the same on all ranks
            _complain(error)
        sys.exit(BAD_SETUP)
    try:
        wrong = _run(context, registry, header)
        context.close()
    except tp_fused.CollectiveFault as fault:
        _complain(fault, f"rank {rank}: ")
        sys.exit(FAULT)
    if wrong:
        sys.exit(WRONG)


def _complain(error: Exception, prefix: str = "") -> None:
    print(f"{prefix}{type(error).__name__}: {error}", file=sys.stderr, flush=True)


def _run(context, registry, header: bool) -> int:
    options = context.options
    bandwidths = copy_bandwidth(context), link_bandwidth(context)
    report = Report(options, context, *bandwidths) if context.rank == 0 else None
    total_wrong = 0
    if report and header:
        report.header()
    with report or contextlib.nullcontext():
        for op in options.ops:
            for index, num_tokens in enumerate(options.tokens):
                row = _run_case(context, registry[op](context, num_tokens), report, bandwidths, index == 0)
                total_wrong += row["wrong"] or 0
        if total_wrong and report:
            print(f"\n# {total_wrong} wrong elements", flush=True)
    return total_wrong


def _run_case(context, case, report, bandwidths, first: bool) -> dict:
    label = f"{case.op} {case.num_tokens}"
    programs = case.programs()
    if report and first:
        report.table(case.op, case.available_baselines(context), case.left_out(context), case.explain())
    wrong = None
    if context.options.check:
        if report:
            report.stage(f"{label}: check")
        wrong = _check(context, case, programs)
    samples = measure(context, programs, _ticker(report, label))
    if context.options.check:  # the timed calls have to be right too, not only the first ones
        wrong += context.host_sum(case.count_wrong(samples["fused"].last))
    host = None
    if context.device.type == "cuda":
        host = host_time(context, programs["fused"], host_calls(samples["fused"].median))
    row = result_row(case, programs, samples, wrong, host, bandwidths)
    if report:
        report.stage(label, advance=1)
        report.row(row)
    return row


def _ticker(report, label: str):
    """Draws the progress, a few times a second."""
    drawn = time.monotonic()

    def tick(done: int, total: int) -> None:
        nonlocal drawn
        if report and time.monotonic() - drawn > 0.2:
            drawn = time.monotonic()
            report.stage(f"{label}: {done} of {total}")

    return tick


def _check(context, case, programs) -> int:
    """Wrong elements of all ranks in two poisoned calls (there are two staging slots), and a look at the baselines."""
    wrong = 0
    for _ in range(2):
        context.host_barrier()
        with poisoned():
            outputs = programs["fused"].call()
            context.settle()
        wrong += case.count_wrong(outputs)
    for name, program in programs.items():
        if name == "fused":
            continue
        context.host_barrier()
        if program.prepare is not None:
            program.prepare()
        if program.case is not None:
            with poisoned():
                variant = program.call()
                context.settle()
            wrong += program.case.count_wrong(variant)
            continue
        called = program.call()
        context.settle()  # a peer that did not come in time is a fault, and no wrong number
        alike = case.resembles(called, program.expected() if program.expected else outputs)
        if wrong == 0 and not alike:
            raise RuntimeError(f"{case.op}: the unfused program {name!r} computes something else")
    return context.host_sum(wrong)


@contextlib.contextmanager
def poisoned():
    """Memory that torch hands out in here is NaN: what an op leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
