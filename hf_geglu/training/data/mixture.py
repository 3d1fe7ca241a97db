"""Several sources as one: each row comes from source i with probability w_i / sum(w), drawn from the seed.

The order is a function of the seed, the weights and the sources; so it is the same in every process and after a resume,
for streams too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from hf_geglu.errors import ConfigurationError, DataError
from hf_geglu.training.data.sources import Rows, Source, open_source, validation_rows
from hf_geglu.training.settings.data import DataSettings

_FROM = "_hf_geglu_source"
_NAMED = re.compile(r"(?P<id>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^@]+))?(?:@(?P<revision>.+))?")


@dataclass(frozen=True)
class Ingredient:
    """One source of a mixture.

    Attributes:
        name: a file, a folder, or the id of a dataset.
        weight: how much of it, relative to the others.
        config, revision: of a dataset on the Hub.
    """

    name: str
    weight: float
    config: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Ingredient:
        """SOURCE=WEIGHT, where SOURCE is ID[:CONFIG][@REVISION] or a path.

        Raises:
            ConfigurationError: it is not.
        """
        name, _, weight = text.rpartition("=")
        try:
            number = float(weight)
        except ValueError:
            number = -1.0
        if not name or not 0 < number < float("inf"):
            raise ConfigurationError(
                f"--dataset_mixture {Path(text).name}: expected SOURCE=WEIGHT with a weight above 0, such as "
                "wiki.jsonl=0.7. Give one for each source."
            )
        if Path(name).exists():
            return cls(name, number)
        found = _NAMED.fullmatch(name)
        if found is None or Path(name).suffix in (".csv", ".tsv", ".json", ".jsonl", ".txt", ".parquet"):
            raise DataError(f"{Path(name).name} does not exist: expected a file, a folder or a dataset's id.")
        return cls(found["id"], number, found["config"], found["revision"])

    def settings(self, data: DataSettings) -> DataSettings:
        """Those that read this source alone."""
        file = Path(self.name).is_file()
        return replace(
            data,
            dataset_mixture=None,
            train_file=[self.name] if file else None,
            dataset_name=None if file else self.name,
            dataset_config_name=self.config,
            dataset_revision=None if file else self.revision,
            validation_file=None,
        )


def open_mixture(data: DataSettings, choose: Callable[[Rows], Rows], *, seed: int) -> tuple[Source, tuple[str, ...]]:
    """The mixture as one source, its rows reduced to what `choose` leaves of each; and a line that says how many rows
    of each source are in it.

    Raises:
        ConfigurationError: a source without a weight.
        DataError: a source that cannot be read, or is a running text.
    """
    from datasets import interleave_datasets

    parts = [Ingredient.parse(text) for text in data.dataset_mixture or ()]
    if len(parts) < 2:
        raise ConfigurationError("--dataset_mixture of one source: expected two or more. Or give --dataset_name.")
    rows = []
    for number, part in enumerate(parts):
        source = open_source(part.settings(data))
        if source.joined:
            raise DataError(
                f"{Path(part.name).name} is a running text, which has no rows to mix: expected documents. Add "
                "--text_unit line or --text_unit paragraph."
            )
        chosen = choose(source.train)
        rows.append(chosen if data.streaming else chosen.add_column(_FROM, [number] * len(chosen)))
    total = sum(part.weight for part in parts)
    try:
        mixed = interleave_datasets(
            rows,
            probabilities=[part.weight / total for part in parts],
            seed=seed,
            stopping_strategy=data.mixture_stop,
        )
    except ValueError as error:  # columns of different types
        raise DataError(f"sources that do not go together: {error} Expected the same columns in each.") from error
    validation = choose(validation_rows(data, joined=False)) if data.validation_file else None
    names = [Path(part.name).name if Path(part.name).exists() else part.name for part in parts]
    if data.streaming:
        shares = ", ".join(f"{part.weight / total:.0%} {name}" for part, name in zip(parts, names, strict=True))
        return Source(mixed, validation, joined=False), (f"mixture: a stream of {shares}",)
    drawn: list[int] = mixed[_FROM]
    counts = [sum(1 for number in drawn if number == i) for i in range(len(parts))]
    told = ", ".join(
        f"{count:,} of {len(of):,} rows of {name}" for count, of, name in zip(counts, rows, names, strict=True)
    )
    more = "; more than there are: repeated" if any(c > len(of) for c, of in zip(counts, rows, strict=True)) else ""
    return Source(mixed.remove_columns(_FROM), validation, joined=False), (f"mixture: {told}{more}",)
