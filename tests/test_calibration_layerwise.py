"""Calibrated one layer at a time: the choice and the bits of the calibration in memory, whatever the architecture."""

import pytest
import torch
from calibration_inputs import data, lively
from test_calibration import CASES, inputs_for
from tiny_models import tiny

from hf_geglu.calibration import calibrate
from hf_geglu.calibration.layerwise import calibrate_layerwise
from hf_geglu.calibration.shelf import Shelf
from hf_geglu.errors import StreamError
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
    assert all(parameter.is_meta for name, parameter in empty.named_parameters() if "." in name)
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
    found, expected = layerwise(model, plan, given, tmp_path), calibrate(model, plan, given)
    if case != "t5":
        assert_same(found, expected)
        return
    # the encoder's output has gradients from several layers, which are added in another order
    assert found.fits.keys() == expected.fits.keys()
    for path, fit in expected.fits.items():
        one, other = ({**line.tensors(), "down": line.down} for line in (found.fits[path], fit))
        for name in ("a", "beta", "down"):  # the factors of a product may turn together
            if other[name] is not None:
                torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4)
    for one, other in zip(found.plan.converted, expected.plan.converted, strict=True):
        assert one.fit.method == other.fit.method
        assert one.fit.error == pytest.approx(other.fit.error, rel=1e-4)


def test_weights_are_read_four_times(tmp_path):
    """However many batches there are; and those of one layer at a time."""
    model = lively(tiny("llama")).eval()
    empty = skeleton(model.config, type(model), buffers=True)
    read = Reader(model)
    calibrate_layerwise(
        empty, make_plan(model), data(rows=32), read, found=find_sites(empty), shelf=Shelf(tmp_path, {})
    )
    up = [name for name in read.read if name.endswith("layers.1.mlp.up_proj.weight")]
    # forward of what is used and of what is held out, backward of both, and the converted model
    assert len(up) == 5
    assert len([name for name in read.read if "embed_tokens" in name]) == 3


def test_a_layer_that_is_called_again_and_again(tmp_path):
    """One block of ALBERT serves three layers; its sums are complete after the first of them."""
    model = lively(tiny("albert", hidden_act="silu", num_hidden_layers=3)).eval()
    plan = make_plan(model)
    assert_same(layerwise(model, plan, data(), tmp_path), calibrate(model, plan, data()))


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(16, 40), torch.nn.Linear(40, 16)
        self.act = torch.nn.SiLU()

    def forward(self, x):
        x += 0.1  # into what it is given
        return {"kept": (x + self.down(self.act(self.up(x))), None)}


class ReturnsASize(Layer):
    def forward(self, x):
        return {**super().forward(x), "size": torch.Size([1])}


class Odd(torch.nn.Module):
    """One layer is called twice with another between; what they return is nested."""

    layer = Layer

    def __init__(self, config=None):
        super().__init__()
        self.config = config
        self.embed = torch.nn.Embedding(64, 16)
        self.shift = torch.nn.Parameter(torch.full((16,), 0.1))
        self.layers = torch.nn.ModuleList([self.layer() for _ in range(2)])
        self.head = torch.nn.Linear(16, 64)

    def forward(self, input_ids):
        x = self.embed(input_ids) + self.shift
        for number in (0, 1, 0):
            x = self.between(self.layers[number](x)["kept"][0])
        return {"logits": self.predicted(x)}

    def between(self, x):
        return x * 1.5

    def predicted(self, x):
        return self.head(x)


class WritesBetween(Odd):
    def between(self, x):
        return x.mul_(1.5)


class ReadsItsHead(Odd):
    def predicted(self, x):
        return torch.nn.functional.linear(x @ self.head.weight.T, self.embed.weight.T) @ self.head.weight.mT


class ReadsALayer(Odd):
    def between(self, x):
        return x + self.layers[0].up.weight.mean()


class ReturnsAnObject(Odd):
    layer = ReturnsASize


@pytest.mark.parametrize("kind", [Odd, ReadsItsHead])
def test_a_layer_that_comes_back_after_another(tmp_path, kind):
    torch.manual_seed(0)
    model = lively(kind()).eval()
    plan = make_plan(model)
    assert_same(layerwise(model, plan, data(), tmp_path), calibrate(model, plan, data()))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (WritesBetween, "writes into what a layer returned"),
        (ReadsALayer, "reads the weights of a layer without calling it"),
        (ReturnsAnObject, "returns a Size, which cannot be kept on disk"),
    ],
)
def test_what_cannot_be_run_layer_by_layer_is_refused(tmp_path, kind, reason):
    torch.manual_seed(0)
    model = lively(kind()).eval()
    plan = make_plan(model)
    with pytest.raises(StreamError, match=reason):
        layerwise(model, plan, data(), tmp_path)
