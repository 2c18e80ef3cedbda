"""`python -m tp_fused doctor`: what is found here, and what it says where something is in the way."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tp_fused import doctor, native, nvml

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tp_fused", "doctor", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_ranks_are_tried(device):
    done = run("--json", TP_FUSED_BACKEND="reference")  # tried beside the others
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["ok"]
    by_check = {finding["check"]: finding for finding in told["findings"]}
    assert torch.__version__ in by_check["versions"]["found"]
    assert by_check["2 ranks on cpu"]["found"] == "share memory: the cpu backend serves, and its result is right"
    asked = by_check["TP_FUSED_BACKEND=reference"]
    assert asked["found"] == "the reference backend serves, and its result is right"
    if device == "cuda":
        assert by_check["driver"]["found"].endswith(f"torch was built with {torch.version.cuda}")
        assert by_check["driver"]["state"] != doctor.FAILED and by_check["GPU 0"]["state"] == doctor.OK


def test_ranks_are_tried_under_torchrun():
    """By ranks of their own: this process is one of torchrun's, which come one by one."""
    torchruns = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}
    done = run("--json", **torchruns, MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("foo", "ValueError: TP_FUSED_BACKEND=foo: must be one of "),
        ("cuda", "ValueError: TP_FUSED_BACKEND=cuda cannot run: "),
    ],
)
def test_a_backend_that_is_asked_for_is_tried(monkeypatch, asked, found):
    if asked == "cuda" and torch.cuda.is_available():
        pytest.skip("that one may run here")
    monkeypatch.setenv("TP_FUSED_BACKEND", asked)
    alone, as_asked = doctor._tries()
    assert (alone.check, alone.state) == ("2 ranks on cpu", doctor.OK)
    assert (as_asked.check, as_asked.state) == (f"TP_FUSED_BACKEND={asked}", doctor.FAILED)
    assert as_asked.found.startswith(found) and as_asked.advice.startswith("unset it")


def no_folder(monkeypatch):
    monkeypatch.setattr(os.path, "isdir", lambda path: False)


def little_memory(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64 << 20))


def few_files(monkeypatch):
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: (256, 256))


def little_locked_memory(monkeypatch):
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: (1 << 16, 1 << 16))
    monkeypatch.setattr(os.path, "isdir", lambda path: True)


def old_processor(monkeypatch):
    monkeypatch.setattr(doctor.native, "_C", SimpleNamespace(cpu_supported=lambda: False))


@pytest.mark.parametrize(
    ("obstacle", "check", "state", "found", "advice"),
    [
        (no_folder, "/dev/shm", doctor.FAILED, "missing", "mount a tmpfs there"),
        (little_memory, "/dev/shm", doctor.WARNING, "64 MiB free", "--shm-size"),
        (few_files, "open files", doctor.WARNING, "256 at most", "ulimit -n 1024"),
        (little_locked_memory, "locked memory", doctor.WARNING, "64 KiB at most", "--ulimit memlock=-1"),
        (old_processor, "processor", doctor.WARNING, "no AVX2", "reference backend"),
    ],
)
def test_an_obstacle_comes_with_advice(monkeypatch, obstacle, check, state, found, advice):
    obstacle(monkeypatch)
    (finding,) = [finding for finding in doctor._host() if finding.check == check]
    assert (finding.state, finding.found) == (state, found)
    assert advice in finding.advice


def test_handles_are_passed_between_processes():
    passed, _ = doctor._handles()  # a container may refuse the other one
    assert (passed.check, passed.state) == ("handles", doctor.OK)


def test_handles_that_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_CHILD", doctor._CHILD.replace("taken >= 0", "ctypes.set_errno(1)"))
    passed, taken = doctor._handles()
    assert passed.state == doctor.OK
    assert (taken.state, taken.found) == (doctor.WARNING, "refused between processes (Operation not permitted)")
    assert "--cap-add=SYS_PTRACE" in taken.advice
    monkeypatch.setattr(doctor, "_CHILD", "raise OSError('no sockets here')")
    (passed,) = doctor._handles()
    assert passed.state == doctor.WARNING and passed.found.endswith("OSError: no sockets here")
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    (passed,) = doctor._handles()
    assert passed.found == f"cannot be passed by sockets in {folder}: AF_UNIX path too long"


# ---- cards that are not there ----


def with_cards(monkeypatch, count: int, apart=(), by_pcie=(), told=True) -> None:
    """So many H200; pairs that cannot read each other, for want of a chipset, and pairs without NVLink."""

    def status(a: str, b: str, index: int) -> int:
        pair = (int(a[-1]), int(b[-1]))
        if index == nvml.P2P_READ:
            return 1 if pair in apart else nvml.P2P_OK
        return 5 if pair in by_pcie else nvml.P2P_OK

    def properties(card: int) -> SimpleNamespace:
        return SimpleNamespace(name="H200", major=9, minor=0, multi_processor_count=132, uuid=f"uuid-{card}")

    for name, function in {
        "is_available": lambda: True,
        "device_count": lambda: count,
        "get_device_properties": properties,
        "can_device_access_peer": lambda a, b: (min(a, b), max(a, b)) not in apart,
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(native._C, "cuda_has_code", lambda card: True)  # which build this is makes no difference
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor, "_newest_cuda", lambda: 13000)
    connected = nvml.Nvml("580.95", lambda uuid: uuid, status), ""
    monkeypatch.setattr(nvml, "connect", lambda: connected if told else (None, "NVML is not installed"))
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    monkeypatch.setattr(doctor.dist, "is_nccl_available", lambda: True)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/nowhere")
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY")


