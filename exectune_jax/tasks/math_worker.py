"""Child process: one JSON pair (reference, answer) a line, a verdict each."""

import json
import sys

from math_verify import parse, verify


def main():
  for line in sys.stdin:
    reference, answer = json.loads(line)
    try:
      equal = verify(parse(f'${reference}$'), parse(f'${answer}$'))
    except Exception:  # noqa: BLE001 an unreadable answer is a wrong answer
      equal = False
    print(json.dumps(bool(equal)), flush=True)


if __name__ == '__main__':
  main()
