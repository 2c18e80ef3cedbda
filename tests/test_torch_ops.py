"""The kernels of csrc/torch_ops.cpp: they serve what is in order without Python, which explains what they refuse.

What the ops do is in the other tests, which call them as everybody does. tests/test_one_road.py looks for calls on
which the kernels and the checks in Python do not agree.
"""

import contextlib
import functools
import itertools
import re
import resource
import threading
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from programs import OPS, Call, python_of
from ranks import outcome, workspace
from thread_ranks import ThreadRanks

import tp_fused
from tp_fused import native, ops, projections

FP8_OPTIONS = [
    {"group_size": size, "scale_layout": layout, "keep_output": keep}
    for size, layout, keep in itertools.product((64, 128), ("row", "column"), (False, True))
]


def options_of(op: str) -> list[dict]:
    complete = {"complete": True}
    special = {
        "rs_rmsnorm": [{}, complete],
        "rs_rmsnorm_fp8": [*FP8_OPTIONS, complete],
        "qkv_a_proj_ag": [{}, {"bias": True}, complete],
        "qkv_a_proj_ag_fp8": [{"scale_layout": "row"}, {"scale_layout": "column"}, complete],
        "qkv_a_proj_ag_norm": [{}, complete],
    }
    return special.get(op, [{}])


@contextlib.contextmanager
def without_python():
    """No call is explained in this context."""
    refused = AssertionError("the native kernel refused")
    with (
        mock.patch.object(ops, "get_workspace", side_effect=refused),
        mock.patch.object(projections, "get_workspace", side_effect=refused),
    ):
        yield


# ---- calls that are in order ----


def in_order(device: str, op: str) -> None:
    """Runs on a rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    calls = [
        Call(op, num_tokens, 256, dtype, residual, device=device, options=options)
        for num_tokens, dtype, options in itertools.product((0, 1, 13), dtypes, options_of(op))
        for residual in ((None, "full", "slice") if op.startswith("rs_rmsnorm") else (None,))
    ]
    with workspace(device, device):
        for call in calls:
            arguments = call.arguments(rank, world_size)
            with without_python():
                results = call.run(rank, world_size, arguments)
            call.check(results, rank, world_size)
            promised = python_of(f"_{op}_fake")(**arguments, group_name=dist.group.WORLD.group_name)
            promised = promised if isinstance(promised, tuple) else (promised,)
            for made, expected in zip(results, promised, strict=True):
                seen = made.shape, made.stride(), made.dtype, made.device
                assert seen == (expected.shape, expected.stride(), expected.dtype, expected.device), call


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("world_size", [1, 3])
def test_the_kernel_makes_what_the_fake_kernel_promises(pool, device, op):
    pool.run(in_order, device, op)


def parts_of_larger_tensors(device: str, op: str, dtype: torch.dtype) -> None:
    """Runs on a rank: every argument begins 16 bytes or more into its storage."""
    call = Call(op, 13, 256, dtype, device=device, options={"bias": True} if op == "qkv_a_proj_ag" else {})
    arguments = call.arguments(dist.get_rank(), dist.get_world_size())
    for name, value in arguments.items():
        if torch.is_tensor(value):
            larger = torch.cat([torch.full_like(value[:1], float("nan")).expand(16, *value.shape[1:]), value])
            arguments[name] = larger[16:]
            assert arguments[name].storage_offset() > 0
    with workspace(device, device), without_python():
        call.check(call.run(dist.get_rank(), dist.get_world_size(), arguments), dist.get_rank(), dist.get_world_size())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("world_size", [2])
def test_arguments_may_be_parts_of_larger_tensors(pool, device, op, dtype):
    pool.run(parts_of_larger_tensors, device, op, dtype)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8], ids=str)
@pytest.mark.parametrize("world_size", [2])
def test_bytes_are_gathered(pool, device, dtype):
    pool.run(gather_bytes, device, dtype)


def gather_bytes(device: str, dtype: torch.dtype) -> None:
    """Runs on a rank."""
    with workspace(device, device), without_python():
        rows = torch.full((2, 256), dist.get_rank() + 1, dtype=torch.uint8, device=device).view(dtype)
        gathered = tp_fused.all_gather_rows(rows, 4).view(torch.uint8)
    assert gathered[:, 0].tolist() == [1, 1, 2, 2]


def symmetric_input(device: str) -> None:
    """Runs on a rank: peers read the input where it lies."""
    with workspace(device, device):
        input = tp_fused.symm_empty((4, 256), torch.float32, device=device).fill_(dist.get_rank() + 1)
        with without_python():
            output = tp_fused.reduce_scatter_rows(input)
        assert output.unique().tolist() == [3]


@pytest.mark.parametrize("world_size", [2])
def test_symmetric_input(pool, device):
    pool.run(symmetric_input, device)


def replaced(device: str) -> list:
    """Runs on a rank: a workspace, a larger one in its place, and none."""
    rows = torch.ones(8, 256, device=device)
    with workspace(device, device, max_num_tokens=4):
        small = outcome(tp_fused.reduce_scatter_rows, rows)[0]
        with workspace(device, device, max_num_tokens=8), without_python():
            tp_fused.reduce_scatter_rows(rows)
    return [small, outcome(tp_fused.reduce_scatter_rows, rows)[0]]


@pytest.mark.parametrize("world_size", [2])
def test_the_workspace_is_the_one_that_the_group_has_now(pool, device):
    for small, none in pool.run(replaced, device):
        assert "num_tokens=8 is over the workspace's max_num_tokens=4" in str(small)
        assert "has no workspace" in str(none)


def test_a_name_is_that_of_its_last_workspace():
    """A forked child has its parent's workspaces here, which it cannot close."""
    first, last = (ThreadRanks(1).workspaces[0] for _ in range(2))
    last.team.serve(last.caller, first.group_name, last.max_num_tokens, last.row_bytes)
    first.call("reduce_scatter_rows", torch.ones(4, 8))
    assert [one.team.progress(0)["calls"] for one in (first, last)] == [0, 1]


