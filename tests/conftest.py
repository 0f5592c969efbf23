"""One thread per test process: parallel workers would otherwise fight for the cores. Every test begins with the same
seed and leaves shared networks alone: what another test finds would depend on the order. The exporter of torch reads
the table of all its operators for every file, a good third of the time of a small one: here it is read once."""

import functools

import pytest
import torch
from nets import forget_changed
from torch.onnx._internal.exporter._registration import ONNXRegistry

torch.set_num_threads(1)
ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))


@pytest.fixture(autouse=True)
def noise_is_the_same():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def shared_networks_stay_as_they_are():
    yield
    changed = forget_changed()
    assert not changed, f"network_of must be left as it is, but {', '.join(changed)} is not; change a copy"
