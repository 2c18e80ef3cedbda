"""Which calls tp_fused serves, and the ops it serves them with: the same for all releases of SGLang.

Everything asked here has one answer on all ranks: sizes, dtypes, settings and the kinds of modules. Nothing asks where
a tensor lies, or how many rows this rank owns.
"""

import collections
import logging
import os
import pkgutil
from typing import NamedTuple

import torch

from ... import faults, ops, projections
from ..._version import __version__
from ...groups import init

logger = logging.getLogger(__name__)

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_E4M3 = torch.float8_e4m3fn
_BLOCK = 128

# What tells SGLang's RMSNorm to compute something else than rms_norm(x) * weight.
_OTHER_NORM = (
    "cast_x_before_out_mul",
    "fp32_residual",
    "override_orig_dtype",
    "variance_size_override",
    "_quant_linear",
)


class _Input(NamedTuple):
    """What a layer's scattered input carries to its projection."""

    num_tokens: int
    quantized: tuple[torch.Tensor, torch.Tensor] | None  # q and scale


class _Projection(NamedTuple):
    weight: torch.Tensor
    scale: torch.Tensor | None  # of a block-scaled fp8 weight


class Session:
    """What the hooks of a process share: the model's sizes, then the workspace.

    release: the module of hooks, which knows where SGLang keeps what is asked for here.
    calls: how often each op has been called, and SGLang's own way has been taken ("original").
    """

    def __init__(self, release):
        self.release = release
        self.workspace = None
        self.hidden_size = self.latent_size = 0
        self.embedded = False
        self.calls = collections.Counter()

    # ---- when the model is built ----

    def note(self, norm, latent_func) -> None:
        """A layer's attention is being built."""
        attention = getattr(latent_func, "__self__", None)
        ranks = [getattr(attention, name, None) for name in ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim")]
        weight = getattr(norm, "weight", None)
        if isinstance(weight, torch.Tensor) and all(isinstance(rank, int) for rank in ranks):
            self.hidden_size = max(self.hidden_size, weight.shape[0])
            self.latent_size = max(self.latent_size, sum(ranks))

    def start(self, allowed: bool) -> None:
        """The model has been built, on all ranks of the group. Collective where it is to be served."""
        reason = self._refusal(allowed)
        if reason is None:
            reason = self._make_workspace()
        if reason is not None:
            logger.warning("tp_fused leaves SGLang as it is: %s", reason)
            return
        logger.info(
            "tp_fused %s: scattered attention input of up to %d tokens, backend %s",
            __version__,
            self.workspace.max_num_tokens,
            self.workspace.backend,
        )

    def _refusal(self, allowed: bool) -> str | None:
        if not allowed:
            return "the attention input is not scattered (--enable-attn-tp-input-scattered, and SGLang's conditions)"
        missing = [target for target, hook in self.release.HOOKS.items() if not _installed(target, hook)]
        if missing:
            return f"not hooked: {', '.join(missing)}"
        if not self.hidden_size:
            return "no layer of a kind that is known was built"
        return self.release.refusal()

    def _make_workspace(self) -> str | None:
        group = self.release.tp_group()
        try:
            workspace = init(
                group.device_group,
                max_num_tokens=self.release.max_num_tokens() + group.world_size,  # SGLang pads to a multiple of it
                hidden_size=self.hidden_size,
                latent_size=self.latent_size,
                dtype=torch.get_default_dtype(),  # the model's, while SGLang builds it
                device=torch.device(group.device).type,
            )
        except (ValueError, TypeError, MemoryError, RuntimeError, faults.CollectiveFault) as error:  # on every rank
            return f"tp_fused.init: {error}"
        if workspace.backend == "reference" and os.environ.get("TP_FUSED_BACKEND") != "reference":
            workspace.close()
            return f"no kernels for this group: {workspace.reason}"
        self.workspace = workspace
        return None

    # ---- what is served ----

    @property
    def scattered(self) -> bool:
        """Whether this forward is served: SGLang scatters it, and there is a workspace."""
        return self.workspace is not None and self.release.context().input_scattered

    def takes(self, rows, norm) -> bool:
        """Whether `rows`, all tokens' partial sum, and the norm after it are of the kind that the ops take."""
        return (
            isinstance(rows, torch.Tensor)
            and rows.dim() == 2
            and rows.dtype in _FLOATS
            and rows.is_contiguous()
            and 0 < rows.shape[0] <= self.workspace.max_num_tokens
            and rows.shape[1] * rows.dtype.itemsize <= self.workspace.row_bytes
            and not self.workspace.closed
            and not torch.compiler.is_compiling()
            and _is_plain_norm(norm, rows)
        )

    # ---- the ops ----

    def attention_input(self, partial, residual, norm, latent_func, *, complete: bool):
        """-> (this rank's normed rows; its rows of the residual). residual: None, full, or left scattered by
        `mlp_input`. complete: `partial` is summed already."""
        arguments = (partial, residual, norm.weight, norm.variance_epsilon, self.workspace.group_name)
        projection = self._projection(latent_func, partial)
        if projection is not None and projection.scale is not None:
            self.calls["rs_rmsnorm_fp8"] += 1
            q, scale, residual, rows = ops.rs_rmsnorm_fp8(*arguments, keep_output=True, complete=complete)
            rows.tp_fused_input = _Input(partial.shape[0], (q, scale))
        else:
            self.calls["rs_rmsnorm"] += 1
            rows, residual = ops.rs_rmsnorm(*arguments, complete=complete)
            rows.tp_fused_input = _Input(partial.shape[0], None)
        return rows, residual

    def latent(self, rows, latent_func) -> torch.Tensor | None:
        """All tokens' latent, of rows that `attention_input` has made; None: not a projection that is served."""
        given = getattr(rows, "tp_fused_input", None)
        projection = None if given is None else self._projection(latent_func, rows)
        if projection is None:
            return None
        group = self.workspace.group_name
        if projection.scale is None:
            self.calls["qkv_a_proj_ag"] += 1
            return projections.qkv_a_proj_ag(rows, projection.weight, given.num_tokens, group)
        self.calls["qkv_a_proj_ag_fp8"] += 1
        return projections.qkv_a_proj_ag_fp8(*given.quantized, *projection, given.num_tokens, group)

    def mlp_input(self, partial, residual, norm):
        """-> (all tokens' normed rows; this rank's rows of the residual, which `full` completes)."""
        self.calls["rs_rmsnorm_ag"] += 1
        arguments = (norm.weight, norm.variance_epsilon, self.workspace.group_name)
        rows, residual = ops.rs_rmsnorm_ag(partial, residual, *arguments)
        residual.tp_fused_num_tokens = partial.shape[0]
        return rows, residual

    def full(self, residual):
        """The residual as SGLang's own code wants it after an MLP: where `mlp_input` left it scattered, gathered."""
        num_tokens = getattr(residual, "tp_fused_num_tokens", None)
        if num_tokens is None:
            return residual
        self.calls["all_gather_rows"] += 1
        return ops.all_gather_rows(residual, num_tokens, self.workspace.group_name)

    def _projection(self, latent_func, rows) -> _Projection | None:
        """The latent projection, where it is a replicated weight of a kind that the ops take."""
        function = getattr(latent_func, "__func__", None)
        if getattr(function, "__qualname__", None) != "DeepseekV2AttentionMLA.prepare_qkv_latent":
            return None
        linear = getattr(latent_func.__self__, "fused_qkv_a_proj_with_mqa", None)
        # By its own name: LoRA wraps it in another class.
        if type(linear).__name__ != "ReplicatedLinear" or getattr(linear, "bias", None) is not None:
            return None
        weight, method = getattr(linear, "weight", None), linear.quant_method
        if weight is None or weight.dim() != 2 or weight.shape[1] != rows.shape[1] or not weight.is_contiguous():
            return None
        if weight.shape[0] * rows.dtype.itemsize > self.workspace.row_bytes:
            return None
        if type(method).__name__ == "UnquantizedLinearMethod":
            packed = getattr(linear, "use_intel_amx_backend", False)
            return None if packed or weight.dtype != rows.dtype else _Projection(weight, None)
        if type(method).__name__ == "Fp8LinearMethod" and rows.dtype == torch.bfloat16:
            return _block_scaled(linear, method)
        return None


def _block_scaled(linear, method) -> _Projection | None:
    """An e4m3 weight with a scale for each 128 x 128 block, whose rows get fp32 scales that are no powers of two."""
    weight, scale = linear.weight, getattr(linear, "weight_scale_inv", None)
    config = method.quant_config
    blocks = tuple(-(-size // _BLOCK) for size in weight.shape)
    served = (
        method.block_quant
        and list(config.weight_block_size or ()) == [_BLOCK, _BLOCK]
        and getattr(config, "scale_fmt", None) != "ue8m0"
        and not getattr(method, "use_mxfp8", False)
        and not getattr(method, "block_fp8_as_mxfp8", False)
        and not getattr(scale, "format_ue8m0", False)
        and weight.dtype == _E4M3
        and weight.shape[0] % 8 == 0
        and weight.shape[1] % 16 == 0
        and isinstance(scale, torch.Tensor)
        and scale.dtype == torch.float32
        and tuple(scale.shape) == blocks
        and scale.is_contiguous()
    )
    return _Projection(weight, scale) if served else None


def _is_plain_norm(norm, rows) -> bool:
    kind = type(norm)
    if (kind.__module__, kind.__name__) != ("sglang.srt.layers.layernorm", "RMSNorm"):
        return False
    if any(getattr(norm, name, None) for name in _OTHER_NORM) or not getattr(norm, "has_weight", True):
        return False
    return norm.weight.shape == rows.shape[1:] and norm.weight.dtype in (rows.dtype, torch.float32)


def _installed(target: str, hook) -> bool:
    """Whether what SGLang calls there is wrapped in the hook."""
    function = pkgutil.resolve_name(target)
    while function is not None:
        if any(cell.cell_contents is hook for cell in getattr(function, "__closure__", None) or ()):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def common_hooks(session: Session, attention_module: str) -> dict:
    """The hooks that both releases have, on classes of the same names. attention_module: where they are."""

    def init_context(original, context, *arguments, **options):
        original(context, *arguments, **options)
        session.start(context.allow_input_scattered)

    def maybe_input_scattered(original, context, forward_batch):
        session.embedded = False
        return original(context, forward_batch)

    def embed(original, embedding, input_ids):
        # In a scattered forward SGLang's embedding leaves its sum to the first layer. Where none has run in the
        # forward, a vision model has brought embeddings, and these are summed.
        if session.scattered and embedding.tp_size > 1:
            session.embedded = True
        return original(embedding, input_ids)

    def fetch_qkv_latent(original, inputs):
        served = session.scattered and inputs.qkv_latent_ is None and not getattr(inputs, "is_pre_gathered", False)
        latent = session.latent(inputs.hidden_states_local, inputs.qkv_latent_func) if served else None
        if latent is None:
            return original(inputs)
        inputs.qkv_latent_ = latent
        return latent

    return {
        f"{attention_module}.AttnTpContext.init_context": init_context,
        f"{attention_module}.AttnTpContext.maybe_input_scattered": maybe_input_scattered,
        f"{attention_module}.AttentionInputs.fetch_qkv_latent": fetch_qkv_latent,
        "sglang.srt.layers.vocab_parallel_embedding.VocabParallelEmbedding.forward": embed,
    }
