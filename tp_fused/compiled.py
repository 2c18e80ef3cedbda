"""What torch's compilers are told of the ops, so that compiled code does on every rank what eager code does.

1. Calls keep their program order: every op is an ordered effect. Ranks see other row counts, so a compiler may fuse,
   drop and move other things on each; calls in another order would add up sums of different calls. Under Inductor
   torch's own collectives keep their place among them.
2. Code belongs to one rank: a graph that the wrappers are traced into names the group with its rank and world size
   ("0#1/2"), and the names of all workspaces are part of the key of torch's compile caches.
3. A row count that torch would guard on, 0 or 1, is a symbol of its own (`free_size`).
"""

import functools
import re
import sys
import types
import weakref

import torch
from torch._higher_order_ops import effects
from torch.fx.node import has_side_effect

_ops: list[torch._ops.OpOverload] = []  # those in order

# ---- order ----


def keep_order(op: torch._ops.OpOverload) -> None:
    """Compiled graphs make calls of this op, and of all others that are given here, in program order."""
    # Private, but torch has no public way (of torch.library it is private as well); the same from 2.10 on.
    register = getattr(effects, "_register_effectful_op", None)
    ordered = getattr(getattr(effects, "_EffectType", None), "ORDERED", None)
    if register is not None and ordered is not None:
        register(op, ordered)
        _ops.append(op)
    # A graph without effects must not lose the call either: the other ranks wait for it.
    has_side_effect(op)


def tracing() -> None:
    """What has to be done before a graph with an op is compiled. Fake kernels call it: nobody else sees every graph."""
    if not _ops:
        raise RuntimeError(
            f"torch {torch.__version__} has no torch._higher_order_ops.effects._register_effectful_op, which keeps "
            f"the ops in order: tp_fused cannot be compiled with it, only run eagerly"
        )
    _tag_caches()
    # Neither is imported for this: to import Inductor takes seconds, and whoever compiles with it has done so.
    config, lowering = (sys.modules.get(f"torch._inductor.{name}") for name in ("config", "lowering"))
    if config is not None:
        # Otherwise torch caches no graph that has effects. It can: the graph says all that the effect is.
        name = f"{effects.with_effects.__module__}.{effects.with_effects.__name__}"
        config.unsafe_marked_cacheable_functions.setdefault(name, torch.__version__)
    if lowering is not None and _ops[0] not in lowering.lowerings:
        for op in _ops:
            lowering.lowerings[op] = _lowering(op, lowering)
        for op, lower in list(lowering.lowerings.items()):
            if getattr(op, "namespace", "") == "_c10d_functional" and "wait_tensor" not in str(op):
                lowering.lowerings[op] = _in_line(lower)


_last_calls = weakref.WeakKeyDictionary()  # the buffer that the last call in a graph of Inductor's made


def _follow(graph, before: int) -> None:
    """The calls among the operations from number `before` on come after the last one before them."""
    from torch._inductor import ir

    for kernel in graph.operations[before:]:
        if isinstance(kernel, ir.FallbackKernel):
            if graph in _last_calls:
                graph.additional_buffer_deps[kernel.get_operation_name()].add(_last_calls[graph])
            _last_calls[graph] = kernel.get_name()


def _in_line(lower):
    """The lowering of a collective of torch's, which keeps its place among the calls of the ops, too.

    On the CPU a rank that waits in an op does not start the collective in which its peers wait for it.
    """

    @functools.wraps(lower)
    def in_line(*arguments, **keywords):
        from torch._inductor.virtualized import V

        before = len(V.graph.operations)
        result = lower(*arguments, **keywords)
        _follow(V.graph, before)
        return result

    return in_line


