"""Which backend serves a group, and what a rank has of a card: from what the ranks report."""

import dataclasses
import os

import pytest
import torch
import torch.distributed as dist
from programs import Call
from ranks import Pool, outcome, workspace

import tp_fused
from tp_fused import backends


def report(**changes) -> backends.Report:
    return dataclasses.replace(backends.report({}, "cpu"), **changes)


@pytest.mark.parametrize(
    ("reports", "asked", "choice", "reason"),
    [
        ([report()] * 2, None, "cpu", "all ranks share one host's memory"),
        ([report()] * 2, "cpu", "cpu", "TP_FUSED_BACKEND asks for it"),
        ([report()] * 2, "reference", "reference", "TP_FUSED_BACKEND asks for it"),
        ([report()] * 9, None, "reference", "world size 9 is over 8"),
        ([report(host="a"), report(host="b")], None, "reference", "rank 1 runs on b, rank 0 on a: they share no mem"),
        (
            [report(host="a/b/c"), report(host="a/b/d")],
            None,
            "reference",
            "each with its own /dev/shm",
        ),
        ([report(), report(cpu_supported=False)], None, "reference", "the processor of rank 1 lacks AVX2"),
    ],
)
def test_choice_of_backend(reports, asked, choice, reason):
    chosen, why = backends.choose_backend(reports, "cpu", len(reports), asked)
    assert chosen == choice and reason in why


@pytest.mark.parametrize(
    ("reports", "device_type", "asked", "message"),
    [
        ([report()] * 9, "cpu", "cpu", "TP_FUSED_BACKEND=cpu cannot run: world size 9 is over 8"),
        ([report(host="a"), report(host="b")], "cpu", "cpu", "TP_FUSED_BACKEND=cpu cannot run: rank 1 runs on b"),
        ([report(), report(cpu_supported=False)], "cpu", "cpu", "cannot run: the processor of rank 1 lacks AVX2"),
        ([report()], "cpu", "cuda", "TP_FUSED_BACKEND=cuda cannot run: the workspace is for cpu tensors"),
        ([report()], "cpu", "fast", "TP_FUSED_BACKEND=fast: must be one of cuda, cpu, reference"),
    ],
)
def test_backend_that_was_asked_for_and_cannot_run(reports, device_type, asked, message):
    with pytest.raises(ValueError) as raised:
        backends.choose_backend(reports, device_type, len(reports), asked)
    assert message in str(raised.value)


def on_card(gpu: str, **changes) -> backends.Report:
    reaches = {"a": True, "b": True}
    card = {"gpu": gpu, "gpu_name": "GPU " + gpu, "num_sms": 132, "cluster_sms": 120, "most_gpcs": 8}
    card |= {"capability": (9, 0), "has_code": True}
    return report(**card | {"reaches": reaches} | changes)


@pytest.mark.parametrize(
    ("reports", "choice", "reason"),
    [
        ([on_card("a"), on_card("b")], "cuda", "all ranks share one host's memory"),
        ([on_card("a"), on_card("a")], "cuda", "all ranks share one host's memory; 2 ranks share a GPU"),
        # Each sees its own card only, and cannot tell.
        ([on_card("a", reaches={"a": True}), on_card("b", reaches={"b": True})], "cuda", "all ranks share one host's"),
        (
            [on_card("a"), on_card("b", reaches={"a": False, "b": True})],
            "reference",
            "the GPU of rank 1 cannot read the memory of rank 0's: there is no peer access",
        ),
        (
            [on_card("a"), on_card("b", capability=(12, 0), has_code=False)],
            "reference",
            "this build has no code for rank 1's GPU b of compute capability 12.0",
        ),
        ([on_card("a"), on_card("b", capability=(7, 5))], "reference", "rank 1 has GPU b of compute capability 7.5; 8"),
        (
            [on_card("a"), on_card("b", capability=(10, 0))],
            "reference",
            "rank 1 has GPU b of compute capability 10.0, rank 0 GPU a of compute capability 9.0: their",
        ),
    ],
)
def test_choice_of_backend_on_cards(monkeypatch, reports, choice, reason):
    monkeypatch.setattr(backends._C, "cuda_compiled", lambda: True)  # what else there is to choose by
    chosen, why = backends.choose_backend(reports, "cuda", len(reports), None)
    assert chosen == choice and reason in why


