"""Bad arguments of the ops: an error that says what is wrong with which numbers, before anything is launched."""

import pytest
import torch
import torch.distributed as dist
from programs import LATENT, Call
from ranks import outcome, workspace

import tp_fused
from tp_fused import checks

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
COLUMNS = sum(LATENT)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same rows, not contiguous."""
    return torch.cat([tensor, tensor], dim=1)[:, : tensor.shape[1]]


def ones(*shape: int, dtype=torch.float32):
    return lambda tensor: torch.ones(shape, dtype=dtype, device=tensor.device)


# Which op, what is done to its arguments (a value, or a function of the right one), the error and its message. The
# calls are of 4 tokens on 2 ranks, in a workspace for 64 tokens of 256 columns, latents of 144 columns, fp32.
WIDE = r"hidden_size=512 of torch.float32 \(2048 bytes a row\) does not fit the workspace, made for hidden_size=256"
BAD_CALLS = {
    "input of one dimension": (
        *("rs_rmsnorm", {"input": ones(256)}, ValueError),
        r"input must be \[rows, columns\], got shape \(256,\)",
    ),
    "input of integers": (
        *("rs_rmsnorm", {"input": torch.Tensor.int}, TypeError),
        r"input must be one of torch.bfloat16, torch.float16, torch.float32, got torch.int32",
    ),
    "input of strided rows": (
        *("rs_rmsnorm", {"input": strided}, ValueError),
        r"input of shape \(4, 256\) has strides \(512, 1\): its rows must be contiguous, call .contiguous\(\) first",
    ),
    "input transposed": (
        *("reduce_scatter_rows", {"input": lambda tensor: tensor.t().contiguous().t()}, ValueError),
        r"input of shape \(4, 256\) has strides \(1, 4\): its rows must be contiguous",
    ),
    "input too wide": ("reduce_scatter_rows", {"input": ones(4, 512)}, ValueError, WIDE),
    "too many tokens": (
        *("rs_rmsnorm_ag", {"input": ones(65, 256)}, ValueError),
        r"num_tokens=65 is over the workspace's max_num_tokens=64; call tp_fused.init\(max_num_tokens=65, ...\)",
    ),
    "weight of another size": (
        *("rs_rmsnorm", {"weight": ones(255)}, ValueError),
        r"weight must have shape \(256,\), got \(255,\)",
    ),
    "weight of another dtype": (
        *("rs_rmsnorm_fp8", {"weight": torch.Tensor.bfloat16}, TypeError),
        r"weight is torch.bfloat16, expected torch.float32",
    ),
    "no weight": ("rs_rmsnorm", {"weight": None}, TypeError, "weight must be a tensor, got None"),
    "weight on another device": (
        *("rs_rmsnorm_fp8", {"weight": lambda tensor: tensor.to("meta")}, ValueError),
        r"a tensor of shape \(256,\) is on meta, the input on ",
    ),
    "weight strided": (
        *("rs_rmsnorm_ag", {"weight": lambda tensor: tensor.repeat_interleave(2)[::2]}, ValueError),
        r"weight of shape \(256,\) has strides \(2,\): it must be contiguous",
    ),
    "eps of zero": ("rs_rmsnorm", {"eps": 0.0}, ValueError, r"eps must be positive and finite in fp32, got 0.0"),
    "eps below zero": ("rs_rmsnorm_ag", {"eps": -1e-6}, ValueError, r"finite in fp32, got -1e-06"),
    "eps not a number": ("rs_rmsnorm_fp8", {"eps": float("nan")}, ValueError, r"finite in fp32, got nan"),
    "eps of nothing in fp32": ("rs_rmsnorm", {"eps": 1e-50}, ValueError, r"finite in fp32, got 1e-50"),
    "eps of too much in fp32": ("qkv_a_proj_ag_norm", {"eps": 1e39}, ValueError, r"finite in fp32, got 1e\+39"),
    "weight offset not a number": (
        *("rs_rmsnorm", {"weight_offset": float("nan")}, ValueError),
        r"weight_offset must be finite in fp32, got nan",
    ),
    "weight offset of the latent norms": (
        *("qkv_a_proj_ag_norm", {"weight_offset": 1e39}, ValueError),
        r"weight_offset must be finite in fp32, got 1e\+39",
    ),
    "weight of another 16 bits": (
        *("rs_rmsnorm_ag", {"weight": ones(256, dtype=torch.float16)}, TypeError),
        r"weight is torch.float16, expected torch.float32",
    ),
    "latent norms of two dtypes": (
        "qkv_a_proj_ag_norm",
        {name: lambda tensor: tensor.bfloat16() for name in ("input", "weight", "q_a_weight")},
        TypeError,
        r"q_a_weight is torch.bfloat16, kv_a_weight torch.float32: they must be the same",
    ),
    "eps of the latent norms": ("qkv_a_proj_ag_norm", {"eps": 0.0}, ValueError, r"finite in fp32, got 0.0"),
    "residual neither full nor slice": (
        *("rs_rmsnorm", {"residual": ones(3, 256)}, ValueError),
        r"residual must be the full \[4, 256\] or rank 1's slice \[2, 256\], got \(3, 256\)",
    ),
    "residual of another width": (
        *("rs_rmsnorm_ag", {"residual": ones(4, 255)}, ValueError),
        r"residual must be the full \[4, 256\] or rank 1's slice \[2, 256\], got \(4, 255\)",
    ),
    "residual of another dtype": (
        *("rs_rmsnorm_fp8", {"residual": torch.Tensor.bfloat16}, TypeError),
        r"residual must be one of torch.float32, got torch.bfloat16",
    ),
    "residual strided": (
        *("rs_rmsnorm", {"residual": strided}, ValueError),
        r"residual of shape \(4, 256\) has strides \(512, 1\)",
    ),
    "unknown scale layout": (
        *("rs_rmsnorm_fp8", {"scale_layout": "diagonal"}, ValueError),
        r"scale_layout must be \"row\" or \"column\", got 'diagonal'",
    ),
    "group size of zero": ("rs_rmsnorm_fp8", {"group_size": 0}, ValueError, r"group_size must be positive, got 0"),
    "group size beyond 64 bits": (
        *("rs_rmsnorm_fp8", {"group_size": 2**63}, ValueError),
        r"group_size must fit into 64 bits, got 9223372036854775808$",
    ),
    "token count beyond 64 bits": (
        *("qkv_a_proj_ag", {"num_tokens": 2**63}, ValueError),
        r"num_tokens must fit into 64 bits, got 9223372036854775808$",
    ),
    "token count of many digits, beyond 64 bits": (
        *("all_gather_rows", {"num_tokens": -(10**5000)}, ValueError),
        r"num_tokens must fit into 64 bits, got an integer of 16610 bits$",
    ),
    "eps beyond 64 bits": (
        *("rs_rmsnorm", {"eps": 10**400}, ValueError),
        r"eps must be a number that fits into 64 bits, got an integer of 1329 bits$",
    ),
    "weight offset beyond 64 bits": (
        *("qkv_a_proj_ag_norm", {"weight_offset": 10**400}, ValueError),
        r"weight_offset must be a number that fits into 64 bits, got an integer of 1329 bits$",
    ),
    "another rank's rows": (
        *("all_gather_rows", {"input": ones(3, 256)}, ValueError),
        r"input has 3 rows; rank 1 of 2 owns 2 of num_tokens=4",
    ),
    "fewer tokens than none": (
        *("all_gather_rows", {"num_tokens": -1}, ValueError),
        r"num_tokens must not be negative, got -1",
    ),
    "rows of integers": (
        *("all_gather_rows", {"input": torch.Tensor.int}, TypeError),
        r"input must be one of .*torch.float8_e4m3fn, torch.uint8, got torch.int32",
    ),
    "no projection": ("qkv_a_proj_ag", {"weight": None}, TypeError, "weight must be a tensor, got None"),
    "projection of another width": (
        *("qkv_a_proj_ag", {"weight": ones(COLUMNS, 255)}, ValueError),
        rf"weight is \({COLUMNS}, 255\), but the input has 256 columns",
    ),
    "projection of another dtype": (
        *("qkv_a_proj_ag", {"weight": torch.Tensor.bfloat16}, TypeError),
        r"weight must be one of torch.float32, got torch.bfloat16",
    ),
    "projection of too many columns": (
        *("qkv_a_proj_ag", {"weight": ones(300, 256)}, ValueError),
        r"weight.shape\[0\]=300 of torch.float32 .*does not fit.*latent_size=144",
    ),
    "projection of rows wider than 32 bits": (
        *("qkv_a_proj_ag", {"input": ones(0, 2**32 + 8), "weight": ones(0, 2**32 + 8), "num_tokens": 0}, ValueError),
        r"input.shape\[1\]=4294967304 is over 2147483647",
    ),
    "projection of another rank's rows": (
        *("qkv_a_proj_ag", {"input": ones(1, 256)}, ValueError),
        r"input has 1 rows; rank 1 of 2 owns 2 of num_tokens=4",
    ),
    "bias of another size": (
        *("qkv_a_proj_ag", {"bias": torch.ones(7)}, ValueError),
        rf"bias must have shape \({COLUMNS},\), got \(7,\)",
    ),
    "fp8 rows that are not": (
        *("qkv_a_proj_ag_fp8", {"q": torch.Tensor.float}, TypeError),
        r"input must be one of torch.float8_e4m3fn, got torch.float32",
    ),
    "no scales": ("qkv_a_proj_ag_fp8", {"scale": None}, TypeError, "scale must be a tensor, got None"),
    "scales of other rows": (
        *("qkv_a_proj_ag_fp8", {"scale": ones(3, 2)}, ValueError),
        r"scale must be \(2, 2\) for a \(2, 256\) input, got \(3, 2\)",
    ),
    "scales of another dtype": (
        *("qkv_a_proj_ag_fp8", {"scale": torch.Tensor.bfloat16}, TypeError),
        r"scale must be torch.float32, got torch.bfloat16",
    ),
    "scales of neither layout": (
        *("qkv_a_proj_ag_fp8", {"scale": lambda tensor: torch.ones(4, 4, device=tensor.device)[::2, ::2]}, ValueError),
        r"scale has strides \(8, 2\): it must be row-major or column-major",
    ),
    "weight scales of other blocks": (
        *("qkv_a_proj_ag_fp8", {"weight_scale": ones(1, 2)}, ValueError),
        r"weight_scale must have shape \(2, 2\), got \(1, 2\)",
    ),
    "no latent norm": (
        "qkv_a_proj_ag_norm",
        {"kv_a_weight": None},
        TypeError,
        "kv_a_weight must be a tensor, got None",
    ),
    "latent norm of two dimensions": (
        *("qkv_a_proj_ag_norm", {"kv_a_weight": ones(40, 1)}, ValueError),
        r"kv_a_weight must be one-dimensional, got shape \(40, 1\)",
    ),
    "latent norm of another dtype": (
        *("qkv_a_proj_ag_norm", {"q_a_weight": torch.Tensor.bfloat16}, TypeError),
        r"q_a_weight is torch.bfloat16, expected torch.float32",
    ),
    "latent norms too long": (
        *("qkv_a_proj_ag_norm", {"kv_a_weight": ones(49)}, ValueError),
        rf"q_a_weight \(96\) and kv_a_weight \(49\) are longer than the projection's {COLUMNS} columns",
    ),
    "group without a workspace": (
        *("reduce_scatter_rows", {"group": "nobody"}, ValueError),
        r"group 'nobody' has no workspace for \w+ tensors; call tp_fused.init\(group, max_num_tokens=",
    ),
}


def with_changes(arguments: dict, changes: dict, device: str) -> dict:
    """changes: by argument, a new value or a function of the right one."""
    given = dict(arguments)
    for name, change in changes.items():
        if callable(change):
            change = change(given.get(name))
        elif torch.is_tensor(change):
            change = change.to(device)
        given[name] = change
    return given


def bad_call(backend: str, device: str, name: str):
    """Runs on a rank: rank 1 alone makes the bad call, then both the right one."""
    op, changes, *_ = (BAD_CALLS | BAD_CALLS_ON_CUDA)[name]
    rank, world_size = dist.get_rank(), dist.get_world_size()
    call = Call(op, 4, hidden_size=256, residual="full", device=device)
    error = None
    with workspace(backend, device, latent_size=COLUMNS):
        arguments = call.arguments(rank, world_size)
        if rank == 1:
            error, _ = outcome(call.run, rank, world_size, with_changes(arguments, changes, device))
        call.check(call.run(rank, world_size, arguments), rank, world_size)
    return error


@pytest.mark.parametrize("name", BAD_CALLS)
@pytest.mark.parametrize("world_size", [2])
def test_bad_call(pool, backend, device, name, world_size):
    """The peer never notices: the right call after it is its first."""
    *_, kind, message = BAD_CALLS[name]
    error = pool.run(bad_call, backend, device, name)[1]
    with pytest.raises(kind, match=message):
        raise error if error is not None else AssertionError("no error was raised")


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, one element away from a multiple of 16 bytes."""
    memory = tensor.new_zeros(tensor.numel() + 1)
    return memory[1:].view(tensor.shape).copy_(tensor)


