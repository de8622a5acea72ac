"""The HTTP side: routes, who may ask, how much, and what is counted."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import math
import sys
import traceback
import urllib.parse

import prometheus_client as prom
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from exectune_jax.cores.base import RequestError, TemperatureError
from exectune_jax.errors import BudgetExhausted, Lost, UserError
from exectune_jax.serving import wire
from exectune_jax.serving.guided import Answer, GuidedCore
from exectune_jax.serving.wire import ApiError

GUIDED = 'exectune'  # the model's name for clients
BODY_SECONDS = 20.0  # within which a request must have arrived
SECONDS = (.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, math.inf)


class Meters:
  """What /metrics shows."""

  def __init__(self, ledger):
    self.registry = prom.CollectorRegistry()
    def make(kind, name, text, *labels, **more):
      return kind(f'exectune_{name}', text, labels, registry=self.registry,
                  **more)
    self.answers = make(prom.Counter, 'answers_total', 'Answers, by why the '
                        'core was alone (empty: guided).', 'alone')
    self.errors = make(prom.Counter, 'errors_total', 'Requests without an '
                       'answer.', 'status')
    self.cached = make(prom.Counter, 'cached_total', 'Answers that were in '
                       'the ledger.')
    self.tokens = make(prom.Counter, 'tokens_total', 'Tokens.', 'whose')
    self.running = make(prom.Gauge, 'requests_running', 'Requests now.')
    self.seconds = make(prom.Histogram, 'answer_seconds', 'From request to '
                        'the end of the answer.', buckets=SECONDS)
    self.guide = make(prom.Histogram, 'strategy_seconds', 'From request to '
                      'strategy.', buckets=SECONDS)
    make(prom.Gauge, 'core_usd', 'Dollars that the core has cost, by the '
         'ledger.').set_function(lambda: ledger.spent_usd)

  def count(self, answer: Answer) -> None:
    self.answers.labels(answer.plan.alone).inc()
    self.cached.inc(answer.cached)
    if not answer.cached:
      self.tokens.labels('core_input').inc(answer.reply.input_tokens)
      self.tokens.labels('core_output').inc(answer.reply.output_tokens)
    self.tokens.labels('guide').inc(answer.plan.tokens)
    self.seconds.observe(answer.seconds)
    if answer.plan.alone != 'asked for':
      self.guide.observe(answer.plan.seconds)


class Endpoint:
  """All routes.

  Args:
    guided: answers chats.
    options: config.serve.
    token: what clients must present, '' for nothing.
  """

  def __init__(self, guided: GuidedCore, options, token: str = ''):
    self.guided, self.options, self.token = guided, options, token
    # Without the address: that is nobody's business.
    self.core = guided.client.core.name.partition('@')[0]
    self.meters = Meters(guided.client.ledger)
    self.running = 0

  def app(self) -> Starlette:
    def route(path, endpoint, method='GET'):
      return Route(path, endpoint, methods=[method])
    return Starlette(routes=[
        route('/v1/chat/completions', self.chat, 'POST'),
        route('/v1/models', self.models), route('/metrics', self.metrics),
        route('/healthz', self.health)], exception_handlers={
            ApiError: self._refused, 404: _plain, 405: _plain,
            Exception: self._failed})

  async def health(self, _) -> Response:
    return JSONResponse({'status': 'ok', 'running': self.running})

  async def models(self, request: Request) -> Response:
    self._authorise(request)
    return JSONResponse({'object': 'list', 'data': [
        {'id': name, 'object': 'model', 'created': 0, 'owned_by': 'exectune'}
        for name in (GUIDED, self.core)]})

  async def metrics(self, request: Request) -> Response:
    self._authorise(request)
    return Response(prom.generate_latest(self.meters.registry),
                    media_type=prom.CONTENT_TYPE_LATEST)

  async def chat(self, request: Request) -> Response:
    self._authorise(request)
    if self.running >= self.options.max_requests:
      raise ApiError(429, f'{self.running} requests are being answered, as '
                     'many as there may be', 'rate_limit_exceeded',
                     kind='requests', headers={'Retry-After': '1'})
    with contextlib.ExitStack() as stack:
      stack.enter_context(self._one())
      ask = wire.read(await self._body(request), GUIDED, self.core)
      if not ask.stream:
        answer = await self._unless_gone(request, self.guided.answer(ask))
        self.meters.count(answer)
        return JSONResponse(wire.Reply(ask.model).whole(
            answer.reply, answer.extension(self.core)))
      # The count ends with the stream, not with this function.
      return StreamingResponse(self._stream(ask, stack.pop_all()),
                               media_type='text/event-stream',
                               headers={'Cache-Control': 'no-cache'})

  async def _stream(self, ask, stack):
    """Events of one answer; a client that leaves ends the work on it, but
    what the core is paid for still reaches the ledger."""
    reply, pieces = wire.Reply(ask.model), asyncio.Queue()
    with stack:
      work = asyncio.create_task(self._checked(
          self.guided.answer(ask, pieces.put_nowait)))
      work.add_done_callback(lambda _: pieces.put_nowait(None))
      try:
        yield reply.first()
        sent = ''
        while (piece := await pieces.get()) is not None:
          sent += piece
          yield reply.piece(piece)
        answer = work.result()
        self.meters.count(answer)
        yield reply.rest(answer.reply, sent)
        yield reply.last(answer.reply, answer.extension(self.core),
                         ask.include_usage)
      except ApiError as e:
        self.meters.errors.labels(str(e.status)).inc()
        yield wire.event(e.body)
      finally:
        work.cancel()

  async def _unless_gone(self, request: Request, answering) -> Answer:
    """The answer; a client that leaves ends the work on it."""
    work = asyncio.create_task(self._checked(answering))
    gone = asyncio.create_task(request.receive())  # nothing else comes now
    try:
      await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
      if not work.done():
        raise ApiError(499, 'the client left')
      return work.result()
    finally:
      work.cancel()
      gone.cancel()

  async def _checked(self, answering) -> Answer:
    """The answer, or what the client is told instead: no addresses, paths or
    words of the core's, which our log has."""
    try:
      return await answering
    except BudgetExhausted as e:
      raise ApiError(429, 'the budget of this server is spent',
                     'insufficient_quota', kind='insufficient_quota') from e
    except (Lost, UserError) as e:
      print(f'error: {e}', file=sys.stderr, flush=True)
      if isinstance(e.__cause__, TemperatureError):
        raise ApiError(400, 'temperature: this core samples at 1 only',
                       param='temperature') from e
      if isinstance(e.__cause__, RequestError):
        raise ApiError(400, 'the core rejects this request', 'core_refused'
                       ) from e
      raise ApiError(502, 'the core does not answer', 'core_failed',
                     kind='server_error') from e
    except Exception as e:  # noqa: BLE001 the client gets JSON, we the trace
      traceback.print_exc()
      raise ApiError(500, 'internal error', kind='server_error') from e

  @contextlib.contextmanager
  def _one(self):
    self.running += 1
    self.meters.running.set(self.running)
    try:
      yield
    finally:
      self.running -= 1
      self.meters.running.set(self.running)

  async def _body(self, request: Request) -> bytes:
    limit, body = self.options.max_body_kb * 1024, b''
    too_large = ApiError(413, f'the body is larger than {limit} bytes',
                         'request_too_large')
    if int(request.headers.get('content-length') or 0) > limit:
      raise too_large
    try:
      async with asyncio.timeout(BODY_SECONDS):
        async for part in request.stream():
          body += part
          if len(body) > limit:
            raise too_large
    except TimeoutError as e:
      raise ApiError(408, 'the body did not arrive in time') from e
    except ClientDisconnect as e:
      raise ApiError(400, 'the client left') from e
    return body

  def _authorise(self, request: Request) -> None:
    if not self.token:
      _only_from_here(request)
      return
    given = request.headers.get('authorization', '').encode('latin-1')
    if not hmac.compare_digest(given, f'Bearer {self.token}'.encode()):
      raise ApiError(401, 'a bearer token is required', 'invalid_api_key',
                     kind='authentication_error',
                     headers={'WWW-Authenticate': 'Bearer'})

  async def _failed(self, request: Request, _) -> Response:
    return await self._refused(request, ApiError(
        500, 'internal error', kind='server_error'))

  async def _refused(self, _, error: ApiError) -> Response:
    self.meters.errors.labels(str(error.status)).inc()
    return JSONResponse(error.body, error.status, error.headers)


def _only_from_here(request: Request) -> None:
  """Without a token a web page must not spend what its visitor pays for."""
  named = [request.url.hostname]
  if 'origin' in request.headers:
    named.append(urllib.parse.urlsplit(request.headers['origin']).hostname)
  if not all(name and is_loopback(name) for name in named):
    raise ApiError(403, f'{named[-1]}: without a token, only this machine may '
                   'ask')


def is_loopback(host: str) -> bool:
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == 'localhost'


async def _plain(request: Request, error) -> Response:
  return JSONResponse(ApiError(
      error.status_code, f'{request.method} {request.url.path}: '
      f'{error.detail}').body, error.status_code)
