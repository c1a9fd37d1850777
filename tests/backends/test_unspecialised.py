"""What kernels leave unspecialised are parameters of theirs: Triton takes any name, and says nothing of a wrong one."""

import sys

import pytest

from compiling import run_alone

pytest.importorskip("triton", minversion="3.6")


def test_attention_kernels_leave_the_same_numbers_open() -> None:
    run_alone(__file__, "attention")


def test_mass_kernels_leave_the_same_numbers_open() -> None:
    run_alone(__file__, "mass")


def attention() -> None:
    from stem_attn.backends.triton.attention_kernel import attention_kernel
    from stem_attn.backends.triton.hopper_fp8_kernel import hopper_fp8_kernel
    from stem_attn.backends.triton.hopper_kernel import hopper_attention_kernel
    from stem_attn.backends.triton.launch_order import UNSPECIALISED

    for kernel, more in (
        (attention_kernel, {"table_stride"}),
        (hopper_attention_kernel, set()),
        (hopper_fp8_kernel, set()),
    ):
        assert {p.name for p in kernel.params if p.do_not_specialize} == {*UNSPECIALISED, *more}


def mass() -> None:
    from stem_attn.backends.triton.hopper_mass_kernel import hopper_mass_kernel
    from stem_attn.backends.triton.mass_kernels import UNSPECIALISED, mass_kernel

    for kernel in (mass_kernel, hopper_mass_kernel):
        assert {p.name for p in kernel.params if p.do_not_specialize} == set(UNSPECIALISED)


if __name__ == "__main__":
    {"attention": attention, "mass": mass}[sys.argv[1]]()
