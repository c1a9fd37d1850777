"""Whose prompt length it is: that of a block, of what runs in it, and of threads started in it."""

import asyncio
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import TextIteratorStreamer

from hf_models import BLOCK, SPARSE, enable, relative_error, tiny_model, tokens
from stem_attn.integrations import hf
from stem_attn.integrations.hf import told
from tiny_model import tokenizer

CHUNK = 3 * BLOCK


@pytest.fixture
def model():
    return enable(tiny_model("llama"), SPARSE)


def logits(model, length, seed=1):
    """Logits of a prompt in chunks."""
    ids, cache, parts = tokens(1, length, seed), None, []
    with torch.no_grad():
        for part in ids.split(CHUNK, dim=1):
            result = model(part, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            parts.append(result.logits)
    return torch.cat(parts, 1)


def one_pass(model, length, seed=1):
    with torch.no_grad():
        return model(tokens(1, length, seed)).logits


def in_thread(function, *args):
    """Start a thread here; return it and where its result will be."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*args)))
    thread.start()
    return thread, results


def run_in_thread(function, *args):
    thread, results = in_thread(function, *args)
    thread.join()
    return results[0]


@pytest.fixture(autouse=True)
def _nothing_is_left():
    start = threading.Thread.start
    yield
    assert threading.Thread.start is start
    assert told._open_here() == ()


def unknown(model):
    return hf.stats(model).unknown_prompt_len


def test_a_thread_started_in_the_block_sees_its_length(model):
    expected = one_pass(model, 300)
    with hf.prompt_length(model, 300):
        assert relative_error(run_in_thread(logits, model, 300), expected) < 1e-5
        nested = run_in_thread(run_in_thread, logits, model, 300)  # a thread of a thread
    assert relative_error(nested, expected) < 1e-5
    assert unknown(model) == 0


def test_generate_streams_from_a_thread(model):
    ids, pieces = tokens(1, 300), []
    options = {"max_new_tokens": 4, "do_sample": False, "prefill_chunk_size": CHUNK}
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    hf.reset_stats(model)
    streamer = TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=60)
    with hf.prompt_length(model, 300):
        thread = threading.Thread(target=model.generate, args=(ids,), kwargs={**options, "streamer": streamer})
        thread.start()
        pieces += list(streamer)
        thread.join()
    assert "".join(pieces) == tokenizer().decode(expected[0, 300:])
    assert unknown(model) == 0


def test_a_thread_keeps_the_length_for_its_first_prompt_after_the_block(model):
    expected, go = one_pass(model, 300), threading.Event()

    def late():
        go.wait()
        return logits(model, 300), logits(model, 200)

    with hf.prompt_length(model, 300):
        thread, results = in_thread(late)
    go.set()
    thread.join()
    assert relative_error(results[0][0], expected) < 1e-5
    assert unknown(model) == 2 * 3  # of the second prompt, whose first chunk has no prefix and whose last is short


def test_other_threads_see_nothing(model):
    inside, done = threading.Event(), threading.Event()

    def other():
        inside.wait()
        result = logits(model, 400)  # longer than what the block says
        done.set()
        return result

    thread, results = in_thread(other)
    with hf.prompt_length(model, 300):
        inside.set()
        done.wait()
        mine = logits(model, 300)
    thread.join()
    assert unknown(model) == 2 * 8
    assert relative_error(results[0], logits(model, 400)) < 1e-6
    assert relative_error(mine, one_pass(model, 300)) < 1e-5


def test_a_thread_that_another_thread_starts_meanwhile_sees_nothing(model):
    """A server's accepting thread starts one a request."""
    requests, inside, done = [], threading.Event(), threading.Event()

    def accept():
        inside.wait()
        requests.append(run_in_thread(logits, model, 400))
        done.set()

    acceptor, _ = in_thread(accept)
    with hf.prompt_length(model, 300):
        inside.set()
        done.wait()
    acceptor.join()
    assert unknown(model) == 2 * 8
    assert len(requests) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_eight_threads_of_six_requests(model, streaming):
    lengths = {(worker, i): 100 + 37 * worker + 11 * i for worker in range(8) for i in range(6)}
    expected = {job: one_pass(model, n, seed=n) for job, n in lengths.items()}
    hf.reset_stats(model)
    errors = {}

    def serve(worker):
        for i in range(6):
            n = lengths[worker, i]
            with hf.prompt_length(model, n):
                run = run_in_thread if streaming else lambda function, *args: function(*args)
                errors[worker, i] = relative_error(run(logits, model, n, n), expected[worker, i])

    threads = [threading.Thread(target=serve, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(errors) == set(lengths)
    assert max(errors.values()) < 1e-5
    stats = hf.stats(model)
    assert stats.unknown_prompt_len == 0
    assert stats.calls == stats.sparse == sum(2 * -(-n // CHUNK) for n in lengths.values())
    assert stats.tokens["sparse"] == 2 * sum(lengths.values())


def test_a_pool_keeps_no_length_and_takes_a_context(model):
    with ThreadPoolExecutor(1) as pool:
        with hf.prompt_length(model, 200):  # the pool starts its worker here
            pool.submit(logits, model, 200).result()
        assert unknown(model) == 0
        pool.submit(logits, model, 300).result()  # longer, and nobody's
        assert unknown(model) == 2 * 5
        hf.reset_stats(model)
        with hf.prompt_length(model, 300):
            result = pool.submit(contextvars.copy_context().run, logits, model, 300).result()
        assert relative_error(result, one_pass(model, 300)) < 1e-5
        assert unknown(model) == 0


def test_async_tasks_have_lengths_of_their_own(model):
    async def request(n):
        with hf.prompt_length(model, n):
            await asyncio.sleep(0)  # others open their blocks now
            return await asyncio.to_thread(logits, model, n, n)

    async def serve():
        return await asyncio.gather(*map(request, (300, 200, 250)))

    for n, result in zip((300, 200, 250), asyncio.run(serve()), strict=True):
        assert relative_error(result, one_pass(model, n, seed=n)) < 1e-5
    assert unknown(model) == 0


def streamed(model, length):
    """A generator that streams from a thread, as servers drive them."""
    with hf.prompt_length(model, length):
        thread, results = in_thread(logits, model, length)
        yield
        thread.join()
        yield results[0]


@pytest.mark.parametrize("contexts", ["one", "many"])
def test_blocks_may_close_in_any_order_and_in_any_context(model, contexts):
    def step(part):
        return next(part, None) if contexts == "one" else contextvars.copy_context().run(next, part, None)

    parts = {n: streamed(model, n) for n in (300, 200)}
    for part in parts.values():
        step(part)
    results = {n: step(part) for n, part in parts.items()}
    for part in parts.values():  # the outer one first
        assert step(part) is None
    for n, result in results.items():
        assert relative_error(result, one_pass(model, n)) < 1e-5
    hf.reset_stats(model)
    logits(model, 400)
    assert unknown(model) == 2 * 8


def test_blocks_nest_and_lengths_of_models_are_apart(model):
    other = enable(tiny_model("llama"), SPARSE)
    with hf.prompt_length(model, 300), hf.prompt_length(other, 200):
        with hf.prompt_length(model, 250):
            assert relative_error(logits(model, 250), one_pass(model, 250)) < 1e-5
        assert relative_error(logits(model, 300), one_pass(model, 300)) < 1e-5
        assert relative_error(logits(other, 200), one_pass(other, 200)) < 1e-5
        with pytest.raises(ValueError, match=r"prompt_len says \[300\] tokens, but the prompt already has \[400\]"):
            one_pass(model, 400)
    assert unknown(model) == unknown(other) == 0


def test_an_error_in_the_block_leaves_nothing(model):
    with pytest.raises(RuntimeError, match="stop"), hf.prompt_length(model, 100):
        raise RuntimeError("stop")
    logits(model, 300)
    assert unknown(model) == 2 * 5


def test_what_others_put_over_the_start_of_threads_stays(model):
    plain = threading.Thread.start
    with hf.prompt_length(model, 300):
        ours = threading.Thread.start

        def theirs(thread):
            ours(thread)

        threading.Thread.start = theirs
    try:
        assert threading.Thread.start is theirs
        run_in_thread(logits, model, 300)
        assert unknown(model) == 2 * 5
        with hf.prompt_length(model, 300):
            run_in_thread(logits, model, 300)
        assert unknown(model) == 2 * 5
        assert threading.Thread.start is theirs
    finally:
        threading.Thread.start = plain
