"""Runs vLLM on two CPU ranks in a process of its own and prints what came out; `tests/engines/test_vllm.py` starts it.

    python vllm_engine.py FOLDER_OF_A_MODEL PROMPTS.json [drop]

drop: leaves a reduction out, to see that it is seen.
"""

import json
import sys


def seen(worker) -> dict:
    """On a rank: which classes run, and what they have called."""
    model = worker.get_model()
    module = sys.modules.get("tp_fused.integrations.vllm.model")
    return {
        "layers": sorted({type(layer).__name__ for layer in model.model.layers}),
        "calls": dict(module.calls) if module else {},
    }


def drop_a_reduction(worker) -> None:
    """On a rank: the first layer's attention reaches the residual of its own rank alone."""
    layer = worker.get_model().model.layers[0]
    if worker.rank == 1:
        layer.self_attn.o_proj.register_forward_hook(lambda _module, _inputs, output: (output[0] * 0, *output[1:]))


def main(folder: str, prompts: str, drop: str = "") -> None:
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=folder,
        tensor_parallel_size=2,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_batched_tokens=128,
        enable_prefix_caching=False,
        compilation_config={"custom_ops": ["all", "-rotary_embedding"]},  # its CPU kernel is wrong for 3-D queries
    )
    if drop:
        engine.collective_rpc(drop_a_reduction)
    with open(prompts) as file:
        tokens = [{"prompt_token_ids": prompt} for prompt in json.load(file)]
    outputs = engine.generate(
        tokens, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=1, detokenize=False)
    )
    generated = [output.outputs[0] for output in outputs]
    result = {
        "tokens": [list(output.token_ids) for output in generated],
        "logprobs": [
            [position[token].logprob for token, position in zip(output.token_ids, output.logprobs, strict=True)]
            for output in generated
        ],
        "ranks": engine.collective_rpc(seen),
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
