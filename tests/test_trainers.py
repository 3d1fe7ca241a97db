"""Other people's training loops and pipelines: transformers' Trainer with resume, TRL's SFTTrainer, pipeline()."""

import json

import pytest
import torch
import transformers
from tiny_models import TINY, tiny

import hf_geglu

IDS = torch.arange(4, 12)
DATA = [{"input_ids": IDS + shift, "labels": IDS + shift} for shift in range(8)]


def _saved(tmp_path, model_type):
    model = tiny(model_type)
    hf_geglu.convert(model)
    model.save_pretrained(tmp_path / "v")
    return tmp_path / "v"


def _tokenizer(folder):
    """A word-level tokenizer of 64 words, saved beside a model."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {name: index for index, name in enumerate(["<pad>", "<s>", "</s>", "[MASK]", *map(str, range(60))])}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", mask_token="[MASK]"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def _arguments(folder, **settings):
    return transformers.TrainingArguments(
        output_dir=str(folder),
        report_to=[],
        use_cpu=True,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        seed=0,
        **settings,
    )


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "bert"])
def test_trainer_resumes_where_it_stopped(tmp_path, model_type):
    folder = _saved(tmp_path, model_type)
    auto = TINY[model_type][0]

    def train(output, steps, resume=None, save=1000):
        model = auto.from_pretrained(folder)
        arguments = _arguments(output, max_steps=4, save_strategy="steps", save_steps=save)
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=DATA)
        if steps < 4:
            trainer.add_callback(_StopAt(steps))
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = train(tmp_path / "whole", 4)
    train(tmp_path / "parts", 2, save=2)
    checkpoint = tmp_path / "parts" / "checkpoint-2"
    stopped = auto.from_pretrained(checkpoint)
    assert type(stopped) is type(whole)
    assert (checkpoint / "modeling_geglu.py").is_file() == (model_type != "llama")
    resumed = train(tmp_path / "parts", 4, resume=str(checkpoint))
    for (name, expected), found in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7, msg=name)
    assert any(not torch.equal(a, b) for a, b in zip(stopped.parameters(), resumed.parameters(), strict=True))


class _StopAt(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self.step


def _sft(folder, out, model, **settings):
    """An SFTTrainer of a saved variant on eight short texts."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    arguments = {"max_steps": 2, "save_strategy": "no", "learning_rate": 1e-2, "per_device_train_batch_size": 2}
    callbacks, peft_config = settings.pop("callbacks", None), settings.pop("peft_config", None)
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(out), report_to=[], use_cpu=True, bf16=False, max_length=16, **(arguments | settings)
        ),
        train_dataset=datasets.Dataset.from_dict(
            {"text": [" ".join(str((i + j) % 50) for j in range(12)) for i in range(8)]}
        ),
        processing_class=_tokenizer(folder),
        callbacks=callbacks,
        peft_config=peft_config,
    )


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_sfttrainer(tmp_path, model_type):
    folder = _saved(tmp_path, model_type)
    model = TINY[model_type][0].from_pretrained(folder)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = _sft(folder, tmp_path / "out", model)
    result = trainer.train()
    assert result.global_step == 2
    moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert {name for name in before if ".mlp." in name} <= moved
    trainer.save_model(str(tmp_path / "saved"))
    again = TINY[model_type][0].from_pretrained(tmp_path / "saved")
    assert type(again) is type(model)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_sfttrainer_with_a_lora(tmp_path):
    peft = pytest.importorskip("peft")
    folder = _saved(tmp_path, "opt")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    lora = peft.LoraConfig(target_modules=["fc1", "fc2"], task_type="CAUSAL_LM")
    _sft(folder, tmp_path / "out", model, save_strategy="steps", save_steps=2, peft_config=lora).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert (checkpoint / "geglu_base.json").is_file()
    base = json.loads((checkpoint / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(folder)
    peft.AutoPeftModelForCausalLM.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("task", "model_type", "text"),
    [
        ("text-generation", "gpt2", "1 2 3"),
        ("fill-mask", "bert", "1 [MASK] 3"),
        ("feature-extraction", "bert", "1 2 3"),
        ("text-generation", "llama", "1 2 3"),
    ],
)
def test_pipeline(tmp_path, task, model_type, text):
    base = tiny(model_type)
    folder = _saved(tmp_path, model_type)
    tokenizer = _tokenizer(folder)
    settings = {"max_new_tokens": 4, "do_sample": False} if task == "text-generation" else {}
    found = transformers.pipeline(task, model=str(folder), device="cpu")(text, **settings)
    if model_type == "llama":
        base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    if task == "feature-extraction":
        base = base.bert
    expected = transformers.pipeline(task, model=base, tokenizer=tokenizer, device="cpu")(text, **settings)
    if task == "feature-extraction":
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    elif task == "fill-mask":
        assert [entry["token"] for entry in found] == [entry["token"] for entry in expected]
    else:
        assert found == expected


def _only_values_moved(model, masks, before):
    for name, parameter in model.named_parameters():
        moved = parameter != before[name]
        mask = masks[name].expand_as(parameter).bool() if name in masks else torch.zeros_like(moved)
        assert not moved[~mask].any(), name
        assert moved.any() == (name in masks), name
    assert all(parameter.requires_grad for parameter in model.parameters())


def _told_of_values(trainer, times):
    told = [entry["value_over_gate"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(told) == times
    assert 0 < told[0] < told[-1]


@pytest.mark.parametrize("model_type", ["gpt2", "bert"])
def test_callback_trains_the_value_branch_alone_and_tells_of_it(tmp_path, model_type):
    from hf_geglu.training.callback import GegluCallback
    from hf_geglu.training.parameters.trainable import value_masks

    model = tiny(model_type)
    hf_geglu.convert(model)
    masks = value_masks(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    arguments = _arguments(tmp_path / "out", max_steps=3, logging_steps=1, save_strategy="no")
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=DATA, callbacks=[GegluCallback(trainable="value")]
    )
    trainer.train()
    _only_values_moved(model, masks, before)
    _told_of_values(trainer, 3)


def test_callback_in_sfttrainer(tmp_path):
    from hf_geglu.training.callback import GegluCallback
    from hf_geglu.training.parameters.trainable import value_masks

    folder = _saved(tmp_path, "gpt2")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    masks = value_masks(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    callbacks = [GegluCallback(trainable="value")]
    trainer = _sft(folder, tmp_path / "out", model, max_steps=3, logging_steps=1, callbacks=callbacks)
    trainer.train()
    _only_values_moved(model, masks, before)
    _told_of_values(trainer, 3)


def test_callback_refuses_a_decay_that_would_move_the_gates(tmp_path):
    from hf_geglu.errors import ConfigurationError
    from hf_geglu.training.callback import GegluCallback

    model = tiny("gpt2")
    hf_geglu.convert(model)
    arguments = _arguments(tmp_path / "out", max_steps=1, weight_decay=0.1)
    with pytest.raises(ConfigurationError, match=r"weight_decay=0\.1 would pull at the gate's half"):
        transformers.Trainer(model=model, args=arguments, callbacks=[GegluCallback(trainable="value")])


def test_callback_refuses_shares_that_would_move_the_gates(tmp_path, monkeypatch):
    from hf_geglu.errors import ConfigurationError
    from hf_geglu.training.callback import GegluCallback

    model = tiny("bert")
    hf_geglu.convert(model)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    arguments = _arguments(tmp_path / "out", max_steps=1)
    with pytest.raises(ConfigurationError, match="FSDP"):
        GegluCallback(trainable="value").on_init_end(arguments, None, None, model=model)
    assert all(parameter.requires_grad for parameter in model.parameters())
