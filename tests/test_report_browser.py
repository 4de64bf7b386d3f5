"""The page in a browser without a network: what it draws, what a reader can do, what cannot run."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from configs import FOLDER
from configs.experiment import Config
from evaluation.files.run_folder import RunFolder
from evaluation.report.report import Baseline, DrawnBlock, Report, write_report
from run_pipeline import Pipeline
from test_report import BLOCKS, FRONT, MEASURED, NEAR_LARGE, NEAR_SMALL, REPORT
from tiny_run import TINY

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH"),
]
HOSTILE = (
    '<script>window.ran = 1</script></script><img src=x onerror="window.ran = 1">'
    '<a href="javascript:window.ran = 1">$x$ &lt;b&gt; \u2028 %{x}</a>'
)
PROBE = Path(__file__).with_name("report_probe.js").read_text()
TO_PARENT = 'setTimeout(() => parent.postMessage([innerWidth, document.body.scrollWidth], "*"))'
FRAME = """<iframe width="400" height="3000" src="page.html"></iframe><pre></pre><script>
onmessage = (event) => {
  const result = document.querySelector("pre");
  result.id = "probe";
  result.textContent = JSON.stringify(event.data);
};</script>"""
FULL = replace(
    REPORT,
    measured=MEASURED,
    latency_device="PyTorch 2 on a test bench, 1 thread, batch 1",
    growth=(("NSGA-II", (0.5, 0.7, 0.9)), ("random search", (0.4, 0.8))),
)


def chromium(page: Path, *options: str) -> str:
    """Open a page where no host has an address; return what the browser prints.

    Whatever the page writes to the console fails the test.
    """
    command = [
        *(str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *(f"--user-data-dir={page.parent / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"),
        *("--enable-logging=stderr", "--virtual-time-budget=5000", *options, page.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    console = [line for line in done.stderr.decode().splitlines() if "CONSOLE" in line]
    assert console == []
    return done.stdout.decode()


def with_script(page: Path, script: str) -> Path:
    """Add a script to a page, and its hash to those that the page allows."""
    text = page.read_text()
    hash = base64.b64encode(sha256(script.encode()).digest()).decode()
    assert text.count("; script-src ") == 1 and text.count("</body>") == 1
    text = text.replace("; script-src ", f"; script-src 'sha256-{hash}' ")
    page.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    return page


def probed(page: Path) -> Any:
    """Return what the page's own script wrote down."""
    found = re.search('<pre id="probe">(.*?)</pre>', chromium(page, "--dump-dom"), re.DOTALL)
    assert found is not None, "the script did not reach its end"
    return json.loads(html.unescape(found.group(1)))


def explored(report: Report, folder: Path) -> Any:
    return probed(with_script(write_report(report, folder), PROBE))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the PNG pictures, which take a second and are not for a browser with scripts."""
    monkeypatch.setattr("evaluation.report.report.draw_fronts", lambda *_, **__: b"")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what a reader of `FULL` finds."""
    return explored(FULL, tmp_path_factory.mktemp("full"))


def points(seen: Any, axis: str, panel: str, name: str) -> Any:
    """Return the trace of markers of that name."""
    (trace,) = (
        one
        for one in seen["axes"][axis]
        if (one["name"], one["mode"], one["panel"]) == (name, "markers", panel)
    )
    return trace


def test_the_page_loads_nothing_and_offers_no_upload(seen: Any):
    assert seen["requests"] == []
    buttons = {button.lower() for button in seen["buttons"]}
    assert buttons == {"download plot as a png", "zoom", "pan", "reset axes"}
    assert all(link.startswith("#cell-") for link in seen["links"])


def test_the_points_are_the_front_at_its_costs(seen: Any):
    trace = points(seen, "params", "y", "Pareto set")
    assert trace["type"] == "log"
    assert trace["x"] == [record.cost.params for record in FRONT]
    assert trace["y"] == [record.valid_accuracy for record in FRONT]
    labels = [one["label"] for one in seen["hovered"] if one["name"] == "Pareto set"]
    for label, record in zip(labels, FRONT, strict=False):
        assert label.startswith(record.id)


def test_every_evaluated_network_is_a_dot_below_the_line_of_the_best(seen: Any):
    for name, records in (
        ("NSGA-II", REPORT.archive),
        ("random search", REPORT.random_archive),
    ):
        trace = points(seen, "params", "y", name)
        assert trace["x"] == [record.cost.params for record in records]
        (line,) = (
            one for one in seen["axes"]["params"] if (one["name"], one["mode"]) == (name, "lines")
        )
        for x, y in zip(trace["x"], trace["y"], strict=True):
            best = [b for a, b in zip(line["x"], line["y"], strict=True) if a <= x]
            assert y <= max(best)