@pytest.mark.parametrize("way", ["call", "redispatch"])
def test_a_wait_for_peers_lets_other_threads_run(way):
    """Ranks may be threads of one process: torch must have let go of the interpreter's lock."""
    op = torch.ops.tp_fused.reduce_scatter_rows.default
    if way == "redispatch":
        op = functools.partial(op.redispatch, torch._C.DispatchKeySet(torch._C.DispatchKey.CPU))
    ranks = ThreadRanks(2)

    def reduce(rank) -> torch.Tensor:
        return torch.cat([op(torch.full((4, 8), float(i)), rank.group_name) for i in range(50)])

    for output in ranks.run(reduce):
        assert torch.equal(output[::2, 0], torch.arange(50) * 2.0)


# ---- calls that are handed over ----


@pytest.fixture
def alone(device, pools):
    """run(function, *arguments) in a group of one rank."""
    return lambda function, *arguments: pools(1).run(function, device, *arguments)[0]


def raise_everything(device: str) -> None:
    """Runs on a rank: an exception arrives as the object that it was, in any thread."""
    errors = [KeyError("one"), KeyboardInterrupt(), tp_fused.CollectiveFault("five", "rs_rmsnorm", 5, 0, 1, "closed")]
    rows, caught = torch.ones(4, 256, device=device), []

    def call(error) -> None:
        try:
            tp_fused.reduce_scatter_rows(rows, "nobody")
        except BaseException as raised:
            caught.append(raised is error)
            names = [frame.name for frame in traceback.extract_tb(raised.__traceback__)]
            caught.append("_reduce_scatter_rows" in names)

    for error in errors:
        with mock.patch.object(ops, "get_workspace", side_effect=error):
            call(error)
            thread = threading.Thread(target=call, args=(error,))
            thread.start()
            thread.join()
    assert caught == [True] * 4 * len(errors)


def test_an_exception_arrives_as_it_was_raised(alone):
    alone(raise_everything)


def disagree(device: str) -> list:
    """Runs on a rank: a check that is missing in Python, and one that is missing in the kernel."""
    rows, weight = torch.ones(4, 256, device=device), torch.ones(256, device=device)
    with workspace(device, device), mock.patch.object(ops.checks, "eps"):
        return outcome(tp_fused.rs_rmsnorm, rows, None, weight, -1.0)[0]


