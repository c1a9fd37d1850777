"""Models spread over devices or processes."""

import socket

import pytest
import torch
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM

from hf_models import SPARSE, enable, relative_error, tiny_model, tokens
from stem_attn.integrations import hf

LENGTH = 200


@torch.no_grad()
def test_device_map_with_offload(tmp_path):
    pytest.importorskip("accelerate")
    model, ids = enable(tiny_model("llama", num_hidden_layers=3), SPARSE), tokens(2, LENGTH)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :37] = 0
    expected = model(ids, attention_mask=mask).logits
    model.save_pretrained(tmp_path / "model")
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    enable(spread, SPARSE)
    actual = spread(ids, attention_mask=mask).logits
    assert relative_error(actual[mask.bool()], expected[mask.bool()]) < 1e-5
    assert hf.stats(spread).sparse == 3


def _tensor_parallel_worker(rank, port, folder, ids, expected, errors):
    import os

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    enable(model, SPARSE)
    with torch.no_grad():
        logits = model(ids).logits
    errors[rank] = relative_error(logits, expected)
    assert hf.stats(model).sparse == 2
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.to_local().shape[0] == 64 // 2  # really split
    torch.distributed.destroy_process_group()


@torch.no_grad()
def test_tensor_parallel_over_two_processes(tmp_path):
    model, ids = enable(tiny_model("llama"), SPARSE), tokens(1, LENGTH)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    errors = torch.ones(2).share_memory_()
    mp.spawn(_tensor_parallel_worker, (port, str(tmp_path), ids, expected, errors), nprocs=2)
    assert errors.max() < 1e-5
