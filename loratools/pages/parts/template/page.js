"use strict";
// Tables sort by a click on a heading and are filtered by a text box. Without this script they are plain tables.
for (const table of document.querySelectorAll("main table")) {
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const heads = Array.from(table.tHead.rows[0].cells);
  const texts = rows.map((row) => Array.from(row.cells, (cell) => cell.textContent.toLowerCase()).join("\n"));
  const count = table.caption.querySelector(".count");

  const valueOf = (row, column) => {
    const cell = row.cells[column];
    if ("value" in cell.dataset) return Number(cell.dataset.value);
    const text = cell.textContent;
    return text === "–" ? null : text;
  };
  const order = new Intl.Collator("en", { numeric: true });
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : order.compare(a, b));

  const sort = (column) => {
    const falling = heads[column].getAttribute("aria-sort") === "ascending";
    heads.forEach((head) => head.setAttribute("aria-sort", "none"));
    heads[column].setAttribute("aria-sort", falling ? "descending" : "ascending");
    const keyed = Array.from(body.rows, (row) => [valueOf(row, column), row]);
    // Rows without a value come last in either direction.
    keyed.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : falling ? compare(b, a) : compare(a, b)));
    const sorted = document.createDocumentFragment();
    for (const [, row] of keyed) sorted.append(row);
    body.append(sorted);
  };

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.addEventListener("click", () => sort(column));
    head.replaceChildren(button);
    head.setAttribute("aria-sort", "none");
  });

  if (rows.length > 1) {
    const filter = document.createElement("input");
    filter.type = "search";
    filter.className = "filter";
    filter.placeholder = "Filter";
    filter.setAttribute("aria-label", "Filter rows: " + table.caption.firstChild.textContent.trim());
    filter.addEventListener("input", () => {
      const wanted = filter.value.trim().toLowerCase().split(/\s+/);
      let shown = 0;
      rows.forEach((row, i) => {
        row.hidden = !wanted.every((word) => texts[i].includes(word));
        shown += row.hidden ? 0 : 1;
      });
      count.textContent = shown === rows.length ? rows.length.toLocaleString("en") : `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
    });
    table.parentElement.prepend(filter);
  }
}
