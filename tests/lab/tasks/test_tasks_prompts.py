"""The prompts of the tasks beyond RULER: seeded, hashed, and what they promise."""

import json
import random
import re
import sys
from itertools import islice

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from stem_attn.lab.errors import InputError
from stem_attn.lab.tasks import code_sources, passages
from stem_attn.lab.tasks.code_sources import SourceFile, last_lines, source_files
from stem_attn.lab.tasks.measures import code_line, edit_similarity, exact_match, number_match, word_similarity
from stem_attn.lab.tasks.registry import TASKS
from stem_attn.lab.tasks.samples import Frame, Request

BEYOND = [name for name, task in TASKS.items() if task.family != "RULER"]
CODE = [name for name in BEYOND if TASKS[name].family == "code"]
# Of the third sample, made of the passages and of the package below: hash, tokens with the answer's.
GOLDEN_CHAT_4096 = {
    "key_values": ("03097653651f92ca", 4087),
    "passage_retrieval": ("d2ef2d2c665d39ee", 3802),
    "passage_count": ("1d826ffa824e94f8", 3928),
    "rounds": ("aa09d60aff336a76", 4086),
    "code_file": ("2b13ebd83d3c10da", 4087),
    "code_repo": ("3cf0b75d5e916313", 4093),
}

_splitter = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
_splitter.pre_tokenizer = pre_tokenizers.Whitespace()


def count_tokens(text):
    """Words and runs of punctuation."""
    return len(_splitter.encode(text).ids)


def package(folder):
    """Write a package of long modules that import from one another."""
    rng = random.Random(0)
    names = [f"part{i}" for i in range(9)]
    for i, name in enumerate(names):
        lines = ['"""A module."""', "", "import os"]
        if i:
            lines.append(f"from sample.{names[i - 1]} import function_{i - 1}_7")
        lines += [f"from . import nothing_{i}", ""]
        for number in range(250 if i < 5 else 8):
            lines += [
                f"def function_{i}_{number}(first, second):",
                f'    """Return {rng.randrange(10**6)}."""',
                f"    value_{number} = first * {rng.randrange(1000)} + second",
                "    # a comment, then a statement over two lines",
                f"    pair = (value_{number},",
                "            second)",
                f"    return pair, os.fspath('{rng.randrange(10**6)}')",
                "",
            ]
        if i:
            lines.append(f"RESULT = function_{i - 1}_7({i}, {rng.randrange(10**6)})")
        (folder / f"{name}.py").write_text("\n".join(lines) + "\n")
    (folder / "__init__.py").write_text("")


@pytest.fixture(autouse=True)
def texts(tmp_path, monkeypatch):
    """Texts that do not change with what is installed."""
    folder = tmp_path / "sample"
    folder.mkdir()
    package(folder)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(code_sources, "PACKAGES", {"sample": "Apache-2.0"})
    rng = random.Random(1)
    pool = tuple(" ".join(str(rng.randrange(10**4)) for _ in range(rng.randint(120, 240))) for _ in range(300))
    for module in ("passage_retrieval", "passage_count"):
        monkeypatch.setattr(f"stem_attn.lab.tasks.{module}.passages", lambda: pool)
    code_sources.source_files.cache_clear()
    yield
    code_sources.source_files.cache_clear()
    sys.modules.pop("sample", None)


def make(task, length=4096, count=3, seed=42):
    frame = Frame("[INST] ", " [/INST]") if TASKS[task].chat else Frame()
    return list(islice(TASKS[task].samples(Request(length, seed, frame, count_tokens)), count))


@pytest.mark.parametrize("task", BEYOND)
def test_prompts_follow_from_the_seed(task):
    samples = make(task)
    found = (samples[2].sha256[:16], samples[2].prompt_tokens + TASKS[task].new_tokens)
    assert found == GOLDEN_CHAT_4096[task]
    assert make(task) == samples
    assert len({sample.prompt for sample in samples}) == 3
    assert make(task, count=1, seed=43)[0].prompt != samples[0].prompt


@pytest.mark.parametrize("task", BEYOND)
@pytest.mark.parametrize("length", [2048, 8192])
def test_prompt_and_answer_fill_the_length_and_no_more(task, length):
    tokens = [sample.prompt_tokens + TASKS[task].new_tokens for sample in make(task, length, seed=7)]
    assert max(tokens) <= length
    assert min(tokens) > 0.85 * length - 200  # a passage more would be too much


@pytest.mark.parametrize("task", BEYOND)
def test_too_short_a_length_is_refused(task):
    with pytest.raises(InputError, match=f"{task} does not fit"):
        make(task, length=70)


def test_the_key_is_in_the_object_with_its_value():
    for sample in make("key_values"):
        pairs = json.loads(re.search(r"\{.*\}", sample.prompt, re.DOTALL).group())
        key = re.search(r'Key: "(.*)"', sample.prompt).group(1)
        assert (pairs[key],) == sample.references


def test_the_excerpt_is_in_the_passage_of_the_number():
    for sample in make("passage_retrieval"):
        excerpt = sample.prompt.split("The following is an excerpt.\n\n")[1].split("\n")[0]
        shown = dict(re.findall(r"Paragraph (\d+): (.*)", sample.prompt))
        assert [number for number, passage in shown.items() if excerpt in passage] == list(sample.references)
        assert f"Here are {len(shown)} paragraphs" in sample.prompt


