"""docs/how-to/torch_compile.md: its program runs under torchrun, and prints what the page shows."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/how-to/torch_compile.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.timeout(600)
def test_the_program_of_the_page(tmp_path):
    program = tmp_path / "model.py"
    program.write_text(blocks("python")[0])
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == blocks("text")[0]


def test_what_the_page_names_exists():
    """The reasons of its table are those of the sources, the calls are public."""
    from tp_fused import compile_pass

    sources = "".join(path.read_text() for path in (ROOT / "tp_fused").rglob("*.py"))
    for reason in re.findall(r"^\| `([^`|]*)` \|", PAGE, re.MULTILINE):
        for piece in re.split(r"\.\.\.|torch\.\w+|N ", reason):
            assert piece.strip(" ,'") in sources, reason
    for name in re.findall(r"compile_pass\.(\w+)", PAGE):
        assert hasattr(compile_pass, name), name
