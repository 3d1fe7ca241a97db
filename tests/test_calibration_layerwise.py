"""Calibrated one layer at a time: the choice and the bits of the calibration in memory, whatever the architecture."""

import pytest
import torch
from calibration_inputs import lively
from test_calibration import CASES, inputs_for
from tiny_models import tiny

from hf_geglu.calibration import calibrate
from hf_geglu.calibration.layerwise import calibrate_layerwise
from hf_geglu.calibration.shelf import Shelf
from hf_geglu.planning import make_plan
from hf_geglu.sites import find_sites
from hf_geglu.skeleton import skeleton


class Reader:
    """Reads tensors of a model, and knows which."""

    def __init__(self, model):
        self.state, self.read = model.state_dict(), []

    def __call__(self, names):
        self.read += names
        return {name: self.state[name].clone() for name in names if name in self.state}


def layerwise(model, plan, given, folder, **settings):
    empty = skeleton(model.config, type(model), buffers=True)
    assert all(parameter.is_meta for parameter in empty.parameters())
    made = calibrate_layerwise(
        empty, plan, given, Reader(model), found=find_sites(empty), shelf=Shelf(folder, {}), **settings
    )
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert not any("forward" in vars(module) or module._forward_hooks for module in empty.modules())
    return made


def assert_same(one, other):
    assert one.plan == other.plan
    assert one.held_out == other.held_out
    assert one.notes == other.notes
    assert one.fits.keys() == other.fits.keys()
    for path, fit in one.fits.items():
        tensors = other.fits[path].tensors()
        for name, tensor in fit.tensors().items():
            assert torch.equal(tensor, tensors[name]), (path, name)


@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_as_in_memory(case, tmp_path):
    model = lively(tiny(case, **CASES[case])).eval()
    plan, given = make_plan(model), inputs_for(case)
    assert_same(layerwise(model, plan, given, tmp_path), calibrate(model, plan, given))
