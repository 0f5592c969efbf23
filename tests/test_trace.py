"""Tracing: which channels are one and the same, what can be pruned, and why not."""

import copy

import numpy as np
import pytest
import torch
import torch_pruning
import torchvision
from nets import (
    TORCHVISION,
    Net,
    conv,
    difference,
    images_of,
    masked,
    model_of,
    network_of,
    random_policy,
    randomise,
    traced,
)
from torch import nn
from torch.nn import functional as F

from ajpq.calibration import calibrate
from ajpq.compression import compress, freeze
from ajpq.errors import AjpqError
from ajpq.network import Network
from ajpq.tracing import trace


def gap(x):
    return x.mean((2, 3))


def head(c: int = 6) -> nn.Linear:
    return nn.Linear(c, 5)


def same(network: Network, a: str, b: str) -> bool:
    """Whether kernel k of layer a writes the channel that kernel k of layer b writes, for all k."""
    return np.array_equal(network[a].writes, network[b].writes)


def reads_of(network: Network, layer: str) -> list:
    """The inputs of a layer as (writer, kernel); None for a channel that no layer writes."""
    wrote = {int(c): (spec.name, k) for spec in reversed(network.layers) for k, c in enumerate(spec.writes)}
    return [wrote.get(int(c)) for c in network[layer].reads]


def shrinks_faithfully(network: Network, seeds: int = 3) -> None:
    x = torch.randn(2, *network.example.shape[1:], generator=torch.Generator().manual_seed(5))
    for seed in range(seeds):
        policy = random_policy(network, seed, widths=(32,))
        assert difference(masked(network, policy), compress(network, policy), x) <= 1e-5


# -- what belongs together --------------------------------------------------------------------------------------------


def test_a_plain_chain_has_one_space_per_layer():
    network = traced(
        lambda m, x: m.l(gap(m.b(F.relu(m.n(m.a(x)))))), a=conv(3, 6), n=nn.BatchNorm2d(6), b=conv(6, 4), l=head(4)
    )
    assert [layer.name for layer in network.layers] == ["a", "b", "l"]
    assert [s.writers for s in network.spaces] == [(), ("a",), ("b",), ("l",)]
    assert [s.prunable for s in network.spaces] == [False, True, True, False]
    assert network.spaces[1].norms == ("n",) and network.norms[0].folds_into == "a" and network["a"].bias
    assert reads_of(network, "b") == [("a", k) for k in range(6)]
    a = network["a"]
    assert (a.kind, a.c_in, a.c_out, a.kernel, a.out_hw, a.weights, a.macs) == (
        "conv",
        3,
        6,
        (3, 3),
        (8, 8),
        162,
        162 * 64,
    )
    assert (network["l"].kind, network["l"].out_hw, network["l"].macs) == ("linear", (1, 1), 20)


def test_a_residual_add_merges_the_channels():
    network = traced(
        lambda m, x: (lambda y: m.l(gap(m.b(F.relu(y)) + y)))(m.a(x)), a=conv(3, 6), b=conv(6, 6), l=head()
    )
    assert same(network, "a", "b")
    assert network.spaces[network.space_of[network["a"].writes[0]]].writers == ("a", "b")
    shrinks_faithfully(network)


def test_a_concat_lists_the_channels():
    network = traced(lambda m, x: m.l(gap(torch.cat([m.b(x), m.a(x)], 1))), a=conv(3, 2), b=conv(3, 3), l=head(5))
    assert reads_of(network, "l") == [("b", 0), ("b", 1), ("b", 2), ("a", 0), ("a", 1)]
    shrinks_faithfully(network)


@pytest.mark.parametrize("multiplier", (1, 2))
def test_a_depthwise_kernel_writes_the_channel_it_reads(multiplier):
    network = traced(
        lambda m, x: m.l(gap(m.d(m.a(x)))), a=conv(3, 6), d=conv(6, 6 * multiplier, groups=6), l=head(6 * multiplier)
    )
    assert network["d"].kind == "depthwise"
    assert network["d"].writes.tolist() == np.repeat(network["a"].writes, multiplier).tolist()
    assert network["d"].weights_per_kernel == 9
    shrinks_faithfully(network)


