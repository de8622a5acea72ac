"""The protocol between us and a black-box core, and its few records."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Protocol

from exectune_jax.episode import Execution

CoreReply = Execution  # text, finish, input/output tokens, usd, latency_s


@dataclasses.dataclass(frozen=True)
class CoreRequest:
  """Everything that the answer depends on.

  messages: ((role, text), ...) with roles system, user and assistant.
  max_tokens: limit on the reply, in the core's tokens.
  sample: number of this draw among repeated draws of the same request;
    always 0 at temperature 0, where all draws are one.
  """
  messages: tuple[tuple[str, str], ...]
  temperature: float
  max_tokens: int
  stop: tuple[str, ...] = ()
  sample: int = 0

  @classmethod
  def build(cls, settings, messages, sample: int = 0) -> CoreRequest:
    """Request with the parameters of a core section of the config."""
    return cls(tuple(messages), settings.temperature, settings.max_tokens,
               tuple(settings.stop), sample if settings.temperature > 0 else 0)

  def key(self, core: str) -> str:
    """Ledger key: hash of the canonical JSON of core and request."""
    fields = {'core': core, **dataclasses.asdict(self)}
    text = json.dumps(fields, sort_keys=True, separators=(',', ':'),
                      ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Core(Protocol):
  """An adapter: one provider, one model. It never retries by itself."""
  name: str  # 'provider:model', part of the ledger key
  usd_per_1m: tuple[float, float]  # dollars for 1M input, 1M output tokens

  async def generate(self, request: CoreRequest) -> CoreReply:
    """One try. Raises one of the errors below; a refusal is a reply."""

  async def close(self) -> None:
    """Closes connections."""


class RetryableError(Exception):
  """Rate limit, server error, broken connection, unreadable reply.

  retry_after_s: what the server asked for, or None.
  """

  def __init__(self, message: str, retry_after_s: float | None = None):
    super().__init__(message)
    self.retry_after_s = retry_after_s


class UnreachableError(RetryableError):
  """No connection at all."""


class RequestError(Exception):
  """The server rejects this very request; others may succeed."""


class FatalError(Exception):
  """No request can succeed: wrong key, unknown model."""


def dollars(usd_per_1m: tuple[float, float], input_tokens: int,
            output_tokens: int) -> float:
  return (input_tokens * usd_per_1m[0] + output_tokens * usd_per_1m[1]) / 1e6


def clean(text: str) -> str:
  """Text that can be stored: lone surrogates become question marks."""
  return text.encode('utf-8', 'replace').decode()


def classify_status(status: int, body: str, where: str,
                    retry_after: str | None = None) -> Exception:
  """The error class of an HTTP status (see the classes above)."""
  message = f'{where}: HTTP {status}: {" ".join(body.split())[:200]}'
  if status in (408, 409, 425, 429) or status >= 500:
    try:
      delay = float(retry_after) if retry_after else None
    except ValueError:  # an HTTP date; the normal backoff will do
      delay = None
    return RetryableError(message, delay)
  fatal = status in (401, 402, 403, 404)
  return FatalError(message) if fatal else RequestError(message)
