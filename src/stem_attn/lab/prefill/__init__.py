"""One long prompt, dense attention beside Stem."""