def test_a_grouped_conv_couples_its_groups():
    network = traced(lambda m, x: m.l(gap(m.g(m.a(x)))), a=conv(3, 6), g=conv(6, 9, groups=3), l=head(9))
    for ids, each in ((network["g"].reads, 2), (network["g"].writes, 3)):
        groups = ids.reshape(3, each)
        assert (groups == groups[0]).all() and len(set(groups[0])) == each
    shrinks_faithfully(network)


def test_flatten_repeats_each_channel():
    network = traced(lambda m, x: m.l(torch.flatten(F.max_pool2d(m.a(x), 4), 1)), a=conv(3, 6), l=head(24))
    assert reads_of(network, "l") == [("a", k) for k in range(6) for _ in range(4)]
    shrinks_faithfully(network)


@pytest.mark.parametrize(
    "run",
    (
        lambda m, x: m.l(F.max_pool2d(m.a(x), 4).view(x.size(0), -1)),
        lambda m, x: m.l(F.max_pool2d(m.a(x), 4).view(x.shape[0], 24)),
        lambda m, x: m.l(F.max_pool2d(m.a(x), 4).view(-1, 24)),
        lambda m, x: m.l(F.max_pool2d(m.a(x), 4).reshape((-1, 24))),
        lambda m, x: m.l(m.flat(F.max_pool2d(m.a(x), 4))),
        lambda m, x: m.l(F.max_pool2d(m.a(x), 8).squeeze(-1).squeeze(-1).repeat_interleave(4, 1)),
        lambda m, x: m.l(F.max_pool2d(m.a(x), 4).permute(0, 1, 3, 2).flatten(1)),
    ),
    ids=("view_-1", "view_literal", "view_-1_literal", "reshape_tuple", "module", "repeat_interleave", "transposed"),
)
def test_every_way_to_flatten(run):
    network = traced(run, a=conv(3, 6), l=head(24), flat=nn.Flatten())
    assert reads_of(network, "l") == [("a", k) for k in range(6) for _ in range(4)]
    assert network.why_not(network["a"]) == ""
    shrinks_faithfully(network)


def test_the_option_a_shortcut_of_resnet20():
    network = network_of("resnet20")
    wide, narrow = network["layer2.0.conv2"].writes, network["layer1.0.conv2"].writes
    assert wide[8:24].tolist() == narrow.tolist() == network["conv1"].writes.tolist()
    assert network["layer3.0.conv2"].writes[16:48].tolist() == wide.tolist()
    outer = np.concatenate([wide[:8], wide[24:]])
    writers = {network.spaces[s].writers for s in network.space_of[outer]}
    assert not set(outer) & set(narrow) and all("layer2.0.conv2" in w and "layer1.0.conv2" not in w for w in writers)
    assert network.prunable[wide].all()


def test_squeeze_and_excitation_ties_the_gate_to_its_channels_and_freezes_nothing():
    network = traced(
        lambda m, x: (lambda y: m.l(gap(y * torch.sigmoid(m.up(F.relu(m.down(F.adaptive_avg_pool2d(y, 1))))))))(m.a(x)),
        a=conv(3, 6),
        down=conv(6, 2, 1),
        up=conv(2, 6, 1),
        l=head(),
    )
    assert same(network, "a", "up")
    assert [network.why_not(layer) for layer in network.layers] == ["", "", "", "network output"]
    shrinks_faithfully(network)


def test_squeeze_and_excitation_as_it_is_often_written():
    class Excite(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.down, self.up, self.l = conv(3, 6), nn.Linear(6, 2), nn.Linear(2, 6), head()

        def forward(self, x):
            x = self.a(x)
            b, c, _, _ = x.size()
            gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1).view(b, c))))).view(b, c, 1, 1)
            return self.l(gap(x * gate))

    network = trace(randomise(Excite()), torch.randn(2, 3, 8, 8))
    assert same(network, "a", "up") and network.why_not(network["a"]) == ""
    shrinks_faithfully(network)


@pytest.mark.parametrize(
    "run",
    (
        lambda m, x: m.l(gap(torch.cat([m.a(x).chunk(2, 1)[1], m.b(x)], 1))),
        lambda m, x: m.l(gap(torch.cat([torch.split(m.a(x), [3, 3], 1)[1], m.b(x)], 1))),
        lambda m, x: m.l(gap(torch.cat([m.a(x).split(3, dim=1)[-1], m.b(x)], 1))),
        lambda m, x: m.l(gap(torch.cat([m.a(x)[:, 3:], m.b(x)], 1))),
        lambda m, x: m.l(gap(torch.cat([m.a(x).narrow(1, 3, 3), m.b(x)], 1))),
    ),
    ids=("chunk", "split_sizes", "split", "slice", "narrow"),
)
def test_every_way_to_split(run):
    network = traced(run, a=conv(3, 6), b=conv(3, 2), l=head(5))
    assert reads_of(network, "l") == [("a", 3), ("a", 4), ("a", 5), ("b", 0), ("b", 1)]
    assert network.prunable[network["a"].writes].all()
    shrinks_faithfully(network)


