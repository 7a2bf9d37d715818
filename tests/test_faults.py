"""Kills and damaged files: a small sample of tests/faults.py, in a process of its own, which forks."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_kills_and_damaged_files_change_no_result():
    program = Path(__file__).with_name("faults.py")
    done = subprocess.run([sys.executable, program, "20"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "20 kills, 0 wrong; 20 damaged files" in done.stdout
