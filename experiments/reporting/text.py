"""The pieces that every section is made of: Markdown tables, numbers with a sign, and verdicts on what was required."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from reporting.statistics import Difference, outcome

NOT_RUN = "Not run."
MISSING = "not run"  # in a table


@dataclass(frozen=True)
class Verdict:
    """One requirement and what the rows say: met, not met, no clear difference, or not run."""

    requirement: str
    result: str
    numbers: str


@dataclass
class Section:
    """A section of the page. ``claim``: the paper's, in one sentence. ``notes``: its heading in docs/results_notes.md."""

    title: str
    notes: str
    claim: str
    lines: list[str] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    def add(self, *blocks: str | list[str]) -> None:
        """Paragraphs, or lists of lines that belong together; an empty line stands behind each."""
        for block in blocks:
            self.lines += [block, ""] if isinstance(block, str) else [*block, ""]


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> list[str]:
    """Lines of a Markdown table; the first ``words`` columns are text, the others numbers."""
    rule = [*["---"] * words, *["---:"] * (len(headers) - words)]
    return [f"| {' | '.join(line)} |" for line in (headers, rule, *rows)]


def picture(name: str, text: str) -> str:
    return f"![{text}](figures/{name}.svg)"


def signed(value: float, digits: int = 4) -> str:
    """+0.1230 or −0.1230; without a sign where nothing but zeros is left."""
    shown = f"{abs(value):.{digits}f}"
    return shown if not float(shown) else ("+" if value > 0 else "−") + shown


def percent(share: Difference) -> str:
    """A share and its standard error, where less than nothing is possible."""
    return f"{signed(100 * share.value, 0).removeprefix('+')}% ± {100 * share.error:.0f}"


def difference(value: Difference, digits: int = 4, factor: float = 1.0) -> str:
    return f"{signed(factor * value.value, digits)} ± {factor * value.error:.{digits}f}"


def below(requirement: str, by_seed: dict[int, Difference]) -> Verdict:
    """Whether the first of two models is below the second: in the mean, and in every seed by more than two errors."""
    if not by_seed:
        return Verdict(requirement, MISSING, "")
    mean = sum(d.value for d in by_seed.values()) / len(by_seed)
    if mean >= 0:
        result = "not met"
    else:
        result = "met" if outcome(list(by_seed.values())) < 0 else "no clear difference"
    numbers = ", ".join(f"{difference(d)} (seed {seed})" for seed, d in by_seed.items())
    return Verdict(requirement, result, f"{numbers} nats")


def direction(differences: Sequence[Difference], lower: str = "lower", higher: str = "higher") -> str:
    """In words: what all seeds agree on beyond two standard errors."""
    return {-1: lower, 1: higher, 0: "no clear difference"}[outcome(differences)]
