"""Connections without a request cost others nothing: they are dropped in time, and make room."""

import contextlib
import socket
import time

import pytest

from tests.support.small_server import complete, serving, slow_text, until

HALF = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"


def opened(client, data=b""):
    sock = socket.create_connection((client.base_url.host, client.base_url.port), timeout=30)
    sock.sendall(data)
    return sock


def dropped(sock):
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("data", [b"", HALF, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" + HALF], ids=len)
def test_half_a_head_is_dropped(folder, data):
    with serving(folder, head_seconds=1) as (_, client):
        with opened(client, data[: -len(HALF)] if len(data) > len(HALF) else data) as sock:
            if len(data) > len(HALF):  # a second request on one connection
                assert b"200" in sock.recv(1000)
                sock.sendall(HALF)
            began = time.monotonic()
            assert dropped(sock)
            assert time.monotonic() - began < 20
        with slow_text(client, max_tokens=200) as stream:  # an answer may take longer than a head
            assert b"".join(stream.iter_raw()).endswith(b"data: [DONE]\n\n")


def test_connections_without_a_request_make_room(folder):
    with serving(folder, max_connections=8, head_seconds=600, step_seconds=0.02) as (service, client):
        with contextlib.ExitStack() as stack:
            stream = stack.enter_context(slow_text(client, max_tokens=100))
            until(lambda: service.batcher.running == 1)
            half = [stack.enter_context(opened(client, HALF)) for _ in range(20)]
            assert complete(client, max_tokens=1).status_code == 200
            assert sum(map(dropped, half[:13])) == 13
            assert b"".join(stream.iter_raw()).endswith(b"data: [DONE]\n\n")


def test_no_more_connections_than_files(monkeypatch):
    resource = pytest.importorskip("resource", reason="this system has no limit of files")
    from fastpeft.serving.http import connections

    for files, expected in ((100, 36), (10, 1), (10**6, 1024), (resource.RLIM_INFINITY, 1024)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, files=files: (files, files))
        assert connections._openable(1024) == expected


def test_a_client_that_does_not_read_is_let_go(folder, monkeypatch):
    """Its row is free long before; the connection ends when nothing was taken for a while."""
    from fastpeft.serving.http import generation, server

    def little_buffer(listener):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    monkeypatch.setattr(generation, "_SEND_SECONDS", 0.5)
    monkeypatch.setattr(server, "drop_dead_peers", little_buffer)
    body = b'{"model": "base", "prompt": "abc", "max_tokens": 400, "stream": true, "logprobs": 20}'
    head = HALF + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    with serving(folder) as (service, client):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((client.base_url.host, client.base_url.port))
        with sock:
            sock.sendall(head + body)
            until(lambda: 'status="499"' in client.get("/metrics").text)
            assert service.batcher.running == 0
