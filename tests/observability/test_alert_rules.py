"""The alert rules on made-up series, by Prometheus' own tool."""

import shutil
import subprocess

import pytest
import yaml

from scripts.dashboards.alerts import ALERTS
from scripts.dashboards.files import ROOT

pytestmark = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed: apt-get install prometheus"
)
GRAFANA = ROOT / "examples" / "grafana"
LABELS = 'model_name="m",engine="0"'

# Of each alert: series by name that make it fire, and such as do not, over an hour by the minute.
CASES = {
    "FastServeStarvation": (
        {'longest_wait_seconds{level="3"}': "16x60", "starvation_limit_seconds{}": "3x60"},
        {'longest_wait_seconds{level="3"}': "14x60", "starvation_limit_seconds{}": "3x60"},
    ),
    "FastServeThrash": (
        {"swapped_out_total{}": "0+60x60", "started_total{}": "0+100x60"},
        {"swapped_out_total{}": "0+40x60", "started_total{}": "0+100x60"},
    ),
    "FastServeRecomputing": (
        {"recomputed_tokens_total{}": "0+30x60", 'batch_tokens_total{phase="prefill"}': "0+100x60"},
        {"recomputed_tokens_total{}": "0+10x60", 'batch_tokens_total{phase="prefill"}': "0+100x60"},
    ),
    "FastServeHostPoolFull": (
        {'host_blocks{use="held"}': "96x60", 'host_blocks{use="free"}': "4x60"},
        {'host_blocks{use="held"}': "80x60", 'host_blocks{use="reclaimable"}': "20x60"},
    ),
    "FastServeCopiesStall": (
        {"copy_wait_seconds_total{}": "0+12x60", "step_seconds_sum{}": "0+60x60"},
        {"copy_wait_seconds_total{}": "0+3x60", "step_seconds_sum{}": "0+60x60"},
    ),
    "FastServeCopiesFail": (
        {"copies_failed_total{}": "0+1x60"},
        {"copies_failed_total{}": "7x60"},
    ),
    "FastServeStepModelOff": (
        {"predicted_step_seconds_total{}": "0+20x60", "step_seconds_sum{}": "0+60x60"},
        {"predicted_step_seconds_total{}": "0+50x60", "step_seconds_sum{}": "0+60x60"},
    ),
}


def run(*command, cwd=None):
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=cwd)


def series(name, values):
    labels = f"{name[:-1]}{',' if not name.endswith('{}') else ''}{LABELS}}}"
    return {"series": f"vllm:fastserve_{labels}", "values": values}


def test_files_are_valid():
    """Rules and configuration pass Prometheus' own check."""
    assert run("promtool", "check", "rules", GRAFANA / "alerts.yml").returncode == 0
    assert run("promtool", "check", "config", GRAFANA / "prometheus.yml").returncode == 0


def test_every_alert_has_a_case():
    """None is left untried."""
    assert [alert.name for alert in ALERTS] == list(CASES)


@pytest.mark.parametrize("fires", [True, False], ids=["fires", "stays silent"])
@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_alert(alert, fires, tmp_path):
    """An alert fires on what it is for, and not just below."""
    made_up = CASES[alert.name][not fires]
    expressions = [
        {"expr": f'count(ALERTS{{alertname="{alert.name}",alertstate="firing"}}) or vector(0)'}
    ]
    test = {
        "rule_files": [str(GRAFANA / "alerts.yml")],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [series(name, values) for name, values in made_up.items()],
                "promql_expr_test": [
                    {
                        **expressions[0],
                        "eval_time": "50m",
                        "exp_samples": [{"labels": "{}", "value": int(fires)}],
                    }
                ],
            }
        ],
    }
    path = tmp_path / "test.yml"
    path.write_text(yaml.safe_dump(test))
    result = run("promtool", "test", "rules", path)
    assert result.returncode == 0, result.stdout + result.stderr
