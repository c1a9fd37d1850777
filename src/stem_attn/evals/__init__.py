"""Whole-model evaluation: what Stem does to a real model on real prompts."""
