"""The decoders beside DeepSeek-V2 and V3 that `parallelize` takes, against the unsharded model in one process."""

import collections

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers", reason="needs transformers (the test extra)")

from tiny_models import HEADS, OTHER_MLA, make_both, make_ids, make_model

from tp_fused.integrations.transformers import parallelize
from tp_fused.integrations.transformers.heads import share_heads

WAYS = ("all_reduce", "transport", "fused")


def differences(kind: str, device: str) -> dict[str, float]:
    """Runs on a rank: how far all logits are from the unsharded model's, and that it generates the same."""
    whole, model, tp = make_both(kind, None, device)
    found = dict.fromkeys(WAYS, 0.0)
    for ids in (make_ids((1, 1), device), make_ids((2, 13), device)):
        expected = whole(ids).logits
        for way in WAYS:
            tp.way = way
            logits = model(ids).logits
            assert torch.equal(logits.argmax(-1), expected.argmax(-1)), way
            found[way] = max(found[way], (logits - expected).abs().max().item())
    ids = make_ids((2, 9), device)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    arguments = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, **arguments), whole.generate(ids, **arguments))
    return found


@pytest.mark.parametrize("kind", [*OTHER_MLA, *HEADS])
@pytest.mark.parametrize("world_size", [2, 4])
def test_logits_equal_the_unsharded_model(pool, device, world_size, kind):
    for found in pool.run(differences, kind, device):
        assert max(found.values()) < 1e-4


class Counter(TorchDispatchMode):
    """Counts the calls of tp_fused's ops."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "tp_fused":
            self.calls[function._opname] += 1
        return function(*args, **(kwargs or {}))


def called_ops(kind: str, device: str) -> dict[str, int]:
    """Runs on a rank: the ops of one forward of three layers."""
    _, model, tp = make_both(kind, None, device)
    tp.check_tokens = "never"
    with Counter() as counter:
        model(make_ids((2, 13), device))
    return dict(counter.calls)


@pytest.mark.parametrize("kind", [*OTHER_MLA, *HEADS])
@pytest.mark.parametrize("world_size", [2])
def test_what_the_how_to_says_is_called(pool, device, kind):
    prologue = ["rs_rmsnorm", "qkv_a_proj_ag_norm"] if kind.startswith("glm") else ["mla_prologue"]
    expected = collections.Counter(dict.fromkeys(["rs_rmsnorm_ag"] if kind in HEADS else prologue, 3))
    expected["rs_rmsnorm_ag"] += 3 + 1  # before the MLPs, and the final norm
    assert pool.run(called_ops, kind, device) == [expected] * 2


def local_heads(kind: str, device: str) -> list[tuple[int, int]]:
    """Runs on a rank: (query heads, key-value heads) by layer."""
    _, model, _ = make_both(kind, None, device)
    attentions = [layer.self_attn for layer in model.model.layers]
    size = attentions[0].head_dim
    return [(a.q_proj.weight.shape[0] // size, a.k_proj.weight.shape[0] // size) for a in attentions]


@pytest.mark.parametrize(("kind", "heads"), [("mistral", [(4, 2), (2, 1)]), ("llama", [(4, 1), (3, 1)])])
@pytest.mark.parametrize("world_size", [2])
def test_heads_are_shared_out(pool, device, kind, heads):
    assert pool.run(local_heads, kind, device) == [[own] * 3 for own in heads]


def served(num_heads: int, num_key_value_heads: int, world_size: int) -> list[tuple[int, int]]:
    """(query head, key-value head that attention kernels give it), of all ranks."""
    pairs = []
    for rank in range(world_size):
        queries, keys = share_heads(num_heads, num_key_value_heads, rank, world_size)
        own, held = range(num_heads)[queries], range(num_key_value_heads)[keys]
        assert len(own) and len(own) % len(held) == 0
        pairs += [(head, held[index // (len(own) // len(held))]) for index, head in enumerate(own)]
    return pairs


@pytest.mark.parametrize("num_key_value_heads", [1, 2, 3, 4, 6, 12])
def test_every_query_head_has_its_own_key_value_head(num_key_value_heads):
    for world_size in range(1, 13):
        expected = [(head, head // (12 // num_key_value_heads)) for head in range(12)]
        assert served(12, num_key_value_heads, world_size) == expected


def indexed_columns(device: str) -> list[int]:
    """Runs on a rank: rows of each layer's replicated projection."""
    _, model, _ = make_both("glm_moe_dsa", None, device)
    return [layer.latent.weight.shape[0] for layer in model.model.layers]


@pytest.mark.parametrize("world_size", [2])
def test_an_indexer_s_projections_join_the_latent_one(pool, device):
    latent = 24 + 16 + 8
    assert pool.run(indexed_columns, device) == [[latent + 16 + 3, latent, latent + 16 + 3]] * 2


def fp32_norms(device: str) -> dict[str, float]:
    """Runs on a rank: norm weights in fp32 beside a model in bf16, as some checkpoints have them."""
    whole, found = make_model("llama", device), {}
    expected = whole(make_ids((1, 9), device)).logits
    whole.to(torch.bfloat16)
    for name, parameter in whole.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data = parameter.data.float()
    tp = parallelize(whole, max_num_tokens=64)
    for way in WAYS:
        tp.way = way
        logits = whole(make_ids((1, 9), device)).logits
        assert logits.dtype == torch.bfloat16
        found[way] = (logits.float() - expected).abs().mean().item() / expected.abs().mean().item()
    return found


@pytest.mark.parametrize("world_size", [2])
def test_norm_weights_in_fp32_are_taken(pool, device):
    for found in pool.run(fp32_norms, device):
        assert max(found.values()) < 0.05
