"""One optimizer step against its closed form, the schedule, distillation, batch-norm statistics, and real training."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ajpq.data import digits
from ajpq.errors import AjpqError
from ajpq.models import digits_cnn
from ajpq.tasks import Classification
from ajpq.training import accuracy, fit, recalibrate


def toy(batches=1, n=8, features=3, classes=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, features, generator=g), torch.randint(classes, (n,), generator=g)) for _ in range(batches)]


def linear(seed=0, features=3, classes=4):
    torch.manual_seed(seed)
    return nn.Linear(features, classes)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))
        self.bias = nn.Parameter(torch.ones(4))
        self.out_scale = nn.Parameter(torch.ones(4, 1))

    def forward(self, x):
        return x @ (self.weight * self.out_scale).T + self.bias


class Dropped(nn.Module):
    """Batch norm behind a dropout that would double every value, in eval mode none."""

    def __init__(self):
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm2d(3, momentum=0.3)

    def forward(self, x):
        return self.norm(self.drop(x)).mean((2, 3))


def test_accuracy_is_the_fraction_of_hits_over_all_images():
    x = torch.eye(4)
    batches = [(x, torch.tensor([0, 1, 2, 0])), (x[:1], torch.tensor([0]))]
    assert accuracy(nn.Identity(), batches) == pytest.approx(4 / 5)


def test_accuracy_uses_eval_mode_and_restores_each_mode():
    model = nn.Sequential(nn.Dropout(1.0), nn.Sequential(nn.Identity()))
    model[1].eval()
    assert accuracy(model, [(torch.eye(4), torch.arange(4))]) == 1.0
    assert [m.training for m in model.modules()] == [True, True, False, False]


def test_accuracy_needs_an_image():
    with pytest.raises(AjpqError, match="at least one image"):
        accuracy(nn.Identity(), [])


def test_recalibrate_gives_the_mean_over_batches_and_touches_nothing_else():
    model, g = Dropped().train(), torch.Generator().manual_seed(0)
    model.norm.running_mean.fill_(99)
    model.drop.eval()
    batches = [(torch.randn(16, 3, 2, 2, generator=g) * 3 + 5, None) for _ in range(4)]
    weights = [p.clone() for p in model.parameters()]
    recalibrate(model, batches)
    means = torch.stack([x.mean((0, 2, 3)) for x, _ in batches]).mean(0)
    variances = torch.stack([x.var((0, 2, 3)) for x, _ in batches]).mean(0)
    assert torch.allclose(model.norm.running_mean, means, atol=1e-5)
    assert torch.allclose(model.norm.running_var, variances, atol=1e-4)
    assert model.norm.momentum == 0.3 and [m.training for m in model.modules()] == [True, False, True]
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_recalibrate_puts_statistics_back_on_error():
    model = Dropped()
    model.norm.running_mean.fill_(7)

    def broken():
        yield torch.randn(4, 3, 2, 2), None
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, broken())
    with pytest.raises(AjpqError, match="at least one batch"):
        recalibrate(model, [])
    assert (model.norm.running_mean == 7).all() and model.norm.num_batches_tracked == 0 and model.norm.momentum == 0.3


def test_recalibrate_without_statistics_does_nothing():
    def never():
        raise AssertionError("the batches were read")
        yield

    recalibrate(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)), never())


def test_first_step_is_nesterov_sgd_in_closed_form():
    model, batches, lr, m = linear(), toy(), 0.1, 0.9
    before, (x, y) = model.weight.detach().clone(), batches[0]
    error = F.softmax(model(x), 1) - F.one_hot(y, 4)  # (8, 4)
    grad = error.T.detach() @ x / 8 + 0.01 * before  # weight decay is part of the gradient
    fit(model, batches, epochs=1, lr=lr, momentum=m, weight_decay=0.01, warmup=0)
    assert torch.allclose(model.weight, before - lr * (1 + m) * grad, atol=1e-6)


def test_only_matrices_decay_and_scales_learn_at_their_own_rate():
    model = Scaled()
    x, y = torch.zeros(4, 3), torch.arange(4)  # symmetric targets: every gradient is zero, decay alone remains
    fit(model, [(x, y)], epochs=1, lr=0.1, momentum=0.0, weight_decay=0.5, warmup=0)
    assert torch.allclose(model.weight, torch.full((4, 3), 0.95))
    assert torch.allclose(model.bias, torch.ones(4)) and torch.equal(model.out_scale, torch.ones(4, 1))
    steps = {}
    for scale_lr in (1.0, 0.25, 0.0):
        model = Scaled()
        fit(model, toy(), epochs=1, lr=0.1, momentum=0.0, weight_decay=0.0, warmup=0, scale_lr=scale_lr)
        steps[scale_lr] = (model.out_scale - 1).detach()
    assert (
        steps[1.0].abs().max() > 1e-3
        and torch.allclose(steps[0.25], steps[1.0] / 4, atol=1e-6)
        and not steps[0.0].any()
    )


def test_learning_rate_rises_linearly_and_falls_along_a_cosine():
    rows = fit(linear(), toy(), epochs=10, lr=2.0, warmup=0.4)
    expected = [0.5, 1.0, 1.5, 2.0] + [1 + math.cos(math.pi * i / 6) for i in range(6)]
    assert [row["lr"] for row in rows] == pytest.approx(expected)


def test_distillation_gradient_is_the_closed_form():
    model, teacher, (batch,) = linear(0), linear(1), toy()
    before, x, t = model.weight.detach().clone(), batch[0], 3.0
    fit(
        model,
        [batch],
        epochs=1,
        lr=0.1,
        momentum=0.0,
        weight_decay=0.0,
        warmup=0,
        teacher=teacher,
        distill=1.0,
        temperature=t,
    )
    with torch.no_grad():
        logits = x @ before.T + linear(0).bias
        grad = t * (F.softmax(logits / t, 1) - F.softmax(teacher(x) / t, 1)).T @ x / 8  # T^2 * (1/T)
    assert torch.allclose(model.weight, before - 0.1 * grad, atol=1e-6)


def test_the_teacher_stays_as_it_is():
    teacher = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).train()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    fit(linear(), toy(3), epochs=2, lr=0.1, teacher=teacher)
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    assert teacher.training and teacher[1].training and all(p.grad is None for p in teacher.parameters())


def test_clip_grad_bounds_the_whole_step():
    model = linear()
    before = torch.cat([p.detach().clone().flatten() for p in model.parameters()])
    fit(model, toy(), epochs=1, lr=1.0, momentum=0.0, weight_decay=0.0, warmup=0, clip_grad=1e-3)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (after - before).norm() == pytest.approx(1e-3, rel=1e-2)


def test_label_smoothing_reaches_the_loss():
    rows = [
        fit(linear(), toy(), epochs=1, lr=0.1, task=Classification(label_smoothing=s))[0]["loss"] for s in (0.0, 0.3)
    ]
    (x, y), model = toy()[0], linear()
    assert rows == pytest.approx([F.cross_entropy(model(x), y, label_smoothing=s).item() for s in (0.0, 0.3)])


def test_same_seed_same_weights_and_the_global_generator_is_put_back():
    def weights(seed):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.5), nn.Linear(16, 4))
        state = torch.get_rng_state()
        fit(model, toy(2), epochs=2, lr=0.1, seed=seed)
        assert torch.equal(state, torch.get_rng_state())
        return model[0].weight

    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))


def test_rows_and_callback():
    seen = []
    rows = fit(linear(), toy(3), epochs=2, lr=0.1, on_epoch=lambda epoch, row: seen.append((epoch, row)))
    assert seen == [(1, rows[0]), (2, rows[1])]
    assert all(set(row) == {"epoch", "loss", "train_accuracy", "seconds", "lr"} for row in rows)
    assert 0 <= rows[1]["train_accuracy"] <= 1 and rows[1]["seconds"] > 0 and rows[1]["loss"] < rows[0]["loss"]


def test_no_epochs_no_change():
    model = linear()
    assert fit(model, toy(), epochs=0, lr=0.1) == [] and torch.equal(model.weight, linear().weight)


def test_interrupt_passes_through_and_leaves_a_usable_model():
    model = digits_cnn(width=2).eval()
    before = model.conv1.weight.detach().clone()

    def stop(epoch, row):
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, [(torch.randn(8, 1, 8, 8), torch.arange(8))], epochs=5, lr=0.1, on_epoch=stop)
    assert not torch.equal(model.conv1.weight, before) and all(p.isfinite().all() for p in model.parameters())
    assert not any(m.training for m in model.modules()) and all(p.grad is None for p in model.parameters())


def test_frozen_parameters_do_not_move():
    model = linear()
    model.weight.requires_grad_(False)
    fit(model, toy(), epochs=2, lr=0.1)
    assert torch.equal(model.weight, linear().weight) and not torch.equal(model.bias, linear().bias)
    model.bias.requires_grad_(False)
    with pytest.raises(AjpqError, match="requires a gradient"):
        fit(model, toy(), epochs=1, lr=0.1)


def test_loss_that_is_not_finite_is_an_error_with_its_place():
    (x, y), bad = toy(2), toy(1)[0]
    with pytest.raises(AjpqError, match=r"nan at epoch 1, step 2, with lr=0.1: lower lr"):
        fit(linear(), [x, y, (bad[0] * float("nan"), bad[1])], epochs=3, lr=0.1)


@pytest.mark.parametrize("setting", [
    {"epochs": -1}, {"lr": 0.0}, {"lr": float("nan")}, {"lr": float("inf")}, {"warmup": 1.0}, {"temperature": 0.0},
    {"distill": 1.1}, {"clip_grad": 0.0},
])  # fmt: skip
def test_settings_are_checked(setting):
    (name, value), *_ = setting.items()
    with pytest.raises(AjpqError, match=f"`.*{name}.*` must hold.*{name}={value}"):
        fit(linear(), toy(), **{"epochs": 1, "lr": 0.1, **setting})


def test_batches_must_exist_and_be_iterable_again():
    with pytest.raises(AjpqError, match="epoch 1 has none"):
        fit(linear(), [], epochs=1, lr=0.1)
    with pytest.raises(AjpqError, match="iterated again"):
        fit(linear(), (batch for batch in toy()), epochs=1, lr=0.1)


def test_loader_without_a_length():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(toy(3))

    rows = fit(linear(), torch.utils.data.DataLoader(Stream(), batch_size=None), epochs=1, lr=1.0, warmup=0)
    assert rows[0]["lr"] == pytest.approx(0.5 * (1 + math.cos(math.pi * 2 / 3)))


def test_digits_recipe_reaches_97_percent():
    data = digits(seed=0)
    torch.manual_seed(0)
    model = digits_cnn()
    fit(model, data.train, epochs=12, lr=0.1)
    assert accuracy(model, data.test) >= 0.97
    state = model.state_dict()["layer2.0.bn1.running_mean"].clone()
    recalibrate(model, data.calibration)
    assert not torch.equal(state, model.layer2[0].bn1.running_mean) and accuracy(model, data.test) >= 0.96
