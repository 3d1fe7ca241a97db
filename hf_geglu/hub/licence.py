"""The licence of a variant is that of its base. Read from the base's card; never guessed."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_geglu.provenance import Base

logger = logging.getLogger(__name__)

UNKNOWN = "other"
FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*")
"""What must travel with copies and derived works (Apache-2.0, section 4; Llama and Gemma licences)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Licence:
    """As the Hub's metadata has it: `license`, and for "other" its name and link."""

    license: str = UNKNOWN
    license_name: str | None = None
    license_link: str | None = None

    @property
    def known(self) -> bool:
        """Whether a reader learns which licence it is."""
        return self.license not in (UNKNOWN, "unknown") or self.license_name is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseCard:
    """What a variant's card inherits from its base's card."""

    licence: Licence = Licence()
    language: Any = None
    pipeline_tag: str | None = None
    base_model: str | None = None
    """What the base itself was made from, by its own card."""


def base_card(base: Base, folder: Path | None = None) -> BaseCard:
    """Read the card of the base.

    Args:
        base: what was converted.
        folder: where it lies, if it is a local folder; otherwise its card is taken from the Hub (or its cache).

    Returns:
        What was found; an unknown licence, with a warning, where there is no card or it names none.
    """
    from huggingface_hub import ModelCard

    why = "the base is not known"
    data: dict[str, Any] = {}
    source: str | Path | None = folder / "README.md" if folder is not None else base.id
    if source is not None:
        why = f"{base.name} has no card that says so"
        try:
            data = ModelCard.load(source, ignore_metadata_errors=True).data.to_dict()
        except Exception as error:  # no network, no such card, damaged metadata: none of it may cost a save
            logger.debug("no card of %s: %s", base.name, error)
    found = inherits(data)
    if not found.licence.known:
        logger.warning("licence unknown (%s): the card says 'other'; push asks for one with --license", why)
    return found


def inherits(data: Mapping[str, Any]) -> BaseCard:
    """What a card with that metadata hands on."""
    origin = data.get("base_model")
    return BaseCard(
        licence=licence_from(data),
        language=data.get("language"),
        pipeline_tag=data.get("pipeline_tag"),
        base_model=origin if isinstance(origin, str) else None,
    )


def card_data(text: str) -> dict[str, Any]:
    """The metadata of a card.

    Raises:
        ValueError: it cannot be read.
    """
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        data: dict[str, Any] = ModelCard(text).data.to_dict()  # type: ignore[no-untyped-call]
    except YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return data


def licence_from(data: Mapping[str, Any]) -> Licence:
    """The licence that a card's metadata names."""
    named = data.get("license")
    named = named[0] if isinstance(named, list) and named else named
    if not isinstance(named, str) or not named.strip():
        return Licence()
    return Licence(license=named.strip(), license_name=data.get("license_name"), license_link=data.get("license_link"))


def copy_licence_files(base: Path, folder: Path) -> None:
    """The base's licence texts go along, where the base is a local folder."""
    for path in _licence_files(base):
        if not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def _licence_files(folder: Path) -> Iterator[Path]:
    for pattern in FILES:
        yield from (path for path in sorted(folder.glob(pattern)) if path.is_file())
