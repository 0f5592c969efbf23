"""The environments: they keep Gymnasium's and Stable-Baselines3's rules, their own docstring, and every budget."""

import inspect
import re

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from nets import network_of, problem_of, traced
from stable_baselines3 import DDPG
from stable_baselines3.common.env_checker import check_env as check_env_sb3
from torch import nn

from ajpq import testing
from ajpq.elimination import elimination
from ajpq.errors import AjpqError
from ajpq.policy import CompressionPolicy
from ajpq.problem import Problem
from ajpq.rewards import accuracy_reward
from ajpq.scoring.setting import each
from ajpq.space import Choices
from envs.compression import CompressionEnv, rollout
from envs.partners import ByImportance, Homogeneous, constant, middle
from envs.views import ChannelView, LayerView, pick, turn

BOTH = pytest.mark.parametrize("controls", ("layer", "channel"))


def problem(**options) -> Problem:
    options.setdefault("budget", {"size": 0.12, "macs": 0.8})
    return problem_of(**options)


def played(env, actions=None) -> tuple[CompressionPolicy, list]:
    """The policy of an episode, of one action or of random ones, and its infos."""
    _, info = env.reset()
    infos, done = [info], False
    while not done:
        action = env.action_space.sample() if actions is None else np.full(env.action_space.shape, actions, np.float32)
        _, _, done, _, info = env.step(action)
        infos.append(info)
    return info["policy"], infos


@BOTH
def test_the_checkers_pass(controls):
    made = problem(choices=Choices(act_bits=(4, 8)))
    env = CompressionEnv(made, controls)
    check_env(env, skip_render_check=True)
    check_env_sb3(env)
    env = gymnasium.make(f"envs:ajpq/{controls.capitalize()}-v0", problem=made).unwrapped
    check_env(env)  # this one renders, makes and closes copies of the environment
    check_env_sb3(env, skip_render_check=False)


@BOTH
def test_the_checkers_pass_where_an_episode_is_one_step(controls):
    network = traced(lambda m, x: m.l(nn.functional.relu(m.k(x.flatten(1)))), shape=(1, 2, 2), k=nn.Linear(4, 6),
                     l=nn.Linear(6, 5))  # fmt: skip
    made = Problem(
        network, [(network.example, None)], [], {"size": 1.0},
        choices=Choices(first_last=None, weight_bits=(0, 2, 8), blocks=1), evaluator=each(lambda policy: 0.5),
    )  # fmt: skip
    env = CompressionEnv(made, controls)
    check_env(env, skip_render_check=True)
    check_env_sb3(env)
    assert len(played(env)[1]) == {"layer": 2, "channel": 3}[controls]


@BOTH
def test_it_can_be_made_by_its_id(controls):
    asked = problem()
    made = gymnasium.make(f"envs:ajpq/{controls.capitalize()}-v0", problem=asked)
    env = made.unwrapped
    assert isinstance(env, CompressionEnv) and env.controls == controls and env.problem is asked
    observation, info = made.reset(seed=0)
    assert made.observation_space.contains(observation) and set(info) == {"layer", "slack"}
    made.step(made.action_space.sample())
    assert made.spec.make().unwrapped.problem is asked  # nothing was copied
    view = Halves()
    made = gymnasium.make("envs:ajpq/Layer-v0", problem=asked, views={"layer": view}, max_episode_steps=3)
    assert made.unwrapped.views["layer"] is view and made.observation_space.shape == (2,)
    wrapped = gymnasium.wrappers.RecordEpisodeStatistics(Shaped(made))
    _, infos = played(wrapped, 0.5)
    assert infos[-1]["episode"]["r"] == pytest.approx(10 * infos[-1]["score"].reward)


@BOTH
def test_it_can_be_made_as_a_vector(controls):
    asked = problem()
    name = f"envs:ajpq/{controls.capitalize()}-v0"
    envs = gymnasium.make_vec(name, 3, vectorization_mode="sync", problem=asked)
    observations, infos = envs.reset(seed=0)
    assert observations.shape == (3, *envs.single_observation_space.shape)
    assert all(env.unwrapped.problem is asked for env in envs.envs)
    assert infos["layer"][0] in asked.network and infos["slack"]["size"].shape == (3,)
    envs.action_space.seed(0)
    ended = np.zeros(3, int)
    for _ in range(200):
        _, rewards, dones, _, infos = envs.step(envs.action_space.sample())
        ended += dones
        for i in np.flatnonzero(dones):
            assert infos["score"][i].reward == rewards[i] and infos["policy"][i].digest()
    assert ended.min() > 1 and asked.evaluations == len({e.policy.digest() for e in asked.history}) > 3
    envs.close()


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
                assert reward == 0 and set(info) == {"layer", "slack"}
                assert info["layer"] == env.draft.decision.layer.name and min(info["slack"].values()) > -1e-8
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


