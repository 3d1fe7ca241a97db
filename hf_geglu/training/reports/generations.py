"""What a model writes to the same prompts before a training and after it.

The random numbers are drawn from a seed of their own, and the generators of the training are left where they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_geglu.errors import ConfigurationError
from hf_geglu.modes import evaluating
from hf_geglu.provenance import Sample
from hf_geglu.training.data.batches import MapBlocks
from hf_geglu.training.objectives.objective import IGNORED, Task
from hf_geglu.training.settings.data import DataSettings
from hf_geglu.training.settings.run import OutputSettings


@dataclass(frozen=True)
class Prompt:
    """What a model is to go on from.

    Attributes:
        text: for people.
        ids: tokens that the model gets.
    """

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Sampler:
    """Completes the same prompts each time.

    Attributes:
        tokenizer: of the model.
        prompts: at least one.
        max_new_tokens: of each completion.
        temperature: of the sampling; 0 takes the most likely token.
        seed: of the first prompt; each has its own.
    """

    tokenizer: Any = field(repr=False)
    prompts: tuple[Prompt, ...]
    max_new_tokens: int
    temperature: float
    seed: int

    def complete(self, model: Any, device: torch.device) -> tuple[str, ...]:
        """The completions, one a prompt, of the model as it is; it is moved to the device and otherwise left alone."""
        model.to(device)
        devices = [device] if device.type == "cuda" else []
        pad = self.tokenizer.pad_token_id
        how: dict[str, Any] = {"do_sample": self.temperature > 0, "max_new_tokens": self.max_new_tokens}
        how |= {"temperature": self.temperature} if self.temperature > 0 else {}
        how |= {"pad_token_id": self.tokenizer.eos_token_id if pad is None else pad}
        found = []
        with torch.random.fork_rng(devices), torch.no_grad(), evaluating(model):
            for number, prompt in enumerate(self.prompts):
                torch.manual_seed(self.seed + number)
                ids = torch.tensor([prompt.ids], device=device)
                written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)[0]
                if not model.config.is_encoder_decoder:
                    written = written[len(prompt.ids) :]
                found.append(self.tokenizer.decode(written, skip_special_tokens=True).strip())
        return tuple(found)


def sampler_for(
    task: Task,
    output: OutputSettings,
    data: DataSettings,
    *,
    tokenizer: Any,
    config: Any,
    held_out: MapBlocks | None,
    block_size: int,
    seed: int,
) -> Sampler | None:
    """The prompts that were given, then the first held-out examples, up to their answer or middle; None without any.

    Args:
        task: of the recipe.
        output: with the flags.
        data: with the prefix of a source.
        tokenizer: of the model.
        config: of the model, for the number of its positions.
        held_out: examples.
        block_size: the longest prompt of a held-out example, in tokens.
        seed: of the completions.

    Raises:
        ConfigurationError: a prompt without tokens, or with more than the model has room for; held-out examples
            without a validation set.
    """
    new = output.generation_max_new_tokens
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text_config, "max_position_embeddings", None) or 0
    room = positions - (0 if task == "seq2seq" else new) if positions > 0 else None
    prompts = [
        Prompt(text, tuple(_tokens(text, task, tokenizer, data.source_prefix))) for text in output.sample_prompts or ()
    ]
    if (output.sample_prompts or output.num_generation_samples) and room is not None and room < 1:
        raise ConfigurationError(
            f"--generation_max_new_tokens {new} takes all {positions} positions of the model: expected room for a "
            "prompt. Lower it."
        )
    for prompt in prompts:
        if not prompt.ids or (room is not None and len(prompt.ids) > room):
            raise ConfigurationError(
                f"--sample_prompts {prompt.text[:40]!r}: {len(prompt.ids)} tokens; expected at least 1"
                + ("" if room is None else f" and at most {max(room, 0)}, so that {new} more fit into the {positions} ")
                + ("" if room is None else "positions of the model")
                + ". Change it, or lower --generation_max_new_tokens."
            )
    if output.num_generation_samples:
        if held_out is None:
            raise ConfigurationError(
                f"--num_generation_samples {output.num_generation_samples}, but nothing is held out: expected a "
                "validation set to take prompts from. Give --validation_file, or --sample_prompts."
            )
        longest = block_size if room is None else min(block_size, room)
        prompts += list(_out_of(held_out, tokenizer, task, count=output.num_generation_samples, longest=longest))
    if not prompts:
        return None
    return Sampler(tokenizer, tuple(prompts), new, output.generation_temperature, seed)


def samples_of(
    sampler: Sampler | None, before: Sequence[str], after: Sequence[str], control: Sequence[str] = ()
) -> tuple[Sample, ...]:
    """What was written to each prompt, side by side; nothing where nothing was written."""
    if sampler is None or not after:
        return ()
    each: Sequence[str | None] = control or [None] * len(after)
    rows = zip(sampler.prompts, before, after, each, strict=True)
    return tuple(Sample(prompt=prompt.text, before=b, after=a, control=c) for prompt, b, a, c in rows)


def _tokens(text: str, task: Task, tokenizer: Any, prefix: str) -> Sequence[int]:
    """Of a prompt that a person typed, as the training shows such text to the model."""
    if task == "sft" and tokenizer.chat_template:
        asked = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        found: Sequence[int] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return found
    found = tokenizer(prefix + text if task == "seq2seq" else text)["input_ids"]
    end = tokenizer.eos_token_id
    # some tokenizers of causal models end a text, after which there is nothing to say
    return found[:-1] if task != "seq2seq" and len(found) > 1 and found[-1] == end else found


def _out_of(held_out: MapBlocks, tokenizer: Any, task: Task, *, count: int, longest: int) -> Iterator[Prompt]:
    for number in range(min(count, len(held_out))):
        example = held_out[number]
        assert isinstance(example, Mapping)
        ids = torch.as_tensor(example["input_ids"])
        if "position_ids" in example:  # several documents: the first one
            begins = (torch.as_tensor(example["position_ids"]) == 0).nonzero().flatten().tolist()
            ids = ids[: (begins[1:] or [len(ids)])[0]]
        if task == "clm":
            ids = ids[: max(1, len(ids) // 2)]
        elif task == "sft":
            answered = (torch.as_tensor(example["labels"]) != IGNORED).nonzero()
            ids = ids[: max(1, int(answered[0]))]
        ids = ids[: max(1, longest)] if task == "seq2seq" else ids[-max(1, longest) :]
        yield Prompt(tokenizer.decode(ids, skip_special_tokens=True).strip(), tuple(ids.tolist()))
