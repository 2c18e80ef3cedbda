"""Every op in plain torch and torch.distributed: the backend that runs anywhere, and the tests' oracle.

Works over gloo and NCCL, on any number of nodes. Rows travel by all-to-all and are added here, in fp32 and in rank
order, so results have the same bits as the other backends'; by bytes an all-to-all of the rows costs what a
reduce-scatter costs.

Before each op on CPU tensors the ranks compare what they call, and a disagreement raises. On CUDA that would need a
wait on the host; there, ranks that disagree are left to the process group's own time-out.
"""

import contextlib
import ctypes

import torch
import torch.distributed as dist

from . import faults, partition
from .native import _C

E4M3_MAX = 448.0
CALL_BYTES = 256  # of a call as ranks tell each other

# Renamed in torch 2.13, where the old name warns.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# ---- single-process pieces: what the fused ops are measured against ----


def sum_in_rank_order(parts: list[torch.Tensor], residual: torch.Tensor | None = None) -> torch.Tensor:
    """The fp32 sum of the parts in list order, then the residual, rounded once to their dtype."""
    total = parts[0].to(torch.float32, copy=True)
    for part in (*parts[1:], *(() if residual is None else (residual,))):
        total += part.float()
    return total.to(parts[0].dtype)


def rms_norm(rows: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float = 0.0) -> torch.Tensor:
    """RMSNorm of rows as stored, in fp32, rounded once; `weight_offset` is added to the weight in fp32.

    The mean of squares is summed in double, so that it does not depend on the order of summation, and the root is
    taken in double because torch's fp32 one is off by a bit now and then.
    """
    mean = rows.double().square().mean(-1, keepdim=True).float()
    root = (mean + eps).double().sqrt().float()
    normed = rows.float() * (1.0 / root)
    offset = ctypes.c_float(weight_offset).value
    factors = weight.float() + offset if offset else weight.float()  # a weight of -0 stays one
    return (normed * factors).to(rows.dtype)


