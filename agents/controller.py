"""One controller: an off-policy algorithm of Stable-Baselines3 that learns from whole episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import gymnasium
import numpy as np
import stable_baselines3
import torch
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from ajpq.errors import AjpqError
from envs.views import View


def algorithm_of(name: str | type[OffPolicyAlgorithm]) -> type[OffPolicyAlgorithm]:
    """A class of stable_baselines3 or sb3_contrib. Raises AjpqError for one that cannot learn from stored episodes or
    wants other settings."""
    import sb3_contrib

    kind = name
    if isinstance(name, str):
        kind = getattr(stable_baselines3, name, None) or getattr(sb3_contrib, name, None)
    known = stable_baselines3.TD3, stable_baselines3.SAC, sb3_contrib.TQC  # DDPG is a TD3
    if not (isinstance(kind, type) and issubclass(kind, known)):
        raise AjpqError(
            f"algorithm must be DDPG, TD3, SAC, TQC or a subclass of one of these, but it is {name!r}; choose one, or "
            "search=single for others"
        )
    return kind


class Controller:
    """The networks of one view's decisions. Transitions are final steps whose reward is the return of their episode, so
    the critic regresses on returns that were seen and does not bootstrap; returns may be restated at any time.
    """

    def __init__(self, view: View, kind: type[OffPolicyAlgorithm], seed: int, settings: Mapping[str, Any]) -> None:
        self.view, self.size = view, view.action_space.shape[0]
        self.model = kind("MlpPolicy", _Shell(view), seed=seed, device="cpu", gamma=1.0, **settings)
        self.model.set_logger(Logger(None, []))  # `configure` would leave a folder for every search
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
        loose = {name: value.detach().clone() for name, value in self._loose().items()}
        return {"parameters": self.model.get_parameters(), "loose": loose, "updates": self.model._n_updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.set_parameters(state["parameters"], exact_match=True, device="cpu")
        for name, value in self._loose().items():
            value.data.copy_(state["loose"][name])
        self.model._n_updates = state["updates"]

    def _loose(self) -> dict[str, torch.Tensor]:
        """What `get_parameters` leaves out: tensors that are in no network, such as the weight of SAC's entropy."""
        return {name: attrgetter(name)(self.model) for name in self.model._get_torch_save_params()[1]}


class _Shell(gymnasium.Env):
    """The two spaces of a view, for Stable-Baselines3 to build its networks from; episodes are played elsewhere."""

    def __init__(self, view: View) -> None:
        self.observation_space, self.action_space = view.observation_space, view.action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        raise AjpqError("this environment only describes spaces, but it was run; use envs.compression.CompressionEnv")

    step = reset
