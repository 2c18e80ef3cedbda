"""2^32 rounds: epochs begin again at 0, and a word that no call has used meanwhile must not seem to be of this round.

The rounds in between are left out: all ranks' epochs are set forward from just after one multiple of 2^28, where a call
looks after the age of all words, to just before the next.
"""

import ctypes
import dataclasses
import time

import pytest
import torch
import torch.distributed as dist
from programs import LATENT, OPS, REDUCTIONS, Call
from ranks import workspace

import tp_fused
from tp_fused.native import _C

OLDEST = 1 << 28  # kOldest of csrc/protocol.h
SIZES = {"max_num_tokens": 600, "hidden_size": 256, "latent_size": sum(LATENT)}
PROGRESS_WORDS = 4  # of 32 bits, in an entry of Control.progress; the first is the epoch


def control_of(made) -> torch.Tensor:
    """The head of a new workspace's own region, as words of 32 bits."""
    if made.device_type == "cuda":
        return made._symmetric[0][0][: _C.CONTROL_BYTES].view(torch.int32)
    first_slot = torch.frombuffer(made.team.next_slot(1), dtype=torch.uint8).data_ptr()  # round 1 has the second slot
    address = first_slot - made.slot_bytes - _C.region_bytes(0)
    words = (ctypes.c_int32 * (_C.CONTROL_BYTES // 4)).from_address(address)
    return torch.frombuffer(words, dtype=torch.int32)


def set_epoch(control: torch.Tensor, epoch: int) -> None:
    first = _C.EPOCH_OFFSET // 4
    entries = control[first : first + PROGRESS_WORDS * _C.MAX_CTAS : PROGRESS_WORDS]
    entries.fill_((epoch + (1 << 31)) % (1 << 32) - (1 << 31))


def go_round(device: str, op: str) -> None:
    """Runs on a rank: small calls at every mark, then calls that use every signal, the last rank coming late."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    small = Call(op, 1, 256, residual="full", device=device)
    large = Call(op, 531, 256, residual="full", device=device)
    with workspace(device, device, **SIZES) as made:
        control = control_of(made)
        memory = tp_fused.symm_empty((600, 256), torch.float32, device=device)

        def run(call: Call, in_place: bool) -> None:
            given = call.arguments(rank, world_size)
            if in_place and op in REDUCTIONS:
                given["input"] = memory[: call.num_tokens].copy_(given["input"])
            dist.barrier()
            time.sleep(0.01 * (rank == world_size - 1))
            call.check(call.run(rank, world_size, given), rank, world_size)

        for mark in range(1, 16):
            dist.barrier()
            set_epoch(control, mark * OLDEST - 3)
            dist.barrier()
            for seed in range(4):
                run(dataclasses.replace(small, seed=seed), False)
        dist.barrier()
        set_epoch(control, (1 << 32) - 9)
        dist.barrier()
        for seed in range(12):
            run(dataclasses.replace(large, seed=seed), seed % 2 == 1)
        made.check()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("world_size", [3])
def test_all_signals_after_all_epochs(pool, device, op, world_size):
    pool.run(go_round, device, op)
