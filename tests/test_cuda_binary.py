"""What nvcc has made of the kernels, read from the compiled library without a GPU: resource usage and SASS.

Shared memory, too, has to be given back when what was read is in registers: an mbarrier arrival does not wait for the
loads that were issued before it, and a bulk copy that then overwrites the buffer may overtake them.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import importlib.util
import itertools
import os
import pickle
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import sass

from tp_fused.native import _C

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120")
DTYPES = ("__nv_bfloat16", "__half", "float")
ENCODED = ("sm_90a", "sm_100")  # of which the code is read
ALL_ROWS_ON = ("sm_80", "sm_90a")  # adds_up_all_rows of csrc/plan/reduce.h
ARRIVAL = r"SYNCS\.ARRIVE\.TRANS64\.A1T0"  # without bytes to expect: what gives a buffer back, or passes an end on
# An instruction is `/*0070*/  @P0 LDG.E.128 R4, ...`; the predicate may be absent.
COUNTED = re.compile(
    r"\*/ +(?:@!?\w+ )?((?:LDL|STL|LDG|STG|UBLK|UTMA|[HQ]G?MMA|WARPGROUP|BAR\.RED|BRA\.U\.ANY)[\w.]*) "
)
# PDL triggers, what all threads of a warp or a block synchronise at, and looks at a peer's signal.
MEETINGS = re.compile(r"\*/ +(?:@!?\w+ )?(PREEXIT|BAR\.RED|BAR\.SYNC|WARPSYNC|LD\S*\.STRONG\.SYS)")
EPILOGUES = (0, 1, 2, 3)  # tpf::Epilogue
ONE_ROW, DIRECT, BULK, ALL_ROWS = 0, 1, 2, 3  # tpf::Body
FP8, GATHER = 2, 3  # of EPILOGUES, those that all ranks may add up all rows for


@dataclasses.dataclass
class Kernel:
    """A kernel as compiled for one architecture."""

    stack_bytes: int
    local_bytes: int
    shared_bytes: int  # static
    opcodes: collections.Counter  # of accesses to memory, products, reducing barriers, loops over threads: "LDG.E.128"
    # Its arrivals on mbarriers, on ENCODED alone: whether each hangs on rows that were read; those that come too early.
    waiting: list[bool] = dataclasses.field(default_factory=list)
    early: list[int] = dataclasses.field(default_factory=list)
    triggers: list[str] = dataclasses.field(default_factory=list)  # of each, what of MEETINGS the code has before it

    def count(self, pattern: str) -> int:
        """Instructions whose opcode matches."""
        return sum(number for opcode, number in self.opcodes.items() if re.match(pattern, opcode))


def find_nvcc() -> str | None:
    """The compiler that setup.py would take."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which(os.environ.get("CUDACXX") or (f"{home}/bin/nvcc" if home else "nvcc"))


