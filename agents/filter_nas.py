"""Filter-level search for widths: how many kernels of a layer get which width is drawn from one distribution per layer,
and the distributions move by the score function. After Zur et al. 2019 (arXiv 1904.09872), section on quantization, and
their code (darts-UNIQ).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from agents.genes import Account, Genome
from agents.partitions import Partitions
from agents.score_function import Descent, Freezer, advantages, score_gradient, softmax
from agents.uniform import homogeneous_within, spread
from ajpq.cost import total
from ajpq.errors import AjpqError
from ajpq.policy import CompressionPolicy
from ajpq.problem import Problem, Score, SearchResult


class FilterNAS:
    """Every step draws `samples` partitions from a multinomial per layer, scores them, forward only, and moves the
    alphas by ``E[n_i L] - E[L] n softmax_i`` (`agents.score_function`). A layer whose largest probability was `freeze`
    or more ten times in a row rests. The deterministic partition of the start and that after every step are scored,
    too. The result is the best of all.

    Loss: ``CE + penalty * sum over costs of (cost / base)^2``, CE the loss of the Score (cross-entropy in nats), base
    the budget (of a cost without one: the original's cost), the cost that of the partition as it was drawn. cost: only
    this one, "bops" or "uniq_bops" as in the paper; None = every limited one.

    Ours, as the paper has neither hard budgets nor so few evaluations:
    (1) Alphas begin with the probabilities of the paper, all the same but 8 bits half as likely, and by a part `trust`
    with those of the best homogeneous policy within budget, which a quarter of the evaluations at most finds; trust=0:
    the paper's alone. Digits network, 5 epochs, cross-entropy of the best of 40 evaluations, mean of three seeds, trust
    0, 0.5, 0.75, 0.9: 0.185, 0.186, 0.179, 0.188 at size 0.08, 0.440, 0.494, 0.481, 0.503 at size 0.055. With lr=0:
    0.188 and 0.519; uniform: 0.231 and 0.970; filled uniform: 0.177 and 0.427.
    (2) They are tilted towards the narrow by the same slope everywhere, at the start and after every step, until the
    expected partition is within budget.
    (3) A drawn partition outside a budget is scored after decisions were lowered by one option in random order until
    all hold; with probability `fill`, what is left over is then spent in random order. The loss is then a function of
    the counts and of chance, so the score function holds as before. The deterministic partition is always filled.
    (4) Weights are not trained meanwhile: batch-norms are corrected before every score. The paper trains weights
    between steps; for weights that serve every partition use weights=shared.

    evaluations: policies to score. seed: of the draws. samples: partitions per step. lr, momentum, decay, clip: of
    `Descent`, as in the paper but for the learning rate (0.1 there), which is for losses in standard deviations
    (`advantages`). objective: "loss", that of the task; "reward" = minus the reward instead. prune: 0 bits is a choice;
    otherwise spaces are pruned as in the best homogeneous policy, and more only where narrow widths do not suffice.
    Raises AjpqError for an unknown cost or objective and where the evaluator measures no loss.
    """

    def __init__(
        self,
        evaluations: int = 120,
        seed: int = 0,
        samples: int = 9,
        lr: float = 0.5,
        momentum: float = 0.9,
        decay: float = 0.999,
        clip: float = 10.0,
        penalty: float = 1.0,
        cost: str | None = None,
        objective: str = "loss",
        trust: float = 0.5,
        prune: bool = False,
        freeze: float = 0.8,
        fill: float = 0.75,
    ) -> None:
        if objective not in ("loss", "reward"):
            raise AjpqError(f"objective must be 'loss' or 'reward', but it is {objective!r}; choose one")
        if samples < 2:
            raise AjpqError(f"`samples >= 2` must hold, as a gradient compares samples, but it is {samples}; raise it")
        self.evaluations, self.seed, self.samples = evaluations, seed, samples
        self.lr, self.momentum, self.decay, self.clip = lr, momentum, decay, clip
        self.penalty, self.cost, self.objective = penalty, cost, objective
        self.trust, self.prune, self.freeze, self.fill = trust, prune, freeze, fill

    def search(self, problem: Problem) -> SearchResult:
        bases = bases_of(problem, self.cost)
        rng, genome = np.random.default_rng(self.seed), Genome(problem.space)
        partitions = Partitions(genome, self._home(problem, genome), self.prune)
        alphas = partitions.initial(self.trust)
        spare = [i for i, gene in enumerate(genome.genes) if gene.kind == "sparsity" and not self.prune]
        freezer = Freezer(len(alphas), self.freeze, times=10)
        descent = Descent(alphas, self.lr, self.momentum, self.decay, self.clip)

        def policy(counts: Sequence[np.ndarray], fill: bool) -> CompressionPolicy:
            account = Account(genome, problem.budget, partitions.values(counts))
            account.trim(rng, spare=spare)
            if fill:
                account.fill(rng.permutation(len(genome)))
            return genome.policy(account.values)

        partitions.meet(alphas, problem, freezer.frozen)
        if self.evaluations > problem.evaluations:
            problem.score(policy(partitions.deterministic(alphas), fill=True))
        for _ in range(10 * self.evaluations):  # a partition drawn twice is not an evaluation
            left = self.evaluations - problem.evaluations
            if left <= 0:
                break
            drawn = [partitions.draw(alphas, rng) for _ in range(min(self.samples, max(left - 1, 1)))]
            scores = problem.score_all([policy(counts, rng.random() < self.fill) for counts in drawn])
            penalties = [_penalty(problem, genome.policy(partitions.values(counts)), bases) for counts in drawn]
            losses = np.array([loss_of(score, self.objective) for score in scores]) + self.penalty * np.array(penalties)
            problem.log("filter_nas/loss", losses.mean())
            if left > 1 and alphas:
                columns = zip(partitions.choices, alphas, zip(*drawn, strict=True), strict=True)
                gradients = [
                    score_gradient(np.array(counts), choice.parts * softmax(alpha), advantages(losses))
                    for choice, alpha, counts in columns
                ]
                descent.step(alphas, gradients, freezer.frozen)
                partitions.meet(alphas, problem, freezer.frozen)
                freezer.look([softmax(alpha).max() for alpha in alphas])
                problem.score(policy(partitions.deterministic(alphas), fill=True))
        return problem.result()

    def _home(self, problem: Problem, genome: Genome) -> np.ndarray:
        """The best homogeneous policy within budget, found by a quarter of the evaluations at most; with no trust in
        it the one that prunes least, for nothing."""
        points = homogeneous_within(problem)
        if not points:
            return genome.cheapest()
        if not self.trust:
            return min(points, key=lambda point: point.sparsity).values(genome)
        points = spread(points, max((self.evaluations - problem.evaluations) // 4, 1))
        scores = problem.score_all([point.policy(problem) for point in points])
        losses = [loss_of(score, self.objective) for score in scores]
        return points[int(np.argmin(losses))].values(genome)


def bases_of(problem: Problem, cost: str | None) -> dict[str, float]:
    """What each penalised cost is divided by, in its unit. Raises AjpqError for a cost that is none."""
    budget = problem.budget
    if cost is not None and cost not in budget.costs:
        raise AjpqError(f"cost must be one of {', '.join(budget.costs)} or null, but it is {cost!r}; choose one")
    names = budget.names if cost is None else (cost,)
    return {name: budget.original[name] * budget.limits.get(name, 1.0) for name in names}


def loss_of(score: Score, objective: str) -> float:
    """What is minimised. objective: "loss", that of the task, for classification the cross-entropy in nats, or
    "reward", minus the reward. Raises AjpqError where the evaluator does not measure it."""
    if objective == "reward":
        return -score.reward
    if score.loss is None:
        raise AjpqError(
            "this search needs the loss, but the evaluator measures accuracy only; use search.objective=reward or "
            "another evaluator"
        )
    return score.loss


def _penalty(problem: Problem, policy: CompressionPolicy, bases: Mapping[str, float]) -> float:
    costs, network = problem.budget.costs, problem.network
    return sum((total(costs[name], network, policy) / base) ** 2 for name, base in bases.items())
