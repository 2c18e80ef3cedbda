"""Compiled code belongs to the rank that it was traced on: caches, exported programs, packages; and few tokens."""

import os

import pytest
import torch
import torch._dynamo.utils
import torch.distributed as dist
from ranks import Pool, outcome, workspace

import tp_fused
from tp_fused import compiled, ops
from tp_fused.partition import row_count

pytestmark = pytest.mark.preload("warm_compiler")

# ---- caches and programs: what one process makes and another finds ----

NUM_TOKENS = 17  # rank 0 owns 9 rows, rank 1 owns 8


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """The first and the second start of a program, on two ranks each: they share a folder and nothing else."""
    folder = str(tmp_path_factory.mktemp("starts"))
    pools = {}

    def run(start: str, function, *arguments) -> list:
        if start not in pools or not pools[start].alive:
            pools[start] = Pool(2)
            pools[start].run(use_caches_of, f"{folder}/cache")
        return pools[start].run(function, folder, *arguments, timeout_s=300)

    yield run
    for pool in pools.values():
        pool.close()


def use_caches_of(folder: str) -> None:
    """Runs on a rank."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder


def layer(op, gather, input, weight):
    """Several ops, one rank's rows and those of all."""
    hidden, residual = op(input, None, weight)
    again, residual = op(input * 2, residual, weight)
    return hidden * 2 + residual, gather(again + 1, input.shape[0])


def wrapped(input, weight):
    return layer(tp_fused.rs_rmsnorm, tp_fused.all_gather_rows, input, weight)


def raw(input, weight):
    ops = torch.ops.tp_fused
    return layer(
        lambda input, residual, weight: ops.rs_rmsnorm(input, residual, weight, 1e-6, "0"),
        lambda rows, num_tokens: ops.all_gather_rows(rows, num_tokens, "0"),
        input,
        weight,
    )


class Layer(torch.nn.Module):
    def forward(self, input, weight):
        return wrapped(input, weight)


def inputs(num_tokens: int = NUM_TOKENS):
    generator = torch.Generator().manual_seed(dist.get_rank())
    return torch.randn(num_tokens, 256, generator=generator), torch.ones(256)


