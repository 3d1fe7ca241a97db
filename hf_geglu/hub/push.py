"""Publishing a variant: what can be checked is checked before, and what the Hub gives back is checked afterwards."""

from __future__ import annotations

import fnmatch
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import RepositoryNotFoundError
from rich.table import Table
from torch import nn

from hf_geglu.errors import HfGegluError, PushError
from hf_geglu.hub.card import CARD, CURVES, card, is_ours
from hf_geglu.hub.licence import Licence, card_data, licence_from
from hf_geglu.hub.manifest import SEALED, Manifest, read_manifest
from hf_geglu.hub.papers import inherited_by, known_provenance
from hf_geglu.hub.saving import save_folder
from hf_geglu.hub.selection import Selection, select_files
from hf_geglu.hub.verifying import Verification, verify_variant

PLACEHOLDERS = ("[More Information Needed]", "TODO", "FIXME")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """What a push did, or would do.

    Attributes:
        repo: on the Hub.
        private: whether only its owner sees it.
        files: bytes by path in the repository.
        left: files of the folder that stay at home.
        removed: files of the repository that the new ones replace.
        commit: None for a dry run.
        url: of the commit.
        verification: of what was downloaded again; of the folder for a dry run.
    """

    repo: str
    private: bool
    files: dict[str, int]
    left: tuple[str, ...]
    removed: tuple[str, ...] = ()
    commit: str | None = None
    url: str | None = None
    verification: Verification

    def table(self) -> Table:
        """For the terminal."""
        who = "private" if self.private else "public"
        table = Table(title=f"{self.repo} ({who}), {sum(self.files.values()):,} bytes")
        table.add_column("file")
        table.add_column("bytes", justify="right")
        for name, size in self.files.items():
            table.add_row(name, f"{size:,}")
        for name in self.removed:
            table.add_row(name, "removed")
        for name in self.left:
            table.add_row(f"[dim]{name}[/]", "[dim]stays here[/]")
        return table


def push(
    what: nn.Module | str | os.PathLike[str],
    repo: str,
    *,
    tokenizer: Any = None,
    private: bool = True,
    license: str | None = None,
    base: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    message: str | None = None,
    tags: Sequence[str] = (),
    max_shard_size: str | int = "5GB",
    token: str | None = None,
) -> Pushed:
    """Check a variant, upload it, download it into an empty cache and check what came back.

    The folder itself is not changed: its card gets the repository's name, and the licence if one is given, on the way.

    Args:
        what: a folder that `save_folder` wrote, or a converted model, which is saved to a temporary folder first.
        repo: "owner/name"; made if it is not there.
        tokenizer: goes along with a model.
        private: see who; False publishes.
        license: of the base (an identifier of the Hub such as "apache-2.0"), where its card did not say.
        base: for a delta: its base, where that is not to be taken from the Hub.
        dry_run: check and say what would go up; nothing leaves this machine.
        message: of the commit.
        tags: for the card, besides its own (one that a person wrote stays as it is).
        max_shard_size: largest weights file of a model.
        token: with write access; the stored login by default.

    Returns:
        What went up.

    Raises:
        PushError: the folder must not be published (every reason is listed), the Hub refused, or what it gave back is
            not what was sent.
        ManifestError: the folder has no manifest.
    """
    if isinstance(what, nn.Module):
        with tempfile.TemporaryDirectory() as scratch:
            folder = save_folder(
                what, Path(scratch) / repo.rpartition("/")[2], tokenizer=tokenizer, max_shard_size=max_shard_size
            )
            return push(
                folder,
                repo,
                private=private,
                license=license,
                base=base,
                dry_run=dry_run,
                message=message,
                tags=tags,
                token=token,
            )
    folder = Path(what)
    if not folder.is_dir():
        raise PushError(f"{folder.name} is no folder; expected one that hf_geglu.save_folder wrote")
    manifest, selection = read_manifest(folder), select_files(folder)
    text = _card_text(folder, manifest, repo, license, tags)
    verification = verify_variant(folder, base=base)
    problems = [*_unverified(verification), *_card_problems(text, manifest), *selection.problems]
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise PushError(f"{folder.resolve().name} was not pushed; {len(problems)} things are to be mended:\n{listed}")
    sizes = {name: path.stat().st_size for name, path in selection.files.items()} | {CARD: len(text.encode())}
    plan = Pushed(
        repo=repo,
        private=private,
        files=dict(sorted(sizes.items())),
        left=selection.left,
        verification=verification,
    )
    if dry_run:
        return plan
    message = message or f"GeGLU variant of {manifest.provenance.base.name or 'an unnamed base'}"
    plan = _upload(plan, selection, text, message, HfApi(token=token))
    return _read_back(plan, base, token)


def writable(repo: str, *, token: str | None = None) -> str:
    """The whole name of a repository that a login may write: checked before work that ends in a push.

    Args:
        repo: "owner/name", or a name alone for the login's own.
        token: the stored login by default.

    Raises:
        PushError: no login, one that may only read, or the owner is somebody else.
    """
    api = HfApi(token=token)
    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", repo):
        raise PushError(f"{repo} is no name of a repository: expected owner/name. Give one")
    if (token or get_token()) is None:
        raise PushError(f"a push to {repo} without a login: expected one with write access. Run `hf auth login`")
    try:
        login = api.whoami()
    except Exception as error:  # whatever the HTTP library of this huggingface_hub raises when there is no network
        reason = str(error).strip().split("\n")[0]
        raise PushError(
            f"a push to {repo} will not do: {reason} Check the network, and that you are logged in with write access "
            "(hf auth login)"
        ) from error
    if (login.get("auth") or {}).get("accessToken", {}).get("role") == "read":
        raise PushError(f"a push to {repo} by a login that may only read: expected write access. Run `hf auth login`")
    owner, _, name = repo.rpartition("/")
    owners = [login["name"], *(each["name"] for each in login.get("orgs") or ())]
    if owner and owner not in owners:
        raise PushError(f"{repo} belongs to {owner}: expected one of {', '.join(owners)}. Name another repository")
    return f"{owner or login['name']}/{name}"


