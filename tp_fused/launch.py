"""Runs a function on several ranks: under torchrun in this process, otherwise in processes started for it."""

import datetime
import faulthandler
import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing


def launch(main, world_size: int, *args, timeout_s: float = 600.0) -> None:
    """Calls `main(*args)` on every rank, with torch.distributed initialised over gloo.

    Under torchrun (RANK and WORLD_SIZE are set) it is called here, and `world_size` must be torchrun's. Otherwise
    `world_size` processes are started; `main` must then be importable by name. Cores are shared out among the ranks.
    A rank that raises ends the others, and its exception is raised here. timeout_s: for the collectives of the group.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if world_size != int(os.environ["WORLD_SIZE"]):
            raise ValueError(f"world size {world_size} was asked for, torchrun runs {os.environ['WORLD_SIZE']} ranks")
        _run_rank(int(os.environ["RANK"]), world_size, "env://", timeout_s, main, args)
        return
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        torch.multiprocessing.spawn(_run_rank, (world_size, store, timeout_s, main, args), nprocs=world_size)


def _run_rank(rank: int, world_size: int, init_method: str, timeout_s: float, main, args) -> None:
    faulthandler.enable()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))))
    timeout = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size, timeout=timeout)
    try:
        main(*args)
    finally:
        dist.destroy_process_group()
