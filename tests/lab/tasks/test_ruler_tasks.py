"""RULER's prompts. The hashes are of prompts that NVIDIA's own generator made.

They come from NVIDIA/RULER at commit c3f5e3b with seed 42, wonderwords 3.0.1 and the tokenizer of this file. For the
essay tasks its sentence splitter was replaced by ours, and its essays by `ESSAY`.
"""

import hashlib
import re
from collections import Counter
from itertools import islice

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from stem_attn.lab.errors import InputError
from stem_attn.lab.tasks.ruler import niah, words
from stem_attn.lab.tasks.ruler.tasks import EXACT, TASKS
from stem_attn.lab.tasks.ruler.words import CompoundWords
from stem_attn.lab.tasks.samples import Frame, Request, largest_size

ESSAY = " ".join(f"Line {i} of the essay says little." for i in range(3000))
BASE = Frame()
CHAT = Frame("[INST] ", " [/INST]")

_splitter = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
_splitter.pre_tokenizer = pre_tokenizers.Whitespace()


def count_tokens(text):
    """Words and runs of punctuation."""
    return len(_splitter.encode(text).ids)


def make(task, length=4096, count=3, frame=BASE, seed=42):
    return list(islice(TASKS[task].samples(Request(length, seed, frame, count_tokens)), count))


@pytest.fixture(autouse=True)
def essay(monkeypatch):
    monkeypatch.setattr(niah, "_essay_words", ESSAY.split)


# Of the third sample, whose draws follow all of the search's and of the samples before: hash, tokens with the answer's,
# references.
GOLDEN_BASE_4096 = {
    "niah_single_1": ("fbb15c34bf7d761c", 4086, "3094235"),
    "niah_multikey_2": ("ee20cd3f5f2c5e07", 4094, "7899609"),
    "niah_multikey_3": ("a61086f3468f3000", 4088, "93447b2f-bba3-4668-8334-e5245f8a2e3c"),
    "vt": ("0bf5191ae6c3b883", 4093, "HYKVM TBYFB YBAGV QGMCY MGJPZ"),
    "cwe": ("cb82724f782ba7f2", 4000, "pentagon rabid dearest assessment foundation interviewer ox ceramic band fries"),
    "fwe": ("f658dc22b2171e06", 3998, "twzdjo hxmdwl nwlwst"),
    "niah_single_2": ("dcc89a8451472302", 4096, "5663623"),
    "niah_single_3": ("7d09c972a4ff56ec", 4096, "23bed01d-43cf-4fde-a493-3b83757750a9"),
    "niah_multikey_1": ("5a9603ca5bc23c7b", 4096, "5672073"),
    "niah_multivalue": ("02e2e2d7e3678b43", 4095, "8973915 3770370 5446912 9852897"),
    "niah_multiquery": ("343018b05a40c0b0", 4096, "1841248 9910817 1954280 8999183"),
}
GOLDEN_CHAT_1024 = {
    "niah_single_1": ("d2eb9b12a9d74283", 1020, "5437923"),
    "niah_multikey_2": ("520b2dfd06eb031e", 1020, "5204819"),
    "niah_multikey_3": ("d07101ba0770db54", 1014, "a377f6f1-d289-40ab-a18a-e30595a5bafa"),
    "vt": ("e6c2ad526b2ffbf2", 1003, "KQFSM GRATU CLEYN BGWLU RZPYX"),
    "cwe": ("e02107ffc91a821d", 1001, "aside moldy fillet climb comeback utter reveal publicity merchant dinosaur"),
    "fwe": ("a88dfcc89beec574", 1023, "sipnko iwshik mxuecn"),
}


def digest(sample):
    return hashlib.sha256(sample.prompt.encode()).hexdigest()[:16]


@pytest.mark.parametrize("task", GOLDEN_BASE_4096)
def test_prompts_are_those_of_nvidias_generator(task):
    sample = make(task)[2]
    tokens = sample.prompt_tokens + TASKS[task].new_tokens
    assert (digest(sample), tokens, " ".join(sample.references)) == GOLDEN_BASE_4096[task]


@pytest.mark.parametrize("task", GOLDEN_CHAT_1024)
def test_short_prompts_in_a_chat_format_are_those_of_nvidias_generator(task):
    sample = make(task, length=1024, frame=CHAT)[2]
    tokens = sample.prompt_tokens + TASKS[task].new_tokens
    assert (digest(sample), tokens, " ".join(sample.references)) == GOLDEN_CHAT_1024[task]


def test_every_task_has_golden_prompts():
    assert set(GOLDEN_BASE_4096) == set(TASKS)
    assert set(GOLDEN_CHAT_1024) == set(EXACT)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [2048, 8192])
def test_prompt_and_answer_fill_the_length_and_no_more(task, length):
    tokens = [sample.prompt_tokens + TASKS[task].new_tokens for sample in make(task, length, seed=7)]
    assert max(tokens) <= length
    assert max(tokens) > 0.95 * length
    # A prompt that came out too long is made again a step smaller: 25 needles, 500 words of an essay.
    assert min(tokens) > length - 1000


@pytest.mark.parametrize("task", TASKS)
def test_references_are_distinct_and_samples_differ(task):
    samples = make(task, length=2048)
    for sample in samples:
        assert len(set(sample.references)) == len(sample.references)
    assert len({sample.prompt for sample in samples}) == 3
    assert make(task, length=2048, count=1, seed=43)[0].prompt != samples[0].prompt
    assert make(task, length=2048) == samples


