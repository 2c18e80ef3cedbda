"""tp_fused.explain without a card: what it says of cards that are not there, and what it refuses."""

import pytest
import torch

import tp_fused


def test_explain_without_a_card():
    told = tp_fused.explain("qkv_a_proj_ag", 16384, gpu="H200", ranks_per_card=8)
    assert told.startswith("qkv_a_proj_ag: 8 ranks, 8 on each H200; rank 0 of them owns 2048 of 16384 rows\n")
    assert "one kernel multiplies, in tiles of" in told and "(max_ctas=8)" in told
    assert "cuBLAS" in tp_fused.explain("qkv_a_proj_ag", 16384, gpu="B200")
    assert "threads move rows" in tp_fused.explain("rs_rmsnorm", 16384, gpu="A100", in_place=True)
    few = tp_fused.explain("rs_rmsnorm_ag_fp8", 1, gpu="H200", dtype=torch.float16)
    assert few.startswith("rs_rmsnorm_ag_fp8: 8 ranks, 1 on each H200; ")
    assert few.endswith(
        "posts its rows to all others and adds up, norms and quantises all rows itself\nthreads move rows"
    )
    for some in ((64, "H200"), (1, "B200")):
        told = tp_fused.explain("rs_rmsnorm_ag_fp8", some[0], gpu=some[1])
        assert "so few rows are gathered in 16 bits, and all quantised by every rank (groups" in told
        assert "\nrs_rmsnorm_ag: 8 ranks" in told
    for many in ((16384, "H200", torch.bfloat16), (64, "H200", torch.float16), (16384, "B200", torch.bfloat16)):
        told = tp_fused.explain("rs_rmsnorm_ag_fp8", many[0], gpu=many[1], dtype=many[2])
        assert "\nrs_rmsnorm_fp8: 8 ranks" in told and "\nall_gather_rows: 8 ranks" in told
    with pytest.raises(ValueError, match="no card is known as H300: A100, H20, H100, H200, B200 and RTX PRO 6000 are"):
        tp_fused.explain("rs_rmsnorm", 16, gpu="H300")
    with pytest.raises(ValueError, match="unknown op 'rs_layernorm'"):
        tp_fused.explain("rs_layernorm", 16, gpu="H200")


FLOATS = "torch.bfloat16, torch.float16, torch.float32"
NOT_SERVED = [
    ("rs_rmsnorm", {"hidden_size": 7}, r"on cuda, hidden_size must be a positive multiple of 8, got 7"),
    ("rs_rmsnorm_fp8", {"hidden_size": 17}, r"on cuda, hidden_size must be a positive multiple of 8, got 17"),
    ("mla_prologue", {"hidden_size": 7164}, r"on cuda, hidden_size must be a positive multiple of 8, got 7164"),
    ("rs_rmsnorm", {"hidden_size": 2**30}, r"hidden_size=1073741824 is over 16384, the widest row the kernels reduce"),
    ("reduce_scatter_rows", {"dtype": torch.uint8}, rf"dtype must be one of {FLOATS}, got torch.uint8"),
    ("rs_rmsnorm_ag", {"dtype": torch.float8_e4m3fn}, rf"dtype must be one of {FLOATS}, got torch.float8_e4m3fn"),
    ("qkv_a_proj_ag", {"dtype": torch.uint8}, rf"dtype must be one of {FLOATS}, got torch.uint8"),
    ("qkv_a_proj_ag_fp8", {"latent_size": 2113}, r"multiple of 8 rows and of 16 columns, got \(2113, 7168\)"),
    ("all_gather_rows", {"dtype": torch.float64}, r"torch.float8_e4m3fn, torch.uint8, got torch.float64"),
]


@pytest.mark.parametrize(("op", "options", "message"), NOT_SERVED)
def test_explain_refuses_what_the_call_refuses(op, options, message):
    with pytest.raises(TypeError if "dtype" in options else ValueError, match=message):
        tp_fused.explain(op, 16, gpu="H100", **options)
