"""Ranks that feed different tokens: named before anything is computed from them."""

import hashlib

import torch

from ... import ops
from .same_model import by_value

_TIMES = ("first", "always", "never")
_TENSORS = ("input_ids", "attention_mask", "position_ids")


class SameTokens:
    """Compares what the ranks feed: one small `all_gather_rows`, and on a GPU a wait for it, on the host."""

    def __init__(self, when: str):
        if when not in _TIMES:
            raise ValueError(f"check_tokens must be one of {', '.join(_TIMES)}, got {when!r}")
        self.when = when
        self._due = when != "never"

    def check(self, workspace, device: torch.device, shape: tuple[int, ...], given: dict) -> None:
        """Raises ValueError, the same on every rank, where they do not feed the same. Collective when it is due.

        A graph that is captured or traced has no room for it, and its replays would not come by here.
        """
        if not self._due or torch.compiler.is_compiling() or _capturing():
            return
        compared = (*shape, *(_checksum(given.get(name)) for name in _TENSORS), _cached(given.get("past_key_values")))
        row = torch.tensor([compared], dtype=torch.int64).view(torch.uint8).to(device)
        # As rows, one for each rank: so it has the ops' deadline, and a rank that does not come is named.
        gathered = ops.all_gather_rows(row, workspace.world_size, workspace.group).cpu()
        workspace.check()  # on a GPU a fault shows only here
        ranks = gathered.view(torch.int64).tolist()
        num_sizes = len(shape)
        told = {"shapes of tokens": [tuple(values[:num_sizes]) for values in ranks]}
        for index, name in enumerate(_TENSORS, num_sizes):
            told[name] = [f"checksum {values[index] & 0xFFFFFFFF:08x}" for values in ranks]
        told["cached lengths"] = [values[-1] for values in ranks]
        for what, values in told.items():
            if len(set(values)) > 1:
                raise ValueError(f"the ranks feed different {what}: {by_value(values)}")
        self._due = self.when == "always"


def _checksum(tensor) -> int:
    """Of 32 bits. 0 for what is not there, or is made by transformers itself (masks by layer type)."""
    if not isinstance(tensor, torch.Tensor):
        return 0
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "little")


def _cached(cache) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
