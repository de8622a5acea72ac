"""Replies that are shown as they come: four providers, and their faults."""

import asyncio

import pytest
from fake_providers import IN, OUT, FakeProviders
from test_faults import PROVIDERS

from exectune_jax.cores.base import CoreRequest, Price
from exectune_jax.cores.client import CoreClient
from exectune_jax.cores.ledger import Ledger
from exectune_jax.cores.service import make_core
from exectune_jax.errors import Lost

TEXT = 'The answer is 42.'


@pytest.fixture(params=PROVIDERS.values(), ids=PROVIDERS)
def ask(request, config, tmp_path, monkeypatch):
  """ask(server, calls) -> outcomes, the pieces of each, ledger."""
  if request.param.startswith('anthropic'):
    pytest.importorskip('anthropic')
  for name in ('OPENAI', 'GEMINI', 'ANTHROPIC', 'EXECTUNE_CORE'):
    monkeypatch.setenv(f'{name}_API_KEY', 'secret-key')
  config.core.update(attempts=3, timeout_s=5.0)

  def run(server, calls=1):
    async def all_calls():
      ledger = Ledger(tmp_path / 'ledger.sqlite')
      core = make_core(request.param.format(server.url), Price(1.0, 10.0))
      client = CoreClient(core, ledger, config.core, 'test')
      pieces = [[] for _ in range(calls)]
      outcomes = []
      for mine in pieces:  # the same request each time
        outcomes += await asyncio.gather(
            client.call(CoreRequest((('user', 'q'),), 1.0, 32), mine.append),
            return_exceptions=True)
      await client.close()
      return outcomes, pieces, ledger
    return asyncio.run(all_calls())
  return run


def test_pieces_make_the_reply_and_its_bill(ask):
  with FakeProviders(lambda _: TEXT) as server:
    (first, again), pieces, ledger = ask(server, calls=2)
  assert ''.join(pieces[0]) == first.text == TEXT
  assert len(pieces[0]) == 6  # as many as the server sent
  assert (first.finish, first.input_tokens, first.output_tokens) == (
      'stop', IN, OUT)
  assert first.usd == pytest.approx((IN + 10 * OUT) / 1e6) == ledger.spent_usd
  assert not first.estimated
  # In the ledger now: nothing comes in pieces, and nothing is paid.
  assert (again, pieces[1], len(server.requests)) == (first, [], 1)


@pytest.mark.parametrize('fault', ['no finish', 'truncated'])
def test_a_reply_that_breaks_off_is_lost_and_not_tried_again(ask, fault):
  """What was shown cannot be taken back, so a second try would garble it."""
  with FakeProviders(lambda _: TEXT, 1.0, (fault,)) as server:
    (outcome,), (pieces,), ledger = ask(server)
  assert isinstance(outcome, Lost)
  assert TEXT.startswith(''.join(pieces)) and ledger.count() == 0
  assert len(server.requests) == (1 if pieces else 3)
  assert ledger.rows('SELECT COUNT(*) AS n FROM failed')[0]['n'] == len(
      server.requests)


@pytest.mark.parametrize('fault', ['429', '500', 'reset', 'html'])
def test_before_the_first_piece_there_are_retries(ask, fault):
  with FakeProviders(lambda _: TEXT, 0.6, (fault,), seed=2) as server:
    (outcome,), (pieces,), _ = ask(server)
  assert server.seen[fault] >= 1
  assert ''.join(pieces) == outcome.text == TEXT


def test_a_refusal_is_a_reply(ask):
  with FakeProviders(lambda _: TEXT, 1.0, ('refusal',)) as server:
    (outcome,), _, _ = ask(server)
  assert outcome.finish == 'refused'