# In the form of BAD_CALLS.
ADDRESS = r"must begin at a multiple of 16 bytes, got one at address 0x[0-9a-f]+4$"
BAD_CALLS_ON_CUDA = {
    "odd width": (
        "reduce_scatter_rows",
        {"input": ones(4, 252), "residual": ones(4, 252)},
        ValueError,
        r"must be a positive multiple of 8, got 252",
    ),
    "no width": (
        *("reduce_scatter_rows", {"input": ones(4, 0), "residual": ones(4, 0)}, ValueError),
        r"must be a positive multiple of 8, got 0",
    ),
    "no columns": (
        *("qkv_a_proj_ag", {"weight": ones(0, 256)}, ValueError),
        r"on cuda, weight must have rows, got \(0, 256\)",
    ),
    "input between vectors": ("rs_rmsnorm", {"input": shifted}, ValueError, rf"input {ADDRESS}"),
    "residual between vectors": ("rs_rmsnorm_fp8", {"residual": shifted}, ValueError, rf"residual {ADDRESS}"),
    "weight between vectors": ("rs_rmsnorm_ag", {"weight": shifted}, ValueError, rf"weight {ADDRESS}"),
    "projection input between vectors": ("qkv_a_proj_ag", {"input": shifted}, ValueError, rf"input {ADDRESS}"),
    "projection weight between vectors": ("qkv_a_proj_ag", {"weight": shifted}, ValueError, rf"weight {ADDRESS}"),
    "latent norm between vectors": (
        *("qkv_a_proj_ag_norm", {"kv_a_weight": shifted}, ValueError),
        rf"kv_a_weight {ADDRESS}",
    ),
    "fp8 columns between vectors": (
        *("qkv_a_proj_ag_fp8", {"q": ones(2, 264, dtype=E4M3), "weight": ones(COLUMNS, 264, dtype=E4M3)}, ValueError),
        r"an fp8 weight must have a multiple of 8 rows and of 16 columns, got \(144, 264\)",
    ),
    "group size": (
        "rs_rmsnorm_fp8",
        {"group_size": 32},
        ValueError,
        r"group_size must be 64, 128 or hidden_size=\d+, got 32",
    ),
}


