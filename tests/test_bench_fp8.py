"""What the benchmark counts as wrong in fp8 outputs: a step, a scale, a rounding in the wrong direction."""

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("typer", reason="the bench extra is not installed")

from bench import fp8
from bench.context import Context
from bench.options import Options
from tp_fused import reference

SIZES = {"tokens": (40,), "hidden": 512, "latent": 320, "kv_lora": 32, "rope": 32}
KINDS = [fp8.RsRmsnormFp8, fp8.RsRmsnormAgFp8, fp8.QkvAProjAgNormFp8, fp8.MlaPrologueFp8]


@pytest.fixture(params=["row", "column"])
def context(request):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    context = Context(Options(ops=("mla_prologue_fp8",), world_size=1, scale_layout=request.param, **SIZES))
    yield context
    context.close()
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_right_is_not_counted(context, kind):
    case = kind(context, 40)
    assert case.count_wrong(case.fused()) == 0
    assert case.resembles(case.baseline("own").call(), case.fused())


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_scales_and_numbers_are_counted(context, kind):
    case = kind(context, 40)
    q, scale, *others = case.fused()
    assert case.count_wrong((q, scale * 1.03, *others)) >= scale.numel()
    assert case.count_wrong((q, torch.full_like(scale, float("nan")), *others)) >= scale.numel()
    q.view(torch.uint8).flatten()[q.float().abs().argmax()] ^= 0x80  # the sign
    assert case.count_wrong((q, scale, *others)) == 1
    for other in others:
        wrong = [tensor + 1 if tensor is other else tensor for tensor in others]
        assert case.count_wrong((*case.fused()[:2], *wrong)) == other.numel()


@pytest.mark.parametrize("kind", [fp8.QkvAProjAgNormFp8, fp8.MlaPrologueFp8])
def test_numbers_that_are_cut_off_are_counted(context, kind):
    """To e4m3 they have to be rounded to the nearest: towards zero, the error is up to twice as large."""
    case = kind(context, 40)
    q, scale, *others = case.fused()
    exact = case.expected[0][0] / scale.repeat_interleave(128, 1)[:, : q.shape[1]]
    cut = exact.clamp(-448, 448).to(torch.float8_e4m3fn)
    cut.view(torch.uint8)[cut.float().abs() > exact.abs()] -= 1
    assert case.count_wrong((cut, scale, *others)) > q.numel() / 100


def test_16_bits_beside_fp8_have_its_weight(context):
    case = fp8.MlaPrologueFp8(context, 40)
    program = case.baseline("mla_prologue")
    outputs, (q, scale, *others) = program.call(), case.fused()
    assert case.resembles(outputs, program.expected())
    assert case.resembles((reference.dequantize(q, scale, (1, 128)), *others), program.expected())
    assert not case.resembles([2 * output for output in outputs], program.expected())


def test_memory_is_that_of_both_halves(context):
    """Rows and weight of a byte, the latents of two but for q_a."""
    case = fp8.MlaPrologueFp8(context, 40)
    rows, latents = 40 * (512 + 4 * 4), 40 * (256 + 4 * 2 + 2 * 64)
    reduction = 40 * 512 * 2 * 3 + rows  # one rank, staged: its input and residual read, residual_out written
    assert case.memory_bytes == reduction + rows + 320 * 512 + latents
    assert case.bytes == 40 * 512 * 2 + latents
    gathered = fp8.RsRmsnormAgFp8(context, 40)
    assert gathered.memory_bytes == reduction and gathered.bytes == 40 * 512 * 2
