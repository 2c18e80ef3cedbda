"""Runs a function on several ranks: under torchrun in this process, otherwise in processes started for it.

And says where each of them computes: `choose_device`, before they start, and `take_device`, in each.
"""

import datetime
import faulthandler
import functools
import gc
import os
import sys
import tempfile
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.multiprocessing

from . import checks
from .groups import default_group
from .native import _C


def launch(main, world_size: int, *args, timeout_s: float = 600.0) -> None:
    """Calls `main(*args)` on every rank, with torch.distributed initialised over gloo.

    Under torchrun (RANK and WORLD_SIZE are set) it is called here, and `world_size` must be torchrun's. Otherwise
    `world_size` processes are started; `main` must then be importable by name, so not typed into an interactive
    session (docs/notebook.md). Cores are shared out among the ranks.
    A rank that raises ends the others, and its exception is raised here. timeout_s: for the collectives of the group.
    Raises TypeError or ValueError, before anything is started, for a `main` that cannot be called and a count of ranks
    below one.
    """
    if not callable(main):
        raise TypeError(f"main must be a function, got {checks.described(main)}")
    checks.count("world_size", world_size, 1)
    checks.seconds("timeout_s", timeout_s)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if world_size != int(os.environ["WORLD_SIZE"]):
            raise ValueError(f"world size {world_size} was asked for, torchrun runs {os.environ['WORLD_SIZE']} ranks")
        _run_rank(int(os.environ["RANK"]), world_size, "env://", timeout_s, main, args)
        return
    if main.__module__ == "__main__" and _in_a_session():
        raise ValueError(
            f"{main.__qualname__} was typed into an interactive session, which the processes of the ranks do not have: "
            f"write it to a file and import it from there (docs/notebook.md)"
        )
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        # A fork server imports once what the ranks need. In a session it outlives the launch, and the module of `main`
        # may be edited before the next. Where there is CUDA, processes are not forked.
        method = "spawn" if torch.cuda.is_available() else "forkserver"
        lasting = [] if _in_a_session() else [main.__module__]
        torch.multiprocessing.set_forkserver_preload(["tp_fused.launch", *lasting, "tp_fused.frozen"])
        rank_args = (world_size, store, timeout_s, main, args)
        torch.multiprocessing.start_processes(_run_rank, rank_args, nprocs=world_size, start_method=method)


def _in_a_session() -> bool:
    """The program is typed, into a notebook for one: no file holds it."""
    return not os.path.exists(getattr(sys.modules["__main__"], "__file__", ""))


def _run_rank(rank: int, world_size: int, init_method: str, timeout_s: float, main, args) -> None:
    faulthandler.enable()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))))
    timeout = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size, timeout=timeout)
    try:
        main(*args)
    finally:
        # A group that a cycle still refers to would outlive this, and its threads, which let go of tensors, the
        # interpreter: that ends the process with an abort.
        gc.collect()
        dist.destroy_process_group()


def choose_device(asked: str = "auto") -> str:
    """cpu or cuda; "auto" is cuda where there is a card and this build has kernels for it.

    Raises ValueError where cuda is asked for and there is none.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("cuda was asked for, but torch sees no card")
    if asked != "auto":
        return asked
    return "cuda" if torch.cuda.is_available() and _C.cuda_compiled() else "cpu"


@dataclass
class Place:
    """Where a rank computes, and over which group its tensors travel.

    ranks_per_card: 0 on the CPU. With more than one, `group` is gloo's, since NCCL wants a card a rank.
    """

    device: torch.device
    group: dist.ProcessGroup
    ranks_per_card: int

    def sentence(self) -> str | None:
        """What a reader of its timings has to know: ranks that share a card, if they do."""
        if self.ranks_per_card < 2:
            return None
        mps = "under MPS" if "CUDA_MPS_PIPE_DIRECTORY" in os.environ else "without MPS: right results, no valid timings"
        return f"{self.ranks_per_card} ranks share a {torch.cuda.get_device_name(self.device)}, {mps}"


def take_device(kind: str) -> Place:
    """On every rank of the default group, gloo's: this rank's card, shared where there are fewer cards than ranks."""
    if kind == "cpu":
        return Place(torch.device("cpu"), default_group(), 0)
    cards = torch.cuda.device_count()
    local_rank = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
    ranks_per_card = -(-int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())) // cards)
    device = torch.device("cuda", local_rank % cards)
    torch.cuda.set_device(device)
    return Place(device, default_group() if ranks_per_card > 1 else _nccl_group(), ranks_per_card)


@functools.cache
def _nccl_group() -> dist.ProcessGroup:
    group = dist.new_group(backend="nccl")
    assert isinstance(group, dist.ProcessGroup)  # all ranks are in it
    return group
