"""What is refused of a model in transformers' fine-grained fp8, by the name of the layer.

Weights are e4m3 with a scale for each block of 128 x 128, and stay so: a rank has whole blocks, or those that end a
weight. Nothing is quantised anew.
"""

from collections.abc import Iterator

import torch
from torch import nn

from .mla import LatentAttentionLayer, heads_together, replicated
from .sharding import BLOCK, Shards, is_fp8

_WEIGHTS = ("weight", "gate_up_proj", "down_proj")


def has_fp8(model) -> bool:
    return any(is_fp8(parameter) for parameter in model.parameters())


def fp8_parameters(model) -> set[str]:
    """The names of all fp8 weights and of their scales."""
    return {name for name, parameter in model.named_parameters() if is_fp8(parameter) or name.endswith("_scale_inv")}


def check_config(config) -> None:
    """Refuses any quantisation but the fine-grained fp8 one."""
    quantised = getattr(config, "quantization_config", None)
    if quantised is None:
        return
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
    if method != "fp8":
        raise ValueError(
            f"parallelize takes unquantised weights and transformers' fine-grained fp8, and this model's "
            f"quantization_config has quant_method {getattr(method, 'value', method)!r}"
        )


def check_weights(model, layer_class, world_size: int) -> None:
    """Raises ValueError where a rank's part of an fp8 weight would cut a block."""
    for name, module in model.named_modules():
        _check_format(name, module)
    for index, layer in enumerate(model.model.layers):
        name = f"model.layers.{index}"
        _check_attention(f"{name}.self_attn", layer.self_attn, layer_class, world_size)
        _check_feed_forward(f"{name}.mlp", layer.mlp, world_size)


def _check_format(name: str, module: nn.Module) -> None:
    dtypes = {getattr(module, kind).dtype for kind in _WEIGHTS if isinstance(getattr(module, kind, None), nn.Parameter)}
    if torch.int8 in dtypes and hasattr(module, "block_size"):
        raise ValueError(f"{name} has fp4 weights; fp8 ones are taken")
    if torch.float8_e4m3fn not in dtypes:
        return
    block_size, scheme = getattr(module, "block_size", None), getattr(module, "activation_scheme", None)
    if block_size is None or tuple(block_size) != (BLOCK, BLOCK):
        raise ValueError(f"{name} has fp8 weights of weight_block_size {block_size}; ({BLOCK}, {BLOCK}) is taken")
    if scheme != "dynamic":
        raise ValueError(f"{name} has fp8 weights with activation_scheme {scheme!r}; 'dynamic' is taken")


def _check_attention(name: str, attention: nn.Module, layer_class, world_size: int) -> None:
    if layer_class is LatentAttentionLayer:
        _check_latents(name, attention)
        for projection, together in heads_together(attention).items():
            if -(-attention.num_heads // together) < world_size:
                raise ValueError(
                    f"{name}.{projection}: blocks of {BLOCK} are whole for {together} heads together, and "
                    f"{attention.num_heads} heads are too few for {world_size} ranks"
                )
    for rank in range(world_size):
        for projection, own in layer_class.shares(attention, Shards(rank, world_size)).items():
            linear = getattr(attention, projection)
            size = linear.in_features if projection == "o_proj" else linear.out_features
            if is_fp8(linear.weight) and any(border % BLOCK and border != size for border in (own.start, own.stop)):
                raise ValueError(
                    f"{name}.{projection}: rank {rank} of {world_size} would have {own.start} to {own.stop} of {size} "
                    f"for its heads, which cuts a block of {BLOCK}"
                )


def _check_latents(name: str, attention: nn.Module) -> None:
    """They become one weight: all are fp8 or none, and all but the last end with a block."""
    latents = replicated(attention)
    names = ", ".join(projection for projection, _ in latents)
    if len({is_fp8(linear.weight) for _, linear in latents}) > 1:
        raise ValueError(f"{name}: {names} are multiplied as one, and not all of them are fp8")
    if len({linear.weight_scale_inv.dtype for _, linear in latents if is_fp8(linear.weight)}) > 1:
        raise ValueError(f"{name}: {names} are multiplied as one, and their scales have different dtypes")
    for projection, linear in latents[:-1]:
        if is_fp8(linear.weight) and linear.out_features % BLOCK:
            raise ValueError(
                f"{name}.{projection}: {linear.out_features} rows, which end within a block of {BLOCK}; those of "
                f"{latents[-1][0]} come after them in one weight"
            )


def _check_feed_forward(name: str, mlp: nn.Module, world_size: int) -> None:
    for part, size, weight in _intermediate_sizes(mlp):
        if not is_fp8(weight):
            continue
        if -(-size // BLOCK) < world_size:
            raise ValueError(
                f"{name}.{part}: {size} intermediate columns are too few blocks of {BLOCK} for {world_size} ranks"
            )
        if part == "experts" and size % BLOCK:
            raise ValueError(f"{name}.{part}: gate and up projection, {size} rows each, share a block of {BLOCK}")


def _intermediate_sizes(mlp: nn.Module) -> Iterator[tuple[str, int, torch.Tensor]]:
    prefix = ""
    if hasattr(mlp, "experts"):
        yield "experts", mlp.experts.intermediate_dim, mlp.experts.down_proj
        mlp, prefix = mlp.shared_experts, "shared_experts."
    for name in ("gate_proj", "up_proj", "down_proj"):
        yield f"{prefix}{name}", mlp.intermediate_size, getattr(mlp, name).weight
