"""Ledger and client, with scripted cores."""

import asyncio
import signal
import threading
import time

import pytest

from exectune_jax import interrupt
from exectune_jax.cores import base, prices, service
from exectune_jax.cores.base import (CoreReply, CoreRequest, FatalError, Price,
                                     RequestError, RetryableError,
                                     UnreachableError)
from exectune_jax.cores.client import CoreClient
from exectune_jax.cores.ledger import Ledger
from exectune_jax.cores.limits import Concurrency
from exectune_jax.errors import BudgetExhausted, Lost, Stopped, UserError


class Scripted:
  """Plays a list of replies and errors; the last one for ever."""

  name, price = 'scripted:core', Price(1.0, 2.0)

  def __init__(self, *script, delay=0.0):
    self.script, self.delay, self.times = list(script), delay, []
    self.flying = self.most = 0

  async def generate(self, request):
    self.times.append(time.monotonic())
    self.flying += 1
    self.most = max(self.most, self.flying)
    await asyncio.sleep(self.delay)
    self.flying -= 1
    step = self.script[min(len(self.times), len(self.script)) - 1]
    if isinstance(step, Exception):
      raise step
    return step

  async def close(self):
    pass


class Gated(Scripted):
  """Answers the first `open_for` calls, the others once the gate is open."""

  def __init__(self, open_for):
    super().__init__(reply())
    self.open_for, self.gate = open_for, threading.Event()

  async def generate(self, request):
    answer = await super().generate(request)
    waits = len(self.times) > self.open_for
    while waits and not self.gate.is_set():
      await asyncio.sleep(0.01)
    return answer


def reply(text='7', usd=0.25):
  return CoreReply(text, 'stop', 10, 2, usd, 0.1)


def request(text='q', sample=0, temperature=0.0):
  return CoreRequest((('user', text),), temperature, 16, (), sample)


@pytest.fixture
def ledger(tmp_path):
  with_ledger = Ledger(tmp_path / 'l.sqlite')
  yield with_ledger
  with_ledger.close()


def play(core, ledger, settings, *requests, field='core'):
  async def run():
    client = CoreClient(core, ledger, settings, 'test', field)
    return await asyncio.gather(*[client.call(r) for r in requests],
                                return_exceptions=True)
  return asyncio.run(run())


def test_paid_once_and_remembered(config, ledger, tmp_path):
  core = Scripted(reply(), delay=0.02)
  answers = play(core, ledger, config.core, *[request()] * 20)
  assert answers == [reply()] * 20
  assert len(core.times) == 1  # single flight
  assert play(core, ledger, config.core, request()) == [reply()]
  assert len(core.times) == 1
  assert ledger.spent_usd == 0.25
  again = Ledger(tmp_path / 'l.sqlite')
  assert (again.spent_usd, again.count()) == (0.25, 1)
  again.close()


def test_draws_are_distinct_only_above_temperature_zero(config):
  config.core.temperature = 0.7
  warm = [CoreRequest.build(config.core, (('user', 'q'),), i).key('c')
          for i in range(3)]
  config.core.temperature = 0.0
  cold = [CoreRequest.build(config.core, (('user', 'q'),), i).key('c')
          for i in range(3)]
  assert len(set(warm)) == 3
  assert len(set(cold)) == 1
  other = CoreRequest.build(config.core, (('user', 'q'),)).key('other')
  assert other != cold[0]


def test_retries_then_succeeds(config, ledger):
  core = Scripted(RetryableError('429', 0.0), RetryableError('500', 0.0),
                  reply())
  assert play(core, ledger, config.core, request()) == [reply()]
  assert len(core.times) == 3


def test_retry_after_is_honoured(config, ledger):
  core = Scripted(RetryableError('429', 0.4), reply())
  play(core, ledger, config.core, request())
  assert core.times[1] - core.times[0] >= 0.4


@pytest.mark.parametrize('script, tries', [
    (RetryableError('500', 0.0), 5), (RequestError('400'), 1)])
def test_hopeless_requests_are_lost_not_zero(config, ledger, script, tries):
  core = Scripted(script)
  (outcome,) = play(core, ledger, config.core, request())
  assert isinstance(outcome, Lost)
  assert len(core.times) == tries
  assert ledger.count() == 0


