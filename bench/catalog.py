"""The ops that can be timed, by name. Without torch, so that help and refusals come at once.

`help` is that of the op's command. Its "bytes" and "right" are what the columns of the table and the check mean; how
they are computed is in cases.py, projections.py and fp8.py.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Op:
    help: str
    baselines: tuple[str, ...]
    options: tuple[str, ...]  # of those that not every op takes: which do something for it
    cuda_only: bool = False
    # Inside the op, maybe by clusters of eight blocks: on a shared card these need room beside blocks that wait.
    torch_multiplies: bool = False


# Of chain and mla_prologue, in 16 bits and in fp8: what engines do, with the fastest parts that there are.
ENGINES = ("dist", "nccl-symm", "twoshot", "oneshot", "flashinfer", "own")
SCATTERED = ("dist-rs", "own-rs")  # the same with scattered rows
OPS = {
    "rs_rmsnorm": Op(
        """Reduce-scatter, residual add and RMSNorm.

        bytes: one rank's input.

        Right: residual_out has the oracle's bits; so has output on a CPU, on CUDA it is within one rounding.
        """,
        ("dist", "nccl-symm", "own", "symm", "barrier"),
        ("dtype", "zero_copy", "compile"),
    ),
    "rs_rmsnorm_fp8": Op(
        """Reduce-scatter, residual add, RMSNorm and fp8 quantisation.

        bytes: one rank's input.

        Right: residual_out has the oracle's bits; so have q and scale on a CPU, on CUDA they are within one step of
        e4m3 and one rounding of the group's largest number.
        """,
        ("dist", "nccl-symm", "own", "rs_rmsnorm"),
        ("dtype", "zero_copy", "compile", "scale_layout"),
    ),
    "rs_rmsnorm_ag": Op(
        """All-reduce, residual add and RMSNorm, with the residual left scattered.

        "rs_rmsnorm" is the same without the gather, "barrier" what one synchronisation takes.

        bytes: one rank's input, scattered and gathered again. Right: as rs_rmsnorm.
        """,
        ("dist", "allreduce", "nccl-symm", "twoshot", "oneshot", "flashinfer", "own", "rs_rmsnorm", "barrier"),
        ("dtype", "zero_copy", "compile"),
    ),
    "rs_rmsnorm_ag_fp8": Op(
        """rs_rmsnorm_fp8, the quantised rows gathered with their scales, the residual left scattered.

        Programs that all-reduce quantise all rows on every rank. bytes: as rs_rmsnorm_ag. Right: as rs_rmsnorm_fp8.
        """,
        ("dist", "allreduce", "nccl-symm", "twoshot", "oneshot", "flashinfer", "own", "rs_rmsnorm_ag"),
        ("dtype", "zero_copy", "compile", "scale_layout"),
    ),
    "reduce_scatter_rows": Op(
        """Reduce-scatter over the token dimension: tp_fused's own transport, so only torch.distributed beside it.

        bytes: one rank's input. Right: the oracle's bits.
        """,
        ("dist", "nccl-symm"),
        ("dtype", "zero_copy"),
    ),
    "all_gather_rows": Op(
        """All-gather of scattered rows: tp_fused's own transport, so only torch.distributed beside it.

        bytes: one rank's output. Right: every rank's bits. With --tokens 0, a bare barrier.
        """,
        ("dist",),
        ("dtype",),
    ),
    "qkv_a_proj_ag": Op(
        """A replicated projection of scattered rows, all-gathered while it is computed.

        bytes: one rank's output. Right: within twice the largest error that the unfused program of the same dtype
        makes, against a product in fp32 (fp64 for fp32).
        """,
        ("dist", "own", "copies", "gemm"),
        ("dtype", "latent"),
    ),
    "qkv_a_proj_ag_complete": Op(
        """qkv_a_proj_ag of rows that all ranks have: each multiplies them by its share of the weight.

        "gemm" is what it replaces: the product of all rows by all of the weight, on every rank. In
        "qkv_a_proj_ag" each rank multiplies its own rows by all of it. bytes and right: as qkv_a_proj_ag.
        """,
        ("gemm", "qkv_a_proj_ag"),
        ("dtype", "latent"),
        torch_multiplies=True,
    ),
    "qkv_a_proj_ag_fp8": Op(
        """qkv_a_proj_ag on fp8 rows and weight with block scales; the output is bf16.

        The unfused program dequantises and multiplies in fp32; where torch has a product with block scales,
        "scaled_mm", "copies" and "gemm" use it. bytes and right: as qkv_a_proj_ag.
        """,
        ("dist", "own", "scaled_mm", "copies", "gemm", "barrier"),
        ("latent", "scale_layout"),
    ),
    "qkv_a_proj_ag_norm": Op(
        """qkv_a_proj_ag and the two latent RMSNorms, split into three contiguous tensors.

        bytes: one rank's outputs. Right: as qkv_a_proj_ag.
        """,
        ("dist", "own", "ag+norm"),
        ("dtype", "latent", "kv_lora", "rope", "compile"),
    ),
    "qkv_a_proj_ag_norm_fp8": Op(
        """qkv_a_proj_ag_fp8, the two latent RMSNorms and the split, with q_a quantised again.

        The unfused programs multiply by torch._scaled_mm where that has block scales, else they dequantise; where ranks
        share a card, a bare barrier follows that product. bytes: one rank's outputs. Right: as qkv_a_proj_ag_fp8; of
        q_a, half a step of e4m3 comes on top.
        """,
        ("dist", "own", "ag_fp8+norm"),
        ("latent", "kv_lora", "rope", "compile", "scale_layout"),
    ),
    "chain": Op(
        """rs_rmsnorm, then qkv_a_proj_ag_norm, against what engines do today.

        Today: all-reduce, then every rank adds, norms and projects all rows, and norms the latents. These baselines
        differ in who reduces. What scattering gains without fusing, the scattered ones tell.

        bytes: those of both ops. Right: residual_out has the oracle's bits, the latents are as in qkv_a_proj_ag_norm.
        """,
        (*ENGINES, *SCATTERED),
        ("dtype", "zero_copy", "compile", "latent", "kv_lora", "rope"),
    ),
    "mla_prologue": Op(
        """All that comes before MLA's attention in one call, against what engines do today, and against both its ways.

        Few tokens are gathered and multiplied by a share of the weight ("all-rows"), of many each rank multiplies its
        own ("chain"). Today, bytes and right: as chain.
        """,
        (*ENGINES, *SCATTERED, "chain", "all-rows"),
        ("dtype", "zero_copy", "compile", "latent", "kv_lora", "rope"),
        torch_multiplies=True,
    ),
    "mla_prologue_fp8": Op(
        """mla_prologue with fp8 rows and weight, and q_a quantised again, against the same, and its 16-bit form.

        Today: all-reduce, then every rank adds, norms, quantises and projects all rows, norms the latents and quantises
        q_a; the scattered programs do so with their own rows, and gather the latents. They multiply as in
        qkv_a_proj_ag_norm_fp8. bytes: those of both halves. Right: residual_out has the oracle's bits, the latents are
        as in qkv_a_proj_ag_norm_fp8.
        """,
        (*ENGINES, *SCATTERED, "mla_prologue", "chain", "all-rows"),
        ("zero_copy", "compile", "latent", "kv_lora", "rope", "scale_layout"),
        torch_multiplies=True,
    ),
    "beside_gemm": Op(
        """rs_rmsnorm with a matrix product beside it on another stream: what both together take. CUDA only.

        The product is [tokens, hidden] by [hidden, 2048], with nothing to wait for. bytes and right: as rs_rmsnorm.
        """,
        ("alone", "gemm"),
        ("dtype", "zero_copy"),
        cuda_only=True,
    ),
}
EVERYWHERE = tuple(op for op, about in OPS.items() if not about.cuda_only)
