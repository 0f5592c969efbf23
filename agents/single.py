"""One controller alone, the other half by a fixed rule: any algorithm of Stable-Baselines3 for continuous actions, on
the Gymnasium environment, by its own `learn`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import stable_baselines3
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from ajpq.errors import AjpqError
from ajpq.problem import Problem, SearchResult
from envs.compression import CompressionEnv
from envs.partners import Controller, Rule
from envs.views import Views

Factory = Callable[..., gymnasium.Env]  # (problem, controls=, partner=, and views= where there are any)
LIMIT = 3  # episodes per evaluation, at most: one that ends in a known policy is not an evaluation


class Single:
    """Search backend that trains the controller of one half, "layer" or "channel".

    evaluations: policies to score. seed: of networks, noise and replay.
    algorithm: a class of stable_baselines3 or sb3_contrib for Box actions (DDPG, TD3, SAC, TQC, PPO, A2C, ...), its
        name, or the dotted path of another one.
    controls: the half that is trained. partner: answers for the other half, see `CompressionEnv`.
    env: makes the environment, and so says what is observed, done and rewarded: `CompressionEnv`, a subclass of it or
        another callable with its arguments, or a class of `gymnasium.Wrapper`, which is put around a `CompressionEnv`.
        The reward that trains the agent is the one that this environment returns; the record holds the problem's own.
    views: observations and action decoding other than those of `CompressionEnv`.
    warmup: episodes, at least 2, before the first gradient step: one random action per episode plus noise of deviation
        `spread` per decision, on [-1, 1], so that nearly homogeneous policies of every size are seen (ours). The mean
        and the deviation of their returns standardise what the agent is told, so rewards may be of any size and sign.
    noise, decay: deviation of the exploration noise on [-1, 1] after warm-up, and its factor per episode; half of the
        variance is shared by all decisions of an episode (HAQ: 0.5 on [0, 1], x 0.99, AMC: x 0.95; the sharing is
        ours). Algorithms that draw their actions take `noise` for the deviation that they start with, or ignore it.
    policy: of Stable-Baselines3. settings: keywords of the algorithm, which go before the defaults of `defaults`.

    Raises AjpqError for an algorithm that does not take Box actions or the settings.
    """

    def __init__(
        self,
        evaluations: int = 120,
        seed: int = 0,
        algorithm: str | type[BaseAlgorithm] = "DDPG",
        controls: str = "channel",
        partner: Controller | Rule | None = None,
        env: Factory | type[gymnasium.Wrapper] = CompressionEnv,
        views: Views | None = None,
        warmup: int = 30,
        spread: float = 0.35,
        noise: float = 0.6,
        decay: float = 0.98,
        policy: str = "MlpPolicy",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if controls not in ("layer", "channel"):
            raise AjpqError(f"controls must be 'layer' or 'channel', but it is {controls!r}; choose one")
        if warmup < 2:
            raise AjpqError(
                f"`warmup >= 2` must hold, as it sets the scale of the reward, but it is {warmup}; raise it"
            )
        self.kind, self.policy, self.settings = algorithm_of(algorithm), policy, _tuples(settings or {})
        self.evaluations, self.seed, self.controls, self.partner = evaluations, seed, controls, partner
        self.env, self.views, self.warmup, self.spread = env, views, warmup, spread
        self.noise, self.decay = noise, decay
        if policy == "MlpPolicy":
            self._model(_Shell(), 8, 8.0)  # its errors come before anything is spent

    def search(self, problem: Problem) -> SearchResult:
        env = self._environment(problem)
        if not isinstance(env.action_space, spaces.Box):
            raise AjpqError(
                f"the actions must be a Box, but this environment has {env.action_space}; give it another view"
            )
        rng = np.random.default_rng(self.seed)
        limit = self.evaluations * LIMIT
        env.reset(seed=self.seed)
        episodes: list[list[tuple]] = []
        while len(episodes) < min(self.warmup, limit) and problem.evaluations < self.evaluations:
            episodes.append(self._random_episode(env, rng))
        returns = [sum(step[3] for step in episode) for episode in episodes]
        if not np.isfinite(returns).any():
            raise AjpqError("a reward must be finite, but none of this environment's is; mend it")
        lengths = [len(episode) for episode in episodes]
        told = _Told(env, returns, lambda n: problem.evaluations >= self.evaluations or n >= limit - len(episodes))
        model = self._model(told, max(lengths), float(np.mean(lengths)))
        write = getattr(problem, "log", None)
        model.set_logger(Logger(None, [_Writer(write)] if write else []))
        if isinstance(model, OffPolicyAlgorithm):
            for episode in episodes:
                for observation, after, action, reward, terminated, ended in episode:
                    reward = told.standardised(reward, ended)
                    row = observation, after, model.policy.scale_action(action), reward, ended
                    model.replay_buffer.add(*map(_batch, row), [{"TimeLimit.truncated": ended and not terminated}])
        try:
            while True:  # until `_Told` has had enough
                left = max(self.evaluations - problem.evaluations, 1)
                model.learn(int(left * np.mean(lengths)), log_interval=1, reset_num_timesteps=model.num_timesteps == 0)
        except _Enough:
            return problem.result()

    def defaults(self, longest: int, mean: float) -> dict[str, Any]:
        """The settings of few and dear evaluations, for episodes of these lengths.

        | setting | value | source |
        |---|---|---|
        | gamma | 1: steps are free | AMC, HAQ |
        | learning_rate | 1e-3 | AMC, HAQ (critic) |
        | policy_kwargs | net_arch [64, 64]; on-policy also log_std_init = log(`noise`) | ours (AMC, HAQ: 300-300) |
        | off-policy: n_steps | the longest episode: targets are returns that were seen, no bootstrapping | ours |
        | off-policy: train_freq, gradient_steps | after every episode, 20 | ours (HAQ: one per decision) |
        | off-policy: batch_size, buffer_size, tau | 64; 100,000; 0.01 | AMC, HAQ (64; -; 0.01) |
        | off-policy: learning_starts | 0, as the warm-up comes before | ours |
        | off-policy: ent_coef | auto_0.1: starts small, as there is little time to lower it | ours |
        | DDPG, TD3: action_noise | `noise`, `decay` | see above |
        | on-policy: n_steps, batch_size | 4 episodes, a quarter of them | ours |
        | on-policy: gae_lambda | 1: returns that were seen | ours |
        | others | their own | |
        """
        common = {"gamma": 1.0, "learning_rate": 1e-3, "policy_kwargs": {"net_arch": [64, 64]}}
        if issubclass(self.kind, OffPolicyAlgorithm):
            return common | {
                "n_steps": longest, "train_freq": (1, "episode"), "gradient_steps": 20, "batch_size": 64,
                "buffer_size": 100_000, "tau": 0.01, "learning_starts": 0, "ent_coef": "auto_0.1",
            }  # fmt: skip
        if issubclass(self.kind, OnPolicyAlgorithm):
            steps = self.settings.get("n_steps", max(4 * round(mean), 16))
            common["policy_kwargs"]["log_std_init"] = float(np.log(max(self.noise, 1e-3)))
            return common | {"n_steps": steps, "batch_size": steps // 4 if steps % 4 == 0 else steps, "gae_lambda": 1.0}
        return {}

    def _environment(self, problem: Problem) -> gymnasium.Env:
        options = {"controls": self.controls, "partner": self.partner}
        if self.views is not None:
            options["views"] = self.views
        kind = self.env.func if isinstance(self.env, partial) else self.env
        if isinstance(kind, type) and issubclass(kind, gymnasium.Wrapper):
            return self.env(CompressionEnv(problem, **options))
        return self.env(problem, **options)

    def _model(self, env: gymnasium.Env, longest: int, mean: float) -> BaseAlgorithm:
        known = _keywords(self.kind)
        settings = {name: value for name, value in self.defaults(longest, mean).items() if name in known}
        if "action_noise" in known and "ent_coef" not in known and self.noise > 0:
            settings["action_noise"] = _Noise(env.action_space.shape, self.noise, self.decay, self.seed)
        settings |= {"seed": self.seed, "device": "cpu"} | self.settings
        try:
            return self.kind(self.policy, env, **settings)
        except (TypeError, ValueError, AssertionError) as error:
            raise AjpqError(
                f"{self.kind.__name__} must take Box actions and the settings {self.settings}, but: {error}; choose "
                "DDPG, TD3, SAC, TQC, PPO or A2C, or other settings"
            ) from error

    def _random_episode(self, env: gymnasium.Env, rng: np.random.Generator) -> list[tuple]:
        """[(observation, next observation, action, reward, terminated, ended)], of one structured random episode."""
        low, high = env.action_space.low, env.action_space.high
        base, steps, ended = rng.uniform(low, high), [], False
        observation, _ = env.reset()
        while not ended:
            action = np.clip(base + rng.normal(0, self.spread, base.shape) * (high - low) / 2, low, high)
            action = action.astype(env.action_space.dtype)
            after, reward, done, truncated, _ = env.step(action)
            ended = done or truncated
            steps.append((observation, after, action, float(reward), done, ended))
            observation = after
        return steps


def algorithm_of(name: str | type[BaseAlgorithm]) -> type[BaseAlgorithm]:
    """The class that a name of stable_baselines3 or sb3_contrib, or a dotted path, stands for. Raises AjpqError where
    it is none."""
    kind: Any = name
    if isinstance(name, str):
        module, _, last = name.rpartition(".")
        kind = getattr(stable_baselines3, name, None)
        try:
            kind = kind or getattr(importlib.import_module(module or "sb3_contrib"), last, None)
        except ImportError:
            kind = None
    if not (isinstance(kind, type) and issubclass(kind, BaseAlgorithm)):
        raise AjpqError(
            "algorithm must be a class of stable_baselines3 or sb3_contrib (DDPG, TD3, SAC, TQC, PPO, A2C) or the "
            f"dotted path of another one, but it is {name!r}; choose one of these"
        )
    return kind


class _Enough(Exception):
    """The search has used up its evaluations; the way out of any algorithm's `learn`."""


