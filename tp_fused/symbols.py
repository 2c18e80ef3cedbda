"""What is known of tensors and sizes that torch traces, asked so that it guards on nothing."""

import torch


def stands_in(tensor: torch.Tensor) -> bool:
    """It is torch's stand-in for a tensor: only the call itself will know its strides and memory."""
    return isinstance(tensor, torch._subclasses.FakeTensor)


def certain(condition) -> bool:
    """It holds: of sizes that are symbols, for all their values."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # and sympy, a third of a second

    return statically_known_true(condition)


def other_shape(tensor: torch.Tensor, shape) -> bool:
    return tensor.dim() != len(shape) or any(certain(a != b) for a, b in zip(tensor.shape, shape, strict=True))
