"""csrc/plan without a card: a plan serves all rows and columns within the limits, and is the same on all ranks."""

import dataclasses
import itertools
import re
from collections.abc import Iterator

import programs
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from programs import REDUCTIONS

import tp_fused
from tp_fused import faults, partition, planning
from tp_fused.native import _C

PROJECTIONS = (*programs.PROJECTIONS, "qkv_a_proj_ag_norm_fp8")
OPS = (*programs.OPS, "qkv_a_proj_ag_norm_fp8")
CARDS = ("A100", "H20", "H100", "H200", "B200", "RTX PRO 6000")
MOST_CHUNKS = 7  # of a block in a reduction: kMaxChunks
MOST_WARP_VALUES = 136  # kMaxWarpValues
STATIC_SHARED_BYTES = 2048
HALF_A_CARD = 66  # kFittedSm90: a rank with more blocks has a card to itself
POSTED_ROWS = 2  # own_card_posted_rows: of a block
QUANTIZED_BYTES = 1792 << 10  # quantized_all_rows: that a rank posts
INBOX_BYTES = 24 << 20  # kMaxInboxBytes
BYTES = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 4, torch.float8_e4m3fn: 1}


@dataclasses.dataclass(frozen=True)
class Asked:
    """A call, and where it is made."""

    op: str
    num_tokens: int
    hidden_size: int
    columns: int
    dtype: torch.dtype
    in_place: bool
    world_size: int
    card: str
    ranks_per_card: int
    max_ctas: int | None
    complete: bool = False
    full: bool = False  # the workspace is as small as it may be for the call

    def plan(self, card: str | None = None) -> dict:
        limits = planning.limits_of(self.card, self.ranks_per_card, self.max_ctas)
        sizes = {"world_size": self.world_size, "hidden_size": self.hidden_size, "columns": self.columns}
        return planning.plan(
            self.op,
            self.num_tokens,
            card=card or self.card,
            dtype=self.dtype,
            in_place=self.in_place,
            complete=self.complete,
            limits=limits,
            slot_bytes=self.slot_bytes,
            **sizes,
        )

    @property
    def slot_bytes(self) -> int:
        """As a workspace's: for the largest call, which has the dtype of most bytes."""
        element_bytes = BYTES[self.dtype] if self.full else 4
        return self.rows * self.world_size * max(self.hidden_size, self.columns) * element_bytes

    @property
    def own_card(self) -> bool:
        return planning.limits_of(self.card, self.ranks_per_card, self.max_ctas).max_ctas > HALF_A_CARD

    @property
    def rows(self) -> int:
        """Of the rank that owns most."""
        return partition.row_count(self.num_tokens, 0, self.world_size)

    @property
    def vectors(self) -> int:
        """Of 16 bytes, in a row."""
        return self.hidden_size * BYTES[self.dtype] // 16


