// Does what a reader does, and writes what there is to see; `probe` is filled in when it is done.
(async () => {
  const rest = () => new Promise((resolve) => setTimeout(resolve, 60));
  const front = document.getElementById("front"), choice = document.getElementById("choice");
  const traces = () => front.data.map((trace) => ({
    name: trace.name, x: trace.x, y: trace.y, mode: trace.mode, panel: trace.yaxis,
    members: trace.customdata || null, chosen: trace.selectedpoints || null,
    std: trace.error_y && trace.error_y.array, symbol: trace.marker && trace.marker.symbol,
    title: front.layout.xaxis.title.text, type: front.layout.xaxis.type,
    ticks: [...front.querySelectorAll(".xtick text")].map((tick) => tick.textContent),
  }));
  const network = () => {
    const shown = [...document.querySelectorAll("article")].filter((one) => one.checkVisibility());
    return shown.map((one) => ({
      id: one.querySelector("code").textContent, text: one.textContent, choice: choice.value,
      cells: [...one.querySelectorAll("svg")].map((svg) => svg.getAttribute("aria-label")),
      chosen: front && traces().map((trace) => trace.chosen),
    }));
  };
  const mouse = (target, kind, x, y) => target.dispatchEvent(new MouseEvent(kind, {
    bubbles: true, cancelable: true, view: window, clientX: x, clientY: y }));
  const point = async (trace, index, click) => {  // moves the mouse onto a point
    const axis = trace.yaxis === "y2" ? "yaxis2" : "yaxis";
    const area = front.querySelector(`.${axis === "yaxis" ? "xy" : "xy2"} .nsewdrag`);
    const box = area.getBoundingClientRect(), { xaxis, [axis]: yaxis } = front._fullLayout;
    const x = box.left + xaxis.d2p(trace.x[index]), y = box.top + yaxis.d2p(trace.y[index]);
    mouse(area, "mousemove", x, y);
    await rest();
    if (click) {
      mouse(area, "mousedown", x, y);
      mouse(document.querySelector(".dragcover") || area, "mouseup", x, y);
      await rest();
    }
  };
  const seen = { first: network(), axes: {}, hovered: [], clicked: [], picked: [] };
  const menu = () => front.querySelector(".updatemenu-header");
  for (const place of front ? front.layout.updatemenus[0].buttons.keys() : []) {
    mouse(menu(), "click", 0, 0);  // opens the menu
    await rest();
    const button = front.querySelectorAll(".updatemenu-dropdown-button")[place];
    const name = button.textContent;
    mouse(button, "click", 0, 0);
    await new Promise((resolve) => setTimeout(resolve, 400));
    seen.axes[name] = traces();
  }
  if (front) {
    await Plotly.update(front, ...front.layout.updatemenus[0].buttons[0].args);
    await rest();
  }
  for (const trace of front ? front.data : []) {
    for (const index of trace.customdata ? trace.x.keys() : []) {
      await point(trace, index, false);
      const labels = [...front.querySelectorAll(".hoverlayer .hovertext")];
      seen.hovered.push({ panel: trace.yaxis, name: trace.name,
        label: labels.map((label) => label.textContent).join("|") });
    }
  }
  for (const [place, trace] of (front ? front.data : []).entries()) {
    if (!trace.customdata) continue;
    const before = choice.value;
    await point(front.data[place], 0, true);
    seen.clicked.push({ ...network()[0], member: trace.customdata[0], before });
  }
  for (const option of document.querySelectorAll("#choice option")) {
    choice.value = option.value;
    choice.dispatchEvent(new Event("change"));
    seen.picked.push({ ...network()[0], shown: network().length, wanted: option.textContent });
  }
  if (front) {
    await Plotly.relayout(front, { "xaxis.range[0]": 4, "xaxis.range[1]": 4.3 });
    await rest();
    seen.zoomed = traces()[0].ticks;
  }
  const growth = (document.getElementById("growth") || {}).data || [];
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
  seen.figures = [...document.querySelectorAll("[role=figure]")].map((figure) => figure.id);
  const result = document.createElement("pre");
  result.id = "probe";
  result.textContent = JSON.stringify(seen);
  document.body.append(result);
})();
