"""The demo's plot: a line a request, from asking to the last word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.demo.burst import KINDS
from benchmarks.demo.client import Answer

_COLOURS = {"story": "tab:blue", "question": "tab:orange"}


def picture(answers: Mapping[str, Sequence[Answer]]) -> Figure:
    """A panel a system: grey while a request waits for its first word, a dot for each piece."""
    figure = Figure(figsize=(6.5 * len(answers), 5.5), layout="constrained")
    panels = figure.subplots(1, len(answers), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (name, of) in zip(panels, answers.items(), strict=True):
        for row, answer in enumerate(of):
            asked_s = answer.ask.at_s
            axes.hlines(row, asked_s, asked_s + answer.first_s, color="lightgrey", lw=5)
            times = [asked_s + time_s for time_s in answer.times_s]
            axes.plot(times, [row] * len(times), ".", ms=3, color=_COLOURS[answer.ask.kind])
        axes.set_title(name)
        axes.set_xlabel("seconds")
        axes.set_yticks([])
    panels[0].set_ylabel("requests, in order of arrival")
    panels[0].invert_yaxis()
    marks = [
        Line2D([], [], color="lightgrey", lw=5, label="waits for the first word"),
        *(
            Line2D([], [], color=_COLOURS[kind], ls="", marker=".", label=KINDS[kind])
            for kind in KINDS
        ),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=3, frameon=False)
    return figure
