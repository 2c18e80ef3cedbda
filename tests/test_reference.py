"""The single-process pieces of reference.py, which the other tests take as their oracle."""

import pytest
import torch
from programs import random, within_twice_the_error

from tp_fused import reference

FLOATS = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("hidden_size", [1, 96, 7168])
def test_rms_norm_against_torch(dtype, hidden_size):
    rows, weight = random("rows", (300, hidden_size), dtype), random("weight", (hidden_size,), dtype)
    exact = torch.nn.functional.rms_norm(rows.double(), (hidden_size,), weight.double(), 1e-5)
    unfused = torch.nn.functional.rms_norm(rows, (hidden_size,), weight, 1e-5)
    within_twice_the_error("rms_norm", reference.rms_norm(rows, weight, 1e-5), exact, unfused)


def test_rms_norm_by_hand():
    # Mean of squares 12, and 4 of eps.
    rows, weight = torch.tensor([[2.0, 2.0, 4.0, -2.0, 2.0, 4.0, -2.0, 6.0]]), torch.arange(8.0)
    expected = torch.tensor([[0.0, 0.5, 2.0, -1.5, 2.0, 5.0, -3.0, 10.5]])
    assert (rows.square().mean() + 5.0).item() == 16.0
    assert torch.equal(reference.rms_norm(rows, weight, 5.0), expected)


def test_rms_norm_rounds_once():
    rows, weight = random("rows", (200, 300), torch.bfloat16), random("weight", (300,), torch.bfloat16)
    exact = torch.nn.functional.rms_norm(rows.double(), (300,), weight.double(), 1e-5)
    # Rounding the normed rows before the weight would move about a third of the elements.
    assert (reference.rms_norm(rows, weight, 1e-5) != exact.bfloat16()).double().mean() < 0.001


def test_sum_is_added_in_list_order():
    parts = [torch.tensor([2.0**24, 1.0]), torch.tensor([1.0, 2.0**24]), torch.tensor([-(2.0**24)] * 2)]
    assert reference.sum_in_rank_order(parts).tolist() == [0.0, 0.0]
    assert reference.sum_in_rank_order([parts[0], parts[2], parts[1]]).tolist() == [1.0, 1.0]


def test_sum_adds_the_residual_last():
    parts = [torch.tensor([2.0**24]), torch.tensor([-(2.0**24)])]
    assert reference.sum_in_rank_order(parts, torch.tensor([1.0])).item() == 1.0


def test_sum_rounds_once():
    parts = [torch.tensor([value], dtype=torch.bfloat16) for value in (256.0, 1.0)]
    # 257 is no bf16: rounded on the way, the sum would stay at 256.
    assert reference.sum_in_rank_order(parts, parts[1]).item() == 258.0


def test_sum_leaves_its_inputs():
    part = torch.tensor([1.0])
    reference.sum_in_rank_order([part, part], part)
    assert part.item() == 1.0


def test_quantize_by_hand():
    rows = torch.tensor([[448.0, -224.0, 3.0, 17.0, 0.0, 0.0, 1.0, 2.0, -0.5], [0.0] * 8 + [896.0]])
    q, scale = reference.quantize_e4m3(rows, group_size=4)
    assert scale.shape == (2, 3)
    assert scale[0].tolist() == [1.0, torch.tensor(2.0).div(448).item(), torch.tensor(0.5).div(448).item()]
    assert scale[1].tolist() == [0.0, 0.0, 2.0]
    # 17 lies between 16 and 18 and goes to the even one; the last group is partial.
    assert q.float().tolist() == [[448.0, -224.0, 3.0, 16.0, 0.0, 0.0, 224.0, 448.0, -448.0], [0.0] * 8 + [448.0]]


@pytest.mark.parametrize("num_rows", [0, 1, 4, 7])
@pytest.mark.parametrize("hidden_size", [96, 256, 300])
def test_quantize_layouts_hold_the_same_scales(num_rows, hidden_size):
    rows = random("rows", (num_rows, hidden_size), torch.float32)
    (q, scale), (q_column, scale_column) = (
        reference.quantize_e4m3(rows, layout=layout) for layout in ("row", "column")
    )
    assert torch.equal(q.float(), q_column.float()) and torch.equal(scale, scale_column)
    assert scale.is_contiguous() and scale_column.stride() == (1, -(-num_rows // 4) * 4)


def test_quantize_and_back():
    rows = random("rows", (50, 300), torch.float32)
    back = reference.dequantize(*reference.quantize_e4m3(rows), (1, 128))
    # Half a step of 3 bits, or of the smallest numbers of a group.
    smallest = rows.abs().amax(1, keepdim=True) / 448 * 2.0**-10
    assert ((back - rows).abs() <= torch.maximum(rows.abs() * 2.0**-4, smallest) * 1.0001).all()


def test_dequantize_partial_blocks():
    q = torch.ones(3, 5).to(torch.float8_e4m3fn)
    spread = reference.dequantize(q, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), (2, 4))
    assert spread.tolist() == [[1.0, 1.0, 1.0, 1.0, 2.0]] * 2 + [[3.0, 3.0, 3.0, 3.0, 4.0]]


def test_project_fp8_by_hand():
    q = torch.tensor([[1.0, 2.0]]).to(torch.float8_e4m3fn)
    weight = torch.tensor([[4.0, 8.0], [0.5, -1.0]]).to(torch.float8_e4m3fn)
    product = reference.project_fp8(q, torch.tensor([[2.0]]), weight, torch.tensor([[0.25]]))
    assert product.dtype == torch.bfloat16 and product.tolist() == [[10.0, -0.75]]
