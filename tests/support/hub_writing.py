"""The half of the Hub's protocol that changes repositories: permissions, commits, branches, the check of the card.

A fault in `HubServer.write_faults[kind]` is a status, `(status, headers)`, or "cut", where the connection ends in the
middle of the request. With `("after", fault)` the request is done, and only its answer is lost. None lets one request
pass.
"""

import base64
import hashlib
import json
import os
import re
import urllib.parse

import yaml

from tests.support.hub_uploads import Uploads

LFS_NAMES = re.compile(r".*\.(safetensors|model|bin)")
REGULAR_AT_MOST = 200_000
"""The size in bytes above which a file goes to LFS whatever its name is."""
STATUS_TEXT = {413: "Payload too large", 409: "Conflict", 403: "Forbidden", 401: "Invalid credentials"}

ROUTES = [
    ("whoami", "GET", r"/api/whoami-v2"),
    ("create", "POST", r"/api/repos/create"),
    ("validate", "POST", r"/api/validate-yaml"),
    ("preupload", "POST", r"/api/models/(?P<repository>[^/]+/[^/]+)/preupload/(?P<revision>.+)"),
    ("commit", "POST", r"/api/models/(?P<repository>[^/]+/[^/]+)/commit/(?P<revision>.+)"),
    ("branch", "POST", r"/api/models/(?P<repository>[^/]+/[^/]+)/branch/(?P<revision>.+)"),
    ("tree", "GET", r"/api/models/(?P<repository>[^/]+/[^/]+)/tree/(?P<revision>.+)"),
    ("requests", "GET", r"/api/models/(?P<repository>[^/]+/[^/]+)/discussions"),
    ("batch", "POST", r"/(?P<repository>[^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    ("put", "PUT", r"/parts/(?P<oid>\w+)/(?P<part>\d+)"),
    ("complete", "POST", r"/complete/(?P<oid>\w+)"),
    ("verify", "POST", r"/verify/(?P<repository>[^/]+/[^/]+)"),
]


class Writing(Uploads):
    """Answers the requests that change repositories. It is a part of the request handler."""

    def do_POST(self):
        if not self.wants_to_write(self.path.partition("?")[0]):
            self.body()
            self.answer(404, {})

    do_PUT = do_POST

    def wants_to_write(self, path):
        """Answer a request that changes repositories, and tell whether it was one."""
        for kind, method, pattern in ROUTES:
            match = re.fullmatch(pattern, path) if method == self.command else None
            if match:
                groups = {name: urllib.parse.unquote(value) for name, value in match.groupdict().items()}
                self.serve(kind, groups)
                return True
        return False

    def serve(self, kind, groups):
        hub, token = self.server_hub, self.headers.get("Authorization")
        with hub.lock:
            hub.tokens["store" if kind in ("put", "complete") else "hub"].add(token)
        if self.meets_fault(kind):
            return
        body = self.body()
        repository = groups.get("repository")
        if repository and repository not in hub.repositories:
            self.refuse(404, "RepoNotFound", "Repository not found")
        elif (
            kind in ("preupload", "commit", "batch", "branch") and repository in hub.readonly and not self.as_request()
        ):
            self.refuse(403, "Forbidden", "you have no right to write here")
        else:
            with hub.lock:
                answer = getattr(self, kind)(body, **groups)
            if self.lost == "cut":
                self.cut()
            elif self.lost:
                self.answer(self.lost, {"error": "the answer was lost"})
            elif isinstance(answer, tuple):
                self.answer(*answer)
            else:
                self.answer(200, answer)

    def meets_fault(self, kind):
        """Answer with the next fault of a kind, and tell whether there was one that hinders the request."""
        hub = self.server_hub
        with hub.lock:
            fault = hub.write_faults[kind].pop(0) if hub.write_faults[kind] else None
        self.lost = fault[1] if isinstance(fault, tuple) and fault[0] == "after" else None
        if fault is None or self.lost:
            return False
        if fault == "cut":
            self.rfile.read(min(1000, int(self.headers.get("Content-Length", 1000)) // 2))
            self.cut()
            return True
        self.body()
        status, headers = fault if isinstance(fault, tuple) else (fault, {})
        self.answer(status, {"error": STATUS_TEXT.get(status, "Something is wrong")}, headers)
        return True

    def cut(self):
        self.close_connection = True
        self.connection.shutdown(2)

    def body(self):
        """Return what was sent, whether its length was announced or it comes in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def as_request(self):
        return "create_pr=1" in self.path

    def whoami(self, body):
        if self.headers.get("Authorization") is None:
            return 401, {"error": "Invalid credentials"}
        return self.server_hub.account

    def create(self, body):
        hub, wish = self.server_hub, json.loads(body)
        name = f"{wish['organization'] or hub.account['name']}/{wish['name']}"
        answer = {"url": f"{hub.address}/{name}", "name": name}
        if name in hub.repositories:
            return 409, {**answer, "error": "You already created this model repo"}
        first = hub.root / f"first-{len(hub.repositories)}"
        first.mkdir()
        (first / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        hub.publish(name, first)
        if wish.get("visibility") == "private" or wish.get("private"):
            hub.private.add(name)
        return answer

    def validate(self, body):
        match = re.match(r"---\n(.*?)\n---", json.loads(body)["content"], re.DOTALL)
        metadata = yaml.safe_load(match[1]) if match else {}
        errors = []
        if not re.fullmatch(r"[a-z0-9.-]+", str(metadata.get("license", ""))):
            errors.append('"license" must be one of the known ones')
        if metadata.get("license") == "other" and not (metadata.get("license_name") and metadata.get("license_link")):
            errors.append('"license_name" and "license_link" are wanted with "other"')
        bases = metadata.get("base_model", [])
        if not all(re.fullmatch(r"[\w.-]+/[\w.-]+", base) for base in ([bases] if isinstance(bases, str) else bases)):
            errors.append('"base_model" must be ids of models')
        if not isinstance(metadata.get("tags", []), list):
            errors.append('"tags" must be an array')
        if metadata.get("base_model_relation", "quantized") not in ("quantized", "finetune", "adapter", "merge"):
            errors.append('"base_model_relation" is unknown')
        return (400 if errors else 200), {"errors": [{"message": text} for text in errors], "warnings": []}

    def preupload(self, body, repository, revision):
        location = self.server_hub.folder(repository, revision)
        if location is None:
            return 404, {"error": f"Invalid rev id: {revision}"}
        commit, folder = location
        lfs = self.server_hub.lfs.get(commit, {})
        return {"files": [_mode(file, folder, lfs) for file in json.loads(body)["files"]]}

    def branch(self, body, repository, revision):
        refs = self.server_hub.refs[repository]
        if revision in refs:
            return 409, {"error": "Reference already exists"}
        refs[revision] = refs["main"]
        return {}

    def tree(self, body, repository, revision):
        location = self.server_hub.folder(repository, revision)
        if location is None:
            return 404, {"error": f"Invalid rev id: {revision}"}
        commit, folder = location
        lfs = self.server_hub.lfs.get(commit, {})
        paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        return [_entry(name, path, lfs.get(name)) for name, path in paths.items()]

    def requests(self, body, repository):
        hub = self.server_hub
        discussions = [
            {
                "title": title, "num": number, "author": {"name": "me"}, "createdAt": "2026-01-01T00:00:00.000Z",
                "status": "open", "repo": {"name": repository, "type": "model"}, "isPullRequest": True,
            }
            for number, (name, title) in enumerate(hub.requests, 1)
            if name == repository
        ]  # fmt: skip
        return {"count": len(discussions), "start": 0, "discussions": discussions}

    def commit(self, body, repository, revision):
        hub = self.server_hub
        header, *operations = [json.loads(line) for line in body.splitlines()]
        parent, before = hub.folder(repository, revision)
        if not self.as_request() and header["value"].get("parentCommit", parent) != parent:
            return 412, {"error": "A commit has happened since. Please refresh and try again."}
        after = hub.root / f"commit-{len(hub.commits)}-{repository.replace('/', '-')}"
        after.mkdir()
        for path in (path for path in before.rglob("*") if path.is_file()):
            copy = after / path.relative_to(before)
            copy.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, copy)
        lfs = dict(hub.lfs.get(parent, {}))
        for operation in operations:
            entry, target = operation["value"], after / operation["value"]["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            lfs.pop(entry["path"], None)
            if operation["key"] == "file":
                target.write_bytes(base64.b64decode(entry["content"]))
            elif not (hub.objects / entry["oid"]).is_file():
                return 400, {"error": f"LFS object {entry['oid']} is not there"}
            else:
                lfs[entry["path"]] = entry["oid"]
                os.link(hub.objects / entry["oid"], target)
        return self.publish_commit(repository, revision, after, lfs, header["value"]["summary"])

    def publish_commit(self, repository, revision, folder, lfs, title):
        """Make a commit visible, and return the answer that names it."""
        hub = self.server_hub
        commit = hashlib.sha1(f"{folder}".encode()).hexdigest()
        hub.repositories[repository][commit], hub.lfs[commit] = folder, lfs
        answer = {"commitUrl": f"{hub.address}/{repository}/commit/{commit}", "commitOid": commit}
        if self.as_request():
            hub.requests.append((repository, title))
            revision = f"refs/pr/{len(hub.requests)}"
            answer["pullRequestUrl"] = f"{hub.address}/{repository}/discussions/{len(hub.requests)}"
        hub.refs[repository][revision] = commit
        hub.commits.append((repository, revision, title))
        return answer


def _mode(file, folder, lfs):
    path = folder / file["path"]
    mode = "lfs" if LFS_NAMES.fullmatch(file["path"]) or file["size"] > REGULAR_AT_MOST else "regular"
    there = {"oid": lfs.get(file["path"]) or _blob(path)} if path.is_file() else {}
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **there}


def _entry(name, path, oid):
    size = path.stat().st_size
    lfs = {"lfs": {"oid": oid, "size": size, "pointerSize": 130}} if oid else {}
    return {"type": "file", "path": name, "size": size, "oid": _blob(path), **lfs}


def _blob(path):
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
