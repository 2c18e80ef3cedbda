"""The benchmark's NCCL over symmetric windows, without a card: on one rank, over gloo, with a stand-in for the pool."""

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("typer", reason="the bench extra is not installed")

from bench import cases, fp8, peers, projections
from bench.baselines import BASELINES
from bench.context import Context
from bench.options import Options


@pytest.fixture
def context():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    sizes = {"tokens": (6, 40), "hidden": 512, "latent": 96, "kv_lora": 32, "rope": 32}
    context = Context(Options(ops=("chain",), world_size=1, **sizes))
    yield context
    context.close()
    dist.destroy_process_group()


class NcclBackend:
    """ProcessGroupNCCL, as far as its memory pools go."""

    mem_allocator = "ncclMemAlloc"

    def __init__(self, happened: list):
        self.happened = happened

    def register_mem_pool(self, pool, symm=False):
        self.happened.append(("register", pool.allocator, symm, pool.allocated))

    def deregister_mem_pool(self, pool):
        self.happened.append(("deregister",))


class Pool:
    def __init__(self, allocator):
        self.allocator, self.allocated = allocator, 0


@pytest.fixture
def windows(context, monkeypatch):
    """The list of what happens with the pool."""
    happened, group = [], context.group

    @contextlib.contextmanager
    def use_mem_pool(pool):
        pool.allocated += 1
        yield

    monkeypatch.setattr(torch.cuda, "MemPool", Pool)
    monkeypatch.setattr(torch.cuda, "use_mem_pool", use_mem_pool)
    backend = NcclBackend(happened)
    monkeypatch.setattr(type(group), "_get_backend", lambda group, device: backend)
    return happened


@pytest.mark.parametrize("num_tokens", [6, 40])
@pytest.mark.parametrize(
    "kind",
    [
        *(cases.RsRmsnorm, fp8.RsRmsnormFp8, cases.ReduceScatterRows, cases.RsRmsnormAg, fp8.RsRmsnormAgFp8),
        *(projections.Chain, fp8.MlaPrologueFp8),
    ],
)
def test_nccl_reads_and_writes_windows(context, windows, kind, num_tokens):
    case = kind(context, num_tokens)
    program, kept = case.baseline("nccl-symm"), context._kept["windows"]
    for _ in range(2):
        if program.prepare:
            program.prepare()
        outputs = program.call()
        assert case.resembles(outputs, case.fused())
    reduced = outputs[-1].untyped_storage().data_ptr()
    assert reduced in (kept.input.untyped_storage().data_ptr(), kept.output.untyped_storage().data_ptr())
    assert len(kept.input) == len(kept.output) == 40


def test_windows_are_registered_once_with_all_memory_in_the_pool(context, windows):
    for num_tokens in (6, 40):
        cases.RsRmsnorm(context, num_tokens).baseline("nccl-symm")
    assert windows == [("register", "ncclMemAlloc", True, 1)]
    context._kept.pop("windows").close()
    assert windows[1:] == [("deregister",)]


def test_windows_that_cannot_be_registered_are_left_out(context, windows, monkeypatch):
    def fail(backend, pool, symm=False):
        raise RuntimeError("NCCL Error 1: unhandled cuda error")

    monkeypatch.setattr(NcclBackend, "register_mem_pool", fail)
    possible = dataclasses.replace(BASELINES["nccl-symm"], available=lambda _: True, why_not=lambda _: None)
    monkeypatch.setitem(BASELINES, "nccl-symm", possible)
    programs = cases.ReduceScatterRows(context, 6).programs()
    assert set(programs) == {"fused", "dist"}
    assert cases.ReduceScatterRows.left_out(context) == {
        "nccl-symm": "RuntimeError: NCCL Error 1: unhandled cuda error"
    }


@pytest.mark.parametrize(
    ("version", "enabled", "why"),
    [
        ((2, 27, 3), None, None),
        ((2, 28, 9), "1", None),
        ((2, 26, 5), None, "NCCL 2.26.5 has no symmetric windows, 2.27 has"),
        ((2, 28, 9), "0", "NCCL_WIN_ENABLE=0"),
    ],
)
def test_why_windows_are_left_out(monkeypatch, version, enabled, why):
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: version)
    monkeypatch.delenv("NCCL_WIN_ENABLE", raising=False)
    if enabled:
        monkeypatch.setenv("NCCL_WIN_ENABLE", enabled)
    assert peers.why_no_windows(None) == why


@pytest.mark.parametrize(
    ("kind", "collectives", "runs"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_windows_want_a_card_a_rank(kind, collectives, runs):
    place = SimpleNamespace(device=torch.device(kind), has_collectives=collectives)
    assert BASELINES["nccl-symm"].available(place) == runs
