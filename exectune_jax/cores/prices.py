"""List prices, in dollars for one million input, output, cached tokens.

They change: the table says when they were looked up, and a config may set
its own (`core.usd_per_1m_input`, `_output`, `_cached`). A model that is not
listed and has no price in the config is refused: a bill of zero would be a
lie.
"""

from __future__ import annotations

from exectune_jax.cores import toy
from exectune_jax.cores.base import Price
from exectune_jax.errors import UserError

AS_OF = '2025-11'
PRICES = {
    'gemini:gemini-2.5-flash-lite': Price(0.10, 0.40, 0.01),
    'gemini:gemini-2.5-flash': Price(0.30, 2.50, 0.03),
    'gemini:gemini-2.5-pro': Price(1.25, 10.00, 0.125),
    'anthropic:claude-haiku-4-5': Price(1.00, 5.00, 0.10),
    'anthropic:claude-sonnet-4-5': Price(3.00, 15.00, 0.30),
    'anthropic:claude-opus-4-5': Price(5.00, 25.00, 0.50),
    'openai:gpt-5-nano': Price(0.05, 0.40, 0.005),
    'openai:gpt-5-mini': Price(0.25, 2.00, 0.025),
    'openai:gpt-5': Price(1.25, 10.00, 0.125),
}


def lookup(settings, field: str) -> Price:
  """Price of the core that a config section names."""
  name = settings.name.partition('@')[0].replace('openai_responses:',
                                                 'openai:')
  given = (settings.usd_per_1m_input, settings.usd_per_1m_output)
  if None not in given:
    return Price(*given, settings.usd_per_1m_cached)
  if name.startswith('toy:'):
    size = name.removeprefix('toy:').partition('?')[0]
    return toy.SKILLS[size].price if size in toy.SKILLS else Price(0.0, 0.0)
  if name in PRICES:
    return PRICES[name]
  raise UserError(f"{field}.name='{settings.name}': no price is known "
                  f'(list of {AS_OF}); set --config.{field}.usd_per_1m_input '
                  f'and --config.{field}.usd_per_1m_output')
