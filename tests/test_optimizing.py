"""`hf_geglu.optimize`: what is installed where, that the model computes as before, and when the module's own forward
must run. Kernels run without a compiler here."""

import copy
import pickle

import pytest
import torch
from tiny_models import tiny
from torch import nn
from versions import BEFORE_5

import hf_geglu
from hf_geglu.errors import KernelError
from hf_geglu.optimizing import running
from hf_geglu.optimizing.plain import watched

IDS = torch.arange(4, 12)[None].repeat(2, 1)

BLOCKS = {
    "llama": {},
    "gemma": {},
    "phi3": {},
    "modernbert": {"mlp_dropout": 0.2},
    "t5": {"feed_forward_proj": "gated-gelu", "dropout_rate": 0.2},
    "gpt2": {},
    "vit": {},
}
UNITS = {"bert": {}, "opt": {}, "bart": {}}
CONVERTED = ("gpt2", "vit", "bert", "opt", "bart")


@pytest.fixture(autouse=True)
def _without_compiler(monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """How often a kernel ran."""
    counts = {"block": 0, "unit": 0}
    block, unit = running.run_block, running.packed_glu

    def run_block(*arguments, **settings):
        counts["block"] += 1
        return block(*arguments, **settings)

    def packed_glu(*arguments, **settings):
        counts["unit"] += 1
        return unit(*arguments, **settings)

    monkeypatch.setattr(running, "run_block", run_block)
    monkeypatch.setattr(running, "packed_glu", packed_glu)
    return counts


def _model(model_type, **changes):
    model = tiny(model_type, **{**BLOCKS, **UNITS}.get(model_type, {}), **changes)
    if model_type in CONVERTED:
        hf_geglu.convert(model, verify="sites")
    return model


def _inputs(model_type):
    if model_type == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    return {"input_ids": IDS, **({"decoder_input_ids": IDS} if model_type in ("t5", "bart") else {})}


def _step(model, inputs):
    """Logits and gradients in training mode, from one random state."""
    model.train()
    model.zero_grad()
    torch.manual_seed(0)
    logits = model(**inputs)[0]
    logits.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients, torch.rand(1)


def _same(one, other):
    assert torch.allclose(one[0], other[0], atol=1e-12)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        assert torch.allclose(gradient, other[1][name], atol=1e-12), name
    assert torch.equal(one[2], other[2])  # dropout drew as much


@pytest.mark.parametrize("model_type", [*BLOCKS, *UNITS])
def test_a_model_computes_what_it_did(model_type, counted):
    model, inputs = _model(model_type).double(), _inputs(model_type)
    inputs = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    classes, state = [type(module) for module in model.modules()], list(model.state_dict())
    before = _step(model, inputs)
    split = BEFORE_5 and model_type == "vit"  # over two modules there
    runs = "block" if model_type in BLOCKS and not split else "unit"
    for mode in ("lean", "tiled"):
        report = hf_geglu.optimize(model, ops=mode)
        assert report.count(runs) == len(report.sites) == len(hf_geglu.find_sites(model)) > 0, str(report)
        counted.update(block=0, unit=0)
        _same(before, _step(model, inputs))
        assert counted == {"block": 0, "unit": 0, runs: len(report.sites)}
        assert list(model.state_dict()) == state
    report = hf_geglu.optimize(model, ops="reference")
    assert report.count("module") == len(report.sites)
    assert [type(module) for module in model.modules()] == classes
    assert not any(running.STATE in module.__dict__ for module in model.modules())
    counted.update(block=0, unit=0)
    assert torch.equal(_step(model, inputs)[0], before[0])
    assert counted == {"block": 0, "unit": 0}


def test_copies_and_pickles_are_about_themselves(counted):
    model = _model("llama")
    hf_geglu.optimize(model, ops="lean")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(1.5)
        counted.update(block=0)
        answer = twin(IDS).logits
        assert counted["block"] == 2
        hf_geglu.optimize(twin, ops="reference")
        assert torch.allclose(answer, twin(IDS).logits, atol=1e-5)
        assert not torch.allclose(answer, model(IDS).logits, atol=1e-3)


def test_a_teacher_beside_the_student_is_not_touched(counted):
    student, teacher = _model("llama"), _model("llama")
    hf_geglu.optimize(student, ops="lean")
    teacher(IDS)
    assert counted["block"] == 0
    assert type(teacher.model.layers[0].mlp) is type(tiny("llama").model.layers[0].mlp)


def test_what_is_saved_is_what_would_have_been(tmp_path):
    model = _model("gpt2")
    model.save_pretrained(tmp_path / "before")
    hf_geglu.optimize(model, ops="lean")
    model.save_pretrained(tmp_path / "after")
    for path in (tmp_path / "before").iterdir():
        assert path.read_bytes() == (tmp_path / "after" / path.name).read_bytes(), path.name


def _hook_forward(model):
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)


