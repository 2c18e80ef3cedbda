"""Many sections in one command, the goals that they are held against, and the tables made of what they leave."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="the bench extra is not installed")
pytest.importorskip("rich", reason="the bench extra is not installed")

from typer.testing import CliRunner

from bench import bounds, decode, goals, multi, pages, results, run, suite, tables
from bench.__main__ import app
from bench.catalog import OPS
from bench.options import Options
from bench.questions import QUESTIONS

ROOT = Path(__file__).resolve().parents[1]


def section(op: str, **options) -> Options:
    sizes = {"hidden": 64, "latent": 96, "kv_lora": 32, "rope": 32, "iters": 2, "warmup": 1, "tokens": (5,)}
    return Options(ops=(op,), world_size=2, **{**sizes, **options})


def test_a_launch_goes_on_after_failures(tmp_path, capfd):
    sections = {
        "hasty": section("rs_rmsnorm", timeout_s=1e-9, iters=10**6, baselines=("own",)),
        "huge": section("rs_rmsnorm", tokens=(10**9,)),
        "small": section("rs_rmsnorm", baselines=("own",)),
    }
    (document,) = suite.run([suite.Launch("two", 250, sections)], tmp_path)
    assert document["results"][0]["wrong"] == 0
    assert json.loads((tmp_path / "small_cpu_2_ranks.json").read_text()) == document
    captured = capfd.readouterr()
    assert f"# two: failed (exit code {run.FAULT}) in hasty, then failed" in captured.out
    assert all(told in captured.err for told in ("never arrived", "/dev/shm"))


def test_a_launch_that_hangs_is_ended_and_tells_where(tmp_path, capfd):
    for limit_s in (12, 50, 200):  # where the machine is busy, ranks start late
        launch = suite.Launch("two", limit_s, {"endless": section("rs_rmsnorm", iters=10**9)})
        assert suite.run([launch], tmp_path) == []
        if "bench/timing.py" in capfd.readouterr().err:  # the ranks' stacks mix, but names of files stay whole
            return
    pytest.fail("no rank has said where it hung")


def test_a_file_is_named_after_section_device_and_ranks():
    machine = {"gpu": "NVIDIA H100 80GB HBM3", "gpus": 1, "device": "cuda"}
    document = {"machine": machine, "options": {"world_size": 8}}
    assert results.file_name("chain", document) == "chain_1xh100_8_ranks.json"


LAUNCHES = {"one card": (goals.GOALS, goals.LAUNCHES)}
LAUNCHES |= {f"{cards} cards": (multi.goals(cards), multi.launches(cards)) for cards in (2, 8)}
PLANNED = [(goal, launches) for chosen, launches in LAUNCHES.values() for goal in chosen]


def made_up(options: Options) -> dict:
    """What a section would leave, with times that tell its programs apart."""
    names = ("fused", *options.variants, *options.baselines)
    programs = {name: {"median_us": 10.0 + i, "copy_share": 0.5 + i} for i, name in enumerate(names)}
    (op,) = options.ops
    row = {"op": op, "host_us": 9.0, "host_empty_us": 6.0, "programs": programs}
    rows = [row | {"tokens": tokens} for tokens in options.tokens]
    return {"options": {"world_size": options.world_size, "hidden": options.hidden}, "results": rows}


@pytest.mark.parametrize(("goal", "launches"), PLANNED, ids=lambda value: getattr(value, "what", ""))
def test_every_goal_is_measured_by_one_section(goal, launches):
    """Of a launch. Two launches may measure the same, for whoever runs one of them; the first counts."""
    beside = ((goal.beside_op or goal.op, *place) for place in goal.beside)
    places, measured = ((goal.op, goal.hidden, goal.tokens), *beside), []
    for launch in launches:
        documents = [made_up(options) for options in launch.sections.values()]
        measured.append(goal.measured(documents))
        if measured[-1] is None:
            continue
        for op, hidden, tokens in places:
            others = [
                document
                for document in documents
                if document["options"]["hidden"] != hidden
                or not any((row["op"], row["tokens"]) == (op, tokens) for row in document["results"])
            ]
            assert len(others) == len(documents) - 1 and goal.measured(others) is None
    assert any(measured)


@pytest.mark.parametrize("launches", [launches for _, launches in LAUNCHES.values()], ids=LAUNCHES)
def test_sections_time_what_their_ops_can_be_timed_beside(launches):
    for launch in launches:
        for options in launch.sections.values():
            assert options.world_size == launch.world_size
            assert all(set(options.baselines) <= set(OPS[op].baselines) for op in options.ops)


def test_a_token_more_is_no_step_up():
    """Of the line through 128 and 256 tokens; and wide rows have the bandwidth of narrow ones."""

    def document(hidden, **times):
        rows = [
            {"op": "rs_rmsnorm", "tokens": int(at[1:]), "programs": {"fused": {"median_us": us, "copy_share": 8 / us}}}
            for at, us in times.items()
        ]
        return {"options": {"world_size": 8, "hidden": hidden}, "results": rows}

    documents = [document(7168, _128=10.0, _129=12.0, _256=22.8, _2048=100.0), document(16384, _896=125.0)]
    chosen = [goal for goal in goals.GOALS if goal.op == "rs_rmsnorm" and goal.beside and "in place" in goal.what]
    found = {(goal.hidden, goal.tokens): (goal.measured(documents)) for goal in chosen}
    assert found[7168, 129] == pytest.approx(12.0 / 10.1)
    assert found[16384, 896] == pytest.approx(0.8)
    assert found[7168, 257] is None and found[8192, 1792] is None


def test_an_op_is_held_against_another():
    """Of as many tokens and ranks, whatever run it comes from."""

    def document(op, **times):
        rows = [
            {"op": op, "tokens": int(at[1:]), "programs": {"fused": {"median_us": us}, "own": {"median_us": 1.0}}}
            for at, us in times.items()
        ]
        return {"options": {"world_size": 2, "hidden": 7168}, "results": rows}

    documents = [document("rs_rmsnorm", _1=10.0, _2=20.0, _4=7.0), document("rs_rmsnorm_ag", _1=12.0, _2=26.0)]
    chosen = [goal for goal in multi.goals(2) if goal.beside_op]
    found = {goal.tokens: goal.measured(documents) for goal in chosen}
    assert found == {1: pytest.approx(1.2), 2: pytest.approx(1.3), 4: None, 8: None, 16: None}
    assert [goal.met(found[goal.tokens]) for goal in chosen[:2]] == [True, False]


def test_a_goal_takes_the_first_run_that_has_what_it_compares():
    """Where launches time one op at one size: beside something else, and staged."""

    def document(**times):
        programs = {name: {"median_us": time} for name, time in times.items()}
        row = {"op": "rs_rmsnorm_ag", "tokens": 512, "programs": programs}
        return {"options": {"world_size": 4, "hidden": 7168}, "results": [row]}

    documents = [document(fused=9.0, twoshot=20.0), document(fused=10.0, staged=11.0), document(fused=1.0, staged=2.0)]
    chosen = [goal for goal in goals.GOALS if (goal.world_size, goal.op, goal.tokens) == (4, "rs_rmsnorm_ag", 512)]
    values = {goal.bound: goal.measured(documents) for goal in chosen}
    assert values == {1.3: pytest.approx(20 / 9), 1.15: pytest.approx(1.1)}


def test_an_eager_call_is_held_against_an_empty_one():
    """Not against a number of us, which a busy machine decides; runs that had no empty call do not tell."""

    def document(**host):
        row = {"op": "rs_rmsnorm", "tokens": 64, "programs": {"fused": {"median_us": 30.0}}, "host_us": 9.0} | host
        return {"options": {"world_size": 8, "hidden": 7168}, "results": [row]}

    (goal,) = (goal for goal in goals.GOALS if "on the CPU" in goal.what)
    assert goal.measured([document()]) is None
    value = goal.measured([document(), document(host_empty_us=7.2)])
    assert value == pytest.approx(1.25) and not goal.met(value) and goal.met(1.2)


def test_a_run_of_some_launches_keeps_what_others_have_measured(tmp_path, capsys):
    def document(commit: str, op: str, **programs: float):
        row = {"op": op, "tokens": 64, "programs": {name: {"median_us": time} for name, time in programs.items()}}
        machine = {"gpu": "NVIDIA H200", "gpus": 2, "device": "cuda", "commit": commit}
        about = {"format": 1, "date": f"day of {commit}", "machine": machine}
        return about | {"options": {"world_size": 2, "hidden": 7168}, "results": [row]}

    for made in (
        document("first", "mla_prologue", fused=9.0, flashinfer=10.0),
        document("second", "rs_rmsnorm_ag", fused=3.0, flashinfer=4.0),
    ):
        bounds.write("multi", [made], tmp_path, goals=bounds.table(multi.goals(2), [made]))
    kept = json.loads((tmp_path / "multi_2xh200_2_ranks.json").read_text())["goals"]
    found = {goal["op"]: (goal["value"], goal["commit"], goal["date"]) for goal in kept if goal["value"] is not None}
    assert found == {
        "mla_prologue": (0.9, "first", "day of first"),
        "rs_rmsnorm_ag": (0.75, "second", "day of second"),
    }
    assert len(kept) == len(multi.goals(2))
    assert {goal["met"] for goal in kept if goal["op"] == "mla_prologue" and goal["tokens"] == 64} == {False}


@pytest.mark.parametrize("name", ["multi_2xh100_2_ranks", "goals_1xh100_8_ranks"])
def test_goals_of_older_files_are_kept(tmp_path, name):
    """Which say neither when each goal was measured nor, some of them, of which hidden size."""
    file = ROOT / "bench" / "results" / f"{name}.json"
    before = json.loads(file.read_text())
    (tmp_path / file.name).write_text(file.read_text())
    world_size = int(name.split("_")[2])
    now = {"format": 1, "date": "today", "machine": before["machine"] | {"commit": "now"}}
    easy = {True: 0.0, False: 1e9}
    nothing = [
        goal | {"value": None, "met": None, "hidden": bounds.HIDDEN, "bound": easy[goal["at_least"]]}
        for goal in before["goals"]
    ]
    bounds.write(name.split("_")[0], [now | {"options": {"world_size": world_size}}], tmp_path, goals=nothing)
    kept = json.loads((tmp_path / file.name).read_text())["goals"]
    assert [goal["value"] for goal in kept] == [goal["value"] for goal in before["goals"]]
    measured = [goal for goal in kept if goal["value"] is not None]
    assert {(goal["commit"], goal["met"]) for goal in measured} == {(before["machine"]["commit"], True)}


# ---- few tokens ----


def test_decode_names_launches_that_end_in_a_minute_each():
    chosen = goals.launches(("decode",))
    assert [launch.name for launch in chosen] == ["decode-8", "decode-4", "decode-2"]
    assert all(launch.timeout_s <= 60 for launch in chosen)
    assert goals.launches(("decode-4", "one")) == [goals.LAUNCHES[2], chosen[1]]
    assert goals.launches() == goals.LAUNCHES
    documents = [made_up(options) for launch in chosen for options in launch.sections.values()]
    assert all(goal.measured(documents) for goal in decode.GOALS)


def test_without_flashinfer_its_goals_are_not_measured(capsys):
    """And the others are: of the programs that are left, the fastest."""
    documents = [made_up(options) for launch in decode.LAUNCHES for options in launch.sections.values()]
    for document in documents:
        for row in document["results"]:
            row["programs"].pop("flashinfer", None)
    rows = goals.table(decode.GOALS, documents)
    missing = [(row["world_size"], row["tokens"]) for row in rows if row["met"] is None]
    assert sorted(missing) == sorted([(ranks, tokens) for ranks in (2, 4) for tokens in (1, 16)] * 2)
    assert capsys.readouterr().out.count("FlashInfer") == len(missing)


@pytest.mark.parametrize("cards", [2, 3, 4, 8])
def test_multi_gives_every_rank_a_card_and_ends_in_time(cards):
    planned = multi.launches(cards)
    assert max(launch.world_size for launch in planned) <= cards
    parts = [multi.launches(cards, (part,)) for part in multi.PARTS]
    assert all(parts) and [launch for part in parts for launch in part] == planned
    # Of two cards all together; of more, each part by itself: --launches.
    for together in [planned] if cards < 4 else parts:
        assert sum(launch.timeout_s for launch in together) < 8 * 60
    names = [name for launch in planned for name in launch.sections]
    ops = {"rs_rmsnorm", "rs_rmsnorm_ag", "rs_rmsnorm_ag_fp8", "qkv_a_proj_ag", "qkv_a_proj_ag_complete", "chain"}
    assert ops | {"mla_prologue", "mla_prologue_fp8", "rs_rmsnorm_blocks", "beside_gemm"} <= set(names)


def test_the_fewest_blocks_near_the_best_time(tmp_path):
    times = {2: 30.0, 4: 20.0, 8: 10.2, 16: 10.0, 24: 9.95, 32: 11.0, 48: 12.0, 64: 12.5}
    programs = {f"ctas{count}": {"median_us": time} for count, time in times.items()}
    rows = [
        {"op": "swept", "tokens": 64, "programs": {**programs, "fused": {"median_us": 12.0}}},
        {"op": "unswept", "tokens": 64, "programs": {"fused": {"median_us": 1.0}}},
    ]
    assert multi.blocks_needed([{"results": rows}]) == [{"op": "swept", "tokens": 64, "best_us": 9.95, "blocks": 8}]


# ---- tables of the documentation ----


def test_the_documentation_shows_the_results_as_they_are():
    documents = pages.load()
    text = (ROOT / "docs" / "performance.md").read_text()
    shown = re.findall("<!-- table: (.*) -->", text)
    assert sorted(shown) == sorted(QUESTIONS) and pages.fill(text, documents) == text, "python -m bench tables"
    folder = ROOT / "docs" / "results"
    written = {path.name: path.read_text() for path in folder.iterdir()}
    assert written == pages.pages(documents), "python -m bench tables"


def test_tables_name_what_was_measured():
    machine = {"gpu": "H100", "gpus": 1, "torch": "2.11", "commit": "0123456789abcdef", "copy_gb_s": 3000.4}
    programs = {
        "fused": {"median_us": 10.04, "copy_share": 0.951},
        "ctas8": {"median_us": 12.0, "copy_share": 0.9},
        "own": {"median_us": 20.0},
    }
    row = {
        "op": "rs_rmsnorm",
        "tokens": 64,
        "programs": programs,
        "speedup": {"ctas8": 1.2, "own": 2.0},
        "host_us": 9.0,
        "host_us_fastest": 8.0,
    }
    options = {"world_size": 8, "hidden": 7168, "dtype": "bf16", "zero_copy": True}
    filled = tables.markdown({"machine": machine, "options": options, "results": [row]})
    assert (
        "1 x H100; torch 2.11; commit 0123456789ab; copies 3000 GB/s; 8 ranks" in filled and "inputs in place" in filled
    )
    assert "| tokens | rs_rmsnorm | of copies | on the CPU | ctas8 | own |" in filled
    assert "| 64 | 10.0 | 0.95 | 8.0 to 9.0 | 12.0 (1.20 x, 0.90 of copies) | 20.0 (2.00 x) |" in filled
    later = tables.markdown({"machine": machine, "options": options, "results": [row | {"host_empty_us": 7.5}]})
    assert "| 64 | 10.0 | 0.95 | 8.0 to 9.0 (empty 7.5) | 12.0" in later


def test_every_result_is_on_one_page(tmp_path):
    (tmp_path / "performance.md").touch()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "gone.md").touch()
    pages.write(tmp_path)
    text = "".join(path.read_text() for path in (tmp_path / "results").glob("[1-9c]*.md"))
    assert not (tmp_path / "results" / "gone.md").exists()
    for path in results.RESULTS.glob("*.json"):
        assert text.count(f"## {path.stem}\n") == 1, path.name


@pytest.mark.parametrize(
    ("command", "launches", "says"),
    [
        ("goals", ",", "',' names none of eight, four, one, even, fp8, decode, decode-8"),
        ("goals", "eight,nine", "'nine' is none of eight, four, one, even, fp8, decode, decode-8"),
        ("multi", " ", "' ' names none of ops, prologue, blocks, beside"),
    ],
)
def test_launches_have_to_be_named(command, launches, says):
    done = CliRunner().invoke(app, [command, "--launches", launches], env={"COLUMNS": "200"})
    assert done.exit_code == 2 and says in done.output, done.output
