"""What stands between the browser and Gradio: only the addresses the page needs are open, the document gets our script
and language, and a policy that lets the browser ask no other host for anything. Knows nothing of what the page shows.

Gradio serves a good deal more than a page (uploads, files, a proxy, API descriptions, code editing); none of it is used
here, so none of it can be reached.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/robots\.txt|/(assets|static)/[^?]*"
    r"|/gradio_api/(queue/(join|data)|cancel|reset/?|heartbeat/\w+|startup-events|theme\.css)"
)
"""Paths that the page asks for."""

POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline'",  # Gradio's document carries its configuration as a script
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
    )
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)

# Cards for sites that show links, with pictures on other hosts; a manifest for installing, likewise.
_FOREIGN = re.compile(rb'<meta\s+(?:property="og:|name="twitter:)[^>]*>\s*|<link rel="manifest"[^>]*>\s*')


class PageShell:
    """ASGI middleware around the mounted Gradio application.

    Args:
        head: HTML that comes first in the document's head.
    """

    def __init__(self, app: ASGIApp, head: str) -> None:
        self.app, self.head = app, head.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if not OPEN.fullmatch(path):
            await _not_found(send)
        elif path == "/":
            # Neither compressed, since the document is changed here, nor with what Gradio takes from the address.
            headers = [(k, v) for k, v in scope["headers"] if k != b"accept-encoding"]
            await self.app({**scope, "headers": headers, "query_string": b""}, receive, self._document(send))
        else:
            await self.app(scope, receive, _with_headers(send))

    def _document(self, send: Send) -> Send:
        start: Message = {}
        body = b""

        async def changed(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = message
                return
            body += message.get("body", b"")
            if message.get("more_body"):
                return
            content = _FOREIGN.sub(b"", body).replace(b"<head>", b"<head>\n" + self.head, 1)
            headers = [(k, v) for k, v in start["headers"] if k != b"content-length"]
            # A head request has a length and no body.
            headers += [(b"content-length", str(len(content)).encode())] if body else []
            await send({**start, "headers": [*headers, *HEADERS, (b"cache-control", b"no-cache")]})
            await send({"type": "http.response.body", "body": content})

        return changed


def _with_headers(send: Send) -> Send:
    async def changed(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *HEADERS]}
        await send(message)

    return changed


async def _not_found(send: Send) -> None:
    await send({"type": "http.response.start", "status": 404, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": b'{"detail":"Not Found"}'})
