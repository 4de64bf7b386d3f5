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
from test_report import BLOCKS, FRONT, MEASURED, NEAR_LARGE, REPORT
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
# Does what a reader does, and writes what there is to see; `probe` is filled in when it is done.
PROBE = """
(async () => {
  const rest = () => new Promise((resolve) => setTimeout(resolve, 60));
  const panels = ["searches", "retrained"].map((id) => document.getElementById(id));
  const traces = (panel) => (panel.data || []).map((trace) => ({
    name: trace.name || "", x: trace.x, y: trace.y, mode: trace.mode,
    networks: trace.customdata || null,
    std: trace.error_y ? trace.error_y.array : null, symbol: trace.marker && trace.marker.symbol,
    title: panel.layout.xaxis.title.text, type: panel.layout.xaxis.type,
    ticks: [...panel.querySelectorAll(".xtick text")].map((tick) => tick.textContent),
  }));
  const network = () => ({
    id: document.getElementById("network-id").textContent,
    text: document.getElementById("network-facts").textContent,
    cells: [...document.querySelectorAll("#network-cells svg")].map(
      (svg) => svg.getAttribute("aria-label")),
    choice: document.getElementById("network-choice").value,
    rings: panels.map((panel) => {  // what the ring is around, on the axes of the figure
      const ring = document.getElementById(`${panel.id}-ring`), box = ring.getBoundingClientRect();
      if (ring.hidden) return null;
      const area = panel.querySelector(".nsewdrag").getBoundingClientRect();
      const { xaxis, yaxis } = panel._fullLayout;
      return [xaxis.p2d((box.left + box.right) / 2 - area.left),
        yaxis.p2d((box.top + box.bottom) / 2 - area.top)];
    }),
  });
  const point = (panel, x, y) => {  // moves the mouse onto a point
    const area = panel.querySelector(".nsewdrag"), box = area.getBoundingClientRect();
    const { xaxis, yaxis } = panel._fullLayout;
    area.dispatchEvent(new MouseEvent("mousemove", { bubbles: true, view: window,
      clientX: box.left + xaxis.d2p(x), clientY: box.top + yaxis.d2p(y) }));
  };
  const seen = { first: network(), axes: {}, hovered: [], picked: [] };
  for (const button of document.querySelectorAll("#axes input")) {
    button.click();
    await rest();
    seen.axes[button.value] = panels.map(traces);
  }
  document.querySelector("#axes input")?.click();
  await rest();
  for (const panel of panels) {
    for (const trace of panel.data || []) {
      if (!trace.customdata) continue;
      for (const pointNumber of trace.customdata.keys()) {
        point(panel, trace.x[pointNumber], trace.y[pointNumber]);
        await rest();
        const labels = [...panel.querySelectorAll(".hoverlayer .hovertext")];
        seen.hovered.push({ ...network(), number: trace.customdata[pointNumber],
          panel: panel.id, label: labels.map((label) => label.textContent).join("|") });
      }
    }
  }
  for (const option of document.querySelectorAll("#network-choice optgroup option")) {
    const choice = document.getElementById("network-choice");
    choice.value = option.value;
    choice.dispatchEvent(new Event("change"));
    seen.picked.push({ ...network(), wanted: option.textContent });
  }
  if (panels[0].data) {
    await Plotly.relayout(panels[0], { "xaxis.range[0]": 4, "xaxis.range[1]": 4.3 });
    await rest();
    seen.zoomed = traces(panels[0])[0].ticks;
  }
  const growth = document.getElementById("growth").data || [];
  seen.growth = growth.map((line) => [line.name, line.x, line.y]);
  seen.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  seen.buttons = [...document.querySelectorAll(".modebar-btn")].map((one) => one.dataset.title);
  seen.links = [...document.querySelectorAll("a")].map((link) =>
    link.getAttribute("href") || link.getAttribute("xlink:href")).filter(Boolean);
  seen.legends = [...document.querySelectorAll(".legendtext")].map((text) => text.textContent);
  seen.scripts = document.scripts.length;
  seen.images = document.images.length;
  seen.ran = window.ran || 0;
  seen.title = document.title;
  seen.hidden = [...document.querySelectorAll("[hidden][id]")].map((part) => part.id);
  seen.width = [innerWidth, document.documentElement.scrollWidth];
  const result = document.createElement("pre");
  result.id = "probe";
  result.textContent = JSON.stringify(seen);
  document.body.append(result);
})();
"""
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


def points(seen: Any, axis: str, panel: int, name: str) -> Any:
    """Return the trace of markers of that name."""
    (trace,) = (
        one for one in seen["axes"][axis][panel] if one["name"] == name and one["mode"] == "markers"
    )
    return trace


def test_the_page_loads_nothing_and_offers_no_upload(seen: Any):
    assert seen["requests"] == []
    buttons = {button.lower() for button in seen["buttons"]}
    assert buttons == {"download plot as a png", "zoom", "pan", "reset axes"}
    assert all(link.startswith("#cell-") for link in seen["links"])


def test_the_points_are_the_front_at_its_costs(seen: Any):
    trace = points(seen, "params", 0, "Pareto set")
    assert trace["type"] == "log"
    assert trace["x"] == [record.cost.params for record in FRONT]
    assert trace["y"] == [record.valid_accuracy for record in FRONT]
    labels = {one["number"]: one["label"] for one in seen["hovered"]}
    for number, record in zip(trace["networks"], FRONT, strict=True):
        assert labels[number].startswith(record.id)


