"""RULER: NVIDIA's synthetic long-context tasks, made and scored by our own code, offline.

Given a tokenizer and a seed, the prompts of the tasks that need no downloaded text are NVIDIA's, byte for byte
(NVIDIA/RULER at commit c3f5e3b).
"""
