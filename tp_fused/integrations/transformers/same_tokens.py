"""Ranks that feed different tokens: named before anything is computed from them."""

import zlib

import torch

from ... import faults, ops
from .same_model import as_integers, by_value

_TIMES = ("first", "always", "never")
_TENSORS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
_DID = ("fed", "generated")
COMPARED_BYTES = 8 * (1 + 2 + len(_TENSORS) + 1)  # what a rank did, batch and length, checksums, the cached length
_SEED = "ranks that sample tokens need the same torch.manual_seed and the same arguments"


def check_times(when: str) -> None:
    if when not in _TIMES:
        raise ValueError(f"check_tokens must be one of {', '.join(_TIMES)}, got {when!r}")


class SameTokens:
    """Compares what the ranks feed: one small `all_gather_rows`, and on a GPU waits of the host before and after it."""

    def __init__(self, when: str):
        check_times(when)
        self.when = when
        self._due = when != "never"

    def check(self, workspace, device: torch.device, shape: tuple[int, ...], fed: dict, did: str = "fed") -> None:
        """Raises ValueError, on every rank, where they have not done the same. Collective when it is due.

        A graph that is captured or traced has no room for it, and its replays would not come by here.
        """
        if not self._due or torch.compiler.is_compiling() or capturing():
            return
        compared = (_DID.index(did), *shape, *_checksums(device, fed), _cached(fed.get("past_key_values")))
        row = torch.tensor([compared], dtype=torch.int64).view(torch.uint8).to(device)
        # As rows, one for each rank: so it has the ops' deadline, and a rank that does not come is named.
        gathered = ops.all_gather_rows(row, workspace.world_size, workspace.group).cpu()
        workspace.check()  # on a GPU a fault shows only here
        ranks = gathered.view(torch.int64).tolist()
        if any(values != ranks[0] for values in ranks):
            raise ValueError(faults.in_group(_differences(ranks, len(shape)), workspace.members))
        self._due = self.when == "always"


def _differences(ranks: list[list[int]], num_sizes: int) -> str:
    did = [_DID[values[0]] for values in ranks]
    told = {"shapes of tokens": [tuple(values[1 : 1 + num_sizes]) for values in ranks]}
    for index, name in enumerate(_TENSORS, 1 + num_sizes):
        told[name] = [f"checksum {values[index]:08x}" if values[index] else "none" for values in ranks]
    told["cached lengths"] = [values[-1] for values in ranks]
    if len(set(did)) > 1:  # one has come to its end
        shapes = told["shapes of tokens"]
        ended = [f"{verb} tokens of shape {shape}" for verb, shape in zip(did, shapes, strict=True)]
        return f"some ranks have ended generating before others: {by_value(ended)}; {_SEED}"
    what, values = next((what, values) for what, values in told.items() if len(set(values)) > 1)
    drawn = did[0] == "generated" or any(told["cached lengths"])
    hint = f"; {_SEED}" if drawn and what in ("input_ids", "shapes of tokens") else ""
    return f"the ranks have {did[0]} different {what}: {by_value(values)}{hint}"


def _checksums(device: torch.device, fed: dict) -> list[int]:
    """Of 32 bits each. 0 for what is not there, or is made by transformers itself (masks by layer type)."""
    parts = [_bytes(name, fed.get(name)).to(device) for name in _TENSORS]
    joined = torch.cat(parts).cpu()  # on a GPU one copy, and one wait, for all of them
    return [zlib.crc32(part.numpy()) for part in joined.split([len(part) for part in parts])]


def _bytes(name: str, fed) -> torch.Tensor:
    if not isinstance(fed, torch.Tensor):
        return torch.empty(0, dtype=torch.uint8)
    tensor = fed.detach()
    if name == "inputs_embeds":  # a number for each row, summed as integers: in any order the same
        tensor = as_integers(tensor).sum(-1)
    return tensor.contiguous().flatten().view(torch.uint8)


def _cached(cache) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def capturing() -> bool:
    """Whether what is called now goes into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
