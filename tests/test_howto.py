"""Programs of docs/how-to run on ranks, and what comes out is compared with the model in one process."""

import re

import pytest
from pages import programs, run_on_ranks


def replaced(text: str, **words: str) -> str:
    """Each of the words stands in the text once."""
    for old, new in words.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def test_the_ops_in_a_forward(tmp_path, device):
    program = "".join(programs("docs/how-to/raw_ops.md", "python"))  # it compares by itself
    assert run_on_ranks(tmp_path, program, device=device).count(f"rs_rmsnorm: backend {device}") == 2


# ---- CUDA graphs ----

DECODED = """
from tp_fused.reference import rms_norm

rank, world_size = dist.get_rank(), dist.get_world_size()


def of_all_ranks(tensor):
    parts = [torch.empty(tensor.shape, device="cpu") for _ in range(world_size)]
    dist.all_gather(parts, tensor.cpu())
    return [part.to(device) for part in parts]


def unfused(partial):
    residual = sum(of_all_ranks(partial))
    latent = linear(rms_norm(residual, decoder.norm, 1e-6), decoder.qkv_a)
    q_a, kv_a, k_pe = latent.split([Q_A, KV_A, K_PE], dim=1)
    latent = torch.cat([rms_norm(q_a, decoder.q_a_norm, 1e-6), rms_norm(kv_a, decoder.kv_a_norm, 1e-6), k_pe], dim=1)
    return rms_norm(residual + sum(of_all_ranks(linear(latent, decoder.o_proj))), decoder.norm, 1e-6)


def step_and_compare():
    for num_tokens in (*CAPTURE_SIZES, 3, 40):
        decoder.input.fill_(torch.nan)  # so are the rows behind the batch
        partial = torch.randn(num_tokens, HIDDEN)
        torch.testing.assert_close(decoder.step(partial), unfused(partial), atol=1e-4, rtol=1e-4)
        decoder.workspace.check()


step_and_compare()
faulted = decoder.graphs
assert sorted(faulted) == (sorted(CAPTURE_SIZES) if device == "cuda" else [])

# Rank 1 has another batch, so replays another graph: NaN, in later replays as well. Then all start again.
partial = torch.randn(5, HIDDEN)
expected = unfused(partial).argmax(-1).cpu()
try:
    for _ in range(2):
        output = decoder.step(partial[:1] if rank == 1 else partial)
        assert device == "cuda" and output.isnan().all()  # on the CPU the call has raised
    decoder.workspace.check()
    reason = "none"
except tp_fused.CollectiveFault as fault:
    reason = fault.reason
assert reason in ("disagrees", "gave up"), reason
dist.barrier()
assert torch.equal(decode(partial), expected)
step_and_compare()

# Graphs of the two workspaces that init has closed, of which the second had no fault before.
replaced = decoder.graphs
decoder.start()
if device == "cuda":
    for graph, output in (faulted[16], replaced[16]):
        output.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert output.isnan().all()
        try:
            decoder.workspace.check()  # tells of one workspace at a time
            reason = "none"
        except tp_fused.CollectiveFault as fault:
            reason = fault.reason
        assert reason == "closed", reason
    dist.barrier()
step_and_compare()
print(f"rank {rank} is through")
"""


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_cuda_graphs(tmp_path, device, num_ranks):
    """On the CPU the same code runs eagerly."""
    program = "".join(programs("docs/how-to/cuda_graphs.md", "python"))
    printed = run_on_ranks(tmp_path, program + DECODED, num_ranks=num_ranks, device=device)
    assert printed.count("is through") == num_ranks
    told = re.findall(r"rank \d called with num_tokens=(\d+), rank \d with num_tokens=(\d+)", printed)
    assert {"1", "16"} in map(set, told)  # as decode prints it


# ---- pipeline stages ----

STAGED = """
import os
from tp_fused.reference import rms_norm


def unsharded(embedding):
    global rank
    hidden, residual, own = embedding, 0, rank
    for number, ranks in enumerate(STAGES):
        for index in range(number * LAYERS_EACH, (number + 1) * LAYERS_EACH):
            shards = []
            for rank in range(len(ranks)):
                shards.append(Layer(index))
            one, residual = shards[0], residual + hidden
            latent = linear(rms_norm(residual, one.norm, 1e-6), one.qkv_a)
            q_a, kv_a, k_pe = latent.split([Q_A, KV_A, K_PE], dim=1)
            latent = torch.cat([rms_norm(q_a, one.q_a_norm, 1e-6), rms_norm(kv_a, one.kv_a_norm, 1e-6), k_pe], dim=1)
            residual = residual + sum(linear(latent, shard.o_proj) for shard in shards)
            rows = rms_norm(residual, one.norm, 1e-6)
            hidden = sum(linear(rows, shard.mlp).relu() for shard in shards)
    rank = own
    return rms_norm(residual + hidden, final_norm, 1e-6)


for backend in ("cpu", "reference"):
    os.environ["TP_FUSED_BACKEND"] = backend
    assert tp_fused.init(group, max_num_tokens=MAX_TOKENS, hidden_size=HIDDEN, dtype=torch.float32).backend == backend
    for num_tokens in (1, 3, 7, 300):
        embedding = torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(num_tokens))
        output, expected = model(embedding), unsharded(embedding)
        if stage == len(STAGES) - 1:
            torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
            print("right")
"""
UNSET = {"hidden = torch.empty(num_tokens, HIDDEN)": "hidden = torch.full((num_tokens, HIDDEN), torch.nan)"}


def test_stages_of_as_many_ranks_send_slices(tmp_path):
    program, _ = programs("docs/how-to/pipeline_stages.md", "python")
    program = replaced(program, **UNSET)  # rows that are not received have no influence
    assert run_on_ranks(tmp_path, program + STAGED, num_ranks=4).count("right") == 2 * 2 * 4


def test_stages_of_other_sizes_send_what_is_gathered(tmp_path):
    program, functions = programs("docs/how-to/pipeline_stages.md", "python")
    before, after = program[: program.index("def send")], program[program.index("layers = [") :]
    program = replaced(
        f"{before}{functions}\n\n{after}", **{"STAGES = [[0, 1], [2, 3]]": "STAGES = [[0, 1], [2, 3, 4]]"}
    )
    assert run_on_ranks(tmp_path, program + STAGED, num_ranks=5).count("right") == 3 * 2 * 4


def test_a_partial_sum_that_is_sent_is_seen(tmp_path):
    """The comparison notices what the page warns of."""
    program, _ = programs("docs/how-to/pipeline_stages.md", "python")
    wrong = {"rows = tp_fused.reduce_scatter_rows(hidden, group, residual=residual)": "rows = residual"}
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        run_on_ranks(tmp_path, replaced(program, **wrong) + STAGED, num_ranks=4)
