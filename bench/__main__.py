"""`python -m bench OP`: checks an op on every rank, then times it beside the unfused program.

`python -m bench plot FILE.json...` draws what runs have left. torch is imported when ranks are to run: help, and what
is wrong with an option, come at once.
"""

import dataclasses
import functools
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from . import catalog, goals, model, multi, pages, tables
from . import options as run_options
from .baselines import BASELINES
from .results import RESULTS

HELP = """Times tp_fused's ops, each beside other programs of the same effect, interleaved in one run: over
torch.distributed ("dist"), over tp_fused's own transport ("own"), and others that the table explains.

Every size is checked first, on poisoned outputs, against an oracle. Then it is timed: median and p99 of the slowest
rank. bytes, algbw and busbw mean what they mean in nccl-tests. Rank processes are started, unless torchrun has.

Exit codes: 0, 1 wrong results, 2 bad options or set-up, 3 a fault between ranks.
"""

FIRST = """Times tp_fused's ops, each beside the unfused program. To begin with:

  python -m bench rs_rmsnorm                                  one op: checked, then timed beside what it replaces
  python -m bench all --json build/bench/all.json             every op in turn, and all numbers in a file
  python -m bench plot build/bench/all.json -o build/bench    a picture for each of these ops

python -m bench --help lists the ops and the other commands, python -m bench OP --help what can be chosen.
"""