class _Told(gymnasium.Wrapper):
    """What the agent is told: returns less their mean in the warm-up, in units of their deviation. A reset that would
    begin an episode too many raises `_Enough`: not every algorithm heeds a callback that asks it to stop."""

    def __init__(self, env: gymnasium.Env, returns: list[float], enough: Callable[[int], bool]) -> None:
        super().__init__(env)
        finite = [value for value in returns if np.isfinite(value)]
        self.mean, self.worst, spread = float(np.mean(finite)), min(finite), float(np.std(finite))
        self.deviation = spread if spread > 1e-6 * abs(self.mean) else abs(self.mean) or 1.0
        self.enough, self.episodes, self._open = enough, 0, False

    def standardised(self, reward: float, ended: bool) -> float:
        """The mean is taken off where the episode ends, so that it moves every return by the same. A reward that is not
        finite is the worst return of the warm-up."""
        reward = float(reward) if np.isfinite(reward) else self.worst
        return (reward - (self.mean if ended else 0.0)) / self.deviation

    def reset(self, **options: Any) -> tuple[Any, dict]:
        if self.enough(self.episodes):
            raise _Enough
        return self.env.reset(**options)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        observation, reward, done, truncated, info = self.env.step(action)
        self.episodes += done or truncated
        return observation, self.standardised(reward, done or truncated), done, truncated, info


