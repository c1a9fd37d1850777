"""Keep cores busy beside a command: N loops that may move between all cores.

    python -m stem_attn.lab.load_cores 2 stem-attn bench --device cpu ...

The loops end with the command, whose exit code is returned.
"""

import subprocess
import sys

# Ends also when the parent is killed.
_LOOP = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(10000))"

if __name__ == "__main__":
    if len(sys.argv) < 3 or not sys.argv[1].isdecimal():
        sys.exit("usage: python load_cores.py LOOPS COMMAND [ARGUMENT ...]")
    loops = [subprocess.Popen([sys.executable, "-c", _LOOP]) for _ in range(int(sys.argv[1]))]
    try:
        sys.exit(subprocess.run(sys.argv[2:]).returncode)
    finally:
        for loop in loops:
            loop.kill()
