"""When to give a candidate up before all images were seen."""

from __future__ import annotations

LOOKS = (0.125, 0.25, 0.5)  # fractions of the images after which a candidate may be given up


def hopeless(hits: int, seen: int, best: int, images: int, risk: float) -> bool:
    """Whether a candidate with `hits` right among `seen` images can be taken to stay at or below `best` right of all.

    The images seen are a random sample without replacement, so for a candidate with K right in all the hits are
    hypergeometric. Given up is one for which even K = best + 1 would give so few hits with a probability of at most
    `risk` / number of looks: over all looks, a candidate better than the best is lost with probability `risk` at most
    (union bound). Certain cases need no probability.
    """
    if hits + (images - seen) <= best:
        return True
    from scipy.stats import hypergeom  # takes a second to import, and only racing needs it

    return bool(hypergeom.cdf(hits, images, best + 1, seen) <= risk / len(LOOKS))
