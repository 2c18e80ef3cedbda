"""Inputs in symmetric memory, which the peers read in place."""

import pytest
import torch
import torch.distributed as dist
from programs import REDUCTIONS, Call
from ranks import outcome, settled, workspace

import tp_fused

SIZES = {"max_num_tokens": 300, "hidden_size": 256}


def in_place(backend: str, device: str, calls: list[Call], first_row: int) -> None:
    """Runs on a rank: each call's input lies `first_row` rows into a symmetric tensor, and is overwritten at once."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with workspace(backend, device, dtype=calls[0].dtype, **SIZES) as made:
        memory = tp_fused.symm_empty((300 + first_row, 256), dtype=calls[0].dtype, device=device)
        assert memory.shape == (300 + first_row, 256) and memory.device.type == device
        outputs = []
        for call in calls:
            arguments = call.arguments(rank, world_size)
            view = memory[first_row : first_row + call.num_tokens].view(-1)
            view = view[: call.num_tokens * call.hidden_size].view(call.num_tokens, call.hidden_size)
            arguments["input"] = view.copy_(arguments["input"])
            if backend != "reference" and call.num_tokens:
                assert made.team.is_symmetric(view.data_ptr())
            outputs.append(call.run(rank, world_size, arguments))
            memory.fill_(float("nan"))  # only the closing synchronisation makes this safe
        for call, output in zip(calls, outputs, strict=True):
            call.check(output, rank, world_size)


@pytest.mark.parametrize("op", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("first_row", [0, 7])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_input_in_place(pool, backend, device, op, dtype, first_row, world_size):
    calls = [
        Call(op, count, hidden, dtype, residual="slice", seed=i, device=device)
        for i, (count, hidden) in enumerate([(300, 256), (1, 256), (0, 256), (257, 96), (3, 200), (300, 256)])
    ]
    pool.run(in_place, backend, device, calls, first_row)


def mixed(device: str, calls: list[Call]) -> None:
    """Runs on a rank: staged inputs and inputs in place by turns."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with workspace(device, device, **SIZES):
        memory = tp_fused.symm_empty((300, 256), dtype=torch.float32, device=device)
        for i, call in enumerate(calls):
            arguments = call.arguments(rank, world_size)
            if i % 3:
                arguments["input"] = memory[: call.num_tokens].copy_(arguments["input"])
            call.check(call.run(rank, world_size, arguments), rank, world_size)


@pytest.mark.parametrize("world_size", [2, 3])
def test_staged_and_in_place_by_turns(pool, device, world_size):
    calls = [Call(REDUCTIONS[i % 4], 65, 256, seed=i, device=device) for i in range(12)]
    pool.run(mixed, device, calls)


def outlives(device: str) -> float:
    """Runs on a rank."""
    with workspace(device, device):
        memory = tp_fused.symm_empty((8, 8), dtype=torch.float32, device=device)
        memory.fill_(dist.get_rank())
    return memory.sum().item()


@pytest.mark.parametrize("world_size", [2])
def test_tensor_outlives_the_workspace(pool, device, world_size):
    assert pool.run(outlives, device) == [0.0, 64.0]


def quantised(backend: str, device: str):
    """Runs on a rank."""
    with workspace(backend, device):
        error, _ = outcome(tp_fused.symm_empty, (8, 8), torch.qint8, device=device)
        assert tp_fused.symm_empty((8, 8), torch.int8, device=device).shape == (8, 8)
        return error


@pytest.mark.parametrize("world_size", [2])
def test_memory_of_quantised_dtypes_is_refused(pool, backend, device, world_size):
    for error in pool.run(quantised, backend, device):
        assert isinstance(error, TypeError) and "no symmetric memory of torch.qint8" in str(error)


def disagreeing_shapes(backend: str, device: str):
    """Runs on a rank."""
    with workspace(backend, device):
        shape = (8, 8 + dist.get_rank())
        error, _ = outcome(tp_fused.symm_empty, shape, torch.float32, device=device)
        assert tp_fused.symm_empty((8, 8), torch.float32, device=device).shape == (8, 8)
        return error


@pytest.mark.parametrize("world_size", [2])
def test_shapes_that_differ_are_named(pool, backend, device, world_size):
    for error in pool.run(disagreeing_shapes, backend, device):
        assert isinstance(error, ValueError)
        assert str(error) == (
            "symm_empty: rank 1 asked for ((8, 9), torch.float32), rank 0 for ((8, 8), torch.float32)"
        )


def beyond_an_address(backend: str, device: str) -> list:
    """Runs on a rank."""
    with workspace(backend, device):
        shapes = (2**32, 2**32), (2**62,), (2**31, 2**31, 4)  # elements, or bytes, that wrap to few in 64 bits
        return [outcome(tp_fused.symm_empty, shape, torch.float32, device=device)[0] for shape in shapes]


@pytest.mark.parametrize("world_size", [2])
def test_more_bytes_than_an_address_can_tell(pool, backend, device, world_size):
    for errors in pool.run(beyond_an_address, backend, device):
        assert [type(error) for error in errors] == [MemoryError] * 3
        assert str(errors[0]) == f"symm_empty: (4294967296, 4294967296) of torch.float32 are {2**66} bytes a rank"


def on_another_card(device: str):
    """Runs on a rank."""
    with workspace(device, device):
        index = torch.cuda.current_device() + dist.get_rank()
        return outcome(tp_fused.symm_empty, (8, 8), torch.float32, device=f"cuda:{index}")[0]


@pytest.mark.cuda
@pytest.mark.parametrize("world_size", [2])
def test_memory_on_another_card_is_refused(pool, device, world_size):
    for error in pool.run(on_another_card, device):
        assert isinstance(error, ValueError) and "symm_empty: rank 1 asked for memory on cuda:" in str(error)


def places_that_differ(device: str, place_of: list):
    """Runs on a rank: the input lies in that buffer from that row on, or outside of symmetric memory."""
    # Few blocks, for the call to be large enough to be read in place.
    with workspace(device, device, max_ctas=4, **SIZES) as made:
        place = place_of[dist.get_rank()]
        buffers = [tp_fused.symm_empty((304, 256), dtype=torch.float32, device=device) for _ in range(2)]
        input = torch.zeros(300, 256, device=device)
        if place is not None:
            buffer, row = place
            input = buffers[buffer][row : row + 300].zero_()
        return outcome(settled, made, tp_fused.reduce_scatter_rows, input)[0]


@pytest.mark.parametrize(
    ("place_of", "message"),
    [
        ([(0, 0), None], "rank 1 called with an ordinary input, rank 0 with an input at byte 0 of symmetric buffer 1"),
        ([(0, 0), (0, 4)], "an input at byte 4096 of symmetric buffer 1, rank 0 with an input at byte 0 of symmetric"),
        (
            [(0, 4), (1, 4)],
            "at byte 4096 of symmetric buffer 2, rank 0 with an input at byte 4096 of symmetric buffer 1",
        ),
    ],
)
@pytest.mark.parametrize("world_size", [2])
def test_places_that_differ_are_a_fault(pool, device, world_size, place_of, message):
    errors = pool.run(places_that_differ, device, place_of)
    assert all(isinstance(error, tp_fused.CollectiveFault) for error in errors), errors
    assert message in str(errors[0])