def test_hanging_core_meets_the_deadline(config, ledger):
  config.core.timeout_s, config.core.deadline_s = 60.0, 0.2
  began = time.monotonic()
  (outcome,) = play(Scripted(reply(), delay=50), ledger, config.core,
                    request())
  assert isinstance(outcome, Lost) and 'deadline_s' in str(outcome)
  assert time.monotonic() - began < 25


def test_one_hanging_try_is_retried(config, ledger):
  config.core.timeout_s, config.core.attempts = 0.05, 2
  core = Scripted(reply(), delay=1)
  (outcome,) = play(core, ledger, config.core, request())
  assert isinstance(outcome, Lost) and 'no reply in' in str(outcome)
  assert len(core.times) == 2


@pytest.mark.parametrize('error', [FatalError('401'),
                                   UnreachableError('refused', 0.0)])
def test_what_no_request_can_survive_names_the_field(config, ledger, error):
  (outcome,) = play(Scripted(error), ledger, config.core, request(),
                    field='teacher')
  assert isinstance(outcome, UserError)
  assert "teacher.name='scripted:core'" in str(outcome)


def test_server_that_dies_later_loses_calls_only(config, ledger):
  core = Scripted(reply(), UnreachableError('refused', 0.0))
  config.core.concurrency = 1
  outcomes = play(core, ledger, config.core, request('a'), request('b'))
  assert outcomes[0] == reply()
  assert isinstance(outcomes[1], Lost)


def test_what_a_failed_try_cost_is_on_the_bill(config, ledger):
  core = Scripted(RetryableError('no finish', 0.0, usd=0.5),
                  RetryableError('cut', 0.0), RetryableError('429', 0.0,
                                                             usd=0.0), reply())
  assert play(core, ledger, config.core, request()) == [reply()]
  assert ledger.spent_usd == 0.75
  failed = ledger.rows('SELECT reason, usd FROM failed')
  assert [tuple(r) for r in failed] == [('no finish', 0.5), ('cut', None),
                                        ('429', 0.0)]


def test_two_clients_of_one_core_pay_once(config, ledger):
  core = Scripted(reply(), delay=0.1)
  async def run():
    clients = [CoreClient(core, ledger, config.core, s) for s in 'ab']
    return await asyncio.gather(*[c.call(request()) for c in clients])
  assert asyncio.run(run()) == [reply()] * 2
  assert len(core.times) == 1


def test_an_overloaded_core_is_asked_less(config, ledger):
  config.core.concurrency = 8
  core = Scripted(RetryableError('429', 0.0, overload=True), reply())
  async def run():
    client = CoreClient(core, ledger, config.core, 'test')
    await client.call(request())
    return client.limit
  limit = asyncio.run(run())
  assert limit.cuts == 1
  assert limit.limit == pytest.approx(8 * 0.7)


def test_teacher_and_core_of_one_provider_share_a_limit(config, tmp_path):
  config.core.update(name='openai:a@http://h/v1', concurrency=4,
                     usd_per_1m_input=1.0, usd_per_1m_output=1.0)
  config.teacher.update(name='openai:b@http://h/v1', concurrency=9,
                        usd_per_1m_input=1.0, usd_per_1m_output=1.0)
  config.judge.update(name='openai:b@http://other/v1',
                      usd_per_1m_input=1.0, usd_per_1m_output=1.0)
  with service.CoreService(config, tmp_path, 'test') as cores:
    core, teacher, judge = (cores.client(n).limit
                            for n in ('core', 'teacher', 'judge'))
  assert core is teacher is not judge
  assert core.high == 9


def test_tokens_a_minute_are_reserved_then_settled(config, ledger):
  """Each call reserves 4 + 16 tokens and uses 12: 600 a minute let 40
  through at once where the reservations alone would let 30, and the other
  ten in 20 seconds."""
  config.core.update(tokens_per_minute=600, concurrency=1)
  core = Scripted(reply())
  began = time.monotonic()
  play(core, ledger, config.core, *[request(str(i)) for i in range(40)])
  assert time.monotonic() - began < 10
  play(core, ledger, config.core, request('x'))
  assert len(core.times) == 41


