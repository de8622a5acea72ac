"""The protocol between us and a black-box core, and its few records."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from typing import Protocol

from exectune_jax.episode import Execution

CoreReply = Execution  # text, finish, tokens of each kind, usd, latency_s


@dataclasses.dataclass(frozen=True)
class CoreRequest:
  """Everything that the answer depends on.

  messages: ((role, text), ...) with roles system, user and assistant.
  max_tokens: limit on the reply, in the core's tokens, thoughts included.
  sample: number of this draw among repeated draws of the same request;
    always 0 at temperature 0, where all draws are one.
  thinking: how much to think: '' as the model likes, a number of tokens
    (Gemini, Claude) or an effort such as 'low' (GPT).
  """
  messages: tuple[tuple[str, str], ...]
  temperature: float
  max_tokens: int
  stop: tuple[str, ...] = ()
  sample: int = 0
  thinking: str = ''

  @classmethod
  def build(cls, settings, messages, sample: int = 0) -> CoreRequest:
    """Request with the parameters of a core section of the config."""
    return cls(tuple(messages), settings.temperature, settings.max_tokens,
               tuple(settings.stop), sample if settings.temperature > 0 else 0,
               settings.thinking)

  def key(self, core: str) -> str:
    """Ledger key: hash of the canonical JSON of core and request."""
    fields = {'core': core, **vars(self)}
    if not self.thinking:  # as in ledgers from before there was this field
      del fields['thinking']
    text = json.dumps(fields, sort_keys=True, separators=(',', ':'),
                      ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Price:
  """Dollars for a million tokens; `cached` are input that the core kept."""
  input: float
  output: float
  cached: float | None = None  # None: as other input

  def dollars(self, input_tokens: int, output_tokens: int,
              cached_tokens: int = 0) -> float:
    """Of one reply; cached tokens are a part of the input's."""
    cached = self.input if self.cached is None else self.cached
    return ((input_tokens - cached_tokens) * self.input
            + cached_tokens * cached + output_tokens * self.output) / 1e6


class Core(Protocol):
  """An adapter: one provider, one model. It never retries by itself."""
  name: str  # 'provider:model', part of the ledger key
  price: Price

  async def generate(self, request: CoreRequest) -> CoreReply:
    """One try. Raises one of the errors below; a refusal is a reply."""

  # A core may have a second way, for replies that are shown as they come:
  #   async def stream(self, request, on_text) -> CoreReply
  # the same, calling on_text(piece) with each piece of the text.

  async def close(self) -> None:
    """Closes connections."""


class RetryableError(Exception):
  """Rate limit, server error, broken connection, unreadable reply.

  retry_after_s: what the server asked for, or None.
  overload: the server has too much to do; ask less of it.
  usd: what the try cost; None where nobody can know.
  """

  def __init__(self, message: str, retry_after_s: float | None = None, *,
               overload: bool = False, usd: float | None = None):
    super().__init__(message)
    self.retry_after_s, self.overload, self.usd = retry_after_s, overload, usd


class UnreachableError(RetryableError):
  """No connection at all."""

  def __init__(self, message: str, retry_after_s: float | None = None):
    super().__init__(message, retry_after_s, usd=0.0)


class RequestError(Exception):
  """The server rejects this very request; others may succeed."""


class BlockedError(RequestError):
  """The provider's filters refuse the prompt, which is the core's answer."""


class FatalError(Exception):
  """No request can succeed: wrong key, unknown model."""


class TemperatureError(FatalError):
  """The core samples at another temperature only."""


@dataclasses.dataclass(frozen=True)
class Usage:
  """Tokens of a reply, read strictly: a nonsense count is no count."""
  input: int | None
  output: int | None
  cached: int = 0
  thinking: int = 0

  @classmethod
  def read(cls, input_, output, cached=0, thinking=0) -> Usage:
    """From whatever stands in a server's reply."""
    n_in, n_out = _count(input_), _count(output)
    return cls(n_in, n_out, min(_count(cached) or 0, n_in or 0),
               min(_count(thinking) or 0, n_out or 0))

  @property
  def known(self) -> bool:
    return self.input is not None and self.output is not None

  def dollars(self, price: Price) -> float | None:
    """What was billed, or None where the server did not say."""
    return (price.dollars(self.input, self.output, self.cached)
            if self.known else None)


def _count(value) -> int | None:
  ok = isinstance(value, int) and not isinstance(value, bool)
  return value if ok and 0 <= value < 1 << 31 else None


def only_temperature_one(request: CoreRequest, who: str) -> None:
  """Refuses what `who` would silently not do.

  At temperature 0 one draw stands for all, which it would not here.

  Raises:
    TemperatureError: another temperature is asked for.
  """
  if request.temperature != 1:
    raise TemperatureError(
        f'{who} samples at temperature 1 only, not {request.temperature:g}; '
        "set this core's temperature=1.0, and samples_alone=4 for the target")


def make_reply(core: Core, request: CoreRequest, text: str,
               finish: str | None, usage: Usage,
               latency_s: float) -> CoreReply:
  """A reply with its bill; without a known usage it is estimated from text.

  An answer is never thrown away, and paid again, because its bill is
  unreadable.

  Raises:
    RetryableError: the finish is none of ours, so this is no answer; it has
      its price all the same.
  """
  if finish not in ('stop', 'length', 'refused'):
    raise RetryableError(f'{core.name}: incomplete reply, finish {finish!r}',
                         usd=usage.dollars(core.price))
  known = usage.known
  if not known:
    usage = Usage(guess_input_tokens(request.messages), guess_tokens(text))
  return CoreReply(
      clean(text), finish, usage.input, usage.output,
      usage.dollars(core.price), latency_s, usage.cached, usage.thinking,
      not known)


def draws_alone(settings) -> int:
  """How many draws stand for the core alone; at temperature 0 all are one."""
  return settings.samples_alone if settings.temperature > 0 else 1


def guess_tokens(text: str) -> int:
  """About as many tokens as common tokenizers make of a text, and its frame:
  four bytes a token."""
  return len(text.encode(errors='replace')) // 4 + 4


def guess_input_tokens(messages) -> int:
  """The same of a whole request."""
  return sum(guess_tokens(text) for _, text in messages)


def clean(text: str) -> str:
  """Text that can be stored: lone surrogates become question marks."""
  return text.encode('utf-8', 'replace').decode()


# OpenAI's and Azure's names for it.
_BLOCKED = re.compile(r'"code":\s*"(content_filter|content_policy_violation|'
                      r'invalid_prompt)"')


def classify_status(status: int, body: str, where: str,
                    retry_after: str | None = None) -> Exception:
  """The error class of an HTTP status (see the classes above)."""
  message = f'{where}: HTTP {status}: {" ".join(body.split())[:200]}'
  if status in (408, 409, 425, 429) or status >= 500:
    return RetryableError(message, seconds(retry_after),
                          overload=status in (429, 503, 529), usd=0.0)
  if status == 400 and _BLOCKED.search(body):
    return BlockedError(message)
  fatal = status in (401, 402, 403, 404)
  return FatalError(message) if fatal else RequestError(message)


def seconds(retry_after: str | None) -> float | None:
  """A Retry-After header or a duration like '34s', in seconds; HTTP dates
  are None, which leaves it to the normal backoff."""
  try:
    delay = float((retry_after or '').removesuffix('s'))
  except ValueError:
    return None
  return delay if 0 <= delay < 86_400 else None
