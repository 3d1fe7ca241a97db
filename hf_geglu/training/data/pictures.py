"""Pictures as they are stored: encoded bytes, wherever they lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from hf_geglu.errors import ConfigurationError, DataError
from hf_geglu.training.data.sources import Rows


def undecoded(rows: Rows, column: str) -> Rows:
    """The same rows with {"bytes", "path"} in the place of pictures: what `Stored.of` takes.

    Raises:
        ConfigurationError: older versions of `datasets` do not say the types of a stream's columns.
    """
    from datasets import Image, __version__

    if rows.features is None:
        raise ConfigurationError(
            f"--streaming: datasets {__version__} does not say which column of this stream has pictures: expected a "
            "version that does. Upgrade it (pip install -U datasets), or leave --streaming out."
        )
    return rows.cast_column(column, Image(decode=False))


@dataclass(frozen=True)
class Stored:
    """A picture that nobody has looked at yet.

    Attributes:
        content: as it was encoded.
        name: of its file, or which row it is.
    """

    content: bytes = field(repr=False)
    name: str

    @classmethod
    def of(cls, held: Mapping[str, Any] | None, number: int) -> Stored:
        """Out of the row of that number: in the row itself, in a file, on the Hub.

        Raises:
            DataError: the row has none, or it cannot be fetched.
        """
        if held is None:
            raise DataError(f"row {number} has no picture: expected one in each. Leave it out.")
        path = str(held["path"] or "")
        name = path.replace("\\", "/").rpartition("/")[2] or f"of row {number}"
        if held["bytes"] is not None:
            return cls(bytes(held["bytes"]), name)
        import fsspec

        try:
            with fsspec.open(path, "rb") as file:
                return cls(file.read(), name)
        except OSError as error:
            raise DataError(
                f"the picture {name} cannot be fetched: expected a file that can be read. Check the data, and the way "
                "to them."
            ) from error

    def check(self) -> None:
        """Look at its head.

        Raises:
            DataError: it is none that pillow reads.
        """
        from PIL import Image

        try:
            with Image.open(BytesIO(self.content)) as picture:
                picture.verify()
        except (OSError, SyntaxError, ValueError) as error:
            raise self._broken() from error

    def decoded(self) -> Any:
        """In RGB, the right way up, as `datasets` decodes it.

        Raises:
            DataError: it is none that pillow reads.
        """
        from datasets import Image

        try:
            return Image().decode_example({"bytes": self.content, "path": None}).convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise self._broken() from error

    def _broken(self) -> DataError:
        return DataError(
            f"the picture {self.name} cannot be read: expected png, jpeg or another format that pillow "
            "reads. Leave it out, or mend it."
        )
