"""One optimizer step against its closed form, the schedule, distillation, batch-norm statistics, and real training."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ajpq.averaging import Average
from ajpq.data import digits
from ajpq.errors import AjpqError
from ajpq.loaders import Beside
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
    """`out_scale` is a step size by its module, not by its name; `in_scale` is not."""

    parameter_kinds = {"out_scale": "steps"}

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))
        self.bias = nn.Parameter(torch.ones(4))
        self.out_scale = nn.Parameter(torch.ones(4, 1))
        self.in_scale = nn.Parameter(torch.ones(1, 3))

    def forward(self, x):
        return x @ (self.weight * self.out_scale * self.in_scale).T + self.bias


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


def test_first_step_of_adam_moves_every_weight_by_the_learning_rate_against_its_gradient():
    model, batches, lr = linear(), toy(), 0.01
    before, (x, y) = model.weight.detach().clone(), batches[0]
    grad = (F.softmax(model(x), 1) - F.one_hot(y, 4)).T.detach() @ x / 8
    fit(model, batches, epochs=1, lr=lr, optimizer="adam", weight_decay=0.5, warmup=0)
    assert torch.allclose(model.weight, before * (1 - lr * 0.5) - lr * grad.sign(), atol=1e-6)


def test_only_matrices_decay_and_scales_learn_at_their_own_rate():
    model = Scaled()
    x, y = torch.zeros(4, 3), torch.arange(4)  # symmetric targets: every gradient is zero, decay alone remains
    fit(model, [(x, y)], epochs=1, lr=0.1, momentum=0.0, weight_decay=0.5, warmup=0)
    assert torch.allclose(model.weight, torch.full((4, 3), 0.95))
    assert torch.allclose(model.bias, torch.ones(4)) and torch.equal(model.out_scale, torch.ones(4, 1))
    assert torch.allclose(model.in_scale, torch.full((1, 3), 0.95))
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
    assert all(set(row) == {"epoch", "loss", "train_accuracy", "seconds", "lr", "skipped"} for row in rows)
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
        fit(linear(), [x, y, (bad[0] * float("nan"), bad[1])], epochs=3, lr=0.1, max_skips=0)


class Turns:
    """Another list of batches in every epoch."""

    def __init__(self, *epochs):
        self.epochs, self.now = epochs, 0

    def __len__(self):
        return len(self.epochs[0])

    def __iter__(self):
        self.now += 1
        return iter(self.epochs[self.now - 1])


def states(model, batches, epochs, **settings):
    """Rows of a training, and the parameters and buffers after each epoch."""
    seen = []
    rows = fit(
        model, batches, epochs=epochs, lr=0.1, **settings,
        on_epoch=lambda *_: seen.append({name: t.clone() for name, t in model.state_dict().items()}),
    )  # fmt: skip
    return rows, seen


def test_a_step_with_a_loss_that_is_not_finite_is_skipped_and_leaves_the_weights_untouched():
    (good,) = toy()
    bad = (good[0] * math.nan, good[1])
    model = nn.Sequential(linear(), nn.BatchNorm1d(4))
    rows, seen = states(model, Turns([good], [bad], [good]), 3, ema=0.9)
    assert [row["skipped"] for row in rows] == [0, 1, 0] and math.isfinite(rows[2]["loss"])
    for name, _ in model.named_parameters():
        assert torch.equal(seen[0][name], seen[1][name]) and not torch.equal(seen[1][name], seen[2][name])
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


class Root(Classification):
    """A finite loss whose gradient is not, at outputs of 0."""

    def losses(self, outputs, targets):
        return outputs.square().sum(1).sqrt()


@pytest.mark.parametrize("accumulate", (1, 2))
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped(accumulate):
    model = linear()
    for p in model.parameters():
        nn.init.zeros_(p)
    rows = fit(model, toy(6), epochs=1, lr=0.1, task=Root(), clip_grad=1.0, accumulate=accumulate)
    assert rows[0]["skipped"] == 6 // accumulate and not any(p.any() for p in model.parameters())
    with pytest.raises(AjpqError, match="at most max_skips=2 steps in a row.*step 2,"):
        fit(model, toy(6), epochs=1, lr=0.1, task=Root(), max_skips=2)


@pytest.mark.parametrize("sizes", ([8, 8, 8, 8], [8, 8, 3, 5, 7]), ids=["even", "uneven"])
def test_accumulated_batches_are_one_larger_batch(sizes):
    (x, y), (teacher, one, other) = toy(n=sum(sizes))[0], (linear(s) for s in (1, 0, 0))
    parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
    pairs = [tuple(map(torch.cat, zip(*parts[i : i + 2], strict=True))) for i in range(0, len(parts), 2)]
    settings = {"epochs": 4, "lr": 0.5, "teacher": teacher, "clip_grad": 0.2}
    small, large = fit(one, parts, **settings, accumulate=2), fit(other, pairs, **settings)
    assert torch.allclose(one.weight, other.weight, atol=1e-6) and not torch.allclose(one.weight, linear().weight)
    for name in ("loss", "train_accuracy", "lr"):
        assert [row[name] for row in small] == pytest.approx([row[name] for row in large], rel=1e-5)


def test_average_of_a_linear_drift_lags_by_a_constant():
    model, decay = linear(), 0.8
    average = Average(model, decay)
    with torch.no_grad():
        for _ in range(200):
            model.weight += 0.01
            average.update()
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    average.apply()
    assert torch.allclose(weight - model.weight, torch.full_like(weight, 0.01 * decay / (1 - decay)), atol=1e-4)
    assert torch.equal(model.bias, bias)


def test_training_ends_with_the_average_of_its_steps():
    start, model = linear(), linear()
    _, seen = states(model, toy(), 12, ema=0.5)  # one step an epoch
    mean = start.weight.detach().clone()
    for n, state in enumerate(seen):
        decay = min(0.5, (1 + n) / (10 + n))
        mean = decay * mean + (1 - decay) * state["weight"]
    assert torch.allclose(model.weight, mean, atol=1e-6) and not torch.allclose(mean, seen[-1]["weight"])


def test_a_change_begins_momentum_and_average_again():
    """After it, the rest of a training without a schedule is that of the weights as they are."""

    def change(step, steps):
        if step != 1:
            return []
        with torch.no_grad():
            model.weight.zero_()
        return list(model.parameters())

    model = linear()
    _, seen = states(model, toy(), 2, ema=0.9, change=change, weight_decay=0.0, warmup=0)
    x, y = toy()[0]
    bias = seen[0]["bias"]
    grad = (F.softmax(bias.expand(8, 4), 1) - F.one_hot(y, 4)).T @ x / 8
    assert torch.allclose(seen[1]["weight"], -0.05 * 1.9 * grad, atol=1e-6)  # half way down the cosine
    assert torch.allclose(model.weight, 0.9 * seen[1]["weight"], atol=1e-6)  # 1 - 1 / 10 of the way from zero


def test_bfloat16_is_close_to_float32():
    losses, weights = {}, {}
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        model = digits_cnn(width=4)
        losses[precision] = fit(model, digits(seed=0).train, epochs=1, lr=0.05, precision=precision)[0]["loss"]
        weights[precision] = model.conv1.weight.detach()
        assert weights[precision].dtype == torch.float32
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)
    assert not torch.equal(*weights.values()) and (weights["bfloat16"] - weights["float32"]).abs().max() < 0.05


class Interrupt(Exception):
    pass


class Hidden:
    """Batches of which nobody can tell how they draw their order."""

    def __init__(self, inner):
        self.inner = inner

    def __len__(self):
        return len(self.inner)

    def __iter__(self):
        return iter(self.inner)


def interrupt_after(epochs):
    def on_epoch(epoch, row):
        if epoch == epochs:
            raise Interrupt

    return on_epoch


@pytest.mark.parametrize("loader", ("digits", "adam", "torch", "torch_seeded", "hidden", "beside"))
def test_a_training_continued_ends_bit_equal(tmp_path, loader):
    settings = {"epochs": 3, "lr": 0.05, "ema": 0.9, "seed": 5, "accumulate": 2}
    if loader == "adam":
        settings, loader = {**settings, "lr": 0.002, "optimizer": "adam"}, "digits"
    if loader == "beside":
        settings["teacher"] = digits_cnn(width=2)
    path = tmp_path / "training.pt"

    def parts():
        torch.manual_seed(0)
        model = digits_cnn(width=2)
        model.linear = nn.Sequential(nn.Dropout(0.5), model.linear)
        if loader == "digits":
            return model, digits(seed=0, batch_size=200).train
        if loader == "beside":
            return model, Beside(digits(seed=0, batch_size=200).train, digits(seed=1, batch_size=300).train)
        if loader == "hidden":
            return model, Hidden(digits(seed=0, batch_size=200).train)
        batches = digits(seed=0, batch_size=200).calibration
        own = torch.Generator().manual_seed(3) if loader == "torch_seeded" else None
        images = torch.utils.data.TensorDataset(*(torch.cat(part) for part in zip(*batches, strict=True)))
        return model, torch.utils.data.DataLoader(images, 64, shuffle=True, generator=own)

    model, batches = parts()
    rows = fit(model, batches, **settings)
    broken, batches = parts()
    with pytest.raises(Interrupt):
        fit(broken, batches, **settings, checkpoint=path, on_epoch=interrupt_after(2))
    again, batches = parts()
    torch.manual_seed(99)
    epochs = []
    found = fit(again, batches, **settings, checkpoint=path, on_epoch=lambda epoch, _: epochs.append(epoch))
    assert epochs == [3] and not torch.equal(broken.conv1.weight, model.conv1.weight)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    assert [{**row, "seconds": 0} for row in found] == [{**row, "seconds": 0} for row in rows]
    finished, batches = parts()
    assert fit(finished, batches, **settings, checkpoint=path) == found  # the file of a whole training: nothing to do
    assert torch.equal(finished.conv1.weight, model.conv1.weight)


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    path = tmp_path / "training.pt"
    fit(linear(), toy(), epochs=2, lr=0.1, checkpoint=path)
    with pytest.raises(AjpqError, match="lr was 0.1 in .* and is 0.2"):
        fit(linear(), toy(), epochs=2, lr=0.2, checkpoint=path)
    with pytest.raises(AjpqError, match="network that it had"):
        fit(linear(features=3, classes=5), toy(), epochs=2, lr=0.1, checkpoint=path)
    images = torch.utils.data.TensorDataset(*toy()[0])
    with pytest.raises(AjpqError, match="0 generators and its batches have"):
        seeded = torch.utils.data.DataLoader(images, 8, shuffle=True, generator=torch.Generator())
        fit(linear(), seeded, epochs=2, lr=0.1, checkpoint=path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(AjpqError, match="cannot be read"):
        fit(linear(), toy(), epochs=2, lr=0.1, checkpoint=path)


@pytest.mark.parametrize("setting", [
    {"epochs": -1}, {"lr": 0.0}, {"lr": float("nan")}, {"lr": float("inf")}, {"warmup": 1.0}, {"temperature": 0.0},
    {"optimizer": "rprop"}, {"momentum": 1.0}, {"distill": 1.1}, {"clip_grad": 0.0}, {"precision": "float16"},
    {"accumulate": 0}, {"ema": 1.0}, {"max_skips": -1},
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


def test_images_without_labels_add_the_distance_from_the_teacher():
    (x, y), (u, _), teacher = *toy(2), linear(1)
    model, settings = linear(0), {"epochs": 1, "lr": 0.5, "warmup": 0.0, "distill": 0.3, "temperature": 2.0}
    weight = model.weight.detach().clone().requires_grad_()

    def outputs(images):
        return images @ weight.T + model.bias.detach()

    def soft(images):
        return F.kl_div(F.log_softmax(outputs(images) / 2, 1), F.log_softmax(teacher(images) / 2, 1),
                        log_target=True, reduction="batchmean") * 4  # fmt: skip

    (0.7 * F.cross_entropy(outputs(x), y) + 0.3 * (soft(x) + soft(u))).backward()
    wanted = weight.detach() - 0.5 * (1.9 * weight.grad + 1.9 * 5e-4 * weight.detach())  # the first Nesterov step
    rows = fit(model, Beside([(x, y)], [(u, y)]), teacher=teacher, **settings)
    assert torch.allclose(model.weight, wanted, atol=1e-6)
    again = linear(0)
    assert fit(again, [(x, y, u)], teacher=teacher, **settings)[0]["loss"] < rows[0]["loss"]  # a loader's own third


def test_images_without_labels_begin_anew_and_need_a_teacher():
    (labelled, other) = toy(5), toy(2, seed=1)
    found = list(Beside(labelled, other))
    assert len(found) == len(Beside(labelled, other)) == 5
    assert [next(i for i, (x, _) in enumerate(other) if x is u) for *_, u in found] == [0, 1, 0, 1, 0]
    assert all(x is a and y is b for (x, y, _), (a, b) in zip(found, labelled, strict=True))
    assert next(iter(Beside(labelled, [other[0][0]])))[2] is other[0][0]  # tensors, no pairs
    with pytest.raises(AjpqError, match="only with a teacher"):
        fit(linear(), Beside(labelled, other), epochs=1, lr=0.1)
    with pytest.raises(AjpqError, match="there is none: give batches"):
        fit(linear(), Beside(labelled, iter(other)), epochs=1, lr=0.1, teacher=linear(1))


def test_batch_norms_keep_nothing_of_images_without_labels():
    (x, y), g = (torch.randn(8, 3, 2, 2), torch.arange(8) % 3), torch.Generator().manual_seed(1)
    u = 50 + 9 * torch.randn(8, 3, 2, 2, generator=g)
    found = []
    for batches in ([(x, y)], Beside([(x, y)], [(u, y)])):
        model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 3))
        fit(model, batches, epochs=3, lr=0.0001, teacher=nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))
        found.append([model[0].running_mean, model[0].running_var, model[0].num_batches_tracked])
        assert model[0].track_running_stats
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
