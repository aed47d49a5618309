"""Stores answers of vision-language models on disk, so that an interrupted run does not repeat requests."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from longalign.vlm.base import VLM, Request

FILE = "answers.jsonl"


class StoredAnswers:
    """The answers of a vision-language model, stored as soon as they arrive. No stored answer is requested again.

    The key of an answer is a hash of `VLM.identity` and of the request's text, options and images. Texts, images and
    API keys are not stored. Several processes can append to one file.

    Args:
        vlm: the vision-language model.
        folder: folder of ``answers.jsonl``, created when needed; None stores in memory only.

    Raises:
        ValueError: if a line of ``answers.jsonl`` is valid JSON, but not an answer.
    """

    def __init__(self, vlm: VLM, folder: Path | str | None):
        self.vlm = vlm
        self.path = None if folder is None else Path(folder).expanduser() / FILE
        self._answers = _read(self.path) if self.path is not None and self.path.exists() else {}

    def ask(self, requests: Sequence[Request]) -> list[str | None]:
        """Returns the answer to each request, one of its options; None where the reply contained no option.

        Only requests without a stored answer are sent; equal requests are sent once. Replies without an option are not
        stored, so the next call sends these requests again.
        """
        keys = [self.key(request) for request in requests]
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._answers}
        unread: set[str] = set()
        new_keys = list(missing)
        for i, answer in self.vlm.answers(list(missing.values())) if missing else ():
            if answer is None:
                unread.add(new_keys[i])
            else:
                self._put(new_keys[i], answer)
        return [None if key in unread else self._answers[key] for key in keys]

    def key(self, request: Request) -> str:
        """Returns the key under which the answer to a request is stored: a SHA-256 hash in hexadecimal."""
        digests = [image.digest for image in request.images]
        text = json.dumps([self.vlm.identity, request.text, request.options, digests])
        return sha256(text.encode()).hexdigest()

    def _put(self, key: str, answer: str) -> None:
        self._answers[key] = answer
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": key, "answer": answer}) + "\n"
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.lseek(descriptor, -1, os.SEEK_END) >= 0 and os.read(descriptor, 1) != b"\n":
                line = "\n" + line  # a killed process left half a line
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def _read(path: Path) -> dict[str, str]:
    """Reads the answers of a file, by key. Lines that an interrupted process left unfinished are skipped.

    Raises ValueError if a line contains something else than an answer.
    """
    answers: dict[str, str] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if not (isinstance(row, dict) and isinstance(row.get("key"), str) and isinstance(row.get("answer"), str)):
            raise ValueError(
                f"{path}, line {number}: expected an answer ('key' and 'answer'), got {line[:80]!r}; remove the line, "
                "or use a different `cache`"
            )
        answers[row["key"]] = row["answer"]
    return answers
