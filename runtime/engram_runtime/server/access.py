"""Who may ask: hosts, origins and keys."""

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from engram_runtime.errors import RequestError
from engram_runtime.openai_api.errors import UNAUTHORISED, ApiError

FORBIDDEN = 403
LEAST_KEY_CHARS = 16
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
KEY_VARIABLE = "ENGRAM_API_KEY"


@dataclass(frozen=True, slots=True)
class Access:
    """What a request must bring.

    Attributes:
        hosts: names the server may be called by, without the port; None for any.
        keys: one of which has to come with a request, if there are any.
    """

    hosts: frozenset[str] | None = LOOPBACK_NAMES
    keys: tuple[bytes, ...] = ()

    def check_host(self, headers: Mapping[str, str]) -> None:
        """Refuse what a page of another site may have sent, be it by a name that it had rebound to this address.

        Raises:
            ApiError: a host that isn't allowed, or an origin that isn't this server.
        """
        host = headers.get("host", "")
        if self.hosts is not None and _without_port(host) not in self.hosts:
            raise ApiError(
                f"this server isn't called {host[:60]!r}, wanted {' or '.join(sorted(self.hosts))}",
                status=FORBIDDEN,
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError(
                f"pages of {origin[:60]!r} may not ask this server", status=FORBIDDEN, code="origin_not_allowed"
            )

    def admits(self, headers: Mapping[str, str]) -> bool:
        """Return whether a request has a key, where there are keys."""
        try:
            self.client(headers)
        except ApiError:
            return False
        return True

    def client(self, headers: Mapping[str, str]) -> str:
        """Return who a key belongs to, empty without keys.

        Raises:
            ApiError: no key, or a wrong one.
        """
        if not self.keys:
            return ""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # All are compared: the time tells nothing of which one was near.
        matches = [hmac.compare_digest(key, given.strip().encode()) for key in self.keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                status=UNAUTHORISED,
                code="invalid_api_key",
            )
        return f"key {matches.index(True)}"


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).lower()


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def access_for(host: str, keys: Sequence[str]) -> Access:
    """Return what requests to an address must bring.

    Raises:
        RequestError: others could reach it without a key.
    """
    if is_loopback(host):
        return Access(LOOPBACK_NAMES | {host.lower()}, _encoded(keys))
    if not keys:
        raise RequestError(
            f"--host {host} can be reached by others, which needs a key; give --api-key-file or set {KEY_VARIABLE}"
        )
    return Access(None, _encoded(keys))


def _encoded(keys: Sequence[str]) -> tuple[bytes, ...]:
    for key in keys:
        if len(key) < LEAST_KEY_CHARS or not (key.isascii() and key.isprintable()):
            raise RequestError(
                f"an API key has {len(key)} characters, wanted at least {LEAST_KEY_CHARS} of printable ASCII; "
                "make one with: openssl rand -hex 24"
            )
    return tuple(key.encode() for key in keys)


def read_keys(path: Path | None, environment: Mapping[str, str]) -> list[str]:
    """Return the keys of a file, one a line, and of the environment.

    Raises:
        RequestError: the file can't be read, or has none.
    """
    from_environment = [key] if (key := environment.get(KEY_VARIABLE)) else []
    if path is None:
        return from_environment
    try:
        keys = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"API keys {path} can't be read: {error}") from error
    if not keys:
        raise RequestError(f"{path} has no API key, wanted one a line")
    return keys + from_environment
