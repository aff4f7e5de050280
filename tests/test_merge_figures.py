"""Figures of merging: what is drawn are the frame's numbers."""

import numpy as np
import pandas as pd
import pytest
from IPython.core.pylabtools import print_figure

from tinyr1_utils import merge_figures, merge_reading


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
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["–", "0", "1"]


def test_a_recipe_without_a_report_says_so():
    figure = merge_figures.kept_by_layer(pd.DataFrame())
    assert "selects no elements" in figure.texts[0].get_text()


def reading(steps: int, **changes) -> pd.DataFrame:
    """One layer's frame with two matrices and a vector in each step."""
    rows = []
    for step in range(1, steps + 1):
        for name, shape in (("mlp.down_proj", (4, 8)), ("self_attn.q_proj", (8, 4)), ("input_layernorm", (32,))):
            counts, density = np.array([3, 21, 4 + step]), np.full((2, 2), 0.1 * step)
            row = {"step": step, "base": "science", "other": "math", "module": name, "shape": shape, "elements": 32}
            row |= {"tensor": f"model.layers.0.{name}.weight", "kept_fraction": 0.1 * step, "threshold": 0.2}
            rows.append(row | {"degenerate": False, "zeros": 0, "lowest": -4, "counts": counts, "density": density})
    return pd.DataFrame(rows).assign(**changes)


def test_a_layers_histograms_and_masks_are_the_frames():
    figure = merge_figures.merge_layer(reading(2))
    panels = figure.axes[:8]  # two matrices x two steps, the query first; then the colour bar
    assert [axes.get_ylabel().partition("\n")[0] for axes in panels[::4]] == ["q_proj", "down_proj"]
    first, last = panels[0], panels[6]
    assert [bar.get_height() for bar in first.patches] == pytest.approx([300 / 32, 2100 / 32, 500 / 32])
    assert [bar.get_x() for bar in first.patches] == [2**-4, 2**-3, 2**-2]
    assert first.lines[0].get_xdata()[0] == 0.2
    assert [axes.texts[0].get_text() for axes in (first, last)] == ["kept 10.0 %", "kept 20.0 %"]
    masks = [panels[place].images[0] for place in (1, 7)]
    assert [float(mask.get_array()[0, 0]) for mask in masks] == pytest.approx([10.0, 20.0])
    assert {mask.get_clim() for mask in masks} == {(0.0, 20.0)}


def test_what_a_histogram_can_not_show_is_said():
    nothing = {"counts": [np.array([], int)] * 3, "zeros": 32, "degenerate": True, "threshold": 0.0}
    axes = merge_figures.merge_layer(reading(1, **nothing, kept_fraction=0.0)).axes[0]
    assert axes.texts[0].get_text() == "kept 0.0 %\nzero 100.0 %\ndegenerate"
    assert not axes.patches and not axes.lines


def test_a_recipe_without_a_threshold_says_so():
    for frame in (pd.DataFrame(columns=merge_reading.READING), reading(1).query("module == 'input_layernorm'")):
        figure = merge_figures.merge_layer(frame)
        assert "by a threshold" in figure.texts[0].get_text()
        assert print_figure(figure), "a notebook shows it"