def rows(section: str) -> list[list[str]]:
    """The cells of a table of the docstring."""
    text = CompressionEnv.__doc__.split(f"### {section}")[1].split("###")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def listed(controls: str) -> list[int]:
    """The indices that the observation table lists for a controller."""
    other = "channel" if controls == "layer" else "layer"
    cells = [row[0] for row in rows("Observation space") if not row[0].startswith(other)]
    return [int(number) for cell in cells for number in re.findall(r"\d+", cell)]


@BOTH
def test_the_docstring_lists_every_observation_and_action(controls):
    env = CompressionEnv(problem(choices=Choices(act_bits=(4, 8))), controls)
    (size,) = env.observation_space.shape
    assert listed(controls) == list(range(size))
    assert re.search(rf'controls="{controls}": Box\(0, 1, \({size},\)\)', CompressionEnv.__doc__)
    actions = rows(f'Action space, controls="{controls}"')
    assert [int(row[0]) for row in actions] == list(range(env.action_space.shape[0]))
    assert all(all(row) for row in (*actions, *rows("Observation space")))  # a unit and a source each
    assert env.observation_space.low.min() == 0 and env.observation_space.high.max() == 1
    assert env.action_space.low.min() == -1 and env.action_space.high.max() == 1
    assert CompressionEnv(problem(), "layer").action_space.shape == (1,)


def test_the_docstring_lists_every_hyper_parameter_with_its_default():
    table = {row[0]: row for row in rows("Hyper-parameters")}
    defaults = {f"choices.{name}": value for name, value in vars(Choices()).items()}
    options = inspect.signature(Problem).parameters
    defaults |= {f"problem.{name}": options[name].default for name in ("importance", "norm_images", "reward")}
    assert set(table) == {"discount", *defaults}
    for name, value in defaults.items():
        text = ", ".join(map(str, value)) if isinstance(value, tuple) else getattr(value, "__name__", str(value))
        assert table[name][1] == text and all(table[name]), name
    assert defaults["problem.importance"] is elimination and defaults["problem.reward"] is accuracy_reward
    arguments = CompressionEnv.__doc__.split("### Arguments")[1]
    assert all(f"{name}:" in arguments for name in inspect.signature(CompressionEnv).parameters)


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


class Rounded(CompressionEnv):
    """A subclass of a user: actions on a grid, and a reward of its own."""

    def step(self, action):
        observation, reward, done, truncated, info = super().step(np.round(4 * action) / 4)
        return observation, reward - info["score"].ratios["macs"] if done else -0.01, done, truncated, info


class Far(ChannelView):
    """A view of a user: the standard one and what is left of the first budget."""

    def __init__(self, problem):
        super().__init__(problem)
        self.observation_space = gymnasium.spaces.Box(-1.0, 1.0, (22,), np.float32)

    def observe(self, draft):
        return np.append(super().observe(draft), np.float32(np.clip(draft.slack[0], 0, 1)))

    def apply(self, draft, action):
        draft.take(draft.decision.options[0 if action[0] < 0 else -1])


def thrifty(measured, ratios):
    return measured.accuracy - 3 * ratios["size"]


USERS = {
    "subclass": lambda problem: Rounded(problem),
    "wrapper": lambda problem: Shaped(CompressionEnv(problem, "channel")),
    "view": lambda problem: CompressionEnv(problem, "channel", views={"channel": Far(problem)}),
    "both views": lambda problem: CompressionEnv(
        problem, "layer", Homogeneous(), lambda p: {"layer": LayerView(p), "channel": Far(p)}
    ),
}


@pytest.mark.parametrize("name", USERS)
@pytest.mark.parametrize("reward", (accuracy_reward, thrifty))
def test_environments_of_users_pass_every_check_without_a_warning(name, reward):
    env = USERS[name](problem(reward=reward))
    if name != "wrapper":  # of a wrapper Gymnasium says that it is one
        check_env(env, skip_render_check=True)
    check_env_sb3(env)
    testing.check_env(env, own_reward=name in ("subclass", "wrapper"))
    scores = [evaluation.score for evaluation in env.unwrapped.problem.history]
    assert all(score.reward == (score.accuracy - 3 * score.ratios["size"] if reward is thrifty else score.accuracy)
               for score in scores)  # fmt: skip