@st.composite
def calls(draw, ops=OPS) -> Asked:
    op = draw(st.sampled_from(ops))
    world_size = draw(st.integers(1, 8))
    dtype = draw(st.sampled_from((torch.bfloat16, torch.float16, torch.float32)))
    if op in PROJECTIONS and op.endswith("_fp8"):
        dtype = torch.float8_e4m3fn
    card = draw(st.sampled_from(CARDS))
    ranks_per_card = draw(st.integers(1, world_size))
    sms = _C.card(card)["sm_count"]
    return Asked(
        op,
        draw(st.integers(0, 20) | st.integers(0, 70_000) | st.sampled_from((64, 512, 1024, 4096, 16384))),
        draw(st.integers(1, 2048) | st.sampled_from((512, 768, 896))) * 8,
        draw(st.integers(1, 848).map(lambda eight: 8 * eight) | st.integers(1, 6784)) if op in PROJECTIONS else 0,
        dtype,
        op in REDUCTIONS and draw(st.booleans()),
        world_size,
        card,
        ranks_per_card,
        draw(st.none() | st.integers(1, sms // ranks_per_card)),
        op in ("rs_rmsnorm", "rs_rmsnorm_fp8", *PROJECTIONS) and draw(st.booleans()),
    )


def few_rows(in_place: bool = True) -> Iterator[Asked]:
    """Reductions of up to three rows a block and a little more, in workspaces that are as small as they may be."""
    forms = [(op, op == "rs_rmsnorm" and complete) for op in REDUCTIONS for complete in (False, True)]
    some = (dict.fromkeys(forms), CARDS, (1, 2, 3, 4, 8), (torch.bfloat16, torch.float32), (512, 7168, 16384))
    for (op, complete), card, world_size, dtype, hidden_size in itertools.product(*some):
        for ranks_per_card in {1, world_size}:
            at_once = planning.limits_of(card, ranks_per_card).max_ctas * world_size
            for tokens in (0, 1, 8, 32, at_once // 2, at_once - 1, at_once, 2 * at_once, 3 * at_once, 3 * at_once + 1):
                sizes = (tokens, hidden_size, 0, dtype, in_place, world_size)
                yield Asked(op, *sizes, card, ranks_per_card, None, complete, full=True)


@settings(max_examples=1500, deadline=None, derandomize=True, database=None)
@given(calls())
def test_every_plan_serves_the_call_within_the_limits(asked):
    plan, card = asked.plan(), _C.card(asked.card)
    limits = planning.limits_of(asked.card, asked.ranks_per_card, asked.max_ctas)
    assert 1 <= plan["blocks"] <= limits.max_ctas
    assert plan["blocks"] % plan["cluster"] == 0
    assert plan["threads"] <= 1024 and plan["threads"] % 32 == 0
    assert plan["shared_bytes"] + STATIC_SHARED_BYTES <= card["shared_bytes"]
    if card["architecture"] < 90:
        assert (plan["cluster"], plan["body"] in ("bulk", "tiles")) == (1, False)
    if plan["body"] == "columns":
        unit = 128 if asked.dtype == torch.float8_e4m3fn else 8
        most = partition.row_count(-(-asked.columns // unit), 0, asked.world_size) * unit  # of rank 0
        assert plan["blocks"] // plan["cluster"] * plan["tile_columns"] >= min(most, asked.columns)
        assert plan["cluster"] <= 2 or plan["blocks"] <= card["cluster_sms"]
        assert plan["chunk_rows"] * plan["chunks"] >= asked.num_tokens
        return
    if plan["body"] == "tiles":
        assert plan["chunk_rows"] * plan["chunks"] >= asked.rows
        return
    assert plan["chunks"] <= (MOST_CHUNKS if asked.op in REDUCTIONS else 8)
    rows = asked.num_tokens if plan["body"] == "all rows" else asked.rows
    assert plan["chunks"] * plan["chunk_rows"] * (plan["blocks"] // plan["cluster"]) >= rows
    if asked.op not in REDUCTIONS:
        return
    # A row is held by the threads of a cluster.
    held = (plan["threads"] - 64 * (plan["body"] == "bulk")) * plan["vectors"]  # by a block
    assert plan["cluster"] * held >= asked.vectors
    assert plan["cluster"] == 1 or plan["body"] == "bulk" or plan["chunk_rows"] <= 1
    assert plan["cluster"] == 1 or plan["body"] != "direct"
    if plan["body"] == "direct" and card["architecture"] >= 90:  # what is compiled for such a card
        assert plan["vectors"] == (16 if asked.dtype == torch.float32 else 8)
    if plan["body"] == "one row" and plan["chunk_rows"] > 1:  # several rows of a block are all posted
        assert not plan["in_place"] and plan["cluster"] == 1 and asked.world_size in (2, 4)
        assert limits.max_ctas > HALF_A_CARD and BYTES[asked.dtype] == 2
    elif plan["body"] == "one row":
        assert plan["blocks"] // plan["cluster"] >= asked.rows
    assert plan["rounds"] == 1 or asked.op == "rs_rmsnorm_ag"
    if plan["body"] == "bulk":
        assert plan["stages"] >= asked.world_size + 1
        assert plan["shared_bytes"] >= plan["stages"] * min(held, asked.vectors) * 16
        assert (plan["cluster"] - 1) * held < asked.vectors and plan["cluster"] * held // 32 <= MOST_WARP_VALUES
    assert plan["in_place"] <= (asked.in_place and plan["body"] != "all rows")
    assert plan["body"] != "all rows" or asked.op == "rs_rmsnorm_ag"


def test_what_is_posted_fits_the_inbox():
    """Rows to be added up, of every source; behind them rows to be gathered, of every owner. All rows: the residual."""
    for asked in itertools.chain(few_rows(), few_rows(in_place=False)):
        plan = asked.plan()
        row_bytes, inbox = asked.vectors * 16, min(9 * asked.slot_bytes, INBOX_BYTES)
        if plan["body"] == "all rows":
            assert (asked.world_size + 1) * asked.num_tokens * row_bytes <= inbox, asked
        elif plan["body"] == "one row" and asked.world_size > 1 and not asked.complete:
            normed = asked.op == "rs_rmsnorm_ag" and plan["rounds"] == 1
            parts = 2 if normed else 0 if plan["in_place"] else 1
            assert parts * asked.world_size * asked.rows * row_bytes <= inbox, asked


def test_a_block_has_few_rows_only_where_all_are_posted():
    for asked in itertools.chain(few_rows(), few_rows(in_place=False)):
        plan, gathers = asked.plan(), asked.op == "rs_rmsnorm_ag"
        architecture, wide = _C.card(asked.card)["architecture"], asked.dtype == torch.float32
        if plan["body"] not in ("one row", "all rows"):
            assert (plan["ranks"], plan["rounds"]) == (0, 2 if gathers else 1), asked
            continue
        assert plan["ranks"] in (0, asked.world_size) and plan["ranks"] in ((0,) if wide else (0, 2, 4, 8)), asked
        assert plan["chunks"] == 1, asked
        if plan["body"] == "all rows":
            assert plan["rounds"] == 1 and architecture < 100, asked
            continue
        assert plan["rounds"] == (2 if gathers and plan["ranks"] == 0 else 1), asked
        assert not gathers or wide or architecture < 120 or plan["ranks"] in (2, 4), asked  # what is compiled for it
        if plan["chunk_rows"] > 1:
            assert plan["chunk_rows"] <= POSTED_ROWS and plan["cluster"] == 1 and plan["ranks"] in (2, 4), asked
            assert asked.own_card and architecture >= 90 and not plan["in_place"] and not asked.complete, asked


def test_a_rank_without_symmetric_memory_plans_as_those_that_post():
    """What is posted is announced as if the input lay nowhere in particular, so nothing would tell the two apart."""
    posting = 0
    for asked in few_rows():
        plan = asked.plan()
        if not plan["in_place"]:
            posting += 1
            assert dataclasses.replace(asked, in_place=False).plan() == plan, asked
    assert posting > 1000


@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(calls(ops=("rs_rmsnorm_ag",)))
def test_rows_that_all_ranks_add_up_are_quantised_by_all(asked):
    """By a kernel of the same grid. More rows are, too, while ranks post few bytes; else no one kernel serves them."""
    quantised = dataclasses.replace(asked, op="rs_rmsnorm_ag_fp8")
    if asked.plan()["body"] == "all rows":
        assert quantised.plan() == asked.plan()
        return
    posted = max(1, asked.world_size - 1) * asked.num_tokens * asked.hidden_size * asked.dtype.itemsize
    try:
        plan = quantised.plan()
    except planning.NoKernelError as error:
        assert re.match(r"no kernel serves rs_rmsnorm_ag_fp8 of \[", str(error))
    else:
        assert (plan["body"], plan["rounds"]) == ("all rows", 1) and posted <= QUANTIZED_BYTES


@pytest.mark.parametrize("hidden_size", [8200, 8448, 8960, 10248, 10752, 12296, 12544])
def test_every_block_of_a_cluster_has_a_part_of_the_row(hidden_size):
    """fp32 rows of few threads, where an SM has 99 KiB: whole warps might leave nothing for the last block."""
    for op in ("rs_rmsnorm", "rs_rmsnorm_ag"):
        for world_size in range(1, 9):
            for in_place in (False, True):
                sizes = (2048, hidden_size, 0, torch.float32, in_place, world_size)
                plan = Asked(op, *sizes, "RTX PRO 6000", 1, None).plan()
                held = (plan["threads"] - 64 * (plan["body"] == "bulk")) * plan["vectors"]
                assert (plan["cluster"] - 1) * held < hidden_size // 4 <= plan["cluster"] * held


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(calls(), st.sampled_from(("H20", "H100", "H200")))
def test_unlike_cards_of_a_group_choose_alike(asked, other):
    """Who publishes what when, and where the input is read. max_ctas is that of the smallest card."""
    assume(asked.card in ("H20", "H100", "H200"))
    smaller = min((asked.card, other), key=lambda card: _C.card(card)["sm_count"])
    asked = dataclasses.replace(asked, card=smaller, max_ctas=None)
    plans = [asked.plan(), asked.plan(other)]
    for plan in plans:
        if plan["body"] == "tiles":
            plan.pop("cluster")  # pairs of blocks are nobody else's business
    assert plans[0] == plans[1]


# A process that died of the first of these; more of them: fuzz_plan of tests/cpp/fuzz_c_api.cpp.
@pytest.mark.parametrize(
    ("op", "num_tokens", "hidden_size", "columns"),
    [
        *((op, 64, 7168, 0) for op in PROJECTIONS),
        ("rs_rmsnorm", 64, 0, 0),
        ("rs_rmsnorm", 64, 12, 0),
        ("rs_rmsnorm_ag", 2**31, 7168, 0),
        ("all_gather_rows", 2**62, 7168, 0),
    ],
)
def test_what_cannot_be_called_has_no_plan(op, num_tokens, hidden_size, columns):
    dtype = torch.float8_e4m3fn if op in PROJECTIONS and op.endswith("_fp8") else torch.bfloat16
    options = {"card": "H200", "world_size": 2, "slot_bytes": 1 << 20}
    with pytest.raises(planning.NoKernelError, match=f"no kernel serves {op} of"):
        planning.plan(op, num_tokens, hidden_size=hidden_size, columns=columns, dtype=dtype, **options)


# What was measured and chosen on H100 and H200, docs/notes.
@pytest.mark.parametrize(
    ("op", "num_tokens", "options", "chosen"),
    [
        ("rs_rmsnorm", 1, {}, {"body": "one row", "cluster": 4, "in_place": False}),
        ("rs_rmsnorm", 1024, {}, {"body": "one row", "cluster": 1, "in_place": False}),
        ("rs_rmsnorm", 1024, {"ranks_per_card": 8}, {"body": "bulk", "in_place": True}),
        ("rs_rmsnorm", 64, {"ranks_per_card": 8}, {"body": "one row", "cluster": 1, "in_place": True}),
        ("rs_rmsnorm", 16384, {}, {"body": "bulk", "threads": 512, "in_place": True}),
        ("rs_rmsnorm", 16384, {"card": "A100"}, {"body": "direct"}),
        ("rs_rmsnorm", 2048, {"hidden_size": 16384, "ranks_per_card": 8}, {"body": "bulk", "cluster": 2}),
        ("rs_rmsnorm", 2048, {"hidden_size": 8192, "ranks_per_card": 8}, {"body": "bulk", "cluster": 1}),
        ("all_gather_rows", 16384, {}, {"body": "direct", "blocks": 128}),
        ("all_gather_rows", 16384, {"ranks_per_card": 8}, {"body": "bulk", "blocks": 8}),
        ("qkv_a_proj_ag", 2048, {}, {"body": "direct", "few_rows": True}),
        ("qkv_a_proj_ag", 2048, {"ranks_per_card": 8}, {"body": "tiles", "few_rows": False, "cluster": 2}),
        ("qkv_a_proj_ag_fp8", 2048, {}, {"body": "tiles", "few_rows": False}),
        ("qkv_a_proj_ag_norm_fp8", 64, {"ranks_per_card": 8}, {"body": "tiles"}),
        ("qkv_a_proj_ag_norm_fp8", 16384, {}, {"body": "tiles", "tile_columns": 64}),
        ("qkv_a_proj_ag_norm_fp8", 16384, {"card": "B200"}, {"tile_columns": 0}),
        ("rs_rmsnorm_ag", 2, {}, {"body": "all rows", "cluster": 4, "in_place": False, "ranks": 8}),
        ("rs_rmsnorm_ag", 3, {}, {"body": "one row", "cluster": 4, "rounds": 1, "ranks": 8}),
        ("rs_rmsnorm_ag", 32, {"ranks_per_card": 8}, {"body": "one row", "rounds": 1}),
        ("rs_rmsnorm_ag", 64, {"ranks_per_card": 8}, {"body": "one row", "cluster": 1, "rounds": 2}),
        ("rs_rmsnorm_ag_fp8", 2, {}, {"body": "all rows", "cluster": 4, "in_place": False}),
        ("rs_rmsnorm_ag_fp8", 16, {"ranks_per_card": 8}, {"body": "all rows", "in_place": False}),
        ("qkv_a_proj_ag", 64, {"complete": True}, {"body": "columns", "cluster": 8, "tile_columns": 24}),
        ("qkv_a_proj_ag", 32, {"complete": True, "ranks_per_card": 8}, {"body": "columns", "cluster": 2}),
        ("qkv_a_proj_ag", 33, {"complete": True, "ranks_per_card": 8}, {"body": "direct"}),
        ("qkv_a_proj_ag", 128, {"complete": True}, {"body": "direct"}),
        ("qkv_a_proj_ag", 16384, {"card": "B200"}, {"few_rows": False, "tile_columns": 0}),
    ],
)
def test_plans_of_deepseek_v3(op, num_tokens, options, chosen):
    values = {"card": "H200", "ranks_per_card": 1} | options
    hidden_size = values.pop("hidden_size", 2112 if op == "all_gather_rows" else 7168)
    dtype = torch.float8_e4m3fn if op in PROJECTIONS and op.endswith("_fp8") else torch.bfloat16
    columns, in_place = 2112 if op in PROJECTIONS else 0, op.startswith(("rs_", "reduce_"))
    asked = Asked(op, num_tokens, hidden_size, columns, dtype, in_place, 8, max_ctas=None, **values)
    plan = asked.plan()
    assert {name: plan[name] for name in chosen} == chosen


# Rows of a rank with a card: one a block, shared by blocks; two a block; more.
@pytest.mark.parametrize(
    ("num_tokens", "body", "said"),
    [
        (1, "all rows", "4 of them share 1 row at most\none round: every rank posts its rows"),
        (16, "one row", "4 of them share 1 row at most\none round: rows are added up by their owners"),
        (64, "one row", "4 of them share 1 row at most\none round: rows are added up by their owners"),
        (300, "one row", "each has 2 rows at most\none round: rows are added up by their owners"),
        (512, "one row", "each has 2 rows at most\none round: rows are added up by their owners"),
        (600, "bulk", "each has 3 rows at most\ntwo rounds: rows are added up by their owners"),
    ],
)
def test_rs_rmsnorm_ag_of_two_cards(num_tokens, body, said):
    asked = Asked("rs_rmsnorm_ag", num_tokens, 7168, 0, torch.bfloat16, True, 2, "H200", 1, None)
    assert asked.plan()["body"] == body
    told = tp_fused.explain("rs_rmsnorm_ag", num_tokens, gpu="H200", in_place=True, world_size=2)
    assert said in told and ("the input is staged" in told) == (body != "bulk"), told


# What takes less time than a kernel more that quantises, and than Triton's product.
@pytest.mark.parametrize(
    ("world_size", "ranks_per_card", "most"), [(2, 1, 128), (2, 2, 128), (4, 4, 42), (8, 8, 18), (8, 1, 18)]
)
def test_all_ranks_quantise_few_rows(world_size, ranks_per_card, most):
    options = {"gpu": "H200", "world_size": world_size, "ranks_per_card": ranks_per_card, "in_place": True}
    assert "adds up, norms and quantises all rows" in tp_fused.explain("rs_rmsnorm_ag_fp8", most, **options)
    assert "quantises all rows" not in tp_fused.explain("rs_rmsnorm_ag_fp8", most + 1, **options)


@pytest.mark.parametrize(("op", "most"), [("qkv_a_proj_ag", 16), ("qkv_a_proj_ag_fp8", 32)])
def test_columns_of_two_cards(op, most):
    dtype = torch.float8_e4m3fn if op.endswith("_fp8") else torch.bfloat16
    few, more = (Asked(op, n, 7168, 2112, dtype, False, 2, "H200", 1, None, complete=True) for n in (most, most + 1))
    assert (few.plan()["body"], more.plan()["body"]) == ("columns", "direct")


def test_an_op_that_plans_have_not_heard_of_is_a_reduction():
    """So that csrc/plan is not among the files of a new op that adds up rows (CONTRIBUTING.md)."""
    limits = {"world_size": 8, "max_ctas": 132, "free_sms": 0, "free_cluster_sms": 0, "slot_bytes": 1 << 30}
    number = {name: code for code, name in faults.OPS.items()}["reduce_scatter_rows"]
    known, new = (_C.plan(op, 0, 64, 7168, card="H200", **limits) for op in (number, max(faults.OPS) + 1))
    assert known == new
    with pytest.raises(ValueError, match="no kernel serves"):
        _C.plan(_C.BARRIER, 0, 64, 7168, card="H200", **limits)


def test_what_no_kernel_serves_is_told_with_its_numbers():
    limits = planning.limits_of("H100", 1)
    with pytest.raises(
        ValueError, match=r"no kernel serves rs_rmsnorm of \[16, 1073741824\] of torch.bfloat16, on 8 ranks with "
    ):
        planning.plan("rs_rmsnorm", 16, card="H100", world_size=8, hidden_size=2**30, limits=limits)
