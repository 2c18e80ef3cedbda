"""Answers prompts with a model of transformers on several ranks, the usual way and on tp_fused, and times both.

    python examples/generate.py                                      2 ranks, started here, a tiny random DeepSeek-V3
    python examples/generate.py --prompt "Who are you?" "And I?"     two turns of one conversation
    torchrun --nproc-per-node 8 examples/generate.py --model FOLDER --dtype bfloat16

FOLDER is a snapshot of a model hub's repository, with its tokenizer; each rank reads its part of the weights. Without
it tokens are bytes, and what a random model says means nothing. Each turn's prompt is prefilled and its answer decoded,
greedily, through one cache that holds the whole conversation.

On GPUs (`--device`) the step that decodes a token is captured in a CUDA graph and replayed. A way that cannot be
captured is decoded eagerly: a line says why and where, and the table which. In float32 both ways must say the same, or
the program exits with 1; in lower precision two tokens that are nearly tied may swap.
"""

import argparse
import contextlib
import multiprocessing.forkserver
import os
import sys
import time
import traceback
from pathlib import Path

if __name__ == "__main__" and "RANK" not in os.environ:
    # The server that `launch` takes ranks from. It imports what they need while this process does, which takes seconds.
    multiprocessing.set_forkserver_preload(["tp_fused.integrations.transformers", "tp_fused.frozen"])
    multiprocessing.forkserver.ensure_running()

import torch
import torch.distributed as dist
import torch.multiprocessing
import transformers
from presets import PRESETS, make_config, make_model
from transformers import AutoTokenizer, StaticCache

from tp_fused.integrations.transformers import load_parallel, parallelize
from tp_fused.launch import choose_device, launch, take_device

WAYS = {"all_reduce": "all-reduce", "fused": "tp_fused"}
WARM_UPS = 3

# ---- one conversation ----


class Conversation:
    """One sequence: its cache, and the step that decodes one token into it."""

    def __init__(self, model, max_length: int, device: torch.device, graphs: bool):
        self.model, self.device = model, device
        self.cache = StaticCache(config=model.config, max_cache_len=max_length)
        self.token = torch.zeros(1, 1, dtype=torch.long, device=device)  # the last one; where a graph reads and writes
        self.graph, self.why_eager = None, None if graphs else "no GPU"

    def prefill(self, ids: torch.Tensor) -> None:
        logits = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))

    def step(self) -> None:
        """The next token, from the last one."""
        self.prefill(self.token)

    def decode(self, num_tokens: int) -> torch.Tensor:
        """Tokens [num_tokens]: the one that the prefill has left, and those that follow it."""
        if self.graph is not None:
            return self.repeat(self.graph.replay, num_tokens)
        with experts_by_token(self.model, self.device):
            return self.repeat(self.step, num_tokens)

    def repeat(self, step, num_tokens: int) -> torch.Tensor:
        tokens = torch.empty(num_tokens, dtype=torch.long, device=self.device)
        for index in range(num_tokens):
            tokens[index : index + 1].copy_(self.token[0])
            step()
        return tokens

    def warm_up(self, ids: torch.Tensor) -> None:
        """Runs what decodes and captures it, then forgets what was said."""
        self.prefill(ids)
        with experts_by_token(self.model, self.device):
            self.step()
            if self.why_eager is None:
                self.capture()
        self.cache.reset()

    def capture(self) -> None:
        """On every rank or on none, so that the timings of a way are of one thing."""
        if any(getattr(layer, "is_sliding", False) for layer in self.cache.layers):
            self.why_eager = "the cache of a sliding window counts on the host"
            return
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(WARM_UPS):
                self.cache.reset()  # which has room for the conversation, not for more steps
                self.step()
            graph, why = self.try_to_capture(torch.cuda.current_stream())
        whys = [None] * dist.get_world_size()
        dist.all_gather_object(whys, why)
        self.why_eager = next((why for why in whys if why), None)
        self.graph = graph if self.why_eager is None else None

    def try_to_capture(self, stream) -> tuple:
        """-> (the graph, None) or (None, why not)"""
        graph, why = torch.cuda.CUDAGraph(), None
        try:
            # Other threads may go on using CUDA: NCCL's looks whether calls have ended.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                try:
                    self.step()
                except RuntimeError as error:  # whereupon the end of the capture may raise, and say less
                    why = told(error)
                    raise
        except RuntimeError as error:
            return None, f"rank {dist.get_rank()} cannot capture a step: {why or told(error)}"
        return graph, None


@contextlib.contextmanager
def experts_by_token(model, device: torch.device):
    """On GPUs each token's experts are multiplied as a batch, as transformers' own `generate` does when it decodes.

    Its default, grouped_mm, is made for many tokens. Except in bfloat16 on some cards, torch reads on the host how many
    of them each expert has, which no CUDA graph can capture.
    """
    before = model.get_experts_implementation()
    if device.type != "cpu":
        model.set_experts_implementation(
            {name: "batched_mm" if kind == "grouped_mm" else kind for name, kind in before.items()}
        )
    try:
        yield
    finally:
        if device.type != "cpu":
            model.set_experts_implementation(before)


