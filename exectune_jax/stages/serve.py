"""A trained guide in production: an OpenAI-compatible endpoint.

The guide writes the strategy, the core answers; without a usable strategy in
time the core answers alone, and the response says so. Ends on SIGTERM or
Ctrl-C, once the requests that are being answered have their answers.

  POST /v1/chat/completions   model exectune, or the core's name: core alone
  GET  /v1/models /metrics /healthz
"""

from __future__ import annotations

import os
import re
import socket

from exectune_jax import interrupt, progress
from exectune_jax.cores.service import CoreService
from exectune_jax.errors import UserError
from exectune_jax.learning import hosts
from exectune_jax.learning.learner import Learner
from exectune_jax.tasks import make_task

TOKEN = 'EXECTUNE_SERVE_TOKEN'


def run(config, workdir):
  """Runs the stage; see the module docstring."""
  try:
    import uvicorn

    from exectune_jax.serving.app import Endpoint, is_loopback
  except ImportError as e:
    raise UserError(f"stages='serve': needs the package {e.name}: pip install "
                    "-e '.[serve]'") from e
  from exectune_jax.serving.engine import Engine
  from exectune_jax.serving.guided import GuidedCore
  s = config.serve
  token = os.environ.get(TOKEN, '')
  if hosts.count() > 1:
    raise UserError(f'mesh.hosts={config.mesh.hosts}: one host serves')
  if not re.fullmatch('[!-~]*', token):
    raise UserError(f'{TOKEN}: visible ASCII characters only, without spaces')
  if not token and not is_loopback(s.host):
    raise UserError(f"serve.host='{s.host}': set {TOKEN} in the environment "
                    'to serve others than this machine')
  listener = _listen(s)
  task = make_task(config.task, config.core.shots)
  learner = Learner(config, workdir, config.rl)
  engine = Engine(learner.guide, learner.sampler,
                  learner.weights(s.guide, 'serve.guide'), s.slots)
  progress.console.print('compiling')
  engine.warm_up()
  with CoreService(config, workdir, 'serve') as cores:
    guided = GuidedCore(engine, cores.client('core'), task, config)
    server = uvicorn.Server(uvicorn.Config(
        Endpoint(guided, s, token).app(), lifespan='off', log_level='warning',
        access_log=False, timeout_graceful_shutdown=s.drain_s))
    serving = cores.submit(server.serve([listener]))
    host, port = listener.getsockname()[:2]
    progress.console.print(
        f'serving {s.guide or "the guide"} + {cores.client("core").core.name} '
        f'on http://{f"[{host}]" if ":" in host else host}:{port}/v1')
    def going():
      if interrupt.requested():
        server.should_exit = True
      return not serving.done()
    engine.run(going)
    serving.result()
    progress.console.print(
        f'drained; ${cores.ledger.spent_usd:.4f} spent by the ledger')
  interrupt.obeyed()


def _listen(options) -> socket.socket:
  """The socket, bound before anything slow."""
  try:
    family = socket.AF_INET6 if ':' in options.host else socket.AF_INET
    return socket.create_server((options.host, options.port), family=family,
                                backlog=1024)
  except (OSError, OverflowError) as e:
    raise UserError(f"serve.host='{options.host}', serve.port={options.port}: "
                    f'{e}; choose others') from e
