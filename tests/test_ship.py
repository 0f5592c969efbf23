"""The packed file: same bits after a round trip, as small as the size formula says, and damage is always noticed."""

import functools
import json
import math
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ajpq import quantize
from ajpq.bitstream import read_bits, write_bits
from ajpq.calibration import calibrate
from ajpq.compression import compress, freeze
from ajpq.errors import AjpqError
from ajpq.layers import ActQuant, ChannelAffine, FrozenLayer, Geometry, QuantLayer
from ajpq.packing import check, pack, unpack
from ajpq.policy import CompressionPolicy
from ajpq.shipping import FILE, describe, load, read_header, ship, to_bytes
from ajpq.tracing import trace

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 32)


def finished(layer: nn.Conv2d | nn.Linear, widths: tuple[int, ...], random: np.random.Generator) -> FrozenLayer:
    """A finished layer of the shape of `layer` with random integers, scales and biases."""
    shape = tuple(layer.weight.shape)
    bits = torch.from_numpy(random.choice(widths, shape[0])).to(torch.uint8)
    low, high, _ = (t.reshape(-1, *[1] * (len(shape) - 1)).numpy() for t in quantize.grid(bits))
    codes = random.integers(0, 256, shape, dtype=np.uint8) % (high - low + 1).astype(np.uint16) + low
    codes = torch.from_numpy(codes.astype(np.int8))
    coded = bits != 32
    scale = torch.from_numpy(random.normal(0, (shape[1] * 50) ** -0.5, shape[0])).to(torch.float16) * coded
    raw = torch.from_numpy(random.standard_normal((int((~coded).sum()), *shape[1:]), np.float32)) / 10
    bias = None
    if layer.bias is not None:
        bias = torch.from_numpy(random.normal(0, 0.1, shape[0])).float()
        bias = torch.where(coded, bias.half().float(), bias)
    act_bits = int(random.choice((2, 4, 8, 8, 8, 32)))
    act = ActQuant(act_bits, bool(random.integers(2)), torch.tensor(float(random.uniform(0.001, 0.1))), learned=False)
    return FrozenLayer(codes, bits, scale, raw, bias, Geometry.of(layer), act)


def finish(module: nn.Module, widths: tuple[int, ...] = WIDTHS, seed: int = 0) -> fx.GraphModule:
    """The traced network with its convolutions and linear layers finished, and its 2d batch-norms as affine maps."""
    random = np.random.default_rng(seed)
    traced = fx.symbolic_trace(module.eval())
    for name, part in list(traced.named_modules()):
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            traced.set_submodule(name, finished(part, widths, random))
        elif isinstance(part, nn.BatchNorm2d):
            scale, shift = torch.from_numpy(random.normal((1, 0), 0.1, (part.num_features, 2))).float().T
            traced.set_submodule(name, ChannelAffine(scale, shift))
    return traced


class Mixed(nn.Module):
    """Every kind of layer, module, tensor and operation in one small forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, (3, 5), stride=(1, 2), padding=(1, 2), groups=12)
        self.grouped = nn.Conv2d(12, 18, 3, padding="same", groups=3, dilation=2, padding_mode="reflect")
        self.blocks = nn.Sequential(
            nn.Conv2d(18, 18, 1), nn.PReLU(18), nn.GroupNorm(3, 18), nn.Conv2d(18, 18, 1, bias=False)
        )
        self.rest = nn.BatchNorm1d(27)
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.scale = nn.Parameter(torch.rand(18, 1, 1))
        self.register_buffer("order", torch.randperm(18))
        self.register_buffer("gate", torch.rand(18) > 0.5)
        self.register_buffer("halves", torch.rand(3, dtype=torch.float16))
        self.register_buffer("doubles", torch.rand(2, dtype=torch.float64) * -1e200)
        self.pool, self.drop = nn.AdaptiveAvgPool2d(1), nn.Dropout(0.5)
        self.head = nn.Linear(27, 10)
        with torch.no_grad():
            self.rest.running_mean.normal_()
            self.rest.num_batches_tracked.fill_(1234567890123)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)) * self.halves.sum().float())
        x = F.relu(x + self.depthwise(self.up(x))[:, :, ::2], inplace=True)
        x = self.grouped(x)
        x = x + self.blocks(x) * self.scale
        y = torch.where(self.gate[:, None, None], x, -x).index_select(1, self.order)[:, :9]
        z = torch.flatten(self.pool(torch.cat([x, y], dim=1)), 1)
        return self.head(self.drop(self.rest(z))) + self.doubles.sign().sum().float()


def _block(c_in: int, c_out: int, stride: int) -> nn.ModuleDict:
    return nn.ModuleDict({"conv1": nn.Conv2d(c_in, c_out, 3, stride, 1), "conv2": nn.Conv2d(c_out, c_out, 3, 1, 1)})


class ResNet20(nn.Module):
    """The CIFAR network as it is when finished: batch-norms folded, zero-padded shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        plan = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
        self.blocks = nn.ModuleList([_block(*p) for p in plan])
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        for i, block in enumerate(self.blocks):
            y = block["conv2"](F.relu(block["conv1"](x)))
            if i in (3, 6):
                x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8 * i // 3, 8 * i // 3), "constant", 0)
            x = F.relu(y + x)
        x = F.avg_pool2d(x, 8)
        return self.linear(x.view(x.size(0), -1))