def test_what_a_view_and_a_wrapper_of_the_users_own_do():
    env = Shaped(CompressionEnv(problem(), "layer", views={"layer": Halves()}))
    check_env_sb3(env.unwrapped, warn=False)  # it would like the action to be symmetric
    observation, _ = env.reset()
    assert observation.shape == (2,)
    done = False
    while not done:
        last = observation
        observation, reward, done, _, info = env.step(np.array([0.5], np.float32))
    assert np.array_equal(observation, last) and observation is not last
    assert reward == pytest.approx(10 * info["score"].reward) and info["score"].within
    assert all(value == pytest.approx(0.5) or value > 0.5 for value in env.unwrapped.draft.sparsity.values())
    policy, _ = played(CompressionEnv(problem(), "channel", views={"channel": Far(problem())}), -1.0)
    inner = np.concatenate([bits for name, bits in policy.weight_bits.items() if name not in ("conv1", "linear")])
    assert set(inner[inner > 0].tolist()) == {1}


@BOTH
def test_stable_baselines3_trains_on_it_directly(controls):
    env = CompressionEnv(problem(), controls)
    model = DDPG("MlpPolicy", env, learning_starts=5, seed=0, device="cpu", policy_kwargs={"net_arch": [8]})
    model.learn(40)
    assert env.problem.evaluations >= 1


def test_nothing_to_decide_is_an_error():
    with pytest.raises(AjpqError, match="controls must be"):
        CompressionEnv(problem(), "both")
    with pytest.raises(AjpqError, match="render_mode must be 'ansi'"):
        CompressionEnv(problem(), render_mode="human")
    with pytest.raises(AjpqError, match="views must be .*'chanel'"):
        CompressionEnv(problem(), views={"chanel": Halves()})
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


def test_misuse_of_a_step_is_told():
    env = CompressionEnv(problem())
    env.reset()
    with pytest.raises(AjpqError, match="action must be finite.*nan"):
        env.step(np.array([np.nan], np.float32))
    played(env)
    with pytest.raises(AjpqError, match="must be reset"):
        env.step(env.action_space.sample())


def test_an_episode_ends_with_the_same_objects_when_it_is_played_again():
    env = CompressionEnv(problem())
    first, infos = played(env, 0.2)
    again, others = played(env, 0.2)
    assert first is again and infos == others and env.problem.evaluations == 1


def test_the_draft_can_be_rendered():
    env = CompressionEnv(problem(choices=Choices(act_bits=(4, 8))), "channel", render_mode="ansi")
    env.reset()
    assert CompressionEnv(problem()).render() is None
    start = env.render().splitlines()
    layers = env.problem.network.layers
    assert len(start) == len(layers) + 2 and start[0].split() == ["layer", "kernels", "bits", "input"]
    place = env.problem.network.index[env.draft.decision.layer.name] + 1
    assert start[place].startswith("->") and start[-2].split() == ["linear", "open", "open", "open"]
    policy, _ = played(env)
    end = env.render().splitlines()
    assert not any("open" in line or "->" in line for line in end)
    for line, layer in zip(end[1:-1], layers, strict=True):
        bits = policy.weight_bits[layer.name]
        left = bits[bits > 0]
        assert line.split()[:4] == [layer.name, str(len(left)), "of", str(layer.c_out)]
        assert (f"{left.min()}-{left.max()}, mean {left.mean():.2f}" in line) == (left.min() < left.max())
        assert line.split()[-1] == str(policy.act_bits[layer.name])
    slack = dict(zip(env.draft.budget.names, env.draft.slack, strict=True))
    assert end[-1] == f"left of each budget: size {slack['size']:.4f}, macs {slack['macs']:.4f}"


# -- partners ---------------------------------------------------------------------------------------------------------


def bits_of(policy: CompressionPolicy) -> np.ndarray:
    return np.concatenate([bits for name, bits in policy.weight_bits.items() if name not in ("conv1", "linear")])


def test_a_homogeneous_partner_says_the_same_everywhere():
    made = problem(budget={"size": 1.0})
    policy, _ = played(CompressionEnv(made, "layer", Homogeneous(width=3)), 0.0)
    assert set(bits_of(policy).tolist()) == {0, 3}
    policy, _ = played(CompressionEnv(made, "layer", Homogeneous(width=5)), -1.0)
    assert set(bits_of(policy).tolist()) == {4}  # 5 is none of the widths
    env = CompressionEnv(made, "channel", Homogeneous(sparsity=0.5))
    policy, _ = played(env)
    assert set(env.draft.sparsity.values()) == {0.5}
    tight = CompressionEnv(problem(budget={"macs": 0.3}), "channel", Homogeneous(sparsity=0.0))
    assert made.budget.names == ("size",) and played(tight)[1][-1]["score"].within


