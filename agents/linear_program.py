"""Bits where they matter most per bit of cost: sensitivities, and the linear program that allocates under all budgets.

The control that needs few evaluations or none, after HAWQ-V3 (Yao et al. 2020, arXiv 2011.10680), which chooses widths
by integer programming over a sensitivity per layer and width. Here the table has a row per kernel and 0 bits, pruning,
as a column; the relaxation is solved, since it is nearly integral: a vertex has at most as many fractional decisions as
there are budgets.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import linprog

from agents.genes import Account, Genome
from agents.uniform import homogeneous_within
from ajpq import quantize
from ajpq.bank import WeightBank
from ajpq.calibration import InputRange
from ajpq.errors import AjpqError
from ajpq.importance import _gains
from ajpq.network import LayerSpec, Network
from ajpq.policy import CompressionPolicy
from ajpq.problem import Problem, SearchResult

PRUNING = 2.0  # what the error of a pruned kernel counts; ours: best of 0.5, 1, 2, 4 on ResNet-20 at size 1/16
PRIOR = 0.1  # of the median factor; ours: best of 0.001, 0.03, 0.1, 0.3, 1 over three budgets and two rewards there
SMALLEST_RADIUS = 0.03  # of the trust region, as a fraction of a decision's options


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """How much every single decision hurts; the sum over all is what `allocate` minimises.

    weights: layer name -> width (0 = pruned) -> float64 (c_out,), one number per kernel
    acts: layer name -> width of its input -> number
    """

    weights: Mapping[str, Mapping[int, np.ndarray]]
    acts: Mapping[str, Mapping[int, float]]

    def of_layer(self, layer: LayerSpec, weight_bits: np.ndarray, act_bits: int) -> float:
        """weight_bits (c_out,)."""
        table = self.weights[layer.name]
        kernels = sum(float(table[int(b)][weight_bits == b].sum()) for b in np.unique(weight_bits))
        return kernels + self.acts[layer.name][act_bits]

    def of(self, network: Network, policy: CompressionPolicy) -> float:
        return sum(self.of_layer(x, policy.weight_bits[x.name], policy.act_bits[x.name]) for x in network.layers)

    def pruning_counts(self, factor: float) -> Sensitivity:
        """The same, with the column of 0 bits multiplied."""
        weights = {
            name: {b: errors * factor if b == 0 else errors for b, errors in table.items()}
            for name, table in self.weights.items()
        }
        return Sensitivity(weights, self.acts)


# -- sensitivity of weights, without data -----------------------------------------------------------------------------


def weight_sensitivity(problem: Problem) -> Sensitivity:
    """Noise over signal at every layer's output, no evaluation needed.

    Kernel k of layer l at b bits: ``g_k^2 ||W_k - Q_b(W_k)||^2 / sum_j g_j^2 ||W_j||^2``, where g is the gain of the
    batch-norm folded into the layer and Q_0 = 0: the part of the layer's output power that becomes error if its input
    is white. Input of layer l at b bits: ``E[(x - Q_b(x))^2] / E[x^2]``, from the histogram of the calibration, which
    is the same ratio for the other factor of the product. Ratios of noise to signal add up along a network to first
    order (Lin, Talathi and Annapureddy 2016, arXiv 1511.06393, section 3); that they are worth the same in every layer
    is their assumption, too.
    """
    space, network = problem.space, problem.space.network
    bank, gains = WeightBank(network), _gains(network)
    weights, acts = {}, {}
    for layer in network.layers:
        power = np.square(gains.get(layer.name, np.ones(layer.c_out)))
        errors = {b: power * _squared_error(bank, layer, b) for b in (0, *space.widths(layer))}
        weights[layer.name] = {b: error / max(errors[0].sum(), 1e-30) for b, error in errors.items()}
        acts[layer.name] = {b: _noise_to_signal(problem.calibration[layer.name], b) for b in space.acts(layer)}
    return Sensitivity(weights, acts)


def _squared_error(bank: WeightBank, layer: LayerSpec, bits: int) -> np.ndarray:
    """Of every kernel at this width, float64 (c_out,)."""
    weight, widths = bank.weight(layer).cpu(), torch.full((layer.c_out,), bits, dtype=torch.uint8)
    if bits == quantize.FLOAT:
        return np.zeros(layer.c_out)
    scale = bank.scale(layer, bits).cpu() if bits else torch.ones(layer.c_out)
    rounded = quantize.decode(quantize.encode(weight, widths, scale), widths, scale)
    return (weight - rounded).double().square().flatten(1).sum(1).numpy()


def _noise_to_signal(seen: InputRange, bits: int) -> float:
    if bits == quantize.FLOAT:
        return 0.0
    edges = np.linspace(seen.low, seen.high, len(seen.counts) + 1)
    x, (low, high), step = (edges[:-1] + edges[1:]) / 2, quantize.act_range(bits, seen.signed), seen.step(bits)
    noise = (seen.counts * (np.clip(np.round(x / step), low, high) * step - x) ** 2).sum()
    return float(noise / max((seen.counts * x**2).sum(), 1e-30))


# -- sensitivity of the reward, measured ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Probe:
    """One decision at one value while all others are at their best. key: "width", "act": place of the layer;
    "sparsity": of the gene."""

    kind: str
    key: int
    option: int  # into the options of the decision
    values: np.ndarray


def measured_sensitivity(
    problem: Problem, evaluations: int, prior: float = PRIOR, errors: Sensitivity | None = None
) -> Sensitivity:
    """The drop of the reward when, in the widest policy, one layer alone takes a width, one space alone a sparsity
    (a quarter, a half, three quarters of the largest, and the largest), one input alone a width.

    Each drop is shared out among the kernels in proportion to `errors` (None = `weight_sensitivity`), whose own numbers
    are thus multiplied by drop / error of a (layer, width), of the channels between two sparsities, or of an input. At
    most `evaluations` policies are scored, the reference first, then those nearest to the best homogeneous policy; what
    was not measured takes the factor of its nearest neighbour. A drop below 0 counts as 0, one that shrinks as the
    layer gets narrower as the larger before it. Measured on few images drops are noisy, and many are 0: `prior` of the
    median factor is added to all factors.
    """
    genome, errors = Genome(problem.space), errors or weight_sensitivity(problem)
    best = genome.levels - 1
    probes = _probes(genome, _start(problem, genome, errors), best)[: max(evaluations - 1, 0)]
    reference, *scores = problem.score_all([genome.policy(values) for values in (best, *(p.values for p in probes))])
    drops: dict[tuple[str, int], dict[int, float]] = {}
    for probe, score in zip(probes, scores, strict=True):
        drops.setdefault((probe.kind, probe.key), {})[probe.option] = reference.reward - score.reward
    return _Factors(genome, errors, drops, prior).applied()


def _probes(genome: Genome, near: np.ndarray, best: np.ndarray) -> list[_Probe]:
    """The most telling first: of every decision the option nearest to `near`, then of every decision the next."""
    units: dict[tuple[str, int], list[int]] = {}
    for i, gene in enumerate(genome.genes):
        units.setdefault((gene.kind, i if gene.kind == "sparsity" else gene.layer), []).append(i)
    ranked = []
    for (kind, key), genes in units.items():
        top = int(best[genes[0]])
        options = np.unique((top * np.array([0, 0.25, 0.5, 0.75])).astype(int)) if kind == "sparsity" else range(top)
        here = top / 2 if kind == "sparsity" else near[genes[0]]
        for turn, option in enumerate(sorted(options, key=lambda o: abs(o - here))):  # noqa: B023
            values = best.copy()
            values[genes] = option
            ranked.append((turn, _Probe(kind, key, int(option), values)))
    return [probe for _, probe in sorted(ranked, key=lambda pair: pair[0])]


class _Factors:
    """drop / error of everything that was measured, and what follows from it for the rest."""

    def __init__(
        self,
        genome: Genome,
        errors: Sensitivity,
        drops: Mapping[tuple[str, int], Mapping[int, float]],
        prior: float,
    ) -> None:
        self.genome, self.errors, self.prior = genome, errors, prior
        self.found = {unit: self._ratios(unit, options) for unit, options in drops.items()}
        known = [factor for table in self.found.values() for factor in table.values() if factor > 0]
        self.usual = float(np.median(known)) if known else 1.0

    def _ratios(self, unit: tuple[str, int], drops: Mapping[int, float]) -> dict[int, float]:
        """Option -> drop / error. For a sparsity: of what goes between this option and the next one measured."""
        ratios, worst, gone = {}, 0.0, 0.0
        for option in sorted(drops, reverse=True):  # from the widest
            drop, error = max(drops[option], worst), self._error(unit, option)
            if unit[0] == "sparsity":
                ratios[option] = (drop - worst) / max(error - gone, 1e-30)
            else:
                ratios[option] = drop / max(error, 1e-30)
            worst, gone = drop, error
        return ratios

    def _error(self, unit: tuple[str, int], option: int) -> float:
        kind, key = unit
        layer = self.genome.network.layers[self.genome.genes[key].layer if kind == "sparsity" else key]
        if kind == "width":
            return float(self.errors.weights[layer.name][self.genome.space.widths(layer)[option]].sum())
        if kind == "act":
            return self.errors.acts[layer.name][self.genome.space.acts(layer)[option]]
        return float(sum(energy[dead].sum() for energy, dead in self._pruned(key, option)))

    def _pruned(self, gene: int, option: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of every writer: errors of its kernels at 0 bits (c_out,), and which of them are pruned, bool (c_out,)."""
        values = self.genome.levels - 1
        values[gene] = option
        alive = self.genome.alive(values)
        layers = [self.genome.network.layers[at] for at in self.genome.touches[gene]]
        return [(self.errors.weights[layer.name][0], ~alive[layer.writes]) for layer in layers]

    def _near(self, unit: tuple[str, int], option: int) -> float:
        table = self.found.get(unit)
        factor = table[min(table, key=lambda o: abs(o - option))] if table else self.usual
        return factor + self.prior * self.usual

    def applied(self) -> Sensitivity:
        genome, space = self.genome, self.genome.space
        channels = self._of_channels()
        weights, acts = {}, {}
        for at, layer in enumerate(genome.network.layers):
            table = self.errors.weights[layer.name]
            weights[layer.name] = {
                b: table[b] * self._near(("width", at), option) for option, b in enumerate(space.widths(layer))
            } | {0: table[0] * channels[layer.writes]}
            acts[layer.name] = {
                b: self.errors.acts[layer.name][b] * self._near(("act", at), option)
                for option, b in enumerate(space.acts(layer))
            }
        return Sensitivity(weights, acts)

    def _of_channels(self) -> np.ndarray:
        """The factor of pruning each channel, float64 (n_channels,)."""
        genome = self.genome
        factors = np.full(genome.network.n_channels, self.usual)
        for i, gene in enumerate(genome.genes):
            if gene.kind == "sparsity":
                values, concerned = genome.levels - 1, np.isin(genome.network.space_of, gene.spaces)
                for option in sorted(self.found.get((gene.kind, i), {})):  # the sparsest first, for all beyond it too
                    values[i] = option
                    concerned |= ~genome.alive(values)
                    factors[concerned] = self._near((gene.kind, i), option)
                    concerned[:] = False
        return factors


# -- allocation -------------------------------------------------------------------------------------------------------


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
    best = _settled(genome, problem, _start(problem, genome, sensitivity), sensitivity)
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


def _start(problem: Problem, genome: Genome, sensitivity: Sensitivity) -> np.ndarray:
    """The values of the homogeneous policy within budget with the least sensitivity."""
    points = [point.values(genome) for point in homogeneous_within(problem)] or [genome.cheapest()]
    return min(points, key=lambda values: sensitivity.of(genome.network, genome.policy(values)))


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
    return loss / saved if saved > 0 else np.inf


def _price_of_raising(account: Account, costs: np.ndarray, loss: float) -> float | None:
    """Minus the sensitivity that goes, per part of what is left of the scarcest budget."""
    if loss >= 0 or not account.budget.fits(account.total + costs):
        return None
    left = np.maximum(account.budget.caps - account.total, 1e-9 * account.budget.caps)
    return loss / max(float((costs / left).max()), 1e-12)


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
