"""The dashboard in Grafana's JSON, and the files that provision it."""

from __future__ import annotations

import json
from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models

from scripts.dashboards.panels import ROWS, Panel
from scripts.dashboards.queries import BY_NAME

_DATASOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
_WIDTH = 24
_LIVE = BY_NAME["jobs"].sample_name


def dashboard_json() -> str:
    """The whole dashboard."""
    board = (
        dashboard.Dashboard("FastServe")
        .uid("fastserve")
        .description("vLLM scheduled by FastServe: who waits, what it costs, where memory goes.")
        .tags(["vllm", "fastserve"])
        .readonly()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .refresh("10s")
        .time("now-30m", "now")
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Source").type("prometheus")
        )
        .with_variable(_variable("model_name", "Model", _LIVE))
        .with_variable(_variable("engine", "Engine", f'{_LIVE}{{model_name=~"$model_name"}}'))
    )
    for row in ROWS:
        board = board.with_row(dashboard.Row(row.question))
        for panel, width in zip(row.panels, _widths(row.panels), strict=True):
            board = board.with_panel(_panel(panel, width))
    return json.dumps(board.build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def provisioning() -> dict[str, Any]:
    """Files by path below Grafana's provisioning folder."""
    provider = {
        "name": "FastServe",
        "type": "file",
        "options": {"path": "/etc/grafana/dashboards"},
    }
    source = {
        "name": "Prometheus",
        "type": "prometheus",
        "access": "proxy",
        "url": "http://localhost:9090",
        "isDefault": True,
        "jsonData": {"timeInterval": "5s"},
    }
    return {
        "dashboards/fastserve.yml": {"apiVersion": 1, "providers": [provider]},
        "datasources/prometheus.yml": {"apiVersion": 1, "datasources": [source]},
    }


def _variable(name: str, label: str, metric: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(_DATASOURCE)
        .query(f"label_values({metric}, {name})")
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .include_all(True)
        .multi(True)
        .all_value(".*")
        .current(models.VariableOption(selected=True, text="All", value="$__all"))
    )


def _widths(panels: tuple[Panel, ...]) -> list[int]:
    """Columns of each panel: six numbers or three drawings side by side, the last row filled."""
    side_by_side = 6 if panels[0].look == "number" else 3
    widths = []
    for start in range(0, len(panels), side_by_side):
        here = len(panels[start : start + side_by_side])
        widths += [_WIDTH // here] * here
    return widths


def _panel(panel: Panel, width: int) -> Any:
    built = _number(panel) if panel.look == "number" else _drawing(panel)
    built.title(panel.title).description(panel.says).datasource(_DATASOURCE).unit(panel.unit)
    for query, name in zip(panel.queries, "ABCDEF", strict=False):
        target = prometheus.Dataquery().expr(query.expr).ref_id(name).legend_format(query.legend)
        built.with_target(target)
    return built.span(width).height(4 if panel.look == "number" else 8)


def _number(panel: Panel) -> Any:
    steps = [models.Threshold(value=None, color="green")]
    if panel.warn is not None:
        steps.append(models.Threshold(value=panel.warn, color="yellow"))
    if panel.alarm is not None:
        steps.append(models.Threshold(value=panel.alarm, color="red"))
    thresholds = dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)
    latest = common.ReduceDataOptions().calcs(["lastNotNull"])
    number = stat.Panel().thresholds(thresholds).reduce_options(latest)
    return number.graph_mode(common_models.BigValueGraphMode.AREA)


def _drawing(panel: Panel) -> Any:
    drawing = timeseries.Panel().min(0).line_width(1).fill_opacity(8)
    if panel.look == "stack":
        stacking = common.StackingConfig().mode(common_models.StackingMode.NORMAL)
        drawing.stacking(stacking).fill_opacity(45)
    return drawing
