"""What the README tells people to paste works."""

import re
from pathlib import Path

import transformers
from tiny_models import tiny
from tiny_training import causal_tokenizer

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_ten_lines_on_ones_own_model(tmp_path, monkeypatch, capsys):
    tiny("gpt2").save_pretrained(tmp_path / "base")
    causal_tokenizer().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(snippet.replace("openai-community/gpt2", "base"), names)
    assert "2 FFN blocks are geglu now, exact" in capsys.readouterr().out
    assert type(names["again"]).__name__ == "GegluGPT2LMHeadModel"
    assert transformers.AutoTokenizer.from_pretrained("gpt2-geglu") is not None


def test_make_targets_exist():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test", "test-all", "test-floor", "lint", "format", "bench"):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_tree_is_the_tree():
    """Every path that the annotated tree names is there."""
    root = Path(__file__).parent.parent
    tree = README.split("## The tree")[1].split("Contributions")[0]
    inside = ""
    for line in tree.splitlines():
        if match := re.match(r"    (\s*)(\S+)", line):
            indent, name = match.groups()
            if not indent:
                inside = name
            path = root / inside / name if indent else root / name
            assert path.exists(), path
