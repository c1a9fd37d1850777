"""enable, disable, stats: what is refused, what is restored, what is counted, and whose state it is."""

import copy
import dataclasses
import gc
import logging
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hf_models import BLOCK, KEEP_ALL, SPARSE, enable, relative_error, tiny_config, tiny_model, tokens
from stem_attn import PrefillPolicy, StemConfig, backends
from stem_attn.integrations import hf

LENGTH = 200


def implementations(model):
    return [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]


def untouched(model):
    return "stem" not in implementations(model) and not any(
        "_stem" in name for m in model.modules() for name in vars(m)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": "fast"}, "unknown preset 'fast'"),
        ({"config": {"block_size": 64}}, "must be a StemConfig or a preset's name, got dict"),
        ({"policy": PrefillPolicy(dense_layers=(0, 2))}, r"dense_layers \(0, 2\) are not all layers of a model with 2"),
        ({"policy": PrefillPolicy(layer_budgets=(1.0,))}, "layer_budgets has 1 factors, and the model has 2 layers"),
        ({"policy": PrefillPolicy(layer_budgets=(1, 2)), "method": "uniform"}, "layer_budgets has no effect on method"),
        ({"policy": PrefillPolicy(layer_budgets=(1, 2)), "method": "xattention"}, "no effect on method 'xattention'"),
        ({"config": StemConfig(decay=0.5), "method": "xattention"}, "config.decay has no effect on method"),
        ({"policy": {"min_seq_len": 0}}, "policy must be a PrefillPolicy, got dict"),
        ({"prompt_len": 0}, "at least 1 token; got 0"),
        ({"prompt_len": [5, "x"]}, "one int a batch row"),
        ({"prompt_len": True}, "got True"),
        ({"backend": "cuda"}, "backend must be one of auto, .*; got 'cuda'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=message):
        hf.enable(model, **arguments)
    assert untouched(model)


def test_a_backend_that_cannot_run_here_is_refused(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(type(backends.by_name("cpu")), "why_unavailable", lambda self: "it is Sunday")
    backends._load.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="backend 'cpu' is not available here: it is Sunday"):
            hf.enable(model, backend="cpu")
        assert untouched(model)
        # Of a model that was enabled elsewhere: no prompt is dense because of it.
        with pytest.raises(RuntimeError, match="backend 'cpu' is not available here: it is Sunday"):
            backends.expected("cpu", "cpu")
    finally:
        backends._load.cache_clear()


class Peft(torch.nn.Module):
    """As much of a PeftModel as matters: it hands what it lacks to its model, and is none itself."""

    def __init__(self, model):
        super().__init__()
        self.base_model = torch.nn.Module()
        self.base_model.model = model

    def get_base_model(self):
        return self.base_model.model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model.model, name)


@pytest.mark.parametrize(
    ("wrap", "hint"),
    [
        (Peft, r"got Peft: enable the model inside, which is its .get_base_model\(\)"),
        (torch.compile, "got OptimizedModule: enable the model inside, which is its ._orig_mod"),
        (torch.nn.DataParallel, "got DataParallel: enable the model inside, which is its .module"),
        (lambda model: torch.nn.Linear(2, 2), "got Linear$"),
    ],
)
def test_wrappers_are_refused_and_say_where_the_model_is(wrap, hint):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=f"must be a transformers PreTrainedModel, {hint}"):
        hf.enable(wrap(model))
    assert untouched(model)


@torch.no_grad()
def test_the_model_in_a_wrapper_runs_within_it():
    model, ids = tiny_model("llama"), tokens(2, LENGTH)
    wrapper = Peft(model)
    enable(wrapper.get_base_model(), SPARSE)
    wrapper.generate(ids, max_new_tokens=2, do_sample=False)
    assert hf.stats(model).sparse == 2


