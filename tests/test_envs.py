"""The environments: they keep Gymnasium's and Stable-Baselines3's rules, their own docstring, and every budget."""

import re

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from nets import problem_of, traced
from stable_baselines3 import DDPG
from stable_baselines3.common.env_checker import check_env as check_env_sb3
from torch import nn

from ajpq.errors import AjpqError
from ajpq.problem import Problem
from ajpq.scoring.task import each
from ajpq.space import Choices
from envs.compression import CompressionEnv, constant, rollout
from envs.views import ChannelView, LayerView, pick, turn

BOTH = pytest.mark.parametrize("controls", ("layer", "channel"))


def problem(**options) -> Problem:
    options.setdefault("budget", {"size": 0.12, "macs": 0.8})
    return problem_of(**options)


@BOTH
def test_the_checkers_pass(controls):
    env = CompressionEnv(problem(choices=Choices(act_bits=(4, 8))), controls)
    check_env(env, skip_render_check=True)
    check_env_sb3(env)


@BOTH
def test_it_can_be_made_by_its_id(controls):
    made = gymnasium.make(f"envs:ajpq/{controls.capitalize()}-v0", problem=problem(), disable_env_checker=True)
    env = made.unwrapped
    assert isinstance(env, CompressionEnv) and env.controls == controls
    observation, info = made.reset(seed=0)
    assert made.observation_space.contains(observation) and info == {}
    made.step(made.action_space.sample())


@BOTH
@pytest.mark.parametrize("name", ("digits_cnn", "mobilenet_v3_small"))
@pytest.mark.parametrize(
    "choices", (Choices(), Choices(act_bits=(2, 4, 8, 32), weight_bits=(0, 1, 2, 8, 32), first_last=None, blocks=2))
)
def test_random_walks_stay_in_the_box_and_end_within_budget(controls, name, choices):
    env = CompressionEnv(
        problem(
            name=name,
            choices=choices,
            budget={"size": 0.3, "macs": 0.6, "bops": 0.005 if len(choices.act_bits) > 1 else 0.1},
        ),
        controls,
    )
    env.action_space.seed(0)
    moved = np.zeros(env.observation_space.shape, bool)
    for episode in range(4 if name == "digits_cnn" else 1):
        observation, _ = env.reset(seed=episode)
        first, done = observation, False
        while not done:
            assert env.observation_space.contains(observation), observation
            moved |= observation != first
            observation, reward, done, truncated, info = env.step(env.action_space.sample())
            assert not truncated and isinstance(reward, float)
            if not done:
                assert reward == 0 and info == {}
        assert env.observation_space.contains(observation)
        info["policy"].validate(env.problem.network)
        assert info["score"].within and reward == info["score"].reward == info["policy"].mean_bits() / 32
        assert env.problem.budget.admits(info["policy"])
    if name == "mobilenet_v3_small" and len(choices.act_bits) > 1:
        assert moved.all(), np.flatnonzero(~moved)  # every number tells something


@BOTH
def test_extreme_and_wild_actions_are_answered(controls):
    env = CompressionEnv(problem(), controls)
    for value in (-1.0, 1.0, 0.0, -7.0, 1e9):
        env.reset()
        done = False
        while not done:
            _, _, done, _, info = env.step(np.full(env.action_space.shape, value, np.float32))
        assert info["score"].within


def rows(controls: str) -> list[int]:
    """The indices that the observation table of the docstring lists for a controller."""
    table = CompressionEnv.__doc__.split("### Observation space")[1].split("###")[0]
    found = []
    for line in table.splitlines()[2:]:
        cell = line.split("|")[1].strip() if line.strip().startswith("|") else ""
        if re.match(r"(layer |channel )?\d", cell) and not cell.startswith(
            "channel" if controls == "layer" else "layer"
        ):
            found += [int(n) for n in re.findall(r"\d+", cell)]
    return found


@BOTH
def test_the_docstring_lists_every_observation_and_action(controls):
    env = CompressionEnv(problem(choices=Choices(act_bits=(4, 8))), controls)
    (size,) = env.observation_space.shape
    assert rows(controls) == list(range(size))
    table = CompressionEnv.__doc__
    assert re.search(rf'controls="{controls}": Box\(0, 1, \({size},\)\)', table)
    section = table.split(f'### Action space, controls="{controls}"')[1].split("###")[0]
    assert [int(n) for n in re.findall(r"^\s*\| (\d) \|", section, re.M)] == list(range(env.action_space.shape[0]))
    assert env.observation_space.low.min() == 0 and env.observation_space.high.max() == 1
    assert env.action_space.low.min() == -1 and env.action_space.high.max() == 1
    assert CompressionEnv(problem(), "layer").action_space.shape == (1,)


def test_what_the_observations_mean():
    made = problem(budget={"size": 0.3})
    layers = made.network.layers
    env = CompressionEnv(made, "channel", partner=constant(1.0))  # as sparse as can be
    observation, _ = env.reset()
    names, before = [], None
    done = False
    while not done:
        decision, draft = env.draft.decision, env.draft
        at = [layer.name for layer in layers].index(decision.layer.name)
        assert observation[0] == pytest.approx(at / (len(layers) - 1))
        assert observation[2] == (decision.layer.kind == "linear") and observation[1] == 0
        assert observation[10] == pytest.approx(float(draft.slack.min()), abs=1e-6)
        assert observation[11] == pytest.approx(
            sum(layer.weights for layer in layers[at + 1 :]) / made.network.weights, abs=1e-6
        )
        pruned = (draft.weight_bits(decision.layer.name) == 0).mean()
        assert observation[13] == pytest.approx(pruned) and pruned > 0.5
        assert observation[14] == pytest.approx(decision.block / decision.blocks)
        assert observation[17] == decision.options[-1] / 8 and observation[18] == 1
        if before is not None:
            assert observation[19] == before / 8
        names.append(decision.layer.name)
        before = decision.options[-1]
        observation, _, done, _, _ = env.step(np.ones(1, np.float32))
    assert list(dict.fromkeys(names)) == [layer.name for layer in layers[1:-1]]


