"""`tp_fused.init`: what it refuses, which backend it takes, and what it leaves behind."""

import contextlib
import os
import re
import resource

import pytest
import torch
import torch.distributed as dist
from programs import Call
from ranks import names_in_shared_memory, outcome, workspace

import tp_fused
from tp_fused import backends

GOOD = {"max_num_tokens": 64, "hidden_size": 256, "dtype": torch.float32, "timeout_s": 20.0}


# ---- arguments ----


def init_on_each(device: str, arguments_of: list[dict], backend_of: list[str | None]):
    """Runs on a rank: what becomes of init with this rank's arguments; the right init afterwards must work."""
    rank = dist.get_rank()
    os.environ.pop("TP_FUSED_BACKEND", None)
    if backend_of[rank] is not None:
        os.environ["TP_FUSED_BACKEND"] = backend_of[rank]
    error, _ = outcome(tp_fused.init, **{**GOOD, "device": device, **arguments_of[rank]})
    call = Call("rs_rmsnorm", 5, device=device)
    with workspace(None, device):
        call.check(call.run(rank, dist.get_world_size()), rank, dist.get_world_size())
    return error


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("max_num_tokens", 65, "max_num_tokens=65, rank 0 with max_num_tokens=64"),
        ("hidden_size", 128, "hidden_size=128, rank 0 with hidden_size=256"),
        ("latent_size", 96, "latent_size=96, rank 0 with latent_size=None"),
        ("dtype", torch.bfloat16, "dtype=torch.bfloat16, rank 0 with dtype=torch.float32"),
        ("timeout_s", 5.0, "timeout_s=5.0, rank 0 with timeout_s=20.0"),
        ("max_ctas", 4, "max_ctas=4, rank 0 with max_ctas=None"),
        ("max_num_tokens", -1, "max_num_tokens=-1, rank 0 with max_num_tokens=64"),
    ],
)
@pytest.mark.parametrize("world_size", [3])
def test_arguments_that_differ_are_named(pool, device, world_size, argument, value, message):
    errors = pool.run(init_on_each, device, [{}, {}, {argument: value}], [None] * 3)
    assert [type(error) for error in errors] == [ValueError] * 3
    assert {str(error) for error in errors} == {f"tp_fused.init: rank 2 was called with {message}"}


@pytest.mark.parametrize("world_size", [2])
def test_backends_that_differ_are_named(pool, device, world_size):
    for error in pool.run(init_on_each, device, [{}, {}], [None, "reference"]):
        assert isinstance(error, ValueError)
        assert "rank 1 was called with TP_FUSED_BACKEND=reference, rank 0 with TP_FUSED_BACKEND=None" in str(error)


@pytest.mark.parametrize(
    ("argument", "value", "kind", "message"),
    [
        ("max_num_tokens", 0, ValueError, "max_num_tokens must be a positive integer below 2**31, got 0"),
        ("hidden_size", -7, ValueError, "hidden_size must be a positive integer below 2**31, got -7"),
        ("hidden_size", "7168", ValueError, "hidden_size must be a positive integer below 2**31, got '7168'"),
        ("latent_size", 0, ValueError, "latent_size must be a positive integer below 2**31, got 0"),
        ("max_ctas", 2.5, ValueError, "max_ctas must be a positive integer below 2**31, got 2.5"),
        (
            "max_num_tokens",
            2**60,
            ValueError,
            "max_num_tokens must be a positive integer below 2**31, got 1152921504606",
        ),
        ("max_num_tokens", True, ValueError, "max_num_tokens must be a positive integer below 2**31, got True"),
        ("timeout_s", "30", ValueError, "timeout_s must be positive seconds, got '30'"),
        ("timeout_s", 0, ValueError, "timeout_s must be positive seconds, got 0"),
        ("timeout_s", float("inf"), ValueError, "timeout_s must be positive seconds, got inf"),
        ("timeout_s", float("nan"), ValueError, "timeout_s must be positive seconds, got nan"),
        ("timeout_s", True, ValueError, "timeout_s must be positive seconds, got True"),
        ("dtype", torch.int8, TypeError, "dtype must be one of torch.bfloat16, torch.float16, torch.float32, got tor"),
    ],
)
@pytest.mark.parametrize("world_size", [2])
def test_arguments_out_of_range(pool, device, world_size, argument, value, kind, message):
    for error in pool.run(init_on_each, device, [{argument: value}] * 2, [None] * 2):
        assert type(error) is kind, repr(error)
        assert f"tp_fused.init: {message}" in str(error)


