"""The load test without vLLM: two stand-ins answer over HTTP as its servers do."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import pytest

import tiny_model
from stem_attn import cli
from stem_attn.lab.load.client import Answer, Request, Server
from stem_attn.lab.load.report import summary
from stem_attn.lab.load.run import SERVERS, Prompts, Search, differing, goodput, told

LIKELY = {7: -0.5, 8: -0.6, 9: -3.0}


class StandIn(BaseHTTPRequestHandler):
    """Answers `tokens` times the token 7, after a time that grows with the prompt."""

    seconds_a_token = 1e-5
    cut_from = 10**9  # answers of longer prompts end early
    takes = 10**9  # longer prompts are refused
    tells_ids = True

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
        if len(asked["prompt"]) > self.takes:
            self._send("too long", 400)
            return
        time.sleep(self.seconds_a_token * len(asked["prompt"]))
        count = asked["max_tokens"] if len(asked["prompt"]) < self.cut_from else 1
        events = []
        for n in range(count):
            reason = "length" if n + 1 == count else None
            ids = {"token_ids": [7]} if asked["return_token_ids"] and self.tells_ids else {}
            events.append({"choices": [{"text": "x", "finish_reason": reason, **ids}]})
        events.append({"choices": [], "usage": {"completion_tokens": count}})
        self._send("".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n")

    def _send(self, text, status=200):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())


@contextmanager
def serving(*kinds):
    """Start stand-ins, each with some attributes of its own; their addresses."""
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), type("Kind", (StandIn,), kind)) for kind in kinds]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield [f"http://127.0.0.1:{server.server_port}" for server in servers]
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def urls():
    """A slow stand-in, and a faster one that cuts long prompts' answers."""
    with serving({}, {"seconds_a_token": 5e-6, "cut_from": 500}) as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.save(str(tmp_path_factory.mktemp("tiny")))


def test_both_servers_get_the_same_load_and_what_is_lost_is_told(urls, folder, tmp_path, capsys):
    arguments = ["--dense", urls[0], "--stem", urls[1], "--model", folder, "--lengths", "100,1000", "--tokens", "2,5"]
    arguments += ["--seconds", "0.1", "--trials", "2", "--burst", "4", "--short", "6", "--short-seconds", "0.2"]
    assert cli.run(["load", *arguments, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "load.json").read_text())
    assert found["command"] == "load"
    unloaded, *rates, short = found["records"]
    assert unloaded["limit"] == 3 * sorted(one["dense"] for one in unloaded["first_token_seconds"])[1]
    searched = [rate for rate in rates if rate["kind"] == "search"]
    kinds = ["unloaded", "search", "search", "rate", "short"]
    if goodput(searched, "dense") is None:  # on a machine that is busy
        kinds.remove("rate")
    assert [record["kind"] for record in found["records"]] == kinds
    capacity = unloaded["requests_a_second"]
    first, second = (trial["requests_a_second"] for trial in searched)
    for name in SERVERS:
        assert first[name] == pytest.approx(capacity[name] * (0.5 * 1.5) ** 0.5)
        grew = second[name] > first[name]
        assert grew == (searched[0][name]["within_limit"] >= 0.99)
        assert second[name] / first[name] == pytest.approx(3 ** (0.25 if grew else -0.25))
    for rate in rates:
        assert rate["dense"]["requests"] == rate["stem"]["requests"] == max(1, round(0.1 * capacity["dense"]))
        assert rate["dense"]["lost"] == []
        for name in SERVERS:
            due, lengths, _, _ = zip(*rate[name]["samples"], strict=True)
            assert len(due) == rate[name]["requests"]
            assert list(due) == sorted(due)
            assert min(lengths) >= 100
            assert max(lengths) <= 1000
        within = [first <= unloaded["limit"] for _, _, first, _ in rate["dense"]["samples"]]
        assert sum(within) / len(within) == pytest.approx(rate["dense"]["within_limit"], abs=1 / len(within))
        assert [a[1] for a in rate["dense"]["samples"]] == [b[1] for b in rate["stem"]["samples"]]
        assert rate["dense"]["first_token_seconds"]["p50"] >= 100 * StandIn.seconds_a_token
        nothing = (
            len(rate["stem"]["lost"]) == rate["stem"]["requests"]
        )  # how many there are follows the machine's speed
        assert (rate["stem"]["first_token_seconds"]["p50"] is None) == nothing
    for rate in rates[len(searched) :]:
        assert rate["requests_a_second"] == dict.fromkeys(SERVERS, goodput(searched, "dense"))
    lost = [reason for rate in rates for reason in rate["stem"]["lost"]]
    assert lost
    assert set(lost) <= {f"1 of {n} tokens, length" for n in range(2, 6)}
    assert short["differ"] == {"compared": 6 - len(short["stem"]["lost"]), "differ": 0, "by_more_than_rounding": 0}
    assert short["dense_from_itself"] == {"compared": 6, "differ": 0, "by_more_than_rounding": 0}
    said = capsys.readouterr().out
    assert len(said.splitlines()) == len(kinds) + 1
    assert "asked again, the dense server differs from itself in 0 of 6, 0 by more" in said


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


