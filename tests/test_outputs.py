"""The 8-bit quantizers behind convolutions whose outputs no layer's own quantizer rounds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from nets import conv, images_of, network_of, random_policy, traced
from torch import Tensor, nn
from torch.nn import functional as F

from ajpq.calibration import calibrate
from ajpq.compression import compress, freeze
from ajpq.finetuning import finetune
from ajpq.layers import ActQuant
from ajpq.onnx_graph import integer_graph
from ajpq.outputs import ends, quantize_outputs, quantized_by
from ajpq.policy import CompressionPolicy
from ajpq.shipping import load, ship


def student_of(network, images, act_bits=(8,), widths=(4,)):
    return compress(network, random_policy(network, 0, 0.2, widths, act_bits), calibrate(network, [(images, None)]))


def quantizers(network) -> dict[str, ActQuant]:
    return {name: part for name, part in network.named_children() if isinstance(part, ActQuant)}


def test_they_stand_where_no_layer_alone_reads() -> None:
    parts = {"a": conv(3, 6), "b": conv(6, 6), "c": conv(6, 6), "d": nn.Linear(6, 4)}

    def forward(m, x):
        a = m.a(x).relu()  # read by b and by the sum
        b = nn.functional.max_pool2d(m.b(a).relu(), 3, 1, 1)  # read by c alone, behind a pooling
        return m.d((a + m.c(b)).mean((2, 3)))  # d is linear, and its output the network's

    network, images = traced(forward, **parts), torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    student = student_of(network, images)
    quantize_outputs(student, images)
    reads = {str(node.args[0]) for node in student.graph.nodes if node.target in quantizers(student)}
    assert reads == {"relu", "c"} and [act.signed for act in quantizers(student).values()] == [False, True]
    assert all(quantized_by(student, end) is not None for end in ends(student))
    before = str(student.graph)
    quantize_outputs(student, images)
    assert str(student.graph) == before  # they are there already


@pytest.mark.parametrize("act_bits", [(32,), (8,)])
def test_float_activations_need_none(act_bits) -> None:
    network, images = network_of("resnet20"), images_of("resnet20", 4)
    student = student_of(network, images, act_bits)
    quantize_outputs(student, images)
    assert len(quantizers(student)) == (10 if act_bits == (8,) else 0)  # the first layer, and one in nine blocks


def in_place(m, x):
    y = m.a(x).relu_()
    z = m.b(y)
    z += y
    return m.c(z.relu_()).flatten(1)


@pytest.mark.parametrize("name", ["resnet20", "in place"])
def test_they_learn_are_finished_and_shipped(name: str, tmp_path: Path) -> None:
    network, images = network_of("resnet20"), images_of("resnet20", 4, seed=1)
    if name == "in place":
        network = traced(in_place, a=conv(3, 6), b=conv(6, 6), c=nn.Conv2d(6, 4, 8))
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    student = student_of(network, images)
    quantize_outputs(student, images)
    start = {key: act.scale.item() for key, act in quantizers(student).items()}
    final = finetune(student, [(images, torch.arange(4))], epochs=1, lr=0.05, norm_batches=1, warmup=0.0)
    learned, fixed = quantizers(student), quantizers(final)
    assert learned.keys() == fixed.keys() == start.keys() and len(fixed) == (10 if name == "resnet20" else 2)
    assert all(learned[key].scale.item() != start[key] for key in start)
    assert all(fixed[key].scale.item() == learned[key].scale.item() for key in fixed)
    assert not any(parameter.requires_grad for parameter in final.parameters())
    ship(final, tmp_path)
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(images), final(images))


def test_outputs_are_rounded_to_256_values_at_most() -> None:
    network, images = network_of("resnet20"), images_of("resnet20", 8)
    student = student_of(network, images)
    with torch.no_grad():
        before = student(images)
        quantize_outputs(student, images)
        after, seen = student(images), []
        first = next(iter(quantizers(student).values()))
        first.register_forward_hook(lambda _, x, y: seen.append((x[0], y)))
        student(images)
    (x, y), step = seen[0], first.scale.item()
    assert 16 < len(y.unique()) <= 256 and 0 < (y - x).abs().mean() <= step / 4
    codes = (y / step).numpy()
    assert np.abs(codes - codes.round()).max() < 1e-3
    assert 0 < (after - before).abs().max() < 0.2 * before.abs().max()


def test_a_bias_of_integers_is_whole() -> None:
    network, images = network_of("digits_cnn"), images_of("digits_cnn", 8)
    final = freeze(student_of(network, images, widths=(2, 4, 8)))
    for node in final.graph.nodes:
        layer = final.get_submodule(node.target) if node.op == "call_module" else None
        if hasattr(layer, "unit"):
            units = layer.shift / layer.unit
            assert (units - units.round()).abs().max() <= 1e-6 * units.abs().max().clamp(min=1)
            assert ((layer.shift - layer.bias).abs() <= 0.5001 * layer.unit).all() and layer.unit.min() > 0


def test_sums_of_integers_do_not_depend_on_their_order() -> None:
    network, images = network_of("resnet20"), images_of("resnet20", 8, seed=2)
    student = student_of(network, images, widths=(4, 8))
    quantize_outputs(student, images)
    final = freeze(student)
    with torch.no_grad():
        whole, single = final(images), torch.cat([final(image[None]) for image in images])
        last = final(images.contiguous(memory_format=torch.channels_last))
    assert torch.equal(whole, single) and torch.equal(whole, last)


def test_behind_a_batch_norm_that_is_not_folded_nothing_more_is_rounded() -> None:
    """A convolution and its norm that run twice: the quantizer belongs behind the convolution."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        z = F.relu(m.bn(m.s(y)))
        return m.l((y + z + F.relu(m.bn(m.s(z)))).mean((2, 3)))

    network = traced(run, (3, 8, 8), a=conv(3, 8), s=conv(8, 8), bn=nn.BatchNorm2d(8), l=nn.Linear(8, 4))
    x = torch.randn(32, 3, 8, 8)
    batches = [(x, torch.zeros(32, dtype=torch.int64))]
    student = compress(network, CompressionPolicy.homogeneous(network, 8, 8), calibrate(network, batches))
    final = finetune(student, batches, epochs=0)
    with torch.no_grad():
        torch.testing.assert_close(integer_graph(final, x)(x), final(x), rtol=1e-4, atol=1e-5)
