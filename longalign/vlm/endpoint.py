"""Vision-language models behind an OpenAI-compatible HTTP endpoint, called with Python's standard library."""

from __future__ import annotations

import json
import os
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from http.client import HTTPException
from threading import Event
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, build_opener
from urllib.request import Request as HTTPRequest

from longalign.runtime import Runtime
from longalign.vlm.base import VLM, Request, option_in
from longalign.vlm.config import EndpointConfig

#: HTTP status codes after which a request is repeated: timeouts, rate limits, server errors
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
#: maximum number of seconds to wait for a ``Retry-After`` of the endpoint; longer values are reduced
MAX_WAIT = 60.0
#: maximum number of bytes that are read from a response
MAX_BYTES = 1_000_000


class EndpointError(OSError):
    """Raised if an endpoint rejected a request, or all attempts failed."""


class _NoRedirect(HTTPRedirectHandler):
    """Reports redirects as errors: urllib would send the API key to the new host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class EndpointVLM(VLM):
    """A vision-language model behind an OpenAI-compatible HTTP endpoint.

    Args:
        base_url: URL without ``/chat/completions``, e.g. ``http://localhost:8000/v1``.
        model: name of the model at the endpoint.
        api_key: the API key, or None to send none. It is sent to the endpoint only, and replaced by ``***`` in
            messages.
        parameters: further fields of the JSON body of each request, e.g. ``{"temperature": 0}``.
        timeout: seconds without data from the endpoint after which an attempt has failed.
        attempts: maximum number of attempts per request.
        backoff: seconds to wait before the second attempt; doubled before each further attempt.
        concurrency: maximum number of requests that are sent at the same time.
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        api_key: str | None,
        parameters: Mapping[str, Any],
        timeout: float,
        attempts: int,
        backoff: float,
        concurrency: int,
    ):
        super().__init__()
        self.url, self.model, self.fields = f"{base_url}/chat/completions", model, dict(parameters)
        self.timeout, self.attempts, self.backoff, self.concurrency = timeout, attempts, backoff, concurrency
        self.identity = json.dumps(["endpoint", base_url, model, self.fields], sort_keys=True)
        self._key = api_key
        self._opener = build_opener(_NoRedirect)

    @classmethod
    def from_config(cls, config: EndpointConfig, runtime: Runtime) -> EndpointVLM:
        """Builds the model with the API key from the environment variable ``config.api_key_env``. Sends nothing.

        If ``config.api_key_env`` is None, the model sends no key.

        Raises:
            ValueError: if the environment variable is not set, or contains other characters than printable ASCII.
        """
        for key, problem in config.check_files():
            raise ValueError(f"{key}: {problem}")
        values = config.model_dump(exclude={"api_key_env"})
        api_key = os.environ[config.api_key_env].strip() if config.api_key_env else None
        return cls(api_key=api_key, **values)

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[int, str | None]]:
        """Yields ``(i, answer)`` for each request ``requests[i]``, as the answers arrive.

        After a failure no further request is sent; answers to requests already sent are yielded before the error.

        Raises:
            EndpointError: if the endpoint rejected a request, or all attempts of a request failed.
        """
        waiting = iter(enumerate(requests))
        running: dict[Future[str], int] = {}
        error: EndpointError | None = None
        stop = Event()
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                while True:
                    while error is None and len(running) < self.concurrency and (job := next(waiting, None)):
                        running[pool.submit(self.reply, job[1], stop)] = job[0]
                    if not running:
                        break
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        index = running.pop(future)
                        try:
                            reply = future.result()
                        except EndpointError as failure:
                            error = error or failure
                        else:
                            yield index, option_in(reply, requests[index].options)
            finally:
                stop.set()  # an interrupt does not wait for further attempts
        if error is not None:
            raise error

    def reply(self, request: Request, stop: Event) -> str:
        """Returns the text of the model's reply to one request.

        A different thread can set ``stop``, so that a failed attempt is not repeated.

        Raises:
            EndpointError: if the endpoint rejected the request, every attempt failed, or an attempt failed after
                ``stop`` was set.
        """
        body = json.dumps({**self.fields, "model": self.model, "messages": [_message(request)]}).encode()
        problem, attempt = "", 0
        for attempt in range(self.attempts):
            try:
                return self._post(body)
            except HTTPError as error:
                problem, pause = self._http_problem(error)
                if error.code not in RETRIED:
                    raise self._failure(f"rejected the request: {problem}") from None
            except (OSError, HTTPException, ValueError) as error:  # no connection, a timeout, no valid response
                problem, pause = self._redacted(str(error) or type(error).__name__), 0.0
            if attempt + 1 == self.attempts or stop.wait(max(self.backoff * 2**attempt, pause)):
                break
        raise self._failure(f"failed {attempt + 1} times; last error: {problem}")

    def _post(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json", "User-Agent": "longalign"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        with self._opener.open(HTTPRequest(self.url, body, headers), timeout=self.timeout) as response:
            content = response.read(MAX_BYTES)
        try:
            text = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str):
            shown = content[:200].decode(errors="replace")
            raise ValueError(f"expected a chat completion with choices[0].message.content, got {shown!r}")
        return text

    def _http_problem(self, error: HTTPError) -> tuple[str, float]:
        """Returns a description of an HTTP error, and the seconds to wait: ``Retry-After`` up to `MAX_WAIT`, or 0."""
        with error:
            try:
                body = error.read(1000).decode(errors="replace")
            except (OSError, HTTPException):
                body = ""
        after = error.headers.get("Retry-After", "") if error.headers else ""
        pause = min(float(after), MAX_WAIT) if after.isdecimal() else 0.0
        return self._redacted(f"HTTP {error.code} {error.reason} {body.strip()[:300]}").strip(), pause

    def _redacted(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _failure(self, problem: str) -> EndpointError:
        return EndpointError(
            f"the endpoint {self.url} {problem}. Check that it runs and serves the model '{self.model}', then run the "
            "command again: answers so far are stored and not requested again"
        )


def _message(request: Request) -> dict[str, Any]:
    urls = [f"data:image/png;base64,{b64encode(image.png).decode()}" for image in request.images]
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*images, {"type": "text", "text": request.text}]}
