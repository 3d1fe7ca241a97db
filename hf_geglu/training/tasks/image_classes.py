"""Image classification: a picture and its class."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_geglu.errors import ConfigurationError, DataError
from hf_geglu.training.data.batches import Blocks, MapBlocks
from hf_geglu.training.data.corpus import Corpus, StreamedBlocks, require_first
from hf_geglu.training.data.pictures import Stored, undecoded
from hf_geglu.training.data.rows import RowSets, row_sets
from hf_geglu.training.data.sources import Rows
from hf_geglu.training.objectives.metrics import ClassMetric
from hf_geglu.training.objectives.objective import Batch, Example
from hf_geglu.training.settings.data import DataSettings
from hf_geglu.training.tasks.classes import (
    Classes,
    all_of_one_class,
    classes_of,
    find_label_column,
    streamed_classes,
    told,
)
from hf_geglu.training.tasks.kind import Prepared, Request, TaskKind

AREA = (0.35, 1.0)
RATIO = (3 / 4, 4 / 3)
"""Share of the area and ratio of the sides of a random crop: the ratios of Inception (arXiv:1409.4842, section 6); its
crops go down to 8 %, which is for training from nothing."""


@dataclass(frozen=True)
class PictureClasses:
    """Predict the class of a picture. Crops and mirrors depend on the seed and the position in the run only.

    Attributes:
        processor: image processor of the model.
        metric: accuracy and F1.
    """

    processor: Any = field(repr=False, compare=False)
    metric: ClassMetric

    def batch(self, examples: Sequence[Example], *, positions: Sequence[int], seed: int) -> Batch:
        """pixel_values (B, channels, height, width) and labels (B,)."""
        rows = [example for example in examples if isinstance(example, Mapping)]
        pictures = [
            _varied(_decoded(row), random.Random(f"{seed}:{position}")) if row["varied"] else _decoded(row)
            for row, position in zip(rows, positions, strict=True)
        ]
        pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([int(row["labels"]) for row in rows])}


@dataclass(frozen=True)
class Pictures:
    """Pictures that are read when they are asked for.

    Attributes:
        rows: a `datasets.Dataset` with the columns image and label.
        classes: their names.
        varied: crop and mirror them.
    """

    rows: Rows = field(repr=False)
    classes: Classes
    varied: bool

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {
            "image": row["image"].convert("RGB"),
            "labels": self.classes.number(row["label"]),
            "varied": self.varied,
        }


@dataclass(frozen=True)
class _Reader:
    """From the rows of a stream to examples, whose pictures are decoded when a batch needs them: a resumed run and the
    other processes go by without."""

    classes: Classes

    def examples(self, rows: Rows, *, varied: bool) -> Iterator[dict[str, Any]]:
        """One after the other."""
        for number, row in enumerate(undecoded(rows, "image")):
            yield {
                "image": Stored.of(row["image"], number),
                "labels": self.classes.number(row["label"]),
                "varied": varied,
            }


def _decoded(example: Mapping[str, Any]) -> Any:
    image = example["image"]
    return image.decoded() if isinstance(image, Stored) else image


def _varied(picture: Any, draw: random.Random) -> Any:
    """A random crop, mirrored half of the time."""
    width, height = picture.size
    area = width * height * draw.uniform(*AREA)
    ratio = draw.uniform(*RATIO)
    w, h = (min(round((area * r) ** 0.5), side) for r, side in ((ratio, width), (1 / ratio, height)))
    left, top = draw.randint(0, width - w), draw.randint(0, height - h)
    picture = picture.crop((left, top, left + max(w, 1), top + max(h, 1)))
    if draw.random() < 0.5:
        from PIL import ImageOps

        picture = ImageOps.mirror(picture)
    return picture


def find_columns(found: Mapping[str, str], request: Request) -> dict[str, str]:
    """Picture and class."""
    data = request.data
    exist = ", ".join(f"{name} ({kind})" for name, kind in found.items()) or "none"
    pictures = [name for name, kind in found.items() if "PIL" in kind or kind.startswith("Image")]
    image = data.image_column or (pictures[0] if len(pictures) == 1 else None)
    if image not in pictures:
        raise DataError(
            f"--image_column {data.image_column}: expected a column of pictures. The columns: {exist}."
            if data.image_column
            else f"{len(pictures)} columns hold pictures: expected one, or --image_column. The columns: {exist}."
        )
    return {image: "image", find_label_column(found, data.label_column): "label"}


def _prepare(request: Request) -> Prepared:
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            "pillow is not installed: expected it for reading pictures. Run: pip install pillow"
        ) from error
    data = request.data
    sets = row_sets(
        data, lambda found: find_columns(found, request), inputs=("image",), seed=request.seed, pictures=True
    )
    label = next(old for old, new in sets.columns.items() if new == "label")
    known = getattr((sets.train.features or {}).get("label"), "names", None)
    if data.streaming:
        classes = streamed_classes(known=known, config=request.config, column=label, given=data.label_names)
        train, validation, lines = _streamed(sets, classes, data)
    else:
        every = [rows for rows in (sets.train, sets.validation) if rows is not None]
        values = [value for rows in every for value in rows.select_columns(["label"])["label"]]
        classes = classes_of(values, known=known, config=request.config, column=label, given=data.label_names)
        for rows in every:
            _readable(rows)
        train = Pictures(sets.train, classes, varied=data.augment)
        validation = None if sets.validation is None else Pictures(sets.validation, classes, varied=False)
        lines = [f"training: {len(train):,} pictures"]
    lines += [*sets.lines, f"{len(classes.names)} classes: {told(classes.names)}"]
    if validation is not None:
        lines.append(f"validation: {len(validation):,} pictures")
    objective = PictureClasses(request.processor, ClassMetric(len(classes.names)))
    column = next(old for old, new in sets.columns.items() if new == "image")
    return Prepared(objective, Corpus(train, validation, tuple(lines), column, sets.revision), classes.options())


def _streamed(sets: RowSets, classes: Classes, data: DataSettings) -> tuple[Blocks, MapBlocks | None, list[str]]:
    """The stream, and what is evaluated on, which is held in memory as it is stored."""
    reader = _Reader(classes)
    validation = None
    if sets.validation is not None:
        validation = list(reader.examples(sets.validation, varied=False))
        for example in validation:
            example["image"].check()
        if not validation:
            raise DataError("a validation set without pictures: expected some. Check the data, or --max_eval_samples.")
    train = StreamedBlocks(lambda: reader.examples(sets.train, varied=data.augment))
    require_first(train)
    lines = ["training: a stream, read in its own order", *all_of_one_class(sets.train, "label")]
    return train, validation, lines


def _readable(rows: Rows) -> None:
    """Look at the head of every picture, so that a broken one is found before the first step."""
    for number, row in enumerate(undecoded(rows.select_columns(["image"]), "image")):
        Stored.of(row["image"], number).check()


IMAGE_CLASSIFICATION = TaskKind(
    "image_classification",
    "the class of a picture",
    "AutoModelForImageClassification",
    "a model that can classify pictures",
    _prepare,
    reads="pictures",
)
