"""torch.export and torch.jit.trace of an enabled model are refused with the reason."""

import pytest
import torch

from hf_models import SPARSE, enable, tiny_model, tokens
from stem_attn.integrations import hf

REASON = r"cannot be exported: .* call hf.disable\(model\) first"


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_export_is_refused(strict, padded, grad):
    torch._dynamo.reset()
    model, ids = enable(tiny_model("llama"), SPARSE), tokens(1, 200)
    inputs = {"use_cache": False, **({"attention_mask": torch.ones_like(ids)} if padded else {})}
    with torch.set_grad_enabled(grad), pytest.raises(Exception, match=REASON):
        torch.export.export(model, (ids,), inputs, strict=strict)
    hf.disable(model)
    with torch.set_grad_enabled(grad):
        torch.export.export(model, (ids,), inputs, strict=False)


def test_tracing_is_refused():
    model = enable(tiny_model("llama"), SPARSE)
    with pytest.raises(ValueError, match=REASON):
        torch.jit.trace(model, (tokens(1, 200),), strict=False)