@pytest.mark.parametrize(
    "run",
    (
        lambda m, x: m.l(gap(F.relu(m.a(x).view(x.size(0), 2, 3, 8, 8).transpose(1, 2).reshape(x.size(0), -1, 8, 8)))),
        lambda m, x: m.l(gap(F.channel_shuffle(m.a(x), 2))),
        lambda m, x: m.l(gap(m.shuffle(m.a(x)))),
        lambda m, x: m.l(gap(m.a(x)[:, [0, 3, 1, 4, 2, 5]])),
    ),
    ids=("views", "function", "module", "indices"),
)
def test_a_channel_shuffle_is_followed(run):
    network = traced(run, a=conv(3, 6), l=head(), shuffle=nn.ChannelShuffle(2))
    assert [k for _, k in reads_of(network, "l")] == [0, 3, 1, 4, 2, 5]
    assert network.prunable[network["a"].writes].all()
    shrinks_faithfully(network)


@pytest.mark.parametrize(
    "permute, expected", (((0, 3, 5, 1, 2, 4), [0, 1, 2] * 4), ((0, 1, 3, 5, 2, 4), [0] * 4 + [1] * 4 + [2] * 4))
)
def test_space_to_depth_with_literal_sizes(permute, expected):
    network = traced(
        lambda m, x: m.l(gap(m.b(m.a(x).view(-1, 3, 4, 2, 4, 2).permute(*permute).contiguous().view(-1, 12, 4, 4)))),
        a=conv(3, 3),
        b=conv(12, 6),
        l=head(),
    )
    assert [k for _, k in reads_of(network, "b")] == expected
    assert network.prunable[network["a"].writes].all()
    shrinks_faithfully(network)


def test_a_module_called_twice_is_one_layer():
    network = traced(
        lambda m, x: m.l(gap(m.b(F.max_pool2d(F.relu(m.b(m.a(x))), 2)))), a=conv(3, 6), b=conv(6, 6), l=head()
    )
    b = network["b"]
    assert [layer.name for layer in network.layers] == ["a", "b", "l"]
    assert b.writes.tolist() == b.reads.tolist() == network["a"].writes.tolist()
    assert b.positions == 64 + 16 and b.macs == 80 * 6 * 54
    shrinks_faithfully(network)


def test_modules_called_by_keyword_are_like_others():
    network = traced(
        lambda m, x: m.l(input=gap(m.b(input=torch.relu(m.n(input=m.a(input=x)))))),
        a=conv(3, 6, bias=False), n=nn.BatchNorm2d(6), b=conv(6, 6), l=head(),
    )  # fmt: skip
    assert network.norms[0].folds_into == "a"
    shrinks_faithfully(network)
    student = compress(network, random_policy(network, 0), calibrate(network, [(network.example, None)]))
    assert freeze(student)(network.example).shape == (2, 5)


def test_a_norm_that_cannot_be_folded_is_charged_to_a_layer():
    network = traced(
        lambda m, x: m.l(gap(m.b(m.n(F.relu(m.a(x)))))),
        a=conv(3, 6, bias=False),
        n=nn.BatchNorm2d(6),
        b=conv(6, 6),
        l=head(),
    )
    assert (network.norms[0].folds_into, network.norms[0].charged_to) == (None, "b") and not network["a"].bias
    shared = traced(
        lambda m, x: m.l(gap(m.n(m.b(m.n(m.a(x)))))),
        a=conv(3, 6, bias=False),
        n=nn.BatchNorm2d(6),
        b=conv(6, 6),
        l=head(),
    )
    assert shared.norms[0].folds_into is None and same(shared, "a", "b")
    both_read = traced(
        lambda m, x: (lambda y: m.l(gap(m.n(y) + y)))(m.a(x)), a=conv(3, 6, bias=False), n=nn.BatchNorm2d(6), l=head()
    )
    assert both_read.norms[0].folds_into is None


