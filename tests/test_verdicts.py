"""What tp_fused.diagnose makes of the records that it has: the first cause, in words."""

import pytest

from tp_fused.diagnose import _judge, _rank_state, call_text


def record(rank: int, status: int, peer: int, number: int = 7, waited_s: float = 1.0, **seen) -> dict:
    call = {"op": 1, "num_tokens": 4, "hidden_size": 256, "dtype": 2, "variant": 0, "source": (0, -1)}
    fault = {"status": status, "rank": rank, "peer": peer, "epoch": number, "call_number": number}
    return {"record": {**fault, "waited_s": waited_s, "expected": call, "seen": {**call, **seen}}}


SEVENTH = "call #7 rs_rmsnorm(num_tokens=4, hidden_size=256, dtype=float32)"
# What is known of each rank of four, the verdict (None: faults.py has the words) and the culprits.
JUDGEMENTS = {
    "two ranks do not come": (
        [record(0, 1, peer=2), record(1, 1, peer=2), {"calls": 6}, {"calls": 6}],
        f"ranks 2 and 3 never entered {SEVENTH}; ranks 0 and 1 waited 1.0 s",
        (2, 3),
    ),
    "one gave up, and who waited for it": (
        [record(0, 3, peer=1), record(1, 2, peer=3, num_tokens=5), record(2, 3, peer=1), {}],
        "call #7: rank 3 called rs_rmsnorm(num_tokens=5, hidden_size=256, dtype=float32); "
        "ranks 0-2 called rs_rmsnorm(num_tokens=4, hidden_size=256, dtype=float32)",
        (3,),
    ),
    "two causes": (
        [record(0, 1, peer=3), record(1, 5, peer=3, number=6), {}, {}],
        f"the process of rank 3 ended before it entered {SEVENTH.replace('7', '6')}; rank 1 waited 1.0 s",
        (3,),
    ),
    "disagreement and a wait in vain": (
        [record(0, 1, peer=1), record(1, 2, peer=2, num_tokens=5), {}, {}],
        "call #7: rank 2 called rs_rmsnorm(num_tokens=5, hidden_size=256, dtype=float32); "
        "ranks 0 and 1 called rs_rmsnorm(num_tokens=4, hidden_size=256, dtype=float32)",
        (2,),
    ),
    "a signal ends a long wait": (
        [record(0, 6, peer=3), record(1, 6, peer=3), record(2, 3, peer=0), {}],
        f"rank 3 had not entered {SEVENTH} when a signal ended the wait; ranks 0-2 waited 1.0 s",
        (3,),
    ),
    "a signal ends a short wait": ([record(0, 6, peer=3), {}, {}, record(3, 3, peer=0, waited_s=0.0)], None, (0,)),
    "nothing but a consequence": (
        [record(0, 3, peer=2), {}, {}, {}],
        f"rank 2 gave up before {SEVENTH}, and has not said why",
        (2,),
    ),
}


@pytest.mark.parametrize("name", JUDGEMENTS)
def test_judgement(name):
    known, verdict, culprits = JUDGEMENTS[name]
    states = [_rank_state(rank, state, "record" in state, False) for rank, state in enumerate(known)]
    diagnosis = _judge(states, None, 5.0)
    assert diagnosis.verdict == verdict or verdict is None
    assert diagnosis.culprits == culprits


# ---- words ----


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "qkv_a_proj_ag_norm(num_tokens=0, hidden_size=7168, dtype=bfloat16)"),
        (
            {"columns": 2112, "kv_columns": 512},
            "(num_tokens=0, hidden_size=7168, dtype=bfloat16, columns=2112, kv_columns=",
        ),
        ({"op": 9}, "barrier(num_tokens=0"),  # the benchmark's
        ({"variant": 10, "source": [1, 0]}, "dtype=bfloat16, residual, keep_output, input in symmetric buffer 1)"),
    ],
)
def test_call_in_words(changes, expected):
    call = {"op": 6, "num_tokens": 0, "hidden_size": 7168, "dtype": 0, "columns": 0, "variant": 0, "source": [0, -1]}
    assert expected in call_text({**call, **changes})
