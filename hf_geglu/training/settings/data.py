"""Which data, and how it becomes examples."""

# ruff: noqa: RUF009 - flag is dataclasses.field with less to write
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_geglu.training.settings.flags import flag, require

_TEXTS = ("clm", "mlm")
_PACKED = ("clm", "mlm", "sft")
_TOKENISED = ("clm", "mlm", "sft", "seq2seq", "text_classification", "token_classification")
_CLASSES = ("text_classification", "token_classification", "image_classification")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which data, and how it becomes examples. Not every recipe has every field.

    Raises:
        ConfigurationError: a value out of its range, or two settings that exclude each other.
    """

    _argument_group_name = "data"

    dataset_name: str | None = flag(None, "Hub id or local folder of a dataset")
    dataset_config_name: str | None = flag(None, "configuration of the dataset", aliases=("dataset_config",))
    dataset_revision: str | None = flag(None, "branch, tag or commit of the dataset on the Hub")
    dataset_train_split: str = flag("train", "name of the split to train on")
    dataset_test_split: str | None = flag(None, "name of the split to evaluate on; default: validation, if any")
    train_file: list[str] | None = flag(
        None, "csv, tsv, json, jsonl, txt or parquet files, or a folder of them", aliases=("train_dir",)
    )
    validation_file: list[str] | None = flag(None, "the same, to evaluate on", aliases=("validation_dir",))
    dataset_mixture: list[str] | None = flag(
        None, "several sources, ID[:CONFIG][@REVISION] or PATH, each with =WEIGHT", metavar="SOURCE=WEIGHT"
    )
    mixture_stop: Literal["first_exhausted", "all_exhausted"] = flag(
        "first_exhausted", "first_exhausted: no row twice; all_exhausted: repeat rows"
    )
    text_column: str | None = flag(
        None,
        "column with the text; default: found by name",
        aliases=("text_column_name", "dataset_text_field"),
        tasks=_TOKENISED,
    )
    text_pair_column: str | None = flag(
        None, "column with a second text; default: found by name", tasks=("text_classification",)
    )
    target_column: str | None = flag(
        None, "column with what is to be written; default: found", aliases=("summary_column",), tasks=("seq2seq",)
    )
    source_lang: str | None = flag(None, "key of the text in a `translation` column", tasks=("seq2seq",))
    target_lang: str | None = flag(None, "key of its translation", tasks=("seq2seq",))
    source_prefix: str = flag("", "put before every text, as T5 wants it", off="''", tasks=("seq2seq",))
    image_column: str | None = flag(
        None,
        "column with the picture; default: the only one",
        aliases=("image_column_name",),
        tasks=("image_classification",),
    )
    label_column: str | None = flag(
        None, "column with the class; default: found by name", aliases=("label_column_name",), tasks=_CLASSES
    )
    label_all_tokens: bool = flag(False, "label every token of a word, not its first", tasks=("token_classification",))
    augment: bool = flag(True, "crop and mirror pictures at random while training", tasks=("image_classification",))
    text_unit: Literal["file", "line", "paragraph"] = flag(
        "file", "one document of a txt file: file, line or paragraph", tasks=(*_TEXTS, "sft")
    )
    validation_split_percentage: float = flag(
        5.0, "share of the rows held out where there is no validation set", unit="percent", off="0"
    )
    dedup_validation: bool = flag(True, "drop validation rows that occur in the training data", off="false")
    max_train_samples: int | None = flag(None, "use only the first so many rows", unit="rows", aliases=("max_samples",))
    max_eval_samples: int | None = flag(None, "the same of the validation set", unit="rows")
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = flag(
        None, "default: fractions say regression, lists several labels", metavar="TYPE", tasks=("text_classification",)
    )
    label_names: list[str] | None = flag(
        None, "the classes in order, where the data do not say them", metavar="NAME", tasks=_CLASSES
    )
    streaming: bool = flag(False, "read the data while training; needs --max_steps")
    block_size: int | None = flag(
        None,
        "length of a block; default: 1024, or what the model takes if less",
        unit="tokens",
        aliases=("max_seq_length", "max_length", "max_source_length"),
        tasks=_TOKENISED,
    )
    max_target_length: int | None = flag(
        None,
        "length of what is to be written; default: 128, or what the model takes",
        unit="tokens",
        tasks=("seq2seq",),
    )
    packing: bool | None = flag(None, "several documents a block; default: yes, for sft no", off="false", tasks=_PACKED)
    packing_strategy: Literal["bfd", "wrapped"] = flag(
        "bfd", "bfd: whole documents, kept apart if the model can; wrapped: cut", tasks=_TEXTS
    )
    line_by_line: bool = flag(False, "the same as --packing false", tasks=("mlm",))
    mlm_probability: float = flag(0.15, "share of the tokens to predict", unit="0..1", tasks=("mlm",))
    assistant_only_loss: bool = flag(True, "train on the answers only, not on questions", off="false", tasks=("sft",))
    completion_only_loss: bool = flag(True, "train on completions only, not on prompts", off="false", tasks=("sft",))
    chat_template_path: str | None = flag(None, "Jinja file with the chat template to use", tasks=("sft",))
    use_cache: bool = flag(True, "keep tokenised text for the next run", off="false", tasks=_PACKED)

    def __post_init__(self) -> None:
        given = [
            f"--{name}"
            for name in ("dataset_name", "train_file", "dataset_mixture")
            if getattr(self, name) not in (None, [])
        ]
        require(
            len(given) == 1,
            " and ".join(given) or "no dataset",
            "one of --dataset_name, --train_file and --dataset_mixture",
            "A Hub id or a folder for the first, csv, json, jsonl, txt or parquet files for the second.",
        )
        require(
            0 <= self.validation_split_percentage < 100,
            f"validation_split_percentage={self.validation_split_percentage:g}",
            "0 <= percentage < 100",
            "0 trains without an evaluation.",
        )
        require(
            0 < self.mlm_probability < 1, f"mlm_probability={self.mlm_probability:g}", "0 < share < 1", "0.15 is usual."
        )
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}={value}", "1 or more", "Leave it out to use all rows.")
        for name in ("block_size", "max_target_length"):
            value = getattr(self, name)
            require(value is None or value >= 4, f"{name}={value}", "4 or more", "128 is small.")
        require(
            (self.source_lang is None) == (self.target_lang is None),
            f"source_lang={self.source_lang} and target_lang={self.target_lang}",
            "both or neither",
            "They are keys of the column `translation`, such as en and de.",
        )
        require(
            not (self.line_by_line and self.packing),
            "--line_by_line and --packing",
            "one of the two",
            "--line_by_line makes a block of each document.",
        )
        require(
            self.dataset_revision is None or self.dataset_name is not None,
            f"--dataset_revision {self.dataset_revision} without --dataset_name",
            "a dataset of the Hub that the revision belongs to",
            "In a mixture write ID@REVISION=WEIGHT.",
        )

    def packs(self, *, default: bool) -> bool:
        """Whether documents share blocks."""
        return False if self.line_by_line else default if self.packing is None else self.packing
