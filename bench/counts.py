"""What the ops, and the programs that they replace, read, write, send and multiply on a rank: see bench/model.py.

Counted for the form that the plan of the call chooses: one synchronisation or two, rows or columns.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

GROUP = 128  # columns of a scale of fp8 rows
BF16, FP8 = 2, 1  # bytes of what is multiplied


@dataclass(frozen=True)
class Phase:
    """Bytes, operations on numbers of so many bytes, and synchronisations: those of the rank that owns most rows."""

    memory: float
    link: float = 0.0
    operations: float = 0.0
    factor_bytes: int = BF16
    barriers: int = 0


Phases = tuple[Phase, ...]


@dataclass(frozen=True)
class Shape:
    """A call, in elements; its properties are bytes, of bf16 where they do not say quantized. `staged`: its input is no
    symmetric memory. `card`, `ranks_per_card`: where it runs."""

    tokens: int
    world_size: int = 8
    hidden: int = 7168
    latent: int = 2112
    staged: bool = False
    card: str = "H100"
    ranks_per_card: int = 1

    @property
    def own_tokens(self) -> int:
        from tp_fused import partition

        return partition.row_count(self.tokens, 0, self.world_size)

    @property
    def rows(self) -> int:
        return self.tokens * self.hidden * BF16

    @property
    def own_rows(self) -> int:
        return self.own_tokens * self.hidden * BF16

    @property
    def quantized_rows(self) -> int:
        return quantized(self.tokens, self.hidden)

    @property
    def own_quantized_rows(self) -> int:
        return quantized(self.own_tokens, self.hidden)

    @property
    def latents(self) -> int:
        return self.tokens * self.latent * BF16

    @property
    def own_latents(self) -> int:
        return self.own_tokens * self.latent * BF16

    def plan(self, op: str, complete: bool = False) -> dict:
        """What would be launched. Ranks that share a card fill it, as in the benchmark."""
        import torch

        from tp_fused import planning

        most_ctas = planning.sm_count(self.card) // self.ranks_per_card
        return planning.plan(
            op,
            self.tokens,
            card=self.card,
            world_size=self.world_size,
            hidden_size=self.hidden,
            columns=self.latent if op.startswith("qkv_") else 0,
            dtype=torch.float8_e4m3fn if op.endswith("_fp8") and op.startswith("qkv_") else torch.bfloat16,
            in_place=not self.staged,
            complete=complete,
            limits=planning.limits_of(self.card, self.ranks_per_card, most_ctas),
        )

    def body(self, op: str) -> str | None:
        """Of the kernel that rs_rmsnorm_ag or rs_rmsnorm_ag_fp8 is; None where it is several."""
        from tp_fused import planning

        try:
            return self.plan(op)["body"]
        except planning.NoKernelError:
            return None

    def gathers(self) -> bool:
        """Whether the prologue gathers the normed rows, for a share of the columns each."""
        from tp_fused.native import _C

        return _C.gathers_normed_rows(self.tokens, self.latent, self.world_size)

    def barriers(self, count: int) -> int:
        return count if self.world_size > 1 else 0


def quantized(tokens: int, columns: int) -> int:
    """Bytes of e4m3 rows and their scales."""
    return tokens * (columns + 4 * -(-columns // GROUP))


# ---- parts ----


def _reduce(shape: Shape, others: float) -> Phase:
    """Every rank's input is read, by its owner and by the peers; `others`: what else the memory moves meanwhile."""
    staging = 2 * (shape.rows - shape.own_rows) if shape.staged else 0
    barriers = shape.barriers(1 if shape.staged else 2)
    return Phase(shape.rows + staging + others, (shape.world_size - 1) * shape.own_rows, barriers=barriers)


def _reduce_all(shape: Shape, normed: float) -> Phase:
    """What the peers post is written, read and cleared; then every rank adds and norms all rows."""
    posted = (shape.world_size - 1) * shape.rows
    return Phase(shape.rows + 2 * shape.own_rows + normed + 3 * posted, posted, barriers=shape.barriers(1))


def _gather(shape: Shape, own: float, all_rows: float) -> Phase:
    return Phase(own + all_rows, all_rows - own, barriers=shape.barriers(1))