# -- what cannot be pruned, and why -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run, reason",
    (
        (lambda m, x: m.l(gap(m.b(torch.sigmoid(m.a(x))))), "a removed channel would not be zero where b reads it"),
        (lambda m, x: m.l(gap(m.b(1 - m.a(x)))), "a removed channel would not be zero where b reads it"),
        (lambda m, x: m.l(gap(m.b(m.a(x) + 1))), "a removed channel would not be zero where b reads it"),
        (
            lambda m, x: m.l(gap(m.b(F.pad(m.a(x), (1, 1, 1, 1), value=2.0)))),
            "a removed channel would not be zero where b reads it",
        ),
        (lambda m, x: m.l(gap(m.b(torch.softmax(m.a(x), 1)))), "'softmax' is not known"),
        (lambda m, x: m.l(gap(m.b(m.other(m.a(x))))), "GroupNorm 'other' is not known"),
        (lambda m, x: m.l(gap(m.b(m.scale * m.a(x)))), "'mul' is not known"),
        (lambda m, x: m.l(gap(m.b(m.up(m.a(x))))), "ConvTranspose2d 'up' is not known"),
        (lambda m, x: m.l(gap(m.b(m.a(x) * m.a(x).mean(1, keepdim=True)))), "'mean' is not known"),
        (lambda m, x: m.l(gap(m.b(m.a(x).view(-1, 6, 8, 8)))), ""),
    ),
    ids=(
        "sigmoid",
        "one_minus",
        "plus_one",
        "pad_with_two",
        "softmax",
        "group_norm",
        "layer_scale",
        "transposed",
        "mean",
        "control",
    ),
)
def test_what_cannot_be_pruned_tells_why_and_loses_no_layer(run, reason):
    network = traced(
        run,
        a=conv(3, 6),
        b=conv(6, 6),
        l=head(),
        other=nn.GroupNorm(2, 6),
        scale=nn.Parameter(torch.randn(6, 1, 1)),
        up=nn.ConvTranspose2d(6, 6, 1),
    )
    assert [layer.name for layer in network.layers] == ["a", "b", "l"]
    assert reason in network.why_not(network["a"]) and network.prunable[network["a"].writes].all() == (reason == "")
    assert network.why_not(network["b"]) == "" and network.prunable[network["b"].writes].all()
    shrinks_faithfully(network)


def test_a_sigmoid_that_only_gates_stays_prunable_but_one_that_is_also_read_does_not():
    network = traced(
        lambda m, x: (lambda g: m.l(gap(m.a(x) * g)) + m.l2(gap(g)))(torch.sigmoid(m.b(x))),
        a=conv(3, 6),
        b=conv(3, 6),
        l=head(),
        l2=head(),
    )
    assert "l2" in network.why_not(network["a"]) and same(network, "a", "b")


def test_broadcast_over_channels():
    network = traced(
        lambda m, x: (lambda y: m.l(gap(m.b(y * torch.sigmoid(m.c(y))))))(m.a(x)),
        a=conv(3, 6),
        b=conv(6, 6),
        c=conv(6, 1),
        l=head(),
    )
    assert network.why_not(network["c"]) == "mul broadcasts it over channels"
    assert network.why_not(network["a"]) == ""  # zero times anything stays zero
    shrinks_faithfully(network)
    added = traced(
        lambda m, x: (lambda y: m.l(gap(m.b(y + m.c(y)))))(m.a(x)), a=conv(3, 6), b=conv(6, 6), c=conv(6, 1), l=head()
    )
    assert "broadcasts" in added.why_not(added["c"]) and "would not be zero" in added.why_not(added["a"])


class Transformer(nn.Module):
    """A patch embedding, LayerNorm, attention by matmul, an MLP on (N, L, C)."""

    def __init__(self):
        super().__init__()
        self.stem, self.embed, self.norm = conv(3, 4), nn.Conv2d(4, 6, 2, 2), nn.LayerNorm(6)
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))
        self.up, self.down, self.out = nn.Linear(6, 12), nn.Linear(12, 6), head()

    def forward(self, x):
        x = self.norm(self.embed(F.relu(self.stem(x))).flatten(2).transpose(1, 2))
        x = x + torch.softmax(self.q(x) @ self.k(x).transpose(1, 2) * 6**-0.5, -1) @ self.v(x)
        return self.out((x + self.down(F.gelu(self.up(x)))).mean(1))


