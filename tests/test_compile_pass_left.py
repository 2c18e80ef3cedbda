"""What tp_fused.compile_pass leaves as it is: the reason is told, and results are those of eager code."""

import re

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from compile_pass_ranks import calls, compiled, random, reduced
from ranks import outcome, workspace

from tp_fused import compile_pass

pytestmark = pytest.mark.preload("warm_compiler")

HIDDEN, NUM_TOKENS = 64, 6
EPS = 1e-5


def norm(rows, weight, dtype=None):
    wide = rows.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype or rows.dtype)


def all_reduced(x, op="sum", group=None):
    return funcol.wait_tensor(funcol.all_reduce(x, op, group or dist.group.WORLD))


# ---- the programs: of (a partial sum, the residual, a weight) ----


def another_group(x, residual, weight):
    return norm(residual + all_reduced(x, group=_other_group()), weight)


def maximum(x, residual, weight):
    return norm(residual + all_reduced(x, "max"), weight)


def read_elsewhere(x, residual, weight):
    x = all_reduced(x)
    return norm(residual + x, weight), x * 2


def not_waited_for(x, residual, weight):
    x = torch.ops._c10d_functional.all_reduce(x, "sum", dist.group.WORLD.group_name)
    later = torch.ops._c10d_functional.wait_tensor(x)
    return norm(residual + later, weight), later, torch.ops._c10d_functional.wait_tensor(x)


def wide_output(x, residual, weight):
    return norm(residual + all_reduced(x), weight.float())


def three_summands(x, residual, weight):
    return norm(residual + all_reduced(x) + residual.tanh(), weight)


def partial_residual(x, residual, weight):
    return norm(residual @ residual.t() @ residual + all_reduced(x), weight)


def what_is_reduced(x, residual, weight):
    return norm(all_reduced(x) + x, weight)


def made_of_what_is_reduced(x, residual, weight):
    x = 2 * x
    return norm(all_reduced(x) + x.tanh(), weight)


def masked_by_what_is_reduced(x, residual, weight):
    return norm(all_reduced(x) + torch.where(x > 0, residual, 0), weight)


def source_of_what_is_reduced(x, residual, weight):
    return norm(all_reduced(x.softmax(-1).cumsum(0)) + x.tanh(), weight)


def product_with_itself(x, residual, weight):
    return norm(all_reduced(x @ x.t() @ x) + x, weight)


def what_is_gathered(x, residual, weight):
    gathered = funcol.all_gather_tensor(residual * 2, 0, _other_group())  # of the same ranks
    return norm(all_reduced(x) + residual, weight), gathered


def weight_of_a_rank(x, residual, weight):
    return norm(residual + all_reduced(x), weight * x[0])


def product_of_one_token(x, residual, weight):
    """As torch decomposes mm, where it is told to tune memory-bound ones."""
    columns = residual.t()[:, :, None].expand(HIDDEN, NUM_TOKENS, 3)[:, 0, :].tanh()
    product = (residual[:1, :, None] * columns[None]).sum(1)
    return norm(torch.cat([product] * 22, 1)[:, :HIDDEN] + all_reduced(x[:1]), weight)


def wide_residual(x, residual, weight):
    total = residual.float() * 1.5 + all_reduced(x).float()
    return norm(total, weight, x.dtype)


def layer_norm(x, residual, weight):
    return torch.nn.functional.layer_norm(residual + all_reduced(x), (HIDDEN,), weight)


def no_weight(x, residual, weight):
    return norm(residual + all_reduced(x), 1.0)


def read_before_the_weight(x, residual, weight):
    total = residual + all_reduced(x)
    normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5)
    return normed * weight, normed + 1


def computed_weight(x, residual, weight):
    total = residual + all_reduced(x)
    return norm(total, weight + total.mean(0))


def strided_weight(x, residual, weight):
    return norm(residual + all_reduced(x), torch.stack([weight, weight], 1)[:, 0])


def with_eps(x, residual, weight, eps):
    total = residual + all_reduced(x)
    return weight * (total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + eps))


def symbolic_eps(x, residual, weight):
    return with_eps(x, residual, weight, EPS)