def _lowering(op: torch._ops.OpOverload, lowering):
    """Inductor's for an op that runs as it is.

    Up to torch 2.13 its own one, for ops with effects, forgets the layout that inputs have to have, and files the
    order under the names of buffers, where the scheduler looks for names of operations.
    """
    from torch._inductor.virtualized import V

    call = lowering.fallback_handler(op, add_to_fallback_set=False)

    def lower(*arguments, **keywords):
        graph = V.graph
        node = graph.current_node
        if node.target is effects.with_effects:  # its arguments are a token, the op and the op's
            node = types.SimpleNamespace(args=node.args[2:], kwargs=node.kwargs)
            arguments, keywords = lowering.constrain_to_fx_strides(node, *arguments, **keywords)
            _refuse_free_sizes(op, graph)
        before = len(graph.operations)
        result = call(*arguments, **keywords)
        _follow(graph, before)
        return result

    return lower


def _refuse_free_sizes(op: torch._ops.OpOverload, graph) -> None:
    """Up to torch 2.13, Inductor takes a symbol that an op with effects has made for a size of another output."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols  # and sympy, a third of a second

    sizes = [value.shape[0] for value in graph.current_node.meta["val"][1:]]
    if any(free_unbacked_symbols(size) - graph.bound_unbacked_symbols for size in sizes):
        raise RuntimeError(
            f"{op}: Inductor cannot compile a dynamic token count for a rank that owns fewer than two rows; call the "
            f"compiled function with 2 * world_size tokens or more first, or compile few tokens with dynamic=False"
        )


# ---- whose code it is ----

_tagged = ""  # what was added to torch's cache tag
_names: list[str] = []  # of all workspaces, pinned


def pin(group_name: str, rank: int, world_size: int) -> str:
    """The group's name in graphs that are traced on this rank."""
    return f"{group_name}#{rank}/{world_size}"


def unpin(name: str) -> tuple[str, int, int] | None:
    """(group_name, rank, world_size) of a pinned name."""
    match = re.fullmatch(r"(.*)#(0|[1-9][0-9]*)/([1-9][0-9]*)", name, re.DOTALL)
    return None if match is None else (match[1], int(match[2]), int(match[3]))


def add_workspace(name: str) -> None:
    """From here on, what torch compiles is cached for this rank of the group alone: `name` is pinned."""
    _names.append(name)
    _tag_caches()


def remove_workspace(name: str) -> None:
    _names.remove(name)
    _tag_caches()


def _tag_caches() -> None:
    """Makes our part of torch's cache tag what it should be, also where someone has set the tag since."""
    global _tagged
    wanted = "".join(f" tp_fused:{name}" for name in sorted(set(_names)))
    tag = torch.compiler.config.cache_key_tag
    if wanted != _tagged or wanted not in tag:
        torch.compiler.config.cache_key_tag = tag.replace(_tagged, "") + wanted
        _tagged = wanted


# ---- sizes ----


_free = weakref.WeakKeyDictionary()  # by torch's ShapeEnv, which belongs to a graph


def _takes_free_sizes(shape_env) -> bool:
    """Whether Dynamo traces, or has traced, this graph for a compiler that is known to take them."""
    if shape_env not in _free and "torch._dynamo.symbolic_convert" in sys.modules:
        translator = sys.modules["torch._dynamo.symbolic_convert"].InstructionTranslator.current_tx()
        name = getattr(translator.output.compiler_fn, "_compiler_name", None) if translator is not None else None
        _free[shape_env] = name in ("eager", "aot_eager")
    return _free.get(shape_env, False)


def free_size(num_tokens: int | torch.SymInt, size_of) -> int | torch.SymInt:
    """size_of(num_tokens), a row count, for a fake kernel.

    Of tensors without rows, or with one, torch takes other paths and guards on it: the graph would be compiled for
    this token count alone, which is an error where the caller asked for any (`mark_dynamic`). Then the size is a
    symbol of its own, which torch checks at run time where it has to equal another. A graph for more rows is compiled
    again for few. Inductor, which cannot have such symbols (`_refuse_free_sizes`), compiles for each such count, and
    torch raises where any was asked for; so it does on an export for fewer than 2 * world_size tokens.
    """
    size = size_of(num_tokens)
    if not isinstance(size, torch.SymInt) or not size.node.has_hint() or size.node.hint > 1:
        return size
    if not _takes_free_sizes(size.node.shape_env):
        return size
    return torch.library.get_ctx().new_dynamic_size()
