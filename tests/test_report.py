"""The report: self-contained, escaped, complete, deterministic, and honest about who won."""

import base64
import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from evaluation.records import Cost, ModelMeasurement, ModelRecord
from evaluation.report.report import Baseline, DrawnBlock, Report, draw_block, write_report
from evaluation.words import count

CELL = (
    ((0, "dws_conv_3x3"), (1, "skip_connect")),
    ((0, "max_pool_3x3"), (2, "sep_conv_5x5")),
    ((1, "ghost_3x3"), (3, "dil_conv_3x3")),
)
BLOCKS = (
    DrawnBlock("normal-0", "normal", 2, CELL, 5_410, 173_000, "darts, seed 0"),
    DrawnBlock("reduction-1", "reduction", 2, CELL[:2], 840, 9_900, "darts, seed 1"),
)


def network(name: str, params: int, valid: float | None, *test: float) -> ModelRecord:
    return ModelRecord(
        id=name,
        genome=(1, 0, 2),
        blocks=("normal-0", "reduction-1"),
        cost=Cost(params, 40 * params),
        seed=0,
        valid_accuracy=valid,
        failure="loss is NaN" if valid is None else None,
    ).retrained(test, tuple(range(len(test))))


FRONT = (
    network("aaa111", 1_234, 0.81, 0.80, 0.82),
    network("bbb222", 12_345, 0.93),
    network("ccc333", 1_234_567, 0.98, 0.95, 0.97),
)
DOMINATED = network("ddd444", 20_000, 0.7)
FAILED = network("fff666", 30_000, None)
NEAR_SMALL = network("small", 1_300, None, 0.78, 0.80)
NEAR_LARGE = network("large", 1_000_000, None, 0.91, 0.93)
REPORT = Report(
    title="quickstart",
    dataset="digits: 1,797 images, 10 classes, 1 x 8 x 8",
    costs=("params",),
    front=FRONT,
    archive=(*FRONT, DOMINATED),
    random_archive=tuple(network(f"r{i}", 2_000 * 3**i, 0.6 + 0.05 * i) for i in range(4)),
    baselines=(Baseline("random blocks", (NEAR_SMALL, NEAR_LARGE)),),
    blocks=BLOCKS,
    hypervolume=(("NSGA-II", 0.93), ("random search", 0.91)),
    reference="The reference point is error 1 and 2M params.",
    rankings=(("scores and training", 0.4567, 12),),
    spent=(("block search", "61 s"),),
    facts=(("seed", "0"),),
    config="data:\n  name: digits\n",
)

MEASURED = {
    "aaa111": ModelMeasurement(0.25, 0.0123, 7_040),
    "ccc333": ModelMeasurement(12.5, 0.5, 4_940_000),
    "large": ModelMeasurement(11.0, 0.75),
}

Write = Callable[..., str]


@pytest.fixture
def drawn(tmp_path: Path) -> Write:
    """Write the report with some fields replaced, and return its page."""
    return lambda **changes: write_report(replace(REPORT, **changes), tmp_path).read_text()


