"""The Gymnasium environment: an episode walks the network and ends in a policy within budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

from ajpq.errors import AjpqError
from ajpq.policy import CompressionPolicy
from ajpq.problem import Problem
from envs.views import ChannelView, LayerView, View, turn

Controller = Callable[[np.ndarray], np.ndarray]  # observation -> action


def constant(value: float = 0.0) -> Controller:
    """The controller that always answers with the same action; 0 is the middle of what the budgets leave."""
    return lambda observation: np.full(2, value, np.float32)


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


class CompressionEnv(gymnasium.Env):
    """Joint pruning and bit allocation after AJPQ (Tang et al., arXiv 2011.06231): pruning is quantization to 0 bit, a layer
    controller sets each layer's sparsity, a channel controller the bit-width of each kernel, both by the same importance.
    The paper's states, actions and reward are not public; what follows is our choice, close to AMC and HAQ where they say so.

    An episode walks the layers in execution order. This environment asks for the decisions of one controller (`controls`);
    those of the other are answered by `partner`.

    ### Action space, controls="layer": Box(-1, 1, (1,)), or (2,) where `choices.act_bits` has several
    | index | meaning |
    |---|---|
    | 0 | sparsity of the spaces that this layer is the first to write, a fraction of their channels: -1 the least from which every budget can be reached, +1 `choices.max_sparsity`, linear between |
    | 1 | bit-width of the layer's input: [-1, 1] in equal parts, one for each width that the budgets leave |

    ### Action space, controls="channel": Box(-1, 1, (1,))
    | index | meaning |
    |---|---|
    | 0 | bit-width of a block of kernels: [-1, 1] in equal parts, one for each width that the budgets leave (HAQ's rounding) |

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

    ### Reward
    0 at every step but the last; there the reward of `problem.score(policy)`, by default the accuracy (a fraction) on the search
    split. Discount 1 is meant: steps are free, the evaluation at the end is what costs. `info` of the last step holds
    "score" and "policy".

    ### Episode end
    Terminates when every layer is decided; never truncates. Every sequence of actions ends in a policy within budget.

    ### Arguments
    problem: an `ajpq.problem.Problem`. controls: "layer" or "channel". partner: observation -> action for the other controller.
    views: {"layer": View, "channel": View} to observe or decode otherwise.
    Raises AjpqError if the controller would have nothing to decide.
    """

    metadata = {"render_modes": []}

    def __init__(
        self,
        problem: Problem,
        controls: str = "layer",
        partner: Controller | None = None,
        views: dict[str, View] | None = None,
    ) -> None:
        if controls not in ("layer", "channel"):
            raise AjpqError(f"controls must be 'layer' or 'channel', but it is {controls!r}; choose one")
        self.problem, self.controls, self.partner = problem, controls, partner or constant()
        self.views = views or {"layer": LayerView(problem), "channel": ChannelView(problem)}
        self.observation_space = self.views[controls].observation_space
        self.action_space = self.views[controls].action_space
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

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._advance()
        return self.views[self.controls].observe(self.draft), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.views[self.controls].apply(self.draft, np.asarray(action))
        self._play()
        if turn(self.draft) is not None:
            return self.views[self.controls].observe(self.draft), 0.0, False, False, {}
        policy = self.draft.policy()
        score = self.problem.score(policy)
        return (
            np.zeros(self.observation_space.shape, np.float32),
            float(score.reward),
            True,
            False,
            {"score": score, "policy": policy},
        )

    def _advance(self) -> None:
        self.draft = self.problem.draft()
        self._play()

    def _play(self) -> None:
        """Let the partner answer until it is our turn or the policy is complete."""
        while (who := turn(self.draft)) not in (None, self.controls):
            self.views[who].apply(self.draft, self.partner(self.views[who].observe(self.draft)))
