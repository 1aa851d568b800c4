"use strict";
for (const table of document.querySelectorAll("table")) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      const ascending = header.getAttribute("aria-sort") !== "ascending";
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
      const body = table.tBodies[0];
      const rows = [...body.rows].map((row) => [key(row), row]);
      const numeric = rows.every(([text]) => text !== "" && !Number.isNaN(Number(text)));
      rows.sort(([a], [b]) => (numeric ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true })));
      if (!ascending) rows.reverse();
      body.append(...rows.map(([, row]) => row));
    });
  });
}
const buttons = [...document.querySelectorAll(".switch button")];
const panels = [...document.querySelectorAll(".panel")];
function show(name) {
  buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.show === name)));
  panels.forEach((panel) => (panel.hidden = panel.dataset.dataset !== name));
}
buttons.forEach((button) => button.addEventListener("click", () => show(button.dataset.show)));
if (buttons.length > 1) {
  document.querySelector(".switch").hidden = false;
  show(buttons[0].dataset.show);
}