def test_there_are_as_many_different_passages_as_said():
    wanted = set()
    for sample in make("passage_count", count=20):
        shown = re.findall(r"Paragraph \d+: (.*)", sample.prompt)
        assert (str(len(set(shown))),) == sample.references
        assert len(shown) > len(set(shown))
        wanted.add(sample.references[0])
    assert len(wanted) > 4


def test_the_text_is_the_one_of_the_time_asked_for():
    for sample in make("rounds"):
        kind, topic, ordinal = re.search(r"asked for a (.*) about (.*) for the (\w+) time", sample.prompt).groups()
        said = re.findall(rf"User: Write a {kind} about {topic}\.\nAssistant: (.*)\n", sample.prompt)
        assert len(said) == 4
        assert sample.references == (said[["first", "second", "third", "fourth"].index(ordinal)],)
        others = re.findall(rf"User: Write a (.*) about {topic}\.", sample.prompt)
        assert len(others) > 8  # other texts about the same


def test_the_next_line_follows_what_is_shown():
    modules = [file.text for file in source_files()]
    for sample in make("code_file", count=10):
        context = sample.prompt.partition("given below. \n")[2].removesuffix("Next line of code:\n")
        (module,) = [text for text in modules if context in text]
        line = module.partition(context)[2].split("\n")[0]
        assert line.strip() == sample.references[0]
        assert len(line) >= 12


def test_the_line_uses_a_function_of_another_file_that_is_shown():
    for sample in make("code_repo", count=10):
        name = re.search(r"function_\d_7", sample.references[0]).group()
        shown, own = sample.prompt.rsplit("# Path: ", 1)
        assert f"def {name}(" in shown
        assert f"def {name}(" not in own
        assert own.count(name) == 1  # its import


def test_statements_are_whole_lines_that_are_neither_imports_nor_docstrings(tmp_path):
    (tmp_path / "m.py").write_text(
        '"""A module of some length."""\nimport something_long\nvalue = call(first,\n    second_argument)\n'
        "def function(first):\n    # a comment that is long\n    return first + 12345\n    a = 1\n"
        "    b = 'x'  # with a note\n"
    )
    file = SourceFile(tmp_path, "m.py")
    assert [file.lines[number].strip() for number in sorted(file.statements)] == [
        "def function(first):",
        "return first + 12345",
    ]
    assert file.defines == {"function"}


def test_the_last_lines_fill_the_room():
    lines = [f"line {i}\n" for i in range(100)]
    assert last_lines(lines, 21, count_tokens) == "".join(lines[-10:])
    assert last_lines(lines, 10**6, count_tokens) == "".join(lines)
    assert last_lines(lines, 1, count_tokens) == ""
    # A tokenizer that joins line ends: alone a line has three tokens, in the text two. Alone 7 lines would fit.
    assert last_lines(lines, 21, lambda text: 2 * text.count("\n") + 1) == "".join(lines[-9:])


@pytest.mark.parametrize("task", CODE)
def test_missing_source_is_a_sentence(task, monkeypatch, tmp_path):
    monkeypatch.setattr(code_sources, "PACKAGES", {"nowhere_to_be_found": "MIT"})
    code_sources.source_files.cache_clear()
    with pytest.raises(InputError, match="that of nowhere_to_be_found is not installed; leave the tasks code_file and"):
        make(task)


def test_too_few_long_files_are_a_sentence():
    with pytest.raises(InputError, match="fewer than 4 files"):
        make("code_file", length=2**16)


def test_too_few_passages_are_a_sentence():
    with pytest.raises(InputError, match="has 300 passages, which do not fill"):
        make("passage_retrieval", length=2**17)


def test_the_installed_texts_are_as_long_as_a_long_prompt():
    found = passages.passages()
    assert len(set(found)) == len(found) > 800
    assert all(120 <= len(passage.split()) <= 240 for passage in found)
    assert [source.rsplit(", ", 1)[1] for source in passages.sources()] == ["PSF-2.0", "BSD-3-Clause"]


@pytest.mark.parametrize(
    ("measure", "answer", "reference", "points"),
    [
        (edit_similarity, "    return value\nmore", "return value", 100),
        (edit_similarity, "```python\nreturn value\n```", "return value", 100),
        (edit_similarity, "return valse", "return value", pytest.approx(100 * 22 / 24)),
        (edit_similarity, "", "return value", 0),
        (exact_match, "# first a note\nreturn value", "return value", 100),
        (exact_match, "return value + 1", "return value", 0),
        (number_match, " 12", "12", 100),
        (number_match, "Paragraph 12, or 13", "12", 50),
        (number_match, "121", "12", 0),
        (number_match, "none", "12", 0),
        (word_similarity, "a b c d e f", "a b c d", 100),
        (word_similarity, "a x c d", "a b c d", 75),
        (word_similarity, "", "a b", 0),
    ],
)
def test_measures(measure, answer, reference, points):
    assert measure(answer, (reference,)) == points


def test_an_answer_of_comments_only_is_taken_as_it_is():
    assert code_line("# a note") == "# a note"
