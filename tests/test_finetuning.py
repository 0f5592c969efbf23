"""Fine-tuning: widths that come down, features that come closer, clipping values, and an interrupt on the way."""

import copy

import onnxruntime
import pytest
import torch
from nets import batches_of, conv, model_of, network_of, random_policy, traced
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ajpq import quantize
from ajpq.calibration import calibrate
from ajpq.compression import compress, freeze
from ajpq.data import digits
from ajpq.errors import AjpqError
from ajpq.features import Features, survivors
from ajpq.finetuning import finetune
from ajpq.frozen_norms import FrozenNorms
from ajpq.layers import ActQuant, Geometry, QuantLayer
from ajpq.lowering import Lowering
from ajpq.models import resnet20, skynet
from ajpq.onnx_export import to_onnx
from ajpq.outputs import quantize_outputs
from ajpq.pact import PactQuant, use_pact
from ajpq.padding import pad
from ajpq.policy import CompressionPolicy
from ajpq.recipe import check_settings
from ajpq.shipping import load, ship
from ajpq.step_sizes import fit_scale
from ajpq.tracing import trace
from ajpq.training import fit, recalibrate

NETWORK = network_of("digits_cnn")
POLICY = random_policy(NETWORK, 0, sparsity=0.3, act_bits=(3, 4))
BATCHES = batches_of(NETWORK, count=4, size=16)


def student(policy=POLICY):
    return compress(NETWORK, policy, calibrate(NETWORK, BATCHES))


def quantized(module):
    return {name: part for name, part in module.named_modules() if isinstance(part, QuantLayer)}


def widths(module):
    return torch.cat([part.bits for part in quantized(module).values()])


# -- operations that overwrite their input -----------------------------------------------------------------------------


@pytest.mark.parametrize("activation", (nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.ELU, nn.Mish))
def test_activations_may_overwrite_what_a_quantizer_gives(activation):
    model = nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), activation(inplace=True), conv(8, 8), nn.BatchNorm2d(8), activation(inplace=True)
    )
    network = traced(lambda m, x: m.head(m.body(x).mean((2, 3))), body=model, head=nn.Linear(8, 10))
    batches = batches_of(network, count=2, size=8)
    student = compress(network, CompressionPolicy.homogeneous(network, 4, 8), calibrate(network, batches))
    finished = finetune(copy.deepcopy(student), batches, epochs=1)
    x = batches[0][0]
    assert torch.isfinite(finished(x)).all() and not torch.equal(finished(x), freeze(student)(x))


@pytest.mark.parametrize("name", ("mobilenet_v3_small", "efficientnet_b0"))
def test_networks_that_overwrite_can_be_fine_tuned(name):
    network = network_of(name)
    batches = batches_of(network, count=1, size=4)
    student = compress(network, CompressionPolicy.homogeneous(network, 4, 8), calibrate(network, batches))
    finished = finetune(student, batches, epochs=1)
    assert torch.isfinite(finished(batches[0][0])).all()


# -- batch-norms -------------------------------------------------------------------------------------------------------


def statistics(module):
    return [t.clone() for name, t in module.named_buffers() if "running" in name]


