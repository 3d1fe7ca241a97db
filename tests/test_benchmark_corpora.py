"""Text for benchmarks is read out of packages without installing them, and only out of the files that were meant."""

import hashlib
import io
import tarfile

import pytest

from benchmarks import corpora
from benchmarks.corpora import Package, corpus, documents

PAGE = """<html><head><style>p {{ color: red }}</style></head><body><h1>Title</h1>
<p>{0}, which is <b>long</b> enough to be a paragraph of running text and not a label or a link.</p>
<pre>code is no prose, however long it may be: for i in range(10): print(i); print(i); print(i)</pre>
<h2>Second</h2><ul><li>{0}, an item of a list that says something in a sentence of some length.</li><li>no</li></ul>
<p>{0}; {1}</p></body></html>"""


def _deb(files):
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:xz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    parts = [(b"debian-binary", b"2.0\n"), (b"control.tar.xz", b"odd"), (b"data.tar.xz", inner.getvalue())]
    return b"!<arch>\n" + b"".join(
        name.ljust(48) + str(len(content)).encode().ljust(10) + b"`\n" + content + b"\n" * (len(content) % 2)
        for name, content in parts
    )


@pytest.fixture
def package(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_GEGLU_CACHE", str(tmp_path))
    long = (
        "More of the same text follows here, sentence by sentence, until the document is long enough to be kept. " * 4
    )
    content = _deb({f"./doc/{n}.html": PAGE.format(f"File number {n}", n + long) for n in "abcde"} | {"./x": "x"})
    package = Package("p/pack_1_all.deb", hashlib.sha256(content).hexdigest(), r"\./doc/\w\.html")
    monkeypatch.setattr(corpora, "PACKAGES", {"prose": (package,)})
    (tmp_path / "debian").mkdir()
    (tmp_path / "debian" / "pack_1_all.deb").write_bytes(content)
    return package


def test_paragraphs_under_headings(package):
    found = documents("prose")
    assert [one.group for one in found] == [f"./doc/{n}.html" for n in "abcde"]  # short sections are left out
    assert found[0].text.startswith("File number a, an item of a list that says something")
    assert "range(10)" not in found[0].text
    assert "color" not in found[0].text


def test_whole_files_are_held_out(package):
    one = corpus("prose", held_out=0.3)
    assert one == corpus("prose", held_out=0.3)
    assert len(one.train) + len(one.held_out) == 5
    assert not set(one.train) & set(one.held_out)
    assert one.held_out


def test_other_bytes_are_not_taken(package, tmp_path, monkeypatch):
    (tmp_path / "debian" / "pack_1_all.deb").write_bytes(b"damaged")
    monkeypatch.setattr(corpora.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(b"also damaged"))
    with pytest.raises(OSError, match="nothing was kept"):
        documents("prose")
    assert (tmp_path / "debian" / "pack_1_all.deb").read_bytes() == b"damaged"
