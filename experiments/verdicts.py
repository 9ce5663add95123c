"""When a claim of the paper is said to hold: verdicts on differences of means, with their confidence intervals."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats

HOLDS, IN_PART, FAILS, UNDECIDED = "holds", "holds in part", "does not hold", "undecided"
VERDICTS = (HOLDS, IN_PART, FAILS, UNDECIDED)


class Measured(NamedTuple):
    """What came out, in words with numbers, the verdict, and what it was measured on if the files say that."""

    text: str
    verdict: str
    on: str = ""


class Gap(NamedTuple):
    """A difference of two means, and half the width of its 95 % confidence interval; NaN if a run diverged."""

    difference: float
    error: float

    def __str__(self) -> str:
        return "unknown, since runs diverged" if math.isnan(self.difference) else f"{self[0]:+.1f} ± {self[1]:.1f}"


def gap(first: Sequence[float], second: Sequence[float]) -> Gap:
    """Returns the difference of two means over seeds, by Welch's t-test.

    >>> print(gap([3.0, 4.0, 5.0], [1.0, 1.5, 2.0]))
    +2.5 ± 2.1
    """
    difference = statistics.mean(first) - statistics.mean(second)
    if len({*first}) == len({*second}) == 1:
        # No seed changes anything, and the test knows no degrees of freedom.
        return Gap(difference, 0.0)
    low, high = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    return Gap(difference, (high - low) / 2)


def at_most(limit: float, found: Gap) -> str:
    """Returns the verdict for a claim that a difference is at most so much.

    >>> at_most(1.0, Gap(0.5, 0.2)), at_most(1.0, Gap(0.5, 2.0)), at_most(1.0, Gap(2.5, 0.2))
    ('holds', 'undecided', 'does not hold')
    """
    if found.difference + found.error <= limit:
        return HOLDS
    return FAILS if found.difference - found.error > limit else UNDECIDED


def at_least(limit: float, found: Gap) -> str:
    """Returns the verdict for a claim that a difference is at least so much.

    >>> at_least(5.0, Gap(6.0, 0.5)), at_least(5.0, Gap(6.0, 2.0)), at_least(5.0, Gap(2.5, 0.2))
    ('holds', 'undecided', 'does not hold')
    """
    return at_most(-limit, Gap(-found.difference, found.error))


def somewhere(verdicts: Sequence[str]) -> str:
    """Returns the verdict for a claim that something is true of some of these.

    >>> somewhere(["does not hold", "holds"]), somewhere(["does not hold", "undecided"]), somewhere(["does not hold"])
    ('holds', 'undecided', 'does not hold')
    """
    return HOLDS if HOLDS in verdicts else UNDECIDED if UNDECIDED in verdicts else FAILS


def everywhere(verdicts: Sequence[str]) -> str:
    """Returns the verdict for a claim that something is true of all of these.

    >>> everywhere(["holds", "holds"]), everywhere(["holds", "undecided"]), everywhere(["does not hold", "undecided"])
    ('holds', 'undecided', 'does not hold')
    """
    return FAILS if FAILS in verdicts else UNDECIDED if UNDECIDED in verdicts else HOLDS


def share(good: int, of: int) -> str:
    """Returns the verdict for a claim that is true in so many of all cases.

    >>> share(3, 3), share(1, 3), share(0, 3)
    ('holds', 'holds in part', 'does not hold')
    """
    return HOLDS if good == of else IN_PART if good else FAILS


def together(verdicts: Sequence[str]) -> str:
    """Returns the verdict on several data sets: the common one, or in part if the claim is true of some.

    >>> together(["holds", "holds"]), together(["holds", "does not hold"]), together(["undecided", "does not hold"])
    ('holds', 'holds in part', 'undecided')
    """
    if len({*verdicts}) == 1:
        return verdicts[0]
    return IN_PART if {*verdicts} & {HOLDS, IN_PART} else UNDECIDED