@torch.no_grad()
def test_accelerates_hooks_stay():
    hooks = pytest.importorskip("accelerate.hooks")
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    seen = []

    class Note(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    hooks.add_hook_to_module(model.model.layers[0].self_attn, Note())
    enable(model, SPARSE)
    model(ids)
    hf.disable(model)
    model(ids)
    assert seen == [model.model.layers[0].self_attn] * 2


@torch.no_grad()
def test_layers_added_before_and_after():
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    new = LlamaDecoderLayer(model.config, 2).eval()
    enable(model, SPARSE, layer_budgets=(1.0, 1.0))
    model.model.layers.append(new)
    model.config.num_hidden_layers = 3
    model(ids, use_cache=False)
    assert hf.stats(model).sparse == 2  # nobody has enabled the new one
    model.config.num_hidden_layers = 2
    for budgets in ((1.0, 1.0), (1.0,)):
        with pytest.raises(ValueError, match=r"layer_budgets has \d factors, and the model has 3 layers"):
            enable(model, SPARSE, layer_budgets=budgets)
    assert hf.stats(model).sparse == 2  # as it was before
    enable(model, SPARSE, layer_budgets=(1.0, 1.0, 1.0), dense_layers=(2,))
    model.config.num_hidden_layers = 3
    model(ids, use_cache=False)
    assert (hf.stats(model).sparse, hf.stats(model).dense) == (2, {"dense layer": 1})


def test_a_layer_with_a_config_of_its_own_is_refused():
    model = tiny_model("llama")
    model.model.layers.append(copy.deepcopy(model.model.layers[1]))
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn has a config object of its own"):
        enable(model, SPARSE)
    assert untouched(model)
    model.model.layers[2].self_attn.config = model.config
    enable(model, SPARSE)


def test_a_failed_enable_leaves_an_enabled_model_as_it_was(monkeypatch):
    model = enable(tiny_model("llama"), SPARSE)
    with torch.no_grad():
        expected = model(tokens(1, LENGTH)).logits

    def refuse(*args, **kwargs):
        raise RuntimeError("no")

    monkeypatch.setattr(model, "set_attn_implementation", refuse)
    with pytest.raises(ValueError, match="cannot run with stem: no"):
        enable(model, KEEP_ALL)
    with torch.no_grad():
        assert torch.equal(model(tokens(1, LENGTH)).logits, expected)
    assert hf.stats(model).sparse == 4
    hf.disable(model)
    assert untouched(model)


def test_nothing_is_left_when_transformers_refuses(monkeypatch):
    model = tiny_model("llama", "eager")

    def refuse(*args, **kwargs):
        model.config._attn_implementation = "stem"  # half way
        raise RuntimeError("no")

    monkeypatch.setattr(model, "set_attn_implementation", refuse)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot run with stem: no"):
        hf.enable(model)
    assert untouched(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("before", ["sdpa", "eager"])
@torch.no_grad()
def test_disable_restores_everything(before):
    model, ids = tiny_model("llama", before), tokens(1, LENGTH)
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    expected = model(ids).logits
    assert enable(model, SPARSE) is model
    assert relative_error(model(ids).logits, expected) > 1e-3
    enable(model, SPARSE)  # twice, and undone once
    hf.disable(model)
    assert implementations(model) == [before] * len(implementations(model))
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert torch.equal(model(ids).logits, expected)
    hf.disable(model)  # harmless


def tiny_vlm():
    text = tiny_config("gemma3_text", sliding_window=40).to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval()


@torch.no_grad()
def test_only_the_text_tower_of_a_vision_language_model_changes():
    model, ids = tiny_vlm(), tokens(2, LENGTH)
    expected = model(input_ids=ids).logits
    enable(model, KEEP_ALL)
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert set(implementations(model.model.vision_tower)) == {"sdpa"}
    assert relative_error(model(input_ids=ids).logits, expected) < 1e-4
    stats = hf.stats(model)
    assert (stats.sparse, stats.banded, stats.dense) == (1, 1, {})
    hf.disable(model)
    assert untouched(model)
    assert set(implementations(model)) == {"sdpa"}


@torch.no_grad()
def test_enabling_again_updates_the_settings():
    model, ids = enable(tiny_model("llama"), SPARSE), tokens(1, LENGTH)
    model(ids)
    assert hf.stats(model).density < 0.7
    enable(model, KEEP_ALL)
    assert hf.stats(model).calls == 0
    model(ids)
    assert hf.stats(model).density == 1.0


@torch.no_grad()
def test_presets_by_name():
    model = hf.enable(tiny_model("llama"), "official")
    model(tokens(1, LENGTH))
    assert hf.stats(model).dense == {"dense layer": 2}  # its two dense layers are all there are
    hf.enable(model, "paper")
    model(tokens(1, LENGTH))
    assert hf.stats(model).dense == {"short prompt": 2}


@torch.no_grad()
def test_dense_layers_count_from_both_ends():
    for layers, indices in (((-1,), {2}), ((0, -1), {0, 2}), ((1,), {1})):
        model = enable(tiny_model("llama", num_hidden_layers=3), StemConfig(block_size=BLOCK), dense_layers=layers)
        model(tokens(1, LENGTH))
        assert hf.stats(model).dense == {"dense layer": len(indices)}
        assert hf.stats(model).sparse == 3 - len(indices)


@torch.no_grad()
def test_layers_have_budgets_of_their_own():
    model, ids = tiny_model("llama"), tokens(1, LENGTH)

    def density(*factors):
        enable(model, dataclasses.replace(SPARSE, budget_ratio=0.4), layer_budgets=factors)
        model(ids)
        assert hf.stats(model).sparse == 2
        return hf.stats(model).density

    plain, half, double = density(), density(0.5, 0.5), density(2.0, 2.0)
    assert density(1.0, 1.0) == plain
    assert half < plain < double < 1
    assert density(0.5, 2.0) == pytest.approx((half + double) / 2)
    assert density(2.0, 100.0) == pytest.approx((double + 1) / 2)


@torch.no_grad()
def test_budgets_of_dense_and_banded_layers_are_not_read():
    model, ids = tiny_model("gemma3_text", sliding_window=40), tokens(1, LENGTH)
    outputs = []
    for first in (0.2, 5.0):
        enable(model, SPARSE, layer_budgets=(first, 1.0))
        outputs.append(model(ids).logits)
    assert torch.equal(*outputs)
    enable(model, SPARSE, layer_budgets=(1.0, 100.0), crossover=True)
    model(ids)
    assert hf.stats(model).dense == {"no gain from sparsity": 1}  # its factor reaches everything
    enable(model, SPARSE, layer_budgets=(1.0, 1.0), dense_layers=(1,))
    model(ids)
    assert hf.stats(model).dense == {"dense layer": 1}


@torch.no_grad()
def test_short_prompts_compare_the_whole_prompt():
    model = enable(tiny_model("llama"), StemConfig(block_size=BLOCK), min_seq_len=LENGTH)
    model(tokens(1, LENGTH - 1))
    assert hf.stats(model).dense == {"short prompt": 2}
    with hf.prompt_length(model, LENGTH):  # the first chunk of a prompt that is long enough
        model(tokens(1, LENGTH - 1))
    assert hf.stats(model).sparse == 2
    padded = torch.ones(2, LENGTH, dtype=torch.long)
    padded[:, :1] = 0  # padding does not count
    model(tokens(2, LENGTH), attention_mask=padded)
    assert hf.stats(model).dense == {"short prompt": 4}


@torch.no_grad()
def test_stats_count_tokens_and_weigh_density_by_work():
    model = enable(tiny_model("llama"), SPARSE)
    model(tokens(2, LENGTH))
    short = hf.stats(model)
    assert short.tokens == {"sparse": 2 * 2 * LENGTH, "banded": 0, "dense": 0}
    hf.reset_stats(model)
    model(tokens(1, 4 * LENGTH))
    long = hf.stats(model)
    model(tokens(2, LENGTH))
    both = hf.stats(model)
    blocks = [(n := -(-tokens // BLOCK)) * (n + 1) // 2 for tokens in (4 * LENGTH, LENGTH)]
    work = [1 * blocks[0], 2 * blocks[1]]
    assert both.density == pytest.approx((long.density * work[0] + short.density * work[1]) / sum(work))
    assert both.calls == 4


def test_gradients_and_training_are_dense_and_differentiable():
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    expected = torch.autograd.grad(model(ids).logits.square().mean(), model.lm_head.weight)[0]
    enable(model, SPARSE)
    actual = torch.autograd.grad(model(ids).logits.square().mean(), model.lm_head.weight)[0]
    assert relative_error(actual, expected) < 1e-6
    assert hf.stats(model).dense == {"gradients (use torch.no_grad())": 2}
    model.train()
    model(ids)
    assert hf.stats(model).dense["training"] == 2


@torch.no_grad()
def test_output_attentions_custom_masks_packing_and_bidirectional_are_dense():
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    lower = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]
    holes = torch.ones(1, LENGTH, dtype=torch.long)
    holes[0, 50:60] = 0
    packed = torch.cat([torch.arange(90), torch.arange(LENGTH - 90)])[None]
    cases = [
        ({"output_attentions": True}, "output_attentions"),
        ({"attention_mask": lower.clone()}, "4-D mask"),
        ({"position_ids": packed, "use_cache": False}, "4-D mask"),
        ({"attention_mask": holes}, "padding between tokens"),
        ({"is_causal": False, "attention_mask": torch.ones_like(lower)}, "not causal"),
    ]
    for inputs, reason in cases:
        hf.disable(model)
        expected = model(ids, **inputs).logits
        enable(model, SPARSE)
        real = inputs["attention_mask"].bool()[0] if reason == "padding between tokens" else slice(None)
        assert relative_error(model(ids, **inputs).logits[0, real], expected[0, real]) < 1e-6, reason
        assert hf.stats(model).dense == {reason: 2}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "gemma3_text", "qwen2", "phi3", "mixtral", "olmo"])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_attention_weights_are_those_of_the_model(family, padded):
    window = {"sliding_window": 40} if family in ("gemma2", "gemma3_text") else {}
    model, ids = tiny_model(family, "eager", **window), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    inputs = {"attention_mask": mask} if padded else {}
    real = mask.bool() if padded else torch.ones_like(ids).bool()
    expected = model(ids, output_attentions=True, **inputs)
    enable(model, SPARSE)
    actual = model(ids, output_attentions=True, **inputs)
    assert len(actual.attentions) == len(expected.attentions) == 2
    for weights, right in zip(actual.attentions, expected.attentions, strict=True):
        assert torch.equal(weights.transpose(1, 2)[real], right.transpose(1, 2)[real])
    assert torch.equal(actual.logits[real], expected.logits[real])
    step = model.generate(
        ids, **inputs, max_new_tokens=2, do_sample=False, output_attentions=True, return_dict_in_generate=True
    )
    assert [part[0].shape[2] for part in step.attentions] == [LENGTH, 1]


@torch.no_grad()
def test_attention_weights_asked_for_in_the_config_or_in_training():
    model, ids = tiny_model("llama", "eager"), tokens(1, LENGTH)
    enable(model.train(), SPARSE)
    assert model(ids, output_attentions=True).attentions[0].shape == (1, 4, LENGTH, LENGTH)
    assert hf.stats(model).dense == {"training": 2}
    hf.disable(model.eval())
    model.config.output_attentions = True
    enable(model, SPARSE)
    assert model(ids).attentions[0].shape == (1, 4, LENGTH, LENGTH)
    assert model(ids, output_attentions=False).attentions is None
    assert hf.stats(model).sparse == 2


@torch.no_grad()
def test_a_model_loaded_with_sdpa_has_no_attention_weights_as_before():
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    before = model(ids, output_attentions=True).attentions
    enable(model, SPARSE)
    assert model(ids, output_attentions=True).attentions == before


@torch.no_grad()
def test_a_row_of_padding_alone_stays_finite_and_changes_nothing():
    model, ids = enable(tiny_model("llama"), SPARSE), tokens(2, LENGTH)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1] = 0
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    assert relative_error(logits[0], model(ids[:1]).logits[0]) < 1e-5
    assert model(ids, attention_mask=torch.zeros_like(mask)).logits.isfinite().all()


@torch.no_grad()
def test_encoder_decoder_keeps_cross_and_bidirectional_attention():
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"d_model": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 128}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(**sizes, **layers)).eval()
    inputs = {"input_ids": tokens(2, 150), "decoder_input_ids": tokens(2, LENGTH)}
    expected = model(**inputs).logits
    enable(model, KEEP_ALL)
    assert relative_error(model(**inputs).logits, expected) < 1e-4
    assert (hf.stats(model).sparse, hf.stats(model).dense) == (1, {"not causal": 2})


