"""Sums over ranks in a graph, what they are made of, and the linears that read them.

A residual has to be full: each rank adds its own rows of it. What is full, and what is a rank's own:

* What the graph is given counts as full, unless the graph itself says otherwise.
* What a collective takes is a rank's own, and so is all that it is computed from, back to the graph's inputs, as long
  as nothing else can be where the ranks differ: through views, element-wise ops, and other ops of one tensor. A product
  of two tensors ends that, since one of them may be a shard: hidden states that are normed and multiplied by a
  row-parallel weight before the all-reduce stay full. Collectives of a group that has one of these ranks alone do not
  count.
* What is computed from a rank's own is so, too, until a collective of the group makes it full.
* A product is a rank's own, unless its weight is declared replicated.
"""

import dataclasses
import operator
from collections.abc import Callable

import torch
import torch.distributed as dist
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
    same,
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
        return _group_name(self.call)

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
_MOVES = ("embedding", "slice", "select", "cat", "expand", "permute", "index", "repeat", "mean", "sum", "split",
          "split_with_sizes", "unbind")  # fmt: skip
_GATHERS = (c10d.all_gather_into_tensor.default, c10d.all_reduce.default)


def rank_dependent(
    node: fx.Node, group_name: str, replicated: Callable[[fx.Node], bool], sums, own: set[fx.Node]
) -> fx.Node | None:
    """The first node that may differ between ranks, of those that this one is made of; None where all hold the same.

    own: `own_of_a_rank`. What else a graph is given counts as the same on all ranks. A product does not: its weight may
    be a shard, unless `replicated` says that it is not.
    """
    seen, stack = set(), [node]
    while stack:
        node = stack.pop()
        if node in seen or node in sums:
            continue
        seen.add(node)
        if node in own:
            return node
        if node.op in ("placeholder", "get_attr") or _is_number(node) or _name(node) in _FACTORIES:
            continue
        if node.target == c10d.wait_tensor.default and node.args[0].target in _GATHERS:
            if _group_name(node.args[0]) != group_name:
                return node.args[0]
            continue
        product = _name(node) in ("mm", "addmm") and replicated(node)
        if _summed_factors(node) is not None or not (_by_element(node) or product):
            return node
        stack += node.all_input_nodes
    return None


def own_of_a_rank(graph: fx.Graph, group_name: str) -> set[fx.Node]:
    """What collectives take, and what it is computed from: the module's docstring has the rule."""
    own, stack = set(), []
    for node in graph.nodes:
        if _is_collective(node) and _is_among(group_name, _group_name(node)):
            stack += node.all_input_nodes
    while stack:
        node = stack.pop()
        if node in own or _is_collective(node) or _is_number(node) or _name(node) in _FACTORIES:
            continue
        own.add(node)
        stack += _where_it_differs(node)
    return own


def _where_it_differs(node: fx.Node) -> list[fx.Node]:
    """Inputs of a node that differs between ranks that have to differ then; none where it may be any of several."""
    factors = _summed_factors(node)
    if factors is not None:
        return factors
    inputs = [each for each in node.all_input_nodes if not _is_number(each)]
    if _by_element(node):
        return inputs
    # An op of an engine may have a weight that is no argument of it.
    return inputs if _namespace(node) in ("aten", "prims") and len(_sources(inputs)) < 2 else []


def _sources(nodes: list[fx.Node]) -> set[fx.Node]:
    """What these are computed from: inputs of the graph and results of collectives. It stops at two."""
    found, seen, stack = set(), set(), list(nodes)
    while stack and len(found) < 2:
        node = stack.pop()
        if node in seen or _is_number(node):
            continue
        seen.add(node)
        if node.op in ("placeholder", "get_attr") or _is_collective(node):
            found.add(node)
        else:
            stack += node.all_input_nodes
    return found


def _by_element(node: fx.Node) -> bool:
    """It computes element by element, moves elements, or takes means and sums of them."""
    moves = _name(node) in _MOVES or node.target in (*VIEWS, *COPIES, CONVERT, operator.getitem)
    return moves or torch.Tag.pointwise in getattr(node.target, "tags", ())


def _summed_factors(node: fx.Node) -> list[fx.Node] | None:
    """Of a sum of products with a broadcast factor, the factors that are not: of one token, torch decomposes mm so."""
    source = node.args[0] if _name(node) == "sum" else None
    while isinstance(source, fx.Node) and source.target == CONVERT:
        source = source.args[0]
    if not isinstance(source, fx.Node) or source.target != aten.mul.Tensor:
        return None
    factors = [arg for arg in source.args if is_tensor(arg) and val(arg).dim() > 0]
    whole = [arg for arg in factors if same(val(arg).numel(), val(source).numel())]
    return whole if len(whole) < len(factors) else None


def _group_name(collective: fx.Node) -> str | None:
    """It is the last argument, or the group itself is; None of a wait."""
    group = collective.args[-1]
    return getattr(group, "group_name", group) if not isinstance(group, fx.Node) else None


def _is_among(group_name: str, other: str | None) -> bool:
    """Several ranks of a group are in the other one, too, or torch does not know it."""
    try:
        groups = map(dist.distributed_c10d._resolve_process_group, (group_name, other))
        first, second = (set(dist.get_process_group_ranks(group)) for group in groups)
    except (LookupError, RuntimeError, TypeError, ValueError):
        return True
    return len(first & second) > 1


def _is_collective(node: fx.Node) -> bool:
    return _namespace(node) == "_c10d_functional"


def _is_number(node: fx.Node) -> bool:
    """A size, for one: all ranks have the same."""
    return isinstance(val(node), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def _namespace(node: fx.Node) -> str:
    return getattr(node.target, "namespace", "")


def _name(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").split(".")[0]
