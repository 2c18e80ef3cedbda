"""The ops as torch sees them: schemas, fake kernels, and whole graphs with a dynamic token count."""

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from programs import EPS, LATENT, OPS, Call, random, same_bits
from ranks import outcome, workspace
from test_border import BAD_CALLS, with_changes

import tp_fused

pytestmark = pytest.mark.preload("warm_compiler")

SIZES = {"max_num_tokens": 300, "hidden_size": 256, "latent_size": sum(LATENT)}


def schema_arguments(call: Call, rank: int, world_size: int) -> tuple[list, dict]:
    """What `torch.ops.tp_fused.<op>` takes for this call: arguments in the schema's order, and keywords."""
    given = call.arguments(rank, world_size) | {"group_name": dist.group.WORLD.group_name}
    schema = getattr(torch.ops.tp_fused, call.op).default._schema
    names = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    return [given.pop(name) for name in names], given


TEST_UTILS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def check_op(backend: str, device: str, calls: list[Call]) -> None:
    """Runs on a rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with workspace(backend, device, **SIZES):
        for call in calls:
            arguments, keywords = schema_arguments(call, rank, world_size)
            # torch cannot compare fp8 inputs before and after; test_ops.py does.
            utils = TEST_UTILS[1:] if call.op == "qkv_a_proj_ag_fp8" else TEST_UTILS
            op = getattr(torch.ops.tp_fused, call.op).default
            torch.library.opcheck(op, arguments, keywords, test_utils=utils)


OPTIONS = {
    "rs_rmsnorm": [{}, {"complete": True}],
    "rs_rmsnorm_fp8": [{}, {"scale_layout": "column", "keep_output": True}],
    "qkv_a_proj_ag": [{}, {"bias": True, "complete": True}],
    "qkv_a_proj_ag_fp8": [{}, {"complete": True}],
    "qkv_a_proj_ag_norm": [{}, {"complete": True}],
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("num_tokens", [1, 9])
@pytest.mark.parametrize("world_size", [2])
def test_opcheck(pool, backend, device, op, num_tokens, world_size):
    calls = [
        Call(op, num_tokens, hidden_size=256, residual=residual, device=device, options=options)
        for residual, options in zip(("full", "slice"), OPTIONS.get(op, [{}, {}]), strict=True)
    ]
    pool.run(check_op, backend, device, calls)


def layer(input, residual, norm, projection, q_a_weight, kv_a_weight, attention_out):
    """What the ops do in a decoder layer, each of them once; the residual stays scattered."""
    num_tokens = input.shape[0]
    hidden, residual = tp_fused.rs_rmsnorm(input, residual, norm, EPS)
    latent = tp_fused.qkv_a_proj_ag(hidden, projection, num_tokens)
    q_a, kv_a, k_pe = tp_fused.qkv_a_proj_ag_norm(hidden, projection, q_a_weight, kv_a_weight, num_tokens, EPS)
    mixed = torch.cat([q_a, kv_a, k_pe], dim=1) + latent
    output, residual = tp_fused.rs_rmsnorm_ag(attention_out * mixed.mean(1, keepdim=True), residual, norm, EPS)
    q, scale, residual, _ = tp_fused.rs_rmsnorm_fp8(output, residual, norm, EPS)
    rows = tp_fused.reduce_scatter_rows(output)
    return latent, residual, q, scale, tp_fused.all_gather_rows(rows, num_tokens)


def layer_inputs(num_tokens: int, device: str) -> list[torch.Tensor]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    call = Call("rs_rmsnorm", num_tokens, hidden_size=256)
    own = call.rows(rank, world_size)
    tensors = [
        call.input(rank),
        random(f"residual {num_tokens}", (num_tokens, 256), torch.float32)[own].contiguous(),
        random("norm", (256,), torch.float32),
        random("projection", (sum(LATENT), 256), torch.float32, 256**-0.5),
        *(random(f"latent norm {size}", (size,), torch.float32) for size in LATENT[:2]),
        random(f"attention {rank} {num_tokens}", (num_tokens, 256), torch.float32),
    ]
    return [tensor.to(device) for tensor in tensors]


def compile_layer(backend: str, device: str, compiler: str, token_counts: list[int]) -> int:
    """Runs on a rank: the compiled layer against the eager one; how many graphs were made."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)
    with workspace(backend, device, timeout_s=100.0, **SIZES):  # ranks compile at their own speed
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        for num_tokens in token_counts:
            inputs = layer_inputs(num_tokens, device)
            expected = layer(*inputs)
            for tensor in (inputs[0], inputs[1], inputs[6]):
                torch._dynamo.mark_dynamic(tensor, 0)
            outputs = compiled(*inputs)
            if compiler == "inductor":  # adds up its own pieces in another order
                for output, wanted in zip(outputs, expected, strict=True):
                    assert (output.shape, output.stride()) == (wanted.shape, wanted.stride())
                    torch.testing.assert_close(output.float(), wanted.float(), rtol=0.07, atol=1e-4)
            else:
                same_bits(outputs, expected)
    return counter.frame_count


