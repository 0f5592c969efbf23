"""Policies: plain data with a stable name, and errors that name the layer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import conv, network_of, random_policy, traced
from torch import nn
from torch.nn import functional as F

from ajpq.errors import AjpqError
from ajpq.policy import CompressionPolicy

ROOT = Path(__file__).resolve().parent.parent


def small():
    return traced(
        lambda m, x: (lambda y: m.l((F.relu(m.b(y)) + y).mean((2, 3))))(m.a(x)),
        a=conv(3, 6),
        b=conv(6, 6),
        l=nn.Linear(6, 5),
    )


def changed(policy: CompressionPolicy, weights: dict | None = None, acts: dict | None = None) -> CompressionPolicy:
    return CompressionPolicy({**policy.weight_bits, **(weights or {})}, {**policy.act_bits, **(acts or {})})


def equal(a: CompressionPolicy, b: CompressionPolicy) -> bool:
    return (
        dict(a.act_bits) == dict(b.act_bits)
        and a.weight_bits.keys() == b.weight_bits.keys()
        and all(
            np.array_equal(a.weight_bits[n], b.weight_bits[n]) and a.weight_bits[n].dtype == b.weight_bits[n].dtype
            for n in a.weight_bits
        )
    )


@pytest.mark.parametrize("name", ("digits_cnn", "shufflenet_v2_x0_5"))
def test_json_round_trip(name):
    policy = random_policy(network_of(name), 0, act_bits=(1, 4, 8, 32))
    again = CompressionPolicy.from_json(policy.to_json())
    assert equal(policy, again) and policy.digest() == again.digest()
    again.validate(network_of(name))
    table = json.loads(policy.to_json())
    assert set(table) == {"weight_bits", "act_bits"} and all(
        isinstance(b, int) for bits in table["weight_bits"].values() for b in bits
    )


def test_the_digest_is_stable_across_processes_and_insertion_order(tmp_path):
    policy = random_policy(network_of("digits_cnn"), 1, act_bits=(4, 8))
    turned = CompressionPolicy(dict(reversed(policy.weight_bits.items())), dict(reversed(policy.act_bits.items())))
    wide = CompressionPolicy(
        {n: b.astype(np.int64) for n, b in policy.weight_bits.items()},
        {n: np.int64(b) for n, b in policy.act_bits.items()},
    )
    assert policy.digest() == turned.digest() == wide.digest()
    (tmp_path / "policy.json").write_text(policy.to_json())
    code = (
        "import sys; from ajpq.policy import CompressionPolicy; "
        "print(CompressionPolicy.from_json(open(sys.argv[1]).read()).digest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "policy.json")], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == policy.digest(), done.stderr


def test_the_digest_sees_every_number():
    network = small()
    policy = CompressionPolicy.homogeneous(network, 4, 8)
    other = policy.weight_bits["b"].copy()
    other[5] = 3
    swapped = {"a": policy.weight_bits["b"].copy(), "b": other}
    digests = {
        p.digest()
        for p in (
            policy,
            changed(policy, {"b": other}),
            changed(policy, {"b": other[::-1]}),
            changed(policy, swapped),
            changed(policy, {"a": other}),
            changed(policy, acts={"a": 7}),
            changed(policy, acts={"b": 7}),
        )
    }
    assert len(digests) == 6  # `swapped` is `other` in b again


def test_homogeneous_and_mean_bits():
    network = small()
    original = CompressionPolicy.homogeneous(network)
    original.validate(network)
    assert (
        {b for bits in original.weight_bits.values() for b in bits.tolist()} == {32} == set(original.act_bits.values())
    )
    assert changed(original, {"a": np.zeros(6, np.uint8)}).mean_bits() == pytest.approx(32 * 11 / 17)
    assert original.alive(network).all()


def test_every_rule_names_the_layer():
    network = small()
    good = CompressionPolicy.homogeneous(network, 4, 8)
    good.validate(network)

    def bits(*values):
        return np.array(values, np.uint8)

    cases = (
        (
            CompressionPolicy({k: v for k, v in good.weight_bits.items() if k != "b"}, good.act_bits),
            "weight_bits .*'b' is missing",
        ),
        (
            CompressionPolicy(good.weight_bits, {k: v for k, v in good.act_bits.items() if k != "b"}),
            "act_bits .*'b' is missing",
        ),
        (changed(good, {"z": bits(4)}), "'z' is not a layer"),
        (changed(good, acts={"z": 4}), "'z' is not a layer"),
        (changed(good, {"b": bits(4, 4)}), r"'b' has 6 kernels and \(2,\) widths"),
        (changed(good, {"b": bits(4, 4, 4, 4, 4, 9)}), "'b' has a kernel of 9 bits"),
        (changed(good, {"b": bits(4, 4, 4, 4, 4, 16)}), "'b' has a kernel of 16 bits"),
        (changed(good, acts={"b": 0}), "act_bits .*'b' has 0"),
        (changed(good, acts={"b": 12}), "act_bits .*'b' has 12"),
        (changed(good, {"l": bits(4, 4, 0, 4, 4)}), "kernel 2 of 'l' is not .*network output"),
        (changed(good, {"b": bits(4, 0, 4, 4, 4, 4)}), "kernel 1 of 'a' has 4 bits while another of a, b has 0"),
        (changed(good, {"a": bits(4, 0, 4, 4, 4, 4)}), "kernel 1 of 'b' has 4 bits while another of a, b has 0"),
        (changed(good, {"a": bits(*[0] * 6), "b": bits(*[0] * 6)}), "'a' keeps no kernel"),
    )
    for policy, text in cases:
        with pytest.raises(AjpqError, match=text) as caught:
            policy.validate(network)
        assert "\n" not in str(caught.value) and ";" in str(caught.value)
    changed(good, {"a": bits(4, 0, 4, 4, 4, 4), "b": bits(1, 0, 32, 8, 4, 4)}).validate(network)


def test_a_layer_without_inputs_is_refused():
    network = traced(
        lambda m, x: (lambda y: m.l((m.b(y[:, :3]) + m.c(y[:, 3:])).mean((2, 3))))(m.a(x)),
        a=conv(3, 6),
        b=conv(3, 4),
        c=conv(3, 4),
        l=nn.Linear(4, 5),
    )
    policy = changed(CompressionPolicy.homogeneous(network, 4), {"a": np.array([0, 0, 0, 4, 4, 4], np.uint8)})
    with pytest.raises(AjpqError, match="'b' keeps no input channel"):
        policy.validate(network)


def test_a_tensor_without_channels_is_refused():
    """Most operations of torch do not take a tensor of no channels, even where all layers around it keep some."""
    network = traced(
        lambda m, x: (lambda y: m.l(torch.cat([F.max_pool2d(y[:, :2], 8), F.avg_pool2d(y[:, 2:], 8)], 1).flatten(1)))(
            m.a(x)
        ),
        a=conv(3, 6),
        l=nn.Linear(6, 5),
    )
    policy = changed(CompressionPolicy.homogeneous(network, 4), {"a": np.array([0, 0, 4, 4, 4, 4], np.uint8)})
    with pytest.raises(AjpqError, match="output of 'getitem' keeps none of its 2; prune fewer kernels of a"):
        policy.validate(network)


@pytest.mark.parametrize(
    "text",
    (
        "",
        "[]",
        "{",
        '{"weight_bits": {}}',
        '{"weight_bits": {"a": 3}, "act_bits": {}}',
        '{"weight_bits": 1, "act_bits": 2}',
        '{"weight_bits": {"a": [4, 300]}, "act_bits": {"a": 8}}',
        '{"weight_bits": {"a": [4]}, "act_bits": {"a": "x"}}',
        '{"weight_bits": {"a": [-1]}, "act_bits": {"a": 8}}',
        '{"weight_bits": {"a": [2.5]}, "act_bits": {"a": 8}}',
    ),
)
def test_damaged_files_are_refused(text):
    with pytest.raises(AjpqError) as caught:
        CompressionPolicy.from_json(text)
    assert "\n" not in str(caught.value)
