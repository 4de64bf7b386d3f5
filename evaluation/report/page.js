"use strict";
// Draws the figures that the page holds as JSON; a member that is clicked or chosen is shown below.
(() => {
  const byId = (id) => document.getElementById(id);
  const front = byId("front"), choice = byId("choice");
  byId("interactive").hidden = false;
  for (const [id, figure] of Object.entries(JSON.parse(byId("data").textContent))) {
    if (matchMedia("(pointer: coarse)").matches) figure.layout.dragmode = false; // a finger scrolls
    Plotly.newPlot(id, figure);
  }

  function show() {
    for (const network of document.querySelectorAll("article")) {
      network.hidden = network.id !== `network-${choice.value}`;
      for (const place of network.hidden ? [] : network.querySelectorAll("[data-cell]:empty")) {
        place.append(byId(place.dataset.cell).querySelector("svg").cloneNode(true));
      }
    }
    const chosen = ({ customdata }) => customdata && [customdata.indexOf(Number(choice.value))];
    if (front) Plotly.restyle(front, { selectedpoints: front.data.map(chosen) });
  }

  if (!choice) return;
  choice.addEventListener("change", show);
  front?.on("plotly_click", ({ points: [{ customdata }] }) => {
    if (customdata == null) return; // no member
    choice.value = customdata;
    show();
  });
  show();
})();
