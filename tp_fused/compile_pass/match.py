"""What the pass looks for in a graph of aten ops: sums over ranks, RMSNorms, linears. Nothing is changed here.

Graphs come functionalised and decomposed (`post_grad_custom_pre_pass`), so that an RMSNorm has few forms left, whoever
wrote it: x * rsqrt(mean(x * x) + eps) * weight, with conversions between, and factors in either order.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import fx

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default,
          aten.squeeze.dim, aten.squeeze.dims, aten.alias.default)  # fmt: skip
_COPIES = (aten.clone.default, aten.contiguous.default, aten.detach.default)
_convert = torch.ops.prims.convert_element_type.default
_ADDS = (aten.add.Tensor, aten.add.Scalar)
_MULS = (aten.mul.Tensor, aten.mul.Scalar)


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


def _same_rows(node: fx.Node, source) -> bool:
    """The node's rows are the source's: a view may split the tokens over several dimensions, no more."""
    if not is_tensor(source) or val(source).dim() == 0 or val(node).dim() == 0:
        return False
    return same(val(node).shape[-1], val(source).shape[-1]) and same(val(node).numel(), val(source).numel())


def _passes_rows_on(node: fx.Node) -> bool:
    """It is a view or a copy, with the same rows."""
    return node.target in (*_VIEWS, *_COPIES) and is_tensor(node) and _same_rows(node, node.args[0])


def unview(node: fx.Node) -> fx.Node:
    """What the node is a view or a copy of, with the same rows."""
    while isinstance(node, fx.Node) and _passes_rows_on(node):
        node = node.args[0]
    return node


def base(node) -> fx.Node:
    """The same, of another dtype maybe: all nodes with this base hold one set of rows, more or less rounded."""
    while is_tensor(node):
        source = unview(node)
        if source.target == _convert:
            source = source.args[0]
        if source is node:
            return node
        node = source
    return node


def readers(node: fx.Node) -> list[fx.Node]:
    """Who reads the node's rows, through views and copies of it."""
    found = []
    for user in node.users:
        found += readers(user) if _passes_rows_on(user) else [user]
    return found


