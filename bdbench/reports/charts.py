"""The charts of a report as Vega-Lite specifications without data, and the JavaScript that draws them."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Sequence
from functools import cache
from typing import Any

import altair as alt
import vl_convert

HEIGHT = 320


def specifications(defenses: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the charts by name; the page fills in the datasets `cells`, `detection`, `history` and `rounds`.

    Args:
        defenses: all columns of the report, so that each has one colour everywhere.
    """
    charts = {
        "quality": _quality(defenses),
        "cost": _cost(defenses),
        "detection": _detection(defenses),
        "loss": _loss(),
        "rounds": _rounds(),
    }
    return {name: chart.to_dict() for name, chart in charts.items()}


@cache
def library() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as JavaScript, gzip, base64: a third of its size."""
    bundle = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub leaves out the default
    return base64.b64encode(gzip.compress(bundle.encode(), 9, mtime=0)).decode()


def _points(defenses: Sequence[str]) -> alt.Chart:
    """Return a point per cell: filled, or hollow where the attack failed."""
    colours = alt.Scale(domain=list(defenses))
    chart: alt.Chart = (
        alt.Chart(alt.NamedData("cells"))
        .mark_point(size=80, strokeWidth=1.8, cursor="pointer")
        .encode(
            stroke=alt.Stroke("defense:N", title="defense", scale=colours, legend=alt.Legend(symbolOpacity=1)),
            fill=alt.Fill("defense:N", title="defense", scale=colours),
            shape=alt.Shape("defense:N", title="defense", scale=alt.Scale(domain=list(defenses))),
            fillOpacity=alt.condition("datum.weak", alt.value(0), alt.value(0.75)),
            tooltip=[
                alt.Tooltip("attack:N"),
                alt.Tooltip("defense:N", title="defense"),
                alt.Tooltip("ba:Q", title="BA", format=".3f"),
                alt.Tooltip("asr:Q", title="ASR", format=".3f"),
                alt.Tooltip("floor:Q", format=".3f"),
                alt.Tooltip("seconds:Q", format=",.0f"),
                alt.Tooltip("mebibytes:Q", title="peak MiB", format=",.0f"),
                alt.Tooltip("note:N"),
            ],
        )
        .properties(width="container", height=HEIGHT)
    )
    return chart


APART = alt.Axis(labelOverlap="greedy", labelSeparation=10, tickCount=6)
"""Labels that would touch are left out."""

ASR = alt.Y("asr:Q", title="ASR (low is good)", scale=alt.Scale(domain=[0, 1]))


def _quality(defenses: Sequence[str]) -> alt.Chart:
    benign = alt.X("ba:Q", title="BA (high is good)", scale=alt.Scale(zero=False, nice=True, padding=12), axis=APART)
    chart: alt.Chart = _points(defenses).encode(x=benign, y=ASR)
    return chart


def _cost(defenses: Sequence[str]) -> alt.Chart:
    seconds = alt.X(
        "seconds:Q", title="seconds to train (logarithmic)", scale=alt.Scale(type="log", padding=12), axis=APART
    )
    # An area that grows from nothing at 0 MiB: twice the memory is twice the area.
    memory = alt.Size("mebibytes:Q", title="peak MiB", scale=alt.Scale(range=[0, 260], zero=True)).legend(tickCount=3)
    chart: alt.Chart = _points(defenses).encode(x=seconds, y=ASR, size=memory)
    return chart


def _detection(defenses: Sequence[str]) -> alt.Chart:
    chosen = alt.selection_point(fields=["defense"], bind="legend")
    chart: alt.Chart = (
        alt.Chart(alt.NamedData("detection"))
        .mark_line(interpolate="step-after", strokeWidth=1.8)
        .encode(
            x=alt.X("fpr:Q", title="clean samples taken for poison (logarithmic)", scale=alt.Scale(type="log")).axis(
                format=".1%", values=[0.001, 0.01, 0.05, 0.1, 1]
            ),
            y=alt.Y("tpr:Q", title="poison found", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format=".0%")),
            color=alt.Color("defense:N", title="defense", scale=alt.Scale(domain=list(defenses))),
            strokeDash=alt.StrokeDash("attack:N", title="attack"),
            detail="run:N",
            opacity=alt.condition(chosen, alt.value(0.85), alt.value(0.1)),
            tooltip=["attack:N", alt.Tooltip("defense:N", title="defense"), "seed:N"],
        )
        .add_params(chosen)
        .properties(width="container", height=HEIGHT)
    )
    return chart


def _loss() -> alt.Chart:
    chart: alt.Chart = (
        alt.Chart(alt.NamedData("history"))
        .mark_line(point=True, strokeWidth=1.8)
        .encode(
            x=alt.X("count:Q", axis=alt.Axis(labelExpr="datum.value % 1 ? '' : format(datum.value, 'd')")),
            y=alt.Y("loss:Q", scale=alt.Scale(zero=False)),
            color=alt.Color("seed:N"),
            tooltip=["seed:N", "count:Q", alt.Tooltip("loss:Q", format=".4g")],
        )
        .properties(width="container", height=150)
    )
    return chart


def _rounds() -> alt.Chart:
    """Return how right a method would have been after each epoch: a line per metric and seed."""
    chart: alt.Chart = (
        alt.Chart(alt.NamedData("rounds"))
        .mark_line(point=True, strokeWidth=1.8)
        .encode(
            x=alt.X("epoch:Q", axis=alt.Axis(labelExpr="datum.value % 1 ? '' : format(datum.value, 'd')")),
            y=alt.Y("value:Q", title="share", scale=alt.Scale(domain=[0, 1])),
            color=alt.Color("seed:N"),
            strokeDash=alt.StrokeDash(
                "metric:N", title="set aside", sort=None, legend=alt.Legend(symbolType="stroke", columns=1)
            ),
            tooltip=["seed:N", "epoch:Q", "metric:N", alt.Tooltip("value:Q", format=".3f")],
        )
        .properties(width="container", height=150)
    )
    return chart
