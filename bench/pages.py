"""docs/results, a page for every machine, and the tables of docs/performance.md: written from bench/results.

In performance.md a table stands between `<!-- table: NAME -->` and `<!-- end -->`; bench/questions.py has the names.
"""

import json
import re
from pathlib import Path

from . import model, tables
from .questions import QUESTIONS, Found, machine_name, missed_goals, page_name
from .results import RESULTS

_PLACE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_FIRST = ("goals", "multi")  # what the others are summed up in

_INDEX = """# Results

Every table is written from a file of `bench/results` (`python -m bench tables`), and every file by a command that
checks each result before it times it: `make gpu-bench` on one card, `make gpu-multi` on several.

* Times are medians of the slowest rank's, in us; the programs of a table ran interleaved in one run. In brackets: how
  many times as long as the op.
* *of copies*: the least number of bytes that all ranks together have to read and write, over the time, as a share of
  what large copies reach on the same card in the same run. *staged* inputs count their staging, too.
* *of the link*: nccl-tests' bus bandwidth as a share of what copies out of another card's memory reach, all cards at
  once, in the same run.
* *on the CPU*: how long an eager call of `torch.ops.tp_fused` keeps its thread until it returns, launch included: the
  slowest rank's median, after the fastest's. *empty*: the slowest rank's of the least that a call is made of,
  torch.empty for each output and the launch of an empty kernel (`torch.cuda._sleep(0)`), in turn with the call.
* *own*: the unfused program over `reduce_scatter_rows` and `all_gather_rows`, its other parts by torch.compile. It
  tells what is gained by fusing apart from what is gained by the transport. The chain's *own* is what engines do, over
  that transport. *own-rs* and *dist-rs* scatter as the chain does, and fuse nothing.
* `chain`: `rs_rmsnorm`, then `qkv_a_proj_ag_norm`; against it an all-reduce, add and norm of all rows, the projection
  of all rows and the norms of the latents, on every rank.
* `beside_gemm`: `rs_rmsnorm` on one stream, a product of [tokens, 7168] by [7168, 2048] on another, until both end.

Where ranks share a card they are processes under MPS; between cards, NVLink multicast is off. CUDA graphs of 8 to 32
calls are replayed, on the same tensors: what fits the L2 cache, a weight of 30 MB for example, stays there from one
call to the next. In a model other kernels lie between. A `rs_rmsnorm` of a few rows is brought to the SMs while the one
before it ends; of the other programs only *barrier* is.

Eight ranks on one card do the redundant work of what engines do, of all eight, on that card; eight cards do it side by
side, so there the chain gains less. Blocks of torch's symmetric-memory kernels have to be on a card at once, and those
of five ranks do not fit: hence the runs of four. Each table names the commit that it is of. The CPU was doing other
things as well.

| machine | files |
| --- | --- |
"""

_LAST = """
[Goals that are missed](missed.md). [By counting](counted.md): what eight cards would take. [Counted and
measured](compared.md): how far that is to be trusted.
"""

_COUNTED = """# By counting

`python -m bench model` counts, for a rank, the bytes of its memory and of its links, the operations of its tensor
cores, and the synchronisations. What goes on at the same time costs the longest of the three, what comes one after the
other is added, and every synchronisation costs a bare barrier as it was measured: with a card a rank where there is
such a run, else on a shared card. That a gather goes on while the product does is assumed, too.

The rates are those of NVIDIA's data sheets of H100, H200 and HGX B200, without sparsity, and for H20, which has no
public one, of its vendors' descriptions. The shares of them that are reached are assumptions: of the memory and of the
links, what copies reach in the runs here; of the tensor cores, what large products of cuBLAS and of block-scaled fp8
do on a card with H100's power. `--memory`, `--link`, `--bf16`, `--fp8` and `--barrier` change them. An H20's tensor
cores, being slower, are likely to reach a larger share. The fused projection is Hopper's: on a B200 the op is cuBLAS's
product and the gather so far, whatever is counted here.

`chain` is `rs_rmsnorm`, then `qkv_a_proj_ag`; `qkv_a_proj_ag_complete` is `qkv_a_proj_ag(complete=True)`, of rows that
all ranks have. Each cell: the time; what most of it goes to, where *link* and *synchronising* are communication; and
how many times as long as that the unfused program takes, over the same transport.

"""

_COMPARED = """# Counted and measured

What `python -m bench model` counts ([By counting](counted.md)) beside what the benchmark measured.

"""

_MISSED = """# Goals that are missed

As each was measured last on a machine (`make gpu-bench`, `make gpu-multi`). [What was tried](../notes/index.md) says
what bounds them.

"""

_SHARED = """## Ranks that share a card

The memory's bandwidth is that of copies in the same run, and there are no links. With a few tokens, what counting
leaves out (launches, and the rows' way through an SM) is most of the time; or less is needed than is counted, where
signals need no fence and rows come out of the L2 cache. That products hide gathers, which counting assumes, is what the
projections miss most.

"""

_LINKED = """
## A card a rank

Reductions that read their inputs in place come out within a fifth of what is counted, from 512 tokens on.

"""


def load(results: Path = RESULTS) -> dict[str, dict]:
    return {path.name: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}


def fill(text: str, documents: dict[str, dict]) -> str:
    """The text with every table as the documents have it now."""
    found = Found(documents)
    return _PLACE.sub(lambda match: f"{match[1]}{QUESTIONS[match[2]](found)}{match[3]}", text)


def pages(documents: dict[str, dict]) -> dict[str, str]:
    """The text of every page of docs/results, by its file's name."""
    of_page: dict[str, list[str]] = {}
    for name in sorted(documents, key=lambda name: (not name.startswith(_FIRST), name)):
        of_page.setdefault(page_name(documents[name]), []).append(name)
    made = {page: _page(names, documents) for page, names in sorted(of_page.items())}
    lines = [
        f"| [{machine_name(documents[names[0]])}]({page}) | {len(names)} |\n" for page, names in sorted(of_page.items())
    ]
    runs = [document for document in documents.values() if model.counts(document)]
    index = _INDEX + "".join(lines) + _LAST
    others = {"counted.md": _counted(runs), "compared.md": _compared(runs), "missed.md": _missed(documents)}
    return {**made, **others, "index.md": index}


def _page(names: list[str], documents: dict[str, dict]) -> str:
    parts = [f"# Results: {machine_name(documents[names[0]])}\n\n[Results](index.md) explains the columns.\n"]
    parts += [f"## {name.removesuffix('.json')}\n\n{tables.markdown(documents[name])}" for name in names]
    return "\n".join(parts)


def _counted(runs: list[dict]) -> str:
    shapes = [model.Shape(tokens) for tokens in model.TOKENS]
    predictions = tables.predictions(shapes, tuple(model.CARDS), model.Shares(), model.barrier_seconds(runs))
    return _COUNTED + predictions


def _missed(documents: dict[str, dict]) -> str:
    return _MISSED + missed_goals(Found(documents))


def _compared(runs: list[dict]) -> str:
    alone = [run for run in runs if run["machine"]["ranks_per_gpu"] == 1]
    together = [run for run in runs if run["machine"]["ranks_per_gpu"] != 1]
    shared, linked = (tables.comparison(part, model.Shares(), runs) for part in (together, alone))
    return _COMPARED + _SHARED + shared + _LINKED + linked


def write(docs: Path, results: Path = RESULTS) -> None:
    documents = load(results)
    page = docs / "performance.md"
    page.write_text(fill(page.read_text(), documents))
    folder = docs / "results"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.md"):
        old.unlink()
    for name, text in pages(documents).items():
        (folder / name).write_text(text)
