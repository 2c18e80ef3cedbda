"""Arguments of a type that nothing here takes: TypeError or ValueError in our words, with what was given.

Of every op, and of `init`, `symm_empty`, `explain` and `diagnose`: each argument is given each of these values in turn.
"""

import inspect
import os

import numpy
import pytest
import test_fp8
import test_mla_prologue
import torch
import torch.distributed as dist
from programs import LATENT, OPS, Call
from ranks import outcome, workspace

import tp_fused
from tp_fused import checks

# Functions make one of the right tensor, where there is one.
VALUES = {
    "None": None,
    "a list": [1.0, 2.0],
    "an array": numpy.ones((4, 256), numpy.float32),
    "a string": "abc",
    "a float": 1.5,
    "an integer": -7,
    "a tensor of three dimensions": torch.ones(1, 2, 3),
    "sparse": lambda tensor: tensor.float().to_sparse(),
    "nested": lambda tensor: torch.nested.nested_tensor([tensor.float()], layout=torch.jagged),
    "meta": lambda tensor: tensor.to("meta"),
}
# What an argument may be, beside its own kind. torch takes any number for a bool, and None.
ADMITTED = {
    "residual": ("None",),
    "bias": ("None",),
    "group": ("None",),
    **dict.fromkeys(("complete", "keep_output", "quantize_q_a", "round_scales"), ("None", "a float", "an integer")),
    "weight_offset": ("a float", "an integer"),
    "eps": ("a float",),
}
# Said by torch's dispatcher, by pybind11 and by Python where nobody has looked.
NOT_OURS = (
    "Expected a value of type",
    "incompatible function",
    "object has no attribute",
    "Could not run",
    "ambiguous",
)


def unfit(right, admitted=()) -> list:
    """All values that must not take the place of `right`."""
    values = [value for name, value in VALUES.items() if name not in admitted]
    return [
        value(right) if callable(value) else value for value in values if not callable(value) or torch.is_tensor(right)
    ]


def complaint(function, argument: str, value, given: dict) -> str | None:
    """What is wrong with how the call fails, if anything is."""
    error, _ = outcome(function, **given | {argument: value})
    about = f"{function.__name__}, {argument}={checks.described(value)}: {error!r}"
    if type(error) not in (TypeError, ValueError):
        return about
    return about if any(words in str(error) for words in NOT_OURS) or not str(error) else None


def right_call(op: str, device: str) -> tuple:
    """The wrapper of an op, and arguments of which none is wrong."""
    function, place = getattr(tp_fused, op), (dist.get_rank(), dist.get_world_size())
    if op in OPS:
        return function, Call(op, 4, 256, residual="full", device=device).arguments(*place)
    if op == "qkv_a_proj_ag_norm_fp8":
        norms = (torch.ones(size, device=device) for size in LATENT[:2])
        given = Call("qkv_a_proj_ag_fp8", 4, 256, device=device).arguments(*place)
        return function, given | dict(zip(("q_a_weight", "kv_a_weight"), norms, strict=True))
    if op == "mla_prologue":
        given = test_mla_prologue.arguments(4, torch.float32, "full", device)
    else:  # rs_rmsnorm_ag_fp8 takes the first of mla_prologue_fp8's
        assert op in ("mla_prologue_fp8", "rs_rmsnorm_ag_fp8")
        given = test_fp8.arguments(4, torch.bfloat16, "full", device)[: 3 if op.startswith("rs_") else None]
    return function, dict(zip(inspect.signature(function).parameters, given, strict=False))


def ops_given_all(backend: str, device: str, op: str) -> list[str]:
    """Runs on a rank."""
    complaints = []
    with workspace(backend, device, latent_size=256):
        function, right = right_call(op, device)
        for name in inspect.signature(function).parameters:
            # Of tensors on the meta device alone torch asks the fake kernel.
            alone = ("meta",) if (op, name) == ("all_gather_rows", "input") else ()
            for value in unfit(right.get(name), ADMITTED.get(name, alone)):
                complaints.append(complaint(function, name, value, right))
        function(**right)
    return [text for text in complaints if text]


@pytest.mark.parametrize("op", [name for name in tp_fused.__all__ if hasattr(torch.ops.tp_fused, name)])
@pytest.mark.parametrize("world_size", [2])
def test_op(pool, backend, device, op, world_size):
    """No rank has launched anything: the right call after all of them is the first of both."""
    assert pool.run(ops_given_all, backend, device, op) == [[], []]


def others_given_all(device: str) -> list[str]:
    """Runs on a rank."""
    os.environ.pop("TP_FUSED_BACKEND", None)
    sizes = {"hidden_size": 256, "latent_size": 256, "dtype": torch.float32}
    init = sizes | {"group": None, "max_num_tokens": 64, "timeout_s": 20.0, "max_ctas": 2, "device": device}
    symm_empty = {"shape": (4, 8), "dtype": torch.float32, "group": None, "device": device}
    explain = {"op": "rs_rmsnorm", "num_tokens": 8, "group": None, "input": torch.ones(8, 256, device=device)}
    on_a_card = sizes | {"gpu": "H100", "world_size": 8, "ranks_per_card": 1, "op": "rs_rmsnorm", "num_tokens": 8}
    calls = [
        (tp_fused.init, init),
        (tp_fused.symm_empty, symm_empty),
        (tp_fused.symm_empty, symm_empty | {"shape": (4, -1)}),
        (tp_fused.explain, explain),
        (tp_fused.explain, on_a_card),
        (tp_fused.diagnose, {"group": None, "timeout_s": 1.0}),
    ]
    complaints = []
    with workspace(None, device):
        for function, right in calls:
            for name in right:
                admitted = ("a float",) if name == "timeout_s" else ()
                if inspect.signature(function).parameters[name].default is None:
                    admitted += ("None",)
                complaints += [complaint(function, name, value, right) for value in unfit(right[name], admitted)]
        Call("rs_rmsnorm", 5, device=device).run(dist.get_rank(), dist.get_world_size())
    return [text for text in complaints if text]


@pytest.mark.parametrize("world_size", [2])
def test_what_is_no_op(pool, device, world_size):
    """None of them leaves the group in a state in which a call fails."""
    assert pool.run(others_given_all, device) == [[], []]