def module_of(node: fx.Node) -> str:
    """The path of the module that a node was traced in, as named_modules() has it; empty where torch has not kept it."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    for piece in ("L['self']", "L['fn']", "._modules", "._orig_mod"):
        path = path.replace(piece, "")
    if path.startswith("L["):
        path = path[path.index("]") + 1 :]
    return path.replace("['", ".").replace("']", "").replace("[", ".").replace("]", "").strip(".")


# ---- RMSNorm ----


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
    elif node.target in (*_MULS, aten.div.Tensor, aten.div.Scalar) and isinstance(node.args[0], fx.Node):
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
        if user.target == aten.reciprocal.default or (user.target in _MULS and 1 in user.args):
            root = user
        else:
            break
    return node.args[0], root


def _number_added(node: fx.Node) -> tuple[fx.Node, float | None] | None:
    """(x, number) of x + number, whichever comes first; None for a number that torch has made a symbol of."""
    if node.target not in _ADDS or node.kwargs.get("alpha", 1) != 1:
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
    while isinstance(node, fx.Node) and node.target == _convert:
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
    while len(normed.users) == 1 and next(iter(normed.users)).target == _convert:
        normed = next(iter(normed.users))
    width = val(normed).shape[-1]
    for product in normed.users:
        if product.target != aten.mul.Tensor:
            continue
        others = [arg for arg in product.args if isinstance(arg, fx.Node) and arg is not normed]
        weight, offset = _weight(others[0]) if len(others) == 1 else (None, None)
        if weight is None or not is_tensor(weight) or val(weight).dim() != 1 or not same(val(weight).shape[0], width):
            continue
        norm = Norm(rows, product, weight, eps, offset)
        if None in (eps, offset):
            norm.complaint = "torch has made a symbol of the norm's eps, or of what is added to its weight: it does so of "
            norm.complaint += "a Python float under dynamic=True, unless it is an attribute of a module"
        if len(normed.users) > 1:
            norm.complaint = f"what the norm multiplies by its weight is read by {_names(normed.users, product)}, too"
        return norm
    return Norm(rows, normed, normed, eps, 0.0, "the norm has no weight of the rows' width")


def _weight(node: fx.Node) -> tuple[fx.Node, float]:
    node, offset = _unconvert(node), 0.0
    if node.op == "call_function" and (added := _number_added(node)) is not None:
        node, offset = _unconvert(added[0]), added[1]
    return node, offset


def _names(nodes, but=None) -> str:
    names = [f"{node.target}" if node.op == "call_function" else node.op for node in nodes if node is not but]
    return ", ".join(dict.fromkeys(names))


def narrowed(norm: Norm, dtype: torch.dtype) -> list[fx.Node] | None:
    """The nodes that hold the norm's output in the rows' dtype: itself, or all who read it, converting."""
    if val(norm.output).dtype == dtype:
        return [norm.output]
    users = list(norm.output.users)
    return users if users and all(user.target == _convert and val(user).dtype == dtype for user in users) else None


# ---- sums over ranks ----


def wait_once(graph: fx.Graph) -> None:
    """Takes out the waits for what has been waited for: torch traces several where code calls `wait_tensor`, too."""
    for node in list(graph.nodes):
        if node.target == c10d.wait_tensor.default and node.args[0].target == c10d.wait_tensor.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


@dataclasses.dataclass
class Reduction:
    """wait(all_reduce(partial)) or wait(reduce_scatter(partial)). wait: None where others read what is not there yet."""

    call: fx.Node
    wait: fx.Node | None
    scatters: bool

    @property
    def partial(self) -> fx.Node:
        return self.call.args[0]

    @property
    def read(self) -> fx.Node:
        return self.wait or self.call

    @property
    def group_name(self) -> str:
        group = self.call.args[-1]
        return getattr(group, "group_name", group)

    @property
    def op(self) -> str:
        return self.call.args[1]

    @property
    def where(self) -> str:
        """The module whose output is summed, as far as torch knows."""
        return module_of(self.call) or module_of(unview(self.partial)) or self.call.name


def find_reductions(graph: fx.Graph) -> dict[fx.Node, Reduction]:
    """All of them, by the node that others read, in the graph's order."""
    found = {}
    for node in graph.nodes:
        if node.target not in (c10d.all_reduce.default, c10d.reduce_scatter_tensor.default):
            continue
        waits = [user for user in node.users if user.target == c10d.wait_tensor.default]
        wait = waits[0] if len(waits) == 1 and len(node.users) == 1 else None
        found[wait or node] = Reduction(node, wait, node.target == c10d.reduce_scatter_tensor.default)
    return found


@dataclasses.dataclass
class Sum:
    """What adds up to `total`, a base: reductions, and others. `inside` are the additions."""

    total: fx.Node
    reductions: list[Reduction]
    others: list[fx.Node]
    inside: set[fx.Node]

    def readers_elsewhere(self, reduction: Reduction) -> list[fx.Node]:
        return [] if reduction.read is self.total else _readers_outside(reduction.read, self.inside)


def as_sum(total: fx.Node, reductions: dict[fx.Node, Reduction], known) -> Sum:
    """The terms of `total`, as far as they are made for it alone. What is in `known` is a term as it stands."""
    if total in reductions:
        return Sum(total, [reductions[total]], [], set())
    own, shared, others, inside = [], [], [], set()
    stack = [total]
    while stack:
        node = stack.pop()
        whole = base(node)
        if whole in known:
            others.append(node)
        elif whole in reductions:
            (shared if _readers_outside(whole, inside) else own).append(node)
        elif _adds_rows(whole) and (whole is total or not _readers_outside(whole, inside)):
            inside.add(whole)
            stack += reversed(whole.args)
        else:
            others.append(node)
    if not own:
        own, shared = shared, []
    return Sum(total, [reductions[base(node)] for node in own], others + shared, inside)


