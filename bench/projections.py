"""The cases that project: qkv_a_proj_ag in its three forms, and from partial sums to latents."""

import functools

import torch
from torch.nn.functional import linear

from tp_fused import reference

from .baselines import BASELINES
from .cases import EPS, OPS, Case, RsRmsnorm, add_norm, rms_norm, steps_apart
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

    def finish(self, latent: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What follows the gather, in the latent's own dtype."""
        return (latent,)

    def unfused(self, via):
        rows, finish = [via.pad_rows(argument) for argument in self.arguments], self._local(self.finish)
        return Program(lambda: finish(via.all_gather(self.project(*rows))))

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
        """Each output, exact, and the error it may have."""
        exact = self.project_exactly()
        plain = self.finish(self.project(*self.arguments))
        errors = [
            (value - right).abs().max().item() if value.numel() else 0.0
            for value, right in zip(plain, self.finish(exact), strict=True)
        ]
        bounds = (ERROR_BOUND * self.context.host_reduce(errors)).tolist()
        gathered = self.context.gather_rows(exact, self.num_tokens)
        return list(zip(self.finish(gathered), bounds, strict=True))

    def count_wrong(self, outputs):
        pairs = zip(outputs, self.expected, strict=True)
        return int(sum((~((value - right).abs() <= bound)).sum() for value, (right, bound) in pairs))

    @property
    def bytes(self):
        return self.num_tokens * self.latent * self.itemsize

    @property
    def memory_bytes(self):
        """The rows once, the weight and the output on every rank."""
        weight = self.latent * self.hidden * self.itemsize
        return self.num_tokens * self.hidden * self.itemsize + self.context.world_size * (weight + self.bytes)


class QkvAProjAgFp8(QkvAProjAg):
    op = "qkv_a_proj_ag_fp8"

    def __init__(self, context, num_tokens: int):
        super().__init__(context, num_tokens)
        blocks = tuple(-(-size // 128) for size in self.weight.shape)
        self.weight = context.constant("projection", self.weight.shape).to(torch.float8_e4m3fn)
        self.weight_scale = (1 + 0.1 * context.constant("scale", blocks).float()) / self.hidden**0.5
        self.itemsize = torch.bfloat16.itemsize

    @functools.cached_property
    def arguments(self) -> tuple[torch.Tensor, torch.Tensor]:
        return reference.quantize_e4m3(self.rows, layout=self.context.options.scale_layout)

    def fused(self):
        weight = (self.weight, self.weight_scale)
        return (OPS.qkv_a_proj_ag_fp8(*self.arguments, *weight, self.num_tokens, self.group),)

    def project(self, q, scale):
        return reference.project_fp8(q, scale, self.weight, self.weight_scale)

    def baseline(self, name):
        if name == "scaled_mm":
            return self.scaled_mm_gathered()
        if name == "copies":
            whole = self.num_tokens % (4 * self.context.world_size) == 0
            possible = whole and BASELINES["scaled_mm"].available(self.context)
            return self.copies(self.scaled_mm(), torch.bfloat16) if possible else None
        return super().baseline(name)

    def scaled_mm_gathered(self) -> Program:
        multiply, via = self.scaled_mm(), OverTpFused(self.context, self.num_tokens)

        def call():
            rows = multiply()
            # A gather's blocks hold their SMs until every rank has come. A product that has not begun may
            # not fit on what they leave: gathers begin when all products are done.
            if self.context.ranks_per_card > 1:
                self.context.meet()
            return (via.all_gather(rows),)

        return Program(call)

    def gemm(self):
        if not BASELINES["scaled_mm"].available(self.context):
            return super().gemm()
        multiply = self.scaled_mm()
        return Program(lambda: (multiply(),), expected=lambda: (self.project_exactly(),))

    def scaled_mm(self):
        """torch's product of this rank's rows. cuBLAS wants a multiple of 4 of them, and their scales column-major.

        An engine's quantisation writes them so: neither is charged. `out` is for such a multiple only.
        """
        padding = (0, 0, 0, -self.own_rows % 4)
        q, scale = (torch.nn.functional.pad(argument.float(), padding) for argument in self.arguments)
        q, scale = q.to(torch.float8_e4m3fn), scale.t().contiguous().t()
        scales = (scale, self.weight_scale.t())

        def call(out=None):
            if self.own_rows == 0:
                return q.new_empty(0, self.latent, dtype=torch.bfloat16)
            return torch._scaled_mm(q, self.weight.t(), *scales, out_dtype=torch.bfloat16, out=out)[: self.own_rows]

        return call

    def project_exactly(self):
        rows = reference.dequantize(*self.arguments, (1, 128))
        return linear(rows, reference.dequantize(self.weight, self.weight_scale, (128, 128)))

    @property
    def memory_bytes(self):
        rows = self.num_tokens * (self.hidden + 4 * -(-self.hidden // 128))
        return rows + self.context.world_size * (self.latent * self.hidden + self.bytes)


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

    def finish(self, latent):
        q_a, kv_a, k_pe = latent.split(self.widths, dim=1)
        return rms_norm(q_a, self.q_a_weight), rms_norm(kv_a, self.kv_a_weight), k_pe.contiguous()


class Chain(QkvAProjAgNorm):
    op = "chain"

    def __init__(self, context, num_tokens: int):
        super().__init__(context, num_tokens)
        self.reduction = RsRmsnorm(context, num_tokens)
        self.input = self.reduction.input

    @functools.cached_property
    def rows(self):
        return self.reduction.expected[0]

    def fused(self):
        output, residual_out = self.reduction.fused()
        return (*self.fused_from(output), residual_out)

    def baseline(self, name):
        norm, latents = self._local(add_norm), self._local(self.finish)
        if name == "flashinfer":
            return self.reduction.flashinfer(lambda output: latents(self.project(output)))

        def finish(rows, residual):
            output, residual_out = norm(rows, residual, self.reduction.weight)
            return (*latents(self.project(output)), residual_out)

        if not name.endswith("-rs"):
            return self.reduction.all_reduce_baseline(name, finish)
        via = {"dist-rs": OverTorch, "own-rs": OverTpFused}[name](self.context, self.num_tokens, self.input)
        residual = via.pad_rows(self.reduction.residual)

        def scattered():
            output, residual_out = norm(via.reduce_scatter(), residual, self.reduction.weight)
            return (*latents(via.all_gather(self.project(output))), residual_out)

        return Program(scattered)

    def count_wrong(self, outputs):
        *latents, residual_out = outputs
        wrong = (steps_apart(residual_out, self.reduction.expected[1]) > 0).sum()
        return super().count_wrong(latents) + int(wrong)

    @property
    def bytes(self):
        return super().bytes + self.reduction.bytes

    @property
    def memory_bytes(self):
        rows = self.num_tokens * self.hidden * self.itemsize
        weight = self.latent * self.hidden * self.itemsize
        latents = self.num_tokens * self.latent * self.itemsize
        return self.reduction.memory_bytes + rows + self.context.world_size * (weight + latents)


class MlaPrologue(Chain):
    op = "mla_prologue"

    def fused(self):
        weights = (self.reduction.weight, self.weight, self.q_a_weight, self.kv_a_weight)
        return OPS.mla_prologue(self.input, self.reduction.residual, *weights, EPS, self.group)

    def baseline(self, name):
        return Program(super().fused) if name == "chain" else super().baseline(name)


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
