"""What a task is: which class of model, how its data becomes examples, what is predicted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_geglu.training.data.corpus import Corpus
from hf_geglu.training.objectives.objective import Objective, Task
from hf_geglu.training.settings.data import DataSettings


@dataclass(frozen=True)
class Request:
    """What a task is given to prepare its data.

    Attributes:
        data: the settings.
        processor: tokenizer or image processor of the model.
        config: of the model.
        block_size: length of an example, in tokens.
        target_size: length of what is to be written, in tokens.
        seed: of splits, mixtures and masks.
    """

    data: DataSettings
    processor: Any
    config: Any
    block_size: int
    seed: int
    target_size: int = 0


@dataclass(frozen=True)
class Prepared:
    """What a task makes of it.

    Attributes:
        objective: makes batches.
        corpus: examples.
        model_options: for `from_pretrained`, such as the classes of a head.
        distils: the logits say a distribution, so that those of another model can be learned from.
    """

    objective: Objective
    corpus: Corpus
    model_options: Mapping[str, Any] = field(default_factory=dict)
    distils: bool = True


@dataclass(frozen=True)
class TaskKind:
    """One task.

    Attributes:
        name: on the command line.
        says: what is predicted, for people.
        auto_class: class of transformers that loads the model.
        expected: what kind of model that is, for messages.
        prepare: settings -> examples and objective.
        reads: "tokens" or "pictures".
        writes: the model can go on from a prompt.
        needs_pad: a batch cannot be made, or not be understood by the model, without a padding token.
    """

    name: Task
    says: str
    auto_class: str
    expected: str
    prepare: Callable[[Request], Prepared]
    reads: str = "tokens"
    needs_pad: bool = False
    writes: bool = False
