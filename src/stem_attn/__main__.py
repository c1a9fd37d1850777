"""Run the command line: `python -m stem_attn`."""

from stem_attn.cli import main

if __name__ == "__main__":  # processes that a command starts import this file too
    main()
