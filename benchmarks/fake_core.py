"""A core with OpenAI's wire format, one answer and a fixed latency.

  python -m benchmarks.fake_core LATENCY_S

Prints its port on loopback; runs until it is killed.
"""

import asyncio
import json
import subprocess
import sys

from aiohttp import web

REPLY = json.dumps({
    'choices': [{'finish_reason': 'stop', 'message': {
        'role': 'assistant', 'content': 'The answer is 6.'}}],
    'usage': {'prompt_tokens': 100, 'completion_tokens': 10}})


def start(latency_s: float = 0.0) -> tuple[subprocess.Popen, str]:
  """(process, address) of one in a process of its own."""
  process = subprocess.Popen(
      [sys.executable, '-m', 'benchmarks.fake_core', str(latency_s)],
      text=True, stdout=subprocess.PIPE)
  return process, f'http://127.0.0.1:{process.stdout.readline().strip()}'


async def main(latency_s: float):
  async def answer(request):
    await request.read()
    if latency_s:
      await asyncio.sleep(latency_s)
    return web.Response(text=REPLY, content_type='application/json')
  app = web.Application()
  app.router.add_post('/{path:.*}', answer)
  runner = web.AppRunner(app, access_log=None)
  await runner.setup()
  site = web.TCPSite(runner, '127.0.0.1', 0, backlog=1024)
  await site.start()
  print(site._server.sockets[0].getsockname()[1], flush=True)
  await asyncio.Event().wait()


if __name__ == '__main__':
  asyncio.run(main(float(sys.argv[1])))
