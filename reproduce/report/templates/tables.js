// Sorting: a click on a head sorts by it, another turns it round, a third restores the order.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];

  function value(row, column) {
    const text = row.cells[column].dataset.sort;
    if (text === undefined) return null;
    if (!heads[column].classList.contains("number")) return isFigure(column) ? Number(text) : text;
    return Number(text);
  }

  // Figures among words (the length of a bar) are sorted as figures.
  function isFigure(column) {
    return original.every((row) => {
      const text = row.cells[column].dataset.sort;
      return text === undefined || (text !== "" && Number.isFinite(Number(text)));
    });
  }

  function compare(one, two) {
    if (typeof one === "number" && typeof two === "number") return one - two;
    return String(one).localeCompare(String(two), "en", { numeric: true });
  }

  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const numeric = head.classList.contains("number");
      const cycle = numeric ? ["descending", "ascending", "none"] : ["ascending", "descending", "none"];
      const before = head.getAttribute("aria-sort");
      const order = cycle[(cycle.indexOf(before) + 1) % cycle.length];
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", order);
      const rows = [...original];
      if (order !== "none") {
        const sign = order === "ascending" ? 1 : -1;
        rows.sort((first, second) => {
          const one = value(first, column);
          const two = value(second, column);
          if (one === null || two === null) return (one === null) - (two === null);
          return sign * compare(one, two);
        });
      }
      table.classList.toggle("unsorted", order === "none");
      body.append(...rows);
    });
  });
}

// A link to where a number comes from opens what is folded around its target.
function unfold() {
  const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let node = target; node; node = node.parentElement) {
    if (node.tagName === "DETAILS") node.open = true;
  }
}
addEventListener("hashchange", unfold);
unfold();
