"""FlashInfer's fused all-reduce in the benchmark, without a card: a stand-in for one rank, with its parameters."""

import dataclasses
import importlib.util
import inspect
import sys
import types
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("typer", reason="the bench extra is not installed")
pytest.importorskip("rich", reason="the bench extra is not installed")

from bench import cases, fp8, goals, multi, peers, projections, run, suite
from bench.baselines import BASELINES
from bench.catalog import OPS
from bench.context import Context
from bench.options import Options
from bench.timing import Program

OPTIONS = Options(
    ops=("chain",), world_size=1, tokens=(6, 40), hidden=512, latent=96, kv_lora=32, rope=32, warmup=1, iters=2
)


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield OPTIONS
    dist.destroy_process_group()


@pytest.fixture
def context(one_rank):
    context = Context(one_rank)
    yield context
    context.close()


# ---- FlashInfer ----

NORM = 1  # AllReduceFusionPattern.kARResidualRMSNorm of FlashInfer 0.7


class Workspace:
    backend, destroyed = "trtllm", False

    def __init__(self, **asked):
        self.asked = asked

    def destroy(self):
        self.destroyed = True


class Comm(types.ModuleType):
    """flashinfer.comm of 0.7.4 for one rank: its two functions' parameters, and what its kernels ask for."""

    def __init__(self):
        super().__init__("flashinfer.comm")
        self.workspaces, self.ways = [], []
        self.AllReduceFusionPattern = SimpleNamespace(kAllReduce=0, kARResidualRMSNorm=NORM)

    def create_allreduce_fusion_workspace(
        self,
        backend="auto",
        world_size=None,
        rank=None,
        max_token_num=None,
        hidden_dim=None,
        dtype=None,
        gpus_per_node=None,
        comm_backend=None,
        force_oneshot_support=False,
        group=None,
    ):
        assert backend == "trtllm" and (gpus_per_node, comm_backend, force_oneshot_support) == (None, None, False)
        made = Workspace(world_size=world_size, rank=rank, tokens=max_token_num, columns=hidden_dim, dtype=dtype)
        assert group.group_name and world_size == group.size()
        self.workspaces.append(made)
        return made

    def allreduce_fusion(
        self,
        input,
        workspace,
        pattern,
        launch_with_pdl=False,
        trigger_completion_at_end=True,
        output=None,
        residual_out=None,
        norm_out=None,
        quant_out=None,
        scale_out=None,
        residual_in=None,
        rms_gamma=None,
        rms_eps=1e-6,
        scale_factor=None,
        layout_code=None,
        use_oneshot=None,
        fp32_acc=False,
    ):
        assert pattern == NORM and launch_with_pdl and fp32_acc and isinstance(use_oneshot, bool)
        assert not workspace.destroyed and input.dtype == rms_gamma.dtype == workspace.asked["dtype"]
        assert len(input) <= workspace.asked["tokens"] and input.shape[1] == workspace.asked["columns"]
        if not use_oneshot:
            assert len(input) > workspace.asked["world_size"]
        for tensor in (input, residual_in, residual_out, norm_out):
            assert tensor.is_contiguous() and tensor.shape == input.shape
        self.ways.append("one-shot" if use_oneshot else "two-shot")
        residual_out.copy_(input + residual_in)
        norm_out.copy_(torch.nn.functional.rms_norm(residual_out, residual_out.shape[1:], rms_gamma, rms_eps))
        return norm_out