def scale_pitch(num_rows: int | torch.SymInt) -> int:
    """Rows between two columns of a "column" scale tensor: padded to 16 bytes, as TMA loads want."""
    return -(-num_rows // 4) * 4


def empty_scale(num_rows: int | torch.SymInt, hidden_size: int, group_size: int, layout: str, device) -> torch.Tensor:
    """An uninitialised scale tensor [num_rows, groups] in either layout."""
    groups = -(-hidden_size // group_size)
    if layout == "row":
        return torch.empty(num_rows, groups, dtype=torch.float32, device=device)
    return torch.empty_strided((num_rows, groups), (1, scale_pitch(num_rows)), dtype=torch.float32, device=device)


def quantize_e4m3(
    rows: torch.Tensor, group_size: int = 128, layout: str = "row", round_scales: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """q = e4m3(rows * (448 / amax)) and scale = amax / 448, amax of every `group_size` columns: see rs_rmsnorm_fp8."""
    num_rows, hidden_size = rows.shape
    group_size = min(group_size, max(hidden_size, 1))  # what follows takes memory for whole groups
    scale = empty_scale(num_rows, hidden_size, group_size, layout, rows.device)
    groups = scale.shape[1]
    padded = torch.nn.functional.pad(rows.float(), (0, groups * group_size - hidden_size))
    grouped = padded.view(num_rows, groups, group_size)
    amax = grouped.abs().amax(-1)
    largest = torch.full_like(amax, E4M3_MAX)  # a tensor: torch turns division by or of a number into a product
    exact = amax / largest
    # Finite for the smallest numbers, too: zeros beside them stay zeros.
    inverse = torch.where(amax > 0, (largest / amax).clamp(max=torch.finfo(torch.float32).max), 0.0)
    if round_scales:
        finite = amax.isfinite()
        power = _up_to_a_power_of_two(torch.where(finite, exact, 1.0))
        exact, inverse = torch.where(finite, power, exact), torch.where(finite, 1.0 / power, inverse)
    scale.copy_(exact)
    q = (grouped * inverse[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return q.view(num_rows, groups * group_size)[:, :hidden_size].contiguous(), scale


def _up_to_a_power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """The least power of two, from 2^-126 on, that is not less."""
    bits = (scale.view(torch.int32) + 0x007FFFFF) & 0x7F800000
    return bits.clamp(min=0x00800000).view(torch.float32)


def dequantize(q: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """fp32 values of fp8 ones with a scale for each block of (rows, columns); the last blocks may be smaller."""
    rows, columns = q.shape
    spread = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return q.float() * spread


def project_fp8(q, scale, weight, weight_scale) -> torch.Tensor:
    """bf16 product of 1x128-scaled rows and a 128x128-scaled weight, in fp32."""
    product = torch.mm(dequantize(q, scale, (1, 128)), dequantize(weight, weight_scale, (128, 128)).t())
    return product.to(torch.bfloat16)


def split_and_norm(latent, q_a_weight, kv_a_weight, eps, weight_offset=0.0) -> tuple[torch.Tensor, ...]:
    """The latent's three parts, contiguous, the first two normalised."""
    q_columns, kv_columns = q_a_weight.numel(), kv_a_weight.numel()
    q_a, kv_a, k_pe = latent.split([q_columns, kv_columns, latent.shape[1] - q_columns - kv_columns], dim=1)
    k_pe = k_pe.clone(memory_format=torch.contiguous_format)  # of one row, .contiguous() would be a view
    return rms_norm(q_a, q_a_weight, eps, weight_offset), rms_norm(kv_a, kv_a_weight, eps, weight_offset), k_pe


# ---- how rows travel ----


def call(workspace, op, *arguments):
    """Makes a call of one of the ops below. What ends it midway, Ctrl-C for one, is a fault of the workspace: its peers
    are in an exchange that this rank has left, and its next call would answer there."""
    before = workspace.calls
    try:
        return op(workspace, *arguments)
    except BaseException as error:
        if workspace.calls > before and workspace.fault is None:
            _fault(
                workspace, f"{type(error).__name__} ended it on rank {workspace.rank}", workspace.rank, "interrupted"
            )
        raise


def _agree(workspace, op: str, input: torch.Tensor, num_tokens: int, variant: str = "") -> None:
    workspace.check()
    workspace.calls += 1
    workspace.calling = op
    if input.device.type != "cpu":
        return
    call = f"{op}(num_tokens={num_tokens}, hidden_size={input.shape[1]}, dtype={input.dtype}{variant})"
    with _heard(workspace):
        calls = _tell(workspace, call)
    for peer, other in enumerate(calls):
        if other != call:
            told = f"rank {peer} called {other}, rank {workspace.rank} {call}"
            raise _fault(workspace, told, peer, "disagrees")


@contextlib.contextmanager
def _heard(workspace):
    """Around an exchange: what torch says where a peer is late or gone becomes a CollectiveFault."""
    try:
        yield
    except RuntimeError as error:
        told = f"rank {workspace.rank} did not hear from all peers: {error}"
        raise _fault(workspace, told, -1, "never arrived") from error


def _fault(workspace, message: str, peer: int, reason: str) -> faults.CollectiveFault:
    op, number = workspace.calling, workspace.calls
    message = faults.in_group(f"{op} #{number}: {message}", workspace.members)
    workspace.fault = faults.CollectiveFault(message, op, number, workspace.rank, peer, reason)
    return workspace.fault


def _tell(workspace, call: str) -> list[str]:
    """What every rank calls. As bytes of one length: torch's collectives of objects need numpy."""
    told = call.encode()[:CALL_BYTES].ljust(CALL_BYTES)
    heard = torch.empty(workspace.world_size * CALL_BYTES, dtype=torch.uint8)
    _all_gather(heard, torch.frombuffer(bytearray(told), dtype=torch.uint8), group=workspace.group)
    return [bytes(words).rstrip().decode(errors="replace") for words in heard.view(-1, CALL_BYTES).tolist()]


def _exchange(workspace, input: torch.Tensor) -> list[torch.Tensor]:
    """Every rank's version of this rank's rows."""
    num_tokens, columns = input.shape
    counts = partition.row_counts(num_tokens, workspace.world_size)
    own = counts[workspace.rank]
    received = input.new_empty(workspace.world_size * own, columns)
    sizes = [own] * workspace.world_size
    with _heard(workspace):
        dist.all_to_all_single(_bytes(received), _bytes(input), sizes, counts, group=workspace.group)
    return list(received.view(workspace.world_size, own, columns).unbind())


def _gather(workspace, input: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """All ranks' rows. Uneven shares travel padded to the largest."""
    counts = partition.row_counts(num_tokens, workspace.world_size)
    share = input.new_empty(counts[0], input.shape[1])
    share[: input.shape[0]] = input
    gathered = input.new_empty(workspace.world_size * counts[0], input.shape[1])
    with _heard(workspace):
        _all_gather(_bytes(gathered), _bytes(share), group=workspace.group)
    if num_tokens == gathered.shape[0]:
        return gathered
    shares = gathered.view(workspace.world_size, counts[0], input.shape[1])
    return torch.cat([share[:count] for share, count in zip(shares, counts, strict=True)])


def _bytes(rows: torch.Tensor) -> torch.Tensor:
    """The same memory as bytes: not every process group knows every dtype.

    Dimensions of one element, or of tensors with none, may have any stride; those of bytes may not.
    """
    return rows.as_strided(rows.shape, (max(rows.shape[1], 1), 1)).view(torch.uint8)


def _reduce(workspace, op: str, input, residual, complete: bool, variant: str = "") -> torch.Tensor:
    num_tokens = input.shape[0]
    options = f"{', complete' if complete else ''}{', residual' if residual is not None else ''}{variant}"
    _agree(workspace, op, input, num_tokens, options)
    if complete:
        parts = [input[partition.row_slice(num_tokens, workspace.rank, workspace.world_size)]]
    else:
        parts = _exchange(workspace, input)
    return sum_in_rank_order(parts, residual)


def _norm_variant(dtype: torch.dtype, weight: torch.Tensor, eps: float, weight_offset: float = 0.0) -> str:
    numbers = f", eps={eps}{f', weight_offset={weight_offset}' if weight_offset else ''}"
    return numbers if weight.dtype == dtype else f"{numbers}, fp32 norm weight"


# ---- the ops ----


def rs_rmsnorm(workspace, input, residual, weight, eps, weight_offset, complete):
    variant = _norm_variant(input.dtype, weight, eps, weight_offset)
    residual_out = _reduce(workspace, "rs_rmsnorm", input, residual, complete, variant)
    return rms_norm(residual_out, weight, eps, weight_offset), residual_out


def rs_rmsnorm_fp8(
    workspace,
    input,
    residual,
    weight,
    eps,
    weight_offset,
    group_size,
    scale_layout,
    keep_output,
    complete,
    round_scales,
):
    variant = f", group_size={group_size}, {scale_layout} scales{', keep_output' if keep_output else ''}"
    variant += ", rounded scales" if round_scales else ""
    variant += _norm_variant(input.dtype, weight, eps, weight_offset)
    residual_out = _reduce(workspace, "rs_rmsnorm_fp8", input, residual, complete, variant)
    output = rms_norm(residual_out, weight, eps, weight_offset)
    q, scale = quantize_e4m3(output, group_size, scale_layout, round_scales)
    return q, scale, residual_out, output if keep_output else output.new_empty(0, output.shape[1])


def rs_rmsnorm_ag(workspace, input, residual, weight, eps, weight_offset):
    variant = _norm_variant(input.dtype, weight, eps, weight_offset)
    residual_out = _reduce(workspace, "rs_rmsnorm_ag", input, residual, False, variant)
    return _gather(workspace, rms_norm(residual_out, weight, eps, weight_offset), input.shape[0]), residual_out


def reduce_scatter_rows(workspace, input, residual):
    return _reduce(workspace, "reduce_scatter_rows", input, residual, False)


def all_gather_rows(workspace, input, num_tokens):
    _agree(workspace, "all_gather_rows", input, num_tokens)
    return _gather(workspace, input, num_tokens)


def _projected(workspace, op, input, num_tokens, variant, complete, product, *operands) -> torch.Tensor:
    """Of all rows: this rank's, gathered, or what every rank multiplies of rows that all of them have."""
    _agree(workspace, op, input, num_tokens, f"{variant}{', complete' if complete else ''}")
    return product(input, *operands) if complete else _gather(workspace, product(input, *operands), num_tokens)


def qkv_a_proj_ag(workspace, input, weight, num_tokens, bias, complete):
    variant = f", columns={weight.shape[0]}, bias={bias is not None}"
    linear = torch.nn.functional.linear
    return _projected(workspace, "qkv_a_proj_ag", input, num_tokens, variant, complete, linear, weight, bias)


def qkv_a_proj_ag_fp8(workspace, q, scale, weight, weight_scale, num_tokens, complete):
    operands, variant = (scale, weight, weight_scale), f", columns={weight.shape[0]}"
    return _projected(workspace, "qkv_a_proj_ag_fp8", q, num_tokens, variant, complete, project_fp8, *operands)


def qkv_a_proj_ag_norm(workspace, input, weight, q_a_weight, kv_a_weight, eps, num_tokens, weight_offset, complete):
    variant = f", columns={weight.shape[0]}, q_a={q_a_weight.numel()}, kv_a={kv_a_weight.numel()}"
    variant += _norm_variant(input.dtype, q_a_weight, eps, weight_offset)
    linear = torch.nn.functional.linear
    latent = _projected(workspace, "qkv_a_proj_ag_norm", input, num_tokens, variant, complete, linear, weight)
    return split_and_norm(latent, q_a_weight, kv_a_weight, eps, weight_offset)


def rs_rmsnorm_ag_fp8(
    workspace, input, residual, weight, eps, weight_offset, group_size, scale_layout, keep_output, round_scales
):
    arguments = (input, residual, weight, eps, weight_offset, group_size, "row", keep_output, False, round_scales)
    q, scale, residual_out, output = rs_rmsnorm_fp8(workspace, *arguments)
    q, scale = (all_gather_rows(workspace, rows, input.shape[0]) for rows in (q, scale))
    made = empty_scale(len(q), q.shape[1], group_size, scale_layout, q.device)
    return q, made.copy_(scale), residual_out, output


def qkv_a_proj_ag_norm_fp8(
    workspace,
    q,
    scale,
    weight,
    weight_scale,
    q_a_weight,
    kv_a_weight,
    eps,
    num_tokens,
    quantize_q_a,
    scale_layout,
    complete,
    round_scales,
):
    variant = f", columns={weight.shape[0]}, q_a={q_a_weight.numel()}, kv_a={kv_a_weight.numel()}"
    variant += _norm_variant(torch.bfloat16, q_a_weight, eps)
    if quantize_q_a:
        variant += f", q_a quantised{' with rounded scales' if round_scales else ''}"
    operands = (scale, weight, weight_scale)
    latent = _projected(workspace, "qkv_a_proj_ag_norm_fp8", q, num_tokens, variant, complete, project_fp8, *operands)
    q_a, kv_a, k_pe = split_and_norm(latent, q_a_weight, kv_a_weight, eps)
    if quantize_q_a:
        return *quantize_e4m3(q_a, 128, scale_layout, round_scales), kv_a, k_pe
    return q_a, empty_scale(0, q_a.shape[1], 128, scale_layout, q_a.device), kv_a, k_pe


def _gathers(workspace, input, weight, complete: bool) -> bool:
    return not complete and _C.gathers_normed_rows(len(input), len(weight), workspace.world_size)


def mla_prologue(
    workspace, input, residual, norm_weight, weight, q_a_weight, kv_a_weight, eps, complete
) -> tuple[torch.Tensor, ...]:
    gathers = _gathers(workspace, input, weight, complete)
    if gathers:
        hidden, residual_out = rs_rmsnorm_ag(workspace, input, residual, norm_weight, eps, 0.0)
    else:
        hidden, residual_out = rs_rmsnorm(workspace, input, residual, norm_weight, eps, 0.0, complete)
    latent = (weight, q_a_weight, kv_a_weight, eps, len(input), 0.0, gathers)
    return *qkv_a_proj_ag_norm(workspace, hidden, *latent), residual_out


def mla_prologue_fp8(
    workspace,
    input,
    residual,
    norm_weight,
    weight,
    weight_scale,
    q_a_weight,
    kv_a_weight,
    eps,
    quantize_q_a,
    scale_layout,
    round_scales,
    complete,
):
    reduced = (input, residual, norm_weight, eps, 0.0, 128, "row", False)
    gathers = _gathers(workspace, input, weight, complete)
    if gathers:
        q, scale, residual_out, _ = rs_rmsnorm_ag_fp8(workspace, *reduced, round_scales)
    else:
        q, scale, residual_out, _ = rs_rmsnorm_fp8(workspace, *reduced, complete, round_scales)
    latent = (q, scale, weight, weight_scale, q_a_weight, kv_a_weight, eps, len(input))
    options = (quantize_q_a, scale_layout, gathers, round_scales)
    return *qkv_a_proj_ag_norm_fp8(workspace, *latent, *options), residual_out