def told(error: BaseException) -> str:
    """What it says first, in whose code, and where: the innermost frame outside torch."""
    frames = [
        (_package(frame), frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    package, file, line = [frame for frame in frames if frame[0] != "torch"][-1]
    said = (str(error).splitlines() or [type(error).__name__])[0]
    return f"{said} (in {package}, {file}:{line})"


def _package(frame) -> str:
    return frame.f_globals.get("__name__", "?").partition(".")[0]


def talk(model, turns: list[torch.Tensor], num_tokens: int, device: torch.device) -> dict:
    """One conversation in the way that is set: its answers, and tokens/s of prefill and decoding, on this rank."""
    max_length = sum(ids.shape[1] for ids in turns) + (num_tokens + 1) * len(turns)
    conversation = Conversation(model, max_length, device, device.type == "cuda")
    conversation.warm_up(turns[0])
    answers, prefilling, decoding = [], 0.0, 0.0
    for ids in turns:
        begin = now(device)
        conversation.prefill(ids)
        middle = now(device)
        answers.append(conversation.decode(num_tokens))
        prefilling, decoding = prefilling + middle - begin, decoding + now(device) - middle
    return {
        "answers": [answer.tolist() for answer in answers],
        "prefill": sum(ids.shape[1] for ids in turns) / prefilling,
        "decode": num_tokens * len(turns) / decoding,
        "eager": conversation.why_eager,
    }


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# ---- the job ----


class Bytes:
    """The tokenizer of a model that has none: a token is a byte."""

    eos_token_id = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


def run(args: argparse.Namespace) -> None:
    """What every rank does."""
    place, dtype = take_device(args.device), getattr(torch, args.dtype)
    transformers.logging.set_verbosity_error()
    say = print if dist.get_rank() == 0 else lambda *_: None
    if place.sentence():
        say(place.sentence())
    tokenizer = Bytes() if args.model is None else AutoTokenizer.from_pretrained(args.model)
    turns = [torch.tensor([tokenizer.encode(text)], device=place.device) for text in args.prompt]
    longest = max(ids.shape[1] for ids in turns)
    if args.model is None:
        config = make_config(args.preset, 2 * sum(ids.shape[1] + args.num_tokens for ids in turns))
        model = make_model(config, args.seed, dtype, place.device)
        tp = parallelize(model, place.group, max_num_tokens=longest, check_tokens="first")
    else:
        model, tp = load_parallel(
            args.model, place.group, max_num_tokens=longest, dtype=dtype, device=place.device, check_tokens="first"
        )
    found = {}
    with torch.inference_mode():
        for way in WAYS:
            tp.way = way
            found[way] = talk(model, turns, args.num_tokens, place.device)
            tp.workspace.check()  # a replayed graph cannot raise
    show(say, found, args, tokenizer)
    same = found["fused"]["answers"] == found["all_reduce"]["answers"]
    if not same:
        say("The two ways do not say the same." + ("" if dtype == torch.float32 else " Nearly tied tokens may swap."))
    sys.stdout.flush()
    dist.barrier()  # whoever exits with an error ends the others, and rank 0 shall have said why
    if not same and dtype == torch.float32:
        raise SystemExit(1)


def show(say, found: dict, args: argparse.Namespace, tokenizer) -> None:
    for text, answer in zip(args.prompt, found["fused"]["answers"], strict=True):
        end = answer.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in answer else len(answer)
        say(f"> {text}\n{tokenizer.decode(answer[:end])!r}\n")
    for way, title in WAYS.items():
        if found[way]["eager"] is not None:
            say(f"{title}: decoded eagerly, {found[way]['eager']}")
    say(f"{dist.get_world_size()} ranks, {args.dtype}; tokens/s on rank 0:\n\n{'':12}{'prefill':>10}{'decode':>10}")
    for way, title in WAYS.items():
        by = "CUDA graph" if found[way]["eager"] is None else "eager"
        say(f"{title:12}{found[way]['prefill']:>10.1f}{found[way]['decode']:>10.1f}  {by}")


# ---- the command line ----


def parse_arguments(argv=None) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=formatter)
    parser.add_argument("--world-size", type=int, default=int(os.environ.get("WORLD_SIZE", 2)), help="ranks (2)")
    parser.add_argument("--model", type=Path, help="folder of a model and its tokenizer (a random model)")
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="sizes of the random model (tiny)")
    parser.add_argument("--prompt", nargs="+", default=["Hello, who are you?", "And what do you do all day?"])
    parser.add_argument("--num-tokens", type=int, default=32, help="length of each answer (32)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: GPUs if any")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (0)")
    args = parser.parse_args(argv)
    for name in ("world_size", "num_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if not -(2**63) <= args.seed < 2**64:
        parser.error(f"--seed must fit into 64 bits, got {args.seed}")
    if not all(args.prompt):
        parser.error("--prompt: a turn is empty")
    if args.model is not None and not (args.model / "config.json").is_file():
        parser.error(f"--model: there is no {args.model / 'config.json'}")
    try:
        args.device = choose_device(args.device)
    except ValueError as error:
        parser.error(f"--device: {error}")
    return args


def main() -> None:
    args = parse_arguments()
    try:
        launch(run, args.world_size, args)
    except torch.multiprocessing.ProcessExitedException as error:
        sys.exit(1 if error.exit_code == 1 else f"a rank ended: {error}")


if __name__ == "__main__":
    main()