@torch.no_grad()
def test_each_reason_is_logged_once_per_model(caplog):
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    with caplog.at_level(logging.INFO, "stem_attn.hf"):
        hf.enable(model, StemConfig())
        for _ in range(2):
            model(ids)
            model(ids[:, :1])
    assert [record.message for record in caplog.records] == [
        "dense attention: short prompt (said once per model)",
        "dense attention: decode (said once per model)",
    ]


@torch.no_grad()
def test_models_do_not_share_state():
    one, other, ids = (
        enable(tiny_model("llama"), SPARSE),
        enable(tiny_model("llama"), KEEP_ALL),
        tokens(1, LENGTH),
    )
    with hf.prompt_length(one, 2 * LENGTH):
        one(ids)
        assert (hf.stats(one).sparse, hf.stats(other).calls) == (2, 0)
        other(ids)
    assert hf.stats(one).density < hf.stats(other).density == 1.0
    hf.disable(one)
    assert set(implementations(other)) == {"stem"}


@torch.no_grad()
def test_a_deleted_model_is_freed():
    model = enable(tiny_model("llama"), SPARSE)
    cache = model(tokens(2, LENGTH), attention_mask=torch.ones(2, LENGTH).tril(150)).past_key_values
    freed = [weakref.ref(model), weakref.ref(model.model.layers[0].self_attn), weakref.ref(cache)]
    del model, cache
    gc.collect()
    assert [ref() for ref in freed] == [None] * 3


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_copies_are_enabled_on_their_own(duplicate):
    model, ids = enable(tiny_model("llama"), SPARSE), tokens(1, LENGTH)
    model(ids)
    twin = duplicate(model)
    assert hf.stats(twin) == hf.stats(model)
    assert torch.equal(twin(ids).logits, model(ids).logits)
    twin(ids)
    assert (hf.stats(twin).calls, hf.stats(model).calls) == (6, 4)
    hf.disable(twin)
    assert set(implementations(twin)) == {"sdpa"}
    assert set(implementations(model)) == {"stem"}