@pytest.mark.parametrize(("num_sms", "cluster_sms"), [(78, 72), (114, 104), (132, 120), (132, 128), (148, 144)])
@pytest.mark.parametrize("ranks", range(1, 9))
def test_blocks_of_ranks_that_share_a_card_leave_room_for_clusters(ranks, num_sms, cluster_sms):
    reports = [on_card("a", num_sms=num_sms, cluster_sms=cluster_sms) for _ in range(ranks)]
    limits = backends.limits_of_ranks(reports, None)
    others = (ranks - 1) * limits.max_ctas
    free = (num_sms - others, cluster_sms - others) if ranks > 1 else (0, 0)
    assert (limits.ranks, limits.free_sms, limits.free_cluster_sms) == (ranks, *free)
    if ranks == 1:
        assert limits.max_ctas == num_sms
        return
    assert 1 <= limits.max_ctas <= num_sms // ranks
    # With seven free in each of 8 GPCs, no eight are in one.
    assert limits.max_ctas == 1 or limits.free_cluster_sms > 8 * 7
    assert limits.max_ctas == 1 or limits.free_sms - (limits.max_ctas - 2) > 8  # likewise the last pair of blocks
    assert limits.max_ctas == 1 or limits.max_ctas % 2 == 0
    more = limits.max_ctas + (1 if limits.max_ctas == 1 else 2)
    others = (ranks - 1) * more
    assert cluster_sms - others <= 8 * 7 or num_sms - others - (more - 2) <= 8
    fills = backends.limits_of_ranks(reports, num_sms // ranks)
    assert (fills.max_ctas, fills.free_sms > 0) == (num_sms // ranks, fills.max_ctas == limits.max_ctas)
    with pytest.raises(ValueError, match=f"{ranks} ranks share a card of {num_sms} SMs, at most"):
        backends.limits_of_ranks(reports, num_sms // ranks + 1)


def test_cards_without_clusters_are_filled():
    reports = [on_card("a", capability=(8, 0), num_sms=108, cluster_sms=0)] * 4
    assert backends.limits_of_ranks(reports, None).max_ctas == 27


def test_a_subgroup_counts_the_others_on_its_cards():
    pair = [on_card("a", ranks_per_card=8), on_card("a", ranks_per_card=8)]
    assert backends.limits_of_ranks(pair, None) == backends.limits_of_ranks([on_card("a")] * 8, None)
    apart = [on_card("a"), on_card("b", ranks_per_card=2)]
    assert backends.limits_of_ranks(apart, None).ranks == 2


@pytest.mark.cuda
def test_what_a_rank_reports_of_its_card(device):
    found = backends.report({}, device)
    assert found.has_code and found.reaches[found.gpu] and len(found.reaches) == torch.cuda.device_count()


def nine_ranks() -> tuple:
    """Runs on a rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    os.environ["TP_FUSED_BACKEND"] = "cpu"
    error, _ = outcome(tp_fused.init, device="cpu", max_num_tokens=64, hidden_size=256)
    with workspace(None) as made:
        call = Call("rs_rmsnorm_ag", 20)
        call.check(call.run(rank, world_size), rank, world_size)
        return error, made.backend


def test_more_ranks_than_a_segment_has_room_for():
    with Pool(9) as pool:
        for error, backend in pool.run(nine_ranks):
            assert "TP_FUSED_BACKEND=cpu cannot run: world size 9 is over 8" in str(error)
            assert backend == "reference"
