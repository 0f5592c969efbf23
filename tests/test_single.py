"""One controller alone: with every algorithm, on any environment, exactly as many evaluations as asked for."""

import itertools
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import stable_baselines3
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from nets import problem_of
from stable_baselines3.common.buffers import NStepReplayBuffer

from agents.random_search import RandomSearch
from agents.single import Single, _Told, algorithm_of
from ajpq.errors import AjpqError
from ajpq.explain import CONF
from ajpq.policy import CompressionPolicy
from ajpq.problem import Problem
from ajpq.scoring.setting import Measured
from ajpq.space import Choices
from envs.compression import CompressionEnv
from envs.partners import Homogeneous, constant
from envs.views import ChannelView

FREE = Choices(weight_bits=(0, 1, 2, 3, 4, 6, 8), first_last=None, blocks=2)
QUICK = {"warmup": 5, "settings": {"gradient_steps": 2}}
OFF, ON = ("DDPG", "TD3", "SAC", "TQC"), ("PPO", "A2C")


def narrowest(policy: CompressionPolicy) -> float:
    return 1 - policy.mean_bits() / 8


def on(evaluator=narrowest, choices: Choices = FREE, limit: float = 0.5, **options) -> Problem:
    return problem_of(budget={"size": limit}, evaluator=evaluator, choices=choices, **options)


def quick(algorithm: str, evaluations: int = 10, seed: int = 0, **options) -> Single:
    settings = {"gradient_steps": 2} if algorithm in OFF else {}
    return Single(evaluations, seed, algorithm, **({"warmup": 5, "settings": settings} | options))


def digests(result) -> list[str]:
    return [evaluation.policy.digest() for evaluation in result.history]


@pytest.mark.parametrize("controls", ("layer", "channel"))
@pytest.mark.parametrize("algorithm", (*OFF, *ON))
def test_every_algorithm_scores_exactly_as_many_policies_as_asked_for(algorithm, controls):
    result = quick(algorithm, 11, controls=controls).search(on())
    assert result.evaluations == 11 == len(set(digests(result)))
    assert all(evaluation.score.within for evaluation in result.history)
    assert result.score.reward == max(evaluation.score.reward for evaluation in result.history)


@pytest.mark.parametrize("algorithm", ("CrossQ", "TRPO", "ARS", "RecurrentPPO"))
def test_the_other_algorithms_of_sb3_contrib_run_too(algorithm):
    policy = "MlpLstmPolicy" if algorithm == "RecurrentPPO" else "MlpPolicy"
    settings = {"delta_std": 5.0} if algorithm == "ARS" else {}
    assert Single(8, 0, algorithm, warmup=3, policy=policy, settings=settings).search(on()).evaluations == 8


@pytest.mark.parametrize("algorithm", ("DDPG", "SAC", "PPO"))
def test_the_same_seed_gives_the_same_search(algorithm):
    first = quick(algorithm, seed=3).search(on())
    np.random.seed(99)  # noqa: NPY002
    again, other = quick(algorithm, seed=3).search(on()), quick(algorithm, seed=4).search(on())
    assert digests(first) == digests(again) != digests(other)


@pytest.mark.parametrize("algorithm", ("DDPG", "PPO"))
def test_it_learns_and_beats_random_at_equal_evaluations(algorithm):
    """Rewards that are negative and large, as minus a divergence: only their standard scores matter."""

    def reward(measured: Measured, ratios) -> float:
        return -1000.0 - 50.0 * measured.accuracy  # the narrowest is the worst

    def mean_of_last(search) -> float:
        return float(np.mean([e.score.reward for e in search.search(on(reward=reward)).history[-10:]]))

    learned, drawn = mean_of_last(Single(34, 0, algorithm, warmup=12)), mean_of_last(RandomSearch(34, 0))
    assert learned > drawn + 2


def test_it_stops_when_there_is_nothing_new():
    """Two policies in all: it must not look for a third for ever."""
    for algorithm in ("DDPG", "PPO"):
        only = on(choices=Choices(weight_bits=(0, 8), max_sparsity=0.0), limit=1.0)
        assert quick(algorithm, 9, controls="layer").search(only).evaluations == 1


def test_a_budget_of_evaluations_that_the_warm_up_uses_up():
    result = Single(4, 0, warmup=30).search(on())
    assert result.evaluations == 4


