"""Hill climbing: a few decisions of the present policy are changed, and the better policy is kept."""

from __future__ import annotations

import numpy as np

from agents.genes import Account, Genome
from agents.uniform import homogeneous_within, spread
from ajpq.errors import AjpqError, check_counts
from ajpq.problem import Problem, SearchResult


class HillClimbing:
    """Starts from the best homogeneous policy within budget. A proposal moves one and a few more decisions (a Poisson
    number, `changes` on average) up or down by at most `reach` of their options; if that breaks a budget, other
    decisions are lowered in random order by one option until all hold; with probability `fill`, decisions are then
    raised by one option in random order wherever that fits. So a gain here is paid there, and no proposal leaves the
    budget. One that is at least as good is the next policy. After `patience` proposals in a row that were not better
    the next homogeneous policy is the start.

    evaluations: policies to score, of which a quarter at most are homogeneous. seed: of the draws. batch: proposals
    from the same policy that are scored together, for an evaluator with several workers. The numbers are ours.
    """

    def __init__(
        self,
        evaluations: int = 120,
        seed: int = 0,
        changes: float = 2.0,
        reach: float = 0.25,
        fill: float = 0.75,
        patience: int = 100,
        batch: int = 1,
    ) -> None:
        check_counts(1, batch=batch, patience=patience)
        if not changes >= 1:
            raise AjpqError(
                f"`changes >= 1` must hold for hill climbing, but {changes=}; 1 moves one decision at a time"
            )
        self.evaluations, self.seed, self.changes, self.reach = evaluations, seed, changes, reach
        self.fill, self.patience, self.batch = fill, patience, batch

    def search(self, problem: Problem) -> SearchResult:
        rng, genome = np.random.default_rng(self.seed), Genome(problem.space)
        few = max((self.evaluations - problem.evaluations) // 4, 1)
        starts = [p.values(genome) for p in spread(homogeneous_within(problem), few)] or [genome.cheapest()]
        rewards = [score.reward for score in problem.score_all([genome.policy(values) for values in starts])]
        ranked = sorted(zip(rewards, starts, strict=True), key=lambda pair: -pair[0])
        best, present, failures, climbs = *ranked[0], 0, 1
        left = self.evaluations * 10  # a policy proposed twice is not an evaluation
        while problem.evaluations < self.evaluations and left > 0 and len(genome):
            n = min(self.evaluations - problem.evaluations, self.batch)
            proposals = [self._neighbour(problem, genome, present, rng) for _ in range(n)]
            scores = problem.score_all([genome.policy(values) for values in proposals])
            failures, left = failures + n, left - n
            for score, values in zip(scores, proposals, strict=True):
                if score.reward >= best:
                    failures = 0 if score.reward > best else failures
                    best, present = score.reward, values
            if failures >= self.patience:
                (best, present), failures, climbs = ranked[climbs % len(ranked)], 0, climbs + 1
        return problem.result()

    def _neighbour(self, problem: Problem, genome: Genome, present: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        n = min(1 + rng.poisson(self.changes - 1), len(genome))
        chosen = rng.choice(len(genome), n, replace=False)
        reach = np.maximum(np.round(self.reach * (genome.levels[chosen] - 1)), 1).astype(int)
        values = present.copy()
        values[chosen] += rng.integers(1, reach + 1) * rng.choice((-1, 1), n)
        account = Account(genome, problem.budget, np.clip(values, 0, genome.levels - 1))
        account.trim(rng, spare=chosen)
        if rng.random() < self.fill:
            account.fill(rng.permutation(len(genome)))
        return account.values