def is_variant(model: nn.Module) -> bool:
    """Whether anything says that a model is a variant: this process, its config, or the manifest it was loaded with."""
    return known_provenance(model) is not None


def push_model(
    model: nn.Module,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    max_shard_size: str | int | None = None,
    tags: str | Sequence[str] | None = None,
    **others: Any,
) -> str:
    """What ``model.push_to_hub`` of a variant does: `push`, by the names that transformers has for its arguments.

    Returns:
        Address of the commit.

    Raises:
        PushError: see `push`; or an argument that it has no counterpart for.
    """
    neutral = {"use_temp_dir": None, "safe_serialization": True}
    odd = sorted(name for name, value in others.items() if value and neutral.get(name) != value)
    if odd:
        raise PushError(
            f"push_to_hub of a GeGLU variant does not take {', '.join(odd)}: it uploads one checked commit to the main "
            "branch. For anything else, save it with hf_geglu.save_folder and use `hf upload`"
        )
    done = push(
        model,
        repo_id,
        private=private is not False,
        message=commit_message,
        tags=[tags] if isinstance(tags, str) else [*(tags or ()), *(getattr(model, "model_tags", None) or ())],
        max_shard_size=max_shard_size or "5GB",
        token=token if isinstance(token, str) else None,
    )
    assert done.url is not None
    return done.url


def _card_text(folder: Path, manifest: Manifest, repo: str, license: str | None, tags: Sequence[str]) -> str:
    """The card as it will stand in the repository: ours is written anew for its name, a person's stays as it is."""
    path = folder / CARD
    if not is_ours(path):
        return path.read_text(encoding="utf-8")
    inherited = inherited_by(folder)
    if license is not None:
        inherited = replace(inherited, licence=Licence(license=license))
    return card(manifest, inherited=inherited, name=repo, curves=(folder / CURVES).is_file(), tags=tags)


def _unverified(verification: Verification) -> list[str]:
    return [f"{check.what}: {check.detail}" for check in verification.differences]


def _card_problems(text: str, manifest: Manifest) -> list[str]:
    try:
        data = card_data(text)
    except ValueError as error:
        return [f"{CARD} has metadata that cannot be read ({error})"]
    problems = []
    if not licence_from(data).known:
        problems.append(
            f"{CARD} names no licence: the variant's is its base's. Look it up and give it: --license apache-2.0 "
            "(in Python: hf_geglu.push(..., license='apache-2.0'))"
        )
    base = manifest.provenance.base.id
    named = data.get("base_model") or []
    if base and base not in ([named] if isinstance(named, str) else named):
        problems.append(f"{CARD} does not name its base; add `base_model: {base}` to its metadata")
    problems += [f"{CARD} still has the placeholder {each!r}" for each in PLACEHOLDERS if each in text]
    if len(ModelCard(text).text.strip()) < 40:
        problems.append(f"{CARD} says nothing; delete it and run `hf-geglu document`, or write one")
    return problems


def _upload(plan: Pushed, selection: Selection, text: str, message: str, api: HfApi) -> Pushed:
    try:
        _check_visibility(api, plan)
        repo = api.create_repo(plan.repo, private=plan.private, exist_ok=True).repo_id
        stale = _stale(api, repo, plan)
        added = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)
            for name, path in selection.files.items()
            if name != CARD
        ]
        added.append(CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=text.encode()))
        removed = [CommitOperationDelete(path_in_repo=name) for name in stale]
        commit = api.create_commit(repo, operations=[*added, *removed], commit_message=message)
    except HfGegluError:
        raise
    except Exception as error:  # whatever the HTTP library of this huggingface_hub raises when there is no network
        reason = str(error).strip().split("\n")[0]
        raise PushError(
            f"the Hub did not take {plan.repo}: {reason} Check the name, the network, and that you are logged in with "
            "write access (hf auth login)"
        ) from error
    return replace(plan, repo=repo, removed=tuple(stale), commit=commit.oid, url=str(commit.commit_url))


def _check_visibility(api: HfApi, plan: Pushed) -> None:
    """An existing repository keeps its visibility, so a private push into a public one would publish."""
    try:
        info = api.repo_info(plan.repo)
    except RepositoryNotFoundError:
        return
    if plan.private and info.private is False:
        raise PushError(
            f"{plan.repo} exists and is public, so this would publish the variant; say --public if it shall, or choose "
            "another name"
        )


def _stale(api: HfApi, repo: str, plan: Pushed) -> list[str]:
    """Weights and code of an earlier push that this one does not replace: a loader could mix them with the new ones."""
    there = api.list_repo_files(repo)
    return [
        name for name in there if name not in plan.files and any(fnmatch.fnmatch(name, pattern) for pattern in SEALED)
    ]


def _read_back(plan: Pushed, base: str | os.PathLike[str] | None, token: str | None) -> Pushed:
    with tempfile.TemporaryDirectory() as cache:
        verification = verify_variant(plan.repo, revision=plan.commit, token=token, cache=Path(cache), base=base)
    if not verification.ok:
        listed = "; ".join(_unverified(verification))
        raise PushError(
            f"{plan.repo} was uploaded, but what came back is not what was sent: {listed}. Delete the commit "
            f"{plan.commit} and push again"
        )
    return replace(plan, verification=verification)
