"""The unfused programs: for every op, a call's inputs on each rank and what must come out, computed in one process.

A `Call` is the same on all ranks; its tensors come from a generator seeded with their name and the rank, so that every
rank can make all the others' and no data travels but through the op.
"""

import dataclasses
import functools
import zlib

import torch

import tp_fused
from tp_fused import ops, partition, projections, prologue, reference

REDUCTIONS = ("rs_rmsnorm", "rs_rmsnorm_fp8", "rs_rmsnorm_ag", "reduce_scatter_rows")
NORMS = ("rs_rmsnorm", "rs_rmsnorm_fp8", "rs_rmsnorm_ag", "qkv_a_proj_ag_norm")
PROJECTIONS = ("qkv_a_proj_ag", "qkv_a_proj_ag_fp8", "qkv_a_proj_ag_norm")
# Which output is the rounded sum.
SUMS = {"rs_rmsnorm": 1, "rs_rmsnorm_fp8": 2, "rs_rmsnorm_ag": 1, "reduce_scatter_rows": 0}
OPS = (*REDUCTIONS, "all_gather_rows", *PROJECTIONS)
# Calls of two or three of these, which ranks tell each other and faults name; their bits: test_mla_prologue, test_fp8.
PROLOGUES = ("mla_prologue", "mla_prologue_fp8")
COMPOSED = ("rs_rmsnorm_ag_fp8", "qkv_a_proj_ag_norm_fp8", *PROLOGUES)
ALL_OPS = (*OPS, *COMPOSED)
PROJECTING = (*PROJECTIONS, "qkv_a_proj_ag_norm_fp8", *PROLOGUES)
REDUCING = (*REDUCTIONS, "rs_rmsnorm_ag_fp8", *PROLOGUES)
SUMS |= {"rs_rmsnorm_ag_fp8": 2, "mla_prologue": 3, "mla_prologue_fp8": 4}
EPS = 1e-5
LATENT = (96, 40, 8)  # columns of q_a, kv_a and k_pe