def test_a_refusal_without_a_reason_is_told_as_a_bug(alone, device):
    error = alone(disagree)
    assert type(error) is RuntimeError
    given = (
        rf"torch.float32 \(4, 256\) of strides \(256, 1\) at 0 on {device}.*, None, torch.float32 \(256,\).*, -1.0, "
    )
    pattern = (
        rf"checks.py admits what the native kernel refused: tp_fused.rs_rmsnorm\({given}.*, False, 0.0\); please report"
    )
    assert re.match(pattern, str(error)), str(error)


def without_memory(device: str):
    """Runs on a rank, which has too little left for the output."""
    rows = torch.zeros(2**14, 2**10)
    with workspace(device, device, max_num_tokens=2**14, hidden_size=2**10, latent_size=2**10):
        tp_fused.all_gather_rows(rows, 2**14)
        limits = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**24, limits[1]))
        try:
            return outcome(tp_fused.all_gather_rows, rows, 2**14)[0]
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)


def test_out_of_memory_is_told_by_torch(pools):
    (error,) = pools(1).run(without_memory, "cpu")
    assert type(error) is RuntimeError and "can't allocate memory: you tried to allocate 67108864 bytes" in str(error)


def gradients(device: str) -> list:
    """Runs on a rank."""
    rows = torch.ones(4, 256, device=device, requires_grad=True)
    seen = []
    for backend in (device, "reference"):
        with workspace(backend, device):
            seen.append([t.requires_grad for t in tp_fused.rs_rmsnorm(rows, None, torch.ones(256, device=device))])
            with torch.no_grad():
                seen.append([t.requires_grad for t in tp_fused.rs_rmsnorm(rows, None, torch.ones_like(rows[0]))])
    return seen


def test_gradients_are_asked_for_alike(alone):
    kernel, kernel_no_grad, handed_over, handed_over_no_grad = alone(gradients)
    assert kernel == handed_over
    assert kernel_no_grad == handed_over_no_grad == [False, False]


# ---- memory ----


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def call_often(device: str) -> list[int]:
    """Runs on a rank: by how much the process grows over calls served, handed over and refused."""
    rows, weight = torch.ones(4, 256, device=device), torch.ones(256, device=device)
    projection = torch.ones(144, 256, device=device)
    fp8_weight = torch.zeros(8, 256, dtype=torch.float8_e4m3fn, device=device)
    q, scale = fp8_weight[:4], torch.ones(4, 2, device=device)

    def served() -> None:
        tp_fused.rs_rmsnorm(rows, rows, weight)
        tp_fused.rs_rmsnorm_fp8(rows, None, weight, scale_layout="column", keep_output=True)
        tp_fused.all_gather_rows(rows, 4)
        tp_fused.qkv_a_proj_ag(rows, projection, 4, bias=weight[:144])
        tp_fused.qkv_a_proj_ag_norm(rows, projection, weight[:96], weight[:40], 4)
        with mock.patch.object(native, "project_fp8", lambda *_: None):
            tp_fused.qkv_a_proj_ag_fp8(q, scale, fp8_weight, scale[:1], 4)

    def handed_over() -> None:
        with mock.patch.object(ops.reference, "rs_rmsnorm", same_rows):
            tp_fused.rs_rmsnorm(rows, rows, weight)

    def refused() -> None:
        assert isinstance(outcome(tp_fused.rs_rmsnorm, rows, rows, weight, -1.0)[0], ValueError)

    grown = []
    for backend, call in ((device, served), ("reference", handed_over), (device, refused)):
        with workspace(backend, device):
            by = []
            for count in (2000, 20_000, 20_000):
                before = resident_bytes()
                for _ in range(count):
                    call()
                by.append(resident_bytes() - before)
            grown.append(min(by[1:]))  # the heap may grow once more; what is forgotten is forgotten each time
    return grown


def same_rows(workspace, input, residual, weight, eps, weight_offset, complete):
    """For a backend that keeps no rows of its own, as torch.distributed does."""
    return torch.empty_like(input), torch.empty_like(input)


@pytest.mark.parametrize("world_size", [1])
def test_memory_does_not_grow(fresh_pool, device):
    """Whatever is forgotten at each call, 32 bytes at least, would be 640 kB."""
    (grown,) = fresh_pool.run(call_often, device)
    assert max(grown) <= 2**19, grown
