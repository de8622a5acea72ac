"""Serves a GGUF model on loopback: llama.cpp's OpenAI-compatible server.

  python -m launch.local_server MODEL.gguf PORT SLOTS CONTEXT THREADS

CONTEXT is in tokens per slot. Ends on SIGTERM. Use launch/local_core.sh,
which installs what this needs and waits until the server is healthy.
"""

import signal
import sys
import threading

import xllamacpp


def main(model: str, port: int, slots: int, context: int, threads: int):
  params = xllamacpp.CommonParams()
  params.model.path = model
  params.hostnames = ['127.0.0.1']
  params.port = port
  params.n_parallel = slots
  params.n_ctx = slots * context
  params.kv_unified = False
  params.cont_batching = True
  params.cpuparams.n_threads = threads
  params.cpuparams_batch.n_threads = threads
  params.ui = False
  server = xllamacpp.Server(params)
  print(f'listening on {server.listening_address}', flush=True)
  stop = threading.Event()
  signal.signal(signal.SIGTERM, lambda *_: stop.set())
  signal.signal(signal.SIGINT, lambda *_: stop.set())
  stop.wait()


if __name__ == '__main__':
  if len(sys.argv) != 6:
    sys.exit(__doc__)
  main(sys.argv[1], *map(int, sys.argv[2:]))
