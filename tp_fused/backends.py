"""Which backend serves a group: decided from what all ranks report, the same on all of them."""

import errno
import os
import secrets
import socket
from dataclasses import dataclass, field

import torch

from .native import _C

BACKENDS = ("cuda", "cpu", "reference")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass
class Report:
    """What one rank tells the others when a workspace is made."""

    arguments: dict
    host: str
    cpu_supported: bool
    token: str = field(default_factory=lambda: secrets.token_hex(8))  # rank 0's names the workspace
    gpu: str | None = None  # which card this rank computes on
    gpu_name: str = ""
    num_sms: int = 0
    cluster_sms: int = 0  # those that thread block clusters of eight can have
    most_gpcs: int = 0  # GPCs of a card of its architecture, at most
    capability: tuple[int, int] = (0, 0)
    has_code: bool = False  # whether this build was compiled for it
    reaches: dict[str, bool] = field(default_factory=dict)  # cards that this rank sees: can its own read their memory?
    error: str | None = None  # why this rank cannot use the device
    open_sizes: dict | None = None  # of the workspace that the group has already
    ranks_per_card: int = 1  # as other workspaces of this rank have found

    @property
    def gpu_in_words(self) -> str:
        return f"{self.gpu_name} of compute capability {'.'.join(map(str, self.capability))}"


@dataclass(frozen=True)
class CardLimits:
    """What a rank has of a card. max_ctas: blocks of its grids. free_*: as in `tpf_team`, 0 for no bound."""

    ranks: int
    max_ctas: int
    free_sms: int
    free_cluster_sms: int


def report(arguments: dict, device: str) -> Report:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        mount = os.stat("/dev/shm").st_dev  # two containers of one machine may have a /dev/shm each
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):  # says nothing of the host
            raise
        boot, mount = "unknown", "none"
    host = f"{socket.gethostname()}/{boot}/{mount}"
    made = Report(arguments, host, _C.cpu_supported())
    try:
        asked = torch.device(device)
        if asked.type == "cuda":
            current = torch.cuda.current_device()
            card = torch.cuda.get_device_properties(current)
            made.gpu, made.num_sms = str(card.uuid), card.multi_processor_count
            made.gpu_name, made.capability = card.name, (card.major, card.minor)
            made.has_code = _C.cuda_has_code(current)
            if made.has_code:
                about = _C.card(current)
                made.cluster_sms, made.most_gpcs = about["cluster_sms"], about["most_gpcs"]
            for other in range(torch.cuda.device_count()):
                uuid = str(torch.cuda.get_device_properties(other).uuid)
                made.reaches[uuid] = other == current or torch.cuda.can_device_access_peer(current, other)
            if asked.index not in (None, current):
                made.error = f"{device} is not torch's current device, cuda:{current}: call torch.cuda.set_device first"
    except (RuntimeError, AssertionError) as error:  # torch's, of a device that it does not know or was not built for
        made.error = f"device {device!r} cannot be used: {error}"
    return made


def compare(reports) -> None:
    """Raises what a rank cannot do, and where the ranks' arguments of `init` differ."""
    for rank, report in enumerate(reports):
        if report.error is not None:
            raise ValueError(f"tp_fused.init: rank {rank}: {report.error}")
    for rank, report in enumerate(reports):
        for name, value in report.arguments.items():
            first = reports[0].arguments[name]
            if value != first and repr(value) != repr(first):  # NaN is not equal to itself
                raise ValueError(
                    f"tp_fused.init: rank {rank} was called with {name}={value}, rank 0 with {name}={first}"
                )


def check_arguments(arguments: dict) -> None:
    for name in ("max_num_tokens", "hidden_size", "latent_size", "max_ctas"):
        value = arguments[name]
        optional = name in ("latent_size", "max_ctas")
        if not (optional and value is None) and not (_is_number(value, int) and 0 < value < 2**31):
            raise ValueError(f"tp_fused.init: {name} must be a positive integer below 2**31, got {value!r}")
    if arguments["dtype"] not in DTYPES:
        raise TypeError(f"tp_fused.init: dtype must be one of {', '.join(map(str, DTYPES))}, got {arguments['dtype']}")
    timeout_s = arguments["timeout_s"]
    if not (_is_number(timeout_s, (int, float)) and 0 < timeout_s < 1e9):
        raise ValueError(f"tp_fused.init: timeout_s must be positive seconds, got {timeout_s!r}")


def _is_number(value, kind) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def grown(arguments: dict, reports) -> dict:
    """The arguments of `init`, with the larger of their sizes and those of the workspace that some rank has open."""
    latent_size = arguments["latent_size"] or arguments["hidden_size"]
    row_bytes = max(arguments["hidden_size"], latent_size) * arguments["dtype"].itemsize
    largest = {**arguments, "latent_size": latent_size, "row_bytes": row_bytes}
    for report in reports:
        for name, size in (report.open_sizes or {}).items():
            largest[name] = max(largest[name], size)
    return largest


