"""What a command line names: a model by its id or folder, or a class in a file or a module."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from hf_geglu.errors import IdentifyError


def names_code(target: str) -> bool:
    """Whether it is FILE.py, FILE.py:NAME or package.module:NAME, rather than a model."""
    path, _, name = target.partition(":")
    return path.endswith(".py") or (bool(name) and all(part.isidentifier() for part in path.split(".")))


def load_units(target: str) -> dict[str, Any]:
    """The units that FILE.py[:NAME] or package.module:NAME names, by name; importing it runs its code.

    Without a name: every module class and every instance of one that the file defines itself.

    Raises:
        IdentifyError: there is no such file, module or name, or nothing in it can be made without arguments.
    """
    path, _, name = target.partition(":")
    module = _imported(path)
    if name:
        held: Any = module
        for part in name.split("."):
            if not hasattr(held, part):
                near = ", ".join(sorted(n for n in vars(module) if not n.startswith("_"))[:12])
                raise IdentifyError(f"{path} has no {name!r}; it has {near}")
            held = getattr(held, part)
        return {name: made(held, name)}
    own = {
        key: value
        for key, value in vars(module).items()
        if (inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__ == module.__name__)
        or isinstance(value, nn.Module)
    }
    if not own:
        raise IdentifyError(f"{path} defines no nn.Module; name a function as {path}:NAME")
    return {key: made(value, key) for key, value in own.items()}


def made(held: Any, name: str) -> Any:
    """An instance, where `held` is a class: from its default arguments, and small numbers for those it must have.

    Raises:
        IdentifyError: it cannot be made so.
    """
    if not (inspect.isclass(held) and issubclass(held, nn.Module)):
        return held
    parameters = list(inspect.signature(held).parameters.values())
    required = [one for one in parameters if one.default is one.empty and one.kind <= one.POSITIONAL_OR_KEYWORD]
    sizes = [16 * (position + 1) for position in range(len(required))]
    problem: Exception | None = None
    for arguments in (sizes, [16] * len(required)):
        try:
            return held(*arguments)
        except Exception as error:  # somebody else's constructor
            problem = error
    wanted = ", ".join(one.name for one in required)
    raise IdentifyError(
        f"{name}({wanted}) could not be made of the numbers {sizes}: {type(problem).__name__}: {problem}. "
        f"Put an instance into the file, such as `unit = {name}(...)`, and name that"
    ) from problem


def _imported(path: str) -> ModuleType:
    if not path.endswith(".py"):
        try:
            return importlib.import_module(path)
        except ImportError as error:
            raise IdentifyError(f"{path} cannot be imported: {error}") from error
    file = Path(path)
    if not file.is_file():
        raise IdentifyError(f"there is no file {path}")
    name = f"_identified_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever somebody's file does
        del sys.modules[name]
        raise IdentifyError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module