def test_whoever_waits_for_a_rate_keeps_no_other_from_the_provider(
    config, ledger):
  """One place for both; the teacher's next request is a minute away."""
  async def run():
    limit = Concurrency(1, 1)
    config.teacher.requests_per_minute = 1
    teacher, core = (CoreClient(Scripted(reply()), ledger, config[f], 'test', f,
                                limit) for f in ('teacher', 'core'))
    await teacher.call(request('a'))
    waiting = asyncio.create_task(teacher.call(request('b')))
    await asyncio.sleep(0.05)
    assert await asyncio.wait_for(core.call(request('c')), 30) == reply()
    assert not waiting.done()
    waiting.cancel()
  asyncio.run(run())


def test_a_retry_does_not_wait_behind_those_that_have_not_begun(
    config, ledger):
  """Sixty requests at a place for two, a hundred a second; the first is
  refused and has a second's time to be answered."""
  config.core.update(requests_per_minute=6000, concurrency=2, deadline_s=20.0)
  order = []
  class Refuses(Scripted):
    async def generate(self, request):
      order.append(request.messages[0][1])
      return await super().generate(request)
  core = Refuses(RetryableError('429', 0.0), reply())
  async def run():
    client = CoreClient(core, ledger, config.core, 'test')
    await client._requests.take(6000)  # from now on one comes every 10 ms
    return await asyncio.gather(*[
        client.call(request(str(i))) for i in range(60)])
  assert asyncio.run(run()) == [reply()] * 60
  assert order.index('0') == 0 and order[1:].index('0') < 10


def test_who_gives_up_while_waiting_for_a_place_gives_its_rate_back(
    config, ledger):
  config.core.update(requests_per_minute=60, tokens_per_minute=6000)
  async def run():
    limit = Concurrency(1, 1)
    client = CoreClient(Scripted(reply()), ledger, config.core, 'test', 'core',
                        limit)
    async with limit.slot():
      waiting = asyncio.create_task(client.call(request()))
      await asyncio.sleep(0.05)
      assert client._requests.level < 60
      waiting.cancel()
      await asyncio.wait([waiting])
      await asyncio.sleep(0.05)
    return client._requests.level, client._tokens.level
  assert asyncio.run(run()) == pytest.approx((60.0, 6000.0))


def test_asking_whether_another_has_the_reply_uses_up_no_rate(
    config, ledger, tmp_path):
  """Six looks at what another process has in flight, two requests a minute."""
  other = Ledger(tmp_path / 'l.sqlite')
  config.core.requests_per_minute, config.core.tokens_per_minute = 2, 600
  key = request().key('scripted:core')
  async def run():
    assert other.begin(key, 'c', 's', 0.1)
    client = CoreClient(Scripted(reply()), ledger, config.core, 'test')
    waiting = asyncio.create_task(client.call(request()))
    await asyncio.sleep(0.6)
    other.put(key, 'c', 's', request(), reply())
    assert await waiting == reply()
    return client._requests.level, client._tokens.level
  assert asyncio.run(run()) == pytest.approx((2.0, 600.0))
  other.close()


def test_a_pause_longer_than_the_deadline_is_not_waited_for(config, ledger):
  """'Come back in ten hours' stops the run with the reason, and holds up
  nobody for longer than the deadline."""
  config.core.deadline_s = 20.0
  error = RetryableError('429: daily quota', 36000.0, overload=True, usd=0.0)
  async def run():
    client = CoreClient(Scripted(error, reply()), ledger, config.core, 'test')
    with pytest.raises(UserError, match='daily quota; it asks to wait 36000 s'):
      await asyncio.wait_for(client.call(request()), 10)
    return client.limit._paused_until - time.monotonic()
  assert 15 < asyncio.run(run()) <= 20


def test_a_deadline_names_the_error_before_it(config, ledger):
  class Slow(Scripted):
    async def generate(self, request):
      if self.times:
        await asyncio.sleep(60)
      return await super().generate(request)
  config.core.deadline_s = 1.0
  (lost,) = play(Slow(RetryableError('500: broken', 0.0), reply()), ledger,
                 config.core, request())
  assert isinstance(lost, Lost)
  assert 'deadline_s=1 passed; before that: 500: broken' in str(lost)


