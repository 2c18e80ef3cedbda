"""tp_fused.compile_pass with an Inductor that tells a pass less, or takes one pass alone: of torch 2.10 to 2.12.

What those lack is taken out of the torch that is installed: what is left of it calls passes as they do.
"""

import contextlib
import importlib
import pickle
import sys

import pytest
import torch
import torch.distributed as dist
from compile_pass_ranks import FrontEnd, calls, compiled, random, rank_of_its_own, reduced
from ranks import workspace

import tp_fused
from tp_fused import compile_pass

pytestmark = pytest.mark.preload("warm_compiler")

HIDDEN, NUM_TOKENS = 64, 6
TOLD, LISTS = "CustomInferenceAwareGraphPass", "get_custom_graph_passes"  # what torch lacks; both are Inductor's
LACKING = {"2.10 and 2.11": (TOLD, LISTS), "2.12": (LISTS,), "as it is": ()}


@contextlib.contextmanager
def without(*lacking: str):
    """compile_pass, imported with a torch without these. An Inductor without lists calls what its setting is."""
    from torch._inductor import codecache, custom_graph_pass
    from torch._inductor.fx_passes import post_grad

    with pytest.MonkeyPatch.context() as patch:
        if TOLD in lacking:
            patch.delattr(custom_graph_pass, TOLD, raising=False)
        if LISTS in lacking and hasattr(custom_graph_pass, LISTS):
            for module in (codecache, custom_graph_pass, post_grad):
                patch.setattr(module, LISTS, lambda setting: () if setting is None else (setting,))
        patch.setattr(tp_fused, "compile_pass", compile_pass)  # as it is to be again
        for name in [name for name in sys.modules if name.startswith(compile_pass.__name__)]:
            patch.delitem(sys.modules, name)
        yield importlib.import_module(compile_pass.__name__)


# ---- training and inference ----


def normed(rows, weight):
    return rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def layer(x, residual, weight):
    return normed(residual + reduced(x * 2), weight)


def inputs() -> tuple[torch.Tensor, ...]:
    x, residual = random("x", NUM_TOKENS, HIDDEN, own=True), random("residual", NUM_TOKENS, HIDDEN)
    return x, residual, 1 + random("weight", HIDDEN)


def run_training_and_inference(lacking: tuple[str, ...]) -> list[tuple[list[str], str]]:
    """Runs on a rank: the calls of the first graph, and why it was left as it is."""
    told = []
    with without(*lacking) as made:
        for training in (False, True):
            given = inputs()
            with compiled(layer, sizes={"hidden_size": HIDDEN}, made=made.TpFusedPass) as (function, rewriting, graphs):
                with torch.set_grad_enabled(training):
                    output = function(*given[:2], given[2].requires_grad_(training))
                    torch.testing.assert_close(output, layer(*inputs()), rtol=1e-5, atol=1e-5)
                told.append((calls(graphs[0]), rewriting.report().graphs[0].because))
    return told


@pytest.mark.parametrize("torch_version", LACKING)
@pytest.mark.parametrize("world_size", [2])
def test_graphs_of_training_are_left(pool, torch_version):
    for inference, training in pool.run(run_training_and_inference, LACKING[torch_version], timeout_s=280):
        assert inference == (["rs_rmsnorm_ag"], "")
        assert training == (["all_reduce_"], "the graph is traced for training: call the model under torch.no_grad()")


def branches(x, weight):
    return torch.cond(x.sum() > 0, lambda x, w: (x @ w).tanh(), lambda x, w: (x @ w).sin(), (x, weight))


def no_grad_inside(x, weight):
    with torch.no_grad():
        return (x @ weight).tanh()


