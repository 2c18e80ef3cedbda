"""The cases in fp8: e4m3 with a scale for each 128 columns of a row, and for each 128x128 block of a weight."""

import functools

import torch
from torch.nn.functional import linear, pad

from tp_fused import reference

from .baselines import BASELINES
from .cases import EPS, OPS, ReductionCase, RsRmsnormAg, add_norm, steps_apart
from .projections import Chain, QkvAProjAg, QkvAProjAgNorm
from .timing import Program
from .transports import OverTpFused

GROUP = 128
BF16 = torch.bfloat16


def add_norm_quantize(rows: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale_layout: str):
    output, residual_out = add_norm(rows, residual, weight)
    return (*reference.quantize_e4m3(output, layout=scale_layout), residual_out)


def quantized_bytes(num_tokens: int, columns: int) -> int:
    return num_tokens * (columns + 4 * -(-columns // GROUP))


# ---- ops that begin with a reduction ----


def wrongly_quantized(case: ReductionCase, q: torch.Tensor, scale: torch.Tensor, output: torch.Tensor) -> int:
    """Elements that are further from the quantised `output` than an op's normed rows may be.

    Some rows at a time: what they are compared in takes many times their memory, on each of the ranks of a card.
    """
    rounding, wrong = case.roundings * torch.finfo(case.context.dtype).eps, 0
    for some_q, some_scale, rows in zip(q.split(2048), scale.split(2048), output.split(2048), strict=True):
        right_q, right_scale = reference.quantize_e4m3(rows)
        wrong += int((steps_apart(some_q, right_q) > case.roundings).sum())
        wrong += int((~((some_scale - right_scale).abs() <= rounding * right_scale)).sum())
    return wrong


class RsRmsnormFp8(ReductionCase):
    op = "rs_rmsnorm_fp8"

    def fused(self):
        layout = self.context.options.scale_layout
        outputs = OPS.rs_rmsnorm_fp8(self.input, self.residual, self.weight, EPS, self.group, scale_layout=layout)
        return outputs[:3]

    def unfused(self, via):
        residual, finish = via.pad_rows(self.residual), self._local(add_norm_quantize)
        layout = self.context.options.scale_layout
        return Program(lambda: finish(via.reduce_scatter(), residual, self.weight, layout))

    def baseline(self, name):
        if name == "rs_rmsnorm":
            arguments = (self.input, self.residual, self.weight, EPS, self.group)
            return Program(lambda: OPS.rs_rmsnorm(*arguments), expected=lambda: self.expected)
        return super().baseline(name)

    def count_wrong(self, outputs):
        q, scale, residual_out = outputs
        wrong = (steps_apart(residual_out, self.expected[1]) > 0).sum()
        return int(wrong) + wrongly_quantized(self, q, scale, self.expected[0])

    @property
    def memory_bytes(self):
        return self.reduction_bytes + 2 * self.bytes + quantized_bytes(self.num_tokens, self.hidden)


class RsRmsnormAgFp8(RsRmsnormAg):
    op = "rs_rmsnorm_ag_fp8"

    def fused(self):
        layout = self.context.options.scale_layout
        return OPS.rs_rmsnorm_ag_fp8(*self.arguments, self.group, scale_layout=layout)[:3]

    @property
    def arguments(self) -> tuple:
        return self.input, self.residual, self.weight, EPS

    def unfused(self, via):
        residual, finish = via.pad_rows(self.residual), self._local(add_norm_quantize)

        def call():
            q, scale, residual_out = finish(via.reduce_scatter(), residual, self.weight, "row")
            q, scale = via.all_gather(q), via.all_gather(scale)
            if self.context.options.scale_layout == "column":
                scale = reference.empty_scale(*q.shape, GROUP, "column", q.device).copy_(scale)
            return q, scale, residual_out

        return Program(call)

    def baseline(self, name):
        layout = self.context.options.scale_layout
        if name == "rs_rmsnorm_ag":
            arguments = (*self.arguments, self.group)
            return Program(
                lambda: OPS.rs_rmsnorm_ag(*arguments), expected=lambda: (self.expected_output, self.expected[1])
            )
        if name == "flashinfer":
            quantize = self._local(reference.quantize_e4m3)
            return self.flashinfer(lambda output: quantize(output, layout=layout))
        if name in ("allreduce", "nccl-symm", "twoshot", "oneshot"):
            finish = self._local(add_norm_quantize)
            return self.all_reduce_baseline(name, lambda rows, residual: finish(rows, residual, self.weight, layout))
        return super().baseline(name)

    def count_wrong(self, outputs):
        q, scale, residual_out = outputs
        wrong = (steps_apart(residual_out, self.expected[1]) > 0).sum()
        return int(wrong) + wrongly_quantized(self, q, scale, self.expected_output)

    @property
    def memory_bytes(self):
        gathered = self.context.world_size * quantized_bytes(self.num_tokens, self.hidden)
        return self.reduction_bytes + 2 * self.bytes + gathered


# ---- ops that project ----


def as_cublas_wants(q: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A multiple of 4 rows, and their scales column-major."""
    q, scale = (pad(argument.float(), (0, 0, 0, -len(q) % 4)) for argument in (q, scale))
    return q.to(torch.float8_e4m3fn), scale.t().contiguous().t()


class QkvAProjAgFp8(QkvAProjAg):
    op = "qkv_a_proj_ag_fp8"

    def __init__(self, context, num_tokens: int):
        super().__init__(context, num_tokens)
        blocks = tuple(-(-size // GROUP) for size in self.weight.shape)
        self.weight = context.constant("projection", self.weight.shape).to(torch.float8_e4m3fn)
        self.weight_scale = (1 + 0.1 * context.constant("scale", blocks).float()) / self.hidden**0.5
        self.itemsize = BF16.itemsize

    @functools.cached_property
    def arguments(self) -> tuple[torch.Tensor, torch.Tensor]:
        return reference.quantize_e4m3(self.rows, layout=self.context.options.scale_layout)

    def fused(self):
        weight = (self.weight, self.weight_scale)
        return (OPS.qkv_a_proj_ag_fp8(*self.arguments, *weight, self.num_tokens, self.group),)

    def project(self, q, scale):
        return reference.project_fp8(q, scale, self.weight, self.weight_scale)

    def multiply(self, q, scale):
        return self.project(q, scale)

    def baseline(self, name):
        if name == "scaled_mm":
            return self.scaled_mm_gathered()
        if name == "copies":
            whole = self.num_tokens % (4 * self.context.world_size) == 0
            possible = whole and BASELINES["scaled_mm"].available(self.context)
            return self.copies(self.scaled_mm(), BF16) if possible else None
        return super().baseline(name)

    def scaled_mm_gathered(self) -> Program:
        multiply, via = self.scaled_mm(), OverTpFused(self.context, self.num_tokens)

        def call():
            rows = multiply()
            self._meet_on_a_shared_card()
            return (via.all_gather(rows),)

        return Program(call)

    def _meet_on_a_shared_card(self) -> None:
        """A gather's blocks hold their SMs until every rank has come. A product that has not begun may not fit on what
        they leave: gathers begin when all products are done."""
        if self.context.ranks_per_card > 1:
            self.context.meet()

    def gemm(self):
        if not BASELINES["scaled_mm"].available(self.context):
            return super().gemm()
        multiply = self.scaled_mm()
        return Program(lambda: (multiply(),), expected=lambda: (self.project_exactly(),))

    def scaled_mm(self):
        """torch's product of this rank's rows. An engine's quantisation writes them as cuBLAS wants them: that is not
        charged. `out` is for a multiple of 4 rows only.
        """
        factors = as_cublas_wants(*self.arguments)
        return lambda out=None: self.scaled_product(*factors, out)[: self.own_rows]

    def scaled_product(self, q, scale, out=None) -> torch.Tensor:
        if len(q) == 0:
            return q.new_empty(0, self.latent, dtype=BF16)
        return torch._scaled_mm(q, self.weight.t(), scale, self.weight_scale.t(), out_dtype=BF16, out=out)

    def project_exactly(self):
        rows = reference.dequantize(*self.arguments, (1, GROUP))
        return linear(rows, self.whole_weight)

    @property
    def whole_weight(self) -> torch.Tensor:
        """Dequantised."""
        return reference.dequantize(self.weight, self.weight_scale, (GROUP, GROUP))

    @property
    def memory_bytes(self):
        rows = quantized_bytes(self.num_tokens, self.hidden)
        return rows + self.context.world_size * (self.latent * self.hidden + self.latent_bytes)


class QkvAProjAgNormFp8(QkvAProjAgNorm, QkvAProjAgFp8):
    """Of the first the latents' norms, of the second the product. q_a is quantised again."""

    op = "qkv_a_proj_ag_norm_fp8"

    def __init__(self, context, num_tokens: int):
        super().__init__(context, num_tokens)
        self.q_a_weight, self.kv_a_weight = self.q_a_weight.to(BF16), self.kv_a_weight.to(BF16)
        self.as_quantized = {"quantize_q_a": True, "scale_layout": context.options.scale_layout}

    def fused(self):
        weights = (self.weight, self.weight_scale, self.q_a_weight, self.kv_a_weight)
        return OPS.qkv_a_proj_ag_norm_fp8(
            *self.arguments, *weights, EPS, self.num_tokens, self.group, **self.as_quantized
        )

    def multiply(self, q, scale):
        """Of rows as cuBLAS wants them."""
        if not BASELINES["scaled_mm"].available(self.context):
            return self.project(q, scale)
        product = self.scaled_product(q, scale)
        self._meet_on_a_shared_card()
        return product

    def finish(self, latent):
        q_a, kv_a, k_pe = self.parts(latent)
        return (*reference.quantize_e4m3(q_a, layout=self.context.options.scale_layout), kv_a, k_pe)

    def unfused(self, via):
        rows, scale = (via.pad_rows(argument) for argument in self.arguments)
        factors, finish = as_cublas_wants(rows, scale), self._local(self.finish)
        return Program(lambda: finish(via.all_gather(self.multiply(*factors)[: len(rows)])))

    def baseline(self, name):
        if name == "ag_fp8+norm":
            finish = self._local(self.finish)
            arguments = (*self.arguments, self.weight, self.weight_scale, self.num_tokens, self.group)
            return Program(lambda: finish(OPS.qkv_a_proj_ag_fp8(*arguments)))
        return super().baseline(name)

    def count_wrong(self, outputs):
        """q_a may be off by its own error before it is quantised, and then by half a step of e4m3."""
        q, scale, *others = outputs
        (q_a, bound), *expected_others = self.expected
        _, expected_scale = reference.quantize_e4m3(q_a)
        half_step = ((q_a.abs() + bound) / 16).maximum(scale.repeat_interleave(GROUP, 1)[:, : q.shape[1]] / 1024)
        expected = [(q_a, bound + half_step), (expected_scale, bound / reference.E4M3_MAX), *expected_others]
        values = (reference.dequantize(q, scale, (1, GROUP)), scale, *others)
        pairs = zip(values, expected, strict=True)
        return sum(int((~((value - right).abs() <= within)).sum()) for value, (right, within) in pairs)

    @property
    def latent_bytes(self):
        q_a, *others = self.widths
        return quantized_bytes(self.num_tokens, q_a) + self.num_tokens * sum(others) * self.itemsize


class MlaPrologueFp8(Chain, QkvAProjAgNormFp8):
    """Of the first the reduction and the programs of today, of the second the projection."""

    op = "mla_prologue_fp8"
    reduces = RsRmsnormFp8

    def fused(self):
        weights = (self.weight, self.weight_scale, self.q_a_weight, self.kv_a_weight)
        reduced = (self.input, self.reduction.residual, self.reduction.weight)
        return OPS.mla_prologue_fp8(*reduced, *weights, EPS, self.group, **self.as_quantized)

    def factors(self, output):
        return reference.quantize_e4m3(pad(output, (0, 0, 0, -len(output) % 4)), layout="column")

    def baseline(self, name):
        if name in ("chain", "all-rows"):
            return Program(lambda: self.in_two_calls(name == "all-rows"))
        return self.in_16_bits() if name == "mla_prologue" else super().baseline(name)

    def in_two_calls(self, of_all_rows: bool):
        reduction, reduce = self.reduction, OPS.rs_rmsnorm_ag_fp8 if of_all_rows else OPS.rs_rmsnorm_fp8
        q, scale, residual_out, _ = reduce(self.input, reduction.residual, reduction.weight, EPS, self.group)
        weights = (self.weight, self.weight_scale, self.q_a_weight, self.kv_a_weight)
        shape = (EPS, self.num_tokens, self.group)
        options = {"complete": of_all_rows, **self.as_quantized}
        return *OPS.qkv_a_proj_ag_norm_fp8(q, scale, *weights, *shape, **options), residual_out

    def in_16_bits(self) -> Program:
        """The op of the same tokens, with this weight."""
        dtype, reduction = self.context.dtype, self.reduction
        weight = self.whole_weight.to(dtype)
        weights = (reduction.weight, weight, self.q_a_weight.to(dtype), self.kv_a_weight.to(dtype))
        arguments = (self.input, reduction.residual, *weights, EPS, self.group)

        def right():
            latent = self.context.gather_rows(linear(self.rows, weight), self.num_tokens)
            return (*self.parts(latent), reduction.expected[1])

        return Program(lambda: OPS.mla_prologue(*arguments), expected=right)