@pytest.mark.parametrize("world_size", [2])
def test_compile_with_a_dynamic_token_count(pool, backend, device, world_size):
    graphs = pool.run(compile_layer, backend, device, "aot_eager", [17, 64, 257, 4])
    assert graphs == [1, 1]


@pytest.mark.parametrize("world_size", [2])
def test_compile_with_inductor(pool, device, world_size):
    graphs = pool.run(compile_layer, device, device, "inductor", [17, 64], timeout_s=240)
    assert graphs == [1, 1]


def fake_shapes(device: str) -> list:
    """Runs on a rank: the shapes that fake kernels give, for a rank that owns no rows too."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with workspace(device, device, **SIZES):
        for op in OPS:
            call = Call(op, 2, hidden_size=256, device=device)
            arguments, keywords = schema_arguments(call, rank, world_size)
            outputs = call.run(rank, world_size)
            with torch._subclasses.FakeTensorMode() as mode:
                fake = [mode.from_tensor(a) if torch.is_tensor(a) else a for a in arguments]
                result = getattr(torch.ops.tp_fused, op)(*fake, **keywords)
            result = result if isinstance(result, (tuple, list)) else (result,)
            seen = [(r.shape, r.dtype, r.stride(), r.device.type) for r in result]
            wanted = [(o.shape, o.dtype, o.stride(), o.device.type) for o in outputs]
            assert seen == wanted, f"{op}: {seen} instead of {wanted}"


@pytest.mark.parametrize("world_size", [3])
def test_fake_kernels_of_a_rank_without_rows(pool, device, world_size):
    pool.run(fake_shapes, device)


# What only the call knows: strides, what torch's dispatcher refuses, and what the workspace and this rank are made for.
AT_THE_CALL = {
    *(name for name in BAD_CALLS if "strided" in name or "another rank" in name or "64 bits" in name),
    *("input transposed", "input too wide", "too many tokens", "scales of neither layout"),
    *("residual neither full nor slice", "residual of another width", "projection of too many columns"),
    *("projection of rows wider than 32 bits", "weight on another device"),
}


def traced(device: str, names: list[str]) -> list:
    """Runs on a rank: what the fake kernels say of bad calls."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    errors = []
    with workspace(device, device, latent_size=sum(LATENT)):
        for name in names:
            op, changes, *_ = BAD_CALLS[name]
            right = Call(op, 4, hidden_size=256, residual="full", device=device).arguments(rank, world_size)
            given = with_changes(right, changes, device)
            given["group_name"] = given.pop("group", dist.group.WORLD.group_name)
            with torch._subclasses.FakeTensorMode() as mode:
                fake = {key: mode.from_tensor(one) if torch.is_tensor(one) else one for key, one in given.items()}
                errors.append(outcome(getattr(torch.ops.tp_fused, op), **fake)[0])
    return errors


@pytest.mark.parametrize("world_size", [2])
def test_bad_calls_are_refused_when_they_are_traced(pool, device):
    """In the words of eager calls: test_border.py has them."""
    names = [name for name in BAD_CALLS if name not in AT_THE_CALL]
    for name, error in zip(names, pool.run(traced, device, names)[1], strict=True):
        *_, kind, message = BAD_CALLS[name]
        with pytest.raises(kind, match=message):
            raise error if error is not None else AssertionError(f"{name}: no error was raised")


def only_one_rank_uses_it(device: str) -> None:
    """Runs on a rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    call = Call("rs_rmsnorm_ag", 4, hidden_size=256, device=device)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(input, weight):
        output, _ = tp_fused.rs_rmsnorm_ag(input, None, weight, EPS)
        return output.sum() if rank == 0 else (input * 2).sum()

    with workspace(device, device, timeout_s=5.0, **SIZES) as made:
        given = call.arguments(rank, world_size)
        step(given["input"], given["weight"])
        if device == "cuda":
            torch.cuda.synchronize()
        made.check()


@pytest.mark.parametrize("world_size", [2])
def test_compiler_keeps_a_call_whose_results_are_unused(pool, device):
    """As with any collective, the peers wait for it."""
    pool.run(only_one_rank_uses_it, device)
