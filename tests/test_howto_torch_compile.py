"""docs/how-to/torch_compile.md: its program runs on two ranks, and prints what the page shows."""

import re
from pathlib import Path

import pytest
from ranks import run_program

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/how-to/torch_compile.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.timeout(600)
@pytest.mark.preload("warm_compiler")
def test_the_program_of_the_page(tmp_path):
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    printed = run_program(blocks("python")[0], tmp_path, 2, timeout_s=500.0, **cache)
    assert printed == blocks("text")[0]


def test_what_the_page_names_exists():
    """The reasons of its table are those of the sources, the calls are public."""
    from tp_fused import compile_pass

    sources = "".join(path.read_text() for path in (ROOT / "tp_fused").rglob("*.py"))
    for reason in re.findall(r"^\| `([^`|]*)` \|", PAGE, re.MULTILINE):
        for piece in re.split(r"\.\.\.|torch\.\w+|N ", reason):
            assert piece.strip(" ,'") in sources, reason
    for name in re.findall(r"compile_pass\.(\w+)", PAGE):
        assert hasattr(compile_pass, name), name
