"""Ranks as threads of one process: the native layer needs no processes, and its waits let other threads run."""

import time

import pytest
import torch
from programs import Call, random, same_bits
from ranks import BUSY_S
from thread_ranks import ThreadRanks, make_segment

from tp_fused import faults, reference
from tp_fused.native import _C

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPS = 1e-5


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_six_rounds_of_mixed_ops(world_size):
    """A wait that kept the interpreter's lock would keep its peers from ever arriving."""

    def rounds(workspace) -> None:
        rank = workspace.rank
        for i, num_tokens in enumerate((5, 0, 64, 1, 257, 33)):
            call = Call("rs_rmsnorm", num_tokens, residual="slice", seed=i)
            given = call.arguments(rank, world_size)
            call.check(workspace.call("rs_rmsnorm", **given), rank, world_size)
            call = Call("reduce_scatter_rows", num_tokens, seed=i)
            call.check((workspace.call("reduce_scatter_rows", call.input(rank)),), rank, world_size)
            call = Call("all_gather_rows", num_tokens, seed=i)
            call.check((workspace.call("all_gather_rows", **call.arguments(rank, world_size)),), rank, world_size)

    ThreadRanks(world_size).run(rounds)


def test_symmetric_input_of_threads():
    stride, shape = 4096, (4, 256)
    segment = make_segment(2 * stride)
    ranks = ThreadRanks(2)

    def reduce(workspace) -> torch.Tensor:
        workspace.team.add_symmetric_buffer([segment.base, segment.base + stride], stride)
        input = torch.frombuffer(segment, dtype=torch.float32, count=1024, offset=workspace.rank * stride).view(shape)
        assert workspace.team.is_symmetric(input.data_ptr())
        input.fill_(workspace.rank + 1)
        output = workspace.call("reduce_scatter_rows", input)
        input.fill_(-1)
        return output

    assert torch.equal(torch.cat(ranks.run(reduce)), torch.full(shape, 3.0))


def test_a_thread_that_never_comes_is_told_apart():
    ranks = ThreadRanks(3, timeout_s=1.0)

    def reduce(workspace):
        if workspace.rank == 2:
            return None
        begin = time.monotonic()
        with pytest.raises(faults.CollectiveFault, match="rank 2 never arrived") as raised:
            workspace.call("reduce_scatter_rows", torch.zeros(4, 8))
        assert 1.0 <= time.monotonic() - begin < BUSY_S
        return raised.value.rank

    assert ranks.run(reduce) == [0, 1, None]


# ---- numbers at the edges of the dtypes ----


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """All bit patterns of a 16-bit dtype: subnormals, infinities and NaNs too."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(256, 256)


def same_numbers(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bits; any NaN is as good as any other."""
    assert torch.equal(actual.isnan(), expected.isnan())
    same_bits([actual.nan_to_num(0.0)], [expected.nan_to_num(0.0)])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_sum_of_one_is_the_value(dtype):
    values = every_value(dtype)
    (output,) = ThreadRanks(1).run(lambda workspace: workspace.call("reduce_scatter_rows", values))
    same_numbers(output, values)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_sums_round_as_torch_rounds(dtype, seed):
    values = every_value(dtype)
    order = torch.randperm(values.numel(), generator=torch.Generator().manual_seed(seed))
    # The second value: any other, or one near the first, where the sum cancels or carries.
    other = values.flatten()[order] if seed % 2 else values.flatten().roll(seed + 1)
    inputs = [values, other.view(256, 256).contiguous()]
    outputs = ThreadRanks(2).run(lambda workspace: workspace.call("reduce_scatter_rows", inputs[workspace.rank]))
    same_numbers(torch.cat(outputs), reference.sum_in_rank_order(inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_of_large_and_small_rows(dtype):
    """Mean squares that leave the range of fp16, and rows of zeros."""
    scales = torch.tensor([0.0, 1e-6, 1e-3, 1.0, 1e3, 3e4])[:, None]
    rows, weight = (random("rows", (6, 300), torch.float32) * scales).to(dtype), torch.ones(300, dtype=dtype)
    rows = rows.clamp(*(torch.finfo(dtype).min, torch.finfo(dtype).max))
    ((output, residual_out),) = ThreadRanks(1).run(
        lambda workspace: workspace.call("rs_rmsnorm", rows, None, weight, EPS)
    )
    same_bits([output, residual_out], [reference.rms_norm(rows, weight, EPS), rows])


@pytest.mark.parametrize("group_size", [64, 128])
def test_fp8_of_every_magnitude(group_size):
    """Groups that reach from their largest value down to e4m3's subnormals and to zero, of both signs."""
    magnitudes = torch.logspace(0, -18, 128 * 64, base=2.0).view(64, 128).repeat(1, 2)
    signs = torch.tensor([1.0, -1.0]).repeat(128)
    rows, weight = (magnitudes * signs).contiguous(), torch.ones(256)
    rows[:, ::37] = 0
    rows[:, 5] = 1
    rows[3] = 0

    def quantize(workspace):
        return workspace.call("rs_rmsnorm_fp8", rows, None, weight, EPS, group_size=group_size)

    ((q, scale, *_),) = ThreadRanks(1).run(quantize)
    same_bits([q, scale], reference.quantize_e4m3(reference.rms_norm(rows, weight, EPS), group_size))


def set_rounds(ranks: ThreadRanks, finished: int, signalled: int) -> torch.Tensor:
    """As if each rank had finished round `finished`, and all signals were those of round `signalled`; the epochs."""
    memory = torch.frombuffer(ranks.segment, dtype=torch.int64).view(ranks.world_size, -1)
    memory[:, _C.CONTROL_BYTES // 8 : _C.region_bytes(0) // 8] = signalled << 32
    epochs = memory.view(torch.int32)[:, _C.EPOCH_OFFSET // 4]
    epochs.fill_(finished)
    return epochs


def test_epochs_wrap_around():
    """After 2^32 rounds epochs begin again at 0."""
    ranks, rows = ThreadRanks(2), torch.ones(3, 8)
    epochs = set_rounds(ranks, -3, -3)

    def six_rounds(workspace) -> None:
        for i in range(6):
            time.sleep(0.02 * (i % 2 == workspace.rank))  # a rank that did not wait would read the round before
            output = workspace.call("reduce_scatter_rows", rows * i)
            assert torch.equal(output, torch.full_like(output, 2 * i))

    ranks.run(six_rounds)
    assert epochs.tolist() == [3, 3]


@pytest.mark.parametrize("finished", [5, 2**31 - 10, 10 - 2**31, -20])
def test_signals_that_nobody_has_sent_for_long_are_waited_for(finished):
    """A call may use signals that no call before it has, however many rounds there were."""
    ranks = ThreadRanks(2, timeout_s=0.2)
    set_rounds(ranks, finished, 0)
    with pytest.raises(faults.CollectiveFault, match="rank 1 never arrived"):
        ranks.workspaces[0].call("reduce_scatter_rows", torch.ones(3, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fp8_of_the_smallest_numbers(dtype):
    """448 over the largest of a group is not finite there, and zeros times that would not be zeros."""
    rows = torch.zeros(2, 256, dtype=dtype)
    rows[0, 0] = 1e-39

    def quantize(workspace):
        return workspace.call("rs_rmsnorm_fp8", rows, None, torch.ones(256, dtype=dtype), EPS, keep_output=True)

    ((q, scale, _, output),) = ThreadRanks(1).run(quantize)
    assert output[0, 0] > 0 and not q.float().isnan().any()
    same_bits([q, scale], reference.quantize_e4m3(output))