def test_batch_norms_that_are_frozen_throughout_learn_scale_and_shift_alone():
    net = student()
    before = statistics(net)
    gains = [m.weight.clone() for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    finetune(net, BATCHES, epochs=2, lr=0.05, norm_batches=0, frozen_norms=1.0)
    assert before and all(map(torch.equal, statistics(net), before))
    learned = [m.weight for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(torch.equal(a, b) for a, b in zip(gains, learned, strict=True))


def test_workers_that_stay_give_frozen_norms_a_pass_of_their_own():
    """torch has one iterator of such a loader, which every `iter` begins anew: the epoch would have lost its place."""
    images, labels = (torch.cat(parts) for parts in zip(*BATCHES, strict=True))
    loader = DataLoader(TensorDataset(images, labels), 16, num_workers=1, persistent_workers=True)
    steps = []

    def at(step, count):
        steps.append((step, count))
        return frozen(step, count)

    net = copy.deepcopy(NETWORK.module).requires_grad_(True)
    frozen = FrozenNorms(net, 0.6, loader, 2)
    fit(net, loader, epochs=2, lr=0.01, change=at)
    assert steps == [(step, 2 * len(loader)) for step in range(2 * len(loader))]


def test_batch_norms_are_re_estimated_before_the_steps_in_which_they_are_frozen_and_not_after():
    net, seen = student(), []
    finetune(
        net, BATCHES, epochs=4, lr=0.05, norm_batches=4, frozen_norms=0.5, lowering=0.25,
        on_epoch=lambda *_: seen.append((statistics(net), copy.deepcopy(net))),
    )  # fmt: skip
    moved = [not all(map(torch.equal, a[0], b[0])) for a, b in zip(seen, seen[1:], strict=False)]
    assert moved == [True, True, False] and all(map(torch.equal, statistics(net), seen[-1][0]))
    recalibrate(seen[1][1], BATCHES)
    assert all(map(torch.equal, statistics(seen[1][1]), seen[2][0]))
    assert not torch.equal(seen[2][1].get_submodule(first_norm(net)).bias, net.get_submodule(first_norm(net)).bias)


def first_norm(module):
    return next(name for name, part in module.named_modules() if isinstance(part, nn.BatchNorm2d))


def test_without_norm_batches_and_steps_nothing_changes():
    net = student()
    x = BATCHES[0][0]
    reference = copy.deepcopy(net)
    quantize_outputs(reference, x)
    assert torch.equal(finetune(net, BATCHES, epochs=0, norm_batches=0)(x), freeze(reference)(x))


# -- lowering ---------------------------------------------------------------------------------------------------------


def test_widths_come_down_by_a_bit_at_a_time_to_those_of_the_policy():
    net = student()
    final = widths(net).int()
    lower = Lowering(net, share=0.5, lift=3)
    seen = {}
    for step in range(20):
        lower(step, steps=20)
        seen[step] = widths(net).int()
    for step, lift in {0: 3, 3: 3, 4: 2, 6: 2, 7: 1, 9: 1, 10: 0, 19: 0}.items():
        expected = torch.where(final < 8, (final + lift).clamp(max=8), final)
        assert torch.equal(seen[step], expected), step
    assert (final == 32).any() and (final == 1).any() and set(seen[0].tolist()) <= set(quantize.WIDTHS)


def test_a_kernel_has_its_step_size_fitted_when_its_width_changes_and_only_then():
    net = student()
    layer = next(part for part in quantized(net).values() if 0 < (part.bits < 8).sum() < len(part.bits))
    moving = layer.bits < 8
    with torch.no_grad():
        layer.scale.fill_(0.123)
    lower = Lowering(net, share=0.5, lift=1)
    assert any(scale is layer.scale for scale in lower(0, 10)) and lower(1, 10) == []
    fitted = fit_scale(layer.weight, layer.bits)
    assert torch.equal(layer.scale, torch.where(moving, fitted, torch.full_like(fitted, 0.123)))


def test_lowering_ends_at_the_policy_and_an_interrupt_leaves_its_widths():
    final, seen = widths(student()), []
    net = student()
    found = finetune(
        net, BATCHES, epochs=4, lr=0.01, lowering=0.5, ema=0.9, on_epoch=lambda *_: seen.append(widths(net).clone())
    )
    assert [torch.equal(bits, final) for bits in seen] == [False, False, True, True]
    assert torch.equal(torch.cat([part.bits for part in found.modules() if hasattr(part, "codes")]), final)

    def stop(epoch, row):
        raise KeyboardInterrupt

    net = student()
    with pytest.raises(KeyboardInterrupt):
        finetune(net, BATCHES, epochs=4, lr=0.01, lowering=0.5, on_epoch=stop)
    assert torch.equal(widths(net), final) and freeze(net)(BATCHES[0][0]).isfinite().all()


# -- features ---------------------------------------------------------------------------------------------------------


def test_survivors_are_the_channels_that_the_student_reads():
    kept, net = survivors(NETWORK, POLICY), student()
    names = [layer.name for layer in NETWORK.layers]
    assert names[-1] in kept and 1 < len(kept) < len(names)
    alive = POLICY.alive(NETWORK)
    for name, channels in kept.items():
        assert net.get_submodule(name).weight.shape[1] == len(channels) == alive[NETWORK[name].reads].sum()


def test_a_chain_is_compared_once_per_set_of_channels_and_a_block_at_its_end():
    chain = trace(skynet().eval(), torch.zeros(1, 3, 32, 64))
    names = [layer.name for layer in chain.layers]
    told = list(survivors(chain, CompressionPolicy.homogeneous(chain)))
    # what depthwise layers read, but the picture and what they make
    assert told == [name for name in names[2::2] if chain[name].kind == "depthwise"] + names[-1:]
    blocks = trace(resnet20().eval(), torch.zeros(1, 3, 32, 32))
    told = survivors(blocks, CompressionPolicy.homogeneous(blocks))
    assert {f"layer{i}.{j}.conv1" for i in (1, 2, 3) for j in range(3)} <= set(told)  # what a block makes
    assert {f"layer{i}.{j}.conv2" for i in (1, 2, 3) for j in range(3)} <= set(told)  # what is inside
    assert "conv1" not in told and not any("shortcut" in name for name in told)


def test_feature_loss_in_closed_form():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    kept = torch.tensor([0, 2, 3])
    small = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    small[0].weight.data, small[0].bias.data = teacher[0].weight.data[kept].clone(), teacher[0].bias.data[kept].clone()
    x = torch.randn(5, 3)
    with Features(small, teacher, {"2": kept}, weight=2.0) as features:
        small(x), teacher(x)
        assert features.loss().item() == 0
        with torch.no_grad():
            small[0].weight *= 3
            small[0].bias *= 3
        small(x), teacher(x)
        assert features.loss().item() == pytest.approx(2.0 * 2**2, rel=1e-5)  # (3 t - t)^2 / t^2
    assert not any(part._forward_pre_hooks for net in (small, teacher) for part in net.modules())


def distance(net, teacher, kept):
    with Features(net, teacher, kept, 1.0) as features, torch.no_grad():
        found = []
        for x, _ in BATCHES:
            net(x), teacher(x)
            found.append(features.loss().item())
    return sum(found) / len(found)


class ChannelsLast(nn.Module):
    """Linear layers over (N, H, W, C) between convolutions."""

    def __init__(self):
        super().__init__()
        self.a, self.p, self.q = nn.Conv2d(1, 8, 3), nn.Linear(8, 16), nn.Linear(16, 8)
        self.b, self.c = nn.Conv2d(8, 6, 3), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.a(x)).permute(0, 2, 3, 1)
        x = self.q(torch.relu(self.p(x))).permute(0, 3, 1, 2)
        return self.c(torch.relu(self.b(x)).mean((2, 3)))


def test_features_of_linear_layers_are_compared_by_their_channels():
    torch.manual_seed(0)
    net, x = ChannelsLast().eval(), torch.randn(8, 1, 9, 9)
    network = trace(net, x)
    policy = random_policy(network, 0, sparsity=0.5)
    kept = survivors(network, policy)
    assert {"p", "q"} <= set(kept)
    small = compress(network, policy, calibrate(network, [(x, None)]))
    with Features(small, net, kept, 1.0) as features:
        small(x), net(x)
        assert 0 < features.loss().item() < 10


def test_features_that_the_original_never_has_do_not_end_the_training():
    torch.manual_seed(0)
    dead = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    dead[0].bias.data.fill_(-100.0)
    small = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with Features(small, dead, {"2": torch.arange(4)}, weight=1.0) as features:
        small(torch.ones(5, 3)), dead(torch.ones(5, 3))
        loss = features.loss()
        loss.backward()
    assert loss.item() == 0 and all((p.grad is None) or (p.grad == 0).all() for p in small.parameters())


def test_distilled_features_come_closer():
    teacher, kept, found = model_of("digits_cnn"), survivors(NETWORK, POLICY), {}
    for weight in (0.0, 5.0):
        net = student()
        finetune(net, BATCHES, epochs=6, lr=0.02, teacher=teacher, features=weight, kept=kept)
        found[weight] = distance(net, teacher, kept)
    assert found[5.0] < 0.8 * found[0.0]


def test_features_need_a_teacher_and_the_channels():
    with pytest.raises(AjpqError, match="there is no teacher"):
        finetune(student(), BATCHES, epochs=1, features=1.0, kept=survivors(NETWORK, POLICY))
    with pytest.raises(AjpqError, match="kept= is missing"):
        finetune(student(), BATCHES, epochs=1, features=1.0, teacher=model_of("digits_cnn"))
    with pytest.raises(AjpqError, match="there is no teacher"):
        check_settings(features=1.0, distillation=False)


# -- activations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", (False, True))
def test_pact_has_the_values_of_the_quantizer_and_the_gradients_of_clipping(signed):
    act = ActQuant(4, signed, torch.tensor(0.1), learned=True)
    pact, x = PactQuant(act), torch.linspace(-3, 3, 101, requires_grad=True)
    low, high = (-0.8, 0.7) if signed else (0.0, 1.5)
    assert torch.allclose(pact(x), act(x), atol=1e-6) and pact.clip.item() == pytest.approx(high)
    pact(x).sum().backward()
    inside = (x >= low) & (x <= high)
    assert torch.equal(x.grad, inside.float())
    below = (x < low).sum().item() * low / high
    assert pact.clip.grad.item() == pytest.approx((x > high).sum().item() + below, rel=1e-5)


def test_pact_networks_train_freeze_and_keep_their_outputs():
    net, plain = student(), student()
    use_pact(net)
    x = BATCHES[0][0]
    assert torch.allclose(net(x), plain(x), atol=1e-4)
    net = student(random_policy(NETWORK, 2, sparsity=0.3, act_bits=(3, 4)))
    final = finetune(net, BATCHES, epochs=2, lr=0.02, activations="pact")
    assert any(isinstance(part, PactQuant) for part in net.modules())
    assert not any(isinstance(part, PactQuant) for part in final.modules())
    outputs = net.eval()(x)  # float16 and whole biases move some activations over a threshold
    assert (final(x) - outputs).abs().mean() < 0.2 * outputs.std()
    pairs = [(part, final.get_submodule(name)) for name, part in net.named_modules() if isinstance(part, PactQuant)]
    assert all(pact.scale.item() == act.scale.item() for pact, act in pairs)


def test_clipping_values_decay_and_step_sizes_do_not():
    for pact, factor in ((True, 1 - 0.1 * 0.5), (False, 1.0)):
        act = ActQuant(4, False, torch.tensor(100.0), learned=True)  # clips nothing, so only decay can move it
        layer = QuantLayer(
            torch.zeros(4, 3),
            None,
            torch.full((4,), 32),
            torch.ones(4),
            Geometry(conv=False),
            PactQuant(act) if pact else act,
        )
        x = torch.zeros(4, 3)
        fit(layer, [(x, torch.arange(4))], epochs=1, lr=0.1, momentum=0.0, weight_decay=0.5, warmup=0)
        assert layer.act.scale.item() == pytest.approx(100.0 * factor)


# -- parameters of no layer -------------------------------------------------------------------------------------------


def test_parameters_of_no_layer_learn_and_are_shipped(tmp_path):
    network = traced(
        lambda m, x: m.last(m.head(m.norm(m.slopes(m.b(m.slope(m.a(x))))).mul(m.gain).mean((2, 3)))),
        a=conv(3, 32), slope=nn.PReLU(), b=conv(32, 12), slopes=nn.PReLU(12), norm=nn.GroupNorm(3, 12),
        gain=nn.Parameter(torch.ones(12, 1, 1)), head=nn.Linear(12, 10), last=nn.LayerNorm(10),
    )  # fmt: skip
    others = ("slope.weight", "slopes.weight", "norm.weight", "norm.bias", "gain", "last.weight", "last.bias")
    before = copy.deepcopy(network.module.state_dict())
    batches, images = batches_of(network, count=3, size=16), batches_of(network, seed=9)[0][0]
    policy = random_policy(network, 0, 0.4, (2, 4, 8), (8,))
    net = compress(network, policy, calibrate(network, batches))
    assert all(p.requires_grad for p in net.parameters())
    final = finetune(net, batches, epochs=3, lr=0.05, teacher=network.module)
    learned = net.state_dict()
    for name in others:
        assert (learned[name] != before[name]).all(), name
        assert torch.equal(final.state_dict()[name], learned[name])
    assert not any(p.requires_grad for p in (*network.module.parameters(), *final.parameters()))
    assert all(torch.equal(before[name], tensor) for name, tensor in network.module.state_dict().items())

    ship(final, tmp_path)
    again, wide = load(tmp_path), pad(final, network, policy, 16)
    assert wide.a.codes.shape[0] > final.a.codes.shape[0]
    with torch.no_grad():
        told = final(images)
        assert torch.equal(again(images), told)
        torch.testing.assert_close(wide(images), told, rtol=1e-4, atol=1e-4)
    for loaded in (again, wide):
        assert all(torch.equal(loaded.state_dict()[name], learned[name]) for name in others)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    model = to_onnx(wide, batches[0][0])
    (found,) = onnxruntime.InferenceSession(model, options).run(None, {"images": images.numpy()})
    assert (torch.from_numpy(found) - told).abs().mean() < 0.02 * told.std()  # some codes turn
    for name in others:  # the comparisons are about what was learned
        reset = copy.deepcopy(final)
        reset.load_state_dict({**reset.state_dict(), name: before[name]})
        with torch.no_grad():
            assert (reset(images) - told).abs().max() > 1e-3, name


# -- together ---------------------------------------------------------------------------------------------------------


def test_bfloat16_trains_a_compressed_network_close_to_float32():
    losses = {}
    for precision in ("float32", "bfloat16"):
        rows = []
        finetune(
            student(), BATCHES, epochs=2, lr=0.01, precision=precision, lowering=0.5, teacher=model_of("digits_cnn"),
            on_epoch=lambda epoch, row, rows=rows: rows.append(row),
        )  # fmt: skip
        losses[precision] = [row["loss"] for row in rows]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.1) and losses["bfloat16"] != losses["float32"]


