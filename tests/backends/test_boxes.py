"""Descriptors that are copies of a checked one."""

import gc
import weakref

import pytest
import torch

pytest.importorskip("triton")
from triton.tools.tensor_descriptor import TensorDescriptor

from stem_attn.backends.triton.boxes import Boxes


def gluon_descriptor(x):
    gluon = pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
    from triton.experimental.gluon.language import NVMMASharedLayout, float16

    return gluon.TensorDescriptor.from_tensor(x, [64, 64], NVMMASharedLayout.get_default_for([64, 64], float16))


@pytest.mark.parametrize("make", [lambda x: TensorDescriptor.from_tensor(x, [64, 64]), gluon_descriptor])
def test_a_copy_is_what_would_be_made(make):
    first, second = torch.zeros(100, 128, dtype=torch.float16), torch.ones(100, 128, dtype=torch.float16)
    boxes = Boxes(make)
    for x in (first, second, first):
        got, expected = boxes.of(x), make(x)
        assert type(got) is type(expected)
        assert got.base is x
        assert {**vars(got), "base": None} == {**vars(expected), "base": None}


def test_no_tensor_is_kept():
    boxes = Boxes(lambda x: TensorDescriptor.from_tensor(x, [64, 64]))
    x = torch.zeros(100, 128)
    boxes.of(x)
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None


def test_the_first_is_checked():
    odd = torch.zeros(100, 129, dtype=torch.float16)[:, 1:]
    with pytest.raises(AssertionError, match="16-byte aligned"):
        Boxes(lambda x: TensorDescriptor.from_tensor(x, [64, 64])).of(odd)


def test_another_thread_finds_a_descriptor_whole():
    first, second = torch.zeros(100, 128), torch.ones(100, 128)
    found = []

    class Watched(Boxes):
        """Asked by another thread as soon as it knows the kind."""

        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "_kind" and value is not None:
                found.append(self.of(second))

    Watched(lambda x: TensorDescriptor.from_tensor(x, [64, 64])).of(first)
    assert found[0].base is second
    assert found[0].block_shape == [64, 64]