def what_a_pass_finds(lacking: tuple[str, ...]) -> dict[str, set[bool]]:
    """Runs on a rank: what a pass takes the graphs of a program for, forwards, backwards and of branches."""
    found = {}
    with without(*lacking), rank_of_its_own():
        inductor = importlib.import_module("tp_fused.compile_pass.inductor")

        class Asking(inductor.GraphPass):
            def __call__(self, graph, is_inference=None):
                self.found.append(inductor.is_inference(is_inference))

            def uuid(self):
                return None

        for program in (branches, no_grad_inside):
            for training in (False, True):
                torch._dynamo.reset()
                asking = Asking()
                asking.found, asking.options = [], {"post_grad_custom_pre_pass": asking}
                x, weight = random("x", 4, 4), random("weight", 4, 4).requires_grad_()
                with torch.set_grad_enabled(training):
                    output = torch.compile(program, fullgraph=True, backend=FrontEnd(asking))(x, weight)
                    if output.requires_grad:
                        output.sum().backward()
                found[f"{program.__name__} {training}"] = set(asking.found)
                assert len(asking.found) >= 3 * (1 + training) if program is branches else asking.found
        with pytest.raises(TypeError, match="is_inference has to be given"):
            inductor.is_inference(None)
    return found


@pytest.mark.parametrize("torch_version", LACKING)
@pytest.mark.parametrize("world_size", [1])
def test_every_graph_is_taken_for_what_it_is(pool, torch_version):
    """A graph of training without grad mode's being on, and the graphs of branches, whose inputs have other names."""
    (found,) = pool.run(what_a_pass_finds, LACKING[torch_version], timeout_s=280)
    assert found == {
        "branches False": {True},
        "branches True": {False},
        "no_grad_inside False": {True},
        "no_grad_inside True": {True},
    }


# ---- several passes ----


def two_groups(x, residual, weight):
    """Two layers, whose sums are over groups of the same ranks."""
    total = residual + reduced(x * 3, _other[0])
    return layer(x, residual, weight), normed(total, weight)


_other: list[dist.ProcessGroup] = []


def run_installed(lacking: tuple[str, ...]) -> tuple[list[str], list[str], list]:
    """Runs on a rank: two groups' passes are installed beside one that is set already."""
    from torch._inductor import config, custom_graph_pass

    seen, uuids = [], []

    class Mine(custom_graph_pass.CustomGraphPass):
        def __call__(self, graph):
            seen.extend(calls(graph))

        def uuid(self):
            return "mine"

    mine, sizes = Mine(), {"hidden_size": HIDDEN, "timeout_s": 100.0}
    _other[:] = [dist.new_group()]
    with (
        without(*lacking) as made,
        workspace("cpu", **sizes),
        workspace("cpu", group=_other[0], **sizes),
        rank_of_its_own(),
    ):
        with config.patch(post_grad_custom_pre_pass=mine):
            for group in (None, *_other):
                made.install(group)
                uuids.append(identity(config.post_grad_custom_pre_pass))
            front = FrontEnd()
            function = torch.compile(two_groups, fullgraph=True, backend=front)
            torch.testing.assert_close(function(*inputs()), two_groups(*inputs()), rtol=1e-5, atol=1e-5)
            reports = made.report().graphs
            assert [(len(each.rewritten), len(each.left)) for each in reports] == [(1, 1), (1, 0)], str(made.report())
            made.uninstall()
            assert config.post_grad_custom_pre_pass is mine
            # One whose code is not known has nothing cached, whatever the other ones are.
            config.post_grad_custom_pre_pass = lambda graph: None
            made.install()
            uuids.append(identity(config.post_grad_custom_pre_pass))
            made.uninstall()
        return calls(front.graphs[0]), seen, uuids


def identity(setting) -> bytes | None:
    """What torch up to 2.12 has of a setting in the key of its cache: none, where it is of another class."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    assert isinstance(setting, CustomGraphPass)
    uuid = setting.uuid()
    return uuid and pickle.dumps(uuid)


@pytest.mark.parametrize("torch_version", LACKING)
@pytest.mark.parametrize("world_size", [2])
def test_installed_beside_others(pool, torch_version):
    ranks = pool.run(run_installed, LACKING[torch_version], timeout_s=280)
    for graph, seen, uuids in ranks:
        assert graph == ["rs_rmsnorm_ag", "rs_rmsnorm_ag"]
        assert seen == ["all_reduce", "all_reduce"]  # before the graph was rewritten
        assert len({*uuids}) == 3 and uuids[-1] is None and None not in uuids[:2]
    assert ranks[0][2][:2] != ranks[1][2][:2]  # code belongs to one rank
