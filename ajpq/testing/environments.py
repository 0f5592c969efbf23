"""Does an environment keep the rules of Gymnasium, of Stable-Baselines3, and those of a search?"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ajpq.problem import Problem
from ajpq.testing.problems import fingerprint, must, must_be_unchanged, small_problem

if TYPE_CHECKING:
    import gymnasium

WRAPPED = ".*different from the unwrapped version.*"  # gymnasium says so of every wrapper


def check_env(
    env: gymnasium.Env | Callable[[Problem], gymnasium.Env],
    problem: Problem | None = None,
    *,
    own_reward: bool = False,
    episodes: int = 4,
) -> None:
    """Play an environment and raise AssertionError where it breaks a rule:

    - check_env of Gymnasium (`utils.env_checker`) and of Stable-Baselines3 (`common.env_checker`) pass without warnings
    - every episode ends, in a policy that the problem has scored and that is within budget, whatever the actions;
      observations stay in their space, rewards are finite numbers
    - the rewards of an episode are 0 but for the last, which is that of info["score"] (not with own_reward=True)
    - actions make a difference, the same ones make the same episode, after `reset` nothing is left of the one before
    - the problem's network is left as it was

    env: the environment, or a callable that makes it of a problem (a class, say). An environment tells its problem as
        `env.unwrapped.problem`, as `envs.compression.CompressionEnv` and what is built on it do. problem: what the
        callable gets, by default `small_problem()`. episodes: of random actions.
    """
    import gymnasium

    if not isinstance(env, gymnasium.Env):
        must(callable(env), f"an environment must be a gymnasium.Env or make one, but it is {env!r}")
        env = env(problem or small_problem())
        must(isinstance(env, gymnasium.Env), f"what was called must make a gymnasium.Env, but it made {env!r}")
    problem = getattr(env.unwrapped, "problem", None)
    must(
        isinstance(problem, Problem),
        "an environment must tell its problem as env.unwrapped.problem, but it has none; set self.problem",
    )
    before = fingerprint(problem.network)
    _check_by_others(env)
    env.action_space.seed(0)
    plans = [None] * episodes + [getattr(env.action_space, end, None) for end in ("low", "high")]
    played = []
    for plan in plans:
        actions: list = []
        played.append((_play(env, problem, plan, actions, own_reward), actions))
    for first, actions in (played[0], played[-1], played[0]):
        again = _play(env, problem, iter(actions), [], own_reward)
        must(
            _same(first, again),
            "the same seed and actions must give the same episode, but they do not; is something kept over a reset, or "
            "drawn from a generator other than self.np_random?",
        )
    must(
        any(not _same(played[0][0], other) for other, _ in played[1:]),
        f"actions must make a difference, but {len(played)} episodes of different actions were all the same",
    )
    must_be_unchanged("an environment", before, problem.network)


def _check_by_others(env: gymnasium.Env) -> None:
    from gymnasium.utils.env_checker import check_env as of_gymnasium
    from stable_baselines3.common.env_checker import check_env as of_stable_baselines3

    bare = env.unwrapped is env and env.spec is not None  # only such a one can be made again by gymnasium
    checks = {
        "gymnasium": lambda: of_gymnasium(env, skip_render_check=not bare, skip_close_check=not bare),
        "stable_baselines3": lambda: of_stable_baselines3(env),
    }
    for name, check in checks.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message=WRAPPED)
            try:
                check()
            except Exception as error:  # the checkers raise whatever the environment does
                raise AssertionError(
                    f"an environment must pass check_env of {name}, but: {type(error).__name__}: {error}"
                ) from error


def _play(env: gymnasium.Env, problem: Problem, plan: Any, actions: list, own_reward: bool) -> list[tuple]:
    """One episode: [(observation, reward)], actions from the space (None), a constant or an iterator; they are kept in
    `actions`."""
    bound = 10 * sum(2 + layer.c_out for layer in problem.network.layers)
    observation, _ = env.reset(seed=7)
    steps, ended, info = [(observation, 0.0)], False, {}
    while not ended:
        must(
            len(steps) <= bound,
            f"an episode must end, but after {bound} steps, ten for every decision that there can be, it has not",
        )
        if plan is None:
            action = env.action_space.sample()
        else:
            action = plan if isinstance(plan, np.ndarray) else next(plan)
        actions.append(action)
        observation, reward, done, truncated, info = env.step(action)
        ended = done or truncated
        must(
            env.observation_space.contains(observation),
            f"an observation must be in the observation space, but {observation} is not in {env.observation_space}",
        )
        must(np.isfinite(reward), f"a reward must be a finite number, but it is {reward}")
        must(
            own_reward or ended or reward == 0,
            f"the reward must be 0 before the end of an episode, but step {len(steps)} has {reward}; use "
            "own_reward=True if this is meant",
        )
        steps.append((observation, float(reward)))
    must(bool(problem.history), "an episode must end in a policy that is scored, but the problem's record is empty")
    outside = [evaluation.number for evaluation in problem.history if not evaluation.score.within]
    must(
        not outside,
        f"every policy must be within budget, but evaluation {outside[:1]} is not; answer the draft's decisions with "
        "options that it offers, whatever the action is",
    )
    if not own_reward:
        must("score" in info, 'the info of the last step must have the "score", but it has only ' + f"{sorted(info)}")
        must(
            reward == info["score"].reward,
            f"the last reward must be that of the score, {info['score'].reward:g}, but it is {reward:g}; use "
            "own_reward=True if this is meant",
        )
    return steps


def _same(first: list[tuple], second: list[tuple]) -> bool:
    return len(first) == len(second) and all(
        a[1] == b[1] and _equal(a[0], b[0]) for a, b in zip(first, second, strict=True)
    )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[name], b[name]) for name in a)
    return np.array_equal(a, b)
