"""What a run was asked to do: checked once, before any process is started, and handed to every rank."""

from dataclasses import dataclass

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


def check(options: Options, max_hidden: int, max_ranks: int, torchrun_ranks: int | None) -> None:
    """Raises OptionError for what can be known to fail without starting a rank."""
    if torchrun_ranks is not None and options.world_size != torchrun_ranks:
        raise OptionError("--world-size", f"{options.world_size} was asked for, torchrun runs {torchrun_ranks} ranks")
    if options.q_lora < 0:
        raise OptionError(
            "--latent",
            f"{options.latent} columns are fewer than --kv-lora {options.kv_lora} + --rope {options.rope}",
        )
    if options.backend in ("cpu", "cuda") and options.backend != options.device:
        raise OptionError("--backend", f"{options.backend} works on {options.backend} tensors, --device says otherwise")
    if options.backend != "reference" and options.hidden > max_hidden:
        raise OptionError(
            "--hidden", f"{options.hidden} is over {max_hidden}, the widest row the kernels reduce; --backend reference"
        )
    if options.backend == "cpu" and options.world_size > max_ranks:
        raise OptionError("--world-size", f"{options.world_size} is over {max_ranks}, the most ranks of one segment")
