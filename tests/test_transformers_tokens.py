"""Ranks that feed different tokens to a parallelized model: told, on every rank, before anything is computed."""

import copy
import gc
import re
import weakref

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers", reason="needs transformers (the test extra)")

import fp8_models
from tiny_models import make_both, make_ids, make_model

from tp_fused.faults import CollectiveFault
from tp_fused.integrations.transformers import parallelize


def feed(case: str, device: str, way: str) -> None:
    """Runs on a rank: the last rank feeds something else."""
    _, model, tp = make_both("llama", None, device, max_num_tokens=16)
    tp.way = way
    ids, odd = make_ids((2, 6), device), dist.get_rank() == dist.get_world_size() - 1
    mask, positions = torch.ones_like(ids), torch.arange(6, device=device).expand(2, 6)
    if case == "cache":
        past = model(ids[:, :5], use_cache=True).past_key_values
        tp.check_tokens = "first"
        model(ids[:, 5:], past_key_values=None if odd else past)
    if case == "ids" and odd:
        ids = ids.flip(1)
    if case == "mask" and odd:
        mask[1, 0] = 0
    if case == "positions" and odd:
        positions = positions + 1
    if case == "embeds":
        embeds = torch.randn(2, 6, 56, generator=torch.Generator().manual_seed(3)).to(device)
        embeds[1, 4, 17] += 1e-3 if odd else 0
        model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions)
    if case == "shape" and odd:
        ids, mask, positions = ids.reshape(3, 4), mask.reshape(3, 4), positions.reshape(3, 4)
    if case == "too many" and odd:
        ids, mask, positions = ids.repeat(3, 1), mask.repeat(3, 1), positions.repeat(3, 1)
    model(ids, attention_mask=mask, position_ids=positions)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("ids", r"different input_ids: ranks 0, 1: checksum (\w{8}); rank 2: checksum (?!\1)"),
        ("embeds", r"different inputs_embeds: ranks 0, 1: checksum (\w{8}); rank 2: checksum (?!\1)"),
        ("mask", r"different attention_mask: ranks 0, 1: .*; rank 2: "),
        ("positions", r"different position_ids: ranks 0, 1: .*; rank 2: "),
        ("shape", r"different shapes of tokens: ranks 0, 1: \(2, 6\); rank 2: \(3, 4\)"),
        ("too many", r"different shapes of tokens: ranks 0, 1: \(2, 6\); rank 2: \(6, 6\)"),
        ("cache", r"different cached lengths: ranks 0, 1: 5; rank 2: 0"),
    ],
)
@pytest.mark.parametrize("way", ["all_reduce", "fused"])
@pytest.mark.parametrize("world_size", [3])
def test_different_tokens_are_told_on_every_rank(pool, device, way, case, message):
    for outcome in pool.outcomes(feed, case, device, way):
        with pytest.raises(ValueError, match=message):
            raise outcome


def forwards(when: str, device: str) -> list[bool]:
    """Runs on a rank: which of three forwards, the first of them right, was refused; and that the fourth is right."""
    whole, model, tp = make_both("llama", None, device)
    tp.check_tokens = when
    ids = make_ids((1, 9), device)
    refused = []
    for shift in (0, 1, 1):
        try:
            model(ids.roll(shift * dist.get_rank(), 1))
            refused.append(False)
        except ValueError:
            refused.append(True)
    torch.testing.assert_close(model(ids).logits, whole(ids).logits, atol=1e-4, rtol=0)
    return refused


@pytest.mark.parametrize(
    ("when", "refused"),
    [("first", [False] * 3), ("always", [False, True, True]), ("never", [False] * 3)],
)
@pytest.mark.parametrize("world_size", [2])
def test_when_tokens_are_compared(pool, device, when, refused):
    assert pool.run(forwards, when, device) == [refused] * 2


def count_later(device: str) -> str:
    """Runs on a rank: another number of tokens on one rank, when tokens are not compared any more."""
    _, model, tp = make_both("llama", None, device)
    tp.check_tokens = "first"
    model(make_ids((1, 9), device))
    try:
        model(make_ids((1, 9 + dist.get_rank()), device))
        if device == "cuda":
            torch.cuda.synchronize()
            model(make_ids((1, 9), device))
    except CollectiveFault as fault:
        return str(fault)
    return ""