def _hook_backward(model):
    model.model.layers[0].mlp.down_proj.register_full_backward_hook(lambda *_: None)


def _hook_activation(model):
    model.model.layers[0].mlp.act_fn.register_forward_pre_hook(lambda *_: None)


def _other_activation(model):
    model.model.layers[0].mlp.act_fn = nn.GELU()


def _wrap(model):
    class Wrapped(nn.Linear):
        pass

    model.model.layers[0].mlp.gate_proj.__class__ = Wrapped


def _parametrize(model):
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.gate_proj)


def _dispatch(model):
    projection = model.model.layers[0].mlp.gate_proj
    projection.forward = lambda x: nn.functional.linear(x, projection.weight)  # what accelerate leaves


@pytest.mark.parametrize(
    "change",
    [_hook_forward, _hook_backward, _hook_activation, _other_activation, _wrap, _parametrize, _dispatch],
    ids=lambda change: change.__name__.strip("_"),
)
def test_what_must_be_called_is_called(change, counted):
    model = _model("llama")
    hf_geglu.optimize(model, ops="lean")
    change(model)
    model(IDS).logits.sum().backward()
    assert counted["block"] == 1  # the other layer's


def test_a_hook_is_heard_and_changes_the_answer():
    model = _model("llama")
    hf_geglu.optimize(model, ops="lean")
    before = model(IDS).logits
    handle = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, output: 2 * output)
    assert not torch.allclose(model(IDS).logits, before, atol=1e-4)
    handle.remove()
    assert torch.equal(model(IDS).logits, before)


def test_hooks_at_install_time_are_a_reason():
    model = _model("llama")
    _hook_forward(model)
    report = hf_geglu.optimize(model)
    assert [site.runs for site in report.sites] == ["module", "block"]
    assert "a projection has a hook" in report.sites[0].reason


def test_lora_is_respected(counted):
    peft = pytest.importorskip("peft")
    model = _model("llama")
    hf_geglu.optimize(model, ops="lean")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    with_adapter = wrapped(IDS).logits
    with wrapped.disable_adapter():
        assert not torch.allclose(wrapped(IDS).logits, with_adapter, atol=1e-4)
    assert counted["block"] == 0
    merged = wrapped.merge_and_unload()
    assert torch.allclose(merged(IDS).logits, with_adapter, atol=1e-4)
    assert counted["block"] == 2


def test_quantised_weights_are_respected(counted):
    torchao = pytest.importorskip("torchao.quantization")
    model = _model("llama")
    hf_geglu.optimize(model, ops="lean")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    model(IDS)
    assert counted["block"] == 0


def test_conversion_and_reverting_after_optimising(counted):
    model = _model("llama", hidden_act="silu")
    hf_geglu.optimize(model, ops="lean")
    hf_geglu.convert(model, verify="sites")
    counted.update(block=0)
    model(IDS)
    assert counted["block"] == 0  # another activation than the one it was optimised for
    assert hf_geglu.optimize(model, ops="lean").count("block") == 2
    hf_geglu.revert(model)
    counted.update(block=0)
    model(IDS)
    assert counted["block"] == 0


def test_exported_traced_and_transformed_models_run_their_modules(counted):
    block = _model("llama").model.layers[0].mlp
    module = nn.Sequential(block)
    hf_geglu.optimize(module, ops="lean")
    x = torch.randn(2, 3, 16)
    expected = module(x)
    counted.update(block=0)
    exported = torch.export.export(module, (x,), strict=False)
    assert not any("hf_geglu" in str(node.target) for node in exported.graph.nodes)
    assert torch.allclose(exported.module()(x), expected, atol=1e-6)
    assert torch.allclose(torch.func.vmap(module)(x), expected, atol=1e-6)
    torch.func.jvp(module, (x,), (x,))
    with torch.utils.flop_counter.FlopCounterMode(display=False) as flops:
        module(x)
    assert flops.get_total_flops() == 3 * 2 * 6 * 16 * 40
    assert counted["block"] == 0
    assert watched() is None
    with torch.device("cpu"):
        module(x)
    assert counted["block"] == 1


def test_torch_compile_takes_the_model_whole():
    model = _model("gemma").double()
    before = _step(model, {"input_ids": IDS})
    hf_geglu.optimize(model, ops="lean")
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    logits = torch.compile(model, backend=backend, fullgraph=True)(input_ids=IDS).logits
    assert torch.allclose(logits, before[0], atol=1e-12)
    assert sum("hf_geglu" in target for target in seen) == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_the_model(reentrant, counted):
    model = _model("t5").double()
    inputs = _inputs("t5")
    before = _step(model, inputs)
    hf_geglu.optimize(model, ops="lean")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    _same(before, _step(model, inputs))
    assert counted["block"] == 8  # each of four twice


