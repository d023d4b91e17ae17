"""The routes of all dialects, and the one for embeddings."""

from __future__ import annotations

from typing import Final

from starlette.routing import Route

from server.dialects.embeddings import EMBEDDINGS, Embeddings
from server.dialects.messages import COUNT_TOKENS, MESSAGES, CountTokens, Messages
from server.dialects.responses import RESPONSES, Responses
from server.dialects.wrap import Dialect, Translated
from server.proxy import Completions, Proxy

CHAT: Final = "/v1/chat/completions"


def translated_routes(proxy: Proxy) -> list[Route]:
    """Return the routes beside those that are guarded as they come.

    Args:
        proxy: What all requests share.
    """
    images = proxy.options.images
    dialects: dict[str, Dialect] = {
        MESSAGES: Messages(images),
        COUNT_TOKENS: CountTokens(images),
        RESPONSES: Responses(images),
    }
    routes = [
        Route(path, Translated(dialect, Completions(CHAT, proxy), proxy), methods=["POST"])
        for path, dialect in dialects.items()
    ]
    return [*routes, Route(EMBEDDINGS, Embeddings(proxy), methods=["POST"])]
