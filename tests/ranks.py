"""Rank processes for tests: a pool of them is started once and then given functions to run.

    results = Pool(world_size=2).run(function, *arguments)

`function`, at the top level of a test module, is called with the arguments on every rank.

The processes are forked from a server that has torch imported already: a pool costs milliseconds, so a test that kills
ranks takes one of its own. In every rank, memory that torch hands out uninitialised is filled with NaN (255 for
integers): an output that an op forgets to write cannot pass for a right one.
"""

import contextlib
import datetime
import faulthandler
import io
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

import tp_fused

# Inductor compiles in the rank itself, and believes the processor where it would compile probes.
os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_VEC_ISA_OK": "1"}
# At every connection torch asks a name server who 127.0.0.1 is, since it writes it as an address of IPv6 that is not in
# /etc/hosts. An answer that is lost is waited for: a second, not five.
os.environ.setdefault("RES_OPTIONS", "timeout:1")
_context = multiprocessing.get_context("forkserver")


def preload(*more: str) -> None:
    """What the server imports, for all ranks at once; before the first pool is made."""
    # The last one is what torch.use_deterministic_algorithms imports: two seconds of it.
    always = ["garbage", "torch", "torch.distributed", "tp_fused", "torch._inductor.config"]
    _context.set_forkserver_preload([*always, *more])


preload()


def _start_server() -> None:
    """Unless it runs. It finds modules of this folder, too: Python before 3.13 does not tell it where to look."""
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.path.dirname(os.path.abspath(__file__)), path]))
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if path is not None:
            os.environ["PYTHONPATH"] = path


# What takes no time may take so long on a busy machine. Waits that must not come to their deadline have a longer one.
BUSY_S = 15.0

# How long the other ranks may go on after one has raised: long enough for a deadline of their own to pass.
_GRACE_S = 15.0


def names_in_shared_memory(*pids: int) -> list[str]:
    """Of the segments that these processes have made, by default this one: those whose name is still there."""
    ours = tuple(f"tp_fused-{pid}-" for pid in pids or (os.getpid(),))
    return [name for name in os.listdir("/dev/shm") if name.startswith(ours)]


class RankDied(Exception):
    """What a pool reports for a rank whose process ended. `exitcode` is negative for a signal."""

    def __init__(self, rank: int, exitcode: int):
        super().__init__(f"the process of rank {rank} ended with exit code {exitcode}")
        self.rank, self.exitcode = rank, exitcode


class _Traceback(Exception):
    """The text of a rank's traceback, shown as the cause of the exception that is raised here."""

    def __str__(self):
        return self.args[0]


class Pool:
    """`world_size` ranks in one gloo group, which run what they are given until `close`."""

    def __init__(self, world_size: int, device: str = "cpu"):
        self.world_size, self.device = world_size, device
        _start_server()
        self._folder = tempfile.TemporaryDirectory(prefix="tp_fused-ranks-")
        # Served by this process, which no test kills. Over files an exchange would take milliseconds.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._connections, self.processes = [], []
        for rank in range(world_size):
            connection, theirs = _context.Pipe()
            arguments = (rank, world_size, device, self._folder.name, self._store.port, theirs)
            process = _context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._connections.append(connection)
            self.processes.append(process)

    @property
    def alive(self) -> bool:
        return bool(self.processes) and all(process.is_alive() for process in self.processes)

    def run(self, function, *arguments, timeout_s: float = 60.0) -> list:
        """The result of every rank. What a rank raises is raised here, and ends the pool."""
        outcomes = self._collect(function, arguments, timeout_s)
        failed = [error for _, error in outcomes if error is not None]
        if failed:
            self.close()
            # A rank that died explains the others' troubles, not the other way round.
            raise next((error for error in failed if isinstance(error, RankDied)), failed[0])
        return [result for result, _ in outcomes]

    def outcomes(self, function, *arguments, timeout_s: float = 60.0) -> list:
        """What became of every rank: its result, the exception that it raised, or `RankDied`."""
        outcomes = self._collect(function, arguments, timeout_s)
        return [result if error is None else error for result, error in outcomes]

    def _collect(self, function, arguments, timeout_s: float) -> list[tuple]:
        """(result, None) or (None, exception) of every rank."""
        job = _pack((function, arguments))
        for connection in self._connections:
            with contextlib.suppress(BrokenPipeError):
                connection.send_bytes(job)
        outcomes = {}
        deadline = time.monotonic() + timeout_s
        while len(outcomes) < self.world_size:
            waiting = {self._connections[r]: r for r in range(self.world_size) if r not in outcomes}
            ready = multiprocessing.connection.wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._timed_out(sorted(waiting.values()), outcomes, timeout_s)
            for connection in ready:
                rank = waiting[connection]
                outcomes[rank] = self._receive(rank)
                if outcomes[rank][1] is not None:
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        return [outcomes[rank] for rank in range(self.world_size)]

    def _receive(self, rank: int) -> tuple:
        try:
            result, error, text = _unpack(self._connections[rank].recv_bytes())
        except (EOFError, ConnectionError):
            self.processes[rank].join(5)
            return None, RankDied(rank, self.processes[rank].exitcode)
        if error is not None:
            error.__cause__ = _Traceback(f"\nrank {rank}: {text}")
        return result, error

    def _timed_out(self, late: list[int], outcomes: dict, timeout_s: float) -> TimeoutError:
        told = [f"rank {rank}: {error or 'done'}" for rank, (_, error) in sorted(outcomes.items())]
        for rank in late:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        for rank in late:
            with open(_stacks_path(self._folder.name, rank)) as file:
                told.append(f"rank {rank} was here:\n{file.read()}")
        self.close()
        return TimeoutError(f"ranks {late} did not finish within {timeout_s} s\n" + "\n".join(told))

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        # On a card a process that is killed while it gives its context back holds up the others that share the card.
        deadline = time.monotonic() + (2 if self.device == "cpu" else 20)
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
            process.join()
        self._connections, self.processes, self._store = [], [], None
        self._folder.cleanup()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def _stacks_path(folder: str, rank: int) -> str:
    return os.path.join(folder, f"stacks-{rank}")