def compare(function, num_tokens: int = NUM_TOKENS) -> None:
    for output, expected in zip(function(*inputs(num_tokens)), wrapped(*inputs(num_tokens)), strict=True):
        assert output.shape == expected.shape, f"{tuple(output.shape)} instead of {tuple(expected.shape)}"
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def compile_and_compare(folder: str, calls: str, shapes: str) -> tuple[int, int]:
    """Runs on a rank: how many graphs torch found in its cache, and how many not."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile({"raw": raw, "wrapped": wrapped}[calls], fullgraph=True)

    def call(input, weight):
        if shapes == "dynamic":
            torch._dynamo.mark_dynamic(input, 0)
        return compiled(input, weight)

    with workspace("cpu", timeout_s=200.0):
        compare(call)
        if shapes == "dynamic":
            compare(call, 40)
    found = torch._dynamo.utils.counters["inductor"]
    return found["fxgraph_cache_hit"], found["fxgraph_cache_miss"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("shapes", ["static", "dynamic"])
@pytest.mark.parametrize("calls", ["wrapped", "raw"])
def test_a_warm_cache_gives_a_rank_its_own_code(starts, calls, shapes):
    """Right results at both starts are asserted on the ranks."""
    assert starts("first", compile_and_compare, calls, shapes) == [(0, 1), (0, 1)]
    assert starts("second", compile_and_compare, calls, shapes) == [(1, 0), (1, 0)]


def export(folder: str, shapes: str) -> None:
    """Runs on a rank: a program, and on rank 0 a package of it."""
    own = f"{folder}/{shapes}-{dist.get_rank()}"
    dynamic = {"input": {0: torch.export.Dim("num_tokens", min=4, max=64)}, "weight": None}
    with workspace("cpu", timeout_s=200.0):
        program = torch.export.export(Layer(), inputs(), dynamic_shapes=dynamic if shapes == "dynamic" else None)
        compare(program.module())
        torch.export.save(program, f"{own}.pt2")
        if shapes == "static":  # one package is enough: it takes seconds of a C++ compiler
            return
        if dist.get_rank() == 1:  # without it rank 0 could not try its package
            return compare(wrapped)
        # Headers are compiled for a wrapper and for kernels, seconds each; here is one of both.
        quick = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}
        path = f"{own}-aoti.pt2"
        package = torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=quick)
        compare(torch._inductor.aoti_load_package(package))


def load(folder: str, shapes: str) -> tuple[str, str]:
    """Runs on a rank: what the other rank's program tells it, and rank 0's package; its own serve it."""

    def refusal(program) -> str:
        error, _ = outcome(program, *inputs())
        return f"{type(error).__name__}: {error}"

    rank, package = dist.get_rank(), ""
    with workspace("cpu", timeout_s=200.0):
        own, other = (torch.export.load(f"{folder}/{shapes}-{of_rank}.pt2").module() for of_rank in (rank, 1 - rank))
        compare(own)
        program = refusal(other)
        if shapes == "dynamic":
            loaded = torch._inductor.aoti_load_package(f"{folder}/{shapes}-0-aoti.pt2")
            compare(loaded if rank == 0 else wrapped)
            package = refusal(loaded) if rank == 1 else ""
    return program, package


@pytest.mark.timeout(900)
@pytest.mark.parametrize("shapes", ["static", "dynamic"])
def test_a_program_is_of_one_rank(starts, shapes):
    """Exported, and as a package of AOTInductor."""
    starts("first", export, shapes)
    for rank, (program, package) in enumerate(starts("second", load, shapes)):
        message = f"this graph was traced for rank {1 - rank} of 2 of group '0'; this process is rank {rank} of 2"
        assert program == f"ValueError: {message}"
        if shapes == "dynamic" and rank == 1:  # what passes the C functions of a package is a RuntimeError
            assert package.startswith("RuntimeError") and message in package


# ---- names ----


def ask_by_name(device: str) -> list:
    """Runs on a rank: a call by the names that graphs of both ranks contain."""
    answers = []
    name, rank = dist.group.WORLD.group_name, dist.get_rank()
    rows = torch.ones(4, 256, device=device)
    with workspace(device, device):
        own = compiled.pin(name, rank, 2)
        answers.append(torch.ops.tp_fused.reduce_scatter_rows(rows, own).unique().tolist())
        for other in (compiled.pin(name, 1 - rank, 2), compiled.pin(name, rank, 3), compiled.pin("none", rank, 2)):
            with pytest.raises(ValueError) as error:
                torch.ops.tp_fused.reduce_scatter_rows(rows, other)
            answers.append(str(error.value))
    return answers


@pytest.mark.parametrize("world_size", [2])
def test_names_in_graphs(pool, device):
    for rank, (own, other, larger, unknown) in enumerate(pool.run(ask_by_name, device)):
        here = f"this process is rank {rank} of 2"
        assert own == [2.0]
        assert other == f"this graph was traced for rank {1 - rank} of 2 of group '0'; {here}"
        assert larger == f"this graph was traced for rank {rank} of 3 of group '0'; {here}"
        assert unknown.startswith("group 'none' has no workspace")


def test_a_pinned_name_is_written_in_one_way():
    """The native kernels know that one."""
    assert compiled.unpin(compiled.pin("0", 1, 12)) == ("0", 1, 12)
    assert [compiled.unpin(name) for name in ("0#01/2", "0#1/02", "0#\u0661/2", "0#1/0")] == [None] * 4


def natively_by_pinned_name(device: str) -> None:
    """Runs on a rank: what a compiled graph calls does not enter the interpreter."""
    name = compiled.pin(dist.group.WORLD.group_name, dist.get_rank(), dist.get_world_size())
    with workspace(device, device), pytest.MonkeyPatch.context() as patch:
        patch.delattr(ops, "get_workspace")
        torch.ops.tp_fused.reduce_scatter_rows(torch.ones(4, 256, device=device), name)


@pytest.mark.parametrize("world_size", [2])
def test_pinned_names_are_served_natively(pool, device):
    pool.run(natively_by_pinned_name, device)


def names_in_the_graph(device: str, group: str | None) -> list[str]:
    """Runs on a rank: what the wrapper puts into a graph."""
    torch._dynamo.reset()
    seen = []

    def look(graph, _):
        seen.extend(node.args[-1] for node in graph.graph.nodes if "reduce_scatter_rows" in str(node.target))
        return graph.forward

    given = dist.group.WORLD.group_name if group == "name" else dist.group.WORLD if group == "group" else None
    with workspace(device, device):
        torch.compile(lambda rows: tp_fused.reduce_scatter_rows(rows, given), backend=look, fullgraph=True)(
            torch.ones(4, 256, device=device)
        )
    return seen


@pytest.mark.parametrize("group", [None, "name", "group"])
@pytest.mark.parametrize("world_size", [2])
def test_wrappers_pin_the_name_while_they_are_traced(pool, device, group):
    assert pool.run(names_in_the_graph, device, group) == [["0#0/2"], ["0#1/2"]]


def cache_tags(device: str) -> list[str]:
    """Runs on a rank: torch's tag before, with a workspace, with another set by the user since, and after."""
    config = torch.compiler.config
    tags = [config.cache_key_tag]
    with config.patch(cache_key_tag="mine"):
        with workspace(device, device):
            tags.append(config.cache_key_tag)
            config.cache_key_tag = "other"
            torch.compile(tp_fused.reduce_scatter_rows, backend="eager")(torch.ones(4, 256, device=device))
            tags.append(config.cache_key_tag)
        tags.append(config.cache_key_tag)
    return tags


