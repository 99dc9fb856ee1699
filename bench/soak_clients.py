"""The clients of ``bench.soak``: what each sends, and whether what comes back is right."""

import collections
import contextlib
import json
import random
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

import httpx

TOKENS, MARK = 16, 95  # of an answer; a prompt with this id makes every forward fail that has its row
LIVE = ("live0", "live1")
# Out of a hundred requests.
KINDS = {"whole": 52, "stream": 26, "leave": 8, "reset": 6, "poisoned": 4, "unknown": 2, "half": 2}


@dataclass
class Tally:
    """What all clients together have seen."""

    counts: collections.Counter = field(default_factory=collections.Counter)
    faults: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, what: str, fault: str | None = None) -> None:
        with self.lock:
            self.counts[what] += 1
            if fault is not None and len(self.faults) < 20:
                self.faults.append(f"{what}: {fault}")


class FailedStream(Exception):
    """A stream that ended with an error."""


class CutStream(Exception):
    """A stream that ended without its last event."""


class Versions:
    """Which folders a live name may have answered by at some time: each from before its load to after its successor's.

    A name that has none may answer 404.
    """

    def __init__(self):
        self._spans: dict[str, list] = {name: [["", 0.0, None]] for name in LIVE}  # folder or "", from, until
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def change(self, name: str, folder: str):
        """Around the call that has ``folder`` ("": none) answer for this name."""
        with self._lock:
            self._spans[name].append([folder, time.monotonic(), None])
        yield
        with self._lock:
            self._spans[name][-2][2] = time.monotonic()

    def during(self, name: str, begin: float, end: float) -> set[str]:
        """The folders that may have answered between these times; fixed names are their own."""
        with self._lock:
            spans = self._spans.get(name, [[name, 0.0, None]])
            return {folder for folder, start, stop in spans if start <= end and (stop is None or stop >= begin)}


class Site:
    """Where the server is, whether it is there now, and what it should answer.

    Args:
        port: on the loopback interface.
        answers: by folder ("base" for none), for each of ``prompts`` the text, or None where it is a near tie.
        prompts: lists of ids.
    """

    def __init__(self, port: int, answers: dict[str, list[str | None]], prompts: list[list[int]]):
        self.port, self.answers, self.prompts = port, answers, prompts
        self.versions, self.tally = Versions(), Tally()
        self.stop = threading.Event()
        self.away: list[list[float]] = []  # from a SIGTERM to the first answer of the next server

    def places(self, name: str) -> list[int]:
        """The prompts whose answers are sure, by whatever folder the name has."""
        folders = [name] if name in self.answers else [folder for folder in self.answers if folder.startswith("v")]
        return [i for i in range(len(self.prompts)) if all(self.answers[folder][i] is not None for folder in folders)]

    def was_away(self, begin: float, end: float) -> bool:
        return any(start <= end and begin <= stop for start, stop in self.away)


def client(site: Site, seed: int) -> None:
    """One client, until the site stops."""
    draw = random.Random(seed)
    names = [name for name in site.answers if not name.startswith("v")] + list(LIVE)
    while not site.stop.is_set():
        with httpx.Client(base_url=f"http://127.0.0.1:{site.port}", timeout=60) as http:
            for _ in range(50):
                if site.stop.is_set():
                    break
                (kind,) = draw.choices(list(KINDS), KINDS.values())
                name = draw.choice(names)
                place = draw.choice(site.places(name))
                begin = time.monotonic()
                try:
                    _send(site, http, kind, name, place, begin)
                except (httpx.TransportError, OSError, CutStream, FailedStream) as error:
                    if site.was_away(begin, time.monotonic()) and not isinstance(error, CutStream | FailedStream):
                        time.sleep(0.1)  # no server listened
                    else:
                        site.tally.add("lost", f"{kind} {name}: {error!r}")
                    break  # with a new connection


