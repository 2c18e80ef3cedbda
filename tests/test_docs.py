"""The documents say what is so: their programs run, their lists are complete. Tables: tests/test_bench_suite.py."""

import importlib
import json
import re
import shutil
import subprocess

import pytest
from pages import ROOT, page, programs, run_on_ranks, run_under_torchrun

import tp_fused
from tp_fused import faults, ops, projections, prologue


def first_cells(text: str) -> set[str]:
    """What the first column of the tables names."""
    return set(re.findall(r"`(\w[\w ]*)`", "".join(re.findall(r"^\|([^|]*)\|", text, re.MULTILINE))))


def test_the_programs_run(tmp_path):
    """The README's, and the one of docs/ops.md that goes on from it."""
    use = programs("README.md", "python")[0]
    in_place = next(program for program in programs("docs/ops.md", "python") if "symm_empty" in program)
    printed = run_under_torchrun(
        tmp_path / "use.py",
        f"{use}\n{in_place}\n"
        "world_size = dist.get_world_size()\n"
        "assert h.shape == (num_tokens // world_size, 7168) and latent.shape == (num_tokens, 2112)\n"
        "assert out.shape == (num_tokens, 7168) and residual.shape == h.shape\n"
        "dist.destroy_process_group()\n",
        CUDA_VISIBLE_DEVICES="",
    )
    assert printed.count("rs_rmsnorm: backend ") == 2 and len(use.splitlines()) <= 15


def test_the_prologue_s_program_runs(tmp_path):
    (program,) = programs("docs/how-to/mla_prologue.md", "python")
    assert run_on_ranks(tmp_path, program).count("mla_prologue: all ranks take all 1 normed rows") == 2


@pytest.mark.preload("transformers")
def test_the_programs_on_transformers_run(tmp_path):
    pytest.importorskip("transformers", reason="needs transformers (the test extra)")
    from tiny_models import make_model, make_tokenizer

    make_model("v3").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    parts = programs("docs/how-to/transformers.md", "python")
    assert len(parts) == 3
    printed = run_on_ranks(tmp_path, "".join(parts), str(tmp_path / "model"))
    assert printed.startswith("who are you ") and len(printed.split()) == 3 + 8


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.skipif(not tp_fused.native._C.cpu_supported(), reason="the CPU lacks AVX2")
def test_the_c_program_runs_and_prints_what_its_page_says(tmp_path):
    library = ROOT / "tp_fused"
    built = tmp_path / "c_api"
    flags = [f"-L{library}", "-ltp_fused", f"-Wl,-rpath,{library}", "-pthread"]
    command = ["cc", "-Wall", "-Werror", f"-I{ROOT}/csrc", f"{ROOT}/examples/c_api.c", *flags, "-o", str(built)]
    subprocess.run(command, check=True, timeout=60)
    printed = subprocess.run([built], check=True, capture_output=True, text=True, timeout=60).stdout
    shown = re.findall(r"^    (.* H200: .*|rank \d: .*)$", page("docs/c_api.md"), re.MULTILINE)
    assert sorted(printed.splitlines()) == sorted(shown)


def test_every_op_is_in_the_tables_and_in_the_reference():
    modules = (ops, projections, prologue)
    assert {name for module in modules for name in module.__all__} <= first_cells(page("docs/ops.md"))
    referred = re.findall(r"^::: (tp_fused\.[\w.]+)$", page("docs/ops.md"), re.MULTILINE)
    assert {module.__name__ for module in modules} <= set(referred)
    others = set(tp_fused.__all__) - {"__version__"} - {name for module in modules for name in module.__all__}
    assert others <= {name.rpartition(".")[2] for name in referred}


def test_every_reason_of_a_fault_is_explained():
    call = {"op": 1, "num_tokens": 1}
    record = {"expected": call, "seen": call, "rank": 0, "peer": 1, "call_number": 1, "waited_s": 1.0}
    reasons = {faults.fault_from({**record, "status": status}).reason for status in range(1, 9)}
    assert len(reasons) == 7 and reasons <= first_cells(page("docs/troubleshooting.md"))
    assert reasons <= first_cells(page("docs/reliability.md"))


def test_every_variable_is_explained():
    sources = [
        ROOT / "setup.py",
        *(path for folder in ("tp_fused", "bench", "tests") for path in (ROOT / folder).rglob("*.py")),
    ]
    read = {name for path in sources for name in re.findall(r"environ[^\n]*?\"(TP_FUSED_\w+)\"", path.read_text())}
    assert "TP_FUSED_BACKEND" in read and read <= first_cells(page("docs/environment.md"))


def test_every_fitted_constant_says_where_it_comes_from():
    """Card, command and commit; those that were fitted together stand under the table's comment."""
    text = (ROOT / "csrc/plan/fitted.h").read_text()
    told = re.findall(r"((?: *//[^\n]*\n)+) *(?:constexpr )?(?:int\w*|Fitted) (k?\w+)[^;]*;", text)
    names = {name for _, name in told}
    assert {"ring_bytes", "few_rows", "kFittedSm90", "kLinkCost"} <= names
    for comment, name in told:
        where = all(re.search(part, comment) for part in (r"\b[HAB]\d{2,3}\b", r"`[^`]+`", r"\b[0-9a-f]{7}\b"))
        together = "kFittedSm90" in comment or name in ("block_copies", "fp8_copies_seen", "kFittedSm80")
        assert where or together, f"{name}: {comment}"
    assert "constexpr" not in (ROOT / "csrc/plan/prologue.h").read_text()


def test_what_the_protocol_s_model_stands_for_is_in_csrc():
    sources = "".join(path.read_text() for path in (ROOT / "csrc").rglob("*.*"))
    rows = re.findall(r"^\| [^|]* \|([^|]*)\|$", page("models/README.md"), re.MULTILINE)
    named = {part for row in rows for name in re.findall(r"`([\w:]+)`", row) for part in name.split("::")}
    assert len(named) > 30 and not [name for name in named if not re.search(rf"\b{name}\b", sources)]


def test_short_pages_stay_short():
    assert len(page("README.md").splitlines()) < 100
    assert len(page("docs/performance.md").splitlines()) <= 120
    assert not [path for path in ROOT.glob("docs/**/*.md") if "Not measured yet" in path.read_text()]


@pytest.mark.parametrize("cards", ["h100", "h200"])
@pytest.mark.parametrize("op", ["rs_rmsnorm", "qkv_a_proj_ag"])
def test_the_readme_tells_what_was_measured(op, cards):
    document = json.loads((ROOT / f"bench/results/{op}_2x{cards}_2_ranks.json").read_text())
    (row,) = [row for row in document["results"] if row["tokens"] == 16384]
    assert f" {row['speedup']['dist']:.2f} " in page("README.md").replace("\n", " ")


def test_the_pictures_are_of_the_results(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    plots = importlib.import_module("plots")
    plots.draw_all(tmp_path)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert len(drawn) == 3
    assert drawn == {name: page(f"docs/images/{name}") for name in drawn}, "python docs/plots.py"
