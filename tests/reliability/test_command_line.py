"""Random command lines: each is a valid call, or exits with one message and status 2.

`pytest tests/reliability/test_command_line.py -m reliability` runs the long form; the test suite runs a short form.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longalign.cli.main import COMMANDS, command_module, command_parser, main

OPTIONS = sorted({name for command in COMMANDS for name in command_parser(command).option_names} | {"--version"})
WORDS = st.one_of(
    st.sampled_from(sorted(COMMANDS)),
    st.sampled_from(OPTIONS),
    st.sampled_from(
        ["run.yaml", "loop.lr=1e-4", "a=b", "cpu", "512", "3x4", "1e-4", "--", "-", "--lr", "--loop.lr=1", ""]
    ),
    st.text(max_size=8),
    st.builds("--{}={}".format, st.text(max_size=5), st.text(max_size=5)),
)


def check(words, monkeypatch, capsys):
    """Parses a command line; the commands are replaced by functions that record their calls."""
    calls = []
    for name in COMMANDS:
        monkeypatch.setattr(command_module(name), "run", lambda args: calls.append(args) or 0)
    try:
        status = main(words)
    except SystemExit as stop:
        status = stop.code
        printed = capsys.readouterr()
        assert status == 0 or (status == 2 and "error: " in printed.err and "usage: " in printed.err), words
        assert not calls
    else:
        assert status == 0 and len(calls) == 1, words
        assert calls[0].command in words


def run(examples):
    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(words=st.lists(WORDS, max_size=8))
    def attack(monkeypatch, capsys, words):
        check(words, monkeypatch, capsys)

    return attack


def test_cli_random_arguments(monkeypatch, capsys):
    run(150)(monkeypatch=monkeypatch, capsys=capsys)


@pytest.mark.reliability
def test_cli_many_random_arguments(monkeypatch, capsys):
    run(5000)(monkeypatch=monkeypatch, capsys=capsys)
