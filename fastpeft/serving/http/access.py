"""Who may do what: one key for requests, a second for changing what is served."""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Awaitable, Callable

from fastapi import Request

from .answers import ApiError

Check = Callable[[Request], Awaitable[None]]


class Access:
    """The checks of a server's routes.

    Args:
        api_key: that requests need, or None.
        admin_key: that loading and unloading need, and that opens everything else too; None for ``api_key``.
    """

    def __init__(self, api_key: str | None, admin_key: str | None):
        self._api = [_digest(key.encode()) for key in (api_key, admin_key) if key is not None and api_key is not None]
        self._admin = self._api if admin_key is None else [_digest(admin_key.encode())]

    async def request(self, request: Request) -> None:
        """Raises ApiError 401."""
        self._refuse_without(self._api, request, False)

    async def page(self, request: Request) -> None:
        """Likewise; browsers may send the key as a password. For what only reads."""
        self._refuse_without(self._api, request, True)

    async def change(self, request: Request) -> None:
        """Raises ApiError 401, and 403 for a key that may only ask."""
        try:
            self._refuse_without(self._admin, request, False)
        except ApiError:
            if self._api and self._api is not self._admin:
                self._refuse_without(self._api, request, False)
                raise ApiError(403, "This key may not load or unload adapters", code="admin_key_needed") from None
            raise

    def _refuse_without(self, keys: list[bytes], request: Request, password: bool) -> None:
        if not keys:
            return
        given = _digest(_given(request, password))
        if not sum(hmac.compare_digest(given, key) for key in keys):  # all of them, however soon one fits
            error = ApiError(
                401, "Incorrect or missing API key, expected Authorization: Bearer KEY", code="invalid_api_key"
            )
            if password:
                error.headers["WWW-Authenticate"] = 'Basic realm="fastpeft: any name, and the key as password"'
            raise error


def _given(request: Request, password: bool) -> bytes:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip().encode("utf-8", "surrogateescape")
    if password and scheme.lower() == "basic":
        try:
            return base64.b64decode(key, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
