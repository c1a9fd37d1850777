"""Adapters to other systems; each is imported by name, so that `stem_attn` itself needs torch only."""