@pytest.mark.parametrize("world_size", [2])
def test_another_number_of_tokens_is_always_told(pool, device):
    for said in pool.run(count_later, device):
        assert "num_tokens=9" in said and "num_tokens=10" in said


def sample(kind: str, device: str, same_seed: bool) -> list[int] | str:
    """Runs on a rank: tokens that are sampled, or what is said of them."""
    make = fp8_models.make_both(device) if kind == "fp8" else make_both(kind, None, device)
    model = make[1]
    torch.manual_seed(5 if same_seed else dist.get_rank())
    try:
        arguments = dict(max_new_tokens=12, do_sample=True, pad_token_id=0)
        return model.generate(make_ids((2, 6), device), **arguments).tolist()
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("kind", ["llama", "v3", "fp8"])
@pytest.mark.parametrize("world_size", [2])
def test_ranks_that_sample_other_tokens_are_told(pool, device, kind):
    """By default: the first prompt is the same on all of them."""
    first, second = pool.run(sample, kind, device, True)
    assert first == second and isinstance(first, list)
    for said in pool.run(sample, kind, device, False):
        assert "the ranks have fed different input_ids: rank 0: checksum" in said
        assert "need the same torch.manual_seed" in said


def end(case: str, device: str) -> str:
    """Runs on a rank: what is said of an answer whose last token differs, or which ends earlier on one rank."""
    _, model, _ = make_both("llama", None, device)
    model = copy.deepcopy(model) if case == "copy" else model
    ids, rank = make_ids((1, 6), device), dist.get_rank()
    said = []

    def choose(input_ids, scores):
        """Token 7, and on the last rank another one at the end."""
        last = input_ids.shape[1] == 6 + (2 if case == "last" else 0)
        chosen = 9 if rank == dist.get_world_size() - 1 and last else 7
        return torch.full_like(scores, -1e9).index_fill_(1, torch.tensor([chosen], device=device), 0.0)

    arguments = dict(do_sample=False, pad_token_id=0, eos_token_id=9 if case == "early" else None)
    number = {"one": 1, "copy": 1, "last": 3, "early": 5}[case]
    try:
        model.generate(ids, max_new_tokens=number, logits_processor=[choose], **arguments)
    except ValueError as error:
        said.append(str(error))
    made = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
    assert made.sequences.shape == (1, 9)
    return said[0]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("one", r"the ranks have generated different input_ids: ranks 0, 1: .*; rank 2: .*torch.manual_seed"),
        ("copy", r"the ranks have generated different input_ids: ranks 0, 1: .*; rank 2: "),
        ("last", r"the ranks have generated different input_ids: ranks 0, 1: .*; rank 2: "),
        (
            "early",
            r"some ranks have ended .*: ranks 0, 1: fed tokens of shape \(1, 1\); rank 2: generated .* \(1, 7\);",
        ),
    ],
)
@pytest.mark.parametrize("world_size", [3])
def test_what_generate_returns_is_compared(pool, device, case, message):
    for said in pool.run(end, case, device):
        assert re.search(message, said), said


def freed(device: str) -> bool:
    """Runs on a rank: a model that nobody holds is gone at once, without the garbage collector."""
    model = make_both("llama", None, device)[1]
    there = weakref.ref(model)
    gc.disable()
    try:
        del model
        return there() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("world_size", [1])
def test_generate_does_not_keep_the_model(pool, device):
    assert pool.run(freed, device) == [True]


def word(device: str) -> None:
    """Runs on a rank."""
    parallelize(make_model("llama", device), max_num_tokens=8, check_tokens="sometimes")


@pytest.mark.parametrize("world_size", [2])
def test_a_time_that_is_none(pool, device):
    for outcome in pool.outcomes(word, device):
        with pytest.raises(ValueError, match="check_tokens must be one of first, always, never, got 'sometimes'"):
            raise outcome


def few_tokens(device: str) -> torch.Tensor:
    """Runs on a rank: a workspace for fewer tokens than there are ranks."""
    *_, before = make_both("llama", None, device)
    before.workspace.close()  # or the one that is made next would have its sizes
    _, model, _ = make_both("llama", None, device, max_num_tokens=1)
    return model(make_ids((1, 1), device)).logits


@pytest.mark.parametrize("world_size", [3])
def test_fewer_tokens_than_ranks(pool, device):
    logits = pool.run(few_tokens, device)
    assert all(torch.equal(logits[0], other) for other in logits)
