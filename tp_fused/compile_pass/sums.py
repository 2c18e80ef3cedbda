"""Sums over ranks in a graph, what they are made of, and the linears that read them."""

import dataclasses
from collections.abc import Callable

import torch
from torch import fx

from .nodes import (
    CONVERT,
    COPIES,
    VIEWS,
    aten,
    base,
    c10d,
    converts,
    is_tensor,
    module_of,
    passes_rows_on,
    same_rows,
    unview,
    val,
)

# ---- reductions, and what is added to them ----


def wait_once(graph: fx.Graph) -> None:
    """Takes out the waits for what has been waited for: torch traces several where code calls `wait_tensor`, too."""
    for node in list(graph.nodes):
        if node.target == c10d.wait_tensor.default and node.args[0].target == c10d.wait_tensor.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


@dataclasses.dataclass
class Reduction:
    """wait(all_reduce(partial)) or wait(reduce_scatter(partial)); wait is None where the call has other readers."""

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
        and all(is_tensor(arg) and same_rows(node, arg) for arg in node.args)
    )


def _readers_outside(node: fx.Node, inside: set[fx.Node]) -> list[fx.Node]:
    """Who reads the node's rows, of its dtype or of another, and is not in `inside`."""
    found = []
    for user in node.users:
        if user in inside:
            continue
        passes = converts(user) or passes_rows_on(user)
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
    def name(self) -> str:
        return self.where or self.output.name

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
    turns = turned.target == aten.t.default or (turned.target == aten.permute.default and turned.args[1] == [1, 0])
    if not rows(given) or not turns:
        return None
    if bias is not None and val(bias).dim() != 1:
        return None
    return Linear(node, turned.args[0], bias)


# ---- whether all ranks hold the same ----

_FACTORIES = ("full", "arange", "zeros", "ones", "scalar_tensor")
_MOVES = ("embedding", "slice", "select", "cat", "expand", "permute", "index", "repeat", "mean", "sum")
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
        name = str(node.target).removeprefix("aten.").split(".")[0]
        if node.op in ("placeholder", "get_attr") or name in _FACTORIES:
            continue
        if node.target == c10d.wait_tensor.default and node.args[0].target in _GATHERS:
            if getattr(node.args[0].args[-1], "group_name", node.args[0].args[-1]) != group_name:
                return node.args[0]
            continue
        pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        product = name in ("mm", "addmm") and replicated(node)
        moves = name in _MOVES or node.target in (*VIEWS, *COPIES, CONVERT)
        if is_tensor(node) and not (pointwise or product or moves):
            return node
        stack += node.all_input_nodes
    return None
