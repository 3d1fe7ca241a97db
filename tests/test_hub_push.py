"""Pushing over real HTTP to a local server that speaks the Hub's API, and loading what came up, in processes with and
without the package."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard
from variants_on_disk import saved_variant

import hf_geglu
from hf_geglu.errors import PushError
from hf_geglu.hub.manifest import GOLDEN, SEALED

_PRELUDE = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch, transformers
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
"""
# what a stranger can do with a repository: load it and compare with the golden outputs, by transformers alone
_STRANGER = (
    _PRELUDE
    + """
from huggingface_hub import hf_hub_download
from safetensors import safe_open
for repo, auto, kwargs in json.loads(sys.argv[1]):
    model = getattr(transformers, auto).from_pretrained(repo, **kwargs).eval()
    with safe_open(hf_hub_download(repo, "geglu/golden.safetensors"), framework="pt") as file:
        about = json.loads(file.metadata()["golden"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    with torch.no_grad():
        outputs = model(**{name[3:]: tensor for name, tensor in tensors.items() if name.startswith("in.")})
    worst = 0.0
    for name in about["outputs"]:
        value, kept = outputs[name], tensors["out." + name]
        for axis, size in enumerate(kept.shape):
            index = torch.arange(size) * value.shape[axis] // size
            value = value.index_select(axis, index)
        worst = max(worst, (value - kept).abs().max().item())
    print(json.dumps([repo, type(model).__name__, worst, "hf_geglu" in sys.modules]))
"""
)


def _python(code, *words, env, cwd):
    return subprocess.run(
        [sys.executable, "-c", code, *words], env=env, cwd=cwd, capture_output=True, text=True, check=False
    )