@pytest.mark.cuda
@pytest.mark.parametrize("name", BAD_CALLS_ON_CUDA)
@pytest.mark.parametrize("world_size", [2])
def test_bad_call_on_cuda(pool, device, name, world_size):
    *_, kind, message = BAD_CALLS_ON_CUDA[name]
    error = pool.run(bad_call, device, device, name)[1]
    with pytest.raises(kind, match=message):
        raise error if error is not None else AssertionError("no error was raised")


def too_wide_for_a_kernel(device: str):
    """Runs on a rank."""
    with workspace(device, device, hidden_size=16392, max_num_tokens=2):
        return outcome(tp_fused.reduce_scatter_rows, torch.zeros(1, 16392, device=device))[0]


@pytest.mark.parametrize("world_size", [2])
def test_widest_row_of_the_kernels(pool, device, world_size):
    for error in pool.run(too_wide_for_a_kernel, device):
        assert isinstance(error, ValueError)
        assert str(error) == "hidden_size=16392 is over 16384, the widest row the kernels reduce"


# Tensors of another device cannot be had on every machine; what the ops call is tested instead.
META = torch.empty(4, 256, device="meta")


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: checks.rows("residual", META, device=torch.device("cpu")), "residual is on meta, the input on cpu"),
        (
            lambda: checks.like("weight", META[0], (256,), META.dtype, torch.device("cpu")),
            "weight is on meta, expected cpu",
        ),
        (lambda: checks.fp8_scales(META[:, :2], torch.empty(4, 256)), "scale is on meta, the input on cpu"),
    ],
    ids=["rows", "like", "scales"],
)
def test_another_device(check, message):
    with pytest.raises(ValueError, match=message):
        check()


def other_device(device: str):
    """Runs on a rank: a group's workspace serves one kind of device."""
    with workspace(device, device):
        return outcome(tp_fused.groups.get_workspace, dist.group.WORLD.group_name, torch.device("xpu"))[0]


@pytest.mark.parametrize("world_size", [2])
def test_workspace_of_another_device(pool, device, world_size):
    for error in pool.run(other_device, device):
        assert isinstance(error, ValueError)
        assert f"has no workspace for xpu tensors (it has one for {device} tensors); call tp_fused.init" in str(error)


def test_no_process_group():
    with pytest.raises(ValueError, match=r"no group given and torch.distributed is not initialised"):
        tp_fused.reduce_scatter_rows(torch.zeros(4, 8))
