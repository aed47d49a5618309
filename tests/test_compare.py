"""benchmarks/compare.py fails for slower rows, other values and new errors, and only for these."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "compare.py"
ROW = {"name": "x", "batch": 8, "seconds": 1.0, "sample": [1.0, 2.0]}


def compare(tmp_path, old, new, *options):
    files = []
    for name, rows in (("old", old), ("new", new)):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps({"device": "CPU", "reward": rows}))
    return subprocess.run([sys.executable, SCRIPT, *files, *options], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"seconds": 1.1}, 0, ""),
        ({"seconds": 1.2}, 1, "1.20 times"),
        ({"sample": [1.0, 2.0005]}, 0, ""),
        ({"sample": [1.0, 2.01]}, 1, "relative error 4.5e-03"),
        ({"sample": [float("nan"), 2.0]}, 1, "relative error nan"),
        ({"error": "OutOfMemoryError"}, 1, "OutOfMemoryError"),
    ],
)
def test_compare_row(tmp_path, change, status, words):
    result = compare(tmp_path, [ROW], [{**ROW, **change}])
    assert result.returncode == status and words in result.stdout, result


def test_compare_ratios_of_machines(tmp_path):
    slow = [{**ROW, "seconds": 3.0}, {**ROW, "name": "y", "seconds": 6.0}]
    fast = [ROW, {**ROW, "name": "y", "seconds": 2.0}]
    assert compare(tmp_path, fast, slow).returncode == 1
    assert compare(tmp_path, fast, slow, "--ratios").returncode == 0


def test_compare_row_without_later_settings(tmp_path):
    assert compare(tmp_path, [ROW], [{**ROW, "dropout": 0.1, "cuda_graphs": False}]).stdout == ""
    assert "no common rows" in compare(tmp_path, [ROW], [{**ROW, "dropout": 0.0}]).stderr


def test_compare_accepts_given_ratio(tmp_path):
    slower = [{**ROW, "seconds": 1.2}]
    assert compare(tmp_path, [ROW], slower, "--slower", "1.25").returncode == 0
    assert compare(tmp_path, [ROW], slower, "--slower", "1.1").returncode == 1


def test_compare_without_common_rows(tmp_path):
    result = compare(tmp_path, [ROW], [{**ROW, "batch": 4}])
    assert result.returncode == 1 and "no common rows" in result.stderr