def by_check(findings) -> dict[str, doctor.Finding]:
    return {finding.check: finding for finding in findings}


def test_cards_that_can_run_everything(monkeypatch):
    with_cards(monkeypatch, 3)
    findings = doctor._cards()
    assert {finding.state for finding in findings} == {doctor.OK}
    found = {finding.check: finding.found for finding in findings}
    assert found["driver"] == "580.95, serves CUDA 13.0, torch was built with 13.0"
    assert found["GPU 2"] == "H200, sm_90, 132 SMs"
    assert found["peer access"] == "between all GPUs"
    assert found["NVLink"] == "between all GPUs with peer access"
    assert found["NCCL"] == "2.28.9"


def test_pairs_without_peer_access_or_nvlink(monkeypatch):
    with_cards(monkeypatch, 4, apart=[(0, 3), (1, 3), (2, 3)], by_pcie=[(0, 2)])
    found = by_check(doctor._cards())
    assert found["peer access"].state == found["NVLink"].state == doctor.WARNING
    why = "(the chipset does not support it)"
    assert found["peer access"].found == f"not between 0-3 {why}, 1-3 {why}, 2-3 {why}"
    assert "reference backend" in found["peer access"].advice
    assert found["NVLink"].found == "PCIe between 0-2"
    assert "CUDA_VISIBLE_DEVICES" in found["NVLink"].advice


def test_links_that_nvml_does_not_know(monkeypatch):
    def fail(*_):
        raise RuntimeError("Invalid Argument")

    with_cards(monkeypatch, 2, apart=[(0, 1)])
    monkeypatch.setattr(nvml, "connect", lambda: (nvml.Nvml("580.95", fail, fail), ""))
    assert by_check(doctor._cards())["peer access"].found == "not between 0-1"


def test_a_driver_that_does_not_answer(monkeypatch):
    with_cards(monkeypatch, 1)
    monkeypatch.setattr(doctor, "_newest_cuda", lambda: 0)
    found = by_check(doctor._cards())["driver"]
    assert (found.state, found.found) == (doctor.FAILED, "none answers")


def test_without_nvml_links_are_not_told(monkeypatch):
    with_cards(monkeypatch, 2, told=False)
    found = by_check(doctor._cards())
    assert found["NVML"].found == "NVML is not installed: links between GPUs are not looked at"
    assert "pip install nvidia-ml-py" in found["NVML"].advice
    assert "NVLink" not in found and found["peer access"].state == doctor.OK
    assert found["driver"].found == "serves CUDA 13.0, torch was built with 13.0"


@pytest.mark.parametrize(
    ("serves", "torchs", "state", "advice"),
    [
        (12080, "13.0", doctor.FAILED, "update the driver, or install a torch for CUDA 12"),
        (13000, "13.0", doctor.OK, ""),
        (13000, "12.8", doctor.OK, ""),
        (12040, "12.8", doctor.WARNING, "better update the driver"),
    ],
)
def test_the_driver_serves_torchs_cuda(monkeypatch, serves, torchs, state, advice):
    with_cards(monkeypatch, 1)
    monkeypatch.setattr(torch.version, "cuda", torchs)
    monkeypatch.setattr(doctor, "_newest_cuda", lambda: serves)
    found = by_check(doctor._cards())["driver"]
    assert found.state == state and advice in found.advice


@pytest.mark.parametrize(
    ("num_cards", "named", "state", "found"),
    [
        (1, None, doctor.WARNING, "no daemon; ranks with a GPU each need none"),
        (2, None, doctor.OK, "no daemon; ranks with a GPU each need none"),
        (2, "empty", doctor.WARNING, "no daemon in CUDA_MPS_PIPE_DIRECTORY={folder}"),
        (1, "served", doctor.OK, "a daemon serves {folder}"),
    ],
)
def test_mps(monkeypatch, tmp_path, num_cards, named, state, found):
    with_cards(monkeypatch, num_cards)
    monkeypatch.setattr(doctor, "_MPS_FOLDER", str(tmp_path / "none"))
    if named:
        monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    if named == "served":
        (tmp_path / "control").touch()
    told = by_check(doctor._cards())["MPS"]
    assert (told.state, told.found) == (state, found.format(folder=tmp_path))


def test_an_old_nccl(monkeypatch):
    with_cards(monkeypatch, 2)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 26, 2))
    found = by_check(doctor._cards())["NCCL"]
    assert (found.state, found.found) == (doctor.WARNING, "2.26.2")
    assert "pip install 'nvidia-nccl-cu13>=2.27'" in found.advice


def test_nvml_that_is_not_there_says_why():
    """On any machine: connected, or a reason."""
    connected, why_not = nvml.connect()
    assert (connected is None) == bool(why_not)


# ---- the report ----


def test_ranks_that_fail_are_told_in_one_line(monkeypatch, capsys):
    def fail(*arguments, **options):
        raise RuntimeError("-- Process 1 terminated --\nthe reference backend serves: no common memory")

    monkeypatch.setattr(doctor, "launch", fail)
    findings = [doctor.Finding("versions", doctor.OK, "1"), doctor._try("cpu", 2)]
    assert doctor.report(findings, as_json=False) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[1] == "failed  2 ranks on cpu  the reference backend serves: no common memory"
    assert printed[2].strip().startswith("-> in a container")
