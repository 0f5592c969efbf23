"""Bits where they matter most per bit of cost: the linear program that allocates under all budgets.

The control that needs few evaluations or none, after HAWQ-V3 (Yao et al. 2020, arXiv 2011.10680), which chooses widths
by integer programming over a sensitivity per layer and width. Here the table (`agents.sensitivity`) has a row per
kernel and 0 bits, pruning, as a column; the relaxation is solved, since it is nearly integral: a vertex has at most as
many fractional decisions as there are budgets.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import linprog

from agents.genes import Account, Genome
from agents.sensitivity import PRIOR, Sensitivity, homogeneous_start, measured_sensitivity, weight_sensitivity
from ajpq.errors import AjpqError
from ajpq.policy import CompressionPolicy
from ajpq.problem import Problem, SearchResult

PRUNING = 2.0  # what the error of a pruned kernel counts; ours: best of 0.5, 1, 2, 4 on ResNet-20 at size 1/16
SMALLEST_RADIUS = 0.03  # of the trust region, as a fraction of a decision's options


def allocate(
    problem: Problem, sensitivity: Sensitivity | None = None, pruning: float = PRUNING, rounds: int = 20
) -> CompressionPolicy:
    """The policy within all budgets with (nearly) the least summed sensitivity; no evaluation is spent.

    sensitivity: None = `weight_sensitivity`; `measured_sensitivity` spends evaluations beforehand. pruning: factor of
    its column of 0 bits. rounds: linear programs at most.

    Costs and sensitivities are products of what several decisions say: pruning a channel shortens the kernels of its
    readers and spares the bits of its writers, an input's width multiplies the bits of weights. So the program is
    solved in steps. Around the present policy every decision alone has, for each of its options, exact differences of
    every cost and of the sensitivity (widths: exact where a cost adds up over kernels); one option per decision is
    chosen (Sinha and Zoltners 1979, the multiple-choice knapsack; one x >= 0 per option, sum = 1) so that the summed
    differences of sensitivity are least and those of costs within what is left. Sparsities and input widths may move
    within a trust region only, which shrinks whenever a step does not help. A fractional decision takes its largest
    part. What then breaks a true budget is lowered, least sensitivity per cost first, and what is left over is spent,
    most sensitivity per cost first. The first policy is the homogeneous one with the least sensitivity.
    """
    genome = Genome(problem.space)
    sensitivity = (sensitivity or weight_sensitivity(problem)).pruning_counts(pruning)
    best = _settled(genome, problem, homogeneous_start(problem, genome, sensitivity), sensitivity)
    radius = 0.5
    for _ in range(rounds if len(genome) else 0):
        step = _settled(genome, problem, _program(best, sensitivity, radius), sensitivity)
        if step.losses.sum() < best.losses.sum() * (1 - 1e-6):
            best = step
        else:
            radius /= 4
            if radius < SMALLEST_RADIUS:
                break
    return genome.follow(problem.draft(), best.values)


# -- within the budgets -----------------------------------------------------------------------------------------------


def _settled(genome: Genome, problem: Problem, values: np.ndarray, sensitivity: Sensitivity) -> Account:
    """Within budget, and nothing left that could be spent on one decision."""
    account = Account(genome, problem.budget, values, sensitivity.of_layer)
    settle(account, np.ones(len(genome)), np.ones(len(genome)))
    return account


def settle(account: Account, down: np.ndarray, up: np.ndarray) -> None:
    """Lower decisions until all budgets hold, the least loss per cost first, then raise them wherever one still fits,
    the most loss per cost first. down, up: float64 (n_genes,), factors on the loss of lowering and of raising each."""
    _greedily(account, -1, _price_of_lowering, lambda: account.fits, down)
    _greedily(account, +1, _price_of_raising, lambda: False, up)


def _greedily(
    account: Account, move: int, price: Callable[[Account, np.ndarray, float], float | None], done: Callable[[], bool],
    factors: np.ndarray,
) -> None:  # fmt: skip
    """Move decisions by one option, always the one with the lowest price (None = not allowed, now and later)."""

    def asked(i: int) -> tuple[float, int] | None:
        value = int(account.values[i]) + move
        if not 0 <= value < account.genome.levels[i]:
            return None
        costs, loss, _ = account.look(i, value)
        now = price(account, costs, loss * factors[i])
        return None if now is None else (now, i)

    if done():
        return
    heap = [entry for i in range(len(account.genome)) if (entry := asked(i)) is not None]
    heapq.heapify(heap)
    while heap and not done():
        _, i = heapq.heappop(heap)
        entry = asked(i)  # prices change with every move
        if entry is not None and heap and entry > heap[0]:
            heapq.heappush(heap, entry)
        elif entry is not None:
            account.take(account.look(i, int(account.values[i]) + move)[2])
            if (entry := asked(i)) is not None:
                heapq.heappush(heap, entry)


def _price_of_lowering(account: Account, costs: np.ndarray, loss: float) -> float:
    """Sensitivity per part of the broken budgets that is saved."""
    saved = float((-costs / account.budget.caps)[account.total > account.budget.caps].sum())
    return loss / max(saved, 1e-12)  # what saves nothing goes last, the least sensitive first


def _price_of_raising(account: Account, costs: np.ndarray, loss: float) -> float | None:
    """Minus the sensitivity that goes, per part of what is left of the scarcest budget."""
    if loss >= 0 or not account.budget.fits(account.total + costs):
        return None
    left = np.maximum(account.budget.caps - account.total, 1e-9 * account.budget.caps)
    return loss / max(float((costs / left).max()), 1e-12)


# -- the program ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Options:
    """Columns of the program: what decision `gene` at `value` adds."""

    gene: Sequence[int]
    value: Sequence[int]
    loss: Sequence[float]
    costs: Sequence[np.ndarray]  # (n limits,) each


def _program(now: Account, sensitivity: Sensitivity, radius: float) -> np.ndarray:
    """Values that minimise the linearised sensitivity under the linearised budgets."""
    layers = range(len(now.genome.network.layers))
    parts = [_options_of_gene(now, i, radius) for i, gene in enumerate(now.genome.genes) if gene.kind != "width"]
    parts += [_options_of_widths(now, sensitivity, at) for at in layers if now.genome.first_width[at] is not None]
    gene, value, loss = (np.concatenate([getattr(part, f) for part in parts]) for f in ("gene", "value", "loss"))
    costs = np.concatenate([part.costs for part in parts]) / now.budget.caps  # (n options, n limits)
    present, row = np.unique(gene, return_inverse=True)
    answer = linprog(
        loss / max(np.abs(loss).max(), 1e-30) * 1e4,  # far above the tolerances of the solver
        A_ub=costs.T,
        b_ub=1 - now.total / now.budget.caps,
        A_eq=sparse.csr_array((np.ones(len(gene)), (row, np.arange(len(gene))))),
        b_eq=np.ones(len(present)),
        bounds=(0, 1),
        method="highs",
    )
    values = now.values.copy()
    if answer.x is not None:
        order = np.lexsort((-value, answer.x))  # of every decision, its largest part comes last, the cheaper of equals
        values[gene[order]] = value[order]
    return values


def _options_of_gene(now: Account, i: int, radius: float, most: int = 17) -> _Options:
    """A sparsity's or an input width's options within the trust region, at most `most` of them."""
    reach, at = max(1, int(radius * now.genome.levels[i])), int(now.values[i])
    low, high = max(at - reach, 0), min(at + reach, int(now.genome.levels[i]) - 1)
    options = sorted({at, *np.linspace(low, high, min(most, high - low + 1)).round().astype(int).tolist()})
    looks = [now.look(i, option) for option in options]
    return _Options([i] * len(options), options, [loss for _, loss, _ in looks], [costs for costs, _, _ in looks])


def _options_of_widths(now: Account, sensitivity: Sensitivity, at: int) -> _Options:
    """Every width of every block of a layer."""
    genome, layer = now.genome, now.genome.network.layers[at]
    widths, blocks = genome.space.widths(layer), genome.blocks(at, now.alive)
    kernels, sizes = np.concatenate(blocks), np.array([len(block) for block in blocks])
    starts, genes = np.cumsum(sizes) - sizes, genome.first_width[at] + np.arange(len(blocks))
    kept, act = now.alive[layer.writes], genome.act_bits(at, now.values)
    costs = np.stack(
        [now.budget.layer_costs(layer, np.where(kept, b, 0).astype(np.uint8), act, now.alive) for b in widths]
    ) / len(kernels)  # (n widths, n limits), per kernel
    losses = np.stack([np.add.reduceat(sensitivity.weights[layer.name][b][kernels], starts) for b in widths])
    here = now.values[genes]
    return _Options(
        np.repeat(genes, len(widths)),
        np.tile(np.arange(len(widths)), len(blocks)),
        (losses - losses[here, np.arange(len(blocks))]).T.ravel(),
        ((costs[None] - costs[here][:, None]) * sizes[:, None, None]).reshape(-1, costs.shape[1]),
    )


# -- the backend ------------------------------------------------------------------------------------------------------


class LinearProgram:
    """Policies from `allocate`, the best of a few.

    evaluations: at most so many policies are scored, those that measure sensitivities included.
    sensitivity: "weights", no evaluation needed; or "measured", which spends what the variants leave on
        `measured_sensitivity` and then tries that table, one closer to the weights' (prior 1), and the weights'.
    pruning: the factors on the column of 0 bits that are tried, with each table; one policy each.
    """

    def __init__(
        self, evaluations: int = 120, sensitivity: str = "measured", pruning: Sequence[float] = (2.0, 1.0, 4.0)
    ) -> None:
        if sensitivity not in ("weights", "measured"):
            raise AjpqError(f"sensitivity must be 'weights' or 'measured', but it is {sensitivity!r}; choose one")
        self.evaluations, self.sensitivity, self.pruning = evaluations, sensitivity, tuple(pruning)
        self.found: Sensitivity | None = None  # of the last search's best policy

    def search(self, problem: Problem) -> SearchResult:
        errors = weight_sensitivity(problem)
        tables = [errors]
        probes = self.evaluations - problem.evaluations - 3 * len(self.pruning)
        if self.sensitivity == "measured" and probes > 1:
            priors = (PRIOR, 1.0)  # the second table scores nothing anew
            tables = [*(measured_sensitivity(problem, probes, prior, errors) for prior in priors), errors]
        left = max(self.evaluations - problem.evaluations, 0)
        variants = [(factor, table) for factor in self.pruning for table in tables][:left]
        policies = [allocate(problem, table, factor) for factor, table in variants]
        scores = problem.score_all(policies)
        if scores:
            best = max(range(len(scores)), key=lambda i: scores[i].reward)
            self.found = variants[best][1].pruning_counts(variants[best][0])
        return problem.result()
