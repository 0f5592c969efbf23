"""The checks for third parties: all that is ours passes, and every single fault is found and named."""

import time
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from nets import network_of, problem_of

from agents.random_search import RandomSearch
from agents.single import Single
from ajpq.cost import BOPs, MACs, Size, UniqBOPs
from ajpq.draft import Draft
from ajpq.explain import CONF
from ajpq.policy import CompressionPolicy
from ajpq.problem import Evaluation, Problem, SearchResult
from ajpq.testing import check_backend, check_cost_model, check_env, small_problem
from envs.compression import CompressionEnv
from envs.partners import ByImportance, Homogeneous, constant
from envs.views import ChannelView

BOTH = pytest.mark.parametrize("controls", ("layer", "channel"))


def test_the_small_problem_is_quick_the_same_every_time_and_worth_a_search():
    small_problem()
    start, state = time.process_time(), torch.get_rng_state()
    first, again, other = small_problem(), small_problem(), small_problem({"macs": 0.5}, seed=1)
    assert time.process_time() - start < 1.5 and torch.equal(state, torch.get_rng_state())
    policies = [RandomSearch(12, 0).search(problem) for problem in (first, again)]
    assert [e.score for e in policies[0].history] == [e.score for e in policies[1].history]
    assert len({e.score.accuracy for e in policies[0].history}) > 4
    assert other.budget.names == ("macs",) and not torch.equal(
        first.network.module.stem.weight, other.network.module.stem.weight
    )
    labels = next(iter(first.evaluator.setting.search_data))[1]
    assert len(labels.unique()) == 4
    for problem in (first, again, other):
        problem.close()


# -- environments -----------------------------------------------------------------------------------------------------


@BOTH
def test_our_environments_pass(controls):
    partners = (None, constant(0.3), Homogeneous(), ByImportance())
    for partner in partners:
        check_env(partial(CompressionEnv, controls=controls, partner=partner))


@BOTH
def test_an_environment_of_the_registry_and_one_of_another_network_pass(controls):
    problem = small_problem()
    name = f"envs:ajpq/{controls.capitalize()}-v0"
    check_env(gymnasium.make(name, problem=problem))
    check_env(gymnasium.make(name, problem=problem).unwrapped)
    check_env(CompressionEnv(problem_of("resnet20", {"size": 0.2}), controls))


class Priced(gymnasium.Wrapper):
    def step(self, action):
        observation, reward, done, truncated, info = self.env.step(action)
        return observation, reward - 0.01, done, truncated, info


class Noisy(CompressionEnv):
    """Random, but by the generator that `reset` seeds."""

    def step(self, action):
        return super().step(np.clip(action + 0.1 * self.np_random.normal(size=action.shape), -1, 1))


def test_environments_of_users_pass():
    check_env(lambda problem: Priced(CompressionEnv(problem)), own_reward=True)
    check_env(Noisy)


class Faulty(CompressionEnv):
    """Does one thing wrong."""

    fault = ""
    count = 0
    kept = False

    def __init__(self, problem, **options):
        super().__init__(problem, **options)
        if self.fault == "discrete":
            self.action_space = gymnasium.spaces.Discrete(3)
        if self.fault == "no problem":
            self.hidden = self.problem

    def reset(self, *, seed=None, options=None):
        if self.fault == "no problem":
            self.problem = self.hidden
        observation, info = super().reset(seed=None if self.fault == "no seed" else seed, options=options)
        if self.fault == "no problem":
            del self.problem
        Faulty.count += 1
        if self.fault == "dirty reset" and self.kept:
            observation[0] = 1.0
        return np.append(observation, 0) if self.fault == "observation" else observation, info

    def step(self, action):
        self.kept |= bool(np.min(action) == 1)
        if self.fault == "deaf":
            action = 0 * action
        if self.fault == "endless" and self.count > 3 and self.draft.decision.layer.name != "stem":
            self.draft = self.problem.draft()
            self._play()
        if self.fault == "modifies":
            self.problem.network.module.linear.weight.data *= 1.001
        observation, reward, done, truncated, info = super().step(action)
        if self.fault == "outside" and done:
            policy = CompressionPolicy.homogeneous(self.problem.network, 8, 8)
            self.problem.score(policy)
        if self.fault == "unscored":
            self.problem.history.clear()
        if self.fault == "early reward" and not done:
            reward = 0.5
        if self.fault == "other reward" and done:
            reward = reward + 1.0
        if self.fault == "nan" and done:
            reward = float("nan")
        if self.fault == "no score":
            info.pop("score", None)
        if self.fault == "range":
            observation = observation + 2
        if self.fault == "random" and not done:
            observation = np.clip(observation + np.random.uniform(0, 0.01, observation.shape), 0, 1).astype(np.float32)
        return observation, reward, done, truncated, info


