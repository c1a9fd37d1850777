"""Several devices: with everything kept, the dense server's answers; and what ranks do to the choice of blocks.

    PYTHONPATH=src:tests/serving python tests/serving/check_sizes.py --model FOLDER --out FOLDER one tp2 pp2 dp2
    PYTHONPATH=src:tests/serving python tests/serving/check_sizes.py --out FOLDER

A size is `one`, or `tp`, `pp` or `dp` (tensor, pipeline, data parallel) and a number of devices. For each, a dense
server and one with Stem stand side by side and answer the same requests, all at once: prompts of 500 to 9000 tokens of
public text, with everything kept, and sparsely. A file a size. Without sizes, the files are compared: a line each, and
exit code 1 where a token differs by more than rounding. The model's tokenizer must know the text: where all tokens are
alike, any choice of blocks is right. No test of pytest: it takes two servers a size.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from servers import server, together

from stem_attn.integrations.vllm.settings import CHOOSER

GPU = torch.cuda.is_available()
FLAGS = {"tp": "tensor_parallel_size", "pp": "pipeline_parallel_size", "dp": "data_parallel_size"}
PROMPTS, NEW_TOKENS = 16, 16
TEXTS, SEEN = 3, 2000  # prompts whose own tokens are judged, and how many of their last ones
NEAR = 0.25  # nats; what rounding may turn round
EVERYTHING = 1000  # times the budget
STEM = {"min_seq_len": 0, "crossover": False}
OPTIONS = {
    "served_model_name": "model",
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 32,
    "disable_log_stats": True,
    "no_enable_prefix_caching": True,
}
OPTIONS |= (
    {"dtype": "bfloat16", "gpu_memory_utilization": 0.02, "kv_cache_memory_bytes": 2**30, "max_model_len": 9216}
    if GPU
    else {"enforce_eager": True, "max_model_len": 2048}
)
LENGTHS = (500, 9000) if GPU else (100, 1500)


def prompts(model):
    from transformers import AutoTokenizer

    from stem_attn.lab.load.run import Prompts

    made = Prompts(AutoTokenizer.from_pretrained(model), 0)
    longest = (LENGTHS[1], LENGTHS[1])
    many = made.requests(PROMPTS, 1.0, LENGTHS, (1, 1)), made.requests(TEXTS, 1.0, longest, (1, 1))
    return [[request.ids for request in some] for some in many]


def complete(running, ids, **asked):
    body = {"model": "model", "prompt": ids, "temperature": 0, "ignore_eos": True, **asked}
    return json.loads(running.request("/v1/completions", body))["choices"][0]


def answers(running, many, **asked):
    """Tokens, and the log-probabilities of the likeliest at every place."""

    def one(ids):
        tokens = {"max_tokens": NEW_TOKENS, "logprobs": 5}
        got = complete(running, ids, **tokens, return_token_ids=True, return_tokens_as_token_ids=True, **asked)
        likely = [
            {int(name.removeprefix("token_id:")): value for name, value in row.items()}
            for row in got["logprobs"]["top_logprobs"]
        ]
        return got["token_ids"], likely

    with ThreadPoolExecutor(len(many)) as clients:
        return list(clients.map(one, many))


def judged(running, texts):
    """The log-probabilities of the prompts' own last tokens."""
    found = []
    for ids in texts:
        rows = complete(running, ids, max_tokens=1, prompt_logprobs=0)["prompt_logprobs"]
        pairs = list(zip(rows, ids, strict=True))[-SEEN:]
        found += [row[str(token)]["logprob"] for row, token in pairs if row is not None]
    return found


def differing(ours, theirs):
    """Count the answers that differ, and those whose first other token was not about as likely."""
    differ = wrong = 0
    for (got, _), (expected, likely) in zip(ours, theirs, strict=True):
        place = next((n for n, pair in enumerate(zip(got, expected, strict=True)) if pair[0] != pair[1]), None)
        if place is not None:
            row = {int(token): value for token, value in likely[place].items()}
            differ += 1
            wrong += row[expected[place]] - row.get(got[place], -float("inf")) >= NEAR
    return differ, wrong


def measure(model, size, out):
    flags = {} if size == "one" else {FLAGS[size[:2]]: int(size[2:])}
    options = {**OPTIONS, **flags}
    dense = {**options, "attention_backend": "FLASH_ATTN"} if GPU else options
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(prompts, model)  # while the servers start
        servers = together(
            server(model, out / f"{size}-dense.log", **dense),
            server(model, out / f"{size}-stem.log", STEM, logits_processors=CHOOSER, **options),
        )
        with servers as (plain, stem):
            ask(plain, stem, *made.result(), size, out)


def ask(plain, stem, many, texts, size, out):
    stem.reset_stats()  # its own warm-up is counted
    found = {
        "size": size,
        "dense": answers(plain, many),
        "everything": answers(stem, many, vllm_xargs={"stem": EVERYTHING}),
    }
    counts = stem.stats()
    assert all(one["density"] == 1 and one["sparse_tokens"] for one in counts), counts
    stem.reset_stats()
    found["dense_judged"], found["stem_judged"] = judged(plain, texts), judged(stem, texts)
    found["counts"] = stem.stats()
    (out / f"{size}.json").write_text(json.dumps(found))


def compare(out):
    """A line a size; whether nothing differs by more than rounding."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}
    one = found.get("one")
    right = True
    for size, record in found.items():
        kept = differing(record["everything"], record["dense"])
        text = f"{size:4}  everything kept: {kept[0]} of {PROMPTS} answers differ, {kept[1]} by more than rounding"
        right &= kept[1] == 0
        if one is not None and record is not one:
            ranks = differing(record["dense"], one["dense"])
            text += f"; dense, against one device: {ranks[0]}, {ranks[1]}"
        losses = [-torch.tensor(record[name]).mean() for name in ("dense_judged", "stem_judged")]
        text += f"; loss on text dense {losses[0]:.4f}, sparse {losses[1]:.4f}"
        base = (one or record)["dense_judged"]
        for name in ("dense_judged", "stem_judged"):
            off = (torch.tensor(record[name]) - torch.tensor(base)).abs().mean()
            text += f"; {name.removesuffix('_judged')} off dense on one device by {off:.4f}"
        print(text + f"; density {[round(counts['density'], 3) for counts in record['counts']]}")
    return right and bool(found)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("sizes", nargs="*")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    for size in asked.sizes:
        measure(asked.model, size, asked.out)
    if not asked.sizes:
        sys.exit(0 if compare(asked.out) else 1)


if __name__ == "__main__":
    main()