@pytest.mark.parametrize(
    ("axis", "title", "values"),
    [
        ("params", "params", [1_234, 1_234_567]),
        ("FLOPs", "FLOPs of one image", [40 * 1_234, 40 * 1_234_567]),
        ("latency", "latency, ms", [0.25, 12.5]),
        ("file size", "file size", [7_040, 4_940_000]),
    ],
)
def test_the_menu_changes_the_cost_axis(seen: Any, axis: str, title: str, values: list[float]):
    assert list(seen["axes"]) == ["params", "FLOPs", "latency", "file size"]
    trace = points(seen, axis, "y2", "Pareto set")
    assert (trace["title"], trace["x"]) == (title, values)
    assert trace["y"] == [FRONT[0].test_accuracy_mean, FRONT[2].test_accuracy_mean]


def test_ticks_are_written_for_people(seen: Any):
    assert "10k" in points(seen, "params", "y", "Pareto set")["ticks"]
    assert "1MB" in points(seen, "file size", "y2", "Pareto set")["ticks"]
    assert "1" in points(seen, "latency", "y", "Pareto set")["ticks"]
    for axis, traces in seen["axes"].items():
        assert 2 <= len(set(traces[0]["ticks"])) <= 11, (axis, traces[0]["ticks"])


def test_zooming_in_leaves_ticks_to_read(seen: Any):
    assert seen["zoomed"][0] == "10k"
    assert 3 <= len(seen["zoomed"]) <= 8


def test_error_bars_are_the_standard_deviations(seen: Any):
    trace = points(seen, "params", "y2", "Pareto set")
    assert trace["std"] == [FRONT[0].test_accuracy_std, FRONT[2].test_accuracy_std]
    baseline = points(seen, "params", "y2", "random blocks")
    assert baseline["std"][1] == NEAR_LARGE.test_accuracy_std
    assert baseline["symbol"] != trace["symbol"]


def test_hovering_tells_what_is_known_of_a_network(seen: Any):
    assert len(seen["hovered"]) == 4 + 4 + 3 + 2 + 2  # searches, front; retrained and baselines
    front = [one for one in seen["hovered"] if one["label"].startswith("ccc333")]
    assert {one["panel"] for one in front} == {"y", "y2"}
    for part in ("1,234,567", "12.5 ms", "98.00 %", "96.00 % ± 1.41", "0: 95.00 %", "1 0 2"):
        assert all(part in one["label"] for one in front if one["name"] == "Pareto set")
    assert "normal-0 · reduction-1" in front[0]["label"]


def test_a_click_shows_the_member_with_its_cells_and_marks_it_in_both_panels(seen: Any):
    clicked = {(one["id"], one["member"]) for one in seen["clicked"] if one["member"] is not None}
    assert clicked == {("aaa111", 0), ("small", 3)}
    for one in seen["clicked"]:
        assert one["cells"] == [f"cell {block.name}" for block in BLOCKS]
        stays = one["member"] is None  # a point of random search is no member
        assert one["choice"] == (one["before"] if stays else str(one["member"]))
    assert seen["clicked"][0]["chosen"] == [None, [0], None, [-1], [0], [0], [-1]]
    assert seen["clicked"][-1]["chosen"] == [None, [-1], None, [-1], [-1], [-1], [0]]


def test_a_network_chosen_by_keyboard_is_shown_and_marked(seen: Any):
    assert [one["id"] for one in seen["picked"]] == ["aaa111", "bbb222", "ccc333", "small", "large"]
    for number, one in enumerate(seen["picked"]):
        assert (one["shown"], one["choice"]) == (1, str(number))
        assert one["wanted"].startswith(one["id"])
    assert "96.00 % ± 1.41" in seen["picked"][2]["text"]
    assert seen["picked"][2]["chosen"] == [None, [2], None, [-1], [2], [1], [-1]]
    (first,) = seen["first"]
    assert (first["id"], first["choice"]) == ("ccc333", "2")


def test_hypervolume_grows_with_the_evaluations(seen: Any):
    assert seen["growth"] == [
        ["NSGA-II", [1, 2, 3], [0.5, 0.7, 0.9]],
        ["random search", [1, 2], [0.4, 0.8]],
    ]


def test_text_from_data_never_runs_nor_becomes_a_tag(tmp_path: Path):
    named = replace(FRONT[0], id=HOSTILE, blocks=(HOSTILE,))
    block = DrawnBlock(HOSTILE, HOSTILE, 2, (((0, HOSTILE),),), 1, 1, HOSTILE)
    report = replace(
        FULL, title=HOSTILE, dataset=HOSTILE, front=(named,), archive=(named,), blocks=(block,),
        baselines=(Baseline(HOSTILE, (replace(NEAR_LARGE, id=HOSTILE, blocks=(HOSTILE,)),)),),
        hypervolume=((HOSTILE, 0.5), (HOSTILE + "2", 0.6)), reference=HOSTILE,
        facts=((HOSTILE, HOSTILE),), config=HOSTILE, latency_device=HOSTILE,
        growth=((HOSTILE, (0.5, 0.6)),),
    )  # fmt: skip
    seen = explored(report, tmp_path)
    assert seen["ran"] == 0
    assert (seen["scripts"], seen["images"]) == (4, 0)  # data, plotly, ours, and the probe
    assert seen["title"] == HOSTILE
    assert all(link.startswith("#cell-") for link in seen["links"])
    hovered = [one for one in seen["hovered"] if one["label"].startswith("<script>window.ran")]
    assert len(hovered) == 4
    for one in hovered:
        assert "javascript:" in one["label"]
        assert "%{x}" in one["label"] and "&lt;b&gt;" in one["label"]
    assert len(seen["picked"]) == 2
    for one in seen["picked"]:
        assert one["id"] == HOSTILE and one["cells"] == [f"cell {HOSTILE}"]
        assert one["text"].count("<script>window.ran") >= 3
    assert len(seen["legends"]) == 2 + 1 + 1 + 1
    written = [text for text in seen["legends"] if text != "Pareto set"]
    assert all(text.startswith("<script>window.ran = 1</script>") for text in written)