def test_attention_is_survived_and_the_conv_before_it_stays_prunable():
    network = trace(randomise(Transformer()), torch.randn(1, 3, 8, 8))
    assert [layer.name for layer in network.layers] == ["stem", "embed", "q", "k", "v", "up", "down", "out"]
    assert [layer.name for layer in network.layers if network.prunable[layer.writes].all()] == ["stem", "up"]
    assert "LayerNorm 'norm'" in network.why_not(network["embed"]) and all(
        network.why_not(network[name]) for name in ("q", "k", "v", "down", "out")
    )
    assert network["up"].positions == 16 and network["up"].macs == 16 * 72 and network.other_parameters == 12
    shrinks_faithfully(network)


@pytest.mark.parametrize(
    "run",
    (
        lambda m, x: m.down(F.gelu(m.up(m.a(x).permute(0, 2, 3, 1)))).permute(0, 3, 1, 2),
        lambda m, x: m.down(m.drop(m.up(m.a(x).flatten(2).transpose(1, 2)))).transpose(1, 2).unflatten(2, (8, 8)),
        lambda m, x: m.c(F.relu(m.up(m.a(x).permute(0, 2, 3, 1)), inplace=True).permute(0, 3, 1, 2)),
        lambda m, x: m.c(m.up(F.silu(m.a(x).permute(0, 2, 3, 1)) * 2).permute(0, 3, 1, 2)),
    ),
    ids=("channels_last", "tokens", "back_to_a_conv", "elementwise_before"),
)
def test_channels_that_lie_last_are_followed_through_linear_layers(run):
    network = traced(
        lambda m, x: m.l(gap(m.b(run(m, x)))),
        a=conv(3, 6), up=nn.Linear(6, 12), down=nn.Linear(12, 6), c=conv(12, 6), b=conv(6, 6), l=head(),
        drop=nn.Dropout(),
    )  # fmt: skip
    assert [network.why_not(layer) for layer in network.layers] == [""] * (len(network.layers) - 1) + ["network output"]
    assert reads_of(network, "up") == [("a", k) for k in range(6)]
    shrinks_faithfully(network)


