"""The benchmark CLI: whole runs as a user starts them, what makes them fail, and the arithmetic of its columns."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("typer", reason="the bench extra is not installed")
pytest.importorskip("rich", reason="the bench extra is not installed")

from ranks import run_program
from typer.testing import CliRunner

import tp_fused
from bench import options as run_options
from bench import run
from bench.__main__ import app
from bench.baselines import BASELINES
from bench.cases import RsRmsnorm, steps_apart
from bench.catalog import EVERYWHERE, OPS
from bench.report import bus_factor
from bench.timing import Samples
from bench.transports import OverTorch

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--hidden", "64", "--latent", "96", "--kv-lora", "32", "--rope", "32", "--iters", "2", "--warmup", "1"]
RANKS = 3
TOKENS = [0, 1, 7]
ON_A_CPU = {"dist", "allreduce", "own", "dist-rs", "own-rs", "gemm", "ag+norm", "ag_fp8+norm", "chain", "all-rows"}
ON_A_CPU |= {"rs_rmsnorm", "rs_rmsnorm_ag", "qkv_a_proj_ag", "mla_prologue"}


def bench(*arguments: str) -> subprocess.CompletedProcess:
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "bench", *arguments]
    environment = {**inherited, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def all_ops(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    path = tmp_path_factory.mktemp("bench") / "all.json"
    tokens = ",".join(map(str, TOKENS))
    done = bench(
        *("all", "--device", "cpu", "--world-size", str(RANKS), "--tokens", tokens),
        *("--zero-copy", "--json", str(path), *SMALL),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done, path


# ---- whole runs ----


def test_every_op_is_right_and_has_its_row(all_ops):
    _, path = all_ops
    document = json.loads(path.read_text())
    rows = {(row["op"], row["tokens"]): row for row in document["results"]}
    assert set(rows) == {(op, tokens) for op in EVERYWHERE for tokens in TOKENS}
    for (op, tokens), row in rows.items():
        assert row["wrong"] == 0
        baselines = set(OPS[op].baselines) & ON_A_CPU
        if tokens == 0:
            baselines = {name for name in baselines if BASELINES[name].empty}
        assert set(row["programs"]) == {"fused"} | baselines
        assert set(row["speedup"]) == baselines
        assert all(0 < times["median_us"] <= times["p99_us"] for times in row["programs"].values())


def test_json_names_machine_and_run(all_ops):
    document = json.loads(all_ops[1].read_text())
    machine = document["machine"]
    assert machine["backend"] == "cpu" and machine["torch"] == torch.__version__
    assert machine["copy_gb_s"] > 0 and machine["cores"] > 0 and machine["cpu"]
    assert document["options"]["world_size"] == RANKS and document["options"]["tokens"] == TOKENS
    assert document["argv"][0] == "all"


def test_columns_agree_with_json(all_ops):
    done, path = all_ops
    row = next(row for row in json.loads(path.read_text())["results"] if row["tokens"] == 7)
    assert row["op"] == "rs_rmsnorm" and row["bytes"] == 7 * 64 * 2
    # Zero-copy: every rank's input is read, then the residual read and two outputs written.
    assert row["memory_bytes"] == (RANKS + 3) * row["bytes"]
    assert row["algbw_gb_s"] == pytest.approx(row["bytes"] / row["programs"]["fused"]["median_us"] * 1e-3)
    assert row["busbw_gb_s"] == pytest.approx(row["algbw_gb_s"] * 2 / 3)
    printed = next(line for line in done.stdout.splitlines() if line.split()[:2] == ["7", str(row["bytes"])])
    assert float(printed.split()[2]) == pytest.approx(row["programs"]["fused"]["median_us"], abs=0.1)
    assert "backend cpu (all ranks share one host's memory)" in done.stdout
    assert "the peers read the input in place" in done.stdout


def drawn(runs: list[Path], folder: Path):
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    return CliRunner().invoke(app, ["plot", *map(str, runs), "-o", str(folder)], env={"COLUMNS": "200"})


def test_plot(all_ops, tmp_path, monkeypatch):
    """A picture for every op and file, in a folder that is made; what sums up other files is left out."""
    document, folder = json.loads(all_ops[1].read_text()), tmp_path / "new" / "folder"
    one = document | {"results": [row for row in document["results"] if row["op"] == "rs_rmsnorm_ag"]}
    runs = [all_ops[1], tmp_path / "one.json"]
    runs[1].write_text(json.dumps(one))
    for kind in ("goals", "blocks"):  # lie beside the runs that they sum up
        runs.append(tmp_path / f"{kind}.json")
        runs[-1].write_text(json.dumps({"machine": document["machine"], kind: []}))
    done = drawn(runs, folder)
    assert done.exit_code == 0, done.output
    names = [*(f"all_{op}.png" for op in EVERYWHERE), "one.png"]
    assert done.output.split() == [str(folder / name) for name in names]
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in names)


@pytest.mark.parametrize(
    ("name", "baselines"),
    [
        ("chain_2xh200_2_ranks", 4),  # of seven programs beside the op
        ("rs_rmsnorm_blocks_2xh200_2_ranks", 4),  # of eight bounds
        ("qkv_a_proj_ag_1xh100_8_ranks", 3),
    ],
)
def test_a_legend_has_six_lines_at_most(name, baselines, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    from bench import plot

    legends, close = [], plot.plt.close

    def closing(figure):
        legends.append([text.get_text() for text in figure.axes[0].get_legend().texts])
        close(figure)

    monkeypatch.setattr(plot.plt, "close", closing)
    plot.draw([ROOT / "bench" / "results" / f"{name}.json"], tmp_path)
    (legend,) = legends
    assert len(legend) == baselines + 2 <= 6
    assert legend[-2].startswith("tp_fused") and legend[-1].startswith("floor: ")


def test_plot_of_something_else(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    done = drawn([tmp_path / "other.json"], tmp_path)
    assert done.exit_code == 2 and "is no file that --json wrote" in " ".join(done.output.split())


@pytest.mark.preload("bench.__main__")
def test_under_torchrun(tmp_path):
    program = "from bench.__main__ import app\napp()\n"
    arguments = ("chain", "--device", "cpu", "--backend", "reference", "--tokens", "5", "--dtype", "fp32", *SMALL)
    printed = run_program(program, tmp_path, 2, *arguments, COLUMNS="200")
    assert "2 ranks" in printed and "TP_FUSED_BACKEND asks for it" in printed


def test_a_rank_that_cannot_start_ends_the_run():
    done = bench("rs_rmsnorm", "--device", "cpu", "--world-size", "1", "--tokens", "1000000000")
    assert done.returncode == run.BAD_SETUP
    assert "MemoryError" in done.stderr and "/dev/shm" in done.stderr and "Traceback" not in done.stderr


# ---- what makes a run fail ----


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield run_options.Options(ops=("rs_rmsnorm",), world_size=1, tokens=(3,), hidden=64, iters=1, warmup=1)
    dist.destroy_process_group()


class NeverWritten(RsRmsnorm):
    def fused(self):
        output, residual_out = super().fused()
        return torch.empty_like(output), residual_out


class OneBitOff(RsRmsnorm):
    def fused(self):
        output, residual_out = super().fused()
        residual_out.view(torch.int16)[0, 0] ^= 1
        return output, residual_out


class WrongLater(RsRmsnorm):
    """Right while it is checked, wrong while it is timed."""

    calls = 0

    def fused(self):
        output, residual_out = super().fused()
        self.calls += 1
        return (output, residual_out) if self.calls <= 2 else (output, 2 * residual_out)


class OtherBaseline(RsRmsnorm):
    def unfused(self, via):
        program = super().unfused(via)
        call = program.call
        program.call = lambda: tuple(tensor.flip(0) for tensor in call())
        return program


class Faulty(RsRmsnorm):
    def fused(self):
        raise tp_fused.CollectiveFault("rs_rmsnorm #1: rank 1 never arrived", "rs_rmsnorm", 1, 0, 1, "never arrived")


@pytest.mark.parametrize(
    ("case", "fewest", "most"),
    [
        (NeverWritten, 2 * 3 * 64, 3 * 3 * 64),  # the timed call may be given memory with the right rows still in it
        (OneBitOff, 3, 3),
        (WrongLater, 1, 3 * 64),
    ],
)
def test_wrong_results_are_counted_and_end_in_a_code(one_rank, case, fewest, most, capsys):
    with pytest.raises(SystemExit) as ended:
        run.run_rank(one_rank, {"rs_rmsnorm": case})
    assert ended.value.code == run.WRONG
    assert fewest <= int(capsys.readouterr().out.split("# ")[-1].split()[0]) <= most


def test_right_results_end_without_a_code(one_rank, capsys):
    run.run_rank(one_rank)
    assert "wrong elements" not in capsys.readouterr().out


def test_a_fault_ends_in_a_code_and_its_message(one_rank, capsys):
    with pytest.raises(SystemExit) as ended:
        run.run_rank(one_rank, {"rs_rmsnorm": Faulty})
    assert ended.value.code == run.FAULT
    assert "rank 0: CollectiveFault: rs_rmsnorm #1: rank 1 never arrived" in capsys.readouterr().err


def test_a_baseline_that_computes_something_else_is_no_baseline(one_rank):
    with pytest.raises(RuntimeError, match="rs_rmsnorm: the unfused program 'dist' computes something else"):
        run.run_rank(one_rank, {"rs_rmsnorm": OtherBaseline})


BAD_OPTIONS = [
    ("rs_rmsnorm --tokens 1,x", "'1,x' is no list of integers"),
    ("rs_rmsnorm --tokens 4,-1", "-1 tokens"),
    ("rs_rmsnorm --min-tokens 9 --max-tokens 3", "9 is over --max-tokens 3"),
    ("rs_rmsnorm --step-factor 1", "1 must be over 1"),
    ("chain --latent 100", "100 columns are fewer than --kv-lora 512 + --rope 64"),
    ("rs_rmsnorm --hidden 100000", "100000 is over 16384"),
    ("rs_rmsnorm --world-size 0", "greater than or equal to 1"),
    ("rs_rmsnorm --backend cuda", "cuda works on cuda tensors"),
    ("rs_rmsnorm --baselines own,owl", "'owl' is none of none, "),
    ("rs_rmsnorm --variants ctas0", "'ctas0' is none of staged, zero-copy, ctasN"),
    ("beside_gemm", "beside_gemm needs cuda"),
    # What would do nothing.
    ("rs_rmsnorm --latent 96", "--latent: does nothing for rs_rmsnorm"),
    ("qkv_a_proj_ag --rope 32", "--rope: does nothing for qkv_a_proj_ag"),
    ("qkv_a_proj_ag_fp8 --dtype fp16", "--dtype: does nothing for qkv_a_proj_ag_fp8"),
    ("rs_rmsnorm --scale-layout row", "--scale-layout: does nothing for rs_rmsnorm"),
    ("all_gather_rows --zero-copy", "--zero-copy: does nothing for all_gather_rows"),
    ("all_gather_rows --variants staged", "staged does nothing for all_gather_rows"),
    ("reduce_scatter_rows --compile", "--compile: does nothing for reduce_scatter_rows"),
    ("rs_rmsnorm --compile --baselines none", "--compile: does nothing without baselines"),
    (
        "rs_rmsnorm --baselines gemm",
        "'gemm' is not timed for rs_rmsnorm; there are dist, nccl-symm, own, symm, barrier",
    ),
    ("rs_rmsnorm --tokens 4 --max-tokens 8", "--max-tokens: does nothing beside --tokens"),
    ("rs_rmsnorm --max-ctas 4", "--max-ctas: does nothing on cpu"),
    ("rs_rmsnorm --variants ctas4", "ctas4 does nothing on cpu"),
    ("rs_rmsnorm --backend reference --zero-copy", "the reference backend has no symmetric memory"),
    ("rs_rmsnorm --backend reference --timeout 5", "the reference backend waits as long as the process group"),
]


@pytest.mark.parametrize(("command", "message"), BAD_OPTIONS)
def test_bad_options_are_named_before_a_rank_starts(command, message, monkeypatch):
    monkeypatch.setattr("tp_fused.launch.launch", lambda *_, **__: pytest.fail("ranks were started"))
    done = CliRunner().invoke(app, [*command.split(), "--device", "cpu"], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def test_the_folder_of_the_numbers_is_made(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("tp_fused.launch.launch", lambda *_, **__: started.append(True))
    path = tmp_path / "no" / "such" / "one.json"
    done = CliRunner().invoke(app, ["rs_rmsnorm", "--device", "cpu", "--json", str(path)])
    assert done.exit_code == 0 and started and path.parent.is_dir()
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(app, ["rs_rmsnorm", "--device", "cpu", "--json", str(tmp_path / "file" / "one.json")])
    assert done.exit_code == 2 and "cannot make the folder" in done.output and len(started) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ((), 0, "python -m bench plot "),
        (("--help",), 0, "qkv_a_proj_ag_norm"),
        (("chain", "--help"), 0, "--kv-lora"),
        (("rs_rmsnorm", "--latent", "96"), 2, "does nothing for rs_rmsnorm"),
    ],
)
def test_help_and_refusals_do_without_torch(arguments, code, says):
    """torch takes a second or two to import."""
    watched = (
        "import sys; from bench.__main__ import app\n"
        "try: app(sys.argv[1:])\n"
        "finally: assert not {'torch', 'tp_fused', 'matplotlib'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", watched, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code and says in done.stdout + done.stderr, done.stdout + done.stderr


# ---- variants of the fused op ----


def test_variants_run_beside_the_op(one_rank, tmp_path):
    path = tmp_path / "one.json"
    options = dataclasses.replace(
        one_rank, ops=("chain",), latent=96, kv_lora=32, rope=32, variants=("zero-copy", "ctas2"), json=str(path)
    )
    run.run_rank(options)
    row = json.loads(path.read_text())["results"][0]
    assert set(row["programs"]) == {"fused", "zero-copy", "ctas2", "dist", "own", "dist-rs", "own-rs"}
    assert row["wrong"] == 0
    assert all(row["programs"][name]["copy_share"] > 0 for name in ("fused", "zero-copy", "ctas2"))
    assert "copy_share" not in row["programs"]["own"]


class WrongWhenBounded(RsRmsnorm):
    def fused(self):
        output, residual_out = super().fused()
        return output, residual_out + (self.context.options.max_ctas is not None)


def test_a_variant_has_to_be_right(one_rank, capsys):
    with pytest.raises(SystemExit) as ended:
        run.run_rank(dataclasses.replace(one_rank, variants=("ctas2",)), {"rs_rmsnorm": WrongWhenBounded})
    assert ended.value.code == run.WRONG and f"{3 * 64} wrong elements" in capsys.readouterr().out


# ---- arithmetic ----


@pytest.mark.parametrize(
    ("passes", "world_size", "factor"), [(1, 4, 0.75), (2, 4, 1.5), (1, 1, 0.0), (1, 3, 2 / 3), (2, 8, 1.75)]
)
def test_bus_factor_is_that_of_nccl_tests(passes, world_size, factor):
    assert bus_factor(passes, world_size) == pytest.approx(factor)


@pytest.mark.parametrize(
    ("arguments", "counts"),
    [
        ((None, 1, 16, 2.0), (1, 2, 4, 8, 16)),
        ((None, 0, 3, 2.0), (0, 1, 2, 3)),
        ((None, 3, 20, 2.5), (3, 7, 18, 20)),
        ((None, 5, 5, 2.0), (5,)),
        (("7,1,1023", 1, 4096, 2.0), (7, 1, 1023)),
    ],
)
def test_token_counts(arguments, counts):
    assert run_options.token_counts(*arguments) == counts


@pytest.mark.parametrize(("count", "p99"), [(1, 1.0), (7, 7.0), (100, 99.0), (1000, 990.0)])
def test_p99(count, p99):
    seconds = torch.arange(1, count + 1, dtype=torch.float64)[torch.randperm(count)]
    assert Samples(seconds).p99 == p99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn], ids=str)
def test_steps_apart(dtype):
    eps = torch.finfo(dtype).eps
    value = torch.tensor([1.0, 1.0, -1.0, 1.0, float("nan")]).to(dtype)
    other = torch.tensor([1.0, 1 + eps, -1 + eps / 2, 1 + 2 * eps, 1.0]).to(dtype)
    steps = steps_apart(value, other).tolist()
    assert steps[:4] == [0, 1, 1, 2] and steps[4] > 1


@pytest.mark.parametrize("num_tokens", [1, 4, 7])
def test_padding_for_torch_keeps_every_row_at_its_owner(num_tokens):
    """What reduce_scatter_tensor cuts into equal shares begins, for each rank, with the rows that the rank owns."""

    class Ranks:
        group, world_size = None, 3

        def row_count(self, num_tokens, rank):
            return tp_fused.row_count(num_tokens, rank, self.world_size)

    input = torch.arange(num_tokens * 2.0).view(num_tokens, 2)
    shares = OverTorch(Ranks(), num_tokens, input).padded.chunk(3)
    for share, owned in zip(shares, input.tensor_split(3), strict=True):
        assert torch.equal(share[: len(owned)], owned) and not share[len(owned) :].any()
