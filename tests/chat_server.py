"""An OpenAI-compatible endpoint on localhost, whose replies a test scripts."""

import json
import os
import threading
from base64 import b64decode
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from unittest import mock

import numpy as np
from PIL import Image


class ChatServer:
    """Attributes: ``url``, and ``requests``, the received ``(path, headers, body)``."""

    def __init__(self, respond):
        self.requests = []
        server = self
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.requests.append((self.path, dict(self.headers), body))
                    number = len(server.requests)
                status, content, headers = respond(number, body)
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:  # the client has given up
                    pass

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@contextmanager
def chat_server(respond):
    """Runs a server in a thread. ``respond(number, body)`` gives ``(status, content, headers)``; see `reply`."""
    server = ChatServer(respond)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        with mock.patch.dict(os.environ, {"no_proxy": "127.0.0.1"}):
            yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()


def reply(text):
    """A chat completion."""
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode(), {}


def failure(status, text="", **headers):
    return status, text.encode(), headers


def question_of(body):
    return body["messages"][0]["content"][-1]["text"]


def images_of(body):
    """The images of a request as arrays ``(h, w, 3)``."""
    urls = [part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url"]
    return [np.array(Image.open(BytesIO(b64decode(url.removeprefix("data:image/png;base64,"))))) for url in urls]
