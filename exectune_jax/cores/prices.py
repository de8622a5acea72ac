"""List prices in dollars for one million input and output tokens.

As published by the providers in autumn 2025; they change, so a config may
set its own (`core.usd_per_1m_input`, `core.usd_per_1m_output`). A model that
is not listed and has no price in the config is refused: a bill of zero would
be a lie.
"""

from __future__ import annotations

from exectune_jax.cores import toy
from exectune_jax.errors import UserError

USD_PER_1M = {
    'gemini:gemini-2.5-flash-lite': (0.10, 0.40),
    'gemini:gemini-2.5-flash': (0.30, 2.50),
    'gemini:gemini-2.5-pro': (1.25, 10.00),
    'openai:gpt-5-nano': (0.05, 0.40),
    'openai:gpt-5-mini': (0.25, 2.00),
    'openai:gpt-5': (1.25, 10.00),
}


def lookup(settings, field: str) -> tuple[float, float]:
  """Price of the core that a config section names."""
  name = settings.name.partition('@')[0]
  given = (settings.usd_per_1m_input, settings.usd_per_1m_output)
  if None not in given:
    return given
  if name.startswith('toy:'):
    size = name.removeprefix('toy:').partition('?')[0]
    return toy.SKILLS[size].usd_per_1m if size in toy.SKILLS else (0.0, 0.0)
  if name in USD_PER_1M:
    return USD_PER_1M[name]
  raise UserError(f"{field}.name='{name}': no price is known; set "
                  f'--config.{field}.usd_per_1m_input and '
                  f'--config.{field}.usd_per_1m_output')
