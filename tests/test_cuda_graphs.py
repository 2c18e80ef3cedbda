"""Ops captured in CUDA graphs: replayed again and again, on new inputs, mixed with eager calls, on one workspace."""

import dataclasses
import random

import pytest
import torch
import torch.distributed as dist
from programs import LATENT, OPS, REDUCTIONS, Call
from ranks import workspace

import tp_fused

pytestmark = pytest.mark.cuda

REPLAYS = 10_000
COUNTS = (1, 7, 64, 257, 1024)
SIZES = {"max_num_tokens": 1024, "hidden_size": 256, "latent_size": sum(LATENT), "dtype": torch.bfloat16}


class Captured:
    """One op at one token count: its graph, with static inputs, and the results of two versions of the inputs."""

    def __init__(self, call: Call, pool, memory: torch.Tensor | None):
        """memory: symmetric memory for the static input."""
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.calls = [dataclasses.replace(call, seed=seed) for seed in range(2)]
        self.versions = [version.arguments(self.rank, self.world_size) for version in self.calls]
        self.eager = [self.checked(version, self.run(version)) for version in range(2)]
        self.static = {key: v.clone() if torch.is_tensor(v) else v for key, v in self.versions[0].items()}
        if memory is not None:
            self.static["input"] = memory[: call.num_tokens]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.outputs = call.run(self.rank, self.world_size, self.static)
        self.replayed = [self.checked(version, self.replay(version)) for version in range(2)]

    def run(self, version: int) -> tuple[torch.Tensor, ...]:
        return self.calls[version].run(self.rank, self.world_size, self.versions[version])

    def replay(self, version: int) -> tuple[torch.Tensor, ...]:
        for key, value in self.versions[version].items():
            if torch.is_tensor(value):
                self.static[key].copy_(value)
        self.graph.replay()
        return self.outputs

    def checked(self, version: int, outputs) -> list[torch.Tensor]:
        """A copy of the outputs, which are what the unfused program makes."""
        self.calls[version].check(outputs, self.rank, self.world_size)
        return [output.clone() for output in outputs]


def differ(outputs, expected) -> torch.Tensor:
    """Whether any bit does, as a tensor: nothing here waits for the GPU."""
    pairs = zip(outputs, expected, strict=True)
    return torch.stack([(a.view(torch.uint8) != e.view(torch.uint8)).any() for a, e in pairs]).any()


def replay_and_call(device: str) -> list[str]:
    """Runs on a rank: which replays and calls ever differed from the first, and those are checked."""
    order = random.Random(dist.get_world_size())  # the same on all ranks
    with workspace(device, device, **SIZES) as made:
        memory = tp_fused.symm_empty((1024, 256), torch.bfloat16, device=device)
        calls = [Call(op, count, 256, torch.bfloat16, "slice", device=device) for op in OPS for count in COUNTS]
        in_place = [call for call in calls if call.op in REDUCTIONS and call.num_tokens in (64, 1024)]
        pool = torch.cuda.graph_pool_handle()
        every = [Captured(call, pool, None) for call in calls] + [Captured(call, pool, memory) for call in in_place]
        replays, eager = torch.zeros(2, len(every), device=device, dtype=torch.int64)
        for _ in range(REPLAYS):
            index, version = order.randrange(len(every)), order.randrange(2)
            replays[index] += differ(every[index].replay(version), every[index].replayed[version])
            if order.random() < 0.2:
                index, version = order.randrange(len(every)), order.randrange(2)
                eager[index] += differ(every[index].run(version), every[index].eager[version])
        torch.cuda.synchronize()
        made.check()
    wrong = {"replays": replays.tolist(), "eager calls": eager.tolist()}
    return [
        f"{number} {kind} of {item.calls[0]}"
        for kind, numbers in wrong.items()
        for item, number in zip(every, numbers, strict=True)
        if number
    ]


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_ten_thousand_replays_among_eager_calls(pool, device, world_size):
    assert pool.run(replay_and_call, device, timeout_s=120) == [[]] * world_size
