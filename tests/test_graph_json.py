"""Graphs as JSON: exact round trips, and files of strangers that must not execute anything."""

import json
import math
import operator

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from ajpq import graph_json, module_json
from ajpq.errors import AjpqError


def _rebuilt(module: fx.GraphModule) -> fx.GraphModule:
    spec = json.loads(json.dumps(graph_json.graph_to_json(module), allow_nan=False))
    modules, tensors = graph_json.targets(spec)
    found = dict(module.named_parameters()) | dict(module.named_buffers())
    return graph_json.graph_from_json(
        spec, {m: module.get_submodule(m) for m in modules}, {t: found[t] for t in tensors}
    )


class _Every(nn.Module):
    """One forward with every kind of node and argument."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(2)])
        self.gamma = nn.Parameter(torch.linspace(-1, 1, 4).reshape(1, 4, 1, 1))
        self.register_buffer("order", torch.tensor([2, 0, 3, 1]))

    def forward(self, x: torch.Tensor, shift: float = 0.5) -> dict[str, torch.Tensor]:
        y = self.blocks[0](x) * self.gamma + shift
        y += self.blocks[1](y)[:, :, ..., ::1]
        y = torch.cat([y[:, :2], y.index_select(1, self.order)[:, 2:]], dim=1)
        y = F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 0, 2), "constant", -0.1)
        y = torch.where(y.clamp(max=math.inf).to(torch.float64) > 0, y, y.new_zeros((1,), dtype=torch.float32))
        b, c, h, w = y.shape
        y = (
            y.view(b, 2, c // 2, h, w)
            .transpose(1, 2)
            .contiguous(memory_format=torch.contiguous_format)
            .view(b, -1, h, w)
        )
        y = F.max_pool2d(F.avg_pool2d(y, kernel_size=2), 2)
        return {"a": torch.flatten(y, 1), "b": (y.mean([2, 3]), [y.size(0), None, 'it\'s\n"so"'])}


def test_round_trip_of_every_kind_of_argument() -> None:
    module = fx.symbolic_trace(_Every().eval())
    again = _rebuilt(module)
    x = torch.randn(2, 4, 16, 16)
    want, got = module(x), again(x)
    assert list(got) == ["a", "b"] and torch.equal(want["a"], got["a"]) and torch.equal(want["b"][0], got["b"][0])
    assert type(got["b"]) is tuple and list(got["b"][1]) == [2, None, 'it\'s\n"so"']
    assert torch.equal(module(x, 3.0)["a"], again(x, shift=3.0)["a"])
    assert graph_json.graph_to_json(again) == graph_json.graph_to_json(module)


@pytest.mark.parametrize(
    "value",
    [
        (1, 2),
        [1, 2],
        (),
        [],
        [(1,), [2.5, (None, True)]],
        slice(None, -1, 2),
        (slice(1, None), ..., None),
        math.inf,
        -math.inf,
        0.1,
        -0.0,
        10**20,
        {"k": (1, [2])},
        torch.float16,
        torch.channels_last,
        "a'b\"\n\\",
        1e-310,
    ],
)
def test_values_keep_their_type(value: object) -> None:
    graph = fx.Graph()
    graph.placeholder("x")
    graph.output(value)
    (got,) = list(_rebuilt(fx.GraphModule(nn.Module(), graph)).graph.nodes)[-1].args
    want = list(graph.nodes)[-1].args[0]
    assert got == want and type(got) is type(want) and repr(got) == repr(want)


def test_devices_become_the_cpu_and_nan_survives() -> None:
    graph = fx.Graph()
    graph.placeholder("x")
    graph.output((torch.device("cuda", 1), math.nan))
    device, nan = _rebuilt(fx.GraphModule(nn.Module(), graph))(0)
    assert device == torch.device("cpu") and math.isnan(nan)


def test_stochastic_depth_becomes_nothing() -> None:
    ops = pytest.importorskip("torchvision.ops")
    block = nn.Sequential(nn.ReLU(), ops.StochasticDepth(0.5, "row"), nn.ReLU())
    again = _rebuilt(fx.symbolic_trace(block.eval()))
    assert [n.op for n in again.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    with pytest.raises(AjpqError, match="stochastic depth is on"):
        graph_json.graph_to_json(fx.symbolic_trace(block.train()))


def _users_function(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def _call(function: object, *args: object, method: str = "") -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    made = graph.call_method(method, (x, *args)) if method else graph.call_function(function, (x, *args))
    graph.output(made)
    return fx.GraphModule(nn.Module(), graph)


@pytest.mark.parametrize(
    ("module", "named"),
    [
        (_call(_users_function), "_users_function"),
        (_call(torch.load), "torch.serialization.load"),
        (_call(eval), "eval"),
        (_call(torch.ops.load_library), "load_library"),
        (_call(torch.hub.load), "torch.hub.load"),
        (_call(print), "print"),
        (_call(operator.methodcaller), "methodcaller"),
        (_call(getattr, "__class__"), "__class__"),
        (_call(torch.save), "save"),
        (_call(torch.from_file), "from_file"),
        (_call(F.boolean_dispatch), "boolean_dispatch"),
        (_call(None, method="numpy"), "numpy"),
        (_call(None, method="apply_"), "apply_"),
        (_call(None, method="my_method"), "my_"),
        (_call(torch.add, 1j), "complex"),
    ],
)
def test_what_cannot_be_shipped_is_named(module: fx.GraphModule, named: str) -> None:
    with pytest.raises(AjpqError, match=f"must be|may call.*{named}"):
        graph_json.graph_to_json(module)


def test_no_function_of_the_table_reaches_files_or_code() -> None:
    bad = (
        "load",
        "save",
        "eval",
        "exec",
        "file",
        "import",
        "compile",
        "numpy",
        "dlpack",
        "attrgetter",
        "itemgetter",
        "methodcaller",
        "open",
        "jit",
        "dispatch",
        "torch_function",
        "set_default",
        "manual_seed",
        "apply",
        "fork",
    )
    names = [*graph_json.FUNCTIONS, *graph_json.METHODS]
    assert not [n for n in names if any(b in n.rpartition(".")[2] for b in bad)] and len(names) > 400
    assert {"torch.cat", "torch.nn.functional.relu", "operator.getitem", "getattr"} <= set(names)


_EVIL = [
    "__import__('os').system('touch owned')",
    "x\nimport os",
    "x)",
    "x(",
    "a b",
    "x;y",
    "",
    "1x",
    "class",
    "x=1",
    "é",
    "x.y",
    "__class__",
    'a"b',
    "a'b",
    7,
    None,
    ["x"],
]


@pytest.mark.parametrize("evil", _EVIL, ids=repr)
def test_hostile_words_are_refused(evil: object) -> None:
    def rows(op: str, target: object, *rest: object) -> dict:
        return {
            "nodes": [["placeholder", "x", []], [op, target, [["node", 1]], *rest], ["output", "output", [["node", 1]]]]
        }

    def build(spec: dict) -> None:
        modules, tensors = graph_json.targets(spec)
        graph_json.graph_from_json(spec, {m: nn.ReLU() for m in modules}, {t: torch.zeros(1) for t in tensors})

    build(rows("call_method", "relu"))
    specs = [
        rows("call_function", evil),
        rows("call_method", evil),
        rows(evil, "relu"),
        rows("call_method", "sum", {evil: 1}) if isinstance(evil, str) else rows("call_function", evil),
    ]
    specs.append({"nodes": [["placeholder", evil, []], ["output", "output", [["node", 1]]]]})
    specs.append(
        {
            "nodes": [
                ["placeholder", "x", []],
                ["call_function", "getattr", [["node", 1], evil]],
                ["output", "output", [["node", 1]]],
            ]
        }
    )
    if evil not in ("1x", "x.y"):  # these are paths as good as "layer1.0"
        specs += [rows("call_module", evil), {"nodes": [["get_attr", evil, []], ["output", "output", [["node", 1]]]]}]
    for spec in specs:
        with pytest.raises((AjpqError, TypeError)):
            build(spec)


def test_hostile_strings_stay_strings(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    evil = "'\"\n\\'); __import__('os').mkdir('owned') #"
    graph = fx.Graph()
    graph.placeholder("x")
    graph.output((evil, {evil: evil}))
    assert _rebuilt(fx.GraphModule(nn.Module(), graph))(0) == (evil, {evil: evil})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "nodes",
    [
        [["placeholder", "x", []]],
        [["output", "output", [1]], ["placeholder", "x", []]],
        [["placeholder", "x", []], ["output", "output", [["node", 2]]]],
        [["placeholder", "x", []], ["output", "output", [["node", 0]]]],
        [["placeholder", "x", []], ["output", "output", [["node", -1]]]],
        [["placeholder", "x", []], ["output", "output", [["what", 1]]]],
        [["placeholder", "x", []], ["output", "output", [["dtype", "load"]]]],
        [["placeholder", "x", []], ["output", "o", [["float", "1"]]]],
        [["get_attr", "forward", []], ["output", "output", [["node", 1]]]],
    ],
)
def test_malformed_graphs_are_refused(nodes: list) -> None:
    with pytest.raises(AjpqError):
        graph_json.graph_from_json({"nodes": nodes}, {}, {})


@pytest.mark.parametrize(
    "module",
    [
        nn.ReLU(inplace=True),
        nn.PReLU(3),
        nn.LayerNorm((4, 5), eps=1e-3),
        nn.LayerNorm(4, bias=False),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4, elementwise_affine=False),
        nn.BatchNorm2d(3, eps=1e-2),
        nn.BatchNorm2d(3, affine=False),
        nn.Identity(1, k=2),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.AdaptiveAvgPool2d((None, 7)),
        nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=False),
        nn.Hardtanh(-2, 3),
        nn.ReLU6(),
        nn.Dropout(0.3),
        nn.ConvTranspose2d(4, 6, 3, stride=2, bias=False),
        nn.Conv1d(4, 6, 3, padding="same"),
        nn.Flatten(2),
        nn.ZeroPad2d(1),
        nn.Conv2d(4, 4, 3, groups=2, padding_mode="reflect", padding=1),
        nn.Linear(3, 4, bias=False),
        nn.Embedding(5, 2),
        nn.GELU("tanh"),
        nn.Softmax(dim=1),
        nn.LocalResponseNorm(3),
        nn.PixelShuffle(2),
        nn.AvgPool2d(2, divisor_override=3),
        nn.ConstantPad2d((1, 2, 3, 4), math.inf),
        nn.Unflatten(1, (2, 3)),
        nn.LeakyReLU(0.3),
        nn.ChannelShuffle(2),
        nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True, proj_size=2),
        nn.GRU(4, 3, bias=False),
        nn.RNN(4, 3, nonlinearity="relu"),
    ],
    ids=repr,
)
def test_leaf_modules_come_back_equal(module: nn.Module) -> None:
    state = torch.get_rng_state()
    again = module_json.module_from_json(json.loads(json.dumps(module_json.module_to_json("m", module))))
    assert torch.equal(state, torch.get_rng_state())
    module_json.set_tensors(again, dict(graph_json.tensors_of(module)))
    assert repr(again) == repr(module) and again.state_dict().keys() == module.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), module.state_dict().values(), strict=True)
    )


class _Mine(nn.ReLU):
    pass


def _double(module: nn.Module) -> nn.Module:
    return module.double()


def _hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *args: None)
    return module


def _eps(module: nn.Module) -> nn.Module:
    module.momentum, module.eps, module.num_features = None, 0.25, 7
    return module


@pytest.mark.parametrize(
    "module",
    [
        _Mine(),
        nn.Sequential(nn.ReLU()),
        _double(nn.PReLU()),
        _hooked(nn.ReLU()),
        _eps(nn.BatchNorm2d(3)),
        nn.MultiheadAttention(4, 2, bias=False),
        nn.TransformerEncoderLayer(4, 2),
        nn.RNNCellBase(4, 3, True, 2),
        nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
    ],
    ids=lambda m: type(m).__name__,
)
def test_leaf_modules_that_would_change_are_refused(module: nn.Module) -> None:
    with pytest.raises(AjpqError, match="path.to.it"):
        module_json.module_to_json("path.to.it", module)


@pytest.mark.parametrize("name", ["Module.__init__", "DataParallel", "os", "functional", "Parameter", "", 3, "init"])
def test_only_modules_of_torch_nn_are_made(name: object) -> None:
    with pytest.raises(AjpqError, match="torch.nn"):
        module_json.module_from_json([name, {}])
