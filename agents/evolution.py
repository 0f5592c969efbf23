"""Evolution by Optuna's NSGA-II, with the budgets as its constraints."""

from __future__ import annotations

import numpy as np
import optuna
from optuna.trial import TrialState

from agents.genes import Account, Genome
from agents.uniform import homogeneous_within, spread
from ajpq.errors import check_counts
from ajpq.problem import Problem, SearchResult


class NSGA2:
    """NSGA-II (Deb et al. 2002) with constrained domination, as Optuna's `NSGAIISampler` implements it: uniform
    crossover, one gene in n redrawn. The genes are the decisions, whatever they cost; the constraints are each cost's
    ratio to its cap minus 1; the objective is the reward.

    A policy outside a budget is told to Optuna with how far, and not scored: its cost is known without. Left at that,
    most of a tight budget's proposals would teach nothing else, so its repair (decisions lowered by one option in
    random order until all budgets hold) is the next proposal; so is, for one within budget that leaves something over,
    the one in which that is spent in random order. Every policy that is scored thus has the genes that Optuna is told,
    and at most every other proposal is free. The first population is the homogeneous policies within budget and
    copies of the best of them in which a part `spread` of the decisions moved by one option.

    The additions are ours: for ResNet-20 at size 1/16 and 200 evaluations of minus the logarithm of the summed
    sensitivity of `agents.sensitivity` (mean of 3 seeds), NSGA-II reaches -1.75 without them, -1.02 with the first
    population, -0.98 if repairs count for the genes that were asked, -0.79 so; random search -1.80. Populations of 20
    and the cost as a second objective were worse.

    evaluations: policies to score. seed: of the sampler and of all draws. population: proposals per generation.
    """

    def __init__(self, evaluations: int = 120, seed: int = 0, population: int = 10, spread: float = 0.15) -> None:
        check_counts(2, population=population)
        self.evaluations, self.seed, self.population, self.spread = evaluations, seed, population, spread

    def search(self, problem: Problem) -> SearchResult:
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            _Evolution(self, problem).run()
        finally:
            optuna.logging.set_verbosity(verbosity)
        return problem.result()


class _Evolution:
    def __init__(self, settings: NSGA2, problem: Problem) -> None:
        self.settings, self.problem, self.genome = settings, problem, Genome(problem.space)
        self.rng = np.random.default_rng(settings.seed)
        sampler = optuna.samplers.NSGAIISampler(population_size=settings.population, seed=settings.seed)
        self.study = optuna.create_study(direction="maximize", sampler=sampler)
        self.queued = 0

    def run(self) -> None:
        wanted, population = self.settings.evaluations, self.settings.population
        points = spread(homogeneous_within(self.problem), max(population // 2, 1))
        starts = [point.values(self.genome) for point in points] or [self.genome.cheapest()]
        for values in starts:
            self._queue(values)
        for proposal in range(wanted * 20):  # a free proposal, and a policy proposed twice, is not an evaluation
            if self.problem.evaluations >= wanted:
                break
            if proposal == len(starts):
                best = max(starts, key=lambda values: self.problem.score(self.genome.policy(values)).reward)
                for _ in range(population - len(starts)):
                    self._queue(self._mutant(best))
            self._propose()

    def _queue(self, values: np.ndarray) -> None:
        self.study.enqueue_trial({str(i): int(value) for i, value in enumerate(values)})
        self.queued += 1

    def _mutant(self, values: np.ndarray) -> np.ndarray:
        moves = self.rng.choice((-1, 1), len(values)) * (self.rng.random(len(values)) < self.settings.spread)
        account = Account(self.genome, self.problem.budget, np.clip(values + moves, 0, self.genome.levels - 1))
        return self._mended(account)

    def _mended(self, account: Account) -> np.ndarray:
        account.trim(self.rng)
        account.fill(self.rng.permutation(len(self.genome)))
        return account.values

    def _propose(self) -> None:
        trial = self.study.ask()
        _ = trial.relative_params  # sampled when asked for; Optuna counts only trials that did into a generation
        mended, self.queued = self.queued > 0, max(self.queued - 1, 0)  # queued trials come first
        levels = self.genome.levels.tolist()
        values = np.array([trial.suggest_int(str(i), 0, n - 1) for i, n in enumerate(levels)], np.int64)
        account = Account(self.genome, self.problem.budget, values)
        for name, used in zip(self.problem.budget.limits, account.total / self.problem.budget.caps, strict=True):
            trial.set_constraint(name, 0.0 if account.fits else used - 1)
        if not account.fits:
            self.study.tell(trial, 0.0)  # counts against no policy within budget
            self._queue(self._mended(account))
        elif not mended and (self._mended(account) != values).any():
            self.study.tell(trial, state=TrialState.FAIL)  # never in a population
            self._queue(account.values)
        else:
            self.study.tell(trial, self.problem.score(self.genome.policy(values)).reward)
