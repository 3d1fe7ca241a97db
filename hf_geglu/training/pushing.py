"""The finished model on the Hub: what can be checked is checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from hf_geglu.errors import ConfigurationError, HfGegluError, PushError
from hf_geglu.training.settings.run import OutputSettings


def place_on_hub(output: OutputSettings, folder: Path) -> str | None:
    """The repository of --push_to_hub, which this login may write; None where nothing is to be pushed.

    Raises:
        PushError: no login, one that may only read, or somebody else's repository.
    """
    if not output.push_to_hub:
        return None
    from hf_geglu.hub.push import writable

    return writable(output.hub_model_id or folder.resolve().name)


def check_variant(model: nn.Module) -> None:
    """Refuse to push what has no manifest to check it by.

    Raises:
        ConfigurationError: the model is no variant.
    """
    from hf_geglu.hub.push import is_variant

    if not is_variant(model):
        raise ConfigurationError(
            f"--push_to_hub of a {type(model).__name__} that is not converted: expected a variant, which is checked by "
            "its manifest. Add --convert, or push the finished folder with `hf upload`."
        )


def push_finished(folder: Path, repo: str) -> str:
    """Push it, private, and check what the Hub gives back; the address of the commit.

    Raises:
        PushError: it was not pushed; the folder is as it was.
    """
    from hf_geglu.hub.push import push

    try:
        done = push(folder, repo)
    except HfGegluError as error:
        raise PushError(
            f"{error} The training is done and whole in {folder.name}: once that is mended, run `hf-geglu push "
            f"{folder.name} {repo}`."
        ) from error
    return str(done.url)
