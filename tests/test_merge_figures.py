"""Figures of merging: what is drawn are the frame's numbers."""

import pandas as pd
import pytest

from tinyr1_utils import merge_figures


def fusion_report() -> pd.DataFrame:
    """Two steps over two layers with one module each, whose weight and bias share a field, and an embedding."""
    rows = [
        (step, module, layer, elements, kept)
        for step in (1, 2)
        for module, layer, elements, kept in (
            ("mlp.up_proj", 0, 90, 0.1), ("mlp.up_proj", 0, 10, 1.0), ("mlp.up_proj", 1, 100, 0.05 * step),
            ("embed_tokens", -1, 50, 0.02),
        )
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["step", "module", "layer", "elements", "kept_fraction"])


def test_kept_by_layer_weighs_tensors_of_a_module_by_their_size():
    figure = merge_figures.kept_by_layer(fusion_report())
    first, second = (axes.collections[0].get_array() for axes in figure.axes[:2])
    assert [float(value) for value in first[1, 1:]] == pytest.approx([19.0, 5.0])  # 90 x 10 % + 10 x 100 % of 100
    assert float(second[1, 2]) == pytest.approx(10.0)
    assert float(first[0, 0]) == pytest.approx(2.0)
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["none", "0", "1"]


def test_a_recipe_without_a_report_says_so():
    figure = merge_figures.kept_by_layer(pd.DataFrame())
    assert "selects no elements" in figure.texts[0].get_text()
