"""Google Cloud Storage for tests, as far as gcsfs asks for it.

What matters is what a directory cannot imitate: there are no folders, only
names; an empty prefix does not exist; times have gcsfs's own resolution.
"""

import datetime
import json
import re
import urllib.parse

from aiohttp import web
from loopback import Loopback


class FakeGcs(Loopback):
  """Context manager; `url` goes into STORAGE_EMULATOR_HOST.

  objects: name -> (bytes, time of change, generation), of the one bucket.
  """

  def __init__(self):
    self.objects, self.generation = {}, 0

  def put(self, name, data):
    self.generation += 1
    now = datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%dT%H:%M:%S.%fZ')
    self.objects[name] = data, now, self.generation
    return self._meta(name)

  def _meta(self, name):
    data, updated, generation = self.objects[name]
    return {'kind': 'storage#object', 'name': name, 'bucket': 'b',
            'size': str(len(data)), 'updated': updated, 'timeCreated': updated,
            'generation': str(generation)}

  async def handle(self, request):
    body, path = await request.read(), request.raw_path.partition('?')[0]
    if path.startswith('/upload'):
      return self._upload(request, body)
    if path == '/storage/v1/b/b/o':
      return self._list(request.query)
    found = re.fullmatch(r'/(?:download/)?storage/v1/b/b/o/(.+)', path)
    if not found:
      return web.json_response({'name': 'b'} if path == '/storage/v1/b/b'
                               else {}, status=200 if path.endswith('/b')
                               else 404)
    name, _, target = found[1].partition('/rewriteTo/b/b/o/')
    name, target = urllib.parse.unquote(name), urllib.parse.unquote(target)
    if name not in self.objects:
      return web.json_response({'error': {'code': 404, 'message': 'No such '
                                          'object'}}, status=404)
    if target:
      return web.json_response({'done': True, 'resource': self.put(
          target, self.objects[name][0])})
    if request.method == 'DELETE':
      del self.objects[name]
      return web.Response(status=204)
    if path.startswith('/download') or request.query.get('alt') == 'media':
      return web.Response(body=self.objects[name][0])
    return web.json_response(self._meta(name))

  def _upload(self, request, body):
    name = request.query.get('name')
    kind = request.headers.get('Content-Type', '')
    if 'multipart' in kind:
      mark = re.search('boundary="?([^";]+)', kind)[1].encode()
      fields, data = (p.split(b'\n\n', 1)[1] for p in (
          body.replace(b'\r\n\r\n', b'\n\n').split(b'--' + mark)[1:3]))
      return web.json_response(self.put(json.loads(fields)['name'],
                                        data.removesuffix(b'\n').removesuffix(
                                            b'\r')))
    if request.query.get('uploadType') == 'resumable' and (
        request.method == 'POST'):
      name = name or json.loads(body)['name']
      return web.Response(headers={'Location': (
          f'{self.url}/upload/x?name={urllib.parse.quote(name, safe="")}')})
    return web.json_response(self.put(name, body))

  def _list(self, query):
    prefix, delimiter = query.get('prefix', ''), query.get('delimiter')
    items, prefixes = [], set()
    for name in sorted(self.objects):
      if name.startswith(prefix):
        rest = name[len(prefix):]
        if delimiter and delimiter in rest:
          prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
        else:
          items.append(self._meta(name))
    return web.json_response({'items': items, 'prefixes': sorted(prefixes)})
