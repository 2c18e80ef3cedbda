"""What a rank has for the whole run: its place, device, workspace and groups, and inputs that peers can recompute."""

import copy
import dataclasses
import functools
import os
import zlib

import torch
import torch.distributed as dist

import tp_fused
from tp_fused import partition
from tp_fused.launch import take_device
from tp_fused.native import _C

from .catalog import OPS
from .options import ctas_of

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Renamed in torch 2.13, where the old name warns.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Host:
    """What the ranks tell each other on the host, over the default group, gloo's."""

    def host_barrier(self) -> None:
        """Waits as long as the process group does: work on the host may take longer than an op's deadline."""
        dist.barrier(dist.group.WORLD)

    def host_reduce(self, values, operation=dist.ReduceOp.MAX) -> torch.Tensor:
        """The values of all ranks, element by element, in double."""
        total = torch.as_tensor(values, dtype=torch.float64, device="cpu").clone()
        dist.all_reduce(total, operation, group=dist.group.WORLD)
        return total

    def host_sum(self, value: int) -> int:
        return int(self.host_reduce([value], dist.ReduceOp.SUM)[0])


class Context(Host):
    """Made on every rank of an initialised gloo group; `close` gives the workspace back.

    `group` is what the ops and the unfused programs talk over: the default group on CPU tensors, an NCCL group where
    every rank has a card of its own. Ranks that share cards have no collective library (NCCL wants a card a rank), so
    there `has_collectives` is False and the programs over torch.distributed are left out.
    """

    def __init__(self, options):
        self.options = options
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.dtype = TORCH_DTYPES[options.dtype]
        self.place_of_rank = take_device(options.device)
        self.device, self.group = self.place_of_rank.device, self.place_of_rank.group
        self.ranks_per_card = self.place_of_rank.ranks_per_card
        self.has_collectives = self.ranks_per_card < 2
        if options.backend is not None:
            os.environ["TP_FUSED_BACKEND"] = options.backend
        if options.compile:
            # Imported here: it takes a second of every start.
            from torch._dynamo import config as dynamo
            from torch._inductor import config as inductor

            # A function is compiled for every size (past the limit torch would run it as it is), in this process.
            dynamo.recompile_limit = dynamo.accumulated_recompile_limit = 10_000
            inductor.compile_threads = 1
        self._variants: dict[str, Context] = {}
        self._kept: dict[str, object] = {}
        self.left_out: dict[str, str] = {}  # baselines that could not be set up, and why
        self.workspace, self._symmetric = None, {}
        self._open()
        self._nothing = torch.empty(0, options.hidden, dtype=self.dtype, device=self.device)

    def _open(self) -> None:
        options, max_ctas = self.options, self.options.max_ctas
        guarded = any(OPS[op].torch_multiplies for op in options.ops)
        if max_ctas is None and self.ranks_per_card > 1 and not guarded:  # init would leave room on the card
            max_ctas = torch.cuda.get_device_properties(self.device).multi_processor_count // self.ranks_per_card
        self.workspace = tp_fused.init(
            self.group,
            max_num_tokens=options.max_tokens,
            hidden_size=options.hidden,
            latent_size=options.latent,
            dtype=self.dtype,
            timeout_s=options.timeout_s,
            max_ctas=max_ctas,
            device=self.device.type,
        )
        self._symmetric = {}

    def close(self) -> None:
        self.host_barrier()
        for kept in self._kept.values():
            kept.close()
        for variant in self._variants.values():
            if variant.workspace is not self.workspace:
                variant.workspace.close()
        self.workspace.close()

    def variant(self, name: str) -> "Context":
        """This context with its inputs placed otherwise, or with another bound of the grid and so another workspace.

        name: "staged", "zero-copy" or "ctasN". Collective when it is asked for the first time.
        """
        if name not in self._variants:
            other = copy.copy(self)
            max_ctas = ctas_of(name)
            if max_ctas is None:
                other.options = dataclasses.replace(self.options, zero_copy=name == "zero-copy")
            else:
                other.options = dataclasses.replace(self.options, max_ctas=max_ctas)
                other.group = dist.new_group(backend="gloo")  # of which the ops need the name only
                other._open()
            self._variants[name] = other
        return self._variants[name]

    # ---- inputs ----

    def random(self, *key, shape: tuple[int, ...]) -> torch.Tensor:
        """Normal numbers that depend on the key only: any rank can make what any other has."""
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(repr(key).encode()))
        return torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)

    @functools.cache  # noqa: B019 -- a context lives as long as its process
    def constant(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """What does not depend on the token count: weights. Made once."""
        return self.random(name, shape=shape)

    def row_count(self, num_tokens: int, rank: int | None = None) -> int:
        return partition.row_count(num_tokens, self.rank if rank is None else rank, self.world_size)

    def symmetric(self, purpose: str, num_tokens: int) -> torch.Tensor:
        """[num_tokens, hidden] of symmetric memory, one and the same for every size. Collective the first time."""
        if purpose not in self._symmetric:
            self._symmetric[purpose] = self.workspace.symm_empty(self.options.max_tokens, self.options.hidden)
        return self._symmetric[purpose][:num_tokens]

    def place(self, input: torch.Tensor) -> torch.Tensor:
        """The tensor, or its copy in symmetric memory where the run is to be zero-copy."""
        if not self.options.zero_copy:
            return input
        placed = self.symmetric("input", input.shape[0])
        placed.copy_(input)
        return placed

    def keep(self, name: str, make):
        """What `make` returns, made once for all sizes and closed at the end."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def explain(self, op: str, **asked) -> str:
        """What the backend would do with the run's inputs, and why. asked: of the call, as `complete`."""
        input = self._symmetric.get("input", self._nothing) if self.options.zero_copy else self._nothing
        op = op if hasattr(torch.ops.tp_fused, op) else "rs_rmsnorm"  # a chain of ops begins with it
        if op.startswith("qkv_") and op.endswith("_fp8"):
            input = self._nothing.to(torch.float8_e4m3fn)
        lines = tp_fused.explain(op, self.options.max_tokens, self.group, input=input, **asked).splitlines()
        return "\n".join(line for line in lines if " owns rows " not in line)  # of one size only

    # ---- meeting the peers ----

    def barrier(self) -> None:
        """A bare barrier on the card, on the workspace's own signals."""
        _C.barrier(self.workspace.team, torch.cuda.current_stream().cuda_stream)

    def meet(self) -> None:
        """Lines the ranks up before a timed call, the shortest way they have."""
        if self.workspace.backend == "cuda":
            self.barrier()
        elif self.workspace.backend == "cpu":
            tp_fused.all_gather_rows(self._nothing, 0, self.group)
        elif self.device.type == "cuda":
            dist.all_reduce(torch.zeros(1, device=self.device), group=self.group)
        else:
            dist.barrier()

    def settle(self) -> None:
        """Waits for what was launched. A kernel that met a fault has written it down and gone on: here it is raised."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        for context in (self, *self._variants.values()):
            context.workspace.check()

    def gather_rows(self, rows: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """All ranks' rows, over gloo: the oracle does not travel by the code it judges."""
        share = self.row_count(num_tokens, 0)
        padded = torch.zeros(share, rows.shape[1], dtype=rows.dtype)
        padded[: rows.shape[0]] = rows.cpu()
        gathered = torch.empty(self.world_size * share, rows.shape[1], dtype=rows.dtype)
        if share > 0:
            all_gather_single(gathered, padded, group=dist.group.WORLD)
        return compact(gathered, num_tokens, self.world_size).to(self.device)


def compact(gathered: torch.Tensor, num_tokens: int, world_size: int) -> torch.Tensor:
    """Rows of equal, padded shares without the padding."""
    if gathered.shape[0] == num_tokens:
        return gathered
    shares = gathered.chunk(world_size)
    counts = partition.row_counts(num_tokens, world_size)
    return torch.cat([share[:count] for share, count in zip(shares, counts, strict=True)])
