"""Why rows cannot be used, counted by reason."""

from collections import Counter

_MAX_REASONS = 50  # that are counted by themselves: they quote what rows say, such as roles


def count_problem(counts: Counter[str], problem: str) -> None:
    """Count a problem by its reason; the reasons are few, whatever data hold."""
    reason = reason_of(problem)
    is_known = reason in counts or len(counts) < _MAX_REASONS
    counts[reason if is_known else "other reasons"] += 1


def reason_of(problem: str) -> str:
    """Return the kind of a problem, for counting: without the details, which follow a sign."""
    ends = [at for sign in (":", ";", " (", ",") if (at := problem.find(sign)) > 0]
    return problem[: min(ends, default=len(problem))]
