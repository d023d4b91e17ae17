"""Remembers decisions on whole requests, so that one that comes again is not read again.

Chat clients and benchmarks send the same body over and over. What is remembered is a decision by a
keyed digest of endpoint and body: no text, and nothing that a dump of the memory would turn back
into one. A new version of the bundle forgets all of it.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from guard.types import Decision

ENTRIES: Final = 4096
MOST_SPANS: Final = 64
"""Spans of a decision that is remembered: more would let few bodies fill the memory."""
_DIGEST_BYTES: Final = 16


class Verdicts:
    """The last decisions of one version of a bundle; safe to share between threads.

    Args:
        entries: Decisions to remember, the last ones asked for; 0 remembers none.
        version: Version of the bundle that decides now.
    """

    def __init__(self, entries: int = ENTRIES, version: int = 0) -> None:
        self._entries, self._version = entries, version
        self._kept: OrderedDict[bytes, Decision] = OrderedDict()
        self._lock = threading.Lock()
        # Digests live as long as this object, so their key may too.
        self._key = secrets.token_bytes(32)

    def __len__(self) -> int:
        return len(self._kept)

    def decided(
        self, version: int, endpoint: str, body: bytes, decide: Callable[[], Decision]
    ) -> Decision:
        """Return the decision on a request: the remembered one, or that which is made now.

        Args:
            version: Version of the bundle that decides; another than the current one neither reads
                nor writes what is remembered.
            endpoint: The request's endpoint.
            body: The client's bytes, all of them: they alone decide.
            decide: Makes the decision; what it raises is not remembered.
        """
        if not self._entries:
            return decide()
        digest = self._digest(endpoint, body)
        found = self._find(version, digest)
        if found is None:
            found = decide()
            self._keep(version, digest, found)
        return found

    def clear(self, version: int) -> None:
        """Forget everything; from now on this version decides."""
        with self._lock:
            self._version = version
            self._kept.clear()

    def _digest(self, endpoint: str, body: bytes) -> bytes:
        found = hashlib.blake2b(key=self._key, digest_size=_DIGEST_BYTES)
        name = endpoint.encode()
        found.update(len(name).to_bytes(4))  # where one ends and the other begins is part of it
        found.update(name)
        found.update(body)
        return found.digest()

    def _find(self, version: int, digest: bytes) -> Decision | None:
        with self._lock:
            found = self._kept.get(digest) if version == self._version else None
            if found is not None:
                self._kept.move_to_end(digest)
            return found

    def _keep(self, version: int, digest: bytes, decision: Decision) -> None:
        if sum(len(hit.spans) for hit in decision.targets) > MOST_SPANS:
            return
        with self._lock:
            if version != self._version:
                return  # the bundle changed while this was decided
            self._kept[digest] = decision
            self._kept.move_to_end(digest)
            while len(self._kept) > self._entries:
                self._kept.popitem(last=False)