def test_a_run_where_everything_failed_makes_a_page(tmp_path: Path):
    failed = tuple(replace(r, valid_accuracy=None, failure="NaN") for r in REPORT.archive)
    seen = explored(
        replace(REPORT, front=(), archive=failed, random_archive=(), baselines=(), blocks=()),
        tmp_path,
    )
    assert (seen["figures"], seen["first"]) == ([], [])


def test_members_without_an_accuracy_can_be_chosen_where_there_is_no_figure(tmp_path: Path):
    bare = (replace(FRONT[1], valid_accuracy=None), replace(NEAR_SMALL, test_accuracy=(), seeds=()))
    report = replace(REPORT, front=bare, archive=(), random_archive=(), baselines=())
    seen = explored(report, tmp_path)
    assert [one["id"] for one in seen["picked"]] == ["bbb222", "small"]
    assert seen["figures"] == []


def test_without_measurements_there_is_no_such_axis(tmp_path: Path):
    seen = explored(replace(REPORT, front=FRONT[:1], baselines=(), random_archive=()), tmp_path)
    assert list(seen["axes"]) == ["params", "FLOPs"]
    assert seen["figures"] == ["front"]
    assert points(seen, "FLOPs", "y", "Pareto set")["x"] == [FRONT[0].cost.flops]


def test_the_page_fits_a_phone(tmp_path: Path):
    page = with_script(write_report(FULL, tmp_path), TO_PARENT)
    page.rename(tmp_path / "page.html")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME)  # Chromium's own window is never narrower than 500 pixels
    assert probed(frame) == [400, 400]


def test_the_page_paints(tmp_path: Path):
    picture = tmp_path / "page.png"
    page = write_report(FULL, tmp_path)
    chromium(page, f"--screenshot={picture}", "--window-size=1200,3000")
    with Image.open(picture) as image:
        assert image.size == (1200, 3000)
        colours = dict((colour, n) for n, colour in image.convert("RGB").getcolors(2**20))
    assert colours[(255, 255, 255)] > 0.7 * 1200 * 3000
    assert colours[(0x1D, 0x5F, 0xBF)] > 500  # the front
    assert colours[(0x0F, 0x8A, 0x6A)] > 50  # the first baseline


WRITTEN = """
const pre = Object.assign(document.createElement("pre"), {id: "probe"});
setTimeout(() => {
  pre.textContent = JSON.stringify({
    ran: window.ran || 0, scripts: document.scripts.length, images: document.images.length,
    title: document.title, text: document.body.textContent,
  });
  document.body.append(pre);
}, 300);
"""


def test_a_whole_run_on_classes_and_files_named_by_a_stranger_runs_no_script(tmp_path: Path):
    evil = "<img src=x onerror='window.ran = 1'><script>window.ran = 1;"
    root = tmp_path / f"{evil} root"
    for number, kind in enumerate((f"{evil} cat", f"{evil} dog")):
        (root / kind).mkdir(parents=True)
        for shade in range(40):
            picture = Image.new("RGB", (8, 8), (200 * number, 3 * shade, 9))
            picture.save(root / kind / f"{evil} {shade}.png")
    data = {"data.name": "folder", "data.root": str(root), "data.image_size_px": 8}
    changes = [f"{key}={value}" for key, value in data.items()]
    small = [one for one in TINY if not one.startswith("data.")]
    config = Config.load(FOLDER / "quickstart.yaml", [*small, *changes])
    folder = RunFolder(tmp_path / f"{evil} run")
    pipeline = Pipeline(config, folder, f"{evil} name", console=Console(file=io.StringIO()))
    pipeline.run()
    (page,) = folder.path.glob("report.html")
    seen = probed(with_script(page.rename(tmp_path / "page.html"), WRITTEN))
    assert (seen["ran"], seen["scripts"], seen["images"]) == (0, 4, 0)
    assert seen["title"] == f"{evil} name"
    assert "onerror='window.ran = 1'><script>window.ran = 1; root" in seen["text"].replace(
        "''", "'"
    )
