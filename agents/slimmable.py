"""Search for the width of every channel space among a few, as slimmable networks have them: one distribution per space
or per size of spaces, moved by the score function towards networks that beat the uniformly slim ones of equal work.
After Zur et al. 2019 (arXiv 1904.09872), section on pruning, and their code (Slimmable).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agents.filter_nas import loss_of
from agents.genes import Account, Genome
from agents.score_function import Descent, advantages, score_gradient
from agents.uniform import Homogeneous, homogeneous_within, spread
from agents.width_distributions import DISTRIBUTIONS, Distribution, blocks_of
from ajpq.errors import AjpqError
from ajpq.problem import Problem, SearchResult

# -- loss -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Frontier:
    """Loss against cost of homogeneous networks, linear between them and constant beyond. costs: (m,) ascending,
    losses: (m,)."""

    costs: np.ndarray
    losses: np.ndarray

    def gap(self, loss: float, cost: float) -> float:
        """(loss - frontier) / |frontier| at this cost, a tenth of it where the frontier is beaten (LeakyReLU)."""
        level = float(np.interp(cost, self.costs, self.losses))
        relative = (loss - level) / max(abs(level), 1e-12)
        return relative if relative > 0 else 0.1 * relative


# -- the backend ------------------------------------------------------------------------------------------------------


class Slimmable:
    """Every step draws `samples` networks, the width of every channel space one of `widths`, scores them, forward only,
    and moves the alphas by the mean over samples of (index - E[index]) * loss. The network of the mean indices is
    scored at the start and after every step, too. The result is the best of all.

    Loss (the paper's fourth): how far a network is from the piecewise linear curve of loss against `cost` of
    the homogeneous ones, relative to it, a tenth of that where it is better. The curve is measured first.

    A width is the fraction of a space's channels that stays, the most important ones. All kernels have the width in
    bits, and all inputs, of the best homogeneous policy within budget, which a quarter of the evaluations at most
    finds; it is a point of the curve, and so are the homogeneous networks of `widths` that are within budget. Alphas
    begin where the mean is its sparsity (the paper begins in the middle). A drawn network outside a budget is scored
    after spaces were made one width narrower in random order until all hold (if none can be, any decision one option
    lower); with probability `fill`, what is left over is then given back channel by channel in random order. The loss
    is then a function of the indices and of chance, so the score function holds as before. The mean network is always
    filled.

    Switchable batch-norm, a set of statistics for every width, has for limit statistics of every policy's own: here
    batch-norms are corrected for each policy before it is scored. The paper also trains each sample together with the
    homogeneous widths; weights=shared (`ajpq.sharing`) does so before the search, under policies whose sparsity is
    nearly homogeneous at a random level, or independent.

    evaluations: policies to score. seed: of the draws. distribution: "categorical", "binomial" or "block_binomial", the
    paper's; on the digits network at 0.5 and 0.3 of its MACs, 40 evaluations and three seeds, "binomial" was best.
    widths: fractions in (0, 1]. samples: networks per step. cost: of the curve, "macs" in the paper.
    objective: "loss", that of the task; "reward" = minus the reward instead. lr, momentum, decay, clip: of `Descent`,
    for losses in standard deviations (`advantages`). Raises AjpqError for bad settings, where nothing may be pruned,
    and where the evaluator measures no loss.
    """

    def __init__(
        self,
        evaluations: int = 120,
        seed: int = 0,
        distribution: str = "binomial",
        widths: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
        samples: int = 5,
        lr: float = 0.5,
        momentum: float = 0.9,
        decay: float = 1.0,
        clip: float = 10.0,
        cost: str = "macs",
        objective: str = "loss",
        fill: float = 0.75,
    ) -> None:
        if distribution not in DISTRIBUTIONS:
            raise AjpqError(
                f"distribution must be one of {', '.join(DISTRIBUTIONS)}, but it is {distribution!r}; choose one"
            )
        if objective not in ("loss", "reward"):
            raise AjpqError(f"objective must be 'loss' or 'reward', but it is {objective!r}; choose one")
        self.widths = np.array(sorted(set(widths)), float)
        if len(self.widths) < 2 or self.widths[0] <= 0 or self.widths[-1] > 1:
            raise AjpqError(f"widths must be at least two fractions in (0, 1], but they are {widths}; choose others")
        if samples < 2:
            raise AjpqError(f"`samples >= 2` must hold, as a gradient compares samples, but it is {samples}; raise it")
        self.evaluations, self.seed, self.distribution, self.samples = evaluations, seed, distribution, samples
        self.lr, self.momentum, self.decay, self.clip = lr, momentum, decay, clip
        self.cost, self.objective, self.fill = cost, objective, fill

    def search(self, problem: Problem) -> SearchResult:
        if self.cost not in problem.budget.costs:
            raise AjpqError(
                f"cost must be one of {', '.join(problem.budget.costs)}, but it is {self.cost!r}; choose one"
            )
        genome = Genome(problem.space)
        blocks = blocks_of(genome, self.distribution)
        if not blocks:
            raise AjpqError(
                "a search for widths must be allowed to prune, but there is no space with a choice; put 0 into the "
                "weight_bits of the choices, raise max_sparsity or use another search"
            )
        return _Slimming(self, problem, genome, blocks).run()


class _Slimming:
    """One search."""

    def __init__(self, settings: Slimmable, problem: Problem, genome: Genome, blocks: list[np.ndarray]) -> None:
        self.settings, self.problem, self.genome, self.blocks = settings, problem, genome, blocks
        self.rng = np.random.default_rng(settings.seed)
        self.genes = np.concatenate(blocks)
        self.distribution: Distribution = DISTRIBUTIONS[settings.distribution](len(settings.widths))
        self.grid = {  # per gene the value of each width, or of the nearest wider one
            i: np.minimum([int((np.array(genome.genes[i].options) > 1 - w + 1e-9).sum()) for w in settings.widths],
                          genome.levels[i] - 1)
            for i in self.genes
        }  # fmt: skip

    @property
    def left(self) -> int:
        return self.settings.evaluations - self.problem.evaluations

    def run(self) -> SearchResult:
        settings, problem, rng, distribution = self.settings, self.problem, self.rng, self.distribution
        home = self._home()
        frontier, top = self._frontier(home), len(settings.widths) - 1
        level = float(np.interp(1 - home.sparsity, settings.widths, np.arange(top + 1)))
        alphas = [distribution.start(float(np.clip(level / top, 0.1, 0.9))) for _ in self.blocks]
        descent = Descent(alphas, settings.lr, settings.momentum, settings.decay, settings.clip)
        self._score([self._mean(alphas)], home, [True])
        for _ in range(10 * settings.evaluations):  # a network drawn twice is not an evaluation
            if self.left <= 0:
                break
            drawn = [
                [distribution.draw(alpha, len(block), rng) for alpha, block in zip(alphas, self.blocks, strict=True)]
                for _ in range(min(settings.samples, max(self.left - 1, 1)))
            ]
            scores = self._score(drawn, home, rng.random(len(drawn)) < settings.fill)
            losses = np.array([frontier.gap(loss_of(s, settings.objective), s.costs[settings.cost]) for s in scores])
            problem.log("slimmable/gap", losses.mean())
            if self.left > 0:
                gradients = [
                    score_gradient(
                        np.stack([distribution.statistic(indices) for indices in column]),
                        distribution.expected(alpha, len(block)),
                        advantages(losses),
                    )
                    for alpha, block, column in zip(alphas, self.blocks, zip(*drawn, strict=True), strict=True)
                ]
                descent.step(alphas, gradients, [False] * len(alphas))
                self._score([self._mean(alphas)], home, [True])
        return problem.result()

    def _home(self) -> Homogeneous:
        """The best homogeneous policy within budget."""
        points = homogeneous_within(self.problem)
        if not points:
            choices = self.problem.space.choices
            return Homogeneous(min(b for b in choices.weight_bits if b), choices.max_sparsity, choices.act_bits[0])
        points = spread(points, max(self.left // 4, 1))
        scores = self.problem.score_all([point.policy(self.problem) for point in points])
        return points[int(np.argmin([loss_of(score, self.settings.objective) for score in scores]))]

    def _frontier(self, home: Homogeneous) -> Frontier:
        """Of home and the homogeneous networks of the widths that are within budget, with its bits."""
        points = [home, *(Homogeneous(home.width, 1 - width, home.act_bits) for width in self.settings.widths[::-1])]
        policies = [self.genome.policy(point.values(self.genome)) for point in points]
        policies = [policy for policy in policies if self.problem.budget.admits(policy)]
        scores = self.problem.score_all(policies[: max(self.left, 0)] or policies[:1])
        losses = {s.costs[self.settings.cost]: loss_of(s, self.settings.objective) for s in scores}
        return Frontier(np.array(sorted(losses)), np.array([losses[cost] for cost in sorted(losses)]))

    def _mean(self, alphas: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [
            np.full(len(block), round(self.distribution.mean(alpha)))
            for alpha, block in zip(alphas, self.blocks, strict=True)
        ]

    def _score(self, drawn: Sequence[Sequence[np.ndarray]], home: Homogeneous, fill: Sequence[bool]) -> list:
        """Scores of networks, as indices per block, within budget; none if nothing is left to spend."""
        if self.left <= 0:
            return []
        accounts = [self._within(np.concatenate(indices), home) for indices in drawn]
        for account, fills in zip(accounts, fill, strict=True):
            while fills:
                fills = any([account.raised(i) for i in self.rng.permutation(self.genes)])
        return self.problem.score_all([self.genome.policy(account.values) for account in accounts])

    def _within(self, indices: np.ndarray, home: Homogeneous) -> Account:
        values, levels = home.values(self.genome), dict(zip(self.genes, indices, strict=True))
        for i, level in levels.items():
            values[i] = self.grid[i][level]
        account = Account(self.genome, self.problem.budget, values)
        while not account.fits and any(levels.values()):
            i = self.rng.choice([i for i, level in levels.items() if level])
            levels[i] -= 1
            account.take(account.look(i, self.grid[i][levels[i]])[2])
        account.trim(self.rng)
        return account
