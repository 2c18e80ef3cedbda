"""Rows to e4m3 with a scale for each 128 columns: what `rs_rmsnorm_fp8` does to rows that it has normed."""

import torch
import triton
import triton.language as tl

GROUP = 128
GROUPS = 8  # of a block


@triton.jit
def quantize_kernel(q, scale, rows, HIDDEN_SIZE: tl.constexpr, ROUND: tl.constexpr, GROUP: tl.constexpr,
                    GROUPS: tl.constexpr):  # fmt: skip
    """q = e4m3(rows * (448 / amax)) and scale = amax / 448; with ROUND the scale is the next power of two."""
    count: tl.constexpr = (HIDDEN_SIZE + GROUP - 1) // GROUP
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    columns = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = columns < HIDDEN_SIZE
    values = tl.load(rows + row * HIDDEN_SIZE + columns, mask=inside, other=0.0).to(tl.float32)
    # A maximum ignores NaN, and the sum of zeros does not.
    amax = tl.max(tl.abs(values), axis=1) + tl.sum(values * 0.0, axis=1)
    exact = tl.div_rn(amax, tl.full((GROUPS,), 448.0, tl.float32))
    if ROUND:
        bits = (exact.to(tl.int32, bitcast=True) + 0x007FFFFF) & 0x7F800000
        power = tl.maximum(bits, 0x00800000).to(tl.float32, bitcast=True)
        exact = tl.where(amax < float("inf"), power, exact)
        inverse = tl.div_rn(tl.full((GROUPS,), 1.0, tl.float32), exact)
    else:
        inverse = tl.div_rn(tl.full((GROUPS,), 448.0, tl.float32), tl.where(amax > 0, amax, 1.0))
        inverse = tl.where(amax > 0, tl.minimum(inverse, 3.4028234663852886e38), amax)  # 0, or NaN
    scaled = tl.clamp(values * inverse[:, None], -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(q + row * HIDDEN_SIZE + columns, scaled.to(q.dtype.element_ty), mask=inside)
    tl.store(scale + row * count + groups, exact, mask=groups < count)


def quantize_e4m3(rows: torch.Tensor, round_scales: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, scale) of contiguous rows [num_rows, hidden_size], as `reference.quantize_e4m3`. From sm_89 on."""
    num_rows, hidden_size = rows.shape
    groups = -(-hidden_size // GROUP)
    q = torch.empty_like(rows, dtype=torch.float8_e4m3fn)
    scale = torch.empty(num_rows, groups, dtype=torch.float32, device=rows.device)
    if num_rows:
        grid = (num_rows, -(-groups // GROUPS))
        with torch.cuda.device(rows.device):
            quantize_kernel[grid](q, scale, rows, hidden_size, round_scales, GROUP, GROUPS, num_warps=4)
    return q, scale