class Thrifty(gymnasium.Wrapper):
    """A wrapper of a user: an own reward, from what the environment tells."""

    seen: list = []

    def __init__(self, env, price: float = 10.0):
        super().__init__(env)
        self.price = price

    def step(self, action):
        observation, reward, done, truncated, info = self.env.step(action)
        if done:
            reward = -self.price * info["score"].ratios["size"]
            self.seen.append(reward)
        return observation, reward, done, truncated, info


class Shy(CompressionEnv):
    """A subclass of a user."""

    def __init__(self, problem, limit: float = 0.3, **options):
        super().__init__(problem, **options)
        self.limit = limit

    def step(self, action):
        return super().step(np.clip(action, -self.limit, self.limit))


class Spy(stable_baselines3.DDPG):
    """DDPG that remembers its instances."""

    made: list = []

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.made.append(self)


def test_the_reward_of_the_environment_trains_and_that_of_the_problem_is_recorded():
    Thrifty.seen, Spy.made = [], []
    result = Single(12, 0, Spy, env=Thrifty, **QUICK).search(on())
    assert all(e.score.reward == e.score.accuracy for e in result.history)
    assert Thrifty.seen[:12] == [-10 * e.score.ratios["size"] for e in result.history]
    buffer = Spy.made[-1].replay_buffer
    stored, ends = buffer.rewards[: buffer.pos, 0], buffer.dones[: buffer.pos, 0] == 1
    expected = (np.array(Thrifty.seen) - np.mean(Thrifty.seen[:5])) / np.std(Thrifty.seen[:5])
    assert np.allclose(stored[ends], expected[: ends.sum()], atol=1e-5) and 11 <= ends.sum() <= 12
    assert not stored[~ends].any()
    length = int(np.flatnonzero(ends)[0]) + 1
    assert isinstance(buffer, NStepReplayBuffer) and buffer.n_steps >= length and buffer.gamma == 1
    sampled = buffer.sample(200)
    whole = sampled.dones.numpy()[:, 0] == 1
    assert whole.mean() > 0.9 and np.isin(sampled.rewards.numpy()[whole, 0], stored[ends]).all()


@pytest.mark.parametrize("env", (Shy, Thrifty, lambda problem, **options: Thrifty(Shy(problem, **options))))
def test_a_subclass_a_wrapper_and_a_function_plug_in(env):
    assert quick("DDPG", 8, env=env).search(on()).evaluations == 8


class Blind(ChannelView):
    def observe(self, draft):
        return super().observe(draft) * 0


def test_views_and_partners_of_the_users_own():
    views = lambda problem: {"channel": Blind(problem)}  # noqa: E731
    assert quick("DDPG", 8, views=views).search(on()).evaluations == 8
    widths = {}
    for partner in (constant(-1.0), constant(1.0), Homogeneous(width=3)):
        result = quick("DDPG", 6, controls="layer", partner=partner).search(on(limit=0.9))
        bits = [np.concatenate(list(e.policy.weight_bits.values())) for e in result.history]
        widths[type(partner).__name__, len(widths)] = {int(b) for found in bits for b in found if b}
    low, high, same = widths.values()
    assert low == {1} and same == {3} and max(high) == 8


@pytest.mark.parametrize(
    "options, text",
    (
        ({"algorithm": "DQN"}, "DQN must take Box actions.*DDPG"),
        ({"algorithm": "Genetic"}, "class of stable_baselines3 or sb3_contrib.*'Genetic'"),
        ({"algorithm": "nowhere.Thing"}, "'nowhere.Thing'"),
        ({"algorithm": dict}, "class of stable_baselines3"),
        ({"algorithm": "stable_baselines3.common"}, "dotted path"),
        ({"settings": {"gradient_step": 3}}, "DDPG must take .*'gradient_step': 3.*unexpected keyword"),
        ({"controls": "both"}, "controls must be"),
        ({"warmup": 1}, "warmup >= 2"),
    ),
)
def test_what_does_not_fit_is_told_before_anything_is_spent(options, text):
    with pytest.raises(AjpqError, match=text):
        Single(10, **options)


