"""Run the command line: `python -m stem_attn`."""

from stem_attn.cli import main

main()