@pytest.mark.parametrize("world_size", [2])
def test_cache_tag(pool, device):
    for rank, tags in enumerate(pool.run(cache_tags, device)):
        own = f" tp_fused:0#{rank}/2"
        assert tags == ["", f"mine{own}", f"other{own}", "other"]


# ---- few tokens ----


def few_tokens(device: str, compiler: str, token_counts: list[int]) -> int:
    """Runs on a rank: compiled at the first token count, right at all; how many graphs were made."""
    torch._dynamo.reset()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    weight = torch.ones(256, device=device)

    def step(input, weight):
        hidden, residual = tp_fused.rs_rmsnorm(input, None, weight)
        again, residual = tp_fused.rs_rmsnorm(input * 2, residual, weight)
        return hidden + again, residual * 2, tp_fused.all_gather_rows(hidden - 1, input.shape[0])

    torch._dynamo.utils.counters.clear()
    function = torch.compile(step, fullgraph=True, backend=compiler)
    with workspace(device, device, timeout_s=100.0):
        for num_tokens in token_counts:
            input = torch.randn(num_tokens, 256, generator=torch.Generator().manual_seed(rank)).to(device)
            expected = step(input, weight)
            if compiler != "inductor":
                torch._dynamo.mark_dynamic(input, 0)
            outputs = function(input, weight)
            assert len(outputs[0]) == row_count(num_tokens, rank, world_size)
            for output, wanted in zip(outputs, expected, strict=True):
                assert (output.shape, output.stride()) == (wanted.shape, wanted.stride())
                torch.testing.assert_close(output, wanted, rtol=0, atol=1e-5)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("token_counts", [[2, 3, 5, 64], [3, 2, 7]], ids=str)
@pytest.mark.parametrize("world_size", [3])
def test_fewer_tokens_than_ranks(pool, device, token_counts):
    """A rank that owns no rows, or one, compiles once for any number of them."""
    assert pool.run(few_tokens, device, "aot_eager", token_counts, timeout_s=400) == [1, 1, 1]


@pytest.mark.parametrize("world_size", [3])
def test_few_tokens_after_many(pool, device):
    """A rank that has compiled for several rows does so once more for none or one, and not again after that."""
    for graphs in pool.run(few_tokens, device, "aot_eager", [64, 2, 5, 3, 4, 32], timeout_s=200):
        assert graphs <= 2


@pytest.mark.parametrize("world_size", [3])
def test_few_tokens_with_inductor(pool, device):
    """Dynamic as torch thinks fit."""
    pool.run(few_tokens, device, "inductor", [3, 2, 9], timeout_s=200)