def test_where_a_partner_is_told_nothing_it_takes_the_middle():
    made = problem(budget={"size": 0.12, "macs": 0.8})
    target = middle(made.space, made.budget)
    assert made.budget.admits(made.space.homogeneous(target["width"], target["sparsity"]))
    assert 1 < target["width"] < 8 and target["act"] == 8
    assert not made.budget.admits(made.space.homogeneous(target["width"], target["sparsity"] - 0.8 / 32))
    env = CompressionEnv(made, "channel", Homogeneous())
    played(env)
    assert set(env.draft.sparsity.values()) == {target["sparsity"]}
    least = made.budget.ratios(made.space.cheapest())["size"]
    tight = problem(budget={"size": least}, choices=Choices(max_sparsity=0.8))
    assert played(CompressionEnv(tight, "channel", Homogeneous()))[1][-1]["score"].within


def test_a_partner_by_importance_gives_what_matters_more():
    def steep(network, batches, task):
        """Kernel k of a layer counts 2^-k."""
        return {layer.name: 2.0 ** -np.arange(layer.c_out) for layer in network.layers}

    made = problem(budget={"size": 1.0}, importance=steep, choices=Choices(blocks="max"))
    policy, _ = played(CompressionEnv(made, "layer", ByImportance(width=4)), -1.0)
    # 4 + 7.5 - k bits, to the next whole number, then to the next width below
    assert policy.weight_bits["layer1.0.conv1"].tolist() == [8, 8, 8, 8, 8, 6, 6, 4, 4, 2, 2, 1, 1, 1, 1, 1]

    def flat(network, batches, task):
        scores = {layer.name: np.ones(layer.c_out) for layer in network.layers}
        scores["layer2.0.conv1"] = np.repeat((0.01, 1.99), len(scores["layer2.0.conv1"]) // 2)
        return scores

    made = problem(budget={"size": 1.0}, importance=flat)
    network, low = made.network, made.network["layer2.0.conv1"].c_out // 2
    env = CompressionEnv(made, "channel", ByImportance(sparsity=low / int(network.prunable.sum())))
    played(env)
    pruned = env.draft.sparsity
    at = int(network.space_of[network["layer2.0.conv1"].writes[0]])
    assert pruned[at] == 0.5 and {value for space, value in pruned.items() if space != at} == {0.0}
    silent = problem(
        importance=lambda network, batches, task: {lay.name: np.zeros(lay.c_out) for lay in network.layers}
    )
    for controls in ("layer", "channel"):
        assert played(CompressionEnv(silent, controls, ByImportance()))[1][-1]["score"].within


@pytest.mark.parametrize("options", ({"width": 0}, {"act_bits": 0}, {"sparsity": 1.0}, {"sparsity": -0.1}))
def test_partners_that_make_no_sense(options):
    with pytest.raises(AjpqError, match="sparsity < 1|at least 1 bit"):
        Homogeneous(**options)


# -- every kernel by itself -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("digits_cnn", "resnet20"))
def test_every_kernel_is_a_decision(name):
    made = problem(name=name, choices=Choices(blocks="max"), budget={"size": 0.2, "macs": 0.7})
    env = CompressionEnv(made, "channel", Homogeneous())
    env.action_space.seed(0)
    observation, _ = env.reset()
    steps, done = 0, False
    while not done:
        decision = env.draft.decision
        assert env.observation_space.contains(observation) and len(decision.kernels) == 1
        assert observation[14] == pytest.approx(decision.block / decision.blocks)
        observation, _, done, _, info = env.step(env.action_space.sample())
        steps += 1
    inner = [layer for layer in made.network.layers if len(made.space.widths(layer)) > 1]
    assert steps == sum(int((info["policy"].weight_bits[layer.name] > 0).sum()) for layer in inner)
    assert info["score"].within and len(set(bits_of(info["policy"]).tolist())) > 4


def test_the_work_of_an_episode_grows_with_its_decisions_and_not_with_their_square(monkeypatch):
    """Counted, not timed: how often the cost of a layer is asked for, per decision."""

    def asked_per_decision(name: str) -> float:
        made = problem(name=name, choices=Choices(blocks="max"))
        env, asked, real = CompressionEnv(made, "channel"), [], made.budget.layer_costs
        monkeypatch.setattr(made.budget, "layer_costs", lambda *given: asked.append(1) or real(*given))
        infos = played(env)[1]
        return len(asked) / (len(infos) - 1)

    small, large = asked_per_decision("digits_cnn"), asked_per_decision("resnet20")
    kernels = [sum(layer.c_out for layer in network_of(name).layers) for name in ("digits_cnn", "resnet20")]
    assert kernels[1] > 2.5 * kernels[0] and large < 1.3 * small < 10