@pytest.mark.parametrize(
    ("run", "reason"),
    (
        (lambda m, x: m.up(x).softmax(-1), "'softmax' is not known"),
        (lambda m, x: torch.sigmoid(m.up(x)), "a removed channel would not be zero where down reads it"),
        (lambda m, x: m.up(x)[..., [1, 0, *range(2, 12)]], "down reads it as a tensor of shape (N, 8, 8, 12)"),
        (lambda m, x: (lambda y: y + y.mean(-1, keepdim=True))(m.up(x)), "'mean' is not known"),
    ),
    ids=("softmax", "sigmoid", "order", "mean"),
)
def test_channels_that_lie_last_and_are_mixed_stay(run, reason):
    network = traced(
        lambda m, x: m.l(m.down(run(m, m.a(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2).mean((2, 3))),
        a=conv(3, 6), up=nn.Linear(6, 12), down=nn.Linear(12, 6), l=head(),
    )  # fmt: skip
    assert reason in network.why_not(network["up"])
    assert network.why_not(network["a"]) == network.why_not(network["down"]) == ""
    shrinks_faithfully(network)


def test_a_linear_layer_over_positions_is_found_and_not_pruned():
    network = traced(
        lambda m, x: m.l(m.t(F.relu(m.a(x).flatten(2))).mean(2)), a=conv(3, 6), t=nn.Linear(64, 16), l=head()
    )
    assert "t reads it as a tensor of shape (N, 6, 64)" in network.why_not(network["a"])
    assert network.why_not(network["t"]) and network["t"].positions == 6
    shrinks_faithfully(network)


@pytest.mark.parametrize(
    "run",
    (
        lambda m, x: m.l(gap(F.normalize(m.a(x)))),
        lambda m, x: m.l(torch.einsum("nchw->nc", m.a(x))),
        lambda m, x: m.l(gap(torch.stack([m.a(x), m.b(x)]).sum(0))),
        lambda m, x: m.l(gap(torch.where(m.a(x) > 0, m.a(x), m.b(x)))),
        lambda m, x: m.l(gap(m.a(x).cumsum(1))),
        lambda m, x: m.l(torch.max(m.a(x).flatten(2), 2).values),
        lambda m, x: m.l(torch.softmax(m.a(x).view(-1, 2, 3, 64), 1).mean(3).flatten(1)),
    ),
    ids=("normalize", "einsum", "stack", "where", "cumsum", "max", "groups"),
)
def test_unknown_operations_freeze_what_they_touch(run):
    network = traced(run, a=conv(3, 6), b=conv(3, 6), l=head())
    assert "is not known to keep channels apart" in network.why_not(network["a"])
    assert not network.prunable[network["a"].writes].any()
    shrinks_faithfully(network)


# -- unusual forwards -------------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.q, self.l = conv(3, 6), conv(6, 6, 1), head()

    def forward(self, x):
        x = self.a(x)
        b, c, h, w = x.shape
        return self.l(self.q(x).view(b, c, h * w).mean(2))


def _add_in_place(m, x):
    y = m.a(x)
    y.add_(m.b(x))
    return m.l(gap(F.relu(y)))


def _sigmoid_in_place(m, x):
    y = m.a(x)
    y.sigmoid_()
    return m.l(gap(m.c(y)))


def _clone(m, x):
    y = m.a(x)
    return m.l(gap(F.relu(y.clone(), inplace=True) + m.c(y)))


def _strided(m, x):
    y = m.a(x)
    return m.l9(gap(torch.cat([y, F.relu(y[:, ::2], inplace=True)], 1)))


def _half_pooled(m, x):
    y = m.a(x)
    return m.l(gap(torch.cat([F.max_pool2d(y[:, :1], 3, 1, 1), y[:, 1:]], 1)))


FAITHFUL = {
    "cat by keyword": lambda m, x: m.l(gap(torch.cat(tensors=(m.a(x), m.b(x)), dim=1)[:, :6])),
    "cat of a chunk": lambda m, x: m.l(gap(torch.cat(m.a(x).chunk(2, 1), 1))),
    "one of several outputs": lambda m, x: m.l(torch.max(m.a(x).flatten(2), 2)[0]),
    "pool with indices": lambda m, x: m.l(gap(F.max_pool2d(m.a(x), 2, return_indices=True)[0])),
    "multi-head attention": lambda m, x: m.l((lambda t: m.t(t, t, t)[0].mean(1))(m.a(x).flatten(2).transpose(1, 2))),
    "expanded parameter": lambda m, x: m.l(gap(m.a(x) * m.g.expand_as(m.b(x)))),
    "flatten by keyword": lambda m, x: m.l(torch.flatten(input=F.adaptive_avg_pool2d(m.a(x), 1), start_dim=1)),
    "in-place add": _add_in_place,
    "in-place sigmoid": _sigmoid_in_place,
    "clone and in-place relu": _clone,
    "strided view and in-place relu": _strided,
    "unbind": lambda m, x: m.l2(gap(torch.stack([m.a(x).unbind(1)[i] for i in (2, 0)], 1))),
    "select": lambda m, x: m.l64(m.a(x)[:, 3].flatten(1)),
    "slice of channels last": lambda m, x: m.l2(torch.softmax(m.a(x).permute(0, 2, 3, 1)[..., 2:4], 1).mean((1, 2))),
    "number of channels as a factor": lambda m, x: (lambda y: m.l(gap(y * y.size(1) ** -0.5)))(m.a(x)),
    "a slice without survivors": _half_pooled,
}


STILL_PRUNABLE = {
    "cat by keyword",
    "cat of a chunk",
    "flatten by keyword",
    "in-place add",
    "clone and in-place relu",
    "a slice without survivors",
}


@pytest.mark.parametrize("what", FAITHFUL)
def test_unusual_forwards_are_shrunk_faithfully(what):
    network = traced(
        FAITHFUL[what],
        a=conv(3, 6),
        b=conv(3, 6),
        c=conv(6, 6),
        l=head(),
        l2=head(2),
        l9=head(9),
        l64=head(64),
        t=nn.MultiheadAttention(6, 2, batch_first=True),
        g=nn.Parameter(torch.randn(1, 6, 1, 1)),
    )
    shrinks_faithfully(network, seeds=8)
    prunable = network.prunable[network["a"].writes]
    assert prunable.all() if what in STILL_PRUNABLE else network.why_not(network["a"])
    if what == "in-place sigmoid":
        assert "would not be zero" in network.why_not(network["a"])


def test_tracing_prints_nothing(capsys):
    traced(
        lambda m, x: m.l(gap(m.a(x) * m.g.expand_as(m.b(x)))),
        a=conv(3, 6),
        b=conv(3, 6),
        g=nn.Parameter(torch.randn(1, 6, 1, 1)),
        l=head(),
    )
    assert capsys.readouterr() == ("", "")


def test_a_size_taken_from_another_tensor():
    shrinks_faithfully(trace(randomise(Bottleneck()), torch.randn(2, 3, 8, 8)))


def test_expand_as_in_squeeze_and_excitation_stays_prunable():
    network = traced(
        lambda m, x: (lambda y: m.l(gap(y * torch.sigmoid(m.up(F.adaptive_avg_pool2d(y, 1))).expand_as(y))))(m.a(x)),
        a=conv(3, 6),
        up=conv(6, 6, 1),
        l=head(),
    )
    shrinks_faithfully(network)
    assert network.why_not(network["a"]) == ""


@pytest.mark.parametrize("shared", (False, True), ids=("no_affine", "tied_weights"))
def test_norms_without_affine_and_tied_weights_freeze_nothing(shared):
    def parts():
        b, c = conv(6, 6, bias=False), conv(6, 6, bias=False)
        c.weight = b.weight if shared else c.weight
        return {"a": conv(3, 6), "n": nn.BatchNorm2d(6, affine=shared), "b": b, "c": c, "l": head()}

    network = traced(lambda m, x: m.l(gap(m.c(F.relu(m.b(F.relu(m.n(m.a(x)))))))), **parts())
    assert [network.why_not(layer) for layer in network.layers] == ["", "", "", "network output"]
    for seed in range(3):
        policy = random_policy(network, seed, widths=(32,))
        small = compress(network, policy)
        zeroed = copy.deepcopy(network)
        zeroed.module.c.weight = nn.Parameter(zeroed.module.c.weight.detach().clone())
        assert difference(masked(zeroed, policy), small, network.example) <= 1e-5


# -- real networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("digits_cnn", "resnet20"))  # those of torchvision: test_any_cnn.py
def test_no_layer_is_lost_and_only_the_output_is_frozen(name):
    model, called = copy.deepcopy(model_of(name)), []
    for module_name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda *_, module_name=module_name: called.append(module_name))
    with torch.no_grad():
        model(images_of(name))
    network = network_of(name)
    assert [layer.name for layer in network.layers] == list(dict.fromkeys(called))
    assert [layer.name for layer in network.layers if not network.prunable[layer.writes].all()] == [
        network.layers[-1].name
    ]
    assert set(network.unused) == {n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))} - set(
        called
    )
    assert network.weights == sum(model.get_submodule(n).weight.numel() for n in set(called))


