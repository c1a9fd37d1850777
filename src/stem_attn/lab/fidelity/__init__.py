"""What methods of sparse attention cost in fidelity, on real text."""