def eps_of_zero(x, residual, weight):
    return with_eps(x, residual, weight, 0.0)


def eps_below_zero(x, residual, weight):
    return with_eps(x, residual, weight, -1e-3)


def eps_of_nothing_in_fp32(x, residual, weight):
    return with_eps(x, residual, weight, 1e-50)


def infinite_weight_offset(x, residual, weight):
    return norm(residual + all_reduced(x), weight + float("inf"))


def bias(x, residual, weight):
    return norm(residual + (all_reduced(x) + weight), weight)


def double(x, residual, weight):
    x, residual, weight = x.double(), residual.double(), weight.double()
    total = residual + all_reduced(x)
    return weight * (total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5))


def several_dtypes(x, residual, weight):
    return norm(residual + (all_reduced(x.bfloat16()).float() + all_reduced(x * 2)), weight)


def reduce_scatter_and_all_reduce(x, residual, weight):
    half = funcol.reduce_scatter_tensor(torch.cat([x, x]), "sum", 0, dist.group.WORLD)
    return norm(residual + (half + all_reduced(x)), weight)


def three_dimensions(x, residual, weight):
    rows = funcol.reduce_scatter_tensor(torch.stack([x, x]), "sum", 0, dist.group.WORLD)
    return norm(residual + rows, weight)


def too_many_tokens(x, residual, weight):
    return norm(torch.cat([residual] * 20) + all_reduced(torch.cat([x] * 20)), weight)


def too_wide_for_the_kernels(x, residual, weight):
    x, residual, weight = (torch.cat([one] * 257, -1) for one in (x, residual, weight))
    return norm(residual + all_reduced(x), weight)


def sizes_of_its_own(x, residual, weight):
    num_tokens = x.shape[0]
    x, residual = (one.repeat(num_tokens + 1, 1, 1)[:, 1:].contiguous() for one in (x, residual))
    return norm(residual + all_reduced(x), weight)


def too_wide(x, residual, weight):
    x, residual, weight = (torch.cat([one] * 9, -1) for one in (x, residual, weight))
    return norm(residual + all_reduced(x), weight)


OWN = "the residual is made of {}, of which each rank has its own: a collective takes it, or what is computed from it"
PRODUCT = (
    "the residual is made of {}, which may differ between ranks: a partial sum, or a product with a weight that is not "
    "declared replicated"
)
LEFT = {
    another_group: "it reduces over group '{other}', the pass serves '0'",
    maximum: "it reduces by 'max', and only 'sum' is served",
    read_elsewhere: "its result is read by aten.mul.Tensor, too, which needs it before the residual is added",
    not_waited_for: "what it returns is not waited for once, and then read",
    wide_output: "the norm of torch.bfloat16 rows leaves torch.float32 ones",
    three_summands: "2 tensors are added to the reduced sum, and only one residual is served",
    partial_residual: PRODUCT.format("aten.mm.default (mm_1)"),
    what_is_reduced: OWN.format("arg0_1 (arg0_1)"),
    made_of_what_is_reduced: OWN.format("aten.mul.Tensor (mul)"),
    masked_by_what_is_reduced: OWN.format("arg0_1 (arg0_1)"),
    source_of_what_is_reduced: OWN.format("arg0_1 (arg0_1)"),
    product_with_itself: OWN.format("arg0_1 (arg0_1)"),
    what_is_gathered: OWN.format("arg0_1 (arg0_1)"),
    weight_of_a_rank: OWN.replace("the residual", "the norm's weight").format("arg0_1 (arg0_1)"),
    product_of_one_token: PRODUCT.format("aten.sum.dim_IntList (sum_1)"),
    wide_residual: "the residual is torch.float32, and what is reduced torch.bfloat16",
    layer_norm: "no RMSNorm of its sum was found: it is read by aten.add.Tensor",
    no_weight: "the norm has no weight of the rows' width",
    read_before_the_weight: "what the norm multiplies by its weight is read by aten.add.Tensor, too",
    computed_weight: "the norm's weight is computed (aten.add.Tensor) after the sum that it norms",
    strided_weight: "the norm's weight has strides (2,)",
    symbolic_eps: "torch has made a symbol of the norm's eps, or of what is added to its weight, as it does of floats "
    "under dynamic=True: set torch._dynamo.config.specialize_float = True",
    eps_of_zero: "eps must be positive and finite in fp32, got 0.0",
    eps_below_zero: "eps must be positive and finite in fp32, got -0.001",
    eps_of_nothing_in_fp32: "eps must be positive and finite in fp32, got 1e-50",
    infinite_weight_offset: "weight_offset must be finite in fp32, got inf",
    bias: "a bias is added to its sum: have one rank add it to its partial sum",
    double: "it reduces torch.float64",
    several_dtypes: "the reductions that are added up have several dtypes",
    reduce_scatter_and_all_reduce: "2 reductions are added up, and one of them is a reduce-scatter",
    three_dimensions: "it scatters a tensor of 3 dimensions, and only rows of two are served",
    too_many_tokens: "num_tokens=120 is over the workspace's max_num_tokens=64",
    too_wide_for_the_kernels: "hidden_size=16448 is over 16384, the widest row the kernels reduce",
    sizes_of_its_own: "the sizes (s + 1, s - 1, s) are not inputs of the graph",
    too_wide: "hidden_size=576 of torch.float32 (2304 bytes a row) does not fit the workspace (1024 bytes a row)",
}
SYMBOLIC = {symbolic_eps, sizes_of_its_own}
WORKSPACES = {too_wide_for_the_kernels: {"hidden_size": 257 * HIDDEN}}
DTYPES = {wide_output: torch.bfloat16, wide_residual: torch.bfloat16}
_groups = []


