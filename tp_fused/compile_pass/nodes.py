"""What is asked of a node in a graph of aten ops: its value, the rows that it holds, who reads them."""

import torch
from torch import fx

from .. import checks

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default,
          aten.squeeze.dim, aten.squeeze.dims, aten.alias.default)  # fmt: skip
COPIES = (aten.clone.default, aten.contiguous.default, aten.detach.default)
CONVERT = torch.ops.prims.convert_element_type.default
_FLOATS = {*checks.FLOATS, torch.float64}
ADDS = (aten.add.Tensor, aten.add.Scalar)
MULS = (aten.mul.Tensor, aten.mul.Scalar)


def val(node: fx.Node):
    return node.meta.get("val")


def is_tensor(node) -> bool:
    return isinstance(node, fx.Node) and isinstance(val(node), torch.Tensor)


def same(a, b) -> bool:
    """Two sizes are equal for all values of their symbols. Asks without a guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return a == b if isinstance(a, int) and isinstance(b, int) else statically_known_true(a == b)


def hint(size) -> int | None:
    """What the size is in the call that is compiled for; None where torch does not know."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else None
    return size


def same_rows(node: fx.Node, source) -> bool:
    """The node's rows are the source's: a view may split the tokens over several dimensions, no more."""
    if not is_tensor(source) or val(source).dim() == 0 or val(node).dim() == 0:
        return False
    return same(val(node).shape[-1], val(source).shape[-1]) and same(val(node).numel(), val(source).numel())


def passes_rows_on(node: fx.Node) -> bool:
    """It is a view or a copy, with the same rows."""
    return node.target in (*VIEWS, *COPIES) and is_tensor(node) and same_rows(node, node.args[0])


def unview(node: fx.Node) -> fx.Node:
    """What the node is a view or a copy of, with the same rows."""
    while isinstance(node, fx.Node) and passes_rows_on(node):
        node = node.args[0]
    return node


def converts(node: fx.Node) -> bool:
    """From one of the dtypes that rows have to another one."""
    return node.target == CONVERT and {val(node).dtype, val(node.args[0]).dtype} <= _FLOATS


def base(node) -> fx.Node:
    """The same, of another dtype maybe: all nodes with this base hold one set of rows, more or less rounded."""
    while is_tensor(node):
        source = unview(node)
        if converts(source):
            source = source.args[0]
        if source is node:
            return node
        node = source
    return node


def readers(node: fx.Node) -> list[fx.Node]:
    """Who reads the node's rows, through views and copies of it."""
    found = []
    for user in node.users:
        found += readers(user) if passes_rows_on(user) else [user]
    return found


def module_of(node: fx.Node) -> str:
    """The path of the module that a node was traced in, as named_modules() has it; empty where torch keeps none."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    for piece in ("L['self']", "L['fn']", "._modules", "._orig_mod"):
        path = path.replace(piece, "")
    if path.startswith("L["):
        path = path[path.index("]") + 1 :]
    return path.replace("['", ".").replace("']", "").replace("[", ".").replace("]", "").strip(".")


def names(nodes, but=None) -> str:
    names = [f"{node.target}" if node.op == "call_function" else node.op for node in nodes if node is not but]
    return ", ".join(dict.fromkeys(names))
