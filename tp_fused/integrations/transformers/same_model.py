"""Ranks that bring different models: told, on every rank, before anything is changed."""

import hashlib
import json
import re

import torch

from ... import faults
from ...rendezvous import Meeting

_SAMPLE = 64  # elements of every tensor that are compared
# Where, and by what, a rank has loaded it; and what saving a model adds to its config: class and dtypes are compared.
_OF_A_RANK = {"_name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype", "torch_dtype"}
_LONGEST_WORD = 60

# Kind -> name of an entry -> its value in words. Ranks are compared kind by kind.
Description = dict[str, dict[str, str]]


def require_same(meeting: Meeting, members: list[int], description: Description) -> None:
    """Raises the same ValueError on every rank, with entries and ranks by name, where descriptions differ. Collective.
    members: the global ranks of the group.

    Digests are exchanged; the entries themselves only of the first kind that differs.
    """
    of_ranks = meeting.gather({kind: _digest(entries) for kind, entries in description.items()}, f"call {meeting.what}")
    for kind in description:
        if len({digests.get(kind) for digests in of_ranks}) > 1:
            entries = meeting.gather(description[kind], f"compare its {kind}")
            told = f"{meeting.what}: the ranks differ in {_differences(kind, entries)}"
            raise ValueError(faults.in_group(told, members))


def describe_config(config) -> dict[str, str]:
    return {name: value for name, value in _flat(config.to_dict()) if name.partition(".")[0] not in _OF_A_RANK}


def describe_tensors(model) -> Description:
    """Names, shapes and dtypes of parameters and stored buffers, and a sample of their elements."""
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    held = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}
    samples = [_sample(tensor) for tensor in held.values()]
    sampled = [] if not samples else torch.cat([sample.to(samples[0].device) for sample in samples]).cpu()
    values, at = {}, 0
    for name, sample in zip(held, samples, strict=True):
        values[name] = described_bytes(sampled[at : at + len(sample)])
        at += len(sample)
    return {
        "tensors": {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()},
        "values": values,
    }


def described_bytes(tensor: torch.Tensor) -> str:
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"checksum {hashlib.blake2b(data, digest_size=4).hexdigest()}"


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """The same bits."""
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def by_value(values: list) -> str:
    """Which ranks have which value."""
    ranks = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(str(rank))
    said = (f"{'rank' if len(who) == 1 else 'ranks'} {', '.join(who)}: {value}" for value, who in ranks.items())
    return "; ".join(said)


def some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes of elements from all over the tensor: an odd step comes through all columns of rows of even length."""
    flat = as_integers(tensor.flatten())  # not every operation takes every dtype of one byte
    return flat[:: -(-flat.numel() // _SAMPLE) | 1].contiguous().view(torch.uint8)


def _digest(entries: dict[str, str]) -> bytes:
    return hashlib.blake2b(json.dumps(entries, sort_keys=True).encode(), digest_size=16).digest()


def _flat(entries: dict, prefix: str = ""):
    for name, value in entries.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            unordered = isinstance(value, (set, frozenset))
            words = repr(sorted(value, key=repr) if unordered else value)
            yield f"{prefix}{name}", re.sub(r" at 0x[0-9a-f]+", "", words)


def _differences(kind: str, entries: list[dict[str, str]]) -> str:
    differ = []
    for name in dict.fromkeys(name for of_rank in entries for name in of_rank):
        values = [of_rank.get(name, "none") for of_rank in entries]
        if len(set(values)) > 1:
            differ.append(f"{name} ({by_value([_short(value) for value in values])})")
    return f"{kind}: {some(differ)}"


def _short(words: str) -> str:
    if len(words) <= _LONGEST_WORD:
        return words
    return f"{words[:_LONGEST_WORD]}..., checksum {hashlib.blake2b(words.encode(), digest_size=4).hexdigest()}"