def _other_group():
    return _groups[0]


def inputs(dtype) -> tuple[torch.Tensor, ...]:
    x, residual = (random(name, NUM_TOKENS, HIDDEN, dtype=dtype, own=name == "x") for name in ("x", "residual"))
    return x, residual, 1 + random("weight", HIDDEN, dtype=dtype)


def run(programs: list) -> list[tuple]:
    """Runs on a rank: what is told of each, the collectives that are left, and the other group's name."""
    if not _groups:
        _groups.append(dist.new_group())
    told = []
    for program in programs:
        given = inputs(DTYPES.get(program, torch.float32))
        dynamic, sizes = program in SYMBOLIC or None, WORKSPACES.get(program)
        with compiled(program, dynamic=dynamic, sizes=sizes) as (function, rewriting, graphs):
            for output, wanted in zip(_listed(function(*given)), _listed(program(*given)), strict=True):
                torch.testing.assert_close(
                    output, wanted, rtol=0.05 if wanted.dtype == torch.bfloat16 else 1e-5, atol=1e-4
                )
            (site,) = rewriting.report().sites
            told.append((site.because, calls(graphs[0]), _groups[0].group_name))
    return told


def _listed(outputs) -> tuple:
    return outputs if isinstance(outputs, tuple) else (outputs,)


@pytest.fixture(scope="module")
def told(pools) -> dict:
    """All programs in one go: a rank has imported and warmed up what compiles by then."""
    by_rank = pools(2).run(run, list(LEFT), timeout_s=290)
    return {program: [rank[index] for rank in by_rank] for index, program in enumerate(LEFT)}


@pytest.mark.parametrize("program", LEFT, ids=lambda program: program.__name__)
def test_left_because(told, program):
    for because, collectives, other in told[program]:
        assert re.sub(r"\bs\d+\b", "s", because) == LEFT[program].format(other=other)
        assert not {"rs_rmsnorm", "rs_rmsnorm_ag"} & set(collectives)


# ---- whole graphs, and what is done another way than it might be ----


def program(x, residual, weight):
    return norm(residual + all_reduced(x), weight)


def run_without_reduction() -> str:
    """Runs on a rank: an engine's own op reduces."""
    library = torch.library.Library("an_engine", "FRAGMENT")
    library.define("all_reduce(Tensor x) -> Tensor")
    library.impl("all_reduce", lambda x: x + 1, "CompositeExplicitAutograd")
    x, residual, weight = inputs(torch.float32)
    with compiled(lambda x: norm(residual + torch.ops.an_engine.all_reduce(x), weight)) as (function, rewriting, _):
        function(x)
        return rewriting.report().graphs[0].because


