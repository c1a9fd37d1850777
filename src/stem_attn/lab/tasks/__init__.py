"""Long-context tasks: prompts made here, offline, answered under dense attention and under sparse methods."""
