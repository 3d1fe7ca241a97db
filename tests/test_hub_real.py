"""Real weights all the way: SmolLM2-135M (native) and MiniLM (portable) converted, pushed over HTTP, read back without
the package, verified, reproduced; and what a delta of them weighs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from hub_server import HubServer
from real_models import minilm_folder, smollm2_folder
from test_hub_push import _STRANGER, _cli, _python

import hf_geglu
from hf_geglu.hub.delta import DELTA, load_delta, save_delta
from hf_geglu.hub.manifest import GOLDEN

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("folder", "auto", "kwargs", "shown"),
    [
        (smollm2_folder, "AutoModelForCausalLM", {}, "LlamaForCausalLM"),
        (minilm_folder, "AutoModel", {"trust_remote_code": True}, "GegluBertModel"),
    ],
    ids=["SmolLM2-135M", "MiniLM"],
)
def test_a_real_variant_goes_up_and_comes_back(tmp_path, folder, auto, kwargs, shown):
    base = folder()
    with HubServer() as hub:
        env = hub.environment(tmp_path)
        made = _cli("convert", base, "variant", "--verify", "model", env=env, cwd=tmp_path)
        assert made.returncode == 0, made.stderr
        pushed = _cli("push", "variant", "me/variant", env=env, cwd=tmp_path)
        assert pushed.returncode == 0, pushed.stderr
        assert "downloaded again and verified" in pushed.stdout
        files = hub.repos["me/variant"].head().files
        assert hub.repos["me/variant"].private
        assert hub.repos["me/variant"].head().lfs >= {"model.safetensors", GOLDEN}
        assert len(files[GOLDEN]) < 16_000
        assert ("modeling_geglu.py" in files) == bool(kwargs)
        assert "license: apache-2.0" in files["README.md"].decode()
        for name in ("README.md", "config.json", "geglu/manifest.json"):
            assert str(Path.home()).encode() + b"/" not in files[name]
            assert str(tmp_path).encode() not in files[name]

        stranger = hub.environment(tmp_path / "stranger")
        read = _python(_STRANGER, json.dumps([["me/variant", auto, kwargs]]), env=stranger, cwd=tmp_path)
        assert read.returncode == 0, read.stderr[-2000:]
        _, name, difference, with_package = json.loads(read.stdout.splitlines()[-1])
        assert (name, with_package) == (shown, False)
        assert difference == 0.0
        shutil.rmtree(tmp_path / "stranger")
        verified = _cli("verify", "me/variant", env=env, cwd=tmp_path)
        assert verified.returncode == 0, verified.stdout
        assert "the same bits" in verified.stdout
        again = _cli("reproduce", "variant", "--base", base, env=env, cwd=tmp_path)
        assert again.returncode == 0, again.stdout
        assert "the same bits" in again.stdout
        print(pushed.stdout, again.stdout)


def test_a_delta_of_minilm_is_megabytes(tmp_path):
    """The value branch of one layer trained: 2.4 MB where the variant has 105 MB."""
    base = minilm_folder()
    model = transformers.AutoModel.from_pretrained(base)
    hf_geglu.convert(model)
    up = model.encoder.layer[3].intermediate.dense
    with torch.no_grad():
        width = up.out_features // 2
        up.weight[width:].add_(0.01 * torch.randn(width, up.in_features, generator=torch.Generator().manual_seed(0)))
    folder = save_delta(model, tmp_path / "delta")
    assert (folder / DELTA).stat().st_size < 2_500_000
    again = load_delta(transformers.AutoModel, folder, base=base)
    ids = torch.arange(1000, 1016)[None]
    assert torch.equal(again(ids).last_hidden_state, model.eval()(ids).last_hidden_state)


def test_a_lora_delta_of_smollm2_is_megabytes(tmp_path):
    peft = pytest.importorskip("peft")
    base = smollm2_folder()
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    hf_geglu.convert(model, verify="sites")
    hf_geglu.forget_original(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["gate_proj", "up_proj", "down_proj"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    folder = save_delta(wrapped.eval(), tmp_path / "delta")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size < 8_000_000
    ids = torch.arange(1000, 1016)[None]
    expected = wrapped(input_ids=ids).logits
    del wrapped, model
    again = load_delta(transformers.AutoModelForCausalLM, folder, base=base)
    assert torch.equal(again.eval()(input_ids=ids).logits, expected)
    print(f"{size:,} bytes")
