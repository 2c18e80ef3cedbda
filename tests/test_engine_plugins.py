"""What of the plugins needs no engine: when they are off, what they refuse, how the launcher reaches all processes.

The rest: tests/engines.
"""

import importlib
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from tp_fused.integrations import sglang as sglang_plugin
from tp_fused.integrations import vllm as vllm_plugin

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


def test_off_unless_asked_for(installed, monkeypatch, caplog):
    assert launched(installed) == ("started\n", [])
    # Of a release that nobody knows, it would say so.
    monkeypatch.syspath_prepend(installed)
    for asked in ("0", ""):
        monkeypatch.setenv("TP_FUSED_SGLANG", asked)
        sglang_plugin.plugin()
    assert caplog.text == ""


def test_an_unknown_release_is_left_alone_with_one_line_a_process(installed):
    """That the started process says so, too, shows that it has the plugin."""
    line = "tp_fused serves SGLang 0.5.6 and 0.5.23, this is 99.0: left as it is"
    assert launched(installed, TP_FUSED_SGLANG="1") == ("started\n", [line, line])


@pytest.mark.parametrize(
    "wanted, version, registered",
    [(None, "0.32.0", 0), ("1", "0.32.0+cpu", 2), ("1", "0.33.0", 0)],
)
def test_vllm_s_models_are_replaced_where_asked_for_and_known(monkeypatch, caplog, wanted, version, registered):
    models = {}
    registry = types.SimpleNamespace(register_model=models.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(__version__=version, ModelRegistry=registry))
    monkeypatch.delenv("TP_FUSED_VLLM", raising=False)
    if wanted is not None:
        monkeypatch.setenv("TP_FUSED_VLLM", wanted)
    vllm_plugin.plugin()
    vllm_plugin.plugin()  # vLLM may call it again
    assert len(models) == registered
    assert all(value == f"tp_fused.integrations.vllm.model:{name}" for name, value in models.items())
    assert ("this is 0.33.0" in caplog.text) == (version == "0.33.0")


def test_the_entry_points_are_there():
    project = (ROOT / "pyproject.toml").read_text()
    entries = re.findall(r'^\[project\.entry-points\."(.*)"\]\ntp_fused = "(.*):(.*)"$', project, re.MULTILINE)
    assert {group for group, *_ in entries} == {"sglang.srt.plugins", "vllm.general_plugins"}
    assert all(callable(getattr(importlib.import_module(module), name)) for _, module, name in entries)