def choose_backend(reports, device_type: str, world_size: int, asked: str | None) -> tuple[str, str]:
    """Which backend runs, and why. A function of what all ranks reported: the same on all of them."""
    if asked is not None and asked not in BACKENDS:
        raise ValueError(f"TP_FUSED_BACKEND={asked}: must be one of {', '.join(BACKENDS)}")
    if asked == "reference":
        return "reference", "TP_FUSED_BACKEND asks for it"
    obstacle = _obstacle(reports, device_type, world_size, asked)
    if obstacle is None:
        reason = "TP_FUSED_BACKEND asks for it" if asked else "all ranks share one host's memory"
        shared = ranks_per_card(reports) if device_type == "cuda" else 1
        return device_type, f"{reason}; {shared} ranks share a GPU" if shared > 1 else reason
    if asked is not None:
        raise ValueError(f"TP_FUSED_BACKEND={asked} cannot run: {obstacle}")
    return "reference", obstacle


def _obstacle(reports, device_type: str, world_size: int, asked: str | None) -> str | None:
    """What keeps the shared-memory backend of this device from running, if anything does."""
    if asked is not None and asked != device_type:
        unseen = "; torch sees no GPU" if asked == "cuda" and not torch.cuda.is_available() else ""
        return f"the workspace is for {device_type} tensors{unseen}"
    if device_type not in ("cpu", "cuda"):
        return f"there are no kernels for {device_type}"
    if device_type == "cuda" and not _C.cuda_compiled():
        return "this build has no CUDA kernels: there was no nvcc, or no GPU and no TP_FUSED_CUDA=1"
    if world_size > _C.MAX_RANKS:
        return f"world size {world_size} is over {_C.MAX_RANKS}, the ranks that one segment is made for"
    for rank, report in enumerate(reports):
        if report.host.split("/")[:2] != reports[0].host.split("/")[:2]:
            return f"rank {rank} runs on {report.host}, rank 0 on {reports[0].host}: they share no memory"
        if device_type == "cpu" and report.host != reports[0].host:
            return f"ranks {rank} and 0 run on one machine, but each with its own /dev/shm"
        if device_type == "cpu" and not report.cpu_supported:
            return f"the processor of rank {rank} lacks AVX2"
        if device_type == "cpu":
            continue
        if report.capability < (8, 0):
            return f"rank {rank} has {report.gpu_in_words}; 8.0 is the least"
        if not report.has_code:
            return f"this build has no code for rank {rank}'s {report.gpu_in_words}"
        if report.capability[0] != reports[0].capability[0]:
            both = f"rank {rank} has {report.gpu_in_words}, rank 0 {reports[0].gpu_in_words}"
            return f"{both}: their kernels are not the same"
        for peer, other in enumerate(reports):
            # A rank may see its own card only: then torch finds out, and raises, where memory cannot be shared.
            if not report.reaches.get(other.gpu, True):
                return f"the GPU of rank {rank} cannot read the memory of rank {peer}'s: there is no peer access"
    return None


def ranks_per_card(reports) -> int:
    """Ranks on the card that has most of them, of this group or of one that a rank has met before."""
    cards = [report.gpu for report in reports]
    return max(max(cards.count(report.gpu), report.ranks_per_card) for report in reports)


def limits_of_ranks(reports, asked: int | None) -> CardLimits:
    """All blocks of one call must run at once, and ranks that share a card share its SMs.

    A cluster of blocks needs free ones of a single GPC. While peers wait in their kernels, a rank that is late may have
    to run one first: cuBLAS's have up to eight blocks. It finds room wherever the peers' blocks lie if what these leave
    is over seven for each GPC, not counting SMs that are in no GPC with seven others. Likewise the pairs of blocks of a
    projection, the last one beside all others. Whoever asks for more blocks than that has nothing but the group's calls
    run on the card.
    """
    num_sms, cluster_sms = (min(getattr(one, name) for one in reports) for name in ("num_sms", "cluster_sms"))
    return limits_of(ranks_per_card(reports), num_sms, cluster_sms, reports[0].most_gpcs, asked)


def limits_of(ranks: int, num_sms: int, cluster_sms: int, most_gpcs: int, asked: int | None = None) -> CardLimits:
    """`limits_of_ranks` of a card that so many ranks share. cluster_sms: 0 where there are no clusters."""
    fitting = max(1, num_sms // ranks)
    if asked is not None and asked > fitting:
        raise ValueError(
            f"tp_fused.init: max_ctas={asked} blocks do not fit: {ranks} ranks share a card of "
            f"{num_sms} SMs, at most {fitting} each"
        )
    roomy = fitting
    if ranks > 1 and cluster_sms > 0:
        beside_a_cluster = (cluster_sms - 7 * most_gpcs - 1) // (ranks - 1)
        in_pairs = (num_sms - most_gpcs + 1) // ranks
        roomy = max(1, min(beside_a_cluster, in_pairs))
        roomy -= roomy > 1 and roomy % 2  # so that projections come in pairs
    max_ctas = min(asked or roomy, _C.MAX_CTAS)
    others = (ranks - 1) * max_ctas
    if others == 0 or max_ctas > roomy:
        return CardLimits(ranks, max_ctas, 0, 0)
    return CardLimits(ranks, max_ctas, num_sms - others, max(0, cluster_sms - others))