@pytest.mark.parametrize("task", [task for task in TASKS if task.startswith("niah")])
def test_a_needle_holds_every_reference_and_the_question_names_its_key(task):
    for sample in make(task, length=2048):
        context, _, question = sample.prompt.rpartition("\nWhat ")
        for reference in sample.references:
            (key,) = re.findall(rf"One of the special magic \w+ for ([^:]+): {reference}\.", context)
            assert key.removesuffix(" is") in question
        assert len(sample.references) == (4 if task in ("niah_multivalue", "niah_multiquery") else 1)
        plural = len(sample.references) > 1
        assert sample.prompt.endswith(" are" if plural else " is")
        assert ("Some special magic numbers are" in sample.prompt) == plural


def test_needles_lie_at_all_depths():
    depths = []
    for sample in make("niah_single_1", length=1024, count=200):
        lines = sample.prompt.split("\n")[1:-1]
        depths.append(next(i for i, line in enumerate(lines) if sample.references[0] in line) / (len(lines) - 1))
    quarters = Counter(min(int(4 * depth), 3) for depth in depths)
    assert min(quarters.values()) > 30


def test_needles_in_essays_lie_between_sentences_at_forty_depths():
    places = set()
    for sample in make("niah_single_2", length=2048, count=100):
        context = sample.prompt.split("\n")[1]
        before, _, after = context.partition("One of the special magic")
        sentences = before.count("little."), after.count("little.")
        if before.strip() and sentences[1]:  # the text's last sentence may be cut
            assert before.endswith("little. ")
        places.add(100 * sentences[0] / sum(sentences))
    grid = [100 * i / 39 for i in range(40)]
    assert len(places) > 20
    assert all(min(abs(place - depth) for depth in grid) < 1.3 for place in places)


def test_a_chain_of_variables_leads_to_its_value_in_order():
    for sample in make("vt", length=2048):
        example, _, rest = sample.prompt.rpartition("Memorize and track")
        chain = re.findall(r"VAR (\w{5}) = (?:VAR )?(\w+)", rest)
        assert tuple(name for name, _ in chain) == sample.references
        assert [source for _, source in chain[1:]] == list(sample.references[:-1])
        assert f"assigned the value {chain[0][1]}, they are: " in rest
        worked = re.findall(r"VAR (\w{3}) = ", example)
        assert len(set(worked)) == 5
        assert example.rstrip().endswith(" ".join(worked))
    examples = {sample.prompt[: sample.prompt.rindex("Memorize")] for sample in make("vt", length=2048)}
    assert len(examples) == 3  # each with names and a value of its own


@pytest.mark.parametrize(("length", "common", "others"), [(2048, 6, 1), (4096, 30, 3)])
def test_common_words_occur_as_often_as_they_should(length, common, others):
    sample = make("cwe", length=length, count=1)[0]
    listed = re.findall(r"\d+\. ([^\d]+?)(?= \d+\.|\n)", sample.prompt[sample.prompt.rindex("Below is") :])
    counts = Counter(listed)
    assert {counts.pop(word) for word in sample.references} == {common}
    assert set(counts.values()) == {others}
    assert len(sample.references) == 10


def test_frequent_words_follow_a_zeta_law():
    sample = make("fwe", count=1)[0]
    text = sample.prompt.partition("coded words. ")[2].partition("\nQuestion")[0]
    ranked = [count for _, count in Counter(text.split()).most_common()]
    assert [word for word, _ in Counter(text.split()).most_common(4)][1:] == list(sample.references)
    assert text.split().count("...") == ranked[0]
    for rank in range(2, 6):
        assert ranked[rank - 1] == pytest.approx(ranked[0] / rank**2, abs=1)


@pytest.mark.parametrize("task", TASKS)
def test_too_short_a_length_is_refused(task):
    with pytest.raises(InputError, match=f"{task if not task.startswith('niah') else 'needle'}.* does not fit"):
        make(task, length=200)


def test_cwe_is_refused_where_the_words_run_out():
    with pytest.raises(InputError, match="distinct words"):
        make("cwe", length=2**18)


def test_the_search_finds_the_largest_size():
    assert largest_size(lambda n: 10 * n, most_tokens=777, step=5, upper=1000) == 77
    assert largest_size(lambda n: 10 * n, most_tokens=20, step=5, upper=1000) == 5


def test_compound_words_are_the_sorted_products():
    adjectives, nouns = ["wide-eyed", "high", "red", "high-pitched", "a"], ["pitched-tent", "ox", "eyed-owl", "tent"]
    expected = sorted({f"{a}-{n}" for a in adjectives for n in nouns} | {"high-pitched-tent"})
    compound = CompoundWords(adjectives, nouns)
    assert list(compound) == expected
    assert compound[2:4] == expected[2:4]
    with pytest.raises(IndexError):
        compound[len(expected)]


def test_the_keys_are_all_of_wonderwords():
    compound = words.compound_words()
    assert len(compound) == len({f"{a}-" for a in words.adjectives()}) * len(set(words.nouns()))
    assert [compound[0], compound[len(compound) - 1]] == ["Early-ATM", "zonked-zucchini"]
