"""What `python -m bench model` counts: the bytes that the benchmark counts, the times that follow, and their tables."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("typer", reason="the bench extra is not installed")
pytest.importorskip("rich", reason="the bench extra is not installed")

from typer.testing import CliRunner

from bench import counts, model, run, tables
from bench.__main__ import app
from bench.cases import RsRmsnorm
from bench.results import RESULTS

ROOT = Path(__file__).resolve().parents[1]
# Where every byte is touched once: not in rounds that follow each other.
AS_IN_THE_BENCHMARK = (
    *("rs_rmsnorm", "rs_rmsnorm_fp8", "rs_rmsnorm_ag", "qkv_a_proj_ag", "qkv_a_proj_ag_fp8", "chain", "mla_prologue"),
)
RATES = model.Rates("H100", bf16=1e12, fp8=2e12, memory=1e12, link=1e11, barrier_s=10e-6)


def case_of(op: str, shape: model.Shape):
    """The benchmark's case without its tensors: enough to count bytes."""
    case = object.__new__(run.CASES[op])
    options = SimpleNamespace(zero_copy=not shape.staged)
    case.context = SimpleNamespace(world_size=shape.world_size, options=options)
    case.num_tokens, case.hidden, case.latent, case.itemsize = shape.tokens, shape.hidden, shape.latent, counts.BF16
    if op in ("chain", "mla_prologue"):
        case.reduction = case_of(RsRmsnorm.op, shape)
    return case


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("shape", [model.Shape(16384), model.Shape(2100, 3, 512, 96), model.Shape(5, 1)], ids=str)
@pytest.mark.parametrize("op", AS_IN_THE_BENCHMARK)
def test_memory_is_counted_as_by_the_benchmark(op, shape, staged):
    shape = replace(shape, staged=staged, ranks_per_card=8)  # the fused kernel, whatever the number of rows
    counted = sum(phase.memory for phase in model.OPS[op].fused(shape))
    assert counted * shape.world_size == case_of(op, shape).memory_bytes


def test_memory_of_posted_columns_is_counted_as_by_the_benchmark():
    shape = model.Shape(16, ranks_per_card=8)
    (phase,) = counts.qkv_a_proj_ag_complete(shape)
    assert phase.memory * shape.world_size == case_of("qkv_a_proj_ag_complete", shape).memory_bytes


def test_few_rows_are_added_up_by_all_ranks():
    """In one synchronisation, for more bytes; the two take the same forms as the plan."""
    few, some, many = model.Shape(2), model.Shape(64), model.Shape(16384)
    assert [shape.body("rs_rmsnorm_ag") for shape in (few, some, many)] == ["all rows", "one row", "bulk"]
    assert [shape.body("rs_rmsnorm_ag_fp8") for shape in (few, some, many)] == ["all rows", None, None]
    (phase,) = counts.rs_rmsnorm_ag(few)
    assert (phase.link, phase.barriers) == (7 * few.rows, 1)
    (phase,) = counts.rs_rmsnorm_ag(some)
    assert (phase.link, phase.barriers) == (7 * 2 * some.own_rows, 2)
    (fp8,), (bf16,) = counts.rs_rmsnorm_ag_fp8(few), counts.rs_rmsnorm_ag(few)  # only what is stored differs
    assert (fp8.link, fp8.barriers) == (bf16.link, bf16.barriers)
    assert bf16.memory - fp8.memory == few.rows - few.quantized_rows
    assert [phase.barriers for phase in counts.rs_rmsnorm_ag_fp8(some)] == [2, 0]  # gathered in 16 bits, then quantised
    assert [phase.barriers for phase in counts.rs_rmsnorm_ag_fp8(many)] == [2, 1]


