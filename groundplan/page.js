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
