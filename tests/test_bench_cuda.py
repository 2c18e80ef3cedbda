"""The benchmark's CUDA programs without a card: on one rank, with stand-ins for what torch has on CUDA only."""

import contextlib
import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem

pytest.importorskip("typer", reason="the bench extra is not installed")

import bench.timing
import tp_fused
from bench import cases, fp8, projections
from bench.context import Context
from bench.options import Options
from bench.transports import OverSymmMem, PeerCopies
from tp_fused import launch


@pytest.fixture
def context():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    context = Context(Options(ops=("chain",), world_size=1, tokens=(6,), hidden=512, latent=96, kv_lora=32, rope=32))
    yield context
    context.close()
    dist.destroy_process_group()


class Symm:
    """torch.ops.symm_mem for one rank: what its ops ask of their arguments, and sums of one."""

    def reduce_scatter_out(self, input, group_name, split_last_dim, output):
        assert input.dim() == output.dim() == 1 and not split_last_dim and group_name
        return output.copy_(input)

    def two_shot_all_reduce_(self, input, reduce_op, group_name):
        assert reduce_op == "sum" and group_name
        return input

    def one_shot_all_reduce(self, input, reduce_op, group_name):
        return self.two_shot_all_reduce_(input, reduce_op, group_name).clone()


def test_torch_symm_mem_computes_the_sum_of_the_case(context, monkeypatch):
    monkeypatch.setattr(torch.ops, "symm_mem", Symm())
    case = cases.RsRmsnorm(context, 6)
    program = case.baseline("symm")
    assert case.resembles(program.call(), program.expected())
    assert torch.equal(program.call()[0], case.expected_sum(None))


@pytest.mark.parametrize("name", ["twoshot", "oneshot"])
@pytest.mark.parametrize("kind", [cases.RsRmsnormAg, fp8.RsRmsnormAgFp8, projections.Chain, fp8.MlaPrologueFp8])
def test_all_reduce_of_torch_symm_mem_finds_a_fresh_input_every_time(context, monkeypatch, kind, name):
    monkeypatch.setattr(torch.ops, "symm_mem", Symm())
    case = kind(context, 6)
    program = case.baseline(name)
    for _ in range(2):
        program.prepare()
        assert case.resembles(program.call(), case.fused())


def test_symm_is_left_out_where_the_ranks_do_not_divide_the_tokens(context, monkeypatch):
    case = cases.RsRmsnorm(context, 6)
    monkeypatch.setattr(context, "world_size", 4)
    assert case.baseline("symm") is None


def test_two_shot_leaves_the_input_of_the_case_alone(context):
    input = torch.ones(6, 512, dtype=torch.bfloat16)
    OverSymmMem(context, 6, input).scratch.zero_()
    assert input.eq(1).all()


class Peers:
    """A rendezvous of ranks whose memory lies in this process."""

    def __init__(self, memories):
        self.memories = memories

    def get_buffer(self, rank, shape, dtype):
        assert self.memories[rank].shape == shape and self.memories[rank].dtype == dtype
        return self.memories[rank]


def test_copies_bring_every_peers_rows_and_take_turns(context, monkeypatch):
    """Three ranks with 7 tokens, all but rank 0 filled by hand."""
    monkeypatch.setattr(context, "world_size", 3)
    monkeypatch.setattr(context, "barrier", lambda: None)
    memories = []

    def empty(*shape, dtype, device):
        memories.extend(torch.full(shape, float("nan"), dtype=dtype, device=device) for _ in range(3))
        return memories[0]

    monkeypatch.setattr(symm_mem, "empty", empty)
    monkeypatch.setattr(symm_mem, "rendezvous", lambda memory, name: Peers(memories))
    via = PeerCopies(context, 7, 5)
    for turn in itertools.islice(itertools.cycle((0, 1)), 3):
        rows = torch.randn(7, 5).to(torch.bfloat16)
        via.next_rows().copy_(rows[tp_fused.row_slice(7, 0, 3)])
        for peer in (1, 2):
            own = tp_fused.row_slice(7, peer, 3)
            memories[peer].fill_(float("nan"))[turn, : own.stop - own.start] = rows[own]
        assert torch.equal(via.all_gather(), rows)


