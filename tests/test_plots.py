"""The pictures of a selection and of an adapter's counts."""

import math
import subprocess
import sys

import pytest
import torch

from helpers import SMALL, make_qkv
from stem_attn import plots, select_blocks
from stem_attn.integrations.hf import Stats
from stem_attn.methods.estimates import attention_mass

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
BLUE, ORANGE = (torch.tensor(color) / 255 for color in (plots.KEPT, plots.PRUNED))


@pytest.fixture
def selection():
    return select_blocks(*make_qkv(300, 400), config=SMALL)


def test_a_picture_shows_the_kept_blocks_of_a_head(selection):
    axes = selection.plot(head=2)
    (image,) = axes.get_images()
    mask = selection.to_mask()[0, 2]
    shown = torch.from_numpy(image.get_array().data)
    assert torch.equal((shown == 1).all(-1), ~mask)
    assert torch.allclose(shown[mask], BLUE.expand(int(mask.sum()), 3))
    first = selection.grid.first_block
    assert tuple(image.get_extent()) == (0, selection.grid.k_blocks, selection.grid.k_blocks, first)
    density = float(mask.sum()) / selection.grid.causal_blocks
    assert axes.get_title() == f"head 2: density {density:.3f}"


def test_without_a_head_the_share_of_heads_is_shown(selection):
    (image,) = selection.plot().get_images()
    share = selection.to_mask()[0].float().mean(0)
    shown = torch.from_numpy(image.get_array().data)
    assert torch.allclose(shown, 1 - share[..., None] * (1 - BLUE))
    assert f"density {selection.density():.3f}" in selection.plot().get_title()


def test_with_mass_pruned_blocks_are_shown_too(selection):
    q, k, _ = make_qkv(300, 400)
    mass = attention_mass(q, k, selection.grid, q.shape[3] ** -0.5)
    (image,) = selection.plot(head=0, mass=mass).get_images()
    shown, mask = torch.from_numpy(image.get_array().data), selection.to_mask()[0, 0]
    pruned = ~mask & (mass[0, 0] > 1e-3)
    assert pruned.any()
    strength = 1 - mass[0, 0].log() / math.log(plots.LEAST_MASS)
    assert torch.allclose(shown[pruned], (1 - strength[..., None] * (1 - ORANGE))[pruned], atol=1e-5)
    assert (shown[mask][:, 2] > shown[mask][:, 0]).all()  # more blue than red


def test_it_draws_into_given_axes(selection):
    axes = matplotlib.figure.Figure().subplots()
    assert selection.plot(axes=axes) is axes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"head": 4}, "head must be from 0 to 3, got 4"),
        ({"batch": 1}, "batch must be from 0 to 0, got 1"),
        ({"mass": torch.zeros(1, 4, 3, 3)}, "mass must have the shape"),
    ],
)
def test_what_is_not_there_is_an_error(selection, arguments, said):
    with pytest.raises(ValueError, match=said):
        selection.plot(**arguments)


def test_counts_are_drawn_by_kind():
    stats = Stats("stem", 12, 6, 2, {"decode": 3, "short prompt": 1}, 0.25, {}, 0, {}, {})
    axes = stats.plot()
    widths = [bar.get_width() for bar in axes.patches]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert dict(zip(names, widths, strict=True)) == {
        "sparse": 6,
        "banded (sliding window)": 2,
        "dense: decode": 3,
        "dense: short prompt": 1,
    }
    assert "12 attention calls, density 0.250" in axes.get_title()
    assert "nothing sparse yet" in Stats("stem", 0, 0, 0, {}, None, {}, 0, {}, {}).plot().get_title()


def test_importing_the_package_does_not_import_matplotlib():
    code = "import sys, stem_attn; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_matplotlib_the_error_says_what_to_install(selection, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        selection.plot()
