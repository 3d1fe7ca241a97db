"""A local server that speaks as much of the Hub's API as pushing and loading a model takes, on 127.0.0.1.

    with HubServer() as hub:
        subprocess.run([...], env=hub.environment(tmp_path))
        hub.repos["me/gpt2-geglu"].head().files

Large files go the LFS way (batch request, PUT to another address, pointer in the commit), as on the Hub; private
repositories ask for the token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_" + "localserver" * 3
LFS_FROM = 4096
"""Binary files from this size on go the LFS way. (The Hub: by ending, and from 10 MB on.)"""


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, bytes]
    lfs: set[str]


@dataclass
class Repo:
    private: bool
    commits: list[Commit] = field(default_factory=list)

    def head(self) -> Commit:
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        if revision == "main":
            return self.head()
        return next((commit for commit in self.commits if commit.oid == revision), None)


class HubServer:
    """The server, its repositories, and a log of requests as (method, path)."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []
        self.damage: str | None = None
        """A file of which every download comes with one byte changed."""
        server = self

        class Handler(_Handler):
            hub = server

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, *, token: str | None = TOKEN) -> dict[str, str]:
        """For a process that takes this server for the Hub; its cache and login are below `home`."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        login = {} if token is None else {"HF_TOKEN": token}
        return (
            clean
            | login
            | {
                "HF_ENDPOINT": self.address,
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "HF_HOME": str(home / "hf-home"),
                "NO_PROXY": "127.0.0.1",
                "OMP_NUM_THREADS": "1",
            }
        )


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    # -- plumbing ------------------------------------------------------------------------------------------------------

    def _answer(self, status: int, body: Any = None, **headers: str) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body if body is not None else {}).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def _error(self, status: int, code: str) -> None:
        self._answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _logged_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, name: str) -> Repo | None:
        """None, and answered, where it is not there or not for these eyes (the Hub does not tell which)."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self._logged_in()):
            self._error(404 if self._logged_in() else 401, "RepoNotFound")
            return None
        return repo

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append((self.command, path))
        for method, pattern, handler in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                handler(self, **match.groupdict())
                return
        self._body()
        self._error(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = _route

    # -- writing -------------------------------------------------------------------------------------------------------

    def whoami(self) -> None:
        if not self._logged_in():
            return self._error(401, "Unauthorized")
        return self._answer(200, {"name": "me", "orgs": [{"name": "us"}], "auth": {"accessToken": {"role": "write"}}})

    def create(self) -> None:
        told = json.loads(self._body())
        name = f"{told['organization']}/{told['name']}" if told.get("organization") else told["name"]
        if not self._logged_in():
            return self._error(401, "Unauthorized")
        if name in self.hub.repos:
            return self._answer(409, {"error": "exists", "url": f"{self.hub.address}/{name}"})
        private = told.get("private") or told.get("visibility") == "private"
        self.hub.repos[name] = Repo(private=bool(private), commits=[Commit("0" * 40, "start", {}, set())])
        return self._answer(200, {"url": f"{self.hub.address}/{name}", "name": name})

    def validate_yaml(self) -> None:
        content = json.loads(self._body())["content"]
        head = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else {}
        errors = [] if isinstance(head, dict) else [{"message": "metadata must be a mapping"}]
        self._answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        files = json.loads(self._body())["files"]
        if self._repo(repo) is None:
            return
        modes = [
            {"path": entry["path"], "uploadMode": "lfs" if _is_lfs(entry) else "regular", "shouldIgnore": False}
            for entry in files
        ]
        self._answer(200, {"files": modes})

    def lfs_batch(self, repo: str) -> None:
        objects = json.loads(self._body())["objects"]
        if self._repo(repo) is None:
            return
        answers = []
        for entry in objects:
            action = {"upload": {"href": f"{self.hub.address}/lfs-store/{entry['oid']}"}}
            known = entry["oid"] in self.hub.objects
            answers.append({**entry, "authenticated": True, **({} if known else {"actions": action})})
        self._answer(200, {"transfer": "basic", "objects": answers})

    def lfs_put(self, oid: str) -> None:
        body = self._body()
        if hashlib.sha256(body).hexdigest() != oid:
            return self._error(400, "BadObject")
        self.hub.objects[oid] = body
        return self._answer(200)

    def commit(self, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in self._body().splitlines() if line]
        found = self._repo(repo)
        if found is None:
            return None
        if not self._logged_in():
            return self._error(401, "Unauthorized")
        files, lfs, message = dict(found.head().files), set(found.head().lfs), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self._error(400, "MissingObject")
                files[value["path"]] = self.hub.objects[value["oid"]]
                lfs.add(value["path"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = hashlib.sha1(json.dumps([message, len(found.commits)]).encode() + b"".join(files.values())).hexdigest()
        found.commits.append(Commit(oid, message, files, lfs & files.keys()))
        return self._answer(
            200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.address}/{repo}/commit/{oid}"}
        )

    # -- reading -------------------------------------------------------------------------------------------------------

    def info(self, repo: str, revision: str = "main") -> None:
        found = self._repo(repo)
        if found is None:
            return None
        commit = found.at(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound")
        return self._answer(
            200,
            {
                "_id": "0",
                "id": repo,
                "modelId": repo,
                "sha": commit.oid,
                "private": found.private,
                "tags": [],
                "siblings": [{"rfilename": name} for name in sorted(commit.files)],
            },
        )

    def tree(self, repo: str, revision: str) -> None:
        found = self._repo(repo)
        if found is None:
            return None
        commit = found.at(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound")
        return self._answer(
            200,
            [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                | (
                    {"lfs": {"oid": _etag(commit, name), "size": len(content), "pointerSize": 130}}
                    if name in commit.lfs
                    else {}
                )
                for name, content in sorted(commit.files.items())
            ],
        )

    def resolve(self, repo: str, revision: str, path: str) -> None:
        found = self._repo(repo)
        if found is None:
            return None
        commit = found.at(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound")
        if path not in commit.files:
            return self._answer(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit.oid)
        content = commit.files[path]
        if path == self.hub.damage:
            content = content[:-1] + bytes([content[-1] ^ 1])
        headers = {"ETag": f'"{_etag(commit, path)}"', "X_Repo_Commit": commit.oid, "Accept_Ranges": "bytes"}
        if path in commit.lfs:
            headers |= {"X_Linked_Etag": headers["ETag"], "X_Linked_Size": str(len(content))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            start, stop = int(asked[1]), int(asked[2] or len(content) - 1) + 1
            headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            return self._answer(206, content[start:stop], **headers)
        return self._answer(200, content, **headers | {"Content_Type": "application/octet-stream"})


def _is_lfs(entry: dict[str, Any]) -> bool:
    return entry["path"].endswith((".safetensors", ".png")) and entry["size"] >= LFS_FROM


def _etag(commit: Commit, path: str) -> str:
    digest = hashlib.sha256 if path in commit.lfs else hashlib.sha1
    return digest(commit.files[path]).hexdigest()


_REPO = r"(?P<repo>[^/]+/[^/]+?)"
_ROUTES = [
    (("GET",), r"/api/whoami-v2", _Handler.whoami),
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.validate_yaml),
    (("POST",), rf"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("PUT",), r"/lfs-store/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    (("POST",), rf"/api/models/{_REPO}/commit/(?P<revision>[^/]+)", _Handler.commit),
    (("GET",), rf"/api/models/{_REPO}", _Handler.info),
    (("GET",), rf"/api/models/{_REPO}/revision/(?P<revision>[^/]+)", _Handler.info),
    (("GET",), rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)", _Handler.tree),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
