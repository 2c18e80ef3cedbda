"""Long random runs: which calls are made, and with what. tests/soak_ranks.py makes them; tools/soak.py is the command.

A `Sequence` is an endless list of calls, numbered from 0, that follows from its fields alone. It comes in segments.
Each has workspaces of its own, on the whole group and on parts of it, a few dozen distinct calls, and an order for
them: some mixed, some the same call hundreds of times over. So a sequence can be begun at any segment, and what failed
there fails again.
"""

import dataclasses
import functools
import itertools
import random
import zlib
from collections.abc import Iterator

import torch
from programs import ALL_OPS, COMPOSED, NORMS, PROJECTING, PROLOGUES, REDUCING, SUMS, Call

BF16, FP16, FP32 = FLOATS = (torch.bfloat16, torch.float16, torch.float32)
E4M3 = torch.float8_e4m3fn
VERSIONS = 3  # of the inputs: more than a workspace has slots, so that rows of no recent call are the right ones
SEGMENT_CALLS = {"cpu": 1000, "cuda": 4000}
MIXED_KINDS = {"cpu": 20, "cuda": 28}
REPEATED_KINDS = (1, 2, 4, 8)  # of a segment, of which each has an equal share of the repeated calls
LATENTS = [(2, 1, 1), (5, 3, 1), (16, 8, 8), (96, 40, 8), (0, 512, 64), (768, 512, 64), (1536, 512, 64)]
HIDDEN = [
    8,
    16,
    24,
    64,
    128,
    136,
    208,
    256,
    512,
    768,
    1024,
    1536,
    2048,
    2560,
    4096,
    5120,
    6144,
    7168,
    8192,
    12288,
    16384,
]
ODD_HIDDEN = [1, 2, 7, 33, 65, 129, 1001]  # for the CPU, which reads no vectors


@dataclasses.dataclass(frozen=True)
class Profile:
    """The size of a group's workspace, and what is repeated there.

    shapes: (num_tokens, hidden_size) that take, between them, every body of the kernels and every depth of their rings.
    A count below 0 is that many times the world size.
    """

    max_num_tokens: int
    row_bytes: int
    shapes: tuple[tuple[int, int], ...]


PROFILES = {
    "cpu": [
        Profile(12345, 64, ((12345, 8), (12345, 16), (4097, 13))),
        Profile(1025, 512, ((1025, 96), (257, 128), (1023, 33))),
        Profile(129, 4096, ((129, 1000), (64, 768), (129, 256))),
        Profile(17, 65536, ((17, 16384), (1, 7168), (-1, 2048), (5, 4096))),
    ],
    "cuda": [
        # Many narrow rows: copied by TMA into the deepest rings.
        Profile(12345, 4224, ((12345, 768), (12345, 1024), (12345, 512), (12345, 256), (12345, 8), (4097, 2048))),
        # The widths of models: shallower rings.
        Profile(4096, 14336, ((4096, 2048), (4096, 7168), (1023, 768), (2048, 5120), (4096, 3072), (300, 7168))),
        # Rows that fill a ring, and rows too wide for one.
        Profile(1024, 65536, ((300, 16384), (1023, 8192), (129, 12288), (1000, 7168), (64, 16384), (512, 10240))),
        # At most one row a block, and rows shared by a cluster.
        Profile(128, 32768, ((1, 7168), (-1, 2048), (-2, 4096), (64, 7168), (128, 8192), (16, 1024), (-8, 768))),
    ],
}


@dataclasses.dataclass(frozen=True)
class Sequence:
    """What a sequence of calls follows from.

    only: the ops to call; empty means all. repeat_share: of the calls, how many are repeats of one and the same.
    """

    seed: int
    world_size: int
    device: str = "cpu"
    only: tuple[str, ...] = ()
    repeat_share: float = 0.5
    subgroups: bool = True

    @property
    def ops(self) -> tuple[str, ...]:
        return self.only or ALL_OPS

    @property
    def segment_calls(self) -> int:
        return SEGMENT_CALLS[self.device]

    def segment(self, index: int) -> "Segment":
        return Segment(self, index)


