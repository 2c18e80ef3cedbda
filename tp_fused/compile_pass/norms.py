"""RMSNorms in a graph.

Graphs come functionalised and decomposed (`post_grad_custom_pre_pass`), so that an RMSNorm has few forms left, whoever
wrote it: x * rsqrt(mean(x * x) + eps) * weight, with conversions between, and factors in either order.
"""

import dataclasses

import torch
from torch import fx

from .. import checks
from .nodes import ADDS, CONVERT, MULS, aten, base, hint, is_tensor, module_of, names, same, val

_SYMBOL = (
    "torch has made a symbol of the norm's eps, or of what is added to its weight, as it does of floats under "
    "dynamic=True: set torch._dynamo.config.specialize_float = True"
)


@dataclasses.dataclass
class Norm:
    """output = rms_norm(rows) * (weight + weight_offset), rows of any shape [..., hidden_size]."""

    rows: fx.Node  # a base
    output: fx.Node
    weight: fx.Node
    eps: float
    weight_offset: float
    complaint: str = ""  # why it cannot be served, where that is so

    @property
    def where(self) -> str:
        return module_of(self.output) or self.output.name


def _is_square(node: fx.Node) -> fx.Node | None:
    if node.target == aten.pow.Tensor_Scalar and node.args[1] == 2:
        return node.args[0]
    if node.target == aten.square.default or (node.target == aten.mul.Tensor and node.args[0] is node.args[1]):
        return node.args[0]
    return None


def _is_mean_of_last(node: fx.Node) -> fx.Node | None:
    """What the node is the mean of, over the last dimension, which it keeps."""
    if node.target == aten.mean.dim:
        source, dims, keep = (*node.args, False)[:3]
    elif node.target in (*MULS, aten.div.Tensor, aten.div.Scalar) and isinstance(node.args[0], fx.Node):
        total, factor = node.args[0], node.args[1]
        if total.target != aten.sum.dim_IntList:
            return None
        source, dims, keep = (*total.args, False)[:3]
        width = hint(val(source).shape[-1])
        divides = node.target in (aten.div.Tensor, aten.div.Scalar)
        if isinstance(factor, fx.Node):
            factor = hint(val(factor)) if isinstance(val(factor), torch.SymInt) else None
        if factor is None or abs((factor if divides else 1 / factor) - width) > 1e-6 * width:
            return None
    else:
        return None
    keep = node.kwargs.get("keepdim", keep)
    rank = val(source).dim()
    return source if keep and [dim % rank for dim in dims] == [rank - 1] else None


def _root(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(x, r) where r is 1 / sqrt(x), or sqrt(x) that others divide by; found at the square root."""
    if node.target == aten.rsqrt.default or (node.target == aten.pow.Tensor_Scalar and node.args[1] == -0.5):
        return node.args[0], node
    if node.target != aten.sqrt.default and (node.target != aten.pow.Tensor_Scalar or node.args[1] != 0.5):
        return None
    root = node
    while len(root.users) == 1:
        user = next(iter(root.users))
        if user.target == aten.reciprocal.default or (user.target in MULS and 1 in user.args):
            root = user
        else:
            break
    return node.args[0], root


def _number_added(node: fx.Node) -> tuple[fx.Node, float | None] | None:
    """(x, number) of x + number, whichever comes first; None for a number that torch has made a symbol of."""
    if node.target not in ADDS or node.kwargs.get("alpha", 1) != 1:
        return None
    for x, number in (node.args[:2], node.args[1::-1]):
        if isinstance(number, fx.Node) and number.target == aten.full.default:
            number = number.args[1]
        if isinstance(x, fx.Node) and isinstance(number, (int, float)):
            return x, float(number)
        if is_tensor(x) and is_tensor(number) and val(number).dim() == 0 and val(x).dim() > 0:
            return x, None
    return None


def _unconvert(node: fx.Node) -> fx.Node:
    while isinstance(node, fx.Node) and node.target == CONVERT:
        node = node.args[0]
    return node


def find_norms(graph: fx.Graph) -> dict[fx.Node, list[Norm]]:
    """All RMSNorms, by the base of the rows that they norm, in the graph's order."""
    found: dict[fx.Node, list[Norm]] = {}
    for node in graph.nodes:
        inner, root = (_root(node) or (None, None)) if node.op == "call_function" else (None, None)
        added = _number_added(inner) if isinstance(inner, fx.Node) else None
        squares = _is_mean_of_last(added[0]) if added is not None else None
        source = _is_square(_unconvert(squares)) if squares is not None else None
        if source is None or not is_tensor(source):
            continue
        rows = base(source)
        for user in root.users:
            if norm := _scaled(user, root, rows, added[1]):
                found.setdefault(rows, []).append(norm)
    return found


def _scaled(user: fx.Node, root: fx.Node, rows: fx.Node, eps: float | None) -> Norm | None:
    """The norm that multiplies the rows by this root, or divides by it, and multiplies by a weight then."""
    if user.target == aten.mul.Tensor:
        others = [arg for arg in user.args if arg is not root]
    elif user.target == aten.div.Tensor and user.args[1] is root:
        others = [user.args[0]]
    else:
        return None
    if len(others) != 1 or base(others[0]) is not rows:
        return None
    normed = user
    while len(normed.users) == 1 and next(iter(normed.users)).target == CONVERT:
        normed = next(iter(normed.users))
    width = val(normed).shape[-1]
    for product in normed.users:
        if product.target != aten.mul.Tensor:
            continue
        others = [arg for arg in product.args if isinstance(arg, fx.Node) and arg is not normed]
        weight, offset = _weight(others[0]) if len(others) == 1 else (None, None)
        if weight is None or not is_tensor(weight) or val(weight).dim() != 1 or not same(val(weight).shape[0], width):
            continue
        norm = Norm(rows, product, weight, eps, offset, _why_refused(eps, offset))
        if len(normed.users) > 1:
            norm.complaint = f"what the norm multiplies by its weight is read by {names(normed.users, product)}, too"
        return norm
    return Norm(rows, normed, normed, eps, 0.0, "the norm has no weight of the rows' width")


def _why_refused(eps: float | None, weight_offset: float | None) -> str:
    """What the op would say of such numbers; empty where it takes them. None: torch has made a symbol of it."""
    if eps is None or weight_offset is None:
        return _SYMBOL
    try:
        checks.eps(eps)
        checks.weight_offset(weight_offset)
    except ValueError as error:
        return str(error)
    return ""


def _weight(node: fx.Node) -> tuple[fx.Node, float]:
    node, offset = _unconvert(node), 0.0
    if node.op == "call_function" and (added := _number_added(node)) is not None:
        node, offset = _unconvert(added[0]), added[1]
    return node, offset


def narrowed(norm: Norm, dtype: torch.dtype) -> list[fx.Node] | None:
    """The nodes that hold the norm's output in the rows' dtype: itself, or all who read it, converting."""
    if val(norm.output).dtype == dtype:
        return [norm.output]
    users = list(norm.output.users)
    return users if users and all(user.target == CONVERT and val(user).dtype == dtype for user in users) else None