def test_algorithms_by_name_and_by_path():
    assert algorithm_of("TD3") is algorithm_of("stable_baselines3.TD3") is stable_baselines3.TD3
    assert algorithm_of("TQC") is algorithm_of("sb3_contrib.tqc.TQC") and algorithm_of(Spy) is Spy


def test_an_environment_whose_actions_are_no_box():
    class Steps(gymnasium.ActionWrapper):
        action_space = gymnasium.spaces.Discrete(3)

        def action(self, action):
            return np.full(1, action - 1.0, np.float32)

    with pytest.raises(AjpqError, match=r"actions must be a Box.*Discrete\(3\)"):
        Single(10, env=lambda problem, **options: Steps(CompressionEnv(problem, **options))).search(on())


def test_rewards_that_fail_now_and_then_are_the_worst_there_were():
    numbers = itertools.count()

    class Shaky(gymnasium.RewardWrapper):
        def reward(self, reward):
            return float("nan") if next(numbers) % 25 == 24 else reward

    assert Single(14, env=Shaky, warmup=6).search(on()).evaluations == 14


def test_equal_returns_of_the_warmup_leave_later_ones_in_proportion():
    told = _Told(gymnasium.Env(), [0.1] * 6, lambda n: False)
    assert told.standardised(0.2, True) == pytest.approx(1.0)
    assert _Told(gymnasium.Env(), [0.0] * 6, lambda n: False).standardised(0.5, True) == 0.5


def test_a_reward_that_is_not_finite():
    class Broken(gymnasium.RewardWrapper):
        def reward(self, reward):
            return float("nan")

    with pytest.raises(AjpqError, match="reward must be finite"):
        Single(10, env=Broken).search(on())


def test_an_environment_that_never_ends_an_episode_with_a_policy():
    def short(problem, **options):
        return gymnasium.wrappers.TimeLimit(CompressionEnv(problem, **options), 3)

    Spy.made = []
    with pytest.raises(AjpqError, match="at least one policy within budget"):
        Single(4, 0, Spy, env=short, **QUICK).search(on())
    buffer = Spy.made[-1].replay_buffer
    assert buffer.pos > 15 and np.array_equal(buffer.dones, buffer.timeouts) and buffer.dones[2, 0] == 1


def test_what_the_algorithm_logs_goes_to_a_problem_that_takes_it():
    for algorithm in ("DDPG", "PPO"):
        problem, told = on(), {}
        problem.log = lambda name, value, told=told: told.setdefault(name, []).append(value)
        quick(algorithm, 24).search(problem)
        losses = [name for name in told if name.startswith("train/") and "loss" in name]
        assert losses and "rollout/ep_rew_mean" in told and np.isfinite([told[name] for name in losses]).all()


def configured(*overrides: str) -> Single:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return instantiate(compose("config", ["search=single", *overrides]).search, _convert_="all")


def test_the_configuration():
    search = configured("seed=5")
    assert search.seed == 5 and search.controls == "channel" and isinstance(search.partner, Homogeneous)
    search = configured(
        "search.algorithm=PPO", "search.controls=layer", "search.evaluations=8", "search.warmup=3",
        "search.partner._target_=envs.partners.ByImportance", "+search.partner.width=4", "+search.settings.n_epochs=2",
        f"search.env._target_={__name__}.Thrifty", "+search.env.price=3",
    )  # fmt: skip
    Thrifty.seen = []
    result = search.search(on())
    assert result.evaluations == 8
    assert Thrifty.seen[0] == pytest.approx(-3 * result.history[0].score.ratios["size"])
    search = configured("search.partner=null", "+search.settings.train_freq=[3,step]", "search.evaluations=7")
    assert search.settings == {"train_freq": (3, "step")} and search.search(on()).evaluations == 7


@pytest.mark.slow
def test_an_environment_in_the_users_folder_by_the_command_line(tmp_path):
    (tmp_path / "my_env.py").write_text(
        "import gymnasium\n\n\nclass Thrifty(gymnasium.RewardWrapper):\n    def reward(self, reward):\n"
        "        return reward - 1\n"
    )
    program = "import sys; from ajpq.cli import main; sys.exit(main())"
    options = ["search=single", "search.env._target_=my_env.Thrifty", "search.evaluations=6", "search.warmup=3",
               "control=none", "train.epochs=1", "finetune=none", "threads=1", "onnx=false",
               "hydra.run.dir=run"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program, *options], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()) == 6
