"""A server on loopback, in a thread of its own, for tests."""

import asyncio
import threading

from aiohttp import web


class Loopback:
  """Context manager; all requests of `methods` go to `handle`.

  url: the server's address, once it runs.
  """

  methods = '*'

  def __enter__(self):
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
    self._thread.start()
    self.url = asyncio.run_coroutine_threadsafe(self._start(),
                                                self._loop).result()
    return self

  def __exit__(self, *_):
    asyncio.run_coroutine_threadsafe(self._runner.cleanup(),
                                     self._loop).result()
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join()
    self._loop.close()

  async def _start(self):
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route(self.methods, '/{tail:.*}', self.handle)
    self._runner = web.AppRunner(app, shutdown_timeout=0.1)
    await self._runner.setup()
    site = web.TCPSite(self._runner, '127.0.0.1', 0)
    await site.start()
    return f'http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}'
