"""What a run was asked to do: checked once, before any process is started, and handed to every rank."""

from dataclasses import dataclass

from .catalog import OPS

VARIANTS = ("staged", "zero-copy", "ctasN")


class OptionError(ValueError):
    """A bad option: which one, and what is wrong with it."""

    def __init__(self, option: str, message: str):
        super().__init__(message)
        self.option = option


@dataclass(frozen=True)
class Options:
    """One run of the benchmark. Sizes are in elements, times in seconds."""

    ops: tuple[str, ...]
    world_size: int
    tokens: tuple[int, ...]
    hidden: int = 7168
    latent: int = 2112
    kv_lora: int = 512
    rope: int = 64
    dtype: str = "bf16"
    scale_layout: str = "row"
    device: str = "cpu"
    backend: str | None = None
    zero_copy: bool = False
    check: bool = True
    baselines: tuple[str, ...] | None = None  # None: all that there are
    variants: tuple[str, ...] = ()
    compile: bool = False
    warmup: int = 3
    iters: int | None = None
    budget_s: float = 2.0
    timeout_s: float = 30.0
    max_ctas: int | None = None
    json: str | None = None
    argv: tuple[str, ...] = ()

    @property
    def q_lora(self) -> int:
        return self.latent - self.kv_lora - self.rope

    @property
    def max_tokens(self) -> int:
        return max(*self.tokens, 1)


def ctas_of(variant: str) -> int | None:
    """The N of "ctasN", None for the other variants."""
    return int(variant[4:]) if variant[:4] == "ctas" and variant[4:].isdecimal() else None


def names(explicit: str, known: tuple[str, ...], option: str) -> tuple[str, ...]:
    """A list of names such as own,dist; "ctas8" and the like are known as "ctasN"."""
    chosen = tuple(word.strip() for word in explicit.split(",") if word.strip())
    for name in chosen:
        if name not in known and not ("ctasN" in known and ctas_of(name)):
            raise OptionError(option, f"{name!r} is none of {', '.join(known)}")
    return chosen


def token_counts(explicit: str | None, smallest: int, largest: int, factor: float) -> tuple[int, ...]:
    """The sizes of a sweep: the explicit list, or smallest, smallest * factor, ... and largest itself."""
    if explicit is not None:
        try:
            counts = tuple(int(word) for word in explicit.split(","))
        except ValueError:
            raise OptionError("--tokens", f"{explicit!r} is no list of integers such as 1,5,1023") from None
        if min(counts) < 0:
            raise OptionError("--tokens", f"{min(counts)} tokens: a count cannot be negative")
        return counts
    if smallest > largest:
        raise OptionError("--min-tokens", f"{smallest} is over --max-tokens {largest}")
    if not factor > 1:
        raise OptionError("--step-factor", f"{factor:g} must be over 1, or the sizes never grow")
    counts, size = [], float(smallest)
    while size < largest:
        counts.append(int(size))
        size = max(size * factor, counts[-1] + 1)
    return (*counts, largest)


def check_use(options: Options, given: set[str]) -> None:
    """Raises for an option that was given and does nothing: by the names of the command's parameters."""
    timed = [OPS[op] for op in options.ops]
    which = f"for {options.ops[0]}" if len(timed) == 1 else "for these ops"
    for name in ("dtype", "latent", "kv_lora", "rope", "scale_layout", "zero_copy", "compile"):
        if name in given and not any(name in op.options for op in timed):
            raise OptionError(_flag(name), f"does nothing {which}")
    for name in options.baselines or ():
        if name != "none" and not any(name in op.baselines for op in timed):
            known = ", ".join(dict.fromkeys(name for op in timed for name in op.baselines))
            raise OptionError("--baselines", f"{name!r} is not timed {which}; there are {known}")
    placed = [name for name in options.variants if ctas_of(name) is None]
    if placed and not any("zero_copy" in op.options for op in timed):
        raise OptionError("--variants", f"{placed[0]} does nothing {which}: its input is not read by the peers")
    if "compile" in given and options.baselines is not None and not set(options.baselines) - {"none"}:
        raise OptionError("--compile", "does nothing without baselines: the op is not compiled")
    for name in ("min_tokens", "max_tokens", "step_factor"):
        if name in given and "tokens" in given:
            raise OptionError(_flag(name), "does nothing beside --tokens")
    if "kv_lora" in {name for op in timed for name in op.options} and options.q_lora < 0:
        raise OptionError(
            "--latent",
            f"{options.latent} columns are fewer than --kv-lora {options.kv_lora} + --rope {options.rope}",
        )


def check_device(options: Options, given: set[str]) -> None:
    """The same, where it depends on what computes."""
    for op in options.ops:
        if OPS[op].cuda_only and options.device != "cuda":
            raise OptionError("--device", f"{op} needs cuda")
    if options.backend in ("cpu", "cuda") and options.backend != options.device:
        raise OptionError("--backend", f"{options.backend} works on {options.backend} tensors, --device says otherwise")
    bounded = [name for name in options.variants if ctas_of(name)]
    if options.device != "cuda" or options.backend == "reference":
        kind = options.backend or options.device
        if "max_ctas" in given:
            raise OptionError("--max-ctas", f"does nothing on {kind}: it bounds the grids of CUDA kernels")
        if bounded:
            raise OptionError("--variants", f"{bounded[0]} does nothing on {kind}: it bounds the grids of CUDA kernels")
    if options.backend == "reference":
        if options.zero_copy or {"zero-copy", "staged"} & {*options.variants}:
            option = "--zero-copy" if options.zero_copy else "--variants"
            raise OptionError(option, "the reference backend has no symmetric memory: its inputs are all the same")
        if "timeout" in given:
            raise OptionError("--timeout", "the reference backend waits as long as the process group does")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check(options: Options, max_hidden: int, max_ranks: int, torchrun_ranks: int | None) -> None:
    if torchrun_ranks is not None and options.world_size != torchrun_ranks:
        raise OptionError("--world-size", f"{options.world_size} was asked for, torchrun runs {torchrun_ranks} ranks")
    if options.backend != "reference" and options.hidden > max_hidden:
        raise OptionError(
            "--hidden", f"{options.hidden} is over {max_hidden}, the widest row the kernels reduce; --backend reference"
        )
    if options.backend == "cpu" and options.world_size > max_ranks:
        raise OptionError("--world-size", f"{options.world_size} is over {max_ranks}, the most ranks of one segment")