class _Noise(ActionNoise):
    """Normal noise; half of its variance is the same for all decisions of an episode."""

    def __init__(self, shape: tuple[int, ...], deviation: float, decay: float, seed: int) -> None:
        super().__init__()
        self.shape, self.deviation, self.decay = shape, deviation / decay, decay
        self.rng = np.random.default_rng(seed)
        self.reset()

    def reset(self) -> None:
        self.deviation *= self.decay
        self.shift = self._draw()

    def __call__(self) -> np.ndarray:
        return self.shift + self._draw()

    def _draw(self) -> np.ndarray:
        return self.rng.normal(0, self.deviation / np.sqrt(2), self.shape).astype(np.float32)


class _Writer(KVWriter):
    """Hands what the algorithm logs about its training to the problem."""

    def __init__(self, log: Callable[[str, float], None]) -> None:
        self.log = log

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        for name, value in key_values.items():
            if name.startswith(("train/", "rollout/")) and np.isscalar(value) and not isinstance(value, str):
                self.log(name, float(value))

    def close(self) -> None:
        pass


class _Shell(gymnasium.Env):
    """The spaces that agents have here, for a model that is made to see whether it can be made."""

    observation_space = spaces.Box(0.0, 1.0, (16,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)


def _keywords(kind: type) -> set[str]:
    """What a class takes, those keywords included that it only hands on."""
    names: set[str] = set()
    for owner in kind.__mro__:
        if "__init__" in vars(owner):
            parameters = inspect.signature(owner.__init__).parameters
            names |= set(parameters)
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
                break
    return names


def _tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Stable-Baselines3 asks for tuples, YAML has lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def _batch(value: Any) -> Any:
    """A batch of one, as replay buffers take it."""
    return (
        {name: np.asarray(part)[None] for name, part in value.items()} if isinstance(value, dict) else np.array([value])
    )
