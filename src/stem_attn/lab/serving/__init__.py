"""Prompts in vLLM: its own attention backend against Stem."""
