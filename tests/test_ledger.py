"""The ledger under kills, other processes, full disks; its bill."""

import asyncio
import csv
import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading

import pytest

from exectune_jax.cores import bill, estimate
from exectune_jax.cores import ledger as ledger_lib
from exectune_jax.cores.base import CoreReply, CoreRequest
from exectune_jax.cores.ledger import KILLED, Ledger
from exectune_jax.cores.segments import Segments
from exectune_jax.errors import BudgetExhausted, UserError
from exectune_jax.stages import collect


def reply(text='7', usd=0.25, **more):
  return CoreReply(text, 'stop', 10, 2, usd, 0.1, **more)


def request(text='q'):
  return CoreRequest((('user', text),), 0.0, 16)


def test_calls_in_flight_are_reserved_in_every_process(tmp_path):
  """Two ledgers of one file stand for two processes."""
  one, two = (Ledger(tmp_path / 'l.sqlite', budget_usd=1.0) for _ in '12')
  assert one.begin('a', 'c', 's', 0.7)
  with pytest.raises(BudgetExhausted, match='budget_usd=1'):
    two.begin('b', 'c', 's', 0.4)
  assert not two.begin('a', 'c', 's', 0.1)  # somebody is at it
  one.put('a', 'c', 's', request(), reply(usd=0.25))
  assert two.begin('b', 'c', 's', 0.4)
  two.fail('b', 'c', 's', 'cut', 0.1)
  assert one.spent_usd == two.spent_usd == pytest.approx(0.35)
  one.close()
  two.close()


_KILLED = """
import sys
from exectune_jax.cores.base import CoreReply, CoreRequest
from exectune_jax.cores.ledger import Ledger
ledger = Ledger(sys.argv[1])
for i in range(10**6):
  r = CoreRequest((('user', str(i)),), 0.0, 1)
  assert ledger.begin(r.key('c'), 'c', 's', 1.0)
  ledger.put(r.key('c'), 'c', 's', r, CoreReply(str(i), 'stop', 1, 1, 1.0, 0.))
  print(i, flush=True)
"""


def test_kill_nine_loses_nothing_committed(tmp_path):
  path = tmp_path / 'l.sqlite'
  child = subprocess.Popen([sys.executable, '-c', _KILLED, str(path)],
                           stdout=subprocess.PIPE, text=True)
  for line in child.stdout:
    seen = int(line)
    if seen >= 200:
      break
  os.kill(child.pid, signal.SIGKILL)
  child.wait()
  ledger = Ledger(path)
  assert ledger.count() >= seen + 1
  assert ledger.spent_usd == ledger.count()
  key = CoreRequest((('user', str(seen)),), 0.0, 1).key('c')
  assert ledger.get(key).text == str(seen)
  ledger.close()


_IN_FLIGHT = """
import sys, time
from exectune_jax.cores.ledger import Ledger
ledger = Ledger(sys.argv[1])
for i in range(3):
  ledger.begin(str(i), 'c', 's', 0.1)
print('flying', flush=True)
time.sleep(60)
"""


def test_what_was_in_flight_at_a_kill_is_counted(tmp_path):
  path = tmp_path / 'l.sqlite'
  child = subprocess.Popen([sys.executable, '-c', _IN_FLIGHT, str(path)],
                           stdout=subprocess.PIPE, text=True)
  assert child.stdout.readline() == 'flying\n'
  alive = Ledger(path, budget_usd=0.55)
  assert not alive.begin('1', 'c', 's', 0.1)  # it may still answer
  with pytest.raises(BudgetExhausted):  # and holds 0.3 dollars
    alive.begin('9', 'c', 's', 0.3)
  child.kill()
  child.wait()
  with pytest.raises(BudgetExhausted, match='0.3000 more by tries whose cost'):
    alive.begin('9', 'c', 's', 0.3)  # which may have been billed
  assert alive.begin('9', 'c', 's', 0.1)
  assert alive.begin('1', 'c', 's', 0.1)  # now it can't
  assert [r['reason'] for r in alive.rows('SELECT * FROM failed')] == [
      KILLED] * 3
  assert bill.spend([alive], ('stage',))[0]['unknown'] == 3
  alive.close()


