"""What is wrong with a call that torch traces, in the words of checks.py: the fake kernels begin with it.

Sizes may be symbols, and torch guards on nothing that is asked here. What no stand-in for a tensor knows (strides,
memory, the values of symbols), and what depends on the workspace, is checked when the call is made.
"""

from . import checks


def reduction(input, residual=None) -> None:
    """The inputs of an op that reduces."""
    checks.rows("input", input)
    if residual is not None:
        checks.rows("residual", residual, (input.dtype,), input.device)


def normed_reduction(input, residual, weight, eps, weight_offset=0.0, name: str = "weight") -> None:
    """The same of one that norms what it has reduced. name: of its weight."""
    reduction(input, residual)
    checks.norm_weight(name, weight, (input.shape[1],), input)
    numbers(eps, weight_offset)


def quantised_reduction(input, residual, weight, eps, weight_offset, group_size, scale_layout) -> None:
    normed_reduction(input, residual, weight, eps, weight_offset)
    checks.scale_layout(scale_layout)
    checks.group_size(group_size)


def projection(input, weight, num_tokens, dtypes=checks.FLOATS) -> None:
    """The inputs of an op that projects."""
    checks.rows("input", input, dtypes)
    checks.projected_rows(input, weight)
    checks.token_count(num_tokens)


def projection_fp8(q, scale, weight, weight_scale, num_tokens) -> None:
    projection(q, weight, num_tokens, (checks.E4M3,))
    checks.fp8_scales(scale, q)
    checks.weight_scale(weight_scale, weight)


def numbers(eps, weight_offset=0.0) -> None:
    """Those that torch has not made symbols of."""
    if isinstance(eps, (int, float)):
        checks.eps(eps)
    if isinstance(weight_offset, (int, float)):
        checks.weight_offset(weight_offset)
