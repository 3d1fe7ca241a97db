"""Notes that are read when another package is imported, and functions that are wrapped once."""

import importlib
import sys

import pytest

from hf_geglu.neighbours import hooks

CALLED = []


def note(module):
    CALLED.append(module.__name__)


def failing(module):
    raise RuntimeError(f"while {module.__name__} was told")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package nobody has imported yet; forgotten afterwards."""
    CALLED.clear()
    name = f"neighbour_{abs(hash(tmp_path))}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("VALUE = 1\n")
    (tmp_path / name / "inner.py").write_text("VALUE = 2\n")
    (tmp_path / name / "broken.py").write_text("raise ImportError('no such kernel')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]
    for module in [module for module in hooks._FINDER.notes if module.partition(".")[0] == name]:
        del hooks._FINDER.notes[module]


def test_called_once_after_the_module_is_there(package):
    hooks.when_imported(package, f"{__name__}:note")
    hooks.when_imported(package, f"{__name__}:note")
    assert package not in sys.modules
    assert CALLED == []
    module = importlib.import_module(package)
    assert [package] == CALLED
    assert module.VALUE == 1
    importlib.import_module(package)
    assert [package] == CALLED
    assert type(module.__loader__).__name__ == type(module.__spec__.loader).__name__ == "SourceFileLoader"
    assert importlib.reload(module).VALUE == 1
    assert [package, package] == CALLED  # its functions are new ones


def test_called_at_once_for_what_is_imported(package):
    importlib.import_module(package)
    hooks.when_imported(package, f"{__name__}:note")
    assert [package] == CALLED


def test_submodules(package):
    hooks.when_imported(f"{package}.inner", f"{__name__}:note")
    importlib.import_module(package)
    assert CALLED == []
    assert importlib.import_module(f"{package}.inner").VALUE == 2
    assert [f"{package}.inner"] == CALLED


def test_a_module_that_fails_fails_as_before(package):
    hooks.when_imported(f"{package}.broken", f"{__name__}:note")
    with pytest.raises(ImportError, match="no such kernel"):
        importlib.import_module(f"{package}.broken")
    assert CALLED == []


def test_a_note_that_fails_is_not_hidden(package):
    hooks.when_imported(package, f"{__name__}:failing")
    with pytest.raises(RuntimeError, match="was told"):
        importlib.import_module(package)


def test_a_module_that_is_not_installed_stays_so(package):
    hooks.when_imported(f"{package}_gone", f"{__name__}:note")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{package}_gone")


def test_wrapping():
    class Owner:
        def method(self, x):
            return x

        @classmethod
        def make(cls, x):
            return cls.__name__, x

    def twice(original):
        return lambda *args: (original(*args), original(*args))

    for _ in range(2):  # the second time is no second wrapper
        hooks.wrap(Owner, "method", twice)
        hooks.wrap(Owner, "make", twice)
        hooks.wrap(Owner, "another versions", twice)
    assert Owner().method(3) == (3, 3)
    assert Owner.make(4) == (("Owner", 4), ("Owner", 4))
    assert Owner.make.__name__ == "make"
