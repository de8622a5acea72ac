"""Four wire formats under every fault, through client and ledger."""

import asyncio
import random
import time

import pytest
from fake_providers import FAULTS, IN, OUT, FakeProviders

from exectune_jax.cores import toy
from exectune_jax.cores.base import CoreRequest, FatalError, Price
from exectune_jax.cores.client import CoreClient
from exectune_jax.cores.ledger import Ledger
from exectune_jax.cores.service import make_core
from exectune_jax.errors import Lost, UserError

PROVIDERS = {'openai': 'openai:m@{}/v1', 'responses':
             'openai_responses:m@{}/v1', 'anthropic': 'anthropic:m@{}',
             'gemini': 'gemini:m@{}'}
# What happens to a call whose only try meets the fault.
ANSWERED = {'refusal': 'refused', 'wrong usage': 'stop'}


@pytest.fixture(autouse=True)
def _keys(monkeypatch):
  for name in ('GEMINI_API_KEY', 'ANTHROPIC_API_KEY'):
    monkeypatch.setenv(name, 'secret-key')


@pytest.fixture(params=PROVIDERS)
def provider(request):
  if request.param == 'anthropic':
    pytest.importorskip('anthropic')
  return PROVIDERS[request.param]


def ask(server, provider, tmp_path, settings, questions):
  """Outcomes of all questions and the closed ledger's path."""
  async def run():
    ledger = Ledger(tmp_path / 'ledger.sqlite')
    core = make_core(provider.format(server.url), Price(1.0, 10.0))
    client = CoreClient(core, ledger, settings, 'test')
    requests = [CoreRequest((('user', q),), 1.0, 32) for q in questions]
    outcomes = await asyncio.gather(*[client.call(r) for r in requests],
                                    return_exceptions=True)
    await client.close()
    return outcomes, ledger
  return asyncio.run(run())


def known_usd(ledger):
  """Dollars that the servers told us, answers and failures."""
  return sum(ledger.rows(f'SELECT COALESCE(SUM(usd), 0) AS usd FROM {what}')
             [0]['usd'] for what in ('calls WHERE NOT estimated', 'failed'))


@pytest.mark.parametrize('fault', FAULTS)
def test_every_fault_by_itself(provider, fault, config, tmp_path):
  # Long enough for an SDK that builds its client in the first call.
  config.core.update(attempts=1, timeout_s=3.0)
  with FakeProviders(str.upper, 1.0, (fault,)) as server:
    began = time.monotonic()
    (outcome,), ledger = ask(server, provider, tmp_path, config.core, ['q'])
    assert time.monotonic() - began < 20
    if fault in ANSWERED:
      assert outcome.finish == ANSWERED[fault]
      assert outcome.estimated == (fault == 'wrong usage')
      assert outcome.usd > 0
    else:
      assert isinstance(outcome, Lost)
      assert 'secret-key' not in str(outcome)
      assert ledger.count() == 0
    assert len(server.requests) == 1  # no hidden retry
    assert known_usd(ledger) == pytest.approx(server.usd)
  ledger.close()


def test_an_answer_with_a_nonsense_bill_is_kept_and_estimated(
    provider, config, tmp_path):
  text = 'four bytes a token ' * 20
  with FakeProviders(lambda _: text, 1.0, ('wrong usage',)) as server:
    (reply,), ledger = ask(server, provider, tmp_path, config.core, ['q' * 40])
  assert reply.text == text
  assert (reply.input_tokens, reply.output_tokens) == (10 + 4, 95 + 4)
  assert reply.usd == pytest.approx((14 * 1.0 + 99 * 10.0) / 1e6)
  ledger.close()


def test_thirty_per_cent_of_every_fault(provider, config, tmp_path):
  """All answers arrive, and the bill is the server's own to the cent."""
  # An answer that is slow to come is billed and given up: not what is tested.
  config.core.update(attempts=12, timeout_s=1.5, deadline_s=120.0)
  questions = [f'question {i}' for i in range(60)]
  with FakeProviders(str.upper, 0.3) as server:
    outcomes, ledger = ask(server, provider, tmp_path, config.core, questions)
    assert sum(server.seen[f] > 0 for f in FAULTS) > 10
    for question, reply in zip(questions, outcomes, strict=True):
      assert reply.text == question.upper() or reply.finish == 'refused'
    assert ledger.count() == 60
    assert known_usd(ledger) == pytest.approx(server.usd)
    assert server.usd > 60 * (IN + OUT * 10) / 1e6 * 0.9
  ledger.close()


