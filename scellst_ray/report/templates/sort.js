"use strict";
const body = document.querySelector("#slides tbody");
const key = (row, column) => row.cells[column].dataset.key;
const number = (text) => (text === "-" ? -Infinity : Number(text.replaceAll(",", "")));
function compare(a, b) {
  const [x, y] = [number(a), number(b)];
  return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y || 0;
}
document.querySelectorAll("#slides th").forEach((heading, column) => {
  const button = heading.querySelector("button");
  if (!button) return;
  button.addEventListener("click", () => {
    const falls = heading.getAttribute("aria-sort") === "ascending";
    document.querySelectorAll("#slides th").forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", falls ? "descending" : "ascending");
    const rows = [...body.rows].sort((a, b) => compare(key(a, column), key(b, column)));
    body.append(...(falls ? rows.reverse() : rows));
  });
});