def run(tool: str, *arguments, folder: Path | None = None) -> str:
    """The output of a CUDA binary utility: of the PyPI package, or of the machine's toolkit."""
    packages = importlib.util.find_spec("nvidia")
    installed = [str(path) for root in packages.submodule_search_locations for path in Path(root).glob("*/bin")]
    compiler = [str(Path(find_nvcc()).resolve().parent)] if find_nvcc() else []
    found = shutil.which(tool, path=os.pathsep.join([*installed, *compiler, os.environ["PATH"]]))
    assert found, f"{tool} is missing: pip install --requirement requirements.txt"
    environment = os.environ | {"PATH": f"{Path(found).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [found, *map(str, arguments)], capture_output=True, text=True, timeout=120, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_cubin(cubin: Path) -> dict[str, Kernel]:
    """The kernels of one cubin, by mangled name."""
    resources = re.findall(
        r"Function (\S+):\s+REG:\d+ STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", run("cuobjdump", "-res-usage", cubin)
    )
    kernels = {
        name: Kernel(int(stack), int(local), int(shared), collections.Counter())
        for name, stack, shared, local in resources
    }
    encoded = cubin.suffixes[-2][1:] in ENCODED
    _, *sections = run("nvdisasm", "-c", *["-hex"] * encoded, cubin).split("\n.text.")
    for section in sections:
        kernel = kernels[section[: section.index(":")]]
        kernel.opcodes.update(COUNTED.findall(section))
        kernel.triggers = [
            before for before, at in itertools.pairwise(["", *MEETINGS.findall(section)]) if at == "PREEXIT"
        ]
        if encoded and re.search(ARRIVAL, section):
            (code,) = sass.functions(f".text.{section}").values()
            kernel.waiting = [sass.hangs_on(code, index, r"LDS\.128") for index in arrivals(code)]
            kernel.early = sass.outstanding_loads(code, "LDS", ARRIVAL)
    return kernels


def arrivals(code: list) -> list[int]:
    return [i for i, item in enumerate(code) if isinstance(item, sass.Instruction) and re.match(ARRIVAL, item.text)]


def demangle(names: list[str]) -> list[str]:
    """`rs_rmsnorm_kernel<float, 2, (tpf::Epilogue)1, (tpf::Body)2, 0>` of each mangled name."""
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = {line: re.search(r"\w+_kernel(<.*>)?(?=\()", line) for line in plain.splitlines()}
    return [match[0] if match else line for line, match in short.items()]


def extract_cubins(folder: Path) -> list[Path]:
    """libtp_fused's cubins, one for each source and architecture: libtp_fused.12.sm_90a.cubin."""
    if not _C.cuda_compiled():
        left_out = os.environ.get("TP_FUSED_CUDA") != "1"
        assert left_out or find_nvcc() is None, f"there is {find_nvcc()}, but libtp_fused has no CUDA kernels"
        why = "TP_FUSED_CUDA is not 1" if left_out else "there was no nvcc"
        pytest.skip(f"libtp_fused was built without its CUDA kernels: {why}")
    run("cuobjdump", "-xelf", "all", Path(_C.__file__).with_name("libtp_fused.so"), folder=folder)
    return sorted(folder.glob("*.cubin"))


def read_once(cubin: Path, kept: Path) -> dict[str, Kernel]:
    """What `read_cubin` has read of the same code, with the same tools and sources; it takes half a minute in all."""
    sources = Path(__file__).read_bytes() + Path(sass.__file__).read_bytes() + run("nvdisasm", "--version").encode()
    path = kept / hashlib.sha256(sources + cubin.suffixes[-2].encode() + cubin.read_bytes()).hexdigest()
    if path.exists():
        path.touch()
        return pickle.loads(path.read_bytes())
    content = read_cubin(cubin)
    path.with_suffix(".part").write_bytes(pickle.dumps(content))
    path.with_suffix(".part").rename(path)
    return content


def read_library(folder: Path, kept: Path) -> dict[str, dict[str, Kernel]]:
    """The kernels of libtp_fused, by architecture and name."""
    cubins = extract_cubins(folder)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as executor:
        contents = list(executor.map(read_once, cubins, itertools.repeat(kept)))
    kernels = collections.defaultdict(dict)
    for cubin, content in zip(cubins, contents, strict=True):
        kernels[cubin.suffixes[-2][1:]] |= dict(zip(demangle(list(content)), content.values(), strict=True))
    return dict(kernels)


@pytest.fixture(scope="module")
def library(tmp_path_factory, kept):
    """What is read of libtp_fused's machine code."""
    return read_library(tmp_path_factory.mktemp("cubins"), kept)


@pytest.fixture
def kernels(library, architecture) -> dict[str, Kernel]:
    """The kernels of one architecture, by name."""
    asked = os.environ.get("TP_FUSED_CUDA_ARCHITECTURES")
    names = {"sm_" + name.removesuffix("-real").removesuffix("f") for name in asked.split(";")} if asked else set()
    if asked and architecture not in names:
        pytest.skip(f"TP_FUSED_CUDA_ARCHITECTURES={asked} leaves out {architecture}")
    assert architecture in library, f"libtp_fused has no kernels for {architecture}, only for {sorted(library)}"
    return library[architecture]


def ranks_of(dtype: str, body: int) -> tuple[int, ...]:
    """The numbers of ranks that a reduction is compiled for; 0 is any."""
    return (0, 2, 4, 8) if dtype != "float" and body in (ONE_ROW, ALL_ROWS) else (0,)


def reductions(kernels: dict[str, Kernel], *bodies: int) -> dict[str, Kernel]:
    """rs_rmsnorm_kernel<dtype, vectors, epilogue, body, ranks> of these bodies; none of them is missing."""
    name_of = re.compile(r"rs_rmsnorm_kernel<(\w+), (\d+), \(tpf::Epilogue\)(\d), \(tpf::Body\)(\d), (\d)>")
    matches = {name: match for name in kernels if (match := name_of.fullmatch(name))}
    found = {name: (m[1], *map(int, m.group(3, 4, 5))) for name, m in matches.items() if int(m[4]) in bodies}
    if any(kernel.count("UBLK") for kernel in kernels.values()):  # TMA moves rows, but the widest: see reduce.h
        for name in [name for name, form in found.items() if form[2] == DIRECT and matches[name][2] == "4"]:
            assert not kernels[name].opcodes, f"{name} is never launched here"
            del found[name]
    # On the newest cards some forms of a row a block are not compiled either: compiled_for_one_row.
    for name in [name for name, form in found.items() if form[1:3] == (GATHER, ONE_ROW) and not kernels[name].opcodes]:
        assert found[name][0] != "float" and found[name][3] in (0, 8), f"{name} is empty"
        found[f"{name}, never launched here"] = found.pop(name)
    wanted = {
        (dtype, epilogue, body, ranks)
        for dtype, epilogue, body in itertools.product(DTYPES, EPILOGUES, bodies)
        for ranks in ranks_of(dtype, body)
        if body != ALL_ROWS or epilogue in (FP8, GATHER)
    }
    assert set(found.values()) == wanted
    return {name: kernels[name] for name in found if name in kernels}


def gathers(kernels: dict[str, Kernel], bulk: bool) -> dict[str, Kernel]:
    """all_gather_rows_kernel<dtype of the norms or void, bulk>."""
    return {
        name: kernels[name] for name in (f"all_gather_rows_kernel<{t}, {str(bulk).lower()}>" for t in ("void", *DTYPES))
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_static_shared_memory_is_what_launches_leave_for_it(kernels, architecture):
    header = Path(__file__).parents[1] / "csrc" / "plan" / "card.h"
    left = int(re.search(r"kStaticSharedBytes = (\d+);", header.read_text())[1])
    reserved = 0 if architecture == "sm_80" else 1024  # counted in, but not of what a block may have
    # Few rows a block: launched without any other shared memory, of which a kernel has 48 KiB unasked.
    alone = re.compile(r"rs_rmsnorm_kernel<.*\(tpf::Body\)[03], \d>")
    over = {
        name: kernel.shared_bytes
        for name, kernel in kernels.items()
        if kernel.shared_bytes - reserved > (48 * 1024 if alone.fullmatch(name) else left)
    }
    assert not over, f"more than {left} bytes: {over}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_has_local_memory(kernels):
    """Whatever of a row is not in registers or shared memory travels to the caches and back."""
    used = {
        name: f"STACK:{kernel.stack_bytes} LOCAL:{kernel.local_bytes}, {kernel.count('LDL|STL')} accesses"
        for name, kernel in kernels.items()
        if kernel.stack_bytes or kernel.local_bytes or kernel.count("LDL|STL")
    }
    assert not used, "\n".join(
        [f"{len(used)} of {len(kernels)} kernels use local memory:", *map(": ".join, used.items())]
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_travel_in_vectors_of_16_bytes(kernels, architecture):
    """Threads that copy rows load and store 16 bytes at a time, past the read-only cache: peers write what is read."""
    narrow = {
        name: dict(kernel.opcodes)
        for name, kernel in {
            **reductions(kernels, ONE_ROW, DIRECT, *[ALL_ROWS] * (architecture in ALL_ROWS_ON)),
            **gathers(kernels, bulk=False),
        }.items()
        if not kernel.count(r"LDG\.E(?!.*CONSTANT).*\.128") or not kernel.count(r"STG\.E.*\.128")
    }
    assert not narrow


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_ranks_add_up_all_rows_where_there_are_the_registers(kernels, architecture):
    """Elsewhere these kernels are empty, and never planned."""
    empty = {name for name, kernel in reductions(kernels, ALL_ROWS).items() if not kernel.opcodes}
    forms = 2 * sum(len(ranks_of(dtype, ALL_ROWS)) for dtype in DTYPES)
    assert len(empty) == (0 if architecture in ALL_ROWS_ON else forms)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_inputs_are_given_back_when_they_have_been_read(kernels):
    """With a row a block no fence comes before the signal that says so, but a barrier that counts what was made of the
    rows. Had the compiler found out that the count tells nothing, it would be a barrier that waits for no row."""
    one_row = {name: kernel for name, kernel in reductions(kernels, ONE_ROW).items() if "(tpf::Epilogue)3" not in name}
    forms = sum(len(ranks_of(dtype, ONE_ROW)) for dtype in DTYPES)
    assert len(one_row) == forms * (len(EPILOGUES) - 1)  # what is gathered says so itself
    assert not [name for name, kernel in one_row.items() if not kernel.count(r"BAR\.RED\.POPC")]


@pytest.mark.parametrize("architecture", ARCHITECTURES[1:])
def test_rows_travel_in_bulk_copies(kernels):
    """With TMA rows come and go in bulk; only what is computed is stored by the threads, as vectors. Peers
    copy gathered rows in bulk; their owners publish them."""
    threads_copy = {
        name: dict(kernel.opcodes)
        for name, kernel in gathers(kernels, bulk=True).items()
        if not kernel.count(r"UBLKCP\.S\.G") or not kernel.count(r"UBLKCP\.G\.S")
    }
    threads_copy |= {
        name: dict(kernel.opcodes)
        for name, kernel in reductions(kernels, BULK).items()
        if not kernel.count(r"UBLKCP\.S\.G")
        or not kernel.count(r"UBLKCP\.G\.S")
        or not kernel.count(r"STG\.E.*\.128")
        or kernel.count(r"LDG\.E(?!.*CONSTANT).*\.128")
    }
    assert not threads_copy


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_columns_of_few_rows_are_multiplied_by_tensor_cores(kernels, architecture):
    """Operands go to shared memory past the registers, and past the cache that no byte is read from twice."""
    forms = [("__nv_bfloat16", tiles) for tiles in (1, 2, 4)] + [("__half", tiles) for tiles in (1, 2, 4)]
    if architecture != "sm_80":  # has no products of fp8
        forms += [("__nv_fp8_e4m3", tiles) for tiles in (1, 2)]
    for dtype, tiles in forms:
        kernel = kernels[f"qkv_a_proj_ag_columns_kernel<{dtype}, {tiles}>"]
        assert kernel.count(r"[HQ]MMA") >= 16 * tiles and kernel.count(r"LDGSTS\.E\.BYPASS(?:\.\w+)*\.128"), (
            dtype,
            tiles,
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES[1:])
def test_one_thread_asks_tma(kernels):
    """Where the compiler does not know that it is one, it asks in a loop over the threads of the warp."""
    assert [name for name, kernel in kernels.items() if kernel.count("UBLK")]
    assert not [name for name, kernel in kernels.items() if kernel.count(r"BRA\.U\.ANY")]


def test_projections_multiply_by_warp_groups(library):
    """On Hopper: TMA brings operands in boxes, and products wait at the end of a stage only. With
    too few registers ptxas makes each wait for the one before, and says so in a note that nobody reads."""
    if "sm_90a" not in library:
        pytest.skip("libtp_fused was not built for sm_90a")
    projections = {
        name: kernel for name, kernel in library["sm_90a"].items() if name.startswith("qkv_a_proj_ag_kernel")
    }
    assert projections
    wrong = {
        name: dict(kernel.opcodes)
        for name, kernel in projections.items()
        if not kernel.count("UTMALDG")
        or not kernel.count(r"UBLKCP\.G\.S")
        or kernel.count("[HQ]GMMA") < 4
        or kernel.count(r"WARPGROUP\.DEPBAR") > 3
    }
    assert not wrong


@pytest.mark.parametrize("architecture", ARCHITECTURES[1:])
def test_pdl_triggers_come_after_all_threads_have_waited(kernels, architecture):
    """One thread's trigger counts for its block, and threads that wait for no peer may run ahead of those that do: a
    barrier of threads stands between. Else the next kernel takes SMs, on a shared card those that a late rank needs."""
    triggers = {name: kernel.triggers for name, kernel in kernels.items() if kernel.triggers}
    assert len(triggers) >= 40
    assert not {name: found for name, found in triggers.items() if not {*found} <= {"BAR.RED", "BAR.SYNC", "WARPSYNC"}}


# ---- arrivals on mbarriers ----


def arriving(library, architecture: str, name: str) -> dict[str, Kernel]:
    """Those that arrive on mbarriers."""
    if architecture not in library:
        pytest.skip(f"libtp_fused was not built for {architecture}")
    return {kernel: read for kernel, read in library[architecture].items() if re.match(name, kernel) and read.waiting}


@pytest.mark.parametrize("architecture", ENCODED)
def test_a_row_buffer_is_given_back_when_its_row_is_in_registers(library, architecture):
    """The next row may be on its way from shared memory meanwhile, so scoreboards alone do not tell: the arrival's
    address is computed from what the loads have brought. One arrival more passes on that there are no more rows."""
    bulk = arriving(library, architecture, r"rs_rmsnorm_kernel<.*\(tpf::Body\)2, 0>")
    assert len(bulk) == 3 * 4 * 2  # dtypes, epilogues, widths
    assert not {
        name: f"{sum(kernel.waiting)} of {len(kernel.waiting)} arrivals"
        for name, kernel in bulk.items()
        if len(kernel.waiting) < 4 or sum(kernel.waiting) != len(kernel.waiting) - 1
    }


@pytest.mark.parametrize("architecture", ENCODED[:1])
def test_a_stage_is_given_back_when_its_scales_are_in_registers(library, architecture):
    """Operands are read by the products themselves, which are waited for; scales, and finished tiles on their way out,
    by loads."""
    projections = arriving(library, architecture, "qkv_a_proj_ag_kernel")
    assert projections
    assert not {name: kernel.early for name, kernel in projections.items() if kernel.early}


def test_an_arrival_before_its_loads_is_seen():
    """On code as ptxas wrote it for an arrival that does not hang on the loads."""

    def instruction(text: str, sets: int = 7, waits: int = 0) -> str:
        upper = sets << 46 | waits << 52
        return f"        /*0000*/  {text} ;  /* 0x{0:016x} */\n  /* 0x{upper:016x} */\n"

    load = instruction("LDS.128 R12, [R3]", sets=1)
    arrival = instruction("SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R0+URZ+0x100], RZ")
    waiting = instruction("IMAD.U32 R5, R12, 0x10000, RZ", waits=2)
    masked = instruction("LOP3.LUT R5, R12, UR4, RZ, 0xc0, !PT", waits=2) + instruction("IMAD.IADD R0, R5, 0x1, R0")
    early, late, dependent = (
        sass.functions(f".text.kernel:\n{code}")["kernel"]
        for code in (load + arrival, load + waiting + arrival, load + masked + arrival)
    )
    assert sass.outstanding_loads(early, "LDS", ARRIVAL) == [1]
    assert sass.outstanding_loads(late, "LDS", ARRIVAL) == []
    assert not sass.hangs_on(early, 1, "LDS") and not sass.hangs_on(late, 2, "LDS")
    assert sass.hangs_on(dependent, 3, "LDS")
