"""Ranks started from an interactive session: the cells of docs/notebook.md, and what `launch` says of other cells."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_cells(cells: list[str], folder: Path) -> subprocess.CompletedProcess:
    """As a notebook does: in one process whose __main__ is no file, in `folder`; `%%writefile NAME` as IPython's."""
    typed = []
    for cell in cells:
        first, _, rest = cell.partition("\n")
        if first.startswith("%%writefile "):
            name = first.removeprefix("%%writefile ").strip()
            typed.append(f"open({name!r}, 'w').write({rest!r})")
        else:
            typed.append(cell)
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-c", "\n".join(typed)],  # with "" in sys.path, as a notebook has
        cwd=folder,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_the_cells_of_the_document(tmp_path):
    text = (ROOT / "docs" / "notebook.md").read_text()
    cells = [cell.replace("/tmp/", f"{tmp_path}/") for cell in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
    assert len(cells) == 2
    done = run_cells(cells, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 2 and all(f"`{line}`" in text for line in lines), done.stdout


def test_a_function_of_a_cell_is_refused(tmp_path):
    done = run_cells(["def main(): pass", "from tp_fused.launch import launch\nlaunch(main, 2)"], tmp_path)
    assert "ValueError: main was typed into an interactive session" in done.stderr, done.stderr
    assert "write it to a file and import it from there (docs/notebook.md)" in done.stderr
