"""Autograd and autocast stay out of the ops: no gradients, and the same bits under autocast."""

import pytest
import torch
import torch.distributed as dist
from programs import ALL_OPS, Call, same_bits
from ranks import workspace

import tp_fused


def under_autocast(backend: str, device: str, op: str, dtype: torch.dtype) -> None:
    """Runs on a rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    options = [{}, {"bias": True}] if op == "qkv_a_proj_ag" else [{}]
    with workspace(backend, device):
        for call in (Call(op, 9, 256, dtype, "full", device=device, options=given) for given in options):
            arguments = call.arguments(rank, world_size)
            plain = call.run(rank, world_size, arguments)
            lower = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
            with torch.autocast(device, dtype=lower):
                cast = call.run(rank, world_size, arguments)
                assert torch.is_autocast_enabled(device)
            same_bits(cast, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize("world_size", [2])
def test_autocast_changes_nothing(pool, backend, device, op, dtype):
    pool.run(under_autocast, backend, device, op, dtype)


def with_gradients(backend: str, device: str, op: str, compiler: str | None) -> list[bool]:
    """Runs on a rank: which outputs ask for gradients; they are those of inputs that ask for none."""
    torch._dynamo.reset()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    asked = []
    with workspace(backend, device, timeout_s=60.0):
        call = Call(op, 9, 256, residual="full", device=device)
        arguments = call.arguments(rank, world_size)
        plain = call.run(rank, world_size, arguments)
        for value in arguments.values():
            if torch.is_tensor(value) and value.dtype == torch.float32:
                value.requires_grad_()
        function = getattr(tp_fused, op)
        if compiler is not None:
            function = torch.compile(function, backend=compiler, fullgraph=True)
        outputs = function(**arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        same_bits([output.detach() for output in outputs], plain)
        asked += [output.requires_grad for output in outputs]
    return asked


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize("world_size", [2])
def test_outputs_ask_for_no_gradients(pool, backend, device, op, compiler):
    """They would be lost: the ops have no backward."""
    for asked in pool.run(with_gradients, backend, device, op, compiler):
        assert not any(asked), asked