@pytest.mark.filterwarnings("ignore")  # of the oracle, not of us
@pytest.mark.parametrize(
    "name", ("digits_cnn", *(n for n in TORCHVISION if n not in ("shufflenet_v2_x0_5", "vgg11_bn")))
)
def test_spaces_agree_with_torch_pruning(name):
    """Not on ShuffleNet and option-A shortcuts, where Torch-Pruning 1.6.1 crashes; VGG is slow and couples nothing."""
    network, model = network_of(name), copy.deepcopy(model_of(name))
    names = {module: module_name for module_name, module in model.named_modules()}
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=images_of(name))
    random, compared = np.random.default_rng(0), 0
    spaces = [space for space in network.spaces if space.prunable]
    for space in spaces[:: 1 if len(spaces) < 70 else 3]:
        for channel in (space.channels[0], random.choice(space.channels)):
            ours = {(w, int(k)) for w in space.writers for k in np.flatnonzero(network[w].writes == channel)}
            root, kernel = min(ours, key=lambda pair: network[pair[0]].kind == "depthwise")
            module = model.get_submodule(root)
            prune = (
                torch_pruning.prune_linear_out_channels
                if isinstance(module, nn.Linear)
                else torch_pruning.prune_conv_out_channels
            )
            theirs = {
                (names[dep.target.module], int(k))
                for dep, kernels in graph.get_pruning_group(module, prune, idxs=[kernel])
                if isinstance(dep.target.module, (nn.Conv2d, nn.Linear))
                and graph.is_out_channel_pruning_fn(dep.handler)
                for k in kernels
            }
            if name == "regnet_y_400mf":  # Torch-Pruning leaves the coupling of a convolution's groups to its pruners
                ours, theirs = ({w for w, _ in pairs} for pairs in (ours, theirs))
            assert ours == theirs, space.writers
            compared += 1
    assert compared >= 10