@pytest.fixture
def flashinfer(monkeypatch):
    """FlashInfer as if it were installed, on a card as if there were one."""
    package, module, comm = types.ModuleType("flashinfer"), types.ModuleType("flashinfer.comm.trtllm_ar"), Comm()
    package.__spec__ = importlib.util.spec_from_loader("flashinfer", loader=None)
    package.comm, comm.trtllm_ar, module.get_trtllm_comm_module = comm, module, lambda: None
    for name, stub in (("", package), (".comm", comm), (".comm.trtllm_ar", module)):
        monkeypatch.setitem(sys.modules, f"flashinfer{name}", stub)
    monkeypatch.setattr(peers, "WORLD_SIZES", (1,))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(BASELINES, "flashinfer", dataclasses.replace(BASELINES["flashinfer"], available=lambda _: True))
    monkeypatch.delenv("FLASHINFER_CONFIDENTIAL_COMPUTE", raising=False)
    yield comm
    assert all(workspace.destroyed for workspace in comm.workspaces), "a context did not close what it had kept"


@pytest.fixture
def kept(flashinfer, context):
    """`context`, closed before `flashinfer` looks."""
    return context


def test_the_stand_in_has_the_parameters_of_flashinfer():
    comm = pytest.importorskip("flashinfer.comm", reason="the peers extra is not installed")
    for function in (Comm.create_allreduce_fusion_workspace, Comm.allreduce_fusion):
        theirs = inspect.signature(inspect.unwrap(getattr(comm, function.__name__))).parameters
        for name, parameter in list(inspect.signature(function).parameters.items())[1:]:
            assert theirs[name].default == parameter.default, name
    assert comm.AllReduceFusionPattern.kARResidualRMSNorm == NORM


@pytest.mark.parametrize("num_tokens", [6, 40])
@pytest.mark.parametrize(
    "kind", [cases.RsRmsnormAg, fp8.RsRmsnormAgFp8, projections.Chain, projections.MlaPrologue, fp8.MlaPrologueFp8]
)
def test_flashinfer_computes_what_the_case_does(flashinfer, kept, kind, num_tokens):
    case = kind(kept, num_tokens)
    program = case.baseline("flashinfer")
    assert set(flashinfer.ways) == {"one-shot", "two-shot"}
    for _ in range(2):
        assert case.resembles(program.call(), case.fused())
    assert flashinfer.ways[-1] == program.way
    assert not case.resembles([2 * output.float() for output in program.call()], case.fused())


def test_workspaces_are_for_all_sizes_and_closed_at_the_end(flashinfer, kept):
    for num_tokens in OPTIONS.tokens:
        cases.RsRmsnormAg(kept, num_tokens).baseline("flashinfer")
    assert [workspace.asked["tokens"] for workspace in flashinfer.workspaces] == [40, 40]
    assert not any(workspace.destroyed for workspace in flashinfer.workspaces)


def test_flashinfer_takes_torchs_symmetric_memory_unless_told_otherwise(flashinfer, kept, monkeypatch):
    peers.FlashInfer(kept, "one-shot").close()
    assert peers.os.environ["FLASHINFER_CONFIDENTIAL_COMPUTE"] == "1"
    monkeypatch.setenv("FLASHINFER_CONFIDENTIAL_COMPUTE", "0")
    peers.FlashInfer(kept, "one-shot").close()
    assert peers.os.environ["FLASHINFER_CONFIDENTIAL_COMPUTE"] == "0"


def test_the_faster_way_is_kept(context, monkeypatch):
    times = {"slow": 3.0, "fast": 1.0, "middle": 2.0}
    asked = []

    def measure(brief, programs):
        asked.append((brief.options.iters, brief.options.budget_s))
        return {name: SimpleNamespace(median=times[name]) for name in programs}

    monkeypatch.setattr(peers, "measure", measure)
    programs = {name: Program(lambda name=name: name) for name in times}
    chosen = peers.fastest(context, programs)
    assert (chosen.way, chosen.call()) == ("fast", "fast") and programs["fast"].way is None
    assert asked == [(20, context.options.budget_s)] and context.options.iters == 2
    assert peers.fastest(context, {"slow": programs["slow"]}).way == "slow" and len(asked) == 1


