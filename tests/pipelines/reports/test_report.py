"""The report of real runs, opened in a real browser."""

import itertools
import json
import os
import re
import shutil

import pyarrow.parquet as pq
import pytest

from jest_core import run_file
from pipelines.data import catalogue
from pipelines.reports import comparison, report
from pipelines.scores import reference_scores
from pipelines.training import train
from tests.conftest import POOL

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
CAPTION = "<script>document.title = 'broken'</script> & \"quotes\""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, ray_session):
    """A uniform and a joint run, on shards with scripts as captions and some pictures marked unsafe."""
    from jest_core.models import towers
    from pipelines.base import checkpoints

    root = tmp_path_factory.mktemp("report")
    rows = pq.read_table(POOL / "00000.parquet").slice(0, 200)
    rows = rows.set_column(rows.schema.get_field_index("caption"), "caption", [[CAPTION] * 200])
    rows = rows.append_column("punsafe", [[0.9 if i % 2 else 0.1 for i in range(200)]])
    (root / "shards").mkdir()
    pq.write_table(rows, root / "shards" / "0.parquet", row_group_size=50)
    text = f"""
root: {root}
run_dir: joint
seed: 0
data: {{shards: "shards/*.parquet", catalogue: catalogue, rules: [{{rule: status}}], n_streams: 4, window_rows: 100}}
model: {{name: jest-tiny}}
reference: {{model: {{name: jest-tiny}}, checkpoint: reference, scores: scores}}
selection: {{method: joint, filter_ratio: 0.5, n_chunks: 4}}
training: {{sub_batch_size: 16, examples_trained: 96, learning_rate: 1.0e-3, warmup_steps: 2, weight_decay: 0.1,
  checkpoint_every_steps: 2}}
evaluation: {{sets: [{{name: own, shards: "shards/*.parquet", tasks: [retrieval]}}]}}
"""
    model = towers.create("jest-tiny", seed=5).model
    checkpoints.write(f"{root}/reference", 1, {"epoch": 1, "state_dict": model.state_dict(), "jest": {"step": 1}})
    from pipelines.evaluation import evaluate

    for name, method in (("joint", "joint"), ("uniform", "uniform")):
        run = run_file.load(text, [f"run_dir={name}", f"selection.method={method}"])
        if name == "joint":
            catalogue.run_stage(run)
            reference_scores.run_stage(run)
        train.run_stage(run)
        evaluate.run_stage(run)
    return root


@pytest.fixture
def browser():
    """Chromium, headless, without a network."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if path is None:
        assert not os.environ.get("CI"), "CI needs a browser: .ci/run installs one"
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as p:
        opened = p.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


def opened(browser, path, **options):
    """A page, and its console errors, console warnings and network requests."""
    context = browser.new_context(offline=True, **options)
    page, messages = context.new_page(), []
    page.on("console", lambda message: messages.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: messages.append(request.url) if request.url.startswith("http") else None)
    page.goto(f"file://{path}")
    page.wait_for_function("document.querySelectorAll('.plotly-graph-div .main-svg').length > 0")
    return page, messages


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_report_works_in_a_browser(runs, browser):
    output = runs / "report.html"
    report.write_report([f"{runs}/uniform", f"{runs}/joint"], str(output))
    page, messages = opened(browser, output)
    assert messages == []
    assert page.title() == "jest report"  # the caption's script did not run
    charts = page.locator(".plotly-graph-div")
    assert charts.count() >= 6
    for i in range(charts.count()):
        drawn = charts.nth(i).locator(".trace, .hm, .bars, image").count()
        assert drawn, f"chart {i} is empty"
    assert "Against uniform, at equal examples" in page.locator("main > p").first.inner_text()
    assert CAPTION in page.locator(".tiles li").first.inner_text()
    assert page.locator("script").count() == 2 + charts.count()  # Plotly, sorting, and one for each chart

    # unsafe pictures are blurred until they are clicked
    hidden = page.locator(".unsafe img").first
    assert hidden.evaluate("e => getComputedStyle(e).filter") == "blur(12px)"
    page.locator(".unsafe summary").first.click()
    assert hidden.evaluate("e => getComputedStyle(e).filter") == "none"
    assert page.locator("li:not(.unsafe) img").count() > 0

    # tables can be sorted, and announce the order
    head = page.locator("table.sortable th", has_text="examples seen").first
    first_of = "document.querySelector('table.sortable tbody th').textContent"
    head.locator("button").click()
    assert (page.evaluate(first_of), head.get_attribute("aria-sort")) == ("uniform", "ascending")
    head.locator("button").press("Enter")
    assert (page.evaluate(first_of), head.get_attribute("aria-sort")) == ("joint", "descending")

    # the pictures come before what was spent, and no toolbar covers a chart
    headings = page.locator("h2").all_inner_texts()
    assert headings.index("Selected and refused by joint") < headings.index("Where the FLOPs and the time went")
    assert page.locator(".modebar-btn").count() == 0

    # for screen readers: a language, headings without skipped levels, and a label for each chart
    assert page.locator("html").get_attribute("lang") == "en"
    levels = page.eval_on_selector_all("h1, h2, h3, h4", "hs => hs.map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert all(page.eval_on_selector_all("[role=img]", "es => es.map(e => e.getAttribute('aria-label'))"))

    # on a phone nothing is wider than the screen except elements that scroll
    phone, messages = opened(browser, output, viewport={"width": 390, "height": 844}, is_mobile=True)
    assert messages == []
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    table = phone.locator(".wide").first  # which says that there is more, until it is scrolled to its end
    assert table.evaluate("e => getComputedStyle(e, '::before').content") == '"more to the right →"'
    table.evaluate("e => { e.scrollLeft = e.scrollWidth; e.dispatchEvent(new Event('scroll')); }")
    assert table.evaluate("e => getComputedStyle(e, '::before').content") == "none"


@pytest.mark.slow
def test_the_verdict_names_gain_and_cost(runs):
    finished = [comparison.read_run(f"{runs}/{name}") for name in ("uniform", "joint")]
    (sentence,) = comparison.verdict(finished)
    (key,) = finished[0].last
    gain = 100 * (finished[1].last[key] - finished[0].last[key])
    assert f"at equal examples: {gain:+.1f} points" in sentence
    ratio = re.search(r"for ([\d.]+) times the FLOPs", sentence)
    assert float(ratio[1]) == pytest.approx(finished[1].teraflops / finished[0].teraflops, abs=0.01)


@pytest.mark.slow
def test_shares_and_repeats_match_the_selection_log(runs):
    from pipelines.reports import composition

    run = comparison.read_run(f"{runs}/joint")
    kinds = {share.column: share for share in composition.shares(run)}
    assert "kind" in kinds
    table = pq.read_table(runs / "shards" / "0.parquet")
    picks = run.picks.filter(run.picks["selected"]).to_pylist()
    expected = [table["kind"][pick["row"]].as_py() for pick in picks if pick["step"] == 0]
    for name, share in kinds["kind"].selected.items():
        assert share[0] == pytest.approx(expected.count(name) / len(expected))
    assert sum(kinds["kind"].offered.values()) == pytest.approx(1)
    counts = {}
    for pick in picks:
        counts[pick["row"]] = counts.get(pick["row"], 0) + 1
    assert [times for _, _, times in composition.repeats(run, 5)] == sorted(
        (c for c in counts.values() if c > 1), reverse=True
    )[:5]
    assert json.dumps(composition.repeats(run, 5))
