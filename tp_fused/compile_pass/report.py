"""What the pass has done to the collectives of the graphs that it saw, and why it left some alone."""

import dataclasses


@dataclasses.dataclass
class Site:
    """A collective of a graph, or several that are added up.

    Bytes are what a rank receives for each token, over all its peers, by the least that the collective can move: an
    all-reduce counts as a reduce-scatter and an all-gather.
    """

    where: str  # the module whose output is reduced, or the norm, as far as torch knows
    form: str  # what stood there
    ops: tuple[str, ...] = ()  # what stands there now; empty where it was left
    because: str = ""  # why it was left
    notes: list[str] = dataclasses.field(default_factory=list)
    collectives_before: int = 1
    bytes_before: float = 0.0
    collectives_after: int = 1
    bytes_after: float = 0.0

    def __str__(self) -> str:
        outcome = " + ".join(self.ops) if self.ops else f"left, because {self.because}"
        notes = "".join(f"; {note}" for note in self.notes)
        return f"{self.where}: {self.form}: {outcome}{notes}"


@dataclasses.dataclass
class GraphReport:
    """One graph that was compiled."""

    sites: list[Site]
    because: str = ""  # why all of it was left

    @property
    def rewritten(self) -> list[Site]:
        return [site for site in self.sites if site.ops]

    @property
    def left(self) -> list[Site]:
        return [site for site in self.sites if not site.ops]

    def totals(self) -> dict[str, float]:
        """Collectives and bytes a token of all sites, before and after."""
        names = ("collectives_before", "bytes_before", "collectives_after", "bytes_after")
        return {name: sum(getattr(site, name) for site in self.sites) for name in names}

    def __str__(self) -> str:
        total = self.totals()
        lines = [
            f"{len(self.rewritten)} sites rewritten, {len(self.left)} left; collectives "
            f"{total['collectives_before']} -> {total['collectives_after']}, bytes a token and rank "
            f"{total['bytes_before']:.0f} -> {total['bytes_after']:.0f}"
        ]
        if self.because:
            lines = [f"left, because {self.because}"]
        return "\n".join([*lines, *(f"  {site}" for site in self.sites)])


@dataclasses.dataclass
class Report:
    """All graphs, in the order in which they were compiled."""

    graphs: list[GraphReport]
    from_cache: int = 0  # graphs that torch took from a cache of its own since the pass was made

    @property
    def sites(self) -> list[Site]:
        return [site for graph in self.graphs for site in graph.sites]

    @property
    def rewritten(self) -> list[Site]:
        return [site for site in self.sites if site.ops]

    @property
    def left(self) -> list[Site]:
        return [site for site in self.sites if not site.ops]

    def __str__(self) -> str:
        lines = [f"graph {index}: {graph}" for index, graph in enumerate(self.graphs)]
        if self.from_cache:
            lines.append(
                f"{self.from_cache} graphs came from torch's cache, as the pass had left them when they were compiled; "
                f"to see them here, compile with TORCHINDUCTOR_FORCE_DISABLE_CACHES=1"
            )
        return "\n".join(lines) if lines else "no graph has been compiled with the pass yet"
