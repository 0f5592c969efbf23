"""The Gymnasium environment: an episode walks the network and ends in a policy within budget."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec

from ajpq.errors import AjpqError
from ajpq.policy import CompressionPolicy
from ajpq.problem import Problem
from envs.partners import Controller, Rule, constant
from envs.rendering import table
from envs.views import View, Views, turn, views_of


def rollout(
    problem: Problem, views: dict[str, View], controllers: dict[str, Controller]
) -> tuple[CompressionPolicy, dict[str, list]]:
    """One episode of both controllers: the policy to be scored, and for each the (observation, action) pairs of its
    turns."""
    draft = problem.draft()
    taken: dict[str, list] = {"layer": [], "channel": []}
    while (who := turn(draft)) is not None:
        observation = views[who].observe(draft)
        action = controllers[who](observation)
        views[who].apply(draft, action)
        taken[who].append((observation, action))
    return draft.policy(), taken


class _Shared(dict):
    """Arguments that a deep copy shares: a problem holds a network, images and a record."""

    def __deepcopy__(self, memo: dict) -> _Shared:
        return _Shared(self)


class CompressionEnv(gymnasium.Env):
    """Joint pruning and bit allocation after AJPQ (Tang et al., arXiv 2011.06231): pruning is quantization to 0 bit, a layer
    controller sets each layer's sparsity, a channel controller the bit-width of each kernel, both by the same importance.
    The paper's states, actions and reward are not public; what follows is our choice, close to AMC and HAQ where they say so.

    An episode walks the layers in execution order. This environment asks for the decisions of one controller (`controls`);
    those of the other are answered by `partner`.

    ### Action space, controls="layer": Box(-1, 1, (1,)), or (2,) where `choices.act_bits` has several
    | index | meaning | unit | source |
    |---|---|---|---|
    | 0 | sparsity of the spaces that this layer is the first to write: -1 the least from which every budget can be reached, +1 `choices.max_sparsity`, linear between | fraction of their channels | AMC (interval: ours) |
    | 1 | bit-width of the layer's input: [-1, 1] in equal parts, one for each width that the budgets leave | bit | HAQ (interval: ours) |

    ### Action space, controls="channel": Box(-1, 1, (1,))
    | index | meaning | unit | source |
    |---|---|---|---|
    | 0 | bit-width of a block of kernels: [-1, 1] in equal parts, one for each width that the budgets leave | bit | HAQ's rounding (interval: ours) |

    ### Observation space, controls="layer": Box(0, 1, (16,)); controls="channel": Box(0, 1, (21,))
    | index | quantity | unit | source |
    |---|---|---|---|
    | 0 | index of the layer | fraction of the depth | AMC, HAQ |
    | 1, 2 | depthwise?, linear? | flag | HAQ, AMC |
    | 3, 4 | log input channels, log kernels | min-max over layers | AMC, HAQ (log: ours) |
    | 5, 6 | kernel area, stride | min-max | AMC, HAQ |
    | 7 | log output pixels | min-max | AMC |
    | 8, 9 | log weights, log MACs | min-max | HAQ, AMC (log: ours) |
    | 10 | least slack: part of the tightest budget not yet spoken for | fraction of the budget | ours (AMC: reduced, rest) |
    | 11, 12 | weights, MACs of the layers behind this one | fraction of the network | AMC (rest) |
    | layer 13, 14 | smallest and largest sparsity on offer; both 0 if there is none | fraction | ours |
    | layer 15 | mean width of the previous layer | bits / 8, at most 1 | HAQ (last action) |
    | channel 13 | sparsity of this layer, the layer controller's goal | fraction | AutoQ (goal) |
    | channel 14, 15 | index and size of the block | fraction of blocks, of kernels | ours |
    | channel 16 | mean importance of the block | fraction of the layer's highest | AJPQ |
    | channel 17 | largest width on offer | bits / 8, at most 1 | ours |
    | channel 18 | width of the layer's input | bits / 8, at most 1 | ours |
    | channel 19 | width of the previous block | bits / 8 | HAQ (last action) |
    | channel 20 | mean width of the previous layer | bits / 8, at most 1 | HAQ |

    The observation of the last step repeats the one before: nothing is left to decide.

    ### Reward
    | step | value | unit | source |
    |---|---|---|---|
    | all but the last | 0 | | AMC, HAQ |
    | the last | the reward of `problem.score(policy)`, see `problem.reward`; by default the accuracy on the search split, without training | fraction; nats, at most 0, for minus a cross-entropy or a divergence | AMC (accuracy), ours |

    Budgets are not part of it: they always hold. It is not scaled; whoever trains an agent standardises it.

    ### Episode
    Terminates when every decision is taken, never truncates. Every sequence of actions ends in a policy within budget. With
    controls="layer" it has a step for every layer that is the first to write a prunable space or whose input has a choice of
    widths, with controls="channel" one for every block of every layer that has a choice of widths (fewer where pruning
    leaves fewer kernels than blocks; choices.blocks="max" asks for every surviving kernel). Nothing is drawn at random, the
    seed of `reset` only seeds `np_random` for subclasses.

    ### Info
    "layer": the name of the layer that the observation is about; "slack": cost -> part of its budget that is not spoken for,
    a fraction. The last step has "score", an `ajpq.problem.Score`, and "policy", an `ajpq.policy.CompressionPolicy`, instead.

    ### Hyper-parameters
    Those of the agents are in `agents/hierarchical.py` and `agents/single.py`.
    | name | default | meaning | unit | source |
    |---|---|---|---|---|
    | discount | 1 | steps are free, the evaluation at the end is what costs | | AMC, HAQ |
    | choices.weight_bits | 0, 1, 2, 3, 4, 6, 8 | widths of a kernel | bit | ours (HAQ: 2 to 8; 0: AJPQ) |
    | choices.act_bits | 8 | widths of a layer's input | bit | ours |
    | choices.blocks | 4 | blocks of kernels that share a width in a layer, by importance | blocks | ours (AJPQ: one per kernel) |
    | choices.max_sparsity | 0.8 | largest sparsity of a space | fraction | AMC |
    | choices.round_to | 1 | a pruned space keeps a multiple of so many channels: a sparsity is rounded down to one | channels | AMC (8) |
    | choices.first_last | 8 | width of weights and input of the first and the last layer | bit | HAQ |
    | problem.importance | elimination | orders channels and kernels | see the criterion | ours (AMC: magnitude) |
    | problem.norm_images | 400 | re-estimate batch-norms before a score | images | ours |
    | problem.reward | accuracy_reward | what is maximised | fraction | AMC, HAQ |

    ### Arguments
    problem: an `ajpq.problem.Problem`. controls: "layer" or "channel".
    partner: answers for the other half, a controller (observation -> action: `envs.partners.constant()`, the default, which
        takes the middle of what is on offer, or a trained agent's) or a rule (`envs.partners.Homogeneous()`, `ByImportance()`).
    views: {"layer": View, "channel": View}, either or both, to observe or decode otherwise, or a callable that makes them of
        the problem.
    render_mode: "ansi", for a `render` that gives the draft so far as a table in text.
    Raises AjpqError if the controller would have nothing to decide.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 1}
    _spec: EnvSpec | None = None

    def __init__(
        self,
        problem: Problem,
        controls: str = "layer",
        partner: Controller | Rule | None = None,
        views: Views | None = None,
        render_mode: str | None = None,
    ) -> None:
        if controls not in ("layer", "channel"):
            raise AjpqError(f"controls must be 'layer' or 'channel', but it is {controls!r}; choose one")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise AjpqError(f"render_mode must be 'ansi' or None, but it is {render_mode!r}; choose one")
        self.problem, self.controls, self.render_mode = problem, controls, render_mode
        self.partner = constant() if partner is None else partner
        self.views = views_of(problem, views)
        self.observation_space = self.views[controls].observation_space
        self.action_space = self.views[controls].action_space
        self._policies: dict[str, CompressionPolicy] = {}  # by digest: the same episode ends with the same object
        self._advance()
        if turn(self.draft) is None:
            what = (
                "prunable space and no choice of act_bits" if controls == "layer" else "layer with a choice of widths"
            )
            raise AjpqError(
                f"an environment must have something to decide, but for controls={controls!r} this network has "
                f"no {what}; "
                "widen the choices or control the other half"
            )
        self._last = self.views[controls].observe(self.draft)  # the observation given last

    @property
    def spec(self) -> EnvSpec | None:
        """What `gymnasium.make` made this environment from. Gymnasium copies it at every look, but not its problem."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        self._spec = spec if spec is None else replace(spec, kwargs=_Shared(spec.kwargs))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._advance()
        return self._observe()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Raises AjpqError for an action that is not finite and after the end of an episode."""
        action = np.asarray(action)
        if turn(self.draft) is None:
            raise AjpqError("an episode that has ended must be reset, but step was called; call env.reset() first")
        if not np.isfinite(action).all():
            raise AjpqError(f"an action must be finite, but it is {action.tolist()}; has the training diverged?")
        self.views[self.controls].apply(self.draft, action)
        self._play()
        if turn(self.draft) is not None:
            observation, info = self._observe()
            return observation, 0.0, False, False, info
        policy = self.draft.policy()
        policy = self._policies.setdefault(policy.digest(), policy)
        score = self.problem.score(policy)
        return copy.deepcopy(self._last), float(score.reward), True, False, {"score": score, "policy": policy}

    def render(self) -> str | None:
        """The draft so far as a table; None without render_mode="ansi"."""
        return table(self.draft) if self.render_mode == "ansi" else None

    def _observe(self) -> tuple[np.ndarray, dict]:
        self._last = self.views[self.controls].observe(self.draft)
        slack = dict(zip(self.draft.budget.names, self.draft.slack.tolist(), strict=True))
        return copy.deepcopy(self._last), {"layer": self.draft.decision.layer.name, "slack": slack}

    def _advance(self) -> None:
        self.draft = self.problem.draft()
        self._play()

    def _play(self) -> None:
        """Let the partner answer until it is our turn or the policy is complete."""
        while (who := turn(self.draft)) not in (None, self.controls):
            if hasattr(self.partner, "answer"):
                self.draft.take(self.partner.answer(self.draft))
            else:
                self.views[who].apply(self.draft, self.partner(self.views[who].observe(self.draft)))