@torch.no_grad()
def test_an_enabled_model_saves_and_reloads_as_usual(tmp_path):
    model = enable(tiny_model("llama"), SPARSE)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_registered_name_runs_the_default_config(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    hf.register()
    ids = tokens(1, LENGTH)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="stem").eval()
    assert relative_error(model(ids).logits, expected) < 1e-6  # short, so dense
    with pytest.raises(ValueError, match="not enabled"):
        hf.stats(model)
    enable(model, SPARSE)
    model(ids)
    assert hf.stats(model).sparse == 2
    hf.disable(model)
    assert set(implementations(model)) == {"sdpa"}


def test_importing_the_package_leaves_transformers_alone():
    code = "import sys, stem_attn; assert not any(m.startswith('transformers') for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_adapter_registers_nothing():
    code = (
        "import stem_attn.integrations.hf\n"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS\n"
        "assert 'stem' not in ALL_ATTENTION_FUNCTIONS.valid_keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@torch.no_grad()
def test_budgets_fall_along_depth():
    model, ids = tiny_model("llama", num_hidden_layers=3), tokens(1, LENGTH)
    config = dataclasses.replace(SPARSE, budget_ratio=0.4)

    def density(**policy):
        enable(model, config, **policy)
        model(ids)
        return hf.stats(model).density

    as_factors = density(layer_budgets=(1.9, 1.0, 0.1))
    assert density(depth_decay=0.1) == as_factors
    assert density() != as_factors
