"""Compile kernels for a Hopper GPU without one, in a process of their own, where Triton is not in its interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any


def compile_for_hopper(kernel: Any, types: dict[str, Any], constants: dict[str, Any], **options: Any) -> Any:
    """Compile for compute capability 9.0; arguments that `types` does not name are int32."""
    return compile_for(("cuda", 90, 32), kernel, types, constants, **options)


def compile_for(
    target: tuple[str, Any, int], kernel: Any, types: dict[str, Any], constants: dict[str, Any], **options: Any
) -> Any:
    """Compile for a backend of Triton's, an architecture and its threads a warp."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    names = kernel.arg_names
    types = types | dict.fromkeys(constants, "constexpr")
    source = (GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource)(
        fn=kernel,
        signature={name: types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    return triton.compile(source, target=GPUTarget(*target), options=options)


def run_alone(file: str, *arguments: object, timeout: int = 120, **env: str) -> None:
    """Run a test file as a script, without Triton's interpreter."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]  # where this file is
    env = {"PYTHONPATH": os.pathsep.join(paths)} | env
    subprocess.run([sys.executable, file, *map(str, arguments)], env=inherited | env, check=True, timeout=timeout)


def cuobjdump() -> Path:
    """Return where Triton's own cuobjdump would be."""
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


# Bytes on the stack that were seen beyond those of Triton 3.6, which the tests run with: with 3.7 by three kernels of
# eight bits, with 3.8 by two of them and by the Hopper mass kernel.
MORE_STACK = {(3, 6): 0, (3, 7): 64, (3, 8): 104}


def assert_no_spills(binary: Path, stack: int = 0) -> None:
    """Read off a kernel's binary that its threads use no local memory, and no more stack than some bytes.

    With another Triton than 3.6 it may be as much more as was seen with it.
    """
    from stem_attn.backends.triton.devices import TRITON

    stack += MORE_STACK.get(TRITON, max(MORE_STACK.values()))
    report = subprocess.run([cuobjdump(), "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    usage = re.search(r"STACK:(\d+).*LOCAL:(\d+)", report)
    assert usage is not None, report
    assert int(usage[1]) <= stack, report
    assert usage[2] == "0", report