ENVIRONMENTS = {
    "observation": "check_env of gymnasium",
    "range": "check_env of gymnasium|observation space",
    "no seed": "check_env of gymnasium",
    "random": "check_env of gymnasium.*non-determ|check_env of gymnasium.*not equivalent|same seed and actions",
    "dirty reset": "same seed and actions",
    "deaf": "actions must make a difference",
    "endless": "an episode must end",
    "outside": "must be within budget",
    "unscored": "record is empty",
    "early reward": "reward must be 0 before the end",
    "other reward": "last reward must be that of the score",
    "nan": "finite|nan in rewards",
    "no score": 'must have the "score"',
    "modifies": "must not modify the problem's network",
    "no problem": "env.unwrapped.problem",
    "discrete": "check_env|space",
}


@pytest.mark.parametrize("fault", ENVIRONMENTS)
def test_every_fault_of_an_environment_is_found(fault):
    Faulty.count = 0
    kind = type("Faulty", (Faulty,), {"fault": fault})
    if fault == "no problem":
        env = kind(small_problem())
        env.reset()
        with pytest.raises(AssertionError, match=ENVIRONMENTS[fault]):
            check_env(env)
        return
    with pytest.raises(AssertionError, match=ENVIRONMENTS[fault]):
        check_env(kind)


def test_what_is_no_environment():
    with pytest.raises(AssertionError, match="gymnasium.Env or make one"):
        check_env(3)
    with pytest.raises(AssertionError, match="must make a gymnasium.Env"):
        check_env(lambda problem: problem)
    with pytest.raises(AssertionError, match="own_reward=True"):
        check_env(lambda problem: Priced(CompressionEnv(problem)))


# -- backends ---------------------------------------------------------------------------------------------------------

SEARCHES = sorted(path.stem for path in (CONF / "search").glob("*.yaml") if path.stem != "policy")


@pytest.mark.parametrize("name", SEARCHES)
def test_every_backend_of_the_configuration_passes(name):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        section = compose("config", [f"search={name}"]).search
    quick = {"warmup": 4} if "warmup" in section else {}
    takes = [key for key in ("evaluations", "seed") if key in section]

    def make(**options):
        given = {key: value for key, value in options.items() if key in takes}
        return instantiate(section, **given, **quick, _convert_="all")

    check_backend(make)


def test_backends_as_a_class_as_a_callable_and_as_an_object_pass():
    check_backend(RandomSearch)
    check_backend(partial(Single, warmup=3, algorithm="PPO"), evaluations=5)
    check_backend(RandomSearch(5, 3), problem_of())


