import json

import pytest

from exectune_jax.episode import (LOST, MALFORMED, Episode, Execution, Problem,
                                  Strategy, Verdict)
from exectune_jax.report import page, reading, statistics, summary


def test_pass_at_k_golden(shared):
  golden = json.loads((shared / 'golden/grpo_golden.json').read_text())
  for name, value in golden['pass@k'].items():
    n, c, k = (int(x.split('=')[1]) for x in name.split(','))
    assert statistics.pass_at_k(n, c, k) == pytest.approx(value, abs=1e-12)


def test_pass_at_k_by_hand():
  assert statistics.pass_at_k(10, 3, 1) == pytest.approx(0.3)
  assert statistics.pass_at_k(4, 2, 2) == pytest.approx(5 / 6)
  with pytest.raises(ValueError):
    statistics.pass_at_k(3, 4, 1)


def test_wilson_published_values():
  # Newcombe (1998), table I: 81/263 and 0/20, 95%
  assert statistics.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
  assert statistics.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
  assert statistics.wilson(0, 0) == (0.0, 1.0)


def _pairs(both, a, b, neither):
  left = [True] * (both + a) + [False] * (b + neither)
  right = [True] * both + [False] * a + [True] * b + [False] * neither
  return left, right


def test_paired_interval_closed_form():
  # (25.5 - 10.5) / 502 -+ 1.96 sqrt((36 / 502 - (15 / 502)^2) / 502)
  difference, interval = statistics.paired_difference(*_pairs(400, 25, 10, 65))
  assert difference == pytest.approx(0.03)
  assert interval == pytest.approx((0.0066009, 0.0531601), abs=1e-6)
  # 12 problems without any difference: -+ 1.96 sqrt((1 / 14) / 14)
  difference, interval = statistics.paired_difference(*_pairs(7, 0, 0, 5))
  assert difference == 0.0
  assert interval == pytest.approx((-0.14, 0.14), abs=1e-4)


def test_interval_of_several_draws_a_problem():
  # One draw a problem, or draws that always agree: as many as problems.
  assert statistics.clustered([1.0] * 81 + [0.0] * 182, 526) == pytest.approx(
      statistics.wilson(81, 263))
  # Rates 0, .5, .5, 1: variance of the mean 1/32, as of 8 independent draws.
  assert statistics.clustered([0.0, 0.5, 0.5, 1.0], 8) == pytest.approx(
      statistics.wilson(4, 8))
  # Rates that agree by chance are no more than their eight draws.
  assert statistics.clustered([0.5, 0.5, 0.5, 1.0], 8) == pytest.approx(
      statistics.wilson(5, 8))
  assert statistics.clustered([1.0] * 20, 40) == pytest.approx((0.8389, 1.0),
                                                               abs=1e-4)


def test_mcnemar_by_hand():
  # 8 against 1: 2 * (1 + 9) / 2^9
  assert statistics.mcnemar(*_pairs(5, 8, 1, 3)) == pytest.approx(20 / 512)
  assert statistics.mcnemar(*_pairs(5, 0, 0, 3)) == 1.0
  assert statistics.mcnemar(*_pairs(0, 4, 4, 0)) == 1.0


def _episode(success, status='ok', tokens=4, text='6', question='q'):
  called = status == 'ok'
  return Episode(
      Problem('p', question, '6'), status=status,
      strategy=Strategy('t', 'b', tokens=(1,) * tokens),
      execution=Execution(text, 'stop', 30, 10, 2e-6, 0.) if called else None,
      verdict=Verdict(success) if called else None)


def _report():
  greedy = {
      'core_alone': [_episode(s) for s in (True, True, False, False, False)],
      'guide': [_episode(True), _episode(False), _episode(True),
                _episode(False, MALFORMED), _episode(False, LOST)]}
  sampled = {'guide': [_episode(True), _episode(False, MALFORMED),
                       _episode(True, LOST), _episode(True)]}
  return summary.summarise('t', 'c', greedy, sampled, {'guide': [6] * 5},
                           1e-7), greedy


def test_summary_by_hand():
  report, _ = _report()
  alone, guide = report['systems']
  assert (alone['accuracy'], alone['executability'], alone['lost']) == (
      0.4, None, 0)
  # the lost one leaves: 2 of 4 right, 1 of 4 malformed, 1 of 4 degraded
  assert (guide['accuracy'], guide['malformed_rate'], guide['degraded_rate'],
          guide['lost']) == (0.5, 0.25, 0.25, 1)
  assert guide['executability'] == pytest.approx(2 / 3)
  # three draws of one problem, of which two worked
  assert guide['pass_at_k'] == {'k': 3, 'rate': 1.0,
                                'ci95': pytest.approx([0.2065, 1.0], abs=1e-4)}
  assert guide['degraded_ci95'] == pytest.approx([0.0456, 0.6994], abs=1e-4)
  assert alone['pass_at_k'] is None
  assert guide['guide_tokens'] == 10
  assert guide['core_tokens'] == 30  # three of four called, 40 tokens each
  assert guide['usd_per_1k'] == pytest.approx(
      1000 * (3 * 2e-6 + 4 * 10 * 1e-7) / 4)
  (pair,) = report['paired']
  assert (pair['a'], pair['b']) == ('guide', 'core_alone')
  assert pair['difference'] == 0.0  # of the four in common: 2 and 2


def test_page_escapes_what_models_wrote():
  report, greedy = _report()
  evil = _episode(True, text='<script>alert(1)</script>',
                  question='</div><img src=x onerror=alert(1)>')
  text = page.page([report], {'guide': [evil, *greedy['guide']]},
                   page.frontier([report]), 'a: <b>')
  assert '<script>' not in text and '<img src=x' not in text
  assert '&lt;script&gt;alert(1)' in text
  assert 'data:image/png;base64,iVBOR' in text


def test_terminal_table_fits_80_columns():
  import rich.console
  report, _ = _report()
  report['systems'][0].update(accuracy=0.988, ci95=[0.8333, 0.9999],
                              core_tokens=1234, usd_per_1k=0.0096283)
  console = rich.console.Console(width=80, record=True, file=open('/dev/null',
                                                                  'w'))
  for table in page.tables(report):
    console.print(table)
  text = console.export_text()
  assert 'core_alone' in text and '…' not in text
  assert 'guide - core_alone' in text
  assert '5 held-out problems, 1 episodes lost' in text


def test_curves_leave_out_steps_of_which_nothing_is_known(tmp_path):
  folder = tmp_path / 'guides/exectune'
  folder.mkdir(parents=True)
  rows = [{'step': 1, 'loss': 1.0}, {'step': 2, 'loss': 0.5, 'reward': 0.25},
          {'step': 3, 'loss': 0.4, 'reward': 0.75}]
  (folder / 'metrics.jsonl').write_text(''.join(
      json.dumps(row) + '\n' for row in rows))
  drawn = {a.get_title(): a.lines[0].get_xydata().tolist()
           for a in reading.curves(tmp_path, 'exectune').axes}
  assert drawn == {'loss': [[1, 1.0], [2, 0.5], [3, 0.4]],
                   'reward': [[2, 0.25], [3, 0.75]]}