@pytest.mark.parametrize(("activations", "frozen"), [("lsq", 0.0), ("pact", 0.0), ("lsq", 0.5)])
def test_fine_tuning_continued_after_an_interrupt_ends_bit_equal(tmp_path, activations, frozen):
    settings = {
        "epochs": 3, "lr": 0.02, "teacher": model_of("digits_cnn"), "lowering": 0.8, "ema": 0.9, "norm_batches": 2,
        "frozen_norms": frozen, "features": 0.5, "kept": survivors(NETWORK, POLICY), "activations": activations,
    }  # fmt: skip

    def train():
        return digits(seed=0, batch_size=256).train

    def stop(epoch, row):
        raise KeyboardInterrupt

    whole = finetune(student(), train(), **settings).state_dict()
    path = tmp_path / "finetune.pt"
    with pytest.raises(KeyboardInterrupt):
        finetune(student(), train(), **settings, checkpoint=path, on_epoch=stop)
    again = finetune(student(), train(), **settings, checkpoint=path).state_dict()
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("setting", [
    {"lowering": 1.0}, {"lift": 0}, {"features": -1.0}, {"activations": "relu"}, {"ema": 1.5},
])  # fmt: skip
def test_settings_are_checked(setting):
    (name, value), *_ = setting.items()
    with pytest.raises(AjpqError, match=f"`.*{name}.*` must hold.*{name}={value}"):
        finetune(student(), BATCHES, epochs=1, teacher=model_of("digits_cnn"), **setting)
