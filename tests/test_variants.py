"""The GLU family: formulas, order of the halves, registration."""

import subprocess
import sys
import threading

import pytest
import torch
from transformers.activations import ACT2FN

import hf_geglu
from hf_geglu import functional, variants
from hf_geglu.errors import SiteError, VariantError

NORMAL = torch.distributions.Normal(0.0, 1.0)
# f of each variant, written from the papers and not from the package
FORMULAS = {
    "geglu": lambda z: z * NORMAL.cdf(z),
    "geglu_tanh": lambda z: 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))),
    "swiglu": lambda z: z / (1 + torch.exp(-z)),
    "reglu": lambda z: z.clamp_min(0),
    "bilinear": lambda z: z,
    "glu": lambda z: 1 / (1 + torch.exp(-z)),
}


@pytest.fixture
def packed():
    return 3 * torch.randn(5, 7, 2 * 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_table_is_the_family():
    assert set(hf_geglu.VARIANTS) == set(FORMULAS)
    assert all("arXiv" in variant.source for variant in hf_geglu.VARIANTS.values())


@pytest.mark.parametrize("name", FORMULAS)
def test_registered_unit_is_the_formula(name, packed):
    gate, value = packed[..., :6], packed[..., 6:]
    torch.testing.assert_close(ACT2FN[name](packed), FORMULAS[name](gate) * value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        functional.glu_unit(gate, value, hf_geglu.VARIANTS[name].gate),
        FORMULAS[name](gate) * value,
        rtol=1e-12,
        atol=1e-12,
    )


def test_gate_comes_first_where_torch_has_it_last(packed):
    swapped = torch.cat([packed[..., 6:], packed[..., :6]], dim=-1)
    torch.testing.assert_close(ACT2FN["glu"](packed), torch.nn.functional.glu(swapped))
    assert not torch.allclose(ACT2FN["glu"](packed), torch.nn.functional.glu(packed))


def test_odd_width_is_refused():
    with pytest.raises(ValueError, match="7 elements"):
        ACT2FN["geglu"](torch.zeros(2, 7))
    with pytest.raises(SiteError, match="7"):
        functional.split_packed(torch.zeros(2, 7), "packed", "first")


def test_interleaved_halves():
    gate, value = functional.split_packed(torch.arange(6.0), "interleaved", "last")
    assert gate.tolist() == [1, 3, 5]
    assert value.tolist() == [0, 2, 4]


def test_ffn_is_shazeer():
    g = torch.Generator().manual_seed(1)
    x, wg, wv, wd = (
        torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((3, 4), (6, 4), (6, 4), (4, 6))
    )
    expected = (FORMULAS["geglu"](x @ wg.T) * (x @ wv.T)) @ wd.T
    torch.testing.assert_close(functional.ffn(x, (wg, None), (wv, None), (wd, None), "gelu"), expected)


def test_registration_is_idempotent_and_thread_safe():
    before = dict(ACT2FN.items())
    threads = [threading.Thread(target=variants.register) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert dict(ACT2FN.items()) == before


def test_a_name_that_is_taken_is_refused_and_nothing_is_registered():
    code = (
        "from transformers.activations import ACT2FN\n"
        "import torch\n"
        "ACT2FN['swiglu'] = torch.nn.SiLU\n"
        "try:\n    import hf_geglu\n"
        "except ValueError as error:\n    print(type(error).__name__, error)\n"
        "print('geglu' in ACT2FN, dict.get(ACT2FN, 'swiglu') is torch.nn.SiLU)\n"
    )
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert "VariantError" in result.stdout
    assert "'swiglu'" in result.stdout
    assert result.stdout.strip().endswith("False True")


def test_unknown_variant_names_the_known():
    with pytest.raises(VariantError, match="geglu, geglu_tanh, swiglu"):
        variants.get_variant("gelglu")