def run_it(options, capsys) -> tuple[str, set[str]]:
    """What a run prints, and the programs that its rows have."""
    rows, row = [], run.result_row

    def result_row(*arguments):
        rows.append(row(*arguments))
        return rows[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "result_row", result_row)
        run.run_rank(dataclasses.replace(options, ops=("rs_rmsnorm_ag",), tokens=(6,)))
    assert {program.get("way") for program in rows[0]["programs"].values()} <= {None, "one-shot", "two-shot"}
    return capsys.readouterr().out, {name for row in rows for name in row["programs"]}


def test_a_run_with_flashinfer(flashinfer, one_rank, capsys):
    out, programs = run_it(one_rank, capsys)
    assert "flashinfer" in programs and "# flashinfer: FlashInfer's all-reduce + add + RMSNorm" in out
    assert "left out" not in out


def test_a_run_without_flashinfer_says_so_in_one_line(one_rank, capsys, monkeypatch):
    monkeypatch.setitem(BASELINES, "flashinfer", dataclasses.replace(BASELINES["flashinfer"], available=lambda _: True))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    out, programs = run_it(one_rank, capsys)
    assert "flashinfer" not in programs and "own" in programs
    (line,) = [line for line in out.splitlines() if "flashinfer" in line]
    assert line == "# flashinfer: left out: flashinfer-python is not installed; the extra `peers` names it"
    out, _ = run_it(dataclasses.replace(one_rank, baselines=("own",)), capsys)
    assert "flashinfer" not in out  # nobody has asked for it


def test_kernels_that_do_not_compile_are_one_line_too(flashinfer, one_rank, capsys, monkeypatch):
    def fail():
        raise RuntimeError("ninja exited with 1\nand said much")

    monkeypatch.setattr(flashinfer.trtllm_ar, "get_trtllm_comm_module", fail)
    out, programs = run_it(one_rank, capsys)
    assert "flashinfer" not in programs
    assert "# flashinfer: left out: RuntimeError: ninja exited with 1\n" in out and "said much" not in out


def test_a_workspace_that_cannot_be_had_is_one_line_too(flashinfer, one_rank, capsys, monkeypatch):
    def fail(**arguments):
        raise TypeError("create_allreduce_fusion_workspace() got an unexpected keyword argument 'group'")

    monkeypatch.setattr(flashinfer, "create_allreduce_fusion_workspace", fail)
    out, programs = run_it(one_rank, capsys)
    assert "flashinfer" not in programs and "own" in programs
    assert "# flashinfer: left out: TypeError: create_allreduce_fusion_workspace() got an unexpected" in out


def test_all_ranks_leave_it_out_where_one_cannot_set_it_up(flashinfer, kept, monkeypatch):
    monkeypatch.setattr(kept, "host_sum", lambda mine: mine + 1)
    with pytest.raises(peers.LeftOut, match="another rank could not"):
        peers.FlashInfer(kept, "one-shot")
    assert not flashinfer.workspaces


def test_other_ranks_load_what_rank_0_has_compiled(flashinfer, kept, monkeypatch):
    happened = []
    monkeypatch.setattr(flashinfer.trtllm_ar, "get_trtllm_comm_module", lambda: happened.append("load"))
    monkeypatch.setattr(kept, "host_sum", lambda mine: happened.append("meet") or mine)
    peers.FlashInfer(kept, "one-shot").close()
    monkeypatch.setattr(kept, "rank", 1)
    peers.FlashInfer(kept, "one-shot").close()
    assert happened == ["load", "meet", "load", "meet", "meet", "meet", "load", "meet", "meet"]


def ranks(world_size: int, ranks_per_card: int, *tokens: int, hidden: int = 7168, dtype=torch.bfloat16):
    options = SimpleNamespace(hidden=hidden, tokens=tokens)
    values = {"world_size": world_size, "ranks_per_card": ranks_per_card, "options": options, "dtype": dtype}
    return SimpleNamespace(device=torch.device("cuda"), **values)


