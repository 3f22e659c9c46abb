"""A model hub on loopback: the part of its HTTP API that from_pretrained and push_to_hub use.

Weights go by way of git LFS and a redirect to another address, as on the real hub; other files are served in place.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".onnx")  # what the hub keeps in LFS
TOKEN = "hf_of_the_test"
NAME = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES = [  # method, path, name of the handler's method
    ("HEAD|GET", rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", "resolve"),
    ("HEAD|GET", r"/large/(?P<digest>\w+)", "large"),
    ("GET", rf"/api/models/{NAME}", "info"),
    ("GET", rf"/api/models/{NAME}/revision/(?P<revision>[^/]+)", "info"),
    ("GET", rf"/api/models/{NAME}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.*))?", "tree"),
    ("POST", r"/test/no-more-cuts", "heal"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", rf"/api/models/{NAME}/branch/(?P<branch>.+)", "branch"),
    ("POST", rf"/api/models/{NAME}/preupload/(?P<revision>.+)", "preupload"),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/large/(?P<digest>\w+)", "upload"),
    ("POST", rf"/api/models/{NAME}/commit/(?P<revision>.+)", "commit"),
]


@dataclass
class Repository:
    """Commits (id -> files) and the branches and tags that name them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """A commit with exactly these files at the tip of a branch; its id."""
        seed = repr([len(self.commits), sorted(files), [hashlib.sha1(files[name]).digest() for name in sorted(files)]])
        commit = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[commit] = files
        self.refs[branch] = commit
        return commit

    def find(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a commit id names."""
        commit = self.refs.get(revision, revision)
        return commit if commit in self.commits else None


class HubServer:
    """Starts on a free port. `requests`: (method, path) of all so far; `cuts`: file -> bytes after which the
    connection is dropped, as long as it is in there."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.cuts: dict[str, int] = {}
        self.requests: list[tuple[str, str]] = []
        self.resumed: list[int] = []  # where the client went on, for each request of the rest of a file
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.cdn = self.url.replace("127.0.0.1", "localhost")  # another host to the client, as on the real hub

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    def upload(self, name: str, folder: Path, branch: str = "main") -> str:
        """A commit with the files of a folder; its id."""
        files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        return self.repositories.setdefault(name, Repository()).commit(files, branch)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository at a revision."""
        repository = self.repositories[name]
        return repository.commits[repository.find(revision)]

    def downloads(self) -> list[str]:
        """The files whose content was sent, with repetitions."""
        return [path for method, path in self.requests if method == "GET" and not path.startswith("/api/")]


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        """Nothing on the test's stderr."""

    def do_GET(self) -> None:
        self.hub.requests.append((self.command, self.path))
        path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        for methods, pattern, action in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in methods.split("|"):
                return getattr(self, action)(**found.groupdict())
        self.answer(404, {"error": f"no such address: {self.command} {path}"})

    do_HEAD = do_POST = do_PUT = do_GET

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status: int, content, headers: dict | None = None) -> None:
        """JSON, or bytes as they are."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def found(self, repo: str, revision: str = "main") -> tuple[Repository, str] | None:
        """The repository and the commit; None where the error was sent already."""
        repository = self.hub.repositories.get(repo)
        commit = repository and repository.find(revision)
        if not commit:
            code = "RevisionNotFound" if repository else "RepoNotFound"
            self.answer(404, {"error": code}, {"X-Error-Code": code, "X-Error-Message": f"{code}: {repo} {revision}"})
            return None
        return repository, commit

    def resolve(self, repo: str, revision: str, file: str) -> None:
        """A small file, or the address of a large one."""
        if not (found := self.found(repo, revision)):
            return
        repository, commit = found
        content, headers = repository.commits[commit].get(file), {"X-Repo-Commit": commit}
        if content is None:
            self.answer(404, {"error": "no such file"}, {**headers, "X-Error-Code": "EntryNotFound"})
        elif file.endswith(LARGE):
            digest = hashlib.sha256(content).hexdigest()
            self.hub.large[digest] = content
            linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": len(content)}
            location = f"{self.hub.cdn}/large/{digest}?file={file}"
            self.answer(302, b"", {**headers, **linked, "Location": location})
        else:
            self.send_bytes(content, {**headers, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    def large(self, digest: str) -> None:
        """A large file."""
        self.send_bytes(self.hub.large[digest], {"ETag": f'"{digest}"'})

    def send_bytes(self, content: bytes, headers: dict) -> None:
        """A file or the rest of one (Range), cut short where the test wants it."""
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        rest = content[int(start[1]) :] if start else content
        cut = next((size for file, size in self.hub.cuts.items() if file in self.path and self.command == "GET"), None)
        if start:
            self.hub.resumed.append(int(start[1]))
            headers["Content-Range"] = f"bytes {start[1]}-{len(content) - 1}/{len(content)}"
        if cut is None:
            self.answer(206 if start else 200, rest, {**headers, "Accept-Ranges": "bytes"})
            return
        self.send_response(206 if start else 200)
        for name, value in {**headers, "Content-Length": len(rest), "Accept-Ranges": "bytes"}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(rest[:cut])
        self.wfile.flush()
        self.close_connection = True

    def heal(self) -> None:
        """From now on connections hold (asked for by a test's process)."""
        self.hub.cuts.clear()
        self.answer(200, {})

    def info(self, repo: str, revision: str = "main") -> None:
        """What the hub says of a repository."""
        if found := self.found(repo, revision):
            repository, commit = found
            files = [{"rfilename": name} for name in repository.commits[commit]]
            self.answer(
                200, {"id": repo, "modelId": repo, "sha": commit, "siblings": files, "tags": [], "private": False}
            )

    def tree(self, repo: str, revision: str, folder: str | None = None) -> None:
        """The files below a folder."""
        if found := self.found(repo, revision):
            repository, commit = found
            within = {name: data for name, data in repository.commits[commit].items() if name.startswith(folder or "")}
            self.answer(
                200,
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in within.items()
                ],
                {"X-Repo-Commit": commit},
            )

    def is_allowed(self) -> bool:
        """Writing needs the token."""
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.answer(401, {"error": "Invalid credentials"})
        return False

    def create(self) -> None:
        """A repository with the one file that the hub puts there."""
        if self.is_allowed():
            asked = json.loads(self.body)
            name = f"{asked['organization'] or 'me'}/{asked['name']}"
            if name in self.hub.repositories:
                self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
                return
            self.hub.repositories[name] = Repository()
            self.hub.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
            self.answer(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def validate(self) -> None:
        """Accepts every front matter: the hub's own rules are not known here."""
        self.answer(200, {"errors": [], "warnings": []})

    def branch(self, repo: str, branch: str) -> None:
        """A branch at the tip of main."""
        if self.is_allowed():
            repository = self.hub.repositories[repo]
            if branch in repository.refs:
                self.answer(409, {"error": "branch exists"})
                return
            repository.refs[branch] = repository.refs["main"]
            self.answer(201, b"")

    def preupload(self, repo: str, revision: str) -> None:
        """Which files go by way of LFS."""
        if self.is_allowed() and self.found(repo, revision):
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(self.body)["files"]
            ]
            self.answer(200, {"files": files})

    def batch(self, repo: str) -> None:
        """Where to put large files."""
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.cdn}/large/{one['oid']}"}}}
            for one in json.loads(self.body)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, digest: str) -> None:
        """A large file, whose digest must be the one announced."""
        is_whole = hashlib.sha256(self.body).hexdigest() == digest
        if is_whole:
            self.hub.large[digest] = self.body
        self.answer(200 if is_whole else 400, b"")

    def commit(self, repo: str, revision: str) -> None:
        """The files sent, over those of the branch."""
        if not (self.is_allowed() and (found := self.found(repo, revision))):
            return
        repository, before = found
        files = dict(repository.commits[before])
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        commit = repository.commit(files, revision)
        self.answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit, "success": True})