@dataclasses.dataclass(frozen=True)
class Space:
    """A workspace: of these ranks, on a group of their own."""

    ranks: tuple[int, ...]
    max_num_tokens: int
    row_bytes: int
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class SoakCall(Call):
    """A `Call` whose tensors are made on its device, with another input for each of `VERSIONS`."""

    version: int = 0
    scale: float = 1.0  # of the inputs that are summed
    zeros: bool = False  # every fifth row is

    def _random(self, name: str, shape, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(f"{name} {self.seed}".encode()))
        dtype = dtype or self.dtype
        if dtype == torch.uint8:
            return torch.randint(256, shape, generator=generator, dtype=dtype, device=self.device)
        return (torch.randn(shape, generator=generator, device=self.device) * scale).to(dtype)

    def _sample(self, rank: int) -> torch.Tensor:
        rows = max(self.num_tokens, 256 if self.op in PROJECTING else 0)
        sample = self._random(f"input {rank} {self.version}", (rows, self.hidden_size), self.scale)
        if self.zeros:
            (sample.view(torch.uint8) if sample.element_size() == 1 else sample)[::5] = 0
        return sample

    def _projection_weight_fp8(self) -> tuple[torch.Tensor, torch.Tensor]:
        weight = self._projection_weight()
        blocks = [-(-size // 128) for size in weight.shape]
        scale = self._random("weight scale", blocks, dtype=FP32).abs() + 0.1
        spread = scale.repeat_interleave(128, 0)[: weight.shape[0]].repeat_interleave(128, 1)[:, : weight.shape[1]]
        return (weight / spread).to(E4M3), scale

    def exact(self, rank: int, world_size: int) -> tuple[int, torch.Tensor] | None:
        """An output that has the same bits on every backend, and these; a projection has none."""
        if self.op == "all_gather_rows":
            return 0, self.input(0)
        if self.op not in SUMS:
            return None
        return SUMS[self.op], self.sums(world_size)[self.rows(rank, world_size)]

    def of_version(self, version: int) -> "SoakCall":
        return dataclasses.replace(self, version=version)

    def __str__(self) -> str:
        told = {"num_tokens": self.num_tokens, "hidden_size": self.hidden_size, "dtype": self.dtype}
        if self.op in PROJECTING:
            told["latent"] = self.latent
        if self.op in REDUCING:
            told["residual"] = self.residual
        return f"{self.op}({', '.join(f'{key}={value}' for key, value in (told | self.options).items())})"


@dataclasses.dataclass(frozen=True)
class Kind:
    """A distinct call of a segment.

    space: which of the segment's. in_place: where in symmetric memory its input begins, in bytes; None is staged.
    captured: replayed from a CUDA graph.
    """

    call: SoakCall
    space: int
    in_place: int | None = None
    captured: bool = False


@dataclasses.dataclass(frozen=True)
class Step:
    """One call: what, and which rank comes how late to it, on the device or on the host."""

    kind: int
    version: int
    late: int = -1
    seconds: float = 0.0
    on_device: bool = False
    repeat: tuple[int, int] | None = None  # number, and how many


class Segment:
    """`spaces`, `kinds` and `steps` of a part of a sequence; `first` is the number of its first call."""

    def __init__(self, sequence: Sequence, index: int):
        self.sequence, self.first = sequence, index * sequence.segment_calls
        self._rng = random.Random(f"{sequence} {index}")
        profiles = PROFILES[sequence.device]
        profile, turn = profiles[index % len(profiles)], index // len(profiles)
        self.spaces = self._draw_spaces(profile)
        self.kinds: list[Kind] = []
        self._num_repeated = self._rng.choice(REPEATED_KINDS) if sequence.repeat_share > 0 else 0  # the first kinds
        self.kinds = list(self._repeated_kinds(profile, turn, self._num_repeated))
        self.kinds += [self._draw_kind() for _ in range(MIXED_KINDS[sequence.device])]

    @functools.cached_property
    def steps(self) -> list[Step]:
        return list(self._draw_steps())

    def describe(self, number: int) -> str:
        step = self.steps[number - self.first]
        kind = self.kinds[step.kind]
        space = self.spaces[kind.space]
        form = "staged" if kind.in_place is None else f"in place at byte {kind.in_place}"
        form = form if kind.call.op in REDUCING else "gathered"
        how = "a replayed graph" if kind.captured else "eager"
        again = f", repeat {step.repeat[0]} of {step.repeat[1]}" if step.repeat else ""
        return (
            f"{kind.call}, {form}, {how}, ranks {list(space.ranks)} with max_num_tokens={space.max_num_tokens} and "
            f"{space.row_bytes} bytes a row, version {step.version} of its input{again}"
        )

    # ---- workspaces ----

    def _draw_spaces(self, profile: Profile) -> list[Space]:
        world_size, rng = self.sequence.world_size, self._rng
        every = tuple(range(world_size))
        spaces = [Space(every, profile.max_num_tokens, profile.row_bytes, rng.choice(FLOATS))]
        if self.sequence.subgroups and world_size > 1:
            parts = [(0, 1), every[1:]] if world_size > 2 else [every]
            for ranks in parts:
                other = rng.choice(PROFILES[self.sequence.device])
                tokens = rng.choice((other.max_num_tokens, rng.randint(1, other.max_num_tokens)))
                spaces.append(Space(ranks, tokens, other.row_bytes, rng.choice(FLOATS)))
        return spaces

    # ---- distinct calls ----

    def _repeated_kinds(self, profile: Profile, turn: int, count: int) -> Iterator[Kind]:
        """The next ones of all that this profile has, in an order of the sequence's own."""
        world_size = self.sequence.world_size
        cases = [
            (op, -tokens * world_size if tokens < 0 else tokens, hidden, dtype)
            for op in self.sequence.ops
            for tokens, hidden in profile.shapes
            for dtype in FLOATS
            if op not in REDUCING or hidden * dtype.itemsize <= profile.row_bytes
        ]
        random.Random(f"{self.sequence} {profile}").shuffle(cases)
        for i in range(count):
            op, tokens, hidden, dtype = cases[(turn * max(REPEATED_KINDS) + i) % len(cases)]
            yield self._kind(0, op, min(tokens, profile.max_num_tokens), hidden, dtype)

    def _draw_kind(self) -> Kind:
        rng = self._rng
        index = 0 if rng.random() < 0.6 else rng.randrange(len(self.spaces))
        space, op, dtype = self.spaces[index], rng.choice(self.sequence.ops), rng.choice(FLOATS)
        tokens = self._draw_tokens(space.max_num_tokens, len(space.ranks))
        widest = min(16384, space.row_bytes // dtype.itemsize if op in REDUCING or op not in PROJECTING else 7168)
        few = self.sequence.device == "cpu" and rng.random() < 0.3
        hidden = rng.choice([size for size in (ODD_HIDDEN if few else HIDDEN) if size <= widest])
        if rng.random() < 0.2:
            hidden = max(8, rng.randint(1, widest // 8) * 8)
        return self._kind(index, op, tokens, min(hidden, widest), dtype)

    def _draw_tokens(self, capacity: int, world_size: int) -> int:
        edges = [0, 1, world_size - 1, world_size, world_size + 1, 129, 1023, capacity - 1, capacity]
        edges += [2**power + more for power in range(1, 14) for more in (-1, 0, 1)]
        rng = self._rng
        few, any_count = rng.randint(0, min(capacity, 64)), rng.randint(0, capacity)
        return rng.choice([rng.choice([count for count in edges if count <= capacity]), few, any_count])

    def _kind(self, space: int, op: str, tokens: int, hidden: int, dtype: torch.dtype) -> Kind:
        """The call in a form of its own."""
        rng, on_cuda = self._rng, self.sequence.device == "cuda"
        options, latent, residual, in_place, scale = {}, LATENTS[0], None, None, 1.0
        if op in PROJECTING:
            fp8 = op.endswith("_fp8")
            size = torch.bfloat16.itemsize if fp8 else dtype.itemsize
            fitting = [parts for parts in LATENTS if sum(parts) * size <= self.spaces[space].row_bytes]
            if on_cuda and fp8:
                fitting, hidden = [parts for parts in fitting if sum(parts) % 8 == 0], max(16, hidden // 16 * 16)
            if op not in ("qkv_a_proj_ag", "qkv_a_proj_ag_fp8"):
                # A norm of one number magnifies its rounding error without a bound. That of a few does, too, of a
                # prologue on cuda, whose first norm may be rounded otherwise.
                fewest = 8 if on_cuda and op in PROLOGUES else 2
                fitting = [parts for parts in fitting if parts[1] >= fewest]
            latent = rng.choice(fitting)
            options["complete"] = rng.random() < 0.3
            hidden = self._bounded(tokens, hidden, sum(latent), dtype)
            if op in ("qkv_a_proj_ag_fp8", "qkv_a_proj_ag_norm_fp8"):
                options["scale_layout"] = rng.choice(("row", "column"))
            if op in ("qkv_a_proj_ag_norm_fp8", "mla_prologue_fp8") and latent[0] > 0:
                options |= {"quantize_q_a": rng.random() < 0.5, "round_scales": rng.random() < 0.3}
            if op == "qkv_a_proj_ag":
                options["bias"] = rng.random() < 0.5
        elif op == "all_gather_rows":
            dtype = rng.choice((dtype, dtype, E4M3, torch.uint8))
        if op in REDUCING:
            residual = rng.choice((None, "full", "slice"))
            in_place = rng.choice((None, None, 0, 16 * rng.randint(1, 64)))
            scale = 1.0 if op in PROLOGUES else rng.choice((1.0, 1.0, 32.0, 2.0**-12))
        if op in ("rs_rmsnorm", "rs_rmsnorm_fp8"):
            options["complete"] = rng.random() < 0.15
        if op in ("rs_rmsnorm_fp8", "rs_rmsnorm_ag_fp8"):
            groups = (64, 128, 128, hidden) if on_cuda else (1, 32, 64, 100, 128, 128, hidden)
            if op == "rs_rmsnorm_ag_fp8":  # whose scales travel
                groups = [size for size in groups if -(-hidden // size) * 4 <= self.spaces[space].row_bytes]
            options |= {"group_size": rng.choice(groups), "keep_output": rng.random() < 0.5}
            options["scale_layout"] = rng.choice(("row", "column"))
            options["round_scales"] = rng.random() < 0.3
        if op in (*NORMS, "rs_rmsnorm_ag_fp8"):
            options["weight_offset"] = rng.choice((0.0, 0.0, 0.0, 1.0, -0.5))
        if op in (*NORMS, *COMPOSED):
            options["float_weight"] = rng.random() < 0.2
        call = SoakCall(
            op, tokens, hidden, dtype, residual, rng.getrandbits(40), self.sequence.device, latent, options, 0, scale
        )
        call = dataclasses.replace(call, zeros=op not in PROJECTING and rng.random() < 0.2)
        return Kind(call, space, in_place, on_cuda and rng.random() < 0.25)

    def _bounded(self, tokens: int, hidden: int, columns: int, dtype: torch.dtype) -> int:
        """The hidden size of a projection, less where its product would take long."""
        most = 2**22 if self.sequence.device == "cpu" else 2**34 if dtype == FP32 else 2**38
        elements = 2**18 if self.sequence.device == "cpu" else 2**24
        rows = max(tokens, 256)
        while hidden > 16 and (rows * hidden * columns > most or rows * hidden > elements):
            hidden = max(16, hidden // 32 * 16)
        return hidden

    # ---- order ----

    def _draw_steps(self) -> Iterator[Step]:
        """Repeats of each of the first kinds, and all kinds mixed before and after each."""
        rng, total = self._rng, self.sequence.segment_calls
        many = int(total * self.sequence.repeat_share) // max(1, self._num_repeated)
        mixed = total - many * self._num_repeated
        cuts = sorted(rng.randint(0, mixed) for _ in range(self._num_repeated))
        for kind, (begin, end) in enumerate(itertools.pairwise([0, *cuts, mixed])):
            for _ in range(begin, end):
                yield self._step(rng.randrange(len(self.kinds)), rng.randrange(VERSIONS))
            for i in range(many if kind < self._num_repeated else 0):
                yield self._step(kind, i % VERSIONS, (i + 1, many))

    def _step(self, kind: int, version: int, repeat: tuple[int, int] | None = None) -> Step:
        rng = self._rng
        if rng.random() >= 0.01:
            return Step(kind, version, repeat=repeat)
        late, seconds = rng.choice(self.spaces[self.kinds[kind].space].ranks), rng.choice((1e-4, 5e-4, 2e-3))
        return Step(kind, version, late, seconds, self.sequence.device == "cuda" and rng.random() < 0.5, repeat)
