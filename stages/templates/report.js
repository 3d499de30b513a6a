"use strict";
(() => {
  const rows = JSON.parse(document.getElementById("data").textContent);
  const table = document.getElementById("table"), body = table.tBodies[0];
  const lines = [...body.rows], said = document.getElementById("said");
  const shown = () => [...body.rows].filter((line) => !line.hidden);

  // each key's first order; what is missing stays last
  const value = (line, key) => key === "place" ? +line.dataset.row : rows[line.dataset.row][key];
  table.tHead.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const head = button.parentElement, key = button.dataset.key;
    const up = head.getAttribute("aria-sort") !== "ascending";
    table.querySelectorAll("[aria-sort]").forEach((one) => one.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    lines.sort((a, b) => {
      const x = value(a, key), y = value(b, key);
      if (x === null || y === null) return (x === null) - (y === null);
      const order = typeof x === "string"
        ? x.localeCompare(y, undefined, { numeric: true }) : x - y;
      return up ? order : -order;
    });
    body.append(...lines);
  });

  document.getElementById("filter").addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/);
    for (const line of lines) {
      const text = line.textContent.toLowerCase();
      line.hidden = !words.every((word) => text.includes(word));
    }
    said.textContent = `${shown().length} of ${lines.length} shown`;
  });

  document.getElementById("copy").addEventListener("click", async () => {
    const text = JSON.stringify(shown().map((line) => rows[line.dataset.row]), null, 2);
    try {
      await navigator.clipboard.writeText(text);
    } catch {  // a file that is opened from a disk may not have the clipboard
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    said.textContent = `${shown().length} rows copied`;
  });

  addEventListener("beforeprint", () => {
    for (const one of document.querySelectorAll("details")) one.open = true;
  });
})();
