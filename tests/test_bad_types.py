"""Arguments of a type that nothing here takes: TypeError or ValueError in our words, with what was given.

Of every op, and of `init`, `symm_empty` and `explain`: each argument is given each of these values in turn.
"""

import inspect
import os

import numpy
import pytest
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
    "complete": ("None", "a float", "an integer"),
    "keep_output": ("None", "a float", "an integer"),
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


def ops_given_all(backend: str, device: str, op: str) -> list[str]:
    """Runs on a rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    call, complaints = Call(op, 4, 256, residual="full", device=device), []
    with workspace(backend, device, latent_size=sum(LATENT)):
        function, right = getattr(tp_fused, op), call.arguments(rank, world_size)
        for name in inspect.signature(function).parameters:
            # Of tensors on the meta device alone torch asks the fake kernel.
            alone = ("meta",) if (op, name) == ("all_gather_rows", "input") else ()
            for value in unfit(right.get(name), ADMITTED.get(name, alone)):
                complaints.append(complaint(function, name, value, right))
        call.check(call.run(rank, world_size, right), rank, world_size)
    return [text for text in complaints if text]


@pytest.mark.parametrize("op", OPS)
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
def test_init_symm_empty_explain(pool, device, world_size):
    """None of them leaves the group in a state in which a call fails."""
    assert pool.run(others_given_all, device) == [[], []]
