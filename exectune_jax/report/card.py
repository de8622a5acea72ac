"""The model card of an exported guide: what it is for, and how good it is."""

from __future__ import annotations

import json

import yaml

from exectune_jax import prompts

_USE = """```python
from transformers import AutoTokenizer
from {library} import {loader}

words = AutoTokenizer.from_pretrained(PATH)
guide = {loader}.from_pretrained(PATH)
prompt = words.apply_chat_template(
    [{{'role': 'system', 'content': {system!r}}},
     {{'role': 'user', 'content': 'Problem: ' + question}}],
    add_generation_prompt=True, enable_thinking=False, return_tensors='pt',
    return_dict=True)
written = guide.generate(**prompt, max_new_tokens={tokens})
strategy = words.decode(written[0, prompt['input_ids'].shape[1]:])
```
"""


def write(name: str, config, base: str, report: dict | None) -> str:
  """Markdown with the front matter that the hub reads.

  Args:
    name: of the guide in guides/.
    config: the whole config of the run.
    base: model that training began from; '' if from nothing.
    report: report.json of the run, or None.
  """
  peft = config.export.lora == 'keep'
  library = 'peft' if peft else 'transformers'
  front = {'library_name': library, 'pipeline_tag': 'text-generation',
           'tags': ['exectune', 'guide']}
  if '/' in base and not base.startswith(('/', '.', '~')):
    front['base_model'] = base
  return '\n'.join([
      '---', yaml.safe_dump(front, sort_keys=False).strip(), '---', '',
      f'# Guide `{name}` for `{config.core.name}`', '',
      'Writes a short strategy for a problem, between `<strategy>` and '
      f'`</strategy>`, which the core `{config.core.name}` carries out. It '
      'was trained with exectune_jax (ExecTune, arXiv 2604.09741) for this '
      f'core on the task `{config.task.name}`, and is not meant to answer '
      'by itself or for another core.', '',
      '## Results', '', _results(name, report), '', '## Use', '',
      _USE.format(library=library, system=prompts.GUIDE_SYSTEM,
                  loader=f'Auto{"Peft" * peft}ModelForCausalLM',
                  tokens=config.guide.max_new_tokens),
      'The core then gets the problem and the strategy. Where there is no '
      'complete strategy block, ask the core alone.', ''])


def _results(name, report) -> str:
  held = {} if report is None else {s['name']: s for s in report['systems']}
  if name not in held:
    return 'This guide has not been evaluated.'
  rows = [f'{report["n"]} held-out problems of `{report["task"]}`, core '
          f'`{report["core"]}`.', '',
          '| system | accuracy % (95%) | degraded % (95%) | $ per 1,000 |',
          '|---|---|---|---|']
  for system in dict.fromkeys(('core_alone', name)):
    if system in held:
      s = held[system]
      rows.append(f'| {system} | {_percent(s["accuracy"], s["ci95"])} | '
                  f'{_percent(s["degraded_rate"], s.get("degraded_ci95"))} | '
                  f'{s["usd_per_1k"]:.4g} |')
  for pair in report['paired']:
    if (pair['a'], pair['b']) == (name, 'core_alone'):
      low, high = (100 * x for x in pair['ci95'])
      rows += ['', f'Paired difference: {100 * pair["difference"]:+.1f} '
                   f'points [{low:+.1f}, {high:+.1f}].']
  return '\n'.join(rows)


def _percent(rate: float, interval) -> str:
  if interval is None:  # a report from before there was one
    return f'{100 * rate:.1f}'
  low, high = (100 * x for x in interval)
  return f'{100 * rate:.1f} ({low:.1f}-{high:.1f})'


def read_report(path) -> dict | None:
  """report.json of a workdir, if there is one that can be read."""
  try:
    return json.loads(path.read_text())
  except (FileNotFoundError, json.JSONDecodeError):
    return None
