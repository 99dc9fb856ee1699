"""Clients in a process of their own, as clients are: each asks at once and reads its stream.

Standard input has ``{"url": ..., "bodies": [...]}``, of which each body is a streamed completion's; standard output has
``{"seconds": ..., "answers": [[text, seconds to its first piece], ...]}``.
"""

import json
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed

from tqdm import tqdm


def main() -> None:
    asked = json.load(sys.stdin)
    ready = threading.Barrier(len(asked["bodies"]) + 1)

    def client(body: dict) -> tuple[str, float]:
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{asked['url']}/v1/completions", json.dumps(body).encode(), head)
        ready.wait()
        text, start, first = "", time.perf_counter(), 0.0
        with urllib.request.urlopen(request, timeout=600) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    first = first or time.perf_counter() - start
                    text += json.loads(line[6:])["choices"][0]["text"]
        return text, first

    with ThreadPoolExecutor(len(asked["bodies"])) as pool:
        futures = [pool.submit(client, body) for body in asked["bodies"]]
        ready.wait()
        start = time.perf_counter()
        for done in tqdm(as_completed(futures), "clients", total=len(futures), leave=False):
            done.result()
        seconds = time.perf_counter() - start
    json.dump({"seconds": seconds, "answers": [future.result() for future in futures]}, sys.stdout)


if __name__ == "__main__":
    main()
