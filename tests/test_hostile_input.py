"""Arguments that nobody should pass, found by hypothesis: the right result or an error in our words, never a crash.

Every call is made three times: as everybody makes it; to ops.py, past the native kernel; and by the reference backend.
What the native kernel serves, the checks in ops.py admit; what it refuses, they refuse, in the words that the caller
gets. An ordinary call after them shows that nothing else has been touched.
"""

import dataclasses
import functools
import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import OPS, REDUCTIONS, python_of
from ranks import outcome

import tp_fused
from tp_fused import partition
from tp_fused.faults import CollectiveFault

MAX_TOKENS, WIDTH, Q_COLUMNS, KV_COLUMNS, COLUMNS = 24, 80, 20, 9, 35
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FP8 = torch.float8_e4m3fn
HUGE = (2**31 - 1, 2**31, 2**31 + 8, 2**32 + 3, 2**40, 2**62, 2**63 - 1)

# ---- what a tensor may be like ----


def in_bytes(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """The same values at an address that is `offset` bytes past a multiple of 16, on the CPU."""
    if tensor.numel() == 0 or tensor.is_cuda:
        return tensor
    memory = bytearray(tensor.numel() * tensor.itemsize + 32)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % 16 + offset
    return (
        torch.frombuffer(memory, dtype=tensor.dtype, offset=start, count=tensor.numel())
        .view(tensor.shape)
        .copy_(tensor)
    )


def at_element(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    memory = tensor.new_zeros(tensor.numel() + offset + 1)
    return memory[offset : offset + tensor.numel()].view(tensor.shape).copy_(tensor)


def freed(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def cut(tensor: torch.Tensor) -> torch.Tensor:
    """A storage that ends before the tensor does."""
    tensor = at_element(tensor, 3)
    tensor.untyped_storage().resize_(max(tensor.untyped_storage().nbytes() - 2 * tensor.itemsize, 0))
    return tensor


def overlapping(tensor: torch.Tensor) -> torch.Tensor:
    """Rows that begin one element after each other."""
    strides = (1,) * tensor.dim()
    return torch.zeros(sum(tensor.shape) + 1, dtype=tensor.dtype, device=tensor.device).as_strided(
        tensor.shape, strides
    )


# By name; each takes the right tensor. Those of the first table are as good as the tensor itself.
RIGHT = {
    "itself": lambda tensor: tensor,
    "one element on": functools.partial(at_element, offset=1),
    "eight elements on": functools.partial(at_element, offset=8),
    "a byte on": functools.partial(in_bytes, offset=1),
    # A dimension of one element may have any stride.
    "of odd strides": lambda tensor: tensor.as_strided(
        tensor.shape, [stride if size > 1 else 7 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    ),
    "the last rows": lambda tensor: torch.cat([tensor, tensor])[len(tensor) :],
    "negated twice": lambda tensor: torch._neg_view(-tensor) if tensor.dtype in FLOATS else tensor,
}
OTHER = {
    "no tensor": lambda tensor: None,
    "strided": lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda tensor: tensor.t().contiguous().t(),
    "of one value": lambda tensor: tensor.new_ones(1).expand(tensor.shape),
    "overlapping": overlapping,
    "one dimension more": lambda tensor: tensor[None],
    "one dimension less": lambda tensor: tensor[0],
    "no dimension": lambda tensor: tensor.new_ones(()),
    "no columns": lambda tensor: tensor[..., :0].contiguous(),
    "no rows": lambda tensor: tensor[:0],
    "a row more": lambda tensor: torch.cat([tensor, tensor[:1]]),
    "double": lambda tensor: tensor.double(),
    "int": lambda tensor: tensor.float().int(),
    "complex": lambda tensor: tensor.to(torch.complex64).conj(),
    "fp8": lambda tensor: tensor.to(FP8),
    "bytes": lambda tensor: tensor.float().to(torch.uint8),
    "meta": lambda tensor: tensor.to("meta"),
    "sparse": lambda tensor: tensor.float().to_sparse(),
    "quantized": lambda tensor: torch.quantize_per_tensor(tensor.float().cpu(), 0.1, 0, torch.quint8),
    "freed": freed,
    "cut": cut,
    **{f"{size} rows": lambda tensor, size=size: tensor.new_ones(1).expand(size, tensor.shape[-1]) for size in HUGE},
    **{f"{size} columns": lambda tensor, size=size: tensor.new_ones(1).expand(len(tensor), size) for size in HUGE},
    **{f"{size} rows of none": lambda tensor, size=size: tensor.new_ones(size, 0) for size in HUGE},
    **{f"none of {size} columns": lambda tensor, size=size: tensor.new_ones(0, size) for size in HUGE},
}
FORMS = RIGHT | OTHER
SCALARS = {
    "eps": (1e-5, 0.0, -1e-5, math.nan, math.inf, -math.inf, 1e-45, 1e-46, 1e-40, 1e38, 3.5e38, 5e-324),
    "num_tokens": (-1, -(2**31), -(2**63), MAX_TOKENS + 2, *HUGE),
    "group_size": (128, 1, 7, 64, 0, -1, -(2**63), *HUGE),
    "scale_layout": ("row", "column", "", "row\0", "Row", "\0"),
    "keep_output": (False, True),
    "complete": (False, True),
    "round_scales": (False, True),
    "quantize_q_a": (False, True),
    "weight_offset": (0.0, -0.0, 1.0, -1e38, math.nan, math.inf, -math.inf, 3.5e38, 1e-50),
    "group_name": ("", "\0", "0\0", "nobody", "x" * 10000),
}
MORE_OPS = ("rs_rmsnorm_ag_fp8", "qkv_a_proj_ag_norm_fp8", "mla_prologue", "mla_prologue_fp8")
# By op: which tensors and scalars it takes, beyond the group's name.
ARGUMENTS = {
    op: tuple(a.name for a in getattr(torch.ops.tp_fused, op).default._schema.arguments if a.name != "group_name")
    for op in (*OPS, *MORE_OPS)
}
MAY_BE_NONE = ("residual", "bias")


@dataclasses.dataclass(frozen=True)
class Hostile:
    """A call: `changes` says what becomes of each argument, by the name of a form or by value."""

    op: str
    num_tokens: int
    hidden_size: int
    dtype: torch.dtype
    symmetric: bool  # the input lies in symmetric memory
    changes: dict

    @property
    def right(self) -> bool:
        """Nothing keeps it from being served."""
        good = {
            "eps": (1e-5, 1e-45, 1e-40, 1e38),
            "group_size": [size for size in SCALARS["group_size"] if 0 < size < 2**31],
            "scale_layout": ("row", "column"),
            "keep_output": (False, True),
            "complete": (False, True),
            "round_scales": (False, True),
            "quantize_q_a": (False, True),
            "weight_offset": (0.0, 1.0, -1e38, 1e-50),
        }
        return all(
            value in good.get(name, RIGHT) or (value == "no tensor" and name in MAY_BE_NONE)
            for name, value in self.changes.items()
        )

    def arguments(self, device: str, rank: int, world_size: int) -> dict:
        """Of a call that is in order."""
        seed = self.num_tokens * 131 + self.hidden_size
        of_rank, of_all = (torch.Generator().manual_seed(seed + 7919 * number) for number in (rank + 1, 0))

        def random(*shape: int, dtype=self.dtype, generator=of_rank) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype).to(device)

        replicated = functools.partial(random, generator=of_all)  # in this order on all ranks

        hidden, rows = self.hidden_size, partition.row_count(self.num_tokens, rank, world_size)
        if self.changes.get("complete") and self.op.startswith("qkv_"):
            rows, of_rank = self.num_tokens, torch.Generator().manual_seed(seed)
            random = functools.partial(random, generator=of_rank)
        same = torch.ones(hidden, dtype=self.dtype, device=device) * 0.75
        blocks = -(-hidden // 128)
        if self.op in (*REDUCTIONS, "rs_rmsnorm_ag_fp8"):
            made = {"input": random(self.num_tokens, hidden), "residual": random(self.num_tokens, hidden)}
            return made | {"weight": same} if "weight" in ARGUMENTS[self.op] else made
        if self.op.startswith("mla_prologue"):
            fp8 = self.op == "mla_prologue_fp8"
            made = {"input": random(self.num_tokens, hidden), "residual": random(self.num_tokens, hidden)}
            made |= {"norm_weight": same, "qkv_a_weight": replicated(COLUMNS, hidden, dtype=FP8 if fp8 else self.dtype)}
            made |= {"weight_scale": replicated(1, blocks, dtype=torch.float32)} if fp8 else {}
            norms = {"q_a_norm_weight": Q_COLUMNS, "kv_a_norm_weight": KV_COLUMNS}
            dtype = torch.bfloat16 if fp8 else self.dtype
            return made | {name: replicated(size, dtype=dtype) for name, size in norms.items()}
        if self.op == "all_gather_rows":
            return {"input": random(rows, hidden)}
        if self.op == "qkv_a_proj_ag":
            return {"input": random(rows, hidden), "weight": replicated(COLUMNS, hidden), "bias": replicated(COLUMNS)}
        if self.op == "qkv_a_proj_ag_norm":
            made = {"input": random(rows, hidden), "weight": replicated(COLUMNS, hidden)}
            return made | {"q_a_weight": replicated(Q_COLUMNS), "kv_a_weight": replicated(KV_COLUMNS)}
        norms = {"q_a_weight": Q_COLUMNS, "kv_a_weight": KV_COLUMNS} if "norm" in self.op else {}
        return {name: replicated(size, dtype=torch.bfloat16) for name, size in norms.items()} | {
            "q": random(rows, hidden, dtype=FP8),
            "scale": random(rows, blocks, dtype=torch.float32),
            "weight": replicated(COLUMNS, hidden, dtype=FP8),
            "weight_scale": replicated(1, blocks, dtype=torch.float32),
        }

    def hostile_arguments(self, device: str, rank: int, world_size: int, memory: torch.Tensor) -> dict:
        made = self.arguments(device, rank, world_size)
        for name, change in self.changes.items():
            made[name] = FORMS[change](made[name]) if name in made else change
        if self.symmetric:
            offset = self.hidden_size % 2
            place = memory[offset : offset + made["input"].numel()].view(made["input"].shape)
            made["input"] = place.copy_(made["input"])
        for name, value in (("num_tokens", self.num_tokens), ("eps", 1e-5)):
            if name in ARGUMENTS[self.op]:
                made.setdefault(name, value)
        return made


@st.composite
def hostile_calls(draw, op: str, world_size: int) -> Hostile:
    # Of equal shares: what is contiguous on one rank is so on the others, and all of them are served or refused.
    num_tokens = draw(st.integers(0, MAX_TOKENS // world_size)) * world_size
    hidden_size = draw(st.integers(0, WIDTH) | st.sampled_from((8, 16, 64, WIDTH)))
    names = draw(st.lists(st.sampled_from((*ARGUMENTS[op], "group_name")), unique=True, max_size=3))
    changes = {name: draw(st.sampled_from(SCALARS.get(name, tuple(FORMS)))) for name in names}
    dtype = draw(st.sampled_from(FLOATS))
    symmetric = op in REDUCTIONS and "input" not in changes and draw(st.booleans())
    return Hostile(op, num_tokens, hidden_size, dtype, symmetric, changes)


# ---- on the ranks ----

_made: dict = {}  # a rank's workspaces by backend, and its symmetric memory


def prepare(device: str) -> None:
    """A workspace of the backend that is tested, and one of the reference's, each on a group of its own."""
    if _made:
        return
    sizes = {"max_num_tokens": MAX_TOKENS, "hidden_size": WIDTH, "dtype": torch.float32, "timeout_s": 5.0}
    with pytest.MonkeyPatch.context() as patch:
        for backend in (device, "reference"):
            patch.setenv("TP_FUSED_BACKEND", backend)
            group = dist.new_group(range(dist.get_world_size()))
            _made[backend] = tp_fused.init(group, device=device, **sizes)
    for dtype in FLOATS:
        _made[dtype] = _made[device].symm_empty(MAX_TOKENS * WIDTH + 1, dtype=dtype)


def close() -> None:
    for made in (_made.get("cpu"), _made.get("cuda"), _made.get("reference")):
        if made is not None:
            made.close()
    _made.clear()


def results(made, function, *arguments, **keywords):
    """A tuple of tensors, or an exception."""

    def call():
        returned = function(*arguments, **keywords)
        if made.device_type == "cuda":
            torch.cuda.synchronize()
            made.check()
        return returned if isinstance(returned, tuple) else (returned,)

    return outcome(call)[0]


def copies(arguments: dict) -> dict:
    """Ordinary tensors instead, for the reference backend's group."""
    made = {name: value.clone() if torch.is_tensor(value) else value for name, value in arguments.items()}
    return made | {"group_name": _made["reference"].group_name}


def told(result) -> tuple | str:
    """What three calls must agree on: the error with its words, but for the group's name; or the shapes."""
    if isinstance(result, Exception):
        return type(result).__name__, str(result)
    return tuple((tensor.shape, tensor.dtype) for tensor in result)


def make(call: Hostile, device: str) -> None:
    """Runs on a rank."""
    prepare(device)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ours, reference = _made[device], _made["reference"]
    try:
        hostile = call.hostile_arguments(device, rank, world_size, _made[call.dtype])
    except (RuntimeError, IndexError):  # torch itself has no such tensor
        return
    name = hostile.pop("group_name", ours.group_name)
    other_name = name if name != ours.group_name else reference.group_name
    op, checks = getattr(torch.ops.tp_fused, call.op), python_of(f"_{call.op}")
    with torch.no_grad():
        served = results(ours, op, **hostile, group_name=name)
        checked = results(ours, checks, **hostile, group_name=name)
        by_reference = results(reference, op, **hostile, group_name=other_name)
        of_copies = None if isinstance(served, Exception) else results(reference, op, **copies(hostile))
    meta = "meta" in call.changes.values()
    if meta and isinstance(served, RuntimeError):  # a fake kernel's: counts may be symbols there, and are not checked
        assert "negative dimension" in str(served) or "overflowed" in str(served), repr(served)
    elif isinstance(served, Exception):
        assert isinstance(served, (ValueError, TypeError)) and not isinstance(served, CollectiveFault), repr(served)
        assert "incompatible function arguments" not in str(served), str(served)
        assert not call.right or device == "cuda", repr(served)
    elif not any(tensor.is_meta for tensor in served):
        assert not isinstance(of_copies, Exception), f"served, but {of_copies!r}"
        for index, (seen, expected) in enumerate(zip(served, of_copies, strict=True)):
            within = {"rtol": 0.02, "atol": 0.02} if call.dtype != torch.float32 or FP8 in (seen.dtype,) else {}
            torch.testing.assert_close(
                seen.float(),
                expected.float(),
                equal_nan=True,
                **within,
                msg=lambda text, i=index: f"output {i}: {text}",
            )
    # The dispatcher's fake kernels, not the implementations, see tensors on the meta device.
    if not meta and hostile.get("input", hostile.get("q")) is not None:
        if isinstance(served, Exception):
            assert told(served) == told(checked), f"the call: {told(served)}; the checks: {checked!r}"
        else:
            assert checked == (None,), f"served, but the checks say {checked!r}"
        if device == "cpu":
            assert told(served) == told(by_reference), f"cpu: {told(served)}; reference: {told(by_reference)}"
    # Nothing else has been touched.
    rows = torch.full((4, 16), 1.0 + rank, device=device)
    summed = op_of_all(rows, ours.group_name)
    assert torch.equal(summed, torch.full_like(summed, world_size * (world_size + 1) / 2))


def op_of_all(rows: torch.Tensor, group_name: str) -> torch.Tensor:
    return torch.ops.tp_fused.reduce_scatter_rows(rows, group_name)


# ---- the tests ----


@pytest.fixture(scope="module", autouse=True)
def closed(pools):
    yield
    for world_size in (1, 2):
        pools(world_size).run(close)


def run(pool, call: Hostile, device: str, function=make) -> None:
    """Unlike the pool's own `run` it leaves the ranks in place after an assertion, for what hypothesis tries next."""
    for result in pool.outcomes(function, call, device):
        if isinstance(result, Exception):
            raise result


@pytest.mark.parametrize(("world_size", "examples"), [(1, 100), (2, 40)])
@pytest.mark.parametrize("op", [*OPS, *MORE_OPS])
def test_served_rightly_or_refused(pools, device, op, world_size, examples):
    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(hostile_calls(op, world_size))
    def every(call):
        run(pools(world_size), call, device)

    every()
