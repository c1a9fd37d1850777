"""Stem under lm-eval: `HFLM(pretrained=enable(model), tokenizer=tokenizer)`. docs/tasks.md shows it."""

import pytest

import tiny_model
from stem_attn import PrefillPolicy, StemConfig
from stem_attn.integrations.hf import disable, enable, stats

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval brings forty packages, pandas and pyarrow among them")

SPARSE = StemConfig(block_size=16, budget_ratio=0.2, budget_bias=0)
EVERYTHING = StemConfig(block_size=16, budget_ratio=1.0, decay=1.0)
POLICY = PrefillPolicy(min_seq_len=256, crossover=False)
NEW_TOKENS = 8


@pytest.fixture(autouse=True)
def no_report_of_the_machine(monkeypatch):
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # takes a minute


def documents(**kwargs):
    from datasets import Dataset

    texts = ["".join(f"Line {i} of {name}. " for i in range(lines)) for name, lines in (("a", 30), ("bee", 50))]
    return {"test": Dataset.from_list([{"text": text, "answer": "x"} for text in texts])}


GENERATION = {
    "task": "tiny_generation",
    "dataset_path": "",
    "custom_dataset": documents,
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{text}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"do_sample": False, "until": [], "max_gen_toks": NEW_TOKENS},
    "metric_list": [{"metric": "exact_match"}],
}
PERPLEXITY = {
    "task": "tiny_choice",
    "dataset_path": "",
    "custom_dataset": documents,
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{text}}",
    "doc_to_choice": ["yes", "no"],
    "doc_to_target": 0,
    "metric_list": [{"metric": "acc"}],
}


def responses(model, task, batch_size):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=model, tokenizer=tiny_model.tokenizer(), batch_size=batch_size)
    manager = TaskManager(include_defaults=False)  # reading its thousands of tasks takes long
    found = lm_eval.simple_evaluate(lm, tasks=[task], task_manager=manager, bootstrap_iters=0)
    samples = found["samples"][task["task"]]
    return [response for sample in sorted(samples, key=lambda s: s["doc_id"]) for response in sample["resps"]]


@pytest.mark.parametrize("batch_size", [1, 2])  # 2: padded on the left
def test_generation_is_sparse_in_its_prefill_and_dense_where_all_is_kept(batch_size):
    model = tiny_model.model()
    dense = responses(model, GENERATION, batch_size)
    everything = responses(enable(model, EVERYTHING, policy=POLICY), GENERATION, batch_size)
    assert everything == dense
    sparse = responses(enable(model, SPARSE, policy=POLICY), GENERATION, batch_size)
    assert sparse != dense
    counts = stats(model)
    layers, calls = 2, 2 // batch_size
    assert counts.sparse == layers * calls
    assert set(counts.dense) == {"decode"}
    assert 0.2 < counts.density < 0.6
    disable(model)
    assert responses(model, GENERATION, batch_size) == dense


def test_log_likelihoods_are_sparse_too():
    model = tiny_model.model()
    dense = [float(number) for ((number, _),) in responses(model, PERPLEXITY, 1)]
    kept = [float(number) for ((number, _),) in responses(enable(model, EVERYTHING, policy=POLICY), PERPLEXITY, 1)]
    assert kept == pytest.approx(dense, abs=1e-3)
    assert stats(model).sparse > 0
    sparse = [float(number) for ((number, _),) in responses(enable(model, SPARSE, policy=POLICY), PERPLEXITY, 1)]
    assert sparse != pytest.approx(dense, abs=1e-3)
    assert stats(model).sparse > 0