@pytest.mark.parametrize(("tokens", "gathers"), [(8, True), (128, True), (192, False)])
def test_the_prologue_is_counted_as_the_ops_it_consists_of(tokens, gathers):
    shape = model.Shape(tokens)
    wanted = counts.gathered_chain if gathers else counts.chain
    assert counts.mla_prologue(shape) == wanted(shape)
    reduced = counts.rs_rmsnorm_ag_fp8 if gathers else counts.rs_rmsnorm_fp8
    projected = counts.qkv_a_proj_ag_complete if gathers else counts.qkv_a_proj_ag
    assert counts.mla_prologue_fp8(shape) == reduced(shape) + projected(shape, counts.FP8)


def test_what_is_replaced_is_the_fastest_of_its_forms():
    shape, alternatives = model.Shape(1), model.OPS["rs_rmsnorm_ag"].unfused.values()
    seconds = [model.predict(program, shape, RATES)[0] for program in alternatives]
    assert model.fastest(alternatives, shape, RATES) == min(seconds) < max(seconds)


def test_what_goes_on_together_costs_its_longest_part_and_phases_are_added():
    linked, multiplied = model.Phase(1e6, link=1e6, barriers=2), model.Phase(1e6, operations=4e6, factor_bytes=1)
    assert model.cost((linked,), RATES) == (pytest.approx(10e-6 + 20e-6), "synchronising")
    assert model.cost((linked,), replace(RATES, barrier_s=1e-6)) == (pytest.approx(12e-6), "link")
    assert model.cost((multiplied,), RATES) == (pytest.approx(2e-6), "arithmetic")
    assert model.cost((multiplied, model.Phase(3e6)), RATES) == (pytest.approx(5e-6), "memory")


def test_ranks_that_share_a_card_share_its_rates_and_have_no_links():
    phase = model.Phase(1e6, link=1e9, operations=4e6)
    assert model.cost((phase,), replace(RATES, ranks_per_card=8)) == (pytest.approx(32e-6), "arithmetic")


def test_rs_rmsnorm_on_links():
    """7 of 8 rows of the own share arrive over the links, the input's opening and closing are synchronised."""
    seconds, bound = model.predict(counts.rs_rmsnorm, model.Shape(16384), RATES)
    assert (seconds, bound) == (pytest.approx(7 * 2048 * 7168 * 2 / 1e11 + 20e-6), "link")
    seconds, bound = model.predict(counts.rs_rmsnorm, model.Shape(8), RATES)
    assert (seconds, bound) == (pytest.approx(7 * 7168 * 2 / 1e11 + 10e-6), "synchronising")  # staged


@pytest.mark.parametrize(("world_size", "barriers"), [(1, 0), (2, 1)])
def test_one_rank_meets_nobody(world_size, barriers):
    phases = counts.chain(model.Shape(64, world_size, staged=True, ranks_per_card=2))
    assert [phase.barriers for phase in phases] == [barriers, barriers]
    assert world_size > 1 or not any(phase.link for phase in phases)


def test_few_rows_of_a_rank_with_a_card_are_multiplied_first():
    few, many = model.Shape(512, 2), model.Shape(514, 2)
    assert few.plan("qkv_a_proj_ag")["few_rows"] and not many.plan("qkv_a_proj_ag")["few_rows"]
    unfused = model.predict(counts.project_then_gather, few, RATES)
    assert model.predict(counts.qkv_a_proj_ag, few, RATES) == unfused
    assert model.predict(counts.qkv_a_proj_ag, few, replace(RATES, ranks_per_card=2)) != unfused
    assert model.predict(counts.qkv_a_proj_ag, many, RATES) < model.predict(counts.project_then_gather, many, RATES)


