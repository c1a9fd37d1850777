"""examples/serve_and_ask.py, as a user runs it, on a tiny random model."""

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve_and_ask.py"


def test_the_server_answers_and_counts_sparse_tokens(folders):
    done = subprocess.run([sys.executable, str(EXAMPLE), folders("llama")], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "'sparse_tokens': " in done.stdout
    assert "'sparse_tokens': 0," not in done.stdout
