import pytest
import torch

from helpers import SMALL, make_qkv
from stem_attn import methods, select_blocks, stem_attention, stem_attention_paged, stem_attention_varlen

Q_LENS, K_LENS = [130, 1, 300, 16], [130, 70, 333, 16]


def pack():
    parts = [
        make_qkv(q_len, k_len, v_dim=24, seed=seed)
        for seed, (q_len, k_len) in enumerate(zip(Q_LENS, K_LENS, strict=True))
    ]
    packed = [torch.cat([x[0].transpose(0, 1) for x in column]) for column in zip(*parts, strict=True)]
    return parts, packed


def starts(lengths):
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


@pytest.mark.parametrize("as_tensor", [False, True])
def test_each_sequence_as_if_alone(as_tensor):
    parts, packed = pack()
    cu_q, cu_k = starts(Q_LENS), starts(K_LENS)
    if as_tensor:
        cu_q, cu_k = torch.tensor(cu_q, dtype=torch.int32), torch.tensor(cu_k, dtype=torch.int32)
    lengths = [500, 70, 400, 16]
    out = stem_attention_varlen(*packed, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, config=SMALL, prompt_len=lengths)
    assert out.shape == (sum(Q_LENS), 4, 24)
    for part, got, n in zip(parts, out.split(Q_LENS), lengths, strict=True):
        alone = stem_attention(*part, config=SMALL, prompt_len=n)
        torch.testing.assert_close(got, alone[0].transpose(0, 1), atol=1e-6, rtol=1e-5)


def test_selections_and_one_prompt_length_for_all():
    parts, packed = pack()
    cu = {"cu_seqlens_q": starts(Q_LENS), "cu_seqlens_k": starts(K_LENS)}
    _, selections = stem_attention_varlen(*packed, **cu, config=SMALL, prompt_len=600, return_selection=True)
    for part, selection in zip(parts, selections, strict=True):
        alone = select_blocks(*part, config=SMALL, prompt_len=600)
        assert torch.equal(selection.to_mask(), alone.to_mask())


@pytest.mark.parametrize("name", sorted(set(methods.METHODS) - {"stem"}))
def test_every_method_runs_packed_and_paged(name):
    fields = {"config": SMALL} if name == "uniform" else {"block_size": 16}
    method = methods.make(name, **fields)
    parts, packed = pack()
    cu = {"cu_seqlens_q": starts(Q_LENS), "cu_seqlens_k": starts(K_LENS)}
    out = stem_attention_varlen(*packed, **cu, method=method)
    expected = torch.cat([stem_attention(*part, method=method)[0].transpose(0, 1) for part in parts])
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    # The packed keys as pages of one token.
    table = torch.zeros(4, max(K_LENS), dtype=torch.int32)
    for row, (first, n) in enumerate(zip(starts(K_LENS), K_LENS, strict=False)):
        table[row, :n] = torch.arange(first, first + n)
    pages = packed[1][:, None], packed[2][:, None]
    paged = stem_attention_paged(
        packed[0], *pages, cu_seqlens_q=cu["cu_seqlens_q"], seq_lens=K_LENS, block_table=table, method=method
    )
    torch.testing.assert_close(paged, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": [0, 10]}, "from 0 to 447 tokens"),
        ({"cu_seqlens_q": [0, 130, 130, 447]}, "rising"),
        ({"cu_seqlens_q": [1, 447]}, "rising ints from 0"),
        ({"cu_seqlens_k": [0, 549]}, "5 rising ints"),
        ({"cu_seqlens_k": None}, "cu_seqlens_k must be 5 rising ints from 0 to 549"),
        ({"cu_seqlens_k": [0, 100, 200, 533, 549]}, "more tokens than k"),
        ({"prompt_len": [130]}, "4 ints"),
        ({"prompt_len": [129, 70, 333, 16]}, "sequence 0 has 130, and got 129"),
    ],
)
def test_bad_packing_is_refused(change, message):
    _, packed = pack()
    kwargs = {"cu_seqlens_q": starts(Q_LENS), "cu_seqlens_k": starts(K_LENS), "config": SMALL, **change}
    with pytest.raises(ValueError, match=message):
        stem_attention_varlen(*packed, **kwargs)


def test_tensors_must_be_packed():
    q, k, v = make_qkv(20)
    with pytest.raises(ValueError, match=r"packed tensor \[tokens, heads, head_dim\]"):
        stem_attention_varlen(q, k, v, cu_seqlens_q=[0, 20], config=SMALL)