@pytest.mark.parametrize("world_size", [2])
def test_equal_arguments_of_which_one_is_out_of_range(pool, device, world_size):
    """True is 1, but no count: no rank raises alone and leaves the other waiting."""
    for error in pool.run(init_on_each, device, [{"max_num_tokens": 1}, {"max_num_tokens": True}], [None] * 2):
        assert type(error) is ValueError
        assert "max_num_tokens must be a positive integer below 2**31, got True" in str(error)


@pytest.mark.parametrize("world_size", [2])
def test_device_of_one_rank_that_torch_does_not_know(pool, device):
    """All ranks are told: none waits for the one that cannot go on."""
    for error in pool.run(init_on_each, device, [{}, {"device": "gpu"}], [None] * 2):
        assert isinstance(error, ValueError)
        assert "tp_fused.init: rank 1: device 'gpu' cannot be used: Expected one of cpu, cuda" in str(error)


def test_no_process_group():
    with pytest.raises(ValueError, match=r"call torch\.distributed\.init_process_group first"):
        tp_fused.init(**GOOD)


# ---- shared memory ----


@contextlib.contextmanager
def address_space_for(spare_bytes: int):
    """This process can map only so much more."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + spare_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def too_large(arguments: dict, narrow_rank: int):
    """Runs on a rank: an init that there is no memory for, then the right one."""
    os.environ["TP_FUSED_BACKEND"] = "cpu"
    narrow = address_space_for(256 << 20) if dist.get_rank() == narrow_rank else contextlib.nullcontext()
    with narrow:
        error, _ = outcome(tp_fused.init, device="cpu", **{**GOOD, **arguments})
    with workspace("cpu"):
        call = Call("rs_rmsnorm", 5)
        call.check(call.run(dist.get_rank(), 2), dist.get_rank(), 2)
    return error, names_in_shared_memory()


@pytest.mark.parametrize(
    ("arguments", "narrow_rank", "message"),
    [
        ({"max_num_tokens": 1 << 30, "hidden_size": 1 << 20}, -1, "rank 0: cannot create shared memory"),
        ({"max_num_tokens": 1 << 14, "hidden_size": 1 << 11}, 1, "rank 1: cannot map shared memory"),
    ],
    ids=["no space", "no address space on rank 1"],
)
@pytest.mark.parametrize("world_size", [2])
def test_no_room_in_shared_memory(fresh_pool, world_size, arguments, narrow_rank, message):
    for error, names in fresh_pool.run(too_large, arguments, narrow_rank):
        assert isinstance(error, MemoryError), repr(error)
        assert message in str(error)
        assert "MiB of /dev/shm, which has" in str(error) and "TP_FUSED_BACKEND=reference" in str(error)
        assert names == []


def too_many_files(after_the_report: bool) -> Exception:
    """Runs on a rank: the last one runs out of file descriptors, at once or for its shared memory; then the right init.

    The limit is lowered under what is open.
    """
    os.environ["TP_FUSED_BACKEND"] = "cpu"
    before, report = resource.getrlimit(resource.RLIMIT_NOFILE), backends.report

    def exhausting(*arguments):
        made = report(*arguments) if after_the_report else None
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
        return made or report(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "report", exhausting)
        error, _ = outcome(tp_fused.init, device="cpu", **GOOD)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
    dist.barrier()  # whoever comes late takes part in the init that the others are in
    with workspace("cpu"):
        call = Call("rs_rmsnorm", 5)
        call.check(call.run(dist.get_rank(), 2), dist.get_rank(), 2)
    return error


@pytest.mark.parametrize("after_the_report", [False, True])
@pytest.mark.parametrize("world_size", [2])
def test_open_files_are_not_mistaken_for_memory(pool, world_size, after_the_report):
    errors = pool.run(too_many_files, after_the_report)
    for rank, error in enumerate(errors):
        assert isinstance(error, OSError if rank == 1 or after_the_report else tp_fused.CollectiveFault), repr(error)
        assert "Too many open files" in str(error) and "/dev/shm" not in str(error)
        if after_the_report:
            assert "rank 1: cannot map shared memory" in str(error)
            assert "Raise its limit of open files (ulimit -n)" in str(error)


def names_while_open(device: str) -> list[str]:
    """Runs on a rank."""
    with workspace(device, device):
        tp_fused.symm_empty((8, 8), torch.float32, device=device)
        dist.barrier()
        names = names_in_shared_memory()
        dist.barrier()
        return names


@pytest.mark.parametrize("world_size", [2])
def test_segments_have_no_name(pool, device, world_size):
    assert pool.run(names_while_open, device) == [[], []]


# ---- life of a workspace ----


def made_again(backend: str, device: str) -> None:
    """Runs on a rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with workspace(backend, device) as first, workspace(backend, device, hidden_size=512) as second:
        assert first.closed and not second.closed
        call = Call("rs_rmsnorm", 5, hidden_size=512, device=device)
        call.check(call.run(rank, world_size), rank, world_size)
        second.check()
    assert second.closed


