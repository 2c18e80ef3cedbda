"""A step that decodes a token, of a parallelized model: nothing in it that a CUDA graph cannot capture.

Without a GPU: the model and its cache are moved to torch's meta device, whose tensors have no values. What the host
reads of them, and what it copies to them, is found there.
"""

import contextlib
import functools
import re
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers", reason="needs transformers (the test extra)")

import fp8_models
import tiny_models
from tiny_models import HEADS, OTHER_MLA, make_ids

from tp_fused import groups
from tp_fused.integrations.transformers import tensor_parallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import generate

aten = torch.ops.aten
WAYS = ("all_reduce", "transport", "fused")
KINDS = ["v3", "v2_lite", *OTHER_MLA, *sorted(HEADS.keys() - {"mistral", "qwen3"})]  # their windows count on the host


class NothingOnTheHost(TorchDispatchMode):
    """Raises where values of the device's tensors are read, sizes follow from values, or devices mix."""

    READS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.bincount.default)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func in self.READS:
            raise AssertionError(f"{func} reads on the host")
        # torch's fallback for other dtypes, on CUDA: it copies the offsets to the host.
        if func is aten._grouped_mm.default and given[0].dtype != torch.bfloat16:
            raise AssertionError(f"{func} of {given[0].dtype} reads on the host")
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        copies = func in (aten._to_copy.default, aten.copy_.default)
        devices = {tensor.device.type for tensor in given + made if tensor.dim() or copies}
        if len(devices) > 1:
            raise AssertionError(f"{func} copies between {devices}")
        return out


def to_meta(model, conversation) -> None:
    """As to a GPU, but for the tensors that somebody made on the host, which stay there."""
    model.to("meta")
    for layer in conversation.cache.layers:
        for name, value in vars(layer).items():
            if isinstance(value, torch.Tensor):
                setattr(layer, name, value.to("meta"))
            elif isinstance(value, torch.device):
                setattr(layer, name, torch.device("meta"))
    conversation.token, conversation.device = conversation.token.to("meta"), torch.device("meta")


@contextlib.contextmanager
def on_meta(tp):
    """The ops' fake kernels run there; of an all-reduce there is none."""
    key = tp.group.group_name, "meta"
    unfused = mock.patch.object(tp._ways["all_reduce"], "all_reduce", torch.clone)
    with mock.patch.dict(groups._workspaces, {key: tp.workspace}), unfused, NothingOnTheHost():
        yield


def started(model, tp, way: str):
    """A conversation that has begun, so that whatever is made at first is made."""
    tp.way = way
    conversation = generate.Conversation(model, 32, torch.device("cpu"), graphs=False)
    conversation.prefill(make_ids((1, 9)))
    conversation.step()
    tp.check_tokens = "never"  # it is never made while a graph is captured
    to_meta(model, conversation)
    return conversation


def make(kind: str, **changes):
    if kind == "v3-fp8":
        return fp8_models.make_both("cpu", **changes)
    return tiny_models.make_both(kind, None, "cpu", **changes)


@torch.inference_mode()
def decode_on_meta(kind: str, way: str) -> tuple:
    _, model, tp = make(kind)
    conversation = started(model, tp, way)
    with on_meta(tp):
        return tuple(conversation.decode(2).shape)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [*KINDS, "v3-fp8"])
@pytest.mark.parametrize("world_size", [2])
def test_a_step_reads_nothing_on_the_host(pool, kind, way):
    assert pool.run(decode_on_meta, kind, way) == [(2,)] * 2


@torch.inference_mode()
def step_with_experts(kind: str, experts: str) -> str:
    _, model, tp = make(kind)
    conversation = started(model, tp, "fused")
    model.set_experts_implementation(experts)
    with on_meta(tp), pytest.raises(AssertionError) as raised:
        conversation.step()
    return generate.told(raised.value)


@pytest.mark.parametrize(("kind", "experts"), [("v3", "grouped_mm"), ("v3", "eager"), ("v3-fp8", "eager")])
@pytest.mark.parametrize("world_size", [2])
def test_what_reads_on_the_host_is_found(pool, kind, experts):
    for told in pool.run(step_with_experts, kind, experts):
        assert "reads on the host" in told


