"""What of the plugins needs no engine: when they are off, what they refuse, how the launcher reaches all processes.

The rest: tests/engines.
"""

import importlib
import os
import re
import shutil
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


def test_a_release_that_does_not_say_which_is_left_alone(installed):
    """As where SGLang runs from its sources."""
    shutil.rmtree(installed / "sglang-99.0.dist-info")
    line = "tp_fused serves SGLang 0.5.6 and 0.5.23, this is a checkout: left as it is"
    assert launched(installed, TP_FUSED_SGLANG="1") == ("started\n", [line, line])


@pytest.mark.parametrize(
    "wanted, version, registered",
    [(None, "0.32.0", 0), ("1", "0.32.0+cpu", 4), ("1", "0.33.0", 0)],
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
    served = {name for name, value in models.items() if value == f"tp_fused.integrations.vllm.model:{name}"}
    sparse = {name for name, value in models.items() if value == f"tp_fused.integrations.vllm.deepseek_v32:{name}"}
    assert not registered or served == {"DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"}
    assert not registered or sparse == {"DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"}
    assert ("this is 0.33.0" in caplog.text) == (version == "0.33.0")


@pytest.mark.parametrize("name, told", [("DeepseekV32ForCausalLM", "DeepSeek-V3.2"), ("GlmMoeDsaForCausalLM", "GLM-5")])
def test_models_with_sparse_attention_are_vllm_s_own_off_cuda_after_one_line(monkeypatch, caplog, name, told):
    class Built:
        def __init__(self, **arguments):
            self.arguments = arguments

    names = ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM")
    classes = types.SimpleNamespace(**{one: type(one, (Built,), {}) for one in names})
    stand_ins = {
        "vllm": {},
        "vllm.models": {"deepseek_v32": classes},
        "vllm.distributed": {"get_tp_group": None},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.layernorm": {"RMSNorm": None},
    }
    for module, members in stand_ins.items():
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(__path__=[], **members))
    made = importlib.import_module("tp_fused.integrations.vllm.deepseek_v32")
    for module in ("deepseek_v32", "workspace"):  # made of stand-ins
        del sys.modules[f"tp_fused.integrations.vllm.{module}"]
        delattr(vllm_plugin, module)
    model = getattr(made, name)(vllm_config="config", prefix="model")
    assert isinstance(model, getattr(classes, name))
    assert model.arguments == {"vllm_config": "config", "prefix": "model"}
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"tp_fused leaves vLLM's model as it is: {told} has other layers in vLLM on this platform"


def test_the_entry_points_are_there():
    project = (ROOT / "pyproject.toml").read_text()
    entries = re.findall(r'^\[project\.entry-points\."(.*)"\]\ntp_fused = "(.*):(.*)"$', project, re.MULTILINE)
    assert {group for group, *_ in entries} == {"sglang.srt.plugins", "vllm.general_plugins"}
    assert all(callable(getattr(importlib.import_module(module), name)) for _, module, name in entries)
