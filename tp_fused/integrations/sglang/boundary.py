"""The hooks of SGLang 0.5.23, whose `layer_boundary` runs what is between the blocks of a layer."""

import sys

from .session import Session, common_hooks

_PACKAGE = "sglang.srt.layers.layer_boundary"

session = Session(sys.modules[__name__])
_stage = None  # the stage whose input is being prepared


def context():
    return sys.modules[f"{_PACKAGE}.adapters.attention"].get_attn_tp_context()


def tp_group():
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().tp_group


def refusal() -> str | None:
    """What in the engine's settings is not served."""
    from sglang.srt.runtime_context import get_exec

    if get_exec().deterministic.enable_deterministic_inference:
        return "deterministic inference has kernels of its own"
    # SGLang binds these by name where it builds its stages.
    prepare, boundary = (sys.modules[f"{_PACKAGE}.{name}"] for name in ("prepare", "boundary"))
    for name in ("_update_read", "_tp_sum_with_residual_read"):
        if getattr(prepare, name) is not getattr(boundary, name):
            return f"not hooked: {_PACKAGE}.boundary.{name}"
    return None


def max_num_tokens() -> int:
    from sglang.srt.runtime_context import get_schedule

    schedule = get_schedule()
    chunk = schedule.chunked_prefill_size
    return chunk if chunk and chunk > 0 else schedule.max_prefill_tokens


def _init(original, plan, kind, norm, variants, **options):
    original(plan, kind, norm, variants, **options)
    session.note(norm, plan.qkv_latent_func)


def _prepare(original, stage, *arguments, **options):
    global _stage
    outer, _stage = _stage, stage
    try:
        return original(stage, *arguments, **options)
    finally:
        _stage = outer


def _is_plain_read(read) -> bool:
    return type(read).__name__ in ("NormReadout", "NormQuantReadout") and getattr(read, "fp8_input", None) is None


def _update_read(original, hidden_states, residual, forward_batch, norm, **options):
    """The attention's input. `pre_move` completes the sum onto each rank's rows, or takes these of a sum that is
    complete; for any other this is not the scattered way."""
    move = getattr(options.get("pre_move"), "__name__", None)
    latent_func = _stage.plan.qkv_latent_func if _stage is not None else None
    if not session.scattered or move not in ("tp_reduce_scatter", "tp_slice"):
        return original(hidden_states, residual, forward_batch, norm, **options)
    served = (
        latent_func is not None
        and not context().is_dsa
        and _stage.plan.norm is norm
        and (residual is not None or options["enters_stack"])
        and _is_plain_read(options["read"])
        and not options.get("read_gathers")
        and not options.get("read_gather_indices")
        and getattr(options.get("update"), "is_plain_add", True)
        and not options.get("quant_format")
        and options.get("post_residual_addition") is None
        and session.takes(hidden_states, norm)
    )
    if not served:
        session.calls["original"] += 1
        return original(hidden_states, session.full(residual), forward_batch, norm, **options)
    complete = move == "tp_slice" or (residual is None and not session.embedded)
    return session.attention_input(hidden_states, residual, norm, latent_func, complete=complete)


def _sum_with_residual_read(original, hidden_states, residual, forward_batch, norm, **options):
    """The MLP's input, of a residual that is scattered."""
    served = (
        session.scattered
        and _stage is not None
        and _stage.plan.norm is norm
        and not _stage.plan.terminal  # the final norm wants the residual full
        and _is_plain_read(options.get("read"))
        and getattr(options.get("update"), "is_plain_add", True)
        and session.takes(hidden_states, norm)
    )
    if not served:
        return original(hidden_states, residual, forward_batch, norm, **options)
    return session.mlp_input(hidden_states, residual, norm)


def _completes_residual(original, stream, *arguments, **options):
    """Before the stream is read by others than the next layer: a pipeline stage, the final norm, who captures it."""
    stream.residual = session.full(stream.residual)
    return original(stream, *arguments, **options)


HOOKS = {
    **common_hooks(session, f"{_PACKAGE}.adapters.attention"),
    f"{_PACKAGE}.construction.StagePlan.__init__": _init,
    f"{_PACKAGE}.stage.StageBoundary._prepare": _prepare,
    f"{_PACKAGE}.prepare._update_read": _update_read,
    f"{_PACKAGE}.prepare._tp_sum_with_residual_read": _sum_with_residual_read,
    f"{_PACKAGE}.residual.stream.ResidualStream.export": _completes_residual,
    f"{_PACKAGE}.residual.stream.ResidualStream.snapshot": _completes_residual,
}
