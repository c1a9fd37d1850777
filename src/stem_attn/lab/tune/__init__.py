"""Budgets by layer for a fidelity target."""