def test_another_rate_is_the_same_but_for_the_pace_and_the_texts(folder):
    from transformers import AutoTokenizer

    prompts = Prompts(AutoTokenizer.from_pretrained(folder), 0)
    slow, fast = prompts.requests(20, 1.0, (100, 200), (1, 9)), prompts.requests(30, 2.0, (100, 200), (1, 9))
    assert [a.at for a in slow] == pytest.approx([2 * b.at for b in fast[:20]])
    assert [(len(a.ids), a.tokens) for a in slow] == [(len(b.ids), b.tokens) for b in fast[:20]]
    assert not any(a.ids == b.ids for a, b in zip(slow, fast, strict=False))  # which a cache of prefixes would know


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
    found = differing(Dense(), requests, [theirs] * 2, [same, ours])
    assert found == {"compared": 2, "differ": 1, "by_more_than_rounding": wrong}


def test_goodput_is_the_highest_rate_with_enough_in_time():
    records = [{"kind": "unloaded"}] + [
        {"kind": "search", "requests_a_second": {"dense": rate}, "dense": {"within_limit": share}}
        for rate, share in ((1.0, 1.0), (2.0, 0.99), (3.0, 0.98))
    ]
    assert goodput(records, "dense") == 2.0
    assert goodput(records[-1:], "dense") is None


@pytest.mark.parametrize("stands", [0.45, 0.7, 1.0])
def test_six_trials_find_what_a_server_stands_within_two_percent(stands):
    search = Search(0.4, 1.2)
    for _ in range(6):
        search.tell(search.rate <= stands)
    assert stands / 1.02 < search.best <= stands


def test_a_server_that_stands_no_rate_has_no_goodput():
    search = Search(1.0, 4.0)
    rates = []
    for _ in range(3):
        rates.append(search.rate)
        search.tell(False)
    assert search.best is None
    assert rates == pytest.approx([2.0, 2**0.5, 2**0.25])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lengths", "10"], "--lengths takes two rising numbers, got '10'"),
        (["--tokens", "5,2"], "--tokens takes two rising numbers, got '5,2'"),
        (["--tokens", "a"], "--tokens takes positive whole numbers separated by commas, such as 4096,8192; got 'a'"),
        (["--seconds", "inf"], "--seconds takes a finite number, got inf"),
        (["--short-seconds", "0"], "--short-seconds takes a number above 0, got 0"),
        (["--dense", "127.0.0.1:1"], "a server's address is http://HOST:PORT, got '127.0.0.1:1'"),
        (["--dense", "https://127.0.0.1:1"], "a server's address is http://HOST:PORT, got 'https://127.0.0.1:1'"),
        ([], "no server with /v1/models at http://127.0.0.1:1"),
    ],
)
def test_wrong_options_end_in_one_line(arguments, said, tmp_path, capsys):
    out = tmp_path / "out"
    nobody = ["--dense", "http://127.0.0.1:1", "--stem", "http://127.0.0.1:1", "--model", "m", "--out", str(out)]
    assert cli.run(["load", *nobody, *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_a_model_without_a_tokenizer_is_told(urls, tmp_path, capsys):
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    arguments = ["--dense", urls[0], "--stem", urls[1], "--model", str(nothing), "--out", str(tmp_path)]
    assert cli.run(["load", *arguments]) == 2
    assert str(nothing) in capsys.readouterr().err
    assert not (tmp_path / "load.json").exists()


def test_a_server_that_refuses_the_longest_prompt_is_told_before_any_load(folder, tmp_path, capsys):
    with serving({}, {"takes": 500}) as (dense, stem):
        arguments = ["--dense", dense, "--stem", stem, "--model", folder, "--lengths", "100,1000", "--tokens", "2,5"]
        assert cli.run(["load", *arguments, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "--stem: none of 1 requests was answered; the first: HTTP 400: too long" in said
    assert not (tmp_path / "load.json").exists()


def test_answers_whose_tokens_are_not_told_are_not_compared():
    with serving({"tells_ids": False}) as (url,):
        requests = [Request(0.0, [1, 2], 3)]
        (blind,) = Server(url).replay(requests, with_ids=True)
        assert blind.error == "3 tokens, and the ids of 0"
        assert differing(Server(url), requests, [blind], [blind])["compared"] == 0
        (timed,) = Server(url).replay(requests, with_ids=False)
        assert timed.error is None


def test_stem_may_lose_all_where_dense_is_best_and_a_run_may_be_cut():
    good = {"within_limit": 1.0, "first_token_seconds": {"p99": 0.5}}
    lost = {"within_limit": 0.0, "first_token_seconds": {"p99": None}}
    trial = {"kind": "search", "requests_a_second": {"dense": 2.0, "stem": 3.0}, "dense": good, "stem": good}
    assert summary([trial]) == "goodput: 2.00 and 3.00 requests/s, ratio 1.50"
    rate = {"kind": "rate", "requests_a_second": {"dense": 2.0, "stem": 2.0}, "dense": good, "stem": good}
    said = "at the dense server's, first token p99 0.500 and 0.500 s, ratio 1.00"
    assert summary([trial, rate]) == f"goodput: 2.00 and 3.00 requests/s, ratio 1.50; {said}"
    assert summary([trial, {**rate, "stem": lost}]).endswith("at the dense server's, one answers nothing")
    assert summary([{**trial, "stem": lost}]) == "goodput: 2.0 and None requests/s"
