"""The heat map says what it shows: of which model, by which method, in which unit."""
import re

import torch

from llmopt.heads import Gradient, Span
from llmopt.heads.base import figure_of
from tests.command import call


def test_a_plot_has_title_labels_and_unit(tmp_path):
    figure = figure_of([torch.tensor([1.0, 2.0]), torch.tensor([3.0])], "heads.span of $m$", Span.unit)
    axes, bar = figure.axes
    assert axes.get_title() == "heads.span of $m$"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("head", "layer")
    assert bar.get_ylabel() == "mean attended distance in tokens"
    figure.savefig(tmp_path / "h.svg")
    assert Gradient(normalize="none").unit == "mean |dL/dgate|"
    assert "norm" in Gradient().unit


def test_the_command_names_model_and_method(tmp_path, monkeypatch, capfd):
    words = ("heads", "llmopt/reference", "--samples", "2", "--data", "world", "--plot", tmp_path / "h.svg")
    monkeypatch.setitem(__import__("matplotlib").rcParams, "svg.fonttype", "none")      # text as text
    assert call(monkeypatch, "-q", *words) == 0
    assert "processor time" not in capfd.readouterr().err                               # -q
    text = (tmp_path / "h.svg").read_text()
    assert "heads.span of llmopt/reference" in text
    assert "mean attended distance in tokens" in text


def test_the_command_tells_what_each_score_took(monkeypatch, capfd):
    words = ("heads", "llmopt/reference", "--samples", "2", "--length", "32", "--data", "world", "--json")
    assert call(monkeypatch, *words, "--method", "heads.span", "--method", "heads.need90") == 0
    told = re.findall(r"^(heads\.\w+) took [\d.]+ s, [\d.]+ s of processor time$", capfd.readouterr().err, re.M)
    assert told == ["heads.span", "heads.need90"]
