"""`parallelize`: what is checked, and what replaces what."""

import functools
import inspect

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from ... import checks
from ...groups import default_group, get_workspace, init, process_group
from ...rendezvous import Meeting
from .fp8 import check_config, check_weights, fp8_parameters, has_fp8
from .fp8_kernels import supply_kernels
from .generation import Generate
from .heads import HeadsLayer
from .layers import DecoderLayer, FinalNorm, VocabParallelEmbedding
from .mla import LatentAttentionLayer
from .same_model import Description, describe_config, describe_tensors, require_same
from .same_tokens import COMPARED_BYTES, check_times
from .sharding import Shards
from .tensor_parallel import TensorParallel, check_way

# By name: transformers imports a model's file when its class is asked for, and older releases lack some.
FAMILIES: dict[str, type[DecoderLayer]] = {
    "DeepseekV2ForCausalLM": LatentAttentionLayer,
    "DeepseekV3ForCausalLM": LatentAttentionLayer,
    "DeepseekV32ForCausalLM": LatentAttentionLayer,
    "Glm4MoeLiteForCausalLM": LatentAttentionLayer,
    "GlmMoeDsaForCausalLM": LatentAttentionLayer,
    "LlamaForCausalLM": HeadsLayer,
    "MistralForCausalLM": HeadsLayer,
    "Qwen2ForCausalLM": HeadsLayer,
    "Qwen3ForCausalLM": HeadsLayer,
}


def parallelize(
    model: PreTrainedModel,
    group: dist.ProcessGroup | None = None,
    *,
    max_num_tokens: int | None = None,
    way: str = "fused",
    timeout_s: float = 30.0,
    check_tokens: str = "always",
) -> TensorParallel:
    """Shards an unsharded decoder of transformers over `group`, in place, and runs its forward on the ops.

        before: all_reduce(x); residual += x; h = rms_norm(residual); latent = h @ qkv_a.T      on all tokens
        after:  mla_prologue                                                                    on this rank's tokens

    model: a DeepSeek-V2, V3 or V3.2, a Kimi-K2 (V3's class), a Glm4MoeLite (GLM-4.7-Flash) or GlmMoeDsa (GLM-5), with
    multi-head latent attention; or a Llama, Mistral, Qwen2 or Qwen3, which run `rs_rmsnorm_ag` at both boundaries.

    Weights may be in transformers' fine-grained fp8 (`FP8Linear`, blocks of 128 x 128, rows quantised as they come):
    `mla_prologue_fp8` runs then, and a rank has whole blocks of every weight.

    Collective: every rank calls it with the same model and arguments. Attention is split by heads, the MLPs, shared and
    routed experts by intermediate columns, the embedding by vocabulary, all as `torch.tensor_split` does, so that the
    sizes need not divide. Where ranks are more than key-value heads, several ranks hold the same one. The latent
    projections, and those of a sparse-attention indexer, are one replicated weight; norms, router and lm_head stay
    whole. With q_lora_rank=None (V2-Lite) the queries need every normalised row, and only the kv latent is scattered.

    max_num_tokens: the most tokens (batch times length) of any forward; makes the group's workspace, with this
    timeout_s, and replaces the one it has. None: the group's own workspace serves. way: see `TensorParallel`.

    Afterwards every rank must call the model with the same tokens, and gets all logits. check_tokens: when the ranks
    compare their tokens or embeddings, masks, positions and cached lengths, and raise ValueError, on all of them, where
    they differ: "always", in the "first" forward or "never". On a GPU a comparison waits for what is fed and for its
    result. A forward with another number of tokens than a peer's is always told, by the ops. Ranks that sample need the
    same `torch.manual_seed`: of other seeds the first token that differs raises, when it is fed or `generate` ends.

    It is for inference: weights no longer require gradients, `output_hidden_states` raises. So does `save_pretrained`,
    of the model and of its decoder: what is left on a rank are its shards, which is what `state_dict` has.
    `copy.deepcopy` copies these, and shares the group.

    Raises ValueError, before anything is changed, when the model is of another class, quantised in another way, of
    mixed dtypes (norms in fp32 are taken), on several devices or not on the workspace's, or has fewer heads than there
    are ranks; and, by the layer's name, where heads or columns cut a block of fp8 weights. So it does, on every rank,
    where the ranks' arguments differ, or their models: in class, config, the names, shapes and dtypes of weights, or in
    a sample of each weight's elements, which tells other seeds and other checkpoints. Which entry and which ranks, the
    error names. TypeError where max_num_tokens is no integer or group no process group. CollectiveFault where a rank
    does not come within the group's timeout, or has refused its model. A forward raises ValueError when
    it has more than max_num_tokens tokens, inputs_embeds of another dtype than the model, or runs under a
    `torch.autocast` to another one.
    """
    group = resolve_group(group)
    with Meeting.of(group, "tp_fused.integrations.transformers.parallelize") as meeting:
        arguments = check_arguments(max_num_tokens, way, timeout_s, check_tokens)
        check_model(model, group.size())
        device = _device(model)
        require_workspace(group, device, max_num_tokens)
        members = dist.get_process_group_ranks(group)
        require_same(meeting, members, describe(model, device, arguments) | describe_tensors(model))
    return convert(
        model,
        Shards(group.rank(), group.size()),
        group,
        device,
        max_num_tokens=max_num_tokens,
        way=way,
        timeout_s=timeout_s,
        check_tokens=check_tokens,
    )


def describe(model, device: torch.device, arguments: dict[str, str]) -> Description:
    """What the ranks' models have to have in common, but for their weights."""
    return {
        "arguments": arguments,
        "model": {"class": type(model).__name__, "device": device.type},
        "config": describe_config(model.config),
    }


