"""What is shown while a corpus is tokenised, and the plot of a run."""

import io

import pytest
from rich.console import Console

from fastbert import system
from fastbert.train import report
from fastbert.train.report import TokenizingReporter


@pytest.fixture
def shown(monkeypatch):
    def console(**options):
        out = io.StringIO()
        made = Console(file=out, width=120, **options)
        for module in (report, system.console):  # the latter's for the bar
            monkeypatch.setattr(module, "console", made)
        return out

    return console


def test_plain_lines_come_now_and_then(shown, monkeypatch):
    out = shown(force_terminal=False)
    now = iter([0.0, 0.0, 5.0, 12.0, 13.0, 20.0])
    monkeypatch.setattr(report.time, "perf_counter", lambda: next(now, 20.0))
    with TokenizingReporter(6_000_000) as reporter:
        for part in range(1, 7):  # the first is of an earlier run
            reporter(10 * part, 1000 * part, 1_000_000 * part)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("tokenised 40 documents, 4,000 tokens, 67% of 6.0 MB, 250 tokens/s")
    assert lines[1].startswith("tokenised 60 documents, 6,000 tokens, 100% of 6.0 MB, 250 tokens/s")
    assert len(lines) == 2


def test_a_terminal_shows_a_bar(shown):
    out = shown(force_terminal=True)
    with TokenizingReporter(4_000_000) as reporter:
        reporter(10, 1000, 0)  # of an earlier run
        reporter(20, 2000, 2_000_000)
        reporter.progress.refresh()
    said = out.getvalue()
    assert "tokenising" in said
    assert "20 documents, 2,000 tokens, 50% of 4.0 MB" in said
    assert "━" in said


def test_a_finished_cache_and_an_unknown_size_are_shown_too(shown):
    out = shown(force_terminal=False)
    with TokenizingReporter(0):
        pass
    assert out.getvalue() == ""
    with TokenizingReporter(0) as reporter:
        reporter(0, 0, 0)
        reporter(3, 500, 0)
    assert "%" not in out.getvalue()
    assert out.getvalue().startswith("tokenised 3 documents, 500 tokens")


@pytest.mark.parametrize("pairs", [{"nsp_loss": 0.7}, {}], ids=["pairs", "words"])
def test_a_plot_has_room_around_its_curves(pairs, tmp_path, monkeypatch):
    """From 0 only where the loss of pairs is drawn: losses of words alone lie close together."""
    import matplotlib.pyplot as plt

    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    history = [
        {"step": 20, "loss": 6.2, "mlm_loss": 6.2, **pairs},
        {"step": 40, "loss": 6.1, "mlm_loss": 6.1, **pairs},
        {"step": 40, "heldout_mlm_loss": 6.33},
    ]
    report.plot_losses(history, {"teacher": 6.36}, tmp_path / "loss.png", "Distillation")
    monkeypatch.undo()
    low, high = kept[0].axes[0].get_ylim()
    plt.close(kept[0])
    assert (low == 0) == bool(pairs)
    assert high - 6.36 > 0.03 * (high - low)
    assert low == 0 or 6.1 - low > 0.03 * (high - low)