@pytest.fixture
def html(drawn: Write, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Do the same without the pictures and plotly, which take a second."""
    monkeypatch.setattr("evaluation.report.report.draw_fronts", lambda *_, **__: b"")
    monkeypatch.setattr("evaluation.report.page.get_plotlyjs", lambda: "var Plotly;")
    return drawn


def verdict(page: str) -> list[str]:
    return re.findall(r'<li class="(?:good|bad|open)">(.*?)</li>', page)


def data_of(page: str) -> Any:
    """Return the JSON that the page's script reads."""
    return json.loads(json_of(page))


def json_of(page: str) -> str:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return str(text)


def rows_of(page: str) -> list[dict[str, str]]:
    """Return the rows of the tables of the front and of the baselines, by the names in the head."""
    rows = []
    for table in re.findall(r'<table class="full">(.*?)</table>', page, re.DOTALL):
        names = re.findall(r"<th[^>]*>(.*?)</th>", table.splitlines()[1])
        for row in re.findall(r"<tr><td>(.*?)</tr>", table, re.DOTALL):
            cells = re.findall(r"(?:^|<td[^>]*>)(.*?)</td>", row)
            rows.append({n: re.sub("<.*?>", "", c) for n, c in zip(names, cells, strict=True)})
    return rows


def test_page_is_self_contained(drawn: Write):
    page = re.sub(r"<script>.*?</script>", "", drawn(), flags=re.DOTALL)
    targets = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]*)""", page)
    assert len(targets) > 2
    assert all(target.startswith(("data:image/png;base64,", "#cell-")) for target in targets)
    assert not re.search(r"<link|@import|url\(", page)
    pictures = re.findall(r"<noscript>(.*?)</noscript>", page, re.DOTALL)
    assert page.count('src="data:image/png;base64,') == 1
    assert pictures[0].count('src="data:image/png;base64,') == 1


def test_the_browser_is_told_to_load_nothing_and_to_run_these_two_scripts(drawn: Write):
    page = drawn()
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="(.*?)">', page)
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 2 and page.count("<script") == 3
    hashes = [base64.b64encode(sha256(one.encode()).digest()).decode() for one in scripts]
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    assert policy.startswith(f"default-src 'none'; script-src {allowed}; ")
    assert "http" not in policy and "*" not in policy


def test_text_from_data_is_escaped_everywhere(html: Write):
    evil = "<script>alert('$x')</script>"
    named = replace(FRONT[0], id=evil, blocks=(evil,))
    block = DrawnBlock(evil, evil, 2, (((0, evil),),), 1, 1, evil)
    page = html(
        title=evil,
        dataset=evil,
        costs=("params",),
        front=(named,),
        baselines=(Baseline(evil, (replace(NEAR_SMALL, id=evil),)),),
        blocks=(block,),
        hypervolume=((evil, 0.5), ("random", 0.6)),
        reference=evil,
        spent=((evil, evil),),
        facts=((evil, evil),),
        config=evil,
    )
    assert page.count("<script") == 3  # the data, plotly and ours
    assert page.count("&lt;script&gt;") >= 15
    assert "&lt;script&gt;alert" in data_of(page)["front"]["data"][-1]["hovertext"][0]


def test_no_text_ends_the_block_of_data(html: Write):
    text = "</script><!-- & \u2028\u2029 \\u003c é"
    page = html(baselines=(Baseline(text, (NEAR_SMALL,)),))
    assert not re.search("[<>&\u2028\u2029]", json_of(page))
    assert unescape(data_of(page)["front"]["data"][-1]["name"]) == text


def test_every_front_id_and_every_used_block_is_on_the_page(html: Write):
    page = html()
    for record in FRONT:
        assert f"<code>{record.id}</code>" in page
    for index, block in enumerate(BLOCKS):
        assert f'<figure id="cell-{index}"><figcaption><b>{block.name}</b>' in page
        assert draw_block(block) in page
        assert page.count(f'<a href="#cell-{index}">{block.name}</a>') == len(FRONT) + 2


def test_a_member_lists_each_cell_once_with_its_uses_and_its_blocks_in_order(html: Write):
    member = replace(FRONT[0], blocks=("normal-0", "reduction-1", "normal-0", "gone"))
    page = html(front=(member,))
    shown = re.findall(r'<article id="network-0" hidden>(.*?)</article>', page, re.DOTALL)[0]
    cells = re.findall(r'<p>(.*?)</p><div data-cell="(.*?)">', shown)
    assert cells == [("normal-0 × 2", "cell-0"), ("reduction-1", "cell-1")]
    assert "<dd>normal-0 · reduction-1 · normal-0 · gone</dd>" in shown
    assert rows_of(page)[0]["blocks"] == "normal-0 · reduction-1 · normal-0 · gone"


def test_numbers_are_written_for_people(html: Write):
    page = html()
    assert "1.23k to 1.23M" in page
    row = rows_of(page)[2]
    assert (row["params"], row["FLOPs"]) == ("1,234,567", "49,382,680")
    assert row["test accuracy"] == "96.00 % ± 1.41"  # 0.95 and 0.97
    assert row["seeds"] == "0: 95.00 %, 1: 97.00 %"
    assert [count(n) for n in (840, 999, 1_000, 999_949, 999_950, 12e6)] == [
        *("840", "999", "1.00k", "1.00M", "1.00M", "12.0M")
    ]


def test_csv_holds_the_numbers_of_the_front_exactly(html: Write, tmp_path: Path):
    measured = replace(FRONT[0], cost=Cost(7, 9, 1 / 3))
    write_report(replace(REPORT, front=(measured, FRONT[1])), tmp_path)
    with (tmp_path / "pareto.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["id"], int(first["params"]), int(first["flops"])) == ("aaa111", 7, 9)
    assert float(first["latency_ms"]) == 1 / 3
    assert float(first["valid_accuracy"]) == measured.valid_accuracy
    assert float(first["test_accuracy"]) == measured.test_accuracy_mean
    assert float(first["test_accuracy_std"]) == measured.test_accuracy_std
    assert (first["seeds"], first["genome"]) == ("0 1", "1 0 2")
    assert first["blocks"].split() == list(measured.blocks)
    unknown = ("latency_ms", "test_accuracy", "test_accuracy_std", "seeds")
    assert [second[name] for name in unknown] == [""] * 4
    assert [first[name] for name in ("latency_spread_ms", "file_bytes")] == ["", ""]


def test_csv_puts_what_was_measured_before_the_estimate(html: Write, tmp_path: Path):
    estimated = replace(FRONT[0], cost=FRONT[0].cost.with_latency(0.2))
    html(front=(estimated, *FRONT[1:]), measured=MEASURED)
    with (tmp_path / "pareto.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[-2:] == ["latency_spread_ms", "file_bytes"]
    found = [[row[name] for name in ("latency_ms", *list(row)[-2:])] for row in rows]
    assert found == [["0.25", "0.0123", "7040"], ["", "", ""], ["12.5", "0.5", "4940000"]]


def test_failed_networks_are_counted_but_never_drawn(tmp_path: Path):
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    write_report(REPORT, tmp_path / "without")
    page = write_report(
        replace(REPORT, archive=(*REPORT.archive, FAILED)), tmp_path / "with"
    ).read_text()
    without, with_failed = (tmp_path / name / "pareto.png" for name in ("without", "with"))
    assert without.read_bytes() == with_failed.read_bytes()
    assert FAILED.id not in page
    assert "Failed, and so not drawn: 1." in page


def test_dominated_networks_are_drawn(tmp_path: Path):
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    write_report(REPORT, tmp_path / "with")
    write_report(replace(REPORT, archive=FRONT), tmp_path / "without")
    pictures = {(tmp_path / name / "pareto.png").read_bytes() for name in ("with", "without")}
    assert len(pictures) == 2


@pytest.mark.parametrize(
    ("share", "rival", "outcome"),
    [(0.93, 0.91, "beat"), (0.90, 0.91, "lost to"), (0.910001, 0.91, "tied with")],
)
def test_verdict_names_the_winner_by_hypervolume(
    html: Write, share: float, rival: float, outcome: str
):
    page = html(hypervolume=(("NSGA-II", share), ("random search", rival)))
    assert f"NSGA-II {outcome} random search at equal evaluations (4 each)" in verdict(page)[0]


def test_verdict_says_when_evaluations_were_unequal(html: Write):
    assert (
        "at unequal evaluations (4 against 1)"
        in verdict(html(random_archive=REPORT.random_archive[:1]))[0]
    )


def test_verdict_compares_a_baseline_with_the_largest_member_of_no_more_params(html: Write):
    # `large` has fewer params than ccc333, so aaa111 is what a user would take in its place.
    text = verdict(html())[1]
    assert text.startswith("The front does not beat random blocks: for 1 of 2 networks")
    assert text.endswith("Ahead of it: large has 92.00 % against 81.00 % of aaa111.")


def test_verdict_allows_a_member_of_a_few_more_params(html: Write):
    almost = replace(NEAR_LARGE, cost=Cost(1_200_000, 1))
    page = html(baselines=(Baseline("random blocks", (NEAR_SMALL, almost)),))
    assert verdict(page)[1].startswith("The front beats random blocks: for 2 of 2 networks")


def test_a_baseline_smaller_than_every_member_is_not_compared(html: Write):
    page = html(baselines=(Baseline("tiny", (replace(NEAR_SMALL, cost=Cost(100, 1)),)),))
    assert verdict(page)[1] == "No retrained member is as small as tiny: not compared."


def test_equal_accuracy_does_not_count_as_a_win(html: Write):
    same = replace(NEAR_LARGE, cost=FRONT[2].cost, test_accuracy=FRONT[2].test_accuracy)
    page = html(baselines=(Baseline("twin", (NEAR_SMALL, same)),))
    assert "The front does not beat twin" in verdict(page)[1]


def test_verdict_marks_wins_within_one_standard_deviation(html: Write):
    noisy = replace(NEAR_LARGE, cost=FRONT[2].cost, test_accuracy=(0.90, 1.0))
    page = html(baselines=(Baseline("noisy", (NEAR_SMALL, noisy)),))
    assert "1 of them by no more than one standard deviation" in verdict(page)[1]
    assert "standard deviation" not in verdict(html(baselines=()))[0]
    alone = html(baselines=(Baseline("noisy", (noisy,)),))
    assert verdict(alone)[1].startswith("The front is level with noisy: for 1 of 1 networks")
    assert '<li class="open">The front is level' in alone


def test_equal_reports_give_equal_bytes(tmp_path: Path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_report(REPORT, tmp_path / folder)
    for name in ("report.html", "pareto.csv", "pareto.png"):
        one, two = (tmp_path / folder / name for folder in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        *("pareto.csv", "pareto.png", "report.html")
    ]


def test_front_that_is_not_retrained_says_so(html: Write):
    page = html(front=FRONT[1:2])
    assert verdict(page)[1] == "No front member is retrained yet: nothing is tested."
    assert "best mean test accuracy" not in page


def test_one_seed_shows_no_deviation(html: Write):
    page = html(front=(network("solo", 500, 0.9, 0.91),))
    assert [rows_of(page)[0][name] for name in ("test accuracy", "seeds")] == [
        *("91.00 %", "0: 91.00 %")
    ]


def test_one_network_alone_makes_a_report(drawn: Write):
    page = drawn(
        front=FRONT[1:2], archive=FRONT[1:2], random_archive=(), baselines=(), hypervolume=()
    )
    assert "<code>bbb222</code>" in page
    assert verdict(page)[0] == "There is no random search to compare the search with."


def test_search_where_everything_failed_makes_a_report(drawn: Write):
    page = drawn(front=(), archive=(FAILED,), random_archive=(), baselines=(), blocks=())
    assert page.count('<td class="none">none</td>') == 2


def test_how_well_the_steering_accuracy_ranks_is_said_with_its_number_of_networks(
    html: Write,
) -> None:
    page = html()
    assert "Order of scores and training: Kendall&#39;s tau 0.46 over 12 networks" in page
    assert "Kendall" not in html(rankings=())


def test_latency_and_file_size_have_columns_where_they_are_known(html: Write):
    names = ("latency", "quartile range", "file size")
    known, unknown = rows_of(html(measured=MEASURED)), rows_of(html())
    assert [row["id"] for row in known] == ["aaa111", "bbb222", "ccc333", "small", "large"]
    assert [[row[name] for name in names] for row in known] == [
        ["0.250 ms", "0.012 ms", "7.0 kB"],
        ["–", "–", "–"],
        ["12.5 ms", "0.50 ms", "4,940.0 kB"],
        ["–", "–", "–"],
        ["11.0 ms", "0.75 ms", "–"],  # a baseline, no file
    ]
    assert not set(names) & {*unknown[0]}


def test_an_estimated_latency_looks_like_one(html: Write):
    estimated = replace(FRONT[0], cost=FRONT[0].cost.with_latency(0.2))
    elsewhere = {"aaa111": ModelMeasurement(None, None, 7_040)}  # the search went by another device
    page = html(front=(estimated,), archive=(estimated,), measured=elsewhere)
    row = rows_of(page)[0]
    assert (row["latency"], row["file size"]) == ("0.200 ms, estimated", "7.0 kB")
    hovers = [
        text for trace in data_of(page)["front"]["data"] for text in trace.get("hovertext", ())
    ]
    assert sum("latency: 0.200 ms, estimated" in text for text in hovers) == 3
    assert "measured as whole networks" not in page
    assert "latency that the search estimated" in page
