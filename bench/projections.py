"""The cases that project: qkv_a_proj_ag, alone and with the latent norms, and from partial sums to latents."""

import functools

import torch
from torch.nn.functional import linear

import tp_fused

from .cases import EPS, OPS, Case, ReductionCase, RsRmsnorm, add_norm, rms_norm, steps_apart
from .timing import Program
from .transports import OverTorch, OverTpFused, PeerCopies

# How the fused result may differ from the exact one, in units of what the unfused program of the same dtype does.
ERROR_BOUND = 2.0


class QkvAProjAg(Case):
    op = "qkv_a_proj_ag"

    def __init__(self, context, num_tokens: int):
        super().__init__(context, num_tokens)
        # Higher than the dtype by enough to be called exact.
        self.exact_dtype = torch.float64 if context.dtype == torch.float32 else torch.float32
        self.weight = context.constant("projection", (self.latent, self.hidden)) / self.hidden**0.5

    @functools.cached_property
    def rows(self) -> torch.Tensor:
        shape = (self.own_rows, self.hidden)
        return self.context.random("rows", self.num_tokens, self.context.rank, shape=shape)

    @property
    def arguments(self) -> tuple[torch.Tensor, ...]:
        """What `project` takes, one entry a row."""
        return (self.rows,)

    def fused(self):
        return (OPS.qkv_a_proj_ag(self.rows, self.weight, self.num_tokens, self.group),)

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        return linear(rows, self.weight)

    def project_exactly(self) -> torch.Tensor:
        return linear(self.rows.to(self.exact_dtype), self.weight.to(self.exact_dtype))

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """The product that an unfused program is timed with: the fastest that there is."""
        return self.project(rows)

    def parts(self, latent: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What is made of the gathered latent, in its own dtype."""
        return (latent,)

    def finish(self, latent: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What follows the gather: the parts, as the op returns them."""
        return self.parts(latent)

    def unfused(self, via):
        rows, finish = [via.pad_rows(argument) for argument in self.arguments], self._local(self.finish)
        return Program(lambda: finish(via.all_gather(self.multiply(*rows))))

    def baseline(self, name):
        if name == "gemm":
            return self.gemm()
        if name == "copies":
            return self.copies(functools.partial(torch.mm, self.rows, self.weight.t()))
        return super().baseline(name)

    def copies(self, multiply, dtype: torch.dtype | None = None) -> Program:
        """`multiply(out=rows)`, and the rows fetched by the peers."""
        via = PeerCopies(self.context, self.num_tokens, self.latent, dtype)

        def call():
            multiply(out=via.next_rows())
            return (via.all_gather(),)

        return Program(call)

    def gemm(self) -> Program:
        """The library's product of this rank's rows."""
        return Program(lambda: (self.project(*self.arguments),), expected=lambda: (self.project_exactly(),))

    @functools.cached_property
    def expected(self) -> list[tuple[torch.Tensor, float]]:
        """Each part of the latent, exact, and the error it may have."""
        exact = self.project_exactly()
        plain = self.parts(self.project(*self.arguments))
        errors = [
            (value - right).abs().max().item() if value.numel() else 0.0
            for value, right in zip(plain, self.parts(exact), strict=True)
        ]
        bounds = (ERROR_BOUND * self.context.host_reduce(errors)).tolist()
        return list(zip(self.parts(self.gathered(exact)), bounds, strict=True))

    def gathered(self, latent: torch.Tensor) -> torch.Tensor:
        """Of all rows, from what this rank's are projected to."""
        return self.context.gather_rows(latent, self.num_tokens)

    def count_wrong(self, outputs):
        pairs = zip(outputs, self.expected, strict=True)
        return int(sum((~((value - right).abs() <= bound)).sum() for value, (right, bound) in pairs))

    @property
    def latent_bytes(self) -> int:
        """Of what every rank gets of the latents."""
        return self.num_tokens * self.latent * self.itemsize

    @property
    def bytes(self):
        return self.latent_bytes

    @property
    def memory_bytes(self):
        """The rows once, the weight and the output on every rank."""
        weight = self.latent * self.hidden * self.itemsize
        return self.num_tokens * self.hidden * self.itemsize + self.context.world_size * (weight + self.latent_bytes)


class QkvAProjAgComplete(QkvAProjAg):
    op = "qkv_a_proj_ag_complete"

    @functools.cached_property
    def rows(self):
        shape = (self.num_tokens, self.hidden)
        return self.context.random("rows", self.num_tokens, shape=shape)

    def fused(self):
        return (OPS.qkv_a_proj_ag(self.rows, self.weight, self.num_tokens, self.group, complete=True),)

    def baseline(self, name):
        if name == "qkv_a_proj_ag":
            own = self.rows[tp_fused.row_slice(self.num_tokens, self.context.rank, self.context.world_size)]
            return Program(lambda: (OPS.qkv_a_proj_ag(own, self.weight, self.num_tokens, self.group),))
        return super().baseline(name)

    def explain(self):
        return self.context.explain("qkv_a_proj_ag", complete=True)

    def gathered(self, latent):
        return latent

    @property
    def memory_bytes(self):
        """The weight once, the rows and the output on every rank."""
        rows = self.num_tokens * self.hidden * self.itemsize
        return self.latent * self.hidden * self.itemsize + self.context.world_size * (rows + self.latent_bytes)


class QkvAProjAgNorm(QkvAProjAg):
    op = "qkv_a_proj_ag_norm"

    def __init__(self, context, num_tokens: int):
        super().__init__(context, num_tokens)
        options = context.options
        self.widths = [options.q_lora, options.kv_lora, options.rope]
        self.q_a_weight = 1 + 0.1 * context.constant("q_a", (options.q_lora,))
        self.kv_a_weight = 1 + 0.1 * context.constant("kv_a", (options.kv_lora,))

    def fused(self):
        return self.fused_from(self.rows)

    def fused_from(self, rows: torch.Tensor):
        norms = (self.q_a_weight, self.kv_a_weight)
        return OPS.qkv_a_proj_ag_norm(rows, self.weight, *norms, EPS, self.num_tokens, self.group)

    def baseline(self, name):
        if name == "ag+norm":
            finish = self._local(self.finish)
            arguments = (self.rows, self.weight, self.num_tokens, self.group)
            return Program(lambda: finish(OPS.qkv_a_proj_ag(*arguments)))
        return super().baseline(name)

    def parts(self, latent):
        q_a, kv_a, k_pe = latent.split(self.widths, dim=1)
        return rms_norm(q_a, self.q_a_weight), rms_norm(kv_a, self.kv_a_weight), k_pe.contiguous()


class Chain(QkvAProjAgNorm):
    op = "chain"
    reduces: type[ReductionCase] = RsRmsnorm

    def __init__(self, context, num_tokens: int):
        super().__init__(context, num_tokens)
        self.reduction = self.reduces(context, num_tokens)
        self.input = self.reduction.input

    @functools.cached_property
    def rows(self):
        return self.reduction.expected[0]

    def fused(self):
        output, residual_out = self.reduction.fused()
        return (*self.fused_from(output), residual_out)

    def factors(self, output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Normed rows as `multiply` takes them; it may be given more rows than there are."""
        return (output,)

    def norm(self, rows: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What follows a reduction: (*factors, residual_out)."""
        output, residual_out = add_norm(rows, residual, self.reduction.weight)
        return (*self.factors(output), residual_out)

    def baseline(self, name):
        norm, latents = self._local(self.norm), self._local(self.finish)
        if name == "flashinfer":
            factors = self._local(self.factors)
            return self.reduction.flashinfer(lambda output: latents(self.multiply(*factors(output))[: len(output)]))

        def finish(rows, residual):
            *factors, residual_out = norm(rows, residual)
            return (*latents(self.multiply(*factors)[: len(rows)]), residual_out)

        if not name.endswith("-rs"):
            return self.reduction.all_reduce_baseline(name, finish)
        via = {"dist-rs": OverTorch, "own-rs": OverTpFused}[name](self.context, self.num_tokens, self.input)
        residual = via.pad_rows(self.reduction.residual)

        def scattered():
            *factors, residual_out = norm(via.reduce_scatter(), residual)
            return (*latents(via.all_gather(self.multiply(*factors)[: len(residual_out)])), residual_out)

        return Program(scattered)

    def count_wrong(self, outputs):
        *latents, residual_out = outputs
        wrong = (steps_apart(residual_out, self.reduction.expected[1]) > 0).sum()
        return super().count_wrong(latents) + int(wrong)

    @property
    def bytes(self):
        return self.latent_bytes + self.reduction.bytes

    @property
    def memory_bytes(self):
        return self.reduction.memory_bytes + super().memory_bytes


class MlaPrologue(Chain):
    op = "mla_prologue"

    def fused(self):
        weights = (self.reduction.weight, self.weight, self.q_a_weight, self.kv_a_weight)
        return OPS.mla_prologue(self.input, self.reduction.residual, *weights, EPS, self.group)

    def baseline(self, name):
        if name == "chain":
            return Program(super().fused)
        return Program(self.of_all_rows) if name == "all-rows" else super().baseline(name)

    def of_all_rows(self):
        reduction, norms = self.reduction, (self.q_a_weight, self.kv_a_weight, EPS)
        rows, residual_out = OPS.rs_rmsnorm_ag(self.input, reduction.residual, reduction.weight, EPS, self.group)
        latents = OPS.qkv_a_proj_ag_norm(rows, self.weight, *norms, self.num_tokens, self.group, complete=True)
        return (*latents, residual_out)


class BesideGemm(RsRmsnorm):
    op = "beside_gemm"
    columns = 2048

    def __init__(self, context, num_tokens: int):
        super().__init__(context, num_tokens)
        self.rows = context.random("gemm", num_tokens, shape=(num_tokens, self.hidden))
        self.matrix = context.constant("gemm", (self.columns, self.hidden)) / self.hidden**0.5
        self.stream = torch.cuda.Stream()

    def fused(self):
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            outputs = super().fused()
        linear(self.rows, self.matrix)
        current.wait_stream(self.stream)
        return outputs

    def baseline(self, name):
        if name == "alone":
            return Program(super().fused)
        return Program(lambda: (linear(self.rows, self.matrix),), expected=lambda: (linear(self.rows, self.matrix),))
