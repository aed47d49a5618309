"""A model behind an HTTP endpoint, against a real server."""

import socket
import threading

import pytest
import torch
from chat_server import chat_server, failure, images_of, question_of, reply

from longalign.runtime import Runtime
from longalign.vlm.base import HashedImage, Request
from longalign.vlm.config import EndpointConfig
from longalign.vlm.endpoint import EndpointError
from longalign.vlm.store import StoredAnswers

KEY = "sk-very-secret"


def endpoint(url, **settings):
    values = {"model": "judge-1", "backoff": 0.0, "timeout": 20.0, **settings}
    return EndpointConfig(base_url=url, **values).build(Runtime())


def request(text="Is it red?", value=0.5, options=("yes", "no")):
    return Request(text, (HashedImage.of(torch.full((3, 4, 6), value)),), options)


def answer(vlm, *requests):
    answers = dict(vlm.answers(requests))
    return [answers[i] for i in range(len(requests))]


def failing_first(status):
    """The question ``fails`` gets a failure; the others get yes, after that."""
    failed = threading.Event()

    def respond(number, body):
        if question_of(body) == "fails":
            failed.set()
            return failure(status)
        failed.wait(60)
        return reply("yes")

    return respond


def test_request_has_model_parameters_question_and_png(monkeypatch):
    monkeypatch.setenv("VLM_KEY", KEY)
    with chat_server(lambda number, body: reply("Yes.")) as server:
        vlm = endpoint(server.url, api_key_env="VLM_KEY", parameters={"temperature": 0.5})
        assert answer(vlm, request(value=1.0)) == ["yes"]
    [(path, headers, body)] = server.requests
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["temperature"], question_of(body)) == ("judge-1", 0.5, "Is it red?")
    [image] = images_of(body)
    assert image.shape == (4, 6, 3) and (image == 255).all()


def test_no_key_is_sent_by_default():
    with chat_server(lambda number, body: reply("no")) as server:
        assert answer(endpoint(server.url), request()) == ["no"]
    assert "Authorization" not in server.requests[0][1]


def test_answers_belong_to_their_requests():
    with chat_server(lambda number, body: reply("yes" if "even" in question_of(body) else "no")) as server:
        requests = [request(f"{i} is {'odd' if i % 2 else 'even'}") for i in range(20)]
        assert answer(endpoint(server.url, concurrency=5), *requests) == ["yes", "no"] * 10


@pytest.mark.parametrize("bad", [failure(503), failure(429), (200, b"<html>", {}), (200, b'{"choices": []}', {})])
def test_failed_request_is_repeated(bad):
    with chat_server(lambda number, body: bad if number < 3 else reply("yes")) as server:
        assert answer(endpoint(server.url, attempts=3), request()) == ["yes"]
    assert len(server.requests) == 3


def test_attempts_are_limited():
    message = r"/v1/chat.* 2 .*500.*out of memory.*'judge-1'"
    with (
        chat_server(lambda number, body: failure(500, "out of memory")) as server,
        pytest.raises(EndpointError, match=message),
    ):
        answer(endpoint(server.url, attempts=2), request())
    assert len(server.requests) == 2


class Pauses(threading.Event):
    """Records the pauses instead of waiting; is set after ``limit`` of them."""

    def __init__(self, limit=100):
        super().__init__()
        self.seconds, self.limit = [], limit

    def wait(self, timeout=None):
        self.seconds.append(timeout)
        return len(self.seconds) >= self.limit


def test_wait_doubles_and_respects_retry_after():
    pauses = Pauses()
    headers = {2: {"Retry-After": "7"}, 3: {"Retry-After": "100000"}, 4: {"Retry-After": "soon"}}
    with (
        chat_server(lambda number, body: failure(429, **headers.get(number, {}))) as server,
        pytest.raises(EndpointError),
    ):
        endpoint(server.url, attempts=5, backoff=0.5).reply(request(), pauses)
    assert pauses.seconds == [0.5, 7.0, 60.0, 4.0]


def test_no_further_attempt_after_stop():
    with chat_server(lambda number, body: failure(503)) as server, pytest.raises(EndpointError):
        endpoint(server.url, attempts=5).reply(request(), Pauses(limit=2))
    assert len(server.requests) == 2


def test_interrupt_stops_further_attempts():
    """The other request fails and would be repeated after a long pause."""
    with chat_server(failing_first(503)) as server:
        answers = endpoint(server.url, concurrency=2, backoff=3600.0).answers([request("fails"), request("works")])
        assert next(answers) == (1, "yes")
        answers.close()
    assert len(server.requests) == 2


@pytest.mark.parametrize("status", [400, 401, 404, 302])
def test_rejected_request_is_not_repeated(status):
    with (
        chat_server(lambda number, body: failure(status, "no such model", Location="/other")) as server,
        pytest.raises(EndpointError, match=rf"{status}.*no such model"),
    ):
        answer(endpoint(server.url), request())
    assert len(server.requests) == 1


def test_key_is_not_in_messages(monkeypatch):
    monkeypatch.setenv("VLM_KEY", KEY)
    with (
        chat_server(lambda number, body: failure(401, f"Incorrect API key: {KEY}")) as server,
        pytest.raises(EndpointError, match=r"401.*\*\*\*") as error,
    ):
        answer(endpoint(server.url, api_key_env="VLM_KEY"), request())
    assert KEY not in str(error.value)


def test_slow_endpoint_times_out():
    release = threading.Event()

    def respond(number, body):
        release.wait(60)
        return reply("yes")

    with chat_server(respond) as server:
        try:
            with pytest.raises(EndpointError, match=r" 2 .*timed out"):
                answer(endpoint(server.url, attempts=2, timeout=0.05), request())
        finally:
            release.set()


def test_unreachable_endpoint_keeps_stored_answers(tmp_path):
    """A rerun sends only what has no answer."""
    with chat_server(lambda number, body: reply("yes") if number < 3 else failure(500)) as server:
        vlm = endpoint(server.url, attempts=1, concurrency=1)
        requests = [request(f"question {i}") for i in range(4)]
        with pytest.raises(EndpointError):
            StoredAnswers(vlm, tmp_path).ask(requests)
    with pytest.raises(EndpointError, match=server.url):  # the server is down
        StoredAnswers(vlm, tmp_path).ask(requests)
    assert StoredAnswers(vlm, tmp_path).ask(requests[:2]) == ["yes", "yes"]


def test_answers_of_running_requests_survive_a_failure(tmp_path):
    with chat_server(failing_first(400)) as server:
        store = StoredAnswers(endpoint(server.url, concurrency=2), tmp_path)
        with pytest.raises(EndpointError):
            store.ask([request("slow"), request("fails")])
        assert store.ask([request("slow")]) == ["yes"]


def test_port_without_server():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(EndpointError, match=f"127.0.0.1:{port}"):
        answer(endpoint(f"http://127.0.0.1:{port}/v1", attempts=2), request())
