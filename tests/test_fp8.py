"""The fp8 path: how rows are quantised, beside others' formulas; the ops that begin and end in fp8."""

import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from programs import EPS, Call, prologue_inputs, random, same_bits, within_one_rounding
from ranks import outcome, workspace

import tp_fused
from tp_fused import partition, reference
from tp_fused.native import _C

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
LATENT = (136, 40, 8)  # q_a has a whole group of 128 and a part of one
WHOLE = (512, 72, 16)  # q_a is quantised by the kernel that norms it
FEW, MANY = 13, 14  # tokens, for the prologue
HIDDEN = 208
SIZES = {"max_num_tokens": 64, "hidden_size": HIDDEN, "latent_size": sum(LATENT), "dtype": torch.float32}

# ---- the formula ----


def some_rows() -> torch.Tensor:
    """Of all magnitudes, with zeros, infinities and NaN among them."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(512, 256, generator=generator) * torch.exp2(torch.arange(512) / 2 - 140)[:, None]
    rows[5, :128], rows[6, 3], rows[7, 200], rows[8] = 0, math.inf, math.nan, 3e38
    return rows


def test_rounded_scales_are_the_next_powers_of_two():
    rows = some_rows()
    q, scale = reference.quantize_e4m3(rows, round_scales=True)
    exact = reference.quantize_e4m3(rows)[1]
    finite = rows.view(512, 2, 128).abs().amax(-1).isfinite()
    mantissa, exponent = torch.frexp(exact.double())
    expected = torch.exp2((exponent - (mantissa == 0.5).int()).double()).clamp(min=2.0**-126)
    expected[exact == 0] = 2.0**-126
    assert torch.equal(scale[finite].double(), expected[finite])
    assert torch.equal(scale[~finite].isnan(), exact[~finite].isnan())
    divided = (rows.view(512, 2, 128) / scale[..., None]).clamp(-448, 448).to(E4M3).view(512, 256)
    same = finite.repeat_interleave(128, 1)
    assert torch.equal(q.float()[same], divided.float()[same])


def test_beside_the_formulas_of_others():
    """Which element and scale differ where, of rows as models have them: `rs_rmsnorm_fp8` says so, too.

    DeepGEMM casts groups of 128: amax is at least 1e-4, the scale amax / 448, or that rounded up to a power of two,
    and an element is multiplied by the scale's reciprocal. transformers' fine-grained quantiser divides by the scale.
    """
    rows = torch.randn(2048, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    grouped = rows.float().view(2048, 4, 128)
    amax = grouped.abs().amax(-1).clamp(min=1e-4)
    for rounded in (False, True):
        q, scale = reference.quantize_e4m3(rows, round_scales=rounded)
        theirs = amax / 448
        theirs = torch.exp2(torch.ceil(torch.log2(theirs))) if rounded else theirs
        assert torch.equal(scale, theirs)
        by_reciprocal = (grouped * (1 / theirs)[..., None]).to(E4M3).view(2048, 512)
        by_division = (grouped / theirs[..., None]).to(E4M3).view(2048, 512)
        for other in (by_reciprocal, by_division):
            differ = (q.view(torch.uint8) != other.view(torch.uint8)).double().mean().item()
            assert differ == 0 if rounded else differ < 5e-4, differ  # by one step
    small = torch.full((1, 128), 1e-7)
    assert reference.quantize_e4m3(small)[1].item() == pytest.approx(1e-7 / 448)  # DeepGEMM: 1e-4 / 448
    told = " ".join(tp_fused.rs_rmsnorm_fp8.__doc__.split())
    assert "DeepGEMM's per-token cast multiplies" in told and "transformers' fine-grained quantiser divides" in told


@pytest.mark.parametrize("seed", range(8))
def test_what_is_right_passes_where_there_is_one_token(seed):
    """Of a row alone, whose own rounding errors may be small by chance: `Call` measures them on more rows."""
    call = Call("mla_prologue_fp8", 1, 128, BF16, seed=seed, options={"round_scales": True})
    sums, norm = call.sums(4), call._norm_weight("norm", 128)
    q, scale = reference.quantize_e4m3(reference.rms_norm(sums, norm, EPS), round_scales=True)
    latent = reference.project_fp8(q, scale, *call._projection_weight_fp8())
    q_a, kv_a, k_pe = reference.split_and_norm(latent, *call._latent_norms(), EPS)
    call.compare((q_a, reference.empty_scale(0, 96, 128, "row", "cpu"), kv_a, k_pe, sums), 0, 4)


@pytest.mark.cuda
def test_a_scale_is_divided_exactly(tmp_path):
    """Of every amax there is, on the card."""
    nvcc = shutil.which("nvcc", path=os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"]))
    if nvcc is None:
        pytest.skip("there is no nvcc")
    here, program = Path(__file__).parent, tmp_path / "fp8_scale"
    options = ["-std=c++20", "--expt-relaxed-constexpr", "-arch=native", f"-I{here.parent / 'csrc'}"]
    subprocess.run([nvcc, *options, "-o", program, here / "cuda" / "fp8_scale.cu"], check=True, timeout=120)
    told = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert told.returncode == 0, told.stdout


# ---- the ops ----


def arguments(
    num_tokens: int,
    dtype: torch.dtype,
    residual: str | None,
    device: str,
    complete: bool = False,
    latent: tuple[int, int, int] = LATENT,
) -> list:
    """Of mla_prologue_fp8, up to eps."""
    place = (dist.get_rank(), dist.get_world_size())
    made = prologue_inputs(num_tokens, HIDDEN, dtype, residual, *place, complete)
    made.append(random("projection", (sum(latent), HIDDEN), torch.float32).to(E4M3))
    made.append(random("weight scale", (-(-sum(latent) // 128), 2), torch.float32).abs() * 0.1)
    made += [random(f"latent norm {size}", (size,), torch.float32) + 1 for size in latent[:2]]
    return [x if x is None else x.to(device) for x in made]


def check_gathered(backend: str, device: str) -> None:
    """Runs on a rank: rs_rmsnorm_ag_fp8."""
    with workspace(backend, device, **SIZES):
        for i, num_tokens in enumerate((0, 1, 2, 3, 50, 64)):
            dtype = (BF16, torch.float16, torch.float32)[i // 2]
            given = arguments(num_tokens, dtype, (None, "full", "slice")[i % 3], device)[:3]
            options = {"group_size": (64, 128, HIDDEN)[i % 3], "keep_output": i % 2 == 0, "round_scales": i > 3}
            for layout in ("row", "column"):
                q, scale, residual_out, output = tp_fused.rs_rmsnorm_ag_fp8(*given, EPS, scale_layout=layout, **options)
                own = tp_fused.rs_rmsnorm_fp8(*given, EPS, **options)
                same_bits((residual_out, output), own[2:])
                same_bits((q, scale), [tp_fused.all_gather_rows(x, num_tokens) for x in own[:2]])
                wanted = reference.empty_scale(num_tokens, HIDDEN, options["group_size"], layout, device)
                assert scale.stride() == wanted.stride()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_quantised_rows_gathered(pool, backend, device, world_size):
    pool.run(check_gathered, backend, device)


def check_forms(backend: str, device: str) -> None:
    """Runs on a rank: few tokens, which on a card every rank quantises itself, and many have the bits of two ops."""
    few, many, hidden = (1, 2, 5, 13), 1030, 1024
    with workspace(backend, device, max_num_tokens=many, hidden_size=hidden, dtype=torch.float32):
        memory = {
            dtype: tp_fused.symm_empty((few[-1] * hidden,), dtype, device=device) for dtype in (BF16, torch.float16)
        }
        for i, num_tokens in enumerate((*few, *few, *few, many)):
            dtype, place = (torch.float32, BF16, torch.float16)[i % 3], (dist.get_rank(), dist.get_world_size())
            made = prologue_inputs(num_tokens, hidden, dtype, (None, "full", "slice")[i // 4 % 3], *place, False)
            input, residual, weight = (x if x is None else x.to(device) for x in made[:3])
            weight = weight.float() if i % 2 else weight
            if dtype in memory and num_tokens in few and i % 4 % 2:  # where peers could read it in place
                input = memory[dtype][: input.numel()].view(input.shape).copy_(input)
            if backend == "cuda" and torch.cuda.get_device_capability()[0] < 10:
                told = tp_fused.explain("rs_rmsnorm_ag_fp8", num_tokens, input=input)
                assert ("one round: every rank" in told) == (num_tokens in few), told
            options = {"group_size": (64, 128, hidden)[(i + i // 4) % 3], "round_scales": i % 2 == 1}
            options |= {"keep_output": i % 3 == 0, "weight_offset": i % 2 * 1.0}
            own = tp_fused.rs_rmsnorm_fp8(input, residual, weight, EPS, **options)
            all_rows = [tp_fused.all_gather_rows(x, num_tokens) for x in own[:2]]
            for layout in ("row", "column"):
                made = tp_fused.rs_rmsnorm_ag_fp8(input, residual, weight, EPS, scale_layout=layout, **options)
                same_bits(made, (*all_rows, *own[2:]))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_few_rows_and_many_have_the_bits_of_two_ops(pool, backend, device, world_size):
    pool.run(check_forms, backend, device)


def gather_scales(backend: str, device: str, hidden: int, group_size: int) -> set[int]:
    """Runs on a rank: how many rounds rs_rmsnorm_ag_fp8 takes on the CPU."""
    rounds, rank = set(), dist.get_rank()
    with workspace(backend, device, max_num_tokens=70, hidden_size=1024, dtype=BF16) as made:
        for num_tokens in (1, 2, 7, 70):
            input = random(f"to be gathered, {rank}", (num_tokens, hidden), BF16).to(device)
            given = (input, None, torch.ones(hidden, dtype=BF16, device=device), EPS)
            for layout in ("row", "column"):
                before = made.team.progress(rank)["calls"] if backend == "cpu" else 0
                made_of = {"group_size": group_size, "scale_layout": layout, "keep_output": True}
                q, scale, _, output = tp_fused.rs_rmsnorm_ag_fp8(*given, **made_of)
                rounds.add(made.team.progress(rank)["calls"] - before if backend == "cpu" else 0)
                output = tp_fused.all_gather_rows(output, num_tokens)
                same_bits((q, scale), reference.quantize_e4m3(output, group_size, layout))
    return rounds


@pytest.mark.parametrize(
    ("hidden", "group_size", "rounds"), [(512, 128, 2), (1024, 64, 2), (512, 512, 3), (520, 128, 3)]
)
@pytest.mark.parametrize("world_size", [1, 3])
def test_scales_are_gathered_with_their_rows(pool, backend, device, hidden, group_size, rounds):
    """Where both are whole vectors of 16 bytes: else in a round of their own."""
    for taken in pool.run(gather_scales, backend, device, hidden, group_size):
        assert taken == {rounds if backend == "cpu" else 0}


def refuse_wide_scales(backend: str, device: str) -> str:
    """Runs on a rank: more bytes of scales than the workspace has for a row; what follows works."""
    with workspace(backend, device, max_num_tokens=8, hidden_size=64, dtype=BF16, timeout_s=10.0):
        given = [torch.ones(3, 64, dtype=BF16, device=device), None, torch.ones(64, dtype=BF16, device=device), EPS]
        refused = outcome(lambda: tp_fused.rs_rmsnorm_ag_fp8(*given, group_size=1))[0]
        if device == "cpu":
            tp_fused.rs_rmsnorm_ag_fp8(*given, group_size=2)
        return str(refused)


@pytest.mark.parametrize("world_size", [2])
def test_scales_have_to_fit_the_workspace(pool, backend, device, world_size):
    said = (
        "group_size must be 64, 128 or hidden_size=64"
        if backend == "cuda"
        else "scales of a row=64 of torch.float32 (256 bytes a row) does"
    )
    for refused in pool.run(refuse_wide_scales, backend, device):
        assert said in refused


def check_latent(backend: str, device: str, latent: tuple[int, int, int], token_counts: tuple[int, ...]) -> None:
    """Runs on a rank: qkv_a_proj_ag_norm_fp8, beside its unfused program on the same product."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with workspace(backend, device, **SIZES | {"max_num_tokens": max(token_counts), "latent_size": sum(latent)}):
        for i, num_tokens in enumerate(token_counts):
            *_, weight, weight_scale, q_norm, kv_norm = arguments(num_tokens, BF16, None, device, latent=latent)
            norms = (q_norm, kv_norm) if i % 2 else (q_norm.to(BF16), kv_norm.to(BF16))
            q, scale = reference.quantize_e4m3(random("rows", (num_tokens, HIDDEN), BF16).to(device))
            for complete in (False, True):
                own = slice(None) if complete else partition.row_slice(num_tokens, rank, world_size)
                given = (q[own].contiguous(), scale[own].contiguous(), weight, weight_scale)
                rows = tp_fused.qkv_a_proj_ag_fp8(*given, num_tokens, complete=complete)
                expected = reference.split_and_norm(rows, *norms, EPS)
                given = (*given, *norms, num_tokens, EPS)
                q_a, no_scale, kv_a, k_pe = tp_fused.qkv_a_proj_ag_norm_fp8(*given, complete=complete)
                compare = same_bits if device == "cpu" else lambda *both: within_one_rounding(*both, BF16)
                compare((q_a, kv_a, k_pe), expected)
                assert no_scale.shape == (0, -(-latent[0] // 128))
                for layout in ("row", "column"):
                    options = {"scale_layout": layout, "complete": complete, "round_scales": i % 2 == 1}
                    again = tp_fused.qkv_a_proj_ag_norm_fp8(*given, quantize_q_a=True, **options)
                    same_bits(again[2:], (kv_a, k_pe))
                    same_bits(again[:2], reference.quantize_e4m3(q_a, 128, layout, i % 2 == 1))
                    wanted = reference.empty_scale(num_tokens, latent[0], 128, layout, device)
                    assert again[1].stride() == wanted.stride()


@pytest.mark.parametrize(
    ("latent", "token_counts"),
    [(LATENT, (0, 1, 2, 50, 64)), (WHOLE, (0, 1, 5, 64, 700))],
    ids=["a part of a group", "whole groups"],
)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_latent_norms_and_q_a_in_fp8(pool, backend, device, latent, token_counts, world_size):
    pool.run(check_latent, backend, device, latent, token_counts)


def two_ops(input, residual, norm_weight, weight, weight_scale, q_norm, kv_norm, complete, **options) -> tuple:
    """What mla_prologue_fp8 promises to be."""
    rounded = {"round_scales": options.get("round_scales", False)}
    gathers = _C.gathers_normed_rows(len(input), len(weight), dist.get_world_size()) and not complete
    if gathers:
        q, scale, residual_out, _ = tp_fused.rs_rmsnorm_ag_fp8(input, residual, norm_weight, EPS, **rounded)
    else:
        made = tp_fused.rs_rmsnorm_fp8(input, residual, norm_weight, EPS, complete=complete, **rounded)
        q, scale, residual_out, _ = made
    latent = (q, scale, weight, weight_scale, q_norm, kv_norm, len(input), EPS)
    return *tp_fused.qkv_a_proj_ag_norm_fp8(*latent, complete=gathers, **options), residual_out


def check_prologue(backend: str, device: str) -> None:
    """Runs on a rank."""
    with workspace(backend, device, **SIZES):
        for i, num_tokens in enumerate((0, 1, FEW, MANY, 64)):
            for complete in (False, True):
                dtype = (BF16, torch.float16, torch.float32)[i // 2]
                given = arguments(num_tokens, dtype, (None, "full", "slice")[i % 3], device, complete)
                options = {"quantize_q_a": i % 2 == 1, "scale_layout": ("row", "column")[i // 2 % 2]}
                options["round_scales"] = complete
                outputs = tp_fused.mla_prologue_fp8(*given, EPS, complete=complete, **options)
                same_bits(outputs, two_ops(*given, complete, **options))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_prologue_has_the_bits_of_its_ops(pool, backend, device, world_size):
    pool.run(check_prologue, backend, device)


def check_ops(backend: str, device: str, num_tokens: int) -> None:
    """Runs on a rank. torch cannot compare fp8 inputs, so not all of opcheck; and compiled code has the same bits."""
    torch._dynamo.reset()
    with workspace(backend, device, **SIZES):
        name = dist.group.WORLD.group_name
        given = arguments(num_tokens, BF16, "slice", device)
        utils = ("test_faketensor",)
        for options in ({}, {"quantize_q_a": True, "scale_layout": "column"}):
            op = torch.ops.tp_fused.mla_prologue_fp8.default
            torch.library.opcheck(op, (*given, EPS, name), options, test_utils=utils)
        op = torch.ops.tp_fused.rs_rmsnorm_ag_fp8.default
        torch.library.opcheck(op, (*given[:3], EPS, name), {"keep_output": True}, test_utils=utils)
        function = torch.compile(lambda *given: tp_fused.mla_prologue_fp8(*given, EPS), backend="aot_eager")
        same_bits(function(*given), two_ops(*given, False))


@pytest.mark.parametrize("num_tokens", [1, MANY])
@pytest.mark.parametrize("world_size", [2])
def test_opcheck_and_compile(pool, backend, device, num_tokens, world_size):
    pool.run(check_ops, backend, device, num_tokens)


def refusals(device: str) -> list[str]:
    """Runs on a rank: before anything is launched, so that the last call is as it should be."""
    with workspace(device, device, timeout_s=10.0, **SIZES):
        given, told = arguments(3, BF16, "full", device), []
        for index, wrong in ((3, given[3].to(BF16)), (4, given[4][:1].contiguous()), (5, given[5].half())):
            if dist.get_rank() == 0:
                bad = [*given[:index], wrong, *given[index + 1 :]]
                told.append(str(outcome(tp_fused.mla_prologue_fp8, *bad, EPS)[0]))
        if dist.get_rank() == 0:
            told.append(str(outcome(lambda: tp_fused.mla_prologue_fp8(*given, EPS, scale_layout="rows"))[0]))
        same_bits(tp_fused.mla_prologue_fp8(*given, EPS), two_ops(*given, False))
        return told


@pytest.mark.parametrize("world_size", [2])
def test_bad_arguments_are_told_before_anything_is_launched(pool, device, world_size):
    assert pool.run(refusals, device)[0] == [
        "qkv_a_weight must be one of torch.float8_e4m3fn, got torch.bfloat16",
        "weight_scale must have shape (2, 2), got (1, 2)",
        "q_a_norm_weight is torch.float16, expected torch.bfloat16",
        'scale_layout must be "row" or "column", got \'rows\'',
    ]