@pytest.mark.parametrize('name, thinking, expected', [
    ('openai:m@{}/v1', 'low', {'reasoning_effort': 'low'}),
    ('openai_responses:m@{}/v1', 'high', {'reasoning': {'effort': 'high'}}),
    ('anthropic:m@{}', '2048',
     {'thinking': {'type': 'enabled', 'budget_tokens': 2048}}),
    ('gemini:m@{}', '0', {})])
def test_thinking_reaches_the_wire(name, thinking, expected, tmp_path):
  if 'anthropic' in name:
    pytest.importorskip('anthropic')
  request = CoreRequest((('system', 's'), ('user', 'q')), 1.0, 4096,
                        thinking=thinking)
  async def run(server):
    core = make_core(name.format(server.url), Price(1, 10), 'core', thinking)
    try:
      return await core.generate(request)
    finally:
      await core.close()
  with FakeProviders(str.upper) as server:
    assert asyncio.run(run(server)).text == 'Q'
    ((_, _, body),) = server.requests
  assert body.items() >= expected.items()
  if 'gemini' in name:
    (budget,) = body['generationConfig']['thinkingConfig'].values()
    assert budget == 0
  if 'anthropic' in name:
    assert 'temperature' not in body and body['system'] == 's'


@pytest.mark.parametrize('name, thinking', [
    ('openai:m@http://x', '1024'), ('gemini:m', 'low'),
    ('anthropic:m', '100')])
def test_thinking_that_a_provider_cannot_read_is_named(name, thinking):
  if 'anthropic' in name:
    pytest.importorskip('anthropic')
  with pytest.raises(UserError, match=f"teacher.thinking='{thinking}'"):
    make_core(name, Price(1, 1), 'teacher', thinking)


@pytest.mark.parametrize('name', ['openai:gpt-5-mini', 'anthropic:m',
                                  'openai_responses:gpt-5'])
def test_a_temperature_that_would_be_ignored_is_refused(name, monkeypatch):
  if 'anthropic' in name:
    pytest.importorskip('anthropic')
  monkeypatch.setenv('OPENAI_API_KEY', 'sk-test')
  async def run():
    core = make_core(name, Price(1, 1))
    try:
      await core.generate(CoreRequest((('user', 'q'),), 0.0, 16))
    finally:
      await core.close()
  with pytest.raises(FatalError, match='temperature=1.0'):
    asyncio.run(run())


def toy_answer(text):
  return toy._Solver(toy.SKILLS['small'], random.Random(text)).reply(text)


def test_training_under_thirty_per_cent_faults(config, tmp_path):
  """RL finishes; nothing unanswered is scored; the bill is the server's."""
  import json

  from exectune_jax import config as config_lib
  from exectune_jax.stages import collect, rl, sft
  collect.run(config, tmp_path)
  for stage in ('sft:base', 'sft'):
    sft.run(config_lib.variant(config, stage)[1], tmp_path)
  before = Ledger(tmp_path / 'ledger.sqlite')
  spent = before.spent_usd
  before.close()
  config.rl.update(steps=4, groups=4, group_size=4, max_lost_fraction=0.9)
  config.core.update(attempts=2, timeout_s=1.0, usd_per_1m_input=1.0,
                     usd_per_1m_output=10.0)
  with FakeProviders(toy_answer, 0.3) as server:
    config.core.name = f'openai:m@{server.url}/v1'
    rl.run(config, tmp_path)
    ledger = Ledger(tmp_path / 'ledger.sqlite')
    assert known_usd(ledger) - spent == pytest.approx(server.usd)
    ledger.close()
  rows = [json.loads(line) for line in
          (tmp_path / 'episodes/exectune.jsonl').read_text().splitlines()]
  assert len(rows) == 4 * 4 * 4
  lost = [r for r in rows if r['status'] == 'lost']
  assert 3 < len(lost) < 40
  for row in rows:
    answered = row['execution'] is not None or row['status'] == 'malformed'
    assert (row['reward'] is not None) <= answered
    assert (row['reward'] is None) == (row['status'] == 'lost')
