"""The shape of the code: imports go one way, the public names are as promised, the file that travels needs nothing of
ours."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_geglu

PACKAGE = Path(hf_geglu.__file__).parent

# Lowest first; names on one line may not import each other, folders count as one.
LAYERS = [
    ["modeling_geglu"],
    ["errors"],
    ["files"],
    ["auto", "variants", "functional", "width", "modes", "fingerprint"],
    ["inputs", "ops"],
    ["sites", "skeleton"],
    ["selection", "conversions", "identifying"],
    ["native", "cost", "choice", "narrow_record"],
    ["sizing"],
    ["plan"],
    ["planning"],
    ["declaration"],
    ["surgery"],
    ["distance"],
    ["verify", "streaming"],
    ["calibration"],
    ["narrowing"],
    ["provenance"],
    ["converting", "config", "optimizing"],
    ["collapsing"],
    ["inspecting"],
    ["hub"],
    ["neighbours", "checkpoint"],
    ["training"],
    ["demo"],
    ["cli"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# The same inside the largest room, in the order of a run read backwards.
TRAINING_LAYERS = [
    ["settings", "objectives", "parser", "memory"],
    ["data", "processes", "config_file"],
    ["parameters", "evaluation", "tasks"],
    ["updates", "reports", "opening", "distillation", "leak", "callback"],
    ["checkpoints", "best", "loss"],
    ["loop", "output", "pushing"],
    ["outset"],
    ["forecast", "run"],
    ["command_line"],
]


def _imports(path, package="hf_geglu"):
    """Names of the rooms of `package` that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{package}."):
            yield node.module.removeprefix(f"{package}.").split(".")[0]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith(f"{package}."):
                    yield alias.name.removeprefix(f"{package}.").split(".")[0]


def _room(path, folder=PACKAGE):
    return path.relative_to(folder).parts[0].removesuffix(".py")


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    room = _room(path)
    assert room in RANK, f"{room} has no place in LAYERS"
    for target in _imports(path):
        if target != room and target in RANK:
            assert RANK[target] < RANK[room], f"{room} imports {target}, which stands above it"


def test_imports_go_one_way_inside_training():
    rank = {name: rank for rank, names in enumerate(TRAINING_LAYERS) for name in names}
    training = PACKAGE / "training"
    for path in (path for path in training.rglob("*.py") if path != training / "__init__.py"):
        room = _room(path, training)
        for target in _imports(path, "hf_geglu.training"):
            assert target == room or rank[target] < rank[room], f"{room} imports {target}, which stands above it"


def test_the_file_that_travels_needs_torch_and_transformers_only():
    tree = ast.parse((PACKAGE / "modeling_geglu.py").read_text(encoding="utf-8"))
    roots = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    roots |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert roots - set(sys.stdlib_module_names) == {"torch", "transformers"}


def test_public_names():
    assert set(hf_geglu.__all__) <= set(dir(hf_geglu))
    for name in hf_geglu.__all__:
        value = getattr(hf_geglu, name)
        assert name == "VARIANTS" or value.__doc__
        assert not isinstance(value, type(ast))  # a function or class, not the module that happens to bear its name
    with pytest.raises(AttributeError):
        _ = hf_geglu.nonsense


def test_import_is_lean():
    """Registration must not pull in what only conversions need; and importing twice does nothing."""
    code = (
        "import sys, hf_geglu, importlib; importlib.reload(hf_geglu)\n"
        "heavy = ['hf_geglu.plan', 'hf_geglu.planning', 'hf_geglu.sites', 'transformers.modeling_utils']\n"
        "heavy += ['transformers.activations', 'transformers.models.auto.configuration_auto', 'datasets', 'typer']\n"
        "print([name for name in heavy if name in sys.modules])\n"
        "from transformers.activations import ACT2FN; from transformers import AutoConfig\n"
        "print('geglu' in ACT2FN, AutoConfig.for_model('geglu_bert').model_type)"
    )
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:2] == ["[]", "True geglu_bert"]


def test_floors_agree():
    """pyproject's lowest transformers is the one that constraints-floor.txt proves."""
    root = PACKAGE.parent
    assert '"transformers>=4.57"' in (root / "pyproject.toml").read_text(encoding="utf-8")
    assert "transformers==4.57" in (root / "constraints-floor.txt").read_text(encoding="utf-8")


def test_every_public_name_may_be_the_first_that_is_used():
    """Registration waits for transformers' own imports, whichever of our modules asks for them first."""
    code = """
import os, sys, torch, hf_geglu
assert not [name for name in sys.modules if name.startswith("transformers.models")]
for name in {home: name for name, home in hf_geglu._HOMES.items()}.values():  # one of each module
    child = os.fork()
    if not child:
        try:
            getattr(hf_geglu, name)
            from transformers import AutoConfig
            from transformers.activations import ACT2FN
            assert AutoConfig.for_model("geglu_bert").model_type == "geglu_bert"
            assert "geglu" in ACT2FN
        except BaseException as error:
            print(name, type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{name} cannot be the first")
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-600:]
