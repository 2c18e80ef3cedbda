"""Whether this machine can run which backend, and what to do where it cannot: `python -m tp_fused doctor`.

Every line is one check: what was found and, where that is in the way of something, what to do. The last checks try it:
ranks are started, make a workspace and call an op, on the CPU and, where there are GPUs, on them.
"""

import ctypes
import dataclasses
import itertools
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import torch
import torch.cuda.nccl
import torch.distributed as dist

from . import native, nvml
from ._version import __version__
from .backends import BACKENDS
from .groups import default_type, init
from .launch import launch, take_device
from .ops import rs_rmsnorm
from .reference import rms_norm

OK, WARNING, FAILED = "ok", "warning", "failed"
SHM_BYTES = 1 << 30  # of /dev/shm, under which a workspace of a serving engine would not find room
OPEN_FILES = 1024
OLDEST_NCCL = (2, 27)  # as in the extras of pyproject.toml
TRY_S = 60.0
_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_MPS_FOLDER = "/tmp/nvidia-mps"  # of a daemon that was told no other


@dataclasses.dataclass(frozen=True)
class Finding:
    """One check. advice: what to do; empty where nothing has to be done."""

    check: str
    state: str
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """All checks, in the order in which one thing builds on another."""
    return [*_software(), *_host(), *_handles(), *_cards(), *_tries()]


def _unless(good: bool, check: str, found: str, advice: str) -> Finding:
    """What was found is good, or a warning with advice."""
    return Finding(check, OK, found) if good else Finding(check, WARNING, found, advice)


# ---- the software ----


def _software() -> list[Finding]:
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    versions = f"tp_fused {__version__}, torch {torch.__version__} ({cuda}), Python {sys.version.split()[0]}"
    findings = [Finding("versions", OK, versions)]
    newest = ".".join(map(str, native.NEWEST_TESTED_TORCH))
    if tuple(map(int, torch.__version__.split(".")[:2])) > native.NEWEST_TESTED_TORCH:
        advice = f"run tests/test_smoke.py of this tp_fused: {newest} is the newest torch that it was tested with"
        findings.append(Finding("torch", WARNING, f"newer than {newest}", advice))
    built = native._C.cuda_compiled()
    found = f"for {native._C.CUDA_ARCHITECTURES}" if built else "not in this build"
    advice = "build it again with an nvcc and TP_FUSED_CUDA=1"
    return [*findings, _unless(built or not torch.cuda.is_available(), "CUDA kernels", found, advice)]


# ---- the host ----


def _host() -> list[Finding]:
    supported = native._C.cpu_supported()
    advice = "ranks on the CPU will use the reference backend"
    findings = [_unless(supported, "processor", "AVX2" if supported else "no AVX2", advice)]
    if not os.path.isdir("/dev/shm"):
        advice = "mount a tmpfs there: the cpu backend keeps its memory in it"
        findings.append(Finding("/dev/shm", FAILED, "missing", advice))
    else:
        free = shutil.disk_usage("/dev/shm").free
        advice = "enlarge it (docker run --shm-size=8g): workspaces on the CPU lie there"
        findings.append(_unless(free >= SHM_BYTES, "/dev/shm", f"{free / 2**20:.0f} MiB free", advice))
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    findings.append(_unless(files >= OPEN_FILES, "open files", f"{files} at most", f"ulimit -n {OPEN_FILES}"))
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    unlimited = locked == resource.RLIM_INFINITY
    found = "no limit" if unlimited else f"{locked >> 10} KiB at most"
    # Only what a network card reads and writes has to be locked: CUDA's pinned memory does not count.
    needed = os.path.isdir("/dev/infiniband")
    advice = "ulimit -l unlimited (docker run --ulimit memlock=-1): NCCL registers memory with the network card"
    return [*findings, _unless(unlimited or not needed, "locked memory", found, advice)]


# What a rank does to hand a file descriptor, as CUDA exports memory by, to another: send it over a Unix socket, as
# torch's symmetric memory does; and take it out of the other process, as torch's expandable segments do.
_CHILD = """
import ctypes, os, socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
    sender.connect(sys.argv[1])
    socket.send_fds(sender, [b"handle"], [0])
PIDFD_OPEN, PIDFD_GETFD = 434, 438
libc = ctypes.CDLL(None, use_errno=True)
taken = parent = libc.syscall(PIDFD_OPEN, os.getppid(), 0)
if parent >= 0:
    taken = libc.syscall(PIDFD_GETFD, parent, 0, 0)
print(0 if taken >= 0 else ctypes.get_errno())
"""