def test_a_prompt_that_filters_block_is_an_answer_and_not_lost(config, ledger):
  error = base.classify_status(
      400, '{"error": {"code":"content_filter", "message": "..."}}', 'core')
  (refused,) = play(Scripted(error), ledger, config.core, request())
  assert (refused.text, refused.finish, refused.usd) == ('', 'refused', 0.0)
  assert ledger.count() == 1
  other = base.classify_status(400, '{"error": {"code": "bad_field"}}', 'core')
  (lost,) = play(Scripted(other), ledger, config.core, request('other'))
  assert isinstance(lost, Lost)


def test_a_signal_ends_what_one_of_several_processes_waits_for(
    config, tmp_path, monkeypatch):
  monkeypatch.setattr(interrupt, '_together', True)
  monkeypatch.setattr(interrupt, '_seen', [signal.SIGTERM])
  with service.CoreService(config, tmp_path, 'test') as cores:
    with pytest.raises(Stopped, match='SIGTERM'):
      cores.run(asyncio.sleep(60))


def test_concurrency_is_bounded(config, ledger):
  config.core.concurrency = 3
  core = Scripted(reply(), delay=0.01)
  play(core, ledger, config.core, *[request(str(i)) for i in range(12)])
  assert core.most == 3


def test_budget_stops_before_it_is_passed_and_survives_restart(
    config, tmp_path):
  # A reply costs 0.25; the most a call could cost is far less than that.
  path = tmp_path / 'l.sqlite'
  ledger = Ledger(path, budget_usd=0.6)
  core = Scripted(reply())
  config.core.concurrency = 1
  outcomes = play(core, ledger, config.core,
                  *[request(str(i)) for i in range(5)])
  assert [isinstance(o, BudgetExhausted) for o in outcomes] == [
      False, False, False, True, True]
  ledger.close()
  ledger = Ledger(path, budget_usd=0.6)
  (outcome,) = play(core, ledger, config.core, request('new'))
  assert isinstance(outcome, BudgetExhausted)
  assert play(core, ledger, config.core, request('0')) == [reply()]
  ledger.close()


def test_a_stop_buys_nothing_more_and_keeps_what_was_bought(config, tmp_path,
                                                            monkeypatch):
  """40 calls, two at a time, stopped in the middle of the second pair."""
  core = Gated(open_for=2)
  monkeypatch.setattr(service, 'make_core', lambda *_: core)
  config.core.concurrency = 2
  with service.CoreService(config, tmp_path, 'test') as cores:
    client = cores.client('core')
    async def all_calls():
      await asyncio.gather(*[client.call(request(str(i))) for i in range(40)])
    future = cores.submit(all_calls())
    while len(core.times) < 4:
      time.sleep(0.01)
    future.cancel()
    threading.Timer(0.3, core.gate.set).start()  # while the service closes
  ledger = Ledger(tmp_path / 'ledger.sqlite')
  assert ledger.count() == len(core.times) == 4
  ledger.close()


@pytest.mark.parametrize('name', ['', 'gpt-5', 'openai:', 'acme:model',
                                  'toy:medium'])
def test_unknown_core_names(name):
  with pytest.raises(UserError, match='name='):
    service.make_core(name, Price(0, 0))


def test_prices(config):
  config.core.name = 'gemini:gemini-2.5-flash'
  assert prices.lookup(config.core, 'core') == Price(0.30, 2.50, 0.03)
  config.core.usd_per_1m_input = 1.0
  config.core.usd_per_1m_output = 4.0
  assert prices.lookup(config.core, 'core') == Price(1.0, 4.0)
  config.core.usd_per_1m_cached = 0.5
  # 70 tokens at 1, 30 cached ones at 0.5, 10 at 4 dollars a million
  assert prices.lookup(config.core, 'core').dollars(
      100, 10, 30) == pytest.approx((70 + 15 + 40) / 1e6)
  config.judge.name = 'openai:unheard-of'
  with pytest.raises(UserError, match='judge.usd_per_1m_input'):
    prices.lookup(config.judge, 'judge')


def test_service_returns_results_and_closes(config, tmp_path):
  with service.CoreService(config, tmp_path, 'test') as cores:
    client = cores.client('core')
    assert cores.client('core') is client
    question = CoreRequest((('user', 'Problem: x\nStrategy: 2 + 3'),), 0., 50)
    assert cores.run(client.call(question)).text.endswith('answer is 5.')
    assert cores.ledger.count() == 1
