"""Several runs in one command: launches of ranks one after the other, each with a time limit of its own.

A launch is a process that starts the ranks and runs its sections, each a run as `python -m bench OP` makes them. Where
one breaks, by a fault for instance, new ranks go on with the next section. A launch that takes too long is ended, and
the next begins.

torch is imported where ranks run: whoever only plans launches does not wait for it.
"""

import contextlib
import faulthandler
import gc
import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from .options import Options
from .results import file_name

# Unless the environment says otherwise: NVLink multicast is another machine feature than the one measured here, and not
# every host has it in order.
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}


@dataclass(frozen=True)
class Launch:
    """Sections, by name, that run on the same ranks. timeout_s: of all of them together."""

    name: str
    timeout_s: float
    sections: dict[str, Options]

    @property
    def world_size(self) -> int:
        return next(iter(self.sections.values())).world_size


def compile_flashinfer() -> None:
    """Where it is installed: before launches that time it, or the first one would spend its time on it.

    Where it fails, the launches say that they leave it out.
    """
    if importlib.util.find_spec("flashinfer"):
        print("# FlashInfer's kernels are compiled, unless they are there", flush=True)
        subprocess.run([sys.executable, "-m", "bench.peers"])


def run(launches: list[Launch], results: Path) -> list[dict]:
    """What the launches leave: the document of every section that has measured something, also kept in `results`."""
    documents = []
    for launch in launches:
        start = time.monotonic()
        print(f"\n# ==== {launch.name}: {launch.world_size} ranks, at most {launch.timeout_s:.0f} s", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            outcome = _run_launch(launch, Path(folder))
            for name in launch.sections:
                written = Path(folder, f"{name}.json")
                if written.exists():
                    document = json.loads(written.read_text())
                    Path(results, file_name(name, document)).write_text(written.read_text())
                    documents.append(document)
        print(f"# {launch.name}: {outcome} after {time.monotonic() - start:.0f} s", flush=True)
    return documents


def _run_launch(launch: Launch, folder: Path) -> str:
    """How it ended, in a word or two for every start of its ranks. The sections leave their files in `folder`."""
    deadline, endings = time.monotonic() + launch.timeout_s, []
    left = {name: replace(options, json=str(folder / f"{name}.json")) for name, options in launch.sections.items()}
    while left:
        endings.append(_run_ranks(replace(launch, sections=left), folder, deadline))
        begun = [name for name in left if _begun(left[name]).exists()]
        if endings[-1] in ("done", "timed out") or not begun:
            break
        endings[-1] += f" in {begun[-1]}"
        left = {name: options for name, options in left.items() if name not in begun}
    return ", then ".join(endings)


def _begun(options: Options) -> Path:
    """What rank 0 leaves when it begins a section."""
    return Path(options.json).with_suffix(".begun")


def _run_ranks(launch: Launch, folder: Path, deadline: float) -> str:
    job = folder / "launch.pickle"
    job.write_bytes(pickle.dumps((launch, deadline)))
    command = [sys.executable, "-m", "bench.suite", str(job)]
    process = subprocess.Popen(command, env={**NO_MULTICAST, **os.environ}, start_new_session=True)
    try:
        code = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "timed out"
    finally:
        with contextlib.suppress(ProcessLookupError):  # its ranks too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return "done" if code == 0 else f"failed (exit code {code})"


def _run_sections(launch: Launch, deadline: float) -> None:
    """On every rank. What fails is the same on all ranks, but for faults: those end the ranks."""
    import torch
    import torch.distributed as dist

    from .run import FAULT, run_rank

    # Says where a rank hangs, shortly before the launch is ended.
    faulthandler.dump_traceback_later(max(1.0, deadline - 10 - time.monotonic()), exit=True)
    code = 0
    for index, (name, options) in enumerate(launch.sections.items()):
        if dist.get_rank() == 0:
            _begun(options).touch()
        try:
            run_rank(options, header=index == 0)
        except SystemExit as ended:
            code = ended.code
            if code == FAULT:
                break
        except RuntimeError as error:
            code = 1
            if dist.get_rank() == 0:
                print(f"# {name} broke off: {error}", flush=True)
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    faulthandler.cancel_dump_traceback_later()
    if code:
        sys.exit(code)


def main(job: str) -> None:
    import torch.multiprocessing

    import tp_fused.launch

    launch, deadline = pickle.loads(Path(job).read_bytes())
    try:
        tp_fused.launch.launch(_run_sections, launch.world_size, launch, deadline)
    except torch.multiprocessing.ProcessExitedException as ended:
        sys.exit(ended.exit_code if ended.exit_code > 0 else 1)


if __name__ == "__main__":
    # By its own name: what is pickled belongs to bench.suite, not to __main__.
    from bench.suite import main

    main(sys.argv[1])
