"""A rank in a process of its own, for what a process must not share: torch's compile caches, exported programs.

    python tests/compiled_rank.py RANK FOLDER RUN WAY

Two ranks in a gloo group, 17 tokens: rank 0 owns 9 rows, rank 1 owns 8. Compares with eager and prints what it found.
"""

import sys

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

import tp_fused

NUM_TOKENS = 17


def layer(op, gather, input, weight):
    """Several ops, one rank's rows and those of all."""
    hidden, residual = op(input, None, weight)
    again, residual = op(input * 2, residual, weight)
    return hidden * 2 + residual, gather(again + 1, input.shape[0])


def wrapped(input, weight):
    return layer(tp_fused.rs_rmsnorm, tp_fused.all_gather_rows, input, weight)


def raw(input, weight):
    ops = torch.ops.tp_fused
    return layer(
        lambda input, residual, weight: ops.rs_rmsnorm(input, residual, weight, 1e-6, "0"),
        lambda rows, num_tokens: ops.all_gather_rows(rows, num_tokens, "0"),
        input,
        weight,
    )


class Layer(torch.nn.Module):
    def forward(self, input, weight):
        return wrapped(input, weight)


def inputs(rank: int, num_tokens: int = NUM_TOKENS):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(num_tokens, 256, generator=generator), torch.ones(256)


def compare(function, rank: int, num_tokens: int = NUM_TOKENS) -> None:
    for output, expected in zip(function(*inputs(rank, num_tokens)), wrapped(*inputs(rank, num_tokens)), strict=True):
        assert output.shape == expected.shape, f"{tuple(output.shape)} instead of {tuple(expected.shape)}"
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def compile_and_compare(rank: int, function, dynamic: bool) -> None:
    compiled = torch.compile(function, fullgraph=True)

    def call(input, weight):
        if dynamic:
            torch._dynamo.mark_dynamic(input, 0)
        return compiled(input, weight)

    compare(call, rank)
    if dynamic:
        compare(call, rank, 40)
    found = counters["inductor"]
    print(f"hits {found['fxgraph_cache_hit']} misses {found['fxgraph_cache_miss']}", flush=True)


def export(rank: int, folder: str, dynamic: bool) -> None:
    shapes = {"input": {0: torch.export.Dim("num_tokens", min=4, max=64)}, "weight": None} if dynamic else None
    program = torch.export.export(Layer(), inputs(rank), dynamic_shapes=shapes)
    compare(program.module(), rank)
    torch.export.save(program, f"{folder}/{rank}.pt2")
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    path = f"{folder}/{rank}-aoti.pt2"
    package = torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=quick)
    compare(torch._inductor.aoti_load_package(package), rank)


def load(rank: int, folder: str, of_rank: int) -> None:
    """A program that rank `of_rank` has made."""
    for load in (
        lambda: torch.export.load(f"{folder}/{of_rank}.pt2").module(),
        lambda: torch._inductor.aoti_load_package(f"{folder}/{of_rank}-aoti.pt2"),
    ):
        program = load()
        if of_rank == rank:
            compare(program, rank)
            continue
        try:
            program(*inputs(rank))
            print("no error")
        except (ValueError, RuntimeError) as error:  # what passes the C functions of a package is a RuntimeError
            print(f"{type(error).__name__}: {error}", flush=True)


def main(rank: int, folder: str, run: str, way: str) -> None:
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{run}", rank=rank, world_size=2)
    name, _, shapes = way.partition(" ")
    with tp_fused.init(max_num_tokens=64, hidden_size=256, dtype=torch.float32, timeout_s=200.0, device="cpu"):
        if name == "export":
            export(rank, folder, shapes == "dynamic")
        elif name == "load":
            load(rank, folder, int(shapes))
        else:
            compile_and_compare(rank, {"raw": raw, "wrapped": wrapped}[name], shapes == "dynamic")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