def _torchvision(name: str) -> nn.Module:
    with torch.device("meta"):  # `finish` replaces every layer that has tensors
        return getattr(pytest.importorskip("torchvision.models"), name)(weights=None)


NETWORKS = {
    "mixed": lambda: finish(Mixed()),
    "one kernel": lambda: finish(nn.Sequential(nn.Conv2d(3, 1, 1, bias=False)), (1,)),
    "float": lambda: finish(Mixed(), (32,)),
    "resnet20": lambda: finish(ResNet20(), (1, 2, 3, 4, 5, 6, 7, 8)),
    "resnet20 at 2 bits": lambda: finish(ResNet20(), (2,)),
    **{
        name: lambda name=name: finish(_torchvision(name))
        for name in ("shufflenet_v2_x0_5", "efficientnet_b0")  # the others: test_any_cnn.py
    },
}


def formula(network: fx.GraphModule) -> int:
    """Bits: b per weight and 16-bit scale, 16-bit bias, 4-bit width per coded kernel; 32 per number of the others."""
    bits = 0
    inside = []
    for name, module in network.named_modules():
        if isinstance(module, FrozenLayer):
            inside.append(name)
            weights, has_bias = module.codes[0].numel(), module.bias is not None
            for b in module.bits.tolist():
                bits += b * weights + (32 * has_bias + 4 if b == 32 else 16 + 16 * has_bias + 4)
        elif isinstance(module, ChannelAffine):
            inside.append(name)
            bits += 32 * len(module.scale)
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if tensor.is_floating_point() and not name.startswith(tuple(f"{i}." for i in inside)):
            bits += 32 * tensor.numel()
    return bits


def state(network: nn.Module) -> dict[str, Tensor]:
    return dict(network.named_parameters()) | dict(network.named_buffers())


def assert_same(first: fx.GraphModule, second: fx.GraphModule) -> None:
    one, two = state(first), state(second)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype and torch.equal(tensor, two[name]), name
    for name, module in first.named_modules():
        if isinstance(module, FrozenLayer):
            other = second.get_submodule(name)
            assert (module.act.bits, module.act.signed) == (other.act.bits, other.act.signed)
            assert module.geometry == other.geometry if module.geometry.conv else not other.geometry.conv


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip_is_exact_and_the_file_is_as_small_as_the_formula(name: str, tmp_path: Path) -> None:
    network = NETWORKS[name]()
    path = ship(network, tmp_path / "new" / "folder", {"name": name})
    again = load(path)
    assert_same(network, again)
    assert not again.training and not any(t.requires_grad for t in state(again).values())
    x = torch.randn(2, 3, 64, 64) if "resnet20" not in name else torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(network(x), again(x))
    assert path.stat().st_size <= formula(network) / 8 * 1.02 + 4096
    assert [p.name for p in path.parent.iterdir()] == [FILE] and read_header(path.parent)["extra"] == {"name": name}
    if path.stat().st_size < 1e6:
        assert to_bytes(pack(again, {"name": name})) == path.read_bytes()


def test_the_header_of_resnet20_is_below_two_kilobytes() -> None:
    assert len(pack(NETWORKS["resnet20"]())["header"]) < 2048