@torch.inference_mode()
def step_of_default_experts(kind: str) -> None:
    """fp8 experts are grouped by default, and tp_fused's kernels can be captured in either way."""
    _, model, tp = make(kind)
    conversation = started(model, tp, "fused")
    assert set(model.get_experts_implementation().values()) == {"grouped_mm"}
    with on_meta(tp):
        conversation.step()


@pytest.mark.parametrize("world_size", [2])
def test_grouped_fp8_experts_of_few_rows(pool):
    pool.run(step_of_default_experts, "v3-fp8")


# ---- capturing, with CUDA's calls left out ----


class Graph:
    """Captures by running: a step is then made once more, when it is replayed."""

    step, fails = None, False

    def replay(self) -> None:
        self.step()


@contextlib.contextmanager
def capture(graph, **_):
    """Its end raises as CUDA's does where something within has failed, or where the graph is told to."""
    failed = graph.fails
    try:
        with mock.patch.object(tensor_parallel, "capturing", lambda: True):
            yield
    except RuntimeError:
        failed = True
    if failed:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore")


def without_cuda(test):
    names = ("synchronize", "stream", "Stream", "current_stream")

    @functools.wraps(test)
    def wrapped(*args):
        with contextlib.ExitStack() as stack:
            for name in names:
                stack.enter_context(mock.patch.object(torch.cuda, name, mock.MagicMock()))
            stack.enter_context(mock.patch.object(torch.cuda, "CUDAGraph", Graph))
            stack.enter_context(mock.patch.object(torch.cuda, "graph", capture))
            return test(*args)

    return wrapped


@without_cuda
@torch.inference_mode()
def converse(way: str, wrong_on: int | None) -> tuple[str | None, list, list]:
    """-> why it was decoded eagerly, and the answers with graphs and without. The cache has room for two steps."""
    _, model, tp = make("v3")
    tp.way = way
    ids = make_ids((1, 9))
    answers = []
    for graphs in (True, False):
        conversation = generate.Conversation(model, 9 + 2, torch.device("cpu"), graphs)
        Graph.step = staticmethod(conversation.step)
        Graph.fails = dist.get_rank() == wrong_on
        conversation.warm_up(ids)
        if graphs:
            why = conversation.why_eager
            assert (conversation.graph is None) == (why is not None)
        conversation.prefill(ids)
        answers.append(conversation.decode(2).tolist())
    return why, *answers


@pytest.mark.parametrize("world_size", [2])
def test_a_step_is_captured(pool):
    for why, replayed, eager in pool.run(converse, "fused", None):
        assert why is None
        assert replayed == eager


@pytest.mark.parametrize("world_size", [2])
def test_gloo_is_not_captured_and_says_why(pool):
    """Not what the end of the failed capture says."""
    at = re.escape(tensor_parallel.__file__)
    for why, replayed, eager in pool.run(converse, "all_reduce", None):
        assert re.fullmatch(
            rf"rank 0 cannot capture a step: an all-reduce through gloo .* \(in tp_fused, {at}:\d+\)", why
        )
        assert replayed == eager


@pytest.mark.parametrize("world_size", [2])
def test_one_rank_that_cannot_capture_is_named_on_all(pool):
    for why, replayed, eager in pool.run(converse, "fused", 1):
        assert re.fullmatch(r"rank 1 cannot capture a step: CUDA error: .* during capture \(in .*:\d+\)", why)
        assert replayed == eager


def captured(device: str) -> dict[str, str | None]:
    """Runs on a rank: why each way was decoded eagerly."""
    _, model, tp = tiny_models.make_both("v3", None, device)
    why = {}
    for tp.way in WAYS:
        with torch.inference_mode():
            why[tp.way] = generate.talk(model, [make_ids((1, 9), device)], 4, torch.device(device))["eager"]
    return why


@pytest.mark.cuda
@pytest.mark.parametrize("world_size", [2])
def test_a_gpu_captures_the_ops(pool, device):
    for why in pool.run(captured, device):
        assert why["fused"] is None and why["transport"] is None
        assert "through gloo" in why["all_reduce"]
