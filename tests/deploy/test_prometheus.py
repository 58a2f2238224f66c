"""The alerts and the dashboard of deploy/: promtool accepts them, they fire when they should, and name real metrics."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from .kuberay import MANIFESTS, ROOT

ALERTS = ROOT / "deploy/prometheus/alerts.yml"
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs Debian's prometheus")


def expressions() -> list[str]:
    """What the panels and the alerts ask of Prometheus; of a comparison, its left side, which has a value always."""
    panels = json.loads((ROOT / "deploy/grafana/jest.json").read_text())["panels"]
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    shown = [target["expr"].replace('run=~"$run"', 'run=~".*"') for panel in panels for target in panel["targets"]]
    return shown + [
        part
        for rule in rules
        for part in re.split(r" (?:[<>]|==|and) (?:[\d.]+ \* )?", rule["expr"])
        if "ray_" in part and "offset" not in part
    ]


def test_prometheus_operator_gets_the_same_alerts():
    rule = yaml.safe_load((MANIFESTS / "monitoring/alerts.yaml").read_text())
    assert (rule["kind"], rule["spec"]) == ("PrometheusRule", yaml.safe_load(ALERTS.read_text()))


@needs_promtool
def test_promtool_accepts_the_configuration_and_the_alerts_fire(tmp_path: Path):
    for words in (
        ["check", "config", "deploy/prometheus/prometheus.yml"],
        ["test", "rules", "tests/deploy/alerts.yml"],
    ):
        done = subprocess.run(["promtool", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case_in_which_it_fires():
    cases = yaml.safe_load((ROOT / "tests/deploy/alerts.yml").read_text())["tests"]
    fired = {each["alertname"] for case in cases for each in case["alert_rule_test"] if each["exp_alerts"]}
    quiet = {each["alertname"] for case in cases for each in case["alert_rule_test"] if not each["exp_alerts"]}
    alerts = {rule["alert"] for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]}
    assert fired == quiet == alerts


def test_metrics_of_gpus_are_those_that_ray_reports():
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    names = {name for e in expressions() for name in re.findall(r"\bray_(node_\w*(?:gpu|gram)\w*)", e)}
    assert len(names) >= 2
    assert names <= METRICS_GAUGES.keys()
