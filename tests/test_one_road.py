"""The native kernels and checks.py agree on which calls are in order, found by hypothesis over layouts of tensors.

Shapes, dtypes, strides, offsets, storages and devices near those of a call that is in order. What such calls compute is
in test_hostile_input.py; here they are either served, as ops.py then admits, or refused in its words.
"""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import OPS, python_of
from test_hostile_input import (
    ARGUMENTS,
    FLOATS,
    FP8,
    MAX_TOKENS,
    MORE_OPS,
    SCALARS,
    Hostile,
    close,
    prepare,
    results,
    run,
)
from test_hostile_input import _made as made

DTYPES = (*FLOATS, FP8, torch.uint8, torch.int32, torch.float64)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What differs from a contiguous tensor of the right shape and dtype. By dimension: `grow`, `steps`."""

    grow: tuple[int, int]
    dtype: torch.dtype | None
    steps: tuple[int, int]  # strides of neighbours, as a multiple of dense ones
    column_major: bool
    offset: int
    missing: int  # elements by which the storage is too short
    meta: bool

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        shape = [max(0, size + grow) for size, grow in zip(tensor.shape, self.grow, strict=False)]
        order = range(len(shape)) if self.column_major else reversed(range(len(shape)))
        strides, dense = [0] * len(shape), 1
        for i in order:
            strides[i] = dense * self.steps[i]
            dense = max(1, strides[i]) * max(1, shape[i])
        device = "meta" if self.meta else tensor.device
        size = self.offset + sum(max(0, size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
        laid = torch.zeros(size, dtype=self.dtype or tensor.dtype, device=device).as_strided(
            shape, strides, self.offset
        )
        if self.missing and not self.meta:
            laid.untyped_storage().resize_(max(0, size - self.missing) * laid.itemsize)
        return laid


def often(usual, *others):
    """Mostly `usual`: a call with one thing wrong gets further than one with ten."""
    return st.sampled_from((usual,) * 6 * max(1, len(others) // 2) + others)


layouts = st.builds(
    Layout,
    # By a row more, the residual of before would be the slice of some ranks.
    grow=st.tuples(often(0, -1, 2, 8, -(10**6)), often(0, -1, 1, 8, -(10**6))),
    dtype=often(None, *DTYPES),
    steps=st.tuples(often(1, 0, 2, 3), often(1, 0, 2)),
    column_major=often(False, True),
    offset=st.integers(0, 17),
    missing=often(0, 1, 100),
    meta=often(False, True),
)


@st.composite
def calls(draw, op: str, world_size: int) -> Hostile:
    # Of equal shares: what is in order on one rank is so on the others, and all of them are served or refused.
    num_tokens = draw(st.integers(0, MAX_TOKENS // world_size)) * world_size
    hidden_size = draw(st.sampled_from((0, 1, 8, 16, 64, 80)))
    names = draw(st.lists(st.sampled_from(ARGUMENTS[op]), unique=True, max_size=4))
    changes = {name: draw(st.sampled_from(SCALARS[name]) if name in SCALARS else layouts) for name in names}
    return Hostile(op, num_tokens, hidden_size, draw(st.sampled_from(FLOATS)), False, changes)


def agree(call: Hostile, device: str) -> None:
    """Runs on a rank."""
    prepare(device)
    workspace = made[device]
    arguments = call.arguments(device, dist.get_rank(), dist.get_world_size())
    for name, value in (("num_tokens", call.num_tokens), ("eps", 1e-5)):
        if name in ARGUMENTS[call.op]:
            arguments[name] = value
    for name, change in call.changes.items():
        arguments[name] = change.of(arguments[name]) if isinstance(change, Layout) else change
    name = {"group_name": workspace.group_name}
    served = results(workspace, getattr(torch.ops.tp_fused, call.op), **arguments, **name)
    tensors = [value for value in arguments.values() if torch.is_tensor(value)]
    if any(tensor.is_meta for tensor in tensors):  # then the fake kernel is asked, and no native one
        return
    checked = results(workspace, python_of(f"_{call.op}"), **arguments, **name)
    if isinstance(served, Exception):
        assert type(served) in (ValueError, TypeError), repr(served)
        assert (type(served), str(served)) == (type(checked), str(checked)), f"{served!r}; the checks: {checked!r}"
        return
    assert checked == (None,), f"served, but the checks say {checked!r}"
    promised = python_of(f"_{call.op}_fake")(**arguments, **name)
    promised = promised if isinstance(promised, tuple) else (promised,)
    assert [(t.shape, t.stride(), t.dtype) for t in served] == [(t.shape, t.stride(), t.dtype) for t in promised]


@pytest.fixture(scope="module", autouse=True)
def closed(pools):
    yield
    for world_size in (1, 2):
        pools(world_size).run(close)


@pytest.mark.parametrize(("world_size", "examples"), [(1, 200), (2, 60)])
@pytest.mark.parametrize("op", [*OPS, *MORE_OPS])
def test_what_is_admitted_is_served(pools, device, op, world_size, examples):
    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(calls(op, world_size))
    def every(call):
        run(pools(world_size), call, device, agree)

    every()