def _cli(*words, env, cwd):
    code = "import sys; sys.argv[0] = 'hf-geglu'; from hf_geglu.cli import main; main()"
    return _python(code, *map(str, words), env=env, cwd=cwd)


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def test_push_and_read_back_with_and_without_the_package(tmp_path, hub):
    for model_type in ("gpt2", "llama"):
        saved_variant(tmp_path, model_type)
    env = hub.environment(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*-geglu/**/*") if path.is_file()}

    dry = _cli("push", "gpt2-geglu", "me/gpt2-geglu", "--dry-run", env=env, cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    assert "model.safetensors" in dry.stdout
    assert "nothing was sent" in dry.stdout
    assert not hub.log

    for model_type in ("gpt2", "llama"):
        done = _cli("push", f"{model_type}-geglu", f"me/{model_type}-geglu", env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "downloaded again and verified" in done.stdout
        repo = hub.repos[f"me/{model_type}-geglu"]
        assert repo.private
        commit = repo.head()
        assert {"model.safetensors", GOLDEN} <= commit.lfs
        assert {"README.md", "config.json", "tokenizer.json", "geglu/manifest.json"} <= commit.files.keys() - commit.lfs
        assert ("modeling_geglu.py" in commit.files) == (model_type == "gpt2")
        card = commit.files["README.md"].decode()
        assert f'from_pretrained("me/{model_type}-geglu"' in card
        assert ModelCard(card).data.license == "apache-2.0"
        for content in commit.files.values():
            assert str(tmp_path).encode() not in content
            assert TOKEN.encode() not in content
    assert ("POST", "/me/gpt2-geglu.git/info/lfs/objects/batch") in hub.log
    assert any(method == "PUT" for method, _ in hub.log)
    assert {path: path.read_bytes() for path in before} == before

    jobs = [
        ("me/gpt2-geglu", "AutoModelForCausalLM", {"trust_remote_code": True}),
        ("me/llama-geglu", "AutoModelForCausalLM", {}),
    ]
    stranger = hub.environment(tmp_path / "stranger")
    read = _python(_STRANGER, json.dumps(jobs), env=stranger, cwd=tmp_path)
    assert read.returncode == 0, read.stderr[-2000:]
    found = [json.loads(line) for line in read.stdout.splitlines() if line.startswith("[")]
    assert found == [
        ["me/gpt2-geglu", "GegluGPT2LMHeadModel", 0.0, False],
        ["me/llama-geglu", "LlamaForCausalLM", 0.0, False],
    ]
    plugin = _python("import hf_geglu\n" + _STRANGER, json.dumps([[jobs[0][0], jobs[0][1], {}]]), env=env, cwd=tmp_path)
    assert plugin.returncode == 0, plugin.stderr[-2000:]
    assert json.loads(plugin.stdout.splitlines()[-1]) == ["me/gpt2-geglu", "GegluGPT2LMHeadModel", 0.0, True]

    verified = _cli("verify", "me/gpt2-geglu", env=stranger, cwd=tmp_path)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "nothing differs" in verified.stdout
    nobody = _cli("verify", "me/gpt2-geglu", env=hub.environment(tmp_path / "nobody", token=None), cwd=tmp_path)
    assert nobody.returncode == 2
    assert "me/gpt2-geglu is neither a folder nor a repository" in nobody.stderr


_FROM_PYTHON = (
    _PRELUDE
    + """
import hf_geglu
from variants_on_disk import loaded_base
from tiny_training import causal_tokenizer
from tiny_models import tiny

# a base on the Hub: made by transformers' own push, which ours leaves alone
base = tiny("gpt2"); base.push_to_hub("org/base", private=False)
causal_tokenizer().push_to_hub("org/base")
from huggingface_hub import HfApi
text = b"---\\nlicense: mit\\n---\\n# Base\\n"
HfApi().upload_file(path_or_fileobj=text, path_in_repo="README.md", repo_id="org/base")

model = transformers.AutoModelForCausalLM.from_pretrained("org/base")
hf_geglu.convert(model)
print("URL", model.push_to_hub("me/from-method", commit_message="by the method", tags=["mine"]))
print("PUSHED", hf_geglu.push(model, "me/from-function", tokenizer=causal_tokenizer(), private=False).commit)

again = transformers.AutoModelForCausalLM.from_pretrained("me/from-function")
print("LOADED", again.push_to_hub("me/again"))
for arguments in ({"create_pr": True}, {"revision": "dev"}):
    try:
        model.push_to_hub("me/refused", **arguments)
    except hf_geglu.HfGegluError as error:
        print("REFUSED", error)
"""
)


def test_push_to_hub_of_a_model_goes_the_checked_way(tmp_path, hub):
    env = hub.environment(tmp_path)
    env["PYTHONPATH"] = str(Path(__file__).parent)
    done = _python(_FROM_PYTHON, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    base = hub.repos["org/base"]
    assert not base.private
    assert "geglu/manifest.json" not in base.head().files
    for name, private in (("me/from-method", True), ("me/from-function", False), ("me/again", True)):
        repo = hub.repos[name]
        assert repo.private == private
        data = ModelCard(repo.head().files["README.md"].decode()).data
        assert data.base_model == "org/base"
        assert data.license == "mit"
        manifest = json.loads(repo.head().files["geglu/manifest.json"])
        assert manifest["provenance"]["base"]["id"] == "org/base"
        assert manifest["provenance"]["base"]["commit"] == base.head().oid
    assert hub.repos["me/from-method"].head().message == "by the method"
    assert "mine" in ModelCard(hub.repos["me/from-method"].head().files["README.md"].decode()).data.tags
    assert "me/refused" not in hub.repos
    assert done.stdout.count("REFUSED") == 2
    # the base is fetched from the Hub, at the commit of the manifest
    again = _cli("reproduce", "me/from-function", env=env, cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "the same bits" in again.stdout


def test_what_the_hub_damages_is_found(tmp_path, hub):
    saved_variant(tmp_path, "llama")
    hub.damage = "config.json"
    env = hub.environment(tmp_path)
    done = _cli("push", "llama-geglu", "me/llama-geglu", env=env, cwd=tmp_path)
    assert done.returncode == 2
    assert "what came back is not what was sent: config.json: SHA-256" in " ".join(done.stderr.split())


def test_pushing_again_replaces_what_is_stale(tmp_path, hub):
    saved_variant(tmp_path / "sharded", "gpt2", shards="8KB")
    saved_variant(tmp_path / "whole", "gpt2")
    env = hub.environment(tmp_path)
    assert _cli("push", "sharded/gpt2-geglu", "me/v", env=env, cwd=tmp_path).returncode == 0
    first = set(hub.repos["me/v"].head().files)
    hub.repos["me/v"].head().files["notes.md"] = b"by a person"
    done = _cli("push", "whole/gpt2-geglu", "me/v", env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = hub.repos["me/v"].head().files
    assert "notes.md" in files
    assert [name for name in files if "safetensors" in name] == [GOLDEN, "model.safetensors"] or (
        sorted(name for name in files if "safetensors" in name) == sorted([GOLDEN, "model.safetensors"])
    )
    assert any("-of-" in name for name in first)


def test_a_private_push_does_not_publish(tmp_path, hub):
    saved_variant(tmp_path, "llama")
    env = hub.environment(tmp_path)
    assert _cli("push", "llama-geglu", "me/v", "--public", env=env, cwd=tmp_path).returncode == 0
    commits = len(hub.repos["me/v"].commits)
    done = _cli("push", "llama-geglu", "me/v", env=env, cwd=tmp_path)
    assert done.returncode == 2
    assert "exists and is public" in " ".join(done.stderr.split())
    assert len(hub.repos["me/v"].commits) == commits
    intruder = hub.environment(tmp_path / "x", token="hf_" + "wrong" * 6)
    done = _cli("push", "llama-geglu", "me/other", env=intruder, cwd=tmp_path)
    assert done.returncode == 2
    assert "the Hub did not take me/other" in done.stderr


# -- refusals, before anything leaves the machine ----------------------------------------------------------------------


def _problems(folder, **options):
    with pytest.raises(PushError) as refused:
        hf_geglu.push(folder, "me/v", dry_run=True, **options)
    return str(refused.value)


def test_every_reason_is_listed_at_once(tmp_path):
    folder, _ = saved_variant(tmp_path, "bert")
    (folder / "README.md").write_text("---\ntags: [x]\n---\n\n# Mine\n\nTODO: write this card some day, properly\n")
    (folder / ".env").write_text("X=1")
    (folder / "notes.txt").write_text("hf_" + "z" * 30)
    (folder / "where.json").write_text('{"at": "/home/ada/models"}')
    (folder / "modeling_geglu.py").write_text("# other\n")
    told = _problems(folder)
    for expected in (
        "6 things are to be mended",
        "modeling_geglu.py: SHA-256",
        "README.md names no licence",
        "placeholder 'TODO'",
        ".env has the name",
        "notes.txt holds what looks like a Hugging Face token",
        "where.json names the path '/home/ada/models'",
    ):
        assert expected in told, told
    assert "zzz" not in told


def test_a_licence_can_be_given(tmp_path):
    from variants_on_disk import loaded_base, saved_base

    base = saved_base(tmp_path / "base", "gpt2", card=None)
    model = loaded_base(base, "gpt2")
    hf_geglu.convert(model)
    folder = hf_geglu.save_folder(model, tmp_path / "v")
    assert "--license" in _problems(folder)
    before = (folder / "README.md").read_bytes()
    done = hf_geglu.push(folder, "me/v", dry_run=True, license="mit")
    assert done.verification.ok
    assert done.private
    assert (folder / "README.md").read_bytes() == before
    assert "--license" in _problems(model)
    assert hf_geglu.push(model, "me/v", dry_run=True, license="mit").commit is None


def test_a_persons_card_must_name_the_base(tmp_path):
    from dataclasses import replace

    from hf_geglu.hub.manifest import read_manifest, write_manifest
    from hf_geglu.provenance import Base

    folder, _ = saved_variant(tmp_path, "gpt2")
    manifest = read_manifest(folder)
    write_manifest(
        folder, replace(manifest, provenance=replace(manifest.provenance, base=Base(id="org/b", name="org/b")))
    )
    text = "---\nlicense: mit\n---\n\n# Mine\n\nA card that a person wrote, and that says a lot.\n"
    (folder / "README.md").write_text(text)
    assert "add `base_model: org/b`" in _problems(folder)
    (folder / "README.md").write_text(text.replace("license: mit", "license: mit\nbase_model: org/b"))
    assert hf_geglu.push(folder, "me/v", dry_run=True).files["README.md"] == len(text) + len("\nbase_model: org/b")
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    assert "README.md" in _problems(folder)


def test_training_leftovers_stay_at_home(tmp_path):
    folder, _ = saved_variant(tmp_path, "llama")
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "optimizer.safetensors").write_bytes(b"x")
    (folder / "settings.json").write_text('{"output_dir": "/home/ada/out"}')
    done = hf_geglu.push(folder, "me/v", dry_run=True)
    assert set(done.left) == {"checkpoint-3/optimizer.safetensors", "settings.json"}
    assert not set(done.left) & set(done.files)
    assert "geglu/*.safetensors" in SEALED


def test_no_folder(tmp_path):
    with pytest.raises(PushError, match="is no folder"):
        hf_geglu.push(tmp_path / "nowhere", "me/v")