def run_training() -> str:
    """Runs on a rank."""
    x, residual, weight = inputs(torch.float32)
    with compiled(program) as (function, rewriting, _), torch.enable_grad():
        function(x, residual, weight.requires_grad_()).sum().backward()
        return rewriting.report().graphs[0].because


def run_without_workspace() -> tuple[str, str]:
    """Runs on a rank: the workspace is closed before the call; and there was none from the beginning."""
    with compiled(program) as (function, rewriting, _):
        from tp_fused import groups

        groups.workspaces_of("0")[0].close()
        function(*inputs(torch.float32))
        with pytest.raises(ValueError) as error:
            compile_pass.TpFusedPass()
        return rewriting.report().graphs[0].because, str(error.value)


@pytest.mark.parametrize("world_size", [2])
def test_left_as_a_whole(pool):
    for because in pool.run(run_without_reduction, timeout_s=200):
        missing = "it has no all_reduce and no reduce_scatter_tensor of torch.ops._c10d_functional"
        assert because == f"{missing}: an_engine.all_reduce.default is not one"
    for because in pool.run(run_training, timeout_s=200):
        assert because == "the graph is traced for training: call the model under torch.no_grad()"
    for because, error in pool.run(run_without_workspace, timeout_s=200):
        missing = "group '0' has no workspace for cpu tensors; call tp_fused.init(group, max_num_tokens=..., "
        assert because.startswith(missing) and error.startswith(missing)


WRONG = {
    "a name": ({"group": "0"}, "group must be a process group, got '0'; of a DeviceMesh, pass mesh.get_group()"),
    "no member": ({"group": -100}, "this rank is not in the group: new_group returned -100, for its other ranks"),
    "a number": ({"replicated": 3}, "replicated must be names of modules, or a function of a module's path and its "
                 "weight's shape, got 3"),
    "numbers": ({"replicated": [3]}, "replicated must be names of modules, or a function of a module's path and its "
                "weight's shape, got [3] (list)"),
}  # fmt: skip


def given_wrong_arguments() -> list:
    """Runs on a rank."""
    with workspace("cpu"):
        return [outcome(compile_pass.install, **options)[0] for options, _ in WRONG.values()]


@pytest.mark.parametrize("world_size", [2])
def test_wrong_arguments(pool):
    for errors in pool.run(given_wrong_arguments):
        assert [str(error) for error in errors] == [words for _, words in WRONG.values()]
        assert [type(error) for error in errors] == [TypeError, ValueError, TypeError, TypeError]


def projected(x, residual, weight, narrow):
    return norm(residual + reduced(x * 2), weight) @ narrow.t()


def run_projections(replicated: bool, columns: int, wide: int = HIDDEN) -> tuple[list[str], str]:
    """Runs on a rank: with a weight cut out of one of `wide` rows."""
    given = *inputs(torch.float32), random("narrow", columns, wide)[:, :HIDDEN]
    with compiled(projected, replicated=lambda name, shape: replicated) as (function, rewriting, graphs):
        torch.testing.assert_close(function(*given), projected(*given), rtol=1e-4, atol=1e-4)
        (site,) = rewriting.report().sites
        return calls(graphs[0]), "; ".join(site.notes)


@pytest.mark.parametrize("world_size", [2])
def test_projections_that_are_not_moved(pool):
    """A weight may be a shard where it is not declared; as wide as the hidden size, columns are no fewer bytes."""
    for seen, notes in pool.run(run_projections, False, 24, timeout_s=200):
        assert seen == ["rs_rmsnorm_ag"] and notes.endswith("is not declared replicated")
    for seen, notes in pool.run(run_projections, True, HIDDEN, timeout_s=200):
        assert seen == ["rs_rmsnorm_ag"] and not notes
    for seen, notes in pool.run(run_projections, True, 24, HIDDEN + 8, timeout_s=200):
        assert seen == ["rs_rmsnorm_ag"] and notes.endswith("has strides (72, 1)")
    for seen, _ in pool.run(run_projections, True, 24, timeout_s=200):
        assert seen == ["rs_rmsnorm", "qkv_a_proj_ag"]
