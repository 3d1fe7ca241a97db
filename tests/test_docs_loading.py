"""The tables of docs/loading.md name a test for each claim; those tests are there."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "loading.md").read_text(encoding="utf-8")


def test_every_named_test_exists():
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE))
    assert len(named) > 40
    for file, name in sorted(named):
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


def test_every_row_of_a_table_names_one():
    rows = [line for line in PAGE.splitlines() if line.startswith("|") and not re.match(r"\|[-|]+$|\| what", line)]
    without = [row for row in rows if "::test_" not in row]
    assert without == [row for row in without if "never imports hf_geglu" in row]


def test_every_failure_of_ours_is_on_the_page():
    """test_failures.py and the page have the same rows."""
    tree = ast.parse((TESTS / "test_failures.py").read_text(encoding="utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
    assert {name for name in names if f"test_failures.py::{name}" not in PAGE} == set()
