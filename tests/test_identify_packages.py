"""Units of other packages, as they are installed: nothing here knows them. Skipped where a package is not installed."""

import json
import subprocess
import sys

import pytest
from torch import nn

from benchmarks.zoo.extras import FOLDER
from hf_geglu import identify

DIFFUSERS = {
    # class of diffusers.models.activations: (family, activation, gate half)
    "GEGLU": ("geglu", "gelu", "last"),
    "SwiGLU": ("swiglu", "silu", "last"),
    "GELU": ("dense", "gelu", None),
    "ApproximateGELU": ("dense", "quick_gelu", None),
}


@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers(name):
    activations = pytest.importorskip("diffusers.models.activations", reason="not installed")
    seen = identify(getattr(activations, name)(16, 40))
    assert (seen.family, seen.activation, seen.gate_half) == DIFFUSERS[name]


def test_diffusers_blocks():
    attention = pytest.importorskip("diffusers.models.attention", reason="not installed")
    seen = identify(attention.FeedForward(16, activation_fn="geglu"))
    assert (seen.family, seen.layout, seen.gate_half) == ("geglu", "packed", "last")
    assert (seen.gate, seen.down) == ("net.0.proj", "net.2")


def test_x_transformers():
    pytest.importorskip("x_transformers", reason="not installed")
    from x_transformers.x_transformers import GLU, FeedForward

    assert identify(GLU(16, 40, nn.GELU())).variant == "geglu"
    assert "a number of its own" in str(identify(GLU(16, 40, nn.SiLU(), mult_bias=True)))
    assert identify(FeedForward(16, glu=True)).family == "geglu"
    assert identify(FeedForward(16, relu_squared=True)).activation == "relu2"
    normed = identify(FeedForward(16, glu=True, swish=True, post_act_ln=True))
    assert normed.family == "swiglu"
    assert "LayerNorm" in normed.notes[0]


TIMM = """
import json
from benchmarks.zoo.extras import use_extras
use_extras()
from timm.layers.mlp import GatedMlp, GluMlp, Mlp, SwiGLU, SwiGLUPacked
from hf_geglu import identify
seen = {kind.__name__: identify(kind(16, 40)) for kind in (GluMlp, GatedMlp, Mlp, SwiGLU)}
seen["SwiGLUPacked"] = identify(SwiGLUPacked(16, 40))
print(json.dumps({name: [one.family, one.gate_half] for name, one in seen.items()}))
"""


@pytest.mark.skipif(not (FOLDER / "timm").is_dir(), reason="timm is installed by `make coverage` or `make identify`")
def test_timm():
    """In a process of its own: with torchvision in sight, transformers would import it everywhere."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", TIMM], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "GluMlp": ["glu", "last"],
        "GatedMlp": ["dense", None],  # no GLU, whatever it is called: its gate is a layer that defaults to nothing
        "Mlp": ["dense", None],
        "SwiGLU": ["swiglu", None],
        "SwiGLUPacked": ["swiglu", "first"],
    }
