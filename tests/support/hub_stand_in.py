"""The Hub's HTTP interface in memory: repositories with commits, behind its library's own client.

Every handler is given the request and the names in its path.
"""
# ruff: noqa: ARG002

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx2

ENDPOINT = "https://huggingface.co"
STORE = "https://storage.example"  # where large files lie: another host, which gets no login
TOKEN = "hf_standInStandInStandIn"
Answer = httpx2.Response


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """Files of every branch by commit; large ones are known by their sha256."""

    private: bool = False
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    messages: list[str] = field(default_factory=list)

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.branches.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None

    def commit(self, branch: str, added: dict[str, bytes], message: str) -> str:
        files = {**self.commits[self.branches[branch]], **added}
        commit = hashlib.sha1(repr(sorted(files.items())).encode() + branch.encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        self.messages.append(message)
        return commit


class HubStandIn:
    """Answers as the Hub does; `fail` answers in its place for the requests that a pattern names.

    `requests` has "METHOD path" of every request, `tokens` what each gave as its login.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        self._faults: list[tuple[re.Pattern[str], Callable[[httpx2.Request], Answer]]] = []

    def client(self) -> httpx2.Client:
        return httpx2.Client(transport=httpx2.MockTransport(self.answer), follow_redirects=True)

    def fail(self, pattern: str, answer: Callable[[httpx2.Request], Answer]) -> None:
        self._faults.append((re.compile(pattern), answer))

    def answer(self, request: httpx2.Request) -> Answer:
        path = request.url.path
        asked = f"{request.method} {path}"
        self.requests.append(asked)
        login = request.headers.get("authorization")
        if request.url.host in STORE:
            assert login is None
        else:
            self.tokens.add(login)
        request.read()
        for pattern, fault in self._faults:
            if pattern.search(asked):
                return fault(request)
        for pattern, handler in ROUTES:
            if found := re.fullmatch(pattern, asked):
                return handler(self, request, *found.groups())
        raise AssertionError(f"the stand-in knows no {asked}")

    def _home(self, request: httpx2.Request) -> Answer:
        return Answer(200)

    def _create(self, request: httpx2.Request) -> Answer:
        asked = json.loads(request.content)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repositories:
            return Answer(409, json={"error": "You already created this model repo", "url": name})
        self.repositories[name] = Repository(asked.get("visibility") == "private")
        return Answer(200, json={"url": f"{ENDPOINT}/{name}"})

    def _check_card(self, request: httpx2.Request) -> Answer:
        return Answer(200, json={"errors": [], "warnings": []})

    def _info(self, request: httpx2.Request, name: str, revision: str | None = None) -> Answer:
        repository = self.repositories.get(name)
        if repository is None:
            return Answer(401, json={"error": "Invalid"}, headers={"X-Error-Code": "RepoNotFound"})
        if (found := repository.files(revision or "main")) is None:
            return Answer(404, json={}, headers={"X-Error-Code": "RevisionNotFound"})
        commit, files = found
        siblings = [self._sibling(file, content) for file, content in files.items()]
        known = {"id": name, "sha": commit, "private": repository.private, "siblings": siblings}
        return Answer(200, json=known)

    def _sibling(self, name: str, content: bytes) -> dict[str, Any]:
        about = {"rfilename": name, "size": len(content), "blobId": git_sha1(content)}
        sha256 = hashlib.sha256(content).hexdigest()
        if sha256 in self.large:
            about["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
        return about

    def _branch(self, request: httpx2.Request, name: str, branch: str) -> Answer:
        branches = self.repositories[name].branches
        if branch in branches:
            return Answer(409, json={"error": "Reference already exists"})
        branches[branch] = branches["main"]
        return Answer(200, json={})

    def _preupload(self, request: httpx2.Request, name: str, branch: str) -> Answer:
        def mode(path: str) -> str:
            return "lfs" if path.endswith((".safetensors", ".gguf")) else "regular"

        asked = json.loads(request.content)["files"]
        files = [
            {"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in asked
        ]
        return Answer(200, json={"files": files})

    def _batch(self, request: httpx2.Request, name: str) -> Answer:
        objects = json.loads(request.content)["objects"]
        for one in objects:
            address = {"href": f"{STORE}/large/{one['oid']}", "header": {}}
            one["actions"] = {"upload": address}
        return Answer(200, json={"transfer": "basic", "objects": objects})

    def _take_large(self, request: httpx2.Request, sha256: str) -> Answer:
        assert hashlib.sha256(request.content).hexdigest() == sha256
        self.large[sha256] = request.content
        return Answer(200)

    def _give_large(self, request: httpx2.Request, sha256: str) -> Answer:
        return Answer(200, content=self.large[sha256])

    def _commit(self, request: httpx2.Request, name: str, branch: str) -> Answer:
        lines = [json.loads(line) for line in request.content.splitlines()]
        added = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile"
                added[value["path"]] = self.large[value["oid"]]
        message = lines[0]["value"]["summary"]
        commit = self.repositories[name].commit(branch, added, message)
        url = f"{ENDPOINT}/{name}/commit/{commit}"
        return Answer(200, json={"commitOid": commit, "commitUrl": url})

    def _file(self, request: httpx2.Request, name: str, revision: str, file: str) -> Answer:
        found = self.repositories[name].files(revision)
        assert found is not None
        commit, files = found
        content, headers = files[file], {"X-Repo-Commit": commit}
        sha256 = hashlib.sha256(content).hexdigest()
        if sha256 in self.large:
            headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
            return Answer(302, headers={**headers, "Location": f"{STORE}/large/{sha256}"})
        headers |= {"ETag": f'"{git_sha1(content)}"', "Content-Length": str(len(content))}
        return Answer(200, headers=headers, content=content if request.method == "GET" else b"")


_NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: tuple[tuple[str, Callable[..., Answer]], ...] = (
    (r"HEAD /", HubStandIn._home),
    (r"POST /api/repos/create", HubStandIn._create),
    (r"POST /api/validate-yaml", HubStandIn._check_card),
    (rf"GET /api/models/{_NAME}", HubStandIn._info),
    (rf"GET /api/models/{_NAME}/revision/([^/]+)", HubStandIn._info),
    (rf"POST /api/models/{_NAME}/branch/([^/]+)", HubStandIn._branch),
    (rf"POST /api/models/{_NAME}/preupload/([^/]+)", HubStandIn._preupload),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", HubStandIn._batch),
    (r"PUT /large/(\w+)", HubStandIn._take_large),
    (r"(?:GET|HEAD) /large/(\w+)", HubStandIn._give_large),
    (rf"POST /api/models/{_NAME}/commit/([^/]+)", HubStandIn._commit),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/([\w.-]+)", HubStandIn._file),
)