def test_what_nobody_told_the_cost_of_counts_at_its_most(tmp_path):
  """A hard limit: two tries of at most 0.4 without a bill, then one with."""
  ledger = Ledger(tmp_path / 'l.sqlite', budget_usd=1.0)
  for key in 'ab':
    assert ledger.begin(key, 'c', 's', 0.4)
    ledger.fail(key, 'c', 's', 'no reply in 60 s', None)
  assert ledger.spent_usd == 0.0
  with pytest.raises(BudgetExhausted, match='up to 0.8000 more'):
    ledger.begin('c', 'c', 's', 0.3)
  assert ledger.begin('c', 'c', 's', 0.2)
  ledger.fail('c', 'c', 's', 'rejected', 0.0)
  assert ledger.begin('d', 'c', 's', 0.2)
  ledger.close()


def test_a_pid_that_is_anothers_by_now_holds_nothing(tmp_path):
  ledger = Ledger(tmp_path / 'l.sqlite')
  parent, born = os.getppid(), ledger_lib._born(os.getppid())
  assert born and born != ledger_lib._born(os.getpid())
  owners = {'a': f'{parent}.{born}.0a', 'b': f'{parent}.0a',  # as it was once
            'c': f'{parent}.{born[:-1]}.0a'}
  with ledger.transaction() as db:
    for key, owner in owners.items():
      db.execute('INSERT INTO flights VALUES (?,?,?,?,?,?)',
                 (key, owner, 0.0, 'c', 's', 0.1))
  assert [ledger.begin(key, 'c', 's', 0.1) for key in 'abc'] == [
      False, False, True]
  ledger.close()


def test_a_copy_of_a_bucket_has_its_bill(tmp_path, capsys):
  for host, usd in ((0, 0.25), (1, 0.5)):
    path = tmp_path / f'there{host}.sqlite'
    segments = Segments(path, tmp_path / f'copy/ledger/host{host}')
    segments.ledger.put(f'k{host}', 'c', 's', request(), reply(usd=usd))
    segments.ship()
    segments.close()
  for _ in range(2):
    bill.run(['spend', str(tmp_path / 'copy'), '--format', 'jsonl'])
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (row['calls'], row['usd']) == (2, 0.75)


def test_a_damaged_file_is_one_clear_error(tmp_path):
  path = tmp_path / 'l.sqlite'
  path.write_bytes(b'not a database' * 100)
  with pytest.raises(UserError, match='l.sqlite'):
    Ledger(path)


def test_a_file_damaged_in_the_middle_is_one_clear_error(tmp_path):
  path = tmp_path / 'l.sqlite'
  ledger = Ledger(path)
  for i in range(300):
    r = request(f'{i} ' * 50)
    ledger.put(r.key('c'), 'c', 's', r, reply())
  ledger.close()
  data = bytearray(path.read_bytes())
  for page in range(4 * 4096, len(data), 4096):
    data[page:page + 200] = b'\xff' * 200
  path.write_bytes(data)
  with pytest.raises(UserError, match='l.sqlite.*malformed'):
    ledger = Ledger(path)
    for i in range(300):
      ledger.get(request(f'{i} ' * 50).key('c'))


def test_replies_of_one_turn_share_a_transaction(tmp_path):
  """And are committed before anybody is told; a waiter that gave up loses
  nothing."""
  ledger, told = Ledger(tmp_path / 'l.sqlite'), []
  ledger._db.set_trace_callback(told.append)
  async def run():
    other = Ledger(tmp_path / 'l.sqlite')  # sees what is committed
    waiting = [ledger.put_soon(str(i), 'c', 's', request(), reply())
               for i in range(5)]
    waiting[3].cancel()
    waiting[0].add_done_callback(lambda _: told.append(other.count()))
    assert other.count() == 0
    await asyncio.wait(waiting)
    await ledger.put_soon('0', 'c', 's', request(), reply('late'))
    other.close()
  asyncio.run(run())
  assert told.count('COMMIT') == 2 and 5 in told
  assert (ledger.count(), ledger.spent_usd) == (5, 5 * 0.25)
  assert ledger.get('0').text == '7'  # the first one under a key stays
  ledger.close()


