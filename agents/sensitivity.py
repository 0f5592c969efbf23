"""Sensitivities: how much every single decision hurts, told by the weights or measured in the reward.

A table as in HAWQ-V3 (Yao et al. 2020, arXiv 2011.10680), a number per layer and width, with a row per kernel and 0
bits, pruning, as a column. `agents.linear_program` allocates by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from agents.genes import Genome
from agents.uniform import homogeneous_within
from ajpq import quantize
from ajpq.bank import WeightBank
from ajpq.calibration import InputRange
from ajpq.importance import Errors, gains
from ajpq.network import LayerSpec, Network
from ajpq.policy import CompressionPolicy
from ajpq.problem import Problem

PRIOR = 0.1  # of the median factor; ours: best of 0.001, 0.03, 0.1, 0.3, 1 for ResNet-20 at three budgets, two rewards


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """How much every single decision hurts; the sum over all is what an allocation minimises.

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


def homogeneous_start(problem: Problem, genome: Genome, sensitivity: Sensitivity) -> np.ndarray:
    """The values of the homogeneous policy within budget with the least sensitivity."""
    points = [point.values(genome) for point in homogeneous_within(problem)] or [genome.cheapest()]
    return min(points, key=lambda values: sensitivity.of(genome.network, genome.policy(values)))


# -- sensitivity of weights, without data -----------------------------------------------------------------------------


def weight_sensitivity(problem: Problem) -> Sensitivity:
    """Noise over signal at every layer's output, no evaluation needed.

    Kernel k of layer l at b bits: ``g_k^2 ||W_k - Q_b(W_k)||^2 / sum_j g_j^2 ||W_j||^2``, where g is the gain of the
    batch-norm folded into the layer and Q_0 = 0: the part of the layer's output power that becomes error if its input
    is white. Input of layer l at b bits: ``E[(x - Q_b(x))^2] / E[x^2]``, from the histogram of the calibration, which
    is the same ratio for the other factor of the product. Ratios of noise to signal add up along a network to first
    order (Lin, Talathi and Annapureddy 2016, arXiv 1511.06393, section 3); that they are worth the same in every layer
    is their assumption, too.

    Where the importance gives `importance.Errors`, as `elimination` does, the table has those at 0 bits, shared out
    equally among the kernels that write a channel.
    """
    space, network = problem.space, problem.space.network
    writers = np.bincount(np.concatenate([layer.writes for layer in network.layers]), minlength=network.n_channels)
    bank, factors = WeightBank(network), gains(network)
    weights, acts = {}, {}
    for layer in network.layers:
        power = np.square(factors.get(layer.name, np.ones(layer.c_out)))
        errors = {b: power * _squared_error(bank, layer, b) for b in (0, *space.widths(layer))}
        weights[layer.name] = {b: error / max(errors[0].sum(), 1e-30) for b, error in errors.items()}
        if isinstance(space.scores, Errors):
            shares = space.scores[layer.name] / writers[layer.writes]
            weights[layer.name][0] = np.where(network.prunable[layer.writes], shares, weights[layer.name][0])
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
    layer gets narrower as the larger before it. A reward that is not finite counts as the worst that is; a reference
    that is not leaves `errors` as they are. Measured on few images drops are noisy, and many are 0: `prior` of the
    median factor is added to all factors.
    """
    genome, errors = Genome(problem.space), errors or weight_sensitivity(problem)
    best = genome.levels - 1
    probes = _probes(genome, homogeneous_start(problem, genome, errors), best)[: max(evaluations - 1, 0)]
    scores = problem.score_all([genome.policy(values) for values in (best, *(p.values for p in probes))])
    reference, *rewards = [score.reward for score in scores]
    if not np.isfinite(reference):
        return errors
    worst = min(reward for reward in (reference, *rewards) if np.isfinite(reward))
    drops: dict[tuple[str, int], dict[int, float]] = {}
    for probe, reward in zip(probes, rewards, strict=True):
        drop = reference - (reward if np.isfinite(reward) else worst)
        drops.setdefault((probe.kind, probe.key), {})[probe.option] = drop
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
