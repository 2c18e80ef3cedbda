"""Ranks that feed different tokens: named before anything is computed from them."""

import zlib

import torch

from ... import ops
from .same_model import as_integers, by_value

_TIMES = ("first", "always", "never")
_TENSORS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
_SEED = "ranks that sample tokens need the same torch.manual_seed before they do"


def check_times(when: str) -> None:
    if when not in _TIMES:
        raise ValueError(f"check_tokens must be one of {', '.join(_TIMES)}, got {when!r}")


class SameTokens:
    """Compares what the ranks feed: one small `all_gather_rows`, and on a GPU two waits of the host."""

    def __init__(self, when: str):
        check_times(when)
        self.when = when
        self._due = when != "never"

    def check(self, workspace, device: torch.device, shape: tuple[int, ...], given: dict, have: str = "feed") -> None:
        """Raises ValueError, on every rank, where they do not have the same. Collective when it is due.

        A graph that is captured or traced has no room for it, and its replays would not come by here.
        """
        if not self._due or torch.compiler.is_compiling() or _capturing():
            return
        compared = (*shape, *_checksums(device, given), _cached(given.get("past_key_values")))
        row = torch.tensor([compared], dtype=torch.int64).view(torch.uint8).to(device)
        # As rows, one for each rank: so it has the ops' deadline, and a rank that does not come is named.
        gathered = ops.all_gather_rows(row, workspace.world_size, workspace.group).cpu()
        workspace.check()  # on a GPU a fault shows only here
        ranks = gathered.view(torch.int64).tolist()
        if any(values != ranks[0] for values in ranks):
            _tell(ranks, len(shape), have)
        self._due = self.when == "always"


def _tell(ranks: list[list[int]], num_sizes: int, have: str) -> None:
    told = {"shapes of tokens": [tuple(values[:num_sizes]) for values in ranks]}
    for index, name in enumerate(_TENSORS, num_sizes):
        told[name] = [f"checksum {values[index]:08x}" for values in ranks]
    told["cached lengths"] = [values[-1] for values in ranks]
    what, values = next((what, values) for what, values in told.items() if len(set(values)) > 1)
    hint = f"; {_SEED}" if what in ("input_ids", "shapes of tokens") else ""
    raise ValueError(f"the ranks {have} different {what}: {by_value(values)}{hint}")


def _checksums(device: torch.device, given: dict) -> list[int]:
    """Of 32 bits each. 0 for what is not there, or is made by transformers itself (masks by layer type)."""
    parts = [_bytes(name, given.get(name)).to(device) for name in _TENSORS]
    joined = torch.cat(parts).cpu()  # on a GPU one copy, and one wait, for all of them
    return [zlib.crc32(part.numpy()) for part in joined.split([len(part) for part in parts])]


def _bytes(name: str, tensor) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor):
        return torch.empty(0, dtype=torch.uint8)
    tensor = tensor.detach()
    if name == "inputs_embeds":  # a number for each row: integers, whose sum has no order
        tensor = as_integers(tensor).sum(-1)
    return tensor.contiguous().flatten().view(torch.uint8)


def _cached(cache) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
