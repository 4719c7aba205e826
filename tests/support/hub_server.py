"""A server that speaks as much of the Hub's protocol as clients of it use, on loopback, with faults on demand."""

import hashlib
import json
import re
import shutil
import tempfile
import threading
import time
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.support.hub_writing import Writing

LARGE = 1000
"""Bytes from which a file is behind a redirect, as files in LFS are."""


class HubServer:
    """Repositories whose commits are folders.

    Attributes:
        repositories: folder of each commit by name of the repository, the newest last.
        refs: commit of each branch and pull request that was made, by repository.
        lfs: SHA-256 of each file of a commit that is in LFS, by commit.
        private: names of repositories that only their owners see; `readonly`: that nobody may write to.
        gated: names of repositories that refuse whom they have not admitted; `asks_for_access`: that admit who asks.
        account: what `whoami` answers.
        commits: repository, revision and title of each commit that was made through the server.
        requests: pull requests: repository, title.
        faults: what the next requests for files meet, one each: a status, `cut` or `slow`.
        write_faults: what the next requests of a kind meet, one each; see `hub_writing`.
        asked_kinds: how many requests of each kind there were.
        chunk_bytes: of a part of an upload; `bytes_per_s`: that are taken in.
        uploaded: bytes of parts that were taken; `objects`: folder of what is held, by SHA-256.
        ranges: whether they are sent; `shift`: by how many bytes they are wrong.
        served: bytes of file contents that were sent.
        asked: path and range of each request for file contents.
        resolved: names of files that the Hub was asked for the place of.
        tokens: seen in requests to the Hub, and in those to the store behind redirects.
    """

    def __init__(self):
        self.root = Path(tempfile.mkdtemp(prefix="hub-"))
        self.objects = self.root / "objects"
        self.objects.mkdir()
        self.repositories, self.refs, self.lfs = {}, defaultdict(dict), {}
        self.private, self.readonly, self.gated, self.asks_for_access, self.faults = set(), set(), set(), set(), []
        self.account = {"name": "me", "orgs": [{"name": "org", "roleInOrg": "write"}], "auth": {}}
        self.commits, self.requests, self.write_faults = [], [], defaultdict(list)
        self.asked_kinds, self.chunk_bytes, self.bytes_per_s, self.uploaded = Counter(), 16_000, None, 0
        self.parts = {}
        self.served, self.asked, self.tokens = 0, [], {"hub": set(), "store": set()}
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
        """Move `main` to a new commit that is a folder; its hash."""
        commits = self.repositories.setdefault(repository, {})
        commit = hashlib.sha1(f"{repository}{len(commits)}".encode()).hexdigest()
        commits[commit] = folder
        self.refs[repository]["main"] = commit
        return commit

    def folder(self, repository, revision):
        """Commit and folder of a revision; None where there is none."""
        commits = self.repositories[repository]
        commit = self.refs[repository].get(revision, revision)
        return (commit, commits[commit]) if commit in commits else None

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        shutil.rmtree(self.root, ignore_errors=True)


def _handler(hub):
    class Handler(Writing, BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement
        server_hub = hub

        def log_message(self, *args):
            pass

        def do_GET(self):
            path = self.path.partition("?")[0]
            if self.wants_to_write(path):
                return
            api = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?", path)
            resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            if not (api or resolve or path.startswith("/store/")):
                self.answer(404, {})
                return
            hub.tokens["hub" if api or resolve else "store"].add(self.headers.get("Authorization"))
            if api:
                self.tell(api[1], (api[2] or "main").replace("%2F", "/"))
            elif resolve:
                self.resolve(*resolve.groups())
            else:
                self.send_file(Path(path.removeprefix("/store")))

        def find(self, repository, revision):
            """Commit and folder; None where the request was refused."""
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

        def tell(self, repository, revision):
            if self.meets_fault("info"):
                return
            found = self.find(repository, revision)
            if found:
                commit, folder = found
                siblings = [{"rfilename": path.name, "size": path.stat().st_size} for path in sorted(folder.iterdir())]
                told = {"private": repository in hub.private, "gated": repository in hub.asks_for_access and "auto"}
                self.answer(200, {"id": repository, "sha": commit, "siblings": siblings, **told})

        def resolve(self, repository, revision, file):
            found = self.find(repository, revision)
            if not found:
                return
            hub.resolved.append(file)
            path = found[1] / file
            if not path.is_file():
                self.answer(404, {}, {"X-Error-Code": "EntryNotFound"})
            elif path.stat().st_size >= LARGE:
                self.answer(302, {}, {"Location": f"{hub.address.replace('127.0.0.1', 'localhost')}/store{path}"})
            else:
                self.send_file(path)

        def send_file(self, path):
            content = path.read_bytes()
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            with hub.lock:
                fault = hub.faults.pop(0) if hub.faults else None
                hub.asked.append((path.name, asked and tuple(map(int, asked.groups()))))
            if isinstance(fault, int):
                self.answer(fault, {}, {"Retry-After": "0"})
                return
            if fault == "slow":
                time.sleep(0.3)
            status, headers = 200, {}
            if asked and hub.ranges:
                start, last = map(int, asked.groups())
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
            self.wfile.write(body)

    return Handler