def _handles() -> list[Finding]:
    """Whether one process can give another a file descriptor. The child's parent is no more to it than another rank."""
    path = os.path.join(os.environ.get("TMPDIR", "/tmp"), f"tp_fused-doctor-{os.getpid()}")
    check, advice = "handles", "ranks on GPUs pass handles by sockets in TMPDIR: set it to a short path that all share"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
            receiver.bind(path)
            receiver.settimeout(10)
            command = [sys.executable, "-I", "-S", "-c", _CHILD, path]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10)
            if done.returncode != 0:
                raise OSError(done.stderr.strip().splitlines()[-1])
            _, (received,), _, _ = socket.recv_fds(receiver, 16, 1)
            os.close(received)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [Finding(check, WARNING, f"cannot be passed by sockets in {os.path.dirname(path)}: {error}", advice)]
    finally:
        if os.path.exists(path):
            os.unlink(path)
    passed = Finding(check, OK, f"are passed between processes by sockets in {os.path.dirname(path)}")
    refusal = int(done.stdout)
    advice = (
        "only torch's expandable_segments need it: docker run --cap-add=SYS_PTRACE, or sysctl "
        "kernel.yama.ptrace_scope=0, or leave them off"
    )
    found = f"refused between processes ({os.strerror(refusal)})" if refusal else "permitted between processes"
    return [passed, _unless(refusal == 0, "pidfd_getfd", found, advice)]


# ---- the cards ----


def _cards() -> list[Finding]:
    if not torch.cuda.is_available():
        devices = sorted(Path("/dev").glob("nvidia[0-9]*"))
        if not devices:
            return [Finding("GPUs", OK, "none: ranks compute on the CPU")]
        advice = "CUDA_VISIBLE_DEVICES hides them, or the driver does not run: look at nvidia-smi"
        if torch.version.cuda is None:
            advice = "install a torch with CUDA"
        found = f"{len(devices)} in /dev, but torch sees none"
        return [*_driver(), Finding("GPUs", FAILED, found, advice)]
    cards = list(range(torch.cuda.device_count()))
    return [*_driver(), *map(_card, cards), *(_links(cards) if len(cards) > 1 else []), *_mps(len(cards)), _nccl()]


def _newest_cuda() -> int:
    """The newest CUDA that the driver serves, as 1000 * major + 10 * minor; 0: no driver answers.

    Asked of the driver itself: not every CUDA build of torch passes it on, and NVML may not be installed.
    """
    try:
        libcuda, number = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
        return 0 if libcuda.cuDriverGetVersion(ctypes.byref(number)) else number.value
    except OSError:  # there is none
        return 0


def _driver() -> list[Finding]:
    """The driver, and the newest CUDA that it serves, beside torch's."""
    if torch.version.cuda is None:
        return []
    connected, why_not = nvml.connect()
    driver = f"{connected.driver}, " if connected else ""
    number, torchs = _newest_cuda(), torch.version.cuda
    if not number:
        advice = "install NVIDIA's driver; start a container with the GPUs (docker run --gpus all)"
        return [Finding("driver", FAILED, "none answers", advice)]
    serves, needed = (number // 1000, number % 1000 // 10), tuple(map(int, torchs.split(".")[:2]))
    found = f"{driver}serves CUDA {serves[0]}.{serves[1]}, torch was built with {torchs}"
    findings = []
    if connected is None:
        advice = "pip install nvidia-ml-py; in a container, NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        findings.append(Finding("NVML", WARNING, f"{why_not}: links between GPUs are not looked at", advice))
    if serves[0] < needed[0]:
        advice = f"update the driver, or install a torch for CUDA {serves[0]}"
        return [*findings, Finding("driver", FAILED, found, advice)]
    advice = "works, but this driver compiles no PTX of so new a CUDA: better update the driver"
    return [*findings, _unless(serves >= needed, "driver", found, advice)]


def _card(card: int) -> Finding:
    about = torch.cuda.get_device_properties(card)
    name = f"{about.name}, sm_{about.major}{about.minor}, {about.multi_processor_count} SMs"
    if about.major < 8:
        advice = "the kernels want compute capability 8.0: the reference backend will serve"
        return Finding(f"GPU {card}", WARNING, name, advice)
    has_code = not native._C.cuda_compiled() or native._C.cuda_has_code(card)
    advice = "this build has no code for it: build again with TP_FUSED_CUDA_ARCHITECTURES"
    return _unless(has_code, f"GPU {card}", name, advice)


def _links(cards: list[int]) -> list[Finding]:
    """How each pair of GPUs reaches the other's memory."""
    connected, _ = nvml.connect()
    uuids = {card: str(torch.cuda.get_device_properties(card).uuid) for card in cards}
    apart, by_pcie = [], []
    for a, b in itertools.combinations(cards, 2):
        if not (torch.cuda.can_device_access_peer(a, b) and torch.cuda.can_device_access_peer(b, a)):
            why = connected.status(uuids[a], uuids[b], nvml.P2P_READ) if connected else None
            apart.append(f"{a}-{b}" + (f" ({nvml.P2P_WHY_NOT.get(why, why)})" if why else ""))
        elif connected and connected.status(uuids[a], uuids[b], nvml.P2P_NVLINK) not in (nvml.P2P_OK, None):
            by_pcie.append(f"{a}-{b}")
    found = f"not between {', '.join(apart)}" if apart else "between all GPUs"
    advice = "ranks on these get the reference backend; look at nvidia-smi topo -p2p r"
    findings = [_unless(not apart, "peer access", found, advice)]
    if connected and len(apart) < len(cards) * (len(cards) - 1) // 2:
        found = f"PCIe between {', '.join(by_pcie)}" if by_pcie else "between all GPUs with peer access"
        advice = "choose GPUs that NVLink connects with CUDA_VISIBLE_DEVICES: nvidia-smi topo -m shows them"
        findings.append(_unless(not by_pcie, "NVLink", found, advice))
    return findings


def _mps(num_cards: int) -> list[Finding]:
    """MPS: needed where ranks share a GPU."""
    named = os.environ.get("CUDA_MPS_PIPE_DIRECTORY")
    folder = named or _MPS_FOLDER
    if os.path.exists(f"{folder}/control"):
        return [Finding("MPS", OK, f"a daemon serves {folder}")]
    if named:
        advice = "start nvidia-cuda-mps-control -d there, or unset the variable"
        return [Finding("MPS", WARNING, f"no daemon in CUDA_MPS_PIPE_DIRECTORY={named}", advice)]
    advice = "start ranks that share a GPU under MPS (tools/with_mps.sh): else they take turns, and times mean nothing"
    return [_unless(num_cards > 1, "MPS", "no daemon; ranks with a GPU each need none", advice)]


def _nccl() -> Finding:
    if not dist.is_nccl_available():
        return Finding("NCCL", WARNING, "not in this torch", "install a torch with NCCL: ranks with a GPU each need it")
    version = torch.cuda.nccl.version()
    least = ".".join(map(str, OLDEST_NCCL))
    package = f"nvidia-nccl-cu{(torch.version.cuda or '').split('.')[0]}"
    advice = f"pip install '{package}>={least}': older ones were not tested"
    return _unless(version[:2] >= OLDEST_NCCL, "NCCL", ".".join(map(str, version)), advice)


# ---- the tries ----


def _tries() -> list[Finding]:
    findings = [_try("cpu", 2)]
    asked = os.environ.get("TP_FUSED_BACKEND")
    if torch.cuda.is_available() and native._C.cuda_compiled():
        findings.append(_try("cuda", min(max(torch.cuda.device_count(), 2), native._C.MAX_RANKS)))
    return [*findings, _try(default_type(), 2, asked)] if asked else findings


def _try(device: str, num_ranks: int, asked: str | None = None) -> Finding:
    """Ranks of their own, on this device: the backend that serves them, or what went wrong.

    asked: for this backend, as the environment does of every `init` here.
    """
    check = f"TP_FUSED_BACKEND={asked}" if asked else f"{num_ranks} ranks on {device}"
    os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    # Ranks of their own, where torchrun has started this process as one of its ranks, too.
    torchruns = {name: os.environ.pop(name) for name in _OF_TORCHRUN if name in os.environ}
    try:
        launch(_try_rank, num_ranks, device, asked, timeout_s=TRY_S)
    except Exception as error:
        told = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        advice = (
            "in a container, ranks need /dev/shm, /tmp and, for GPUs, the process ids in common: docker's --ipc, --pid"
        )
        if asked:
            advice = f"unset it, or ask for one that can run here: one of {', '.join(BACKENDS)}"
        return Finding(check, FAILED, told, advice)
    finally:
        os.environ |= torchruns
    shared = "" if asked else "share memory: "
    return Finding(check, OK, f"{shared}the {asked or device} backend serves, and its result is right")


def _try_rank(device: str, asked: str | None) -> None:
    place = take_device(device)
    os.environ.pop("TP_FUSED_BACKEND", None)  # in this rank's process alone
    if asked:
        os.environ["TP_FUSED_BACKEND"] = asked
    rows = torch.ones(5, 256, device=place.device) * (1 + dist.get_rank())
    weight = torch.linspace(0.5, 2, 256, device=place.device)
    with init(place.group, max_num_tokens=8, hidden_size=256, dtype=torch.float32, device=device, timeout_s=20) as made:
        if made.backend != (asked or device):
            raise RuntimeError(f"the {made.backend} backend serves: {made.reason}")
        output, sums = rs_rmsnorm(rows, None, weight, group=place.group)
        expected = torch.full_like(sums, sum(range(1, dist.get_world_size() + 1)))
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