def _send(site: Site, http: httpx.Client, kind: str, name: str, place: int, begin: float) -> None:
    body = {"model": name, "prompt": site.prompts[place], "max_tokens": TOKENS, "temperature": 0}
    if kind in ("reset", "half"):
        _raw(site, body, kind)
        site.tally.add("sent")
        site.tally.add("left")
        return
    if kind == "poisoned":
        body["prompt"] = [*body["prompt"], MARK]
    if kind == "unknown":
        body["model"] = "nobody"
    if kind not in ("stream", "leave"):
        response = http.post("/v1/completions", json=body)
        text = response.json()["choices"][0]["text"] if response.status_code == 200 else None
    else:
        with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            text = _read(response, 2 if kind == "leave" else None) if response.status_code == 200 else None
    site.tally.add("sent")
    _judge(site, kind, name, place, response.status_code, text, begin)


def _read(response: httpx.Response, events: int | None) -> str:
    """The text of a stream to its end, or of some events."""
    text = ""
    try:
        for line in response.iter_lines():
            if line == "data: [DONE]":
                return text
            if line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise FailedStream(event["error"]["message"])
                text += "".join(choice["text"] for choice in event["choices"])
                events = None if events is None else events - 1
                if events == 0:
                    return text
    except httpx.TransportError as error:  # what has begun to be answered was accepted, whenever that was
        raise CutStream(repr(error)) from error
    raise CutStream("a stream ended without its last event")


def _judge(site: Site, kind: str, name: str, place: int, status: int, text: str | None, begin: float) -> None:
    tally, folders = site.tally, site.versions.during(name, begin, time.monotonic())
    if status == 404 and (kind == "unknown" or "" in folders):
        tally.add("refused: no such adapter")
    elif status in (429, 503):
        tally.add("refused: full")
    elif kind == "poisoned" and status == 500:
        tally.add("failed as it must")
    elif status != 200:
        tally.add("lost", f"{kind} {name}: {status}")
    elif kind in ("poisoned", "unknown"):
        tally.add("wrong", f"{kind} {name} was answered")
    else:
        expected = [site.answers[folder][place] for folder in folders if folder]
        if any(answer == text or (kind == "leave" and answer.startswith(text)) for answer in expected):
            tally.add("left" if kind == "leave" else "right")
        else:
            tally.add("wrong", f"{kind} {name} {place}: {text!r}, expected {expected}")


def _raw(site: Site, body: dict, kind: str) -> None:
    """A request whose client is gone at once: its connection is reset after the request, or inside of its head."""
    text = json.dumps({**body, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(text)}"
    with socket.create_connection(("127.0.0.1", site.port), timeout=10) as sock:
        sock.sendall(head.encode()[: 40 if kind == "half" else None])
        if kind == "reset":
            sock.sendall(b"\r\n\r\n" + text)
            sock.recv(64)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def killed_client(site: Site) -> None:
    """A process that asks for a long stream, and is killed while it reads."""
    code = (
        "import json, sys, urllib.request as u\n"
        "r = u.Request(sys.argv[1], sys.argv[2].encode(), {'Content-Type': 'application/json'})\n"
        "[print(line, flush=True) for line in u.urlopen(r)]\n"
    )
    body = {"model": "alice", "prompt": site.prompts[0], "max_tokens": 400, "temperature": 0, "stream": True}
    command = [sys.executable, "-c", code, f"http://127.0.0.1:{site.port}/v1/completions", json.dumps(body)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        if process.stdout.readline():
            site.tally.add("killed")
        process.kill()


def admin(site: Site, folders: list[str], pause: threading.Lock, seed: int) -> None:
    """Loads, replaces and unloads the live names; holds ``pause`` for each change."""
    draw = random.Random(seed)
    while not site.stop.is_set():
        with pause:
            name, folder = draw.choice(LIVE), draw.choice([*folders, *folders, ""])
            verb = "load" if folder else "unload"
            fields = {"lora_path": folder, "load_inplace": True} if folder else {}
            url = f"http://127.0.0.1:{site.port}/v1/{verb}_lora_adapter"
            with site.versions.change(name, folder):
                status = httpx.post(url, json={"lora_name": name, **fields}, timeout=60).status_code
            if status == 200 or (status == 404 and not folder):
                site.tally.add(f"{verb}s")
            else:
                site.tally.add("lost", f"{verb} {name} {folder}: {status}")
        time.sleep(0.05)
