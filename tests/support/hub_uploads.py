"""Uploads to LFS as the Hub takes them: announced in batches, sent in one piece or in parts, checked by SHA-256."""

import hashlib
import json
import time


class Uploads:
    """Answers the requests that upload objects. It is a part of the request handler."""

    def batch(self, body, repository):
        hub, objects = self.server_hub, []
        for entry in json.loads(body)["objects"]:
            path = hub.objects / entry["oid"]
            if path.is_file() and path.stat().st_size == entry["size"]:
                objects.append(entry)
                continue
            store = hub.address.replace("127.0.0.1", "localhost")
            upload = {"href": f"{store}/parts/{entry['oid']}/1"}
            if entry["size"] > hub.chunk_bytes:
                count = -(-entry["size"] // hub.chunk_bytes)
                links = {str(part): f"{store}/parts/{entry['oid']}/{part}?sig=s3cr3t" for part in range(1, count + 1)}
                header = {"chunk_size": str(hub.chunk_bytes), **links}
                upload = {"href": f"{hub.address}/complete/{entry['oid']}", "header": header}
            verify = {"href": f"{hub.address}/verify/{repository}"}
            objects.append({**entry, "actions": {"upload": upload, "verify": verify}})
        return {"transfer": "multipart", "objects": objects}

    def put(self, body, oid, part):
        hub = self.server_hub
        if hub.bytes_per_s:
            hub.lock.release()  # others do not wait for a slow line
            time.sleep(len(body) / hub.bytes_per_s)
            hub.lock.acquire()
        hub.uploaded += len(body)
        hub.parts[oid, int(part)] = body
        if "sig" not in self.path:
            self.keep(oid, [body])
        return 200, {}, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}

    def complete(self, body, oid):
        listed = sorted(json.loads(body)["parts"], key=lambda part: part["partNumber"])
        parts = [self.server_hub.parts[oid, part["partNumber"]] for part in listed]
        tags = [f'"{hashlib.md5(part).hexdigest()}"' for part in parts]
        if tags != [part["etag"] for part in listed] or not self.keep(oid, parts):
            return 400, {"error": "the parts are not those of the object"}
        return {}

    def keep(self, oid, parts):
        """Store an object if its SHA-256 is its name, and tell whether it is."""
        content = b"".join(parts)
        if hashlib.sha256(content).hexdigest() != oid:
            return False
        (self.server_hub.objects / oid).write_bytes(content)
        return True

    def verify(self, body, repository):
        entry = json.loads(body)
        path = self.server_hub.objects / entry["oid"]
        is_stored = path.is_file() and path.stat().st_size == entry["size"]
        return (200, {}) if is_stored else (404, {"error": "no such object"})