def test_copies_resemble_the_fused_op(context, monkeypatch):
    monkeypatch.setattr(context, "barrier", lambda: None)
    monkeypatch.setattr(symm_mem, "empty", lambda *shape, **options: torch.empty(*shape, **options))
    monkeypatch.setattr(symm_mem, "rendezvous", lambda memory, name: Peers([memory]))
    case = projections.QkvAProjAg(context, 6)
    assert case.resembles(case.baseline("copies").call(), case.fused())


def scaled_mm(rows, weight, scale_a, scale_b, out_dtype, out=None):
    """torch._scaled_mm with what cuBLAS asks for: a multiple of 4 rows, column-major scales, one for each block."""
    (height, depth), width = rows.shape, weight.shape[1]
    assert height % 4 == 0 and weight.t().is_contiguous()
    assert scale_a.shape == (height, depth // 128) and scale_a.stride() == (1, height)
    assert scale_b.shape == (depth // 128, -(-width // 128)) and scale_b.t().is_contiguous()
    right = tp_fused.reference.project_fp8(rows, scale_a, weight.t(), scale_b.t()).to(out_dtype)
    return right if out is None else out.copy_(right)


@pytest.mark.parametrize("num_tokens", [1, 4, 6])
def test_scaled_mm_gets_what_cublas_asks_for(context, monkeypatch, num_tokens):
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    case = fp8.QkvAProjAgFp8(context, num_tokens)
    assert case.resembles(case.baseline("scaled_mm").call(), case.fused())
    assert case.resembles((case.scaled_mm()(),), (case.project_exactly(),))


@pytest.mark.parametrize(("ranks_per_card", "order"), [(1, "product gather"), (8, "product meet gather")])
def test_gathers_wait_for_the_products_of_ranks_that_share_a_card(context, monkeypatch, ranks_per_card, order):
    happened, gather = [], tp_fused.all_gather_rows
    monkeypatch.setattr(
        torch, "_scaled_mm", lambda *args, **kwargs: happened.append("product") or scaled_mm(*args, **kwargs)
    )
    monkeypatch.setattr(tp_fused, "all_gather_rows", lambda *args: happened.append("gather") or gather(*args))
    monkeypatch.setattr(context, "meet", lambda: happened.append("meet"))
    monkeypatch.setattr(context, "ranks_per_card", ranks_per_card)
    fp8.QkvAProjAgFp8(context, 4).baseline("scaled_mm").call()
    assert happened == order.split()


@pytest.mark.parametrize(("num_tokens", "cuda", "runs"), [(4, True, True), (6, True, False), (4, False, False)])
def test_copies_of_fp8_products_where_torch_writes_them_in_place(context, monkeypatch, num_tokens, cuda, runs):
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(context, "barrier", lambda: None)
    monkeypatch.setattr(symm_mem, "empty", lambda *shape, **options: torch.empty(*shape, **options))
    monkeypatch.setattr(symm_mem, "rendezvous", lambda memory, name: Peers([memory]))
    available = dataclasses.replace(fp8.BASELINES["scaled_mm"], available=lambda context: cuda)
    monkeypatch.setitem(fp8.BASELINES, "scaled_mm", available)
    case = fp8.QkvAProjAgFp8(context, num_tokens)
    program = case.baseline("copies")
    assert (program is not None) == runs
    assert not runs or case.resembles(program.call(), case.fused())


@pytest.fixture
def on_hopper(context, monkeypatch):
    """The calls of torch's product with block scales, and of the ranks' meeting, by name, in order."""
    happened = []
    monkeypatch.setattr(
        torch, "_scaled_mm", lambda *args, **kwargs: happened.append("product") or scaled_mm(*args, **kwargs)
    )
    monkeypatch.setattr(context, "meet", lambda: happened.append("meet"))
    available = dataclasses.replace(fp8.BASELINES["scaled_mm"], available=lambda context: True)
    monkeypatch.setitem(fp8.BASELINES, "scaled_mm", available)
    return happened


FP8_PROGRAMS = [
    *((fp8.QkvAProjAgNormFp8, name) for name in ("dist", "own")),
    *((fp8.MlaPrologueFp8, name) for name in ("dist", "own", "dist-rs", "own-rs")),
]


@pytest.mark.parametrize("num_tokens", [1, 4, 6])
@pytest.mark.parametrize(("kind", "name"), FP8_PROGRAMS)
def test_unfused_fp8_programs_multiply_as_cublas_wants(context, on_hopper, kind, name, num_tokens):
    case = kind(context, num_tokens)
    program = case.baseline(name)
    if program.prepare:
        program.prepare()
    assert case.resembles(program.call(), case.fused()) and on_hopper == ["product"]
    context.ranks_per_card = 8
    if program.prepare:
        program.prepare()
    assert case.resembles(program.call(), case.fused()) and on_hopper[1:] == ["product", "meet"]


def test_no_rows_are_not_multiplied(context, on_hopper):
    case = fp8.MlaPrologueFp8(context, 0)
    assert [len(output) for output in case.baseline("own-rs").call()] == [0] * 5 and not on_hopper


@pytest.mark.parametrize("name", ["own", "own-rs"])
def test_compiled_quantisation_writes_as_cublas_wants(context, on_hopper, name):
    context.options = dataclasses.replace(context.options, compile=True)
    case = fp8.MlaPrologueFp8(context, 6)
    assert case.resembles(case.baseline(name).call(), case.fused()) and on_hopper == ["product"]


def test_host_time_is_that_of_a_call(context, monkeypatch):
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    program = cases.RsRmsnorm(context, 6).programs()["fused"]
    host = bench.timing.host_time(context, program, calls=20)
    assert 0 < host.fastest <= host.slowest < 1 and 0 < host.empty < 1


def test_calls_and_empty_calls_take_turns(context, monkeypatch):
    """So that a busy machine delays both alike; the slowest rank's of both."""
    happened, clock = [], itertools.count()
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: happened.extend(["launch"] * 2))
    monkeypatch.setattr(bench.timing, "time", SimpleNamespace(perf_counter=lambda: next(clock) + len(happened)))
    monkeypatch.setattr(context, "host_reduce", lambda mine: torch.tensor([mine, [2.0, -2.0, 3.5]]).amax(0))
    program = bench.timing.Program(lambda: happened.append("call") or ())
    host = bench.timing.host_time(context, program, calls=3)
    assert happened == ["call", *["call", "launch", "launch"] * 3]
    # Each pair of looks at the clock is a second apart, a call takes one more, a launch two.
    assert (host.slowest, host.fastest, host.empty) == (2.0, 2.0, 3.5)


def test_an_empty_call_makes_what_the_op_returns_and_launches_once(monkeypatch):
    launched = []
    monkeypatch.setattr(torch.cuda, "_sleep", launched.append)
    outputs = (torch.ones(3, 8, dtype=torch.bfloat16), torch.ones(2, 1))
    made = bench.timing.empty_call(outputs)()
    assert [(tensor.shape, tensor.dtype) for tensor in made] == [(tensor.shape, tensor.dtype) for tensor in outputs]
    assert launched == [0] and not {tensor.data_ptr() for tensor in made} & {tensor.data_ptr() for tensor in outputs}


@pytest.mark.parametrize("kind", [cases.RsRmsnorm, cases.RsRmsnormAg, fp8.QkvAProjAgFp8])
def test_a_bare_barrier_returns_nothing(context, monkeypatch, kind):
    met = []
    monkeypatch.setattr(context, "barrier", lambda: met.append(True))
    program = kind(context, 6).baseline("barrier")
    assert program.call() == program.expected() == () and met == [True]


@pytest.mark.parametrize(("seconds", "calls"), [(8e-6, 3000), (2e-4, 500), (9e-4, 200)])
def test_more_calls_are_timed_of_short_ones(seconds, calls):
    assert bench.timing.host_calls(seconds) == calls


class Graphs:
    """CUDA graphs without a card: what is captured is called, and a replay takes as long as it would there."""

    def __init__(self, monkeypatch, seconds: float):
        """seconds: of a call."""
        self.captured, self.seconds = [], seconds
        nothing = contextlib.nullcontext
        stand_ins = {"CUDAGraph": nothing, "Event": self.event, "Stream": self.stream, "stream": nothing}
        stand_ins |= {"current_stream": nothing, "synchronize": lambda: None, "graph": self.capture}
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    def event(self, enable_timing):
        elapsed_ms = self.captured[-1].calls * self.seconds * 1e3
        return SimpleNamespace(record=lambda: None, elapsed_time=lambda stop: elapsed_ms)

    @contextlib.contextmanager
    def capture(self, graph, stream, capture_error_mode):
        self.captured.append(SimpleNamespace(calls=0))
        graph.replay = lambda: None
        yield

    def call(self):
        if self.captured:
            self.captured[-1].calls += 1
        return torch.empty(1)


@pytest.mark.parametrize(
    ("seconds", "slowest", "calls"),
    [
        (0.0, 0.0, [8, 32]),
        (10e-6, 20e-6, [8, 32]),
        (93e-6, 93e-6, [8, 32]),
        (200e-6, 201e-6, [8, 14]),
        (700e-6, 700e-6, [8]),
        (10e-6, 17e-3, [8]),
    ],
)
def test_short_calls_share_a_graph_with_more_on_all_ranks_alike(context, monkeypatch, seconds, slowest, calls):
    graphs = Graphs(monkeypatch, seconds)
    monkeypatch.setattr(context, "meet", lambda: None)
    monkeypatch.setattr(context, "host_reduce", lambda mine: torch.tensor([*mine, slowest]).amax(0, keepdim=True))
    clock = bench.timing.CudaClock()
    loaded = clock.load(bench.timing.Program(graphs.call), context)
    assert [graph.calls for graph in graphs.captured] == calls and loaded.calls == calls[-1]
    sample, result = clock.sample(loaded, context.meet)
    assert clock.seconds([sample]) == pytest.approx([seconds]) and result is loaded.result


def load_a_graph(kib: int, device: str) -> tuple[int, int]:
    """Runs on a rank, alone on a card: the calls in a graph of calls that fill so much, and the bytes that it keeps."""
    context = SimpleNamespace(meet=lambda: None, settle=torch.cuda.synchronize, host_reduce=torch.tensor)

    def call():
        return torch.empty(kib, 2**10, dtype=torch.uint8, device=device).zero_()

    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    loaded = bench.timing.CudaClock().load(bench.timing.Program(call), context)
    torch.cuda.empty_cache()
    return loaded.calls, torch.cuda.memory_reserved() - before


@pytest.mark.cuda
@pytest.mark.parametrize(("kib", "short"), [(64, True), (2**20, False)])
def test_a_graph_keeps_the_memory_of_two_calls(pools, device, kib, short):
    [(calls, reserved)] = pools(1).run(load_a_graph, kib, device)
    assert (calls == 32) == short
    assert reserved <= 2 * (kib * 2**10 + 2**21)  # torch takes 2 MiB at a time from the card


@pytest.mark.parametrize(
    ("cards", "rank", "world_size", "card", "ranks_per_card"),
    [(8, 5, 8, 5, 1), (1, 5, 8, 0, 8), (2, 3, 4, 1, 2), (4, 2, 3, 2, 1), (3, 7, 8, 1, 3)],
)
def test_ranks_share_cards_where_there_are_fewer(monkeypatch, cards, rank, world_size, card, ranks_per_card):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "card")
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: world_size)
    monkeypatch.setattr(launch, "_nccl_group", lambda: "nccl")
    monkeypatch.setattr(launch, "default_group", lambda: "gloo")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    place = launch.take_device("cuda")
    assert (place.device, place.ranks_per_card) == (torch.device("cuda", card), ranks_per_card)
    assert (place.group == "nccl") == (ranks_per_card == 1) == (place.sentence() is None)
    if ranks_per_card > 1:
        assert place.sentence() == f"{ranks_per_card} ranks share a card, without MPS: right results, no valid timings"


@pytest.mark.parametrize(
    ("asked", "available", "compiled", "chosen"),
    [
        ("auto", True, True, "cuda"),
        ("auto", True, False, "cpu"),
        ("auto", False, True, "cpu"),
        ("cpu", True, True, "cpu"),
        ("cuda", True, False, "cuda"),
    ],
)
def test_the_card_is_chosen_where_it_can_be_used(monkeypatch, asked, available, compiled, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(launch._C, "cuda_compiled", lambda: compiled)
    assert launch.choose_device(asked) == chosen


def test_a_card_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no card"):
        launch.choose_device("cuda")