def test_everybody_of_a_turn_hears_that_the_disk_is_full(tmp_path):
  ledger = Ledger(tmp_path / 'l.sqlite')
  ledger._db.execute('PRAGMA max_page_count=1')
  async def run():
    return await asyncio.gather(*[ledger.put_soon(
        str(i), 'c', 's', request('q' * 9000), reply()) for i in range(3)],
                                return_exceptions=True)
  found = asyncio.run(run())
  assert [type(e) for e in found] == [UserError] * 3
  assert 'free some space' in str(found[2])
  assert ledger.count() == 0
  ledger.close()


_FULL = """
import resource, signal, sys
from exectune_jax.cores.base import CoreReply, CoreRequest
from exectune_jax.cores.ledger import Ledger
from exectune_jax.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
ledger = Ledger(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
done = 0
try:
  for i in range(10**5):
    r = CoreRequest((('user', str(i)),), 0.0, 1)
    ledger.begin(r.key('c'), 'c', 's', 1.0)
    ledger.put(r.key('c'), 'c', 's', r,
               CoreReply('x' * 1000, 'stop', 1, 1, 1.0, 0.))
    done += 1
except UserError as e:
  print(done, str(e).replace(chr(10), ' '), flush=True)
"""


def test_a_full_disk_is_one_clear_error_and_loses_nothing(tmp_path):
  path = tmp_path / 'l.sqlite'
  found = subprocess.run([sys.executable, '-c', _FULL, str(path)],
                         capture_output=True, text=True, timeout=60)
  done, _, message = found.stdout.partition(' ')
  assert found.returncode == 0, found.stderr
  assert 'l.sqlite' in message and 'free some space' in message
  assert int(done) > 20
  ledger = Ledger(path)
  assert ledger.count() == ledger.spent_usd == int(done)
  ledger.close()


def test_it_is_safe_across_threads(tmp_path):
  ledger = Ledger(tmp_path / 'l.sqlite')
  def work(n):
    for i in range(50):
      r = request(f'{i}')  # the same fifty from every thread
      ledger.put(r.key('c'), 'c', 's', r, reply(str(n), usd=1.0))
  threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
  [t.start() for t in threads]
  [t.join() for t in threads]
  assert (ledger.count(), ledger.spent_usd) == (50, 50.0)
  ledger.close()


def test_a_ledger_of_the_first_version_is_taken_over(tmp_path):
  """Its keys, its replies and its bill stay what they were."""
  path, first = tmp_path / 'l.sqlite', request('old')
  old = sqlite3.connect(path)
  old.execute(
      'CREATE TABLE calls (key TEXT PRIMARY KEY, core TEXT, stage TEXT, '
      'created REAL, request TEXT, text TEXT, finish TEXT, input_tokens '
      'INTEGER, output_tokens INTEGER, usd REAL, latency_s REAL) '
      'WITHOUT ROWID')
  # the key as that version made it
  text = ('{"core":"c","max_tokens":16,"messages":[["user","old"]],'
          '"sample":0,"stop":[],"temperature":0.0}')
  key = hashlib.sha256(text.encode()).hexdigest()
  old.execute('INSERT INTO calls VALUES (?,?,?,?,?,?,?,?,?,?,?)',
              (key, 'c', 's', 1.0, '[]', '7', 'stop', 10, 2, 0.25, 0.1))
  old.commit()
  old.close()
  assert first.key('c') == key
  for _ in range(2):
    ledger = Ledger(path)
    assert ledger.get(key) == reply()
    assert ledger.spent_usd == 0.25
    ledger.close()


@pytest.fixture
def spent(tmp_path):
  """A workdir with the ledgers of two hosts."""
  for host, name in enumerate(('ledger.sqlite', 'ledger.1.sqlite')):
    ledger = Ledger(tmp_path / name)
    for i in range(3):
      r = request(f'{host}{i}')
      ledger.put(r.key('c'), 'openai:m', 'rl:x' if i else 'collect', r,
                 reply('[/bold] said\n"he"', usd=0.5, cached_tokens=4))
    ledger.fail('x', 'openai:m', 'collect', 'HTTP 429', 0.0)
    ledger.fail('y', 'openai:m', 'collect', 'cut', None)
    ledger._db.execute("UPDATE calls SET created = 86400.0 * 3")
    ledger._db.execute("UPDATE failed SET created = 86400.0 * 3")
    ledger.close()
  return tmp_path


