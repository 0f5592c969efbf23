"""One controller: an off-policy algorithm of Stable-Baselines3 that learns from whole episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
import stable_baselines3
import torch
from stable_baselines3.common.logger import configure
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from ajpq.errors import AjpqError
from envs.views import View


def algorithm_of(name: str | type[OffPolicyAlgorithm]) -> type[OffPolicyAlgorithm]:
    """A class of stable_baselines3 or sb3_contrib. Raises AjpqError for one that cannot learn from stored episodes."""
    kind = name
    if isinstance(name, str):
        import sb3_contrib

        kind = getattr(stable_baselines3, name, None) or getattr(sb3_contrib, name, None)
    if not (isinstance(kind, type) and issubclass(kind, OffPolicyAlgorithm) and kind is not stable_baselines3.DQN):
        raise AjpqError(
            "algorithm must be an off-policy class of stable_baselines3 or sb3_contrib for continuous actions (DDPG, "
            f"TD3, SAC, TQC), but it is {name!r}; choose one of these, or search=single for others"
        )
    return kind


class Controller:
    """The networks of one view's decisions. Transitions are final steps whose reward is the return of their episode, so
    the critic regresses on returns that were seen and does not bootstrap; returns may be restated at any time.
    """

    def __init__(self, view: View, kind: type[OffPolicyAlgorithm], seed: int, settings: Mapping[str, Any]) -> None:
        self.view, self.size = view, view.action_space.shape[0]
        self.model = kind("MlpPolicy", _Shell(view), seed=seed, device="cpu", gamma=1.0, **settings)
        self.model.set_logger(configure(None, []))
        self._episode: list[int] = []  # of every stored transition

    def remember(self, episode: int, observations: Sequence[np.ndarray], actions: Sequence[np.ndarray]) -> None:
        for observation, action in zip(observations, actions, strict=True):
            self.model.replay_buffer.add(
                observation[None], observation[None], action[None], np.zeros(1, np.float32), np.array([True]), [{}]
            )
            self._episode.append(episode)

    def learn(self, returns: np.ndarray, steps: int) -> dict[str, float]:
        """Take gradient steps on returns (n_episodes,), restated for all that is stored; the losses."""
        if not self._episode or not steps:
            return {}
        buffer = self.model.replay_buffer
        kept = self._episode[-buffer.buffer_size :]
        place = (np.arange(len(self._episode) - len(kept), len(self._episode))) % buffer.buffer_size
        buffer.rewards[place, 0] = returns[kept]
        self.model.train(gradient_steps=steps, batch_size=self.model.batch_size)
        told = self.model.logger.name_to_value
        return {name.removeprefix("train/"): float(told[name]) for name in list(told) if name.endswith("_loss")}

    def act(self, observations: np.ndarray) -> np.ndarray:
        """The actor's actions (N, size) for observations (N, n)."""
        return self.model.predict(observations, deterministic=True)[0].reshape(len(observations), self.size)

    @torch.no_grad()
    def value(self, observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """The critics' mean expected return (K, N) of K action sequences (K, N, size) met with observations (N, n)."""
        many, n, size = actions.shape
        seen = torch.from_numpy(observations).repeat(many, 1)
        found = self.model.critic(seen, torch.from_numpy(actions.reshape(many * n, size)))
        found = torch.stack(found) if isinstance(found, tuple) else found.flatten(1).T  # TQC: quantiles (N, critics, q)
        return found.reshape(len(found), many, n).mean(0).numpy()

    def state_dict(self) -> dict[str, Any]:
        """Networks, optimizers and what is known of each; what was remembered is the search's to keep."""
        return {"parameters": self.model.get_parameters(), "updates": self.model._n_updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.set_parameters(state["parameters"], exact_match=True, device="cpu")
        self.model._n_updates = state["updates"]


class _Shell(gymnasium.Env):
    """The two spaces of a view, for Stable-Baselines3 to build its networks from; episodes are played elsewhere."""

    def __init__(self, view: View) -> None:
        self.observation_space, self.action_space = view.observation_space, view.action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        raise AjpqError("this environment only describes spaces, but it was run; use envs.compression.CompressionEnv")

    step = reset