def _paragraphs(text: str) -> str:
    """Without the line breaks of the source, which typer would keep."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.callback(help=_paragraphs(HELP), invoke_without_command=True)
def begin(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(FIRST, nl=False)


class Dtype(str, Enum):
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Backend(str, Enum):
    cpu = "cpu"
    cuda = "cuda"
    reference = "reference"


class ScaleLayout(str, Enum):
    row = "row"
    column = "column"


_general = functools.partial(typer.Option, rich_help_panel="Run")
_sizes = functools.partial(typer.Option, rich_help_panel="Sizes")
_timing = functools.partial(typer.Option, rich_help_panel="Timing")


def run_op(
    context: typer.Context,
    world_size: Annotated[int | None, _general(min=1, help="Ranks", show_default="torchrun's, else 2")] = None,
    device: Annotated[Device, _general(help="auto: cuda where there is a card and a build for it")] = Device.auto,
    backend: Annotated[Backend | None, _general(help="Asks for one", show_default="what fits the machine")] = None,
    zero_copy: Annotated[bool, _general("--zero-copy", help="Inputs in symmetric memory, read in place")] = False,
    max_ctas: Annotated[int | None, _general(min=1, help="Bound of every CUDA grid")] = None,
    timeout: Annotated[float, _general(min=0.001, help="Seconds that an op waits for a peer")] = 30.0,
    check: Annotated[int, _general(min=0, max=1, help="1: check results before timing them")] = 1,
    json: Annotated[Path | None, _general(dir_okay=False, help="Write all numbers to this file")] = None,
    min_tokens: Annotated[int, _sizes(min=0, help="The first size")] = 1,
    max_tokens: Annotated[int, _sizes(min=0, help="The last size")] = 4096,
    step_factor: Annotated[float, _sizes(help="From one size to the next")] = 2.0,
    tokens: Annotated[str | None, _sizes(help="These sizes instead, for example 1,5,1023")] = None,
    hidden: Annotated[int, _sizes(min=1, help="Columns of the reduced rows")] = 7168,
    latent: Annotated[int, _sizes(min=1, help="Columns of the projection")] = 2112,
    kv_lora: Annotated[int, _sizes(min=1, help="Of those, kv_a's")] = 512,
    rope: Annotated[int, _sizes(min=0, help="Of those, k_pe's; q_a has the rest")] = 64,
    dtype: Annotated[Dtype, _sizes(help="Of the rows")] = Dtype.bf16,
    scale_layout: Annotated[ScaleLayout, _sizes(help="Of fp8 scales")] = ScaleLayout.row,
    warmup: Annotated[int, _timing(min=1, help="Rounds before the clock counts, at most")] = 3,
    iters: Annotated[int | None, _timing(min=1, help="Rounds that count", show_default="as --budget allows")] = None,
    budget: Annotated[float, _timing(min=0.0, help="Seconds of timing a size, for 3 to 1000 rounds")] = 2.0,
    baselines: Annotated[str, _timing(help="Programs to time beside it: all, none, or a list: own,barrier")] = "all",
    variants: Annotated[str, _timing(help="The fused op again: staged, zero-copy, ctasN (N blocks at most)")] = "",
    compile: Annotated[bool, _timing("--compile", help="torch.compile the unfused programs' local parts")] = False,
) -> None:
    torchrun_ranks = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else None
    # By name: typer brings a click of its own, or not.
    given = {name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"}
    try:
        options = run_options.Options(
            ops=catalog.EVERYWHERE if context.info_name == "all" else (context.info_name,),
            world_size=world_size or torchrun_ranks or 2,
            tokens=run_options.token_counts(tokens, min_tokens, max_tokens, step_factor),
            hidden=hidden,
            latent=latent,
            kv_lora=kv_lora,
            rope=rope,
            dtype=dtype.value,
            scale_layout=scale_layout.value,
            device=device.value,
            backend=backend.value if backend else None,
            zero_copy=zero_copy,
            check=bool(check),
            baselines=None if baselines == "all" else run_options.names(baselines, ("none", *BASELINES), "--baselines"),
            variants=run_options.names(variants, run_options.VARIANTS, "--variants"),
            compile=compile,
            warmup=warmup,
            iters=iters,
            budget_s=budget,
            timeout_s=timeout,
            max_ctas=max_ctas,
            json=None if json is None else str(json),
            argv=tuple(sys.argv[1:]),
        )
        run_options.check_use(options, given)
        if device is Device.auto:
            options = dataclasses.replace(options, device=_any_device())
        run_options.check_device(options, given)
        launch(options, torchrun_ranks)
    except run_options.OptionError as error:
        raise typer.BadParameter(str(error), ctx=context, param_hint=error.option) from None


def _any_device() -> str:
    import tp_fused.launch

    return tp_fused.launch.choose_device()


def launch(options: run_options.Options, torchrun_ranks: int | None) -> None:
    import torch.multiprocessing

    import tp_fused.launch
    from tp_fused.native import _C

    from .run import run_rank

    try:
        tp_fused.launch.choose_device(options.device)
    except ValueError as error:
        raise run_options.OptionError("--device", str(error)) from None
    run_options.check(options, _C.MAX_HIDDEN_SIZE, _C.MAX_RANKS, torchrun_ranks)
    if options.json is not None:
        _make_folder(Path(options.json).absolute().parent, "--json")
    try:
        # The process group waits longer than the ops: between two of them a rank may be busy with the oracle.
        tp_fused.launch.launch(run_rank, options.world_size, options, timeout_s=max(600.0, 10 * options.timeout_s))
    except torch.multiprocessing.ProcessExitedException as ended:
        # The rank has said why, unless a signal ended it.
        if ended.exit_code < 0:
            typer.echo(f"rank {ended.error_index} was ended by {ended.signal_name}", err=True)
        raise typer.Exit(ended.exit_code if ended.exit_code > 0 else 1) from None
    except torch.multiprocessing.ProcessRaisedException as raised:
        typer.echo(str(raised), err=True)
        raise typer.Exit(1) from None


def _make_folder(folder: Path, option: str) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"cannot make the folder {folder}: {error.strerror}", param_hint=option) from None
    return folder


@app.command(help="Draws a picture for every op of every file: time over tokens, the unfused programs', and the floor.")
def plot(
    files: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="What --json wrote")],
    output: Annotated[Path, typer.Option("--output", "-o", file_okay=False, help="The folder for the pictures")] = Path(
        "build/plots"
    ),
) -> None:
    from .plot import draw  # matplotlib is for this command only

    try:
        pictures = draw(files, _make_folder(output, "--output"))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="FILES") from None
    for picture in pictures:
        typer.echo(picture)


@app.command("tables", help=_paragraphs(pages.__doc__))
def write_tables(
    docs: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="The folder of performance.md")] = Path(
        "docs"
    ),
) -> None:
    pages.write(docs)


_Results = Annotated[Path, typer.Option(file_okay=False, show_default="bench/results", help="Where the files go")]


def _launches(named: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """At least one of them."""
    try:
        names = run_options.names(named, known, "--launches")
    except run_options.OptionError as error:
        raise typer.BadParameter(str(error), param_hint=error.option) from None
    if not names:
        raise typer.BadParameter(f"{named!r} names none of {', '.join(known)}", param_hint="--launches")
    return names


@app.command("goals", help=_paragraphs(goals.__doc__))
def run_goals(
    launches: Annotated[str, typer.Option(help=f"Only these, of {', '.join(goals.NAMES)}")] = ",".join(goals.NAMES),
    results: _Results = RESULTS,
) -> None:
    names = _launches(launches, goals.NAMES)
    if _any_device() != "cuda":
        raise typer.BadParameter("there is no card, or no build for it")
    goals.check(goals.launches(names), _make_folder(results, "--results"))


@app.command("multi", help=_paragraphs(multi.__doc__))
def run_multi(
    launches: Annotated[str, typer.Option(help=f"Only these, of {', '.join(multi.PARTS)}")] = ",".join(multi.PARTS),
    results: _Results = RESULTS,
) -> None:
    parts = _launches(launches, multi.PARTS)
    import torch

    cards = torch.cuda.device_count()
    if cards < 2:
        raise typer.BadParameter(f"torch sees {cards} cards; two are the least")
    multi.check(multi.launches(cards, parts), _make_folder(results, "--results"))


_share = functools.partial(typer.Option, min=0.01, max=1.0, rich_help_panel="Of the datasheet's rates")


@app.command("model", help=_paragraphs(model.__doc__))
def count_costs(
    cards: Annotated[str, _general(help="Of these")] = ",".join(model.CARDS),
    world_size: Annotated[int, _general(min=1, help="Ranks, each with a card")] = 8,
    barrier: Annotated[
        float | None, _general(min=0.001, help="us of a synchronisation", show_default="measured")
    ] = None,
    results: Annotated[
        Path, typer.Option(exists=True, file_okay=False, show_default="bench/results", help="Where the files are")
    ] = RESULTS,
    tokens: Annotated[str, _sizes(help="These sizes")] = ",".join(map(str, model.TOKENS)),
    hidden: Annotated[int, _sizes(min=1, help="Columns of the reduced rows")] = 7168,
    latent: Annotated[int, _sizes(min=1, help="Columns of the projection")] = 2112,
    memory: Annotated[float, _share(help="By large copies")] = model.Shares.memory,
    link: Annotated[float, _share(help="By copies between cards")] = model.Shares.link,
    bf16: Annotated[float, _share(help="By a product")] = model.Shares.bf16,
    fp8: Annotated[float, _share(help="By a product with block scales")] = model.Shares.fp8,
) -> None:
    from tp_fused.native import _C

    shares = model.Shares(memory, link, bf16, fp8)
    try:
        if world_size > _C.MAX_RANKS:
            raise run_options.OptionError("--world-size", f"{world_size} is over {_C.MAX_RANKS}")
        chosen = run_options.names(cards, tuple(model.CARDS), "--cards")
        counts = run_options.token_counts(tokens, 1, 1, 2.0)
        if min(counts) == 0:
            raise run_options.OptionError("--tokens", "0 tokens: there is nothing to count")
        shapes = [model.Shape(count, world_size, hidden, latent) for count in counts]
        found = model.documents(results)
        barrier_s = model.barrier_seconds(found) if barrier is None else barrier * 1e-6
        typer.echo(tables.predictions(shapes, chosen, shares, barrier_s))
        typer.echo(tables.comparison(found, shares, found))
    except run_options.OptionError as error:
        raise typer.BadParameter(str(error), param_hint=error.option) from None
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--results") from None


for _op, _about in catalog.OPS.items():
    app.command(_op, help=_paragraphs(_about.help))(run_op)
app.command("all", help="Every op in turn, for an overview.")(run_op)


if __name__ == "__main__":
    app(prog_name="python -m bench")