class Search:
    """Scores random policies, and does one thing wrong."""

    fault = ""

    def __init__(self, evaluations, seed):
        self.evaluations, self.rng = evaluations, np.random.default_rng(seed)

    def search(self, problem):
        if self.fault == "unseeded":
            self.rng = np.random.default_rng(np.random.randint(1000))
        if self.fault == "modifies":
            problem.network.module.linear.weight.data += 1
        if self.fault == "gradient":
            problem.network.module.linear.weight.grad = torch.zeros(4, 16)
        if self.fault == "mode":
            problem.network.module.train()
        if self.fault == "nothing":
            return SearchResult(problem.space.cheapest(), None, 0, ())
        asked = 0
        while problem.evaluations < self.evaluations + (self.fault == "too many"):
            problem.score(self.draw(problem))
            asked += 1
            if self.fault != "endless" and asked > 10 * self.evaluations:
                break
        result = problem.result()
        if self.fault == "outside":
            problem.score(CompressionPolicy.homogeneous(problem.network, 8, 8))
            result = problem.result()
        if self.fault == "worse":
            worst = min(problem.history, key=lambda evaluation: evaluation.score.reward)
            result = SearchResult(worst.policy, worst.score, result.evaluations, result.history)
        if self.fault == "unscored":
            result = SearchResult(self.draw(problem), result.score, result.evaluations, result.history)
        if self.fault == "short":
            result = SearchResult(result.policy, result.score, result.evaluations, result.history[1:])
        if self.fault == "edits":
            name = "down"
            problem.history[-1].policy.weight_bits[name][:] = np.maximum(
                problem.history[-1].policy.weight_bits[name], 1
            )
            problem.history[-1].policy.weight_bits[name][0] = 0
            result = problem.result()
        if self.fault == "invents":
            first = problem.history[0]
            score = type(first.score)(**{**vars(first.score), "reward": 9.0})
            problem.history[0] = Evaluation(1, first.policy, score, 0.0)
            result = problem.result()
        return problem.best.policy if self.fault == "policy" else result

    def draw(self, problem):
        draft: Draft = problem.draft()
        while (decision := draft.decision) is not None:
            options = decision.options
            draft.take(self.rng.uniform(*options) if decision.kind == "sparsity" else int(self.rng.choice(options)))
        return draft.policy()


BACKENDS = {
    "unseeded": "same seed must give the same history.*number 1 on",
    "modifies": "must not modify the problem's network.*linear.weight",
    "gradient": "must not modify the problem's network.*linear.weight",
    "mode": "must not modify the problem's network.*mode",
    "nothing": "must score at least one policy",
    "too many": "at most as many policies.*evaluations=8 it scored 9",
    "endless": "must end where there is nothing new.*1 were new",
    "outside": "within budget, but number|at most as many",
    "worse": "must be the best policy that was scored",
    "unscored": "must be one that was scored",
    "short": "must hold the problem's own record",
    "edits": "must not be changed after it was scored",
    "invents": "must say what the problem measures.*reward 9",
    "policy": "must return a SearchResult, but it returned CompressionPolicy",
}


def test_the_search_without_a_fault_passes():
    check_backend(Search)


@pytest.mark.parametrize("fault", BACKENDS)
def test_every_fault_of_a_backend_is_found(fault):
    kind = type("Faulty", (Search,), {"fault": fault})
    if fault == "outside":  # within its number of evaluations
        kind.__init__ = lambda self, evaluations, seed: Search.__init__(self, evaluations - 1, seed)
    with pytest.raises((AssertionError, ValueError), match=BACKENDS[fault]):
        check_backend(kind)


def test_faults_of_other_kinds():
    with pytest.raises(AssertionError, match="must have a method search"):
        check_backend(lambda seed: 3)

    class Ignores(Search):
        def __init__(self, seed):
            super().__init__(8, seed)

    check_backend(Ignores)

    class Fixed(Search):
        def __init__(self, evaluations, seed):
            super().__init__(8, seed)

    with pytest.raises(AssertionError, match="evaluations=2 it scored 3"):
        check_backend(Fixed)


def test_a_users_problem_and_the_global_generators_are_left_alone():
    problem, torches = small_problem(), torch.get_rng_state()
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    check_backend(partial(Single, warmup=3), problem, evaluations=4)
    assert np.random.random() == expected and torch.equal(torch.get_rng_state(), torches)
    assert isinstance(problem, Problem) and problem.evaluations == 0


# -- cost models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", (Size, MACs, BOPs, UniqBOPs))
def test_our_cost_models_pass(model):
    check_cost_model(model)
    check_cost_model(model(), network_of("digits_cnn"), policies=1)