@pytest.mark.parametrize(
    ("world_size", "ranks_per_card", "tokens", "expected"),
    [
        (2, 1, 0, ()),
        (2, 1, 2, ("one-shot",)),
        (2, 1, 3, ("one-shot", "two-shot")),
        (2, 1, 16384, ("one-shot", "two-shot")),
        (8, 1, 9362, ("one-shot", "two-shot")),
        (8, 1, 9363, ("two-shot",)),  # its one-shot buffers would begin past 32 bits
        # Four blocks a token, on half of 132 SMs.
        (2, 2, 8, ("one-shot", "two-shot")),
        (2, 2, 9, ("two-shot",)),
        (2, 2, 16, ("two-shot",)),
        (2, 2, 17, ()),
        (8, 8, 2, ("one-shot",)),
        (8, 8, 3, ()),
        (8, 8, 16, ("two-shot",)),
        (8, 8, 17, ()),
        (8, 4, 32, ("two-shot",)),
    ],
)
def test_ways_of_flashinfer(monkeypatch, world_size, ranks_per_card, tokens, expected):
    card = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert peers.ways(ranks(world_size, ranks_per_card), tokens) == expected


@pytest.mark.parametrize(
    ("columns", "itemsize", "blocks_a_token"),
    [(7168, 2, 4), (7168, 4, 8), (1024, 2, 1), (2048, 2, 2), (4104, 2, 1), (16384, 2, 8)],
)
def test_blocks_of_flashinfer(columns, itemsize, blocks_a_token):
    """A cluster of at most eight blocks of at least 128 threads, each with 16 bytes of the token."""
    assert peers.grid_blocks(10, columns * itemsize, 4, one_shot=True) == 10 * blocks_a_token
    assert peers.grid_blocks(10, columns * itemsize, 4, one_shot=False) == 3 * blocks_a_token


@pytest.mark.parametrize(
    ("asked", "capability", "why"),
    [
        (ranks(2, 1, 64), (9, 0), None),
        (ranks(3, 1, 64), (9, 0), "its kernels are for 2, 4, 8 ranks"),
        (ranks(2, 1, 64), (8, 0), "its kernels are for Hopper and newer"),
        (ranks(8, 8, 5, 64), (9, 0), "its grid has no bound, and no size's blocks, 8 ranks', fit on half of the card"),
        (ranks(8, 8, 2, 64), (9, 0), None),
    ],
)
def test_why_flashinfer_is_left_out(monkeypatch, asked, capability, why):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    card = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert peers.why_no_flashinfer(asked) == why


@pytest.mark.parametrize(
    ("command", "installed", "parts", "times"),
    [
        *((multi, True, ("ops",), 1), (multi, True, ("prologue",), 1), (multi, True, ("beside",), 0)),
        *((goals, True, ("decode",), 1), (goals, True, ("decode-2",), 1), (goals, True, ("decode-8", "eight"), 0)),
        *((multi, False, ("ops",), 0), (goals, False, ("decode",), 0)),
    ],
)
def test_kernels_are_compiled_before_launches_that_have_a_time_limit(
    monkeypatch, tmp_path, command, installed, parts, times
):
    happened = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    monkeypatch.setattr(suite.subprocess, "run", lambda command: happened.append(command[1:]))
    monkeypatch.setattr(command, "run", lambda planned, results: happened.append("launches") or [])
    command.check(multi.launches(2, parts) if command is multi else goals.launches(parts), tmp_path)
    assert happened == [["-m", "bench.peers"]] * times + ["launches"]


def test_peers_stand_where_they_are_asked_for():
    everywhere = {"rs_rmsnorm_ag", "rs_rmsnorm_ag_fp8", "chain", "mla_prologue", "mla_prologue_fp8"}
    assert {op for op in OPS if "flashinfer" in OPS[op].baselines} == everywhere
    scattered = {"rs_rmsnorm", "rs_rmsnorm_fp8", "reduce_scatter_rows"}
    assert {op for op in OPS if "nccl-symm" in OPS[op].baselines} == everywhere | scattered