def test_actions_are_decoded_into_equal_parts():
    options = (1, 2, 4, 8)
    assert [pick(options, a) for a in (-1, -0.51, -0.49, -0.01, 0.01, 0.49, 0.51, 1)] == [1, 1, 2, 2, 4, 4, 8, 8]
    assert pick(options, -9) == 1 and pick(options, 9) == 8 and pick((3,), 0.2) == 3


def test_the_layer_action_is_the_share_of_the_sparsity_on_offer():
    env = CompressionEnv(problem(budget={"size": 1.0}, choices=Choices(max_sparsity=0.5)), "layer")
    env.reset()
    for action in (-1.0, 0.0, 1.0):
        draft = env.problem.draft()
        space = next(iter(env.problem.network.space_of[draft.decision.layer.writes]))
        env.views["layer"].apply(draft, np.array([action], np.float32))
        assert draft.sparsity[space] == pytest.approx(0.25 + 0.25 * action)


def test_the_partner_answers_for_the_other_controller():
    seen = []

    def partner(observation):
        seen.append(observation.shape)
        return np.full(1, -1.0, np.float32)

    env = CompressionEnv(problem(), "layer", partner)
    env.reset()
    done = False
    while not done:
        _, _, done, _, info = env.step(np.full(1, -1.0, np.float32))
    assert set(seen) == {(21,)}
    inner = np.concatenate(
        [bits for name, bits in info["policy"].weight_bits.items() if name not in ("conv1", "linear")]
    )
    assert set(inner[inner > 0].tolist()) == {1}


def test_a_rollout_records_the_turns_of_both():
    made = problem()
    policy, taken = rollout(
        made, {"layer": LayerView(made), "channel": ChannelView(made)}, {"layer": constant(), "channel": constant(-1.0)}
    )
    assert made.evaluations == 0 and made.score(policy).within
    assert {o.shape for o, _ in taken["layer"]} == {(16,)} and {o.shape for o, _ in taken["channel"]} == {(21,)}
    prunable = sum(space.prunable for space in made.network.spaces)
    assert len(taken["layer"]) == prunable and len(taken["channel"]) > 3 * prunable


class Halves:
    """A view of a user: two layer features, and the action is the sparsity itself."""

    observation_space = gymnasium.spaces.Box(0.0, 1.0, (2,), np.float32)
    action_space = gymnasium.spaces.Box(0.0, 1.0, (1,), np.float32)

    def observe(self, draft):
        return np.array([draft.sparsity.get(0, 0.0), np.clip(draft.slack.min(), 0, 1)], np.float32)

    def apply(self, draft, action):
        low, high = draft.decision.options
        draft.take(np.clip(float(action[0]), low, high))


class Shaped(gymnasium.RewardWrapper):
    def reward(self, reward):
        return 10 * reward


def test_a_view_and_a_wrapper_of_the_users_own():
    made = problem()
    env = Shaped(CompressionEnv(made, "layer", views={"layer": Halves(), "channel": ChannelView(made)}))
    check_env_sb3(env.unwrapped, warn=False)  # it would like the action to be symmetric
    observation, _ = env.reset()
    assert observation.shape == (2,)
    done = False
    while not done:
        _, reward, done, _, info = env.step(np.array([0.5], np.float32))
    assert reward == pytest.approx(10 * info["score"].reward) and info["score"].within
    assert all(value == pytest.approx(0.5) or value > 0.5 for value in env.unwrapped.draft.sparsity.values())


@BOTH
def test_stable_baselines3_trains_on_it_directly(controls):
    env = CompressionEnv(problem(), controls)
    model = DDPG("MlpPolicy", env, learning_starts=5, seed=0, device="cpu", policy_kwargs={"net_arch": [8]})
    model.learn(40)
    assert env.problem.evaluations >= 1


def test_nothing_to_decide_is_an_error():
    with pytest.raises(AjpqError, match="controls must be"):
        CompressionEnv(problem(), "both")
    with pytest.raises(AjpqError, match="no prunable space"):
        CompressionEnv(problem_of(budget={"size": 0.5}, choices=Choices(weight_bits=(2, 4))), "layer")
    with pytest.raises(AjpqError, match="no layer with a choice of widths"):
        CompressionEnv(problem_of(budget={"size": 0.5}, choices=Choices(weight_bits=(0, 8))), "channel")


def test_a_network_of_one_layer_can_be_walked():
    network = traced(lambda m, x: m.l(x.flatten(1)), shape=(1, 2, 2), l=nn.Linear(4, 5))
    made = Problem(
        network,
        [(network.example, None)],
        [],
        {"size": 1.0},
        choices=Choices(first_last=None),
        evaluator=each(lambda policy: 0.5),
    )
    env = CompressionEnv(made, "channel")
    observation, _ = env.reset()
    assert env.observation_space.contains(observation) and turn(env.draft) == "channel"
    done = False
    while not done:
        observation, _, done, _, _ = env.step(env.action_space.sample())
        assert env.observation_space.contains(observation)
