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

from tp_fused import doctor

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tp_fused", "doctor", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_ranks_are_tried():
    done = run("--json", TP_FUSED_BACKEND="reference")  # what is asked for elsewhere does not count here
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["ok"]
    by_check = {finding["check"]: finding for finding in told["findings"]}
    assert torch.__version__ in by_check["versions"]["found"]
    assert by_check["2 ranks on cpu"]["found"] == "share memory: the cpu backend serves, and its result is right"


def no_folder(monkeypatch):
    monkeypatch.setattr(os.path, "isdir", lambda path: False)


def little_memory(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64 << 20))


def few_files(monkeypatch):
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: (256, 256))


def old_processor(monkeypatch):
    monkeypatch.setattr(doctor.native, "_C", SimpleNamespace(cpu_supported=lambda: False))


@pytest.mark.parametrize(
    ("obstacle", "check", "state", "found", "advice"),
    [
        (no_folder, "/dev/shm", doctor.FAILED, "missing", "mount a tmpfs there"),
        (little_memory, "/dev/shm", doctor.WARNING, "64 MiB free", "--shm-size"),
        (few_files, "open files", doctor.WARNING, "256 at most", "ulimit -n 1024"),
        (old_processor, "processor", doctor.WARNING, "no AVX2", "reference backend"),
    ],
)
def test_an_obstacle_comes_with_advice(monkeypatch, obstacle, check, state, found, advice):
    obstacle(monkeypatch)
    (finding,) = [finding for finding in doctor._host() if finding.check == check]
    assert (finding.state, finding.found) == (state, found)
    assert advice in finding.advice


def test_ranks_that_fail_are_told_in_one_line(monkeypatch, capsys):
    def fail(*arguments, **options):
        raise RuntimeError("-- Process 1 terminated --\nthe reference backend serves: no common memory")

    monkeypatch.setattr(doctor, "launch", fail)
    findings = [doctor.Finding("versions", doctor.OK, "1"), doctor._try("cpu")]
    assert doctor.report(findings, as_json=False) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[1] == "failed  2 ranks on cpu  the reference backend serves: no common memory"
    assert printed[2].strip().startswith("-> in a container")
