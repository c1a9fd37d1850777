"""The paper's own tests of its ideas, each as methods to compare at equal density.

Every method is the official preset with a field or two changed, so a row of one test may stand in another as well; it
is measured once.

Source: Stem (arXiv 2603.06274), Tables 1 and 5, Figures 3 and 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stem_attn.config import StemConfig
from stem_attn.lab.named_methods import NamedMethod

_BASE = "stem-official"


@dataclass(frozen=True, slots=True)
class PaperTest:
    """One table or figure.

    Args:
        title: What is compared.
        methods: (label, method) pairs in the order of the table.
        densities: Where the test needs densities of its own, those; otherwise those of the run.
    """

    title: str
    methods: tuple[tuple[str, NamedMethod], ...]
    densities: tuple[float, ...] | None = None


def _official(rows: tuple[float, float] = (0.0, 1.0), **fields: Any) -> NamedMethod:
    preset = StemConfig.preset("official")
    fields = {name: value for name, value in fields.items() if value != getattr(preset, name)}
    changes = [f"{name}={value}" for name, value in fields.items()]
    if rows != (0.0, 1.0):
        changes.append(f"rows={rows[0]:.0%}-{rows[1]:.0%}")
    return NamedMethod(" ".join([_BASE, *changes]), _BASE, fields, rows)


_SCORE_ONLY = _official(value_term="none")
_UNIFORM = _official(value_term="none", decay=1.0)

PAPER_TESTS = {
    "table1": PaperTest(
        "Output-Aware Metric against the score alone (Table 1)",
        (
            ("score only", _SCORE_ONLY),
            ("+ value term of the paper (log)", _official(value_term="log")),
            ("+ value term of the official code (z-score)", _official()),
        ),
    ),
    "table5": PaperTest(
        "Uniform, + Token Position-Decay, + Output-Aware Metric (Table 5)",
        (("uniform", _UNIFORM), ("+ TPD", _SCORE_ONLY), ("+ TPD + OAM", _official())),
    ),
    # The early half of the rows has a quarter of the pairs: as many as are cut here, it can lose.
    "figure3": PaperTest(
        "Sparse in the early half of the rows only, or in the late half only (Figure 3)",
        (
            ("early half", _official(rows=(0.0, 0.5))),
            ("late half", _official(rows=(0.5, 1.0))),
        ),
        densities=(0.85, 0.9),
    ),
    "figure5": PaperTest(
        "Sensitivity to the decay mu and the value weight beta (Figure 5)",
        (
            *((f"mu = {mu:g}", _official(decay=mu)) for mu in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
            ("beta = 0", _SCORE_ONLY),
            *((f"beta = {beta:g}", _official(value_weight=beta)) for beta in (0.1, 0.2, 0.3, 0.5, 1.0)),
        ),
    ),
}
