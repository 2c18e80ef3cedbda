"""What csrc/plan decides for a call: on this machine's card, or on one that is known by name and need not be there."""

import torch

from . import backends, faults, partition
from .native import _C, DTYPE_CODES

_CODES = {name: code for code, name in faults.OPS.items()}


class NoKernelError(ValueError):
    """No kernel serves such a call."""


def plan(
    op: str,
    num_tokens: int,
    *,
    card: int | str,
    world_size: int,
    hidden_size: int,
    columns: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    in_place: bool | None = False,
    complete: bool = False,
    limits: backends.CardLimits | None = None,
    slot_bytes: int | None = None,
) -> dict:
    """The plan of a call whose input is [num_tokens, hidden_size], by name; see `tpf_plan` in csrc/tp_fused.h. Of
    rs_rmsnorm_ag also "quantized_by_all": whether rs_rmsnorm_ag_fp8 of such rows is this and a quantisation.

    card: an ordinal or a name. columns: of a projection. in_place: the input lies in symmetric memory (None: unknown).
    limits: what the rank has of the card, by default all of it. slot_bytes: of the workspace, by default what the call
    takes. Raises NoKernelError where no kernel serves the call: of rs_rmsnorm_ag_fp8, no single one. ValueError where
    the card is not known.
    """
    gathered = op == "rs_rmsnorm_ag_fp8"  # of few tokens rs_rmsnorm_fp8 with TPF_GATHERED
    if op not in _CODES and not gathered:
        raise ValueError(f"unknown op {op!r}")
    if limits is None:
        limits = limits_of(card, 1)
    if slot_bytes is None:
        rows = world_size * partition.row_count(num_tokens, 0, world_size)
        slot_bytes = rows * max(hidden_size, columns) * dtype.itemsize
    try:
        return _C.plan(
            _CODES["rs_rmsnorm_fp8" if gathered else op],
            DTYPE_CODES[dtype],
            num_tokens,
            hidden_size,
            columns=columns,
            in_place=bool(in_place),
            complete=complete,
            gathered=gathered,
            world_size=world_size,
            max_ctas=limits.max_ctas,
            free_sms=limits.free_sms,
            free_cluster_sms=limits.free_cluster_sms,
            slot_bytes=slot_bytes,
            card=card,
        )
    except ValueError as error:
        if "no kernel serves" not in str(error):  # the card is not known
            raise
        weight = f" and a weight of {columns} rows" if columns else ""
        raise NoKernelError(
            f"no kernel serves {op} of [{num_tokens}, {hidden_size}] of {dtype}{weight}, on {world_size} ranks with "
            f"{limits.max_ctas} blocks each on {card}"
        ) from None


def sm_count(card: int | str) -> int:
    return _C.card(card)["sm_count"]


def limits_of(card: int | str, ranks: int, max_ctas: int | None = None) -> backends.CardLimits:
    """What a rank has of a card on which there are so many."""
    about = _C.card(card)
    return backends.limits_of(ranks, about["sm_count"], about["cluster_sms"], about["most_gpcs"], max_ctas)