def test_every_evaluated_network_is_a_dot_below_the_line_of_the_best(seen: Any):
    for name, records in (
        ("NSGA-II", REPORT.archive),
        ("random search", REPORT.random_archive),
    ):
        trace = points(seen, "params", 0, name)
        assert trace["x"] == [record.cost.params for record in records]
        (line,) = (
            one
            for one in seen["axes"]["params"][0]
            if one["name"] == name and one["mode"] == "lines"
        )
        for x, y in zip(trace["x"], trace["y"], strict=True):
            best = [b for a, b in zip(line["x"], line["y"], strict=True) if a <= x]
            assert y <= max(best)


@pytest.mark.parametrize(
    ("axis", "title", "values"),
    [
        ("params", "params", [1_234, 1_234_567]),
        ("flops", "FLOPs of one image", [40 * 1_234, 40 * 1_234_567]),
        ("latency_ms", "latency, ms", [0.25, 12.5]),
        ("file_bytes", "file size", [7_040, 4_940_000]),
    ],
)
def test_a_button_changes_the_cost_axis(seen: Any, axis: str, title: str, values: list[float]):
    assert list(seen["axes"]) == ["params", "flops", "latency_ms", "file_bytes"]
    trace = points(seen, axis, 1, "Pareto set")
    assert (trace["title"], trace["x"]) == (title, values)
    assert trace["y"] == [FRONT[0].test_accuracy_mean, FRONT[2].test_accuracy_mean]


def test_ticks_are_written_for_people(seen: Any):
    assert "10k" in points(seen, "params", 0, "Pareto set")["ticks"]
    assert "1MB" in points(seen, "file_bytes", 1, "Pareto set")["ticks"]
    assert "1" in points(seen, "latency_ms", 1, "Pareto set")["ticks"]
    for axis, panels in seen["axes"].items():
        for traces in panels:
            assert 2 <= len(set(traces[0]["ticks"])) <= 11, (axis, traces[0]["ticks"])


def test_zooming_in_leaves_ticks_to_read(seen: Any):
    assert seen["zoomed"][0] == "10k"
    assert 3 <= len(seen["zoomed"]) <= 8


def test_error_bars_are_the_standard_deviations(seen: Any):
    trace = points(seen, "params", 1, "Pareto set")
    assert trace["std"] == [FRONT[0].test_accuracy_std, FRONT[2].test_accuracy_std]
    baseline = points(seen, "params", 1, "random blocks")
    assert baseline["std"][1] == NEAR_LARGE.test_accuracy_std
    assert baseline["symbol"] != trace["symbol"]


def test_hovering_shows_the_network_and_its_cells_below(seen: Any):
    assert len(seen["hovered"]) == 4 + 4 + 3 + 2 + 2  # searches, front; retrained and baselines
    for one in seen["hovered"]:
        assert one["label"].startswith(one["id"])
        assert one["cells"] == [f"cell {block.name}" for block in BLOCKS]
    front = [one for one in seen["hovered"] if one["id"] == "ccc333"]
    assert {one["panel"] for one in front} == {"searches", "retrained"}
    for text in (front[0]["text"], front[0]["label"]):
        for part in ("1,234,567", "12.5 ms", "98.00 %", "96.00 % ± 1.41", "0: 95.00 %", "1 0 2"):
            assert part in text
        assert "normal-0 · reduction-1" in text


def test_a_network_chosen_by_keyboard_is_shown_and_marked_in_both_figures(seen: Any):
    assert len(seen["picked"]) == 5
    for one in seen["picked"]:
        assert one["wanted"].startswith(one["id"])
    one = seen["picked"][2]
    for ring, accuracy in zip(one["rings"], (0.98, 0.96), strict=True):
        assert ring == [pytest.approx(1_234_567, rel=0.01), pytest.approx(accuracy, abs=0.001)]
    assert seen["picked"][1]["rings"][1] is None  # not retrained
    assert (seen["first"]["id"], seen["first"]["choice"]) == ("ccc333", "2")


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
    hovered = [one for one in seen["hovered"] if one["id"] == HOSTILE]
    assert len(hovered) == 4
    for one in hovered:
        assert "<script>window.ran" in one["label"] and "javascript:" in one["label"]
        assert "%{x}" in one["label"] and "&lt;b&gt;" in one["label"]
        assert "<script>window.ran" in one["text"]
    assert len(seen["legends"]) == 2 + 1 + 2 + 1
    written = [text for text in seen["legends"] if text != "Pareto set"]
    assert all(text.startswith("<script>window.ran = 1</script>") for text in written)


def test_a_run_where_everything_failed_makes_a_page(tmp_path: Path):
    failed = tuple(replace(r, valid_accuracy=None, failure="NaN") for r in REPORT.archive)
    seen = explored(
        replace(REPORT, front=(), archive=failed, random_archive=(), baselines=(), blocks=()),
        tmp_path,
    )
    assert set(seen["hidden"]) == {
        *("searches", "searches-ring", "retrained", "retrained-ring", "network", "growth-part")
    }


def test_without_measurements_there_is_no_such_axis(tmp_path: Path):
    seen = explored(replace(REPORT, front=FRONT[:1], baselines=(), random_archive=()), tmp_path)
    assert list(seen["axes"]) == ["params", "flops"]
    assert "growth-part" in seen["hidden"]
    assert points(seen, "flops", 0, "Pareto set")["x"] == [FRONT[0].cost.flops]


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
