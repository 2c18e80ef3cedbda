"""Decoders made of transformers' modules, compiled with the pass, against eager mode; and Inductor as a whole."""

import itertools
import os

import pytest
import torch
import torch._dynamo.utils
import torch.distributed as dist
from compile_pass_ranks import calls, compiled, copied, random, received, reduced
from ranks import Pool, workspace
from torch._inductor import ir

from tp_fused import compile_pass

pytest.importorskip("transformers", reason="needs transformers (the test extra)")

import compile_pass_models as models

pytestmark = pytest.mark.preload("warm_compiler", "transformers")

SIZES = {"hidden_size": models.HIDDEN}
LAYER = ["rs_rmsnorm_ag"] * 3
PROJECTED = ["rs_rmsnorm", "qkv_a_proj_ag", "qkv_a_proj_ag"]
EXPERTS = [*PROJECTED, "rs_rmsnorm_ag", "rs_rmsnorm_ag"]
# The two reductions of the layer with experts, routed and shared, are one after.
MODELS = {
    "Llama": (LAYER + LAYER[1:], 5),
    "LlamaLayer": (LAYER, 3),
    "GemmaLayer": (LAYER, 3),
    "Deepseek": ([*PROJECTED, "rs_rmsnorm_ag", *EXPERTS], 6),
    "Experts": (EXPERTS, 4),
}


def tokens(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randint(models.VOCAB, (1, num_tokens), generator=generator), torch.arange(num_tokens)[None]


def run(kind: str, hook: str, backend: str, token_counts: list[int]) -> tuple[list, dict]:
    """Runs on a rank: the collectives of every graph, and what the report adds up."""
    model = getattr(models, kind)(getattr(models, hook)).eval()
    with compiled(model, backend, sizes=SIZES) as (function, rewriting, graphs):
        for num_tokens in token_counts:
            given = tokens(num_tokens)
            expected = model(*given)
            for tensor in given if num_tokens > 1 else ():
                torch._dynamo.mark_dynamic(tensor, 1)
            torch.testing.assert_close(function(*given), expected, rtol=1e-4, atol=1e-4)
        report = rewriting.report()
        assert not report.left, str(report)
        return [calls(graph) for graph in graphs], report.graphs[0].totals()


# Each model, form of all-reduce and number of ranks; and all that Inductor makes code of, as users have it.
RUNS = [
    (3, "GemmaLayer", "all_reduced", "front end"),
    (2, "LlamaLayer", "all_reduced_in_place", "inductor"),
    (2, "Experts", "all_reduced_in_place", "inductor"),
]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("world_size", "kind", "hook", "compiler"), RUNS)
def test_logits_equal_eager_ones(pool, kind, hook, compiler):
    """Token counts that the ranks cannot share out evenly, and fewer than there are ranks."""
    wanted, reductions = MODELS[kind]
    token_counts = [9, 2, 31] if compiler == "inductor" else [9, 2, 31, 1]
    for graphs, totals in pool.run(run, kind, hook, compiler, token_counts, timeout_s=600):
        assert graphs == [wanted] * (1 + (1 in token_counts))  # for any count, and for one token
        assert (totals["collectives_before"], totals["collectives_after"]) == (reductions, len(wanted))


def run_dynamic(kind: str) -> tuple[int, list, list[str]]:
    """Runs on a rank: dynamic=True makes symbols of the sizes of inputs, and of floats if torch is not told not to."""
    model = getattr(models, kind)().eval()
    with (
        compiled(model, dynamic=True, sizes=SIZES) as (function, rewriting, graphs),
        torch._dynamo.config.patch(specialize_float=True),
    ):
        for num_tokens in (9, 2, 31):
            given = tokens(num_tokens)
            torch.testing.assert_close(function(*given), model(*given), rtol=1e-4, atol=1e-4)
        return len(graphs), calls(graphs[0]), list(map(str, rewriting.report().left))


@pytest.mark.parametrize("kind", ["LlamaLayer", "Experts"])
@pytest.mark.parametrize("world_size", [2])
def test_all_is_dynamic(pool, kind):
    for seen in pool.run(run_dynamic, kind, timeout_s=290):
        assert seen == (1, MODELS[kind][0], [])


class Counting(compile_pass.TpFusedPass):
    """Counts the bytes of the graph that it is given, too."""

    def __call__(self, graph: torch.fx.Graph, is_inference: bool | None = None) -> None:
        self.before = copied(graph)
        super().__call__(graph, is_inference)


def run_static(kind: str, num_tokens: int) -> tuple:
    """Runs on a rank: the collectives; bytes a token without and with the pass, as counted and as reported."""
    model, names = getattr(models, kind)().eval(), list(compile_pass.MLA_PROJECTIONS)
    with compiled(model, sizes=SIZES, made=Counting, replicated=names) as (function, rewriting, graphs):
        given = tokens(num_tokens)
        torch.testing.assert_close(function(*given), model(*given), rtol=1e-4, atol=1e-4)
        totals = rewriting.report().graphs[0].totals()
        counted = [received(graph, num_tokens, dist.get_world_size()) for graph in (rewriting.before, graphs[0])]
        return calls(graphs[0]), counted, (totals["bytes_before"], totals["bytes_after"])