def test_print_shows_the_table():
    network = traced(
        lambda m, x: m.l(gap(m.b(torch.sigmoid(m.a(x))))),
        a=conv(3, 6),
        b=conv(6, 1200, stride=2),
        l=head(1200),
        never=conv(3, 3),
    )
    head_line, rule, a, b, linear, total, unused = str(network).splitlines()
    assert head_line.split()[:2] == ["layer", "kind"] and set(rule) == {"-", " "}
    assert a.split() == [
        "a",
        "conv",
        "(6,",
        "3,",
        "3,",
        "3)",
        "8x8",
        "162",
        "10,368",
        "1",
        *"a removed channel would not be zero where b reads it".split(),
    ]
    assert b.split() == ["b", "conv", "(1200,", "6,", "3,", "3)", "4x4", "64,800", "1,036,800", "2", "yes"]
    assert linear.split() == [
        "l",
        "linear",
        "(5,",
        "1200,",
        "1,",
        "1)",
        "1x1",
        "6,000",
        "6,000",
        "3",
        "network",
        "output",
    ]
    assert total == "3 layers, 70,962 weights, 1,053,168 MACs, 4 spaces, 1200 of 1214 channels prunable"
    assert unused == "never called in eval mode, not shipped: never"


def test_the_users_module_is_not_modified():
    model = torchvision.models.mobilenet_v3_small(num_classes=10)
    calls = []
    model.features[0][0].register_forward_hook(lambda *_: calls.append(1))
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    network = trace(model, torch.randn(1, 3, 32, 32))
    compress(network, random_policy(network, 0))
    assert all(module.training for module in model.modules()) and all(
        p.requires_grad and p.grad is None for p in model.parameters()
    )
    assert hooks == [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()
    ]
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert not {t.data_ptr() for t in network.module.state_dict().values()} & {t.data_ptr() for t in after.values()}


# -- errors -----------------------------------------------------------------------------------------------------------


class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = conv(3, 6)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else x


def test_errors_are_one_sentence():
    sick = Net(lambda m, x: m.a(x), a=conv(3, 6))
    with torch.no_grad():
        sick.a.weight[0, 0, 0, 0] = torch.nan
    cases = (
        (sick, torch.randn(1, 3, 8, 8), "'a.weight' has 1 NaN or inf"),
        (DataDependent(), torch.randn(1, 3, 8, 8), "DataDependent.forward must be traceable"),
        (Net(lambda m, x: F.relu(x)), torch.randn(1, 3, 8, 8), "must have a Conv2d or Linear"),
        (Net(lambda m, x: m.a(x), a=conv(3, 6)), torch.randn(1, 4, 8, 8), r"input of shape \(2, 4, 8, 8\)"),
        (
            Net(lambda m, x: m.l(x.flatten(1)), l=nn.Linear(192, 5)),
            torch.randn(1, 3, 9, 9),
            "must accept the example input",
        ),
    )
    for model, example, text in cases:
        with pytest.raises(AjpqError, match=text) as caught:
            trace(model, example)
        assert "\n" not in str(caught.value) and ";" in str(caught.value)


def test_an_unknown_layer_name_is_told():
    with pytest.raises(AjpqError, match="no 'layer9'.*conv1"):
        network_of("digits_cnn")["layer9"]


def test_identities_go_where_they_are_of_one_value():
    class Net(nn.Module):
        def __init__(self, how):
            super().__init__()
            self.a, self.b, self.id, self.how = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Identity(), how

        def forward(self, x):
            if self.how == "pair":
                u, v = self.id((self.a(x), self.b(x)))
                return u - 2 * v
            if self.how == "list":
                return torch.cat(self.id([self.a(x), self.b(x)]), 1)
            if self.how == "number":
                return self.a(x) * self.id(2.0)
            return self.id(F.relu(self.id(input=self.a(self.id(x)))))

    x = torch.randn(2, 3, 8, 8)
    for how, left in (("pair", 1), ("list", 1), ("number", 1), ("values", 0)):
        net = Net(how).eval()
        network = trace(net, x)
        with torch.no_grad():
            assert torch.equal(network.module(x), net(x)), how
        assert sum(node.target == "id" for node in network.module.graph.nodes) == left, how
