"""A client that asks the service without pause and logs one numbered line for each answer."""

import json
import os
import sys
import time
import urllib.request

URL = os.environ.get("SERVICE_URL", "http://ai-service:8000/predict")
PAUSE = float(os.environ.get("PAUSE_SECONDS", "0.1"))


def ask() -> str:
    try:
        with urllib.request.urlopen(URL, timeout=3) as reply:
            return f"ok pod={json.load(reply)['pod']}"
    except Exception as error:
        return f"failed error={error!r}"


def main() -> None:
    number = 0
    while True:
        number += 1
        print(f"seq={number} time={time.time():.3f} {ask()}", flush=True)
        time.sleep(PAUSE)


if __name__ == "__main__":
    sys.exit(main())
