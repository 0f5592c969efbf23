"""AJPQ's two controllers (Tang et al., arXiv 2011.06231), trained together by Stable-Baselines3.

The layer controller sets sparsities, the channel controller bit-widths; one episode of both is one evaluation and
fills both replay buffers. The paper's algorithm is not public; the settings below are AMC's and HAQ's DDPG where they
say so, else ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from scipy.special import ndtri  # quantiles of the normal distribution; scipy.stats takes a second to import
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from agents.controller import Controller, algorithm_of
from agents.genes import Account, Genome
from agents.linear_program import settle
from agents.sensitivity import Sensitivity
from ajpq.errors import AjpqError, check_counts
from ajpq.problem import Problem, SearchBackend, SearchResult
from envs.views import ChannelView, LayerView, Views, turn, views_of

PATIENCE = 60  # proposals in a row that are all known, after which the search ends
KEEP = 1e3  # factor on the loss of lowering what the noise has just changed; it is not raised
STANDARD = {"layer": LayerView, "channel": ChannelView}
WHO = {"sparsity": "layer", "act": "layer", "width": "channel"}  # controller of every kind of decision


@dataclass(frozen=True, eq=False)
class Episode:
    """One walk through the network. values: its policy (`agents.genes.Genome`); for each controller, the observations
    (N, n) and actions (N, size) of its turns, and for every turn the gene behind each number of the action (-1: none).
    """

    values: np.ndarray
    reward: float
    observations: Mapping[str, np.ndarray]
    actions: Mapping[str, np.ndarray]
    genes: Mapping[str, np.ndarray]


class Hierarchical:
    """Search backend with a layer and a channel controller.

    An episode walks the network; a controller's action for a decision is its level on [-1, 1], from the cheapest answer
    to the dearest. What an episode is going to do is planned before it starts: the actors (or the memory of a good
    episode) propose all levels, noise is added, levels are lowered in random order until every budget holds and then
    raised wherever one still fits; of several such plans that is carried out which the critics value most. So no plan
    leaves the budget, and what one decision gains another one pays.

    evaluations: policies to score. seed: of networks, noise and replay.
    algorithm: DDPG (as in AMC and HAQ), TD3, SAC, TQC or a subclass of one of these, or its name.
    start: a search that comes first, e.g. `agents.linear_program.LinearProgram()`, with `share` (a fraction) of the
        evaluations; what it scored within budget are the first episodes. None = the first episodes are random.
    warmup: episodes before the first gradient step. Without a start they are random: one level per controller and
        episode plus noise of deviation `spread` per decision, so that nearly homogeneous policies of every kind are
        seen; with a start they are noisy versions of its best (ours).
    elite: probability that a plan begins with one of the `parents` best episodes so far, not with the actors' levels.
    few: decisions that the noise changes, on average. reach: by how much at most, as a fraction of the levels (ours;
        HAQ adds normal noise of 0.5 on [0, 1] to every decision).
    fill: probability that what is left of the budget is used up (ours).
    doubt: where the start knows the sensitivity of every decision, levels are lowered and raised by it (loss per cost)
        and not in random order; it is multiplied by log-normal noise of this deviation, drawn for every plan (ours).
    candidates: up to so many plans are compared by the critics: looking at a critic costs nothing, an evaluation does
        (ours; 1 = the critics only train the actors).
    batch: episodes that are planned by the same controllers and scored together, so that an evaluator with several
        workers is kept busy; the warm-up always is one batch.
    gradient_steps: after every episode, for each controller (HAQ: one per decision), and ten times as many after the
        warm-up.
    batch_size, net_arch, learning_rate, buffer_size: of each controller's networks (AMC and HAQ: 64, 300-300, 1e-3
        critic).
    views: observations other than those of `CompressionEnv`: {"layer": View, "channel": View} or a callable that makes
        them of the problem. Actions are those of the standard views.
    on_episode: called with (number, reward, best reward so far) after each.

    The reward comes at the end and the discount is 1, so the return of every decision is the reward itself: it is
    stored with every transition, each marked as final. Critics see its normal score among all rewards so far (the
    quantile of the standard normal distribution at its rank), restated after every episode, so that neither the unit of
    a reward nor outliers matter.
    """

    def __init__(
        self,
        evaluations: int = 200,
        seed: int = 0,
        algorithm: str | type[OffPolicyAlgorithm] = "DDPG",
        start: SearchBackend | None = None,
        share: float = 1 / 3,
        warmup: int = 30,
        spread: float = 0.15,
        elite: float = 0.5,
        parents: int = 3,
        few: float = 3.0,
        reach: float = 0.25,
        fill: float = 0.75,
        doubt: float = 0.5,
        candidates: int = 16,
        batch: int = 1,
        gradient_steps: int = 20,
        batch_size: int = 64,
        net_arch: tuple[int, ...] = (64, 64),
        learning_rate: float = 1e-3,
        buffer_size: int = 100_000,
        views: Views | None = None,
        on_episode: Callable[[int, float, float], None] | None = None,
    ) -> None:
        check_counts(1, batch=batch, batch_size=batch_size)
        check_counts(0, gradient_steps=gradient_steps)
        if not few >= 1:
            raise AjpqError(f"`few >= 1` must hold, but {few=}; 1 changes one decision of a plan")
        self.kind, self.evaluations, self.seed, self.start = algorithm_of(algorithm), evaluations, seed, start
        self.share = share
        self.warmup, self.spread, self.elite, self.parents = max(warmup, 1), spread, elite, max(parents, 1)
        self.few, self.reach, self.fill, self.doubt = few, reach, fill, doubt
        self.candidates = max(candidates, 1)
        self.batch, self.gradient_steps = batch, gradient_steps
        self.settings = {
            "learning_rate": learning_rate,
            "buffer_size": buffer_size,
            "batch_size": batch_size,
            "tau": 0.01,
            "policy_kwargs": {"net_arch": list(net_arch)},
        }
        self.views, self.on_episode = views, on_episode
        self._resumed: Mapping[str, Any] | None = None

    def search(self, problem: Problem) -> SearchResult:
        self._prepare(problem)
        if self._resumed is not None:
            self._continue(self._resumed)
        elif self.start is not None:
            first = copy.copy(self.start)
            first.evaluations = max(int(self.evaluations * self.share + 1e-9), 1)
            keeper, problem.checkpoint = problem.checkpoint, None  # what is kept is the state of this search
            try:
                first.search(problem)
            finally:
                problem.checkpoint = keeper
            self.sensitivity = getattr(first, "found", None)
            for evaluation in problem.history[: self.evaluations]:
                values = self.genome.values_of(evaluation.policy)
                ours = self.genome.policy(values).digest() == evaluation.policy.digest()  # others skip branches
                if ours and evaluation.score.within and evaluation.score.whole:
                    self._remember(problem, values, evaluation.score.reward)
            if len(self.episodes) >= self.warmup:
                self._learn(10 * self.gradient_steps)
        self.known = {self.genome.policy(episode.values).digest() for episode in self.episodes}
        if not len(self.genome):
            problem.score(self.genome.policy(np.zeros(0, np.int64)))  # the only one
        fruitless = 0
        while problem.evaluations < self.evaluations and fruitless < PATIENCE and len(self.genome):
            learned = len(self.episodes) >= self.warmup
            most = self.batch if learned else self.warmup - len(self.episodes)
            plans: list[np.ndarray] = []
            while len(plans) < min(most, self.evaluations - problem.evaluations) and fruitless < PATIENCE:
                values = self._plan(learned)
                digest = self.genome.policy(values).digest()
                fruitless = fruitless + 1 if digest in self.known else 0
                if digest not in self.known:
                    self.known.add(digest)
                    plans.append(values)
            scores = problem.score_all([self.genome.policy(values) for values in plans])
            for score, values in zip(scores, plans, strict=True):
                self._remember(problem, values, score.reward)
                if learned or len(self.episodes) == self.warmup:
                    self._learn(self.gradient_steps * (1 if learned else 10))
            problem.save(self)
        return problem.result()

    def _prepare(self, problem: Problem) -> None:
        self.problem, self.genome = problem, Genome(problem.space)
        self.walkers, self.controllers = views_of(problem, self.views), {}
        for who, view in self.walkers.items():
            if getattr(type(view), "apply", None) is not STANDARD[who].apply or not _is_unit(view.action_space):
                raise AjpqError(
                    f"controllers plan in levels of [-1, 1], so a view may only observe otherwise, but that of "
                    f"{who!r} decodes actions of its own; derive it from {STANDARD[who].__name__} without `apply`, or "
                    "use search=single, which calls it"
                )
            self.controllers[who] = Controller(view, self.kind, self.seed + len(self.controllers), self.settings)
        self.rng, self.episodes, self.sensitivity = np.random.default_rng(self.seed), [], None
        self.gene = {(gene.kind, gene.layer, gene.block): i for i, gene in enumerate(self.genome.genes)}
        self.owner = np.array([WHO[gene.kind] == "channel" for gene in self.genome.genes], bool)

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Generators, episodes and networks; the replay buffers are made of the episodes again."""
        return {
            "rng": self.rng.bit_generator.state,
            "global": {"numpy": np.random.get_state(), "torch": torch.get_rng_state()},  # what the algorithms draw from
            "episodes": [vars(episode) for episode in self.episodes],
            "controllers": {who: controller.state_dict() for who, controller in self.controllers.items()},
            "sensitivity": None if self.sensitivity is None else vars(self.sensitivity),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next search continue from here."""
        self._resumed = state

    def _continue(self, state: Mapping[str, Any]) -> None:
        self.rng.bit_generator.state, self._resumed = state["rng"], None
        self.sensitivity = None if state["sensitivity"] is None else Sensitivity(**state["sensitivity"])
        for who, controller in self.controllers.items():
            controller.load_state_dict(state["controllers"][who])
        for number, kept in enumerate(state["episodes"]):
            self.episodes.append(Episode(**kept))
            for who, controller in self.controllers.items():
                controller.remember(number, kept["observations"][who], kept["actions"][who])
        np.random.set_state(state["global"]["numpy"])
        torch.set_rng_state(state["global"]["torch"])

    # -- learning -----------------------------------------------------------------------------------------------------

    def _remember(self, problem: Problem, values: np.ndarray, reward: float) -> None:
        episode = self._walked(problem, values, reward)
        self.episodes.append(episode)
        for who, controller in self.controllers.items():
            controller.remember(len(self.episodes) - 1, episode.observations[who], episode.actions[who])
        if self.on_episode is not None:
            self.on_episode(len(self.episodes), reward, max(e.reward for e in self.episodes))

    def _learn(self, steps: int) -> None:
        rewards = [episode.reward for episode in self.episodes]
        below, upto = (np.searchsorted(np.sort(rewards), rewards, side) for side in ("left", "right"))
        returns = ndtri((below + upto) / 2 / len(rewards)).astype(np.float32)  # of equal rewards the mean rank
        for who, controller in self.controllers.items():
            for name, value in controller.learn(returns, steps).items():
                self.problem.log(f"{who}/{name}", value)

    def _levels(self, values: np.ndarray) -> np.ndarray:
        """float32 (n_genes,) on [-1, 1]."""
        return (2 * values / (self.genome.levels - 1) - 1).astype(np.float32)

    def _walked(self, problem: Problem, values: np.ndarray, reward: float) -> Episode:
        """Walk the network with the answers of a policy."""
        draft, levels = problem.draft(), self._levels(values)
        seen: dict[str, list] = {who: [] for who in self.walkers}
        genes: dict[str, list] = {who: [] for who in self.walkers}
        while (who := turn(draft)) is not None:
            seen[who].append(self.walkers[who].observe(draft))
            layer, row = draft.decision.layer, [-1] * self.controllers[who].size
            while (decision := draft.decision) is not None and decision.layer is layer and WHO[decision.kind] == who:
                i = self.gene.get((decision.kind, problem.network.index[layer.name], decision.block), -1)
                row[0 if decision.kind != "act" else -1] = i
                draft.take(decision.options[-1] if i < 0 else self.genome.genes[i].options[values[i]])
                if who == "channel":
                    break
            genes[who].append(row)
        observations, actions, places = {}, {}, {}
        for who, controller in self.controllers.items():
            shape = controller.model.observation_space.shape
            observations[who] = np.array(seen[who], np.float32).reshape(-1, *shape)
            places[who] = np.array(genes[who], int).reshape(-1, controller.size)
            actions[who] = np.where(places[who] >= 0, levels[places[who]], 0).astype(np.float32)
        return Episode(values, reward, observations, actions, places)

    # -- planning -----------------------------------------------------------------------------------------------------

    def _plan(self, learned: bool) -> np.ndarray:
        if not learned and self.start is None:
            return self._random()
        best = np.argsort([-episode.reward for episode in self.episodes], kind="stable")[: self.parents]
        parent = self.episodes[best[self.rng.integers(len(best))] if learned else best[0]]
        if not learned:
            return self._noisy(parent.values)
        base = parent.values if self.rng.random() < self.elite else self._acted(parent)
        plans = [self._noisy(base) for _ in range(self.rng.integers(self.candidates) + 1)]
        plans = [p for p in plans if self.genome.policy(p).digest() not in self.known] or plans[:1]
        return plans[int(np.argmax(self._value(parent, plans)))]

    def _random(self) -> np.ndarray:
        """Nearly the same level for all decisions of a controller, within budget."""
        base = np.where(self.owner, self.rng.random(), self.rng.random())
        levels = np.clip(base + self.rng.normal(0, self.spread, len(base)), 0, 1)
        return self._within(np.round(levels * (self.genome.levels - 1)).astype(np.int64))

    def _noisy(self, values: np.ndarray) -> np.ndarray:
        """A few decisions moved up or down, within budget."""
        chosen = self.rng.choice(len(values), min(1 + self.rng.poisson(self.few - 1), len(values)), replace=False)
        most = np.maximum(np.round(self.reach * (self.genome.levels[chosen] - 1)), 1).astype(int)
        moved = values.copy()
        moved[chosen] += self.rng.integers(1, most + 1) * self.rng.choice((-1, 1), len(chosen))
        return self._within(np.clip(moved, 0, self.genome.levels - 1), chosen)

    def _acted(self, parent: Episode) -> np.ndarray:
        """The actors' levels for what was observed in an episode."""
        values = parent.values.copy()
        for who, controller in self.controllers.items():
            if len(parent.observations[who]):
                levels = controller.act(parent.observations[who])
                here = parent.genes[who] >= 0
                genes = parent.genes[who][here]
                values[genes] = np.round((levels[here] + 1) / 2 * (self.genome.levels[genes] - 1))
        return values

    def _within(self, values: np.ndarray, spare: np.ndarray | tuple = ()) -> np.ndarray:
        if self.sensitivity is not None:
            account = Account(self.genome, self.problem.budget, values, self.sensitivity.of_layer)
            taste = np.exp(self.rng.normal(0, self.doubt, len(values)))
            kept = np.isin(np.arange(len(values)), spare)
            settle(account, np.where(kept, KEEP * taste, taste), np.where(kept, 0.0, taste))
            return account.values
        account = Account(self.genome, self.problem.budget, values)
        account.trim(self.rng, spare=spare)
        if self.rng.random() < self.fill:
            account.fill(self.rng.permutation(len(self.genome)))
        return account.values

    def _value(self, parent: Episode, plans: list[np.ndarray]) -> np.ndarray:
        """What the critics expect of each plan, summed over its decisions, as seen from an episode."""
        total, levels = np.zeros(len(plans)), np.stack([self._levels(values) for values in plans])
        for who, controller in self.controllers.items():
            genes = parent.genes[who]
            if len(genes):
                actions = np.where(genes >= 0, levels[:, genes], 0).astype(np.float32)  # (K, N, size)
                total += controller.value(parent.observations[who], actions).sum(1)
        return total


def _is_unit(space: spaces.Space) -> bool:
    return isinstance(space, spaces.Box) and bool((space.low == -1).all() and (space.high == 1).all())
