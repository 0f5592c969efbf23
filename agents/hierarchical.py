"""AJPQ's two controllers (Tang et al., arXiv 2011.06231), trained together by Stable-Baselines3.

The layer controller sets sparsities, the channel controller bit-widths; one episode of both is one evaluation and
fills both replay buffers. The paper's algorithm is not public; the settings below are AMC's and HAQ's DDPG where they
say so, else ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
import numpy as np
import stable_baselines3
from stable_baselines3.common.logger import configure
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from ajpq.errors import AjpqError
from ajpq.problem import Problem, SearchResult
from envs.compression import rollout
from envs.views import ChannelView, LayerView, View


class Hierarchical:
    """Search backend with a layer and a channel controller.

    evaluations: policies to score. seed: of networks, noise and replay.
    algorithm: any off-policy class of Stable-Baselines3 (DDPG as in AMC and HAQ; TD3, SAC), or its name.
    warmup: episodes of structured noise before the first gradient step: one random action per controller and episode
        plus noise of deviation `spread` per decision, so that nearly homogeneous policies of every size are seen
        (ours).
    noise, decay: deviation of the exploration noise on [-1, 1] after warm-up, and its factor per episode; half of the
        variance is shared by all decisions of an episode (HAQ: 0.5 on [0, 1], x 0.99, AMC: x 0.95; the sharing is
        ours).
    batch: episodes that are played by the same controllers and scored together, so that an evaluator with several
        workers is kept busy; the warm-up always is one batch.
    gradient_steps: after every episode, for each controller (HAQ: one per decision).
    batch_size, net_arch, learning_rate, buffer_size: of each controller's networks (AMC and HAQ: 64, 300-300, 1e-3
        critic).
    views: observations and action decoding other than those of `CompressionEnv`: a callable problem -> {"layer",
        "channel"}.
    on_episode: called with (number, reward, best reward so far) after each.

    The reward comes at the end and the discount is 1, so the return of every decision is the reward itself: it is
    stored as such with every transition, each marked as final, standardised by the warm-up's mean and deviation. The
    critic thus regresses on returns that were seen and does not bootstrap.
    """

    def __init__(
        self,
        evaluations: int = 200,
        seed: int = 0,
        algorithm: str | type[OffPolicyAlgorithm] = "DDPG",
        warmup: int = 30,
        spread: float = 0.35,
        noise: float = 0.6,
        decay: float = 0.98,
        batch: int = 1,
        gradient_steps: int = 20,
        batch_size: int = 64,
        net_arch: tuple[int, ...] = (64, 64),
        learning_rate: float = 1e-3,
        buffer_size: int = 100_000,
        views: Callable[[Problem], Mapping[str, View]] | None = None,
        on_episode: Callable[[int, float, float], None] | None = None,
    ) -> None:
        kind = getattr(stable_baselines3, algorithm, None) if isinstance(algorithm, str) else algorithm
        if not (isinstance(kind, type) and issubclass(kind, OffPolicyAlgorithm) and kind is not stable_baselines3.DQN):
            raise AjpqError(
                f"algorithm must be an off-policy class of stable_baselines3 for continuous actions (DDPG, TD3, SAC), "
                f"but it is {algorithm!r}; choose one of these"
            )
        self.kind, self.evaluations, self.seed, self.warmup = kind, evaluations, seed, warmup
        self.spread, self.noise, self.decay, self.batch = spread, noise, decay, batch
        self.gradient_steps, self.batch_size = gradient_steps, batch_size
        self.settings = {
            "learning_rate": learning_rate,
            "buffer_size": buffer_size,
            "batch_size": batch_size,
            "gamma": 1.0,
            "tau": 0.01,
            "policy_kwargs": {"net_arch": list(net_arch)},
        }
        self.views, self.on_episode = views, on_episode

    def search(self, problem: Problem) -> SearchResult:
        views = (
            dict(self.views(problem)) if self.views else {"layer": LayerView(problem), "channel": ChannelView(problem)}
        )
        models = {who: self._model(view, i) for i, (who, view) in enumerate(views.items())}
        rng = np.random.default_rng(self.seed)
        rewards: list[float] = []
        waiting: list[tuple[float, dict]] = []  # episodes of the warm-up, until their mean and deviation are known
        mean, deviation = 0.0, 1.0
        limit = self.evaluations * 3  # of episodes: one that ends in a known policy is not an evaluation
        while problem.evaluations < self.evaluations and len(rewards) < limit:
            first, left = len(rewards) + 1, self.evaluations - problem.evaluations
            learned = first > self.warmup
            episodes = []
            for episode in range(first, first + min(left, self.batch if learned else self.warmup + 1 - first)):
                sigma = self.noise * self.decay ** max(episode - self.warmup - 1, 0)
                controllers = {
                    who: _Explorer(model, rng, sigma if learned else None, self.spread) for who, model in models.items()
                }
                episodes.append(rollout(problem, views, controllers))
            scores = problem.score_all([policy for policy, _ in episodes])
            for score, (_, taken) in zip(scores, episodes, strict=True):
                rewards.append(score.reward)
                if learned:
                    self._remember(models, taken, (score.reward - mean) / deviation)
                    for who, model in models.items():
                        if taken[who]:
                            model.train(gradient_steps=self.gradient_steps, batch_size=self.batch_size)
                else:
                    waiting.append((score.reward, taken))
                    if len(rewards) == self.warmup:
                        mean, deviation = float(np.mean(rewards)), max(float(np.std(rewards)), 1e-3)
                        for reward, old in waiting:
                            self._remember(models, old, (reward - mean) / deviation)
                if self.on_episode is not None:
                    self.on_episode(len(rewards), score.reward, max(rewards))
        return problem.result()

    def _model(self, view: View, number: int) -> OffPolicyAlgorithm:
        model = self.kind("MlpPolicy", _Shell(view), seed=self.seed + number, device="cpu", **self.settings)
        model.set_logger(configure(None, []))
        return model

    @staticmethod
    def _remember(models: dict[str, OffPolicyAlgorithm], taken: dict[str, list], reward: float) -> None:
        for who, model in models.items():
            for observation, action in taken[who]:
                model.replay_buffer.add(
                    observation[None],
                    observation[None],
                    action[None],
                    np.array([reward], np.float32),
                    np.array([True]),
                    [{}],
                )


class _Explorer:
    """A controller for one episode: the model's action plus noise, or (deviation None) structured random actions."""

    def __init__(
        self, model: OffPolicyAlgorithm, rng: np.random.Generator, deviation: float | None, spread: float
    ) -> None:
        self.model, self.rng = model, rng
        size = model.action_space.shape[0]
        self.entropic = hasattr(model, "ent_coef")  # SAC explores by itself
        self.base = rng.uniform(-1, 1, size) if deviation is None else None
        self.own = spread if deviation is None else 0.0 if self.entropic else deviation / np.sqrt(2)
        self.shift = rng.normal(0, self.own, size) if deviation is not None else np.zeros(size)

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        action = (
            self.base if self.base is not None else self.model.predict(observation, deterministic=not self.entropic)[0]
        )
        action = action + self.shift + self.rng.normal(0, self.own, len(action)) if self.own else action
        return np.clip(action, -1, 1).astype(np.float32)


class _Shell(gymnasium.Env):
    """The two spaces of a view, for Stable-Baselines3 to build its networks from; episodes are run by `rollout`."""

    def __init__(self, view: View) -> None:
        self.observation_space, self.action_space = view.observation_space, view.action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        raise AjpqError("this environment only describes spaces, but it was run; use envs.compression.CompressionEnv")

    step = reset
