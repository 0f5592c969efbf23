"""Differentiable search in a super net: DNAS (Wu et al. 2018, arXiv 1812.00090)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from agents.children import Children
from ajpq.architecture import GRANULARITIES, Architecture, Parts, check_differentiable
from ajpq.epochs import go_on, orders_of
from ajpq.errors import AjpqError
from ajpq.loaders import divide
from ajpq.problem import Problem, SearchResult
from ajpq.supernet import SuperNet

LOSSES = ("lagrangian", "product")


class DNAS:
    """A super net holds every candidate width; the probabilities of the candidates, softmax(logits), are trained by
    gradient. An epoch is, as in the paper, a pass over the first part of the training images that trains the weights,
    and one over the rest that trains the logits; every step draws one mixture by Gumbel-softmax, at the temperature
    ``T0 exp(-eta epoch)``. Every few epochs children are drawn within budget and scored (`agents.children`); the best
    of all is the result. The candidates, 0 and 32 bits included, are those of the problem's `Choices`.

    Loss of the logits: CE is that of the problem's task, for classification the cross-entropy; K budgets; cost_i is
    expected under softmax(logits) (the paper takes it under the drawn mixture, which has more noise), cap_i the largest
    allowed:

        "product"     CE * 1/K sum_i beta log(cost_i)^gamma, the paper's; costs in their own units. Knows no budget
        "lagrangian"  CE + sum_i psi(g_i), g_i = log(cost_i / cap_i): the augmented Lagrangian of g_i <= 0 (Nocedal and
                      Wright, Numerical Optimization, eq. 17.65, for inequalities): psi(g) = (max(0, l + rho g)^2 -
                      l^2) / (2 rho), and after every step l = max(0, l + rho g)

    What else is ours, as the paper is silent or took a hundred epochs from random weights: the search begins with the
    problem's weights; logits begin tilted so that the expected costs are within budget (`Architecture.meet`; only for
    "lagrangian"); the pair (width of weights, width of input) of a layer or block is two independent choices, where the
    problem's choices hold several of both (`Architecture` says why); 0 bits skip a residual branch at granularity
    "block", or "layer" where it is one layer, a choice besides that of the width (in the super net its output is
    multiplied by the probability of taking it), and prune channels everywhere else; children are scored on the
    problem's weights, not trained; the i-th of n children of a round has its Gumbel noise multiplied by i / n, so that
    the first is the most probable policy within budget.

    evaluations: policies to score, spread evenly over the rounds. seed: of everything.
    granularity: a choice of widths for every "layer", every residual "block" (by graph), or every "kernel" or block of
        kernels, as `Choices.blocks` says.
    epochs; warmup: so many first ones train weights only; every: epochs between two rounds of children.
    share: of the training images, for the weights. lr, momentum, weight_decay: of SGD for the weights, along a cosine.
    arch_lr, arch_decay: of Adam for the logits (the paper: 0.005 and 0.001, for ten times as many steps).
    temperature: T0. eta: None = the last epoch has a tenth of T0, which is what 0.025 gives after 90 epochs.
    beta, gamma: of the product. rho: of the Lagrangian.
    weights, inputs: quantizers of the super net, see `ajpq.supernet.SuperNet`; the policies are always scored, and the
        result shipped, with `ajpq.quantize`.
    device: None = a GPU where torch sees one, else the CPU.
    Raises AjpqError for bad settings, a problem without training images, a cost model without gradient among those
    limited, and a loss that is not finite.
    """

    def __init__(
        self, evaluations: int = 40, seed: int = 0, granularity: str = "layer", epochs: int = 20, warmup: int = 0,
        every: int = 2, share: float = 0.8, lr: float = 0.02, momentum: float = 0.9, weight_decay: float = 5e-4,
        arch_lr: float = 0.05, arch_decay: float = 0.0, temperature: float = 5.0, eta: float | None = None,
        loss: str = "lagrangian", beta: float = 0.1, gamma: float = 0.9, rho: float = 1.0, weights: str = "rounded",
        inputs: str = "rounded", device: str | None = None,
    ) -> None:  # fmt: skip
        if loss not in LOSSES:
            raise AjpqError(f"loss must be one of {', '.join(LOSSES)}, but it is {loss!r}; choose one")
        if granularity not in GRANULARITIES:
            raise AjpqError(f"granularity must be one of {', '.join(GRANULARITIES)}, but it is {granularity!r}")
        rules = {
            "epochs >= 1": epochs >= 1, "every >= 1": every >= 1, "warmup >= 0": warmup >= 0, "lr > 0": lr > 0,
            "arch_lr > 0": arch_lr > 0, "temperature > 0": temperature > 0, "rho > 0": rho > 0,
        }  # fmt: skip
        for rule, holds in rules.items():
            if not holds:
                raise AjpqError(f"`{rule}` must hold for DNAS, but it does not; change that setting")
        self.evaluations, self.seed, self.granularity = evaluations, seed, granularity
        self.epochs, self.warmup, self.every, self.share = epochs, warmup, every, share
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.arch_lr, self.arch_decay = arch_lr, arch_decay
        self.temperature, self.eta = temperature, math.log(10) / epochs if eta is None else eta
        self.loss, self.beta, self.gamma, self.rho = loss, beta, gamma, rho
        self.weights, self.inputs, self.device = weights, inputs, device
        self.run: Run | None = None  # the present or last search
        self._state: Mapping[str, Any] | None = None

    def temperature_at(self, epoch: int) -> float:
        """epoch: from 0."""
        return self.temperature * math.exp(-self.eta * epoch)

    def search(self, problem: Problem) -> SearchResult:
        self.run = run = Run(self, problem)
        if self._state is not None:
            run.load_state_dict(self._state)
            self._state = None
        if not len(run.architecture):
            problem.score(run.children.draw(np.random.default_rng(self.seed), 0.0))
        while len(run.architecture) and run.epoch < self.epochs:
            run.train()
            if run.epoch % self.every == 0 or run.epoch == self.epochs:
                run.score_children()
                problem.save(self)
        return problem.result()

    def state_dict(self) -> dict[str, Any]:
        assert self.run is not None, "there is a state once a search has begun"
        return self.run.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._state = state


class Run:
    """One search. architecture: its logits; net: the super net; epoch: how many are done."""

    def __init__(self, settings: DNAS, problem: Problem) -> None:
        if problem.train is None:
            raise AjpqError(
                "DNAS trains as it searches and needs training images, but the problem has none; pass train= to it"
            )
        self.settings, self.problem, self.epoch = settings, problem, 0
        self.device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.parts = divide(problem.train, settings.share, settings.seed)
        self.architecture = Architecture(problem.space, settings.granularity)
        self.net = SuperNet(self.architecture, problem.calibration, settings.weights, settings.inputs).to(self.device)
        self.multipliers = torch.zeros(len(problem.budget.names), dtype=torch.float64)
        loads = self.architecture.loads(self.architecture.probabilities())
        for name in problem.budget.names:
            check_differentiable(name, problem.budget.costs[name], loads)
        self.children = Children(problem, self.architecture)
        if settings.loss == "lagrangian":
            self.architecture.meet(problem.budget)
        s, groups = settings, _decayed(self.net, settings.weight_decay)
        self.sgd = torch.optim.SGD(groups, lr=s.lr, momentum=s.momentum, nesterov=s.momentum > 0)
        self.adam = torch.optim.Adam(self.architecture.parameters(), lr=s.arch_lr, weight_decay=s.arch_decay)

    def train(self) -> None:
        """One epoch. What it draws depends on the seed and its number alone, so that a search can continue."""
        s, problem, at = self.settings, self.problem, self.epoch
        temperature = s.temperature_at(at)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(_mixed(s.seed, at))
            noise = torch.Generator().manual_seed(_mixed(s.seed, at) + 1)
            self.net.refresh()
            weight_loss = self._train_weights(temperature, noise)
            loss = self._train_logits(temperature, noise) if at >= s.warmup else None
        self.epoch += 1
        problem.log("dnas/temperature", temperature)
        problem.log("dnas/weight_loss", weight_loss)
        if loss is not None:
            problem.log("dnas/architecture_loss", loss)
        for name, ratio in self.expected().items():
            problem.log(f"dnas/expected_{name}", ratio)

    @torch.no_grad()
    def expected(self) -> dict[str, float]:
        """Expected cost of every limited cost, as a fraction of what is allowed."""
        excess = self.architecture.excess(self.architecture.probabilities(), self.problem.budget)
        return dict(zip(self.problem.budget.names, excess.exp().tolist(), strict=True))

    def _train_weights(self, temperature: float, noise: torch.Generator) -> float:
        s, losses, steps = self.settings, [], len(self.parts[0])
        for i, (x, y) in enumerate(self._images(0)):
            done = (self.epoch + i / steps) / s.epochs
            for group in self.sgd.param_groups:
                group["lr"] = s.lr * 0.5 * (1 + math.cos(math.pi * done))
            with torch.no_grad():
                parts = self.architecture.sample(temperature, noise)
            loss = self._of_task(x, y, parts)
            self._check(loss, "weights")
            self.sgd.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.net.parameters(), 5.0)
            self.sgd.step()
            losses.append(loss.item())
        return float(np.mean(losses))

    def _train_logits(self, temperature: float, noise: torch.Generator) -> float:
        losses, logits = [], list(self.architecture.parameters())
        for x, y in self._images(1):
            parts = self.architecture.sample(temperature, noise)
            task_loss = self._of_task(x, y, parts).cpu()
            excess = self.architecture.excess(self.architecture.probabilities(), self.problem.budget)
            loss = self._loss(task_loss, excess)
            self._check(loss, "architecture")
            for parameter, grad in zip(logits, torch.autograd.grad(loss, logits, allow_unused=True), strict=True):
                parameter.grad = grad
            self.adam.step()
            self.multipliers = (self.multipliers + self.settings.rho * excess.detach()).clamp(min=0)
            losses.append(loss.item())
        return float(np.mean(losses))

    def _loss(self, task_loss: Tensor, excess: Tensor) -> Tensor:
        """excess: log(expected cost / cap), (n limits,)."""
        s = self.settings
        if s.loss == "product":
            logs = excess + torch.log(torch.as_tensor(self.problem.budget.caps))
            return task_loss * (s.beta * logs.clamp(min=1e-3) ** s.gamma).mean()
        known, rho = self.multipliers, s.rho
        return task_loss + (((known + rho * excess).clamp(min=0) ** 2 - known**2) / (2 * rho)).sum()

    def _of_task(self, x: Tensor, y: Tensor, parts: Parts) -> Tensor:
        return self.problem.task.losses(self.net(x, parts), y).mean()

    def score_children(self) -> None:
        """A round: as many new policies as keep `evaluations` in step with the epochs."""
        s, problem = self.settings, self.problem
        wanted = s.evaluations * self.epoch // s.epochs - problem.evaluations
        rng, known = np.random.default_rng([s.seed, self.epoch]), {e.policy.digest() for e in problem.history}
        fresh: dict = {}
        for i in range(10 * wanted):
            if len(fresh) >= wanted:
                break
            policy = self.children.draw(rng, min(i / max(wanted, 1), 1.0))
            if policy.digest() not in known:
                fresh[policy.digest()] = policy
        problem.score_all(list(fresh.values()))

    def _images(self, part: int) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y, *_ in self.parts[part]:
            yield x.to(self.device), y.to(self.device)

    def _check(self, loss: Tensor, what: str) -> None:
        if not torch.isfinite(loss):
            raise AjpqError(
                f"the loss of a super net must stay finite, but that of its {what} is {loss.item()} in epoch "
                f"{self.epoch}; lower {'lr' if what == 'weights' else 'arch_lr'}"
            )

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch, "net": dict(self.net.state_dict()), "multipliers": self.multipliers,
            "architecture": dict(self.architecture.state_dict()), "sgd": self.sgd.state_dict(),
            "adam": self.adam.state_dict(), "orders": [orders_of(part) for part in self.parts],
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.multipliers = state["epoch"], state["multipliers"].clone()
        for name in ("net", "architecture", "sgd", "adam"):
            getattr(self, name).load_state_dict(state[name])
        for part, orders, epochs in zip(self.parts, state["orders"], self._begun(), strict=True):
            go_on(part, orders, epochs)

    def _begun(self) -> tuple[int, int]:
        """Epochs that each part of the images has been through."""
        return self.epoch, max(self.epoch - self.settings.warmup, 0)


def _decayed(net: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups: weights, and the clipping values of PACT, decay; gains, shifts and biases do not."""
    plain = [p for name, p in net.named_parameters() if p.ndim == 1]
    others = [p for name, p in net.named_parameters() if p.ndim != 1]
    groups = [{"params": others, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _mixed(seed: int, epoch: int) -> int:
    """A seed for every epoch of every seed."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint32)[0])