class Cost:
    """Bits of weights, with one fault."""

    unit = "bit"
    fault = ""

    def __init__(self):
        self.calls = 0

    def __call__(self, loads):
        self.calls += 1
        found = torch.stack([self.of(load) for load in loads])
        return {
            "list": lambda: found.tolist(),
            "total": lambda: found.sum(),
            "column": lambda: found[:, None],
            "integers": lambda: found.long(),
            "relative": lambda: found / found.sum(),
            "neighbours": lambda: found + found.roll(1),
            "first": lambda: found * (torch.arange(len(loads)) > 0) + 1,
            "remembers": lambda: found + self.calls,
            "noisy": lambda: found + torch.rand(len(loads)),
        }.get(self.fault, lambda: found)()

    def of(self, load):
        bits, kept = load.weight_bits, load.kept
        weights = load.weights_per_kernel
        match self.fault:
            case "numpy":
                return torch.tensor(float(bits.numpy().sum()), dtype=torch.float64)
            case "negative":
                return (kept * bits).sum() - 20
            case "infinite":
                return (weights / (bits - 3)).sum().abs()
            case "zero":
                return 0 * bits.sum()
            case "narrow is dear":
                return (kept * weights * (33 - bits)).sum()
            case "five is cheap":
                return (kept * weights * torch.where(bits == 5, 1.0, bits)).sum()
            case "acts":
                return (kept * bits).sum() * (40 - load.act_bits)
            case "pruned is dear":
                return ((1 - kept) * 9).sum() + bits.sum()
            case "inputs":
                return bits.sum() * (100 - load.inputs)
            case "side":
                return bits.sum() + 1000 - load.side
            case "gradient":
                return (kept * weights * bits).sum() + (load.act_bits - load.act_bits).sqrt()
            case "changes":
                load.weight_bits.mul_(1.01)
        return (kept * weights * bits).sum()


COSTS = {
    "list": "must be a tensor, but it is a list",
    "total": r"one number per layer, \(6,\), but its shape is \(\)",
    "column": r"its shape is \(6, 1\)",
    "integers": "floating point.*int64",
    "relative": "must follow from loads.i. alone",
    "neighbours": "must follow from loads.i. alone",
    "first": "must follow from loads.i. alone",
    "remembers": "must follow from loads.i. alone|same answer",
    "noisy": "must follow from loads.i. alone|same answer",
    "numpy": "must be computed in tensors",
    "negative": "not negative, but '.*' .* has -",
    "infinite": "must be finite",
    "zero": "must cost something",
    "narrow is dear": "must not fall when kernels get wider",
    "five is cheap": "must not fall when kernels get wider",
    "acts": "must not fall when the layer's input gets wider",
    "pruned is dear": "must not fall when kernels come back",
    "inputs": "must not fall when the layer reads more channels",
    "side": "must not fall when more is stored",
    "gradient": "gradient of a cost must be finite.*act_bits",
    "changes": "follow from loads.i. alone|same answer|change the loads|must not fall|leaf",
}


def test_the_cost_model_without_a_fault_passes():
    check_cost_model(Cost)


@pytest.mark.parametrize("fault", COSTS)
def test_every_fault_of_a_cost_model_is_found(fault):
    with pytest.raises(AssertionError, match=COSTS[fault]):
        check_cost_model(type("Faulty", (Cost,), {"fault": fault}))


@pytest.mark.parametrize("unit", (None, "", 3))
def test_a_cost_model_without_a_unit(unit):
    with pytest.raises(AssertionError, match="`unit` as a word"):
        check_cost_model(type("Faulty", (Cost,), {"unit": unit}))


def test_a_table_of_costs_passes():
    """A model that looks its costs up has no gradient, and need not."""

    class Table:
        unit = "ms"

        def __call__(self, loads):
            rows = [float(load.kept.detach().sum()) * int(load.act_bits.detach()) for load in loads]
            return torch.tensor(rows, dtype=torch.float64)

    check_cost_model(Table)


class _Blind(ChannelView):
    def observe(self, draft):
        return super().observe(draft) * 0


def test_a_view_of_the_users_own_passes():
    check_env(partial(CompressionEnv, controls="channel", views=lambda problem: {"channel": _Blind(problem)}))
