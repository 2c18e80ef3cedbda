"""What the tests of the pass run on ranks: compile with Inductor's front end, run, look at the graph that is left."""

import contextlib

import torch
import torch._inductor.compile_fx as inductor
import torch.distributed as dist
from ranks import workspace
from torch._inductor.virtualized import V

from tp_fused import compile_pass


class FrontEnd:
    """A backend of torch.compile: Inductor up to its last graph pass. The graph is run as it is, no code is generated.

    What the pass sees and leaves is what it is under `torch.compile(model)`, and no C++ compiler is waited for. Without
    a pass as an option, those run that Inductor's own settings have.
    """

    def __init__(self, compile_pass=None):
        self.options = compile_pass.options if compile_pass is not None else None
        self.graphs: list[torch.fx.Graph] = []

    def __call__(self, module, inputs):
        return inductor.compile_fx(module, inputs, inner_compile=self._compile, config_patches=self.options)

    def _compile(self, module, inputs, is_inference=False, **_):
        inductor.view_to_reshape(module)
        with torch.no_grad():
            fake_mode = inductor.fake_tensor_prop(module, inputs)
        with V.set_fake_mode(fake_mode):
            inductor._recursive_post_grad_passes(module, is_inference=is_inference)
        module.graph.lint()
        self.graphs.append(module.graph)

        def run(arguments):
            return module(*arguments)

        run._boxed_call = True
        return run


@contextlib.contextmanager
def rank_of_its_own():
    """Nothing is found in a cache, and nothing of an earlier test is left; products are whole on one thread."""
    torch._dynamo.reset()
    patches = {"fx_graph_cache": False, "compile_threads": 1, "cpp.vec_isa_ok": True}
    with (
        torch._inductor.config.patch(patches),
        torch._functorch.config.patch(enable_autograd_cache=False),
        torch.no_grad(),
    ):
        yield


def calls(graph: torch.fx.Graph) -> list[str]:
    """The collectives of a graph, in order: torch's and the ops."""
    names = []
    for node in graph.nodes:
        module = getattr(node.target, "namespace", "")
        if module in ("tp_fused", "_c10d_functional") and "wait_tensor" not in str(node.target):
            names.append(node.target.__name__.split(".")[0])
    return names


def received(graph: torch.fx.Graph, num_tokens: int, world_size: int) -> float:
    """Bytes that a rank receives at least, counted from the shapes in the graph: of `num_tokens`, all static."""
    total = 0.0
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "").split(".")[0]
        if name in ("all_reduce", "all_reduce_", "rs_rmsnorm_ag", "rs_rmsnorm"):
            part = node.args[0].meta["val"]
            total += (1 if name == "rs_rmsnorm" else 2) * part.numel() * part.itemsize
        elif name in ("qkv_a_proj_ag", "all_gather_rows"):
            total += node.meta["val"].numel() * node.meta["val"].itemsize
    return total * (world_size - 1) / world_size / num_tokens


@contextlib.contextmanager
def compiled(module, backend: str = "front end", dynamic=None, sizes=None, made=compile_pass.TpFusedPass, **options):
    """(the module, compiled with the pass; the pass; the graphs) with a workspace. Every rank is to enter."""
    with rank_of_its_own(), workspace("cpu", timeout_s=100.0, **{"max_num_tokens": 64, **(sizes or {})}):
        rewriting = made(**options)
        if backend == "inductor":
            graphs = []
            options = rewriting.options | {"post_grad_custom_post_pass": lambda graph: graphs.append(copied(graph))}
            function = torch.compile(module, fullgraph=True, dynamic=dynamic, options=options)
        else:
            front = FrontEnd(rewriting)
            graphs = front.graphs
            function = torch.compile(module, fullgraph=True, dynamic=dynamic, backend=front)
        yield function, rewriting, graphs


def copied(graph: torch.fx.Graph) -> torch.fx.Graph:
    """As it is now: Inductor goes on with the other one."""
    copy = torch.fx.Graph()
    copy.graph_copy(graph, {})
    return copy


def reduced(rows, group=None):
    """All-reduced in place, as engines do it."""
    dist.all_reduce(rows, group=group)
    return rows


def random(name: str, *shape: int, dtype=torch.float32, scale: float = 1.0, own: bool = False) -> torch.Tensor:
    """The same on all ranks; `own`: another one on each."""
    seed = sum(map(ord, name)) * 8 + (dist.get_rank() + 1 if own else 0)
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