def _adds_rows(node: fx.Node) -> bool:
    return (
        node.target == aten.add.Tensor
        and node.kwargs.get("alpha", 1) == 1
        and all(is_tensor(arg) and _same_rows(node, arg) for arg in node.args)
    )


def _readers_outside(node: fx.Node, inside: set[fx.Node]) -> list[fx.Node]:
    """Who reads the node's rows, of its dtype or of another, and is not in `inside`."""
    found = []
    for user in node.users:
        if user in inside:
            continue
        passes = user.target == _convert or _passes_rows_on(user)
        found += _readers_outside(user, inside) if passes else [user]
    return found


# ---- linears ----


@dataclasses.dataclass
class Linear:
    """output = rows @ weight.T + bias, rows flattened to two dimensions."""

    output: fx.Node
    weight: fx.Node
    bias: fx.Node | None

    @property
    def where(self) -> str:
        return module_of(self.output)

    @property
    def width(self):
        return val(self.weight).shape[0]


def as_linear(node: fx.Node, rows: Callable[[fx.Node], bool]) -> Linear | None:
    """The node as a linear of what `rows` says are the rows; its weight [columns, hidden_size] is a node of its own."""
    if node.op != "call_function" or node.kwargs:
        return None
    if node.target == aten.mm.default:
        bias, (given, turned) = None, node.args
    elif node.target == aten.addmm.default:
        bias, given, turned = node.args
    else:
        return None
    turns = turned.target == aten.t.default or (
        turned.target in (aten.permute.default, aten.transpose.int) and tuple(_flat(turned.args[1:])) in ((1, 0), (0, 1))
    )
    if turned.target == aten.permute.default and tuple(_flat(turned.args[1:])) == (0, 1):
        turns = False
    if not rows(given) or not turns or not is_tensor(turned.args[0]):
        return None
    if bias is not None and val(bias).dim() != 1:
        return None
    return Linear(node, turned.args[0], bias)


def _flat(args) -> list[int]:
    return [x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else [arg])]


# ---- whether all ranks hold the same ----

_FACTORIES = (aten.full.default, aten.arange.start_step, aten.zeros.default, aten.ones.default, aten.scalar_tensor.default)  # fmt: skip
_MOVES = (*_VIEWS, *_COPIES, aten.embedding.default, aten.slice.Tensor, aten.select.int, aten.cat.default,
          aten.expand.default, aten.permute.default, aten.index.Tensor, _convert)  # fmt: skip
_GATHERS = (c10d.all_gather_into_tensor.default, c10d.all_reduce.default)


def rank_dependent(node: fx.Node, group_name: str, replicated: Callable[[fx.Node], bool], sums) -> fx.Node | None:
    """The first node that may differ between ranks, of those that this one is made of; None where all hold the same.

    What a graph is given counts as the same on all ranks. A product does not: its weight may be a shard, unless
    `replicated` says that it is not.
    """
    seen, stack = set(), [node]
    while stack:
        node = stack.pop()
        if node in seen or node in sums:
            continue
        seen.add(node)
        if node.op in ("placeholder", "get_attr") or node.target in _FACTORIES:
            continue
        if node.target == c10d.wait_tensor.default and node.args[0].target in _GATHERS:
            if getattr(node.args[0].args[-1], "group_name", node.args[0].args[-1]) != group_name:
                return node.args[0]
            continue
        pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        reduces = node.target in (aten.mean.dim, aten.sum.dim_IntList)
        product = node.target in (aten.mm.default, aten.addmm.default) and replicated(node)
        if not (pointwise or reduces or product or node.target in _MOVES or not is_tensor(node)):
            return node
        stack += node.all_input_nodes
    return None
