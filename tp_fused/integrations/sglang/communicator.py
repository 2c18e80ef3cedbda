"""The hooks of SGLang 0.5.6, whose `LayerCommunicator` runs what is between the blocks of a layer."""

import sys

from .session import Session, common_hooks

_MODULE = "sglang.srt.layers.communicator"

session = Session(sys.modules[__name__])


def context():
    return sys.modules[_MODULE].get_attn_tp_context()


def tp_group():
    from sglang.srt.distributed import get_tp_group

    return get_tp_group()


def refusal() -> str | None:
    """What in the engine's settings is not served."""
    from sglang.srt.distributed import get_pp_group
    from sglang.srt.server_args import get_global_server_args

    if getattr(get_global_server_args(), "enable_deterministic_inference", False):
        return "deterministic inference has kernels of its own"
    if get_pp_group().world_size > 1:
        # Its pipeline sends a slice of every rank's tensor: of partial sums, or of a scattered residual, that is wrong.
        return "SGLang 0.5.6 sends partial sums through a pipeline"
    return None


def max_num_tokens() -> int:
    from sglang.srt.server_args import get_global_server_args

    arguments = get_global_server_args()
    chunk = arguments.chunked_prefill_size
    return chunk if chunk and chunk > 0 else arguments.max_prefill_tokens


def _init(original, communicator, *arguments, **options):
    original(communicator, *arguments, **options)
    session.note(communicator.input_layernorm, communicator.qkv_latent_func)


def _prepare_attn(original, communicator, hidden_states, residual, forward_batch, quant_format=""):
    if not session.scattered:
        return original(communicator, hidden_states, residual, forward_batch, quant_format)
    module = sys.modules[_MODULE]
    norm, latent_func = communicator.input_layernorm, communicator.qkv_latent_func
    served = (
        not quant_format
        and latent_func is not None
        and communicator._communicate_simple_fn is module.CommunicateSimpleFn._trivial
        and session.takes(hidden_states, norm)
    )
    if not served:
        session.calls["original"] += 1
        return original(communicator, hidden_states, session.full(residual), forward_batch, quant_format)
    complete = residual is None and not session.embedded
    rows, residual = session.attention_input(hidden_states, residual, norm, latent_func, complete=complete)
    context().set_attn_inputs(module.AttentionInputs(rows, forward_batch, latent_func))
    return rows, residual


def _prepare_mlp(original, communicator, hidden_states, residual, forward_batch, cache=None):
    step = communicator._communicate_with_all_reduce_and_layer_norm_fn
    served = (
        session.scattered
        and not communicator.is_last_layer  # the final norm wants the residual full
        and getattr(getattr(step, "func", None), "__name__", None) == "_gather_hidden_states_and_residual"
        and session.takes(hidden_states, communicator.post_attention_layernorm)
    )
    if not served:
        return original(communicator, hidden_states, residual, forward_batch, cache)
    return session.mlp_input(hidden_states, residual, communicator.post_attention_layernorm)


HOOKS = {
    **common_hooks(session, _MODULE),
    f"{_MODULE}.LayerCommunicator.__init__": _init,
    f"{_MODULE}.LayerCommunicator.prepare_attn": _prepare_attn,
    f"{_MODULE}.LayerCommunicator.prepare_mlp": _prepare_mlp,
}
