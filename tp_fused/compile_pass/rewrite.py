"""Puts the ops into the place of what they replace, in one graph.

Each op takes the place of the sum that its norm reads, so what it needs is there already, and what reads its results
comes later. All decisions follow from what is the same on all ranks: the graph, the workspace and the token count.
"""

import dataclasses
import operator
from collections.abc import Callable

import torch
from torch import fx

from .. import checks
from ..native import _C
from .nodes import (
    CONVERT,
    aten,
    base,
    c10d,
    hint,
    is_tensor,
    module_of,
    names,
    passes_rows_on,
    readers,
    same,
    unview,
    val,
)
from .norms import Norm, find_norms, narrowed
from .report import GraphReport, Site
from .sums import (
    Linear,
    Reduction,
    Sum,
    as_linear,
    as_sum,
    find_reductions,
    own_of_a_rank,
    rank_dependent,
    wait_once,
)

_ops = torch.ops.tp_fused


class Left(Exception):
    """Why a site is left as it is."""


@dataclasses.dataclass
class Carried:
    """A sum whose rows lie scattered now."""

    total: fx.Node  # the sum as it was
    rows: fx.Node  # this rank's
    partial: fx.Node  # what was reduced, of all tokens
    scattered_before: bool  # it was the result of a reduce-scatter
    site: Site


class Rewriter:
    """Rewrites one graph. replicated(path of a module, shape of its weight): whether all ranks hold the same weight."""

    def __init__(self, graph: fx.Graph, workspace, pinned_name: str, replicated: Callable[[str, tuple], bool]):
        self.graph, self.workspace, self.group = graph, workspace, pinned_name
        self.replicated = replicated
        self.fake_mode = torch._guards.detect_fake_mode([val(node) for node in graph.nodes])
        self.share = (workspace.world_size - 1) / workspace.world_size
        wait_once(graph)
        self.norms, self.reductions = find_norms(graph), find_reductions(graph)
        self.own = own_of_a_rank(graph, workspace.group_name)
        self.carried: dict[fx.Node, Carried] = {}
        self.shapes: dict[fx.Node, list[int | fx.Node]] = {}
        self.dead: list[fx.Node] = []

    def run(self) -> GraphReport:
        sites, seen = [], set()
        finished = {node: reduction for node, reduction in self.reductions.items() if reduction.wait is not None}
        for rows, norms in self.norms.items():
            total = as_sum(rows, finished, self.carried)
            if not total.reductions:
                continue
            seen |= {reduction.call for reduction in total.reductions}
            norm = next((norm for norm in norms if not norm.complaint), norms[0])
            site = self._site(norm.where, total.reductions, _form(total))
            try:
                self._rewrite(norm, total, site)
            except Left as why:
                site.because = str(why)
            sites.append(site)
        for reduction in self.reductions.values():
            if reduction.call not in seen:
                form = reduction.call.target.__name__.split(".")[0]
                sites.append(self._site(reduction.where, [reduction], form, self._why_no_norm(reduction)))
        self._finish()
        return GraphReport(sites)

    # ---- one site ----

    def _rewrite(self, norm: Norm, total: Sum, site: Site) -> None:
        reductions = total.reductions
        scatters = reductions[0].scatters
        if len(reductions) > 1 and any(reduction.scatters for reduction in reductions):
            raise Left(f"{len(reductions)} reductions are added up, and one of them is a reduce-scatter")
        partials = [self._checked(reduction, total) for reduction in reductions]
        dtype, hidden_size = val(partials[0]).dtype, val(partials[0]).shape[-1]
        if any(val(partial).dtype != dtype for partial in partials):
            raise Left("the reductions that are added up have several dtypes")
        if norm.complaint:
            raise Left(norm.complaint)
        outputs = narrowed(norm, dtype)
        if outputs is None:
            raise Left(f"the norm of {dtype} rows leaves {val(norm.output).dtype} ones")
        residual = self._residual(total.others, dtype, scatters)
        weight = self._norm_weight(norm, scatters)
        # What may fail is asked before the first node is made.
        self.shapes |= {node: self._shape(node, scatters) for node in (*outputs, norm.rows)}

        with self.graph.inserting_before(norm.rows):
            flat = [self._flat(partial, norm) for partial in partials]
            while len(flat) > 1:
                flat = [self._call(norm, aten.add.Tensor, flat[0], flat[1]), *flat[2:]]
            partial = self._contiguous(norm, flat[0])
            if residual is not None:
                residual = self._contiguous(norm, self._flat(residual, norm))
            if val(weight).dtype not in (dtype, torch.float32):
                weight = self._call(norm, CONVERT, weight, torch.float32)
            linears = [] if scatters else self._projections(outputs, norm, site)
            op = _ops.rs_rmsnorm if scatters or linears else _ops.rs_rmsnorm_ag
            offset = {"weight_offset": norm.weight_offset} if norm.weight_offset else {}
            arguments = (partial, residual, weight, norm.eps, self.group)
            result = self._call(norm, op.default, *arguments, **offset)
            output, residual_out = (self._item(result, index) for index in (0, 1))
        if linears:
            for linear in linears:
                self._project(linear, output, partial)
            self.dead += [linear.output for linear in linears]
        else:
            for old in outputs:
                with self.graph.inserting_before(old):
                    old.replace_all_uses_with(self._shaped(output, old, scatters, partial))
        self.dead += outputs
        self.carried[norm.rows] = Carried(norm.rows, residual_out, partial, scatters, site)
        site.ops = (op.__name__.split(".")[-1], *["qkv_a_proj_ag"] * len(linears))
        site.collectives_after = 1 + len(linears)
        gathered = sum(hint(linear.width) for linear in linears) if linears else 0 if scatters else hint(hidden_size)
        site.bytes_after = (hint(hidden_size) + gathered) * dtype.itemsize * self.share

    def _checked(self, reduction: Reduction, total: Sum) -> fx.Node:
        """The partial sum of a reduction that can be served."""
        workspace, partial = self.workspace, reduction.partial
        if reduction.group_name != workspace.group_name:
            raise Left(f"it reduces over group {reduction.group_name!r}, the pass serves {workspace.group_name!r}")
        if reduction.op != "sum":
            raise Left(f"it reduces by {reduction.op!r}, and only 'sum' is served")
        if others := total.readers_elsewhere(reduction):
            raise Left(f"its result is read by {names(others)}, too, which needs it before the residual is added")
        tensor = val(partial)
        if tensor.device.type != workspace.device_type:
            raise Left(f"it reduces a tensor on {tensor.device}, the workspace is for {workspace.device_type}")
        if tensor.dtype not in checks.FLOATS:
            raise Left(f"it reduces {tensor.dtype}")
        if reduction.scatters and tensor.dim() != 2:
            raise Left(f"it scatters a tensor of {tensor.dim()} dimensions, and only rows of two are served")
        rows = tensor.shape[0]
        for size in tensor.shape[1:-1]:
            rows = rows * size
        num_tokens, width = hint(rows), hint(tensor.shape[-1])
        if num_tokens is None or width is None:
            raise Left("torch does not know the sizes of what it reduces")
        if num_tokens > workspace.max_num_tokens:
            raise Left(f"num_tokens={num_tokens} is over the workspace's max_num_tokens={workspace.max_num_tokens}")
        if width * tensor.dtype.itemsize > workspace.row_bytes:
            raise Left(
                f"hidden_size={width} of {tensor.dtype} ({width * tensor.dtype.itemsize} bytes a row) does not fit the "
                f"workspace ({workspace.row_bytes} bytes a row)"
            )
        if workspace.backend != "reference" and width > _C.MAX_HIDDEN_SIZE:
            raise Left(f"hidden_size={width} is over {_C.MAX_HIDDEN_SIZE}, the widest row the kernels reduce")
        if workspace.backend == "cuda" and width % 8:
            raise Left(f"hidden_size={width} is no multiple of 8, which the CUDA kernels want")
        return partial

    def _residual(self, others: list[fx.Node], dtype, scatters: bool) -> fx.Node | None:
        if not others:
            return None
        if len(others) > 1:
            raise Left(f"{len(others)} tensors are added to the reduced sum, and only one residual is served")
        residual = others[0]
        carried = self.carried.get(base(residual))
        if carried is not None and carried.scattered_before == scatters:
            return carried.rows
        if not scatters:
            self._require_full("the residual", residual)
        while val(residual).dtype != dtype and base(residual) is not residual:
            source = unview(residual)
            residual = source.args[0] if source.target == CONVERT else source
        if val(residual).dtype != dtype:
            raise Left(f"the residual is {val(residual).dtype}, and what is reduced {dtype}")
        return residual

    def _require_full(self, what: str, node: fx.Node) -> None:
        def replicated(product: fx.Node) -> bool:
            linear = as_linear(product, lambda rows: True)
            return linear is not None and self._declared(linear)

        full = [total for total, carried in self.carried.items() if not carried.scattered_before]
        differs = rank_dependent(node, self.workspace.group_name, replicated, full, self.own)
        if differs is None:
            return
        made = f"{what} is made of {differs.target} ({module_of(differs) or differs.name})"
        if differs in self.own:
            raise Left(f"{made}, of which each rank has its own: a collective takes it, or what is computed from it")
        raise Left(
            f"{made}, which may differ between ranks: a partial sum, or a product with a weight that is not declared "
            f"replicated"
        )

    def _norm_weight(self, norm: Norm, scatters: bool) -> fx.Node:
        weight = norm.weight
        for node in self.graph.nodes:
            if node is weight:
                break
            if node is norm.rows:
                raise Left(f"the norm's weight is computed ({weight.target}) after the sum that it norms")
        if not scatters:
            self._require_full("the norm's weight", weight)
        if not val(weight).is_contiguous():
            raise Left(f"the norm's weight has strides {val(weight).stride()}")
        return weight

    # ---- projections ----

    def _declared(self, linear: Linear) -> bool:
        return self.replicated(linear.where, tuple(hint(size) for size in val(linear.weight).shape))

    def _projections(self, outputs: list[fx.Node], norm: Norm, site: Site) -> list[Linear]:
        """The linears that are all that reads the norm, when this rank's rows may go through them before the gather."""
        users = [user for output in outputs for user in readers(output)]
        linears = [as_linear(user, lambda rows: unview(rows) in outputs) for user in users]
        if not users or None in linears:
            return []
        hidden_size = hint(val(norm.rows).shape[-1])
        widths = [hint(linear.width) for linear in linears]
        if sum(widths) >= hidden_size:
            return []
        problems = [self._why_not_projected(linear) for linear in linears]
        if any(problems):
            site.notes.append(f"not projected before the gather, because {', '.join(filter(None, problems))}")
            return []
        if len(linears) > 1:
            site.notes.append(f"{len(linears)} projections are gathered one by one; merged, they would be one call")
        return linears

    def _why_not_projected(self, linear: Linear) -> str:
        weight = val(linear.weight)
        if not self._declared(linear):
            return f"{linear.name} is not declared replicated"
        if weight.stride(-1) != 1 or not same(weight.stride(0), weight.shape[1]):
            return f"the weight of {linear.name} has strides {weight.stride()}"
        return ""

    def _project(self, linear: Linear, rows: fx.Node, partial: fx.Node) -> None:
        old = linear.output
        with self.graph.inserting_before(old):
            bias = {"bias": linear.bias} if linear.bias is not None else {}
            arguments = (rows, linear.weight, self._num_tokens(partial), self.group)
            old.replace_all_uses_with(self._call(old, _ops.qkv_a_proj_ag.default, *arguments, **bias))

    # ---- afterwards ----

    def _finish(self) -> None:
        """Residuals are gathered where something else reads them, and what nobody reads any more is taken out."""
        for node in self.dead:
            self._erase(node)
        for carried in reversed(self.carried.values()):  # a sum is read by the next one, until that is gone
            self._erase(carried.total)
            total = carried.total
            if not total.users:
                continue
            first = next(node for node in self.graph.nodes if node in total.users)
            with self.graph.inserting_before(first):
                rows = carried.rows
                if not carried.scattered_before:
                    num_tokens = self._num_tokens(carried.partial)
                    rows = self._call(total, _ops.all_gather_rows.default, rows, num_tokens, self.group)
                    carried.site.notes.append(f"its residual is gathered for {names(readers(total))}")
                    carried.site.collectives_after += 1
                    width = hint(val(rows).shape[-1])
                    carried.site.bytes_after += width * val(rows).dtype.itemsize * self.share
                rows = self._shaped(rows, total, carried.scattered_before, carried.partial)
                if val(rows).dtype != val(total).dtype:
                    rows = self._call(total, CONVERT, rows, val(total).dtype)
            total.replace_all_uses_with(rows)
            self._erase(total)

    def _erase(self, node: fx.Node) -> None:
        stack = [node]
        while stack:
            node = stack.pop()
            ours = node.target in (c10d.wait_tensor.default, *_REDUCTIONS)
            if node.users or node.op != "call_function" or node._erased or (node.is_impure() and not ours):
                continue
            inputs = node.all_input_nodes
            self.graph.erase_node(node)
            stack += inputs

    # ---- nodes ----

    def _call(self, like: fx.Node | Norm, target, *arguments, **keywords) -> fx.Node:
        """A new node, traced to where `like` comes from."""
        source = like.output if isinstance(like, Norm) else like
        node = self.graph.call_function(target, arguments, keywords)
        node.meta |= {key: source.meta[key] for key in ("nn_module_stack", "stack_trace") if key in source.meta}
        given, options = torch.utils._pytree.tree_map_only(fx.Node, val, (arguments, keywords))
        with self.fake_mode:
            node.meta["val"] = target(*given, **options)
        return node

    def _item(self, result: fx.Node, index: int) -> fx.Node:
        node = self.graph.call_function(operator.getitem, (result, index))
        node.meta |= {**result.meta, "val": val(result)[index]}
        return node

    def _flat(self, node: fx.Node, norm: Norm) -> fx.Node:
        """The node's rows in two dimensions."""
        while val(node).dim() != 2 and passes_rows_on(node):
            node = node.args[0]
        if val(node).dim() == 2:
            return node
        return self._call(node, aten.reshape.default, node, [-1, self.shapes[norm.rows][-1]])

    def _contiguous(self, norm: Norm, node: fx.Node) -> fx.Node:
        tensor = val(node)
        if tensor.stride(-1) == 1 and same(tensor.stride(0), tensor.shape[1]):
            return node
        return self._call(norm, aten.clone.default, node, memory_format=torch.contiguous_format)

    def _num_tokens(self, rows: fx.Node) -> int | fx.Node:
        size = val(rows).shape[0]
        return size if isinstance(size, int) else self._call(rows, aten.sym_size.int, rows, 0)

    def _shaped(self, rows: fx.Node, like: fx.Node, scattered: bool, partial: fx.Node) -> fx.Node:
        """`rows` in the shape of the node that they replace."""
        shape = val(like).shape
        if len(shape) == 2 and (not scattered or same(val(rows).shape[0], shape[0])):
            return rows
        if not scattered:
            return self._call(like, aten.reshape.default, rows, self.shapes[like])
        # The count is the same, as the tokens divide; torch does not see it, and would guard on it.
        num_rows = self._call(like, operator.floordiv, self._num_tokens(partial), self.workspace.world_size)
        width = self.shapes[like][-1]
        return self._call(like, aten.as_strided.default, rows, [num_rows, width], [width, 1], 0)

    def _shape(self, node: fx.Node, scattered: bool) -> list[int | fx.Node]:
        """The node's sizes as arguments: numbers, inputs of the graph, and -1 for one that is neither."""
        inputs = [each for each in self.graph.nodes if each.op == "placeholder" and isinstance(val(each), torch.SymInt)]
        by_symbol = {val(each).node.expr: each for each in inputs}
        sizes = [size if isinstance(size, int) else by_symbol.get(size.node.expr, -1) for size in val(node).shape]
        if sizes[-1] == -1 or (not scattered and len(sizes) != 2 and sizes.count(-1) > 1):
            raise Left(f"the sizes {tuple(val(node).shape)} are not inputs of the graph")
        return sizes

    # ---- words ----

    def _site(self, where: str, reductions: list[Reduction], form: str, because: str = "") -> Site:
        received = sum(self._received(reduction) for reduction in reductions)
        count = len(reductions)
        return Site(where, form, because=because, collectives_before=count, bytes_before=received,
                    collectives_after=count, bytes_after=received)  # fmt: skip

    def _received(self, reduction: Reduction) -> float:
        tensor = val(reduction.partial)
        if tensor.dim() == 0:
            return 0.0
        row = (hint(tensor.shape[-1]) or 0) * tensor.dtype.itemsize * self.share
        return row if reduction.scatters else 2 * row

    def _why_no_norm(self, reduction: Reduction) -> str:
        if reduction.wait is None:
            return "what it returns is not waited for once, and then read"
        users = readers(reduction.read)
        others = [arg for user in users if user.target == aten.add.Tensor for arg in user.args if is_tensor(arg)]
        if any(val(arg).dim() == 1 for arg in others):
            return "a bias is added to its sum: have one rank add it to its partial sum"
        return f"no RMSNorm of its sum was found: it is read by {names(users) or 'nobody'}"


def _form(total: Sum) -> str:
    reductions = " + ".join("reduce_scatter" if one.scatters else "all_reduce" for one in total.reductions)
    return f"{reductions} ->{' + residual ->' * bool(total.others)} RMSNorm"


_REDUCTIONS = (c10d.all_reduce.default, c10d.reduce_scatter_tensor.default)