def convert(
    model: PreTrainedModel,
    shards: Shards,
    group: dist.ProcessGroup,
    device: torch.device,
    *,
    max_num_tokens: int | None,
    way: str,
    timeout_s: float,
    check_tokens: str,
) -> TensorParallel:
    """Replaces the modules of a checked model by those of a rank, which take what `shards` reads."""
    layer_class = FAMILIES[_class_name(model)]
    if max_num_tokens is not None:
        dtype = model.lm_head.weight.dtype
        init(
            group,
            max_num_tokens=max(max_num_tokens, group.size()),  # tokens are compared by a row of each rank
            hidden_size=model.config.hidden_size,
            latent_size=max(layer_class.latent_size(model.config) or 0, COMPARED_BYTES // dtype.itemsize),
            dtype=dtype,
            timeout_s=timeout_s,
            device=device,
        )
    tp = TensorParallel(group, device, way, check_tokens, max_num_tokens)
    if has_fp8(model):
        supply_kernels()
    decoder = model.model
    model.eval().requires_grad_(False)
    decoder.embed_tokens = VocabParallelEmbedding(tp, shards, decoder.embed_tokens)
    for index, layer in enumerate(decoder.layers):
        decoder.layers[index] = layer_class(tp, shards, layer)
    decoder.norm = FinalNorm(tp, decoder.norm)
    parameters = list(inspect.signature(decoder.forward).parameters)
    decoder.register_forward_pre_hook(functools.partial(tp.admit, parameters), with_kwargs=True)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):  # the decoder is one, too, and its config is of the whole model
            module.save_pretrained = module.push_to_hub = _refuse_to_save
    model.generate = Generate(tp, model)
    return tp


def _refuse_to_save(*_, **__):
    raise NotImplementedError(
        "save_pretrained and push_to_hub: a parallelized model holds this rank's shards, under names of their own; "
        "save it before parallelize"
    )


def require_workspace(group: dist.ProcessGroup, device: torch.device, max_num_tokens: int | None) -> None:
    """Where none is to be made. Tokens are compared by a row of each rank."""
    if max_num_tokens is not None:
        return
    try:
        workspace = get_workspace(group.group_name, device)
    except ValueError as error:
        raise ValueError(f"{error}, or pass max_num_tokens") from None
    if workspace.max_num_tokens < group.size() or workspace.row_bytes < COMPARED_BYTES:
        raise ValueError(
            f"the workspace of group {group.group_name!r} takes {workspace.max_num_tokens} rows of "
            f"{workspace.row_bytes} bytes; a model wants {group.size()} of {COMPARED_BYTES} at least: make a larger "
            f"one, or pass max_num_tokens"
        )


def resolve_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    if not dist.is_initialized():
        raise ValueError("torch.distributed is not initialised: call torch.distributed.init_process_group first")
    return process_group(group) if group is not None else default_group()


# ---- what is refused ----


def check_arguments(max_num_tokens: int | None, way: str, timeout_s: float, check_tokens: str) -> dict[str, str]:
    """Returns them in words, to compare with the other ranks'."""
    if max_num_tokens is not None:
        checks.count("max_num_tokens", max_num_tokens, least=1)
    check_way(way)
    check_times(check_tokens)
    words = {"max_num_tokens": max_num_tokens, "way": way, "timeout_s": timeout_s, "check_tokens": check_tokens}
    return {name: str(value) for name, value in words.items()}


def _class_name(model) -> str | None:
    """The name in FAMILIES of the model's class, or of one that it is derived from."""
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES and cls.__module__.startswith("transformers.models."):
            return cls.__name__
    return None


def check_model(model, world_size: int) -> None:
    """What is refused of a model wherever its weights are."""
    if _class_name(model) is None:
        raise ValueError(f"parallelize takes a {', '.join(FAMILIES)} of transformers, got {type(model)}")
    if isinstance(model.model.norm, FinalNorm):
        raise ValueError("the model is parallelized already")
    check_config(model.config)
    for name in ("num_attention_heads", "intermediate_size", "moe_intermediate_size", "vocab_size"):
        size = getattr(model.config, name, None)
        if size is not None and size < world_size:
            raise ValueError(f"{world_size} ranks are more than {name}={size} can be split over")
    if has_fp8(model):
        check_weights(model, FAMILIES[_class_name(model)], world_size)
        if model.lm_head.weight.dtype != torch.bfloat16:
            raise ValueError(f"beside fp8 weights the others must be bfloat16, got {model.lm_head.weight.dtype}")


def _device(model) -> torch.device:
    """The one that all parameters are on. Checks their dtypes, too."""
    named = dict(model.named_parameters())
    # Those that the ops apply, which may be in fp32 beside rows of any dtype; attention's own norms may not.
    norms = {name for name in named if name.endswith(("layernorm.weight", "model.norm.weight"))}
    devices = {parameter.device for parameter in named.values()}
    dtypes = {named[name].dtype for name in named.keys() - norms - fp8_parameters(model)}
    norm_dtypes = {named[name].dtype for name in norms}
    if len(devices) != 1 or len(dtypes) != 1 or norm_dtypes not in (dtypes, {torch.float32}):
        found = ", ".join(map(str, devices | dtypes | norm_dtypes))
        raise ValueError(f"the model's parameters must share one device and dtype, but for norms in fp32; got {found}")
    device = devices.pop()
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"the model is on {device}; load its weights on cpu or cuda first, or use load_parallel")
    return device
