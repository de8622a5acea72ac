"""The report for people: terminal tables, a picture, one HTML page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import rich.box
from rich.table import Table

from exectune_jax.episode import Episode

# heading, key in report.json; the terminal table fits 80 columns
COLUMNS = (('acc %', 'accuracy'), ('95% CI', 'ci95'),
           ('alpha', 'executability'), ('malf.', 'malformed_rate'),
           ('degr.', 'degraded_rate'), ('leak', 'leak_rate'),
           ('guide', 'guide_tokens'), ('core', 'core_tokens'),
           ('$/1k', 'usd_per_1k'))


def rows(report: dict) -> list[list[str]]:
  """System table as text."""
  return [[s['name'], *(_show(key, s[key]) for _, key in COLUMNS)]
          for s in report['systems']]


def rate_columns(report: dict) -> list[str]:
  k = next((s['pass_at_k']['k'] for s in report['systems']
            if s.get('pass_at_k')), 1)
  return ['system', 'alpha', '95% CI', f'pass@{k}', '95% CI', 'degr.', '95% CI']


def rate_rows(report: dict) -> list[list[str]]:
  """The systems' rates with intervals, as text; alpha and pass@k of those
  whose strategies were sampled."""
  found = []
  for s in report['systems']:
    passed = s.get('pass_at_k') or {}
    found.append([s['name'], *(
        _show(key, value) for key, value in (
            ('', s['executability']), ('ci95', s.get('executability_ci95')),
            ('', passed.get('rate')), ('ci95', passed.get('ci95')),
            ('', s['degraded_rate']), ('ci95', s.get('degraded_ci95'))))])
  return found


def pair_rows(report: dict) -> list[list[str]]:
  """Differences of the last system to the others, as text."""
  last = report['systems'][-1]['name']
  return [[f'{p["a"]} - {p["b"]}', f'{100 * p["difference"]:+.1f}',
           f'[{100 * p["ci95"][0]:+.1f}, {100 * p["ci95"][1]:+.1f}]',
           f'{p["mcnemar_p"]:.2g}']
          for p in report['paired'] if p['a'] == last]


def tables(report: dict) -> list[Table]:
  """The tables for the terminal."""
  return [_table(*content) for content in _contents(report)]


def _contents(report: dict) -> list[tuple[str, list[str], list[list[str]]]]:
  """(title, columns, rows) of every table."""
  return [(headline(report), ['system', *(c for c, _ in COLUMNS)],
           rows(report)),
          ('executability of sampled strategies, and harm of greedy ones',
           rate_columns(report), rate_rows(report)),
          ('paired differences in points',
           ['pair', 'difference', '95% interval', 'McNemar p'],
           pair_rows(report))]


def headline(report: dict) -> str:
  """Task, core, number of problems, and how many episodes are unknown."""
  lost = sum(s['lost'] for s in report['systems'])
  return (f'{report["task"]}, core {report["core"]}, {report["n"]} held-out '
          f'problems' + (f', {lost} episodes lost' if lost else ''))


def frontier(reports: Sequence[dict]):
  """Accuracy over dollars per 1,000 problems, one panel a report."""
  import matplotlib
  matplotlib.use('Agg')
  from matplotlib import pyplot as plt
  figure, axes = plt.subplots(1, len(reports), squeeze=False,
                              figsize=(6.4 * len(reports), 4.4))
  for axis, report in zip(axes[0], reports, strict=True):
    for i, s in enumerate(report['systems']):
      low, high = s['ci95']
      axis.errorbar(s['usd_per_1k'], 100 * s['accuracy'],
                    yerr=[[100 * max(0.0, s['accuracy'] - low)],
                          [100 * max(0.0, high - s['accuracy'])]],
                    fmt='o', capsize=3, color=f'C{i}')
      axis.annotate(s['name'], (s['usd_per_1k'], 100 * s['accuracy']),
                    xytext=(6, 4), textcoords='offset points', fontsize=9)
    costs = [s['usd_per_1k'] for s in report['systems']]
    if max(costs) > 5 * max(min(costs), 1e-12):
      axis.set_xscale('log')
    axis.margins(x=0.25)
    axis.set_xlabel('dollars per 1,000 problems')
    axis.set_ylabel('accuracy, % (bars: 95% interval)')
    axis.set_title(f'{report["task"]}, core {report["core"].partition("@")[0]}')
    axis.grid(alpha=0.3)
  figure.tight_layout()
  return figure


def page(reports: Sequence[dict], episodes: dict[str, Sequence[Episode]],
         figure, config_text: str) -> str:
  """One self-contained HTML page; all texts are escaped."""
  image = io.BytesIO()
  figure.savefig(image, format='png', dpi=120)
  picture = base64.b64encode(image.getvalue()).decode()
  parts = [_STYLE, '<h1>Executability report</h1>',
           f'<img alt="accuracy against cost" '
           f'src="data:image/png;base64,{picture}">']
  for report in reports:
    (title, *first), *others = _contents(report)
    parts.append(f'<h2>{html.escape(title)}</h2>' + _html_table(*first))
    parts.extend(f'<h3>{title.capitalize()}</h3>' + _html_table(*table)
                 for title, *table in others)
  parts.append('<p>Rates in percent. guide, core: tokens per problem. $/1k: '
               'dollars per 1,000 problems, guide and core. alpha: share of '
               'strategies sampled at temperature 1 with which the core '
               'succeeds; pass@k: of problems on which one of k does. A '
               'malformed strategy counts as wrong. degraded: the core was '
               'right alone and wrong with the strategy.</p><h2>Episodes</h2>')
  for name, chosen in episodes.items():
    parts.append(f'<h3>{html.escape(name)}</h3>')
    parts.extend(_html_episode(e) for e in chosen)
  parts.append(f'<h2>Config</h2><pre>{html.escape(config_text)}</pre>')
  return '<!doctype html><meta charset="utf-8">' + '\n'.join(parts)


_STYLE = """<title>Executability report</title><style>
body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}
table{border-collapse:collapse}td,th{padding:.2em .7em;text-align:right;
border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}
img{max-width:100%}pre{background:#f6f6f6;padding:1em;overflow:auto}
.e{border-left:3px solid #bbb;padding-left:1em;margin:1em 0}
.right{border-color:#2a2}.wrong{border-color:#c33}</style>"""


def _html_episode(e: Episode) -> str:
  strategy = (e.strategy.body or e.strategy.text) if e.strategy else '(none)'
  reply = e.execution.text if e.execution else '(not called)'
  kind = 'right' if e.success else 'wrong'
  return (f'<div class="e {kind}"><b>Problem</b> '
          f'{html.escape(e.problem.question)}<br><b>Strategy</b> '
          f'{html.escape(strategy)}<br><b>Core</b> {html.escape(reply)}<br>'
          f'<b>{kind if e.status == "ok" else html.escape(e.status)}</b>, '
          f'reference {html.escape(e.problem.answer)}</div>')


def _table(title, columns, body) -> Table:
  table = Table(title=title, title_justify='left', box=rich.box.SIMPLE,
                padding=(0, 1, 0, 0), pad_edge=False)
  for i, column in enumerate(columns):
    table.add_column(column, justify='right' if i else 'left', no_wrap=not i)
  for row in body:
    table.add_row(*row)
  return table


def _html_table(columns, body) -> str:
  head = ''.join(f'<th>{html.escape(c)}</th>' for c in columns)
  lines = [''.join(f'<td>{html.escape(v)}</td>' for v in row) for row in body]
  return (f'<table><tr>{head}</tr>'
          + ''.join(f'<tr>{line}</tr>' for line in lines) + '</table>')


def _show(key: str, value) -> str:
  if value is None:
    return '-'
  if key == 'ci95':
    return f'{100 * value[0]:.1f}-{100 * value[1]:.1f}'
  if key in ('guide_tokens', 'core_tokens'):
    return f'{value:.0f}'
  if key == 'usd_per_1k':
    return f'{value:.3g}'
  return f'{100 * value:.1f}'