def test_the_bits_are_where_the_documentation_says(tmp_path: Path) -> None:
    """Decodes a file with the two lines of C in the module's docstring, one bit at a time."""
    network = finish(nn.Sequential(nn.Conv2d(3, 20, 3), nn.ReLU(), nn.Conv2d(20, 9, 1)))
    parts = safetensors.torch.load_file(ship(network, tmp_path))
    stream, halves, p, kernel, scales = parts["codes"].tolist(), parts["widths"].tolist(), 0, 0, parts["scale"].tolist()
    for layer in (network.get_submodule("0"), network.get_submodule("2")):
        for codes, bits, scale in zip(layer.codes, layer.bits.tolist(), layer.scale.tolist(), strict=True):
            b = halves[kernel // 2] >> 4 * (kernel % 2) & 15
            kernel += 1
            if bits == 32:
                assert b == 9
                continue
            assert b == bits and scales.pop(0) == scale
            lowest = -(1 << (b - 1)) if b <= 3 else 1 - (1 << (b - 1))
            for code in codes.flatten().tolist():
                u = sum((stream[(p + i) >> 3] >> ((p + i) & 7) & 1) << i for i in range(b))
                p += b
                assert u + lowest == code
    assert len(stream) == math.ceil(p / 8) and not scales and len(halves) == math.ceil(kernel / 2)


def test_bits_across_blocks_of_kernels() -> None:
    random = np.random.default_rng(0)
    kernels = []
    for n, weights in ((3, 2**19 + 1), (5, 7), (0, 4), (700, 3001)):
        widths = random.integers(1, 9, n).astype(np.uint8)
        kernels.append(
            ((random.integers(0, 256, (n, weights)) % (1 << widths.astype(int))[:, None]).astype(np.uint8), widths)
        )
    stream, start = write_bits(kernels), 0
    for codes, widths in kernels:
        assert np.array_equal(read_bits(stream, start, widths, codes.shape[1]), codes)
        start += int(widths.sum()) * codes.shape[1]
    assert len(stream) == math.ceil(start / 8)


def test_index_tensors_cost_little() -> None:
    """Not in the formula: the channels that survive a shuffle. 1,000 of them fit into 500 bytes."""

    class Gather(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("index", torch.randperm(2000)[:1000].sort().values)

        def forward(self, x: Tensor) -> Tensor:
            return x[:, self.index]

    parts = pack(fx.symbolic_trace(Gather()))
    assert len(parts["other"]) < 500 and torch.equal(unpack(parts).index, Gather().index) is False
    assert set(parts) == {"header", "other"}


FRESH = """
import sys, torch, safetensors.torch
from pathlib import Path
from ajpq.shipping import load
torch.set_num_threads(1)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    pair = safetensors.torch.load_file(folder / "pair")
    with torch.no_grad():
        assert torch.equal(load(folder)(pair["x"]), pair["y"]), folder
foreign = {"hydra", "omegaconf", "gymnasium", "stable_baselines3", "sklearn", "torchvision", "rich", "envs", "agents"}
print(sorted(foreign & {m.split(".")[0] for m in sys.modules}))
"""


def test_a_fresh_process_gets_the_same_bits_with_torch_alone(tmp_path: Path) -> None:
    for name in ("mixed", "resnet20", "efficientnet_b0", "shufflenet_v2_x0_5"):
        network, x = NETWORKS[name](), torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            safetensors.torch.save_file({"x": x, "y": network(x)}, ship(network, tmp_path / name).parent / "pair")
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FRESH, str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    torch.manual_seed(0)
    path = ship(finish(Mixed()), tmp_path_factory.mktemp("small"))
    return path, path.read_bytes()


def test_every_truncation_is_noticed(small: tuple[Path, bytes], tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    cut.write_bytes(small[1] + b"\0")
    for n in (len(small[1]) + 1, *range(len(small[1]) - 1, -1, -1)):
        os.truncate(cut, n)
        with pytest.raises(AjpqError, match="cut"):
            load(cut)


def test_every_flipped_byte_is_noticed(small: tuple[Path, bytes], tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    bad = tmp_path / "bad"
    bad.write_bytes(small[1])
    with bad.open("r+b", buffering=0) as file:
        for n, byte in enumerate(small[1]):
            os.pwrite(file.fileno(), bytes([byte ^ int(random.integers(1, 256))]), n)
            with pytest.raises(AjpqError, match="bad"):
                load(bad)
            os.pwrite(file.fileno(), bytes([byte]), n)
    assert_same(load(bad), load(small[0]))


def _edit(parts: dict[str, Tensor], change) -> dict[str, Tensor]:
    """The parts with another header, as a forger would write it."""
    header = json.loads(zlib.decompress(parts["header"].numpy().tobytes()))
    header = change(header) or header
    return parts | {
        "header": torch.frombuffer(bytearray(zlib.compress(json.dumps(header).encode())), dtype=torch.uint8)
    }


def _set(*path_and_value):
    *path, last, value = path_and_value

    def change(header: dict) -> None:
        for key in path:
            header = header[key]
        header[last] = value

    return change


FORGED = {
    "newer version": (_set("version", 2), "version 1 or older, but this has 2; update"),
    "no format": (_set("format", "zip"), "header that says ajpq"),
    "a list": (lambda header: [header], "header that says ajpq"),
    "a text as version": (_set("version", "1"), "header that says ajpq"),
    "deep": (_set("nodes", 1, 2, 0, functools.reduce(lambda v, _: ["list", v], range(400), 1)), "well formed"),
    "method of a module": (
        lambda h: h["nodes"].__setitem__(
            slice(-1, None), [["get_attr", "stem.forward", []], ["output", "", [["node", 1]]]]
        ),
        "tensors only",
    ),
    "no nodes": (lambda header: header.pop("nodes") and None, "well formed"),
    "one module less": (lambda header: header["modules"].pop() and None, "well formed"),
    "another class": (_set("modules", 0, ["system", {}]), "layer of torch.nn"),
    "huge layer": (_set("modules", 0, 1, [10**12, 3, 3, 3]), "end early"),
    "negative layer": (_set("modules", 0, 1, [-4, 3, 3, 3]), "end early"),
    "a bias more": (_set("modules", 0, 4, 1), "end early"),
    "wide scale": (_set("modules", 0, 3, [8, 1, "00" * 5]), "well formed"),
    "hostile node": (_set("nodes", 1, 1, "a\nimport os"), "path of a module"),
    "hostile function": (
        lambda h: [n.__setitem__(1, "os.system") for n in h["nodes"] if n[0] == "call_function"] and None,
        "os.system",
    ),
    "tensor": (_set("tensors", 0, ["load", [3]]), "well formed"),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_headers_are_refused(name: str, small: tuple[Path, bytes], tmp_path: Path) -> None:
    change, says = FORGED[name]
    (tmp_path / FILE).write_bytes(to_bytes(_edit(safetensors.torch.load(small[1]), change)))
    with pytest.raises(AjpqError, match=says) as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["header", "widths", "codes", "scale", "bias", "affine", "raw", "other"])
def test_parts_that_do_not_fit_are_refused(part: str, small: tuple[Path, bytes]) -> None:
    parts = safetensors.torch.load(small[1])
    more = torch.cat([parts[part], parts[part][:2]])
    for wrong in (parts[part][:-1], more, parts[part].to(torch.int32), parts[part][None]):
        with pytest.raises(AjpqError):
            unpack(parts | {part: wrong})
    with pytest.raises(AjpqError):
        unpack({k: v for k, v in parts.items() if k != part})
    with pytest.raises(AjpqError, match="flat"):
        unpack(parts | {"more": torch.zeros(1)})


def test_widths_and_codes_out_of_range_are_refused(small: tuple[Path, bytes]) -> None:
    parts = safetensors.torch.load(small[1])
    with pytest.raises(AjpqError, match="1 to 9"):
        unpack(parts | {"widths": parts["widths"] | 15})
    with pytest.raises(AjpqError, match="grid"):
        unpack(parts | {"codes": torch.full_like(parts["codes"], 255)})


def test_bombs_are_not_inflated(small: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ajpq.bitstream.LIMIT", 100)
    with pytest.raises(AjpqError, match="at most 100 bytes"):
        unpack(safetensors.torch.load(small[1]))


def test_other_files_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(AjpqError, match="nowhere.*cannot be read"):
        load(tmp_path / "nowhere")
    with pytest.raises(AjpqError, match="cannot be read"):
        load(tmp_path)
    for name, data in {
        "text": b"hello, this is not a network\n",
        "empty": b"",
        "zip": b"PK\3\4" + bytes(100),
        "tensors": safetensors.torch.save({"a": torch.zeros(3)}),
    }.items():
        (tmp_path / name).write_bytes(data)
        for read in (load, read_header, describe):
            with pytest.raises(AjpqError, match=f"{name}.*(not; check the path|breaks off)"):
                read(tmp_path / name)


def _change(name: str, layer: FrozenLayer) -> None:
    match name:
        case "bias":
            layer.bias += 1e-5
        case "weight":
            layer.weight[0, 0, 0, 0] += 1
        case "codes":
            layer.codes[(layer.bits == 2).nonzero()[0, 0]] = 7
        case "bits":
            layer.bits[0] = 0
        case "scale":
            layer.scale[0] = math.nan
        case "raw":
            layer.raw = layer.raw.double()


@pytest.mark.parametrize("name", ["bias", "weight", "codes", "bits", "scale", "raw"])
def test_layers_that_would_come_back_different_are_refused(name: str, tmp_path: Path) -> None:
    network = finish(nn.Sequential(nn.Conv2d(3, 40, 3)))
    _change(name, network.get_submodule("0"))
    with pytest.raises(AjpqError):
        ship(network, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_networks_that_are_not_finished_are_refused(tmp_path: Path) -> None:
    network = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 1)))
    weight, act = torch.rand(4, 3, 1, 1), ActQuant(8, True, torch.ones(()), learned=True)
    network.set_submodule("0", QuantLayer(weight, None, torch.full((4,), 4), torch.ones(4), Geometry(True), act))
    with pytest.raises(AjpqError, match="0 still learns; freeze"):
        ship(network, tmp_path / "new")
    with pytest.raises(AjpqError, match="Sequential"):
        ship(nn.Sequential(), tmp_path / "new")
    with pytest.raises(AjpqError, match="extra"):
        ship(finish(nn.Sequential(nn.Conv2d(3, 4, 1))), tmp_path / "new", {"a": object()})
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = finish(nn.Sequential(nn.Conv2d(3, 4, 1)))
    old = ship(network, tmp_path).read_bytes()

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    for folder in (tmp_path, tmp_path / "a" / "b"):
        with pytest.raises(AjpqError, match="No space left"):
            ship(network, folder, {"new": True})
    assert [p.name for p in tmp_path.iterdir()] == [FILE] and (tmp_path / FILE).read_bytes() == old
    with pytest.raises(AjpqError, match="choose another"):
        ship(network, tmp_path / FILE / "below")


def test_describe_lists_layers_and_bytes(small: tuple[Path, bytes]) -> None:
    text = describe(small[0])
    assert "12x1x3x5" in text and "27" in text and f"{len(small[1]):,} bytes" in text and " x 32" in text


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], end: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), kind(6, 4, batch_first=True, bidirectional=True), nn.Linear(8, 5)
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.c(self.b(F.relu(self.a(x)).mean(2).transpose(1, 2))[0].mean(1)))


@pytest.mark.parametrize("kind", (nn.LSTM, nn.GRU, nn.RNN))
def test_recurrent_networks_are_shipped(kind, tmp_path: Path) -> None:
    x = torch.randn(4, 3, 8, 8)
    network = trace(Recurrent(kind, nn.ReLU()).eval(), x)
    check(network)
    final = freeze(compress(network, CompressionPolicy.homogeneous(network, 4, 8), calibrate(network, [(x, None)])))
    assert torch.equal(load(ship(final, tmp_path))(x), final(x))


@torch.fx.wrap
def tripled(x: Tensor) -> Tensor:
    return x * 3


class Tripled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return tripled(x)


@pytest.mark.parametrize(
    "end, told",
    (
        (Tripled(), "calls test_ship.tripled"),
        (nn.Sequential(nn.Unflatten(1, (1, 5)), nn.TransformerEncoderLayer(5, 1).eval()), "end.1"),
    ),
)
def test_what_cannot_be_shipped_is_known_before_a_search(end: nn.Module, told: str) -> None:
    with pytest.raises(AjpqError, match=told):
        check(trace(Recurrent(nn.GRU, end).eval(), torch.randn(4, 3, 8, 8)))
