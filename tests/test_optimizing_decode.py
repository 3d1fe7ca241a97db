"""Packed weights in a live model: when they are made and used, and that no change of a weight goes unseen."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from tiny_models import tiny
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import hf_geglu
from hf_geglu.errors import KernelError
from hf_geglu.ops import choose, decode
from hf_geglu.optimizing import decoding

pytestmark = pytest.mark.skipif(decode.why_not(torch.float32) is not None, reason=str(decode.why_not(torch.float32)))

IDS = torch.arange(4, 12)[None].repeat(2, 1)


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """How often packed weights ran and were made; small blocks count as large ones."""
    monkeypatch.setattr(choose, "ENOUGH_WEIGHTS", 0)
    counts = {"run": 0, "pack": 0}
    run, pack = decode.run, decode.pack

    def counted_run(*arguments):
        counts["run"] += 1
        return run(*arguments)

    def counted_pack(*arguments):
        counts["pack"] += 1
        return pack(*arguments)

    monkeypatch.setattr(decode, "run", counted_run)
    monkeypatch.setattr(decode, "pack", counted_pack)
    return counts


def _packed(block):
    return decoding.packing_of(block).packed


def _block():
    """A packed-weights block in a model, run until it is packed; and a call of it."""
    model = nn.Sequential(tiny("llama").model.layers[0].mlp)
    hf_geglu.optimize(model, decode=True)
    x = torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def call():
        return model(x)

    call(), call()
    assert _packed(model[0]) is not None
    return model, call


def _expected(model, call):
    twin = copy.deepcopy(model)
    hf_geglu.optimize(twin, ops="reference")
    with torch.no_grad():
        return twin(torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("model_type", ["llama", "gemma", "phi3", "modernbert", "t5", "gpt2", "vit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_answers_as_it_did(model_type, dtype, counted):
    if decode.why_not(dtype) is not None:
        pytest.skip(decode.why_not(dtype))
    changes = {"t5": {"feed_forward_proj": "gated-gelu"}}.get(model_type, {})
    model = tiny(model_type, **changes).eval()
    if model_type in ("gpt2", "vit"):
        hf_geglu.convert(model, verify="sites")
    model = model.to(dtype)
    inputs = {"input_ids": IDS, **({"decoder_input_ids": IDS} if model_type == "t5" else {})}
    if model_type == "vit":
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16).to(dtype)}
    with torch.no_grad():
        before = model(**inputs)[0]
        report = hf_geglu.optimize(model, decode=True)
        if not report.count("block"):
            pytest.skip("over two modules in this version of transformers")
        assert report.count("block") == len(report.sites) == sum(site.packed_bytes > 0 for site in report.sites)
        for _ in range(2):  # looked at; looked at again, and packed
            assert torch.equal(model(**inputs)[0], before)
        assert counted == {"run": 0, "pack": len(report.sites)}
        after = [model(**inputs)[0] for _ in range(2)]
    assert counted == {"run": 2 * len(report.sites), "pack": len(report.sites)}
    assert torch.equal(after[0], after[1])
    assert (after[0] - before).abs().max() <= 40 * torch.finfo(dtype).eps * before.abs().max()


def test_generation_gives_the_same_tokens(counted):
    model = tiny("llama").eval()
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    before = model.generate(IDS, **settings)
    hf_geglu.optimize(model, decode=True)
    assert torch.equal(model.generate(IDS, **settings), before)
    assert counted == {"run": 2 * 10, "pack": 2}


def _optimizer(kind, **settings):
    def change(block):
        optimizer = kind(block.parameters(), lr=0.05, **settings)
        for parameter in block.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    return change


def _in_place(block):
    with torch.no_grad():
        block.up_proj.weight[3, 5] += 10.0


def _through_data(block):
    block.gate_proj.weight.data.mul_(1.1)


def _other_data(block):
    block.down_proj.weight.data = torch.randn(16, 40)


def _load(block, assign=False):
    block.load_state_dict({name: torch.randn_like(t) for name, t in block.state_dict().items()}, assign=assign)


def _assign(block):
    _load(block, assign=True)


def _other_parameter(block):
    block.up_proj.weight = nn.Parameter(torch.randn(40, 16))


def _other_projection(block):
    block.gate_proj = nn.Linear(16, 40, bias=False)


def _new_bias(block):
    block.gate_proj.bias, block.up_proj.bias = (nn.Parameter(torch.randn(40)) for _ in range(2))


def _from_a_vector(block):
    with torch.no_grad():
        nn.utils.vector_to_parameters(torch.randn(3 * 16 * 40), block.parameters())


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_optimizer(torch.optim.AdamW, fused=True), id="fused step"),
        pytest.param(_optimizer(torch.optim.AdamW, foreach=True), id="foreach step"),
        pytest.param(_optimizer(torch.optim.SGD), id="step"),
        _in_place,
        _through_data,
        _other_data,
        _load,
        _assign,
        _other_parameter,
        _other_projection,
        _new_bias,
        _from_a_vector,
    ],
)
def test_a_change_of_weights_is_seen_at_once(change, counted):
    model, call = _block()
    before, packed = call(), counted["pack"]
    change(model[0])
    expected = _expected(model, call)
    size = expected.abs().max()
    assert (expected - before).abs().max() > 1e-3 * size
    ran = counted["run"]
    for _ in range(3):
        assert (call() - expected).abs().max() <= 1e-5 * size
    assert counted == {"run": ran + 1, "pack": packed + 1}  # and packed anew


def test_what_a_fused_step_leaves_unchanged_is_why_steps_are_counted():
    weight = nn.Parameter(torch.ones(4))
    weight.grad = torch.ones(4)
    version = weight._version
    torch.optim.AdamW([weight], fused=True).step()
    assert weight._version == version
    assert not torch.equal(weight, torch.ones(4))


def test_weights_that_change_at_every_call_are_never_packed(counted):
    model, call = _block()
    counted.update(run=0, pack=0)
    for _ in range(4):
        _in_place(model[0])
        call()
    assert counted == {"run": 0, "pack": 0}


def test_training_drops_them(counted):
    model, call = _block()
    model(torch.randn(1, 2, 16)).sum().backward()
    assert _packed(model[0]) is None
    with torch.no_grad():
        model(torch.randn(1, decode.MOST_TOKENS + 1, 16))  # many tokens, no gradient: an evaluation
    assert _packed(model[0]) is None
    call(), call()
    with torch.no_grad():
        model(torch.randn(1, decode.MOST_TOKENS + 1, 16))
    assert _packed(model[0]) is not None


def test_nothing_of_it_is_in_the_model(tmp_path):
    model = tiny("llama").eval()
    model.save_pretrained(tmp_path / "before")
    hf_geglu.optimize(model, decode=True)
    with torch.no_grad():
        model(IDS), model(IDS)
    blocks = [layer.mlp for layer in model.model.layers]
    assert all(_packed(block) for block in blocks)
    model.save_pretrained(tmp_path / "after")
    for path in (tmp_path / "before").iterdir():
        assert path.read_bytes() == (tmp_path / "after" / path.name).read_bytes(), path.name
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any(_packed(layer.mlp) for layer in twin.model.layers)
    held = [weakref.ref(_packed(block).down.pieces[0]) for block in blocks]
    hf_geglu.optimize(model, ops="reference")
    gc.collect()
    assert [reference() for reference in held] == [None, None]
    assert not any(decoding.NAME in vars(block) for block in blocks)


def test_it_goes_with_the_model():
    model, _ = _block()
    held = weakref.ref(_packed(model[0]).down.pieces[0])
    del model, _
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("how", ["hook", "autocast", "dispatch"])
def test_calls_that_need_the_modules_get_them(how, counted):
    model, call = _block()
    expected, before = call(), counted["run"]
    if how == "hook":
        model[0].up_proj.register_forward_hook(lambda *_: None)
        answer = call()
    elif how == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            answer = call()
        assert answer.dtype == torch.bfloat16
    else:
        with FlopCounterMode(display=False):
            answer = call()
    assert counted["run"] == before
    assert torch.allclose(answer.float(), expected, atol=0.05)


def test_dropout_at_work_runs_the_module(counted):
    model = tiny("t5", feed_forward_proj="gated-gelu", dropout_rate=0.5).train()
    hf_geglu.optimize(model, decode=True)
    with torch.no_grad():
        for _ in range(3):
            model(input_ids=IDS, decoder_input_ids=IDS)
        assert counted["run"] == 0
        model.eval()
        for _ in range(3):
            model(input_ids=IDS, decoder_input_ids=IDS)
    assert counted == {"run": 4, "pack": 4}


def test_the_compiler_takes_the_model_whole(counted):
    model = tiny("llama").eval()
    hf_geglu.optimize(model, decode=True)
    with torch.no_grad():
        before = [model(IDS).logits for _ in range(3)][-1]
        ran = counted["run"]
        after = torch.compile(model, backend="aot_eager", fullgraph=True)(input_ids=IDS).logits
    assert torch.allclose(after, before, atol=1e-5)
    assert counted["run"] == ran


def test_it_is_asked_for_and_the_bytes_are_told(monkeypatch):
    model = tiny("llama")
    report = hf_geglu.optimize(model)
    assert report.packed_bytes == 0
    assert "decoding" not in str(report)
    with torch.no_grad():
        model(IDS), model(IDS)
    assert decoding.NAME not in vars(model.model.layers[0].mlp)
    report = hf_geglu.optimize(model, decode=True)
    assert report.packed_bytes == 2 * 4 * 3 * 16 * 40 == sum(site["packed_bytes"] for site in report.to_dict()["sites"])
    assert "2 blocks will keep a packed second copy of their weights, 0.0 MB" in str(report)
    assert "float64 are not packed" in str(hf_geglu.optimize(tiny("llama").double(), decode=True))
    monkeypatch.setattr(choose, "ENOUGH_WEIGHTS", 1 << 19)
    assert "2 x not packed: too small" in str(hf_geglu.optimize(tiny("llama"), decode=True))
    with pytest.raises(KernelError, match="decode=True is for optimised blocks"):
        hf_geglu.optimize(model, ops="reference", decode=True)