def test_the_bill_of_all_hosts_by_stage_core_and_day(spent, capsys):
  bill.run(['spend', str(spent), '--format', 'jsonl'])
  rows = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
  common = {'core': 'openai:m', 'day': '1970-01-04', 'estimated': 0,
            'failed_usd': 0.0}
  assert rows == [
      {**common, 'stage': 'collect', 'calls': 2, 'input_tokens': 20,
       'cached_tokens': 8, 'output_tokens': 4, 'usd': 1.0, 'failed': 4,
       'unknown': 2},
      {**common, 'stage': 'rl:x', 'calls': 4, 'input_tokens': 40,
       'cached_tokens': 16, 'output_tokens': 8, 'usd': 2.0, 'failed': 0,
       'unknown': 0}]
  bill.run(['spend', str(spent), '--by', 'core'])
  assert 'total $3.0000' in capsys.readouterr().out


@pytest.mark.parametrize('form', ['jsonl', 'csv'])
def test_export_keeps_every_call(spent, form, capsys):
  bill.run(['export', str(spent), '--format', form])
  assert '6 calls written' in capsys.readouterr().out
  with (spent / f'ledger.{form}').open(newline='') as file:
    rows = (list(csv.DictReader(file)) if form == 'csv'
            else [json.loads(x) for x in file])
  assert len(rows) == 6
  assert {r['text'] for r in rows} == {'[/bold] said\n"he"'}
  asked = [r['request'] for r in rows]
  asked = list(map(json.loads, asked)) if form == 'csv' else asked
  assert sorted(a[0][1] for a in asked) == ['00', '01', '02', '10', '11', '12']


def test_show_prints_replies_as_they_are(spent, capsys):
  bill.run(['show', str(spent), '--last', '2'])
  out = capsys.readouterr().out
  assert out.count('[/bold] said "he"') == 2
  assert '2 tries failed: cut' not in out  # one in each ledger
  assert out.count('1 tries failed: cut') == 2


@pytest.mark.parametrize('argv, words', [
    (['spend', '/nowhere'], 'there is no ledger'),
    (['spend', '.', '--by', 'colour'], 'no ledger')])
def test_the_command_line_fails_in_one_line(argv, words, tmp_path,
                                            monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit, match=words):
    bill.run(argv)


def test_estimate_counts_what_the_stages_then_ask(config, tmp_path):
  """Against the calls that collect really makes with this core."""
  config.collect.problems = 30
  (line,) = estimate.lines(config, 'collect', 'collect', None)
  collect.run(config, tmp_path)
  ledger = Ledger(tmp_path / 'ledger.sqlite')
  made, usd = ledger.count(), ledger.spent_usd
  assert line.calls == 30
  assert line.most == 30 * (1 + config.collect.max_revisions)
  assert line.calls * 0.5 <= made <= line.most
  assert usd <= line.most_usd
  (after,) = estimate.lines(config, 'collect', 'collect', ledger)
  assert after.calls == max(0, 30 - made)
  (rl,) = estimate.lines(config, 'rl', 'rl:exectune', ledger)
  s = config.rl
  assert rl.calls == s.steps * s.groups * (s.group_size + 1)
  assert rl.usd == pytest.approx(rl.calls * usd / made)  # the mean so far
  ledger.close()


def test_estimate_of_evaluation_and_judge(config):
  config.evaluate.update(systems=('core_alone', 'generic', 'sft', 'exectune',
                                  'large_core'), alpha_samples=2)
  config.large_core.name = 'toy:large'
  config.judge.name = 'toy:large'
  found = estimate.counts(config, 'evaluate', {
      'train': 0, 'evaluated': 100, 'transfer': 10})
  guided = 2 * (100 * 3 + 10)
  assert found == {'core': (guided + 220,) * 2, 'large_core': (110, 110),
                   'judge': (guided, 2 * guided)}
