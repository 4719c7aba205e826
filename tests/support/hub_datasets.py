"""The part of the Hub's protocol by which datasets are listed and read: as of models, with other addresses."""

import hashlib
import re
import urllib.parse

_INFO = re.compile(r"/api/datasets/(?P<repository>[^/]+(/[^/]+)?)/revision/(?P<revision>[^/]+)")
_TREE = re.compile(r"/api/datasets/(?P<repository>[^/]+(/[^/]+)?)/tree/(?P<revision>[^/]+)(/(?P<path>.*))?")
_PATHS = re.compile(r"/api/datasets/(?P<repository>[^/]+(/[^/]+)?)/paths-info/(?P<revision>[^/]+)")
_FILE = re.compile(r"/datasets/(?P<repository>[^/]+(/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


class Datasets:
    """Answers the requests for datasets, which are repositories like any other. It is a part of the request handler."""

    def do_HEAD(self):
        if not self.serves_dataset():
            self.answer(404, {})

    def do_POST(self):
        if not self.serves_dataset():
            super().do_POST()

    def serves_dataset(self):
        """Answer a request for a dataset, and tell whether it was one."""
        path = self.path.partition("?")[0]
        kinds = {"info": _INFO, "tree": _TREE, "paths": _PATHS, "file": _FILE}
        for kind, pattern in kinds.items():
            match = pattern.fullmatch(path)
            if match:
                parts = {name: urllib.parse.unquote(value or "") for name, value in match.groupdict().items()}
                location = self.find(parts["repository"], parts["revision"])
                if location and kind == "info":
                    self.send_info(parts["repository"], parts["revision"])
                elif location:
                    getattr(self, f"send_dataset_{kind}")(*location, parts.get("path", ""))
                return True
        return False

    def send_dataset_tree(self, commit, folder, path):
        depth = "**/*" if "recursive=true" in self.path.lower() else "*"
        entries = sorted((folder / path).glob(depth)) if (folder / path).is_dir() else []
        if entries:
            self.answer(200, [_entry(folder, entry) for entry in entries])
        else:
            self.refuse(404, "EntryNotFound", f"{path} does not exist on {commit}")

    def send_dataset_paths(self, commit, folder, path):
        asked = urllib.parse.parse_qs(self.body().decode())["paths"]
        self.answer(200, [_entry(folder, folder / name) for name in asked if (folder / name).exists()])

    def send_dataset_file(self, commit, folder, path):
        file = folder / path
        if not file.is_file():
            self.answer(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        elif self.command == "HEAD":
            self.send_response(200)
            content = file.read_bytes()
            headers = {"X-Repo-Commit": commit, "ETag": f'"{_digest(content)}"', "Content-Length": str(len(content))}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
        else:
            self.send_file(file)


def _digest(content):
    return hashlib.sha1(content).hexdigest()


def _entry(folder, path):
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": _digest(name.encode())}
    return {"type": "file", "path": name, "oid": _digest(path.read_bytes()), "size": path.stat().st_size}
