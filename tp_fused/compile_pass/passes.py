"""The pass as Inductor knows it."""

import functools
import hashlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import torch.distributed as dist
from torch import fx
from torch._inductor import config

from .. import checks, compiled, groups
from .._version import __version__
from . import inductor
from .nodes import val
from .report import GraphReport, Report
from .rewrite import Rewriter
from .sums import find_reductions

_log = logging.getLogger("tp_fused.compile_pass")

# Modules whose weight all ranks hold whole, in every engine that splits MLA attention by heads.
MLA_PROJECTIONS = ("q_a_proj", "kv_a_proj_with_mqa", "fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa")


class TpFusedPass(inductor.GraphPass):
    """Rewrites the reductions of a graph into ops: `torch.compile(model, options=TpFusedPass(group).options)`.

    group: whose reductions; it has a workspace (`tp_fused.init`). replicated: which linears all ranks hold the same
    weight of, which a graph does not tell. Names of modules (a linear is one when any part of its path has such a
    name), or a function of the path and the weight's shape. Of the others every rank is taken to hold a shard.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        replicated: Iterable[str] | Callable[[str, tuple[int, int]], bool] = MLA_PROJECTIONS,
    ):
        if group is None and dist.group.WORLD is None:
            raise ValueError("no group given and torch.distributed is not initialised")
        self.group = groups.process_group(group if group is not None else dist.group.WORLD)
        if not groups.workspaces_of(self.group.group_name):
            groups.get_workspace(self.group.group_name, groups.type_of(None))  # which says what is missing
        self._names = None if callable(replicated) else _module_names(replicated)
        self._replicated = replicated if callable(replicated) else self._has_name
        self._graphs: list[GraphReport] = []
        self._cached_before = _cache_hits()

    @property
    def options(self) -> dict:
        """What `torch.compile` takes as `options` to run this pass."""
        return {"post_grad_custom_pre_pass": self}

    def report(self) -> Report:
        return Report(list(self._graphs), _cache_hits() - self._cached_before)

    # ---- Inductor's side ----

    def __call__(self, graph: fx.Graph, is_inference: bool | None = None) -> None:
        self._graphs.append(self._rewritten(graph, inductor.is_inference(is_inference)))
        _log.info("%s", self._graphs[-1])

    def uuid(self):
        """What a cached graph depends on besides itself; None has nothing cached, where `replicated` is a function."""
        if self._names is None:
            return None
        rank, world_size = self.group.rank(), self.group.size()
        made = groups.workspaces_of(self.group.group_name)
        sizes = tuple((w.device_type, w.backend, w.max_num_tokens, w.row_bytes) for w in made)
        return (_sources(), __version__, self.group.group_name, rank, world_size, self._names, sizes)

    def __deepcopy__(self, memo) -> "TpFusedPass":
        """Itself: torch copies its configuration, and a process group cannot be copied."""
        return self

    def _rewritten(self, graph: fx.Graph, is_inference: bool) -> GraphReport:
        reductions = find_reductions(graph)
        if not reductions:
            return GraphReport([], _no_reduction(graph))
        if not is_inference:
            return GraphReport([], "the graph is traced for training: call the model under torch.no_grad()")
        device = val(next(iter(reductions))).device
        try:
            workspace = groups.get_workspace(self.group.group_name, device)
        except ValueError as error:
            return GraphReport([], str(error))
        compiled.tracing()
        pinned = compiled.pin(workspace.group_name, workspace.rank, workspace.world_size)
        return Rewriter(graph, workspace, pinned, self._replicated).run()

    def _has_name(self, path: str, shape: tuple[int, int]) -> bool:
        return not set(self._names).isdisjoint(path.split("."))


def _module_names(given) -> tuple[str, ...]:
    names = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [None]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"replicated must be names of modules, or a function of a module's path and its weight's shape, got "
            f"{checks.described(given)}"
        )
    return tuple(sorted(set(names)))


def _no_reduction(graph: fx.Graph) -> str:
    targets = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    others = sorted(target for target in targets if "all_reduce" in target or "reduce_scatter" in target)
    told = f": {', '.join(others)} is not one" if others else ""
    return f"it has no all_reduce and no reduce_scatter_tensor of torch.ops._c10d_functional{told}"


@functools.cache
def _sources() -> str:
    """Of the files that decide what a graph becomes."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _cache_hits() -> int:
    from torch._dynamo.utils import counters

    return counters["inductor"]["fxgraph_cache_hit"]


# ---- for all that is compiled ----

_installed: list[TpFusedPass] = []


def install(group: dist.ProcessGroup | None = None, **options) -> TpFusedPass:
    """From here on, `torch.compile` rewrites the reductions of `group`, in every model. Options as `TpFusedPass` has.

    Beside passes that are set already, after these. To be called on every rank, before the models are called first.
    """
    added = TpFusedPass(group, **options)
    others = [one for one in _installed if one.group.group_name == added.group.group_name]
    if others:
        raise ValueError(f"a pass is installed for group {added.group.group_name!r} already; uninstall() it first")
    config.post_grad_custom_pre_pass = inductor.setting_of([*_passes(), added])
    _installed.append(added)
    return added


def uninstall() -> None:
    """Takes out what `install` has put in. Code that is compiled stays as it is."""
    kept = [one for one in _passes() if one not in _installed]
    config.post_grad_custom_pre_pass = inductor.setting_of(kept)
    _installed.clear()


def report() -> Report:
    """What the installed passes have done so far. `print(report())` has a line for every reduction."""
    reports = [one.report() for one in _installed]
    hits = max((one.from_cache for one in reports), default=0)
    return Report([graph for one in reports for graph in one.graphs], hits)


def _passes() -> list:
    """Those that are set."""
    return inductor.passes_of(config.post_grad_custom_pre_pass)
