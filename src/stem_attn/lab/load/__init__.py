"""Two servers under the same load: one with dense attention, one with Stem."""