def document(gpu="NVIDIA H100 80GB HBM3", gpus=1, world_size=8, programs=("fused",), zero_copy=True, **options) -> dict:
    machine = {"gpu": gpu, "gpus": gpus, "ranks_per_gpu": world_size // gpus, "copy_gb_s": 3000.0 * gpus}
    sizes = {"world_size": world_size, "hidden": 7168, "latent": 2112, "dtype": "bf16", "zero_copy": zero_copy}
    times = {name: {"median_us": 100.0 + index} for index, name in enumerate(programs)}
    rows = [{"op": "rs_rmsnorm", "tokens": 512, "programs": times}]
    return {"machine": machine, "options": {**sizes, **options}, "results": rows}


def test_runs_are_compared_by_what_they_measured_of_their_machine():
    shared = document(programs=("barrier", "fused", "own", "staged", "ctas8"))
    linked = document(gpus=8, programs=("fused",))
    linked["machine"]["link_gb_s"] = 400.0
    found = [shared, linked]
    has = model.rates_of(linked, found, model.Shares())
    assert (has.memory, has.link, has.barrier_s, has.ranks_per_card) == pytest.approx((3e12, 4e11, 100e-6, 1))
    assert model.rates_of(shared, found, model.Shares()).ranks_per_card == 8
    rows = model.compare(shared, model.rates_of(shared, found, model.Shares()))
    assert [(row.program, row.measured) for row in rows] == [
        ("fused", pytest.approx(101e-6)),
        ("own", pytest.approx(102e-6)),
        ("staged", pytest.approx(103e-6)),
    ]
    assert rows[2].counted == pytest.approx(25 * 512 * 7168 * 2 / 3e12 + 100e-6)
    staged = document(programs=("fused", "own"), zero_copy=False)
    assert [row.program for row in model.compare(staged, has)] == ["staged", "own, staged"]


def test_the_barrier_is_that_of_the_place_or_of_the_fewest_ranks_a_card():
    one, eight = document(programs=("barrier",)), document(gpus=8, programs=("fused", "barrier"))
    assert model.barrier_seconds([one, eight]) == pytest.approx(101e-6)
    assert model.barrier_seconds([one, eight], ("NVIDIA H100 80GB HBM3", 1, 8)) == pytest.approx(100e-6)
    with pytest.raises(ValueError, match="no run on a card has timed a barrier"):
        model.barrier_seconds([document()])


def test_runs_that_cannot_be_compared_are_left_out(tmp_path):
    runs = [document(), document(gpu=None), document(gpu="NVIDIA A100"), document(dtype="fp16"), document(baselines=[])]
    for index, made in enumerate([*runs, {"machine": document()["machine"], "goals": []}]):
        (tmp_path / f"{index}.json").write_text(json.dumps(made))
    assert model.documents(tmp_path) == runs[:1]


# ---- the command and the page ----


def bench_model(*arguments: str):
    return CliRunner().invoke(app, ["model", *arguments], env={"COLUMNS": "200"})


def test_the_page_shows_what_the_command_prints():
    done = bench_model()
    assert done.exit_code == 0, done.output
    predictions = done.output[: done.output.index("| cards | ranks |")].strip()
    assert "`rs_rmsnorm_ag`" in predictions and predictions in (ROOT / "docs" / "results" / "counted.md").read_text()


def test_shares_and_sizes_can_be_chosen():
    barrier_us, sizes = 7.0, ("--tokens", "4096", "--world-size", "4", "--hidden", "1024", "--latent", "96")
    done = bench_model("--cards", "B200", "--link", "0.5", "--barrier", str(barrier_us), *sizes)
    assert done.exit_code == 0, done.output
    us = 3 * 1024 * 1024 * 2 / 450e9 * 1e6 + 2 * barrier_us
    assert f"| 4096 | {us:.1f}, synchronising" in done.output and "4 ranks, hidden 1024, 96 latent" in done.output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--cards", "A100"), "'A100' is none of H20"),
        (("--tokens", "0"), "there is nothing to count"),
        (("--results", str(ROOT / "docs")), "no run on a card has timed a barrier"),
    ],
)
def test_bad_options(arguments, told):
    done = bench_model(*arguments)
    assert done.exit_code == 2 and told in " ".join(done.output.split())


def test_what_is_not_measured_is_said():
    assert tables.comparison([], model.Shares(), []) == "Not measured yet.\n"
    found = model.documents(RESULTS)
    assert "Counted / measured:" in tables.comparison(found, model.Shares(), found)