@pytest.mark.parametrize("world_size", [2])
def test_init_again_replaces_the_workspace(pool, backend, device, world_size):
    pool.run(made_again, backend, device)


def used_after_closing(backend: str, device: str) -> list:
    """Runs on a rank."""
    with workspace(backend, device) as made:
        pass
    made.close()
    input = torch.zeros(4, 256, device=device)
    return [
        outcome(call)[0]
        for call in (lambda: tp_fused.reduce_scatter_rows(input), made.check, lambda: made.symm_empty(4, 4))
    ]


@pytest.mark.parametrize("world_size", [2])
def test_closed_workspace(pool, backend, device, world_size):
    for op, check, symm_empty in pool.run(used_after_closing, backend, device):
        assert f"has no workspace for {device} tensors; call tp_fused.init" in str(op)
        for error in (op, check, symm_empty):
            assert isinstance(error, ValueError), repr(error)
        for error in (check, symm_empty):
            assert "is closed; call tp_fused.init(...) on all ranks" in str(error)


def two_groups(backend: str, device: str) -> None:
    """Runs on a rank: ranks 0 and 1 also form a group of their own, whose rounds mix with those of all three."""
    rank = dist.get_rank()
    pair, made = dist.new_group([0, 1]), None
    sizes = {"max_num_tokens": 64, "hidden_size": 256, "dtype": torch.float32, "device": device}
    with workspace(backend, device):
        for i in range(6):
            call = Call("rs_rmsnorm", 20 + i, seed=i, device=device)
            call.check(call.run(rank, 3), rank, 3)
            if rank < 2:
                made = tp_fused.init(pair, **sizes) if made is None else made
                small = Call("rs_rmsnorm_ag", 7 + i, seed=i, device=device)
                small.check(small.run(rank, 2, small.arguments(rank, 2) | {"group": pair}), rank, 2)
        if made is not None:
            made.close()


@pytest.mark.parametrize("world_size", [3])
def test_groups_do_not_meet_each_other(fresh_pool, backend, device, world_size):
    fresh_pool.run(two_groups, backend, device)


def explained(backend: str, device: str) -> dict[str, str]:
    """Runs on a rank. Of two blocks each has two of its four rows: one alone would be staged wherever it lies."""
    with workspace(backend, device, max_ctas=2):
        symmetric = tp_fused.symm_empty((8, 256), torch.float32, device=device)
        return {
            "staged": tp_fused.explain("rs_rmsnorm", 8, input=torch.zeros(8, 256, device=device)),
            "in place": tp_fused.explain("rs_rmsnorm", 8, input=symmetric),
            "projection": tp_fused.explain("qkv_a_proj_ag", 9, device=device),
            "fp8": tp_fused.explain("qkv_a_proj_ag_fp8", 9, device=device),
            "too many": tp_fused.explain("rs_rmsnorm_ag", 65, device=device),
            "unknown": str(outcome(tp_fused.explain, "rs_layernorm", 1, device=device)[0]),
        }


@pytest.mark.parametrize("world_size", [2])
def test_explain(pool, backend, device, world_size):
    shared = backend == "cuda" and torch.cuda.device_count() < world_size
    reason = "TP_FUSED_BACKEND asks for it" + ("; 2 ranks share a GPU" if shared else "")
    for rank, told in enumerate(pool.run(explained, backend, device)):
        assert told["staged"].startswith(f"rs_rmsnorm: backend {backend} ({reason})\n")
        assert f"rank {rank} of 2 owns rows {4 * rank} to {4 * rank + 4} of 8" in told["staged"]
        assert f"rank {rank} of 2 owns rows {5 * rank} to {5 + 4 * rank} of 9" in told["projection"]
        assert "it would raise: the workspace was made for 64 tokens" in told["too many"]
        assert told["unknown"].startswith("unknown op 'rs_layernorm'; there are rs_rmsnorm, ")
        if backend == "reference":
            assert "torch.distributed" in told["in place"]
        else:
            assert "the input is staged" in told["staged"]
            assert "the peers read the input in place" in told["in place"]
            assert "torch multiplies" in told["projection"]
        if backend == "cuda":
            blocks = r"^2 blocks \(max_ctas=2\) of \d+ threads; each has {} rows at most$"
            assert re.search(blocks.format(2), told["staged"], re.MULTILINE)
            assert re.search(blocks.format(3), told["projection"], re.MULTILINE)
            assert "no kernel does both for qkv_a_proj_ag of torch.float32" in told["projection"]
            assert re.search("^(one|a Triton) kernel multiplies", told["fp8"], re.MULTILINE)
