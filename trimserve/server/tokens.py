"""Clients, their tokens and what they may use, from a file that is read again when it changes.

    [clients.shop]                                   # a name for logs, limits and errors
    token_sha256 = ["9f86d0..."]                     # of its tokens; two while one replaces the other
    services = ["trimserve.v1.GenerationService"]    # default: all that do not change the server
    max_priority = 10                                # of its requests; default: 0
    requests_per_minute = 600                        # allowances; default: no limit
    tokens_per_minute = 100_000                      # of prompts and answers
    bytes_per_minute = "1GiB"                        # of requests

The file holds digests only, so reading it grants no access. Tokens must be long and random: a guessable token can be
found from its digest.
"""

import hashlib
import hmac
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from trimserve.api.bounds import BOUNDS
from trimserve.errors import CredentialsError, PermissionDenied, Unauthenticated
from trimserve.server.metrics import Metrics
from trimserve.server.reloaded import Reloaded
from trimserve.validation import complaint

__all__ = ["Caller", "Tokens"]

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

Allowance = Annotated[int, Field(ge=1)]

SCHEME = "bearer "

PRIORITIES = BOUNDS["priority"]

ALLOWANCES = ("requests_per_minute", "tokens_per_minute", "bytes_per_minute")


class _Entry(BaseModel):
    """One client in the file."""

    model_config = ConfigDict(extra="forbid")

    token_sha256: list[Digest] = Field(min_length=1)
    services: frozenset[str] | None = None
    max_priority: Annotated[int, Field(ge=PRIORITIES.low, le=PRIORITIES.high)] = 0
    requests_per_minute: Allowance | None = None
    tokens_per_minute: Allowance | None = None
    bytes_per_minute: Annotated[ByteSize, Field(ge=1)] | None = None

    @field_validator("services")
    @classmethod
    def _exist(cls, services: frozenset[str] | None, info: ValidationInfo) -> frozenset[str] | None:
        known: Collection[str] = info.context or ()
        if unknown := (services or frozenset()) - set(known):
            raise ValueError(f"must be among {', '.join(known)}, got {', '.join(sorted(unknown))}")
        return services

    def rates(self) -> dict[str, int]:
        """The allowances that it has."""
        named = {name: getattr(self, name) for name in ALLOWANCES}
        return {name: int(per_minute) for name, per_minute in named.items() if per_minute is not None}


class _Clients(BaseModel):
    """The file."""

    model_config = ConfigDict(extra="forbid")

    clients: dict[Name, _Entry]

    @field_validator("clients")
    @classmethod
    def _differ(cls, clients: dict[str, _Entry]) -> dict[str, _Entry]:
        owners: dict[str, str] = {}
        for name, entry in clients.items():
            for digest in entry.token_sha256:
                if owners.setdefault(digest, name) != name:
                    raise ValueError(f"{owners[digest]} and {name} must have different tokens, got {digest[:8]}...")
        return clients


@dataclass(frozen=True, slots=True)
class Caller:
    """A client, identified by its token; without tokens, by what the transport calls it."""

    name: str
    services: frozenset[str]
    """Full names of those it may use."""
    max_priority: int = int(PRIORITIES.high)
    """Of its requests."""
    rates: Mapping[str, int] = field(default_factory=dict)
    """What it may have in a minute, by the name that the file has for it; without an entry, there is no limit."""

    def check(self, service: str) -> None:
        """Check that it may use a service.

        Raises:
            PermissionDenied: it may not.
        """
        if service not in self.services:
            raise PermissionDenied(f"client {self.name} may not use {service}")


class Tokens:
    """The clients of a file."""

    def __init__(
        self, path: Path, services: Collection[str], metrics: Metrics, unnamed: Collection[str] | None = None
    ) -> None:
        """Read the file.

        Args:
            path: TOML, as described above.
            services: full names of all services.
            metrics: tells of failures to read it again.
            unnamed: those of a client that names none; None is all.
        Raises:
            CredentialsError: it cannot be read, or is not a valid list of clients.
        """
        of_unnamed = services if unnamed is None else unnamed
        self._callers = Reloaded("tokens", [path], lambda: _read(path, services, of_unnamed), metrics)

    def caller(self, metadata: Mapping[str, str | bytes]) -> Caller:
        """The client whose token a call carries, as `authorization: Bearer TOKEN` or `x-api-key: TOKEN`.

        Args:
            metadata: of the call, with lower-case keys.
        Raises:
            Unauthenticated: there is no token, or an unknown one.
        """
        digest = hashlib.sha256(_token(metadata).encode()).digest()
        found = None
        # Every digest is compared, each in constant time, so that timing reveals nothing about them.
        for known, caller in self._callers.get():
            if hmac.compare_digest(digest, known):
                found = caller
        if found is None:
            raise Unauthenticated("the token is not one of a client of this server")
        return found


def _token(metadata: Mapping[str, str | bytes]) -> str:
    authorization = metadata.get("authorization")
    if isinstance(authorization, str) and authorization.lower().startswith(SCHEME):
        return authorization[len(SCHEME) :].strip()
    key = metadata.get("x-api-key")
    if isinstance(key, str):
        return key
    raise Unauthenticated("a token must be sent as metadata, authorization: Bearer TOKEN or x-api-key: TOKEN, got none")


def _read(path: Path, services: Collection[str], unnamed: Collection[str]) -> tuple[tuple[bytes, Caller], ...]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        entries = _Clients.model_validate(document, context=services).clients
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        words = complaint(first, is_secret="token_sha256" in first["loc"])
        raise CredentialsError(f"{path} (--auth-file): {where}: {words}") from None
    except (OSError, ValueError) as error:
        raise CredentialsError(f"{path} (--auth-file) must be TOML with clients: {error}") from error
    return tuple(
        (bytes.fromhex(digest), _caller(name, entry, unnamed))
        for name, entry in entries.items()
        for digest in entry.token_sha256
    )


def _caller(name: str, entry: _Entry, unnamed: Collection[str]) -> Caller:
    allowed = frozenset(unnamed) if entry.services is None else entry.services
    return Caller(name, allowed, entry.max_priority, entry.rates())