@pytest.mark.parametrize(("kind", "num_tokens"), [("Llama", 6), ("Deepseek", 6), ("Experts", 1)])
@pytest.mark.parametrize("world_size", [2])
def test_bytes(pool, kind, num_tokens):
    """Of all layers, with a number of tokens that does not change; one token, too, is counted as if shared out."""
    row = 4 * models.HIDDEN / 2
    columns = 4 * (models.Q_LORA + models.KV_LORA + models.ROPE) / 2
    wanted = {
        "Llama": (10 * row, 10 * row),
        "Deepseek": (12 * row, 8 * row + 2 * columns),
        "Experts": (8 * row, 5 * row + columns),
    }[kind]
    for graph, counted, reported in pool.run(run_static, kind, num_tokens, timeout_s=290):
        assert graph == MODELS[kind][0]
        assert counted == pytest.approx(wanted)
        assert reported == pytest.approx(wanted)


# ---- Inductor as a whole ----


def with_a_gather(x, residual, weight, up, down):
    """The second reduction is left, as its result is read alone; the residual is gathered, and may be so beside it."""
    kept = []
    for _ in range(3):
        residual = residual + reduced(x)
        rows = reduced((normed(residual, weight) @ up).relu() @ down)
        kept.append(rows * 2)
        residual = residual + rows
        x = normed(residual, weight) @ up @ down
    return kept, residual


def normed(rows, weight):
    return rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def run_with_a_gather(num_tokens: int) -> list[str]:
    """Runs on a rank: the calls that Inductor schedules, each of which has to wait for the one before it."""
    weights = 1 + random("weight", 64), random("up", 64, 40, scale=0.1), random("down", 40, 64, scale=0.1)
    given = random("x", num_tokens, 64, own=True), random("residual", num_tokens, 64, scale=0.1), *weights
    scheduled = []

    def look(nodes):
        calls = [node for node in nodes if isinstance(node.node, ir.FallbackKernel) and is_call(node.node)]
        for before, after in itertools.pairwise(calls):
            assert before.get_name() in after.ancestors, f"{after.node.op_overload} may come first"
        scheduled.extend(str(node.node.op_overload) for node in calls)
        return nodes

    with (
        compiled(with_a_gather, "inductor", sizes={"hidden_size": 64}) as (function, rewriting, _),
        torch._inductor.config.patch(_pre_fusion_custom_pass=look),
    ):
        expected = with_a_gather(given[0].clone(), *given[1:])
        torch.testing.assert_close(function(*given), expected, rtol=1e-3, atol=1e-3)
        report = rewriting.report()
        assert report.rewritten and report.left, str(report)
    return scheduled


def is_call(kernel) -> bool:
    name = str(kernel.op_overload)
    return name.startswith(("tp_fused.", "_c10d_functional.")) and "wait_tensor" not in name


@pytest.mark.timeout(600)
@pytest.mark.parametrize("world_size", [2])
def test_inductor_keeps_the_order_of_calls(pool):
    """Those of the ops and of torch's collectives: ranks that waited in different ones would wait for ever."""
    one, other = pool.run(run_with_a_gather, 9, timeout_s=400)
    assert one == other
    assert {name.split(".")[0] for name in one} == {"tp_fused", "_c10d_functional"}


# ---- caches ----


def cached(folder: str) -> tuple[int, int, str]:
    """Runs on a rank: sites that the pass rewrote, graphs from the cache, and the report."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    torch._inductor.config.compile_threads = 1
    x, residual, weight = random("x", 5, 64, own=True), random("residual", 5, 64), 1 + random("weight", 64)

    def program(x, residual, weight):
        total = residual + reduced(x * 2)
        return total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5) * weight

    with workspace("cpu", hidden_size=64, timeout_s=100.0), torch.no_grad():
        compile_pass.install()
        output = torch.compile(program, fullgraph=True)(x, residual, weight)
        report = compile_pass.report()
        compile_pass.uninstall()
        torch.testing.assert_close(output, program(x, residual, weight), rtol=1e-4, atol=1e-4)
    return len(report.rewritten), report.from_cache, str(report)


@pytest.mark.timeout(600)
def test_a_cache_that_ranks_share(tmp_path):
    """At the first start each rank runs its pass; at the second it finds its own code, and the report says so."""
    told = []
    for _ in range(2):
        with Pool(2) as pool:
            told.append(pool.run(cached, str(tmp_path), timeout_s=280))
    assert [(sites, hits) for sites, hits, _ in told[0]] == [(1, 0)] * 2
    for sites, hits, text in told[1]:
        assert (sites, hits) == (0, 1)
        assert "1 graphs came from torch's cache" in text
