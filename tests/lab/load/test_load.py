"""The load test without vLLM: two stand-ins answer over HTTP as its servers do."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import pytest

import tiny_model
from stem_attn import cli
from stem_attn.lab.load.client import Answer, Request
from stem_attn.lab.load.run import Prompts, differing, goodput, told

LIKELY = {7: -0.5, 8: -0.6, 9: -3.0}


class StandIn(BaseHTTPRequestHandler):
    """Answers `tokens` times the token 7, after a time that grows with the prompt."""

    seconds_a_token = 1e-5
    cut_from = 10**9  # answers of longer prompts end early

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._send(json.dumps({"data": [{"id": "tiny"}]}))

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["model"] == "tiny"
        if "logprobs" in asked:
            top = {f"token_id:{token}": value for token, value in LIKELY.items()}
            self._send(json.dumps({"choices": [{"logprobs": {"top_logprobs": [top]}}]}))
            return
        time.sleep(self.seconds_a_token * len(asked["prompt"]))
        count = asked["max_tokens"] if len(asked["prompt"]) < self.cut_from else 1
        events = []
        for n in range(count):
            reason = "length" if n + 1 == count else None
            ids = {"token_ids": [7]} if asked["return_token_ids"] else {}
            events.append({"choices": [{"text": "x", "finish_reason": reason, **ids}]})
        events.append({"choices": [], "usage": {"completion_tokens": count}})
        self._send("".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n")

    def _send(self, text):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def urls():
    """A slow stand-in, and a faster one that cuts long prompts' answers."""
    slow = type("Slow", (StandIn,), {})
    fast = type("Fast", (StandIn,), {"seconds_a_token": 5e-6, "cut_from": 500})
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for handler in (slow, fast)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield [f"http://127.0.0.1:{server.server_port}" for server in servers]
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.save(str(tmp_path_factory.mktemp("tiny")))


def test_both_servers_get_the_same_load_and_what_is_lost_is_told(urls, folder, tmp_path, capsys):
    arguments = ["--dense", urls[0], "--stem", urls[1], "--model", folder, "--lengths", "100,1000", "--tokens", "2,5"]
    arguments += ["--seconds", "0.1", "--percents", "20,40", "--burst", "4", "--short", "6", "--short-seconds", "0.2"]
    assert cli.run(["load", *arguments, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "load.json").read_text())
    assert found["command"] == "load"
    unloaded, *rates, short = found["records"]
    assert [record["kind"] for record in found["records"]] == ["unloaded", "rate", "rate", "short"]
    assert unloaded["limit"] == 3 * sorted(one["dense"] for one in unloaded["first_token_seconds"])[1]
    assert [rate["share"] for rate in rates] == [0.2, 0.4]
    for rate in rates:
        assert rate["requests_a_second"] == rate["share"] * unloaded["requests_a_second"]["dense"]
        assert rate["dense"]["requests"] == rate["stem"]["requests"] == max(1, round(0.1 * rate["requests_a_second"]))
        assert rate["dense"]["lost"] == []
        assert 0 < rate["stem"]["first_token_seconds"]["p50"] < rate["dense"]["first_token_seconds"]["p50"]
    lost = [reason for rate in rates for reason in rate["stem"]["lost"]]
    assert lost
    assert set(lost) <= {f"1 of {n} tokens, length" for n in range(2, 6)}
    assert short["differ"] == {"compared": 6 - len(short["stem"]["lost"]), "differ": 0, "by_more_than_rounding": 0}
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_arrivals_are_a_poisson_process_and_prompts_have_the_lengths(folder):
    from transformers import AutoTokenizer

    made = Prompts(AutoTokenizer.from_pretrained(folder), 0).requests(2000, 5.0, (10, 20), (1, 3))
    gaps = [b.at - a.at for a, b in pairwise(made)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.2, rel=0.1)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.2)
    assert {len(request.ids) for request in made} == set(range(10, 21))
    assert {request.tokens for request in made} == {1, 2, 3}
    assert made == Prompts(AutoTokenizer.from_pretrained(folder), 0).requests(2000, 5.0, (10, 20), (1, 3))


def test_an_answer_that_failed_is_outside_every_limit():
    good, bad = Answer(0.5, 1.5, 3, (), None), Answer(0.1, 0.1, 1, (), "1 of 3 tokens, None")
    found = told([good, good, good, bad], limit=1.0)
    assert found["within_limit"] == 0.75
    assert found["lost"] == ["1 of 3 tokens, None"]
    assert found["first_token_seconds"] == {"p50": 0.5, "p99": 0.5}
    assert found["next_token_seconds"] == 0.5
    assert told([bad], limit=1.0)["first_token_seconds"]["p99"] is None


@pytest.mark.parametrize(("token", "wrong"), [(8, 0), (9, 1), (3, 1)])
def test_answers_differ_by_rounding_or_by_more(token, wrong):
    class Dense:
        def likeliest(self, ids, count):
            assert ids == [1, 2, 7]
            return LIKELY

    theirs, same, ours = (Answer(0.1, 0.2, 2, ids, None) for ids in ((7, 7), (7, 7), (7, token)))
    requests = [Request(0.0, [1, 2], 2)] * 2
    found = differing(Dense(), requests, {"dense": [theirs] * 2, "stem": [same, ours]})
    assert found == {"compared": 2, "differ": 1, "by_more_than_rounding": wrong}


def test_goodput_is_the_highest_rate_with_enough_in_time():
    records = [{"kind": "unloaded"}] + [
        {"kind": "rate", "requests_a_second": rate, "dense": {"within_limit": share}}
        for rate, share in ((1.0, 1.0), (2.0, 0.99), (3.0, 0.98))
    ]
    assert goodput(records, "dense") == 2.0
    assert goodput(records[-1:], "dense") is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lengths", "10"], "--lengths takes two rising numbers, got '10'"),
        (["--tokens", "5,2"], "--tokens takes two rising numbers, got '5,2'"),
        ([], "no server with /v1/models at http://127.0.0.1:1"),
    ],
)
def test_wrong_options_end_in_one_line(arguments, said, tmp_path, capsys):
    nobody = ["--dense", "http://127.0.0.1:1", "--stem", "http://127.0.0.1:1", "--model", "m", "--out", str(tmp_path)]
    assert cli.run(["load", *nobody, *arguments]) == 2
    assert said in capsys.readouterr().err
