#!/usr/bin/env python3
"""gcloud for tests: workers are directories, and ssh runs commands in them.

$FAKE/scenario.json says how it goes: `create` (an outcome for each creation:
'ok' or an error), `waits` (states before ACTIVE), `runs` (for each machine,
for each worker: [seconds, exit code] of the training run), `preempt` (after
how many looks at a machine's runs it is taken away; 0: never). Every call is
appended to $FAKE/calls.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

FAKE = pathlib.Path(os.environ.get('FAKE', ''))
ARGS = sys.argv[1:]


# Stands for a worker's Python: makes .venv, whose python is `train`.
PYTHON3 = '''#!/bin/bash
[ "$2" = uv ] && [ "$3" = venv ] && { mkdir -p .venv/bin
ln -sf "$(dirname "$0")/train" .venv/bin/python; }
exit 0
'''


def install(folder, train, **operators):
  """Makes a cloud in `folder`; returns the operator's part of PATH.

  Args:
    train: script that stands for a worker's Python.
    operators: further commands of the operator, name to script.
  """
  operators['gcloud'] = f'#!/bin/sh\nexec {sys.executable} {__file__} "$@"\n'
  for place, scripts in (('bin', {'python3': PYTHON3, 'train': train,
                                  'sudo': '#!/bin/sh\nexit 0\n'}),
                         ('operator', operators)):
    (folder / place).mkdir(parents=True)
    for name, text in scripts.items():
      (folder / place / name).write_text(text)
      (folder / place / name).chmod(0o755)
  return folder / 'operator'


def plan(folder, **scenario):
  """Begins a scenario in which all goes well but for what is given."""
  (folder / 'scenario.json').write_text(json.dumps({
      'machine': -1, 'states': [], 'looks': 0, 'create': ['ok'] * 9,
      'waits': [], 'runs': [[[0, 0]]] * 9, 'preempt': [0] * 9, **scenario}))


def flag(name, default=''):
  return ARGS[ARGS.index(name) + 1] if name in ARGS else default


def load():
  return json.loads((FAKE / 'scenario.json').read_text())


def save(s):
  (FAKE / 'scenario.json').write_text(json.dumps(s))


def workers(s):
  return sorted((FAKE / f'machine{s["machine"]}').glob('worker*'))


def take_away(s):
  for w in workers(s):
    if (w / 'exectune/pid').exists():
      try:
        os.kill(int((w / 'exectune/pid').read_text()), signal.SIGKILL)
      except ProcessLookupError:
        pass
  time.sleep(0.2)  # what stood beside them notes how they ended


def create(s):
  if s['states']:
    sys.exit('ERROR: (gcloud) ALREADY_EXISTS')
  outcome = s['create'].pop(0)
  if outcome != 'ok':
    save(s)
    sys.exit(f'ERROR: (gcloud) {outcome}')
  s['machine'] += 1
  s.update(states=[*s['waits'], 'ACTIVE'], looks=0)
  for i, (seconds, code) in enumerate(s['runs'][s['machine']]):
    home = FAKE / f'machine{s["machine"]}/worker{i}'
    home.mkdir(parents=True)
    (home / 'behaviour').write_text(f'{seconds} {code}')
  save(s)


def describe(s):
  if not s['states']:
    sys.exit('ERROR: NOT_FOUND')
  print(s['states'][0])
  if len(s['states']) > 1:
    s['states'].pop(0)
  save(s)


def delete(s):
  if not s['states']:
    sys.exit('ERROR: NOT_FOUND')
  take_away(s)
  s['states'] = []
  save(s)


def reach(s):
  """The workers of a command; none answers unless the machine is there."""
  if s['states'] != ['ACTIVE']:
    sys.exit(255)
  chosen = flag('--worker')
  return workers(s) if chosen == 'all' else [workers(s)[int(chosen)]]


def scp(s):
  files = [a for a in ARGS[3:] if a.startswith('/')]
  for w in reach(s):
    for f in files:
      shutil.copy(f, w)  # with its mode, as scp -p does


def ssh(s):
  command, found = flag('--command'), reach(s)
  if 'worker.sh state' in command:
    s['looks'] += 1
    save(s)
    limit = s['preempt'][s['machine']]
    if limit and s['looks'] > limit:
      take_away(s)
      s['states'] = ['SUSPENDED']
      save(s)
      sys.exit(255)
  env = {'PATH': f'{FAKE}/bin:/usr/bin:/bin'}
  codes = [subprocess.run(['bash', '-c', command], cwd=w,
                          env={**env, 'HOME': str(w)}).returncode
           for w in found]
  sys.exit(max(codes))


def unreachable(s):
  """Whether this call meets a network that is down."""
  s['calls'] = s.get('calls', 0) + 1
  save(s)
  return s['calls'] in s.get('down', [])


if __name__ == '__main__':
  with (FAKE / 'calls').open('a') as calls:
    calls.write(json.dumps(ARGS) + '\n')
  if unreachable(load()):
    sys.exit('ERROR: gcloud crashed (ConnectionError): no route to host')
  {'create': create, 'describe': describe, 'delete': delete, 'ssh': ssh,
   'scp': scp}[ARGS[3]](load())