def test_autocast(counted):
    model = _model("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(IDS).logits
        hf_geglu.optimize(model, ops="lean")
        after = model(IDS).logits
    assert counted["block"] == 2
    assert torch.allclose(after.float(), before.float(), atol=0.02)


def test_mixed_dtypes_run_the_module(counted):
    model = _model("llama").bfloat16()
    hf_geglu.optimize(model, ops="lean")
    block = model.model.layers[0].mlp
    block.down_proj.float()
    with pytest.raises(RuntimeError, match="dtype"):  # the module's own error, not ours
        block(torch.randn(1, 2, 16, dtype=torch.bfloat16))
    assert counted["block"] == 0


def test_data_parallel_replicas_use_their_own_weights():
    block = _model("llama").model.layers[0].mlp
    hf_geglu.optimize(nn.Sequential(block), ops="lean")
    replica = block._replicate_for_data_parallel()
    other = nn.Linear(16, 40, bias=False)
    replica._modules = {**replica._modules, "up_proj": other}
    x = torch.randn(2, 3, 16)
    expected = block.down_proj(block.act_fn(block.gate_proj(x)) * other(x))
    assert torch.allclose(replica(x), expected, atol=1e-6)


def test_reasons_are_given():
    if not BEFORE_5:  # there every expert is a module of its own
        report = hf_geglu.optimize(tiny("mixtral"))
        assert "experts in one parameter" in report.sites[0].reason
    report = hf_geglu.optimize(tiny("bert"))
    assert {site.runs for site in report.sites} == {"module"}
    assert "hf_geglu.convert makes it a gated one" in str(report)
    assert hf_geglu.optimize(nn.Linear(2, 2)).sites == ()
    with pytest.raises(KernelError, match="unknown ops='fast'"):
        hf_geglu.optimize(nn.Linear(2, 2), ops="fast")


class _Strange(nn.Module):
    """Gated, and yet not the formula."""

    def __init__(self, after):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act, self.after = nn.GELU(), after

    def forward(self, x):
        return self.after(self.down(self.act(self.gate(x)) * self.up(x)))


@pytest.mark.parametrize(
    "after",
    [lambda y: 2 * y, lambda y: nn.functional.dropout(y, 0.5, training=True), lambda y: (y,)],
    ids=["scaled", "noisy", "tuple"],
)
def test_a_block_that_does_more_is_left_alone(after):
    model = nn.Sequential(_Strange(after))
    report = hf_geglu.optimize(model, ops="lean")
    assert [site.runs for site in report.sites] == ["module"]
    assert "something else than" in report.sites[0].reason
    assert type(model[0]) is _Strange


def test_auto_leaves_small_calls_to_the_module(counted):
    model = _model("llama")
    before = model(IDS).logits
    assert hf_geglu.optimize(model).count("block") == 2
    assert torch.equal(model(IDS).logits, before)
    assert counted["block"] == 0


@pytest.fixture
def group(tmp_path):
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("needs gloo")
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield distributed
    distributed.destroy_process_group()


def test_data_parallel_training(group, counted):
    model = _model("llama").double()
    before = _step(model, {"input_ids": IDS})
    hf_geglu.optimize(model, ops="lean")
    parallel = nn.parallel.DistributedDataParallel(model)
    model.zero_grad()
    parallel(input_ids=IDS).logits.square().mean().backward()
    assert counted["block"] == 2
    for name, gradient in before[1].items():
        assert torch.allclose(model.get_parameter(name).grad, gradient, atol=1e-12)


@pytest.mark.parametrize("each", ["block", "projection"])
def test_sharded_training(group, counted, each):
    """A block whose weights are gathered around it runs by kernels; one whose projections gather their own may not."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("needs torch.distributed.fsdp.fully_shard")
    model = _model("llama").double()
    before = _step(model, {"input_ids": IDS})
    hf_geglu.optimize(model, ops="lean")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        for module in [layer.mlp] if each == "block" else [layer.mlp.up_proj, layer.mlp.down_proj]:
            fsdp.fully_shard(module, mesh=mesh)
    model.zero_grad()
    model(input_ids=IDS).logits.square().mean().backward()
    assert counted["block"] == (2 if each == "block" else 0)
    for name, gradient in before[1].items():
        found = model.get_parameter(name).grad
        found = found.full_tensor() if hasattr(found, "full_tensor") else found
        assert torch.allclose(found, gradient, atol=1e-12), name
