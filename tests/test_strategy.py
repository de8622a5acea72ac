import dataclasses
import json

import pytest

from exectune_jax import episode, strategy
from exectune_jax.episode import (Episode, Execution, PlanStep, Problem,
                                  Reward, Strategy, Verdict)


@pytest.mark.parametrize('text, body', [
    ('<strategy>2 * 3</strategy>', '2 * 3'),
    ('  <strategy>\n a \n b </strategy>\n', 'a \n b'),
    ('<strategy></strategy>', None),
    ('<strategy>   </strategy>', None),
    ('2 * 3', None),
    ('', None),
    ('Sure: <strategy>2 * 3</strategy>', None),
    ('<strategy>2 * 3</strategy> good luck', None),
    ('<strategy>a</strategy><strategy>b</strategy>', None),
    ('<strategy>a <strategy>b</strategy>', None),
    ('</strategy>a<strategy>', None),
    ('<strategy>' + 'x' * 9000 + '</strategy>', None),
])
def test_parse_accepts_exactly_one_block(text, body):
  parsed = strategy.parse(text)
  assert parsed.body == body
  assert bool(parsed.fault) == (body is None)


def test_truncated_is_malformed_even_if_it_looks_whole():
  parsed = strategy.parse('<strategy>a</strategy>', complete=False)
  assert parsed.body is None
  assert 'truncated' in parsed.fault


def test_wrap_is_the_inverse_of_parse():
  assert strategy.parse(strategy.wrap(' 3 + 4 ')).body == '3 + 4'


def test_episode_survives_json():
  full = Episode(
      Problem('p', 'q?', '7', (PlanStep('3', '+', '4', 'add'),), ('t',)),
      group=3, index=2, version=5,
      strategy=Strategy('<strategy>x</strategy>', 'x', '', (1, 2),
                        (-0.1, -2.0)),
      execution=Execution('7', 'stop', 10, 2, 1e-5, 0.2),
      verdict=Verdict(True, '7'), leaks=True, base=0.25, base_usd=1e-6,
      judge=0.5, reward=Reward(0.9, {'exec': 0.9}))
  for e in (full, dataclasses.replace(full, strategy=None, execution=None,
                                      verdict=None, reward=None)):
    assert episode.from_dict(json.loads(json.dumps(episode.to_dict(e)))) == e
