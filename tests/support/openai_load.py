"""Chats with OpenAI's own client, without retries, one after the other in several threads, until stdin ends.

    python3 openai_load.py URL MODEL THREADS     the key is in $API_KEY

Says {"ok": N, "failed": [...], "slowest": SECONDS} as JSON at the end.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any, List

PATIENCE_S = 40  # for the last request of a thread


class Load:
    """Requests in threads, and what became of them."""

    def __init__(self, url: str, model: str) -> None:
        self._url, self._model = url, model
        self._ended = threading.Event()
        self._times: List[float] = []
        self._failed: List[str] = []

    def run(self, threads: int) -> str:
        """Chat until stdin ends. What is to be said, as JSON."""
        workers = [
            threading.Thread(target=self._work, args=(n,), daemon=True) for n in range(threads)
        ]
        for worker in workers:
            worker.start()
        sys.stdin.read()
        self._ended.set()
        for worker in workers:
            worker.join(PATIENCE_S)
        slowest = round(max(self._times, default=0.0), 2)
        return json.dumps({"ok": len(self._times), "failed": self._failed, "slowest": slowest})

    def _work(self, number: int) -> None:
        import openai  # type: ignore[import-not-found, unused-ignore]

        key = os.environ["API_KEY"]
        client = openai.OpenAI(base_url=self._url, api_key=key, max_retries=0, timeout=30)
        while not self._ended.is_set():
            began = time.monotonic()
            try:
                self._chat(client, streams=number % 2 == 1)
                self._times.append(time.monotonic() - began)
            except Exception as exc:  # noqa: BLE001 - whatever fails is counted
                self._failed.append(f"{type(exc).__name__}: {exc}"[:200])
            time.sleep(0.05)

    def _chat(self, client: Any, streams: bool) -> None:
        messages = [{"role": "user", "content": "hi"}]
        answer = client.chat.completions.create(
            model=self._model, messages=messages, stream=streams
        )
        if streams:
            assert list(answer)  # one that breaks off before its [DONE] raises
        else:
            assert answer.choices


if __name__ == "__main__":
    print(Load(sys.argv[1], sys.argv[2]).run(int(sys.argv[3])))
