import json

import numpy as np
import pytest

from jest_core import run_file
from pipelines.base import storage
from pipelines.data import catalogue
from pipelines.reports import thresholds
from pipelines.reports.thresholds import Sample
from pipelines.scores import score_cache

NOISY = {"generic_title", "lang"}


def test_precision_and_recall_of_a_threshold():
    clean = np.array([True, True, False, True, False])
    sample = Sample(np.zeros(5, np.int64), np.arange(5), np.array([5, 4, 3, 2, 1], np.float32), clean)
    assert thresholds.at(sample, 4.0) == (1.0, 2 / 3)
    assert thresholds.at(sample, 2.0) == (0.75, 1.0)
    figure = json.loads(thresholds.precision_recall(sample, {0.4: 4.0}).to_json())
    assert figure["data"][1]["text"] == ["best 40%"]


def test_the_page_shows_what_each_threshold_keeps_and_drops(scored, tmp_path, capsys):
    thresholds.write_page(scored, "cosine", "noise", str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert page.count("just kept") == page.count("just dropped") == len(thresholds.SHARES)
    assert page.count("data:image/png;base64,") > 100
    assert "Precision and recall" in page
    assert "the best 30% by cosine" in capsys.readouterr().out


def test_score_rules_keep_the_best_share_and_are_counted(scored, tmp_path):
    run = run_file.load(
        run_file.dump(scored),
        [
            "data.refines=catalogue",
            f"data.catalogue={tmp_path / 'best'}",
            "data.rules=[{rule: score, scores: scores, keep_share: 0.3},"
            " {rule: score, scores: scores, column: matched_pair_loss, at_least: 0.1}]",
        ],
    )
    manifest = catalogue.run_stage(run).manifest
    scored_counts = score_cache.opened(run.path("scores"))["counts"]
    cosines = np.concatenate(
        [
            np.array(part["cosine"])[np.array(part["status"]) == "ok"]
            for i in range(4)
            for part in [storage.open_parquet(score_cache.part_path(run.path("scores"), i)).read().to_pydict()]
        ]
    )
    n_best = (cosines >= np.sort(cosines)[::-1][int(np.ceil(0.3 * len(cosines))) - 1]).sum()
    assert manifest["counts"]["kept"] <= n_best
    assert scored_counts["ok"] - manifest["counts"]["score"] == manifest["counts"]["kept"]
    resolved = manifest["rules"][0]
    assert resolved["keep_share"] is None
    assert resolved["at_least"] == pytest.approx(float(np.sort(cosines)[::-1][int(np.ceil(0.3 * len(cosines))) - 1]))
