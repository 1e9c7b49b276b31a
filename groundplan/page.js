"use strict";
// Everything is in the page without this script; it adds sorting, and the treemap's keys and its line of text.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const body = head.closest("table").tBodies[0];
    const down = head.getAttribute("aria-sort") !== "descending";
    const at = head.cellIndex;
    const value = (row) => {
      const cell = row.cells[at];
      return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
    };
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a), y = value(b);
      const order = typeof x === "number" ? x - y : x.localeCompare(y);
      return down ? -order : order;
    });
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...rows);
  });
}
const map = document.querySelector(".treemap");
if (map) {
  const boxes = [...map.querySelectorAll("g[tabindex]")];
  const line = document.getElementById("part");
  const middle = (box) => {
    const r = box.firstElementChild;
    const n = (name) => Number(r.getAttribute(name));
    return [n("x") + n("width") / 2, n("y") + n("height") / 2];
  };
  const show = (box) => { line.textContent = box.getAttribute("aria-label"); };
  const go = (from, to) => {
    from.tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  };
  const nearest = (box, dx, dy) => {
    const [x, y] = middle(box);
    let best = null, least = Infinity;
    for (const other of boxes) {
      const [u, v] = middle(other);
      const along = (u - x) * dx + (v - y) * dy;
      const across = Math.abs((u - x) * dy) + Math.abs((v - y) * dx);
      if (along > 0.5 && along + 2 * across < least) [best, least] = [other, along + 2 * across];
    }
    return best;
  };
  const ways = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
  for (const box of boxes) {
    box.addEventListener("focus", () => show(box));
    box.addEventListener("mouseenter", () => show(box));
    box.addEventListener("keydown", (event) => {
      const to = event.key === "Home" ? boxes[0] : event.key === "End" ? boxes[boxes.length - 1]
        : ways[event.key] && nearest(box, ...ways[event.key]);
      if (!to) return;
      event.preventDefault();
      go(box, to);
    });
  }
}
// The timelines: what is there at the moment under the pointer, or at the cursor that the arrow keys move.
const report = JSON.parse(document.getElementById("report").textContent);
const written = (bytes) => {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (bytes >= size) return `${(bytes / size).toFixed(2)} ${unit}`;
  }
  return `${bytes} B`;
};
const seriesOf = (drawing) => {
  const { rank, device } = drawing.dataset;
  const of = report.ranks.find((each) => each.ranks[0] === Number(rank)) ?? report.memory;
  return of.timeline.find((each) => each.device === device);
};
for (const drawing of document.querySelectorAll("svg.timeline")) {
  const series = seriesOf(drawing);
  const line = drawing.parentNode.querySelector("output");
  const spans = [...drawing.querySelectorAll("[data-phase]")].map((each) => [Number(each.dataset.x), Number(each.dataset.width)]);
  const [left, right] = [spans[0][0], spans[spans.length - 1][0] + spans[spans.length - 1][1]];
  const [, , , height] = drawing.getAttribute("viewBox").split(" ").map(Number);
  const cursor = drawing.querySelector("line").cloneNode();
  for (const [name, value] of Object.entries({ y1: 20, y2: height - 40, class: "cursor", visibility: "hidden" })) {
    cursor.setAttribute(name, value);
  }
  drawing.append(cursor);
  drawing.setAttribute("tabindex", "0");
  let x = left;
  const show = (to) => {
    x = Math.min(Math.max(to, left), right);
    const at = Math.max(spans.findLastIndex(([start]) => start <= x), 0);
    const phase = series.phases[at];
    const moment = phase.at[0] + (x - spans[at][0]) / spans[at][1] * Math.max(phase.moments, 1);
    const place = Math.max(phase.at.findLastIndex((each) => each <= moment + 1e-6), 0);
    const held = phase.bytes.map((column) => column[place]);
    const kinds = series.kinds.map((kind, number) => [held[number], `${kind} ${written(held[number])}`]).filter(([bytes]) => bytes);
    const total = held.reduce((sum, bytes) => sum + bytes, 0);
    const reserved = phase.reserved ? `; ${written(phase.reserved[place])} reserved` : "";
    line.textContent = `${phase.phase}, moment ${phase.at[place] - phase.at[0]} of ${phase.moments}: ${written(total)}${reserved}; `
      + kinds.sort(([a], [b]) => b - a).map(([, text]) => text).join(", ");
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.setAttribute("visibility", "visible");
  };
  drawing.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect();
    show((event.clientX - box.left) / box.width * 1000);
  });
  drawing.addEventListener("keydown", (event) => {
    const step = (right - left) / (event.shiftKey ? 40 : 400);
    const to = { ArrowLeft: x - step, ArrowRight: x + step, Home: left, End: right }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    show(to);
  });
}
