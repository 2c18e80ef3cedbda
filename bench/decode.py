"""Few tokens, as in decode: goals of ranks that share a card, and the launches that measure them.

A goal compares programs of one run. A card may be lent for minutes: only what mla_prologue is compared with on two and
four ranks is compiled.
"""

from .bounds import Goal, at_most, section, times
from .catalog import ENGINES, SCATTERED
from .suite import Launch

FLASHINFER = (1, 16)  # of more tokens its blocks do not fit beside those of other ranks
STAGED = (64, 128, 256, 512)
PROLOGUE = (1, 8, 16, 64, 128, 256, 512, 1024, 2048, 4096, 16384)
ON_EIGHT = (1, 8, 64)


def _eager_call(row: dict) -> float:
    return row["host_us"] / row["host_empty_us"]


def _of_two_or_four(ranks: int) -> list[Goal]:
    what, reduces, staged = "time, in that of", "rs_rmsnorm_ag", {"program": "staged"}
    flashinfer, in_place = times("flashinfer"), times("fused", **staged)
    staged_flashinfer, unfused = times("flashinfer", **staged), times(*ENGINES, *SCATTERED)
    return [
        *(at_most(0.90, f"{what} FlashInfer's", ranks, reduces, tokens, flashinfer) for tokens in FLASHINFER),
        *(
            at_most(0.90, f"staged, {what} FlashInfer's", ranks, reduces, tokens, staged_flashinfer)
            for tokens in FLASHINFER
        ),
        *(at_most(1.15, f"staged, {what} inputs in place", ranks, reduces, tokens, in_place) for tokens in STAGED),
        *(
            at_most(1.0, f"{what} the fastest unfused program", ranks, "mla_prologue", tokens, unfused)
            for tokens in PROLOGUE
        ),
    ]


GOALS = [
    *(
        at_most(1.2, "time, in that of rs_rmsnorm", world_size, "rs_rmsnorm_ag", 1, times("rs_rmsnorm"))
        for world_size in (2, 4, 8)
    ),
    *(at_most(1.35, "time, in bare barriers", 8, "rs_rmsnorm_ag", tokens, times("barrier")) for tokens in (1, 8)),
    *(
        at_most(0.35, "time, in that of qkv_a_proj_ag", 8, "qkv_a_proj_ag_complete", tokens, times("qkv_a_proj_ag"))
        for tokens in ON_EIGHT
    ),
    *(
        at_most(0.35, "time, in that of rs_rmsnorm, then qkv_a_proj_ag_norm", 8, "mla_prologue", tokens, times("chain"))
        for tokens in ON_EIGHT
    ),
    at_most(
        *(1.2, "eager call on the CPU, in torch.empty of its outputs + an empty launch", 8, "rs_rmsnorm", 64),
        _eager_call,
    ),
    *(goal for world_size in (2, 4) for goal in _of_two_or_four(world_size)),
]


def _timed(world_size: int, op: str, tokens: tuple[int, ...], *baselines: str, **options):
    options = {"compile": False, "budget_s": 0.25, **options}
    return section(world_size, op, *tokens, baselines=baselines, **options)


def _two_or_four(world_size: int) -> Launch:
    reduced, prologue = ("flashinfer", "rs_rmsnorm"), (*ENGINES, *SCATTERED)
    sections = {
        "rs_rmsnorm_ag_decode": _timed(
            world_size, "rs_rmsnorm_ag", (*FLASHINFER, *STAGED), *reduced, variants=("staged",)
        ),
        "mla_prologue_decode": _timed(world_size, "mla_prologue", PROLOGUE, *prologue, compile=True, budget_s=0.2),
    }
    return Launch(f"decode-{world_size}", 60, sections)


BESIDE_FLASHINFER = [_two_or_four(4), _two_or_four(2)]
LAUNCHES = [
    Launch(
        "decode-8",
        50,
        {
            "rs_rmsnorm_ag_decode": _timed(8, "rs_rmsnorm_ag", (1, 8), "rs_rmsnorm", "barrier"),
            "rs_rmsnorm_decode": _timed(8, "rs_rmsnorm", (64,)),
            "qkv_a_proj_ag_complete_decode": _timed(8, "qkv_a_proj_ag_complete", ON_EIGHT, "qkv_a_proj_ag"),
            "mla_prologue_decode": _timed(8, "mla_prologue", ON_EIGHT, "chain"),
        },
    ),
    *BESIDE_FLASHINFER,
]
