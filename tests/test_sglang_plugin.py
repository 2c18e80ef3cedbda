"""What of the SGLang plugin needs no SGLang: when it is off, and how its launcher reaches SGLang's processes.

The rest: tests/engines/test_sglang.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAUNCHER = """
import multiprocessing

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=print, args=["started"])
    process.start()
    process.join()
"""


@pytest.fixture
def installed(tmp_path):
    """A stand-in for SGLang of a release that nobody knows, whose server starts a process."""
    package, metadata = tmp_path / "sglang", tmp_path / "sglang-99.0.dist-info"
    package.mkdir()
    metadata.mkdir()
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text(LAUNCHER)
    (metadata / "METADATA").write_text("Name: sglang\nVersion: 99.0\n")
    return tmp_path


def launched(installed, **environment) -> tuple[str, list[str]]:
    command = [sys.executable, "-m", "tp_fused.integrations.sglang.launch_server"]
    kept = {name: value for name, value in os.environ.items() if name != "TP_FUSED_SGLANG"}
    paths = os.pathsep.join([str(ROOT), str(installed)])
    environment = {**kept, "PYTHONPATH": paths, **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "tp_fused" in line]


def test_off_unless_asked_for(installed):
    assert launched(installed) == ("started\n", [])
    assert launched(installed, TP_FUSED_SGLANG="0") == ("started\n", [])


def test_an_unknown_release_is_left_alone_with_one_line_a_process(installed):
    """That the started process says so, too, shows that it has the plugin."""
    line = "tp_fused serves SGLang 0.5.6 and 0.5.23, this is 99.0: left as it is"
    assert launched(installed, TP_FUSED_SGLANG="1") == ("started\n", [line, line])
