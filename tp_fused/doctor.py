"""Whether this machine can run which backend, and what to do where it cannot: `python -m tp_fused doctor`.

Every line is one check: what was found and, where that is in the way of something, what to do. The last checks try it:
two ranks are started, make a workspace and call an op, on the CPU and, where there are GPUs, on them.
"""

import dataclasses
import json
import os
import resource
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from . import native
from ._version import __version__
from .groups import init
from .launch import launch, take_device
from .ops import rs_rmsnorm
from .reference import rms_norm

OK, WARNING, FAILED = "ok", "warning", "failed"
SHM_BYTES = 1 << 30  # of /dev/shm, under which a workspace of a serving engine would not find room
OPEN_FILES = 1024
TRY_RANKS, TRY_S = 2, 60.0


@dataclasses.dataclass(frozen=True)
class Finding:
    """One check. advice: what to do; empty where nothing has to be done."""

    check: str
    state: str
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """All checks, in the order in which one thing builds on another."""
    return [*_software(), *_host(), *_cards(), *_tries()]


# ---- the software ----


def _software() -> list[Finding]:
    cuda = torch.version.cuda or "no CUDA"
    versions = f"tp_fused {__version__}, torch {torch.__version__} ({cuda}), Python {sys.version.split()[0]}"
    findings = [Finding("versions", OK, versions)]
    newest = ".".join(map(str, native.NEWEST_TESTED_TORCH))
    if tuple(map(int, torch.__version__.split(".")[:2])) > native.NEWEST_TESTED_TORCH:
        advice = f"run tests/test_smoke.py of this tp_fused: {newest} is the newest torch that it was tested with"
        findings.append(Finding("torch", WARNING, f"newer than {newest}", advice))
    built = native._C.cuda_compiled()
    advice = "" if built or not torch.cuda.is_available() else "build it again with an nvcc and TP_FUSED_CUDA=1"
    state = WARNING if advice else OK
    found = f"for {native._C.CUDA_ARCHITECTURES}" if built else "not in this build"
    return [*findings, Finding("CUDA kernels", state, found, advice)]


# ---- the host ----


def _host() -> list[Finding]:
    supported = native._C.cpu_supported()
    advice = "" if supported else "ranks on the CPU will use the reference backend"
    findings = [Finding("processor", OK if supported else WARNING, "AVX2" if supported else "no AVX2", advice)]
    if not os.path.isdir("/dev/shm"):
        findings.append(
            Finding("/dev/shm", FAILED, "missing", "mount a tmpfs there: the cpu backend keeps its memory in it")
        )
    else:
        free = shutil.disk_usage("/dev/shm").free
        advice = "" if free >= SHM_BYTES else "enlarge it (docker run --shm-size=8g): workspaces on the CPU lie there"
        findings.append(Finding("/dev/shm", WARNING if advice else OK, f"{free / 2**20:.0f} MiB free", advice))
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    advice = "" if files >= OPEN_FILES else f"ulimit -n {OPEN_FILES}"
    findings.append(Finding("open files", WARNING if advice else OK, f"{files} at most", advice))
    return findings


# ---- the cards ----


def _cards() -> list[Finding]:
    if not torch.cuda.is_available():
        devices = sorted(Path("/dev").glob("nvidia[0-9]*"))
        if not devices:
            return [Finding("GPUs", OK, "none: ranks compute on the CPU")]
        advice = "install a torch with CUDA" if torch.version.cuda is None else "compare nvidia-smi's CUDA with torch's"
        return [Finding("GPUs", FAILED, f"{len(devices)} in /dev, but torch sees none", advice)]
    cards = range(torch.cuda.device_count())
    findings = []
    for card in cards:
        about = torch.cuda.get_device_properties(card)
        name = f"{about.name}, sm_{about.major}{about.minor}, {about.multi_processor_count} SMs"
        advice = ""
        if about.major < 8:
            advice = "the kernels want compute capability 8.0: the reference backend will serve"
        elif native._C.cuda_compiled() and not native._C.cuda_has_code(card):
            advice = "this build has no code for it: build again with TP_FUSED_CUDA_ARCHITECTURES"
        findings.append(Finding(f"GPU {card}", WARNING if advice else OK, name, advice))
    pairs = [(a, b) for a in cards for b in cards if a != b and not torch.cuda.can_device_access_peer(a, b)]
    if len(cards) > 1:
        advice = "ranks on these get the reference backend; look at nvidia-smi topo -p2p r" if pairs else ""
        found = f"not between {', '.join(f'{a} and {b}' for a, b in pairs)}" if pairs else "between all GPUs"
        findings.append(Finding("peer access", WARNING if pairs else OK, found, advice))
    if len(cards) < TRY_RANKS and "CUDA_MPS_PIPE_DIRECTORY" not in os.environ:
        advice = (
            "start ranks that share a GPU under MPS (tools/with_mps.sh): else they take turns, and times mean nothing"
        )
        findings.append(Finding("MPS", WARNING, "not in the environment", advice))
    if dist.is_nccl_available():
        findings.append(Finding("NCCL", OK, ".".join(map(str, torch.cuda.nccl.version()))))
    return findings


# ---- the tries ----


def _tries() -> list[Finding]:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() and native._C.cuda_compiled() else [])]
    return [_try(device) for device in devices]


def _try(device: str) -> Finding:
    """Ranks of their own, on this device: the backend that serves them, or what went wrong."""
    check = f"{TRY_RANKS} ranks on {device}"
    os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    try:
        launch(_try_rank, TRY_RANKS, device, timeout_s=TRY_S)
    except Exception as error:
        told = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        advice = "in a container, ranks need /dev/shm in common and, for GPUs, --ipc=host and the SYS_PTRACE capability"
        return Finding(check, FAILED, told, advice)
    return Finding(check, OK, f"share memory: the {device} backend serves, and its result is right")


def _try_rank(device: str) -> None:
    place = take_device(device)
    os.environ.pop("TP_FUSED_BACKEND", None)  # in this rank's process alone
    rows = torch.ones(5, 256, device=place.device) * (1 + dist.get_rank())
    weight = torch.linspace(0.5, 2, 256, device=place.device)
    with init(place.group, max_num_tokens=8, hidden_size=256, dtype=torch.float32, device=device, timeout_s=20) as made:
        if made.backend != device:
            raise RuntimeError(f"the {made.backend} backend serves: {made.reason}")
        output, sums = rs_rmsnorm(rows, None, weight, group=place.group)
        expected = torch.full_like(sums, sum(range(1, TRY_RANKS + 1)))
        torch.testing.assert_close(sums, expected, rtol=0, atol=0)
        torch.testing.assert_close(output, rms_norm(expected, weight, 1e-6), rtol=1e-6, atol=1e-6)


# ---- the report ----


def report(findings: list[Finding], as_json: bool) -> int:
    """Prints them; the exit code: 1 where a check failed."""
    failed = any(finding.state == FAILED for finding in findings)
    if as_json:
        print(
            json.dumps({"ok": not failed, "findings": [dataclasses.asdict(finding) for finding in findings]}, indent=2)
        )
        return int(failed)
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        print(f"{finding.state:8}{finding.check:{width + 2}}{finding.found}")
        if finding.advice:
            print(f"{'':{width + 10}}-> {finding.advice}")
    return int(failed)
