"use strict";
// Draws the figures from the JSON block `data` (evaluation/report/figures.py says what it holds).
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const INK = "#1f2937", DIM = "#5b6472", GRID = "#e5e7eb";
  const HOVER_CHARACTERS = 46;
  const LEGEND = { orientation: "h", y: -0.22, yanchor: "top", x: 0, xanchor: "left" };
  // The buttons by name: plotly's own choice includes one that uploads the data.
  const CONFIG = {
    responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "",
    typesetMath: false,
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  };
  const touch = matchMedia("(pointer: coarse)").matches;
  const figures = { searches: byId("searches"), retrained: byId("retrained") };
  let axis = data.axes[0], shown = null; // the cost on the axes, and the number of a network

  // Plotly reads its labels as a little HTML.
  const plain = (text) =>
    text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  function wrapped(text) {
    const lines = [""];
    for (const word of text.split(" ")) {
      const last = lines.length - 1;
      if (lines[last] && lines[last].length + word.length >= HOVER_CHARACTERS) lines.push(word);
      else lines[last] += (lines[last] ? " " : "") + word;
    }
    return lines.map(plain).join("<br>    ");
  }

  function hover(number) {
    const network = data.networks[number];
    const lines = network.facts.map(([name, text]) => wrapped(`${name}: ${text}`));
    return [`<b>${wrapped(network.id)}</b>`, plain(network.group), ...lines].join("<br>");
  }

  function steps(series) {
    const corners = series.steps[axis.cost] || [];
    return {
      x: corners.map((corner) => corner[0]), y: corners.map((corner) => corner[1]),
      mode: "lines", line: { shape: "hv", color: series.colour, width: 2 },
      name: plain(series.label), legendgroup: plain(series.label), hoverinfo: "skip",
    };
  }

  function points(series) {
    const pale = "steps" in series;
    const trace = {
      x: series.costs[axis.cost], y: series.accuracy, customdata: series.networks,
      mode: "markers", name: plain(series.label), legendgroup: plain(series.label),
      hoverinfo: "text", hovertext: series.networks.map(hover), showlegend: !pale,
      hoverlabel: { bgcolor: "#fff", bordercolor: series.colour, align: "left",
        font: { color: INK, size: 12 } },
      marker: pale
        ? { color: series.colour, size: 6, opacity: 0.3 }
        : { color: series.colour, size: 10, symbol: series.symbol,
            line: { color: "#fff", width: 1 } },
    };
    if (series.deviations.length) {
      trace.error_y = { type: "data", array: series.deviations, color: series.colour,
        thickness: 1.3, width: 4 };
    }
    return trace;
  }

  function layout(panel, costs) {
    return {
      height: 450, margin: { l: 58, r: 14, t: 34, b: 56 }, font: { color: INK, size: 12 },
      paper_bgcolor: "#fff", plot_bgcolor: "#fff", hovermode: "closest",
      dragmode: touch ? false : "zoom", legend: LEGEND,
      xaxis: { type: "log", title: { text: axis.title }, tickformat: axis.format,
        ticksuffix: axis.suffix, gridcolor: GRID, zeroline: false, linecolor: DIM,
        ticks: "outside", tickcolor: DIM, ...span(costs) },
      yaxis: { tickformat: "~%", gridcolor: GRID, zeroline: false, automargin: true,
        range: panel.range || undefined, autorange: !panel.range },
      annotations: panel.note ? [{ text: panel.note, xref: "paper", yref: "paper", x: 0, y: 0,
        xanchor: "left", yanchor: "bottom", showarrow: false, font: { size: 11, color: DIM },
        bgcolor: "#fff" }] : [],
    };
  }

  // At least a factor of four, so that there is more than one tick.
  function span(costs) {
    const logs = costs.filter((cost) => cost > 0).map(Math.log10);
    if (!logs.length) return {};
    const low = Math.min(...logs), high = Math.max(...logs);
    const pad = Math.max(0.06 * (high - low), (Math.log10(4) - (high - low)) / 2);
    const range = [low - pad, high + pad];
    return { range, ...ticks(range) };
  }

  // By 1, 2, 5 up to three decades, as plotly sees fit within one.
  function ticks([low, high]) {
    if (high - low < 0.9) return { tickmode: "auto", nticks: 4 };
    return { tickmode: "linear", tick0: 0, dtick: high - low < 3.5 ? "D2" : 1 };
  }

  function zoomed(figure, change) {
    if (!Object.keys(change).some((key) => key.startsWith("xaxis.range"))) return;
    const steps = Object.entries(ticks(figure.layout.xaxis.range));
    Plotly.relayout(figure, Object.fromEntries(steps.map(([key, to]) => [`xaxis.${key}`, to])));
  }

  // Puts a ring around the network that is shown. It lies over the figure and is no part of it,
  // because a redrawn figure tells again what the mouse was on last.
  function mark(name) {
    const figure = figures[name], ring = byId(`${name}-ring`);
    const place = data[name].series
      .map((series) => [series, series.networks.indexOf(shown)])
      .findLast(([, index]) => index >= 0);
    ring.hidden = true;
    if (!place || !figure._fullLayout) return;
    const [series, index] = place, { xaxis, yaxis } = figure._fullLayout;
    const x = xaxis.d2p(series.costs[axis.cost][index]), y = yaxis.d2p(series.accuracy[index]);
    ring.hidden = !(x >= 0 && x <= xaxis._length && y >= 0 && y <= yaxis._length);
    ring.style.left = `${xaxis._offset + x}px`;
    ring.style.top = `${yaxis._offset + y}px`;
  }

  function draw() {
    for (const [name, figure] of Object.entries(figures)) {
      const panel = data[name];
      figure.hidden = !panel.series.length;
      byId(`${name}-none`).hidden = Boolean(panel.series.length);
      if (figure.hidden) continue;
      const costs = panel.series.flatMap((series) => series.costs[axis.cost]);
      const lines = panel.series.filter((series) => "steps" in series).map(steps);
      Plotly.react(figure, [...lines, ...panel.series.map(points)], layout(panel, costs), CONFIG);
    }
  }

  // Fills the panel with a network, and marks it in both figures.
  function show(number) {
    if (number === shown) return;
    shown = number;
    const network = data.networks[number];
    byId("network-id").textContent = network.id;
    byId("network-group").textContent = network.group;
    byId("network-facts").replaceChildren(...network.facts.flatMap(([name, text]) => {
      const term = document.createElement("dt"), value = document.createElement("dd");
      term.textContent = name;
      value.textContent = text;
      return [term, value];
    }));
    byId("network-cells").replaceChildren(...network.cells.map(([place, caption]) => {
      const cell = document.createElement("div"), name = document.createElement("p");
      name.textContent = caption;
      cell.append(name, byId(`cell-${place}`).querySelector("svg").cloneNode(true));
      return cell;
    }));
    byId("network-choice").value = number < data.members ? String(number) : "";
    Object.keys(figures).forEach(mark);
  }

  function axisButtons() {
    for (const one of data.axes) {
      const label = document.createElement("label"), button = document.createElement("input");
      Object.assign(button, { type: "radio", name: "cost", value: one.cost,
        checked: one === axis });
      button.addEventListener("change", () => { axis = one; draw(); });
      label.append(button, document.createElement("span"));
      label.lastChild.textContent = one.name;
      byId("axes").append(label);
    }
  }

  function networkChoice() {
    const choice = byId("network-choice");
    choice.append(new Option("a point of the search", "", false, false));
    choice.firstChild.hidden = true;
    let group = null;
    data.networks.slice(0, data.members).forEach((network, number) => {
      if (!group || group.label !== network.group) {
        group = document.createElement("optgroup");
        group.label = network.group;
        choice.append(group);
      }
      group.append(new Option(`${network.id}, ${network.facts[0][1]} params`, String(number)));
    });
    choice.addEventListener("change", () => show(Number(choice.value)));
  }

  function growth() {
    if (!data.growth.length) return;
    byId("growth-part").hidden = false;
    const lines = data.growth.map((series) => ({
      x: series.shares.map((_, index) => index + 1), y: series.shares, mode: "lines",
      line: { shape: "hv", color: series.colour, width: 2 }, name: plain(series.label),
    }));
    Plotly.newPlot(byId("growth"), lines, {
      height: 350, margin: { l: 58, r: 14, t: 34, b: 56 }, font: { color: INK, size: 12 },
      paper_bgcolor: "#fff", plot_bgcolor: "#fff", hovermode: "x unified",
      dragmode: touch ? false : "zoom", showlegend: true, legend: { ...LEGEND, y: -0.28 },
      hoverlabel: { namelength: -1 },
      xaxis: { title: { text: "evaluated networks" }, gridcolor: GRID, zeroline: false,
        linecolor: DIM, rangemode: "tozero" },
      yaxis: { tickformat: "~%", hoverformat: ".2%", gridcolor: GRID, zeroline: false,
        automargin: true },
    }, CONFIG);
  }

  byId("interactive").hidden = false;
  axisButtons();
  draw();
  for (const [name, figure] of Object.entries(figures)) {
    if (!figure.data) continue;
    for (const event of ["plotly_hover", "plotly_click"]) {
      figure.on(event, ({ points }) => show(points[0].customdata));
    }
    for (const event of ["plotly_afterplot", "plotly_relayouting"]) {
      figure.on(event, () => mark(name));
    }
    figure.on("plotly_relayout", (change) => zoomed(figure, change));
  }
  if (data.networks.length) {
    byId("network").hidden = false;
    networkChoice();
    show(data.first);
  }
  growth();
})();
