"""Two processes over gloo compute what one does: tensor parallelism of transformers, FSDP2 of accelerate.

And what vLLM's Transformers backend asks of a model; vLLM itself is not run here.
"""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from parallel_job import IDS, train, undropped
from tiny_models import TINY, tiny
from versions import BEFORE_5

import hf_geglu
from hf_geglu.modeling_geglu import PackedGLU

JOB = Path(__file__).with_name("parallel_job.py")
GATHERED = "colwise_rep" if BEFORE_5 else "colwise_gather_output"
SPLIT = "rowwise_rep" if BEFORE_5 else "rowwise_split_input"
HAS_FSDP2 = "fsdp_version" in inspect.signature(accelerate.FullyShardedDataParallelPlugin).parameters
DENSE_WITH_A_PLAN = {"phi": "model.layers.{}.mlp.fc1", "gpt_neox": "gpt_neox.layers.{}.mlp.dense_h_to_4h"}


def _saved(folder, model_type, *, layers=None, **overrides):
    """A variant whose biases are not all zero: a split that is wrong for them must show."""
    model = tiny(model_type, **overrides)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    hf_geglu.convert(model, layers=layers)
    model.save_pretrained(folder)
    return folder, model


SPLIT_JOBS = {
    "phi": ("phi", {}),
    "phi-partly": ("phi", {"layers": 0}),
    "gpt_neox": ("gpt_neox", {}),
    "llama": ("llama", {"num_key_value_heads": 2}),
}
REFUSED = ("colwise", "packed_colwise")
FSDP = ("phi", "llama")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Everything that two processes do, in one launch: job -> (folder, model, what was found)."""
    root = tmp_path_factory.mktemp("parallel")
    made = {name: _saved(root / name, kind, **options) for name, (kind, options) in SPLIT_JOBS.items()}
    jobs = {name: {"what": "tensor_parallel", "folder": str(made[name][0])} for name in SPLIT_JOBS}
    if not BEFORE_5:
        plans = {style: {"model.layers.*.mlp.fc1": style} for style in REFUSED}
        jobs |= {style: {**jobs["phi"], "plan": plan} for style, plan in plans.items()}
    if HAS_FSDP2:
        jobs |= {f"fsdp2-{name}": {"what": "fsdp2", "folder": str(made[name][0])} for name in FSDP}
    (root / "jobs.json").write_text(json.dumps(list(jobs.values())))
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*launch, str(JOB), str(root / "jobs.json"), str(root / "found.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return made, dict(zip(jobs, json.loads((root / "found.json").read_text()), strict=True))


@pytest.mark.parametrize("name", SPLIT_JOBS)
def test_tensor_parallelism_computes_the_same(results, name):
    made, found = results[0][name], results[1][name]
    folder, model = made
    model_type = SPLIT_JOBS[name][0]
    assert "error" not in found, found
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(found["logits"]), model(IDS).logits, rtol=1e-5, atol=1e-5)
    model.zero_grad()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert found["loss"] == pytest.approx(loss.item(), abs=1e-5)
    if BEFORE_5:
        # it leaves parameters outside of its plan to the user, takes the digit of "fc1" for a layer's number (no
        # split), and hides the biases of row-wise projections, of any model, and then saves without them
        return
    gradient = torch.tensor(found["gradient"])
    torch.testing.assert_close(gradient, model.get_input_embeddings().weight.grad, rtol=1e-4, atol=1e-6)
    if model_type in DENSE_WITH_A_PLAN:
        assert found["local"][DENSE_WITH_A_PLAN[model_type].format(0) + ".weight"] == [40, 16]
    again = TINY[model_type][0].from_pretrained(f"{folder}-saved")
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


@pytest.mark.skipif(BEFORE_5, reason="transformers 4 takes no plan from the user")
@pytest.mark.parametrize("style", REFUSED)
def test_a_plan_that_would_split_wrongly_is_refused(results, style):
    error = results[1][style]["error"]
    assert error.startswith("VariantLoadError")
    assert f"splits model.layers.0.mlp.fc1 by '{style}'" in error
    assert "colwise_gather_output" in error


@pytest.mark.skipif(not HAS_FSDP2, reason="this accelerate has FSDP 1 only")
@pytest.mark.parametrize("name", FSDP)
def test_fsdp2_has_the_same_losses(results, name):
    folder, two = results[0][name][0], results[1][f"fsdp2-{name}"]
    assert "error" not in two, two
    model = undropped(folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    one = [loss.item() for loss in train(model, optimizer, IDS, lambda loss: loss.backward())]
    assert two["losses"] == pytest.approx(one, abs=1e-5)
    assert one[2] < one[0]
    assert any("mlp" in name for name in two["sharded"])


# -- what vLLM's Transformers backend asks for (its documentation, "Supported Models") ---------------------------------


@pytest.mark.parametrize("model_type", ["phi", "gpt_neox", "opt", "gpt2", "bert", "vit"])
def test_what_vllm_asks_of_a_custom_model(tmp_path, model_type):
    folder, _ = _saved(tmp_path, model_type)
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModel"].startswith("modeling_geglu.Geglu")
    assert (folder / "modeling_geglu.py").is_file()
    built = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(folder))
    base = tiny(model_type, auto=transformers.AutoModel)
    assert any(isinstance(module, PackedGLU) for module in built.modules())  # customised in the base model
    for name in ("_supports_attention_backend", "_supports_sdpa", "_supports_flash_attn", "base_model_prefix"):
        assert getattr(built, name) == getattr(base, name), name
    assert set(built._no_split_modules or ()) == set(base._no_split_modules or ())
    assert built.config.base_model_pp_plan == base.config.base_model_pp_plan
    assert set(built._tp_plan or ()) == set(base._tp_plan or ())


@pytest.mark.parametrize("model_type", DENSE_WITH_A_PLAN)
def test_the_tensor_parallel_plan_under_our_names(tmp_path, model_type):
    """Names of linear layers, styles that vLLM maps to its own layers; the packed projection is gathered."""
    folder, _ = _saved(tmp_path, model_type)
    plan = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(folder)).tp_plan
    up = DENSE_WITH_A_PLAN[model_type].format("*").partition(".")[2]
    assert plan[up] == GATHERED
    assert plan[{"phi": "layers.*.mlp.fc2", "gpt_neox": "layers.*.mlp.dense_4h_to_h"}[model_type]] == SPLIT
    known = {"colwise", "rowwise", "replicate", GATHERED, SPLIT, "embedding_rowwise"}
    assert set(plan.values()) <= known
    with_head = TINY[model_type][0].from_pretrained(folder)
    prefix = with_head.base_model_prefix
    assert with_head.tp_plan[f"{prefix}.{up}"] == GATHERED
    assert transformers.AutoConfig.for_model(model_type).base_model_tp_plan[up] == "colwise"  # the base's is as it was