def _pack(value) -> bytes:
    """Bytes of any picklable value, tensors of every dtype included; they arrive on the CPU."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(data: bytes):
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)


def _serve(rank: int, world_size: int, device: str, folder: str, port: int, connection) -> None:
    with open(_stacks_path(folder, rank), "w") as stacks:
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR1, file=stacks)
        torch.set_num_threads(1)
        if device == "cuda":
            torch.cuda.set_device(rank % torch.cuda.device_count())
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # products have the same bits at every run
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialised memory
        store = dist.TCPStore("127.0.0.1", port)
        timeout = datetime.timedelta(seconds=30)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
        while True:
            try:
                function, arguments = _unpack(connection.recv_bytes())
            except (EOFError, ConnectionError):
                return
            connection.send_bytes(_run(function, arguments))


def _run(function, arguments) -> bytes:
    try:
        return _pack((function(*arguments), None, ""))
    except Exception as error:
        text = traceback.format_exc()
        try:
            data = _pack((None, error, text))
            _unpack(data)
            return data
        except Exception:  # not every exception can be pickled
            return _pack((None, RuntimeError(f"{type(error).__name__}: {error}"), text))


# ---- programs ----


def run_program(
    program: str | Path, folder: Path, world_size: int, *arguments: str, timeout_s: float = 240.0, **environment
) -> str:
    """What a program prints, a text or a file, that all ranks run: as under torchrun, but torch is imported already."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    script = program if isinstance(program, Path) else folder / "program.py"
    if program is not script:
        script.write_text(program)
    variables = environment | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is served here
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    _start_server()
    processes = []
    for rank in range(world_size):
        given = (folder, [str(script), *arguments], variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        processes.append(_context.Process(target=_be_program, args=given, daemon=True))
        processes[-1].start()
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()
    printed, told = (
        "".join((folder / f"{kind}-{rank}").read_text() for rank in range(world_size)) for kind in ("out", "err")
    )
    assert [process.exitcode for process in processes] == [0] * world_size, printed + told
    return printed


def _be_program(folder: Path, arguments: list[str], variables: dict[str, str]) -> None:
    for descriptor, kind in ((1, "out"), (2, "err")):
        with open(folder / f"{kind}-{variables['RANK']}", "w") as file:
            os.dup2(file.fileno(), descriptor)
    os.environ |= variables
    torch.set_num_threads(1)
    sys.argv = arguments
    sys.path.insert(0, os.path.dirname(arguments[0]))
    runpy.run_path(arguments[0], run_name="__main__")


# ---- what the functions that run on ranks need ----


@contextlib.contextmanager
def workspace(backend: str | None = None, device: str = "cpu", **arguments):
    """A workspace of the default group, on this rank; `backend` None leaves the choice to tp_fused."""
    if backend is None:
        os.environ.pop("TP_FUSED_BACKEND", None)
    else:
        os.environ["TP_FUSED_BACKEND"] = backend
    defaults = {"max_num_tokens": 64, "hidden_size": 256, "dtype": torch.float32, "timeout_s": 20.0}
    with tp_fused.init(device=device, **{**defaults, **arguments}) as made:
        yield made


def settled(made, function, *arguments):
    """What the call returns, once that is certain; raises what it ran into.

    On CUDA an op returns before its peers have come: where they do not come it leaves NaN, and `check` of the
    workspace `made`, or the next call, raises.
    """
    result = function(*arguments)
    if made.device_type == "cuda":
        torch.cuda.synchronize()
        made.check()
    return result


def outcome(function, *arguments, **keywords):
    """What the call returns or raises, and how many seconds it took."""
    begin = time.monotonic()
    try:
        result = function(*arguments, **keywords)
    except Exception as error:
        result = error
    return result, time.monotonic() - begin