def _project(shape: Shape, tokens: int, factor_bytes: int = BF16, columns: int | None = None) -> Phase:
    """The product of so many rows, its result not counted."""
    columns = shape.latent if columns is None else columns
    scales = tokens * 4 * -(-shape.hidden // GROUP) if factor_bytes == FP8 else 0
    return Phase(
        (tokens + columns) * shape.hidden * factor_bytes + scales,
        operations=2.0 * tokens * shape.hidden * columns,
        factor_bytes=factor_bytes,
    )


def _add(phase: Phase, memory: float) -> Phase:
    return replace(phase, memory=phase.memory + memory)


# ---- reductions ----


def rs_rmsnorm(shape: Shape) -> Phases:
    return (_reduce(shape, 3 * shape.own_rows),)


def reduce_then_norm(shape: Shape) -> Phases:
    return (_reduce(shape, shape.own_rows), Phase(4 * shape.own_rows))


def rs_rmsnorm_fp8(shape: Shape) -> Phases:
    return (_reduce(shape, 2 * shape.own_rows + shape.own_quantized_rows),)


def reduce_then_quantize(shape: Shape) -> Phases:
    return (_reduce(shape, shape.own_rows), Phase(3 * shape.own_rows + shape.own_quantized_rows))


def rs_rmsnorm_ag(shape: Shape) -> Phases:
    if shape.body("rs_rmsnorm_ag") == "all rows":
        return (_reduce_all(shape, shape.rows),)
    reduced = _reduce(shape, 2 * shape.own_rows + shape.rows)
    # Rows are gathered as they are finished; that every rank has them says that no input is read any more.
    return (replace(reduced, link=reduced.link + shape.rows - shape.own_rows, barriers=shape.barriers(2)),)


def rs_rmsnorm_ag_fp8(shape: Shape) -> Phases:
    if shape.body("rs_rmsnorm_ag_fp8") == "all rows":
        return (_reduce_all(shape, shape.quantized_rows),)
    if shape.body("rs_rmsnorm_ag") is not None and shape.plan("rs_rmsnorm_ag")["quantized_by_all"]:
        return (*rs_rmsnorm_ag(shape), Phase(shape.rows + shape.quantized_rows))
    return (*rs_rmsnorm_fp8(shape), _gather(shape, shape.own_quantized_rows, shape.quantized_rows))


def _all_reduce_two_shot(shape: Shape) -> Phases:
    return (_reduce(shape, shape.own_rows), _gather(shape, shape.own_rows, shape.rows))


def _all_reduce_one_shot(shape: Shape) -> Phases:
    """Every rank reads all inputs, and each input is read by all ranks."""
    staging = 2 * shape.rows if shape.staged else 0
    memory, link = (shape.world_size + 1) * shape.rows + staging, (shape.world_size - 1) * shape.rows
    return (Phase(memory, link, barriers=shape.barriers(2)),)


def two_shot_then_norm(shape: Shape) -> Phases:
    return (*_all_reduce_two_shot(shape), Phase(4 * shape.rows))


def one_shot_then_norm(shape: Shape) -> Phases:
    return (*_all_reduce_one_shot(shape), Phase(4 * shape.rows))


def two_shot_then_quantize(shape: Shape) -> Phases:
    return (*_all_reduce_two_shot(shape), Phase(3 * shape.rows + shape.quantized_rows))


def one_shot_then_quantize(shape: Shape) -> Phases:
    return (*_all_reduce_one_shot(shape), Phase(3 * shape.rows + shape.quantized_rows))


# ---- projections ----


def qkv_a_proj_ag(shape: Shape, factor_bytes: int = BF16) -> Phases:
    plan = shape.plan("qkv_a_proj_ag" if factor_bytes == BF16 else "qkv_a_proj_ag_fp8")
    if plan["body"] != "tiles":
        return project_then_gather(shape, factor_bytes)
    product = _project(shape, shape.own_tokens, factor_bytes)
    link = shape.latents - shape.own_latents
    return (replace(_add(product, shape.latents), link=link, barriers=shape.barriers(1)),)


def project_then_gather(shape: Shape, factor_bytes: int = BF16) -> Phases:
    product = _project(shape, shape.own_tokens, factor_bytes)
    return (_add(product, shape.own_latents), _gather(shape, shape.own_latents, shape.latents))


def qkv_a_proj_ag_fp8(shape: Shape) -> Phases:
    return qkv_a_proj_ag(shape, FP8)


def project_fp8_then_gather(shape: Shape) -> Phases:
    return project_then_gather(shape, FP8)


def qkv_a_proj_ag_complete(shape: Shape, factor_bytes: int = BF16) -> Phases:
    """Of rows that all ranks have, a share of the columns; posted, or gathered after cuBLAS's product."""
    columns = -(-shape.latent // shape.world_size)
    product = _project(shape, shape.tokens, factor_bytes, columns)
    own = shape.tokens * columns * BF16
    op = "qkv_a_proj_ag" if factor_bytes == BF16 else "qkv_a_proj_ag_fp8"
    if shape.plan(op, complete=True)["body"] != "columns":
        return (_add(product, own), _gather(shape, own, shape.latents))
    link = shape.latents - own
    return (replace(_add(product, shape.latents), link=link, barriers=shape.barriers(1)),)


def project_everywhere(shape: Shape, factor_bytes: int = BF16) -> Phases:
    return (_add(_project(shape, shape.tokens, factor_bytes), shape.latents),)


# ---- the attention's input as a whole. What quantises q_a again is not counted ----


def chain(shape: Shape) -> Phases:
    return rs_rmsnorm(shape) + qkv_a_proj_ag(shape)


def gathered_chain(shape: Shape) -> Phases:
    return rs_rmsnorm_ag(shape) + qkv_a_proj_ag_complete(shape)


def mla_prologue(shape: Shape) -> Phases:
    return gathered_chain(shape) if shape.gathers() else chain(shape)


def mla_prologue_fp8(shape: Shape) -> Phases:
    if shape.gathers():
        return rs_rmsnorm_ag_fp8(shape) + qkv_a_proj_ag_complete(shape, FP8)
    return rs_rmsnorm_fp8(shape) + qkv_a_proj_ag(shape, FP8)


def _engines(all_reduced: Callable[[Shape], Phases], factor_bytes: int = BF16) -> Callable[[Shape], Phases]:
    """All-reduce; then every rank adds and norms all rows, projects them all, and norms the latents."""
    return lambda shape: (
        *all_reduced(shape),
        *project_everywhere(shape, factor_bytes),
        Phase(2 * shape.latents),
    )


@dataclass(frozen=True)
class Op:
    """`unfused`: the programs that it replaces, by the names that the benchmark has for them."""

    fused: Callable[[Shape], Phases]
    unfused: dict[str, Callable[[Shape], Phases]]
    meaning: str


_ALL_REDUCE = "an all-reduce in one shot or two, whichever is faster, then add and norm of all rows on every rank"
_PRODUCT = "the product, then an all-gather"
_ENGINES = {
    "own": _engines(two_shot_then_norm),
    "twoshot": _engines(two_shot_then_norm),
    "oneshot": _engines(one_shot_then_norm),
}
_ENGINES_FP8 = {
    "own": _engines(two_shot_then_quantize, FP8),
    "twoshot": _engines(two_shot_then_quantize, FP8),
    "oneshot": _engines(one_shot_then_quantize, FP8),
}
OPS = {
    "rs_rmsnorm": Op(rs_rmsnorm, {"own": reduce_then_norm}, "a reduce-scatter, then add and norm"),
    "rs_rmsnorm_fp8": Op(
        rs_rmsnorm_fp8, {"own": reduce_then_quantize}, "a reduce-scatter, then add, norm and quantisation"
    ),
    "rs_rmsnorm_ag": Op(rs_rmsnorm_ag, {"twoshot": two_shot_then_norm, "oneshot": one_shot_then_norm}, _ALL_REDUCE),
    "rs_rmsnorm_ag_fp8": Op(
        rs_rmsnorm_ag_fp8,
        {"twoshot": two_shot_then_quantize, "oneshot": one_shot_then_quantize},
        f"{_ALL_REDUCE}, quantised",
    ),
    "qkv_a_proj_ag": Op(qkv_a_proj_ag, {"own": project_then_gather, "copies": project_then_gather}, _PRODUCT),
    "qkv_a_proj_ag_fp8": Op(
        qkv_a_proj_ag_fp8, {"scaled_mm": project_fp8_then_gather, "copies": project_fp8_then_gather}, _PRODUCT
    ),
    "qkv_a_proj_ag_complete": Op(
        qkv_a_proj_ag_complete, {"gemm": project_everywhere}, "the whole product on every rank, no communication"
    ),
    "chain": Op(chain, _ENGINES, "what engines do"),
    "mla_prologue": Op(mla_prologue, _ENGINES, "what engines do"),
    "mla_prologue_fp8": Op(mla_prologue_fp8, _ENGINES_FP8, "what engines do with fp8 weights"),
}