def random(name: str, shape, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    shape = torch.Size(shape)
    # Tests of other ops and backends ask for the same again. Large ones would fill the memory.
    return _kept(name, shape, dtype, scale).clone() if shape.numel() <= 2**18 else _make(name, shape, dtype, scale)


def _make(name: str, shape: torch.Size, dtype: torch.dtype, scale: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if dtype == torch.uint8:
        return torch.randint(256, shape, generator=generator, dtype=dtype)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


_kept = functools.lru_cache(128)(_make)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of `tp_fused.<op>`."""

    op: str
    num_tokens: int
    hidden_size: int = 208  # a multiple of 16, as fp8 projections on cuda want, and not of 128
    dtype: torch.dtype = torch.float32
    residual: str | None = None  # None, "full" or "slice"
    seed: int = 0
    device: str = "cpu"
    latent: tuple[int, int, int] = LATENT
    options: dict = dataclasses.field(default_factory=dict)  # the op's keywords; "bias" and "float_weight" are whether

    # ---- inputs ----

    def input(self, rank: int) -> torch.Tensor:
        """The [num_tokens, hidden_size] that a rank reduces or, of its rows, gathers and projects."""
        return self._sample(0 if self.options.get("complete") else rank)[: self.num_tokens]

    def arguments(self, rank: int, world_size: int) -> dict:
        """What this rank passes, on the call's device."""
        if self.op in COMPOSED:
            return self._composed_arguments(rank, world_size)
        own = self.rows(rank, world_size)
        arguments = {"input": self.input(rank)}
        if self.op in REDUCTIONS:
            full = self._residual()
            arguments["residual"] = full[own] if self.residual == "slice" else full
            if self.op != "reduce_scatter_rows":
                arguments |= {"weight": self._norm_weight("norm", self.hidden_size), "eps": EPS}
        else:
            rows = self.input(0) if self.options.get("complete") else self.input(0)[own].contiguous()
            arguments = {"input": rows, "num_tokens": self.num_tokens}
        if self.op in PROJECTIONS:
            arguments["weight"] = self._projection_weight()
        if self.op == "qkv_a_proj_ag_norm":
            q_a, kv_a = self._latent_norms()
            arguments |= {"q_a_weight": q_a, "kv_a_weight": kv_a, "eps": EPS}
        options = dict(self.options)
        options.pop("float_weight", None)
        if options.pop("bias", False):
            arguments["bias"] = self._bias()
        if self.op == "qkv_a_proj_ag_fp8":
            layout = options.pop("scale_layout", "row")
            arguments["q"], arguments["scale"] = reference.quantize_e4m3(arguments.pop("input"), layout=layout)
            arguments["weight"], arguments["weight_scale"] = self._projection_weight_fp8()
        moved = {key: v.to(self.device) if torch.is_tensor(v) else v for key, v in arguments.items()}
        return moved | options

    def _composed_arguments(self, rank: int, world_size: int) -> dict:
        if self.op == "rs_rmsnorm_ag_fp8":
            return dataclasses.replace(self, op="rs_rmsnorm_fp8").arguments(rank, world_size)
        norms = [norm.to(self.device) for norm in self._latent_norms()]
        if self.op == "qkv_a_proj_ag_norm_fp8":
            given = dataclasses.replace(self, op="qkv_a_proj_ag_fp8").arguments(rank, world_size)
            given |= {key: value for key, value in self.options.items() if key == "scale_layout"}  # of q_a, too
            return given | {"q_a_weight": norms[0], "kv_a_weight": norms[1], "eps": EPS}
        given = dataclasses.replace(self, op="rs_rmsnorm").arguments(rank, world_size)
        given["input"] = self.input(rank).to(self.device)  # of as many rows as those that errors are measured on
        weights = {"norm_weight": given.pop("weight"), "q_a_norm_weight": norms[0], "kv_a_norm_weight": norms[1]}
        if self.op == "mla_prologue":
            weights["qkv_a_weight"] = self._projection_weight().to(self.device)
        else:
            weights["qkv_a_weight"], weights["weight_scale"] = (
                x.to(self.device) for x in self._projection_weight_fp8()
            )
        return given | weights

    def run(self, rank: int, world_size: int, arguments: dict | None = None) -> tuple[torch.Tensor, ...]:
        arguments = self.arguments(rank, world_size) if arguments is None else arguments
        result = getattr(tp_fused, self.op)(**arguments)
        return result if isinstance(result, tuple) else (result,)

    # ---- the unfused program ----

    def check(self, outputs, rank: int, world_size: int) -> None:
        """Raises AssertionError where `outputs` are not what the unfused program makes on this rank."""
        self.compare(tuple(output.cpu() for output in outputs), rank, world_size)

    def compare(self, outputs, rank: int, world_size: int) -> None:
        """The same of outputs that lie where `_random` makes tensors."""
        if self.op == "all_gather_rows":
            same_bits(outputs, (self.input(0),))
        elif self.op in COMPOSED:
            self._compare_composed(outputs, rank, world_size)
        elif self.op in PROJECTIONS:
            exact, unfused = self._project(torch.float64), [self._project(self.dtype)]
            if self.device != "cpu":  # cuBLAS adds up in another order where the rows are fewer
                unfused.append(self._project(self.dtype, partition.row_count(self.num_tokens, 0, world_size)))
            for index, values in enumerate(zip(outputs, exact, *unfused, strict=True)):
                assert len(values[0]) == self.num_tokens, f"output {index} has {len(values[0])} rows"
                within_twice_the_error(f"output {index}", *values)
        else:
            expected = self._reduce(rank, world_size)
            if self.device == "cpu":
                same_bits(outputs, expected)
            else:  # the sums have the same bits everywhere; a norm may be rounded the other way
                sums = SUMS[self.op]
                same_bits(outputs[sums : sums + 1], expected[sums : sums + 1])
                within_one_rounding(outputs, expected, self.dtype)

    def _compare_composed(self, outputs, rank: int, world_size: int) -> None:
        if self.op == "rs_rmsnorm_ag_fp8":
            own = dataclasses.replace(self, op="rs_rmsnorm_fp8")
            shares = [own._reduce(peer, world_size) for peer in range(world_size)]
            q, scale = (torch.cat(parts) for parts in list(zip(*shares, strict=True))[:2])
            expected = (q, scale, *shares[rank][2:])
            same_bits(outputs[2:3], expected[2:3])
            within_one_rounding(outputs, expected, self.dtype)
            return
        rows = [self._sample(0)]
        if self.op in PROLOGUES:
            sums, norm = self.sums(world_size, every=True), self._norm_weight("norm", self.hidden_size)
            same_bits(outputs[-1:], (sums[: self.num_tokens][self.rows(rank, world_size)],))
            rows = [reference.rms_norm(sums, norm, EPS)]
            if self.device != "cpu":  # where a norm may be rounded the other way
                rows.append(_rms_norm(sums, norm.to(self.dtype)))
        latents = [part for index, part in enumerate(outputs) if index != 1 or self.op == "mla_prologue"][:3]
        slack = 0
        if self.options.get("quantize_q_a"):  # to half a step of e4m3
            scale = outputs[1].repeat_interleave(128, 1)[:, : self.latent[0]]
            latents[0] = reference.dequantize(*outputs[:2], (1, 128))
            slack = (latents[0].abs() / 16).maximum(scale / 1024) + latents[0].abs() / 256  # and to bf16, below
            latents[0] = latents[0].to(torch.bfloat16)
        exact, unfused = self._project(torch.float64, rows=rows[0]), [self._project(self.dtype, rows=x) for x in rows]
        if self.device != "cpu":  # cuBLAS adds up in another order where the rows are fewer
            unfused.append(self._project(self.dtype, partition.row_count(self.num_tokens, 0, world_size), rows[0]))
        for index, values in enumerate(zip(latents, exact, *unfused, strict=True)):
            assert len(values[0]) == self.num_tokens, f"latent {index} has {len(values[0])} rows"
            within_twice_the_error(f"latent {index}", *values, slack=slack if index == 0 else 0)

    def rows(self, rank: int, world_size: int) -> slice:
        return partition.row_slice(self.num_tokens, rank, world_size)

    def sums(self, world_size: int, every: bool = False) -> torch.Tensor:
        """All rows of what is reduced, [num_tokens, hidden_size]: the same bits on every backend.

        every: and of the sample's other rows, which have no residual.
        """
        ranks = range(1 if self.options.get("complete") else world_size)
        parts, residual = [self._sample(rank) if every else self.input(rank) for rank in ranks], self._residual()
        if every and residual is not None:
            residual = torch.nn.functional.pad(residual, (0, 0, 0, len(parts[0]) - len(residual)))
        return reference.sum_in_rank_order(parts, residual)

    def _reduce(self, rank: int, world_size: int) -> tuple[torch.Tensor, ...]:
        sums = self.sums(world_size)
        residual_out = sums[self.rows(rank, world_size)]
        if self.op == "reduce_scatter_rows":
            return (residual_out,)
        norm = (self._norm_weight("norm", self.hidden_size), EPS, self.options.get("weight_offset", 0.0))
        if self.op == "rs_rmsnorm_ag":
            return reference.rms_norm(sums, *norm), residual_out
        output = reference.rms_norm(residual_out, *norm)
        if self.op == "rs_rmsnorm":
            return output, residual_out
        group_size, layout = self.options.get("group_size", 128), self.options.get("scale_layout", "row")
        q, scale = reference.quantize_e4m3(output, group_size, layout, self.options.get("round_scales", False))
        return q, scale, residual_out, output if self.options.get("keep_output") else output[:0]

    def _project(
        self, dtype: torch.dtype, rows_each: int = 0, rows: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """The projection of the sample's rows, or of others, with every step done in `dtype`, in products of so many
        rows, or one.
        """
        rows, weight = self._sample(0) if rows is None else rows, self._projection_weight()
        if self.op.endswith("_fp8"):
            dtype = torch.bfloat16 if dtype != torch.float64 else dtype
            rounded = self.op == "mla_prologue_fp8" and self.options.get("round_scales", False)
            rows = reference.dequantize(*reference.quantize_e4m3(rows, round_scales=rounded), (1, 128))
            weight = reference.dequantize(*self._projection_weight_fp8(), (128, 128))
        bias = self._bias().to(dtype) if self.options.get("bias") else None
        rows, weight = rows.to(dtype), weight.to(dtype)
        parts = rows.split(rows_each or len(rows))
        latent = torch.cat([torch.nn.functional.linear(part, weight, bias) for part in parts])
        if self.op in ("qkv_a_proj_ag", "qkv_a_proj_ag_fp8"):
            return (latent,)
        q_a, kv_a, k_pe = latent.split(self.latent, dim=1)
        wide, offset = torch.promote_types(dtype, torch.float32), self.options.get("weight_offset", 0.0)
        weights = ((weight.to(wide) + offset).to(dtype) for weight in self._latent_norms())
        return (*(_rms_norm(x, weight) for x, weight in zip((q_a, kv_a), weights, strict=True)), k_pe)

    # ---- tensors ----

    def _random(self, name: str, shape, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        return random(f"{name} {self.seed} {self.num_tokens}", shape, dtype or self.dtype, scale)

    def _sample(self, rank: int) -> torch.Tensor:
        """The rank's rows and, where few are projected, some more: rounding errors are measured on all of these."""
        num_rows = max(self.num_tokens, 256) if self.op in PROJECTING else self.num_tokens
        return self._random(f"input {rank}", (num_rows, self.hidden_size))

    def _residual(self) -> torch.Tensor | None:
        if self.residual is None:
            return None
        return self._random("residual", (self.num_tokens, self.hidden_size))

    def _norm_weight(self, name: str, size: int) -> torch.Tensor:
        # In fp32 it is one that 16 bits do not hold.
        return self._random(name, (size,), dtype=torch.float32 if self.options.get("float_weight") else None) + 1

    def _latent_norms(self) -> list[torch.Tensor]:
        """Of fp8 products, which make bf16, in bf16 or fp32."""
        made = [self._norm_weight(name, size) for name, size in zip("qk", self.latent[:2], strict=True)]
        fp8 = self.op.endswith("_fp8") and not self.options.get("float_weight")
        return [norm.to(torch.bfloat16) if fp8 else norm for norm in made]

    def _projection_weight(self) -> torch.Tensor:
        return self._random("weight", (sum(self.latent), self.hidden_size), self.hidden_size**-0.5)

    def _projection_weight_fp8(self) -> tuple[torch.Tensor, torch.Tensor]:
        weight = self._projection_weight()
        blocks = [-(-size // 128) for size in weight.shape]
        scale = random("weight scale", blocks, torch.float32).abs() + 0.1
        spread = scale.repeat_interleave(128, 0)[: weight.shape[0]].repeat_interleave(128, 1)[:, : weight.shape[1]]
        return (weight / spread).to(torch.float8_e4m3fn), scale

    def _bias(self) -> torch.Tensor:
        return self._random("bias", (sum(self.latent),))


def _rms_norm(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(rows, rows.shape[-1:], weight, EPS)


def prologue_inputs(
    num_tokens: int,
    hidden_size: int,
    dtype: torch.dtype,
    residual: str | None,
    rank: int,
    world_size: int,
    complete: bool,
) -> list:
    """input, residual and norm weight of mla_prologue and mla_prologue_fp8 on a rank."""
    call = Call("rs_rmsnorm", num_tokens, hidden_size, dtype, residual, options={"complete": complete})
    arguments = call.arguments(rank, world_size)
    return [arguments[name] for name in ("input", "residual", "weight")]


def python_of(name: str):
    """What is written in Python for an op: `_name`, which explains refusals, or `_name_fake`."""
    return next(getattr(module, name) for module in (ops, projections, prologue) if hasattr(module, name))


# ---- comparisons ----


def within_one_rounding(actual, expected, dtype: torch.dtype) -> None:
    """Values that follow from a row of `dtype` of which an element may be rounded the other way.

    In fp32 the mean of squares itself carries a few roundings.
    """
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        seen, wanted = (a.shape, a.dtype), (e.shape, e.dtype)
        assert seen == wanted, f"output {index} is {seen}, expected {wanted}"
        eight = e.dtype == torch.float8_e4m3fn
        step = 2 * max(torch.finfo(e.dtype).eps, torch.finfo(dtype).eps, 2**-21)
        torch.testing.assert_close(a.float(), e.float(), atol=2**-9 if eight else 1e-7, rtol=step)


def same_bits(actual, expected) -> None:
    """Tensors of equal shape, dtype and bits."""
    assert len(actual) == len(expected), f"{len(actual)} outputs, expected {len(expected)}"
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        seen, wanted = (a.shape, a.dtype), (e.shape, e.dtype)
        assert seen == wanted, f"output {index} is {seen}, expected {wanted}"
        if a.numel() == 0:
            continue
        # Copied: .contiguous() leaves a single column its strides, and then there is no view of its bytes.
        a_bytes, e_bytes = (x.clone(memory_format=torch.contiguous_format).view(torch.uint8) for x in (a, e))
        differ = a_bytes != e_bytes
        if differ.any():
            where = differ.view(*a.shape, -1).any(-1).nonzero()
            first = tuple(where[0].tolist())
            raise AssertionError(
                f"output {index} of shape {tuple(a.shape)}: {len(where)} elements differ, the first at {first}: "
                f"{a[first].item()} instead of {e[first].item()}"
            )


def within_twice_the_error(name: str, actual, exact, *unfused, slack=0) -> None:
    """The distance from the exact result is at most twice that of an unfused program, which may have more rows.

    slack: what each element may be off besides.
    """
    seen, wanted = (actual.shape[1], actual.dtype), (unfused[0].shape[1], unfused[0].dtype)
    assert seen == wanted, f"{name} has columns and dtype {seen}, expected {wanted}"
    if actual.numel() == 0:
        return
    error = ((actual.double() - exact[: len(actual)]).abs() - slack).max()
    bound = 2 * max((one.double() - exact).abs().max() for one in unfused)
    assert error <= bound, f"{name} is off by {error:.3g}, more than {bound:.3g}"
