"""A server on loopback that speaks the part of the Hub's protocol that its clients use, with faults on demand."""

import hashlib
import json
import re
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.support.hub_datasets import Datasets
from tests.support.hub_writing import Writing

LARGE = 1000
"""The size in bytes from which on a file is behind a redirect, as files in LFS are."""


class HubServer:
    """Serves repositories whose commits are folders.

    Attributes:
        root: Folder for everything that the server keeps.
        objects: Folder of the objects of LFS, whose names are their SHA-256.
        repositories: Folders of the commits of each repository, by name of the repository and hash of the commit.
        refs: Hash of the commit of each branch and pull request, by repository and name of the branch.
        lfs: SHA-256 of each file that is in LFS, by hash of the commit and name of the file.
        private: Names of repositories that only their owners see.
        readonly: Names of repositories that nobody may write to.
        gated: Names of repositories that refuse users whom they have not admitted.
        asks_for_access: Names of repositories that admit every user who asks.
        account: Answer to `whoami`.
        commits: Repository, revision and title of each commit that was made through the server.
        requests: Repository and title of each pull request.
        faults: Faults of the next requests for files, one for each request: a status, "cut" or "slow".
        write_faults: Faults of the next requests of each kind, one for each request; see `hub_writing`.
        chunk_bytes: Size of a part of an upload, in bytes.
        bytes_per_s: Rate at which parts are taken in; None for no limit.
        uploaded: Size of all parts that were taken in, in bytes.
        parts: Content of each part that was taken in, by object and number of the part.
        ranges: Whether the server honours requests for a range of a file.
        shift: Number of bytes by which every range that is sent is wrong.
        served: Size of all file contents that were sent, in bytes.
        file_requests: Name and range of each request for the content of a file.
        resolved: Names of the files whose place the Hub was asked for.
        tokens: Tokens in requests to the "hub", and in those to the "store" behind redirects.
        lock: Lock of everything above.
    """

    def __init__(self):
        self.root = Path(tempfile.mkdtemp(prefix="hub-"))
        self.objects = self.root / "objects"
        self.objects.mkdir()
        self.repositories, self.refs, self.lfs = {}, defaultdict(dict), {}
        self.private, self.readonly, self.gated, self.asks_for_access, self.faults = set(), set(), set(), set(), []
        self.account = {"name": "me", "orgs": [{"name": "org", "roleInOrg": "write"}], "auth": {}}
        self.commits, self.requests, self.write_faults = [], [], defaultdict(list)
        self.chunk_bytes, self.bytes_per_s, self.uploaded = 16_000, None, 0
        self.parts = {}
        self.served, self.file_requests, self.tokens = 0, [], {"hub": set(), "store": set()}
        self.resolved = []
        self.ranges, self.shift = True, 0
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self._server.server_port}"

    def publish(self, repository, folder):
        """Move `main` to a new commit that is a folder, and return the hash of the commit."""
        commits = self.repositories.setdefault(repository, {})
        commit = hashlib.sha1(f"{repository}{len(commits)}".encode()).hexdigest()
        commits[commit] = folder
        self.refs[repository]["main"] = commit
        return commit

    def folder(self, repository, revision):
        """Return the hash and the folder of a revision's commit; None where there is no such revision."""
        commits = self.repositories[repository]
        commit = self.refs[repository].get(revision, revision)
        return (commit, commits[commit]) if commit in commits else None

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        shutil.rmtree(self.root, ignore_errors=True)


def _handler(hub):
    class Handler(Datasets, Writing, BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement
        server_hub = hub

        def log_message(self, *args):
            pass

        def do_GET(self):
            path = self.path.partition("?")[0]
            if self.serves_dataset() or self.wants_to_write(path):
                return
            api = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?", path)
            resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            if not (api or resolve or path.startswith("/store/")):
                self.answer(404, {})
                return
            hub.tokens["hub" if api or resolve else "store"].add(self.headers.get("Authorization"))
            if api:
                self.send_info(api[1], (api[2] or "main").replace("%2F", "/"))
            elif resolve:
                self.resolve(*resolve.groups())
            else:
                self.send_file(Path(path.removeprefix("/store")))

        def find(self, repository, revision):
            """Return the hash and the folder of a revision's commit; None where the request was refused."""
            if repository in hub.gated:
                self.refuse(403, "GatedRepo", f"Access to model {repository} is restricted.")
            elif repository not in hub.repositories:
                self.refuse(404, "RepoNotFound", "Repository not found")
            elif hub.folder(repository, revision) is None:
                self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            else:
                return hub.folder(repository, revision)
            return None

        def refuse(self, status, code, message):
            self.answer(status, {}, {"X-Error-Code": code, "X-Error-Message": message})

        def send_info(self, repository, revision):
            if self.meets_fault("info"):
                return
            location = self.find(repository, revision)
            if location:
                commit, folder = location
                files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
                siblings = [
                    {"rfilename": path.relative_to(folder).as_posix(), "size": path.stat().st_size} for path in files
                ]
                access = {"private": repository in hub.private, "gated": repository in hub.asks_for_access and "auto"}
                self.answer(200, {"id": repository, "sha": commit, "siblings": siblings, **access})

        def resolve(self, repository, revision, file):
            location = self.find(repository, revision)
            if not location:
                return
            hub.resolved.append(file)
            path = location[1] / file
            if not path.is_file():
                self.answer(404, {}, {"X-Error-Code": "EntryNotFound"})
            elif path.stat().st_size >= LARGE:
                self.answer(302, {}, {"Location": f"{hub.address.replace('127.0.0.1', 'localhost')}/store{path}"})
            else:
                self.send_file(path)

        def send_file(self, path):
            content = path.read_bytes()
            requested = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            with hub.lock:
                fault = hub.faults.pop(0) if hub.faults else None
                hub.file_requests.append((path.name, requested and tuple(map(int, requested.groups()))))
            if isinstance(fault, int):
                self.answer(fault, {}, {"Retry-After": "0"})
                return
            if fault == "slow":
                time.sleep(0.3)
            status, headers = 200, {}
            if requested and hub.ranges:
                start, last = map(int, requested.groups())
                start, last = start - hub.shift, last - hub.shift
                headers = {"Content-Range": f"bytes {start}-{last}/{len(content)}"}
                status, content = 206, content[start : last + 1]
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if fault == "cut":
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
                self.connection.shutdown(2)
                return
            self.wfile.write(content)
            with hub.lock:
                hub.served += len(content)

        def answer(self, status, content, headers=()):
            body = json.dumps(content).encode()
            self.send_response(status)
            for name, value in (*dict(headers).items(), ("Content-Length", str(len(body)))):
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler
