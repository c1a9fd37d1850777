"""The benchmark command: correctness first, then medians of every kernel a user could pick, in one run."""
